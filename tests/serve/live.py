"""A server of the tests: a service on a free port of the loopback, in a thread, and the clients
that ask it.
"""

from __future__ import annotations

import asyncio
import base64
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
from PIL import Image
from support.tiny_runs import IMAGES

from ernie_tune.generate.engine import Engine, Request
from ernie_tune.serve.options import ServeOptions
from ernie_tune.serve.server import Server, server
from ernie_tune.serve.service import Service

DIGIT, OTHER = IMAGES / "0003.png", IMAGES / "0008.png"


class Live:
    """A running server. `url` ends in /v1."""

    def __init__(self, service: Service, serving: Server, thread: threading.Thread, port: int) -> None:
        self.service, self.server, self.thread, self.port = service, serving, thread, port
        self.root = f"http://127.0.0.1:{port}"

    def client(self, key: str = "none", **options: Any) -> openai.OpenAI:
        settings: dict[str, Any] = {"max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=f"{self.root}/v1", api_key=key, **settings)

    def drain(self) -> None:
        assert self.server._loop is not None
        self.server._loop.call_soon_threadsafe(self.server.drain)


@contextmanager
def live(engine: Engine, models: dict[str, str | None] | None = None, **options: Any) -> Iterator[Live]:
    service = Service(engine, models or {"ernie": None}, ServeOptions(**options))
    serving = server(service, "127.0.0.1", 0)
    ready, port = threading.Event(), []
    serving.on_ready = lambda address: (port.append(address[1]), ready.set())  # type: ignore[func-returns-value]
    thread = threading.Thread(target=lambda: asyncio.run(serving.serve()), daemon=True)
    thread.start()
    try:
        assert ready.wait(30), "the server did not start"
        yield Live(service, serving, thread, port[0])
    finally:
        serving.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "the server did not end"


def data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image_part(path: Path) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(path, "image/png")}}


def video_part(path: Path, kind: str = "image/gif") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": data_url(path, kind)}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def until(true: Callable[[], object], seconds: float = 30) -> None:
    """Wait for it; AssertionError when it takes too long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def clip(folder: Path) -> Path:
    """Four frames of noise."""
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)) for _ in range(4)]
    frames[0].save(folder / "clip.gif", save_all=True, append_images=frames[1:], duration=500)
    return folder / "clip.gif"


CASES = ("text", "dialogue", "image", "two_images", "video")


def cases(video: Path) -> dict[str, tuple[list[dict[str, Any]], Request]]:
    """name -> (messages as a client writes them, the same as chat asks the engine)."""

    def ours(text: str, **media: Any) -> Request:
        return Request([{"role": "user", "content": text}], **media)

    def theirs(*content: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": list(content)}]

    dialogue = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    return {
        "text": ([{"role": "user", "content": "why 九"}], ours("why 九")),
        "dialogue": (dialogue, Request(dialogue)),
        "image": (theirs(image_part(DIGIT), text_part("read")), ours("<image>read", images=[str(DIGIT)])),
        "two_images": (
            theirs(text_part("a"), image_part(DIGIT), image_part(OTHER), text_part("same?")),
            ours("a<image><image>same?", images=[str(DIGIT), str(OTHER)]),
        ),
        "video": (theirs(video_part(video), text_part("what?")), ours("<video>what?", videos=[str(video)])),
    }


CASES = ("text", "dialogue", "image", "two_images", "video")

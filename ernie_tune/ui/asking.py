"""Models that answer: each behind a server of its own, a child process that speaks OpenAI's API on
this machine alone, and the small client for it.

A studio holds no model itself, so it stays light, a model that dies takes nothing along, and two
can answer side by side. Refuses to know: pages, how answers are made.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import mimetypes
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_tune.config.language import VARIABLE, halves, say
from ernie_tune.data.records import IMAGE_TAG, TAG
from ernie_tune.ui.jobs import RUNNING, ChildJob, Jobs

KIND, SERVED = "ask", "serve"
MOST = 2  # servers at once
_READY_SECONDS = 300.0
_ANSWER_SECONDS = 600.0


@dataclass
class ModelServer:
    """A model's server. `key`: known to this studio alone; `asking`: how many need it now."""

    model: str
    job: ChildJob
    port: int
    key: str = field(repr=False)
    used: float = field(default_factory=time.monotonic)
    ready: bool = False
    asking: int = 0


class ModelServers:
    """The models that answer now. One that nobody asks goes when another is wanted; they end with
    this process, however it ends.
    """

    def __init__(self, jobs: Jobs, root: Path) -> None:
        self.jobs, self.root = jobs, root
        self.running: dict[str, ModelServer] = {}
        self.served: dict[str, ModelServer] = {}  # by job; those that people asked for
        self._lock = threading.Lock()  # of `running`: tabs and judges ask at the same time

    @contextlib.contextmanager
    def asked(self, model: str) -> Iterator[ModelServer]:
        """The server of a model (a folder, or a name that `serve` knows), started if need be and
        ready, kept as long as it is asked. Raises ValueError where it does not come up, and where
        as many others as may run are being asked.
        """
        with self._lock:
            server = self._of(model)
            server.asking += 1
        try:
            self.wait(server)
            yield server
        finally:
            with self._lock:
                server.asking -= 1
                server.used = time.monotonic()

    def _of(self, model: str) -> ModelServer:
        server = self.running.get(model)
        if server is not None and self.jobs.state(server.job) == RUNNING:
            return server
        others = [s for name, s in self.running.items() if name != model and self.jobs.state(s.job) == RUNNING]
        if len(others) >= MOST:
            idle = sorted((s for s in others if not s.asking), key=lambda s: s.used)
            if not idle:
                raise ValueError(
                    say(
                        f"models that answer ({len(others)}) must be fewer than {MOST + 1}; wait until one of them is done",
                        f"正在回答的模型（{len(others)} 个）不得超过 {MOST} 个；请等其中一个答完",
                    )
                )
            self.jobs.kill(self.running.pop(idle[0].model).job)
        self.running[model] = self._started(KIND, model, model, tied=True)
        return self.running[model]

    def serve(self, model: str, title: str) -> ModelServer:
        """A server of its own for others to ask; it goes on when this process ends."""
        server = self._started(SERVED, model, title, tied=False)
        self.served[server.job.id] = server
        return server

    def _started(self, kind: str, model: str, title: str, tied: bool) -> ModelServer:
        port, key = free_port(), secrets.token_urlsafe(24)
        words = ["serve", model, "--host", "127.0.0.1", "--port", str(port), "--served_model_name", "model"]
        # both languages: whoever asks it later reads one of them
        environ = {"ERNIE_TUNE_API_KEY": key, VARIABLE: "both"}
        job = self.jobs.start(kind, title, words, self.root, environ, tied=tied)
        return ModelServer(model, job, port, key)

    def is_ready(self, server: ModelServer) -> bool:
        """Whether it answers now."""
        if not server.ready:
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.ready = request(server, "GET", "/health").status == 200
        return server.ready

    def wait(self, server: ModelServer, seconds: float = _READY_SECONDS) -> None:
        """Until it answers. Raises ValueError with the end of its output where it has died."""
        end = time.monotonic() + seconds
        while not self.is_ready(server):
            if self.jobs.state(server.job) != RUNNING or time.monotonic() > end:
                last = [line for line in self.jobs.output(server.job).splitlines() if line.strip()][-3:]
                raise ValueError(
                    say(
                        "{model} must come up, but says: {why}",
                        "{model} 未能启动，输出为：{why}",
                        model=server.model,
                        why=halves("\n".join(last)) if last else "–",
                    )
                )
            time.sleep(0.1)

    def close(self) -> None:
        """End them all."""
        with self._lock:
            for server in self.running.values():
                self.jobs.kill(server.job)
            self.running.clear()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def request(server: ModelServer, method: str, path: str, body: Any = None) -> http.client.HTTPResponse:
    """One request; the response is open. Raises OSError and HTTPException as they come."""
    line = http.client.HTTPConnection("127.0.0.1", server.port, timeout=_ANSWER_SECONDS)
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    line.request(method, path, data, headers)
    return line.getresponse()


def asked_body(messages: Sequence[Mapping[str, Any]], images: Sequence[str | bytes], **sampling: Any) -> dict[str, Any]:
    """The body of /v1/chat/completions for messages with `<image>` tags and the files of their
    pictures. Raises ValueError where tags and pictures differ in number, OSError for a file that
    cannot be read.
    """
    left = list(images)
    turns = []
    for message in messages:
        parts: list[dict[str, Any]] = []
        for piece in _pieces(str(message.get("content") or "")):
            if piece == IMAGE_TAG and left:
                parts.append({"type": "image_url", "image_url": {"url": data_url(left.pop(0))}})
            elif piece == IMAGE_TAG:
                raise _counts(messages, images)
            elif piece:
                parts.append({"type": "text", "text": piece})
        plain = len(parts) == 1 and parts[0]["type"] == "text"
        turns.append({"role": message["role"], "content": parts[0]["text"] if plain else parts or ""})
    if left:
        raise _counts(messages, images)
    return {"model": "model", "messages": turns, **sampling}


def _pieces(text: str) -> Iterator[str]:
    end = 0
    for tag in TAG.finditer(text):
        yield text[end : tag.start()]
        yield tag[0]
        end = tag.end()
    yield text[end:]


def _counts(messages: Sequence[Mapping[str, Any]], images: Sequence[Any]) -> ValueError:
    tags = sum(str(m.get("content") or "").count(IMAGE_TAG) for m in messages)
    return ValueError(
        say(
            f"<image> tags ({tags}) must be as many as pictures ({len(images)}); add or remove some",
            f"<image> 标记（{tags}）须与图片（{len(images)}）一样多；请增减",
        )
    )


def data_url(image: str | bytes) -> str:
    """A picture as it travels in a request."""
    if isinstance(image, str) and image.startswith("data:"):
        return image
    kind = mimetypes.guess_type(image)[0] if isinstance(image, str) else None
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    return f"data:{kind or 'image/png'};base64,{base64.b64encode(data).decode()}"


def answers(server: ModelServer, body: Mapping[str, Any]) -> list[str]:
    """The whole answers to a request, `n` of them. Raises ValueError with what the server says."""
    with _spoken(server, {**body, "stream": False}) as response:
        found = json.loads(response.read())
    return [choice["message"]["content"] or "" for choice in found["choices"]]


def stream(server: ModelServer, body: Mapping[str, Any]) -> Iterator[str]:
    """The answer so far, again and again as it grows."""
    text = ""
    with _spoken(server, {**body, "stream": True}) as response:
        for raw in response:
            line = raw.decode("utf-8", "replace").strip()
            if not line.startswith("data:") or line == "data: [DONE]":
                continue
            found = json.loads(line[5:])
            if "error" in found:
                raise ValueError(halves(str(found["error"].get("message", found["error"]))))
            text += "".join(choice["delta"].get("content") or "" for choice in found.get("choices", ()))
            yield text


@contextlib.contextmanager
def _spoken(server: ModelServer, body: Mapping[str, Any]) -> Iterator[http.client.HTTPResponse]:
    try:
        response = request(server, "POST", "/v1/chat/completions", body)
        with response:
            if response.status != 200:
                said = response.read().decode("utf-8", "replace")
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    said = json.loads(said)["error"]["message"]
                raise ValueError(halves(said))
            yield response
    except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
        raise ValueError(
            say(
                "{model} has stopped answering ({why})",
                "{model} 停止了回答（{why}）",
                model=server.model,
                why=repr(error),
            )
        ) from error

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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.data.records import IMAGE_TAG, TAG
from ernie_tune.ui.jobs import RUNNING, ChildJob, Jobs

KIND = "ask"
MOST = 2  # servers at once
_READY_SECONDS = 300.0
_ANSWER_SECONDS = 600.0


@dataclass
class ModelServer:
    """A model's server. `key`: known to this studio alone."""

    model: str
    job: ChildJob
    port: int
    key: str = field(repr=False)
    used: float = field(default_factory=time.monotonic)
    ready: bool = False


class ModelServers:
    """The models that answer now; the one that was asked least recently goes when there are too
    many.
    """

    def __init__(self, jobs: Jobs, root: Path) -> None:
        self.jobs, self.root = jobs, root
        self.running: dict[str, ModelServer] = {}
        for job in jobs.all():  # of an earlier studio; their keys are gone with it
            if job.kind == KIND:
                jobs.kill(job)

    def of(self, model: Path) -> ModelServer:
        """The server of a model, started if need be; it may not be ready yet."""
        name = str(model)
        server = self.running.get(name)
        if server is not None and self.jobs.state(server.job) != RUNNING:
            server = None
        if server is None:
            others = sorted((s for n, s in self.running.items() if n != name), key=lambda s: s.used)
            for old in others[: max(0, len(others) - MOST + 1)]:
                self.jobs.kill(self.running.pop(old.model).job)
            port, key = free_port(), secrets.token_urlsafe(24)
            words = ["serve", name, "--host", "127.0.0.1", "--port", str(port), "--served_model_name", "model"]
            job = self.jobs.start(KIND, name, words, self.root, {"ERNIE_TUNE_API_KEY": key})
            server = self.running[name] = ModelServer(name, job, port, key)
        server.used = time.monotonic()
        return server

    def wait(self, server: ModelServer, seconds: float = _READY_SECONDS) -> None:
        """Until it answers. Raises ValueError with the end of its output where it has died."""
        end = time.monotonic() + seconds
        while not server.ready:
            with contextlib.suppress(OSError, http.client.HTTPException):
                server.ready = request(server, "GET", "/health").status == 200
            if server.ready:
                return
            if self.jobs.state(server.job) != RUNNING or time.monotonic() > end:
                last = [line for line in self.jobs.output(server.job).splitlines() if line.strip()][-3:]
                raise ValueError(
                    say(
                        "{model} must come up, but says: {why}",
                        "{model} 未能启动，输出为：{why}",
                        model=server.model,
                        why=" ".join(last) or "nothing",
                    )
                )
            time.sleep(0.1)

    def close(self) -> None:
        """End them all."""
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
                raise ValueError(str(found["error"].get("message", found["error"])))
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
                raise ValueError(said)
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

"""What every request passes before the application sees it: the name by which it calls the server,
shutdown, key, number of requests in the house, kind, size and speed of the body, total time.

Refuses before anything of the body is read. An ASGI middleware; refuses to know: what requests
mean.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException

from ernie_tune.config.language import say
from ernie_tune.serve.errors import ApiError
from ernie_tune.serve.metrics import Metrics
from ernie_tune.serve.options import ServeOptions
from ernie_tune.serve.replies import dumps, error, sse

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

RETRY_AFTER_SECONDS = 1
_LAST_WORD_SECONDS = 5.0  # to tell a client that its time is over
_OPEN = ("/", "/health")  # need no key
_KNOWN = (
    "/",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/models",
    "/health",
    "/metrics",
    "/openapi.json",
)


class Gate:
    """Wraps the application. `draining` set: only what is inside goes on."""

    def __init__(self, app: App, options: ServeOptions, metrics: Metrics) -> None:
        self.app, self.options, self.metrics = app, options, metrics
        self.inside = 0
        self.bytes_inside = 0  # of all bodies that are read or being read
        self.draining = self.given_up = False
        self._tasks: set[asyncio.Task[Any]] = set()  # of the requests inside
        self.empty = asyncio.Event()
        self.empty.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        reply, started = _Reply(send), time.monotonic()
        try:
            await self._pass(scope, receive, reply)
        except ApiError as problem:
            await reply.refuse(problem)
        finally:
            path = scope["path"] if scope["path"] in _KNOWN else "other"
            self.metrics.requests.add(1, path, str(reply.status or 499))
            if self.options.log_requests:
                print(_line(scope, reply.status or 499, time.monotonic() - started), file=sys.stderr, flush=True)

    async def _pass(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        self._check_host(headers)
        if scope["path"] not in _OPEN:
            self._check_key(headers)
        if not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, reply.send)
            return
        if self.draining:
            raise ApiError(
                503,
                say("the server is shutting down; ask another one", "服务器正在关闭；请使用其他服务器"),
                "server_error",
                "shutting_down",
            )
        if scope["method"] != "POST":
            await self.app(scope, receive, reply.send)
            return
        self._check_body(headers)
        if self.inside >= self.options.max_concurrency:
            raise ApiError(
                429, _busy("requests", self.options.max_concurrency), "rate_limit_error", "rate_limit_exceeded"
            )
        started = time.monotonic()
        self.inside += 1
        self.empty.clear()
        body, task = _Body(receive, self), asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        reply.on_first_part = lambda: self.metrics.first_token.observe(time.monotonic() - started)
        try:
            work = self.app(scope, body.receive, reply.send)
            await asyncio.wait_for(work, self.options.request_timeout_seconds)
        except asyncio.TimeoutError:
            seconds = self.options.request_timeout_seconds
            raise ApiError(
                504,
                say(
                    f"the answer must be complete after {seconds:g} seconds; lower max_tokens",
                    f"回答须在 {seconds:g} 秒内完成；请减小 max_tokens",
                ),
                "timeout_error",
                "timeout",
            ) from None
        except asyncio.CancelledError:
            if not self.given_up:
                raise
            raise ApiError(
                503,
                say(
                    "the server has ended before the answer; ask another one",
                    "服务器在回答之前已结束；请使用其他服务器",
                ),
                "server_error",
                "shutting_down",
            ) from None
        finally:
            self._tasks.discard(task)
            self.inside -= 1
            self.bytes_inside -= body.seen
            if not self.inside:
                self.empty.set()
            self.metrics.whole.observe(time.monotonic() - started)

    def give_up(self) -> None:
        """End what is inside: its clients are told."""
        self.given_up = True
        for task in self._tasks:
            task.cancel()

    def _check_host(self, headers: Mapping[bytes, bytes]) -> None:
        """Under a foreign name a page of the web would read answers as its own: names can be led to
        any address.
        """
        given = headers.get(b"host")
        name = None if given is None else _host_name(given.decode("latin-1"))
        if name is None or name in self.options.host_names or _is_loopback(name):
            return
        if not (self.options.any_address and _is_address(name)):
            raise ApiError(
                400,
                say(
                    f"host ({name[:100]!r}) must be a name of this server; use its address, "
                    "or let the operator add the name to allow_hosts",
                    f"主机名（{name[:100]!r}）须为本服务器的名称；请用其地址，或请管理员将该名称加入 allow_hosts",
                ),
                code="unknown_host",
            )

    def _check_key(self, headers: Mapping[bytes, bytes]) -> None:
        keys = self.options.api_keys
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        # All keys are compared, whichever fits, in the same time.
        fits = sum(hmac.compare_digest(given, key.encode()) for key in keys)
        if keys and not (fits and scheme.lower() == b"bearer"):
            raise ApiError(
                401,
                say(
                    "the request must bear a valid key; send the header Authorization: Bearer KEY",
                    "请求须带有效的密钥；请发送请求头 Authorization: Bearer KEY",
                ),
                "authentication_error",
                "invalid_api_key",
            )

    def _check_body(self, headers: Mapping[bytes, bytes]) -> None:
        # Any other kind, or none, a page of the web may send to a server of its reader's machine
        # unasked.
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json" and not (kind.startswith(b"application/") and kind.endswith(b"+json")):
            raise ApiError(
                400,
                say(
                    "the header Content-Type must be application/json; send it with the body",
                    "请求头 Content-Type 须为 application/json；请随请求体发送",
                ),
            )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.options.max_body_bytes:
            raise ApiError(413, _too_large(self.options.max_body_bytes), code="request_too_large")


def _host_name(host: str) -> str:
    """Of a Host header, without the port and the brackets of IPv6, in lower case."""
    host = host.strip().lower()
    name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    return name.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_loopback(name: str) -> bool:
    return (
        name == "localhost"
        or name.endswith(".localhost")
        or (_is_address(name) and ipaddress.ip_address(name).is_loopback)
    )


def _line(scope: Scope, status: int, seconds: float) -> str:
    """One line of the log; nothing in it that a client could make look like another."""
    ticket = scope.get("state", {}).get("ticket")
    tokens = f" {ticket.model} {ticket.prompt_tokens}+{ticket.answer_tokens} tokens" if ticket is not None else ""
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
    path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in path)
    client = (scope.get("client") or ("-",))[0]
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"ernie_tune: {now} {client} {scope['method']} {path} {status} {seconds:.3f} s{tokens}"


def _too_large(limit: int) -> str:
    return say(
        f"the body must be at most {limit} bytes; send smaller or fewer pictures",
        f"请求体至多 {limit} 字节；请减少图片的大小或数量",
    )


def _busy(what: str, limit: int) -> str:
    return say(
        f"the server is busy: {what} in progress must stay below {limit}; try again soon",
        f"服务器繁忙：进行中的 {what} 须少于 {limit}；请稍后重试",
    )


class _Body:
    """A body as it comes, with or without its length: counted, and waited for only so long."""

    def __init__(self, receive: Receive, gate: Gate) -> None:
        self._receive, self._gate = receive, gate
        self.seen = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:  # what is left to come is the client's leaving
            return await self._receive()
        options = self._gate.options
        try:
            message = await asyncio.wait_for(self._receive(), options.body_timeout_seconds)
        except asyncio.TimeoutError:
            raise HTTPException(
                408,
                say(
                    f"the body must not pause for {options.body_timeout_seconds:g} seconds",
                    f"请求体不能停顿 {options.body_timeout_seconds:g} 秒",
                ),
            ) from None
        self._complete = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self.seen += size
        self._gate.bytes_inside += size
        if self.seen > options.max_body_bytes:
            raise HTTPException(413, _too_large(options.max_body_bytes))
        if self._gate.bytes_inside > options.max_pending_bytes:
            raise HTTPException(
                429, _busy("bytes of requests", options.max_pending_bytes), {"Retry-After": str(RETRY_AFTER_SECONDS)}
            )
        return message


class _Reply:
    """Knows what of the answer is out."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status = 0
        self._streams = self._over = False
        self.on_first_part: Callable[[], None] | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = dict(message.get("headers", ()))
            self._streams = headers.get(b"content-type", b"").startswith(b"text/event-stream")
        elif message["type"] == "http.response.body":
            self._over = not message.get("more_body", False)
            if self.on_first_part and message.get("body") and self.status == 200:
                self.on_first_part()
                self.on_first_part = None
        await self._send(message)

    async def refuse(self, problem: ApiError) -> None:
        """An answer where none has begun; in a stream, its last event; else the connection just
        ends.
        """
        if self._over:
            return
        try:
            await asyncio.wait_for(self._refuse(problem), _LAST_WORD_SECONDS)
        except asyncio.TimeoutError:
            return

    async def _refuse(self, problem: ApiError) -> None:
        if self.status:
            if self._streams:
                await self._send({"type": "http.response.body", "body": sse(error(problem)), "more_body": False})
            return
        body = dumps(error(problem))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if problem.status in (429, 503):
            headers.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
        if problem.status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await self.send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

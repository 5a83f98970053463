"""What every request to a studio passes: the name by which it is called, the page it comes from,
the key where one is set, files that only were sent; and what the browser is told about the page.

An ASGI middleware, for websockets too. Refuses to know: gradio, what requests mean.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from ernie_tune.config.language import Text, in_language, say

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("localhost", "127.0.0.1", "::1")
COOKIE = "ernie_tune_ui_key_"  # and what tells one key from another
_LARGEST_BYTES = 64 << 20
# Nothing from elsewhere: gradio's page would fetch fonts and scripts of its makers.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
    "'unsafe-inline'; img-src 'self' data: blob:; connect-src 'self' ws: wss: data: blob:; frame-ancestors 'none'; "
    "base-uri 'self'; form-action 'self'"
)
_HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
)


class StudioGate:
    """`hosts`: names by which the studio may be called; empty: any (only with a key). `key`: ""
    where everyone of this machine may look. A key comes once as `?key=`; what stays, in a cookie
    that scripts cannot read, is made of it: keys hold signs that cookies cannot. `sent`: the folder
    of what browsers have sent; a request that names a file anywhere else as if it had been sent is
    refused, for the page's server would read it.
    """

    def __init__(self, app: App, hosts: tuple[str, ...] = LOOPBACK, key: str = "", sent: Path | None = None) -> None:
        self.app, self.hosts, self.key, self.sent = app, hosts, os.fsencode(key), sent
        # a cookie goes to every port of a host: each key has its own, so that two studios do not
        # take each other's
        self.cookie = COOKIE + hashlib.sha256(b"name" + self.key).hexdigest()[:12]
        self.token = hashlib.sha256(b"studio" + self.key).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        origin = headers.get("origin", "")
        if self.hosts and _name(f"//{host}") not in self.hosts:
            return await _refuse(
                headers,
                scope,
                send,
                421,
                say(
                    "this studio is not called so; open it under the address that it printed",
                    "此工作室不叫这个名称；请用启动时打印的地址打开",
                ),
            )
        if origin and urlsplit(origin).netloc != host:
            told = say("another page must not drive this studio", "其他网页不得操作此工作室")
            return await _refuse(headers, scope, send, 403, told)
        if not self.key or self._knows(headers):
            if self.sent is not None and scope["type"] == "http" and _holds_events(scope, headers):
                body = await _body(receive)
                if body is None or _foreign(body, self.sent):
                    told = say("the file must be sent with the page; send it again", "文件须由页面上传；请重新上传")
                    return await _refuse(headers, scope, send, 403, told)
                receive = _again(body, receive)
            return await self.app(scope, receive, self._told(send))
        if scope["type"] == "http" and scope["method"] == "GET" and self._is_given(scope.get("query_string", b"")):
            cookie = f"{self.cookie}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            return await _answer(send, 303, b"", ((b"location", b"/"), (b"set-cookie", cookie.encode())))
        told = say(
            "this studio asks for a key: open the address with ?key= that it printed",
            "此工作室需要密钥：请打开启动时打印的带 ?key= 的地址",
        )
        await _refuse(headers, scope, send, 401, told)

    def _knows(self, headers: dict[str, str]) -> bool:
        try:
            found = SimpleCookie(headers.get("cookie", "")).get(self.cookie)
        except CookieError:
            return False
        return found is not None and hmac.compare_digest(found.value.encode(), self.token.encode())

    def _is_given(self, query: bytes) -> bool:
        """Whether the key is in an address: as the printed link has it, or as people type it, with
        its own + and &.
        """
        text = query.decode("latin-1")
        typed = text[4:] if text.startswith("key=") else ""
        read = (unquote(typed, errors="surrogateescape"), *parse_qs(text, errors="surrogateescape").get("key", [])[:1])
        return sum(hmac.compare_digest(key.encode("utf-8", "surrogateescape"), self.key) for key in read) > 0

    def _told(self, send: Send) -> Send:
        async def tell(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *_HEADERS]}
            await send(message)

        return tell


def _holds_events(scope: Scope, headers: dict[str, str]) -> bool:
    """Whether a request's body is what a page says; not files, which the server takes apart."""
    return scope["method"] not in ("GET", "HEAD", "OPTIONS") and not headers.get("content-type", "").startswith(
        "multipart/form-data"
    )


async def _body(receive: Receive) -> bytes | None:
    """All of it; None for one that is cut off, or larger than any page's."""
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > _LARGEST_BYTES:
            return None
        parts.append(part)
        more = message.get("more_body", False)
    return b"".join(parts)


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read once more, then whatever comes."""
    left = [body]

    async def give() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return give


def _foreign(body: bytes, sent: Path) -> bool:
    """Whether a body names a file outside `sent` as one that was sent."""
    try:
        waiting = [json.loads(body)] if body.strip() else []
    except (ValueError, RecursionError):
        return True
    while waiting:
        value = waiting.pop()
        if isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += value.values()
            path = value.get("path")
            named = "meta" in value or "orig_name" in value
            if named and isinstance(path, str) and not _inside(path, sent):
                return True
    return False


def _inside(path: str, folder: Path) -> bool:
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except ValueError:  # a zero in its name
        return False


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


async def _refuse(headers: dict[str, str], scope: Scope, send: Send, status: int, why: Text) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    tongue = "zh" if headers.get("accept-language", "").lower().startswith("zh") else "en"
    await _answer(
        send, status, f"{in_language(why, tongue)}\n".encode(), ((b"content-type", b"text/plain; charset=utf-8"),)
    )


async def _answer(send: Send, status: int, body: bytes, headers: tuple[tuple[bytes, bytes], ...]) -> None:
    start = [*headers, (b"content-length", str(len(body)).encode()), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": start})
    await send({"type": "http.response.body", "body": body})

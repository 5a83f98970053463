"""The connections of a server: how many may be open, how long each may be silent, and how long it
may leave its answer unread. Needs the extra `serve`.

A full house lets go of the connection that has been silent for longest, so nobody who only holds
connections open can keep others out. Refuses to know: requests.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from ernie_tune.serve.errors import ApiError
from ernie_tune.serve.replies import dumps, error

RESERVED_FILES = 128  # of the process's limit: for sockets of downloads, weights, logs
_WANTED_FILES = 65_536
_REPEAT_SECONDS = 60.0


class Connections:
    """All open connections of one server, and the silent ones in the order in which they fell
    silent.
    """

    def __init__(self, most: int, head_seconds: float, write_seconds: float) -> None:
        """`head_seconds`: for the head of a request to arrive. `write_seconds`: until what waits
        for a client is read.
        """
        self.most, self.head_seconds, self.write_seconds = most, head_seconds, write_seconds
        self._open: set[Connection] = set()
        self._silent: dict[Connection, None] = {}

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, one: Connection) -> bool:
        """False where all others are busy, too."""
        if len(self._open) >= self.most:
            oldest = next(iter(self._silent), None)
            if oldest is None:
                return False
            self.leave(oldest)
            oldest.transport.abort()
        self._open.add(one)
        return True

    def leave(self, one: Connection) -> None:
        self._open.discard(one)
        self._silent.pop(one, None)

    def silent(self, one: Connection, now: bool) -> None:
        """`now`: it waits for a request; else it has one."""
        if not now:
            self._silent.pop(one, None)
        elif one in self._open:
            self._silent.setdefault(one)


class Connection(H11Protocol):
    """One connection of HTTP/1.1 that keeps to the house's times."""

    def __init__(self, *args: Any, house: Connections, **options: Any) -> None:
        super().__init__(*args, **options)
        self._house = house
        self._head: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._house.enter(self):
            self._house.silent(self, True)
            self._await_head()
            return
        body = dumps(error(ApiError(503, "the server has too many connections; try again soon", "server_error")))
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\nRetry-After: 1"
        )
        transport.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._house.leave(self)
        self._head = self._stopped(self._head)
        self._unread = self._stopped(self._unread)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        waits = self._waits()
        self._house.silent(self, waits)
        if waits:  # part of a head, or what is left of a body that was refused
            self._await_head()
        else:
            self._head = self._stopped(self._head)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._house.silent(self, self._waits())

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self._house.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = self._stopped(self._unread)

    def _waits(self) -> bool:
        """Whether the next request has not begun."""
        return self.cycle is None or self.cycle.response_complete

    @staticmethod
    def _stopped(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
        if timer is not None:
            timer.cancel()
        return None

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(self._house.head_seconds, self._give_up)

    def _give_up(self) -> None:
        self._head = None
        if self._waits():
            self.transport.abort()


def open_files() -> int | None:
    """How many files the process may hold open, after raising that as far as it is allowed to; None
    where nobody says.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = _WANTED_FILES if hard == unlimited else min(_WANTED_FILES, hard)
    if soft != unlimited and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            pass
    return None if soft == unlimited else soft


def log_seldom(
    write: Callable[[str], None] | None = None,
) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """A handler of an event loop's errors that tells of a failing accept() once a minute; asyncio
    would thousands of times.
    """
    last = [-_REPEAT_SECONDS]

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def handle(loop: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
        if "socket.accept()" not in str(context.get("message", "")):
            loop.default_exception_handler(dict(context))
            return
        if time.monotonic() - last[0] >= _REPEAT_SECONDS:
            last[0] = time.monotonic()
            (write or say)(
                f"ernie_tune: connections cannot be accepted ({context.get('exception')}); raise the limit of open files"
            )

    return handle

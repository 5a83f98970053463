"""Threads that an ending process does not wait for, and the lease under which work in them goes on:
a time, and somebody who wants its result.

Refuses to know: what the work is.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

from ernie_tune.config.language import say

T = TypeVar("T")


class Lease:
    """How long one piece of work may go on. `seconds` count from `begin`; `give_up` ends it from
    any thread.

    Work asks `left` before everything that may take long, and holds its sockets through `holding`,
    so that giving up also wakes a thread that waits for one.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._deadline: float | None = None
        self._over = False
        self._sockets: list[socket.socket] = []

    def begin(self) -> None:
        self._deadline = time.monotonic() + self._seconds

    def left(self) -> float:
        """Seconds that are left, above 0. Raises TimeoutError when there are none, or nobody waits
        any more.
        """
        if self._deadline is None:
            self.begin()
        assert self._deadline is not None
        left = self._deadline - time.monotonic()
        if self._over:
            raise TimeoutError(say("nobody waits for it any more", "已无人等待它"))
        if left <= 0:
            raise TimeoutError(say(f"it took more than {self._seconds:g} seconds", f"耗时超过 {self._seconds:g} 秒"))
        return left

    def give_up(self) -> None:
        with self._lock:
            self._over = True
            for sock in self._sockets:
                _wake(sock)

    @contextlib.contextmanager
    def holding(self, sock: socket.socket) -> Iterator[None]:
        """Let `give_up` end what waits for this socket. The caller closes it."""
        with self._lock:
            self._sockets.append(sock)
            if self._over:
                _wake(sock)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.remove(sock)


def _wake(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # not connected yet, or gone already
        # The plain method: a TLS socket's own would take its session from under the thread that
        # reads.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


class Pool:
    """A few threads that take work in the order in which it came. Daemons: what hangs in one cannot
    keep a process alive.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads = threads
        for i in range(threads):
            threading.Thread(target=self._serve, name=f"{name}-{i}", daemon=True).start()

    async def run(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises. Cancelled before a thread has taken it up, it is never
        called.
        """
        future: Future[T] = Future()
        self._work.put((future, call))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Let each thread end after what it is at."""
        for _ in range(self._threads):
            self._work.put(None)

    def _serve(self) -> None:
        while (entry := self._work.get()) is not None:
            future, call = entry
            if future.set_running_or_notify_cancel():
                with _Told(future):
                    future.set_result(call())
            del entry, future, call  # a waiting thread holds no picture


class _Told:
    """Hands whatever ends the work to the one who waits for it: the thread must live on."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self._future.set_exception(error)
        return True

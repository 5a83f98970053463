"""How long a user's reward function is waited for: said aloud where it takes long, ended where it
takes too long, so that none can hold a run up for ever without a word.

A function that is called in the main thread is interrupted by a timer of the system, in the midst
of a sleep, of a request or of a regular expression; in another thread it is only spoken of, since
nothing in Python can end it there. Async functions wait in a thread of their own, which is left
behind where one of them never lets go. Refuses to know: rewards, rows, what becomes of those that
are late.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

from ernie_tune.config.language import Text, say

# A user's function may raise whatever its own packages do, and end as a script does; what is left
# (MemoryError, an interrupt) ends the run.
USERS = (Exception, SystemExit)
GRACE_SECONDS = 5.0  # for async functions to notice that their time is up


class TookTooLong(BaseException):
    """Raised within a function whose time is up: not an Exception, which its own handlers would
    take for one of its errors. `seconds` that it was given, `place` where it stood.
    """

    def __init__(self, seconds: float, place: str) -> None:
        super().__init__(seconds, place)
        self.seconds, self.place = seconds, place


def place_in(frame: FrameType | None, file: str) -> str:
    """Where a thread stands in a file, as " (rewards.py:12)"; "" where it is not in it."""
    while frame is not None and frame.f_code.co_filename != file:
        frame = frame.f_back
    return "" if frame is None else f" ({Path(file).name}:{frame.f_lineno})"


def speak(line: Text) -> None:
    """Not print: a timer may come while something is being printed, and streams cannot be entered
    twice.
    """
    with contextlib.suppress(OSError):
        os.write(2, f"ernie_tune: {line}\n".encode())


def _slow(what: Text, seconds: float, place: str, left: float) -> Text:
    rest = say("it is waited for without end", "将一直等待")
    if left < math.inf:
        rest = say(f"it is waited for {left:.3g} s more", f"再等 {left:.3g} 秒")
    return say(
        f"{what} has not answered for {seconds:.3g} s{place}; {rest} (reward_limit_seconds)",
        f"{what} 已 {seconds:.3g} 秒没有返回{place}；{rest}（reward_limit_seconds）",
    )


@contextlib.contextmanager
def waiting_for(what: Text, file: str, say_seconds: float, limit_seconds: float) -> Iterator[None]:
    """A `with` around a call of a function of `file`. After `say_seconds`, and each time that these
    have doubled, a line on stderr says how long `what` takes and where it stands; after
    `limit_seconds` (0: never) TookTooLong is raised in it. Timers that were set before go on.
    """
    limit = limit_seconds or math.inf
    began = time.monotonic()
    words = _Words(what, file, say_seconds, limit)
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        with _spoken_of(words, threading.get_ident()):
            yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        gone = time.monotonic() - began
        if gone >= limit:
            signal.setitimer(signal.ITIMER_REAL, limit)  # again, where the function catches everything
            raise TookTooLong(limit, place_in(frame, file))
        signal.setitimer(signal.ITIMER_REAL, words.next_after(gone, frame))

    handler = signal.signal(signal.SIGALRM, ring)
    left, every = signal.setitimer(signal.ITIMER_REAL, min(say_seconds, limit))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler if handler is not None else signal.SIG_DFL)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 1e-3), every)


class _Words:
    """What there is to say of a call, and when."""

    def __init__(self, what: Text, file: str, say_seconds: float, limit: float) -> None:
        self.what, self.file, self.due, self.limit = what, file, say_seconds, limit

    def next_after(self, gone: float, frame: FrameType | None) -> float:
        """Speak where it is time; seconds until it is time again."""
        if gone >= self.due:
            speak(_slow(self.what, gone, place_in(frame, self.file), self.limit - gone))
            while self.due <= gone:
                self.due *= 2
        return max(min(self.due, self.limit) - gone, 1e-3)


@contextlib.contextmanager
def _spoken_of(words: _Words, thread: int) -> Iterator[None]:
    """A call in a thread that nothing can interrupt."""
    over, began = threading.Event(), time.monotonic()
    words.limit = math.inf

    def look() -> None:
        wait = words.due
        while not over.wait(wait):
            wait = words.next_after(time.monotonic() - began, sys._current_frames().get(thread))

    threading.Thread(target=look, daemon=True).start()
    try:
        yield
    finally:
        over.set()


# --- async functions ------------------------------------------------------------------------------


class _Own(ThreadPoolExecutor):
    """Threads for `asyncio.to_thread` that nobody waits for, neither the loop nor the interpreter
    at its end.
    """

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # who asked may stop waiting, the thread goes on

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except USERS as error:
                future.set_exception(error)

        threading.Thread(target=work, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """There is nothing to wait for."""


def gathered(jobs: Sequence[Awaitable[Any]], seconds: float, late: Any) -> tuple[list[Any], FrameType | None]:
    """What the jobs give, all of them in one event loop in a thread of its own (a notebook's thread
    already runs one); `late` for those that are not done after `seconds` and GRACE_SECONDS more.
    With it, where the loop's thread stands then: a job that blocks it is never left. What a job
    raises is raised.
    """
    found, over, raised = [late] * len(jobs), threading.Event(), list[BaseException]()

    async def note(i: int) -> None:
        found[i] = await jobs[i]

    async def all_of_them() -> None:
        asyncio.get_running_loop().set_default_executor(_Own())
        try:
            ended = await asyncio.gather(*map(note, range(len(jobs))), return_exceptions=True)
            raised.extend(one for one in ended if one is not None)
        finally:
            over.set()

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()), daemon=True)
    thread.start()
    in_time = over.wait(seconds + GRACE_SECONDS)
    frame = None if in_time else sys._current_frames().get(thread.ident or 0)
    if raised:
        raise raised[0]
    return list(found), frame

"""Whether two texts are mathematically equal, by the package math-verify in a process of its own.

An answer such as 9^{9^{9^9}} would keep sympy busy for ever, and its own time limit works in a main
thread alone: so one worker process does the asking, and is ended and replaced when an answer takes
longer than SECONDS.
Refuses to know: completions, where an answer's span lies.
"""

from __future__ import annotations

import atexit
import importlib.util
import multiprocessing
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from ernie_tune.config.language import say

SECONDS = 2.0
START_SECONDS = 60.0  # importing sympy
_worker: tuple[BaseProcess, Connection] | None = None


def available() -> bool:
    """Whether math-verify is installed (extra `rl`)."""
    return importlib.util.find_spec("math_verify") is not None


def equal(gold: str, answer: str, seconds: float = SECONDS) -> float | None:
    """1 or 0; None where the gold cannot be read as mathematics. An answer that takes longer than
    `seconds` is 0.
    """
    global _worker
    if _worker is None or not _worker[0].is_alive():
        _worker = _start()
    asked = _worker[1]
    asked.send((gold, answer))
    if asked.poll(seconds):
        try:
            found: float | None = asked.recv()
            return found
        except EOFError:
            pass
    stop()
    return 0.0


def stop() -> None:
    """End the worker; the next question starts another."""
    global _worker
    if _worker is not None:
        process, asked = _worker
        _worker = None
        process.kill()
        process.join()
        asked.close()


def _start() -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    if not ours.poll(START_SECONDS) or ours.recv() != "ready":
        process.kill()
        raise RuntimeError(
            say(
                f"the worker of math-verify (pid {process.pid}) must start within {START_SECONDS:g} s; try again",
                f"math-verify 的工作进程（pid {process.pid}）须在 {START_SECONDS:g} 秒内启动；请重试",
            )
        )
    return process, ours


def _answer(asked: Connection) -> None:
    """The worker: (gold, answer) in, a score out, until the pipe closes."""
    import logging

    from math_verify import parse, verify

    logging.disable(logging.WARNING)  # that its own time limits are off is why this process exists
    asked.send("ready")
    while True:
        try:
            gold, answer = asked.recv()
        except (EOFError, OSError):
            return
        wanted = parse(f"${gold}$", parsing_timeout=None, raise_on_error=False)
        # what it could not read, it gives back as text
        if all(isinstance(part, str) for part in wanted):
            asked.send(None)
            continue
        got = parse(f"${answer}$", parsing_timeout=None, raise_on_error=False)
        asked.send(float(verify(wanted, got, timeout_seconds=None, raise_on_error=False)))


atexit.register(stop)

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
import os
import time
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from ernie_tune.config.language import say

SECONDS = 2.0
START_SECONDS = 60.0  # importing sympy
_worker: tuple[BaseProcess, Connection] | None = None


def available() -> bool:
    """Whether math-verify is installed (extra `rl`)."""
    return importlib.util.find_spec("math_verify") is not None


def equal(gold: str, answer: str, seconds: float = SECONDS) -> float | None:
    """1 or 0; None where the gold cannot be read as mathematics. An answer that takes longer than
    `seconds` of the worker's computing is 0.
    """
    global _worker
    if _worker is None or not _worker[0].is_alive():
        _worker = _start()
    asked = _worker[1]
    asked.send((gold, answer))
    if _answered(asked, _worker[0].pid, seconds):
        try:
            found: float | None = asked.recv()
            return found
        except EOFError:
            pass
    stop()
    return 0.0


def _answered(asked: Connection, pid: int | None, seconds: float) -> bool:
    """Whether an answer comes before the worker has computed for `seconds`. On a busy machine that
    takes longer than by the clock, which must not turn a right answer into a wrong one.
    """
    spent, began, patience = _computed(pid), time.monotonic(), seconds
    while not asked.poll(min(0.2, seconds)):
        now = _computed(pid)
        if now is not None and spent is not None:
            patience = 10 * seconds
            if now - spent >= seconds:
                return False
        if time.monotonic() - began >= patience:
            return False
    return True


def _computed(pid: int | None) -> float | None:
    """Seconds that a process has computed; None where the system does not tell."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


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
    verify(parse("$1$", parsing_timeout=None), parse("$1$", parsing_timeout=None), timeout_seconds=None)  # loads sympy
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

"""Ctrl-C, SIGTERM and the SIGHUP of a closed terminal during a run: noted, and handled between two
steps. Refuses to know: what is finished and saved then.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
from collections.abc import Iterator
from typing import Any

from ernie_tune.config.language import say

# Windows has no SIGHUP.
SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the step in progress was finished and saved."""


def _forget_terminal() -> None:
    """The terminal has gone: what is still said goes nowhere, and nobody fails who says it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if stat.S_ISCHR(os.fstat(stream).st_mode):
            os.dup2(nowhere, stream)
    os.close(nowhere)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C, SIGTERM and SIGHUP are noted and handled between steps; a second one acts at once.
    What was told to be ignored (nohup) stays so. Outside the main thread nothing changes.
    """
    seen: list[int] = []
    told = say(
        "ernie_tune: finishing this step, then saving; once more to stop at once",
        "ernie_tune：完成当前步后保存；再按一次立即停止",
    )
    line = f"{told}\n".encode()

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        # not print: a signal may come while something is being printed, and streams cannot be
        # entered twice
        try:
            os.write(2, line)
        except OSError:
            _forget_terminal()

    try:
        before = {s: signal.signal(s, note) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
    except ValueError:  # not the main thread
        yield seen
        return
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

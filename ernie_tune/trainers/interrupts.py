"""Ctrl-C and SIGTERM during a run: noted, and handled between two steps. Refuses to know: what is finished and saved then."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the step in progress was finished and saved."""


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted and handled between steps; a second one acts at once. Outside the main thread nothing changes."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        # not print: a signal may come while something is being printed, and streams cannot be entered twice
        os.write(2, b"ernie_tune: finishing this step, then saving; once more to stop at once\n")

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield seen
        return
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""`python -m ernie_tune.ui.child RC_FILE COMMAND…`: run a command that outlives the page, hand it
the signals to stop, and write down how it ended.

Refuses to know: what the command does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path


def main(words: list[str]) -> int:
    """The exit code of the command, which RC_FILE gets too."""
    result = Path(words[0])
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: object) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    child = subprocess.Popen(words[1:], start_new_session=True)
    for missed in early:
        child.send_signal(missed)
    code = child.wait()
    unfinished = result.with_name(result.name + ".tmp")
    unfinished.write_text(f"{code}\n", encoding="utf-8")
    os.replace(unfinished, result)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

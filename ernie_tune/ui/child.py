"""`python -m ernie_tune.ui.child RC_FILE LEASH COMMAND…`: run a command that outlives the page,
hand it the signals to stop, and write down how it ended.

LEASH is `-` for a command that outlives the studio too, else the number of an open file: the
reading end of a pipe whose other end the studio alone holds, so that it closes when the studio ends
in whatever way, and the command then ends as well. Refuses to know: what the command does.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
import threading
from pathlib import Path

from ernie_tune.config.atomic import write_atomically

NO_LEASH = "-"
_GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


def main(words: list[str]) -> int:
    """The exit code of the command, which RC_FILE gets too."""
    result, leash = Path(words[0]), words[1]
    child: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: object) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, forward)
    tied = leash != NO_LEASH
    child = subprocess.Popen(words[2:], start_new_session=True, preexec_fn=_end_with_parent if tied else None)
    for missed in early:
        child.send_signal(missed)
    if tied:
        threading.Thread(target=_hold, args=(int(leash), child), daemon=True).start()
    code = child.wait()
    write_atomically(result, f"{code}\n")
    return code


def _hold(leash: int, child: subprocess.Popen[bytes]) -> None:
    """Wait until the studio is gone, then end the command: asked first, forced afterwards."""
    with open(leash, "rb", buffering=0) as held:
        while held.read(1):
            pass
    child.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(_GRACE_SECONDS)
    child.kill()


def _end_with_parent() -> None:
    """Have the system end this process when the one that started it is killed; where it cannot,
    the pipe alone holds it.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

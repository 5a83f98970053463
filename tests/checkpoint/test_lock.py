"""checkpoint/lock.py: one writer a folder, and nothing that a dead one can leave in the way."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ernie_tune.checkpoint import lock
from ernie_tune.checkpoint.lock import LOCK_FILE, FolderTaken, check_free, locked

ROOT = Path(__file__).parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from ernie_tune.checkpoint.lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], env=environ, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    return child


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    child = holder(folder)
    try:
        message = rf"output_dir \({folder}\) must have one writer: another run \(pid {child.pid}, host {socket.gethostname()}, since 2"
        for _ in range(2):
            with pytest.raises(FolderTaken, match=message), locked(folder):
                raise AssertionError("never inside")
        with pytest.raises(FolderTaken, match=message):
            check_free(folder)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert json.loads((folder / LOCK_FILE).read_text())["pid"] == child.pid, "what it has left"
    check_free(folder)
    with locked(folder):
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (folder / LOCK_FILE).exists()


@pytest.mark.parametrize(
    ("counted", "boot", "why"),
    [
        (
            3,
            None,
            "was ended from outside: the system has ended processes since then because memory ran out; lower max_seq",
        ),
        (2, None, "was ended from outside: kill -9, a crash, or the machine was switched off"),
        (3, "another", "was ended from outside: kill -9, a crash, or the machine was switched off"),
    ],
)
def test_the_next_one_is_told_of_a_kill(  # type: ignore[no-untyped-def]
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, counted: int, boot: str | None, why: str
) -> None:
    """The system counts whom it ended for lack of memory; after a restart the count is anew."""
    monkeypatch.setattr(lock, "kills", lambda: 2)
    child = os.fork()
    if not child:
        with locked(tmp_path):
            os._exit(0)  # as a kill does: nothing is tidied up
    os.waitpid(child, 0)
    monkeypatch.setattr(lock, "kills", lambda: counted)
    if boot:
        monkeypatch.setattr(lock, "_boot", lambda: boot)
    with locked(tmp_path):
        pass
    said = capsys.readouterr().err
    assert f"the last run in {tmp_path} (pid {child}, host {socket.gethostname()}, since 2" in said
    assert why in said
    with locked(tmp_path, "export"):
        assert capsys.readouterr().err == "", "the last one ended well"


def test_the_remedy_is_that_of_the_verb() -> None:
    assert "weight_quantize_algo: weight_only_mix" in lock.out_of_memory()
    assert "end other programs, or take a machine with more" in lock.out_of_memory("export")


def test_the_lock_ends_with_its_block_also_after_an_error(tmp_path: Path) -> None:
    for _ in range(3):
        with pytest.raises(KeyError), locked(tmp_path):
            raise KeyError
    with locked(tmp_path), locked(tmp_path, "export", file=tmp_path / "other.lock"):
        with (
            pytest.raises(FolderTaken, match="another export"),
            locked(tmp_path, "export", file=tmp_path / "other.lock"),
        ):
            pass
        with pytest.raises(FolderTaken, match=rf"another run \(pid {os.getpid()}, "), locked(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_let_go_of_while_one_waits_for_it_is_not_taken_twice(tmp_path: Path) -> None:
    """The file is removed between open and flock: the new one must be locked, not what nobody sees
    any more.
    """
    real, taken = lock._flock, []

    def late(handle: int) -> bool:
        if not taken:
            taken.append(handle)
            (tmp_path / LOCK_FILE).unlink()
        return real(handle)

    lock._flock = late
    try:
        with locked(tmp_path):
            lock._flock = real
            with pytest.raises(FolderTaken), locked(tmp_path):
                pass
    finally:
        lock._flock = real


def test_without_locks_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(handle: int) -> bool:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(lock, "_flock", none)
    with locked(tmp_path):
        check_free(tmp_path)
    assert (
        "is on a file system without locks (No locks available): nothing keeps a second run out of it"
        in capsys.readouterr().err
    )

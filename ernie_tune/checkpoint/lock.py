"""One writer a folder: a lock with the name of its holder, for the life of a run or of an export.

It is `flock` on a small file, so it ends with the process that holds it, however that ends: what a
dead process has left never stands in the way. The next one says that it was ended from outside, and
whether the system did it for lack of memory. On NFS the kernel turns it into a lock of the
server's, so that other machines see it, unless the mount says `nolock` or `local_lock`: then each
machine sees only its own. Where a file system knows no locks at all, a line says so and nothing is
guarded.
Refuses to know: what is written, ranks (the one that writes takes the lock).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from ernie_tune.config.host_memory import kills
from ernie_tune.config.language import Text, say

LOCK_FILE = ".lock"
_NAMED_WITHIN_SECONDS = 2.0


class FolderTaken(ValueError):
    """Another process writes there."""


@contextlib.contextmanager
def locked(folder: Path, what: str = "run", *, file: Path | None = None) -> Iterator[None]:
    """Hold `folder` (made where it is not there) while the block runs. `file`: the lock's, by
    default `folder`/.lock; it is gone afterwards.

    Raises FolderTaken naming the holder's process and machine; OSError where the file cannot be
    made.
    """
    file = file or folder / LOCK_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = _take(file, folder, what)
    try:
        yield
    finally:
        if handle is not None:
            # before it is let go: the next one finds no file, or one that is nobody's
            file.unlink(missing_ok=True)
            os.close(handle)


def check_free(folder: Path, what: str = "run") -> None:
    """Raises FolderTaken where somebody holds `folder` now. Takes and makes nothing."""
    file = folder / LOCK_FILE
    if not file.is_file():
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        if not _flock(handle):
            raise FolderTaken(_taken(_holder(file), folder, what))
    except OSError:
        return  # no locks here
    finally:
        os.close(handle)


def _take(file: Path, folder: Path, what: str) -> int | None:
    last = time.monotonic() + _NAMED_WITHIN_SECONDS
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = not _flock(handle)
        except OSError as error:
            os.close(handle)
            file.unlink(missing_ok=True)
            told = say(
                f"ernie_tune: {folder} is on a file system without locks ({error.strerror}): nothing keeps a second {what} out of it",
                f"ernie_tune: {folder} 所在的文件系统不支持加锁（{error.strerror}）：请勿同时启动第二个进程",
            )
            print(told, file=sys.stderr)
            return None
        if not held and _still(file, handle):
            if left := _left(file):
                print(_ended(left, folder, what), file=sys.stderr)
            me = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}"}
            me |= {"boot": _boot(), "kills": kills()}
            os.truncate(handle, 0)
            os.pwrite(handle, json.dumps(me).encode(), 0)
            return handle
        os.close(handle)
        if held:
            # without a name it may be one who only looks, has just come, or is about to leave
            if (holder := _holder(file)) or time.monotonic() > last:
                raise FolderTaken(_taken(holder, folder, what))
            time.sleep(0.02)


def _flock(handle: int) -> bool:
    """Whether nobody else had it. Raises OSError where there are no locks. Windows has none of this
    kind: nothing is guarded there.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _still(file: Path, handle: int) -> bool:
    """Whether the file of this name is the one that was locked."""
    try:
        return os.path.samestat(file.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _left(file: Path) -> dict[str, Any]:
    """What a holder has left that could not take its file away; nothing where there was none."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and "pid" in found else {}


def _ended(left: Mapping[str, Any], folder: Path, what: str) -> Text:
    who = f"pid {left['pid']}, host {left.get('host', '?')}, since {left.get('since', '?')}"
    here = left.get("host") == socket.gethostname() and left.get("boot") == _boot()
    if here and isinstance(left.get("kills"), int) and kills() > left["kills"]:
        why = out_of_memory(what)
    else:
        why = say("kill -9, a crash, or the machine was switched off", "kill -9、崩溃，或机器曾断电重启")
    return say(
        "ernie_tune: the last {what} in {folder} ({who}) was ended from outside: {why}",
        "ernie_tune：{folder} 中上一次的 {what}（{who}）被外部终止：{why}",
        what=what,
        folder=folder,
        who=who,
        why=why,
    )


def out_of_memory(what: str = "run") -> Text:
    """That the system has ended a process for lack of memory, and what to change."""
    remedy = (
        say(
            "lower max_seq_len or per_device_train_batch_size, set recompute: true, or, with LoRA, "
            "weight_quantize_algo: weight_only_mix; `ernie-tune estimate FILE` says what fits",
            "请调小 max_seq_len 或 per_device_train_batch_size，设 recompute: true，LoRA 可设 "
            "weight_quantize_algo: weight_only_mix；`ernie-tune estimate FILE` 会给出可行的配置",
        )
        if what == "run"
        else say("end other programs, or take a machine with more", "请结束其他程序，或换内存更大的机器")
    )
    return say(
        "the system has ended processes since then because memory ran out; {remedy}",
        "此后系统因内存不足终止过进程；{remedy}",
        remedy=remedy,
    )


def _boot() -> str:
    """Which start of the machine this is; empty where the system does not say."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.is_file() else ""


def _taken(holder: Mapping[str, Any], folder: Path, what: str) -> Text:
    who = f"pid {holder.get('pid', '?')}, host {holder.get('host', '?')}, since {holder.get('since', '?')}"
    return say(
        f"output_dir ({folder}) must have one writer: another {what} ({who}) writes here; wait for it, end it, or choose another output_dir",
        f"输出目录（{folder}）只能由一个进程写入：另一进程（{who}）正在写；请等待、结束它，或换一个 output_dir",
    )


def _holder(file: Path) -> dict[str, Any]:
    """Who has it; nothing where its name is not there, or is that of a process of this machine that
    has died.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or (found.get("host") == socket.gethostname() and not _lives(found.get("pid"))):
        return {}
    return found


def _lives(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    return True

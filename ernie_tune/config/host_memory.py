"""Main memory as the system tells of it: what the machine has, what is free by the machine, a
container and `ulimit`, and how often it has ended processes because none was left.

Refuses to know: what anybody needs memory for, cards.
"""

from __future__ import annotations

import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ernie_tune.config.language import Text, say

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# In a control group's folder: limit, what is in use, and among that pages of files, which the
# system takes back when others need them. Version 2, then 1 under its own folder.
_VERSIONS = (
    ("", "memory.max", "memory.current", ("active_file", "inactive_file")),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
)
# limit -> its name, and the column of /proc/self/statm that counts against it
_ULIMITS = {resource.RLIMIT_AS: ("ulimit -v", 0), resource.RLIMIT_DATA: ("ulimit -d", 5)}


@dataclass(frozen=True)
class Free:
    """Bytes that a new process may take, and what sets the bound."""

    bytes: int
    bound: Text


def machine_memory(proc: Path = PROC) -> tuple[int, int] | None:
    """(bytes of the machine, bytes that are free); None on a system that does not say."""
    file = proc / "meminfo"
    if not file.is_file():
        return None
    kib = dict(re.findall(r"^(\w+):\s+(\d+) kB$", file.read_text(), re.MULTILINE))
    return int(kib.get("MemTotal", 0)) * 1024, int(kib.get("MemAvailable", 0)) * 1024


def free_memory(proc: Path = PROC, groups: Path = GROUPS) -> Free | None:
    """The least that machine, containers and `ulimit` leave; None on a system that does not say."""
    machine = machine_memory(proc)
    if machine is None:
        return None
    found = [Free(machine[1], say("this machine", "本机"))]
    found += [
        Free(max(0, limit - used), say("the container's limit", "容器上限"))
        for limit, used in container_limits(proc, groups)
    ]
    found += [left for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA) if (left := _left(kind, proc)) is not None]
    return min(found, key=lambda f: f.bytes)


def free_addresses(proc: Path = PROC) -> Free | None:
    """What `ulimit -v` leaves, which counts mapped files too, page by page whether they are read or
    not; None without such a limit. (Control groups count pages that were read, and take them back
    when room is short: a file does not have to fit them.)
    """
    return _left(resource.RLIMIT_AS, proc)


def _left(kind: int, proc: Path) -> Free | None:
    soft, statm = resource.getrlimit(kind)[0], proc / "self" / "statm"
    if soft == resource.RLIM_INFINITY or not statm.is_file():
        return None
    name, column = _ULIMITS[kind]
    taken = int(statm.read_text().split()[column]) * resource.getpagesize()
    return Free(max(0, soft - taken), Text(name, name))


def container_limits(proc: Path = PROC, groups: Path = GROUPS) -> list[tuple[int, int]]:
    """(limit, bytes in use) of the control groups that this process is in and that have a limit.
    Pages of files are not in use: they make room.
    """
    return [
        (int(limit), max(0, int(used) - files))
        for folder, limit_file, used_file, kept in _folders(proc, groups)
        if (limit := _text(folder / limit_file)).isdecimal() and (used := _text(folder / used_file)).isdecimal()
        for files in [sum(_counter(folder / "memory.stat", name) for name in kept)]
    ]


def kills(proc: Path = PROC) -> int:
    """Processes that the system has ended since it was started because memory ran out; 0 where it
    does not count them.
    """
    return _counter(proc / "vmstat", "oom_kill")


def _folders(proc: Path, groups: Path) -> Iterator[tuple[Path, str, str, tuple[str, ...]]]:
    """Of this process's groups, from the innermost to the root: inside a container its own group
    is the root.
    """
    text = _text(proc / "self" / "cgroup")
    for under, *names in _VERSIONS:
        pattern = r"^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:/(.*)$" if under else r"^0::/(.*)$"
        own = re.search(pattern, text, re.MULTILINE)
        parts = [part for part in own[1].split("/") if part not in ("", "..")] if own else []
        limit, used, kept = names
        for count in range(len(parts), -1, -1):
            yield groups.joinpath(under, *parts[:count]), str(limit), str(used), tuple(kept)


def _counter(file: Path, name: str) -> int:
    found = re.search(rf"^{name} (\d+)$", _text(file), re.MULTILINE)
    return int(found[1]) if found else 0


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""

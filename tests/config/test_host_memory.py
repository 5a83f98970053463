"""config/host_memory.py: what is free by machine, container and ulimit, and what is counted."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from ernie_tune.config import host_memory
from ernie_tune.config.host_memory import container_limits, free_addresses, free_memory, kills, machine_memory

GB = 10**9
FREE = 8 * 2**20 * 1024


def machine(folder: Path, cgroup: str = "") -> tuple[Path, Path]:
    proc, groups = folder / "proc", folder / "groups"
    (proc / "self").mkdir(parents=True)
    groups.mkdir()
    (proc / "meminfo").write_text(f"MemTotal:       33554432 kB\nMemAvailable:   {FREE // 1024} kB\n")
    (proc / "self" / "cgroup").write_text(cgroup)
    return proc, groups


def group(folder: Path, version: int, limit: str, used: int, stat: str = "") -> None:
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(text + "\n")


@pytest.mark.parametrize(
    ("version", "limit", "used", "want", "bound"),
    [
        (2, "max", 5 * GB, FREE, "this machine"),
        (2, str(6 * GB), 2 * GB, 4 * GB, "the container's limit"),
        (1, str(6 * GB), 2 * GB, 4 * GB, "the container's limit"),
        (1, str(6 * GB), 7 * GB, 0, "the container's limit"),
        (1, "9223372036854771712", 2 * GB, FREE, "this machine"),
    ],
)
def test_the_least_of_what_is_left(tmp_path: Path, version: int, limit: str, used: int, want: int, bound: str) -> None:
    proc, groups = machine(tmp_path)
    group(groups / ("" if version == 2 else "memory"), version, limit, used)
    found = free_memory(proc, groups)
    assert found is not None
    assert (found.bytes, str(found.bound)) == (want, bound)


@pytest.mark.parametrize(
    ("version", "line"),
    [(2, "0::/user.slice/job.scope\n"), (1, "5:cpu,memory:/user.slice/job.scope\n0::/elsewhere\n")],
)
def test_groups_inside_groups_all_bind(tmp_path: Path, version: int, line: str) -> None:
    """A limit on the slice binds a job whose own group has none."""
    proc, groups = machine(tmp_path, line)
    top = groups / ("" if version == 2 else "memory")
    group(top / "user.slice", version, str(5 * GB), GB)
    group(top / "user.slice" / "job.scope", version, str(9 * GB) if version == 1 else "max", GB)
    group(top / "other.slice", version, str(GB), GB)
    assert min(limit for limit, _ in container_limits(proc, groups)) == 5 * GB
    found = free_memory(proc, groups)
    assert found is not None
    assert found.bytes == 4 * GB


@pytest.mark.parametrize("version", [1, 2])
def test_pages_of_files_make_room(tmp_path: Path, version: int) -> None:
    """A mapped folder that was read once fills the container's count and bars nobody."""
    proc, groups = machine(tmp_path)
    total = "total_" if version == 1 else ""
    stat = f"active_file {7}\n{total}active_file {GB}\n{total}inactive_file {2 * GB}\n{total}anon {GB}"
    group(
        groups / ("" if version == 2 else "memory"), version, str(6 * GB), 4 * GB, stat if version == 1 else stat[14:]
    )
    assert container_limits(proc, groups) == [(6 * GB, GB)]


def test_ulimits_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proc, groups = machine(tmp_path)
    (proc / "self" / "statm").write_text("1000 5 5 1 0 300 0\n")
    page = resource.getpagesize()
    for kind, name, pages in ((resource.RLIMIT_AS, "ulimit -v", 1000), (resource.RLIMIT_DATA, "ulimit -d", 300)):
        limits = {kind: 3 * GB}
        monkeypatch.setattr(
            host_memory.resource, "getrlimit", lambda what, limits=limits: (limits.get(what, resource.RLIM_INFINITY), 0)
        )
        found = free_memory(proc, groups)
        assert found is not None
        assert (found.bytes, str(found.bound)) == (3 * GB - pages * page, name)
        # addresses alone are what mapped files take
        addresses = free_addresses(proc)
        assert (addresses is None) == (kind != resource.RLIMIT_AS)
        assert addresses in (None, found)


def test_a_system_that_does_not_say(tmp_path: Path) -> None:
    assert free_memory(tmp_path, tmp_path) is None
    assert machine_memory(tmp_path) is None
    assert kills(tmp_path) == 0
    (tmp_path / "vmstat").write_text("pgfault 12\noom_kill 3\n")
    assert kills(tmp_path) == 3

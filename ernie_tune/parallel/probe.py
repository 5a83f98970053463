"""How the ranks of a launcher talk: is a sum right, does an exchange arrive, how fast is each pair.
Run by `ernie-tune doctor --dist` on every rank.

A rank that is missing, dies or does not answer is named by the watch (watch.py) within a minute.
Refuses to know: models, layouts.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist

from ernie_tune.config.language import say
from ernie_tune.parallel import gloo
from ernie_tune.parallel.watch import Limits, Watch, launched_address

_SMALL, _LARGE = 1, 1 << 22  # float32 elements: a latency, and 16 MiB
_ROUNDS = 5


def probe(tell: Callable[[str], Any], limits: Limits | None = None) -> None:
    """Every rank calls it; rank 0 tells the lines. Raises RuntimeError where a collective gives
    wrong numbers.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    address = launched_address(os.environ)
    if address is None:
        raise ValueError(
            say(
                "doctor --dist must run under a launcher with several processes; start it with --nproc 2",
                "doctor --dist 须在启动器下以多个进程运行；请加 --nproc 2 启动",
            )
        )
    watch = Watch(rank, size, address, limits or Limits(join=45, idle=30, silent=15))
    watch.wait_for_all()
    watch.mark("making the group of all ranks")
    gloo.install()
    dist.init_parallel_env()
    places: list[str] = []
    dist.all_gather_object(places, socket.gethostname())
    lines = [f"{size} ranks: " + ", ".join(f"{r} on {place}" for r, place in enumerate(places))]
    for name, check in (("all-reduce", _all_reduce), ("all-to-all", _all_to_all)):
        for count in (_SMALL, _LARGE):
            watch.mark(f"{name} of {count * 4} bytes a rank")
            seconds = check(rank, size, count)
            lines.append(f"{name}, {_size(count)} a rank: {seconds * 1e3:.2f} ms")
    lines.append("from one rank to another, 16 MiB: GB/s")
    lines += _pairs(rank, size, watch)
    if rank == 0:
        for line in lines:
            tell(line)
    watch.close()


def _size(count: int) -> str:
    return f"{count * 4} bytes" if count == _SMALL else f"{count * 4 >> 20} MiB"


def _timed(action: Callable[[], None]) -> float:
    """Median seconds of a few rounds that all ranks begin together."""
    seconds = []
    for _ in range(_ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[_ROUNDS // 2]


def _all_reduce(rank: int, size: int, count: int) -> float:
    x = paddle.full([count], float(rank + 1))
    dist.all_reduce(x)
    _expect("all-reduce", x, [size * (size + 1) / 2], count)
    return _timed(lambda: dist.all_reduce(x.clone()))


def _all_to_all(rank: int, size: int, count: int) -> float:
    each = max(1, count // size)
    x = paddle.concat([paddle.full([each], float(rank * size + r)) for r in range(size)])
    out = paddle.empty_like(x)
    dist.alltoall_single(out, x)
    _expect("all-to-all", out, [float(r * size + rank) for r in range(size)], each)
    return _timed(lambda: dist.alltoall_single(out, x))


def _expect(what: str, got: paddle.Tensor, want: list[float], each: int) -> None:
    found, right = got.numpy(), np.repeat(np.array(want, np.float32), each)
    if not np.array_equal(found, right):
        at = int(np.flatnonzero(found != right)[0])
        raise RuntimeError(
            say(
                f"{what} gave {found[at]:g} at {at}, which must be {right[at]:g}: the ranks' versions of paddle "
                "or of the communication library differ",
                f"{what} 在第 {at} 处得到 {found[at]:g}，应为 {right[at]:g}：各进程的 paddle 或通信库版本不同",
            )
        )


def _pairs(rank: int, size: int, watch: Watch) -> list[str]:
    """A table: row from, column to. One pair at a time, the others wait."""
    x = paddle.full([_LARGE], float(rank))
    rows = []
    for source in range(size):
        speeds = []
        for target in range(size):
            if source == target:
                speeds.append("    -")
                continue
            watch.mark(f"16 MiB from rank {source} to rank {target}")
            seconds = _timed(lambda s=source, t=target: _send(x, rank, s, t))  # type: ignore[misc]
            said: list[float] = []
            dist.all_gather_object(said, seconds)
            speeds.append(f"{_LARGE * 4 / max(said[source], said[target]) / 1e9:5.2f}")
        rows.append(f"  rank {source}: {' '.join(speeds)}")
    return rows


def _send(x: paddle.Tensor, rank: int, source: int, target: int) -> None:
    if rank == source:
        dist.send(x, target)
    elif rank == target:
        dist.recv(x.clone(), source)

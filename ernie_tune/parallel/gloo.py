"""What Paddle's Gloo backend lacks, so that every mode of Fleet runs on a CPU. `install()` does
nothing where a GPU build of Paddle is used.

Stock `ProcessGroupGloo` (paddle 3.3.1) has no all-to-all, no reduce-scatter, no average, no partial
or coalesced sends; it gives up after 30 s of skew between ranks, returns inf for float16 sums,
blocks two ranks that send to each other at once, and cannot make several groups of three or more
ranks. Here groups get another process group, over a mesh of TCP links whose reader threads take in
whatever comes: a send never waits for its receive, so no order of calls can dead-lock, and a
further group costs nothing. Sums run in rank order, so the replicas of a sum are equal to the bit.
Refuses to know: models, optimizers, which axis a group belongs to.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer
from paddle.base import core
from paddle.distributed import collective
from paddle.distributed.communication.group import _GroupManager

from ernie_tune.config.language import say
from ernie_tune.parallel.memory import bytes_of, bytes_of_array, contiguous, fill_bytes, put

TESTED_WITH = ("3.3.1",)
# A rank that waits longer than this for another one gives up. Skew between ranks is normal (data,
# evaluation, saving), silence is not.
TIMEOUT_S = float(os.environ.get("ERNIE_TUNE_COMM_TIMEOUT_S", "1800"))
# Up to this size everybody sends everything to everybody: one exchange instead of two.
_SMALL_BYTES = 1 << 16
_P2P, _COLLECTIVE = 1, 2  # two streams of messages between two ranks of a group, each in order
_HEADER = struct.Struct("<qqq")  # group id, stream, bytes
_NUMPY = {
    paddle.float32: np.float32,
    paddle.float64: np.float64,
    paddle.int64: np.int64,
    paddle.int32: np.int32,
    paddle.int16: np.int16,
    paddle.int8: np.int8,
    paddle.uint8: np.uint8,
    paddle.bool: np.bool_,
}
_REDUCE = {
    core.ReduceOp.SUM: np.add,
    core.ReduceOp.AVG: np.add,
    core.ReduceOp.MAX: np.maximum,
    core.ReduceOp.MIN: np.minimum,
    core.ReduceOp.PRODUCT: np.multiply,
}
_installed: list[bool] = []


# --- transport ------------------------------------------------------------------------------------


class _Links:
    """Directed TCP links between all ranks, opened when first used. Received messages wait in
    queues by (source, group, stream).
    """

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.store = collective._default_store
        self.host = os.environ.get("POD_IP", "127.0.0.1")
        self.out: dict[int, socket.socket] = {}
        self.inbox: dict[tuple[int, int, int], queue.SimpleQueue[bytearray]] = {}
        self.lock = threading.Lock()
        self.closed: set[int] = set()
        self.server = socket.socket()
        self.server.bind((self.host, 0))
        self.server.listen(128)
        self.store.set(f"ernie_tune/{self.rank}", f"{self.host}:{self.server.getsockname()[1]}")
        self.readers: list[tuple[socket.socket, threading.Thread]] = []
        self._start(self.server, self._accept)
        atexit.register(self.close)

    def _start(self, link: socket.socket, work: Callable[[socket.socket], None]) -> None:
        thread = threading.Thread(target=work, args=(link,), daemon=True)
        self.readers.append((link, thread))
        thread.start()

    def close(self) -> None:
        """End the readers before the interpreter ends. One that wakes up later, when its peer ends,
        finds its own state gone: the process crashes.
        """
        for link, thread in list(self.readers):
            with contextlib.suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)
            thread.join(1.0)

    def _accept(self, server: socket.socket) -> None:
        with contextlib.suppress(OSError):  # until `close`
            while True:
                link, _ = server.accept()
                link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._start(link, self._read)

    def _read(self, link: socket.socket) -> None:
        source = -1
        try:
            (source,) = struct.unpack("<i", _receive(link, 4))
            while True:
                group, stream, size = _HEADER.unpack(_receive(link, _HEADER.size))
                self._queue((source, group, stream)).put(_receive(link, size))
        except OSError:  # the peer has ended; whoever still waits for it is told in `receive`
            self.closed.add(source)

    def _queue(self, key: tuple[int, int, int]) -> queue.SimpleQueue[bytearray]:
        with self.lock:
            return self.inbox.setdefault(key, queue.SimpleQueue())

    def _link(self, to: int) -> socket.socket:
        if to not in self.out:
            self.store.wait(f"ernie_tune/{to}")
            host, port = self.store.get(f"ernie_tune/{to}").decode().rsplit(":", 1)
            self.out[to] = link = socket.create_connection((host, int(port)))
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.sendall(struct.pack("<i", self.rank))
        return self.out[to]

    def _alive(self, rank: int) -> bool:
        """Whether a rank's process is there, as far as our link to it tells; one is opened to find
        out.
        """
        if rank == self.rank or rank in self.closed:
            return rank == self.rank
        try:
            return self._link(rank).recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:  # nothing to read, as ever on this direction: it is there
            return True
        except OSError:
            self.closed.add(rank)
            return False

    def send(self, to: int, group: int, stream: int, data: memoryview) -> None:
        """Raises ConnectionError where the receiver has ended."""
        if to == self.rank:
            self._queue((to, group, stream)).put(bytearray(data))
            return
        try:
            link = self._link(to)
            link.sendall(_HEADER.pack(group, stream, len(data)))
            if len(data):
                link.sendall(data)
        except OSError as error:  # a broken pipe would pass for an output that nobody reads
            self.closed.add(to)
            raise ConnectionError(
                say(
                    f"rank {to} has ended; rank {self.rank} sent it something (group {group}, {error.strerror})",
                    f"进程 {to} 已结束；进程 {self.rank} 正在向它发送数据（组 {group}，{error.strerror}）",
                )
            ) from error

    def receive(self, source: int, group: int, stream: int) -> bytearray:
        """The next message. Raises ConnectionError when its sender has ended, TimeoutError after
        `TIMEOUT_S`.
        """
        end, waiting = time.monotonic() + TIMEOUT_S, self._queue((source, group, stream))
        try:  # nearly always soon, and then nobody has to be asked whether the sender lives
            return waiting.get(timeout=0.5)
        except queue.Empty:
            pass
        while time.monotonic() < end:
            # asked before looking: what it sent while alive still counts
            ended = not self._alive(source)
            try:
                return waiting.get(timeout=0.5)
            except queue.Empty:
                if ended and waiting.empty():
                    raise ConnectionError(
                        say(
                            f"rank {source} has ended; rank {self.rank} waited for it (group {group})",
                            f"进程 {source} 已结束；进程 {self.rank} 正在等它（组 {group}）",
                        )
                    ) from None
        raise TimeoutError(
            say(
                f"rank {source} sent nothing to rank {self.rank} for {TIMEOUT_S:.0f} s (group {group}); "
                "look for what it does in its log, or raise ERNIE_TUNE_COMM_TIMEOUT_S",
                f"进程 {source} 在 {TIMEOUT_S:.0f} 秒内没有向进程 {self.rank} 发送任何数据（组 {group}）；请在其日志中查看它在做什么，或调大 "
                "ERNIE_TUNE_COMM_TIMEOUT_S",
            )
        )


def _receive(link: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    view = memoryview(data)
    while len(view):
        got = link.recv_into(view)
        if not got:
            raise ConnectionError("closed")
        view = view[got:]
    return data


_links: list[_Links] = []


def _mesh() -> _Links:
    if not _links:
        _links.append(_Links())
    return _links[0]


class _Done:
    """A finished task."""

    def wait(self, *_: Any) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def synchronize(self, *_: Any) -> None:
        return None


# --- collectives ----------------------------------------------------------------------------------


def _exchange(pg: Any, pieces: Sequence[memoryview]) -> list[memoryview | bytearray]:
    """Piece j goes to member j; what member j sent comes back at j."""
    gid, ranks = pg.group_id, pg.members
    mesh = _mesh()
    me = ranks.index(mesh.rank)
    for step in range(1, len(ranks)):
        j = (me + step) % len(ranks)
        mesh.send(ranks[j], gid, _COLLECTIVE, pieces[j])
    return [pieces[j] if j == me else mesh.receive(r, gid, _COLLECTIVE) for j, r in enumerate(ranks)]


def _reduced(pg: Any, x: Tensor, op: Any, scatter: bool) -> np.ndarray:
    """The reduction over members of a contiguous tensor of a NumPy type, flat; with `scatter` only
    this member's part of equal parts.
    """
    kind, n = _NUMPY[x.dtype], pg.size()
    me = pg.members.index(_mesh().rank)
    flat: np.ndarray = np.frombuffer(bytes_of(x), kind)
    small = not scatter and flat.nbytes <= _SMALL_BYTES
    cuts = [0, len(flat)] if small else [len(flat) * j // n for j in range(n + 1)]
    pieces = [flat] * n if small else [flat[a:b] for a, b in pairwise(cuts)]
    parts: list[np.ndarray] = [np.frombuffer(part, kind) for part in _exchange(pg, [bytes_of_array(p) for p in pieces])]
    total = parts[0].copy()
    for part in parts[1:]:
        _REDUCE[op](total, part, out=total)
    if op == core.ReduceOp.AVG:
        total = (total / n).astype(kind)
    if small or scatter:
        return total
    whole = _exchange(pg, [bytes_of_array(total)] * n)
    whole[me] = bytes_of_array(total)
    return np.concatenate([np.frombuffer(part, kind) for part in whole])


def _reduce_into(pg: Any, out: Tensor, x: Tensor, op: Any, scatter: bool = False) -> _Done:
    """float16 and bfloat16 are added in float32 and rounded once."""
    x = contiguous(x)
    wide = x.astype("float32") if x.dtype in (paddle.float16, paddle.bfloat16) else x
    total = _reduced(pg, wide, core.ReduceOp.SUM if op is None else op, scatter)
    if wide is x:
        put(out, bytes_of_array(total))
    else:
        narrow = paddle.to_tensor(total).astype(out.dtype)
        put(out, bytes_of(narrow))
    return _Done()


def _all_reduce(pg: Any, x: Tensor, op: Any = None, *_: Any) -> _Done:
    return _reduce_into(pg, x, x, op)


def _reduce(pg: Any, x: Tensor, to: int, op: Any = None, *_: Any) -> _Done:
    """Everybody computes the sum, only the receiver keeps it: the same bits as an all-reduce."""
    out = x if pg.members[to] == _mesh().rank else paddle.empty_like(x)
    return _reduce_into(pg, out, x, op)


def _reduce_scatter(pg: Any, out: Tensor, x: Any, op: Any = None, *_: Any) -> _Done:
    whole = x if isinstance(x, Tensor) else paddle.concat([part.detach().reshape([-1]) for part in x])
    return _reduce_into(pg, out, whole, op, scatter=True)


def _broadcast(pg: Any, x: Tensor, source: int, *_: Any) -> _Done:
    gid, ranks = pg.group_id, pg.members
    mesh = _mesh()
    if ranks[source] == mesh.rank:
        data = contiguous(x)
        for r in ranks:
            if r != mesh.rank:
                mesh.send(r, gid, _COLLECTIVE, bytes_of(data))
    else:
        put(x, mesh.receive(ranks[source], gid, _COLLECTIVE))
    return _Done()


def _all_gather(pg: Any, out: Any, x: Any, *flags: Any) -> _Done:
    """(list or tensor, tensor, sync); Fleet also calls (tensor in, tensor out) without a flag."""
    if not flags and isinstance(out, Tensor):
        out, x = x, out
    x = contiguous(x)
    parts = _exchange(pg, [bytes_of(x)] * pg.size())
    if not isinstance(out, Tensor):
        for tensor, part in zip(out, parts, strict=True):
            put(tensor, part)
        return _Done()
    if x.size:  # the input may be a slice of the output
        parts[pg.members.index(_mesh().rank)] = bytearray(bytes_of(x))
    put(out, bytearray(b"".join(parts)))
    return _Done()


def _all_to_all(pg: Any, outs: Any, ins: Any, *_: Any) -> _Done:
    if isinstance(outs, Tensor):
        return _all_to_all_single(pg, outs, ins)
    ready = [contiguous(x) for x in ins]
    for out, part in zip(outs, _exchange(pg, [bytes_of(x) for x in ready]), strict=True):
        put(out, part)
    return _Done()


def _all_to_all_single(pg: Any, out: Tensor, x: Tensor, out_rows: Any = (), in_rows: Any = (), *_: Any) -> _Done:
    """Rows in parts of `in_rows` (equal parts without it); parts may be empty."""
    x, n = contiguous(x), pg.size()
    rows = list(in_rows) if not isinstance(in_rows, bool) and in_rows else [x.shape[0] // n] * n
    data = bytes_of(x)
    row_bytes = len(data) // x.shape[0] if x.shape[0] else 0
    cuts = np.cumsum([0, *rows]).tolist()
    parts = _exchange(pg, [data[a * row_bytes : b * row_bytes] for a, b in pairwise(cuts)])
    put(out, bytearray(b"".join(parts)))
    return _Done()


def _barrier(pg: Any, *_: Any) -> _Done:
    _exchange(pg, [memoryview(b"")] * pg.size())
    return _Done()


# --- point to point -------------------------------------------------------------------------------


class _Receive:
    """A receive that was posted. Those from one source complete in the order of posting, whoever is
    waited for first.
    """

    posted: ClassVar[dict[tuple[int, int], list[_Receive]]] = {}

    def __init__(self, key: tuple[int, int], fill: Callable[[bytearray], None]) -> None:
        self.key, self.fill, self.done = key, fill, False
        self.posted.setdefault(key, []).append(self)

    def wait(self, *_: Any) -> bool:
        while not self.done:
            first = self.posted[self.key].pop(0)
            first.fill(_mesh().receive(*first.key, _P2P))
            first.done = True
        return True

    synchronize = wait

    def is_completed(self) -> bool:
        return self.done


_coalesced: dict[int, list[_Receive]] = {}


def _send(pg: Any, x: Tensor, to: int, *_: Any) -> _Done:
    return _send_partial(pg, x, to, 1, 0)


def _send_partial(pg: Any, x: Tensor, to: int, parts: int, index: int, *_: Any) -> _Done:
    gid, ranks = pg.group_id, pg.members
    x = contiguous(x)
    _mesh().send(ranks[to], gid, _P2P, _part(x, parts, index))
    return _Done()


def _recv(pg: Any, x: Tensor, source: int, *flags: Any) -> _Receive:
    return _recv_partial(pg, x, source, 1, 0, *flags)


def _recv_partial(pg: Any, x: Tensor, source: int, parts: int, index: int, *flags: Any) -> _Receive:
    gid, ranks = pg.group_id, pg.members

    def fill(data: bytearray) -> None:
        fill_bytes(_part(x, parts, index), data)

    task = _Receive((ranks[source], gid), fill)
    if gid in _coalesced:
        _coalesced[gid].append(task)
    elif not flags or flags[0]:
        task.wait()
    return task


def _part(x: Tensor, parts: int, index: int) -> memoryview:
    data = bytes_of(x)
    size = len(data) // parts
    return data[index * size : (index + 1) * size]


def _all_gather_partial(pg: Any, out: Tensor, x: Tensor, parts: int, index: int, *_: Any) -> _Done:
    mine = bytearray(_part(x, parts, index))
    put(out, bytearray(b"".join(_exchange(pg, [memoryview(mine)] * pg.size()))))
    return _Done()


def _start_coalescing(pg: Any) -> None:
    _coalesced[pg.group_id] = []


def _end_coalescing(pg: Any, *_: Any) -> None:
    for task in _coalesced.pop(pg.group_id, []):
        task.wait()


_METHODS: dict[str, Callable[..., Any]] = {
    "send": _send,
    "recv": _recv,
    "send_partial": _send_partial,
    "recv_partial": _recv_partial,
    "all_gather_partial": _all_gather_partial,
    "all_reduce": _all_reduce,
    "allreduce": _all_reduce,
    "reduce": _reduce,
    "broadcast": _broadcast,
    "all_gather": _all_gather,
    "all_gather_into_tensor": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "reduce_scatter_tensor": _reduce_scatter,
    "all_to_all": _all_to_all,
    "alltoall": lambda pg, ins, outs, *a: _all_to_all(pg, outs, ins),
    "all_to_all_tensor": _all_to_all,
    "all_to_all_single": _all_to_all_single,
    "alltoall_single": lambda pg, x, out, in_rows, out_rows, *a: _all_to_all_single(pg, out, x, out_rows, in_rows),
    "barrier": _barrier,
    "_start_coalescing": _start_coalescing,
    "_end_coalescing": _end_coalescing,
}


# --- the process group of Fleet's groups ----------------------------------------------------------


class _Ranks:
    """What a group of Fleet holds instead of a `ProcessGroupGloo`: the methods above. The stock one
    opens two contexts with a thread each and a store with another, takes half a second for it, and
    mixes up the addresses of groups of three and more; none of which these methods use.
    """

    def __init__(self, rank: int, size: int, group_id: int) -> None:
        self._rank, self._size, self.group_id = rank, size, group_id

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size

    def name(self) -> str:
        return "GLOO"

    @cached_property
    def members(self) -> list[int]:
        """Global ranks, in the group's order; Paddle knows them once it has made the group."""
        return list(_GroupManager.group_map_by_id[self.group_id].ranks)


for _name, _method in _METHODS.items():
    setattr(_Ranks, _name, _method)
    setattr(_Ranks, f"{_name}_on_calc_stream", _method)


def _create(_store: Any, rank: int, world_size: int, group_id: int = 0, *_: Any) -> _Ranks:
    return _Ranks(rank, world_size, group_id)


# --- operators without a CPU kernel, or with a wrong one ------------------------------------------


def _of_ring(ring_id: int) -> Any:
    return collective._get_group_map()[ring_id].process_group


class _SumForward(PyLayer):
    """Sum over the group forward, identity backward."""

    @staticmethod
    def forward(ctx, x, ring_id):  # type: ignore[no-untyped-def]
        total = x.detach().clone()
        _all_reduce(_of_ring(ring_id), total)
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad


def _all_reduce_op(x: Tensor, ring_id: int, *_: Any) -> Tensor:
    _all_reduce(_of_ring(ring_id), x)
    return x


_stock_embedding = paddle._C_ops.c_embedding


def _embedding(table_VD: Tensor, ids_T: Tensor, first: int, *more: Any) -> Tensor:
    """Rows of a part of a table that begins at row `first`, zeros for ids of other parts. The stock
    kernel clears, in float64, half of its gradient's memory.
    """
    if table_VD.dtype != paddle.float64:
        return _stock_embedding(table_VD, ids_T, first, *more)
    own_T = ids_T - first
    here_T = (own_T >= 0) & (own_T < table_VD.shape[0])
    rows_TD = paddle.nn.functional.embedding(paddle.where(here_T, own_T, paddle.zeros_like(own_T)), table_VD)
    return rows_TD * here_T.unsqueeze(-1).astype(table_VD.dtype)


# Fleet's own PyLayer around c_identity sums the gradient over the group.
_OPERATORS: dict[str, Callable[..., Any]] = {
    "c_identity": lambda x, *a: x.clone() if not x.stop_gradient else paddle.assign(x),
    "mp_allreduce_sum": lambda x, ring_id: _SumForward.apply(x, ring_id),
    "all_reduce_": _all_reduce_op,
    "c_embedding": _embedding,
}


def untested(version: str) -> str:
    """The line to print for a version of Paddle that this file was not tested with; "" for the
    others.
    """
    plain = version.split("+")[0]
    if plain in TESTED_WITH:
        return ""
    tested = ", ".join(TESTED_WITH)
    return f"ernie_tune: paddle {plain}: the CPU collectives were tested with {tested}; compare losses with one process"


def install() -> bool:
    """Complete Gloo in this process; True where it did. Call before `fleet.init`. Prints a line for
    a version of Paddle it was not tested with.
    """
    if paddle.is_compiled_with_cuda() or paddle.is_compiled_with_xpu():
        return False
    if _installed:
        return True
    from paddle.distributed import parallel
    from paddle.distributed.communication import reduce as reduce_module
    from paddle.distributed.fleet.utils import hybrid_parallel_util, tensor_fusion_helper

    if line := untested(paddle.__version__):
        print(line, file=sys.stderr)
    setattr(core.ProcessGroupGloo, "create", staticmethod(_create))  # noqa: B010  its stub allows no assignment
    for name, operator in _OPERATORS.items():
        setattr(paddle._C_ops, name, operator)
    parallel.ParallelEnv._device_id = 0
    setattr(core, "nccl_version", lambda: 99999)  # noqa: B010  asked for before an average, which is ours here
    reduce_module.is_avg_reduce_op_supported = lambda: True
    tensor_fusion_helper.alignment["cpu"] = 256
    tensor_fusion_helper.get_current_device_type = lambda: "cpu"
    # Every rank of a tensor group reads the same rows itself (machine/alone.py), so the wrappers
    # have nothing to hand on.
    hybrid_parallel_util.broadcast_input_data = lambda hcg, *inputs, **kwargs: (inputs, kwargs)
    _installed.append(True)
    return True

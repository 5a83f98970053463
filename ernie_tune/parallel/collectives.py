"""Collectives with a gradient, over one group: what goes around a block whose weights are split,
and how tokens are spread over tensor ranks.

Tensor parallel: `enter` is identity forward and a sum backward, `leave` a sum forward and identity
backward (1909.08053, operators f and g; Fleet's own).
Sequence parallel: `enter` gathers tokens and scatters the summed gradient, `leave` the reverse
(2205.05198). A pack of T tokens is cut into n runs that differ by at most one token, so no length
has to be divisible and no padding exists: only the messages are padded, to equal size.
Legend: T tokens of the pack, t tokens of this rank, n ranks, D width, M rows. Refuses to know:
layers, models.
"""

from __future__ import annotations

from itertools import pairwise

import paddle
import paddle.distributed as dist
from paddle import Tensor
from paddle.autograd import PyLayer

from ernie_tune.config.language import say
from ernie_tune.parallel.mesh import Group


def bounds(total: int, group: Group) -> list[int]:
    """Where each rank's run of `total` tokens begins, and the end."""
    small, longer = divmod(total, group.size)
    return [r * small + min(r, longer) for r in range(group.size + 1)]


def own_rows(x_TD: Tensor, group: Group) -> Tensor:
    """This rank's run of all rows. Raises ValueError when there are fewer rows than ranks."""
    total = x_TD.shape[0]
    if total < group.size:
        raise ValueError(
            say(
                f"a pack of {total} token(s) must have at least one for each of the {group.size} tensor ranks "
                "with sequence_parallel; pack more rows, or turn it off",
                f"使用 sequence_parallel 时，{total} 个 token 的一包须让 {group.size} 个张量并行进程各得至少一个；请多打包几行，或关闭它",
            )
        )
    cuts = bounds(total, group)
    return x_TD[cuts[group.rank] : cuts[group.rank + 1]].contiguous()


def _padded(x_tD: Tensor, rows: int) -> Tensor:
    if x_tD.shape[0] == rows:
        return x_tD.contiguous()
    return paddle.concat([x_tD, paddle.zeros([rows - x_tD.shape[0], *x_tD.shape[1:]], x_tD.dtype)])


def all_rows(x_tD: Tensor, total: int, group: Group) -> Tensor:
    """Every rank's run, joined: [T, D]."""
    each, longer = -(-total // group.size), total % group.size
    padded = paddle.empty([each * group.size, *x_tD.shape[1:]], x_tD.dtype)
    dist.stream.all_gather(padded, _padded(x_tD.detach(), each), group=group.fleet, sync_op=True)
    if not longer:
        return padded
    runs = [padded[r * each : r * each + each - (r >= longer)] for r in range(group.size)]
    return paddle.concat(runs)


def sum_rows(x_TD: Tensor, group: Group) -> Tensor:
    """The sum over ranks of all rows, of which this rank keeps its run: [t, D]."""
    total = x_TD.shape[0]
    each, longer, cuts = -(-total // group.size), total % group.size, bounds(total, group)
    x_TD = x_TD.detach()
    if longer:
        x_TD = paddle.concat([_padded(x_TD[a:b], each) for a, b in pairwise(cuts)])
    out = paddle.empty([each, *x_TD.shape[1:]], x_TD.dtype)
    dist.stream.reduce_scatter(out, x_TD.contiguous(), op=dist.ReduceOp.SUM, group=group.fleet, sync_op=True)
    return out[: cuts[group.rank + 1] - cuts[group.rank]]


class _GatherSum(PyLayer):
    """[t, D] -> [T, D]; the gradients of all ranks' copies are added up."""

    @staticmethod
    def forward(ctx, x_tD, total, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return all_rows(x_tD, total, group)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        return sum_rows(grad_TD, ctx.group)


class _SumScatter(PyLayer):
    """Partial sums [T, D] -> [t, D]."""

    @staticmethod
    def forward(ctx, x_TD, group):  # type: ignore[no-untyped-def]
        ctx.group, ctx.total = group, x_TD.shape[0]
        return sum_rows(x_TD, group)

    @staticmethod
    def backward(ctx, grad_tD):  # type: ignore[no-untyped-def]
        return all_rows(grad_tD, ctx.total, ctx.group)


class _Spread(PyLayer):
    """Equal copies [T, D] -> [t, D]."""

    @staticmethod
    def forward(ctx, x_TD, group):  # type: ignore[no-untyped-def]
        ctx.group, ctx.total = group, x_TD.shape[0]
        return own_rows(x_TD.detach(), group)

    @staticmethod
    def backward(ctx, grad_tD):  # type: ignore[no-untyped-def]
        return all_rows(grad_tD, ctx.total, ctx.group)


class _Join(PyLayer):
    """[t, D] -> equal copies [T, D], whose gradients are equal too."""

    @staticmethod
    def forward(ctx, x_tD, total, group):  # type: ignore[no-untyped-def]
        ctx.group = group
        return all_rows(x_tD, total, group)

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        return own_rows(grad_TD, ctx.group)


class TokenRuns:
    """Sequence parallelism of one model: how long the pack in work is, and this rank's part of it.
    `total` is set by whoever sees a whole pack.
    """

    def __init__(self, group: Group) -> None:
        self.group, self.total = group, 0

    def spread(self, x_TD: Tensor) -> Tensor:
        """Equal copies -> this rank's run."""
        self.total = x_TD.shape[0]
        return _Spread.apply(x_TD, self.group)

    def join(self, x_tD: Tensor) -> Tensor:
        """This rank's run -> the whole, for what every rank computes alike."""
        return _Join.apply(x_tD, self.total, self.group)

    def span(self) -> tuple[int, int]:
        """This rank's run of the pack."""
        cuts = bounds(self.total, self.group)
        return cuts[self.group.rank], cuts[self.group.rank + 1]


def enter(x: Tensor, group: Group, runs: TokenRuns | None) -> Tensor:
    """Before weights split by columns."""
    if runs is not None:
        return _GatherSum.apply(x, runs.total, group)
    from paddle.distributed.fleet.layers.mpu import mp_ops

    return mp_ops._c_identity(x, group=group.fleet)


def leave(x: Tensor, group: Group, runs: TokenRuns | None) -> Tensor:
    """After weights split by rows."""
    if runs is not None:
        return _SumScatter.apply(x, group)
    from paddle.distributed.fleet.layers.mpu import mp_ops

    return mp_ops._mp_allreduce(x, group=group.fleet, use_calc_stream=True, use_model_parallel=True)


def exchange_rows(x_MD: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """All-to-all: `send[j]` rows go to rank j, `receive[j]` come from it; any of them may be 0.
    Without a gradient.
    """
    out = paddle.empty([sum(receive), *x_MD.shape[1:]], x_MD.dtype)
    dist.stream.alltoall_single(
        out, x_MD.contiguous(), out_split_sizes=receive, in_split_sizes=send, group=group.fleet, sync_op=True
    )
    return out

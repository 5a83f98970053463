"""Expert parallelism: each rank keeps a run of every family's experts; one all-to-all takes rows to
their experts, another brings the results back.

All families of a layer travel in one exchange, so that every rank makes the same calls whether or
not its tokens need a family (a rank may hold no picture). A family that receives nothing computes
on one row of zeros: its weights get a zero gradient, and no product sees an empty matrix.
Legend: F families, E experts of each, e experts here, n ranks, M rows sent (by family, then
expert), D width. Refuses to know: routers, models' classes.
What it asks of the model: a routing layer calls `expert_rows(work)`, work being a list of (experts,
rows_MD or None, counts), one a family, before its `shared_experts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_tune.parallel.collectives import exchange_rows
from ernie_tune.parallel.mesh import Group
from ernie_tune.parallel.placement import Placement, place, split_
from ernie_tune.parallel.tensor import layers_of

BESIDE = "shared_experts"


@dataclass(frozen=True)
class Route:
    """Where rows go. `to_send` orders mine by destination; `arrived` orders what comes by family
    and expert; `rows_F` of them for each family.
    """

    send: list[int]
    receive: list[int]
    to_send: np.ndarray
    arrived: np.ndarray
    rows_F: list[int]
    counts_Fe: list[tuple[int, ...]]
    group: Group


def plan_route(counts_FE: np.ndarray, group: Group) -> Route:
    """Tell everybody how many rows each expert gets, and work out the orders."""
    n, (families, experts) = group.size, counts_FE.shape
    per = experts // n
    mine = paddle.to_tensor(counts_FE)
    everyone = paddle.empty([n * families, experts], "int64")
    dist.stream.all_gather(everyone, mine, group=group.fleet, sync_op=True)
    counts_nFE = everyone.numpy().reshape(n, families, experts)
    to = np.arange(experts) // per
    # Mine lie by (family, expert); a stable sort by destination keeps that order for each rank.
    destination = np.concatenate([np.repeat(to, counts_FE[f]) for f in range(families)])
    here_nFe = counts_nFE[:, :, group.rank * per : (group.rank + 1) * per]
    # What comes lies by (source, family, expert).
    slot = np.repeat(np.tile(np.arange(families * per), n), here_nFe.reshape(-1))
    local_Fe = here_nFe.sum(0)
    return Route(
        send=np.bincount(destination, minlength=n).tolist(),
        receive=here_nFe.sum((1, 2)).tolist(),
        to_send=np.argsort(destination, kind="stable"),
        arrived=np.argsort(slot, kind="stable"),
        rows_F=local_Fe.sum(1).tolist(),
        counts_Fe=[tuple(row) if sum(row) else (1, *row[1:]) for row in local_Fe.tolist()],
        group=group,
    )


def _reordered(x_MD: Tensor, order: np.ndarray) -> Tensor:
    return paddle.gather(x_MD, paddle.to_tensor(order)) if len(order) else x_MD


def _go(x_MD: Tensor, r: Route) -> tuple[Tensor, ...]:
    came = exchange_rows(_reordered(x_MD, r.to_send), r.send, r.receive, r.group)
    came, out, start = _reordered(came, r.arrived), [], 0
    for rows in r.rows_F:
        # A view would share memory with its neighbours; the products may write into theirs.
        out.append(came[start : start + rows].contiguous() if rows else paddle.zeros([1, came.shape[1]], came.dtype))
        start += rows
    return tuple(out)


def _come_back(parts: tuple[Tensor, ...], r: Route) -> Tensor:
    kept = [x for x, rows in zip(parts, r.rows_F, strict=True) if rows]
    joined = paddle.concat(kept) if kept else parts[0][:0]
    joined = _reordered(joined, np.argsort(r.arrived))
    return _reordered(exchange_rows(joined, r.receive, r.send, r.group), np.argsort(r.to_send))


class _Go(PyLayer):
    """[M, D] -> each family's rows for the experts here."""

    @staticmethod
    def forward(ctx, x_MD, route):  # type: ignore[no-untyped-def]
        ctx.route = route
        return _go(x_MD.detach(), route)

    @staticmethod
    def backward(ctx, *grads):  # type: ignore[no-untyped-def]
        return _come_back(grads, ctx.route)


class _ComeBack(PyLayer):
    """Each family's results -> [M, D] where they were asked for."""

    @staticmethod
    def forward(ctx, route, *parts):  # type: ignore[no-untyped-def]
        ctx.route, ctx.frozen = route, [x.stop_gradient for x in parts]
        return _come_back(tuple(x.detach() for x in parts), route)

    @staticmethod
    def backward(ctx, grad_MD):  # type: ignore[no-untyped-def]
        return tuple(None if skip else g for skip, g in zip(ctx.frozen, _go(grad_MD, ctx.route), strict=True))


class _After(PyLayer):
    """x, but its backward comes before the backward of `other`. The branches of a routing layer are
    independent, so autograd may run their collectives in another order on a rank whose graph looks
    different; with this between them there is one order.
    """

    @staticmethod
    def forward(ctx, x, other):  # type: ignore[no-untyped-def]
        ctx.skip, ctx.like = other.stop_gradient, other
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return grad, None if ctx.skip else paddle.zeros_like(ctx.like)


class ExchangedRows(nn.Layer):
    """Steps in for a routing layer's `expert_rows`."""

    def __init__(self, group: Group, beside: nn.Layer | None) -> None:
        super().__init__()
        self.group, self.orders = group, beside is not None
        self.last: Tensor | None = None
        # experts here -> whether any row reached them since `drop_unused`
        self.used: dict[nn.Layer, bool] = {}
        if beside is not None:
            beside.register_forward_pre_hook(self.then)

    def then(self, _layer: nn.Layer, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Pre-hook of what the routing layer runs beside its experts."""
        last, self.last = self.last, None
        return args if last is None else (_After.apply(args[0], last), *args[1:])

    def drop_unused(self) -> None:
        """Take back the zero gradients of experts that no row reached: on one process they would
        have none, and AdamW would leave them alone.
        """
        for experts, reached in self.used.items():
            for parameter in experts.parameters() if not reached else ():
                parameter.clear_gradient(False)
        self.used = {}

    def forward(self, work: list[Any]) -> list[Tensor | None]:
        counts_FE = np.array([w.counts for w in work], np.int64)
        route = plan_route(counts_FE, self.group)
        rows = [w.rows_MD for w in work if w.rows_MD is not None]
        x_MD = paddle.concat(rows) if len(rows) > 1 else rows[0]
        parts = _Go.apply(x_MD, route)
        for w, reached in zip(work, route.rows_F, strict=True) if self.training else ():
            self.used[w.experts] = self.used.get(w.experts, False) or reached > 0
        outs = [w.experts(x, c) for w, x, c in zip(work, parts, route.counts_Fe, strict=True)]
        out_MD = _ComeBack.apply(route, *outs)
        self.last = out_MD if self.orders else None
        back: list[Tensor | None] = []
        start = 0
        for w in work:
            end = start + sum(w.counts)
            back.append(None if w.rows_MD is None else out_MD if len(rows) == 1 else out_MD[start:end])
            start = end
        return back


def apply_experts(model: nn.Layer, plan: Mapping[str, str], group: Group) -> None:
    """Keep this rank's experts of every stack and send rows to where the others are. Raises
    ValueError where they do not divide.
    """
    if group.size == 1:
        return
    layers = dict(model.named_sublayers())
    routers = set()
    for name, stack, leaf in layers_of(model, plan, "expert"):
        routers.add(name.rpartition(".")[0])
        weight = stack._parameters.get(leaf)
        product = stack._sub_layers[leaf.removesuffix("_proj") + "_product"]
        if weight is not None:
            split_(weight, 0, group, expert=True)
        else:
            product.quant.cut(None, group.rank, group.size)
        slot = product._sub_layers.get("adapters")
        for adapter in slot.children() if slot is not None else ():
            kept = adapter.cut(group.rank, group.size, total=_experts_of(product, weight, group))
            for value in adapter.parameters():
                place(value, Placement(0, group.name, expert=True, handle=group, kept=kept))
    for name in routers:
        layers[name].expert_rows = ExchangedRows(group, layers.get(f"{name}.{BESIDE}"))


def _experts_of(product: nn.Layer, weight: Tensor | None, group: Group) -> int:
    local = weight.shape[0] if weight is not None else product.quant.shape[0]
    return local * group.size

"""Tensor and sequence parallelism of a plain model by its sharding table: slice weights in place,
put the collectives around blocks as hooks.

A block is the parent of a layer split by rows: its input enters, the row layer's output leaves; the
layers split by columns inside run unchanged on their slice. So a layer keeps its class, its fast
products and its adapters. Legend: T tokens, V vocabulary, D width.
Refuses to know: the model's classes (names come from the table), optimizers, other axes. What it
asks of the model, all by attribute: an embedding has `lookup(ids, weight)`, a model has
`scores(hidden, weight, transposed)`, a routing layer `tallies(tally)`, a block whose second
argument has `plan.offsets` sees a whole pack, a quantised layer has `quant.cut(axis, rank, size)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from ernie_tune.config.language import say
from ernie_tune.parallel.collectives import TokenRuns, enter, leave
from ernie_tune.parallel.mesh import Group
from ernie_tune.parallel.placement import Placement, place, split_

# Adapter tensors beside a split layer: kind of the layer -> leaf -> (axis, whether the gradient of
# a whole one is a partial sum).
AdapterPlan = Mapping[str, Mapping[str, tuple[int | None, bool]]]


def layers_of(model: nn.Layer, plan: Mapping[str, str], kind: str) -> Iterator[tuple[str, nn.Layer, str]]:
    """(name of the layer, layer, leaf) of every parameter that the table gives this kind. A
    quantised layer has lost the parameter, not its place.
    """
    patterns = [pattern.rpartition(".") for pattern, found in plan.items() if found == kind]
    for name, layer in model.named_sublayers():
        for owner, _, leaf in patterns:
            if fnmatchcase(name, owner) and _has(layer, leaf):
                yield name, layer, leaf


def _has(layer: nn.Layer, leaf: str) -> bool:
    """Whether it holds this parameter, or did before it was quantised; without making the dense
    matrix of a quantised one.
    """
    return leaf in layer._parameters or leaf in vars(layer) or isinstance(getattr(type(layer), leaf, None), property)


def apply_tensor(
    model: nn.Layer, plan: Mapping[str, str], adapters: AdapterPlan, group: Group, runs: TokenRuns | None
) -> None:
    """Slice what the table names over `group` and connect it; `runs`: with sequence parallelism."""
    if group.size == 1:
        return
    layers = dict(model.named_sublayers(include_self=True))
    blocks: dict[str, bool] = {}
    for kind, axis in (("column", 1), ("row", 0)):
        for name, layer, leaf in layers_of(model, plan, kind):
            _slice_layer(layer, leaf, axis, group)
            _slice_adapters(layer, adapters.get(kind, {}), group, by_rows=kind == "row")
            parent = name.rpartition(".")[0]
            if kind == "row":
                layer.register_forward_post_hook(
                    lambda at, _args, out: leave(out, group, runs if at.training else None)
                )
            if parent:
                blocks[parent] = blocks.get(parent, False) or kind == "row"
    for name, closed in blocks.items():
        if not closed:
            raise ValueError(
                say(
                    f"block {name} has layers split by columns and must have one split by rows; complete the "
                    "sharding table",
                    f"模块 {name} 有按列切分的层，须也有按行切分的层；请补全切分表",
                )
            )
        layers[name].register_forward_pre_hook(_entering(group, runs))
    for _name, layer, leaf in layers_of(model, plan, "vocab"):
        if leaf in layer._parameters:  # a quantised table stays whole
            split_(layer._parameters[leaf], 0, group)
            layer.lookup = VocabLookup(group)
    model.scores = VocabScores(group)


def _slice_layer(layer: nn.Layer, leaf: str, axis: int, group: Group) -> None:
    weight, bias = layer._parameters.get(leaf), getattr(layer, "bias", None)
    if weight is not None:
        split_(weight, axis, group)
    else:
        layer.quant.cut(axis, group.rank, group.size)
    if bias is not None and axis == 0:
        raise ValueError(
            say(
                "a layer split by rows must have no bias, which every rank would add; take it out of the table",
                "按行切分的层不能有偏置，否则每个进程都会加一次；请从切分表中去掉",
            )
        )
    if bias is not None:
        split_(bias, 0, group)


def _slice_adapters(layer: nn.Layer, plan: Mapping[str, tuple[int | None, bool]], group: Group, by_rows: bool) -> None:
    slot = layer._sub_layers.get("adapters")
    for adapter in slot.children() if slot is not None else ():
        for leaf, value in adapter.named_parameters():
            axis, partial = plan[leaf]
            if axis is None:
                place(value, Placement(partial=partial))
            else:
                split_(value, axis, group)
        if by_rows:
            adapter.sum_over = group.sum_


def _entering(group: Group, runs: TokenRuns | None) -> Any:
    def hook(layer: nn.Layer, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if runs is not None and len(args) > 1:
            runs.total = args[1].plan.offsets[-1]
        return (enter(args[0], group, runs if layer.training else None), *args[1:])

    return hook


def apply_sequence(model: nn.Layer, plan: Mapping[str, str], ends: tuple[str, str], runs: TokenRuns) -> None:
    """Spread tokens after the first of `ends`, join them after the last, and tell routers which of
    the pack's tokens are here. Every whole parameter in between sees this rank's tokens alone, so
    its gradient is a partial sum (trap m). In eval mode every rank has all
    tokens: a step of generation may have fewer of them than there are ranks.
    """
    for name, layer in model.named_sublayers():
        if name == ends[0]:
            layer.register_forward_post_hook(lambda at, _args, out: runs.spread(out) if at.training else out)
        elif name == ends[1]:
            layer.register_forward_post_hook(lambda at, _args, out: runs.join(out) if at.training else out)
    routers = {name.rpartition(".")[0] for name, _, _ in layers_of(model, plan, "expert")}
    layers = dict(model.named_sublayers())
    for name in routers:
        layers[name].register_forward_pre_hook(_Localise(runs))
        layers[name].tallies = SummedTallies(runs.group)
    for name, value in model.named_parameters():
        if (name.startswith("layers.") or name.startswith(f"{ends[1]}.")) and not hasattr(value, "placement"):
            place(value, Placement(partial=True))


class _Localise:
    """Pre-hook of a routing layer (x, text_index, vision_index, ...): the pack's positions become
    this rank's.
    """

    def __init__(self, runs: TokenRuns) -> None:
        self.runs = runs
        self.known: tuple[Any, ...] = (None, 0, None, None)

    def __call__(self, layer: nn.Layer, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, text, vision, *rest = args
        if not layer.training:
            return args
        if rest and rest[0] is not None:  # a tap, which may hold what all tokens of the pack are to choose
            rest[0].first = self.runs.span()[0]
        if vision is None:
            return args
        if self.known[0] is not vision or self.known[1] != self.runs.total:
            first, end = self.runs.span()
            here = [index.masked_select((index >= first) & (index < end)) - first for index in (text, vision)]
            self.known = (vision, self.runs.total, here[0], here[1] if here[1].shape[0] else None)
            if self.known[3] is None:
                self.known = (vision, self.runs.total, None, None)
        return (x, self.known[2], self.known[3], *rest)


class SummedTallies(nn.Layer):
    """What the routers' own losses must know of a pack whose tokens lie on several ranks: the sum
    of what each knows. Without a gradient: a rank's loss is then its share of the pack's, and so is
    its gradient.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, tally_mE: Tensor) -> Tensor:
        return self.group.sum_(tally_mE) if self.training else tally_mE


class VocabLookup(nn.Layer):
    """Rows of a table split by rows: each rank looks up what it has, the sum is the row."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, ids_T: Tensor, weight_VD: Tensor) -> Tensor:
        from paddle.distributed.fleet.layers.mpu import mp_ops

        first = self.group.rank * weight_VD.shape[0]
        own = mp_ops._c_lookup_table(
            weight_VD, ids_T, start_index=first, vocab_size=weight_VD.shape[0] * self.group.size
        )
        return leave(own, self.group, None)


class VocabScores(nn.Layer):
    """Scores over the whole vocabulary from a split output matrix, for sampling; losses go through
    the log-probabilities of targets instead.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        self.group = group

    def forward(self, hidden_TD: Tensor, weight: Tensor, transposed: bool) -> Tensor:
        own = paddle.matmul(hidden_TD, weight, transpose_y=transposed)
        if getattr(weight, "placement", None) is None:
            return own
        if not own.stop_gradient and paddle.is_grad_enabled():
            raise ValueError(
                say(
                    "scores of a split vocabulary have no gradient; use token_logp, or call under no_grad",
                    "切分后的词表分数没有梯度；请用 token_logp，或在 no_grad 下调用",
                )
            )
        parts = [paddle.empty_like(own) for _ in range(self.group.size)]
        dist.stream.all_gather(parts, own.contiguous(), group=self.group.fleet, sync_op=True)
        return paddle.concat(parts, axis=-1)

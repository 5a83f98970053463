"""`parallelize(model, plan, mesh)`: the one place where the order of wrapping is written.

    experts       each rank keeps a run of every expert stack; rows travel (expert.py)
    tensor        weights are sliced by the table; blocks are entered and left (tensor.py)
    sequence      tokens are spread between the first and the last module; whole parameters there
                  get partial gradients
    open          the first module's output asks for a gradient, so that every rank makes the same
                  calls in the backward
    equal         replicas get the values of their group's first rank

The optimizer comes after (sharding.py), for the slices do not exist before. Recompute wraps layers
from outside, in the forward. On one process nothing is touched. Refuses to know: the model's
classes, optimizers, data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor, nn

from ernie_tune.parallel.collectives import TokenRuns
from ernie_tune.parallel.expert import apply_experts
from ernie_tune.parallel.mesh import Mesh
from ernie_tune.parallel.placement import owners
from ernie_tune.parallel.tensor import AdapterPlan, apply_sequence, apply_tensor


def parallelize(
    model: nn.Layer,
    plan: Mapping[str, str],
    mesh: Mesh,
    *,
    adapters: AdapterPlan | None = None,
    ends: tuple[str, str] = ("embed_tokens", "norm"),
) -> TokenRuns | None:
    """Lay `model`, with its adapters on, over `mesh`, in place. `plan`: parameter pattern ->
    column, row, vocab or expert; others stay whole. `ends`:
    the modules that first and last hold the pack's tokens. Returns what sequence parallelism knows
    of the pack, None without it.

    Parameters keep their identity and their names; each carries its `placement`. Raises ValueError
    where a dimension does not divide.
    """
    if mesh.world == 1:
        return None
    group = mesh.group("tensor")
    runs = TokenRuns(group) if mesh.layout.sequence_parallel else None
    apply_experts(model, plan, mesh.group("expert"))
    apply_tensor(model, plan, adapters or {}, group, runs)
    if mesh.layout.expert > 1 or mesh.size("pipe") > 1:
        _open(model, ends[0])
    if runs is not None:
        apply_sequence(model, plan, ends, runs)
    model.leaves_out = runs is None and mesh.layout.expert == 1
    equalise(model, mesh)
    return runs


def _open(model: nn.Layer, first: str) -> None:
    """With experts or stages elsewhere, a rank whose rows need no gradient below would skip
    collectives that the others wait in (traps p, u).
    """

    def hook(_layer: nn.Layer, _args: tuple[Any, ...], x_TD: Tensor) -> Tensor:
        if x_TD.stop_gradient and paddle.is_grad_enabled():
            x_TD = x_TD.detach()
            x_TD.stop_gradient = False
        return x_TD

    for name, layer in model.named_sublayers():
        if name == first:
            layer.register_forward_post_hook(hook)


def equalise(model: nn.Layer, mesh: Mesh) -> None:
    """Give every replica the values of the first of its ranks: fresh adapters, quantisation and
    files may differ by a bit between machines.
    """
    with paddle.no_grad():
        for value in model.parameters():
            if not value._is_initialized():  # read later, by all from the same file
                continue
            for axis in owners(value):
                group = mesh.group(axis)
                if group.size > 1:
                    dist.broadcast(value, group.ranks[0], group=group.fleet)

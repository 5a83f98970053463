"""A window's gradients over the mesh: what each rank adds, who averages with whom, the norm that
counts every parameter once, the clip.

Fleet's convention: a rank computes the gradient of (number of `batch` ranks) x its share of the
loss, and ranks average. An expert of Fleet's topology sees the tokens of all expert ranks and is
averaged over `expert_data` only, so its gradient is scaled by tensor / expert.
Refuses to know: models, losses, which parameters are trained and why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from ernie_tune.parallel.mesh import Mesh
from ernie_tune.parallel.placement import owners, placement_of

_BUCKET_BYTES = 128 * 2**20


def is_fleet_expert(parameter: Tensor, mesh: Mesh) -> bool:
    """Whether its replicas are Fleet's `expert_data` group."""
    return placement_of(parameter).expert and mesh.layout.fleet_experts


def all_reduce_(parameters: Sequence[Tensor], group: Any, scale: float) -> None:
    """Sum the gradients over a group in a few large messages, times `scale`; Fleet's own."""
    from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients_with_group

    held = [p for p in parameters if p.grad is not None]
    if held:
        fused_allreduce_gradients_with_group(held, group, _BUCKET_BYTES, scale)


class Presence:
    """Which parameters have a gradient anywhere on the mesh. A picture or an expert may be missing
    on one rank: it then adds zeros, and a parameter that no rank touched keeps no gradient, as on
    one process.
    """

    def __init__(self, trainable: Mapping[str, Tensor], mesh: Mesh) -> None:
        self.group = mesh.group("stage")
        names = self.group.objects(list(trainable))
        self.names = sorted({name for part in names for name in part})

    def complete(self, trainable: Mapping[str, Tensor], prefix: str = "") -> None:
        """Give every parameter (whose name starts with `prefix`) that has a gradient on some rank
        one on this.
        """
        names = [name for name in self.names if name.startswith(prefix)]
        if not names:
            return
        here = [name in trainable and trainable[name].grad is not None for name in names]
        flags = self.group.reduce_(paddle.to_tensor(np.array(here, np.int32)), dist.ReduceOp.MAX).numpy()
        for name, wanted, have in zip(names, flags.tolist(), here, strict=True):
            if wanted and not have and name in trainable:
                trainable[name].grad = paddle.zeros_like(trainable[name])


def sum_partial_(parameters: Sequence[Tensor], mesh: Mesh) -> None:
    """Add up the gradients of whole parameters that each tensor rank knows in part (traps m, n,
    o).
    """
    if mesh.size("tensor") > 1:
        all_reduce_([p for p in parameters if placement_of(p).partial], mesh.group("tensor").fleet, 1.0)


def scale_experts_(parameters: Sequence[Tensor], mesh: Mesh) -> None:
    """tensor / expert on the gradients of Fleet's experts (trap i)."""
    factor = mesh.layout.tensor / mesh.layout.expert
    with paddle.no_grad():
        for p in parameters:
            if p.grad is not None and is_fleet_expert(p, mesh):
                p.grad.scale_(factor)


def counted_here(parameter: Tensor, mesh: Mesh, owner: int | None) -> bool:
    """Whether this rank is the one that counts its copy in the norm. `owner`: the number of the
    rank in its sharding group that alone has the summed gradient, None without sharding.
    """
    # another stage holds it too, and counts it (traps d, w)
    if not getattr(parameter, "is_firstly_shared", True):
        return False
    axes = owners(parameter)
    if owner is None:
        return all(mesh.rank_in(axis) == 0 for axis in axes)
    if is_fleet_expert(parameter, mesh):
        return mesh.rank_in("expert_data") == owner
    first = {"batch": ("data",), "expert_data": ("data",)}
    rest = [axis for found in axes for axis in first.get(found, (found,))]
    return mesh.rank_in("sharding") == owner and all(mesh.rank_in(axis) == 0 for axis in rest)


def square_sum(x: Tensor) -> float:
    """Sum of squares. Paddle's own of its clip: `paddle.dot` adds float32 one by one and is off by
    0.3 % on 4 million values (3.3.1, CPU).
    """
    wide = x.astype("float32") if x.dtype in (paddle.bfloat16, paddle.float16) else x
    return float(paddle._C_ops.squared_l2_norm(wide).item())


def global_norm(parameters: Sequence[Tensor], mesh: Mesh, owner_of: Mapping[str, int]) -> float:
    """Euclidean norm over the whole model: every rank adds the squares that it alone counts, in
    float64. One collective, entered by all.
    """
    squares = [
        square_sum(p.grad) for p in parameters if p.grad is not None and counted_here(p, mesh, owner_of.get(p.name))
    ]
    total = paddle.to_tensor(np.array([math.fsum(squares)]))
    return math.sqrt(mesh.group("world").sum_(total).item())

"""Optimizer states shared among ranks: Fleet's stage 1 (1910.02054), once for the dense parameters and once for its experts.

Fleet's first version is used, which gives whole parameters to ranks: its second cuts across them, loses gradients without `main_grad` and lets replicas
diverge beside data parallelism (traps b, c of parallel.md 1.5), and a checkpoint of whole parameters can be read under any layout. Over experts the
first version goes wrong only because it takes one group for all parameters (trap g): here the experts have an engine over their own group.
Refuses to know: models, learning-rate schedules, files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle
from paddle import Tensor

from ernie_tune.parallel.gradients import all_reduce_, is_fleet_expert
from ernie_tune.parallel.mesh import Group, Mesh

MakeOptimizer = Callable[[list[Tensor]], Any]


class _Over:
    """What Fleet's engine asks of a topology, for any group."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def get_sharding_parallel_world_size(self) -> int:
        return self.group.size

    def get_sharding_parallel_rank(self) -> int:
        return self.group.rank

    def get_sharding_parallel_group(self) -> Any:
        return self.group.fleet


class _Part:
    """Some of the parameters, and the group over which they are averaged and, with stage 1 on, their optimizer states are shared."""

    def __init__(self, parameters: list[Tensor], group: Group, make: MakeOptimizer, shard: bool) -> None:
        self.parameters, self.group = parameters, group
        self.inner = make(parameters)
        self.sharded: Any = None
        if shard and group.size > 1:
            from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer

            self.over = _Over(group)
            self.sharded = DygraphShardingOptimizer(self.inner, self.over)

    def average_(self) -> None:
        held = [p for p in self.parameters if p.grad is not None]
        if self.sharded is not None:
            # Only those with a gradient: the engine would invent zeros for the others, and AdamW would decay them.
            self.sharded.reduce_gradients(held, self.over)
        elif self.group.size > 1:
            all_reduce_(held, self.group.fleet, 1.0 / self.group.size)

    def owners(self) -> dict[str, int]:
        return dict(self.sharded._param2rank) if self.sharded is not None else {}

    def step(self) -> None:
        (self.sharded or self.inner).step()


class MeshOptimizer:
    """The optimizer of a mesh: `make` builds one for a list of parameters. Behaves as Paddle's for set_lr, step, state_dict and set_state_dict; the
    states are those of the parameters that this rank owns."""

    def __init__(self, trainable: Sequence[Tensor], mesh: Mesh, make: MakeOptimizer) -> None:
        experts = [p for p in trainable if is_fleet_expert(p, mesh)]
        dense = [p for p in trainable if not is_fleet_expert(p, mesh)]
        shard = mesh.degrees.sharding_stage > 0
        groups = [(dense, mesh.group("sharding")), (experts, mesh.group("expert_data"))]
        self.parts = [_Part(found, group, make, shard) for found, group in groups if found]
        self.data = mesh.group("data")
        self.dense = dense
        self.owner_of = {name: rank for part in self.parts for name, rank in part.owners().items()}
        self.mesh = mesh

    def average_(self) -> None:
        """Average gradients over the ranks that saw other rows; with sharding only the owner of a parameter has the result."""
        if self.data.size > 1:
            all_reduce_(self.dense, self.data.fleet, 1.0 / self.data.size)
        for part in self.parts:
            part.average_()

    def owned(self) -> list[Tensor]:
        """The parameters whose states are on this rank."""
        return [
            p
            for part in self.parts
            for p in part.parameters
            if part.owners().get(p.name, part.group.rank) == part.group.rank
        ]

    def set_lr(self, rate: float) -> None:
        for part in self.parts:
            part.inner.set_lr(rate)

    def get_lr(self) -> float:
        return float(self.parts[0].inner.get_lr())

    def step(self) -> None:
        """Update what this rank owns and hand it to the others."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for part in self.parts:
            for key, value in part.inner.state_dict().items():
                merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
        return merged

    def set_state_dict(self, state: dict[str, Any]) -> None:
        for part in self.parts:
            names = {p.name for p in part.inner._parameter_list}
            mine = {k: v for k, v in state.items() if any(k.startswith(f"{name}_") for name in names)}
            masters = {k: v for k, v in state.get("master_weights", {}).items() if k in names}
            part.inner.set_state_dict({**mine, "master_weights": masters} if masters else mine)

    def _create_accumulators(self, block: Any, parameters: Sequence[Tensor]) -> None:
        with paddle.no_grad():
            for part in self.parts:
                names = {p.name for p in part.inner._parameter_list}
                part.inner._create_accumulators(block, [p for p in parameters if p.name in names])

"""Optimizer states, gradients and parameters shared among ranks (1910.02054, stages 1 to 3), once
for the dense parameters and once for Fleet's experts.

Fleet's first version is used, which gives whole parameters to ranks: its second cuts across them,
loses gradients without `main_grad` and lets replicas diverge beside data parallelism (traps b, c),
and a checkpoint of whole parameters can be read under any layout. Over experts the first version
goes wrong only because it takes one group for all parameters (trap g): here the experts have an
engine over their own group. Stages 2 and 3 keep that engine and its owners. Fleet's own
group_sharded layers wait, inside the backward, for a gradient of every parameter in every
micro-batch, or gather layers in the order of the first step: a picture on one rank alone stops
them. Here gradients go to their owners after each micro-batch, and with recompute after each block,
in one order on all ranks (`fold_`); stage 3 also lets go of the blocks' parameters (`blocks.py`).
Refuses to know: models, learning-rate schedules, files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import paddle
import paddle.distributed as dist
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


def _engine(inner: Any, over: _Over) -> Any:
    from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer

    class Owners(DygraphShardingOptimizer):
        """Fleet's engine, told which parameters have changed: from stage 2 on only their owners
        hold the gradients that it would ask.
        """

        changed: set[str] | None = None
        released: frozenset[str] = frozenset()

        def _sharding_sync_parameters(self) -> None:
            if self.changed is None:
                super()._sharding_sync_parameters()
                return
            with paddle.no_grad():
                for rank, parameters in self._rank2params.items():
                    for p in parameters:
                        if p.name in self.changed and p.name not in self.released:
                            dist.broadcast(p, src=over.group.ranks[rank], group=over.group.fleet)

    return Owners(inner, over)


class _Part:
    """Some of the parameters, and the group over which they are averaged and, with stage 1 on,
    their optimizer states are shared.
    """

    def __init__(self, parameters: list[Tensor], group: Group, make: MakeOptimizer, shard: bool) -> None:
        self.parameters, self.group = parameters, group
        self.names = {p.name for p in parameters}
        self.inner = make(parameters)
        self.sharded: Any = None
        if shard and group.size > 1:
            self.over = _Over(group)
            self.sharded = _engine(self.inner, self.over)

    def average_(self, parameters: Sequence[Tensor]) -> None:
        held = [p for p in parameters if p.grad is not None]
        if self.sharded is not None:
            # Only those with a gradient: the engine would invent zeros for the others, and AdamW
            # would decay them.
            self.sharded.reduce_gradients(held, self.over)
        elif self.group.size > 1:
            all_reduce_(held, self.group.fleet, 1.0 / self.group.size)

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter.name in self.names

    def owners(self) -> dict[str, int]:
        return dict(self.sharded._param2rank) if self.sharded is not None else {}

    def step(self) -> None:
        (self.sharded or self.inner).step()


class MeshOptimizer:
    """The optimizer of a mesh: `make` builds one for a list of parameters. Behaves as Paddle's for
    set_lr, step, state_dict and set_state_dict; the states are those of the parameters that this
    rank owns.
    """

    def __init__(self, trainable: Sequence[Tensor], mesh: Mesh, make: MakeOptimizer) -> None:
        experts = [p for p in trainable if is_fleet_expert(p, mesh)]
        dense = [p for p in trainable if not is_fleet_expert(p, mesh)]
        shard = mesh.layout.sharding_stage > 0
        groups = [(dense, mesh.group("sharding")), (experts, mesh.group("expert_data"))]
        self.parts = [_Part(found, group, make, shard) for found, group in groups if found]
        self.data = mesh.group("data")
        self.dense = dense
        self.owner_of = {name: rank for part in self.parts for name, rank in part.owners().items()}
        self.mesh = mesh
        # of the window so far, from stage 2 on: the gradients that this rank owns
        self.folded: dict[str, Tensor] = {}
        self.changed: set[str] = set()

    def average_(self, only: set[str] | None = None) -> None:
        """Average gradients over the ranks that saw other rows; with sharding only the owner of a
        parameter has the result. `only`: of these.
        """
        chosen = [(part, [p for p in part.parameters if only is None or p.name in only]) for part in self.parts]
        if self.data.size > 1:
            dense = [p for p in self.dense if only is None or p.name in only]
            all_reduce_(dense, self.data.fleet, 1.0 / self.data.size)
        for part, parameters in chosen:
            part.average_(parameters)

    def fold_(self, parameters: Sequence[Tensor]) -> None:
        """Stages 2 and 3: hand these gradients to their owners, who add them up over the window,
        and drop them. The same call on every rank.
        """
        self.average_({p.name for p in parameters})
        with paddle.no_grad():
            for part in self.parts:
                owners = part.owners()
                for p in parameters:
                    if p.grad is None or p not in part:
                        continue
                    self.changed.add(p.name)
                    if owners.get(p.name, part.group.rank) == part.group.rank:
                        before = self.folded.get(p.name)
                        self.folded[p.name] = p.grad.clone() if before is None else before.add_(p.grad)
                    p.clear_gradient(False)

    def unfold_(self) -> None:
        """The owners' sums become their gradients; nobody else has one."""
        for part in self.parts:
            for p in part.parameters:
                if p.name in self.folded:
                    p.grad = self.folded.pop(p.name)
            if part.sharded is not None:
                part.sharded.changed = self.changed
        self.changed = set()

    def forget_(self) -> None:
        """Drop what was folded of a window that is not to be stepped with."""
        self.folded, self.changed = {}, set()

    def release(self, names: set[str]) -> None:
        """Stage 3: these are gathered when they are used, not after the step."""
        for part in self.parts:
            if part.sharded is not None:
                part.sharded.released = frozenset(names)

    def owned(self) -> list[Tensor]:
        """The parameters whose states are on this rank."""
        return [
            p
            for part in self.parts
            for p in part.parameters
            if part.owners().get(p.name, part.group.rank) == part.group.rank
        ]

    @property
    def _parameter_list(self) -> list[Tensor]:
        """As Paddle's optimizers name what they update."""
        return self.owned()

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

"""Mistakes that a layout could make, each of which a parity run must notice. `applied(name)` makes
one for the length of a `with`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import paddle
from paddle.distributed.fleet.meta_optimizers.dygraph_optimizer import DygraphShardingOptimizer

from ernie_tune.machine.alone import LocalEngine
from ernie_tune.machine.fleet import DistributedEngine
from ernie_tune.models.ernie import PLAN
from ernie_tune.objectives import logprobs
from ernie_tune.parallel import expert, gradients, parallelize, pipeline, sharding, tensor
from ernie_tune.parallel.sharding import MeshOptimizer


def _nothing(*_: Any) -> None:
    return None


def _dense_only(parameter: Any, mesh: Any, owner: Any) -> bool:
    return bool(mesh.rank_in("tensor") == 0 and mesh.rank_in("batch") == 0)


def _last_alone(self: MeshOptimizer) -> None:
    for name in self.folded:
        self.folded[name] = self.folded[name] * 0.5
    right_unfold(self)


right_unfold = MeshOptimizer.unfold_


def _zeros(self: Any, trainable: Any) -> None:
    for value in trainable.values():
        if value.grad is None:
            value.grad = paddle.zeros_like(value)


def _drifted(model: Any, mesh: Any) -> None:
    with paddle.no_grad():
        value = dict(model.named_parameters())["norm.weight"]
        value.set_value(value + 1e-4 * mesh.rank)


def _partial_sends(*settings: Any) -> Any:
    """Fleet's own setting: each tensor rank sends its share of the boundary, and the receivers join
    the shares.
    """
    strategy = right_strategy(*settings)
    strategy.pipeline_configs = {**strategy.pipeline_configs, "enable_partial_send_recv": True}
    return strategy


right_strategy = pipeline._engine_strategy


@dataclass(frozen=True)
class Mutant:
    """`patch` makes the mistake; `degrees` and `job`: where it must show. `told`: what the
    self-check after the first step says of it, if it can.
    """

    patch: Callable[[], Any]
    degrees: dict[str, Any]
    job: dict[str, Any] = field(default_factory=dict)
    told: str = ""
    raises: str = ""


_TP, _SP = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}
_DP, _EP = {"data": 2}, {"data": 2, "expert": 2}
_TE, _SH = {**_SP, "expert": 2}, {"sharding": 2, "sharding_stage": 1}
_LORA = {"train": "lora"}

MUTANTS: dict[str, Mutant] = {
    "gradients are not averaged over data ranks": Mutant(
        lambda: mock.patch.object(MeshOptimizer, "average_", _nothing), _DP, told="differs between the batch ranks"
    ),
    "partial gradients of replicated factors are not added": Mutant(
        lambda: mock.patch.object(gradients, "sum_partial_", _nothing),
        _TP,
        _LORA,
        told="differs between the tensor ranks",
    ),
    "partial gradients are not added under sequence parallelism": Mutant(
        lambda: mock.patch.object(gradients, "sum_partial_", _nothing), _SP, told="differs between the tensor ranks"
    ),
    "counts are those of this rank": Mutant(
        lambda: mock.patch.object(DistributedEngine, "counts", lambda self, c: dict(c)), _DP
    ),
    "experts are not scaled": Mutant(lambda: mock.patch.object(gradients, "scale_experts_", _nothing), _EP),
    "every copy is counted in the norm": Mutant(
        lambda: mock.patch.object(gradients, "counted_here", return_value=True), _TP
    ),
    "slices are counted on one rank alone": Mutant(
        lambda: mock.patch.object(gradients, "owners", return_value=("batch", "tensor")), _TP
    ),
    "a row layer is missing from the table": Mutant(
        lambda: mock.patch.dict(PLAN, {"layers.*.self_attn.o_proj.weight": "whole"}),
        _TP,
        raises="complete the sharding table",
    ),
    "blocks are entered without a sum of gradients": Mutant(
        lambda: mock.patch.object(tensor, "enter", lambda x, g, r: x), _TP, told="differs between the tensor ranks"
    ),
    "what no rank touched is given zeros": Mutant(
        lambda: mock.patch.object(gradients.Presence, "complete", _zeros), _SH, {"images": ()}
    ),
    "rows come back in another order": Mutant(lambda: mock.patch.object(expert, "_reordered", lambda x, order: x), _EP),
    "usage is that of this rank": Mutant(
        lambda: mock.patch.object(DistributedEngine, "update_router_bias", LocalEngine.update_router_bias),
        _DP,
        {"bias_update": 0.02},
    ),
    "routers know only the tokens of their rank": Mutant(
        lambda: mock.patch.object(tensor.SummedTallies, "forward", lambda self, x: x),
        _SP,
        {"balance": [0.05, 0.02, 0.01], "optimizer": "sgd"},
    ),
    "the hidden states' gradient is that of a slice of the vocabulary": Mutant(
        lambda: mock.patch.object(logprobs._Slice, "whole", lambda self, x: x), _TP
    ),
    "unused experts keep a gradient of zero": Mutant(
        lambda: mock.patch.object(expert.ExchangedRows, "drop_unused", _nothing), _EP, {"images": ()}
    ),
    "replicas start with other values": Mutant(
        lambda: mock.patch.object(parallelize, "equalise", _drifted),
        _TP,
        told="norm.weight differs between the tensor ranks",
    ),
    "sharding ranks do not hand on what they updated": Mutant(
        lambda: mock.patch.object(DygraphShardingOptimizer, "_sharding_sync_parameters", _nothing),
        _SH,
        told="differs between the batch ranks",
    ),
    "the optimizer does not see a parameter": Mutant(
        lambda: mock.patch.object(MeshOptimizer, "step", _nothing), _TP, told="did not change in the first step"
    ),
    "a recomputed block over a frozen embedding is cut off": Mutant(  # trap p
        lambda: mock.patch.multiple("ernie_tune.peft.model", opened=lambda recompute: recompute),
        _TP,
        {**_LORA, "recompute": True},
    ),
    "experts are counted on every rank that has tokens for them": Mutant(  # trap h
        lambda: mock.patch.object(gradients, "counted_here", _dense_only), _EP
    ),
    "owners of gradients do not add up a window": Mutant(
        lambda: mock.patch.object(MeshOptimizer, "unfold_", _last_alone), {**_SH, "sharding_stage": 2}
    ),
    "experts of all ranks take part in one sharding group": Mutant(
        lambda: mock.patch.object(sharding, "is_fleet_expert", return_value=False),
        {**_SH, "expert": 2},
    ),
}

# Of layouts of four processes.
FOURS: dict[str, Mutant] = {
    "boundaries between stages are taken for equal on the tensor ranks": Mutant(  # trap r
        lambda: mock.patch.object(pipeline, "_engine_strategy", _partial_sends), {**_SP, "pipe": 2}
    ),
}

# Mistakes that end in ranks waiting for each other, or taking one message for another.
FATAL: dict[str, Mutant] = {
    "a rank whose rows need no gradient skips the exchange": Mutant(  # trap u
        lambda: mock.patch.object(parallelize, "_open", _nothing), _EP, {"train": "frozen:aligner", "images": (0,)}
    ),
    "the branches of a routing layer have no order": Mutant(
        lambda: mock.patch.object(expert._After, "apply", lambda x, other: x), _TE, {"train": "lora"}
    ),
}


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    if not name:
        yield
        return
    with {**MUTANTS, **FOURS, **FATAL}[name].patch():
        yield

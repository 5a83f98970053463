"""Mistakes that a layout could make, each of which a parity run must notice. `applied(name)` makes one for the length of a `with`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from ernie_tune.models.ernie import PLAN
from ernie_tune.parallel import collectives, expert, gradients, tensor
from ernie_tune.parallel.sharding import MeshOptimizer
from ernie_tune.train.distributed import DistributedEngine


def _nothing(*_: Any) -> None:
    return None


MUTANTS: dict[str, Callable[[], Any]] = {
    "gradients are not averaged over data ranks": lambda: mock.patch.object(MeshOptimizer, "average_", _nothing),
    "partial gradients of tensor ranks are not added": lambda: mock.patch.object(gradients, "sum_partial_", _nothing),
    "counts are those of this rank": lambda: mock.patch.object(DistributedEngine, "counts", lambda self, c: dict(c)),
    "experts are not scaled": lambda: mock.patch.object(gradients, "scale_experts_", _nothing),
    "every copy is counted in the norm": lambda: mock.patch.object(gradients, "counted_here", return_value=True),
    "a row layer is missing from the table": lambda: mock.patch.dict(
        PLAN, {"layers.*.self_attn.o_proj.weight": "whole"}
    ),
    "blocks are entered without a sum of gradients": lambda: mock.patch.object(tensor, "enter", lambda x, g, r: x),
    "a missing gradient is left out": lambda: mock.patch.object(gradients.Presence, "complete", _nothing),
    "experts are ordered by source alone": lambda: mock.patch.object(expert, "_reordered", lambda x, order: x),
    "tokens are cut evenly": lambda: mock.patch.object(
        collectives, "bounds", lambda total, group: [r * (total // group.size) for r in range(group.size)] + [total]
    ),
    "usage is that of this rank": lambda: mock.patch.object(
        DistributedEngine,
        "update_router_bias",
        lambda self, model, c: __import__("ernie_tune.models.moe", fromlist=["x"]).update_correction_bias(model, c),
    ),
}


@contextlib.contextmanager
def applied(name: str) -> Iterator[None]:
    if not name:
        yield
        return
    with MUTANTS[name]():
        yield

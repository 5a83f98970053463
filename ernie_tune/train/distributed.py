"""The loop's engine on a Fleet mesh: the same calls as on one process, with the sums between them. `pipeline` stages override forward and backward.

    mesh = init_mesh(Degrees(tensor=2, sharding=2, sharding_stage=1))
    engine = DistributedEngine.lay(model, mesh)                     # model: with its adapters on, not yet split
    optimizer = engine.optimizer(make)                              # make(parameters) -> an optimizer of Paddle
    loop = Loop(model, objective, optimizer, schedule, settings, engine)

Refuses to know: objectives' arithmetic, settings' names, files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.utils import unique_name

from ernie_tune.models.ernie import PLAN
from ernie_tune.models.moe import MoELayer, update_correction_bias
from ernie_tune.parallel import gradients
from ernie_tune.parallel.collectives import TokenRuns
from ernie_tune.parallel.expert import ExchangedRows
from ernie_tune.parallel.mesh import MAX, Mesh
from ernie_tune.parallel.parallelize import parallelize
from ernie_tune.parallel.selfcheck import check_moved, check_replicas, fingerprints
from ernie_tune.parallel.sharding import MeshOptimizer
from ernie_tune.peft.slots import ADAPTER_PLAN
from ernie_tune.train.engine import Engine, Window, Work


class DistributedEngine(Engine):
    """See the module's docstring. `self_check`: compare replicas after the first step, and look whether everything moved."""

    def __init__(self, model: nn.Layer, mesh: Mesh, runs: TokenRuns | None = None, self_check: bool = True) -> None:
        self.mesh, self.runs, self.self_check = mesh, runs, self_check
        self.batch = mesh.batch
        self.gradient_scale = float(mesh.batch[1])
        self.is_writer = mesh.is_writer
        self.named = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        self.exchanges = [layer for layer in model.sublayers() if isinstance(layer, ExchangedRows)]
        self.presence = gradients.Presence(self.named, mesh)
        self.owner_of: Mapping[str, int] = {}
        self.before: dict[str, int] = {}
        self.touched: set[str] = set()
        self._optimizer: MeshOptimizer | None = None

    @classmethod
    def lay(cls, model: nn.Layer, mesh: Mesh, self_check: bool = True) -> DistributedEngine:
        """Split `model` over `mesh` in place, and the engine for it."""
        return cls(model, mesh, parallelize(model, PLAN, mesh, adapters=ADAPTER_PLAN), self_check)

    def optimizer(self, make: Callable[[list[Tensor]], Any]) -> MeshOptimizer:
        """The mesh's optimizer: `make` is called once for the dense parameters and once for Fleet's experts, with plain lists."""
        self._optimizer = MeshOptimizer(list(self.named.values()), self.mesh, make)
        self.owner_of = self._optimizer.owner_of
        return self._optimizer

    def seed(self, base: int, step: int) -> int:
        return self.mesh.seed(base, step)

    def counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        total: dict[str, float] = {}
        for part in self.mesh.group("batch").objects(dict(counts)):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def forward_backward(self, work: Work, window: Sequence[Any]) -> tuple[float, dict[str, tuple[float, float]]]:
        if work.router is not None and self.runs is not None:
            raise ValueError(
                "router losses (router_aux_loss_coef, moe_orthogonal_loss_lambda, router_z_loss_coef) must be 0 with sequence_parallel, where no rank "
                "sees a whole pack; turn them off, or turn off sequence_parallel"
            )
        return super().forward_backward(work, window)

    def synchronise(self, parameters: Sequence[Tensor]) -> None:
        if self._optimizer is None:
            raise AssertionError("optimizer() comes first")
        for rows in self.exchanges:
            rows.drop_unused()
        self.presence.complete(self.named)
        gradients.sum_partial_(parameters, self.mesh)
        self._optimizer.average_()
        gradients.scale_experts_(parameters, self.mesh)

    def norm(self, parameters: Sequence[Tensor]) -> float:
        return gradients.global_norm(parameters, self.mesh, self.owner_of)

    def step(self, optimizer: Any, rate: float) -> None:
        if self.self_check and not self.before:
            self.before = fingerprints(self.named)
            # A step can be lost to rounding where it is tiny, or where bfloat16 values have a float32 master: those say nothing.
            told = {n: p for n, p in self.named.items() if rate >= 1e-6 and p.dtype in (paddle.float32, paddle.float64)}
            self.touched = {name for name, p in told.items() if p.grad is not None and _any(p.grad)}
        optimizer.set_lr(rate)
        with unique_name.guard():
            optimizer.step()

    def update_router_bias(self, model: Any, coefficient: float) -> None:
        """Usage is counted where tokens are routed: on the batch ranks, and with sequence parallelism on the tensor ranks too."""
        axes = ["batch"] + ["tensor"] * (self.runs is not None)
        for layer in model.sublayers():
            if isinstance(layer, MoELayer):
                for axis in axes:
                    self.mesh.group(axis).sum_(layer.moe_statics.expert_usage)
        update_correction_bias(model, coefficient)

    def totals(self, window: Window) -> Window:
        done = Window()
        for part in self.mesh.group("batch").objects(window):
            done.add(part.loss, part.metrics)
            done.num_tokens += part.num_tokens
            done.num_rows += part.num_rows
        return done

    def stopped(self, interrupted: bool) -> bool:
        flag = paddle.to_tensor(np.array([int(interrupted)], np.int32))
        return bool(self.mesh.group("world").reduce_(flag, MAX).item())

    def after_first_step(self, model: Any) -> None:
        if not self.self_check:
            return
        check_replicas(dict(model.named_parameters()), self.mesh)
        everywhere = {name for part in self.mesh.group("stage").objects(sorted(self.touched)) for name in part}
        check_moved(self.before, self.named, everywhere, self.mesh)


def _any(gradient: Tensor) -> bool:
    return bool((gradient != 0).any())

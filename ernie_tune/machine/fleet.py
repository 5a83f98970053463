"""The loop's engine on a Fleet mesh: the same calls as on one process, with the sums between them.

    mesh = init_mesh(Layout(tensor=2, pipe=2), accumulation=8)
    engine = DistributedEngine.lay(model, mesh, accumulation=8)     # model: with its adapters on,
                                                                    not yet split
    optimizer = engine.optimizer(make)                              # make(parameters) -> an
                                                                    optimizer of Paddle
    loop = Loop(model, objective, optimizer, schedule, settings, engine)

Refuses to know: objectives' arithmetic, settings' names, files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor
from paddle.utils import unique_name

from ernie_tune.config.language import say
from ernie_tune.machine.alone import LocalEngine, Window, Work
from ernie_tune.machine.stages import StagedModel, item_costs, pipeline_items, stages_of
from ernie_tune.models.ernie import PLAN, ErnieModel
from ernie_tune.models.moe import MoELayer, update_correction_bias
from ernie_tune.parallel import gradients
from ernie_tune.parallel.blocks import Blocks, kept_elsewhere
from ernie_tune.parallel.collectives import TokenRuns
from ernie_tune.parallel.expert import ExchangedRows
from ernie_tune.parallel.mesh import MAX, Mesh
from ernie_tune.parallel.parallelize import parallelize
from ernie_tune.parallel.pipeline import Cut, cut_at, cut_balanced
from ernie_tune.parallel.placement import Placement, place, placement_of, split_
from ernie_tune.parallel.selfcheck import check_moved, check_replicas, fingerprints
from ernie_tune.parallel.sharding import MeshOptimizer
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.slots import ADAPTER_PLAN


@dataclass(frozen=True)
class Laid:
    """What `spread` found out: the token runs of sequence parallelism, and where a pipeline is
    cut.
    """

    runs: TokenRuns | None = None
    cut: Cut | None = None

    @staticmethod
    def part(parameter: Tensor, whole: tuple[int, ...]) -> tuple[Any, ...]:
        """The index, in a whole value of shape `whole`, of what this rank keeps of a parameter."""
        where = placement_of(parameter)
        if where.axis is None:
            return ()
        here = where.indices(whole[where.axis])
        at = slice(here.start, here.stop) if isinstance(here, range) else list(here)
        return (*[slice(None)] * where.axis, at)


def spread(model: ErnieModel, mesh: Mesh, bounds: Sequence[int] = ()) -> Laid:
    """Lay `model`, with its adapters on, over `mesh` in place. It may have no values yet
    (`AutoModel.from_pretrained(..., lay=...)`): then only this rank's parts are ever read:

        laid: list[Laid] = []
        model = AutoModel.from_pretrained(folder, lay=lambda empty: laid.append(spread(empty, mesh))
        or Laid.part) engine = DistributedEngine.over(model, mesh, laid[0])
    """
    cut = None
    if mesh.size("pipe") > 1:
        items, d = pipeline_items(model.config), mesh.layout
        if bounds:
            cut = cut_at(items, bounds, d.pipe, d.virtual_pipe)
        else:
            cut = cut_balanced(items, item_costs(model.config), d.pipe, d.virtual_pipe)
        model.keep(stages_of(cut, mesh.rank_in("pipe")))
    runs = parallelize(model, PLAN, mesh, adapters=ADAPTER_PLAN)
    if isinstance(model, PeftModel):
        _split_alternatives(model)
    return Laid(runs, cut)


def _split_alternatives(model: PeftModel) -> None:
    """A parameter that an adapter trains in full has other values for when the adapter is off: they
    are split as it is.
    """
    current = dict(model.named_parameters())
    for values in (model.originals, *(adapter.copies for adapter in model.adapters.values())):
        for name, value in values.items():
            where = placement_of(current[name]) if name in current else Placement()
            if where.axis is not None and where.handle is not None and placement_of(value) != where:
                split_(value, where.axis, where.handle)
                place(value, where)


_BLOCKS = "layers"  # what stage 3 keeps apart, block by block


def unkept(model: ErnieModel, mesh: Mesh) -> frozenset[str]:
    """Paddle's names of the parameters that this rank will not keep under sharding stage 3, once
    the optimizer is made: a model that has no values yet need not read them. None of them where an
    adapter starts from the layers' values, which it must then see.
    """
    starts = isinstance(model, PeftModel) and any(
        a.waiting and (a.copies or _norms(a.config)) for a in model.adapters.values()
    )
    if mesh.layout.sharding_stage < 3 or starts:
        return frozenset()
    trained = [p for p in model.parameters() if not p.stop_gradient]
    # Fleet deals parameters out by their sizes alone, whatever the optimizer.
    dealt = MeshOptimizer(trained, mesh, lambda ps: paddle.optimizer.SGD(1.0, parameters=ps))
    return kept_elsewhere(model, mesh, dealt.owner_of, _BLOCKS)


def _norms(config: Any) -> bool:
    return isinstance(config, LoraConfig) and config.use_dora


class DistributedEngine(LocalEngine):
    """See the module's docstring. `self_check`: compare replicas after the first step, and look
    whether everything moved.
    """

    def __init__(
        self,
        model: ErnieModel,
        mesh: Mesh,
        runs: TokenRuns | None = None,
        staged: StagedModel | None = None,
        self_check: bool = True,
    ) -> None:
        self.model, self.mesh, self.runs, self.staged, self.self_check = model, mesh, runs, staged, self_check
        self.batch = mesh.batch
        self.gradient_scale = float(mesh.batch[1])
        self.is_writer = mesh.is_writer
        self.named = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
        self.exchanges = {name: x for name, x in model.named_sublayers() if isinstance(x, ExchangedRows)}
        self.presence = gradients.Presence(self.named, mesh)
        self.owner_of: Mapping[str, int] = {}
        self.before: dict[str, int] = {}
        self.touched: set[str] = set()
        self.blocks: Blocks | None = None
        self._optimizer: MeshOptimizer | None = None

    @classmethod
    def lay(
        cls,
        model: ErnieModel,
        mesh: Mesh,
        *,
        accumulation: int = 1,
        bounds: Sequence[int] = (),
        self_check: bool = True,
    ) -> DistributedEngine:
        """Lay `model` over `mesh` in place, and the engine for it. With a pipeline: `accumulation`
        micro-batches a window, and where its stages begin among `pipeline_items` (`bounds`, by
        default balanced by cost); `callable` then stands for the model where it is called.
        ValueError for layouts that cannot be.
        """
        return cls.over(model, mesh, spread(model, mesh, bounds), accumulation=accumulation, self_check=self_check)

    @classmethod
    def over(
        cls, model: ErnieModel, mesh: Mesh, laid: Laid, *, accumulation: int = 1, self_check: bool = True
    ) -> DistributedEngine:
        """The engine for a model that `spread` has laid over `mesh`, once it has its values."""
        staged = None if laid.cut is None else StagedModel(model, laid.cut, accumulation, mesh, laid.runs)
        return cls(model, mesh, laid.runs, staged, self_check)

    @property
    def callable(self) -> Any:
        """What evaluation and generation call: the model, or its stages together."""
        return self.staged or self.model

    def optimizer(self, make: Callable[[list[Tensor]], Any]) -> MeshOptimizer:
        """The mesh's optimizer: `make` is called once for the dense parameters and once for Fleet's
        experts, with plain lists.
        """
        self._optimizer = MeshOptimizer(list(self.named.values()), self.mesh, make)
        self.owner_of = self._optimizer.owner_of
        if self.mesh.layout.sharding_stage == 3:
            self.blocks = Blocks(self.model, self.mesh, self.owner_of, _BLOCKS, self._fold)
            self._optimizer.release(self.blocks.names())
        return self._optimizer

    def _fold(self, prefix: str = "") -> None:
        """Hand the gradients under `prefix` to their owners."""
        if self._optimizer is None:
            raise AssertionError("optimizer() comes first")
        for name, rows in self.exchanges.items():
            if name.startswith(prefix):
                rows.drop_unused()
        self.presence.complete(self.named, prefix)
        parameters = [p for name, p in self.named.items() if name.startswith(prefix)]
        gradients.sum_partial_(parameters, self.mesh)
        self._optimizer.fold_(parameters)

    def after_micro_batch(self) -> None:
        if self.mesh.layout.sharding_stage < 2:
            return
        if self.blocks is not None:
            self.blocks.close()
        self._fold()

    def whole(self) -> AbstractContextManager[None]:
        return nullcontext() if self.blocks is None else self.blocks.whole()

    def seed(self, base: int, step: int) -> int:
        return self.mesh.seed(base, step)

    def counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        total: dict[str, float] = {}
        for share in self.mesh.group("batch").objects(dict(counts)):
            for name, value in share.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def forward_backward(self, work: Work, window: Sequence[Any]) -> tuple[float, dict[str, tuple[float, float]]]:
        if self.blocks is not None and work.recompute is None:
            raise ValueError(
                say(
                    "sharding stage 3 must go with recompute: true, which says when a block's parameters are "
                    "needed; set it, or use stage 2",
                    "sharding stage3 须与 recompute: true 同用，由它决定何时需要各块的参数；请设置，或用 stage2",
                )
            )
        if self.staged is None:
            return super().forward_backward(work, window)
        done = self.staged.forward_backward(work, window, self.gradient_scale, self.batch[1])
        return done.loss, done.metrics

    def synchronise(self, parameters: Sequence[Tensor]) -> None:
        if self._optimizer is None:
            raise AssertionError("optimizer() comes first")
        if self.mesh.layout.sharding_stage >= 2:
            self._optimizer.unfold_()
        else:
            for rows in self.exchanges.values():
                rows.drop_unused()
            self.presence.complete(self.named)
            gradients.sum_partial_(parameters, self.mesh)
            self._optimizer.average_()
        gradients.scale_experts_(parameters, self.mesh)

    def norm(self, parameters: Sequence[Tensor]) -> float:
        return gradients.global_norm(parameters, self.mesh, self.owner_of)

    def step(self, optimizer: Any, rate: float) -> None:
        if self.self_check and not self.before:
            with self.whole():
                self.before = fingerprints(self.named)
            # A step can be lost to rounding where it is tiny, or where bfloat16 values have a
            # float32 master: those say nothing.
            told = {n: p for n, p in self.named.items() if rate >= 1e-6 and p.dtype in (paddle.float32, paddle.float64)}
            self.touched = {name for name, p in told.items() if p.grad is not None and _any(p.grad)}
        optimizer.set_lr(rate)
        with unique_name.guard():
            optimizer.step()

    def update_router_bias(self, model: Any, coefficient: float) -> None:
        """Usage is counted where tokens are routed: on the batch ranks, and with sequence
        parallelism on the tensor ranks too.
        """
        axes = ["batch"] + ["tensor"] * (self.runs is not None)
        for layer in model.sublayers():
            if isinstance(layer, MoELayer):
                for axis in axes:
                    self.mesh.group(axis).sum_(layer.moe_statics.expert_usage)
        update_correction_bias(model, coefficient)

    def totals(self, window: Window) -> Window:
        done = Window()
        for share in self.mesh.group("batch").objects(window):
            done.add(share.loss, share.metrics)
            done.num_tokens += share.num_tokens
            done.num_rows += share.num_rows
        return done

    def clear(self, parameters: Sequence[Tensor]) -> None:
        super().clear(parameters)
        if self._optimizer is not None:
            self._optimizer.forget_()

    def stopped(self, interrupted: bool) -> bool:
        flag = paddle.to_tensor(np.array([int(interrupted)], np.int32))
        return bool(self.mesh.group("world").reduce_(flag, MAX).item())

    def after_first_step(self, model: Any) -> None:
        if not self.self_check:
            return
        everywhere = {name for part in self.mesh.group("stage").objects(sorted(self.touched)) for name in part}
        with self.whole():
            check_replicas(dict(model.named_parameters()), self.mesh)
            check_moved(self.before, self.named, everywhere, self.mesh)


def _any(gradient: Tensor) -> bool:
    return bool((gradient != 0).any())

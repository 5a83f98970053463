"""What the loop asks of the machine it runs on: one process here, a Fleet mesh in `fleet.py`. The
loop is the same for both.

A step calls, in this order, and every rank of a mesh makes the same calls:

    seed                    Paddle's generator, by (run, step) and this rank's place
    counts                  the window's divisor shares, summed over the ranks that read different
                            rows
    forward_backward        every micro-batch; leaves this rank's share of the window's gradient in
                            `parameter.grad`
    synchronise             gradients become the whole window's: data, sharding, partial sums of
                            tensor ranks, experts
    norm, clip              Euclidean norm of all gradients, each parameter counted once; scaled in
                            place
    step                    the optimizer
    update_router_bias      with the experts' usage of all ranks
    totals                  loss, metrics, tokens and rows of the whole window, the same on every
                            rank

Scale of gradients: `forward_backward` is given the global divisor. A rank's gradient is
`Engine.gradient_scale` times its share of the whole window's gradient, and `synchronise` averages
over ranks, as Fleet's engines do. A pipeline overrides `forward_backward` (and `totals`): the loss
and the metrics are known on its last stage only, the other stages return 0.0 and {} and are told by
`totals`.
Refuses to know: objectives' arithmetic, learning rates, files.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor
from paddle.utils import unique_name

from ernie_tune.models.moe import RouterTap, update_correction_bias
from ernie_tune.models.replay import COLUMN, forced_experts
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.objective import Objective
from ernie_tune.parallel.gradients import square_sum

Sums = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Work:
    """What a window is computed with. `divisor`: the window's global divisor. `count_usage`:
    routers count, for the bias update.
    """

    model: Any
    objective: Objective
    divisor: float
    router: RouterLossWeights | None = None
    count_usage: bool = False
    recompute: Callable[..., Tensor] | None = None

    def tap(self, micro_batches: int, scale: float = 1.0, batch: Any = None) -> RouterTap | None:
        """The routers' instructions for one of so many micro-batches: their losses are means over
        the window. `scale`: the engine's gradient scale over the number of ranks that read
        different rows.
        """
        noted = COLUMN in getattr(batch, "columns", {})
        force = forced_experts(batch, self.model.config) if noted else None
        if not self.router and not self.count_usage and force is None:
            return None
        return RouterTap(self.router, scale=scale / micro_batches, count_usage=self.count_usage, force=force)


@dataclass
class Window:
    """What one window amounts to, on this rank or, after `totals`, everywhere. `loss` is divided
    already, `metrics` are (sum, count).
    """

    loss: float = 0.0
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    num_tokens: int = 0
    num_rows: int = 0

    def add(self, loss: float, metrics: Sums) -> None:
        """One micro-batch more."""
        self.loss += loss
        for name, (total, count) in metrics.items():
            before = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (before[0] + total, before[1] + count)


def forward_loss(
    objective: Objective,
    model: Any,
    batch: Any,
    tap: RouterTap | None = None,
    recompute: Callable[..., Tensor] | None = None,
) -> LossOut:
    """One micro-batch through model and objective on one device."""
    hidden_TD = model(batch.inputs, tap=tap, recompute=recompute, read=batch.read_R)
    return with_flips(objective.loss(objective.outputs(model, hidden_TD, batch), batch), tap)


def with_flips(out: LossOut, tap: RouterTap | None) -> LossOut:
    """A loss with the share of (token, router) whose own choice differs from what was replayed."""
    if tap is None or not tap.flips:
        return out
    flips = {"mismatch/routing_flips": (float(sum(f for f, _ in tap.flips)), float(sum(n for _, n in tap.flips)))}
    return dataclasses.replace(out, metrics={**out.metrics, **flips})


def global_norm(gradients: Sequence[Tensor]) -> float:
    """Euclidean norm over all gradients; the sums over tensors are in float64."""
    return math.sqrt(math.fsum(square_sum(g) for g in gradients))


def clip_(gradients: Sequence[Tensor], norm: float, max_norm: float) -> None:
    """Scale all gradients in place so that their norm is at most `max_norm`; 0 never clips."""
    if max_norm > 0 and norm > max_norm:
        with paddle.no_grad():
            for g in gradients:
                g.scale_(max_norm / norm)


class LocalEngine:
    """One process: every sum over ranks is the value itself."""

    gradient_scale = 1.0
    # Whether this process writes what a run writes once, and (rank, size) among those that read
    # different rows.
    is_writer = True
    batch: tuple[int, int] = (0, 1)

    def seed(self, base: int, step: int) -> int:
        """Seed of Paddle's generator for one step."""
        return (base * 1_000_003 + step) % 2**31

    def counts(self, counts: Mapping[str, float]) -> dict[str, float]:
        """The divisor shares of all ranks that read different rows, added by name."""
        return dict(counts)

    def forward_backward(self, work: Work, window: Sequence[Any]) -> tuple[float, dict[str, tuple[float, float]]]:
        """Forward and backward of every micro-batch of this rank's window: its share of the loss,
        and its summed metrics.
        """
        done = Window()
        for batch in window:
            out = forward_loss(work.objective, work.model, batch, work.tap(len(window), batch=batch), work.recompute)
            scaled = out.total / work.divisor
            (scaled if self.gradient_scale == 1.0 else scaled * self.gradient_scale).backward()
            done.add(float(scaled), out.metrics)
            # What a PyLayer noted on its context lives as long as the graph: without this, through
            # the next micro-batch's forward too.
            del out, scaled
            self.after_micro_batch()
        return done.loss, done.metrics

    def after_micro_batch(self) -> None:
        """Called when the backward of a micro-batch is over."""

    def whole(self) -> AbstractContextManager[None]:
        """A `with` in which every parameter is whole on this rank up to its placement: needed to
        save, where stage 3 keeps them apart.
        """
        return nullcontext()

    def synchronise(self, parameters: Sequence[Tensor]) -> None:
        """Make this rank's gradients the whole window's. `parameters`: the trainable ones, in the
        model's order.
        """

    def norm(self, parameters: Sequence[Tensor]) -> float:
        """Euclidean norm of all gradients of the whole model, the same number on every rank."""
        return global_norm([p.grad for p in parameters if p.grad is not None])

    def clip(self, parameters: Sequence[Tensor], norm: float, max_norm: float) -> None:
        """Scale the gradients so that their norm is at most `max_norm`; 0 never clips."""
        clip_([p.grad for p in parameters if p.grad is not None], norm, max_norm)

    def step(self, optimizer: Any, rate: float) -> None:
        """One step of the optimizer at this learning rate."""
        optimizer.set_lr(rate)
        # Paddle numbers an optimizer's tensors by a global counter; in a scope of its own each has
        # the same name in every run.
        with unique_name.guard():
            optimizer.step()

    def update_router_bias(self, model: Any, coefficient: float) -> None:
        """Move the routers' selection biases by the usage that the window's forwards counted."""
        update_correction_bias(model, coefficient)

    def totals(self, window: Window) -> Window:
        """The whole window, the same on every rank."""
        return window

    def clear(self, parameters: Sequence[Tensor]) -> None:
        """Drop gradients and their memory."""
        for p in parameters:
            p.clear_gradient(False)

    def stopped(self, interrupted: bool) -> bool:
        """Whether any rank was asked to stop: all must leave the loop at the same step."""
        return interrupted

    def after_first_step(self, model: Any) -> None:
        """Called once, after the first optimizer step: the place for a check of the layout. Raises
        RuntimeError where it is wrong.
        """

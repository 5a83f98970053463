"""THE loop: windows of micro-batches in, one record per optimizer step out. Saving, evaluating and logging are the caller's `if`s.

What changes a gradient happens in `_step`, in this order: seed, forward and backward of each micro-batch, one division by the window's global
count, clipping, AdamW, the router's bias rule. A loss or gradient that is no number changes nothing: the weights stay the last good ones.
Refuses to know: the method (an `Objective`), the data's origin, files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor
from paddle.utils import unique_name

from ernie_tune.models.moe import RouterTap, update_correction_bias
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.train.objective import Objective, forward_loss
from ernie_tune.train.optim import Schedule, clip_, global_norm


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `loss` is the objective over the window, without router losses; `metrics` are means; `seconds` include reading the window."""

    step: int  # 1-based: steps done so far
    loss: float
    learning_rate: float
    grad_norm: float
    num_tokens: int
    num_rows: int
    seconds: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass
class LoopSettings:
    """What the loop needs beside model, objective and optimizer."""

    max_grad_norm: float = 1.0
    router: RouterLossWeights | None = None
    bias_update: float = 0.0
    recompute: Callable[..., Tensor] | None = None
    seed: int = 42


class Loop:
    """`for record in loop.steps(windows): ...` Each step is seeded by (seed, step), so a run that resumes needs no generator state."""

    def __init__(
        self,
        model: Any,
        objective: Objective,
        optimizer: paddle.optimizer.Optimizer,
        schedule: Schedule,
        settings: LoopSettings,
    ) -> None:
        self.model, self.objective, self.optimizer, self.schedule, self.settings = (
            model,
            objective,
            optimizer,
            schedule,
            settings,
        )
        self.parameters = [p for p in model.parameters() if not p.stop_gradient]
        self.step = self.tokens = self.rows = 0
        self.seconds = 0.0

    def steps(self, windows: Iterable[Sequence[Any]]) -> Iterator[StepRecord]:
        """One record per window until the schedule's last step."""
        iterator = iter(windows)
        while self.step < self.schedule.total_steps:
            start = time.perf_counter()
            window = next(iterator, None)
            if window is None:
                return
            yield self._step(window, start)

    def state_dict(self) -> dict[str, Any]:
        """What the steps so far amount to, by all processes that made them."""
        return {"step": self.step, "seconds": self.seconds, "tokens": self.tokens, "rows": self.rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self.seconds, self.tokens, self.rows = (state[k] for k in ("step", "seconds", "tokens", "rows"))

    def _step(self, window: Sequence[Any], start: float) -> StepRecord:
        s = self.settings
        paddle.seed((s.seed * 1_000_003 + self.step) % 2**31)
        self.model.train()
        rate = self.schedule.at(self.step)
        loss, metrics = self.accumulate(window)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = global_norm(gradients)
        if math.isfinite(loss) and math.isfinite(norm):
            clip_(gradients, norm, s.max_grad_norm)
            self.optimizer.set_lr(rate)
            # Paddle numbers an optimizer's tensors by a global counter; in a scope of its own each has the same name in every run.
            with unique_name.guard():
                self.optimizer.step()
            if s.bias_update:
                update_correction_bias(self.model, s.bias_update)
            self.objective.end(metrics)
        self.clear_gradients()
        self.step += 1
        tokens, rows = sum(batch.inputs.num_tokens for batch in window), sum(batch.num_rows for batch in window)
        seconds = time.perf_counter() - start
        self.tokens, self.rows, self.seconds = self.tokens + tokens, self.rows + rows, self.seconds + seconds
        means = {name: total / max(count, 1e-12) for name, (total, count) in metrics.items()}
        return StepRecord(self.step, loss, rate, norm, tokens, rows, seconds, means)

    def accumulate(self, window: Sequence[Any]) -> tuple[float, dict[str, tuple[float, float]]]:
        """Forward and backward of every micro-batch, leaving the window's gradient in the parameters; the loss and the summed metrics."""
        s = self.settings
        divisor = self.objective.begin(self.objective.counts(window))
        loss = 0.0
        metrics: dict[str, tuple[float, float]] = {}
        for batch in window:
            tap = (
                RouterTap(s.router, scale=1.0 / len(window), count_usage=bool(s.bias_update))
                if s.router or s.bias_update
                else None
            )
            out = forward_loss(self.objective, self.model, batch, tap, s.recompute)
            scaled = out.total / divisor
            scaled.backward()
            loss += float(scaled)
            for name, (total, count) in out.metrics.items():
                before = metrics.get(name, (0.0, 0.0))
                metrics[name] = (before[0] + total, before[1] + count)
            # What a PyLayer noted on its context lives as long as the graph: without this, through the next micro-batch's forward too.
            del out, scaled
        return loss, metrics

    def clear_gradients(self) -> None:
        """Drop gradients and their memory."""
        for p in self.parameters:
            p.clear_gradient(False)

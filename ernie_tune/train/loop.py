"""THE loop: windows of micro-batches in, one record per optimizer step out. Saving, evaluating and
logging are the caller's `if`s.

What changes a gradient happens in `_step`, in this order: seed, forward and backward of each
micro-batch, one division by the window's global count, the sum over ranks, clipping, AdamW, the
router's bias rule. A loss or gradient that is no number changes nothing: the weights stay the last
good ones. Refuses to know: the method (an `Objective`), how many processes there are (an engine),
the data's origin, files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import paddle
from paddle import Tensor

from ernie_tune.machine.alone import LocalEngine, Window, Work
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.objectives.objective import Objective
from ernie_tune.train.optim import Schedule


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step. `loss` is the objective over the window, without router losses; `metrics`
    are means; `seconds` include reading the window.
    """

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
    """`for record in loop.steps(windows): ...` Each step is seeded by (seed, step), so a run that
    resumes needs no generator state.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        optimizer: paddle.optimizer.Optimizer,
        schedule: Schedule,
        settings: LoopSettings,
        engine: LocalEngine | None = None,
    ) -> None:
        self.model, self.objective, self.optimizer, self.schedule, self.settings = (
            model,
            objective,
            optimizer,
            schedule,
            settings,
        )
        self.engine = engine or LocalEngine()
        self._checked = False
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
        s, engine = self.settings, self.engine
        paddle.seed(engine.seed(s.seed, self.step))
        self.model.train()
        rate = self.schedule.at(self.step)
        loss, metrics = self.accumulate(window)
        engine.synchronise(self.parameters)
        norm = engine.norm(self.parameters)
        tokens, rows = sum(batch.inputs.num_tokens for batch in window), sum(batch.num_rows for batch in window)
        done = engine.totals(Window(loss, metrics, tokens, rows))
        if math.isfinite(done.loss) and math.isfinite(norm):
            engine.clip(self.parameters, norm, s.max_grad_norm)
            engine.step(self.optimizer, rate)
            if s.bias_update:
                engine.update_router_bias(self.model, s.bias_update)
            self.objective.end(done.metrics)
            if not self._checked:
                engine.after_first_step(self.model)
                self._checked = True
        self.clear_gradients()
        self.step += 1
        seconds = time.perf_counter() - start
        self.tokens, self.rows, self.seconds = (
            self.tokens + done.num_tokens,
            self.rows + done.num_rows,
            self.seconds + seconds,
        )
        means = {name: total / max(count, 1e-12) for name, (total, count) in done.metrics.items()}
        return StepRecord(self.step, done.loss, rate, norm, done.num_tokens, done.num_rows, seconds, means)

    def accumulate(self, window: Sequence[Any]) -> tuple[float, dict[str, tuple[float, float]]]:
        """Forward and backward of every micro-batch, leaving this rank's share of the window's
        gradient in the parameters; its loss and summed metrics.
        """
        s = self.settings
        divisor = self.objective.begin(self.engine.counts(self.objective.counts(window)))
        work = Work(self.model, self.objective, divisor, s.router, bool(s.bias_update), s.recompute)
        return self.engine.forward_backward(work, window)

    def clear_gradients(self) -> None:
        """Drop gradients and their memory."""
        self.engine.clear(self.parameters)

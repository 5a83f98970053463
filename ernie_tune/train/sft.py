"""Supervised fine-tuning as a loop asks for it: weighted likelihood of the target tokens, and
weights that keep tasks in balance.

Refuses to know: optimizers, files, evaluation. The numbers are `objectives/`'s; this file connects
them to the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.data.batching import MicroBatch
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.objective import Outputs, logp_outputs
from ernie_tune.objectives.sft import sft_loss, token_coefficients


class TaskBalance:
    """Factors on the tasks' losses. "static": 1. "dwa" (1803.10704): K *
    softmax(r_k / T), r_k the ratio of a task's mean losses in the last two periods. "uncertainty"
    (1705.07115): sum_k exp(-s_k)/2 * L_k + s_k/2, with s_k learned by gradient steps on the host.
    """

    def __init__(
        self, kind: str = "static", period_steps: int = 1, temperature: float = 2.0, uncertainty_lr: float = 0.01
    ) -> None:
        if kind not in ("static", "dwa", "uncertainty"):
            raise ValueError(
                say(
                    f"balance ({kind!r}) must be static, dwa or uncertainty; use 'static'",
                    f"balance（{kind!r}）须为 static、dwa 或 uncertainty；可用 'static'",
                )
            )
        self.kind, self.period_steps, self.temperature, self.uncertainty_lr = (
            kind,
            max(1, period_steps),
            temperature,
            uncertainty_lr,
        )
        self.steps = 0
        self.log_variance: dict[str, float] = {}
        self.running: dict[str, list[float]] = {}
        self.past: list[dict[str, float]] = []

    def factors(self, counts: Mapping[str, float]) -> dict[str, float]:
        """Factor of each task present in a window; `counts` are their shares of the window's
        divisor and sum to it."""
        if self.kind == "uncertainty":
            total = sum(counts.values())
            return {
                k: 0.5 * math.exp(-self.log_variance.get(k, 0.0)) * total / max(n, 1e-12) for k, n in counts.items()
            }
        if self.kind == "dwa":
            return dwa(self.past, counts, self.temperature)
        return dict.fromkeys(counts, 1.0)

    def update(self, losses: Mapping[str, tuple[float, float]]) -> None:
        """Learn from one window: task -> (summed loss, count)."""
        self.steps += 1
        for task, (total, count) in losses.items():
            if self.kind == "uncertainty" and count:
                s = self.log_variance.get(task, 0.0)
                self.log_variance[task] = s - self.uncertainty_lr * (0.5 - 0.5 * math.exp(-s) * total / count)
            seen = self.running.setdefault(task, [0.0, 0.0])
            seen[0] += total
            seen[1] += count
        if self.steps % self.period_steps == 0:
            self.past = [*self.past[-1:], {k: t / n for k, (t, n) in self.running.items() if n}]
            self.running = {}

    def state_dict(self) -> dict[str, Any]:
        running = {k: list(v) for k, v in self.running.items()}
        return {"steps": self.steps, "log_variance": dict(self.log_variance), "running": running, "past": self.past}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.log_variance = state["steps"], dict(state["log_variance"])
        self.running, self.past = {k: list(v) for k, v in state["running"].items()}, list(state["past"])


def dwa(past: Sequence[Mapping[str, float]], tasks: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Dynamic weight averaging: K * softmax(L(t-1)/L(t-2) / T) over all K tasks known, whether in
    this window or not; 1 until two periods are known.

    The ratio of a task that was not seen in both periods is 1.
    """
    if len(past) < 2:
        return dict.fromkeys(tasks, 1.0)
    former, latter = past[-2], past[-1]
    ratio = {k: latter[k] / former[k] if k in latter and former.get(k) else 1.0 for k in {**latter, **tasks}}
    weights = {k: math.exp(r / temperature) for k, r in ratio.items()}
    total = sum(weights.values())
    return {k: len(weights) * weights[k] / total for k in tasks}


class SFTObjective:
    """Weighted negative log-likelihood of the target tokens."""

    def __init__(self, norm: str = "token", balance: TaskBalance | None = None) -> None:
        token_coefficients(
            np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64), norm
        )  # refuses an unknown norm now, not at step 1
        self.norm, self.balance = norm, balance or TaskBalance()
        self._factors: dict[str, float] = {}

    def _shares(self, batch: MicroBatch) -> tuple[np.ndarray, np.ndarray]:
        """(coefficient of each target, share of each row in the divisor)."""
        coefficient_N, _ = token_coefficients(batch.weight_N, batch.row_N, batch.row_tokens_R, self.norm)
        if self.norm == "token":
            return coefficient_N, np.bincount(batch.row_N, weights=coefficient_N, minlength=batch.num_rows)
        return coefficient_N, np.ones(batch.num_rows)

    def counts(self, window: Sequence[MicroBatch]) -> dict[str, float]:
        counts: dict[str, float] = {}
        for batch in window:
            for domain, share in zip(batch.domains, self._shares(batch)[1].tolist(), strict=True):
                counts[domain] = counts.get(domain, 0.0) + share
        return counts

    def begin(self, counts: Mapping[str, float]) -> float:
        self._factors = self.balance.factors(counts)
        return sum(counts.values())

    def outputs(self, model: Any, hidden_TD: Tensor, batch: MicroBatch) -> Outputs:
        return logp_outputs(model, hidden_TD, batch)

    def loss(self, outputs: Outputs, batch: MicroBatch) -> LossOut:
        logp_N = outputs["logp_N"]
        factor_R = np.array([self._factors.get(d, 1.0) for d in batch.domains], np.float32)
        coefficient_N, share_R = self._shares(batch)
        out = sft_loss(logp_N, coefficient_N * factor_R[batch.row_N])
        metrics = dict(out.metrics)
        tasks = sorted({d for d in batch.domains if d})
        if tasks:  # each task's own loss, averaged as the whole is
            nll_N = -logp_N.detach().numpy().astype(np.float64) * coefficient_N
            nll_R = np.bincount(batch.row_N, weights=nll_N, minlength=batch.num_rows)
            for task in tasks:
                rows = [i for i, d in enumerate(batch.domains) if d == task]
                metrics[f"task/{task}"] = (float(nll_R[rows].sum()), float(share_R[rows].sum()))
        return LossOut(out.total, float(share_R.sum()), metrics)

    def end(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        self.balance.update({k.removeprefix("task/"): v for k, v in metrics.items() if k.startswith("task/")})

    def state_dict(self) -> dict[str, Any]:
        return {"balance": self.balance.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.balance.load_state_dict(state["balance"])

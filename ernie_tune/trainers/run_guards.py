"""Everything that may warn in a run or stop it, with one state.

Refuses to know: the loop, how anything is measured, what is done about a verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ernie_tune.config.arguments import RunConfig
from ernie_tune.evaluate.measure import Measure
from ernie_tune.report.log import RunLog
from ernie_tune.train.guards import DivergenceGuard, EarlyStopping, ForgettingGuard, LearningWatch, Verdict
from ernie_tune.train.loop import StepRecord


class RunGuards:
    """Divergence, early stopping, forgetting, and whether anything is learned."""

    def __init__(self, config: RunConfig) -> None:
        e = config.eval
        self.config = config
        self.early = EarlyStopping(e.early_stopping_patience, e.metric_for_best_model, e.greater_is_better)
        self.divergence, self.watch = DivergenceGuard(), LearningWatch()
        self.forgetting: ForgettingGuard | None = None
        self.best_checkpoint = ""
        self.broken = False

    def start(self, measure: Measure, log: RunLog, resumed: bool) -> None:
        """Score the guard sets before training, once in the life of a run. Raises ValueError where
        the metric that is to choose is none of those measured.
        """
        if self.config.eval.eval_strategy != "no" and measure.first.get("metrics"):
            self.early.check(measure.first["metrics"])
        self.forgetting = measure.forgetting_guard(log, resumed)

    def after_step(self, record: StepRecord) -> list[Verdict]:
        verdict = self.divergence.look(record.step, record.loss, record.grad_norm)
        self.broken = verdict is not None and verdict.stop
        more = self.watch.look(record.step, {"loss": record.loss, "grad_norm": record.grad_norm})
        return ([verdict] if verdict else []) + more

    def after_evaluation(
        self, step: int, metrics: Mapping[str, float], measure: Measure, log: RunLog
    ) -> tuple[bool, list[Verdict]]:
        best, verdict = self.early.look(step, metrics)
        return best, ([verdict] if verdict else []) + measure.look_at_guards(log, self.forgetting)

    def state_dict(self) -> dict[str, Any]:
        return {
            "early": self.early.state_dict(),
            "divergence": self.divergence.state_dict(),
            "watch": self.watch.state_dict(),
            "best_checkpoint": self.best_checkpoint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.early.load_state_dict(state["early"])
        self.divergence.load_state_dict(state["divergence"])
        self.watch.load_state_dict(state["watch"])
        self.best_checkpoint = state["best_checkpoint"]

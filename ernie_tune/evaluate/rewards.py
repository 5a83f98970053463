"""Held-out prompts answered by the policy and judged by the rubric that it learns from.

Refuses to know: how a run is made, how rewards are computed, what a verdict does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ernie_tune.data.records import Record
from ernie_tune.evaluate.answers import Question, question
from ernie_tune.evaluate.measure import Measure
from ernie_tune.rewards.attacks import reference_answer
from ernie_tune.rewards.functions import Answered
from ernie_tune.rewards.rubric import Rubric
from ernie_tune.train.rollout_guards import RolloutWatch


class OnlineMeasure(Measure):
    """Held-out prompts are answered greedily and judged as in training; there is no loss on answers
    that nobody wrote.
    """

    def __init__(self, *args: Any, rubric: Rubric, watch: RolloutWatch) -> None:
        super().__init__(*args)
        self.rubric, self.watch = rubric, watch

    def during(self, *args: Any, **more: Any) -> dict[str, float]:
        """As any method's; the watch hears of it."""
        metrics = super().during(*args, **more)
        self.watch.measured(metrics)
        return metrics

    def _loss(self, rows: Sequence[Record], done: Callable[[int], object] = lambda count: None) -> dict[str, float]:
        done(len(rows))
        return {}

    def _measured(self, title: str, limit: int) -> tuple[dict[str, float], list[Question], list[str]]:
        """Without answers there would be nothing to measure."""
        return super()._measured(title, limit or max(1, self.config.eval.report_max_samples))

    def _questions(self, limit: int) -> list[Question]:
        count = min(limit, len(self.rows))
        return [_asked(self.rows[i * len(self.rows) // count]) for i in range(count)]

    def _answers(self, asked: Sequence[Question], done: Callable[[int], object]) -> tuple[dict[str, float], list[str]]:
        scores, given = super()._answers(asked, done)
        if not asked:
            return scores, given
        judged = self.rubric([(q.record, [Answered(text)]) for q, text in zip(asked, given, strict=True)])
        for name in self.rubric.names:
            known = [value for one in judged if (value := one[0].parts[name]) is not None]
            if known:
                scores[f"reward/{name}"] = float(np.mean(known))
        totals = [
            sum(w * (one[0].parts[n] or 0.0) for n, w in zip(self.rubric.names, self.rubric.weights, strict=True))
            for one in judged
        ]
        scores = {"reward": float(np.mean(totals)), **scores}
        return scores, given


def _asked(record: Record) -> Question:
    """A held-out prompt with its gold answer, or a dialogue cut before its last answer."""
    if record.messages[-1]["role"] == "assistant":
        return question(record)
    gold = record.reward.answer if record.reward else None
    answer = "" if gold is None else reference_answer(gold)
    whole = dataclasses.replace(record, messages=(*record.messages, {"role": "assistant", "content": answer}))
    return dataclasses.replace(question(whole), record=whole)

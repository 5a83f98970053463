"""Judges of the answers that nothing is learned from: whether they go on agreeing with what is
rewarded.

Refuses to know: how judges judge, what is learned, when a round is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ernie_tune.checkpoint.state import Ranks
from ernie_tune.rewards.rubric import Rubric
from ernie_tune.train.rolled import Rolled, number_of


class SecondJudges:
    """`rubric`: the judges, asked about every round's answers after these were rewarded."""

    def __init__(self, rubric: Rubric, ranks: Ranks) -> None:
        self.rubric, self.ranks = rubric, ranks

    def __call__(self, groups: Sequence[Rolled]) -> dict[str, float]:
        """monitor/<name>/mean, and monitor/<name>/spearman: the rank correlation with the reward
        over the answers of all ranks that both judge; nan where either is the same for all.
        """
        judged = self.rubric([(group.record, group.answers) for group in groups])
        reward_C = np.concatenate([*(group.reward_G for group in groups), np.zeros(0)])
        scored = [one for group in judged for one in group]
        mine = {name: [number_of(one.parts[name]) for one in scored] for name in self.rubric.names}
        told = self.ranks.gather((reward_C.tolist(), mine))
        reward_C = np.array([x for rewards, _ in told for x in rewards])
        out = {}
        for name in self.rubric.names:
            theirs_C = np.array([x for _, found in told for x in found[name]])
            both = ~np.isnan(theirs_C) & ~np.isnan(reward_C)
            if both.any():
                out[f"monitor/{name}/mean"] = float(theirs_C[both].mean())
            agreement = spearman(reward_C[both], theirs_C[both])
            if np.isfinite(agreement):
                out[f"monitor/{name}/spearman"] = agreement
        return out


def spearman(x_C: np.ndarray, y_C: np.ndarray) -> float:
    """The correlation of ranks, equal values sharing their mean rank; nan where one is constant."""
    x_C, y_C = _ranks(x_C), _ranks(y_C)
    x_C, y_C = x_C - x_C.mean() if len(x_C) else x_C, y_C - y_C.mean() if len(y_C) else y_C
    whole = float((x_C**2).sum() * (y_C**2).sum()) ** 0.5
    return float((x_C * y_C).sum()) / whole if whole > 0 else float("nan")


def _ranks(x_C: np.ndarray) -> np.ndarray:
    _, at_C, count = np.unique(x_C, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2.0)[at_C] if len(x_C) else x_C

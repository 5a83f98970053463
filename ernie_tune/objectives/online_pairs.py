"""Pairs among several answers to one prompt by their rewards: rejection sampling inside the step.
Numbers in, pairs out.

Legend: G answers of one prompt, P pairs. Refuses to know: who wrote the answers, what rewards mean.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.objectives.preference import Pairs

MODES = ("best_worst", "best_vs_worsts", "all_pairs", "correct_vs_wrong")


@dataclass(frozen=True)
class PairRule:
    """mode: best_worst (one pair), best_vs_worsts (the best against every answer of the lowest
    reward), all_pairs, correct_vs_wrong (rewards of at least `correct` against at most `wrong`).
    min_gap: the least difference of rewards. max_length_ratio: bound on the longer over the
    shorter. max_pairs a prompt. alpha: margin per difference of rewards. tau: temperature of the
    certainty sigma(gap / tau), None: certain.
    """

    mode: str = "best_worst"
    min_gap: float = 0.25
    correct: float = 1.0
    wrong: float = 0.0
    max_length_ratio: float | None = None
    max_pairs: int = 4
    alpha: float = 0.0
    tau: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(
                say(
                    f"pair mode ({self.mode!r}) must be one of {', '.join(MODES)}; use 'best_worst'",
                    f"配对方式（{self.mode!r}）须为 {', '.join(MODES)} 之一；请用 'best_worst'",
                )
            )
        if self.min_gap <= 0 or self.max_pairs < 1:
            raise ValueError(
                say(
                    f"min_gap ({self.min_gap:g}) must be positive and max_pairs ({self.max_pairs}) at least 1; "
                    "0.25 and 4 are usual",
                    f"min_gap（{self.min_gap:g}）须为正，max_pairs（{self.max_pairs}）至少为 1；通常为 0.25 与 4",
                )
            )


def eligible_edges(
    reward_G: np.ndarray, rule: PairRule, may_win_G: np.ndarray, length_G: np.ndarray, answer_G: Sequence[Hashable]
) -> list[tuple[int, int]]:
    """(better, worse) that the rule's bounds allow, in index order, before its mode and cap."""
    edges = []
    for i in range(len(reward_G)):
        for j in range(len(reward_G)):
            gap, lengths = reward_G[i] - reward_G[j], sorted((length_G[i], length_G[j]))
            near = rule.max_length_ratio is None or lengths[1] <= rule.max_length_ratio * lengths[0]
            if gap >= rule.min_gap and may_win_G[i] and near and answer_G[i] != answer_G[j]:
                edges.append((i, j))
    return edges


def online_pairs(
    reward_G: np.ndarray,
    rule: PairRule,
    may_win_G: np.ndarray | None = None,
    length_G: np.ndarray | None = None,
    answer_G: Sequence[Hashable] | None = None,
) -> Pairs:
    """Pairs of one prompt's answers; they share weight 1. May be empty: such a prompt is not
    counted.

    `may_win_G`: complete and well formed, so that it may be a better answer. `answer_G`: what makes
    two answers the same (token ids). Where there are more than `max_pairs`, the largest gaps stay,
    then the most alike in length, then the first.
    """
    reward_G = np.asarray(reward_G, np.float64)
    size = len(reward_G)
    may_win_G = np.ones(size, bool) if may_win_G is None else may_win_G
    length_G = np.ones(size, np.int64) if length_G is None else length_G
    edges = eligible_edges(reward_G, rule, may_win_G, length_G, range(size) if answer_G is None else answer_G)
    if rule.mode == "correct_vs_wrong":
        edges = [(i, j) for i, j in edges if reward_G[i] >= rule.correct and reward_G[j] <= rule.wrong]
    edges.sort(key=lambda e: (reward_G[e[1]] - reward_G[e[0]], abs(int(length_G[e[0]]) - int(length_G[e[1]])), e))
    if rule.mode in ("best_worst", "best_vs_worsts") and edges:
        first = edges[0]
        best = reward_G[first[0]] - reward_G[first[1]]
        edges = [e for e in edges if e[0] == first[0] and reward_G[e[0]] - reward_G[e[1]] == best]
        edges = edges[:1] if rule.mode == "best_worst" else edges
    edges = edges[: rule.max_pairs]
    better, worse = (np.array([e[k] for e in edges], np.int64) for k in (0, 1))
    gap = reward_G[better] - reward_G[worse]
    p = None if rule.tau is None else 1 / (1 + np.exp(-gap / rule.tau))
    return Pairs.of(better, worse, np.full(len(edges), 1 / max(len(edges), 1)), rule.alpha * gap, p)

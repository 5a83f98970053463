"""Losses of a reward model: scalar rewards of answers against pairs, rankings and ratings (methods.md 4.5). Pure arithmetic.

Legend: C answers of a micro-batch with one reward each, P pairs, M rated answers.
Refuses to know: the head, the model, images.
"""

from __future__ import annotations

import numpy as np
from paddle import Tensor

from ernie_tune.objectives.listwise import edge_loss
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import Pairs, take, vector
from ernie_tune.objectives.unpaired import Labels


def reward_pair_loss(reward_C: Tensor, pairs: Pairs, center: float = 0.01) -> LossOut:
    """-log sigma(s_w - s_l - m) + c (s_w + s_l)^2: Bradley-Terry with margins (2307.09288) and rewards centred at 0 (2312.09244).

    For K ranked answers give `listwise.tier_edges`: the mean over K(K-1)/2 pairs of one prompt (2203.02155), all in this micro-batch.
    """
    if center < 0:
        raise ValueError(f"center_rewards_coefficient ({center}) must not be negative; 0.01 is usual, 0 leaves it out")
    out = edge_loss(reward_C, pairs)
    if not center or not len(pairs):
        return out
    sum_P = take(reward_C, pairs.better_P) + take(reward_C, pairs.worse_P)
    centring = center * (sum_P.square() * vector(pairs.weight_P, sum_P)).sum()
    return LossOut(out.total + centring, out.count)


def reward_regression_loss(reward_C: Tensor, ratings: Labels) -> LossOut:
    """(s - q)^2 with the rating q on [0, 1]."""
    if not len(ratings):
        return LossOut(reward_C.sum() * 0.0, 0.0)
    error_M = take(reward_C, ratings.index_M) - vector(ratings.good_M, reward_C)
    return LossOut((error_M.square() * vector(ratings.weight_M, error_M)).sum(), float(ratings.weight_M.sum()))


def reward_metrics(reward_C: Tensor, pairs: Pairs) -> dict[str, tuple[float, float]]:
    """TRL's names as (sum, count): accuracy and margin over pairs, mean_reward over answers."""
    s_C = reward_C.detach().numpy().astype(np.float64)
    margin_P = s_C[pairs.better_P] - s_C[pairs.worse_P]
    return {
        "accuracy": (float((margin_P > 0).sum()), float(len(pairs))),
        "margin": (float(margin_P.sum()), float(len(pairs))),
        "mean_reward": (float(s_C.sum()), float(len(s_C))),
    }

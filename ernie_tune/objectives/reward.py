"""Losses of a reward model: scalar rewards of answers against pairs, rankings and ratings (methods.md 4.5). Pure arithmetic.

Legend: C answers of a micro-batch with one reward each, P pairs, M rated answers, S levels of a rating.
Refuses to know: the head, the model, images.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
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


def reward_ordinal_loss(
    reward_C: Tensor, index_M: np.ndarray, level_M: np.ndarray, threshold_S: Tensor, weight_M: np.ndarray | None = None
) -> LossOut:
    """Cumulative link: P(level <= k) = sigma(threshold_k - s); loss -log P(level). `level_M` counts from 0; S - 1 rising thresholds, learned or fixed.

    Raises ValueError for a level without a threshold and for thresholds that do not rise.
    """
    threshold = threshold_S.detach().numpy()
    if len(index_M) and not 0 <= int(np.min(level_M)) <= int(np.max(level_M)) <= len(threshold):
        raise ValueError(
            f"level_M ({np.min(level_M)} to {np.max(level_M)}) must lie between 0 and the number of thresholds ({len(threshold)}); count levels from 0"
        )
    if (np.diff(threshold) <= 0).any():
        raise ValueError(
            f"threshold_S ({', '.join(f'{t:g}' for t in threshold)}) must rise; start them apart and use a smaller learning rate"
        )
    if not len(index_M):
        return LossOut(reward_C.sum() * 0.0, 0.0)
    weight_M = np.ones(len(index_M)) if weight_M is None else weight_M
    s_M = take(reward_C, index_M)
    far = paddle.full([1], 1e4, dtype=threshold_S.dtype)  # stands for infinity, with a gradient of 0
    bound = paddle.concat([-far, threshold_S, far])
    upper_M, lower_M = take(bound, np.asarray(level_M) + 1) - s_M, take(bound, level_M) - s_M
    # log(sigma(u) - sigma(l)) = log sigma(u) + log sigma(-l) + log(1 - e^{l - u})
    value_M = -F.log_sigmoid(upper_M) - F.log_sigmoid(-lower_M) - paddle.log(-paddle.expm1(lower_M - upper_M))
    return LossOut((value_M * vector(weight_M, value_M)).sum(), float(weight_M.sum()))


def reward_metrics(reward_C: Tensor, pairs: Pairs) -> dict[str, tuple[float, float]]:
    """TRL's names as (sum, count): accuracy and margin over pairs, mean_reward over answers."""
    s_C = reward_C.detach().numpy().astype(np.float64)
    margin_P = s_C[pairs.better_P] - s_C[pairs.worse_P]
    return {
        "accuracy": (float((margin_P > 0).sum()), float(len(pairs))),
        "margin": (float(margin_P.sum()), float(len(pairs))),
        "mean_reward": (float(s_C.sum()), float(len(s_C))),
    }

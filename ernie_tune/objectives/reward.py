"""Losses of a reward model: scalar rewards of answers against pairs, rankings and ratings. Pure
arithmetic.

Legend: C answers of a micro-batch with one reward each, P pairs, M rated answers, K cuts between K
+ 1 levels of a rating.
Refuses to know: the head, the model, images.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.objectives.listwise import edge_loss
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import Pairs, take, vector
from ernie_tune.objectives.unpaired import Labels


def reward_pair_loss(reward_C: Tensor, pairs: Pairs, center: float = 0.01) -> LossOut:
    """-log sigma(s_w - s_l - m) + c (s_w + s_l)^2: Bradley-Terry with margins (2307.09288) and
    rewards centred at 0 (2312.09244).

    For K ranked answers give `listwise.tier_edges`: the mean over K(K-1)/2 pairs of one prompt
    (2203.02155), all in this micro-batch.
    """
    if center < 0:
        raise ValueError(
            say(
                f"center_rewards_coefficient ({center}) must not be negative; 0.01 is usual, 0 leaves it out",
                f"center_rewards_coefficient（{center}）不能为负；通常为 0.01，0 表示不用",
            )
        )
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


def ordered_cuts(free_K: Tensor) -> Tensor:
    """Cuts that rise whatever the free numbers are: the first as it is, each other a softplus above
    the one before.
    """
    return paddle.concat([free_K[:1], F.softplus(free_K[1:])]).cumsum()


def even_cuts(levels: int) -> np.ndarray:
    """The free numbers of cuts under which a reward of 0 gives every level the same probability,
    [levels - 1].
    """
    share_K = np.arange(1, levels) / levels
    cut_K = np.log(share_K / (1 - share_K))
    return np.concatenate([cut_K[:1], np.log(np.expm1(np.diff(cut_K)))])


def levels_of(rating_M: np.ndarray, levels: int, where: str = "") -> np.ndarray:
    """The level, from 0, of ratings on [0, 1]. Raises ValueError for one between two levels;
    `where` opens it.
    """
    exact_M = np.asarray(rating_M, np.float64) * (levels - 1)
    level_M = np.round(exact_M).astype(np.int64)
    off = np.flatnonzero(np.abs(exact_M - level_M) > 1e-3)
    if len(off):
        raise ValueError(
            say(
                f"{where and where + ': '}score ({rating_M[off[0]]:g} of its scale) must be one of rating_levels "
                f"({levels}) even steps; set it to the number of values that scores have",
                f"{where and where + ': '}评分（其范围的 {rating_M[off[0]]:g}）须落在 rating_levels（{levels}）个等间隔的值上；请设为评分实际的取值个数",
            )
        )
    return level_M


def reward_ordinal_loss(reward_C: Tensor, cut_K: Tensor, ratings: Labels) -> LossOut:
    """-log [sigma(t_k - s) - sigma(t_{k-1} - s)] of level k, t_0 = -inf and the last inf:
    proportional odds (McCullagh 1980). The difference is sigma(b) sigma(-a) (1 - e^(a-b)), of which
    each factor has a logarithm that does not cancel.
    """
    if not len(ratings):
        return LossOut(
            (reward_C.sum() + cut_K.sum()) * 0.0, 0.0
        )  # the cuts have a gradient all the same, which AdamW must see
    cuts = cut_K.shape[0]
    level_M = levels_of(ratings.good_M, cuts + 1)
    s_M = take(reward_C, ratings.index_M)
    above_M = take(cut_K, np.minimum(level_M, cuts - 1)) - s_M
    below_M = take(cut_K, np.maximum(level_M - 1, 0)) - s_M
    first_M, last_M = (vector(at, s_M) for at in (level_M == 0, level_M == cuts))
    inner_M = (1 - first_M) * (1 - last_M)
    # 1 where there is one cut: any number with a logarithm
    gap_M = inner_M * (above_M - below_M) + (1 - inner_M)
    logp_M = (1 - last_M) * F.log_sigmoid(above_M) + (1 - first_M) * F.log_sigmoid(-below_M)
    logp_M = logp_M + inner_M * paddle.log(-paddle.expm1(-gap_M))
    return LossOut(-(logp_M * vector(ratings.weight_M, logp_M)).sum(), float(ratings.weight_M.sum()))


def expected_rating(reward_C: np.ndarray, cut_K: np.ndarray) -> np.ndarray:
    """The mean of the level that the cuts give a reward, on [0, 1]: sum_k P(level above k) / K."""
    out_C: np.ndarray = (1 / (1 + np.exp(np.asarray(cut_K)[None] - np.asarray(reward_C)[:, None]))).mean(axis=1)
    return out_C


def reward_metrics(reward_C: Tensor, pairs: Pairs) -> dict[str, tuple[float, float]]:
    """TRL's names as (sum, count): accuracy and margin over pairs, mean_reward over answers."""
    s_C = reward_C.detach().numpy().astype(np.float64)
    margin_P = s_C[pairs.better_P] - s_C[pairs.worse_P]
    return {
        "accuracy": (float((margin_P > 0).sum()), float(len(pairs))),
        "margin": (float(margin_P.sum()), float(len(pairs))),
        "mean_reward": (float(s_C.sum()), float(len(s_C))),
    }

"""The critic's loss: squared error of predicted returns, clipped around what the critic said when
the answers were sampled.

Legend: N trained tokens. Refuses to know: models, rewards, how returns were made.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import vector


def value_loss(
    value_N: Tensor, old_value_N: np.ndarray, return_N: np.ndarray, weight_N: np.ndarray, cliprange: float | None
) -> LossOut:
    """Sum over tokens of w / 2 max((V - R)^2, (clip(V, V_old +- cliprange) - R)^2) over the sum of
    w (arXiv 1707.06347 as OpenAI's baselines clip it).

    Metric: critic/vf_clipfrac, the tokens where the clipped error is the larger. Raises ValueError
    for a cliprange that is not positive.
    """
    if cliprange is not None and cliprange <= 0:
        raise ValueError(
            say(
                f"cliprange_value ({cliprange:g}) must be positive, or None for any distance; 0.2 is usual",
                f"cliprange_value（{cliprange:g}）须为正，或用 None 表示不裁剪；通常为 0.2",
            )
        )
    count = float(np.sum(weight_N))
    if not len(weight_N):
        return LossOut(value_N.sum() * 0.0, count)
    target_N, weights = vector(return_N, value_N), vector(weight_N, value_N)
    error_N = (value_N - target_N).square()
    worst_N, over = error_N, 0.0
    if cliprange is not None:
        moved_N = value_N - vector(old_value_N, value_N)
        held_N = vector(old_value_N, value_N) + paddle.clip(moved_N, -cliprange, cliprange)
        clipped_N = (held_N - target_N).square()
        worst_N = paddle.maximum(error_N, clipped_N)
        # what stayed within the range differs by rounding alone, and is not clipped
        held_back_N = (moved_N.abs() > cliprange) & (clipped_N > error_N)
        over = float((held_back_N.numpy() * weight_N).sum())
    return LossOut(0.5 * (worst_N * weights).sum(), count, {"critic/vf_clipfrac": (over, count)})

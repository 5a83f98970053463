"""The term that rewards a policy for saying something else where it cannot see: the distance of its
answers with the picture from the same answers with most of the picture grey.

    J += coef k3(d) - entropy_seen H[with] - entropy_blind H[without],    k3(d) = e^d - d - 1

with d = log pi(with the picture) - log pi(without), a token. Without bound the first part wrecks a
run, a few tokens have nearly all of it: each token's is held at `cap`, beyond which it has no
gradient. The entropies keep both from growing uncertain instead.
Refuses to know: which part is grey, whose tokens are compared, models. Source: PAPO (arXiv
2507.06448). Legend: N tokens of a micro-batch, K of them with a counterpart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import take

_FAR = 20.0  # beyond it e^d is capped whatever the cap


@dataclass(frozen=True)
class Perception:
    """`coef` of the distance, its `cap` a token, and the weights of the entropies with the picture
    and without. Raises ValueError for a cap that is not positive.
    """

    coef: float = 0.0
    cap: float = 1.0
    entropy_seen: float = 0.0
    entropy_blind: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.cap < np.exp(_FAR):
            raise ValueError(
                say(
                    f"perception_cap ({self.cap:g}) must be above 0 and below e^20, or the term has no bound; 1 is usual",
                    f"perception_cap（{self.cap:g}）须大于 0 且小于 e^20，否则该项无界；通常为 1",
                )
            )


def perception_term(logp_N: Tensor, entropy_N: Tensor | None, blind_N: np.ndarray, how: Perception) -> LossOut:
    """Minus what the term adds to J, a sum over the tokens that have a counterpart: `blind_N` is
    its number among the N, -1 without. Raises ValueError where entropies are weighed and missing.
    """
    seen_K = np.flatnonzero(blind_N >= 0)
    if not len(seen_K):
        return LossOut(logp_N.sum() * 0.0, 0.0)
    without_K = blind_N[seen_K]
    d_K = paddle.clip(take(logp_N, seen_K) - take(logp_N, without_K), -_FAR, _FAR)
    distance_K = paddle.clip(paddle.expm1(d_K) - d_K, max=how.cap)
    total = -how.coef * distance_K.sum()
    metrics = {
        "perception/distance": (float(distance_K.sum()), float(len(seen_K))),
        "perception/image_delta": (float(d_K.sum()), float(len(seen_K))),
    }
    for weight, at_K in ((how.entropy_seen, seen_K), (how.entropy_blind, without_K)):
        if not weight:
            continue
        if entropy_N is None:
            raise ValueError(
                say(
                    "entropy_N (None) must be given with perception_entropy; ask for entropies with the log-probabilities",
                    "使用 perception_entropy 时须有 entropy_N（现为 None）；请在求对数概率时一并求熵",
                )
            )
        total = total + weight * take(entropy_N, at_K).sum()
    return LossOut(total, float(len(seen_K)), metrics)

"""The router's own losses as pure functions of its logits and matrix.

Legend: T tokens of one modality, E its experts, D width. Refuses to know: layers, which tokens are
text, how losses enter the gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import paddle
import paddle.nn.functional as F
from paddle import Tensor


@dataclass(frozen=True)
class RouterLossWeights:
    """Coefficients, one number for both modalities or (text, vision). ERNIEKit's VL fine-tuning
    sets all three to 0.
    """

    balance: float | tuple[float, float] = 0.0
    orthogonal: float | tuple[float, float] = 0.0
    z: float | tuple[float, float] = 0.0

    def of(self, modality: int) -> tuple[float, float, float]:
        """(balance, orthogonal, z) of one modality."""
        pick = [w[modality] if isinstance(w, tuple) else w for w in (self.balance, self.orthogonal, self.z)]
        return pick[0], pick[1], pick[2]


def tally(probs_TE: Tensor, top_k: int) -> Tensor:
    """[E + 2]: how many tokens pick each expert, by p without the bias; how many tokens there are;
    and 1. Summed over the ranks that have tokens of a pack it is the pack's, and the last number
    says how many ranks those are. Without a gradient.
    """
    chosen = paddle.topk(probs_TE.detach(), top_k, axis=-1)[1]
    counts_E = paddle.bincount(chosen.reshape([-1]), minlength=probs_TE.shape[1]).astype(probs_TE.dtype)
    return paddle.concat([counts_E, paddle.to_tensor([float(probs_TE.shape[0]), 1.0], dtype=probs_TE.dtype)])


def balance_loss(probs_TE: Tensor, top_k: int, whole: Tensor | None = None) -> Tensor:
    """E * sum_e (share of tokens that pick e, by p without the bias) * (mean p_e). Perfect balance
    gives top_k. Counts carry no gradient.

    `whole`: the `tally` of the pack where only some of its tokens are here; what the ranks get adds
    up to the pack's loss.
    """
    whole = tally(probs_TE, top_k) if whole is None else whole
    counts_E, tokens = whole[:-2], whole[-2].clip(min=1e-6)
    return probs_TE.shape[1] * ((counts_E / tokens) * (probs_TE.sum(0) / tokens)).sum()


def z_loss(logits_TE: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Mean squared log-sum-exp of the logits. `tokens`: of the whole pack, as in `balance_loss`."""
    squares_T = paddle.logsumexp(logits_TE, axis=-1).square()
    return squares_T.mean() if tokens is None else squares_T.sum() / tokens


def orthogonal_loss(weight_DE: Tensor) -> Tensor:
    """||G - I||_F^2 / E^2 with G the Gram matrix of the router's columns at unit length."""
    unit = weight_DE / weight_DE.norm(axis=0, keepdim=True).clip(min=1e-12)
    gram = paddle.matmul(unit, unit, transpose_x=True)
    return (gram - paddle.eye(gram.shape[0], dtype=gram.dtype)).square().sum() / gram.shape[0] ** 2


def router_loss(
    logits_TE: Tensor,
    weight_DE: Tensor,
    top_k: int,
    weights: RouterLossWeights,
    modality: int,
    whole: Tensor | None = None,
) -> Tensor | None:
    """Weighted sum of one router's losses; None where every coefficient is 0. `whole`: as in
    `balance_loss`; the matrix's own loss is shared by the ranks that have tokens.
    """
    balance, orthogonal, z = weights.of(modality)
    terms = []
    if balance:
        terms.append(balance * balance_loss(F.softmax(logits_TE, axis=-1), top_k, whole))
    if orthogonal:
        loss = orthogonal * orthogonal_loss(weight_DE)
        terms.append(loss if whole is None else loss / whole[-1])
    if z:
        terms.append(z * z_loss(logits_TE, None if whole is None else whole[-2]))
    return sum(terms[1:], terms[0]) if terms else None

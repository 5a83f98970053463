"""The router's own losses as pure functions of its logits and matrix (architecture.md 3.6, methods.md 4.10).

Legend: T tokens of one modality, E its experts, D width. Refuses to know: layers, which tokens are text, how losses enter the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paddle
import paddle.nn.functional as F
from paddle import Tensor


@dataclass(frozen=True)
class RouterLossWeights:
    """Coefficients, one number for both modalities or (text, vision). ERNIEKit's VL fine-tuning sets all three to 0."""

    balance: float | tuple[float, float] = 0.0
    orthogonal: float | tuple[float, float] = 0.0
    z: float | tuple[float, float] = 0.0

    def of(self, modality: int) -> tuple[float, float, float]:
        """(balance, orthogonal, z) of one modality."""
        pick = [w[modality] if isinstance(w, tuple) else w for w in (self.balance, self.orthogonal, self.z)]
        return pick[0], pick[1], pick[2]


def balance_loss(probs_TE: Tensor, top_k: int) -> Tensor:
    """E * sum_e (share of tokens that pick e, by p without the bias) * (mean p_e). Perfect balance gives top_k. Counts carry no gradient."""
    tokens = max(probs_TE.shape[0], 1e-6)
    chosen = paddle.topk(probs_TE.detach(), top_k, axis=-1)[1]
    counts_E = paddle.bincount(chosen.reshape([-1]), minlength=probs_TE.shape[1]).astype(probs_TE.dtype)
    return probs_TE.shape[1] * ((counts_E / tokens) * (probs_TE.sum(0) / tokens)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-sum-exp of the logits."""
    return paddle.logsumexp(logits_TE, axis=-1).square().mean()


def orthogonal_loss(weight_DE: Tensor) -> Tensor:
    """||G - I||_F^2 / E^2 with G the Gram matrix of the router's columns at unit length."""
    unit = weight_DE / weight_DE.norm(axis=0, keepdim=True).clip(min=1e-12)
    gram = paddle.matmul(unit, unit, transpose_x=True)
    return (gram - paddle.eye(gram.shape[0], dtype=gram.dtype)).square().sum() / gram.shape[0] ** 2


def router_loss(
    logits_TE: Tensor, weight_DE: Tensor, top_k: int, weights: RouterLossWeights, modality: int
) -> Tensor | None:
    """Weighted sum of one router's losses; None where every coefficient is 0."""
    balance, orthogonal, z = weights.of(modality)
    terms = []
    if balance:
        terms.append(balance * balance_loss(F.softmax(logits_TE, axis=-1), top_k))
    if orthogonal:
        terms.append(orthogonal * orthogonal_loss(weight_DE))
    if z:
        terms.append(z * z_loss(logits_TE))
    return sum(terms[1:], terms[0]) if terms else None


def pooled_balance_loss(logits: Sequence[Tensor], top_k: int) -> Tensor:
    """transformers' number: tokens of all layers and both modalities in one histogram, so text expert e and vision expert e share a bin. A monitor."""
    return balance_loss(F.softmax(paddle.concat(list(logits)).astype("float32"), axis=-1), top_k)

"""Supervised fine-tuning: weighted negative log-likelihood under three ways of averaging. Pure
arithmetic.

Legend: N target tokens of a micro-batch, R its rows. Refuses to know: the model, the data, how
gradients are divided.
"""

from __future__ import annotations

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.objectives.loss import LossOut

NORMS = ("token", "seq", "token_balanced")


def token_coefficients(
    weight_N: np.ndarray, row_N: np.ndarray, row_tokens_R: np.ndarray, norm: str
) -> tuple[np.ndarray, float]:
    """What multiplies each token's loss, and this micro-batch's share of the divisor.

    token: mean over target tokens (their weights count). seq: mean over rows of each row's token
    mean. token_balanced (ERNIEKit):
    mean over rows of the row's sum over its whole length, prompt included.
    """
    if norm not in NORMS:
        raise ValueError(
            say(
                f"loss_norm ({norm!r}) must be one of {NORMS}; use 'token'",
                f"loss_norm（{norm!r}）须为 {NORMS} 之一；请用 'token'",
            )
        )
    if norm == "token":
        return weight_N, float(weight_N.sum())
    per_row = np.bincount(row_N, weights=weight_N, minlength=len(row_tokens_R)) if norm == "seq" else row_tokens_R
    return (weight_N / np.maximum(per_row, 1e-12)[row_N]).astype(weight_N.dtype), float(len(row_tokens_R))


def sft_loss(logp_N: Tensor, coefficient_N: np.ndarray, count: float = 1.0) -> LossOut:
    """-sum coefficient * logp. Metrics: the plain nll over target tokens, whatever the
    coefficients.
    """
    total = -(logp_N * paddle.to_tensor(coefficient_N, dtype=logp_N.dtype)).sum()
    return LossOut(total, count, {"nll": (-float(logp_N.detach().sum()), float(logp_N.shape[0]))})

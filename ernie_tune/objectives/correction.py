"""Rollout and training see one policy through two forwards: weights that correct for the
difference, and numbers that tell how large it is.

Legend: N trained tokens (an answer's are neighbours, in order), C answers. rho = exp(old -
sampled), old: the trainer's log-probabilities when the answers were made, sampled: what the rollout
engine reported. Numpy only.
Refuses to know: engines, models, the loss that takes the weights.
Sources: TIS and MIS (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy
RL training"), IcePop (Ling team 2025), geometric masks (Liu et al. 2025, "When speed kills
stability"); metrics as verl names them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ernie_tune.config.language import say

# name -> (lower, upper) bounds of the ratio by default; None: unbounded
MODES: Mapping[str, tuple[float | None, float | None]] = {
    "none": (None, None),
    "tis_token": (None, 2.0),
    "icepop": (0.5, 5.0),
    "tis_sequence": (None, 3.0),
    "mask_sequence": (None, 3.0),
    "geometric": (0.8, 1.25),
}
_MAX_EXPONENT = 20.0


def correction(
    old_N: np.ndarray,
    sampled_N: np.ndarray,
    candidate_N: np.ndarray,
    mode: str,
    low: float | None = None,
    high: float | None = None,
) -> np.ndarray:
    """The weight of each token's loss, [N].

    tis_token: min(rho, high). icepop: rho inside [low, high], else 0. tis_sequence, mask_sequence:
    the answer's product of rho, cut at `high` or 0 above it (and below `low`). geometric: the
    answer's geometric mean of rho inside [low, high], else 0. Bounds that are None are the defaults
    of `MODES`. Raises ValueError for another mode, and for bounds in the wrong order.
    """
    if mode not in MODES:
        raise ValueError(
            say(
                f"rollout_is ({mode!r}) must be one of {', '.join(MODES)}; use 'none'",
                f"rollout_is（{mode!r}）须为 {', '.join(MODES)} 之一；请用 'none'",
            )
        )
    low, high = (given if given is not None else usual for given, usual in zip((low, high), MODES[mode], strict=True))
    lower, upper = (0.0 if low is None else low), (np.inf if high is None else high)
    if not lower < upper:
        raise ValueError(
            say(
                f"rollout_is_min ({lower:g}) must be below rollout_is_max ({upper:g}); swap them",
                f"rollout_is_min（{lower:g}）须小于 rollout_is_max（{upper:g}）；请对调",
            )
        )
    log_N = old_N - sampled_N
    if mode == "none":
        return np.ones(len(log_N))
    if mode in ("tis_sequence", "mask_sequence", "geometric"):
        log_N = _per_answer(log_N, candidate_N, mean=mode == "geometric")
    ratio_N = np.exp(np.clip(log_N, -_MAX_EXPONENT, _MAX_EXPONENT))
    if mode.startswith("tis"):
        return np.minimum(ratio_N, upper)
    return np.where((ratio_N < lower) | (ratio_N > upper), 0.0, ratio_N)


def _per_answer(value_N: np.ndarray, candidate_N: np.ndarray, mean: bool) -> np.ndarray:
    """The sum or the mean of each token's answer, [N]."""
    _, at_N, count_C = np.unique(candidate_N, return_inverse=True, return_counts=True)
    sum_C = np.bincount(at_N, value_N, minlength=len(count_C))
    return (sum_C / count_C if mean else sum_C)[at_N]


def mismatch_sums(old_N: np.ndarray, sampled_N: np.ndarray, candidate_N: np.ndarray) -> dict[str, float]:
    """Sums over this rank's tokens and answers, to be added over ranks (all but `max_abs`, whose
    largest counts) and read by `mismatch_metrics`.
    """
    log_N = sampled_N - old_N
    rho_N = np.exp(np.clip(-log_N, -_MAX_EXPONENT, _MAX_EXPONENT))
    _, first, count_C = np.unique(candidate_N, return_index=True, return_counts=True)
    order = np.argsort(first)
    starts, count_C = first[order], count_C[order]
    add = lambda x_N: np.add.reduceat(x_N, starts) if len(starts) else np.zeros(0)  # noqa: E731
    old_C, sampled_C = -add(old_N) / np.maximum(count_C, 1), -add(sampled_N) / np.maximum(count_C, 1)
    rho_C = np.exp(np.clip(-add(log_N), -_MAX_EXPONENT, _MAX_EXPONENT))
    return {
        "tokens": float(len(log_N)),
        "answers": float(len(starts)),
        "kl": float(log_N.sum()),
        "k3_kl": float((rho_N - 1 + log_N).sum()),
        "abs": float(np.abs(log_N).sum()),
        "max_abs": float(np.abs(log_N).max(initial=0.0)),
        "rho": float(rho_N.sum()),
        "rho_square": float((rho_N**2).sum()),
        "rho_sequence_square": float((rho_C**2).sum()),
        "training_ppl": float(np.exp(old_C).sum()),
        "rollout_ppl": float(np.exp(sampled_C).sum()),
        "log_ppl": float((old_C - sampled_C).sum()),
        "log_ppl_abs": float(np.abs(old_C - sampled_C).sum()),
    }


def mismatch_metrics(sums: Mapping[str, float]) -> dict[str, float]:
    """verl's names under "mismatch/": KL(rollout || training) and its k3 form per token,
    perplexities, chi-square of tokens and answers, and the share of an effective sample size that
    the weights leave (`ess`).
    """
    tokens, answers = max(sums["tokens"], 1.0), max(sums["answers"], 1.0)
    mean = sums["rho"] / tokens
    return {
        "mismatch/kl": sums["kl"] / tokens,
        "mismatch/k3_kl": sums["k3_kl"] / tokens,
        "mismatch/mean_abs_dlp": sums["abs"] / tokens,
        "mismatch/max_abs_dlp": sums["max_abs"],
        "mismatch/training_ppl": sums["training_ppl"] / answers,
        "mismatch/rollout_ppl": sums["rollout_ppl"] / answers,
        "mismatch/log_ppl_diff": sums["log_ppl"] / answers,
        "mismatch/log_ppl_abs_diff": sums["log_ppl_abs"] / answers,
        "mismatch/chi2_token": sums["rho_square"] / tokens - 1,
        "mismatch/chi2_seq": sums["rho_sequence_square"] / answers - 1,
        "mismatch/ess": mean**2 / max(sums["rho_square"] / tokens, 1e-300),
    }

"""How much better an answer was than expected: advantages from rewards, one function a paper.
Numbers in, numbers out, no paddle.

Legend: C answers of a round, N their trained tokens (an answer's tokens are neighbours, in order),
F reward functions. `group_C` names the prompt of each answer, `candidate_N` the answer of each
token.
A reward of nan says "not applicable": such an answer leaves mean, spread and loss, its advantage is
0.
What spans ranks goes through `total`, which adds arrays up over them: the result does not depend on
the layout.
Refuses to know: where rewards come from, models, how advantages are used.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ernie_tune.config.language import say

SCALES = ("group", "batch", "none")
EPSILON = 1e-4  # TRL's; verl and PaddleNLP add 1e-6
WHITEN_EPSILON = 1e-8
Total = Callable[[np.ndarray], np.ndarray]


def alone(sums: np.ndarray) -> np.ndarray:
    """The total over the ranks of a run of one process."""
    return sums


def group_sums(value_C: np.ndarray, group_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sum, count) of each answer's group over the values that are no nan, [C] each."""
    _, at_C = np.unique(group_C, return_inverse=True)
    known_C = ~np.isnan(value_C)
    total_G = np.bincount(at_C, np.where(known_C, value_C, 0.0))
    count_G = np.bincount(at_C, known_C)
    return total_G[at_C], count_G[at_C]


def _spread(centred_C: np.ndarray, group_C: np.ndarray) -> np.ndarray:
    """Standard deviation (n - 1) of each answer's group, [C]; 0 for groups of one."""
    square_C, count_C = group_sums(centred_C**2, group_C)
    return np.sqrt(square_C / np.maximum(count_C - 1, 1))


def no_spread(reward_C: np.ndarray, group_C: np.ndarray) -> np.ndarray:
    """Whether all known rewards of an answer's group are the same, [C]: nothing is to be learned
    there, exactly.
    """
    _, at_C = np.unique(group_C, return_inverse=True)
    known_C = ~np.isnan(reward_C)
    low_G, high_G = np.full(at_C.max(initial=-1) + 1, np.inf), np.full(at_C.max(initial=-1) + 1, -np.inf)
    np.minimum.at(low_G, at_C[known_C], reward_C[known_C])
    np.maximum.at(high_G, at_C[known_C], reward_C[known_C])
    return ~(high_G > low_G)[at_C]


def group_relative(
    reward_C: np.ndarray, group_C: np.ndarray, scale: str = "group", epsilon: float = EPSILON, total: Total = alone
) -> np.ndarray:
    """(R - mean of its group) / (std + epsilon), [C].

    scale: "group" (GRPO, arXiv 2402.03300), "batch" (one std over all answers of all ranks), "none"
    (Dr.GRPO, 2503.20783). Standard deviations divide by n - 1. A group whose rewards are all the
    same gets exactly 0. Raises ValueError for another scale.
    """
    if scale not in SCALES:
        raise ValueError(
            say(
                f"scale_rewards ({scale!r}) must be one of {', '.join(SCALES)}; use 'group'",
                f"scale_rewards（{scale!r}）须为 {', '.join(SCALES)} 之一；请用 'group'",
            )
        )
    sum_C, count_C = group_sums(reward_C, group_C)
    centred_C = reward_C - sum_C / np.maximum(count_C, 1)
    centred_C[no_spread(reward_C, group_C)] = 0.0
    if scale == "group":
        centred_C = centred_C / (_spread(centred_C, group_C) + epsilon)
    elif scale == "batch":
        centred_C = centred_C / (deviation(reward_C, total) + epsilon)
    return np.nan_to_num(centred_C, nan=0.0)


def leave_one_out(reward_C: np.ndarray, group_C: np.ndarray) -> np.ndarray:
    """R - mean of the *other* answers of its group (RLOO, arXiv 2402.14740), [C]; an answer without
    others gets 0.
    """
    sum_C, count_C = group_sums(reward_C, group_C)
    out_C = reward_C - (sum_C - reward_C) / np.maximum(count_C - 1, 1)
    out_C[no_spread(reward_C, group_C) | (count_C < 2)] = 0.0
    return np.nan_to_num(out_C, nan=0.0)


def mean_relative(reward_C: np.ndarray, group_C: np.ndarray) -> np.ndarray:
    """(R - mean) / mean of its group (MaxRL, arXiv 2602.02710), [C]; 0 where the mean is not
    positive.
    """
    sum_C, count_C = group_sums(reward_C, group_C)
    mean_C = sum_C / np.maximum(count_C, 1)
    out_C = np.where(mean_C > 0, (reward_C - mean_C) / np.where(mean_C > 0, mean_C, 1.0), 0.0)
    out_C[no_spread(reward_C, group_C)] = 0.0
    return np.nan_to_num(out_C, nan=0.0)


def normalise_then_sum(
    reward_CF: np.ndarray, weight_F: np.ndarray, group_C: np.ndarray, epsilon: float = EPSILON, total: Total = alone
) -> np.ndarray:
    """Each reward made relative to its group first, then summed by weight, then normalised over the
    batch (GDPO, arXiv 2601.05242), [C].
    """
    each_CF = np.stack([group_relative(column_C, group_C, epsilon=epsilon) for column_C in reward_CF.T], axis=1)
    sum_C = np.where(np.isnan(reward_CF).all(axis=1), np.nan, each_CF @ weight_F)
    mean, spread = _mean(sum_C, total), deviation(sum_C, total)
    return np.nan_to_num((sum_C - mean) / (spread + epsilon), nan=0.0)


def weighted_sum(reward_CF: np.ndarray, weight_F: np.ndarray) -> np.ndarray:
    """Sum of weight * reward over the functions that apply, [C]; nan where none does."""
    summed_C = np.nansum(reward_CF * weight_F, axis=1)
    return np.where(np.isnan(reward_CF).all(axis=1), np.nan, summed_C)


def token_rewards(
    reward_C: np.ndarray, candidate_N: np.ndarray, kl_N: np.ndarray | None = None, kl_coef: float = 0.0
) -> np.ndarray:
    """-kl_coef * kl of each token, and the answer's reward on its last token, [N] (arXiv
    2203.02155). An unknown reward counts 0 here.
    """
    reward_N = np.zeros(len(candidate_N)) if kl_N is None else -kl_coef * kl_N
    last_N = np.append(candidate_N[1:] != candidate_N[:-1], True) if len(candidate_N) else np.zeros(0, bool)
    reward_N[last_N] += np.nan_to_num(reward_C, nan=0.0)[candidate_N[last_N]]
    return reward_N


def returns_to_go(reward_N: np.ndarray, candidate_N: np.ndarray) -> np.ndarray:
    """What is still to come of an answer's rewards from each token on, undiscounted, [N]
    (REINFORCE++, arXiv 2501.03262).
    """
    if not len(reward_N):
        return reward_N.copy()
    suffix_N = np.cumsum(reward_N[::-1])[::-1]
    end_N = np.searchsorted(candidate_N, candidate_N, side="right")
    return suffix_N - np.append(suffix_N, 0.0)[end_N]


def gae(
    reward_N: np.ndarray, value_N: np.ndarray, candidate_N: np.ndarray, gamma: float = 1.0, lam: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """(advantage, return) of each token (GAE, arXiv 1506.02438), [N] each.

    delta_t = r_t + gamma V_{t+1} - V_t with V = 0 after the last token; A_t = delta_t + gamma lam
    A_{t+1}; return = A + V.
    """
    advantage_N = np.zeros(len(reward_N))
    follows_N = np.append(candidate_N[1:] == candidate_N[:-1], False) if len(candidate_N) else np.zeros(0, bool)
    run = 0.0
    for t in range(len(reward_N) - 1, -1, -1):
        run = run if follows_N[t] else 0.0
        after = value_N[t + 1] if follows_N[t] else 0.0
        run = reward_N[t] + gamma * after - value_N[t] + gamma * lam * run
        advantage_N[t] = run
    return advantage_N, advantage_N + value_N


def whiten(value_N: np.ndarray, total: Total = alone, keep_mean: bool = False) -> np.ndarray:
    """(x - mean) / sqrt(var + 1e-8) over the tokens of all ranks, [N]; var divides by n - 1.
    `keep_mean`: the mean is added again.
    """
    count, summed = total(np.array([len(value_N), value_N.sum()], np.float64))
    mean = summed / max(count, 1.0)
    (square,) = total(np.array([((value_N - mean) ** 2).sum()]))
    white_N = (value_N - mean) / np.sqrt(square / max(count - 1, 1.0) + WHITEN_EPSILON)
    return white_N + mean if keep_mean else white_N


def with_teacher(
    advantage_N: np.ndarray, teacher_logp_N: np.ndarray, old_logp_N: np.ndarray, coef: float
) -> np.ndarray:
    """A + coef (log pi_teacher - log pi_old) of each token, [N]: minus the sampled reverse KL as a
    reward of the token itself (Lu et al. 2025, "On-policy distillation"; slime's opd).
    """
    return advantage_N + coef * (teacher_logp_N - old_logp_N)


def _mean(value_C: np.ndarray, total: Total) -> float:
    known_C = value_C[~np.isnan(value_C)]
    count, summed = total(np.array([len(known_C), known_C.sum()], np.float64))
    return float(summed / max(count, 1.0))


def deviation(value_C: np.ndarray, total: Total) -> float:
    """Standard deviation (n - 1) over the known values of all ranks."""
    known_C = value_C[~np.isnan(value_C)]
    mean = _mean(value_C, total)
    count, square = total(np.array([len(known_C), ((known_C - mean) ** 2).sum()], np.float64))
    return float(np.sqrt(square / max(count - 1, 1.0)))

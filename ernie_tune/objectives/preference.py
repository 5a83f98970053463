"""What learning from preferences is made of: answers with their log-probabilities, and which of two
is better by how much.

Legend: N target tokens of a micro-batch, C its candidate answers, P its pairs.
Refuses to know: the model, where the reference comes from, files, which loss is taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_tune.config.language import say

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
# exp() of more than this is cut: the gradient there is 0 instead of no number at all.
MAX_EXPONENT = 80.0


@dataclass(frozen=True)
class Candidates:
    """Answers of a micro-batch. `logp_C`: summed log-probability of each one's target tokens (with
    a graph); `length_C`: how many tokens.

    `ref_logp_C`: the same under the reference; None where there is none. Only LD-DPO needs tokens:
    `logp_N`, `ref_logp_N`, and `candidate_N`, the candidate of each token, in the order of the
    answer. Only WPO's alignment needs `log_sum_square_C`: sum over tokens of log sum_v p(v)^2.
    """

    logp_C: Tensor
    length_C: np.ndarray
    ref_logp_C: Tensor | None = None
    logp_N: Tensor | None = None
    ref_logp_N: Tensor | None = None
    candidate_N: np.ndarray | None = None
    log_sum_square_C: Tensor | None = None

    def __post_init__(self) -> None:
        if len(self.length_C) != self.logp_C.shape[0]:
            raise ValueError(
                say(
                    f"length_C ({len(self.length_C)} answers) must have one entry per log-probability "
                    f"({self.logp_C.shape[0]}); "
                    "build both from the same micro-batch",
                    f"length_C（{len(self.length_C)} 个回答）须与对数概率（{self.logp_C.shape[0]}）项数相同；请由同一个微批生成",
                )
            )
        if len(self.length_C) and int(np.min(self.length_C)) < 1:
            raise ValueError(
                say(
                    f"length_C (candidate {int(np.argmin(self.length_C))}: 0 tokens) must be at least 1; "
                    "drop answers of which nothing is a target, or raise max_seq_len",
                    f"length_C（候选 {int(np.argmin(self.length_C))}：0 个 token）至少为 1；请去掉没有学习目标的回答，或调大 max_seq_len",
                )
            )


@dataclass(frozen=True)
class Pairs:
    """Candidate `better_P` is preferred to `worse_P`. `weight_P`: its share in the mean.
    `margin_P`: what the rewards should differ by at least.
    `p_P`: the probability that the preference is right (1: certain, one half: a tie).
    """

    better_P: np.ndarray
    worse_P: np.ndarray
    weight_P: np.ndarray
    margin_P: np.ndarray
    p_P: np.ndarray

    @staticmethod
    def of(
        better_P: np.ndarray | list[int],
        worse_P: np.ndarray | list[int],
        weight_P: np.ndarray | None = None,
        margin_P: np.ndarray | None = None,
        p_P: np.ndarray | None = None,
    ) -> Pairs:
        """Weights and probabilities default to 1, margins to 0."""
        better_P, worse_P = np.asarray(better_P, np.int64), np.asarray(worse_P, np.int64)
        fill = (np.ones(len(better_P)), np.zeros(len(better_P)), np.ones(len(better_P)))
        given = (weight_P, margin_P, p_P)
        return Pairs(better_P, worse_P, *[f if g is None else np.asarray(g) for g, f in zip(given, fill, strict=True)])

    def __post_init__(self) -> None:
        for name in ("worse_P", "weight_P", "margin_P", "p_P"):
            if len(getattr(self, name)) != len(self.better_P):
                raise ValueError(
                    say(
                        f"{name} ({len(getattr(self, name))} pairs) must have as many entries as better_P "
                        f"({len(self.better_P)}); give one per pair",
                        f"{name}（{len(getattr(self, name))} 对）的项数须与 better_P（{len(self.better_P)}）相同；请每对给一项",
                    )
                )
        if len(self.p_P) and not (self.p_P.min() >= 0 and self.p_P.max() <= 1):
            raise ValueError(
                say(
                    f"p_P ({self.p_P.min():g} to {self.p_P.max():g}) must lie in [0, 1]; it is the probability "
                    "that the preference is right",
                    f"p_P（{self.p_P.min():g} 到 {self.p_P.max():g}）须在 [0, 1] 内；它是偏好正确的概率",
                )
            )

    def __len__(self) -> int:
        return len(self.better_P)


@dataclass(frozen=True)
class PreferenceHyper:
    """Settings of the pairwise family, named as TRL names them where it has them.

    beta: scale of the implicit reward; larger keeps the policy closer to the reference.
        label_smoothing: share of wrong labels (cdpo, robust, exo_pair).
    simpo_gamma: SimPO's target margin. orpo_lambda: weight of ORPO's odds term. rpo_alpha,
        cpo_alpha: weight of the NLL. dpop_lambda: weight of DPOP's
    penalty. ld_alpha: weight of tokens beyond the shorter answer's length (None: 1).
    f_divergence_type, f_alpha_divergence_coef: what replaces the log-ratio. use_weighting: WPO.
    nll_norm: "token" (mean over tokens) or "seq" (mean over answers of their token means).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 1.0
    orpo_lambda: float = 0.1
    rpo_alpha: float = 1.0
    cpo_alpha: float = 1.0
    dpop_lambda: float = 5.0
    ld_alpha: float | None = None
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    use_weighting: bool = False
    nll_norm: str = "token"

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(
                say(f"beta ({self.beta}) must be positive; 0.1 is usual", f"beta（{self.beta}）须为正；通常为 0.1")
            )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                say(
                    f"label_smoothing ({self.label_smoothing}) must be at least 0 and below 0.5; it is the share "
                    "of wrong labels",
                    f"label_smoothing（{self.label_smoothing}）须不小于 0 且小于 0.5；它是错误标签的比例",
                )
            )
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(
                say(
                    f"ld_alpha ({self.ld_alpha}) must lie in [0, 1]; 1 is plain DPO",
                    f"ld_alpha（{self.ld_alpha}）须在 [0, 1] 内；1 即普通 DPO",
                )
            )
        if self.f_divergence_type not in F_DIVERGENCES:
            raise ValueError(
                say(
                    f"f_divergence_type ({self.f_divergence_type!r}) must be one of {', '.join(F_DIVERGENCES)}; "
                    "use 'reverse_kl'",
                    f"f_divergence_type（{self.f_divergence_type!r}）须为 {', '.join(F_DIVERGENCES)} 之一；请用 'reverse_kl'",
                )
            )
        if self.nll_norm not in ("token", "seq"):
            raise ValueError(
                say(
                    f"nll_norm ({self.nll_norm!r}) must be token or seq; use 'token'",
                    f"nll_norm（{self.nll_norm!r}）须为 token 或 seq；请用 'token'",
                )
            )


def take(values: Tensor, index: np.ndarray) -> Tensor:
    """values[index] for a vector; an empty index gives an empty vector that keeps the graph."""
    return paddle.gather(values, paddle.to_tensor(np.asarray(index, np.int64)))


def padded_index(segment_N: np.ndarray, segments: int) -> np.ndarray:
    """For each segment the positions of its entries in order, padded with N: [S, longest]."""
    segment_N = np.asarray(segment_N, np.int64)
    length_S = np.bincount(segment_N, minlength=segments)
    index_SL = np.full((segments, max(int(length_S.max(initial=0)), 1)), len(segment_N), np.int64)
    order_N = np.argsort(segment_N, kind="stable")
    start_S = np.cumsum(length_S) - length_S
    index_SL[segment_N[order_N], np.arange(len(segment_N)) - start_S[segment_N[order_N]]] = order_N
    return index_SL


def padded(values_N: Tensor, index_SL: np.ndarray, fill: float) -> Tensor:
    """values_N laid out by `padded_index`, `fill` where a segment has no more: [S, L]."""
    end = paddle.full([1], fill, dtype=values_N.dtype)
    return take(paddle.concat([values_N, end]), index_SL.reshape(-1)).reshape(list(index_SL.shape))


def segment_sum(values_N: Tensor, segment_N: np.ndarray, segments: int) -> Tensor:
    """Sum of each segment's values, [S]; 0 for an empty one. Gathered and added in a fixed order,
    so the same on every device and run.
    """
    return padded(values_N, padded_index(segment_N, segments), 0.0).sum(axis=1)


def sequence_logp(logp_N: Tensor, candidate_N: np.ndarray, candidates: int) -> Tensor:
    """l(y) = sum of the answer's token log-probabilities, [C]."""
    return segment_sum(logp_N, candidate_N, candidates)


def vector(values: np.ndarray, like: Tensor) -> Tensor:
    return paddle.to_tensor(np.asarray(values), dtype=like.dtype)


def f_score(log_ratio: Tensor, kind: str, alpha: float = 0.5, power: int = 1) -> Tensor:
    """f'(ratio) of an f-divergence, without its constant where it cancels (2309.16240): what takes
    the log-ratio's place in DPO.

    forward_kl: 1 - 1/t. js_divergence: log 2t/(t+1). alpha_divergence: (t^(alpha-1) - 1)/(alpha-1),
    whose limit at 1 is log t.
    A score is held within exp(MAX_EXPONENT / power), so that its `power`-th power, and that power's
    gradient, are float32 numbers.
    """
    bound = MAX_EXPONENT / power
    if kind == "forward_kl":
        return 1 - paddle.exp(paddle.clip(-log_ratio, max=bound))
    if kind == "js_divergence":
        return float(np.log(2)) + F.log_sigmoid(log_ratio)
    if kind == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        exponent = paddle.clip((alpha - 1) * log_ratio, max=bound + min(0.0, float(np.log(abs(alpha - 1)))))
        return paddle.expm1(exponent) / (alpha - 1)
    return log_ratio


def log_ratios(candidates: Candidates, pairs: Pairs, ld_alpha: float | None, reference: bool) -> tuple[Tensor, Tensor]:
    """(better, worse): log pi(y) - log pi_ref(y) of each pair, or log pi(y) without `reference`,
    [P] each.

    With `ld_alpha` tokens beyond the length of the pair's shorter answer count that much (LD-DPO
    2409.06411). Raises ValueError where the reference, or for LD-DPO the tokens, are missing.
    """
    if ld_alpha is None or ld_alpha == 1:
        score_C = candidates.logp_C
        if reference:
            score_C = score_C - _reference(candidates.ref_logp_C, "ref_logp_C").detach()
        return take(score_C, pairs.better_P), take(score_C, pairs.worse_P)
    if candidates.logp_N is None or candidates.candidate_N is None:
        raise ValueError(
            say(
                f"ld_alpha ({ld_alpha}) must come with logp_N and candidate_N (None); keep the tokens",
                f"ld_alpha（{ld_alpha}）须与 logp_N 和 candidate_N 一起给出（现为 None）；请保留各 token 的值",
            )
        )
    score_N = candidates.logp_N
    if reference:
        score_N = score_N - _reference(candidates.ref_logp_N, "ref_logp_N").detach()
    index_CL = padded_index(candidates.candidate_N, len(candidates.length_C))
    score_CL = padded(score_N, index_CL, 0.0)
    shared_P = np.minimum(candidates.length_C[pairs.better_P], candidates.length_C[pairs.worse_P])
    weight_PL = vector(np.where(np.arange(index_CL.shape[1])[None] < shared_P[:, None], 1.0, ld_alpha), score_N)
    sides = [
        (paddle.gather(score_CL, paddle.to_tensor(side)) * weight_PL).sum(axis=1)
        for side in (pairs.better_P, pairs.worse_P)
    ]
    return sides[0], sides[1]


def _reference(values: Tensor | None, name: str) -> Tensor:
    if values is None:
        raise ValueError(
            say(
                f"{name} (None) must be the reference's log-probabilities; this loss compares with a reference: "
                "set ref_mode, "
                "or take simpo, orpo or cpo",
                f"{name} 须为参考模型的对数概率（现为 None）；此损失要与参考模型比较：请设置 ref_mode，或用 simpo、orpo、cpo",
            )
        )
    return values


def implicit_rewards(candidates: Candidates, beta: float, kappa: float = 0.0, *, reference: bool = True) -> Tensor:
    """r_C = beta (log pi - log pi_ref) / |y|^kappa; without `reference` the second
    log-probability is left out.
    """
    score_C = candidates.logp_C
    if reference:
        score_C = score_C - _reference(candidates.ref_logp_C, "ref_logp_C").detach()
    return beta * score_C / vector(np.power(candidates.length_C.astype(np.float64), kappa), score_C)


def wpo_factors(candidates: Candidates, pairs: Pairs) -> Tensor:
    """WPO (2406.11827): how probable both answers are for the policy, exp of their token means,
    without gradient, [P]. It does not enter the divisor.
    """
    logp_C = candidates.logp_C.detach()
    # the paper's alignment: relative to a token drawn from the policy
    if candidates.log_sum_square_C is not None:
        logp_C = logp_C - candidates.log_sum_square_C.detach()
    weight_C = paddle.exp(logp_C / vector(candidates.length_C, logp_C))
    return take(weight_C, pairs.better_P) * take(weight_C, pairs.worse_P)


def mixed_reference(reference: Tensor, policy: Tensor, alpha: float = 0.6) -> Tensor:
    """TR-DPO (2404.09656): a reference weight after an update, alpha * policy + (1 - alpha) *
    reference; alpha 1 copies.
    """
    if not 0 < alpha <= 1:
        raise ValueError(
            say(
                f"ref_model_mixup_alpha ({alpha}) must lie in (0, 1]; 0.6 mixes, 1 copies",
                f"ref_model_mixup_alpha（{alpha}）须在 (0, 1] 内；0.6 为混合，1 为复制",
            )
        )
    return policy.detach() * alpha + reference.detach() * (1 - alpha)


def preference_metrics(
    candidates: Candidates, pairs: Pairs, beta: float, kappa: float = 0.0
) -> dict[str, tuple[float, float]]:
    """TRL's names, name -> (sum over pairs, pairs). Without a reference the rewards are beta log
    pi(y) / |y|^kappa.

    `rewards/saturated` counts pairs whose margin is beyond 10 either way: there the sigmoid has no
    gradient left, or a hopeless one. Over the pairs of different length: `length/longer_chosen`,
    how often the labels prefer the longer answer, and `rewards/longer_preferred`, how often the
    rewards do.
    """
    r_C = implicit_rewards(candidates, beta, kappa, reference=candidates.ref_logp_C is not None)
    r_C, logp_C = (x.detach().numpy().astype(np.float64) for x in (r_C, candidates.logp_C))
    better, worse = pairs.better_P, pairs.worse_P
    margin_P = r_C[better] - r_C[worse]
    sums = {
        "rewards/chosen": r_C[better],
        "rewards/rejected": r_C[worse],
        "rewards/margins": margin_P,
        "rewards/accuracies": margin_P > 0,
        "rewards/saturated": np.abs(margin_P) > 10,
        "logps/chosen": logp_C[better],
        "logps/rejected": logp_C[worse],
        "length/chosen": candidates.length_C[better],
        "length/rejected": candidates.length_C[worse],
    }
    metrics = {name: (float(np.sum(values)), float(len(pairs))) for name, values in sums.items()}
    longer_P = np.sign(candidates.length_C[better] - candidates.length_C[worse])
    uneven = float(np.count_nonzero(longer_P))
    if uneven:
        metrics["length/longer_chosen"] = (float((longer_P > 0).sum()), uneven)
        metrics["rewards/longer_preferred"] = (float((longer_P * margin_P > 0).sum()), uneven)
    return metrics

"""Learning from answers that the policy itself sampled: surrogates of the policy gradient, the
penalty for leaving a reference, the entropy.

A surrogate makes a loss of every token; how tokens become one number is a setting of its own
(`AGGREGATIONS`), with its divisor counted before any forward and summed over ranks and the whole
window. So a loss of a window is the same however the window is cut.
Legend: N trained tokens of a micro-batch (an answer's are neighbours, in order), C its answers.
Tokens that the policy did not choose (forced thoughts, tool results) are none of the N: they are in
no sum and no ratio.
Refuses to know: models, engines, rewards, how advantages were made, how counts travel between
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import segment_sum, take, vector

# What the sum over tokens is divided by: "seq_mean" the answers, each token first by its answer's
# length; "token" the tokens; "fixed" the answers times the longest allowed answer; "seq_sum" the
# answers.
AGGREGATIONS = ("seq_mean", "token", "fixed", "seq_sum")
KL_TYPES = ("k1", "k2", "k3", "k3_is")
MAX_LOG_RATIO = 20.0
MAX_KL_LOG_RATIO = 10.0  # of the reference, as verl holds it: exp() in k3 would overflow


@dataclass(frozen=True)
class PolicyHyper:
    """Settings of the policy's loss, named as TRL's GRPOConfig names them where it has them.

    loss_type: a name of SURROGATES. loss_agg: None takes the surrogate's own. epsilon,
    epsilon_high: the ratio's range is [1 - epsilon, 1 + epsilon_high] (gmpo: of the log-ratio).
    delta: the unclipped ratio's cap (INTELLECT-2, arXiv 2505.07291). dual_clip: bound of the loss
    of bad answers (1912.09729). cispo_cap: CISPO's bound of the weight itself.
    sapo_temperature_pos, _neg: SAPO's. off_policy_mask_threshold: bad answers whose tokens have
    become less likely by more than this on average are left out (DeepSeek-V3.2, 2512.02556).
    kl_type: the estimator of the penalty.
    max_completion_length: divisor of "fixed". awr_temperature, awr_cap: of AWR's weights.
    """

    loss_type: str = "dapo"
    loss_agg: str | None = None
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    delta: float | None = None
    dual_clip: float | None = None
    cispo_cap: float = 5.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    off_policy_mask_threshold: float | None = None
    kl_type: str = "k3_is"
    max_completion_length: int = 512
    awr_temperature: float = 1.0
    awr_cap: float = 20.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("loss_type", self.loss_type, tuple(SURROGATES)),
            ("loss_agg", self.loss_agg or AGGREGATIONS[0], AGGREGATIONS),
            ("kl_type", self.kl_type, KL_TYPES),
        ):
            if value not in known:
                raise ValueError(
                    say(
                        f"{name} ({value!r}) must be one of {', '.join(known)}; correct the name",
                        f"{name}（{value!r}）须为 {', '.join(known)} 之一；请改正名称",
                    )
                )
        positive = ("epsilon", "epsilon_high", "cispo_cap", "sapo_temperature_pos", "sapo_temperature_neg")
        for name in (*positive, "awr_temperature", "awr_cap"):
            if getattr(self, name) <= 0:
                raise ValueError(
                    say(
                        f"{name} ({getattr(self, name):g}) must be positive; leave it out for the usual value",
                        f"{name}（{getattr(self, name):g}）须为正；不设置则用常用值",
                    )
                )
        if self.epsilon >= 1 and self.loss_type not in ("gmpo", "cispo"):
            raise ValueError(
                say(
                    f"epsilon ({self.epsilon:g}) must be below 1, it is taken from a ratio of 1; use 0.2",
                    f"epsilon（{self.epsilon:g}）须小于 1，它从比值 1 中减去；请用 0.2",
                )
            )
        if self.delta is not None and self.delta <= 1 + self.epsilon:
            raise ValueError(
                say(
                    f"delta ({self.delta:g}) must be above 1 + epsilon ({1 + self.epsilon:g}), else it clips "
                    "before the clip; raise it",
                    f"delta（{self.delta:g}）须大于 1 + epsilon（{1 + self.epsilon:g}），否则先于裁剪生效；请调大",
                )
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(
                say(
                    f"dual_clip ({self.dual_clip:g}) must be above 1; 3 is usual",
                    f"dual_clip（{self.dual_clip:g}）须大于 1；通常为 3",
                )
            )
        if self.max_completion_length < 1:
            raise ValueError(
                say(
                    f"max_completion_length ({self.max_completion_length}) must be at least 1; raise it",
                    f"max_completion_length（{self.max_completion_length}）至少为 1；请调大",
                )
            )

    @property
    def aggregation(self) -> str:
        return self.loss_agg or SURROGATES[self.loss_type].aggregation


@dataclass(frozen=True)
class Sampled:
    """A micro-batch of sampled answers. `logp_N` under the policy being trained, with a graph;
    `old_logp_N` when they were sampled (None: the policy has not moved since, the ratio is 1 with a
    gradient); `advantage_N`; `ref_logp_N` where a penalty asks for it. `weight_N`: correction of a
    rollout engine's mismatch, or what else scales a token's loss without a gradient. `keep_C`:
    answers that count at all (neither cut off nor unjudged).
    `length_C`: trained tokens of each. `entropy_N`: of the policy's whole distribution, with a
    graph where entropy is rewarded.
    """

    logp_N: Tensor
    advantage_N: np.ndarray
    candidate_N: np.ndarray
    length_C: np.ndarray
    old_logp_N: np.ndarray | None = None
    ref_logp_N: np.ndarray | None = None
    weight_N: np.ndarray | None = None
    keep_C: np.ndarray | None = None
    entropy_N: Tensor | None = None

    def __post_init__(self) -> None:
        size = self.logp_N.shape[0]
        for name in ("advantage_N", "candidate_N", "old_logp_N", "ref_logp_N", "weight_N"):
            value = getattr(self, name)
            if value is not None and len(value) != size:
                raise ValueError(
                    say(
                        f"{name} ({len(value)} tokens) must have one entry per token ({size}); build both together",
                        f"{name}（{len(value)} 个 token）须对每个 token（{size}）有一项；请一并生成",
                    )
                )
        if np.bincount(self.candidate_N, minlength=len(self.length_C)).tolist() != np.asarray(self.length_C).tolist():
            raise ValueError(
                say(
                    f"length_C ({np.asarray(self.length_C).tolist()}) must count the tokens of each answer in "
                    "candidate_N; build both together",
                    f"length_C（{np.asarray(self.length_C).tolist()}）须为 candidate_N 中各回答的 token 数；请一并生成",
                )
            )

    @property
    def kept_C(self) -> np.ndarray:
        """Which answers count, [C] of 0 and 1; one without a token never does."""
        kept = np.ones(len(self.length_C)) if self.keep_C is None else np.asarray(self.keep_C, np.float64)
        return kept * (np.asarray(self.length_C) > 0)


@dataclass(frozen=True)
class View:
    """What a surrogate sees: tensors [N] of the micro-batch and the way from tokens to answers and
    back.
    """

    logp: Tensor
    log_ratio: Tensor
    advantage: Tensor
    candidate_N: np.ndarray
    length_C: np.ndarray

    def per_answer(self, value_N: Tensor, mean: bool) -> Tensor:
        """The sum or the mean over each token's answer, [N]."""
        value_C = segment_sum(value_N, self.candidate_N, len(self.length_C))
        if mean:
            value_C = value_C / vector(np.maximum(self.length_C, 1), value_C)
        return take(value_C, self.candidate_N)


def _ratio(log_ratio_N: Tensor) -> Tensor:
    return paddle.exp(paddle.clip(log_ratio_N, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _clipped(ratio_N: Tensor, view: View, h: PolicyHyper) -> Tensor:
    """-min(rho A, clip(rho) A), with `delta` and `dual_clip`."""
    first_N = ratio_N if h.delta is None else paddle.clip(ratio_N, max=h.delta)
    gain_N = paddle.minimum(
        first_N * view.advantage, paddle.clip(ratio_N, 1 - h.epsilon, 1 + h.epsilon_high) * view.advantage
    )
    if h.dual_clip is not None:
        floor_N = paddle.where(view.advantage < 0, h.dual_clip * view.advantage, gain_N)
        gain_N = paddle.maximum(gain_N, floor_N)
    return -gain_N


def _token(view: View, h: PolicyHyper) -> Tensor:
    """One ratio a token: PPO (arXiv 1707.06347), GRPO (2402.03300), DAPO (2503.14476), Dr.GRPO
    (2503.20783), REINFORCE++ (2501.03262).
    """
    return _clipped(_ratio(view.log_ratio), view, h)


def _gspo(view: View, h: PolicyHyper) -> Tensor:
    """The answer's geometric mean of ratios (arXiv 2507.18071)."""
    return _clipped(_ratio(view.per_answer(view.log_ratio, mean=True)), view, h)


def _gspo_token(view: View, h: PolicyHyper) -> Tensor:
    """GSPO's ratio by value, each token's own gradient (section 4.3 there)."""
    ratio_N = _ratio(view.per_answer(view.log_ratio, mean=True)).detach()
    return _clipped(ratio_N * paddle.exp(view.logp - view.logp.detach()), view, h)


def _cispo(view: View, h: PolicyHyper) -> Tensor:
    """-sg(min(rho, cap)) A log pi: no token's gradient is dropped (MiniMax-M1, arXiv
    2506.13585).
    """
    return -paddle.clip(_ratio(view.log_ratio), max=h.cispo_cap).detach() * view.advantage * view.logp


def _sapo(view: View, h: PolicyHyper) -> Tensor:
    """A sigmoid in the place of the clip, -(4 / tau) sigma(tau (rho - 1)) A (arXiv 2511.20347)."""
    good_N = (view.advantage > 0).astype(view.logp.dtype)
    tau_N = good_N * h.sapo_temperature_pos + (1 - good_N) * h.sapo_temperature_neg
    return -F.sigmoid(tau_N * (_ratio(view.log_ratio) - 1)) * 4 / tau_N * view.advantage


def _gmpo(view: View, h: PolicyHyper) -> Tensor:
    """The answer's geometric mean of ratios whose logarithms are clipped token by token, on the
    side that would gain (arXiv 2507.20673).
    """
    clipped_N = paddle.clip(view.log_ratio, -h.epsilon, h.epsilon_high)
    good_N = view.advantage >= 0
    used_N = paddle.where(good_N, paddle.minimum(view.log_ratio, clipped_N), paddle.maximum(view.log_ratio, clipped_N))
    return -_ratio(view.per_answer(used_N, mean=True)) * view.advantage


def _rloo(view: View, h: PolicyHyper) -> Tensor:
    """The whole answer's ratio (arXiv 2402.14740, as TRL clips it)."""
    return _clipped(_ratio(view.per_answer(view.log_ratio, mean=False)), view, h)


def _reinforce(view: View, _: PolicyHyper) -> Tensor:
    """-A log pi, without a ratio (Williams 1992)."""
    return -view.advantage * view.logp


def _vespo(view: View, _: PolicyHyper) -> Tensor:
    """-sg(phi(w)) A log pi, phi(w) = e^lam w^k e^(-lam w) of the answer's ratio w; (k, lam) = (2,
    3) for good answers, (3, 2) for bad (2602.10693).
    """
    log_w_N = paddle.clip(view.per_answer(view.log_ratio, mean=False), float(np.log(1e-8)), MAX_LOG_RATIO)
    good_N = (view.advantage >= 0).astype(view.logp.dtype)
    k_N, lam_N = 3 - good_N, 2 + good_N
    phi_N = paddle.exp(lam_N + k_N * log_w_N - lam_N * paddle.exp(log_w_N))
    return -phi_N.detach() * view.advantage * view.logp


def _awr(view: View, h: PolicyHyper) -> Tensor:
    """-min(e^(A / temperature), cap) log pi: likelihood weighed by advantage (arXiv 1910.00177, eq.
    9), which bad answers leave with little weight and no push away.
    """
    weight_N = paddle.clip(
        paddle.exp(paddle.clip(view.advantage / h.awr_temperature, max=MAX_LOG_RATIO)), max=h.awr_cap
    )
    return -weight_N.detach() * view.logp


@dataclass(frozen=True)
class Surrogate:
    """`loss` of each token; which aggregation the paper takes; whether one ratio stands for a whole
    answer.
    """

    loss: Callable[[View, PolicyHyper], Tensor]
    aggregation: str
    whole_answer: bool = False


SURROGATES: Mapping[str, Surrogate] = {
    "grpo": Surrogate(_token, "seq_mean"),
    "dapo": Surrogate(_token, "token"),
    "bnpo": Surrogate(_token, "token"),
    "dr_grpo": Surrogate(_token, "fixed"),
    "ppo": Surrogate(_token, "token"),
    "gspo": Surrogate(_gspo, "seq_mean", whole_answer=True),
    "gspo_token": Surrogate(_gspo_token, "seq_mean", whole_answer=True),
    # GSPO times the length, arXiv 2602.05261
    "luspo": Surrogate(_gspo, "seq_sum", whole_answer=True),
    "cispo": Surrogate(_cispo, "token"),
    "sapo": Surrogate(_sapo, "seq_mean"),
    "gmpo": Surrogate(_gmpo, "seq_mean", whole_answer=True),
    "rloo": Surrogate(_rloo, "seq_mean", whole_answer=True),
    "reinforce": Surrogate(_reinforce, "seq_sum"),
    "vespo": Surrogate(_vespo, "token", whole_answer=True),
    "awr": Surrogate(_awr, "seq_mean"),
}


def policy_counts(length_C: np.ndarray, keep_C: np.ndarray | None, hyper: PolicyHyper) -> float:
    """What this micro-batch adds to the divisor of each of its terms, before any forward."""
    kept_C = (np.ones(len(length_C)) if keep_C is None else np.asarray(keep_C, np.float64)) * (np.asarray(length_C) > 0)
    if hyper.aggregation == "token":
        return float((kept_C * length_C).sum())
    return float(kept_C.sum() * (hyper.max_completion_length if hyper.aggregation == "fixed" else 1))


def _aggregated(value_N: Tensor, sampled: Sampled, hyper: PolicyHyper) -> LossOut:
    """The sum that `policy_counts` divides."""
    weight_N = sampled.kept_C[sampled.candidate_N]
    if hyper.aggregation == "seq_mean":
        weight_N = weight_N / np.asarray(sampled.length_C)[sampled.candidate_N]
    count = policy_counts(sampled.length_C, sampled.keep_C, hyper)
    if not len(weight_N):
        return LossOut(sampled.logp_N.sum() * 0.0, count)
    return LossOut((value_N * vector(weight_N, value_N)).sum(), count)


def kl_estimate(logp_N: Tensor, ref_logp_N: Tensor, kind: str, ratio_N: Tensor | None = None) -> Tensor:
    """KL(policy || reference) of each sampled token, [N] (Schulman 2020): k1 = d, k2 = d^2 / 2, k3
    = e^-d - 1 + d with d = log pi - log pi_ref; k3_is = k3 times the ratio to the sampling policy,
    whose gradient is that of the KL (DeepSeek-V3.2). Raises ValueError for another kind.
    """
    if kind not in KL_TYPES:
        raise ValueError(
            say(
                f"kl_type ({kind!r}) must be one of {', '.join(KL_TYPES)}; use 'k3_is'",
                f"kl_type（{kind!r}）须为 {', '.join(KL_TYPES)} 之一；请用 'k3_is'",
            )
        )
    d_N = logp_N - ref_logp_N
    if kind == "k1":
        return d_N
    if kind == "k2":
        return 0.5 * d_N * d_N
    d_N = paddle.clip(d_N, -MAX_KL_LOG_RATIO, MAX_KL_LOG_RATIO)
    k3_N = paddle.expm1(-d_N) + d_N
    return k3_N if kind == "k3" else k3_N * (paddle.exp(logp_N - logp_N.detach()) if ratio_N is None else ratio_N)


def _off_policy_kept(view: View, sampled: Sampled, threshold: float) -> np.ndarray:
    """1 for tokens of answers that are kept, [N]: good ones, and bad ones that the policy has not
    yet left behind.
    """
    gone_N = view.per_answer(-view.log_ratio.detach(), mean=True).numpy()
    return ((sampled.advantage_N >= 0) | (gone_N <= threshold)).astype(np.float64)


def policy_terms(sampled: Sampled, hyper: PolicyHyper, kl: bool = False, entropy: bool = False) -> dict[str, LossOut]:
    """ "pg", and with `kl` and `entropy` "kl" and "ent" (minus the entropy): sums to be divided by
    the global `policy_counts`.

    Metrics under TRL's names: clip_ratio/low_mean, high_mean, region_mean (of tokens), kl, entropy,
    approx_kl (half the mean squared log-ratio).
    Raises ValueError where the reference or the entropy is missing.
    """
    logp_N = sampled.logp_N
    old_N = logp_N.detach() if sampled.old_logp_N is None else vector(sampled.old_logp_N, logp_N)
    view = View(logp_N, logp_N - old_N, vector(sampled.advantage_N, logp_N), sampled.candidate_N, sampled.length_C)
    value_N = SURROGATES[hyper.loss_type].loss(view, hyper)
    weight_N = np.ones(len(sampled.candidate_N)) if sampled.weight_N is None else np.asarray(sampled.weight_N)
    if hyper.off_policy_mask_threshold is not None:
        weight_N = weight_N * _off_policy_kept(view, sampled, hyper.off_policy_mask_threshold)
    out = _aggregated(value_N * vector(weight_N, value_N), sampled, hyper)
    terms = {"pg": LossOut(out.total, out.count, _clip_metrics(view, sampled, hyper))}
    if kl:
        if sampled.ref_logp_N is None:
            raise ValueError(
                say(
                    "ref_logp_N (None) must be given for the kl term; score the answers with the reference first",
                    "kl 项须有 ref_logp_N（现为 None）；请先用参考模型计算回答的对数概率",
                )
            )
        estimate_N = kl_estimate(logp_N, vector(sampled.ref_logp_N, logp_N), hyper.kl_type, _ratio(view.log_ratio))
        out = _aggregated(estimate_N, sampled, hyper)
        terms["kl"] = LossOut(out.total, out.count, {"kl": _token_metric(estimate_N, sampled)})
    if entropy:
        if sampled.entropy_N is None:
            raise ValueError(
                say(
                    "entropy_N (None) must be given for the ent term; ask for entropies with the log-probabilities",
                    "ent 项须有 entropy_N（现为 None）；请在求对数概率时一并求熵",
                )
            )
        terms["ent"] = _aggregated(-sampled.entropy_N, sampled, hyper)
    if sampled.entropy_N is not None:
        terms["pg"].metrics["entropy"] = _token_metric(sampled.entropy_N, sampled)  # type: ignore[index]
    return terms


def _token_metric(value_N: Tensor, sampled: Sampled) -> tuple[float, float]:
    kept_N = sampled.kept_C[sampled.candidate_N]
    return float((value_N.detach().numpy() * kept_N).sum()), float(kept_N.sum())


def _clip_metrics(view: View, sampled: Sampled, h: PolicyHyper) -> dict[str, tuple[float, float]]:
    """Shares of tokens whose ratio left the range on the side where the clip bites, and how far the
    policy has moved.
    """
    kept_N = sampled.kept_C[sampled.candidate_N]
    count = float(kept_N.sum())
    log_ratio_N = view.log_ratio.detach()
    metrics = {"approx_kl": (float((0.5 * log_ratio_N.numpy() ** 2 * kept_N).sum()), count)}
    if h.loss_type == "cispo":
        over_N = np.exp(log_ratio_N.numpy()) > h.cispo_cap
        return {**metrics, "cispo_clip_ratio": (float((over_N * kept_N).sum()), count)}
    surrogate = SURROGATES[h.loss_type].loss
    if surrogate not in (_token, _gspo, _gspo_token, _rloo, _gmpo):
        return metrics
    if surrogate not in (_token, _gmpo):
        log_ratio_N = view.per_answer(log_ratio_N, mean=surrogate is not _rloo)
    ratio_N, good_N = log_ratio_N.numpy(), sampled.advantage_N > 0
    low, high = (-h.epsilon, h.epsilon_high) if surrogate is _gmpo else (np.log1p(-h.epsilon), np.log1p(h.epsilon_high))
    low_N = (ratio_N < low) & (sampled.advantage_N < 0) * (kept_N > 0)
    high_N = (ratio_N > high) & good_N * (kept_N > 0)
    for name, hit_N in (("low", low_N), ("high", high_N), ("region", low_N | high_N)):
        metrics[f"clip_ratio/{name}_mean"] = (float(hit_N.sum()), count)
    return metrics


@dataclass
class EntropyControl:
    """The entropy bonus's coefficient, raised while the entropy is below `target` and lowered above
    it, by `delta` a step within [low, high] (Skywork-OR1, arXiv 2505.22312). `adaptive` False
    leaves it as it is.
    """

    coef: float = 0.0
    adaptive: bool = False
    target: float = 0.2
    low: float = 0.0
    high: float = 1.0
    delta: float = 0.005

    def step(self, entropy: float) -> float:
        """Move after a step whose mean entropy was this; returns the new coefficient."""
        if self.adaptive:
            moved = self.coef + (self.delta if entropy < self.target else -self.delta)
            self.coef = float(min(max(moved, self.low), self.high))
        return self.coef


@dataclass
class KlControl:
    """The penalty's coefficient, moved towards a target KL (arXiv 1909.08593, section 2.2): coef *=
    1 + clip(kl / target - 1, +-0.2) n / horizon.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000
    history: list[float] = field(default_factory=list)

    def step(self, kl: float, answers: int) -> float:
        """Move after a step of `answers` answers whose mean KL was this; returns the new
        coefficient.
        """
        if self.target is not None:
            self.coef *= 1 + float(np.clip(kl / self.target - 1, -0.2, 0.2)) * answers / self.horizon
        return self.coef


def high_entropy(entropy_N: np.ndarray, quantile: float) -> np.ndarray:
    """The tokens that a share `quantile` of most uncertain ones holds, [N] of 0 and 1 (arXiv
    2506.01939); 1 keeps all. Raises ValueError for a quantile outside (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(
            say(
                f"top_entropy_quantile ({quantile:g}) must lie in (0, 1]; 0.2 keeps the most uncertain fifth",
                f"top_entropy_quantile（{quantile:g}）须在 (0, 1] 内；0.2 保留最不确定的五分之一",
            )
        )
    if quantile == 1 or not len(entropy_N):
        return np.ones(len(entropy_N))
    return (entropy_N >= np.quantile(entropy_N, 1 - quantile)).astype(np.float64)

"""Single answers called good or bad, or rated: KTO, BCO and APO-zero without pairs, and the running
numbers they compare with.

Legend: C candidate answers of a micro-batch, M those with a label. r = beta (log pi(y) - log
pi_ref(y)).
Refuses to know: where mismatched answers for KTO's baseline come from, how sums travel between
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import paddle.nn.functional as F
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import Candidates, implicit_rewards, take, vector


@dataclass(frozen=True)
class Labels:
    """Candidate `index_M` is good with probability `good_M` (1 good, 0 bad, between: a rating on
    [0, 1]); `weight_M`: its share in the mean. `ratio_M`: what BCO multiplies the loss of a bad one
    by (`density.density_ratio`), which is in no divisor; None: nothing.
    """

    index_M: np.ndarray
    good_M: np.ndarray
    weight_M: np.ndarray
    ratio_M: np.ndarray | None = None

    @staticmethod
    def of(
        index_M: np.ndarray | list[int], good_M: np.ndarray | list[float], weight_M: np.ndarray | None = None
    ) -> Labels:
        index_M = np.asarray(index_M, np.int64)
        return Labels(index_M, np.asarray(good_M, np.float64), np.ones(len(index_M)) if weight_M is None else weight_M)

    def __post_init__(self) -> None:
        if not len(self.index_M) == len(self.good_M) == len(self.weight_M):
            raise ValueError(
                say(
                    f"good_M ({len(self.good_M)}) and weight_M ({len(self.weight_M)}) must have as many entries "
                    "as index_M "
                    f"({len(self.index_M)}); give one per labelled answer",
                    f"good_M（{len(self.good_M)}）与 weight_M（{len(self.weight_M)}）的项数须与 "
                    f"index_M（{len(self.index_M)}）相同；请每个有标签的回答给一项",
                )
            )
        if self.ratio_M is not None and len(self.ratio_M) != len(self.index_M):
            raise ValueError(
                say(
                    f"ratio_M ({len(self.ratio_M)}) must have as many entries as index_M ({len(self.index_M)}); "
                    "give one per labelled answer",
                    f"ratio_M（{len(self.ratio_M)}）的项数须与 index_M（{len(self.index_M)}）相同；请每个有标签的回答给一项",
                )
            )
        if len(self.good_M) and not (self.good_M.min() >= 0 and self.good_M.max() <= 1):
            raise ValueError(
                say(
                    f"good_M ({self.good_M.min():g} to {self.good_M.max():g}) must lie in [0, 1]; map ratings by "
                    "their scale first",
                    f"good_M（{self.good_M.min():g} 到 {self.good_M.max():g}）须在 [0, 1] 内；请先按评分范围换算",
                )
            )

    def __len__(self) -> int:
        return len(self.index_M)


@dataclass(frozen=True)
class RewardShift:
    """BCO's delta = (E[r | good] + E[r | bad]) / 2 as state that goes in and comes out. `decay`
    None: means over all seen; else of the exponential moving averages, whose first value is the
    first batch's. A kind never seen counts as 0.
    """

    decay: float | None = None
    good: float = 0.0
    bad: float = 0.0
    num_good: float = 0.0
    num_bad: float = 0.0

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise ValueError(
                say(
                    f"decay ({self.decay}) must be at least 0 and below 1; 0.99 is usual",
                    f"decay（{self.decay}）须不小于 0 且小于 1；通常为 0.99",
                )
            )

    @property
    def delta(self) -> float:
        return (self.good + self.bad) / 2

    def updated(self, good: tuple[float, float], bad: tuple[float, float]) -> RewardShift:
        """After a step: global (sum of rewards, answers) of both kinds, as the metrics
        `rewards/chosen` and `rewards/rejected` hold them.
        """
        mean_good, num_good = self._moved(self.good, self.num_good, good)
        mean_bad, num_bad = self._moved(self.bad, self.num_bad, bad)
        return replace(self, good=mean_good, bad=mean_bad, num_good=num_good, num_bad=num_bad)

    def _moved(self, mean: float, seen: float, batch: tuple[float, float]) -> tuple[float, float]:
        total, count = batch
        if not count:
            return mean, seen
        share = count / (seen + count) if self.decay is None or not seen else 1 - self.decay
        return mean + share * (total / count - mean), seen + count

    def state_dict(self) -> dict[str, float | None]:
        return asdict(self)

    @staticmethod
    def from_state(state: Mapping[str, float | None]) -> RewardShift:
        return RewardShift(**state)  # type: ignore[arg-type]


def kl_sum(mismatched: Candidates) -> tuple[float, float]:
    """This micro-batch's share of KTO's baseline: (sum of log-ratios of answers put to prompts that
    are not theirs, answers). Without gradient.
    """
    ratio_C = implicit_rewards(mismatched, 1.0).detach()
    return float(ratio_C.sum()), float(ratio_C.shape[0])


def kl_baseline(total: float, count: float) -> float:
    """z0 = max(0, mean log-ratio) of the global `kl_sum` (2402.01306, section 4.1). Raises
    ValueError without answers.
    """
    if count <= 0:
        raise ValueError(
            say(
                f"mismatched answers ({count:g}) must be at least 1 for KTO's baseline; put two or more rows in a "
                "micro-batch, or take apo_zero_unpaired",
                f"KTO 的基线至少要有 1 个错配的回答（现为 {count:g}）；请在一个微批中放两行或更多，或用 apo_zero_unpaired",
            )
        )
    return max(0.0, total / count)


def _sides(candidates: Candidates, labels: Labels, beta: float) -> tuple[Tensor, Tensor]:
    """(rewards, probability of good) of the labelled answers, [M]."""
    r_M = take(implicit_rewards(candidates, beta), labels.index_M)
    return r_M, vector(labels.good_M, r_M)


def _out(value_M: Tensor, labels: Labels) -> LossOut:
    return LossOut((value_M * vector(labels.weight_M, value_M)).sum(), float(labels.weight_M.sum()))


def kto_loss(
    candidates: Candidates,
    labels: Labels,
    z0: float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> LossOut:
    """Good: lambda_D (1 - sigma(r - beta z0)); bad: lambda_U (1 - sigma(beta z0 - r)) (2402.01306
    eq. 7). The lambdas do not enter the divisor.
    """
    if not len(labels):
        return LossOut(candidates.logp_C.sum() * 0.0, 0.0)
    r_M, good_M = _sides(candidates, labels, beta)
    good, bad = 1 - F.sigmoid(r_M - beta * z0), 1 - F.sigmoid(beta * z0 - r_M)
    return _out(good_M * desirable_weight * good + (1 - good_M) * undesirable_weight * bad, labels)


def kto_balance(good: float, bad: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> str | None:
    """What to change where lambda_D n_D / (lambda_U n_U) leaves [1, 4/3] (2402.01306 eq. 8), or one
    kind is absent; None where it does not.
    """
    if not good or not bad:
        kinds = say("good", "好"), say("bad", "坏")
        kind, other = kinds if good else kinds[::-1]
        return say(
            f"all answers so far are {kind}: without {other} ones nothing teaches the difference; check the "
            "labels, add "
            f"{other} answers, or to imitate good ones take stage SFT",
            f"至今的回答均为{kind}回答：缺少{other}回答就学不到差别；请检查标签、补充{other}回答；若只想模仿好回答，请用 stage SFT",
        )
    ratio = desirable_weight * good / (undesirable_weight * bad)
    if 1 - 1e-9 <= ratio <= 4 / 3 + 1e-9:
        return None
    low, high = (undesirable_weight * bad * k / good for k in (1, 4 / 3))
    return (
        f"desirable_weight x good answers over undesirable_weight x bad ones is {ratio:.3g}; KTO wants 1 to 1.33: "
        f"set desirable_weight between {low:.3g} and {high:.3g}"
    )


def bco_loss(candidates: Candidates, labels: Labels, delta: float, beta: float = 0.1) -> LossOut:
    """-q log sigma(r - delta) - rho (1 - q) log sigma(delta - r) (2404.04656); rho: `ratio_M`. With
    q between 0 and 1: one rated answer alone.
    """
    if not len(labels):
        return LossOut(candidates.logp_C.sum() * 0.0, 0.0)
    r_M, good_M = _sides(candidates, labels, beta)
    bad_M = 1 - good_M if labels.ratio_M is None else (1 - good_M) * vector(labels.ratio_M, r_M)
    return _out(-good_M * F.log_sigmoid(r_M - delta) - bad_M * F.log_sigmoid(delta - r_M), labels)


def apo_zero_unpaired_loss(candidates: Candidates, labels: Labels, beta: float = 0.1) -> LossOut:
    """Good: 1 - sigma(r); bad: sigma(r) (2408.06266)."""
    if not len(labels):
        return LossOut(candidates.logp_C.sum() * 0.0, 0.0)
    r_M, good_M = _sides(candidates, labels, beta)
    return _out(good_M * (1 - F.sigmoid(r_M)) + (1 - good_M) * F.sigmoid(r_M), labels)


def label_metrics(candidates: Candidates, labels: Labels, beta: float) -> dict[str, tuple[float, float]]:
    """rewards/chosen and rejected, logps/chosen and rejected as (sum, answers) of the good (above
    one half) and the bad.
    """
    if not len(labels):
        return {}
    r_C = implicit_rewards(candidates, beta).detach().numpy().astype(np.float64)
    logp_C = candidates.logp_C.detach().numpy().astype(np.float64)
    out = {}
    for side, mine_M in (("chosen", labels.good_M > 0.5), ("rejected", labels.good_M < 0.5)):
        index = labels.index_M[mine_M]
        if len(index):
            out[f"rewards/{side}"] = (float(r_C[index].sum()), float(len(index)))
            out[f"logps/{side}"] = (float(logp_C[index].sum()), float(len(index)))
            out[f"length/{side}"] = (float(candidates.length_C[index].sum()), float(len(index)))
    return out

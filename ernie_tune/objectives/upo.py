"""Every kind of signal in one loss: a weighted sum of terms, each divided by its own global count.
Pure arithmetic.

What is known of ERNIE's UPO is a sentence: a pairwise preference loss beside PPO. The sum here
contains that and is ours; it does not claim to be theirs.

Legend: C candidate answers of a micro-batch, P pairs, U units (a prompt with its signal), M
labelled answers.
Refuses to know: the model, rollouts, how counts travel between ranks. The terms of online learning
(pg, kl, ent) and the routers' (moe) are made elsewhere and join as LossOuts under their names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.objectives.listwise import (
    Units,
    bernoulli_kl_loss,
    competing,
    edge_loss,
    infonca_loss,
    lipo_lambda_loss,
    plackett_luce_loss,
    rating_edges,
    soft_edges,
    tier_edges,
)
from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.pairwise import LOSSES, NAMES, Baselines, nll_loss, pair_loss
from ernie_tune.objectives.preference import Candidates, Pairs, PreferenceHyper, implicit_rewards, preference_metrics
from ernie_tune.objectives.unpaired import Labels, apo_zero_unpaired_loss, bco_loss, kto_loss, label_metrics

OFFLINE = ("pair", "bco_pair", "rank", "rate", "bin", "nll")
TERMS = ("pg", *OFFLINE, "kl", "ent", "moe")
RANK = ("plackett_luce", "edges", "lipo_lambda")
RATE = ("soft_bt", "margin", "infonca", "bernoulli_kl")
BIN = ("kto", "bco", "apo_zero_unpaired")


@dataclass(frozen=True)
class UpoSettings:
    """weights: term -> lambda; a term without one is not computed. hyper: beta and what edge losses
    take. reference, kappa: the implicit reward r = beta (log pi - log pi_ref) / |y|^kappa.
    edge_loss: "sigmoid" on r, or another name of `pairwise.LOSSES`, which brings its own r.
    rank, rate, bin: how rankings, ratings and labels are learned. rate_margin, rate_alpha: margins
    of "margin"; rate_alpha is InfoNCA's temperature too.
    rate_tau: softness of soft_bt and bernoulli_kl. edge_weight: "unit" shares a unit's weight among
    its edges. top_k: stages of Plackett-Luce.
    """

    weights: Mapping[str, float] = field(
        default_factory=lambda: {"pg": 1.0, "pair": 1.0, "rank": 0.5, "rate": 0.5, "bin": 0.25, "nll": 0.1, "kl": 0.0}
    )
    hyper: PreferenceHyper = field(default_factory=lambda: PreferenceHyper(nll_norm="seq"))
    reference: bool = True
    kappa: int = 0
    edge_loss: str = "sigmoid"
    rank: str = "plackett_luce"
    rate: str = "soft_bt"
    bin: str = "kto"
    rate_margin: str = "linear"
    rate_alpha: float = 1.0
    rate_tau: float = 1.0
    edge_weight: str = "unit"
    top_k: int | None = None
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        allowed = {
            "edge_loss": tuple(name for name in NAMES if name in LOSSES),
            "rank": RANK,
            "rate": RATE,
            "bin": BIN,
            "kappa": (0, 1),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                known = ", ".join(map(str, values))
                raise ValueError(
                    say(
                        f"{name} ({getattr(self, name)!r}) must be one of {known}; use {values[0]!r}",
                        f"{name}（{getattr(self, name)!r}）须为 {known} 之一；请用 {values[0]!r}",
                    )
                )
        for term, weight in self.weights.items():
            if term not in TERMS:
                raise ValueError(
                    say(
                        f"weights ({term}) must name one of {', '.join(TERMS)}; correct the name",
                        f"weights（{term}）的名称须为 {', '.join(TERMS)} 之一；请改正名称",
                    )
                )
            if weight < 0:
                raise ValueError(
                    say(
                        f"weights[{term}] ({weight:g}) must not be negative; 0 leaves the term out",
                        f"weights[{term}]（{weight:g}）不能为负；0 表示不用该项",
                    )
                )
        if not any(self.weights.values()):
            raise ValueError(
                say(
                    "weights (all 0) must give at least one term a weight; there is nothing to learn otherwise",
                    "weights（全为 0）至少须给一项非零权重；否则无可学习",
                )
            )
        if not self.reference and self.weights.get("bin", 0.0):
            raise ValueError(
                say(
                    "reference (False) must be True for the bin term: kto and bco compare with one; set "
                    "weights.bin to 0",
                    "bin 项要求 reference（现为 False）为 True：kto 与 bco 要与参考模型比较；请将 weights.bin 设为 0",
                )
            )

    def active(self, term: str) -> bool:
        return bool(self.weights.get(term, 0.0))


@dataclass(frozen=True)
class Signals:
    """What is known of a micro-batch's candidates; every part may be empty. Tiers count from 0
    (best); scores are on [0, 1], higher is better.
    """

    pairs: Pairs = field(default_factory=lambda: Pairs.of([], []))
    tiers: Units = field(default_factory=lambda: Units.of([], [], []))
    ratings: Units = field(default_factory=lambda: Units.of([], [], []))
    labels: Labels = field(default_factory=lambda: Labels.of([], []))

    def best(self) -> tuple[np.ndarray, np.ndarray]:
        """Candidates that the nll term raises, and their weights: the better of pairs, the first
        tier, the highest rated of several, the good.

        A unit's weight is shared among its best.
        """
        several = _pick(self.ratings, self.ratings.size_U > 1)
        best = [_best_of(self.tiers, -self.tiers.value_M), _best_of(several, several.value_M)]
        good_M = self.labels.good_M > 0.5
        index = [self.pairs.better_P, *[b[0] for b in best], self.labels.index_M[good_M]]
        weight = [self.pairs.weight_P, *[b[1] for b in best], self.labels.weight_M[good_M]]
        return np.concatenate(index).astype(np.int64), np.concatenate(weight).astype(np.float64)


def _best_of(units: Units, value_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    top_U = np.full(len(units), -np.inf)
    np.maximum.at(top_U, units.unit_M, value_M)
    best_M = value_M == top_U[units.unit_M]
    share_U = np.bincount(units.unit_M[best_M], minlength=len(units))
    unit = units.unit_M[best_M]
    return units.index_M[best_M], units.weight_U[unit] / share_U[unit]


def _pick(units: Units, keep_U: np.ndarray) -> Units:
    """The units kept, renumbered."""
    keep_M = keep_U[units.unit_M]
    number_U = np.cumsum(keep_U) - 1
    return Units(
        units.index_M[keep_M],
        number_U[units.unit_M[keep_M]],
        units.value_M[keep_M],
        units.weight_U[keep_U.astype(bool)],
    )


def _alone(ratings: Units) -> Labels:
    """Answers rated alone, as labels that are good with the score's probability."""
    alone = _pick(ratings, ratings.size_U == 1)
    return Labels(alone.index_M, alone.value_M, alone.weight_U[alone.unit_M])


def _edges(settings: UpoSettings, candidates: Candidates, pairs: Pairs, baselines: Baselines) -> LossOut:
    plain = settings.reference and not settings.kappa
    if settings.edge_loss == "sigmoid" and not plain:  # else DPO's own, to the last bit
        return edge_loss(_rewards(settings, candidates), pairs)
    return pair_loss(settings.edge_loss, candidates, pairs, settings.hyper, baselines)


def _rewards(settings: UpoSettings, candidates: Candidates) -> Tensor:
    return implicit_rewards(candidates, settings.hyper.beta, settings.kappa, reference=settings.reference)


def _rank(settings: UpoSettings, candidates: Candidates, tiers: Units, baselines: Baselines) -> LossOut:
    if settings.rank == "edges":
        return _edges(settings, candidates, tier_edges(tiers, settings.edge_weight), baselines)
    r_C = _rewards(settings, candidates)
    if settings.rank == "plackett_luce":
        return plackett_luce_loss(r_C, tiers, settings.top_k)
    return lipo_lambda_loss(r_C, replace(tiers, value_M=tiers.value_M.max(initial=0.0) - tiers.value_M))


def _rate(settings: UpoSettings, candidates: Candidates, ratings: Units, baselines: Baselines) -> LossOut:
    several = _pick(ratings, ratings.size_U > 1)
    if settings.rate in ("margin", "soft_bt"):
        out = _edges(settings, candidates, _rated_pairs(settings, several), baselines)
    elif settings.rate == "infonca":
        out = infonca_loss(_rewards(settings, candidates), several, settings.rate_alpha)
    else:
        r_C = _rewards(settings, candidates)
        out = bernoulli_kl_loss(r_C, several, 1 / settings.rate_tau, settings.edge_weight)
    alone = _alone(ratings)
    if not len(alone):
        return out
    single = bco_loss(candidates, alone, baselines.delta, settings.hyper.beta)
    return LossOut(out.total + single.total, out.count + single.count)


def _rated_pairs(settings: UpoSettings, several: Units) -> Pairs:
    if settings.rate == "margin":
        return rating_edges(several, settings.rate_margin, settings.rate_alpha, settings.edge_weight)
    return soft_edges(several, settings.rate_tau, settings.edge_weight, ties=settings.rate == "soft_bt")


def _bin(settings: UpoSettings, candidates: Candidates, labels: Labels, baselines: Baselines) -> LossOut:
    beta = settings.hyper.beta
    if settings.bin == "kto":
        weights = (settings.desirable_weight, settings.undesirable_weight)
        return kto_loss(candidates, labels, baselines.z0, beta, *weights)
    if settings.bin == "bco":
        return bco_loss(candidates, labels, baselines.delta, beta)
    return apo_zero_unpaired_loss(candidates, labels, beta)


def upo_terms(
    settings: UpoSettings, candidates: Candidates, signals: Signals, baselines: Baselines | None = None
) -> dict[str, LossOut]:
    """The offline terms that have a weight. A term without units here is 0 with a graph and counts
    0.
    """
    b = baselines or Baselines()
    build = {
        "pair": lambda: _edges(settings, candidates, signals.pairs, b),
        "bco_pair": lambda: pair_loss("bco_pair", candidates, signals.pairs, settings.hyper, b),
        "rank": lambda: _rank(settings, candidates, signals.tiers, b),
        "rate": lambda: _rate(settings, candidates, signals.ratings, b),
        "bin": lambda: _bin(settings, candidates, signals.labels, b),
        "nll": lambda: nll_loss(candidates, *signals.best(), settings.hyper.nll_norm),
    }
    return {term: make() for term, make in build.items() if settings.active(term)}


def upo_counts(settings: UpoSettings, signals: Signals, length_C: np.ndarray) -> dict[str, float]:
    """What this micro-batch adds to each offline term's divisor, before any forward. Every active
    term is there, so all ranks sum the same names.
    """
    several = _pick(signals.ratings, signals.ratings.size_U > 1)
    if settings.rate == "infonca":
        rated = float(several.weight_U.sum())
    else:
        rated = float(_rated_pairs(settings, several).weight_P.sum())
    ranked = tier_edges(signals.tiers, settings.edge_weight).weight_P.sum() if settings.rank == "edges" else None
    index, weight = signals.best()
    counts = {
        "pair": signals.pairs.weight_P.sum(),
        "bco_pair": signals.pairs.weight_P.sum(),
        "rank": competing(signals.tiers) if ranked is None else ranked,
        "rate": rated + _alone(signals.ratings).weight_M.sum(),
        "bin": signals.labels.weight_M.sum(),
        "nll": (weight * length_C[index]).sum() if settings.hyper.nll_norm == "token" else weight.sum(),
    }
    return {term: float(count) for term, count in counts.items() if settings.active(term)}


def upo_loss(
    settings: UpoSettings,
    candidates: Candidates,
    signals: Signals,
    counts: Mapping[str, float],
    baselines: Baselines | None = None,
    online: Mapping[str, LossOut] | None = None,
) -> LossOut:
    """The whole: offline terms of `signals`, `online` terms as they come, each over its global
    count; to be divided by 1.

    Metrics: TRL's names (chosen and rejected of pairs and labels together), upo/<term>/loss,
    upo/<term>/grad_share (of the L1 norm of the gradient by the answers' log-probabilities; offline
    terms), upo/rank/accuracies and upo/rate/accuracies (share of comparisons that the rewards have
    right).
    """
    terms = upo_terms(settings, candidates, signals, baselines)
    extra = {name: out for name, out in (online or {}).items() if settings.active(name)}
    out = combine({**terms, **extra}, settings.weights, counts, "upo/{}/loss")
    metrics = dict(out.metrics)
    metrics.update(_grad_shares(settings, candidates, signals, counts, baselines))
    metrics.update(_metrics(settings, candidates, signals))
    return LossOut(out.total, 1.0, metrics)


def _grad_shares(
    settings: UpoSettings,
    candidates: Candidates,
    signals: Signals,
    counts: Mapping[str, float],
    baselines: Baselines | None,
) -> dict[str, tuple[float, float]]:
    """Each term's part of sum over answers of |d term / d log pi(y)|, as (part, sum); sums over
    micro-batches and ranks keep their meaning.
    """
    if candidates.logp_C.stop_gradient:
        return {}
    leaf_C = candidates.logp_C.detach()
    leaf_C.stop_gradient = False
    norms = {}
    for name, out in upo_terms(settings, replace(candidates, logp_C=leaf_C), signals, baselines).items():
        if out.count and not out.total.stop_gradient:
            # LD-DPO reads the tokens instead
            grad_C = paddle.grad(out.total, leaf_C, allow_unused=True)[0]
            if grad_C is not None:
                norms[name] = settings.weights[name] / counts[name] * float(grad_C.abs().sum())
    return {f"upo/{name}/grad_share": (norm, sum(norms.values())) for name, norm in norms.items()}


def _metrics(settings: UpoSettings, candidates: Candidates, signals: Signals) -> dict[str, tuple[float, float]]:
    beta, metrics = settings.hyper.beta, {}
    if len(signals.pairs):
        metrics.update(
            preference_metrics(candidates, signals.pairs, beta, 0.0 if settings.reference else settings.kappa)
        )
    if len(signals.labels) and candidates.ref_logp_C is not None:
        for name, (total, count) in label_metrics(candidates, signals.labels, beta).items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + total, before[1] + count)
    r_C = _rewards(settings, candidates).detach().numpy()
    for name, pairs in (("rank", tier_edges(signals.tiers)), ("rate", rating_edges(signals.ratings))):
        if len(pairs):
            right = (r_C[pairs.better_P] > r_C[pairs.worse_P]).sum()
            metrics[f"upo/{name}/accuracies"] = (float(right), float(len(pairs)))
    return metrics


def pair_weight(beta: float, share: float = 0.2) -> float:
    """lambda_pair that makes the pair term's gradient `share` of a group-relative policy gradient's
    at the reference.
    """
    return share / (2 * beta)


PRESETS: Mapping[str, UpoSettings] = {
    "upo_hetero": UpoSettings(weights={"pair": 1.0, "rank": 0.5, "rate": 0.5, "bin": 0.25, "nll": 0.1}),
    "mpo": UpoSettings(weights={"pair": 0.8, "bco_pair": 0.2, "nll": 1.0}, hyper=PreferenceHyper()),
}


@dataclass(frozen=True)
class SamplingPreset:
    """A preset whose policy samples answers while it learns. pg_loss: a name of
    `policy.SURROGATES`. rows: comparisons come from judged rows of the data, not from the sampled
    answers. frozen_routers: routers of a model that is trained itself stay as they are.
    """

    pg_loss: str
    weights: Mapping[str, float] = field(default_factory=lambda: {"pg": 1.0, "pair": 1.0})
    kappa: int = 0
    rows: bool = False
    frozen_routers: bool = False


# dpo_aux has the structure of arXiv 2405.17956: likelihood weighed by advantage beside pairs or
# labels.
SAMPLING_PRESETS: Mapping[str, SamplingPreset] = {
    "upo_online": SamplingPreset("ppo"),
    "upo_offline": SamplingPreset("ppo", rows=True),
    "upo_group": SamplingPreset("gspo", kappa=1, frozen_routers=True),
    "dpo_aux": SamplingPreset("awr", rows=True),
}

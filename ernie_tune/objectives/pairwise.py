"""The DPO family: one function per loss on the scores of a better and a worse answer, under TRL's
names. Pure arithmetic.

Legend: C candidate answers of a micro-batch, P its pairs. A score is log pi(y) - log pi_ref(y), or
what a loss puts in its place (the table below); u = beta (score of the better - score of the
worse). Refuses to know: the model, the reference, how losses are divided.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import (
    Candidates,
    Pairs,
    PreferenceHyper,
    f_score,
    log_ratios,
    take,
    vector,
    wpo_factors,
)


@dataclass(frozen=True)
class Baselines:
    """What a loss compares with besides the pair; the caller keeps it over steps. delta: BCO's
    reward shift. kl_chosen, kl_rejected: KTO-pair's means of the log-ratios over the batch, 0 at
    least. z0: KTO's baseline for single answers.
    """

    delta: float = 0.0
    z0: float = 0.0
    kl_chosen: float = 0.0
    kl_rejected: float = 0.0


@dataclass(frozen=True)
class _Side:
    """The scores of one order of each pair, [P]: the better first, or for label noise the other way
    round.
    """

    better: Tensor
    worse: Tensor
    margin: Tensor

    def u(self, h: PreferenceHyper) -> Tensor:
        return h.beta * (self.better - self.worse) - self.margin

    def swapped(self) -> _Side:
        return _Side(self.worse, self.better, -self.margin)


def _sigmoid(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """-log sigma(u - m): DPO, eq. 7 of 2305.18290; with margins ODPO, eq. 6 of 2402.10571."""
    return -F.log_sigmoid(s.u(h))


def _cdpo(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    u, e = s.u(h), h.label_smoothing
    return -(1 - e) * F.log_sigmoid(u) - e * F.log_sigmoid(-u)


def _robust(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """Unbiased under flipped labels, eq. 6 of 2403.00409."""
    u, e = s.u(h), h.label_smoothing
    return (-(1 - e) * F.log_sigmoid(u) + e * F.log_sigmoid(-u)) / (1 - 2 * e)


def _hinge(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """SLiC 2305.10425, RSO 2309.06657."""
    return F.relu(1 - s.u(h))


def _ipo(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """Eq. 17 of 2310.12036, tau = beta."""
    return (s.better - s.worse - 1 / (2 * h.beta)).square()


def _simpo(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """Eq. 6 of 2405.14734; the scores are token means without reference."""
    return -F.log_sigmoid(s.u(h) - h.simpo_gamma)


def _odds(s: _Side, _h: PreferenceHyper, _: Baselines) -> Tensor:
    """-log sigma(log-odds of the better - of the worse), eq. 7 of 2403.07691; odds of the geometric
    mean probability of a token.
    """
    return -F.log_sigmoid(_log_odds(s.better) - _log_odds(s.worse) - s.margin)


def _log_odds(mean_logp: Tensor) -> Tensor:
    mean_logp = paddle.clip(mean_logp, max=-1e-12)  # a certain answer has infinite odds
    return mean_logp - paddle.log(-paddle.expm1(mean_logp))


def _dpop(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """Eq. 3 of 2402.13228: the penalty for a less probable better answer lies inside the
    sigmoid.
    """
    return -F.log_sigmoid(s.u(h) - h.beta * h.dpop_lambda * F.relu(-s.better))


def _dpop_outside(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """PaddleFormers' second form, for parity only."""
    return -F.log_sigmoid(s.u(h)) + h.dpop_lambda * F.relu(-s.better)


def _bco_pair(s: _Side, h: PreferenceHyper, b: Baselines) -> Tensor:
    """2404.04656."""
    return -F.log_sigmoid(h.beta * s.better - b.delta) - F.log_sigmoid(b.delta - h.beta * s.worse)


def _nca_pair(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """2402.05369, K = 2."""
    better, worse = h.beta * s.better, h.beta * s.worse
    return -F.log_sigmoid(better) - 0.5 * F.log_sigmoid(-better) - 0.5 * F.log_sigmoid(-worse)


def _exo_pair(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """KL(sigma(u), sigma(-u) || 1 - eps, eps), eq. 16 of 2402.00856."""
    u, e = s.u(h), h.label_smoothing
    if e == 0:
        raise ValueError(
            say(
                "label_smoothing (0) must be positive for exo_pair, whose target is (1 - eps, eps); use 0.001",
                "exo_pair 的 label_smoothing（0）须为正，其目标为 (1 - eps, eps)；请用 0.001",
            )
        )
    return F.sigmoid(u) * (F.log_sigmoid(u) - math.log1p(-e)) + F.sigmoid(-u) * (F.log_sigmoid(-u) - math.log(e))


def _sppo_hard(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """Eq. 4.7 of 2405.00675 with win probabilities 1 and 0."""
    return (s.better - 0.5 / h.beta).square() + (s.worse + 0.5 / h.beta).square()


def _apo_zero(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """Eq. 7 of 2408.06266."""
    return 1 - F.sigmoid(h.beta * s.better) + F.sigmoid(h.beta * s.worse)


def _apo_down(s: _Side, h: PreferenceHyper, _: Baselines) -> Tensor:
    """Eq. 8 of 2408.06266."""
    return F.sigmoid(h.beta * s.better) + 1 - F.sigmoid(h.beta * (s.better - s.worse))


def _kto_pair(s: _Side, h: PreferenceHyper, b: Baselines) -> Tensor:
    """KTO's value function on pairs, each side against the other's mean log-ratio (PaddleFormers'
    kto_pair).
    """
    better = 1 - F.sigmoid(h.beta * (s.better - b.kl_rejected))
    return 0.5 * (better + 1 - F.sigmoid(h.beta * (b.kl_chosen - s.worse)))


@dataclass(frozen=True)
class _Loss:
    """`value` of a pair; scores are divided by |y|^kappa; whether they have a reference, may take a
    margin, and may be another f-divergence's; with which power a score enters.
    """

    value: Callable[[_Side, PreferenceHyper, Baselines], Tensor]
    kappa: int = 0
    reference: bool = True
    margin: bool = False
    divergence: bool = False
    power: int = 1


LOSSES: Mapping[str, _Loss] = {
    "sigmoid": _Loss(_sigmoid, margin=True, divergence=True),
    "odpo": _Loss(_sigmoid, margin=True, divergence=True),
    "sigmoid_norm": _Loss(_sigmoid, kappa=1, margin=True, divergence=True),
    "cdpo": _Loss(_cdpo, margin=True, divergence=True),
    "robust": _Loss(_robust, margin=True, divergence=True),
    "hinge": _Loss(_hinge, margin=True, divergence=True),
    # TRL and the paper's experiments: token means
    "ipo": _Loss(_ipo, kappa=1, divergence=True, power=2),
    "ipo_sum": _Loss(_ipo, divergence=True, power=2),  # the paper's formula, PaddleFormers
    "simpo": _Loss(_simpo, kappa=1, reference=False, margin=True),
    "odds": _Loss(_odds, kappa=1, reference=False, margin=True),
    "cpo_sigmoid": _Loss(_sigmoid, reference=False, margin=True),
    "dpop": _Loss(_dpop, margin=True),
    "dpop_outside": _Loss(_dpop_outside, margin=True),
    "bco_pair": _Loss(_bco_pair),
    "nca_pair": _Loss(_nca_pair),
    "exo_pair": _Loss(_exo_pair, divergence=True),
    "sppo_hard": _Loss(_sppo_hard),
    "apo_zero": _Loss(_apo_zero),
    "apo_down": _Loss(_apo_down),
    "kto_pair": _Loss(_kto_pair),
}
COMPOSED = ("rpo", "mpo", "orpo", "cpo")
# kto_pair is a function and no name to train by: its baselines are means over a batch, so a
# window's loss would depend on how it is cut.
NAMES = (*(name for name in LOSSES if name != "kto_pair"), "sft", *COMPOSED)


def expand(names: Sequence[str], weights: Sequence[float] | None, hyper: PreferenceHyper) -> dict[str, float]:
    """A list of losses with weights (default 1 each) as atomic terms: name -> weight. "sft" is the
    NLL of the better answers.

    Composed: rpo = sigmoid + rpo_alpha sft (2404.19733); mpo = 0.8 sigmoid + 0.2 bco_pair + sft
    (2411.10442); orpo = sft + orpo_lambda odds; cpo = cpo_sigmoid + cpo_alpha sft. Raises
    ValueError for unknown names, another number of weights, and a mixture of losses with and
    without reference.
    """
    if weights is not None and len(weights) != len(names):
        raise ValueError(
            say(
                f"loss_weights ({len(weights)}) must be as many as loss_type ({len(names)}); give one per loss",
                f"loss_weights（{len(weights)} 个）须与 loss_type（{len(names)} 个）一样多；请每个损失给一个",
            )
        )
    parts = {
        "rpo": {"sigmoid": 1.0, "sft": hyper.rpo_alpha},
        "mpo": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0},
        "orpo": {"odds": hyper.orpo_lambda, "sft": 1.0},
        "cpo": {"cpo_sigmoid": 1.0, "sft": hyper.cpo_alpha},
    }
    terms: dict[str, float] = {}
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        if name not in NAMES:
            raise ValueError(
                say(
                    f"loss_type ({name}) must be one of {', '.join(NAMES)}; correct the name",
                    f"loss_type（{name}）须为 {', '.join(NAMES)} 之一；请改正名称",
                )
            )
        for part, share in parts.get(name, {name: 1.0}).items():
            terms[part] = terms.get(part, 0.0) + weight * share
    referenced = {LOSSES[name].reference for name in terms if name in LOSSES}
    if len(referenced) > 1:
        raise ValueError(
            say(
                f"loss_type ({', '.join(names)}) must not mix losses with and without a reference; split the run "
                "or drop one",
                f"loss_type（{', '.join(names)}）不能混用需要与不需要参考模型的损失；请分开训练，或去掉其一",
            )
        )
    return terms


def needs_reference(terms: Mapping[str, float]) -> bool:
    """Whether any of the terms compares with a reference."""
    return any(LOSSES[name].reference for name in terms if name in LOSSES)


def reward_kappa(terms: Mapping[str, float]) -> float:
    """The exponent of |y| in the reported rewards: as TRL has it, 0 with a reference, the loss's
    own without.
    """
    return max((LOSSES[name].kappa for name in terms if name in LOSSES and not LOSSES[name].reference), default=0.0)


def pair_loss(
    name: str,
    candidates: Candidates,
    pairs: Pairs,
    hyper: PreferenceHyper | None = None,
    baselines: Baselines | None = None,
) -> LossOut:
    """One atomic loss (a name of LOSSES): sum of weight * loss over pairs, divided by the sum of
    weights.

    A pair that is right with probability p costs p loss(better, worse) + (1 - p) loss(worse,
    better); for sigmoid that is the cross-entropy with p.
    """
    hyper, baselines = hyper or PreferenceHyper(), baselines or Baselines()
    loss = LOSSES[name]
    if not len(pairs):
        return LossOut(candidates.logp_C.sum() * 0.0, 0.0)
    if not loss.margin and pairs.margin_P.any():
        able = ", ".join(k for k, v in LOSSES.items() if v.margin)
        raise ValueError(
            say(
                f"loss_type ({name}) must be one of {able} for pairs with margins; drop the margins or change it",
                f"样本对带 margin 时，loss_type（{name}）须为 {able} 之一；请去掉 margin，或改用其他损失",
            )
        )
    if not loss.divergence and hyper.f_divergence_type != "reverse_kl":
        able = ", ".join(k for k, v in LOSSES.items() if v.divergence)
        raise ValueError(
            say(
                f"loss_type ({name}) must be one of {able} for f_divergence_type {hyper.f_divergence_type}; use "
                "reverse_kl",
                f"f_divergence_type 为 {hyper.f_divergence_type} 时，loss_type（{name}）须为 {able} 之一；请用 reverse_kl",
            )
        )
    side = _side(loss, candidates, pairs, hyper)
    value_P = loss.value(side, hyper, baselines)
    if (pairs.p_P != 1).any():
        p_P = vector(pairs.p_P, value_P)
        value_P = p_P * value_P + (1 - p_P) * loss.value(side.swapped(), hyper, baselines)
    if hyper.use_weighting:
        value_P = value_P * wpo_factors(candidates, pairs)
    return LossOut((value_P * vector(pairs.weight_P, value_P)).sum(), float(pairs.weight_P.sum()))


def _side(loss: _Loss, candidates: Candidates, pairs: Pairs, hyper: PreferenceHyper) -> _Side:
    """Scores of both answers as this loss wants them."""
    scores = []
    ratios = log_ratios(candidates, pairs, hyper.ld_alpha, loss.reference)
    for ratio_P, at in zip(ratios, (pairs.better_P, pairs.worse_P), strict=True):
        score_P = f_score(ratio_P, hyper.f_divergence_type, hyper.f_alpha_divergence_coef, loss.power)
        scores.append(score_P / vector(candidates.length_C[at], score_P) if loss.kappa else score_P)
    return _Side(scores[0], scores[1], vector(pairs.margin_P, scores[0]))


def nll_loss(
    candidates: Candidates, index_M: np.ndarray, weight_M: np.ndarray | None = None, norm: str = "token"
) -> LossOut:
    """Negative log-likelihood of the candidates `index_M`. token: sum of w * nll over sum of w *
    |y|. seq: sum of w * nll / |y| over sum of w.
    """
    weight_M = np.ones(len(index_M)) if weight_M is None else weight_M
    if not len(index_M):
        return LossOut(candidates.logp_C.sum() * 0.0, 0.0)
    length_M = candidates.length_C[index_M]
    weight_M, share_M = (weight_M, weight_M * length_M) if norm == "token" else (weight_M / length_M, weight_M)
    nll_M = -take(candidates.logp_C, index_M)
    return LossOut((nll_M * vector(weight_M, nll_M)).sum(), float(share_M.sum()))


def pair_terms(
    terms: Mapping[str, float],
    candidates: Candidates,
    pairs: Pairs,
    hyper: PreferenceHyper,
    baselines: Baselines | None = None,
) -> dict[str, LossOut]:
    """Every term of `expand` on the same pairs; `loss.combine` makes one loss of them."""
    return {
        name: nll_loss(candidates, pairs.better_P, pairs.weight_P, hyper.nll_norm)
        if name == "sft"
        else pair_loss(name, candidates, pairs, hyper, baselines)
        for name in terms
    }


def pair_counts(
    terms: Mapping[str, float], pairs: Pairs, length_C: np.ndarray, hyper: PreferenceHyper
) -> dict[str, float]:
    """What this micro-batch adds to each term's divisor, before any forward: the `count` that
    `pair_terms` will give.
    """
    tokens_P = length_C[pairs.better_P] if hyper.nll_norm == "token" else np.ones(len(pairs))
    return {name: float((pairs.weight_P * tokens_P).sum() if name == "sft" else pairs.weight_P.sum()) for name in terms}

"""Learning from judged answers, as the loop asks for it: log-probabilities of whole units in, one
loss out, with the numbers that run along.

Refuses to know: the formulas (objectives), where the reference's log-probabilities come from
(reference.py), files.
Legend: T tokens, N target tokens, C candidates, P pairs, U units.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.data.units import Unit, UnitBatch
from ernie_tune.objectives.listwise import Units, score_margins
from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.objective import Outputs, logp_outputs
from ernie_tune.objectives.pairwise import Baselines, pair_counts, pair_terms, reward_kappa
from ernie_tune.objectives.preference import (
    Candidates,
    Pairs,
    PreferenceHyper,
    preference_metrics,
    sequence_logp,
)
from ernie_tune.objectives.unpaired import Labels, RewardShift, kl_baseline
from ernie_tune.objectives.upo import Signals, UpoSettings, upo_counts, upo_loss

_KL = ("kl_sum", "kl_count")
_BESIDE = (*_KL, "good", "bad")  # counted with a window, but no divisors
_SIDES = ("rewards/chosen", "rewards/rejected")


@dataclass(frozen=True)
class Margins:
    """What a difference of scores asks of the rewards (ODPO): alpha times it ("linear") or its
    logarithm ("log"); alpha 0: nothing.
    """

    alpha: float = 0.0
    kind: str = "linear"


def pairs_of(batch: UnitBatch, margins: Margins | None = None, edge_weight: str = "unit") -> Pairs:
    """Every comparison that the batch's rows imply: pairs, rankings and ratings alike. The
    comparisons of one unit share its weight, or with edge_weight "edge" have it each.
    """
    rows = [
        (first + better, first + worse, unit, better, worse)
        for unit, first in zip(batch.units, batch.first_candidate_U.tolist(), strict=True)
        for better, worse in unit.edges
    ]
    weight = [u.weight / (len(u.edges) if edge_weight == "unit" else 1) for _, _, u, _, _ in rows]
    margin = [u.margin + _offset(u, b, w, margins or Margins()) for _, _, u, b, w in rows]
    return Pairs.of(
        [r[0] for r in rows],
        [r[1] for r in rows],
        np.array(weight, np.float64),
        np.array(margin, np.float64),
        np.array([u.confidence for _, _, u, _, _ in rows], np.float64),
    )


def _offset(unit: Unit, better: int, worse: int, margins: Margins) -> float:
    scores = unit.score_C[[better, worse]]
    if not margins.alpha or np.isnan(scores).any():
        return 0.0
    if not scores[0] > scores[1]:
        raise ValueError(
            say(
                f"{unit.where}: score of the better answer ({scores[0]:g}) must be above that of the "
                f"worse ({scores[1]:g}) with offset_alpha; correct the row",
                f"{unit.where}：使用 offset_alpha 时较优回答的分数（{scores[0]:g}）须高于较差的（"
                f"{scores[1]:g}）；请改正该行",
            )
        )
    return float(score_margins(scores[:1], scores[1:], margins.kind, margins.alpha)[0])


def image_metrics(
    candidates: Candidates, pairs: Pairs, batch: UnitBatch, beta: float, kappa: float = 0.0
) -> dict[str, tuple[float, float]]:
    """Of the comparisons of a true and a spoilt picture alone: how often, and by how much, the
    answer to the true one has the higher reward.
    """
    mine_P = np.array([batch.units[u].corrupted for u in batch.unit_C[pairs.better_P]], bool)
    if not mine_P.any():
        return {}
    found = preference_metrics(candidates, Pairs.of(pairs.better_P[mine_P], pairs.worse_P[mine_P]), beta, kappa)
    return {f"rewards/image_{name}": found[f"rewards/{name}"] for name in ("accuracies", "margins")}


def signals_of(batch: UnitBatch) -> Signals:
    """The batch's judgements by kind: pairs of `pair` rows, tiers of rankings, scores of ratings,
    labels.
    """
    parts: dict[str, list[tuple[Unit, int]]] = {name: [] for name in ("pair", "ranking", "rating", "label")}
    for unit, first in zip(batch.units, batch.first_candidate_U.tolist(), strict=True):
        parts[unit.signal].append((unit, first))
    edges = [(u, f + b, f + w) for u, f in parts["pair"] for b, w in u.edges]
    pairs = Pairs.of(
        [b for _, b, _ in edges],
        [w for _, _, w in edges],
        np.array([u.weight / len(u.edges) for u, _, _ in edges], np.float64),
        np.array([u.margin for u, _, _ in edges], np.float64),
        np.array([u.confidence for u, _, _ in edges], np.float64),
    )
    density_C = batch.columns.get("density_C")
    labels = [
        (f + c, u.label_C[c], u.weight / u.num_candidates) for u, f in parts["label"] for c in range(u.num_candidates)
    ]
    return Signals(
        pairs,
        _units(
            parts["ranking"], [u.rank_C if not np.isnan(u.rank_C).any() else -u.score_C for u, _ in parts["ranking"]]
        ),
        _units(parts["rating"], [u.score_C for u, _ in parts["rating"]]),
        Labels(
            np.array([i for i, _, _ in labels], np.int64),
            np.array([g for _, g, _ in labels], np.float64),
            np.array([w for _, _, w in labels], np.float64),
            None if density_C is None else density_C[[i for i, _, _ in labels]],
        ),
    )


def _units(members: Sequence[tuple[Unit, int]], values: Sequence[np.ndarray]) -> Units:
    index = [np.arange(first, first + u.num_candidates) for u, first in members]
    number = [np.full(u.num_candidates, i) for i, (u, _) in enumerate(members)]
    if not members:
        return Units.of([], [], [])
    weight_U = np.array([u.weight for u, _ in members], np.float64)
    return Units.of(np.concatenate(index), np.concatenate(number), np.concatenate(values), weight_U)


def candidates_of(logp_N: Tensor, batch: UnitBatch) -> Candidates:
    """The batch's answers with their log-probabilities, and the reference's where the batch has
    them.
    """
    count = len(batch.length_C)
    ref_logp_N = batch.columns.get("ref_logp_N")
    ref_N = None if ref_logp_N is None else paddle.to_tensor(ref_logp_N, dtype=logp_N.dtype)
    return Candidates(
        sequence_logp(logp_N, batch.candidate_N, count),
        batch.length_C,
        None if ref_N is None else sequence_logp(ref_N, batch.candidate_N, count),
        logp_N,
        ref_N,
        batch.candidate_N,
    )


class JudgedObjective(abc.ABC):
    """What all objectives on judged answers share: global counts, KTO's baseline of this window,
    BCO's running shift.
    """

    def __init__(self, shift: RewardShift | None = None) -> None:
        self._counts: dict[str, float] = {}
        self.shift = shift or RewardShift()
        self.z0 = 0.0

    @property
    def uses_kl(self) -> bool:
        """Whether windows must bring log-ratios of mismatched answers."""
        return False

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def anchored(self) -> bool:
        """Whether the loss holds the likelihood of the better answers."""
        return False

    @abc.abstractmethod
    def counts(self, window: Sequence[UnitBatch]) -> dict[str, float]:
        """As `Objective.counts`."""

    def outputs(self, model: Any, hidden_TD: Tensor, batch: UnitBatch) -> Outputs:
        return logp_outputs(model, hidden_TD, batch)

    @abc.abstractmethod
    def loss(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        """As `Objective.loss`."""

    def begin(self, counts: Mapping[str, float]) -> float:
        self._counts = {name: n for name, n in counts.items() if name not in _BESIDE}
        if self.uses_kl and counts["bin"]:
            self.z0 = kl_baseline(counts["kl_sum"], counts["kl_count"])
        return 1.0  # each term has its own divisor

    def end(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        good, bad = (metrics.get(name, (0.0, 0.0)) for name in _SIDES)
        self.shift = self.shift.updated(good, bad)

    def baselines(self) -> Baselines:
        return Baselines(delta=self.shift.delta, z0=self.z0)

    def state_dict(self) -> dict[str, Any]:
        return {"shift": self.shift.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shift = RewardShift.from_state(state["shift"])


class PairObjective(JudgedObjective):
    """The DPO family: `terms` are atomic losses with weights (`pairwise.expand`), on all
    comparisons of a batch.
    """

    def __init__(
        self,
        terms: Mapping[str, float],
        hyper: PreferenceHyper,
        margins: Margins | None = None,
        reference: bool = True,
        shift: RewardShift | None = None,
    ) -> None:
        super().__init__(shift)
        self.terms, self.hyper, self.margins, self._reference = dict(terms), hyper, margins or Margins(), reference

    @property
    def needs_reference(self) -> bool:
        return self._reference

    @property
    def anchored(self) -> bool:
        return "sft" in self.terms

    def counts(self, window: Sequence[UnitBatch]) -> dict[str, float]:
        total = dict.fromkeys(self.terms, 0.0)
        for batch in window:
            pairs = pairs_of(batch, self.margins)
            for name, n in pair_counts(self.terms, pairs, batch.length_C, self.hyper).items():
                total[name] += n
        return total

    def loss(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        candidates, pairs = candidates_of(outputs["logp_N"], batch), pairs_of(batch, self.margins)
        terms = pair_terms(self.terms, candidates, pairs, self.hyper, self.baselines())
        out = combine(terms, self.terms, self._counts)
        named = out.metrics if len(self.terms) > 1 else {}
        how = self.hyper.beta, reward_kappa(self.terms)
        found = {**preference_metrics(candidates, pairs, *how), **image_metrics(candidates, pairs, batch, *how)}
        return LossOut(out.total, out.count, {**named, **found})


class UpoObjective(JudgedObjective):
    """Every kind of judgement in one weighted sum; with the label term alone it is
    KTO or BCO.

    For KTO it also counts the labels: `good` and `bad` are the weights of such answers in the steps
    made so far, of all ranks, `labelled_steps` how many steps those were.
    """

    def __init__(self, settings: UpoSettings, shift: RewardShift | None = None) -> None:
        super().__init__(shift)
        self.settings = settings
        self.good = self.bad = 0.0
        self.labelled_steps = 0
        self._labels = (0.0, 0.0)  # of the window at hand

    @property
    def uses_kl(self) -> bool:
        return self.settings.active("bin") and self.settings.bin == "kto"

    @property
    def needs_reference(self) -> bool:
        return self.settings.reference

    @property
    def anchored(self) -> bool:
        return self.settings.active("nll")

    def counts(self, window: Sequence[UnitBatch]) -> dict[str, float]:
        total: dict[str, float] = dict.fromkeys(_BESIDE, 0.0) if self.uses_kl else {}
        for batch in window:
            for name, n in upo_counts(self.settings, signals_of(batch), batch.length_C).items():
                total[name] = total.get(name, 0.0) + n
            if self.uses_kl:
                for name, value in zip(_KL, batch.columns.get("mismatch_S", (0.0, 0.0)), strict=True):
                    total[name] += float(value)
                for unit in (u for u in batch.units if u.signal == "label"):
                    share = float(np.mean(unit.label_C))
                    total["good"] += unit.weight * share
                    total["bad"] += unit.weight * (1 - share)
        return total

    def begin(self, counts: Mapping[str, float]) -> float:
        if not any(n for name, n in counts.items() if name not in _BESIDE):
            raise ValueError(
                say(
                    "rows of a window must have a judgement that a term with a weight ("
                    f"{', '.join((k for k, w in self.settings.weights.items() if w))}) can learn from; give "
                    "such rows or weights",
                    "一个窗口内须有带权重的项（"
                    f"{', '.join((k for k, w in self.settings.weights.items() if w))}"
                    "）可学习的评判；请补充此类数据，或调整权重",
                )
            )
        self._labels = counts.get("good", 0.0), counts.get("bad", 0.0)
        return super().begin(counts)

    def end(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        super().end(metrics)
        if self.uses_kl:
            self.good, self.bad = self.good + self._labels[0], self.bad + self._labels[1]
            self.labelled_steps += 1

    def state_dict(self) -> dict[str, Any]:
        labels = {"good": self.good, "bad": self.bad, "steps": self.labelled_steps}
        return {**super().state_dict(), **({"labels": labels} if self.uses_kl else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        if "labels" in state:  # the first release counted, but kept no count
            seen = state["labels"]
            self.good, self.bad, self.labelled_steps = seen["good"], seen["bad"], seen["steps"]

    def loss(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        s, candidates, signals = self.settings, candidates_of(outputs["logp_N"], batch), signals_of(batch)
        out = upo_loss(s, candidates, signals, self._counts, self.baselines())
        found = image_metrics(candidates, signals.pairs, batch, s.hyper.beta, 0.0 if s.reference else s.kappa)
        return LossOut(out.total, out.count, {**out.metrics, **found})


def settled(metrics: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Means of (sum, count), without what nothing was counted for."""
    return {name: total / count for name, (total, count) in metrics.items() if count and math.isfinite(total)}

"""Sampled answers and judgements in one loss: the policy gradient of a group, pairs among its
answers on the same log-probabilities, and judged rows that ride in the same window.

Each term is divided by its own count over the whole window and all ranks. What has no weight is not
computed, so that without pairs the loss is the policy's own to the last bit, and without the policy
gradient it is DPO's. Refuses to know: formulas (objectives), where answers, rewards, references and
rows come from. Legend: N trained tokens, C answers, P pairs, G answers of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.data.units import Unit, UnitBatch
from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.objective import Outputs, logp_outputs
from ernie_tune.objectives.online_pairs import PairRule, online_pairs
from ernie_tune.objectives.policy import policy_terms
from ernie_tune.objectives.preference import Pairs, preference_metrics
from ernie_tune.objectives.upo import Signals, UpoSettings, upo_loss, upo_terms
from ernie_tune.train.policy import PolicyObjective, kept_answers
from ernie_tune.train.preference import UpoObjective, candidates_of, signals_of

SAMPLED = "sampled"  # signal of a unit whose answers the policy wrote itself
_ROWS = "rows/"  # counts of terms that judged rows feed
_PULLS = ("pg_pull", "pg_answers", "pair_pull", "pair_answers")  # counted with a window, but no divisors
SHARE = 0.2  # of the policy gradient's pull on a token that the pairs' is given, at the reference


def is_sampled(batch: UnitBatch) -> bool:
    """Whether the policy wrote the batch's answers; else they are rows of the data."""
    return bool(batch.units) and batch.units[0].signal == SAMPLED


@dataclass(frozen=True)
class PairTerm:
    """Which of a group's answers are compared, and how. `weight` None: chosen in each window so
    that the pairs pull a token with `SHARE` of the policy gradient's strength, were the policy the
    reference.
    """

    rule: PairRule
    settings: UpoSettings
    weight: float | None = 1.0


def unit_pairs(unit: Unit, rule: PairRule, may_win_G: np.ndarray) -> Pairs:
    """Pairs among the answers to one prompt, by their rewards; equal answers make none."""
    length_G = np.array([int(d.trained_L.sum()) for d in unit.dialogues])
    answers = [d.row.input_ids_L[unit.shared :].tobytes() for d in unit.dialogues]
    may_win_G = may_win_G.astype(bool) & (length_G > 0)
    return online_pairs(unit.score_C, rule, may_win_G, length_G, answers)


def sampled_pairs(batch: UnitBatch, rule: PairRule) -> Pairs:
    """All pairs of a batch's prompts, by number of answer in the batch; those of one prompt share
    weight 1.
    """
    first_U, may_win_C = batch.first_candidate_U.tolist(), batch.columns["may_win_C"]
    found = [
        (first, unit_pairs(unit, rule, may_win_C[first : first + unit.num_candidates]))
        for unit, first in zip(batch.units, first_U, strict=True)
    ]
    parts = zip(
        *((f + p.better_P, f + p.worse_P, p.weight_P, p.margin_P, p.p_P) for f, p in found),
        strict=True,
    )
    return Pairs(*(np.concatenate(part) for part in parts))


class OnlineUpoObjective:
    """The policy's terms, pairs among sampled answers (`pair`), and judged rows (`rows`), which
    learn as offline UPO does.

    `weights`: of the terms pg and pair (kl and ent have theirs in `policy`: its beta and entropy
    coefficient).
    """

    def __init__(
        self,
        policy: PolicyObjective,
        weights: Mapping[str, float],
        pair: PairTerm | None = None,
        rows: UpoObjective | None = None,
    ) -> None:
        self.policy, self.term_weights, self.rows = policy, dict(weights), rows
        self.pair = pair if weights.get("pair") else None
        self._counts: dict[str, float] = {}
        self.pair_weight = 0.0

    # --- what the loop asks ----------------------------------------------------------------------

    def counts(self, window: Sequence[UnitBatch]) -> dict[str, float]:
        sampled = [batch for batch in window if is_sampled(batch)]
        out = self.policy.counts(sampled)
        if self.pair is not None:
            pairs = [sampled_pairs(batch, self.pair.rule) for batch in sampled]
            out["pair"] = float(sum(p.weight_P.sum() for p in pairs))
            if self.pair.weight is None:
                pulls = [self._pulls(b, p, self.pair) for b, p in zip(sampled, pairs, strict=True)]
                out.update({name: sum(one[name] for one in pulls) for name in _PULLS})
        if self.rows is not None:
            judged = self.rows.counts([batch for batch in window if not is_sampled(batch)])
            out.update({_ROWS + name: count for name, count in judged.items()})
        return out

    def begin(self, counts: Mapping[str, float]) -> float:
        self._counts = dict(counts)
        self.policy.begin(counts)
        if self.pair is not None:
            self.pair_weight = self.term_weights["pair"] * self._factor(self.pair, counts)
        judged = {name.removeprefix(_ROWS): n for name, n in counts.items() if name.startswith(_ROWS)}
        if self.rows is not None and judged:
            self.rows.begin(judged)
        return 1.0  # each term has its own divisor

    def outputs(self, model: Any, hidden_TD: Tensor, batch: UnitBatch) -> Outputs:
        """Of sampled answers over what could be sampled; of rows over everything, as offline."""
        if is_sampled(batch):
            return self.policy.outputs(model, hidden_TD, batch)
        return logp_outputs(model, hidden_TD, batch)

    def loss(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        return self._of_sampled(outputs, batch) if is_sampled(batch) else self._of_rows(outputs, batch)

    def end(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        self.policy.end(metrics)
        if self.rows is not None:
            self.rows.end(metrics)

    def state_dict(self) -> dict[str, Any]:
        rows = {} if self.rows is None else {"rows": self.rows.state_dict()}
        return {**self.policy.state_dict(), **rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state)
        if self.rows is not None:
            self.rows.load_state_dict(state["rows"])

    # --- terms -----------------------------------------------------------------------------------

    def _of_sampled(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        policy, sampled = self.policy, self.policy.sampled(outputs, batch)
        weights = {**policy.weights, "pg": self.term_weights.get("pg", 0.0), "pair": self.pair_weight}
        pairs = sampled_pairs(batch, self.pair.rule) if self.pair is not None else None

        def terms_of(logp_N: Tensor) -> dict[str, LossOut]:
            how = {"kl": policy.beta > 0, "entropy": policy.rewards_entropy}
            terms = policy_terms(replace(sampled, logp_N=logp_N), policy.hyper, **how)
            if self.pair is not None and pairs is not None:
                known = candidates_of(logp_N, batch)
                terms["pair"] = upo_terms(self.pair.settings, known, Signals(pairs))["pair"]
            return terms

        terms = terms_of(outputs["logp_N"])
        used = {name: one for name, one in terms.items() if weights[name] or name == "ent"}
        out = combine(used, weights, self._counts, "upo/{}/loss")
        metrics = {**terms["pg"].metrics, **out.metrics, **policy.mismatch(sampled, batch), **self._told(weights)}
        metrics.update(self._shares(terms_of, outputs["logp_N"], weights, self._counts))
        if self.pair is not None and pairs is not None:
            metrics.update(_pair_metrics(self.pair, batch, pairs, outputs["logp_N"]))
        return LossOut(out.total, out.count, metrics)

    def _of_rows(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        assert self.rows is not None
        rows, settings, signals = self.rows, self.rows.settings, signals_of(batch)
        counts = {name.removeprefix(_ROWS): n for name, n in self._counts.items() if name.startswith(_ROWS)}
        known, baselines = candidates_of(outputs["logp_N"], batch), rows.baselines()
        out = upo_loss(settings, known, signals, counts, baselines)

        def terms_of(logp_N: Tensor) -> dict[str, LossOut]:
            return upo_terms(settings, candidates_of(logp_N, batch), signals, baselines)

        shares = self._shares(terms_of, outputs["logp_N"], settings.weights, counts)
        told = {
            f"upo/{name}/{what}": (value, 1.0)
            for name in counts
            if settings.active(name)
            for what, value in (("weight", settings.weights[name]), ("count", counts[name]))
        }
        return LossOut(out.total, out.count, {**out.metrics, **told, **shares})

    def _told(self, weights: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Weight and count of the terms that sampled answers feed."""
        names = [name for name in ("pg", "pair", "kl", "ent") if name in self._counts and weights[name]]
        told = {f"upo/{name}/weight": (float(weights[name]), 1.0) for name in names}
        return {**told, **{f"upo/{name}/count": (self._counts[name], 1.0) for name in names}}

    def _active(self) -> Iterator[str]:
        """Every term of the run that log-probabilities feed."""
        yield from (name for name in ("pg", "pair") if self.term_weights.get(name) and (name == "pg" or self.pair))
        if self.policy.beta:
            yield "kl"
        if self.rows is not None:
            yield from (name for name in self.rows.settings.weights if self.rows.settings.active(name))

    def _shares(
        self,
        terms_of: Callable[[Tensor], Mapping[str, LossOut]],
        logp_N: Tensor,
        weights: Mapping[str, float],
        counts: Mapping[str, float],
    ) -> dict[str, tuple[float, float]]:
        """Each term's part of sum over tokens of |d term / d log pi|, as (part, sum of all): over a
        window they add up to shares.
        """
        if logp_N.stop_gradient or not paddle.is_grad_enabled():
            return {}
        leaf_N = logp_N.detach()
        leaf_N.stop_gradient = False
        norms = dict.fromkeys(self._active(), 0.0)
        for name, out in terms_of(leaf_N).items():
            if name in norms and out.count and not out.total.stop_gradient:
                grad_N = paddle.grad(out.total, leaf_N, retain_graph=True, allow_unused=True)[0]
                if grad_N is not None:
                    norms[name] = weights[name] / counts[name] * float(grad_N.abs().sum())
        return {f"upo/{name}/grad_share": (norm, sum(norms.values())) for name, norm in norms.items()}

    # --- the pairs' weight -----------------------------------------------------------------------

    def _pulls(self, batch: UnitBatch, pairs: Pairs, pair: PairTerm) -> dict[str, float]:
        """Sums over answers of how strongly the policy gradient pulls each of their tokens, and
        over the answers in pairs of how the pairs do, both at the reference, without divisors and
        weights.
        """
        hyper, length_C = self.policy.hyper, batch.length_C
        kept_C = kept_answers(batch) * (length_C > 0)
        first_N = np.r_[0, np.cumsum(length_C)[:-1]]
        pulled_C = np.zeros(len(length_C))
        some_C = length_C > 0
        pulled_C[some_C] = np.abs(np.add.reduceat(batch.columns["advantage_N"], first_N[some_C]) / length_C[some_C])
        if hyper.aggregation == "seq_mean":
            pulled_C[some_C] /= length_C[some_C]
        in_pairs = np.unique(np.concatenate([pairs.better_P, pairs.worse_P]))
        weight_C = np.bincount(pairs.better_P, pairs.weight_P, len(length_C)) + np.bincount(
            pairs.worse_P, pairs.weight_P, len(length_C)
        )
        per_token_C = weight_C * pair.settings.hyper.beta / 2 / np.maximum(length_C, 1) ** pair.settings.kappa
        sums = ((pulled_C * kept_C).sum(), kept_C.sum(), per_token_C[in_pairs].sum(), len(in_pairs))
        return dict(zip(_PULLS, map(float, sums), strict=True))

    def _factor(self, pair: PairTerm, counts: Mapping[str, float]) -> float:
        if pair.weight is not None:
            return pair.weight
        pg, answers, pulled, paired = (counts[name] for name in _PULLS)
        if not (pg and pulled):
            return 0.0  # nothing to be a share of, or nothing to weigh
        return SHARE * (pg / answers / counts["pg"]) / (pulled / paired / counts["pair"])


def _pair_metrics(pair: PairTerm, batch: UnitBatch, pairs: Pairs, logp_N: Tensor) -> dict[str, tuple[float, float]]:
    """How many pairs a prompt gave, how far their rewards are apart, and TRL's numbers of the
    implicit rewards.
    """
    s, score_C = pair.settings, np.concatenate([unit.score_C for unit in batch.units])
    gap = float((score_C[pairs.better_P] - score_C[pairs.worse_P]).sum())
    found = {
        "upo/pairs_per_group": (float(len(pairs)), float(batch.num_rows)),
        "upo/pair_gap": (gap, float(len(pairs))),
    }
    if len(pairs):
        known = candidates_of(logp_N.detach(), batch)
        found.update(preference_metrics(known, pairs, s.hyper.beta, 0.0 if s.reference else s.kappa))
    return found

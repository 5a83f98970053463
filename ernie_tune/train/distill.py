"""Learning from a teacher beside sampled rewards, as the loop asks for it: the policy's loss, and
the distance of whole next-token distributions from the teacher's.

Refuses to know: the formulas (objectives), who the teacher is and when it was asked.
Legend: N trained tokens, E the teacher's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.data.units import UnitBatch
from ernie_tune.objectives.distill import ScoreHead, token_jsd
from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.objective import Outputs
from ernie_tune.objectives.policy import policy_terms
from ernie_tune.objectives.preference import vector
from ernie_tune.train.policy import PolicyObjective, kept_answers

STATES = "teacher_state_ND"


class DistilledObjective:
    """The policy's terms on sampled answers, and `coef` times the generalised Jensen-Shannon
    divergence from the teacher, a mean over tokens, on sampled answers and demonstrations alike.

    `head`: the teacher's, asked for when it is needed, on the stage that has one; coef 0: none is.
    """

    def __init__(self, policy: PolicyObjective, coef: float, beta: float, head: Callable[[], ScoreHead]) -> None:
        self.policy, self.coef, self.beta, self.head = policy, coef, beta, head
        self._counts: dict[str, float] = {}

    def counts(self, window: Sequence[UnitBatch]) -> dict[str, float]:
        out = self.policy.counts([batch for batch in window if _is_sampled(batch)])
        if self.coef:
            out["distill"] = float(sum(_kept_tokens(batch).sum() for batch in window))
        return out

    def begin(self, counts: Mapping[str, float]) -> float:
        self._counts = dict(counts)
        self.policy.begin(counts)
        return 1.0

    def outputs(self, model: Any, hidden_TD: Tensor, batch: UnitBatch) -> Outputs:
        """The policy's, and jsd_N where the term has a weight."""
        out = dict(self.policy.outputs(model, hidden_TD, batch)) if _is_sampled(batch) else {}
        if self.coef:
            weight, transposed = model.head_weight()
            hidden_ND = paddle.gather(hidden_TD, paddle.to_tensor(batch.source_N))
            state_NE = paddle.to_tensor(batch.columns[STATES], dtype=hidden_ND.dtype)
            how = (self.beta, self.policy.temperature, self.policy.banned)
            out["jsd_N"] = token_jsd(hidden_ND, ScoreHead(weight, transposed), state_NE, self.head(), *how)
        return out

    def loss(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        terms: dict[str, LossOut] = {}
        told: dict[str, tuple[float, float]] = {}
        policy = self.policy
        if _is_sampled(batch):
            sampled = policy.sampled(outputs, batch)
            terms = policy_terms(sampled, policy.hyper, kl=policy.beta > 0, entropy=policy.rewards_entropy)
            told = {**policy.mismatch(sampled, batch), **_reverse_kl(batch)}
        if self.coef:
            kept_N = _kept_tokens(batch)
            total = (outputs["jsd_N"] * vector(kept_N, outputs["jsd_N"])).sum()
            terms["distill"] = LossOut(total, float(kept_N.sum()))
        out = combine(terms, {**policy.weights, "distill": self.coef}, self._counts, "policy/{}_loss")
        return LossOut(out.total, out.count, {**out.metrics, **told})

    def end(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        self.policy.end(metrics)

    def state_dict(self) -> dict[str, Any]:
        return self.policy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state)


def _is_sampled(batch: UnitBatch) -> bool:
    return "advantage_N" in batch.columns


def _kept_tokens(batch: UnitBatch) -> np.ndarray:
    """1 for tokens that count, [N]; all of a demonstration do."""
    return kept_answers(batch)[batch.candidate_N] if _is_sampled(batch) else np.ones(len(batch.target_N))


def _reverse_kl(batch: UnitBatch) -> dict[str, tuple[float, float]]:
    """KL(policy || teacher) of a sampled token, where the policy was when it sampled."""
    kept_N = _kept_tokens(batch)
    gap_N = batch.columns["old_logp_N"] - batch.columns["teacher_logp_N"]
    return {"teacher/kl": (float((gap_N * kept_N).sum()), float(kept_N.sum()))}

"""Learning from sampled answers, as the loop asks for it: log-probabilities of whole groups in, one
loss out.

The columns of a batch say what was known when its answers were sampled; what is computed here is
the policy as it is now, over the same support:
the same temperature, the same ids left out.
Refuses to know: the formulas (objectives), where answers, rewards and advantages come from.
Legend: N trained tokens, C answers, T tokens of the pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from paddle import Tensor

from ernie_tune.data.units import UnitBatch
from ernie_tune.objectives.correction import correction, mismatch_sums
from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.objective import Outputs, logp_and_entropy, logp_outputs
from ernie_tune.objectives.perception import Perception, perception_term
from ernie_tune.objectives.policy import EntropyControl, PolicyHyper, Sampled, policy_counts, policy_terms

BLIND = "blind_N"  # the column of counterparts without the picture


class PolicyObjective:
    """The policy's loss, the penalty for leaving the reference (`beta`) and the entropy bonus, each
    over its global count.

    `banned`: ids that sampling leaves out. `rollout_is`: correction of the rollout engine's
    mismatch, with its bounds; auto: icepop where the trainer computed its own log-probabilities.
    `perception`: the term of batches that show answers without the picture, too. `log_entropy`: the
    entropy of every token is computed and logged even where nothing rewards it.
    """

    def __init__(
        self,
        hyper: PolicyHyper,
        banned: Sequence[int] = (),
        temperature: float = 1.0,
        beta: float = 0.0,
        entropy: EntropyControl | None = None,
        rollout_is: str = "none",
        bounds: tuple[float | None, float | None] = (None, None),
        log_entropy: bool = False,
        perception: Perception | None = None,
    ) -> None:
        self.hyper, self.banned, self.temperature, self.beta = hyper, tuple(banned), temperature, beta
        self.entropy = entropy or EntropyControl()
        self.rollout_is, self.bounds, self.log_entropy = rollout_is, bounds, log_entropy
        self.perception = perception
        self._counts: dict[str, float] = {}

    @property
    def needs_reference(self) -> bool:
        return self.beta > 0

    @property
    def rewards_entropy(self) -> bool:
        return self.entropy.adaptive or self.entropy.coef != 0

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms, as they are now."""
        return {"pg": 1.0, "kl": self.beta, "ent": self.entropy.coef, "see": 1.0}

    def counts(self, window: Sequence[UnitBatch]) -> dict[str, float]:
        total = sum(policy_counts(b.length_C, kept_answers(b), self.hyper) for b in window)
        counts = dict.fromkeys(("pg", *self._extra()), float(total))
        if self.perception is not None:
            counts["see"] = float(sum((b.columns[BLIND] >= 0).sum() for b in window if BLIND in b.columns))
        return counts

    def _extra(self) -> tuple[str, ...]:
        return (*(("kl",) if self.beta else ()), *(("ent",) if self.rewards_entropy else ()))

    def begin(self, counts: Mapping[str, float]) -> float:
        self._counts = dict(counts)
        return 1.0  # each term has its own divisor

    def outputs(self, model: Any, hidden_TD: Tensor, batch: UnitBatch) -> Outputs:
        """logp_N, and entropy_N where something rewards or logs it."""
        read = logp_and_entropy if self.rewards_entropy or self.log_entropy else logp_outputs
        return read(model, hidden_TD, batch, self.temperature, self.banned)

    def loss(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        sampled = self.sampled(outputs, batch)
        terms = policy_terms(sampled, self.hyper, kl=self.beta > 0, entropy=self.rewards_entropy)
        if self.perception is not None and BLIND in batch.columns:
            blind_N = batch.columns[BLIND].astype(np.int64)
            terms["see"] = perception_term(outputs["logp_N"], outputs.get("entropy_N"), blind_N, self.perception)
        out = combine(terms, self.weights, self._counts, "policy/{}_loss")
        named = {k: v for k, v in out.metrics.items() if len(terms) > 1 or k != "policy/pg_loss"}
        return LossOut(out.total, out.count, {**named, **self.mismatch(sampled, batch)})

    def sampled(self, outputs: Outputs, batch: UnitBatch) -> Sampled:
        """The batch's answers as the objectives take them."""
        columns = batch.columns
        old_N, engine_N = columns["old_logp_N"], columns["sampled_logp_N"]
        mode = self.rollout_is
        if mode == "auto":  # the engine's own words need none
            mode = "none" if np.array_equal(old_N, engine_N) else "icepop"
        weight_N = correction(old_N, engine_N, batch.candidate_N, mode, *self.bounds)
        if "entropy_keep_N" in columns:
            weight_N = weight_N * columns["entropy_keep_N"]
        return Sampled(
            outputs["logp_N"],
            columns["advantage_N"],
            batch.candidate_N,
            batch.length_C,
            columns["old_logp_N"],
            columns.get("ref_logp_N"),
            weight_N,
            kept_answers(batch),
            outputs.get("entropy_N"),
        )

    def mismatch(self, sampled: Sampled, batch: UnitBatch) -> dict[str, tuple[float, float]]:
        """How far the trainer's log-probabilities of before are from the engine's, where the
        trainer computed its own.
        """
        old_N, engine_N = batch.columns["old_logp_N"], batch.columns["sampled_logp_N"]
        if np.array_equal(old_N, engine_N):
            return {}
        sums = mismatch_sums(old_N, engine_N, batch.candidate_N)
        return {f"mismatch/{name}": (sums[key], sums["tokens"]) for name, key in (("kl", "kl"), ("k3_kl", "k3_kl"))}

    def end(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        total, count = metrics.get("entropy", (0.0, 0.0))
        if count:
            self.entropy.step(total / count)

    def state_dict(self) -> dict[str, Any]:
        return {"entropy_coef": self.entropy.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.entropy.coef = state["entropy_coef"]


def kept_answers(batch: UnitBatch) -> np.ndarray:
    """1 for the answers that count, [C], from the column keep_N; an answer without a trained token
    counts for nothing.
    """
    keep_C = np.zeros(len(batch.length_C))
    keep_C[batch.candidate_N] = batch.columns["keep_N"]
    return keep_C

"""Whether the engine that samples and the forward that trains are one policy: looked at every so
many rounds, and what follows where they are not.

Where they agree, what the engine said of its tokens stands for the policy of before, which saves a
forward over the batch. Above the gate the run says so, computes the old log-probabilities itself
from then on, and tokens whose ratio to the engine's leaves the bounds of IcePop are left out.
Refuses to know: engines, losses, how a forward is made. State is JSON.
Gates: float32 on one machine differs by rounding, at most some 1e-6; bfloat16 by what its products
lose.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_tune.checkpoint.state import Ranks
from ernie_tune.config.language import Text, say
from ernie_tune.data.units import UnitBatch
from ernie_tune.objectives.correction import mismatch_metrics, mismatch_sums
from ernie_tune.train.guards import Verdict

ANSWERS = 64  # that are looked at, on each rank
Ask = Callable[[UnitBatch], np.ndarray]


@dataclass(frozen=True)
class MismatchGate:
    """How far log-probabilities of one token may differ: at most, and on average (nats)."""

    largest: float = 1e-5
    mean: float = 1e-5

    @classmethod
    def of(cls, dtype: str, largest: float | None = None) -> MismatchGate:
        """The gate of a model's dtype; `largest`: another bound of the first kind."""
        usual = cls(0.5, 1e-2) if dtype in ("bfloat16", "float16") else cls()
        return usual if largest is None else cls(largest, largest)


class Agreement:
    """`ask`: a micro-batch -> what the trainer says of its tokens, [N]. `every`: rounds between two
    looks. `recompute`: the trainer's own are taken, in every round.
    """

    def __init__(self, ask: Ask, ranks: Ranks, gate: MismatchGate, every: int = 20, recompute: bool = False) -> None:
        self.ask, self.ranks, self.gate, self.every, self.recompute = ask, ranks, gate, every, recompute
        self.metrics: dict[str, float] = {}
        self.news: list[Text] = []

    def __call__(self, round_number: int, batches: Sequence[UnitBatch]) -> list[np.ndarray]:
        """Old log-probabilities of each micro-batch of a round, as the trainer computes them; none
        where the engine's stand. All ranks call it with as many micro-batches.
        """
        self.metrics = {}
        if not self.recompute and round_number % self.every:
            return []
        answers = np.cumsum([len(batch.length_C) for batch in batches])
        wanted = len(batches) if self.recompute else int(np.searchsorted(answers, ANSWERS)) + 1
        wanted = max(self.ranks.gather(min(wanted, len(batches))))
        told = [np.asarray(self.ask(batch), np.float64) for batch in batches[:wanted]]
        self._judge(round_number, batches, told)
        if not self.recompute:
            return []
        return told + [np.asarray(self.ask(batch), np.float64) for batch in batches[wanted:]]

    def _judge(self, round_number: int, batches: Sequence[UnitBatch], told: Sequence[np.ndarray]) -> None:
        pairs = zip(batches, told, strict=False)
        sums = [mismatch_sums(own, b.columns["sampled_logp_N"], b.candidate_N) for b, own in pairs]
        everywhere = [one for part in self.ranks.gather(sums) for one in part]
        if not everywhere:
            return
        whole = {name: float(np.sum([one[name] for one in everywhere])) for name in everywhere[0]}
        whole["max_abs"] = max(one["max_abs"] for one in everywhere)
        self.metrics = mismatch_metrics(whole)
        largest, mean = self.metrics["mismatch/max_abs_dlp"], self.metrics["mismatch/mean_abs_dlp"]
        within = largest <= self.gate.largest and mean <= self.gate.mean  # nan is not
        if self.recompute or within:
            return
        self.recompute = True
        self.news.append(
            say(
                "round {round}: log-probabilities of sampling and training differ by up to {largest} ({mean} on "
                "average), more than mismatch_gate ({gate}) allows; from now on the trainer computes its own "
                "(old_logps: recompute) and leaves out tokens that IcePop's bounds exclude",
                "第 {round} 轮：采样与训练的对数概率最多相差 {largest}（平均 {mean}），超过 "
                "mismatch_gate（{gate}）；此后由训练自行计算（old_logps: recompute），并去除 IcePop 界外的 token",
                round=round_number,
                largest=f"{largest:.3g}",
                mean=f"{mean:.3g}",
                gate=f"{self.gate.largest:g}",
            )
        )

    def verdicts(self) -> list[Verdict]:
        """What there is to say, once."""
        news, self.news = self.news, []
        return [Verdict(text) for text in news]

    def state_dict(self) -> dict[str, Any]:
        return {"recompute": self.recompute}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recompute = bool(state["recompute"])

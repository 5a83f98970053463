"""Watchers of preference learning: answers that become improbable, margins past the sigmoid's
slope, length mistaken for quality.

They read the logged means under TRL's names (`objectives.preference.preference_metrics`) and answer
with verdicts; each speaks once in a run.
Refuses to know: models, data, losses, files. State is JSON, so a resumed run judges as an
uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.train.guards import Verdict

# A batch's mean says little: both ends of a comparison are means over this many records (fewer
# while the run is young).
SMOOTH = 10


class DisplacementGuard:
    """Likelihood displacement: `logps/chosen` fell by more than `drop` of its size within `steps`
    steps, although chosen answers should gain.

    Present and past are means over SMOOTH records that do not overlap. `anchored`: the loss already
    holds an NLL term, so the advice is another.
    """

    def __init__(self, drop: float = 0.2, steps: int = 200, *, anchored: bool = False) -> None:
        self.drop, self.steps, self.anchored = drop, steps, anchored
        self.seen: list[tuple[int, float]] = []
        self.told = False

    def look(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        if self.told or "logps/chosen" not in values:
            return None
        self.seen = [(s, v) for s, v in self.seen if s > step - self.steps] + [(step, float(values["logps/chosen"]))]
        n = min(SMOOTH, len(self.seen) // 4)
        if n == 0 or (n < SMOOTH and step - self.seen[0][0] < self.steps // 2):
            return None
        before, now = (float(np.mean([v for _, v in part])) for part in (self.seen[:n], self.seen[-n:]))
        if before - now <= self.drop * abs(before):
            return None
        self.told = True
        anchored = say(
            "raise the weight of its NLL term, lower learning_rate or raise beta",
            "请调大其 NLL 项的权重，调小 learning_rate，或调大 beta",
        )
        free = say(
            "anchor them: loss_type [sigmoid, sft] or rpo (adds their NLL), or dpop",
            "请加以约束：loss_type 设为 [sigmoid, sft] 或 rpo（加入其 NLL），或 dpop",
        )
        return Verdict(
            say(
                "step {step}: chosen answers became less probable: logps/chosen {before} to {now} within {n} steps; {how}",
                "第 {step} 步：更优回答的概率在下降：logps/chosen 在 {n} 步内由 {before} 变为 {now}；{how}",
                step=step,
                before=f"{before:.4g}",
                now=f"{now:.4g}",
                n=step - self.seen[0][0],
                how=anchored if self.anchored else free,
            )
        )

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [list(pair) for pair in self.seen], "told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.told = [(int(s), float(v)) for s, v in state["seen"]], bool(state["told"])


class _MeanGuard:
    """Speaks when the mean of a number over the last `records` records passes a bound."""

    def __init__(self, bound: float, records: int) -> None:
        self.bound, self.records = bound, records
        self.recent: list[float] = []
        self.told = False

    def _passed(self, value: float) -> float | None:
        """The mean, where it is above the bound for the first time."""
        if self.told:
            return None
        self.recent = [*self.recent, value][-self.records :]
        mean = float(np.mean(self.recent))
        if len(self.recent) < self.records or mean <= self.bound:
            return None
        self.told = True
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent, "told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recent, self.told = list(state["recent"]), bool(state["told"])


class SaturationGuard(_MeanGuard):
    """More than `bound` of the pairs have a reward margin beyond 10 either way, over `records`
    records.
    """

    def __init__(self, bound: float = 0.25, records: int = 20) -> None:
        super().__init__(bound, records)

    def look(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        if "rewards/saturated" not in values:
            return None
        share = self._passed(float(values["rewards/saturated"]))
        if share is None:
            return None
        return Verdict(
            say(
                f"step {step}: {share:.0%} of the pairs have a reward margin beyond 10, where the loss "
                "has no slope left: the policy is far from the reference; end sooner, lower "
                "learning_rate or beta, or take ipo, whose target is finite",
                f"第 {step} 步：{share:.0%} 的样本对奖励差超过 "
                "10，损失已无梯度：策略远离参考模型；请提早结束、调小 learning_rate 或 "
                "beta，或改用目标有限的 ipo",
            )
        )


class LengthGuard(_MeanGuard):
    """The rewards prefer the longer answer more often than the labels do, by more than `bound`,
    over `records` records.
    """

    def __init__(self, bound: float = 0.15, records: int = 50) -> None:
        super().__init__(bound, records)

    def look(self, step: int, values: Mapping[str, float]) -> Verdict | None:
        if "rewards/longer_preferred" not in values or "length/longer_chosen" not in values:
            return None
        excess = self._passed(float(values["rewards/longer_preferred"]) - float(values["length/longer_chosen"]))
        if excess is None:
            return None
        return Verdict(
            say(
                f"step {step}: the rewards prefer the longer answer in {excess:.0%} more of the pairs "
                "than the labels do: length is learned in place of quality; take sigmoid_norm, simpo or "
                "ld_alpha, or balance the lengths of chosen and rejected",
                f"第 {step} 步：奖励偏好更长回答的比例比标注高出 {excess:.0%}：学到的是长度而非质量；请用 "
                "sigmoid_norm、simpo 或 ld_alpha，或平衡 chosen 与 rejected 的长度",
            )
        )


class PreferenceWatch:
    """All of them on one record."""

    def __init__(self, *, anchored: bool = False) -> None:
        self.guards: dict[str, DisplacementGuard | SaturationGuard | LengthGuard] = {
            "displacement": DisplacementGuard(anchored=anchored),
            "saturation": SaturationGuard(),
            "length": LengthGuard(),
        }

    def look(self, step: int, values: Mapping[str, float]) -> list[Verdict]:
        """The warnings that this record completes."""
        return [v for v in (guard.look(step, values) for guard in self.guards.values()) if v is not None]

    def state_dict(self) -> dict[str, Any]:
        return {name: guard.state_dict() for name, guard in self.guards.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, guard in self.guards.items():
            guard.load_state_dict(state[name])

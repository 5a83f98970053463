"""Which prompts are answered next: shuffled passes, or prompts drawn by how hard they are for the
policy as it is now.

Every process draws the same numbers; which of them are its own is the caller's business. What was
seen of a prompt comes back through `saw`.
Refuses to know: what a prompt is, models, rewards beyond "how often was the answer right".
Source of the difficulty rules: Reinforce-Rej and curricula as in arXiv 2504.03380; weights p (1 -
p) are the variance of a coin.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ernie_tune.config.language import say

_FLOOR = 0.02  # weight of a prompt that is always or never solved
# by the share of right answers
BUCKETS = {"easy": (0.75, 1.01), "medium": (0.25, 0.75), "hard": (-0.01, 0.25)}


@dataclass(frozen=True)
class Difficulty:
    """`decay`: of the running share of right answers. `quotas`: which part of a round each bucket
    gives, while it has prompts. `retire_after`: visits in a row at which every answer was right,
    after which a prompt rests.
    """

    decay: float = 0.5
    quotas: Mapping[str, float] = field(default_factory=lambda: {"easy": 0.2, "medium": 0.6, "hard": 0.2})
    retire_after: int = 3

    def __post_init__(self) -> None:
        if set(self.quotas) - set(BUCKETS) or abs(sum(self.quotas.values()) - 1) > 1e-6:
            raise ValueError(
                say(
                    f"quotas ({dict(self.quotas)}) must name {', '.join(BUCKETS)} and sum to 1; correct them",
                    f"quotas（{dict(self.quotas)}）的名称须为 {', '.join(BUCKETS)}，总和为 1；请改正",
                )
            )
        if not 0 <= self.decay < 1 or self.retire_after < 1:
            raise ValueError(
                say(
                    f"decay ({self.decay:g}) must lie in [0, 1) and retire_after ({self.retire_after}) be at "
                    "least 1; 0.5 and 3 are usual",
                    f"decay（{self.decay:g}）须在 [0, 1) 内，retire_after（{self.retire_after}）至少为 1；通常为 0.5 与 3",
                )
            )


class PromptStream:
    """Numbers below `size`, drawn without end. With `difficulty` by weight p (1 - p) + 0.02 inside
    buckets, p the running share of right answers (one half until a prompt was seen); else each once
    a pass, shuffled by (seed, pass).
    """

    def __init__(self, size: int, seed: int, difficulty: Difficulty | None = None) -> None:
        if size < 1:
            raise ValueError(
                say(f"size ({size}) must be at least 1; give prompts", f"size（{size}）至少为 1；请给出提示")
            )
        self.size, self.seed, self.difficulty = size, seed, difficulty
        self.drawn = 0  # how many numbers were given so far
        self.draws = 0  # how many calls
        self.right = np.full(size, 0.5)
        self.visits = np.zeros(size, np.int64)
        self.streak = np.zeros(size, np.int64)  # visits in a row with nothing but right answers

    @property
    def passes(self) -> float:
        """How often every prompt was drawn, on average."""
        return self.drawn / self.size

    def draw(self, count: int) -> list[int]:
        """The next `count` numbers; in one call none twice while there are others."""
        found = self._by_difficulty(count) if self.difficulty else self._in_passes(count)
        self.drawn += count
        self.draws += 1
        return found

    def saw(self, right: Mapping[int, float]) -> None:
        """Take in the share of right answers of prompts: number -> share."""
        decay = self.difficulty.decay if self.difficulty else 0.5
        for number, share in right.items():
            first = self.visits[number] == 0
            self.right[number] = share if first else decay * self.right[number] + (1 - decay) * share
            self.visits[number] += 1
            self.streak[number] = self.streak[number] + 1 if share >= 1 else 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "seed": self.seed,
            "drawn": self.drawn,
            "draws": self.draws,
            "right": self.right.tolist(),
            "visits": self.visits.tolist(),
            "streak": self.streak.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream over the same prompts stopped. Raises ValueError for another
        number of prompts or another seed.
        """
        for name in ("size", "seed"):
            if state[name] != getattr(self, name):
                raise ValueError(
                    say(
                        f"{name} of the prompts ({getattr(self, name)}) must be that of the saved run "
                        f"({state[name]}); restore it, or start anew",
                        f"提示的 {name}（{getattr(self, name)}）须与保存的训练（{state[name]}）相同；请恢复它，或重新开始",
                    )
                )
        self.drawn, self.draws = state["drawn"], state["draws"]
        self.right = np.array(state["right"], np.float64)
        self.visits, self.streak = np.array(state["visits"], np.int64), np.array(state["streak"], np.int64)

    def _in_passes(self, count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:
            number, at = divmod(self.drawn + len(found), self.size)
            order = np.random.Generator(np.random.Philox(key=[self.seed, number])).permutation(self.size)
            found += order[at : at + count - len(found)].tolist()
        return found

    def _resting(self) -> np.ndarray:
        assert self.difficulty is not None
        resting = self.streak >= self.difficulty.retire_after
        # all solved: go on with all
        return resting if not resting.all() else np.zeros(self.size, bool)

    def _by_difficulty(self, count: int) -> list[int]:
        assert self.difficulty is not None
        rng = np.random.Generator(np.random.Philox(key=[self.seed, (1 << 40) + self.draws]))
        weight = self.right * (1 - self.right) + _FLOOR
        weight[self._resting()] = 0.0
        found: list[int] = []
        for name, quota in self.difficulty.quotas.items():
            low, high = BUCKETS[name]
            inside = np.where((self.right >= low) & (self.right < high), weight, 0.0)
            found += _drawn(rng, inside, round(quota * count))
        weight[found] = 0.0
        found += _drawn(rng, weight, count - len(found))
        while len(found) < count:  # fewer prompts than asked for: some come twice
            found += rng.permutation(self.size)[: count - len(found)].tolist()
        return found[:count]


def _drawn(rng: np.random.Generator, weight: np.ndarray, count: int) -> list[int]:
    """At most `count` numbers with a weight, each once, the likelier the heavier."""
    count = min(count, int((weight > 0).sum()))
    if count <= 0:
        return []
    return [int(i) for i in rng.choice(len(weight), count, replace=False, p=weight / weight.sum())]

"""How busy a scheduler was: what its turns computed, and what they left idle.

Refuses to know: models, prompts, who asks. Times are those of this process.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

_TURNS = 1 << 14  # whose times are kept: a server makes turns without end


@dataclass
class TurnLoad:
    """Counts of turns so far. `rows`, `waiting`: summed over turns; `most`: rows of the fullest;
    `room`: rows that there was place for; `computed`, `asked`: tokens of prompts, once and once for
    each answer; `cut`: answers that were ended from outside.
    """

    rows: int = 0
    waiting: int = 0
    most: int = 0
    room: int = 0
    computed: int = 0
    asked: int = 0
    cut: int = 0
    longest: int = 0  # tokens of an answer
    turns: int = 0
    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=_TURNS))  # of the newest turns

    def turn(self, rows: int, waiting: int, room: int, seconds: float) -> None:
        """A turn that gave `rows` answers one token each."""
        self.rows, self.waiting, self.most = self.rows + rows, self.waiting + waiting, max(self.most, rows)
        self.room = max(self.room, room)
        self.turns += 1
        self.seconds.append(seconds)

    def add(self, other: TurnLoad) -> None:
        """The turns of another as well."""
        for name in ("rows", "waiting", "computed", "asked", "cut", "turns"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("most", "room", "longest"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))
        self.seconds.extend(other.seconds)

    def metrics(self) -> dict[str, float]:
        """rollout/turns, turn_ms_p50, turn_ms_p99, slots_busy (share of the room), bubble (share of
        the fullest turn's rows that were idle, the long tail of the longest answers), waiting
        (prompts, mean), prefill_tokens, prefix_hit_rate (share of prompt tokens that an answer took
        from another's), longest, aborted. Empty before the first turn.
        """
        turns = self.turns
        if not turns:
            return {}
        p50, p99 = np.percentile(1e3 * np.array(self.seconds), (50, 99))
        found = {
            "turns": float(turns),
            "turn_ms_p50": float(p50),
            "turn_ms_p99": float(p99),
            "slots_busy": self.rows / (turns * max(self.room, 1)),
            "bubble": 1 - self.rows / (turns * max(self.most, 1)),
            "waiting": self.waiting / turns,
            "prefill_tokens": float(self.computed),
            "prefix_hit_rate": 1 - self.computed / max(self.asked, 1),
            "longest": float(self.longest),
            "aborted": float(self.cut),
        }
        return {f"rollout/{name}": value for name, value in found.items()}

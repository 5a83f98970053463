"""What the log says of the steps since its last line: means over all of them, not the last one.

Refuses to know: what the numbers mean, files, how they are shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_SEEN = ("steps", "num_tokens", "seconds")


class Interval:
    """`add` each step, `take` a line's values; also the mean loss of the whole run. States go into
    a checkpoint, so that a resumed run says the same.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}  # name -> [total, steps that had it]
        self._seen = dict.fromkeys(_SEEN, 0.0)
        self._run = [0.0, 0.0]  # loss, steps

    def add(self, loss: float, metrics: Mapping[str, float], num_tokens: int, seconds: float) -> None:
        """One optimizer step: its means, the tokens it read, and how long it took."""
        for name, value in {"loss": loss, **metrics}.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += 1
        for name, value in zip(_SEEN, (1, num_tokens, seconds), strict=True):
            self._seen[name] += value
        self._run = [self._run[0] + loss, self._run[1] + 1]

    def take(self) -> dict[str, float]:
        """Mean loss and metrics a step, `tokens_per_second` and `interval_runtime` (seconds) since
        the last call.
        """
        means = {name: total / count for name, (total, count) in self._sums.items()}
        seconds = self._seen["seconds"]
        speed = self._seen["num_tokens"] / seconds if seconds else 0.0
        self._sums, self._seen = {}, dict.fromkeys(_SEEN, 0.0)
        return {**means, "tokens_per_second": round(speed, 1), "interval_runtime": round(seconds, 4)}

    @property
    def run_loss(self) -> float:
        """The mean loss of all steps of the run; 0 before the first."""
        return self._run[0] / self._run[1] if self._run[1] else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self._sums, "seen": self._seen, "run": self._run}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._sums = {name: list(values) for name, values in state["sums"].items()}
        self._seen, self._run = dict(state["seen"]), list(state["run"])

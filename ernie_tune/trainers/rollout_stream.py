"""Prompts in the place of a data stream, and what of them and their rounds a checkpoint holds.

Refuses to know: how a round is made (train/rollouts.py), methods, settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.data.batching import Dropped
from ernie_tune.data.prompts import Difficulty, PromptStream
from ernie_tune.data.records import Record
from ernie_tune.machine.place import Place
from ernie_tune.train.rollouts import ROLLOUTS_FILE, Rollouts

STREAM_FOLDER = "rollouts"


class DataRanks:
    """The processes that hold different prompts."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.rank, self.size = place.batch

    def gather(self, value: Any) -> list[Any]:
        return self.place.gather_batch(value)


class RolloutStream:
    """Prompts in the place of a data stream: how far they are. Windows come from rounds of answers
    to them.
    """

    def __init__(
        self,
        records: Sequence[Record],
        seed: int,
        windows_per_round: int,
        prompts_per_round: int,
        by_difficulty: bool,
    ) -> None:
        self.records = records
        self.prompts = PromptStream(len(records), seed, Difficulty() if by_difficulty else None)
        self.windows_per_round, self.prompts_per_round = windows_per_round, prompts_per_round
        self.dropped = Dropped()

    @property
    def epoch(self) -> float:
        """How often every prompt was drawn, on average."""
        return self.prompts.passes

    def state_dict(self) -> dict[str, Any]:
        """How far; what is needed to go on is the rounds' own part."""
        return {"drawn": self.prompts.drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The rounds' part says it all."""


class RolloutsPart:
    """Where the prompts stand and what is left of a round: one folder for each rank that holds
    other prompts.
    """

    def __init__(self, place: Place, rollouts: Rollouts) -> None:
        self.place, self.rollouts = place, rollouts

    def save(self, folder: Path) -> None:
        rank = self.place.batch[0]
        first = min(process for process, part in self.place.gather((self.place.rank, rank)) if part == rank)
        if self.place.rank == first:  # others that hold these prompts hold the same answers
            self.rollouts.save(folder / self._name(rank))

    def load(self, folder: Path) -> None:
        """Those of any number of ranks: each takes the groups that are now its own."""
        count = len(list(folder.glob(f"{STREAM_FOLDER}*/{ROLLOUTS_FILE}"))) or 1
        self.rollouts.load(*(folder / self._name(rank) for rank in range(count)))

    def _name(self, rank: int) -> str:
        return f"{STREAM_FOLDER}_{rank}" if rank else STREAM_FOLDER

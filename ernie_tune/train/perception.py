"""A round's right answers once more, with most of the picture grey, beside them in the pack: what
the perception term compares.

The answers that ride along count for nothing else: their keep_N is 0. Refuses to know: the term
(objectives/perception.py), how rounds are made, layouts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ernie_tune.data.processor import Processor
from ernie_tune.data.units import Unit, UnitBatch, collate_units
from ernie_tune.models.replay import COLUMN as EXPERTS
from ernie_tune.models.replay import UNKNOWN
from ernie_tune.train.evidence import RIGHT, greyed, sees, some_hidden
from ernie_tune.train.policy import BLIND
from ernie_tune.train.rolled import Rolled


@dataclasses.dataclass(frozen=True)
class Beside:
    """Adds grey counterparts to the micro-batches of every `every`-th round. `ratio` of the
    pictures is grey, by chance of (seed, prompt, round); `answers`: at most so many of a
    micro-batch.
    """

    processor: Processor
    ratio: float
    seed: int
    every: int = 1
    answers: int = 64

    def __call__(self, batch: UnitBatch, groups: Sequence[Rolled], round_number: int) -> UnitBatch:
        """`batch` of `groups` with the counterparts behind, and the column blind_N."""
        if round_number % self.every:
            return batch
        units: list[Unit] = []
        blind_N, at = np.full(len(batch.target_N), -1), len(batch.target_N)
        left, first = self.answers, 0
        for group in groups:
            ends = first + np.cumsum(group.length_G)
            shown = np.flatnonzero((group.right_G >= RIGHT) & (group.counts_G > 0) & (group.length_G > 0))
            chosen = shown[:left] if sees(group) else shown[:0]
            if len(chosen):
                hidden_P = some_hidden(group.unit.dialogues[0], self.ratio, self.seed, group.number, round_number)
                units.append(_some(group.unit, chosen, hidden_P))
            for i in chosen:
                count = int(group.length_G[i])
                blind_N[ends[i] - count : ends[i]] = at + np.arange(count)
                at += count
            left -= len(chosen)
            first = int(ends[-1]) if len(ends) else first
        if not units:
            return batch.with_columns(**{BLIND: blind_N})
        more = collate_units([*batch.units, *units], self.processor)
        source = _counterparts(blind_N, at)
        columns = {name: _behind(name, values, source, more) for name, values in batch.columns.items()}
        columns["keep_N"] = np.where(np.arange(at) < len(blind_N), columns["keep_N"], 0.0)
        columns[BLIND] = np.concatenate([blind_N, np.full(at - len(blind_N), -1)])
        return more.with_columns(**columns)


def _some(unit: Unit, chosen: np.ndarray, hidden_P: np.ndarray) -> Unit:
    """The chosen answers of a unit with grey patches."""
    dialogues = tuple(greyed(unit.dialogues[i], hidden_P) for i in chosen)
    nothing = np.full(len(chosen), np.nan)
    return Unit(
        dialogues, unit.shared if len(chosen) > 1 else 0, unit.signal, nothing, nothing, nothing, where=unit.where
    )


def _counterparts(blind_N: np.ndarray, size: int) -> np.ndarray:
    """For each token that rides along, the one whose counterpart it is."""
    out = np.empty(size - len(blind_N), np.int64)
    seen = np.flatnonzero(blind_N >= 0)
    out[blind_N[seen] - len(blind_N)] = seen
    return out


def _behind(name: str, values: np.ndarray, source: np.ndarray, batch: UnitBatch) -> np.ndarray:
    """A column with what stands for those that ride along: of tokens their counterparts' values,
    experts that are not known.
    """
    if name == EXPERTS:
        rest = np.full((len(batch.place_M) - len(values), *values.shape[1:]), UNKNOWN, values.dtype)
        return np.concatenate([values, rest])
    return np.concatenate([values, values[source]])

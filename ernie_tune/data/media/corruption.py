"""Pairs made of a row's own picture: its right answer to the true picture over the same answer to a
spoilt one (mDPO 2406.11839, eq. 4).

What is spoilt are the patches: grey, or under noise. Tokens and answers stay, so only what is seen
can tell the two sides apart.
Refuses to know: files, tokens, losses, paddle. Legend: P patches, C values per patch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.mixing import hash_of
from ernie_tune.data.records import Candidate, Corruption, Record

_DRAWS = 1 << 64


def masked(pixels_PC: np.ndarray) -> np.ndarray:
    """Grey patches: 0 is the mean of what the processor makes."""
    return np.zeros_like(pixels_PC)


def corrupted(pixels_PC: np.ndarray, how: Corruption) -> np.ndarray:
    """The patches spoilt: `masked`, or sqrt(1 - s^2) x + s e with e ~ N(0, 1), which keeps the
    variance of normalised values (the noise of diffusion models, 2006.11239 eq. 4, that VCD
    2311.16922 puts on pictures). The same `how` gives the same noise. Raises ValueError for another
    kind or strength.
    """
    if how.kind == "mask":
        return masked(pixels_PC)
    if how.kind != "noise":
        raise ValueError(
            say(
                f"image_corruption ({how.kind!r}) must be mask or noise; use 'mask'",
                f"image_corruption（{how.kind!r}）须为 mask 或 noise；可用 'mask'",
            )
        )
    if not 0 < how.noise <= 1:
        raise ValueError(
            say(
                f"image_corruption_noise ({how.noise}) must be above 0 and at most 1, where nothing of "
                "the picture is left; use 0.99",
                f"image_corruption_noise（{how.noise}）须大于 0 且不超过 1（此时图片全部丢失）；可用 0.99",
            )
        )
    fresh_PC = np.random.default_rng(how.seed).standard_normal(pixels_PC.shape, np.float32)
    return (np.sqrt(1 - how.noise**2) * pixels_PC + how.noise * fresh_PC).astype(pixels_PC.dtype)


def corrupted_pair(record: Record, how: Corruption) -> Record | None:
    """The pair (right answer, same answer with its pictures spoilt); None for a row without
    pictures, or of which no answer is known to be right.
    """
    if not record.best:
        return None
    right = record.candidates[record.best[0]]
    if not (right.images or record.images):
        return None
    better, worse = (
        dataclasses.replace(right, score=None, label=None, rank=rank, corruption=what)
        for rank, what in ((1.0, None), (2.0, how))
    )
    both: tuple[Candidate, ...] = (better, worse)
    return dataclasses.replace(record, signal="pair", candidates=both, reward=None, margin=None, confidence=1.0)


class CorruptedPairs(Sequence[Record]):
    """The rows of a data set, and after them a pair for each of a share of those that can have one.
    Which rows, and their noise, are decided by `key` and the row's number alone: every process, and
    a run that goes on, sees the same.
    """

    def __init__(self, rows: Sequence[Record], kind: str, noise: float, share: float, *key: int) -> None:
        self.rows, self.kind, self.noise, self.key = rows, kind, noise, key
        drawn = (i for i in range(len(rows)) if hash_of(*key, 0, i) < share * _DRAWS)
        self.chosen = [i for i in drawn if self._pair(i) is not None]

    def _pair(self, i: int) -> Record | None:
        return corrupted_pair(self.rows[i], Corruption(self.kind, self.noise, hash_of(*self.key, 1, i)))

    def __len__(self) -> int:
        return len(self.rows) + len(self.chosen)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        place = range(len(self))[i]
        return self.rows[place] if place < len(self.rows) else self._pair(self.chosen[place - len(self.rows)])

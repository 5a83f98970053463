"""Which rows repeat each other: hashes of every row in temporary files, groups of equal ones, and
MinHash sketches for nearly equal ones.

Refuses to know: formats, what a repetition means (train, eval, answers that differ:
`scan.py` decides), where rows are.
Memory: some 10 MiB however many rows there are; 56 bytes a row in the folder for temporary files,
    and only from 16,000 rows on.
MinHash: Broder 1997; bands: a pair of similarity s shares one with probability 1 - (1 - s^4)^3, 96
    % at 0.9, 8 % at 0.4.
Legend: n rows of a batch, B bytes of its texts, S sampled shingles, H hash functions.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np

from ernie_tune.data.doctor.rows import Columns, Facts

BANDS, BAND_HASHES = 3, 4
SHINGLE_BYTES = 8
NEAR = 0.8  # share of common shingles from which two rows are nearly equal
_SAMPLED = np.uint64(1 << 61)  # an eighth of all shingles, the same ones in every text
_PART_ROWS = 1 << 17  # rows whose hashes are sorted at once, more or less
_IN_MEMORY = 1 << 17  # bytes of a column before it goes to disk
_MIX = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS_H1 = (np.arange(BANDS * BAND_HASHES, dtype=np.uint32) * np.uint32(0x9E3779B1) | np.uint32(1))[:, None]


def hashes(values: Sequence[Any]) -> np.ndarray:
    """Python's own hash of each value, 64 bits; equal within one process only."""
    if values.count(values[0]) == len(values):
        return np.full(len(values), hash(values[0])).view(np.uint64)
    return np.fromiter(map(hash, values), np.int64, len(values)).view(np.uint64)


def join_texts(columns: Columns) -> tuple[bytes, np.ndarray]:
    """The texts of all rows, each of the three closed by a zero byte, and where each row ends:
    (bytes, ends_n).
    """
    texts = list(chain.from_iterable(zip(*columns[:3], strict=True)))
    joined = ("\0".join(texts) + "\0").encode()
    zeros = np.flatnonzero(np.frombuffer(joined, np.uint8) == 0)
    if len(zeros) != len(texts):  # a text has one too
        prompt, answer, rejected = ([text.replace("\0", " ") for text in column] for column in columns[:3])
        return join_texts(columns._replace(prompt=prompt, answer=answer, rejected=rejected))
    return joined, zeros[2::3] + 1


def sketch(joined: bytes, ends_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bands [BANDS, n] uint64, known_n): rows that share a band are probably alike; rows too short
    to tell are not known.
    """
    padded = joined + bytes(SHINGLE_BYTES)
    shingles_B = np.ndarray((len(joined),), "<u8", padded, 0, (1,)) * _MIX
    # A shingle that reaches into the next row would depend on the neighbour.
    shingles_B[(ends_n[:, None] - np.arange(1, SHINGLE_BYTES)).clip(0)] = np.iinfo(np.uint64).max
    at_S = np.flatnonzero(shingles_B < _SAMPLED)
    starts_n = np.concatenate([[0], np.searchsorted(at_S, ends_n)])
    if not len(at_S):
        return np.zeros((BANDS, len(ends_n)), np.uint64), np.zeros(len(ends_n), bool)
    # the best mixed bits of a product are the upper ones; its three highest are zero here
    kept_S = (shingles_B[at_S] >> np.uint64(29)).astype(np.uint32)
    kept_S ^= kept_S >> np.uint32(15)
    first_n = np.minimum(starts_n[:-1], len(at_S) - 1)
    least_Hn = np.minimum.reduceat(_MULTIPLIERS_H1 * kept_S, first_n, axis=1)
    bands = np.zeros((BANDS, len(ends_n)), np.uint64)
    for i in range(BAND_HASHES):
        bands = (bands ^ least_Hn[i::BAND_HASHES]) * _MIX
    return bands, np.diff(starts_n) > 0


def similarity(one: Facts, other: Facts) -> float:
    """Share of common shingles (Jaccard) of two rows; 0 where their media differ."""
    if one[3] != other[3]:
        return 0.0
    a, b = _shingles(one), _shingles(other)
    either = len(_distinct(np.concatenate([a, b])))
    return (len(a) + len(b) - either) / either


def _shingles(facts: Facts) -> np.ndarray:
    """The distinct shingles of a row's texts."""
    text = "\0".join(facts[:3]).encode().ljust(SHINGLE_BYTES, b"\0")
    return _distinct(np.ndarray((len(text) - SHINGLE_BYTES + 1,), "<u8", text, 0, (1,)))


def _distinct(values: np.ndarray) -> np.ndarray:
    """What `np.unique` gives, at a third of its price for some hundred values."""
    ordered = np.sort(values)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])]


def _members(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    """Indices of the values that stand in `ordered`; bits of their own leave few to search for."""
    low, mask = np.uint64(20), np.uint64(0xFFFF)  # the lowest may be those of the part
    marked = np.zeros(1 << 16, bool)
    marked[ordered >> low & mask] = True
    at = np.flatnonzero(marked[values >> low & mask])
    return at[ordered[np.searchsorted(ordered, values[at]).clip(max=len(ordered) - 1)] == values[at]]


class RowLog:
    """Columns of 64-bit numbers on disk, one entry a row, and the search for equal ones."""

    def __init__(self, *names: str) -> None:
        self._files = {name: tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY) for name in names}  # noqa: SIM115 closed when collected
        self.rows = 0

    def add(self, **columns: np.ndarray) -> None:
        """Append a batch: one uint64 array for every column."""
        for name, values in columns.items():
            self._files[name].write(values.tobytes())
        self.rows += len(values)

    def take(self, name: str, rows_k: np.ndarray) -> np.ndarray:
        """Values of a column at these rows, in any order, by one pass over the column."""
        out = np.zeros(len(rows_k), np.uint64)
        for first, values in self._chunks(name):
            here = (rows_k >= first) & (rows_k < first + len(values))
            out[here] = values[rows_k[here] - first]
        return out

    def groups(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, values) of all rows whose value is not alone, a share of the values at a time,
        equal values together in row order.
        """
        parts = 1 << (self.rows // _PART_ROWS).bit_length()
        for part in range(parts):
            picked = []
            for first, chunk in self._chunks(name):
                at = np.flatnonzero(chunk & np.uint64(parts - 1) == part)
                picked.append((at + first, chunk[at]))
            rows, values = (np.concatenate(column) for column in zip(*picked, strict=True))
            ordered = np.sort(values)
            repeated = ordered[1:][ordered[1:] == ordered[:-1]]
            if len(repeated):
                here = _members(values, repeated)
                order = np.argsort(values[here], kind="stable")
                yield rows[here][order], values[here][order]

    def pairs(self, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(first, later) rows of equal values: every later row with the first one."""
        for rows, values in self.groups(name):
            starts = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]]))
            first = np.repeat(rows[starts], np.diff(np.append(starts, len(rows))))
            later = first != rows
            yield first[later], rows[later]

    def _chunks(self, name: str) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, values) over the whole column."""
        file = self._files[name]
        file.seek(0)
        first = 0
        while raw := file.read(_IN_MEMORY):
            values = np.frombuffer(raw, np.uint64)
            yield first, values
            first += len(values)

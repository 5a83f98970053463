"""Several data sets -> one endless, shuffled sequence in given proportions: the same on every
machine, resumable, shardable.

Refuses to know: what the rows are, batches, processes (a rank is two integers). Python integers
only.
Everything is arithmetic on a position: no permutation is stored, so any position costs the same,
and resuming costs nothing.
Strategies: ERNIEKit and LLaMA-Factory's names. Proportions are exact quotas, not
draws.
"""

from __future__ import annotations

import math
import warnings
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any, Generic, TypeVar

from ernie_tune.config.language import say

STRATEGIES = ("concat", "random", "interleave_under", "interleave_over")
_MASK = (1 << 64) - 1
_ROUNDS = 8  # of the Feistel network; 4 suffice in theory, small domains like more
_TOLERANCE = 1e-9  # of quotas: 0.1 * 30 is 3

T = TypeVar("T")


def hash_of(*numbers: int) -> int:
    """64 well-mixed bits of these integers (the finalizer of SplitMix64, chained)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def permute(i: int, n: int, *key: int) -> int:
    """Where a shuffle of range(n) named `key` puts i: a Feistel network on the next power of four,
    walked until it falls below n.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask, seed = (1 << half) - 1, hash_of(*key)
    while True:
        left, right = i >> half, i & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (hash_of(seed, turn, right) & mask)
        i = left << half | right
        if i < n:
            return i


def parse_probs(value: str | Sequence[float] | None, n: int) -> list[float]:
    """ "0.8,0.2" or numbers -> n weights that sum to 1 (None: equal). Raises ValueError."""
    given = [1.0] * n if value is None else [float(p) for p in (value.split(",") if isinstance(value, str) else value)]
    if len(given) != n:
        raise ValueError(
            say(
                f"probs ({value!r}) must have one number for each of the {n} data sets; add or remove numbers",
                f"权重（{value!r}）须与 {n} 个数据集一一对应；请增减",
            )
        )
    if not all(p > 0 and math.isfinite(p) for p in given):
        raise ValueError(
            say(
                f"probs ({value!r}) must be above 0; drop data sets that you do not want",
                f"权重（{value!r}）须大于 0；不需要的数据集请去掉",
            )
        )
    return [p / sum(given) for p in given]


def quotas(strategy: str, lengths: Sequence[int], probs: Sequence[float], samples: int | None = None) -> list[int]:
    """Rows an epoch takes from each data set.

    concat: all. random: `samples` (default: as many as there are) shared by probs.
        interleave_under: the most that repeats no row;
    interleave_over: the fewest that miss no row. Raises ValueError.
    """
    if strategy not in STRATEGIES:
        raise ValueError(
            say(
                f"mix_strategy ({strategy!r}) must be one of {', '.join(STRATEGIES)}; use 'concat'",
                f"mix_strategy（{strategy!r}）须为 {', '.join(STRATEGIES)} 之一；可用 'concat'",
            )
        )
    if not lengths or min(lengths) < 1:
        raise ValueError(
            say(
                f"data sets ({list(lengths)} rows) must have at least one row each; drop the empty ones",
                f"每个数据集（{list(lengths)} 行）至少要有一行；请去掉空的",
            )
        )
    if samples is not None and (strategy != "random" or samples < 1):
        raise ValueError(
            say(
                f"num_samples_each_epoch ({samples}) must be above 0 and go with mix_strategy random, not "
                f"{strategy}; drop it",
                f"num_samples_each_epoch（{samples}）须大于 0 且与 mix_strategy random 同用，而不是 {strategy}；请去掉",
            )
        )
    if strategy == "concat":
        return list(lengths)
    if strategy == "random":
        total = sum(lengths) if samples is None else samples
        ends = [round(total * edge) for edge in accumulate(probs)]
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]
    per_unit = [n / p for n, p in zip(lengths, probs, strict=True)]
    if strategy == "interleave_under":
        return [max(1, math.floor(min(per_unit) * p + _TOLERANCE)) for p in probs]
    return [math.ceil(max(per_unit) * p - _TOLERANCE) for p in probs]


class Mixture(Generic[T]):
    """An endless sequence over `sources`: position p lies in epoch p // len(mixture). Raises
    ValueError for what makes no mixture.

    Each source is a stream of shuffles of its rows; an epoch takes its quota where the last one
    stopped, so rows that one epoch left out come first in the next. Without `shuffle` rows and
    sources keep their order.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[T]],
        probs: str | Sequence[float] | None = None,
        strategy: str = "concat",
        *,
        seed: int = 42,
        shuffle: bool = True,
        samples_each_epoch: int | None = None,
    ) -> None:
        self.sources, self.seed, self.shuffle = list(sources), seed, shuffle
        self._lengths = [len(source) for source in sources]
        weights = parse_probs(probs, len(self.sources))
        self.quotas = quotas(strategy, self._lengths, weights, samples_each_epoch)
        self._ends = list(accumulate(self.quotas))
        if strategy == "concat" and len(set(weights)) > 1:
            warnings.warn(
                f"probs {probs!r} have no effect with mix_strategy concat; use interleave_under or drop them",
                stacklevel=2,
            )

    def __len__(self) -> int:
        return self._ends[-1]

    def locate(self, position: int) -> tuple[int, int]:
        """(source, row) at a position."""
        epoch, slot = divmod(position, len(self))
        if self.shuffle:
            slot = permute(slot, len(self), self.seed, 0, epoch)
        k = bisect_right(self._ends, slot)
        in_stream = epoch * self.quotas[k] + slot - (self._ends[k] - self.quotas[k])
        turn, row = divmod(in_stream, self._lengths[k])
        return k, permute(row, self._lengths[k], self.seed, 1 + k, turn) if self.shuffle else row

    def __getitem__(self, position: int) -> T:
        k, row = self.locate(position)
        return self.sources[k][row]

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a position to mean the same row."""
        return {"seed": self.seed, "shuffle": self.shuffle, "lengths": self._lengths, "quotas": self.quotas}


class Shard(Generic[T]):
    """The endless share of one of `size` data-parallel ranks, which advance in step: rank r takes
    positions r, r + size, ...

    No row is dropped or repeated at the end of an epoch. The state counts rows of all ranks, so a
    run may resume on another `size`.
    """

    def __init__(self, mixture: Mixture[T], rank: int = 0, size: int = 1) -> None:
        if not 0 <= rank < size:
            raise ValueError(
                say(
                    f"rank ({rank}) must be in [0, size) ({size}); pass the data-parallel rank and size",
                    f"rank（{rank}）须在 [0, size)（{size}）内；请传入数据并行的进程号与进程数",
                )
            )
        self.mixture, self.rank, self.size = mixture, rank, size
        self.position = 0  # rows that all ranks together have taken

    @property
    def epoch(self) -> float:
        return self.position / len(self.mixture)

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        row = self.mixture[self.position + self.rank]
        self.position += self.size
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, **self.mixture.fingerprint}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where the state was taken. Raises ValueError when data, proportions or seed
        differ.
        """
        now = self.mixture.fingerprint
        changed = [key for key in now if state.get(key) != now[key]]
        if changed:
            key = changed[0]
            raise ValueError(
                say(
                    f"{key} ({now[key]}) must be that of the saved run ({state.get(key)}); restore it, or "
                    "start without the data state",
                    f"{key}（{now[key]}）须与保存时（{state.get(key)}）一致；请恢复，或不带数据状态重新开始",
                )
            )
        self.position = int(state["position"])

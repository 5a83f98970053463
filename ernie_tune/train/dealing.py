"""Which groups of a round are trained in which window, and on which of the ranks that hold
different prompts.

A round is one ordered list of groups, the same on any number of ranks; only who holds which follows
from how many there are. So every layout trains the windows of one process, and every rank has
equally many micro-batches in each. A group stays on its rank through all passes. Refuses to know:
what a group is, how it was sampled, losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Item = TypeVar("Item")


@dataclass(frozen=True)
class Deal:
    """`windows` of a pass, over `size` ranks. Neighbours in the round, one for each window, are of
    one rank.
    """

    windows: int = 1
    size: int = 1

    def owner(self, position: int) -> int:
        """The rank that holds the group at a place of the round."""
        return position // self.windows % self.size

    def own(self, items: Sequence[Item], rank: int) -> list[Item]:
        """What of a round's list one rank holds, in order."""
        return [item for position, item in enumerate(items) if self.owner(position) == rank]

    def passes(self, count: int, passes: int, seed: int, round_number: int) -> list[list[int]]:
        """The windows of all passes over a round of `count` groups, as places in it. In each pass
        neighbours change their windows by chance; nothing does where there is one window.
        """
        out: list[list[int]] = []
        for number in range(passes):
            rng = np.random.Generator(np.random.Philox(key=[seed, (round_number << 20) + number]))
            found: list[list[int]] = [[] for _ in range(self.windows)]
            for first in range(0, count, self.windows):
                some = range(first, min(first + self.windows, count))
                places = rng.permutation(self.windows)[: len(some)]
                for position, window in zip(some, places, strict=True):
                    found[window].append(position)
            out += found
        return out


@dataclass(frozen=True)
class Seat:
    """A group that some rank has sampled: the rank, the number among its groups, and whether its
    answers' rewards differ.
    """

    rank: int
    number: int
    spread: bool


def seats(owners: Sequence[int], told: Sequence[Sequence[bool]], before: Sequence[int]) -> list[Seat]:
    """The groups of a draw in its order. `owners`: the rank of each; `told`: for each rank, whether
    the rewards of its groups differ; `before`: how many groups each rank had.
    """
    at = [0] * len(told)
    out = []
    for rank in owners:
        out.append(Seat(rank, before[rank] + at[rank], told[rank][at[rank]]))
        at[rank] += 1
    return out


def seated(found: Sequence[Seat], wanted: int) -> list[Seat]:
    """The round: groups that differ, in the order in which they were drawn, and where too few do,
    others behind them.
    """
    live = [seat for seat in found if seat.spread]
    return [*live, *(seat for seat in found if not seat.spread)][:wanted]


def apart(numbers: Sequence[int], size: int) -> list[int]:
    """Another number each time that a prompt of so many is drawn in a round: its answers would be
    the same ones again.
    """
    seen: dict[int, int] = {}
    out = []
    for number in numbers:
        out.append(number + size * seen.get(number, 0))
        seen[number] = seen.get(number, 0) + 1
    return out

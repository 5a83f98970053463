"""Work outside the pipeline, shared by its ranks: pieces dealt out by size, their rows brought to
the first stage, gradients brought back.

Every rank has all inputs, so only result rows [rows, D] travel. Refuses to know: what is computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
import paddle.distributed as dist
from paddle import Tensor

from ernie_tune.parallel.mesh import Group


def deal(sizes: Sequence[int], ranks: int) -> list[list[int]]:
    """The pieces of each rank, largest first to the rank with least so far (ties: lower rank):
    loads differ by at most the largest piece.
    """
    loads = [0] * ranks
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for piece in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        loads[rank] += sizes[piece]
        hands[rank].append(piece)
    return hands


class SharedWork:
    """Pieces of given sizes (rows) on the ranks of one group: what this rank computes, and the two
    exchanges.
    """

    def __init__(self, sizes: Sequence[int], group: Group) -> None:
        self.sizes, self.group = list(sizes), group
        self.hands = deal(sizes, group.size)
        self.mine = self.hands[group.rank]
        self.rows_of_rank = [sum(sizes[i] for i in hand) for hand in self.hands]

    def to_first(self, rows_RD: Tensor) -> Tensor | None:
        """This rank's pieces, in the order of `mine` -> on the group's first rank all pieces in
        their own order; None elsewhere.
        """
        first = self.group.rank == 0
        send = [rows_RD.shape[0], *[0] * (self.group.size - 1)]
        receive = self.rows_of_rank if first else [0] * self.group.size
        out = self._exchange(rows_RD, send, receive)
        return paddle.gather(out, paddle.to_tensor(np.argsort(self._dealt_rows()))) if first else None

    def from_first(self, rows_RD: Tensor | None, like_D: Tensor) -> Tensor:
        """The inverse, for gradients: all pieces on the first rank -> this rank's. `like_D` gives
        width and type where nothing is held.
        """
        if rows_RD is None:
            rows_RD = paddle.zeros([0, like_D.shape[-1]], like_D.dtype)
        else:
            rows_RD = paddle.gather(rows_RD, paddle.to_tensor(self._dealt_rows()))
        send = self.rows_of_rank if self.group.rank == 0 else [0] * self.group.size
        receive = [self.rows_of_rank[self.group.rank], *[0] * (self.group.size - 1)]
        return self._exchange(rows_RD, send, receive)

    def _dealt_rows(self) -> np.ndarray:
        """Row numbers in dealt order: rank by rank, piece by piece."""
        start = np.cumsum([0, *self.sizes])
        return np.concatenate([np.arange(start[i], start[i + 1]) for hand in self.hands for i in hand])

    def _exchange(self, rows_RD: Tensor, send: list[int], receive: list[int]) -> Tensor:
        out = paddle.empty([sum(receive), rows_RD.shape[1]], rows_RD.dtype)
        dist.alltoall_single(
            out, rows_RD.contiguous(), in_split_sizes=send, out_split_sizes=receive, group=self.group.fleet
        )
        return out

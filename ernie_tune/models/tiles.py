"""Attention of segments of one length on the CPU, in tiles of scores that stay in the processor's
cache: what lies between two products is never written to memory.

A picture of 4,096 patches has 16.8 million scores a head; as one product they go through memory
eight times a layer, which takes three times as long as the products. Nothing of them is kept for
the backward but each row's sum (Dao et al., arXiv 2205.14135): making a tile again takes as long as
reading it back would.
Legend: P pairs (segment, key/value head), R query rows of a pair (position by position, the heads
of a group side by side), S keys, H head width. Refuses to know: packs, autograd, other devices
(attention.py has the same formulas in Paddle's operators).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.models import mkl, threads

# Scores of one tile: half of a core's second cache or less. The backward has two tiles at a time.
TILE_SCORES = 2**18
# Query rows of a tile in the backward, and queries of one in a causal segment, where later rows see
# more keys: a tile skips most of the triangle above them.
_BACK_ROWS, _CAUSAL_QUERIES = 256, 128
# Up to so many scores it takes longer to wake another thread than to compute.
_ALONE_SCORES = 2**20
_FAR = 1e30


class Tiles:
    """softmax(q k^T) v of all pairs, forward once and then backward. Tensors are [n, K, R, H] or
    [n, K, S, H]: n segments, K key/value heads. q is scaled already.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, queries: int, causal: bool) -> None:
        self.tensors = (q, k, v)  # own the memory
        self.q, self.k, self.v = (_pairs(x) for x in self.tensors)
        self.queries, self.causal = queries, causal
        self.pairs, self.rows, self.width = self.q.shape
        self.keys, self.group, self.kind = self.k.shape[1], self.rows // queries, self.q.dtype
        self.z_PR1 = np.empty((self.pairs, self.rows, 1), self.kind)
        self.shift_PR1: np.ndarray | None = None  # what was taken off the scores, where they were far
        # no score is larger than the longest query times the longest key
        longest = [float(np.einsum("prh,prh->pr", x, x).max(initial=0.0)) for x in (self.q, self.k)]
        self.near = math.sqrt(longest[0]) * math.sqrt(longest[1]) < mkl.near_limit(self.kind)

    def forward(self) -> Tensor:
        """[n, K, R, H]."""
        out = paddle.empty(self.tensors[0].shape, self.tensors[0].dtype)
        step = self._step(TILE_SCORES // max(1, self.keys * self.group))
        size = max(1, TILE_SCORES // max(1, step * self.group * self.keys))
        out_PRH = _pairs(out)
        self._run(self._forward, size, lambda some: (step, out_PRH[some]))
        return out

    def backward(self, g: Tensor, pull: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v. `pull`: each row of the gradient times that of the output."""
        grads = [paddle.empty(x.shape, x.dtype) for x in self.tensors]
        step = self._step(_BACK_ROWS // self.group)
        size = max(1, TILE_SCORES // max(1, step * self.group * self.keys))
        arrays = [_pairs(x) for x in (g, pull, *grads)]
        self._run(self._backward, size, lambda some: (step, *(x[some] for x in arrays)))
        return grads[0], grads[1], grads[2]

    def _run(self, work: Callable[..., None], size: int, rest: Callable[[slice], tuple[Any, ...]]) -> None:
        """`work(pairs, *rest(pairs))` for so many pairs at a time, on several threads where that is
        worth it. No two touch the same numbers.
        """
        several = self.pairs * self.rows * self.keys > _ALONE_SCORES
        size = min(size, -(-self.pairs // mkl.max_threads())) if several else size
        jobs = [(work, (some, *rest(some))) for a in range(0, self.pairs, size) for some in (slice(a, a + size),)]
        if several:
            threads.run(jobs)
        else:
            for function, arguments in jobs:
                function(*arguments)

    def _step(self, queries: int) -> int:
        most = min(self.queries, _CAUSAL_QUERIES) if self.causal else self.queries
        return max(1, min(most, max(queries, 16)))

    def _blocks(self, step: int) -> list[tuple[slice, int, int]]:
        """(query rows, queries, end key) of each row of tiles."""
        prefix = self.keys - self.queries
        return [
            (slice(a * self.group, b * self.group), b - a, prefix + b if self.causal else self.keys)
            for a in range(0, self.queries, step)
            for b in (min(a + step, self.queries),)
        ]

    def _forward(self, some: slice, step: int, out_PRH: np.ndarray) -> None:
        q, k, v, z = self.q[some], self.k[some], self.v[some], self.z_PR1[some]
        room, ones = np.empty(len(q) * step * self.group * self.keys, self.kind), _ones(self.keys, self.kind)
        ones_PS1 = np.broadcast_to(ones, (len(q), *ones.shape))
        for rows, queries, end in self._blocks(step):
            e = _tile(room, len(q), rows, end)
            mkl.multiply(q[:, rows], k[:, :end], e, (False, True))
            if not self.near and not self._is_near(e):
                self._shift(e, some, rows, queries)
            mkl.exp_array_(e)
            if self.causal:
                e[..., end - queries :] *= _triangle(queries, self.group)
            mkl.multiply(e, ones_PS1[:, :end], z[:, rows])
            mkl.multiply(e, v[:, :end], out_PRH[:, rows])
            out_PRH[:, rows] /= z[:, rows]

    def _is_near(self, e: np.ndarray) -> bool:
        limit = mkl.near_limit(self.kind)
        return bool(-limit < e.min(initial=0.0) and e.max(initial=0.0) < limit)

    def _shift(self, e: np.ndarray, some: slice, rows: slice, queries: int) -> None:
        """Take each row's maximum off it."""
        if self.shift_PR1 is None:
            self.shift_PR1 = np.zeros_like(self.z_PR1)
        if self.causal:
            e[..., e.shape[-1] - queries :] += (_triangle(queries, self.group) - 1.0) * _FAR
        self.shift_PR1[some][:, rows] = e.max(-1, keepdims=True)
        self._below(e, some, rows)

    def _below(self, e: np.ndarray, some: slice, rows: slice) -> None:
        """What is nothing beside the row's largest stays a normal number, which exp is fast on."""
        if self.shift_PR1 is not None:
            limit = mkl.exp_limit(self.kind)
            e -= self.shift_PR1[some][:, rows]
            np.clip(e, -limit, limit, out=e)

    def _backward(
        self,
        some: slice,
        step: int,
        grad_PRH: np.ndarray,
        pull_PR1: np.ndarray,
        dq: np.ndarray,
        dk: np.ndarray,
        dv: np.ndarray,
    ) -> None:
        q, k, z = self.q[some], self.k[some], self.z_PR1[some]
        # The row sum that softmax's backward subtracts rides along as one more column of the
        # product grad @ v^T. softmax is e / z: z is divided out of the narrow side.
        v_more = _beside(self.v[some], -1.0)
        g_more = _beside(grad_PRH, pull_PR1)
        g_more /= z
        wide = max(1, min(self.keys, TILE_SCORES // 2 // (step * self.group)))
        room = np.empty((2, len(q) * step * self.group * wide), self.kind)
        # the last queries come first: they see all keys
        for later, (rows, queries, end) in enumerate(reversed(self._blocks(step))):
            for a in range(0, end, wide):
                keys = slice(a, min(a + wide, end))
                e, ds = (_tile(x, len(q), rows, keys.stop - a) for x in room)
                mkl.multiply(q[:, rows], k[:, keys], e, (False, True))
                self._below(e, some, rows)
                mkl.exp_array_(e)
                if self.causal and keys.stop > end - queries:
                    own = max(0, end - queries - a)  # the first column that some rows do not see
                    e[..., own:] *= _triangle(queries, self.group)[:, a + own - (end - queries) :][
                        :, : e.shape[-1] - own
                    ]
                mkl.multiply(g_more[:, rows], v_more[:, keys], ds, (False, True))
                ds *= e
                mkl.multiply(ds, k[:, keys], dq[:, rows], add=a > 0)
                mkl.multiply(ds, q[:, rows], dk[:, keys], (True, False), add=later > 0)
                mkl.multiply(e, g_more[:, rows, :-1], dv[:, keys], (True, False), add=later > 0)


def _pairs(x: Tensor) -> np.ndarray:
    return mkl.view(x).reshape(-1, *x.shape[2:])


def _beside(x_PSH: np.ndarray, column_PS1: np.ndarray | float) -> np.ndarray:
    """x with one column more."""
    out = np.empty((*x_PSH.shape[:2], x_PSH.shape[2] + 1), x_PSH.dtype)
    out[..., :-1], out[..., -1:] = x_PSH, column_PS1
    return out


def _tile(room: np.ndarray, pairs: int, rows: slice, keys: int) -> np.ndarray:
    shape = pairs, rows.stop - rows.start, keys
    return room[: math.prod(shape)].reshape(shape)


@lru_cache(maxsize=64)
def _ones(keys: int, kind: np.dtype) -> np.ndarray:
    return np.ones((keys, 1), kind)


def seen(queries: int, group: int, keys: int) -> np.ndarray:
    """1 where a query sees a key, 0 where it is one of the last `queries` and comes after it,
    [queries * group, keys].
    """
    return np.repeat(np.tri(queries, keys, keys - queries, dtype=np.float32), group, axis=0)


@lru_cache(maxsize=64)
def _triangle(queries: int, group: int) -> np.ndarray:
    """Of a block's own keys alone: the wide ones would fill memory."""
    return seen(queries, group, queries)

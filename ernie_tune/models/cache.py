"""Keys and values of a batch of rows that grow by one token a step. Rows end at a common column:
shorter ones are padded at the left.

This is the cache of devices on which one product over all rows is best; on the CPU segments are
(`cache_of`). Rows may leave (`select`) and others join (`join`) between two steps; columns that no
row is left to use are given back.

Legend: B rows, K key/value heads, C columns, H head width. Holds keys after rope. Refuses to know:
sampling, positions, tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.models import mkl
from ernie_tune.models.attention import cached_attention
from ernie_tune.models.segments import SegmentCache

# Columns are allocated in steps, so most steps write in place; attention runs over the whole
# allocation with dead columns masked.
GROW_TOKENS = 128
_DEAD = -1e30


class KVCache:
    """One forward with `prefilling` True fills it; each later forward takes one token per row, then
    `advance()`.
    """

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor] = [None] * num_layers
        self.values: list[Tensor] = [None] * num_layers
        self.prefilling = True
        self.used = 0
        self._bias = np.zeros((0, 0), np.float32)
        self._bias_tensor: Tensor | None = None

    @staticmethod
    def tokens(rows: Iterable[tuple[int, int, int]]) -> int:
        """Tokens that prompts may come to hold, each (prompt tokens, samples left, tokens of one
        answer): rows times the longest.
        """
        some = [*rows]
        return sum(samples for _, samples, _ in some) * max((a + b for a, _, b in some), default=0)

    def fill(self, layer: int, k_TKH: Tensor, v_TKH: Tensor, offsets: tuple[int, ...]) -> None:
        """Copy each segment's keys and values to the end of its row."""
        heads = k_TKH.shape[1]
        if layer == 0:
            self.plan(offsets, heads)
        for store, x in ((self.keys, k_TKH), (self.values, v_TKH)):
            table = paddle.concat([x.reshape([-1, x.shape[2]]), paddle.zeros([1, x.shape[2]], x.dtype)])
            store[layer] = paddle.gather(table, self._source).reshape([len(offsets) - 1, heads, -1, x.shape[2]])

    def plan(self, offsets: tuple[int, ...], heads: int) -> None:
        """Where each (row, head, column) comes from among the packed (token, head) rows; the
        padding comes from a row of zeros behind them.
        """
        lengths = np.diff(offsets)
        self.used = int(lengths.max())
        column = np.arange(_allocation(self.used))
        live_BC = (column >= (self.used - lengths)[:, None]) & (column < self.used)
        self._set_bias(np.where(live_BC, 0.0, _DEAD).astype(np.float32))
        token_BC = np.asarray(offsets[1:])[:, None] - self.used + column
        source = token_BC[:, None, :] * heads + np.arange(heads)[:, None]
        self._source = paddle.to_tensor(np.where(live_BC[:, None, :], source, offsets[-1] * heads).reshape(-1))

    def append(self, layer: int, k_BKH: Tensor, v_BKH: Tensor) -> tuple[Tensor, Tensor]:
        """Write one column and return everything, [B, K, C, H] twice."""
        for store, x in ((self.keys, k_BKH), (self.values, v_BKH)):
            if self.used == store[layer].shape[2]:
                blank = paddle.zeros([*store[layer].shape[:2], GROW_TOKENS, x.shape[-1]], x.dtype)
                store[layer] = paddle.concat([store[layer], blank], axis=2)
            store[layer][:, :, self.used] = x
        return self.keys[layer], self.values[layer]

    def attend(self, layer: int, q_BNH: Tensor, k_BKH: Tensor, v_BKH: Tensor) -> Tensor:
        """Write one token of each row and attend from it to its row, [B, N, H]."""
        return cached_attention(q_BNH, *self.append(layer, k_BKH, v_BKH), self.bias())

    def bias(self) -> Tensor:
        """0 on live columns, very negative elsewhere, [B, C] float32; the column being written is
        live.
        """
        if self._bias.shape[1] <= self.used:
            blank = np.full((self._bias.shape[0], GROW_TOKENS), _DEAD, np.float32)
            self._bias, self._bias_tensor = np.concatenate([self._bias, blank], axis=1), None
        if self._bias_tensor is None or self._bias[0, self.used] != 0.0:
            self._bias[:, self.used] = 0.0
            self._bias_tensor = paddle.to_tensor(self._bias)
        return self._bias_tensor

    def advance(self) -> None:
        """The column written by this forward is now part of the past."""
        self.used += 1

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row named twice is copied (n samples of one prompt
        share its prefill).
        """
        index = paddle.to_tensor(list(rows), dtype="int64")
        for store in (self.keys, self.values):
            for layer, x in enumerate(store):
                store[layer] = paddle.gather(x, index)
        self._set_bias(self._bias[list(rows)])
        if self.used - self.longest() >= GROW_TOKENS:
            self._merge((self,))

    def join(self, other: Any) -> None:
        """Put the rows of `other`, which has been filled, behind these; both then end at one
        column. `other` is not to be used afterwards.
        """
        self._merge((self, other))

    def longest(self) -> int:
        """Tokens of the longest row."""
        return int((self._bias[:, : self.used] == 0).sum(1).max(initial=0))

    def _merge(self, parts: tuple[KVCache, ...]) -> None:
        """All rows of `parts`, no wider than the longest of them needs."""
        used = max(part.longest() for part in parts)
        for name in ("keys", "values"):
            stores = [getattr(part, name) for part in parts]
            for layer in range(len(stores[0])):
                # One layer after the other, each given up as it is copied: the peak is both batches
                # and one layer.
                rows = [_moved(store[layer], part.used, used) for store, part in zip(stores, parts, strict=True)]
                for store in stores:
                    store[layer] = None
                stores[0][layer] = rows[0] if len(rows) == 1 else paddle.concat(rows)
        self._set_bias(np.concatenate([_moved_bias(part._bias, part.used, used) for part in parts]))
        self.used = used

    def _set_bias(self, bias: np.ndarray) -> None:
        self._bias, self._bias_tensor = bias, None


def _allocation(used: int) -> int:
    """Columns to hold `used` and at least one more."""
    return -(-(used + 1) // GROW_TOKENS) * GROW_TOKENS


def _moved(x_BKCH: Tensor, used: int, new_used: int) -> Tensor:
    """The last `new_used` of `used` columns, or all of them behind zeros, in a new allocation."""
    rows, heads, _, width = x_BKCH.shape
    kept = min(used, new_used)
    sides = (new_used - kept, _allocation(new_used) - new_used)
    left, right = (paddle.zeros([rows, heads, columns, width], x_BKCH.dtype) for columns in sides)
    return paddle.concat([left, x_BKCH[:, :, used - kept : used], right], axis=2)


def _moved_bias(bias_BC: np.ndarray, used: int, new_used: int) -> np.ndarray:
    out = np.full((len(bias_BC), _allocation(new_used)), _DEAD, np.float32)
    kept = min(used, new_used)
    out[:, new_used - kept : new_used] = bias_BC[:, used - kept : used]
    return out


Cache = KVCache | SegmentCache


def cache_of(dtype: str) -> type[KVCache] | type[SegmentCache]:
    """The cache for a model that computes in `dtype` on the present device."""
    return SegmentCache if mkl.usable(dtype) else KVCache

"""Keys and values of a batch of rows that grow by one token a step. Rows end at a common column: shorter prompts are padded at the left.

Legend: B rows, K key/value heads, C columns, H head width. Holds post-rope keys (architecture.md 10). Refuses to know: sampling, positions, tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle
from paddle import Tensor

# Columns are allocated in steps, so most steps write in place; attention runs over the whole allocation with dead columns masked.
GROW_TOKENS = 128
_DEAD = -1e30


class KVCache:
    """One forward with `prefilling` True fills it; each later forward takes one token per row, then `advance()`."""

    def __init__(self, num_layers: int) -> None:
        self.keys: list[Tensor] = [None] * num_layers
        self.values: list[Tensor] = [None] * num_layers
        self.prefilling = True
        self.used = 0
        self._bias = np.zeros((0, 0), np.float32)
        self._bias_tensor: Tensor | None = None

    def fill(self, layer: int, k_TKH: Tensor, v_TKH: Tensor, offsets: tuple[int, ...]) -> None:
        """Copy each segment's keys and values to the end of its row."""
        heads = k_TKH.shape[1]
        if layer == 0:
            self.plan(offsets, heads)
        for store, x in ((self.keys, k_TKH), (self.values, v_TKH)):
            table = paddle.concat([x.reshape([-1, x.shape[2]]), paddle.zeros([1, x.shape[2]], x.dtype)])
            store[layer] = paddle.gather(table, self._source).reshape([len(offsets) - 1, heads, -1, x.shape[2]])

    def plan(self, offsets: tuple[int, ...], heads: int) -> None:
        """Where each (row, head, column) comes from among the packed (token, head) rows; the padding comes from a row of zeros behind them."""
        lengths = np.diff(offsets)
        self.used = int(lengths.max())
        column = np.arange(-(-(self.used + 1) // GROW_TOKENS) * GROW_TOKENS)
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

    def bias(self) -> Tensor:
        """0 on live columns, very negative elsewhere, [B, C] float32; the column being written is live."""
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
        """Keep these rows, in this order; a row named twice is copied (n samples of one prompt share its prefill)."""
        index = paddle.to_tensor(list(rows), dtype="int64")
        for store in (self.keys, self.values):
            for layer, x in enumerate(store):
                store[layer] = paddle.gather(x, index)
        self._set_bias(self._bias[list(rows)])

    def _set_bias(self, bias: np.ndarray) -> None:
        self._bias, self._bias_tensor = bias, None

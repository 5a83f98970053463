"""Keys and values in segments of their own: a prompt's once, however many samples go on from it,
and each sample's, which grows.

A row is its prompt's segment and its own one. Nothing is padded, and nothing moves when rows join
or leave: a segment goes when the last row that uses it does. Attention reads them where they lie,
by address, so this needs the math library (`mkl.usable`); elsewhere `KVCache` holds padded rows.

Legend: B rows, N query and K key/value heads, G = N/K, H head width, L tokens of a segment, W
tokens of the longest row. Refuses to know: sampling, positions, tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.models import mkl

# A sample's segment begins with room for so many tokens; when it is full it moves to one of twice
# the room, at most so many tokens more.
FIRST_TOKENS, MOST_MORE_TOKENS = 16, 256
_DEAD = -1e30


class Segment:
    """Keys and values of neighbouring tokens in all layers: memory [layers, 2, room, K, H], of
    which `used` tokens are written.
    """

    def __init__(self, layers: int, room: int, heads: int, width: int, kind: np.dtype) -> None:
        self.memory = np.empty((layers, 2, room, heads, width), kind)
        self.used = 0

    @property
    def room(self) -> int:
        return int(self.memory.shape[2])

    @property
    def step(self) -> int:
        """Bytes from a layer's keys to its values."""
        return int(self.memory.strides[1])

    @cached_property
    def address(self) -> int:
        return int(self.memory.ctypes.data)

    def longer(self) -> Segment:
        """The same with more room."""
        layers, _, room, heads, width = self.memory.shape
        out = Segment(layers, room + min(room, MOST_MORE_TOKENS), heads, width, self.memory.dtype)
        out.memory[:, :, : self.used] = self.memory[:, :, : self.used]
        out.used = self.used
        return out


@dataclass(eq=False)
class _Row:
    prompt: Segment
    own: Segment

    @property
    def length(self) -> int:
        """Tokens that the one being written attends to, itself too."""
        return self.prompt.used + self.own.used + 1


class SegmentCache:
    """One forward with `prefilling` True fills it; each later forward takes one token per row, then
    `advance()`. Rows of one prompt stay neighbours.
    """

    def __init__(self, num_layers: int) -> None:
        self.layers, self.prefilling = num_layers, True
        self._rows: list[_Row] = []
        self._step: _Step | None = None  # what the layers of this forward share

    @staticmethod
    def tokens(rows: Iterable[tuple[int, int, int]]) -> int:
        """Tokens that prompts may come to hold, each (prompt tokens, samples left, tokens of one
        answer): each prompt once.
        """
        return sum(length + samples * answer for length, samples, answer in rows)

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        """Memory of all segments."""
        return sum(segment.memory.nbytes for segment in self._segments())

    @property
    def num_tokens(self) -> int:
        """Tokens that are held, those of a shared prompt once."""
        return sum(segment.used for segment in self._segments())

    def _segments(self) -> list[Segment]:
        rows = self._rows
        return [*{id(row.prompt): row.prompt for row in rows}.values(), *(row.own for row in rows)]

    def plan(self, offsets: tuple[int, ...], heads: int = 1, width: int = 1, kind: np.dtype | None = None) -> None:
        """One row for each segment of a pack."""
        for a, b in pairwise(offsets):
            shape = heads, width, kind or np.dtype(np.float32)
            prompt = Segment(self.layers, b - a, *shape)
            prompt.used = b - a
            self._rows.append(_Row(prompt, Segment(self.layers, FIRST_TOKENS, *shape)))

    def fill(self, layer: int, k_TKH: Tensor, v_TKH: Tensor, offsets: tuple[int, ...]) -> None:
        """Copy each segment's keys and values to its row."""
        for which, x_TKH in enumerate((k_TKH, v_TKH)):
            x = mkl.view(x_TKH.contiguous())
            if layer == 0 and which == 0:
                self.plan(offsets, x.shape[1], x.shape[2], x.dtype)
            for row, a, b in zip(self._rows, offsets, offsets[1:], strict=False):
                row.prompt.memory[layer, which] = x[a:b]

    def attend(self, layer: int, q_BNH: Tensor, k_BKH: Tensor, v_BKH: Tensor) -> Tensor:
        """Write one token of each row and attend from it to its row, [B, N, H]."""
        q, k, v = (mkl.view(x.contiguous()) for x in (q_BNH, k_BKH, v_BKH))
        out_BNH = paddle.empty(q_BNH.shape, q_BNH.dtype)
        self.attend_rows(layer, q, k, v, mkl.view(out_BNH))
        return out_BNH

    def attend_rows(
        self, layer: int, q_BNH: np.ndarray, k_BKH: np.ndarray, v_BKH: np.ndarray, out_BNH: np.ndarray
    ) -> None:
        """`attend` of arrays, into `out`."""
        if self._step is None:
            for row in self._rows:
                if row.own.used == row.own.room:
                    row.own = row.own.longer()
            self._step = _Step(self._rows, q_BNH.shape[1])
        for written, k_KH, v_KH in zip(self._step.written, k_BKH, v_BKH, strict=True):
            written[layer, 0], written[layer, 1] = k_KH, v_KH
        self._step.attend(layer, q_BNH, out_BNH)

    def advance(self) -> None:
        """The token written by this forward is now part of the past."""
        for row in self._rows:
            row.own.used += 1
        if self._step is not None and not self._step.next():
            self._step = None

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row named twice has its prompt in common with itself (n
        samples of one prompt).
        """
        old, taken = self._rows, set()
        self._rows, self._step = [], None
        for i in rows:
            own = old[i].own
            if i in taken:
                layers, _, room, heads, width = own.memory.shape
                again = Segment(layers, room, heads, width, own.memory.dtype)
                again.memory[:, :, : own.used], again.used = own.memory[:, :, : own.used], own.used
                own = again
            taken.add(i)
            self._rows.append(_Row(old[i].prompt, own))

    def join(self, other: Any) -> None:
        """Put the rows of `other`, which has been filled, behind these. `other` is not to be used
        afterwards.
        """
        self._rows += other._rows
        self._step = None


class _Step:
    """One decode step's products, the same in every layer but for where the layer's keys and values
    begin; and in the steps after it, as long as no row comes, goes or moves, but for one token.
    """

    def __init__(self, rows: Sequence[_Row], heads: int) -> None:
        layers, _, _, kv_heads, width = rows[0].own.memory.shape
        kind = rows[0].own.memory.dtype
        group, size = heads // kv_heads, kind.itemsize
        self.rows = list(rows)
        self.count, self.kv_heads, self.group, self.width = len(rows), kv_heads, group, width
        self.longest = max(row.length for row in rows)
        self.ragged = any(row.length < self.longest for row in rows)
        # until a segment is full, then this is made again
        room = self.longest + min(row.own.room - row.own.used for row in rows) - 1
        shape = kv_heads, len(rows) * group
        self.q, self.out = np.empty((*shape, width), kind), np.empty((*shape, width), kind)
        self.scores = np.empty((*shape, room), kind)
        # (segment, tokens, first row, rows, first column): each prompt with all of its rows, then
        # each row's own
        pieces, at = [], 0
        for _, same in groupby(rows, key=lambda row: id(row.prompt)):
            some = list(same)
            pieces.append((some[0].prompt, some[0].prompt.used, at, len(some), 0))
            at += len(some)
        shared = len(pieces)
        pieces += [(row.own, row.own.used + 1, i, 1, row.prompt.used) for i, row in enumerate(rows)]
        head = np.arange(kv_heads)
        segments = [piece[0] for piece in pieces]
        tokens, first, many, column = (np.array(x)[:, None] for x in list(zip(*pieces, strict=True))[1:])
        row = head * shape[1] + first * group  # [pieces, K]
        q, scores, out = (x.ctypes.data for x in (self.q, self.scores, self.out))
        self.q_at, out_at = (row * width * size + begin for begin in (q, out))
        scores_at = (row * room + column) * size + scores
        step = np.array([s.step for s in segments])[:, None]
        begin = np.array([s.address for s in segments])[:, None] + head * width * size
        each = 2 * np.arange(layers)[:, None, None]
        self.keys_at, values_at = begin + each * step, begin + (each + 1) * step  # [layers, pieces, K]
        lengths = np.repeat(tokens, kv_heads, 1)
        counts = np.repeat(many * group, kv_heads, 1)
        token = kv_heads * width  # elements from token to token
        self.read = mkl.Products(
            kind,
            lengths.size,
            (counts.ravel(), lengths.ravel(), width),
            (width, token, room),
            (False, True),
            width**-0.5,
        )
        # (products, where the scores are, the values in each layer, the sums)
        self.write = [
            (
                mkl.Products(
                    kind,
                    lengths[part].size,
                    (counts[part].ravel(), width, lengths[part].ravel()),
                    (room, token, width),
                    add=add,
                ),
                scores_at[part].ravel(),
                values_at[:, part].reshape(layers, -1),
                out_at[part].ravel(),
            )
            for part, add in ((slice(0, shared), False), (slice(shared, None), True))
        ]
        self.q_at, self.scores_at = self.q_at.ravel(), scores_at.ravel()
        self.keys_at = self.keys_at.reshape(layers, -1)
        self.own, self.lengths = shared * kv_heads, lengths[shared:].ravel()
        self._write_here()

    def _write_here(self) -> None:
        self.written = [row.own.memory[:, :, row.own.used] for row in self.rows]  # this step's token
        self.live = self.scores[..., : self.longest]

    def next(self) -> bool:
        """Go on to the next token of every row; False where one of them has no room for it."""
        if self.longest == self.scores.shape[-1]:
            return False
        self.longest += 1
        self.lengths += 1
        self.read.columns(self.own, self.lengths)
        self.write[1][0].depth(self.lengths)
        self._write_here()
        return True

    def attend(self, layer: int, q_BNH: np.ndarray, out_BNH: np.ndarray) -> None:
        """softmax(q k^T / sqrt(H)) v of each row over its prompt and its own tokens."""
        split = self.count, self.kv_heads, self.group, self.width
        heads_first = self.kv_heads, self.count, self.group, self.width
        self.q.reshape(heads_first)[...] = q_BNH.reshape(split).transpose(1, 0, 2, 3)
        scores = self.live
        if self.ragged:
            scores.fill(_DEAD)
        self.read.run(self.q_at, self.keys_at[layer], self.scores_at)
        scores -= scores.max(-1, keepdims=True)
        np.exp(scores, out=scores)
        for products, scores_at, values_at, out_at in self.write:
            products.run(scores_at, values_at[layer], out_at)
        self.out /= scores.sum(-1, keepdims=True)
        out_BNH.reshape(split)[...] = self.out.reshape(heads_first).transpose(1, 0, 2, 3)

"""FastDeploy's weight-only grid in numpy: one bfloat16 scale for each output column (and each
rank's share of rows), codes symmetric around zero.

`quantize` makes the codes that `paddle.nn.quant.weight_quantize` makes, on the CPU bit for bit;
`snap` writes weights on which that operator finds given int4 codes again. bfloat16 arrays are their
raw bits in uint16.
Legend: K input rows, N output columns, S shards of rows, each with its own scales. Refuses to know:
byte layouts, how good scales are found, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_tune.checkpoint.tensors import narrow_bfloat16, widen_bfloat16
from ernie_tune.config.language import say

Array = np.ndarray[Any, Any]
LARGEST = {8: 127, 4: 7}  # -128 and -8 are never produced
_BELOW_HALF = np.float32(np.nextafter(np.float32(0.5), np.float32(0)))
_SIGN = np.uint32(1 << 31)
_BLOCK_BYTES = 1 << 18  # of float32: what is worked on at once stays in the processor's cache
ROUNDINGS = ("cpu", "gpu")


@dataclass(frozen=True)
class Grid:
    """One quantised matrix: codes int8 [K, N], scales [S, N] in float32 whose values are
    bfloat16's; row k belongs to shard k * S // K.
    """

    codes_KN: Array
    scale_SN: Array
    bits: int

    def dense(self) -> Array:
        """The matrix that is multiplied with, float32 [K, N]."""
        shards, (rows, columns) = len(self.scale_SN), self.codes_KN.shape
        wide = self.codes_KN.astype(np.float32).reshape(shards, rows // shards, columns)
        wide *= self.scale_SN[:, None]
        return wide.reshape(rows, columns)


def round_half_away(x: Array) -> Array:
    """Nearest integers of float32 as int8, halves away from zero, exactly: 0.49999997 stays below a
    half, and 0.5 plus the number below it is 1.
    """
    pushed = np.array(x, np.float32, order="C")
    _push(pushed, np.empty_like(pushed))
    return pushed.astype(np.int8)


def round_in_place(x: Array) -> None:
    """The same, kept as floats."""
    _push(x, np.empty_like(x))
    np.trunc(x, out=x)


def _push(x: Array, buffer: Array) -> None:
    """x += copysign(_BELOW_HALF, x) by its bits: that function's loop takes twice as long."""
    signed = np.bitwise_and(x.view(np.uint32), _SIGN, out=buffer.view(np.uint32))
    np.bitwise_or(signed, _BELOW_HALF.view(np.uint32), out=signed)
    x += buffer


def check_shards(rows: int, shards: int) -> None:
    """ValueError where the rows of a matrix cannot be shared out equally."""
    if shards < 1 or rows % shards:
        raise ValueError(
            say(
                f"target_tp ({shards}) must divide the input width ({rows}) of every row-parallel layer; "
                "lower target_tp",
                f"target_tp（{shards}）须整除每个行并行层的输入宽度（{rows}）；请调小 target_tp",
            )
        )


def absmax(bits_KN: Array, shards: int = 1) -> Array:
    """Largest magnitude of each column and shard, float32 [S, N]. Bits of magnitudes are ordered as
    magnitudes are.
    """
    check_shards(len(bits_KN), shards)
    parts = bits_KN.reshape(shards, len(bits_KN) // shards, bits_KN.shape[1])
    return widen_bfloat16(_largest(parts))


def _largest(parts_SKN: Array) -> Array:
    """max(bits & 0x7FFF) over rows, block by block."""
    shards, rows, columns = parts_SKN.shape
    out = np.zeros((shards, columns), np.uint16)
    step = max(1, _BLOCK_BYTES // (2 * columns))
    for s in range(shards):
        for a in range(0, rows, step):
            np.maximum(out[s], (parts_SKN[s, a : a + step] & 0x7FFF).max(0), out=out[s])
    return out


def column_scales(bits_KN: Array, bits: int, shards: int = 1) -> Array:
    """The operator's scales [S, N]: max |w| / 127 (or / 7) in float32, rounded to bfloat16."""
    return round_bfloat16(absmax(bits_KN, shards) / np.float32(LARGEST[bits]))


def round_bfloat16(values: Array) -> Array:
    """float32 -> float32 with bfloat16's values."""
    return widen_bfloat16(narrow_bfloat16(np.ascontiguousarray(values, np.float32)))


def quantize(bits_KN: Array, bits: int, shards: int = 1, rounding: str = "cpu") -> Grid:
    """Round a bfloat16 matrix (raw bits) to the operator's grid; each shard of rows is quantised
    for itself, as each rank does.

    `rounding`: "cpu" divides by the rounded scale, "gpu" (compute capability 7.5 to 9.0) by the
    unrounded maximum; they differ by at most one code, seldom. A column of zeros has scale 0 and
    codes 0; its codes mean nothing, and the operator leaves others there.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(
            say(
                f"rounding ({rounding!r}) must be one of {ROUNDINGS}; choose one of them",
                f"rounding（{rounding!r}）须为 {ROUNDINGS} 之一；请选择其一",
            )
        )
    top = absmax(bits_KN, shards)
    scale = round_bfloat16(top / np.float32(LARGEST[bits]))
    if rounding == "cpu":
        return Grid(nearest_codes(bits_KN, scale, bits), scale, bits)
    return Grid(_codes_by_maximum(bits_KN, top, bits), scale, bits)


def nearest_codes(bits_KN: Array, scale_SN: Array, bits: int) -> Array:
    """clip(round(w / scale)), int8 [K, N], for given scales; 0 where the scale is 0."""
    largest = np.float32(LARGEST[bits])
    divisor = np.where(scale_SN == 0, np.float32(1), scale_SN)
    codes = np.empty(bits_KN.shape, np.int8)
    blocks = list(_blocks(bits_KN.shape, len(scale_SN)))
    # used again by every block: pages that are asked for anew cost as much as the arithmetic
    buffers = np.empty((2, max(rows.stop - rows.start for _, rows in blocks), bits_KN.shape[1]), np.float32)
    for shard, rows in blocks:
        x, halves = buffers[:, : rows.stop - rows.start]
        np.left_shift(bits_KN[rows], 16, out=x.view(np.uint32), dtype=np.uint32)
        x /= divisor[shard]
        np.clip(x, -largest, largest, out=x)
        _push(x, halves)
        codes[rows] = x
    return codes


def _codes_by_maximum(bits_KN: Array, top_SN: Array, bits: int) -> Array:
    largest = np.float32(LARGEST[bits])
    divisor = np.where(top_SN == 0, np.float32(1), top_SN)
    codes = np.empty(bits_KN.shape, np.int8)
    for shard, rows in _blocks(bits_KN.shape, len(top_SN)):
        x = widen_bfloat16(bits_KN[rows]) / divisor[shard] * largest
        codes[rows] = round_half_away(np.clip(x, -largest, largest))
    return codes


def _blocks(shape: tuple[int, ...], shards: int) -> Iterator[tuple[int, slice]]:
    """(shard, rows) in pieces of about `_BLOCK_BYTES`, none across two shards."""
    check_shards(shape[0], shards)
    share, step = shape[0] // shards, max(1, _BLOCK_BYTES // (4 * shape[1]))
    for s in range(shards):
        for a in range(s * share, (s + 1) * share, step):
            yield s, slice(a, min(a + step, (s + 1) * share))


# --- weights on which the operator finds given codes again ----------------------------------------


def _found_again(scale: Array) -> Array:
    """The scale that the operator finds on a column snapped with `scale`: its largest weight is
    bf16(7 s).
    """
    return round_bfloat16(round_bfloat16(scale * np.float32(7)) / np.float32(7))


def settle(scale: Array) -> Array:
    """The nearest scales that the operator finds again exactly: fixed points of s -> bf16(bf16(7 s)
    / 7), seldom more than one bit away.
    """
    scale = round_bfloat16(scale)
    bits = narrow_bfloat16(scale)
    best, done = scale.copy(), _found_again(scale) == scale
    for step in (1, -1, 2, -2):
        near = widen_bfloat16((bits.astype(np.int32) + step).clip(0, 0x7F7F).astype(np.uint16))
        use = ~done & (_found_again(near) == near)
        best[use] = near[use]
        done |= use
    return best


def snap(grid: Grid, original_KN: Array | None = None) -> Array:
    """bf16(scale * code) as raw bits [K, N]. For int4 with settled scales and a code of +-7 in each
    column and shard, `quantize` returns this very grid.

    Columns (of a shard) whose grid is what `quantize` makes of `original_KN` (raw bits) anyway are
    left as they are there.
    """
    snapped = np.empty(grid.codes_KN.shape, np.uint16)
    for shard, rows in _blocks(snapped.shape, len(grid.scale_SN)):
        snapped[rows] = narrow_bfloat16(grid.codes_KN[rows] * grid.scale_SN[shard])
    if original_KN is None:
        return snapped
    plain_SN = column_scales(original_KN, grid.bits, len(grid.scale_SN))
    share = len(snapped) // len(plain_SN)
    for s, (plain_N, scale_N) in enumerate(zip(plain_SN, grid.scale_SN, strict=True)):
        rows, same = slice(s * share, (s + 1) * share), np.flatnonzero(plain_N == scale_N)
        if same.size:
            found = nearest_codes(original_KN[rows, same], plain_N[None, same], grid.bits)
            same = same[(found == grid.codes_KN[rows, same]).all(0)]
            snapped[rows, same] = original_KN[rows, same]
    return snapped

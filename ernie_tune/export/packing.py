"""Codes <-> the bytes that `paddle.nn.quant.weight_quantize` returns, for the GPUs that its kernels
are written for.

sm75, 80, 86, 89 and 90 share one layout, sm70 has its own. int8 is [N, K] bytes, int4 [N/2, K]; the
shapes are labels only, the bytes are no plain transpose: rows of the packed array (columns N) may
be sliced in twos (int8) or fours (int4), its last axis must not be.
Legend: K input rows, N output columns. Refuses to know: scales, rounding, files.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ernie_tune.config.language import say

Array = np.ndarray[Any, Any]
ARCHS = (70, 75, 80, 86, 89, 90)
_TILE = 64  # rows that a kernel reads at once
# row within 16 (int8), byte of two rows within 16 (int4) -> its place
_PLACE8 = (0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15)
_PLACE4 = (0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)
# nibble i of a 32-bit word is nibble _NIBBLE[i] of the plain word
_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)


def check_shape(rows: int, columns: int, arch: int = 80) -> None:
    """ValueError for shapes and GPUs that the operator is not made for. With K % 64 != 0 the
    operator itself hangs or corrupts memory.
    """
    if arch not in ARCHS:
        raise ValueError(
            say(
                f"arch ({arch}) must be one of {ARCHS}; choose the compute capability of the GPU that serves",
                f"arch（{arch}）须为 {ARCHS} 之一；请选部署 GPU 的计算能力",
            )
        )
    if rows % _TILE or not rows:
        raise ValueError(
            say(
                f"input width ({rows}) must be a multiple of {_TILE} for FastDeploy's kernels; leave the layer in "
                "bfloat16, or lower target_tp",
                f"FastDeploy 的算子要求输入宽度（{rows}）为 {_TILE} 的整数倍；请让该层保持 bfloat16，或减小 target_tp",
            )
        )
    if columns % 16 or not columns:
        raise ValueError(
            say(
                f"output width ({columns}) must be a multiple of 16 for FastDeploy's kernels; leave the layer in "
                "bfloat16",
                f"FastDeploy 的算子要求输出宽度（{columns}）为 16 的整数倍；请让该层保持 bfloat16",
            )
        )


def pack(codes_KN: Array, bits: int, arch: int = 80) -> Array:
    """int8 codes [K, N] in +-127 (8 bits) or +-7 (4 bits) -> packed int8 [N, K] or [N/2, K]. Raises
    ValueError like `check_shape`.
    """
    rows, columns = codes_KN.shape
    check_shape(rows, columns, arch)
    if arch == 70:
        return _pack_rows(codes_KN, bits)
    if bits == 8:
        biased = (codes_KN.view(np.uint8) + np.uint8(128))[_source(_PLACE8, rows)]
        tiled = biased.reshape(rows // _TILE, _TILE, columns // 2, 2).transpose(2, 0, 3, 1)
        return np.ascontiguousarray(tiled).reshape(columns, rows).view(np.int8)
    pairs = _two_in_a_byte(codes_KN[0::2], codes_KN[1::2])[_source(_PLACE4, rows // 2)]
    tiled = pairs.reshape(rows // _TILE, _TILE // 2, columns // 4, 4).transpose(2, 0, 3, 1)
    words = np.ascontiguousarray(tiled).reshape(-1).view("<u4")
    return _move_nibbles(words, _NIBBLE).view(np.int8).reshape(columns // 2, rows)


def unpack(packed: Array, bits: int, arch: int = 80) -> Array:
    """Inverse of `pack`: int8 codes [K, N]."""
    columns, rows = packed.shape
    columns *= 2 if bits == 4 else 1
    check_shape(rows, columns, arch)
    if arch == 70:
        return _unpack_rows(packed, bits, rows, columns)
    flat = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    if bits == 8:
        tiled = flat.reshape(columns // 2, rows // _TILE, 2, _TILE).transpose(1, 3, 0, 2)
        biased = np.empty((rows, columns), np.uint8)
        biased[_source(_PLACE8, rows)] = tiled.reshape(rows, columns)
        return (biased + np.uint8(128)).view(np.int8)
    words = _move_nibbles(flat.view("<u4"), tuple(int(i) for i in np.argsort(_NIBBLE)))
    tiled = words.view(np.uint8).reshape(columns // 4, rows // _TILE, 4, _TILE // 2).transpose(1, 3, 0, 2)
    pairs = np.empty((rows // 2, columns), np.uint8)
    pairs[_source(_PLACE4, rows // 2)] = tiled.reshape(rows // 2, columns)
    return np.stack(_out_of_bytes(pairs), 1).reshape(rows, columns)


def _source(place: tuple[int, ...], count: int) -> Array:
    """For each place, which row goes there."""
    return (np.arange(0, count, len(place))[:, None] + np.argsort(place)).reshape(-1)


def _two_in_a_byte(low: Array, high: Array) -> Array:
    """Codes in [-8, 7] plus 8, `low` in the low half."""
    return (low.view(np.uint8) + np.uint8(8)) | (high.view(np.uint8) + np.uint8(8)) << np.uint8(4)


def _out_of_bytes(pairs: Array) -> tuple[Array, Array]:
    low, high = (pairs & np.uint8(15)).view(np.int8), (pairs >> np.uint8(4)).view(np.int8)
    return low - np.int8(8), high - np.int8(8)


def _move_nibbles(words: Array, source: tuple[int, ...]) -> Array:
    """Nibble i of each 32-bit word becomes its old nibble `source[i]`."""
    out = np.zeros_like(words)
    for i, j in enumerate(source):
        part = words >> np.uint32(4 * j)
        part &= np.uint32(15)
        part <<= np.uint32(4 * i)
        out |= part
    return out


def _pack_rows(codes_KN: Array, bits: int) -> Array:
    """sm70: row-major; int8 swaps bytes 1 and 2 of every 4, int4 puts two neighbouring columns into
    a byte and moves nibbles.
    """
    rows, columns = codes_KN.shape
    if bits == 8:
        biased = (codes_KN.view(np.uint8) + np.uint8(128)).reshape(-1, 4)[:, [0, 2, 1, 3]]
        return np.ascontiguousarray(biased).reshape(columns, rows).view(np.int8)
    pairs = np.ascontiguousarray(_two_in_a_byte(codes_KN[:, 0::2], codes_KN[:, 1::2]))
    return _move_nibbles(pairs.reshape(-1).view("<u4"), _NIBBLE).view(np.int8).reshape(columns // 2, rows)


def _unpack_rows(packed: Array, bits: int, rows: int, columns: int) -> Array:
    flat = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    if bits == 8:
        biased = np.ascontiguousarray(flat.reshape(-1, 4)[:, [0, 2, 1, 3]])
        return (biased.reshape(rows, columns) + np.uint8(128)).view(np.int8)
    words = _move_nibbles(flat.view("<u4"), tuple(int(i) for i in np.argsort(_NIBBLE)))
    return np.stack(_out_of_bytes(words.view(np.uint8).reshape(rows, columns // 2)), 2).reshape(rows, columns)

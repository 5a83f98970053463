"""Rows times matrices of int8 or int4 codes on a CPU, without the matrix: a few of its rows at a
time are unpacked into memory that the processor keeps near, multiplied, and written over.

Two thirds of a step on a quantised base went into writing whole float32 matrices to main memory and
reading them again. What need not be done to every value is done to the rows instead: one scale a
column multiplies the result. `whole` stays as the oracle: the same numbers, only the
sums run in another order. Several experts, or parts of one matrix, are worked on at once,
by as many threads as the math library would take.
Legend: M rows, I input width, O output width, G groups of input rows that share a scale. int4 codes
lie as `quantize.pack_halves` packs them: byte row b holds the rows b and b + I/2.
Refuses to know: layers, autograd, how codes were chosen, other devices.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.models import mkl, threads

Array = np.ndarray[Any, Any]

# Unpacked at once: within a core's second-level cache, beside the rows that it is multiplied with.
PIECE_BYTES = 2**20
_FLOAT = np.dtype(np.float32)
_OFFSET = 8  # of int4 codes, which lie as 0 to 15


@dataclass(frozen=True)
class Codes:
    """One matrix [I, O]: `codes` int8 [I, O] or uint8 [I/2, O], `scale` float32 [G, O]. Arrays may
    be views of a mapped file.
    """

    codes: Array
    scale: Array
    bits: int

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows * (2 if self.bits == 4 else 1), columns

    def pieces(self) -> list[tuple[int, int]]:
        """Ranges of code rows whose rows each have one scale and which are small enough."""
        return _pieces(*self.shape, self.scale.shape[0], self.bits)

    @property
    def scaled_after(self) -> bool:
        """Whether a product with bare codes needs but one factor a column."""
        return self.scale.shape[0] == 1

    def unpack(self, first: int, end: int, columns: slice, scratch: Scratch) -> Iterator[tuple[int, Array]]:
        """(row of the matrix, rows from there on) of a range of code rows: one part for int8, two
        for int4. Each is in `scratch`, which the next one writes over. Times their scales, unless
        `scaled_after`.
        """
        codes, group_rows = self.codes[first:end, columns], self.shape[0] // self.scale.shape[0]
        made = scratch.floats[: codes.size].reshape(codes.shape)
        if self.bits == 8:
            np.copyto(made, codes)
            if not self.scaled_after:
                made *= self.scale[first // group_rows, columns]
            yield first, made
            return
        halves = scratch.halves[: codes.size].reshape(codes.shape)
        for row, take, by in ((first, np.bitwise_and, 15), (self.codes.shape[0] + first, np.right_shift, 4)):
            take(codes, by, out=halves)
            halves -= _OFFSET  # as bytes, which turn over: int8's values
            np.copyto(made, halves.view(np.int8))
            if not self.scaled_after:
                made *= self.scale[row // group_rows, columns]
            yield row, made


@dataclass(frozen=True)
class Scratch:
    """Where a piece of a matrix is unpacked."""

    floats: Array
    halves: Array  # of int4's bytes


@lru_cache(maxsize=256)
def _pieces(rows: int, columns: int, groups: int, bits: int) -> list[tuple[int, int]]:
    group_rows, code_rows = rows // groups, rows * bits // 8
    largest = max(1, PIECE_BYTES // (_FLOAT.itemsize * columns))
    borders = {0, code_rows}
    for group in range(1, groups):
        # where a scale ends, in either half of the bytes
        borders |= {row for row in (group * group_rows, group * group_rows - code_rows) if 0 < row < code_rows}
    ordered = sorted(borders)
    out = []
    for start, end in itertools.pairwise(ordered):
        out += [(first, min(first + largest, end)) for first in range(start, end, largest)]
    return out


def ready(x: Tensor) -> bool:
    """Whether rows like these are multiplied here: float32 on a CPU that the library knows."""
    return bool(x.dtype == paddle.float32) and mkl.ready(x)


def whole(matrix: Codes) -> Array:
    """The matrix [I, O] in float32."""
    packed = matrix.codes
    plain = packed if matrix.bits == 8 else np.concatenate([packed & 15, packed >> 4]).view(np.int8)
    out = np.empty(matrix.shape, np.float32)
    np.copyto(out, plain)
    if matrix.bits == 4:
        out -= np.float32(_OFFSET)
    groups, columns = matrix.scale.shape
    grouped = out.reshape(groups, -1, columns)
    grouped *= matrix.scale[:, None]
    return out


def rows_by_codes(x_MI: Tensor, matrix: Codes) -> Tensor:
    """[M, I] by [I, O]."""
    return _forward(x_MI, [(matrix, 0, x_MI.shape[0])], matrix.shape)


def rows_by_codes_transposed(grad_MO: Tensor, matrix: Codes) -> Tensor:
    """[M, O] by the transpose of [I, O]: what goes back to the input."""
    return _backward(grad_MO, [(matrix, 0, grad_MO.shape[0])], matrix.shape)


def stack_product(
    x_MI: Tensor, matrix: Callable[[int], Codes], spans: Iterable[tuple[int, int, int]], shape: tuple[int, int]
) -> Tensor:
    """Each expert's rows by its matrix of this [I, O]. `spans`: (expert, first row, end row)."""
    return _forward(x_MI, [(matrix(e), a, b) for e, a, b in spans], shape)


def stack_product_transposed(
    grad_MO: Tensor, matrix: Callable[[int], Codes], spans: Iterable[tuple[int, int, int]], shape: tuple[int, int]
) -> Tensor:
    """Each expert's rows by the transpose of its matrix."""
    return _backward(grad_MO, [(matrix(e), a, b) for e, a, b in spans], shape)


Work = Sequence[tuple[Codes, int, int]]  # matrix, first row, end row


def _forward(x_MI: Tensor, work: Work, shape: tuple[int, int]) -> Tensor:
    x_MI = x_MI.contiguous()
    n_in, n_out = shape
    out = paddle.empty([x_MI.shape[0], n_out], x_MI.dtype)
    x, made, rows = x_MI.data_ptr(), out.data_ptr(), mkl.view(out)

    def job(matrix: Codes, a: int, b: int, columns: slice) -> None:
        width, scratch = columns.stop - columns.start, _scratch(matrix, columns.stop - columns.start)
        target, add = (made + 4 * (a * n_out + columns.start), n_out), False
        for first, end in matrix.pieces():
            for row, unpacked in matrix.unpack(first, end, columns, scratch):
                left = (x + 4 * (a * n_in + row), n_in)
                _multiply((b - a, width, len(unpacked)), left, (unpacked, width), target, add=add)
                add = True
        if matrix.scaled_after:
            rows[a:b, columns] *= matrix.scale[0, columns]

    threads.run([(job, (m, a, b, columns)) for m, a, b in work if b > a for columns in _shares(n_out, len(work))])
    return out


def _backward(grad_MO: Tensor, work: Work, shape: tuple[int, int]) -> Tensor:
    grad_MO = grad_MO.contiguous()
    n_in, n_out = shape
    out = paddle.empty([grad_MO.shape[0], n_in], grad_MO.dtype)
    grad, made, grads = grad_MO.data_ptr(), out.data_ptr(), mkl.view(grad_MO)
    everything = slice(0, n_out)

    def job(matrix: Codes, a: int, b: int, pieces: slice) -> None:
        scratch = _scratch(matrix, n_out)
        scaled = grads[a:b] * matrix.scale[0] if matrix.scaled_after else None
        left = grad + 4 * a * n_out if scaled is None else scaled.ctypes.data
        for first, end in matrix.pieces()[pieces]:
            for row, unpacked in matrix.unpack(first, end, everything, scratch):
                target = (made + 4 * (a * n_in + row), n_in)
                sizes = (b - a, len(unpacked), n_out)
                _multiply(sizes, (left, n_out), (unpacked, n_out), target, transposed=True)

    threads.run([(job, (m, a, b, part)) for m, a, b in work if b > a for part in _shares(len(m.pieces()), len(work))])
    return out


def _shares(size: int, jobs: int) -> Iterator[slice]:
    """`size` as it is where there are jobs for all threads, else in parts, one a thread."""
    most = mkl.max_threads()
    parts = 1 if jobs >= most else min(size, most)
    for i in range(parts):
        yield slice(size * i // parts, size * (i + 1) // parts)


def _scratch(matrix: Codes, width: int) -> Scratch:
    most = max((end - first for first, end in matrix.pieces()), default=0) * width
    return Scratch(np.empty(most, np.float32), np.empty(most if matrix.bits == 4 else 0, np.uint8))


def _multiply(
    sizes: tuple[int, int, int],
    left: tuple[int, int],
    right: tuple[Array, int],
    out: tuple[int, int],
    add: bool = False,
    transposed: bool = False,
    factor: float = 1.0,
) -> None:
    """`sizes` (rows, columns, depth); operands as (address or array, row length)."""
    product = _product(threading.get_ident(), sizes, (left[1], right[1], out[1]), transposed, add, factor)
    product.run(left[0], right[0].ctypes.data, out[0])


@lru_cache(maxsize=1024)
def _product(
    _thread: int, sizes: tuple[int, int, int], steps: tuple[int, int, int], transposed: bool, add: bool, factor: float
) -> mkl.Products:
    """Each thread has its own: a product keeps the addresses of its operands until it has run, and
    another thread would write its own over them.
    """
    return mkl.Products(_FLOAT, 1, sizes, steps, (False, transposed), factor, add)

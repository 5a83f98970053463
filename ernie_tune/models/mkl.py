"""The math library that Paddle ships for x86, called directly for what Paddle's CPU operators do on
one core: exp, tanh, products of many sizes.

Measured on two AVX-512 cores against Paddle's operators: exp 8 times faster, tanh 2.6 times, the
products of a stack of experts 1.3 times.
Plain functions without autograd: for the inside of a PyLayer or under no_grad. Refuses to know:
models. Where `ready` is False (a GPU, another processor, bfloat16) the in-place functions are
Paddle's operators, and the callers multiply expert by expert.
Legend: M rows sorted by expert, E experts, D and I widths.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import say

# The vector functions: high accuracy (below one unit in the last place), denormals are zero, no
# error reports.
_MODE = ctypes.c_longlong(0x2 | 0x280000 | 0x100)
_ROW_MAJOR, _PLAIN, _TRANSPOSED = 101, 111, 112
_LETTER = {paddle.float32: "s", paddle.float64: "d"}
_NUMPY: dict[paddle.dtype, np.dtype[Any]] = {paddle.float32: np.dtype(np.float32), paddle.float64: np.dtype(np.float64)}
_PADDLE = {kind: dtype for dtype, kind in _NUMPY.items()}
_VIEWS = {**_NUMPY, paddle.int8: np.dtype(np.int8), paddle.uint8: np.dtype(np.uint8)}
_CPU = paddle.CPUPlace()
_TABLE_ROWS = 256
# Up to so many products one call each is faster than a call for all of them, whose tables take
# 20 us to make, and whose sums of rows take three times as long.
_FEW_PRODUCTS = 8


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """Paddle has loaded it already: this only asks for a handle."""
    path = Path(paddle.__file__).parent / "libs" / "libmklml_intel.so"
    return ctypes.CDLL(str(path)) if path.is_file() else None


@lru_cache(maxsize=16)
def _function(name: str) -> Callable[..., object]:
    function = _library()[name]  # type: ignore[index]
    if name.endswith("gemm_batch"):
        function.argtypes = (ctypes.c_int, *[ctypes.c_void_p] * 13, ctypes.c_int, ctypes.c_void_p)
    elif name.endswith("gemm"):
        number, at, row = ctypes.c_float if name == "cblas_sgemm" else ctypes.c_double, ctypes.c_void_p, ctypes.c_int
        function.argtypes = (*[ctypes.c_int] * 6, number, at, row, at, row, number, at, row)
    return function


def ready(*tensors: Tensor) -> bool:
    """Whether the library can work on these together: all float32 or all float64, on the CPU, not
    huge, and it is there.
    """
    first = tensors[0].dtype
    return (
        not _ALONE.on
        and first in _LETTER
        and all(x.dtype == first and x.place.is_cpu_place() and numel(x) < 2**31 for x in tensors)
        and _library() is not None
    )


def max_threads() -> int:
    """Threads that the library takes for one large product."""
    return int(_function("MKL_Get_Max_Threads")() or 1)  # type: ignore[call-overload]


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """The library's calls of this thread are computed by this thread alone."""
    before = _function("MKL_Set_Num_Threads_Local")(1)
    try:
        yield
    finally:
        _function("MKL_Set_Num_Threads_Local")(before)


def numel(x: Tensor) -> int:
    """Elements of x. Paddle's own `size` takes 5 us to say it, more than a small operator."""
    return math.prod(x.shape)


def view(x: Tensor) -> np.ndarray:
    """The tensor's own memory as an array that can be written (older NumPy's `from_dlpack` cannot);
    not to be kept.
    """
    kind = _VIEWS[x.dtype]
    memory: Any = (ctypes.c_char * (numel(x) * kind.itemsize)).from_address(_address(x))
    return np.frombuffer(memory, kind).reshape(x.shape)


def _address(x: Tensor) -> int:
    if not x.is_contiguous():
        raise AssertionError("the library reads and writes contiguous tensors only")
    return x.data_ptr()


def _vector(name: str, x: Tensor) -> Tensor:
    at, size = ctypes.c_void_p(_address(x)), ctypes.c_int(numel(x))
    _function(f"VM{_LETTER[x.dtype].upper()}{name}_")(ctypes.byref(size), at, at, ctypes.byref(_MODE))
    return x


def exp_array_(x: np.ndarray) -> None:
    """exp in place, of a contiguous array."""
    _array("EXP", x)


def tanh_array_(x: np.ndarray) -> None:
    """tanh in place, of a contiguous array."""
    _array("TANH", x)


def _array(name: str, x: np.ndarray) -> None:
    at, size = ctypes.c_void_p(x.ctypes.data), ctypes.c_int(x.size)
    _function(f"VM{'S' if x.itemsize == 4 else 'D'}{name}_")(ctypes.byref(size), at, at, ctypes.byref(_MODE))


def near_zero(x: Tensor) -> bool:
    """Whether exp of every element is far from the ends of the numbers, so that a softmax needs no
    shift: nearly always, and quickly seen.
    """
    if not ready(x):
        return False
    limit, values = near_limit(_NUMPY[x.dtype]), view(x)
    return bool(-limit < values.min(initial=0.0) and values.max(initial=0.0) < limit)


def near_limit(kind: np.dtype[Any]) -> float:
    """How far from 0 an element may be that is `near_zero`."""
    return 0.75 * exp_limit(kind)


def exp_limit(kind: np.dtype[Any]) -> float:
    """Beyond it exp leaves the normal numbers, and the vector function takes 50 times as long."""
    return 80.0 if kind.itemsize == 4 else 700.0


def below_zero_(x: Tensor) -> Tensor:
    """Subtract each row's maximum in place."""
    if not ready(x):
        return x.subtract_(x.max(-1, keepdim=True))
    values = view(x)
    values -= values.max(-1, keepdims=True)
    return x


def exp_(x: Tensor, far: bool) -> Tensor:
    """exp in place; `far`, not `near_zero`: below -80 (-700 in float64) it stays at exp(-80), which
    is nothing beside a softmax's largest.
    """
    if not ready(x):
        return x.exp_()
    limit = exp_limit(_NUMPY[x.dtype])
    return _vector("EXP", x.clip_(-limit, limit) if far else x)


def log_(x: Tensor) -> Tensor:
    """log in place, of positive numbers."""
    return _vector("LN", x) if ready(x) else x.log_()


def rows_by_matrices(x_MD: Tensor, weight_EDI: Tensor, counts: Sequence[int], transposed: bool = False) -> Tensor:
    """Each expert's rows times its matrix, [M, I]; `transposed`: x is [M, I], the result [M, D]."""
    x_MD, weight_EDI = x_MD.contiguous(), weight_EDI.contiguous()
    _, depth, inner = weight_EDI.shape
    n_in, n_out = (inner, depth) if transposed else (depth, inner)
    _check(counts, weight_EDI.shape[0], x_MD, n_in)
    out = paddle.empty([x_MD.shape[0], n_out], x_MD.dtype)
    experts, rows, start = _split(counts)
    _products(
        x_MD.dtype,
        (rows, n_out, n_in),
        (x_MD, start * n_in, n_in, False),
        (weight_EDI, experts * depth * inner, inner, transposed),
        (out, start * n_out, n_out),
    )
    return out


def rows_by_rows(x_MD: Tensor, grad_MI: Tensor, counts: Sequence[int]) -> Tensor:
    """x^T grad over each expert's rows, [E, D, I]: the gradient of its matrix, zero where it has no
    rows.
    """
    x_MD, grad_MI = x_MD.contiguous(), grad_MI.contiguous()
    depth, inner = x_MD.shape[1], grad_MI.shape[1]
    _check(counts, len(counts), x_MD, depth)
    _check(counts, len(counts), grad_MI, inner)
    out = paddle.empty([len(counts), depth, inner], x_MD.dtype)
    if 0 in counts:
        view(out)[np.asarray(counts) == 0] = 0
    experts, rows, start = _split(counts)
    _products(
        x_MD.dtype,
        (depth, inner, rows),
        (x_MD, start * depth, depth, True),
        (grad_MI, start * inner, inner, False),
        (out, experts * depth * inner, inner),
    )
    return out


def rows_by_table(x_TD: Tensor, table_VD: Tensor) -> Tensor:
    """x table^T of a few rows, [T, V], in products of a few hundred columns: each piece of the
    table is read once, where one product of all columns copies it before.
    """
    x_TD, table_VD = x_TD.contiguous(), table_VD.contiguous()
    (rows, depth), vocabulary = x_TD.shape, table_VD.shape[0]
    out, kind = paddle.empty([rows, vocabulary], x_TD.dtype), _NUMPY[x_TD.dtype]
    first = np.arange(0, vocabulary, _TABLE_ROWS)
    columns = np.minimum(vocabulary - first, _TABLE_ROWS)
    products = Products(kind, len(first), (rows, columns, depth), (depth, depth, vocabulary), (False, True))
    size = kind.itemsize
    products.run(_address(x_TD), first * (depth * size) + _address(table_VD), first * size + _address(out))
    return out


def _check(counts: Sequence[int], experts: int, x: Tensor, width: int) -> None:
    """The library believes what it is told and would read beyond the end."""
    if len(counts) != experts or x.shape != [sum(counts), width]:
        raise ValueError(
            say(
                f"rows ({x.shape}) must be {sum(counts)} of width {width} for the counts {tuple(counts)} of "
                f"{experts} expert(s); pass the router's counts",
                f"rows（{x.shape}）须为 {sum(counts)} 行、宽 {width}，与 {experts} 个专家的计数 {tuple(counts)} 相符；请传入路由给出的计数",
            )
        )


def _split(counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Experts that have rows, how many, and where they start."""
    rows = np.asarray(counts, np.int64)
    experts = np.flatnonzero(rows)
    return experts, rows[experts], (np.cumsum(rows) - rows)[experts]


def _products(
    dtype: paddle.dtype,
    sizes: tuple[int | np.ndarray, int | np.ndarray, int | np.ndarray],
    left: tuple[Tensor, np.ndarray, int, bool],
    right: tuple[Tensor, np.ndarray, int, bool],
    out: tuple[Tensor, np.ndarray, int],
) -> None:
    """One `cblas_?gemm_batch`: product i has `sizes` (rows, columns, depth) and operands (tensor,
    element where it begins, row length, transposed).
    """
    kind, flags = _NUMPY[dtype], (left[3], right[3])
    products = Products(kind, len(out[1]), sizes, (left[2], right[2], out[2]), flags)
    products.run(*(begin * kind.itemsize + _address(tensor) for tensor, begin, *_ in (left, right, out)))


def multiply(
    left: np.ndarray,
    right: np.ndarray,
    out: np.ndarray,
    transposed: tuple[bool, bool] = (False, False),
    add: bool = False,
) -> None:
    """out[i] = left[i] @ right[i] (+ out[i], with `add`) of arrays [P, rows, columns], whose rows
    may have gaps between them.
    """
    count, rows, columns = out.shape
    if not out.size:
        return
    depth, size, letter = left.shape[1 if transposed[0] else 2], out.itemsize, "s" if out.itemsize == 4 else "d"
    flags = [_TRANSPOSED if flag else _PLAIN for flag in transposed]
    steps = [max(x.strides[1] // size, x.shape[2]) for x in (left, right, out)]  # of a single row NumPy may say 0
    at = [x.__array_interface__["data"][0] for x in (left, right, out)]
    if count <= _FEW_PRODUCTS:
        gemm, next_a, next_b, next_c = (
            _function(f"cblas_{letter}gemm"),
            left.strides[0],
            right.strides[0],
            out.strides[0],
        )
        (a, b, c), (step_a, step_b, step_c), (ta, tb), beta = at, steps, flags, float(add)
        for _ in range(count):
            gemm(_ROW_MAJOR, ta, tb, rows, columns, depth, 1.0, a, step_a, b, step_b, beta, c, step_c)
            a, b, c = a + next_a, b + next_b, c + next_c
        return
    numbers = np.array([*flags, rows, columns, depth, *steps, count], np.int32)
    each = np.multiply.outer([x.strides[0] for x in (left, right, out)], np.arange(count))
    each += np.array(at)[:, None]
    factors = np.array([1.0, float(add)], out.dtype)
    ta, tb, m, n, k, step_a, step_b, step_c, group = _places(numbers)
    (alpha, beta), (a, b, c) = _places(factors), (each.ctypes.data + i * each.strides[0] for i in range(3))
    _function(f"cblas_{letter}gemm_batch")(
        _ROW_MAJOR, ta, tb, m, n, k, alpha, a, step_a, b, step_b, beta, c, step_c, 1, group
    )


def _places(x: np.ndarray) -> range:
    """Where each element of a contiguous vector lies."""
    begin = x.ctypes.data
    return range(begin, begin + x.nbytes, x.itemsize)


class Products:
    """Many products out = factor * left @ right (+ out, with `add`), in one call of
    `cblas_?gemm_batch`: prepared once, run on any memory.

    The library believes what it is told: the caller answers for sizes and addresses. One thread at
    a time.
    """

    def __init__(
        self,
        kind: np.dtype[Any],
        count: int,
        sizes: tuple[int | np.ndarray, int | np.ndarray, int | np.ndarray],
        steps: tuple[int | np.ndarray, int | np.ndarray, int | np.ndarray],
        transposed: tuple[bool, bool] = (False, False),
        factor: float | np.ndarray = 1.0,
        add: bool = False,
    ) -> None:
        """`sizes`: (rows, columns, depth) of each product; `steps`: from row to row, in elements,
        of left, right and out.
        """
        self.count = count
        self._ints, self._factors = np.empty((9, count), np.int32), np.empty((2, count), kind)
        flags = tuple(_TRANSPOSED if flag else _PLAIN for flag in transposed)
        for row, value in zip(self._ints, (*flags, *sizes, *steps, 1), strict=True):
            row[:] = value
        self._factors[0], self._factors[1] = factor, float(add)
        self._at = np.empty((3, count), np.uintp)
        function = _function(f"cblas_{'s' if kind.itemsize == 4 else 'd'}gemm_batch")
        # The tables never move: where their rows begin is said once, a step has hundreds of calls.
        transposed_a, transposed_b, m, n, k, step_a, step_b, step_c, group = _rows(self._ints)
        (a, b, c), (alpha, beta) = _rows(self._at), _rows(self._factors)
        self._batch = partial(
            function, _ROW_MAJOR, transposed_a, transposed_b, m, n, k, alpha, a, step_a, b, step_b, beta, c, step_c, count, group
        )  # fmt: skip

    def rows(self, first: int, count: np.ndarray) -> None:
        """From product `first` on they have so many rows; none is nothing to do."""
        self._ints[2, first:] = count

    def columns(self, first: int, count: np.ndarray) -> None:
        """From product `first` on they have so many columns."""
        self._ints[3, first:] = count

    def depth(self, count: np.ndarray) -> None:
        """They are sums of so many terms."""
        self._ints[4] = count

    def run(self, left: np.ndarray | int, right: np.ndarray | int, out: np.ndarray | int) -> None:
        """The operands of product i begin at these addresses."""
        if not self.count:
            return
        self._at[0], self._at[1], self._at[2] = left, right, out
        self._batch()


class _Flag(threading.local):
    on = False


_STEPPING, _ALONE = _Flag(), _Flag()


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """Paddle's operators do everything: what this file does can be held against them."""
    before, _ALONE.on = _ALONE.on, True
    try:
        yield
    finally:
        _ALONE.on = before


@contextlib.contextmanager
def stepping() -> Iterator[None]:
    """For a forward of a few tokens without a gradient, one of each row, where the library is
    `usable`: Paddle's operators then take longer to get going than to compute, and layers that ask
    `is_stepping` do several at once in NumPy. The same formulas; float32 may differ in the last
    place.
    """
    before, _STEPPING.on = _STEPPING.on, True
    try:
        yield
    finally:
        _STEPPING.on = before


def is_stepping() -> bool:
    return _STEPPING.on


def made(x: np.ndarray) -> Tensor:
    """A tensor with these numbers. (`paddle.to_tensor` takes three times as long.)"""
    out = paddle._C_ops.empty(list(x.shape), _PADDLE[x.dtype], _CPU)
    view(out)[...] = x
    return out


def usable(dtype: str) -> bool:
    """Whether a model of this dtype computes where the library can."""
    known = dtype in ("float32", "float64") and _library() is not None
    return not _ALONE.on and paddle.get_device() == "cpu" and known


def _rows(table: np.ndarray) -> list[ctypes.c_void_p]:
    """Where each row of a C-contiguous table begins."""
    begin, step = table.__array_interface__["data"][0], table.strides[0]
    return [ctypes.c_void_p(begin + i * step) for i in range(len(table))]

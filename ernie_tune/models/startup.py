"""Once per process, on the CPU: keep big buffers between steps, check that the fast matrix product
is also right, and say so in one line.

Refuses to know: models, training. The environment variables themselves are `config/cpu.py`'s, set
when the package is imported.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import time

import numpy as np
import paddle

from ernie_tune import CPU_PLAN
from ernie_tune.config.language import say

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_SIZE = 768
DEBUG_VARIABLE = "ERNIE_TUNE_DEBUG"  # set by --debug: the line is shown though nothing is wrong
_checked: list[str] = []


def keep_freed_memory() -> bool:
    """Ask glibc to hold on to freed blocks up to 1 GiB. Otherwise each buffer above 32 MiB is
    mapped and zeroed anew every step: half the time of an elementwise pass over it. False where the
    C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if ctypes.util.find_library("c") else None
    return bool(mallopt and mallopt(_M_MMAP_THRESHOLD, 2**30) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def prefer_huge_pages(size: int = 2**30 - 2**20) -> bool:
    """Grow the heap by `size` bytes that nobody touches yet, and let Linux back them with 2 MiB
    pages as they are used: a step walks through more memory than the processor keeps small pages'
    addresses for (2-4 %). False where that is not to be had.
    """
    libc = ctypes.CDLL(None)
    if not all(hasattr(libc, name) for name in ("malloc", "madvise", "free")):
        return False
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(size))
    if not block:
        return False
    first = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    failed = libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(block + size - first), mmap.MADV_HUGEPAGE)
    libc.free(ctypes.c_void_p(block))
    return not failed


def check_product(size: int = _SIZE) -> tuple[float, float]:
    """(largest relative error against numpy in float64, GFLOP/s) of one float32 product."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((size, size), np.float32) for _ in range(2))
    x, y = paddle.to_tensor(a), paddle.to_tensor(b)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        product = paddle.matmul(x, y)
        times.append(time.perf_counter() - start)
    want = a.astype(np.float64) @ b.astype(np.float64)
    error = float(np.abs(product.numpy() - want).max() / np.abs(want).max())
    return error, 2 * size**3 / min(times) / 1e9


def prepare_device() -> str:
    """Run the checks once and return the line to print; "" on a GPU and on later calls. Raises
    RuntimeError when the product is wrong.
    """
    if _checked or not paddle.get_device().startswith("cpu"):
        return ""
    if keep_freed_memory():
        prefer_huge_pages()
    error, gflops = check_product()
    if not error < 1e-5:
        raise RuntimeError(
            say(
                f"a {_SIZE}x{_SIZE} float32 product is off by {error:.1e}; unset MKL_DEBUG_CPU_TYPE and start again",
                f"{_SIZE}x{_SIZE} 的 float32 乘积误差为 {error:.1e}；请取消设置 MKL_DEBUG_CPU_TYPE 后重新启动",
            )
        )
    _checked.append(f"{CPU_PLAN.line}; {_SIZE}x{_SIZE} product: {gflops:.0f} GFLOP/s, error {error:.0e}")
    return _checked[0]

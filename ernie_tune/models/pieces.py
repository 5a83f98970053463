"""Chains of element-wise arithmetic on the CPU, a piece after another: what lies between two
operations stays in the processor's cache instead of going through memory.

Refuses to know: formulas, autograd, other devices.
"""

from __future__ import annotations

from collections.abc import Callable

from paddle import Tensor

from ernie_tune.models import mkl, threads

PIECE_ELEMENTS = 2**15  # four such arrays in float32 fill half a mebibyte


def in_pieces(work: Callable[..., None], *tensors: Tensor) -> None:
    """`work(*arrays)` for every piece of tensors of one size, which lie contiguously; it writes
    into some of them. For tensors that are `mkl.ready`.
    """
    flat = [mkl.view(x).reshape(-1) for x in tensors]
    starts = range(0, flat[0].size, PIECE_ELEMENTS)
    threads.run([(work, tuple(x[a : a + PIECE_ELEMENTS] for x in flat)) for a in starts])


def in_rows(work: Callable[..., None], *tensors: Tensor) -> None:
    """The same for tensors of as many rows each, a few rows of all of them at a time."""
    arrays = [mkl.view(x) for x in tensors]
    step = max(1, PIECE_ELEMENTS // max(x.shape[1] for x in arrays))
    starts = range(0, len(arrays[0]), step)
    threads.run([(work, tuple(x[a : a + step] for x in arrays)) for a in starts])

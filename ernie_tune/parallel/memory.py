"""The memory of tensors as bytes, to be sent and received without copies.

Refuses to know: ranks, groups, sockets.
"""

from __future__ import annotations

import ctypes

import numpy as np
from paddle import Tensor

from ernie_tune.config.language import say


def bytes_of(x: Tensor) -> memoryview:
    """The tensor's own memory; valid while the tensor lives. Raises ValueError where it is
    scattered.
    """
    if not x.is_contiguous():
        raise ValueError(
            say(
                f"a tensor of shape {x.shape} must be contiguous to be sent or received; call contiguous()",
                f"形状为 {x.shape} 的张量须连续才能收发；请调用 contiguous()",
            )
        )
    size = x.size * x.element_size()
    return memoryview((ctypes.c_char * size).from_address(x.data_ptr())).cast("B") if size else memoryview(b"")


def bytes_of_array(values: np.ndarray) -> memoryview:
    """The array's own memory."""
    return values.view(np.uint8).data if values.size else memoryview(b"")


def contiguous(x: Tensor) -> Tensor:
    """The tensor without its gradient, copied only where it is not contiguous."""
    x = x.detach()
    return x if x.is_contiguous() else x.contiguous()


def put(x: Tensor, data: memoryview | bytearray) -> None:
    """Write bytes into a tensor. Raises ValueError where it has another size."""
    fill_bytes(bytes_of(x), data)


def fill_bytes(view: memoryview, data: memoryview | bytearray) -> None:
    """Write bytes into the memory of a tensor. Raises ValueError where it has another size."""
    if len(view) != len(data):
        raise ValueError(
            say(
                f"received {len(data)} bytes for a tensor of {len(view)}; the ranks called with other shapes",
                f"收到 {len(data)} 字节，而张量为 {len(view)} 字节；各进程的形状不同",
            )
        )
    if len(data):
        view[:] = data

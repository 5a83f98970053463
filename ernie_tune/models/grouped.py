"""Rows sorted by expert times each expert's matrix, forward and backward, and how many rows each
expert has.

On a CPU the math library takes all experts in one call. On a card Paddle's grouped product does,
where it proves itself (models/proven.py); else the experts follow one another, one product each.
Both want the counts on the host: a slice of rows is cut by numbers that the host knows, and of
Paddle 3.3's operators none multiplies groups whose sizes lie on the device: `batched_gemm` and
`moe_permute` take a list, `moe_gate_dispatch` pads every expert to a capacity. So there is one copy
a layer, of both modalities' counts together, asked for early and waited for late: the card works on
the shared expert meanwhile. One for all layers is not to be had, since a layer's routers read what
the layer before made. Ways without any would change how much is computed, or what: all rows through
all experts take E / k times the products (ten times, of the 28B), room for T rows an expert as much
more memory, and a smaller capacity drops rows.
Legend: M rows sorted by expert, E experts, D and I widths. Refuses to know: routers, layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_tune.models import mkl
from ernie_tune.models.proven import proven

Counts = tuple[int, ...]
# One expert without rows, and counts that no tile of a kernel divides.
_TRIAL_COUNTS = (5, 0, 130, 1)
_FORMATS = (paddle.bfloat16, paddle.float32)  # of Paddle's grouped product


class _GroupedMatmul(PyLayer):
    @staticmethod
    def forward(ctx, x_MD, weight_EDI, counts, by_kernel):  # type: ignore[no-untyped-def]
        ctx.counts, ctx.by_kernel = counts, by_kernel
        ctx.save_for_backward(x_MD, weight_EDI)
        return _grouped(x_MD, weight_EDI, counts, by_kernel)

    @staticmethod
    def backward(ctx, grad_MI):  # type: ignore[no-untyped-def]
        x_MD, weight_EDI = ctx.saved_tensor()
        counts, dx, dw = ctx.counts, None, None
        if not x_MD.stop_gradient:
            dx = _rows_back(grad_MI, weight_EDI, counts, ctx.by_kernel)
        if not weight_EDI.stop_gradient:
            dw = _of_matrices(x_MD, grad_MI, counts, weight_EDI, ctx.by_kernel)
        return dx, dw


def _grouped(x_MD: Tensor, weight_EDI: Tensor, counts: Counts, by_kernel: bool) -> Tensor:
    if mkl.ready(x_MD, weight_EDI):
        return mkl.rows_by_matrices(x_MD, weight_EDI, counts)
    if by_kernel and any(counts):
        return _kernel(x_MD, weight_EDI, list(counts))
    parts = [paddle.matmul(x_MD[a:b], weight_EDI[e]) for e, a, b in _slices(counts)]
    if not parts:
        return paddle.zeros([0, weight_EDI.shape[2]], x_MD.dtype)
    return paddle.concat(parts) if len(parts) > 1 else parts[0]


def _rows_back(grad_MI: Tensor, weight_EDI: Tensor, counts: Counts, by_kernel: bool) -> Tensor:
    """What goes back to the rows, [M, D]."""
    if mkl.ready(grad_MI, weight_EDI):
        return mkl.rows_by_matrices(grad_MI, weight_EDI, counts, transposed=True)
    if by_kernel and any(counts):
        return _kernel(grad_MI, weight_EDI, list(counts), trans_rhs=True)
    parts = [paddle.matmul(grad_MI[a:b], weight_EDI[e], transpose_y=True) for e, a, b in _slices(counts)]
    return paddle.concat(parts) if parts else paddle.zeros([0, weight_EDI.shape[1]], grad_MI.dtype)


def _of_matrices(x_MD: Tensor, grad_MI: Tensor, counts: Counts, weight_EDI: Tensor, by_kernel: bool) -> Tensor:
    """The gradient of each matrix, [E, D, I]; zero where an expert has no rows."""
    if mkl.ready(x_MD, grad_MI):
        return mkl.rows_by_rows(x_MD, grad_MI, counts)
    if by_kernel and any(counts):
        return _kernel(x_MD, grad_MI, list(counts), trans_lhs=True)
    blank = paddle.zeros(weight_EDI.shape[1:], weight_EDI.dtype) if 0 in counts else None
    rows = [blank] * len(counts)
    for e, a, b in _slices(counts):
        rows[e] = paddle.matmul(x_MD[a:b], grad_MI[a:b], transpose_x=True)
    return paddle.stack(rows)


def _slices(counts: Counts) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of every non-empty expert."""
    out, start = [], 0
    for e, n in enumerate(counts):
        if n:
            out.append((e, start, start + n))
        start += n
    return out


def _kernel(
    lhs: Tensor, rhs: Tensor, batch_sizes: list[int], trans_lhs: bool = False, trans_rhs: bool = False
) -> Tensor:
    """Paddle's grouped product: [M, D] by [E, D, I]; `trans_rhs`: [M, I] by their transposes;
    `trans_lhs`: [M, D] and [M, I], to [E, D, I].
    """
    from paddle.incubate.nn.functional import batched_gemm

    return batched_gemm(lhs.contiguous(), rhs.contiguous(), batch_sizes, trans_lhs, trans_rhs)


def kernel_holds(width: int, inner: int, dtype: paddle.dtype) -> bool:
    """Whether Paddle's grouped product gives here what one product an expert gives, for matrices
    [width, inner], forward and backward.
    """
    rng, rows = np.random.default_rng(0), sum(_TRIAL_COUNTS)
    shapes = ((rows, width), (len(_TRIAL_COUNTS), width, inner), (rows, inner))
    values = [rng.standard_normal(shape).astype(np.float32) for shape in shapes]

    def results(by_kernel: bool) -> Sequence[Tensor]:
        x, weight, grad = (paddle.to_tensor(value).astype(dtype) for value in values)
        return [
            _grouped(x, weight, _TRIAL_COUNTS, by_kernel),
            _rows_back(grad, weight, _TRIAL_COUNTS, by_kernel),
            _of_matrices(x, grad, _TRIAL_COUNTS, weight, by_kernel),
        ]

    return proven("grouped product", (width, inner), dtype, lambda: results(True), lambda: results(False))


def on_card(x: Tensor) -> bool:
    """Whether x lies in a card's memory."""
    return bool(x.place.is_gpu_place())


def _by_kernel(x_MD: Tensor, weight_EDI: Tensor) -> bool:
    if not on_card(x_MD) or x_MD.dtype not in _FORMATS or weight_EDI.dtype != x_MD.dtype:
        return False
    return kernel_holds(weight_EDI.shape[1], weight_EDI.shape[2], x_MD.dtype)


def grouped_matmul(x_MD: Tensor, weight_EDI: Tensor, counts: Counts) -> Tensor:
    """Rows sorted by expert times that expert's matrix: [M, D] x [E, D, I] -> [M, I]; `counts[e]`
    rows belong to expert e.
    """
    by_kernel = _by_kernel(x_MD, weight_EDI)
    if paddle.is_grad_enabled():
        return _GroupedMatmul.apply(x_MD, weight_EDI, counts, by_kernel)
    return _grouped(x_MD, weight_EDI, counts, by_kernel)


class GroupedProduct(nn.Layer):
    """`grouped_matmul` as a layer without parameters: a place where an adapter can be attached, or
    a quantised stack can step in.
    """

    def forward(self, x_MD: Tensor, weight_EDI: Tensor, counts: Counts) -> Tensor:
        return grouped_matmul(x_MD, weight_EDI, counts)


def rows_of_experts(expert_M: Tensor, experts: int) -> Tensor:
    """How many pairs chose each expert, [E] int64, on the device."""
    if on_card(expert_M):  # Paddle's bincount reads numbers back to the host twice
        return (expert_M.unsqueeze(1) == paddle.arange(experts, dtype=expert_M.dtype)).astype("int64").sum(0)
    return paddle.bincount(expert_M, minlength=experts)


class Arriving:
    """Whole numbers of a device on their way to the host. Asking does not wait; what the device is
    given after that runs while they travel.
    """

    def __init__(self, *rows: Tensor) -> None:
        self._numbers: Callable[[], np.ndarray] | None = None
        self._rows = paddle.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)
        if on_card(self._rows) and copy_holds():
            self._numbers = _copied(self._rows)

    def tuples(self) -> list[Counts]:
        """Of each of the tensors, its numbers; waits for them."""
        numbers = self._numbers() if self._numbers is not None else self._rows.numpy()
        return [tuple(row) for row in numbers.tolist()]


def _copied(x: Tensor) -> Callable[[], np.ndarray]:
    """Start copying to pinned memory; the result waits for the copy alone, not for what the device
    was given later.
    """
    pinned = x.pin_memory(blocking=False)
    event = paddle.device.cuda.Event()
    event.record()

    def numbers() -> np.ndarray:
        event.synchronize()
        return np.asarray(pinned.numpy())

    return numbers


def copy_holds() -> bool:
    """Whether numbers that are copied so arrive whole, behind work that keeps the device busy."""

    def arrived() -> Sequence[Tensor]:
        busy = paddle.ones([512, 512])
        for _ in range(8):
            busy = paddle.matmul(busy, busy) * (1 / 512)
        numbers = _copied((busy[:2, :64] * paddle.arange(64, dtype="float32")).astype("int64"))
        return [paddle.to_tensor(numbers()).astype("float32")]

    def known() -> Sequence[Tensor]:
        return [paddle.to_tensor(np.tile(np.arange(64, dtype=np.float32), (2, 1)))]

    return proven("copying counts to the host", "pinned", paddle.float32, arrived, known)

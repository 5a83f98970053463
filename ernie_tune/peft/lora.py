"""Low-rank adapters of linear layers and of stacked experts: y + scaling * (x A) B, with rsLoRA,
LoRA+, DoRA and dropout.

Legend: T tokens, M (token, expert) pairs sorted by expert, I input width, O output width, r rank, n
adapted experts. Refuses to know: which modules get an adapter, files. Under tensor parallelism a
factor is split as its weight is (`slots.ADAPTER_PLAN`) and `sum_over` adds up over ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_tune.models.layers import has_values
from ernie_tune.peft.config import LoraConfig

_TALL_ROWS = 512


def draw_factor(name: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """The fresh A [I, r] of one module: uniform in +-1/sqrt(I) (Kaiming with a = sqrt 5), the same
    on every layout because it is drawn by name.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
    bound = np.float32(shape[0] ** -0.5)
    return (rng.random(shape, np.float32) * 2 - 1) * bound


def tall_product(a_TI: Tensor, b_TO: Tensor) -> Tensor:
    """a^T b for many rows and few columns. The CPU's library splits only over columns; cut into
    blocks of rows it is three times faster.
    """
    blocks = a_TI.shape[0] // _TALL_ROWS
    if blocks < 2 or not a_TI.place.is_cpu_place():
        return paddle.matmul(a_TI, b_TO, transpose_x=True)
    end = blocks * _TALL_ROWS
    a, b = (x[:end].reshape([blocks, _TALL_ROWS, x.shape[1]]) for x in (a_TI, b_TO))
    total = paddle.matmul(a, b, transpose_x=True).sum(0)
    return total + paddle.matmul(a_TI[end:], b_TO[end:], transpose_x=True) if end < a_TI.shape[0] else total


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Inverted dropout. On the CPU numpy draws the mask, four times faster; its seed comes from
    Paddle's generator, so recompute draws it again.
    """
    if rate == 0 or not training:
        return x
    if not x.place.is_cpu_place():
        return F.dropout(x, rate)
    rng = np.random.Generator(np.random.SFC64(paddle.randint(0, 2**31 - 1, [1]).item()))
    size = int(np.prod(x.shape))
    bits = rng.integers(0, 2**64, -(-size // 4), dtype=np.uint64).view(np.uint16)[:size].reshape(x.shape)
    kept = np.where(bits >= round(rate * 2**16), np.float32(1 / (1 - rate)), np.float32(0))
    return x * paddle.to_tensor(kept).astype(x.dtype)


class _Project(PyLayer):
    """scale * x A."""

    @staticmethod
    def forward(ctx, x_TI, a_Ir, scale):  # type: ignore[no-untyped-def]
        ctx.scale = scale
        ctx.save_for_backward(x_TI, a_Ir)
        return paddle.matmul(x_TI, a_Ir) * scale

    @staticmethod
    def backward(ctx, grad_Tr):  # type: ignore[no-untyped-def]
        x_TI, a_Ir = ctx.saved_tensor()
        grad = grad_Tr * ctx.scale
        dx = None if x_TI.stop_gradient else paddle.matmul(grad, a_Ir, transpose_y=True)
        return dx, None if a_Ir.stop_gradient else tall_product(x_TI, grad)


def _project(x_TI: Tensor, a_Ir: Tensor, scale: float) -> Tensor:
    return _Project.apply(x_TI, a_Ir, scale) if paddle.is_grad_enabled() else paddle.matmul(x_TI, a_Ir) * scale


class _AddProduct(PyLayer):
    """out + u B, in one pass over `out`."""

    @staticmethod
    def forward(ctx, out_TO, u_Tr, b_rO):  # type: ignore[no-untyped-def]
        ctx.frozen = out_TO.stop_gradient
        ctx.save_for_backward(u_Tr, b_rO)
        return paddle.addmm(out_TO, u_Tr, b_rO)

    @staticmethod
    def backward(ctx, grad_TO):  # type: ignore[no-untyped-def]
        u_Tr, b_rO = ctx.saved_tensor()
        du = None if u_Tr.stop_gradient else paddle.matmul(grad_TO, b_rO, transpose_y=True)
        return None if ctx.frozen else grad_TO, du, None if b_rO.stop_gradient else tall_product(u_Tr, grad_TO)


def _add_product(out_TO: Tensor, u_Tr: Tensor, b_rO: Tensor) -> Tensor:
    if paddle.is_grad_enabled():
        return _AddProduct.apply(out_TO, u_Tr, b_rO)
    return paddle.addmm(out_TO, u_Tr, b_rO)


class _ScaleColumns(PyLayer):
    """x * s for s [O]: like the broadcast product, with the reduction of its backward as a matrix
    product.
    """

    @staticmethod
    def forward(ctx, x_TO, s_O):  # type: ignore[no-untyped-def]
        ctx.frozen = x_TO.stop_gradient
        ctx.save_for_backward(x_TO, s_O)
        return x_TO * s_O

    @staticmethod
    def backward(ctx, grad_TO):  # type: ignore[no-untyped-def]
        x_TO, s_O = ctx.saved_tensor()
        ds = None if s_O.stop_gradient else column_sum(grad_TO * x_TO).astype(s_O.dtype)
        return None if ctx.frozen else grad_TO * s_O, ds


class LinearLora(nn.Layer):
    """The adapter of one linear layer: `lora_A` [I, r], `lora_B` [r, O] and, for DoRA, `magnitude`
    [O].
    """

    def __init__(self, linear: nn.Layer, name: str, config: LoraConfig) -> None:
        super().__init__()
        held = getattr(linear, "quant", None)  # a quantised layer makes its matrix anew each time
        weight = linear.weight if held is None else held
        known = has_values(weight) if held is None else held.known
        (n_in, n_out), dtype = weight.shape, weight.dtype
        self.scaling, self.rate = config.scaling, config.lora_dropout
        fresh = draw_factor(name, (n_in, config.r), config.seed)
        self.lora_A = parameter(self, fresh, dtype)
        self.lora_B = parameter(self, np.zeros((config.r, n_out), np.float32), dtype)
        if config.use_dora:
            self.magnitude = parameter(self, np.zeros(n_out, np.float32), dtype)
            if known:
                self.settle(linear)

    # Adds up over the ranks that hold the other rows of the weight; set from outside where it is
    # split by rows.
    sum_over: Callable[[Tensor], Tensor] | None = None

    def settle(self, linear: nn.Layer) -> None:
        """Take what starts from the layer's values: DoRA's magnitudes."""
        if "magnitude" in self._parameters:
            with paddle.no_grad():
                self.magnitude.set_value(column_norms(linear.weight, self.sum_over))

    def project(self, x_TI: Tensor) -> Tensor:
        """scaling * x A, [T, r]."""
        return _project(dropout(x_TI, self.rate, self.training), self.lora_A, self.scaling)

    def forward(self, linear: nn.Layer, args: tuple[Any, ...], out_TO: Tensor) -> Tensor:
        """DoRA scales the columns of (W + scaling A B) to `magnitude`; their norm carries no
        gradient (2402.09353, 4.3). The bias is not scaled.
        """
        if "magnitude" not in self._parameters:
            return _add_product(out_TO, self.project(args[0]), self.lora_B)
        bare = out_TO if linear.bias is None else out_TO - linear.bias
        with paddle.no_grad():
            norm_O = column_norms(linear.weight + self.delta(), self.sum_over)
        scaled = _ScaleColumns.apply(_add_product(bare, self.project(args[0]), self.lora_B), self.magnitude / norm_O)
        return scaled if linear.bias is None else scaled + linear.bias

    @property
    def only_adds(self) -> bool:
        """Whether the output is y + scaling (x A) B while nothing is dropped, and no more."""
        return "magnitude" not in self._parameters and self.sum_over is None

    def low_rank(self) -> tuple[Tensor, Tensor, float]:
        """(A, B, scaling)."""
        return self.lora_A, self.lora_B, self.scaling

    def delta(self) -> Tensor:
        """scaling * A B, [I, O]."""
        return paddle.matmul(self.lora_A, self.lora_B) * self.scaling

    def merged(self, weight_IO: Tensor) -> Tensor:
        """The weight that gives the same outputs without the adapter."""
        total = weight_IO + self.delta()
        return total * (self.magnitude / column_norms(total)) if "magnitude" in self._parameters else total


class ExpertLora(nn.Layer):
    """The adapters of some experts of one stack: `lora_A` [n, I, r] and `lora_B` [n, r, O] of
    `experts`, and nothing for the others.
    """

    def __init__(
        self, shape: tuple[int, int], dtype: str, experts: tuple[int, ...], name: str, config: LoraConfig
    ) -> None:
        super().__init__()
        n_in, n_out = shape
        self.experts, self.scaling, self.rate = experts, config.scaling, config.lora_dropout
        fresh = np.stack([draw_factor(f"{name}.{e}", (n_in, config.r), config.seed) for e in experts])
        self.lora_A = parameter(self, fresh, dtype)
        self.lora_B = parameter(self, np.zeros((len(experts), config.r, n_out), np.float32), dtype)

    def cut(self, rank: int, size: int, total: int) -> tuple[int, ...]:
        """Keep the adapters of the rank's run of all `total` experts, which are numbered from 0
        there; returns which adapters those are. Without any the layer passes its input on.
        """
        first, per = rank * (total // size), total // size
        kept = [j for j, e in enumerate(self.experts) if first <= e < first + per]
        self.experts = tuple(self.experts[j] - first for j in kept)
        for leaf, value in list(self._parameters.items()):
            if kept:
                self._parameters[leaf] = local = parameter(self, value.numpy()[kept], value.dtype)
                local.stop_gradient = value.stop_gradient
            else:
                del self._parameters[leaf]
        return tuple(kept)

    def forward(self, product: nn.Layer, args: tuple[Any, ...], out_MO: Tensor) -> Tensor:
        x_MI, _, counts = args
        starts = np.cumsum((0, *counts)).tolist()
        spans = tuple((j, starts[e], starts[e + 1]) for j, e in enumerate(self.experts) if counts[e])
        if not spans:
            return out_MO
        x_MI = dropout(x_MI, self.rate, self.training)
        return _AddExpertProducts.apply(out_MO, x_MI, self.lora_A, self.lora_B, spans, self.scaling)

    def delta(self, j: int) -> Tensor:
        """scaling * A B of the j-th adapted expert, [I, O]."""
        return paddle.matmul(self.lora_A[j], self.lora_B[j]) * self.scaling


class _AddExpertProducts(PyLayer):
    """out + scale * (x A_j) B_j on the rows of span j = (adapter, first row, end row); the other
    rows pass untouched, forward and backward.
    """

    @staticmethod
    def forward(ctx, out_MO, x_MI, a_nIr, b_nrO, spans, scale):  # type: ignore[no-untyped-def]
        us = [paddle.matmul(x_MI[a:b], a_nIr[j]) * scale for j, a, b in spans]
        parts = [paddle.addmm(out_MO[a:b], u, b_nrO[j]) for (j, a, b), u in zip(spans, us, strict=True)]
        ctx.spans, ctx.scale, ctx.us, ctx.frozen = spans, scale, us, out_MO.stop_gradient
        ctx.save_for_backward(x_MI, a_nIr, b_nrO)
        return _fill_gaps(parts, spans, lambda a, b: out_MO[a:b], out_MO.shape[0])

    @staticmethod
    def backward(ctx, grad_MO):  # type: ignore[no-untyped-def]
        x_MI, a_nIr, b_nrO = ctx.saved_tensor()
        rows = [grad_MO[a:b] for _, a, b in ctx.spans]
        dus = [
            paddle.matmul(g, b_nrO[j], transpose_y=True) * ctx.scale
            for (j, _, _), g in zip(ctx.spans, rows, strict=True)
        ]
        dx = None
        if not x_MI.stop_gradient:
            parts = [
                paddle.matmul(du, a_nIr[j], transpose_y=True) for (j, _, _), du in zip(ctx.spans, dus, strict=True)
            ]
            blank = lambda a, b: paddle.zeros([b - a, x_MI.shape[1]], x_MI.dtype)  # noqa: E731
            dx = _fill_gaps(parts, ctx.spans, blank, x_MI.shape[0])
        das: list[Tensor] = [paddle.zeros(a_nIr.shape[1:], a_nIr.dtype)] * a_nIr.shape[0]
        dbs: list[Tensor] = [paddle.zeros(b_nrO.shape[1:], b_nrO.dtype)] * a_nIr.shape[0]
        for (j, a, b), u, du, g in zip(ctx.spans, ctx.us, dus, rows, strict=True):
            das[j], dbs[j] = tall_product(x_MI[a:b], du), tall_product(u, g)
        frozen = a_nIr.stop_gradient
        return (
            None if ctx.frozen else grad_MO,
            dx,
            None if frozen else paddle.stack(das),
            None if frozen else paddle.stack(dbs),
        )


def _fill_gaps(parts: list[Tensor], spans: tuple[tuple[int, int, int], ...], gap: Any, rows: int) -> Tensor:
    """Rows [0, rows): the parts on their spans, `gap(first, end)` between them."""
    out, at = [], 0
    for part, (_, a, b) in zip(parts, spans, strict=True):
        out += [gap(at, a), part] if at < a else [part]
        at = b
    if at < rows:
        out.append(gap(at, rows))
    return paddle.concat(out) if len(out) > 1 else out[0]


def column_norms(weight_IO: Tensor, sum_over: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """L2 norm of each column, [O], computed in float32 at least. `sum_over`: adds up over the ranks
    that hold the other rows.
    """
    wide = weight_IO if weight_IO.dtype == paddle.float64 else weight_IO.astype("float32")
    squares_O = column_sum(wide * wide)
    return paddle.sqrt(squares_O if sum_over is None else sum_over(squares_O)).astype(weight_IO.dtype)


def column_sum(x_IO: Tensor) -> Tensor:
    """Sum of each column, [O], as a product: several times faster on the CPU than Paddle's
    reduction.
    """
    return paddle.matmul(paddle.ones([1, x_IO.shape[0]], x_IO.dtype), x_IO).reshape([-1])


def parameter(layer: nn.Layer, values: np.ndarray, dtype: paddle.dtype | str) -> Tensor:
    """A trainable parameter with these values."""
    zero = nn.initializer.Constant(0.0)
    made = layer.create_parameter(list(values.shape), dtype=dtype, default_initializer=zero)
    made.set_value(paddle.to_tensor(values).astype(dtype))
    return made

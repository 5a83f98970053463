"""The small layers that every tower shares: norms, gated and plain MLPs, rotary tables. Single
device, flat tokens.

Legend: T tokens, D width, N heads, H head width, I inner width, P patches. Refuses to know:
segments, caches, experts, distribution.

The functions with a hand-written backward (`rms_norm`, `swiglu`) exist for the CPU: Paddle's
composed backward of the same formulas spends most of a step in strided reductions there. They
compute the same numbers in fewer passes, on every device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_tune.models import mkl
from ernie_tune.models.pieces import in_pieces, in_rows

# Below so many elements one broadcast beats a product with ones and a second pass.
_FEW = 2**14


def has_values(parameter: Tensor) -> bool:
    """False for a parameter of a pipeline stage that another rank holds: it has a name and a shape,
    but no memory (`AutoModel.from_pretrained`).
    """
    return bool(parameter._is_initialized())


@lru_cache(maxsize=256)
def _ones(rows: int, columns: int, dtype: paddle.dtype) -> Tensor:
    return paddle.ones([rows, columns], dtype)


def row_sum(x_TD: Tensor) -> Tensor:
    """Sum over the last axis, kept as [T, 1]. A product with ones is several times faster than
    Paddle's CPU reduction and equal in float32 to rounding.
    """
    return paddle.matmul(x_TD, _ones(x_TD.shape[-1], 1, x_TD.dtype))


def _by_product(x: Tensor) -> bool:
    """Whether a product with ones beats a broadcast: on the CPU, where it is exact and twice as
    fast.
    """
    return x.place.is_cpu_place() and x.dtype in (paddle.float32, paddle.float64)


def across(x_T1: Tensor, width: int) -> Tensor:
    """A column as [T, width], or as it is where broadcasting is fast."""
    return paddle.matmul(x_T1, _ones(1, width, x_T1.dtype)) if _by_product(x_T1) else x_T1


def scale_rows(x: Tensor, column: Tensor) -> Tensor:
    """x times one number per row, [..., 1], without autograd."""
    if mkl.numel(x) > _FEW and _by_product(column):
        return across(column, x.shape[-1]).multiply_(x)
    return x * column


def _outer(column_T1: Tensor, row_D: Tensor) -> Tensor:
    """column * row, [T, D]."""
    row_1D = row_D.astype(column_T1.dtype).unsqueeze(0)
    return paddle.matmul(column_T1, row_1D) if _by_product(column_T1) else column_T1 * row_1D


def _widen(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.astype("float32") if x.dtype in (paddle.bfloat16, paddle.float16) else x


def _normalise(x_TD: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * weight, 1 / rms(x) [T, 1]), the latter in float32 at least."""
    if mkl.ready(x_TD, weight_D):
        out, inv = paddle.empty(x_TD.shape, x_TD.dtype), paddle.empty([x_TD.shape[0], 1], x_TD.dtype)
        weight, rows = mkl.view(weight_D), (x_TD.contiguous(), inv, out)
        in_rows(lambda x, inv, out: _normalise_rows(x, weight, eps, inv, out), *rows)
        return out, inv
    wide = _widen(x_TD)
    inv_T1 = paddle.rsqrt(row_sum(wide * wide).scale_(1 / wide.shape[1], eps))
    if wide is x_TD:
        return _outer(inv_T1, weight_D).multiply_(wide), inv_T1
    # cast before the weight, as the released model does
    return (wide * inv_T1).astype(x_TD.dtype) * weight_D, inv_T1


def _normalise_rows(x: np.ndarray, weight_D: np.ndarray, eps: float, inv_T1: np.ndarray, out: np.ndarray) -> None:
    np.einsum("td,td->t", x, x, out=inv_T1[:, 0])
    inv_T1 /= x.shape[1]
    inv_T1 += eps
    np.sqrt(inv_T1, out=inv_T1)
    np.reciprocal(inv_T1, out=inv_T1)
    np.multiply(x, inv_T1, out=out)
    out *= weight_D


def where_needed(frozen: tuple[bool, ...], *grads: Tensor) -> tuple[Tensor | None, ...]:
    """What a PyLayer's backward must return: None for the inputs that need no gradient, which are
    frozen layers' outputs beside trained ones.
    """
    return tuple(None if skip else grad for skip, grad in zip(frozen, grads, strict=True))


class _RmsNorm(PyLayer):
    @staticmethod
    def forward(ctx, x_TD, weight_D, eps):  # type: ignore[no-untyped-def]
        out_TD, inv_T1 = _normalise(x_TD, weight_D, eps)
        ctx.frozen = (x_TD.stop_gradient, weight_D.stop_gradient)
        ctx.save_for_backward(x_TD, inv_T1, weight_D)
        return out_TD

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        x_TD, inv_T1, weight_D = ctx.saved_tensor()
        if mkl.ready(x_TD, grad_TD, weight_D):
            return where_needed(ctx.frozen, *_norm_gradients(x_TD.contiguous(), inv_T1, weight_D, grad_TD.contiguous()))
        x, grad, weight = _widen(x_TD), _widen(grad_TD), weight_D.astype(inv_T1.dtype)
        product = grad * x
        dw = paddle.matmul(inv_T1, product, transpose_x=True).reshape([-1]).astype(weight_D.dtype)
        # d(1/rms)/dx = -x / (D rms^3)
        pull_T1 = paddle.matmul(product, weight.unsqueeze(1)) * inv_T1**3 / x.shape[1]
        dx = _outer(inv_T1, weight).multiply_(grad).subtract_(scale_rows(x, pull_T1))
        return where_needed(ctx.frozen, dx.astype(grad_TD.dtype), dw)


def _norm_gradients(x_TD: Tensor, inv_T1: Tensor, weight_D: Tensor, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Of x and of the weight."""
    weight, dx, width = mkl.view(weight_D), paddle.empty(x_TD.shape, x_TD.dtype), x_TD.shape[1]
    sums: dict[int, np.ndarray] = {}

    def work(x: np.ndarray, inv: np.ndarray, grad: np.ndarray, dx: np.ndarray) -> None:
        product = np.multiply(grad, x, out=dx)
        sums[dx.ctypes.data] = np.einsum("t,td->d", inv[:, 0], product)
        # d(1/rms)/dx = -x / (D rms^3)
        pull_T1 = np.einsum("td,d->t", product, weight)[:, None] * inv**3
        pull_T1 /= -width
        np.multiply(grad, weight, out=dx)
        dx *= inv
        dx += x * pull_T1

    in_rows(work, x_TD, inv_T1, grad_TD, dx)
    dweight = np.sum([sums[at] for at in sorted(sums)], 0, dtype=weight.dtype)
    return dx, mkl.made(dweight)


def normalised(x_TD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    """`rms_norm` of arrays in their own dtype."""
    inv_T = 1.0 / np.sqrt(np.einsum("td,td->t", x_TD, x_TD) / x_TD.dtype.type(x_TD.shape[1]) + x_TD.dtype.type(eps))
    out_TD = x_TD * inv_T[:, None]
    out_TD *= weight_D
    return out_TD


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) in float32, cast to the input's dtype, then times the weight."""
    if mkl.is_stepping():
        return mkl.made(normalised(x_TD.numpy(), weight_D.numpy(), eps))
    return _RmsNorm.apply(x_TD, weight_D, eps) if paddle.is_grad_enabled() else _normalise(x_TD, weight_D, eps)[0]


class RMSNorm(nn.Layer):
    """RMS norm over the last axis."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = self.create_parameter([width], default_initializer=nn.initializer.Constant(1.0))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight, self.eps)


class _Swiglu(PyLayer):
    @staticmethod
    def forward(ctx, gate_TI, up_TI):  # type: ignore[no-untyped-def]
        ctx.frozen = (gate_TI.stop_gradient, up_TI.stop_gradient)
        out_TI, sigmoid_TI = _gated(gate_TI, up_TI, keep=True)
        ctx.save_for_backward(gate_TI, up_TI, sigmoid_TI)
        return out_TI

    @staticmethod
    def backward(ctx, grad_TI):  # type: ignore[no-untyped-def]
        gate_TI, up_TI, sigmoid_TI = ctx.saved_tensor()
        if mkl.ready(gate_TI, up_TI, grad_TI):
            kept = [x.contiguous() for x in (gate_TI, up_TI, sigmoid_TI, grad_TI)]
            grads = [paddle.empty(x.shape, x.dtype) for x in kept[:2]]
            in_pieces(_gated_back, *kept, *grads)
            return where_needed(ctx.frozen, *grads)
        act = gate_TI * sigmoid_TI
        # d silu / d gate = sigmoid + act (1 - sigmoid)
        slope = (act - act * sigmoid_TI).add_(sigmoid_TI)
        return where_needed(ctx.frozen, slope.multiply_(up_TI).multiply_(grad_TI), grad_TI * act)


def _gated(gate_TI: Tensor, up_TI: Tensor, keep: bool = False) -> tuple[Tensor, Tensor]:
    """(silu(gate) * up, with `keep` sigmoid(gate))."""
    if not mkl.ready(gate_TI, up_TI):
        sigmoid = F.sigmoid(gate_TI)
        return (gate_TI * sigmoid if keep else sigmoid.multiply_(gate_TI)).multiply_(up_TI), sigmoid
    out = paddle.empty(gate_TI.shape, gate_TI.dtype)
    sigmoid = paddle.empty_like(out) if keep else out
    in_pieces(_gated_piece, gate_TI.contiguous(), up_TI.contiguous(), sigmoid, out)
    return out, sigmoid


def _gated_piece(gate: np.ndarray, up: np.ndarray, sigmoid: np.ndarray, out: np.ndarray) -> None:
    """The sigmoid as (1 + tanh(x / 2)) / 2: nothing is too large for it."""
    np.multiply(gate, 0.5, out=sigmoid)
    mkl.tanh_array_(sigmoid)
    sigmoid *= 0.5
    sigmoid += 0.5
    np.multiply(gate, sigmoid, out=out)
    out *= up


def _gated_back(
    gate: np.ndarray, up: np.ndarray, sigmoid: np.ndarray, grad: np.ndarray, dgate: np.ndarray, dup: np.ndarray
) -> None:
    act = gate * sigmoid
    np.multiply(act, grad, out=dup)
    act -= act * sigmoid
    act += sigmoid
    act *= up
    np.multiply(act, grad, out=dgate)


class _SwigluHalves(PyLayer):
    @staticmethod
    def forward(ctx, x_MI):  # type: ignore[no-untyped-def]
        out_Mi, sigmoid_Mi = _gated_rows(x_MI, keep=True)
        ctx.save_for_backward(x_MI, sigmoid_Mi)
        return out_Mi

    @staticmethod
    def backward(ctx, grad_Mi):  # type: ignore[no-untyped-def]
        x_MI, sigmoid_Mi = ctx.saved_tensor()
        out = paddle.empty(x_MI.shape, x_MI.dtype)
        in_rows(_halves_back, x_MI.contiguous(), sigmoid_Mi, grad_Mi.contiguous(), out)
        return out


def _gated_rows(x_MI: Tensor, keep: bool = False) -> tuple[Tensor, Tensor]:
    out = paddle.empty([x_MI.shape[0], x_MI.shape[1] // 2], x_MI.dtype)
    sigmoid = paddle.empty_like(out) if keep else out
    in_rows(_halves_piece, x_MI.contiguous(), sigmoid, out)
    return out, sigmoid


def _halves_piece(x: np.ndarray, sigmoid: np.ndarray, out: np.ndarray) -> None:
    half = out.shape[1]
    _gated_piece(x[:, :half], x[:, half:], sigmoid, out)


def _halves_back(x: np.ndarray, sigmoid: np.ndarray, grad: np.ndarray, out: np.ndarray) -> None:
    half = grad.shape[1]
    _gated_back(x[:, :half], x[:, half:], sigmoid, grad, out[:, :half], out[:, half:])


def _swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # exp(-gate) may be inf: then the product is 0
        return gate / (1.0 + np.exp(-gate)) * up


def gated_halves(x_TI: Tensor) -> Tensor:
    """`swiglu` of the first half of each row and the second one, where they lie. For a tensor that
    is `mkl.ready`.
    """
    if mkl.is_stepping():
        return mkl.made(gated(x_TI.numpy()))
    return _SwigluHalves.apply(x_TI) if paddle.is_grad_enabled() else _gated_rows(x_TI)[0]


def gated(x_TI: np.ndarray) -> np.ndarray:
    """`gated_halves` of an array."""
    half = x_TI.shape[1] // 2
    return _swiglu(x_TI[:, :half], x_TI[:, half:])


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up."""
    if mkl.is_stepping():
        return mkl.made(_swiglu(gate_TI.numpy(), up_TI.numpy()))
    return _Swiglu.apply(gate_TI, up_TI) if paddle.is_grad_enabled() else _gated(gate_TI, up_TI)[0]


class Linear(nn.Linear):
    """Without bias, and without the flags that `nn.Linear` looks up by name in every call: on the
    CPU they cost more than a small product.
    """

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__(n_in, n_out, bias_attr=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return x_TD @ self.weight  # `paddle.matmul` takes as long again to get going


class LowRank(Protocol):
    """What adds `scale * (x A) B` to the product of a linear layer, when anything acts."""

    def low_rank(self) -> tuple[Tensor, Tensor, float] | None:
        """(A [I, r], B [r, O], scale); None where nothing acts."""
        ...


class GatedMLP(nn.Layer):
    """down(silu(gate(x)) * up(x)) without biases: dense layers and shared experts."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, inner)
        self.up_proj = Linear(width, inner)
        self.down_proj = Linear(inner, width)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


def text_angles(position_ids_T3: np.ndarray, head_dim: int, freq_allocation: int, theta: float) -> np.ndarray:
    """Angles [T, head_dim/2] of the 3-D rope: even low frequencies take
    height, odd ones width, the last ones time.

    float64: at position 1e5 a float32 angle is already wrong by up to a few 1e-3 rad.
    """
    half = head_dim // 2
    freq = theta ** (-2.0 * np.arange(half) / head_dim)
    axis = np.where(np.arange(half) >= half - freq_allocation, 0, 1 + np.arange(half) % 2)
    return position_ids_T3[:, axis].astype(np.float64) * freq


def vision_angles(grid_thw_n3: np.ndarray, head_dim: int, theta: float, merge: int = 2) -> np.ndarray:
    """Angles [P, head_dim/2] of the 2-D rope: rows, then columns, restarting
    in every frame, patches in 2x2-block order.
    """
    freq = theta ** (-2.0 * np.arange(head_dim // 4) / (head_dim // 2))
    out = []
    for t, h, w in np.asarray(grid_thw_n3).tolist():
        rows, cols = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
        block = [
            a.reshape(h // merge, merge, w // merge, merge).transpose(0, 2, 1, 3).reshape(-1) for a in (rows, cols)
        ]
        angles = np.concatenate([block[0][:, None] * freq, block[1][:, None] * freq], axis=1)
        out.append(np.tile(angles, (t, 1)))
    return np.concatenate(out)


def rotate_pairs(x_TNH: Tensor, turn_TNh: Tensor) -> Tensor:
    """Rotate adjacent pairs (x[2i], x[2i+1]) by complex factors [T, N, H/2], in float32, cast
    back.
    """
    tokens, heads, width = x_TNH.shape
    if mkl.is_stepping():
        return mkl.made(turned(x_TNH.numpy(), turn_TNh.numpy()))
    pairs = paddle.as_complex(x_TNH.astype(_real(turn_TNh)).reshape([tokens, heads, width // 2, 2]))
    return paddle.as_real(pairs * turn_TNh).reshape([tokens, heads, width]).astype(x_TNH.dtype)


def turned(x_TNH: np.ndarray, turn_TNh: np.ndarray) -> np.ndarray:
    """`rotate_pairs` of an array in its own dtype; the factors may be [T, 1, H/2]."""
    return (x_TNH.view(turn_TNh.dtype) * turn_TNh).view(x_TNH.dtype)


class _RotateHalves(PyLayer):
    @staticmethod
    def forward(ctx, x_PNH, cos_PNH, sin_PNH):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(cos_PNH, sin_PNH)
        return _turn_halves(x_PNH, cos_PNH, sin_PNH)

    @staticmethod
    def backward(ctx, grad_PNH):  # type: ignore[no-untyped-def]
        cos_PNH, sin_PNH = ctx.saved_tensor()
        return _turn_halves(grad_PNH, cos_PNH, -sin_PNH), None, None


def _turn_halves(x_PNH: Tensor, cos_PNH: Tensor, sin_PNH: Tensor) -> Tensor:
    x = x_PNH.astype(cos_PNH.dtype)
    patches, heads, width = x.shape
    # exchanged as rows of half the width: splitting and joining them takes four times as long
    swapped = paddle.gather(x.reshape([-1, width // 2]), _neighbours(patches * heads)).reshape(x.shape)
    return swapped.multiply_(sin_PNH).add_(x * cos_PNH).astype(x_PNH.dtype)


@lru_cache(maxsize=16)
def _neighbours(pairs: int) -> Tensor:
    """1, 0, 3, 2, ...: of so many pairs."""
    return paddle.to_tensor(np.arange(2 * pairs).reshape(-1, 2)[:, ::-1].reshape(-1).copy())


def rotate_halves(x_PNH: Tensor, cos_PNH: Tensor, sin_PNH: Tensor) -> Tensor:
    """(a, b) of each head's halves -> (a cos - b sin, b cos + a sin), in float32, cast back. cos
    and sin are repeated over both halves; over the first one sin is negative.
    """
    if paddle.is_grad_enabled():
        return _RotateHalves.apply(x_PNH, cos_PNH, sin_PNH)
    return _turn_halves(x_PNH, cos_PNH, sin_PNH)


def _real(x: Tensor) -> paddle.dtype:
    return paddle.float64 if x.dtype == paddle.complex128 else paddle.float32


def turns(angles_Th: np.ndarray, dtype: str) -> np.ndarray:
    """e^(i angle), complex of as many bits as the real dtype asks for."""
    return np.exp(1j * angles_Th).astype(np.complex128 if dtype == "float64" else np.complex64)


def turn_factors(angles_Th: np.ndarray, heads: int, dtype: str) -> Tensor:
    """e^(i angle) repeated over heads, complex [T, heads, h]: Paddle's CPU broadcast is ten times
    slower than the repeated tensor, built once per forward.
    """
    return paddle.to_tensor(np.repeat(turns(angles_Th, dtype)[:, None, :], heads, axis=1))

"""The small layers that every tower shares: norms, gated and plain MLPs, rotary tables. Single device, flat tokens.

Legend: T tokens, D width, N heads, H head width, I inner width, P patches. Refuses to know: segments, caches, experts, distribution.

The functions with a hand-written backward (`rms_norm`, `swiglu`) exist for the CPU: Paddle's composed backward of the same formulas spends
most of a step in strided reductions there. They compute the same numbers in fewer passes, on every device.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer


@lru_cache(maxsize=256)
def _ones(rows: int, columns: int, dtype: paddle.dtype) -> Tensor:
    return paddle.ones([rows, columns], dtype)


def row_sum(x_TD: Tensor) -> Tensor:
    """Sum over the last axis, kept as [T, 1]. A product with ones is several times faster than Paddle's CPU reduction and equal in float32 to rounding."""
    return paddle.matmul(x_TD, _ones(x_TD.shape[-1], 1, x_TD.dtype))


def _by_product(x: Tensor) -> bool:
    """Whether a product with ones beats a broadcast: on the CPU, where it is exact and twice as fast."""
    return x.place.is_cpu_place() and x.dtype in (paddle.float32, paddle.float64)


def across(x_T1: Tensor, width: int) -> Tensor:
    """A column as [T, width], or as it is where broadcasting is fast."""
    return paddle.matmul(x_T1, _ones(1, width, x_T1.dtype)) if _by_product(x_T1) else x_T1


def down(x_D: Tensor, rows: int) -> Tensor:
    """A vector as [rows, D], or as it is where broadcasting is fast."""
    return paddle.matmul(_ones(rows, 1, x_D.dtype), x_D.unsqueeze(0)) if _by_product(x_D) else x_D


def _normalise(x_TD: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) in the input's dtype and the wide factor 1/rms, [T, D]; computed in float32 at least."""
    x = x_TD.astype("float32") if x_TD.dtype in (paddle.bfloat16, paddle.float16) else x_TD
    inv_TD = across(paddle.rsqrt(row_sum(x * x) / x.shape[-1] + eps), x.shape[-1])
    return (x * inv_TD).astype(x_TD.dtype), inv_TD  # cast before the weight: architecture.md 2.1


def where_needed(frozen: tuple[bool, ...], *grads: Tensor) -> tuple[Tensor | None, ...]:
    """What a PyLayer's backward must return: None for the inputs that need no gradient, which are frozen layers' outputs beside trained ones."""
    return tuple(None if skip else grad for skip, grad in zip(frozen, grads, strict=True))


class _RmsNorm(PyLayer):
    @staticmethod
    def forward(ctx, x_TD, weight_D, eps):  # type: ignore[no-untyped-def]
        normed_TD, inv_TD = _normalise(x_TD, eps)
        ctx.frozen = x_TD.stop_gradient
        ctx.save_for_backward(normed_TD, inv_TD, weight_D)
        return normed_TD * down(weight_D, x_TD.shape[0])

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        normed_TD, inv_TD, weight_D = ctx.saved_tensor()
        wide, (tokens, width) = inv_TD.dtype, normed_TD.shape
        grad, normed = grad_TD.astype(wide), normed_TD.astype(wide)
        scaled = grad * down(weight_D.astype(wide), tokens)
        dx = (scaled - normed * across(row_sum(scaled * normed) / width, width)) * inv_TD
        dw = None
        if not weight_D.stop_gradient:
            dw = paddle.matmul(_ones(1, tokens, wide), grad * normed).reshape([-1]).astype(weight_D.dtype)
        return None if ctx.frozen else dx.astype(grad_TD.dtype), dw


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) in float32, cast to the input's dtype, then times the weight (architecture.md 2.1)."""
    if paddle.is_grad_enabled():
        return _RmsNorm.apply(x_TD, weight_D, eps)
    return _normalise(x_TD, eps)[0] * down(weight_D, x_TD.shape[0])


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
        half, tanh, act = _silu(gate_TI)
        ctx.frozen = (gate_TI.stop_gradient, up_TI.stop_gradient)
        ctx.save_for_backward(half, tanh, act, up_TI)
        return act * up_TI

    @staticmethod
    def backward(ctx, grad_TI):  # type: ignore[no-untyped-def]
        half, tanh, act, up_TI = ctx.saved_tensor()
        # with h = g/2, t = tanh(h): silu = h + h t, so d silu/dg = (1 + t + h (1 - t^2)) / 2
        slope = (tanh + half - half * (tanh * tanh)) * 0.5 + 0.5
        return where_needed(ctx.frozen, grad_TI * up_TI * slope, grad_TI * act)


def _silu(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """g/2, tanh(g/2) and silu(g): tanh is the vectorised one of the CPU's exponentials."""
    half = gate * 0.5
    tanh = paddle.tanh(half)
    return half, tanh, half * tanh + half


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _Swiglu.apply(gate_TI, up_TI) if paddle.is_grad_enabled() else _silu(gate_TI)[2] * up_TI


class GatedMLP(nn.Layer):
    """down(silu(gate(x)) * up(x)) without biases: dense layers and shared experts."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias_attr=False)
        self.up_proj = nn.Linear(width, inner, bias_attr=False)
        self.down_proj = nn.Linear(inner, width, bias_attr=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(swiglu(self.gate_proj(x_TD), self.up_proj(x_TD)))


def text_angles(position_ids_T3: np.ndarray, head_dim: int, freq_allocation: int, theta: float) -> np.ndarray:
    """Angles [T, head_dim/2] of the 3-D rope (architecture.md 2.2): even low frequencies take height, odd ones width, the last ones time.

    float64: at position 1e5 a float32 angle is already wrong by up to a few 1e-3 rad.
    """
    half = head_dim // 2
    freq = theta ** (-2.0 * np.arange(half) / head_dim)
    axis = np.where(np.arange(half) >= half - freq_allocation, 0, 1 + np.arange(half) % 2)
    return position_ids_T3[:, axis].astype(np.float64) * freq


def vision_angles(grid_thw_n3: np.ndarray, head_dim: int, theta: float, merge: int = 2) -> np.ndarray:
    """Angles [P, head_dim/2] of the 2-D rope (architecture.md 4.3): rows, then columns, restarting in every frame, patches in 2x2-block order."""
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
    """Rotate adjacent pairs (x[2i], x[2i+1]) by complex factors [T, N, H/2], in float32, cast back."""
    tokens, heads, width = x_TNH.shape
    pairs = paddle.as_complex(x_TNH.astype(_real(turn_TNh)).reshape([tokens, heads, width // 2, 2]))
    return paddle.as_real(pairs * turn_TNh).reshape([tokens, heads, width]).astype(x_TNH.dtype)


def rotate_halves(x_PNH: Tensor, cos_PNH: Tensor, sin_PNH: Tensor) -> Tensor:
    """x*cos + rotate_half(x)*sin, in float32, cast back; cos and sin are repeated over both halves."""
    x = x_PNH.astype(cos_PNH.dtype)
    a, b = paddle.split(x, 2, axis=-1)
    return (x * cos_PNH + paddle.concat([-b, a], axis=-1) * sin_PNH).astype(x_PNH.dtype)


def _real(x: Tensor) -> paddle.dtype:
    return paddle.float64 if x.dtype == paddle.complex128 else paddle.float32


def turn_factors(angles_Th: np.ndarray, heads: int, dtype: str) -> Tensor:
    """e^(i angle) repeated over heads, complex [T, heads, h]: Paddle's CPU broadcast is ten times slower than the repeated tensor, built once per forward."""
    turns = np.exp(1j * angles_Th).astype(np.complex128 if dtype == "float64" else np.complex64)
    return paddle.to_tensor(np.repeat(turns[:, None, :], heads, axis=1))

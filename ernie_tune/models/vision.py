"""The vision tower and the variable-resolution resampler: packed patches
in, one feature row per placeholder out.

Legend: P patches, C values of a patch (588), D tower width, N heads, H head width, F feature rows.
Refuses to know: text, files, pixels before normalisation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_tune.config.language import say
from ernie_tune.models import mkl
from ernie_tune.models.attention import AttentionPlan, segment_attention
from ernie_tune.models.config import VisionConfig
from ernie_tune.models.inputs import check_grid
from ernie_tune.models.layers import RMSNorm, rotate_halves, vision_angles
from ernie_tune.models.pieces import in_pieces

_SLOPE = 1.702


class _QuickGelu(PyLayer):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensor()
        if mkl.ready(x, grad):
            out = paddle.empty(x.shape, x.dtype)
            in_pieces(_gelu_back, x.contiguous(), grad.contiguous(), out)
            return out
        sigmoid = F.sigmoid(_SLOPE * x)
        return grad * sigmoid * (1.0 + _SLOPE * x * (1.0 - sigmoid))


def _gelu(x: Tensor) -> Tensor:
    if not mkl.ready(x):
        return x * F.sigmoid(_SLOPE * x)
    out = paddle.empty(x.shape, x.dtype)
    in_pieces(_gelu_piece, x.contiguous(), out)
    return out


def _gelu_piece(x: np.ndarray, out: np.ndarray) -> None:
    np.multiply(x, -_SLOPE, out=out)
    mkl.exp_array_(out)  # inf is as good as large: x / inf is 0
    out += 1.0
    np.divide(x, out, out=out)


def _gelu_back(x: np.ndarray, grad: np.ndarray, out: np.ndarray) -> None:
    """s (1 + 1.702 x (1 - s)) grad, where s is the sigmoid."""
    sigmoid = np.multiply(x, -_SLOPE)
    mkl.exp_array_(sigmoid)
    sigmoid += 1.0
    np.reciprocal(sigmoid, out=sigmoid)
    np.subtract(1.0, sigmoid, out=out)
    out *= x
    out *= _SLOPE
    out += 1.0
    out *= sigmoid
    out *= grad


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x). (Of Paddle's operators on the CPU it takes six times as long, each of
    which goes through memory.)
    """
    return _QuickGelu.apply(x) if paddle.is_grad_enabled() else _gelu(x)


class LayerNorm(nn.LayerNorm):
    """With a frozen weight, Paddle's CPU kernel (3.3.1) leaves the weight out of the input's
    gradient; a copy that asks for a gradient keeps it in.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if weight.stop_gradient and not x.stop_gradient:
            weight = weight.detach()
            weight.stop_gradient = False
        return F.layer_norm(x, self._normalized_shape, weight, self.bias, self._epsilon)


class PatchEmbed(nn.Layer):
    """A patch (channel, row, column) -> D channels, no bias; `proj` is the checkpoints' name."""

    def __init__(self, v: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Linear(v.patch_dim, v.hidden_size, bias_attr=False)

    def forward(self, pixels_PC: Tensor) -> Tensor:
        return self.proj(pixels_PC.astype(self.proj.weight.dtype))


class VisionAttention(nn.Layer):
    """Full attention inside one frame; q, k, v from one matrix; half-split rope."""

    def __init__(self, v: VisionConfig) -> None:
        super().__init__()
        self.num_heads = v.num_heads
        self.qkv = nn.Linear(v.hidden_size, 3 * v.hidden_size)
        self.proj = nn.Linear(v.hidden_size, v.hidden_size)

    def forward(self, x_PD: Tensor, cos_sin: tuple[Tensor, Tensor], plan: AttentionPlan) -> Tensor:
        heads_x3 = 3 * self.num_heads
        q, k, v = paddle.split(self.qkv(x_PD).reshape([x_PD.shape[0], heads_x3, -1]), 3, axis=1)
        q, k = rotate_halves(q, *cos_sin), rotate_halves(k, *cos_sin)
        out = segment_attention(q, k, v, plan)
        return self.proj(out.reshape([x_PD.shape[0], -1]))


class VisionMLP(nn.Layer):
    """fc2(quick_gelu(fc1(x))) with biases."""

    def __init__(self, v: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(v.hidden_size, v.intermediate_size)
        self.fc2 = nn.Linear(v.intermediate_size, v.hidden_size)

    def forward(self, x_PD: Tensor) -> Tensor:
        return self.fc2(quick_gelu(self.fc1(x_PD)))


class VisionBlock(nn.Layer):
    """Pre-norm attention and MLP, both residual."""

    def __init__(self, v: VisionConfig) -> None:
        super().__init__()
        self.norm1 = LayerNorm(v.hidden_size, epsilon=v.layer_norm_eps)
        self.attn = VisionAttention(v)
        self.norm2 = LayerNorm(v.hidden_size, epsilon=v.layer_norm_eps)
        self.mlp = VisionMLP(v)

    def forward(self, x_PD: Tensor, cos: Tensor, sin: Tensor, plan: AttentionPlan) -> Tensor:
        x_PD = x_PD + self.attn(self.norm1(x_PD), (cos, sin), plan)
        return x_PD + self.mlp(self.norm2(x_PD))


class VisionTower(nn.Layer):
    """Patches of all images and videos, in order -> [P, D]."""

    def __init__(self, v: VisionConfig) -> None:
        super().__init__()
        self.config = v
        self.patch_embed = PatchEmbed(v)
        self.blocks = nn.LayerList([VisionBlock(v) for _ in range(v.depth)])
        self.ln = LayerNorm(v.hidden_size, epsilon=v.layer_norm_eps)

    def forward(
        self, pixels_PC: Tensor, grid_thw_n3: np.ndarray, recompute: Callable[..., Tensor] | None = None
    ) -> Tensor:
        frames = frame_offsets(grid_thw_n3)
        if pixels_PC.shape[0] != frames[-1]:
            raise ValueError(
                say(
                    f"number of patches ({pixels_PC.shape[0]}) must equal the sum of T*Hp*Wp over grid_thw "
                    f"({frames[-1]}); rebuild both together",
                    f"图块数（{pixels_PC.shape[0]}）须等于 grid_thw 中 T*Hp*Wp 之和（{frames[-1]}）；请一并重新生成",
                )
            )
        v = self.config
        angles = vision_angles(grid_thw_n3, v.hidden_size // v.num_heads, v.rope_theta, v.spatial_merge_size)
        # sin of the first half is negative, as `rotate_halves` wants it
        wide = np.repeat(np.concatenate([-angles, angles], axis=1)[:, None, :], v.num_heads, axis=1)
        dtype = "float64" if self.ln.weight.dtype == paddle.float64 else "float32"
        cos, sin = (paddle.to_tensor(f(wide).astype(dtype)) for f in (np.cos, np.sin))
        plan = AttentionPlan(frames, causal=False)
        x_PD = self.patch_embed(pixels_PC)
        for block in self.blocks:
            x_PD = recompute(block, x_PD, cos, sin, plan) if recompute else block(x_PD, cos, sin, plan)
        return self.ln(x_PD)


def frame_offsets(grid_thw_n3: np.ndarray) -> tuple[int, ...]:
    """Patch bounds of every frame: attention never leaves one."""
    check_grid(grid_thw_n3)
    sizes = [h * w for t, h, w in np.asarray(grid_thw_n3).tolist() for _ in range(t)]
    return tuple(np.cumsum([0, *sizes]).tolist())


def frame_pairs(grid_thw_n3: np.ndarray, merge: int = 2) -> np.ndarray:
    """Rows [2, F] of merged patches that the temporal layer joins: a video's frames 2i and 2i+1, an
    image with itself.
    """
    first, second, start = [], [], 0
    for t, h, w in np.asarray(grid_thw_n3).tolist():
        size = h * w // merge**2
        rows = start + np.arange(t * size).reshape(t, size)
        first.append(rows[0::2].reshape(-1))
        second.append(rows[1::2].reshape(-1) if t > 1 else rows.reshape(-1))
        start += t * size
    return np.stack([np.concatenate(first), np.concatenate(second)])


def _merge_stack(n_in: int, width: int, eps: float) -> nn.LayerList:
    """fc1, gelu, fc2, norm under the checkpoints' indices 0, 2, 3."""
    return nn.LayerList([nn.Linear(n_in, width), nn.GELU(), nn.Linear(width, width), LayerNorm(width, epsilon=eps)])


class Resampler(nn.Layer):
    """2x2 patches, then frame pairs, merged and projected to the text width."""

    def __init__(self, v: VisionConfig, hidden_size: int, rms_norm_eps: float) -> None:
        super().__init__()
        self.merge = v.spatial_merge_size
        width = v.hidden_size * self.merge**2
        self.spatial_linear = _merge_stack(width, width, v.layer_norm_eps)
        self.temporal_linear = _merge_stack(width * v.temporal_merge_size, width, v.layer_norm_eps)
        self.mlp = nn.Linear(width, hidden_size)
        self.after_norm = RMSNorm(hidden_size, rms_norm_eps)

    def forward(self, x_PD: Tensor, grid_thw_n3: np.ndarray) -> Tensor:
        x = x_PD.reshape([x_PD.shape[0] // self.merge**2, -1])
        for layer in self.spatial_linear:
            x = layer(x)
        first, second = (paddle.to_tensor(rows) for rows in frame_pairs(grid_thw_n3, self.merge))
        x = paddle.concat([paddle.gather(x, first), paddle.gather(x, second)], axis=-1)
        for layer in self.temporal_linear:
            x = layer(x)
        return self.after_norm(self.mlp(x))

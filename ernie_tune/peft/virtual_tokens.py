"""Prompt tuning, P-tuning and prefix tuning by one means: k virtual tokens before every packed row,
which the caller never sees.

`with_virtual_tokens` lengthens the pack, `PeftModel` drops their rows from the output, and the
adapters here overwrite what the virtual rows carry:
a prompt their embeddings (the row's positions move by k), a prefix their keys and values in every
layer (positions stay; the virtual rows sit at position 0, where the rotation is the identity, so
prefix keys are not rotated). Both are text for the routers, and both land in the key/value cache.
Legend: T tokens, k virtual tokens, S segments, D width, K key/value heads, H head width. Refuses to
know: files, losses.
"""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn
from paddle.autograd import PyLayer

from ernie_tune.config.language import say
from ernie_tune.models.ernie import Attention, SequenceContext
from ernie_tune.models.inputs import PackedInput
from ernie_tune.models.layers import has_values
from ernie_tune.peft.config import PrefixConfig, PromptConfig
from ernie_tune.peft.lora import draw_factor, parameter


class LengthenedInput(PackedInput):
    """A pack with virtual tokens before every segment."""


def with_virtual_tokens(inputs: PackedInput, count: int, shift: int) -> tuple[LengthenedInput, np.ndarray]:
    """The pack with `count` text tokens (id 0) before every segment, and the rows of the real
    tokens in it.

    The real tokens' positions move by `shift`; the virtual ones are at 0, 1, ... if it is not 0,
    else all at 0. Raises ValueError for shared prefixes.
    """
    if inputs.parents is not None:
        raise ValueError(
            say(
                "parents must be None with virtual tokens, which begin every segment; pack whole rows "
                "(prefix_sharing: false)",
                "使用虚拟 token 时 parents 须为 None，因为每段都以它们开头；请打包完整的行（prefix_sharing: false）",
            )
        )
    segments = len(inputs.offsets) - 1
    real_T = np.arange(inputs.num_tokens) + count * np.repeat(np.arange(1, segments + 1), inputs.segment_lengths)
    size = inputs.num_tokens + count * segments

    def spread(values: np.ndarray) -> np.ndarray:
        out = np.zeros((size, *values.shape[1:]), values.dtype)
        out[real_T] = values
        return out

    offsets = tuple(b + count * i for i, b in enumerate(inputs.offsets))
    positions = spread(inputs.position_ids_T3 + shift)
    if shift:
        positions[virtual_rows(offsets, count)] = np.tile(np.arange(count), segments)[:, None]
    changed = {
        "input_ids_T": spread(inputs.input_ids_T),
        "position_ids_T3": positions,
        "vision_T": spread(inputs.vision_T),
        "placeholder_T": spread(inputs.placeholder_T),
        "offsets": offsets,
    }
    longer = LengthenedInput(**{**vars(inputs), **changed})
    return longer, real_T


def virtual_rows(offsets: tuple[int, ...], count: int) -> np.ndarray:
    """Rows [S*k] of the virtual tokens in a lengthened pack."""
    return (np.array(offsets[:-1])[:, None] + np.arange(count)).reshape(-1)


class _SetRows(PyLayer):
    """x with `values` [k, D] written over each segment's k rows."""

    @staticmethod
    def forward(ctx, x_TD, values_kD, rows_Sk):  # type: ignore[no-untyped-def]
        ctx.frozen, ctx.shape = x_TD.stop_gradient, values_kD.shape
        ctx.save_for_backward(rows_Sk)
        return paddle.scatter(x_TD, rows_Sk, paddle.tile(values_kD, [rows_Sk.shape[0] // ctx.shape[0], 1]))

    @staticmethod
    def backward(ctx, grad_TD):  # type: ignore[no-untyped-def]
        (rows_Sk,) = ctx.saved_tensor()
        dvalues = paddle.gather(grad_TD, rows_Sk).reshape([-1, *ctx.shape]).sum(0)
        blank = paddle.zeros([rows_Sk.shape[0], grad_TD.shape[1]], grad_TD.dtype)
        return None if ctx.frozen else paddle.scatter(grad_TD, rows_Sk, blank), dvalues, None


class PromptEmbedding(nn.Layer):
    """Adapter of the embedding: `prompt` [k, D], or with an encoder prompt + MLP(prompt) of an
    inner width (P-tuning). It starts from `embedding`: the table [V, D], or where that has no
    values, from zeros of its shape.
    """

    def __init__(self, embedding: Any, config: PromptConfig) -> None:
        super().__init__()
        self.count, width, dtype = config.num_virtual_tokens, embedding.shape[1], embedding.dtype
        self.rows: Tensor | None = None
        if not isinstance(embedding, Tensor) or not has_values(embedding):
            fresh = np.zeros((self.count, width), np.float32)
        elif config.init_ids:
            fresh = embedding.detach()[list(config.init_ids)].astype("float32").numpy()
        else:
            spread = float(embedding.detach()[:1024].astype("float32").std())
            fresh = draw_normal("prompt", (self.count, width), config.seed) * np.float32(spread)
        self.prompt = parameter(self, fresh, dtype)
        if config.encoder_width:
            inner = config.encoder_width
            self.encoder_A = parameter(self, draw_factor("prompt.encoder_A", (width, inner), config.seed), dtype)
            self.encoder_B = parameter(self, draw_factor("prompt.encoder_B", (inner, width), config.seed), dtype)

    def claim(self, offsets: tuple[int, ...] | None) -> None:
        """Say which lengthened pack the next lookups embed; None: they have no virtual tokens. The
        lookup itself sees ids alone.
        """
        self.rows = None if offsets is None else paddle.to_tensor(virtual_rows(offsets, self.count))

    def tokens(self) -> Tensor:
        """The embeddings [k, D] that the model sees."""
        if "encoder_A" not in self._parameters:
            return self.prompt
        return self.prompt + paddle.matmul(paddle.tanh(paddle.matmul(self.prompt, self.encoder_A)), self.encoder_B)

    def forward(self, _module: nn.Layer, _args: tuple[Any, ...], x_TD: Tensor) -> Tensor:
        return x_TD if self.rows is None else _SetRows.apply(x_TD, self.tokens(), self.rows)


class Prefix(nn.Layer):
    """Adapter of k_proj or v_proj in one layer: `prefix` [K, k, H]."""

    def __init__(self, heads: int, width: int, dtype: str, name: str, config: PrefixConfig) -> None:
        super().__init__()
        self.count = config.num_virtual_tokens
        fresh = draw_normal(name, (heads, self.count, width), config.seed) * np.float32(0.02)
        self.prefix = parameter(self, fresh, dtype)

    def forward(self, projection: nn.Layer, _args: tuple[Any, ...], out: Tensor) -> Tensor:
        ctx: SequenceContext = projection.sequence
        if ctx.cache is not None and not ctx.cache.prefilling:
            return out  # the cache has the prefix already
        rows = paddle.to_tensor(virtual_rows(ctx.plan.offsets, self.count))
        values_kD = self.prefix.transpose([1, 0, 2]).reshape([self.count, -1])
        return _SetRows.apply(out, values_kD, rows)


def note_sequence(attention: Attention, args: tuple[Any, ...]) -> None:
    """Pre-hook of an attention layer with prefixes: its projections see only rows, so tell them
    which sequence the rows belong to.
    """
    attention.k_proj.sequence = attention.v_proj.sequence = args[1]


def draw_normal(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """N(0, 1) float32, drawn by name."""
    return np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())])).standard_normal(
        shape, np.float32
    )

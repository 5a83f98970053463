"""Every parameter of a model as (canonical name, shape), from its config alone: counts without
allocation, loading without guessing.

The names are the ones `ErnieModel.state_dict()` has; a test holds the two together. Linear weights
are [in, out] (Paddle's layout).
Legend: V vocabulary, H hidden, E experts of one modality, I expert width, D vision width. Refuses
to know: paddle, files, other schemes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ernie_tune.models.config import ModelConfig, VisionConfig

MODALITIES = ("text", "vision")

ROUTER_BIAS = "e_score_correction_bias"  # the last part of its name in every sparse layer


@dataclass(frozen=True)
class ParameterSpec:
    """Shape of one parameter. `float32`: kept in float32 whatever the model's dtype (routers and
    their biases).
    """

    shape: tuple[int, ...]
    float32: bool = False
    trainable: bool = True  # the correction bias is moved by its own rule, never by a gradient

    @property
    def size(self) -> int:
        return math.prod(self.shape)


Named = Iterator[tuple[str, ParameterSpec]]


def _linear(name: str, n_in: int, n_out: int, bias: bool = False) -> Named:
    yield f"{name}.weight", ParameterSpec((n_in, n_out))
    if bias:
        yield f"{name}.bias", ParameterSpec((n_out,))


def _layer_norm(name: str, width: int) -> Named:
    yield f"{name}.weight", ParameterSpec((width,))
    yield f"{name}.bias", ParameterSpec((width,))


def _swiglu(name: str, width: int, inner: int) -> Named:
    yield from _linear(f"{name}.gate_proj", width, inner)
    yield from _linear(f"{name}.up_proj", width, inner)
    yield from _linear(f"{name}.down_proj", inner, width)


def _moe(name: str, c: ModelConfig) -> Named:
    m, h = c.moe, c.hidden_size
    if m is None:
        raise AssertionError("caller checks is_moe_layer")
    for i in range(m.num_modalities):
        yield f"{name}.gate.weight{'_1' if i else ''}", ParameterSpec((h, m.num_experts), float32=True)
    yield (
        f"{name}.moe_statics.e_score_correction_bias",
        ParameterSpec((m.num_modalities, m.num_experts), float32=True, trainable=False),
    )
    for modality, inner in zip(MODALITIES, m.intermediate_size, strict=False):
        # gate half first
        yield f"{name}.{modality}_experts.up_gate_proj", ParameterSpec((m.num_experts, h, 2 * inner))
        yield f"{name}.{modality}_experts.down_proj", ParameterSpec((m.num_experts, inner, h))
    if m.num_shared_experts:
        yield from _swiglu(f"{name}.shared_experts", h, m.shared_intermediate_size)


def _decoder(c: ModelConfig) -> Named:
    h, hd = c.hidden_size, c.head_dim
    yield "embed_tokens.weight", ParameterSpec((c.vocab_size, h))
    for i in range(c.num_hidden_layers):
        name = f"layers.{i}"
        yield f"{name}.input_layernorm.weight", ParameterSpec((h,))
        for proj, heads in (
            ("q_proj", c.num_attention_heads),
            ("k_proj", c.num_key_value_heads),
            ("v_proj", c.num_key_value_heads),
        ):
            yield from _linear(f"{name}.self_attn.{proj}", h, heads * hd)
        yield from _linear(f"{name}.self_attn.o_proj", c.num_attention_heads * hd, h)
        yield f"{name}.post_attention_layernorm.weight", ParameterSpec((h,))
        if c.is_moe_layer(i):
            yield from _moe(f"{name}.mlp", c)
        else:
            yield from _swiglu(f"{name}.mlp", h, c.intermediate_size)
    yield "norm.weight", ParameterSpec((h,))
    if not c.tie_word_embeddings:
        yield "lm_head.weight", ParameterSpec((h, c.vocab_size))


def _tower(v: VisionConfig) -> Named:
    d = v.hidden_size
    yield from _linear("vision_model.patch_embed.proj", v.patch_dim, d)
    for i in range(v.depth):
        name = f"vision_model.blocks.{i}"
        yield from _layer_norm(f"{name}.norm1", d)
        yield from _linear(f"{name}.attn.qkv", d, 3 * d, bias=True)
        yield from _linear(f"{name}.attn.proj", d, d, bias=True)
        yield from _layer_norm(f"{name}.norm2", d)
        yield from _linear(f"{name}.mlp.fc1", d, v.intermediate_size, bias=True)
        yield from _linear(f"{name}.mlp.fc2", v.intermediate_size, d, bias=True)
    yield from _layer_norm("vision_model.ln", d)


def _resampler(v: VisionConfig, hidden_size: int) -> Named:
    d4 = v.hidden_size * v.spatial_merge_size**2
    for name, n_in in (("spatial_linear", d4), ("temporal_linear", d4 * v.temporal_merge_size)):
        yield from _linear(f"resampler_model.{name}.0", n_in, d4, bias=True)
        yield from _linear(f"resampler_model.{name}.2", d4, d4, bias=True)
        yield from _layer_norm(f"resampler_model.{name}.3", d4)
    yield from _linear("resampler_model.mlp", d4, hidden_size, bias=True)
    yield "resampler_model.after_norm.weight", ParameterSpec((hidden_size,))


def parameter_specs(c: ModelConfig) -> dict[str, ParameterSpec]:
    """All parameters of the model in a fixed order: decoder, tower, resampler."""
    specs = dict(_decoder(c))
    if c.vision is not None:
        specs.update(_tower(c.vision))
        specs.update(_resampler(c.vision, c.hidden_size))
    return specs


def parameter_count(c: ModelConfig, prefix: str = "") -> int:
    """Number of parameters whose canonical name starts with `prefix`; correction biases included,
    as in the published totals.
    """
    return sum(spec.size for name, spec in parameter_specs(c).items() if name.startswith(prefix))

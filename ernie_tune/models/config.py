"""The shape of a model, as frozen data: the canonical form of every dialect of `config.json` (read
and written in `config_dialects.py`).

Refuses to know: files, weights, training settings, paddle.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Widths in channels; `layer_norm_eps` is hard 1e-6 in
    every release.
    """

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    in_channels: int = 3
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_merge_size: int = 2
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch, ordered (channel, row, column)."""
        return self.in_channels * self.patch_size**2


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts. Index 0 of `intermediate_size` is text, index 1
    vision; text-only models have one entry.
    """

    num_experts: int  # per modality
    intermediate_size: tuple[int, ...]
    top_k: int
    num_shared_experts: int
    layer_indices: tuple[int, ...]  # 0-based layers that are sparse
    norm_min: float = 1e-12

    @property
    def num_modalities(self) -> int:
        return len(self.intermediate_size)

    @property
    def shared_intermediate_size(self) -> int:
        """The shared expert is one SwiGLU of the *text* expert width times the count."""
        return self.intermediate_size[0] * self.num_shared_experts


@dataclass(frozen=True)
class TokenIds:
    """Ids of the tokens that the model treats specially. None: the folder's config does not say;
    look it up in the tokenizer.
    """

    pad: int | None = 0
    bos: int | None = 1
    eos: int | None = 2
    image: int | None = None
    image_start: int | None = None
    image_end: int | None = None
    # equal to `image` in Paddle folders, a token of its own in native transformers ones
    video: int | None = None
    video_start: int | None = None
    video_end: int | None = None

    def placeholders(self) -> tuple[int, ...]:
        """Ids whose embedding is overwritten by visual features."""
        return tuple(dict.fromkeys(i for i in (self.image, self.video) if i is not None))

    def markers(self) -> tuple[int, ...]:
        """Start and end ids: text for positions, vision for routing."""
        return tuple(i for i in (self.image_start, self.image_end, self.video_start, self.video_end) if i is not None)


@dataclass(frozen=True)
class ModelConfig:
    """One ERNIE-4.5 model. `vision is None`: text-only; `moe is None`: every layer dense."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    freq_allocation: int = 20
    rope_theta: float = 500000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 131072
    tie_word_embeddings: bool = True
    moe: MoEConfig | None = None
    vision: VisionConfig | None = None
    tokens: TokenIds = field(default_factory=TokenIds)
    dtype: str = "bfloat16"  # what the folder's weights are stored in

    def __post_init__(self) -> None:
        check_config(self)

    def is_moe_layer(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layer_indices

    def replace(self, **changes: Any) -> ModelConfig:
        return dataclasses.replace(self, **changes)


def _require(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


# Far beyond any release: larger numbers are mistakes, and would take hours to be found out.
_LARGEST = {
    "vocab_size": 10**7, "hidden_size": 10**6, "intermediate_size": 10**7, "num_hidden_layers": 2000,
    "num_attention_heads": 10**5, "num_key_value_heads": 10**5, "head_dim": 10**5,
}  # fmt: skip


def check_config(c: ModelConfig) -> None:
    """Refuse shapes that cannot be built, naming both values and the remedy."""
    for name in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ):
        value = getattr(c, name)
        _require(
            isinstance(value, int) and value > 0, f"{name} ({value!r}) must be a positive integer; fix config.json"
        )
        _require(value <= _LARGEST[name], f"{name} ({value!r}) must be at most {_LARGEST[name]:,}; fix config.json")
    _require(
        c.num_attention_heads % c.num_key_value_heads == 0,
        f"num_attention_heads ({c.num_attention_heads}) must be a multiple of num_key_value_heads "
        f"({c.num_key_value_heads}); fix config.json",
    )
    _require(
        c.head_dim % 2 == 0,
        f"head_dim ({c.head_dim}) must be even for rotary pairs; fix hidden_size or num_attention_heads",
    )
    half = c.head_dim // 2
    _require(
        c.vision is None or (0 <= c.freq_allocation <= half and (half - c.freq_allocation) % 2 == 0),
        f"freq_allocation ({c.freq_allocation}) must leave an even number of height/width frequencies of "
        f"head_dim/2 ({half}); "
        "set freq_allocation (or rope mrope_section) to match",
    )
    _check_vision(c)
    _check_moe(c)


def _check_vision(c: ModelConfig) -> None:
    v = c.vision
    if v is None:
        return
    _require(
        v.hidden_size % v.num_heads == 0,
        f"vision hidden_size ({v.hidden_size}) must be a multiple of num_heads ({v.num_heads}); fix vision_config",
    )
    _require(
        (v.hidden_size // v.num_heads) % 4 == 0,
        f"vision head width ({v.hidden_size // v.num_heads}) must be a multiple of 4 for 2-D rope; fix vision "
        "hidden_size or num_heads",
    )
    _require(
        v.spatial_merge_size == 2 and v.temporal_merge_size == 2,
        f"spatial_merge_size ({v.spatial_merge_size}) and temporal_merge_size ({v.temporal_merge_size}) must be "
        "2: no released model has others",
    )


def _check_moe(c: ModelConfig) -> None:
    m = c.moe
    if m is None:
        return
    _require(
        1 <= m.top_k <= m.num_experts,
        f"moe_k ({m.top_k}) must be between 1 and moe_num_experts ({m.num_experts}); lower moe_k",
    )
    want = 1 if c.vision is None else 2
    _require(
        m.num_modalities == want,
        f"moe_intermediate_size {list(m.intermediate_size)} must have {want} value(s) for a "
        f"{'text-only' if want == 1 else 'vision-language'} model; fix config.json",
    )
    bad = [i for i in m.layer_indices if not 0 <= i < c.num_hidden_layers]
    _require(
        not bad,
        f"moe layer indices {bad} must be below num_hidden_layers ({c.num_hidden_layers}); fix "
        "moe_layer_start_index / moe_layer_end_index",
    )

"""The shape of a model, as frozen data: the canonical form of every dialect of `config.json` (read
and written in `config_dialects.py`).

Refuses to know: files, weights, training settings, paddle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ernie_tune.config.language import say


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


def _require(ok: bool, english: str, chinese: str) -> None:
    if not ok:
        raise ValueError(say(english, chinese))


# Far beyond any release: larger numbers are mistakes, and would take hours, or all of the memory,
# to be found out.
_LARGEST = {
    "vocab_size": 10**7, "hidden_size": 10**6, "intermediate_size": 10**7, "num_hidden_layers": 2000,
    "num_attention_heads": 10**5, "num_key_value_heads": 10**5, "head_dim": 10**5,
}  # fmt: skip
_LARGEST_VISION = {
    "depth": 2000, "hidden_size": 10**6, "num_heads": 10**5, "intermediate_size": 10**7, "in_channels": 64,
    "patch_size": 1024, "spatial_merge_size": 64, "temporal_merge_size": 64,
}  # fmt: skip
_LARGEST_MOE = {"num_experts": 10**5, "top_k": 10**5}


def _check_counts(part: object, largest: Mapping[str, int], where: str = "") -> None:
    """Refuse what is no positive integer or beyond any model, in the part of the config that
    `where` names.
    """
    for name, most in largest.items():
        value = getattr(part, name)
        _require(
            type(value) is int and value > 0,
            f"{where}{name} ({value!r}) must be a positive integer; fix config.json",
            f"{where}{name}（{value!r}）须为正整数；请修改 config.json",
        )
        _require(
            value <= most,
            f"{where}{name} ({value!r}) must be at most {most:,}; fix config.json",
            f"{where}{name}（{value!r}）不能超过 {most:,}；请修改 config.json",
        )


def check_config(c: ModelConfig) -> None:
    """Refuse shapes that cannot be built, naming both values and the remedy."""
    _check_counts(c, _LARGEST)
    _require(
        c.num_attention_heads % c.num_key_value_heads == 0,
        f"num_attention_heads ({c.num_attention_heads}) must be a multiple of num_key_value_heads "
        f"({c.num_key_value_heads}); fix config.json",
        f"num_attention_heads（{c.num_attention_heads}）须为 num_key_value_heads（{c.num_key_value_heads}"
        "）的倍数；请修改 config.json",
    )
    _require(
        c.head_dim % 2 == 0,
        f"head_dim ({c.head_dim}) must be even for rotary pairs; fix hidden_size or num_attention_heads",
        f"head_dim（{c.head_dim}）须为偶数（旋转位置编码成对）；请修改 hidden_size 或 num_attention_heads",
    )
    half = c.head_dim // 2
    _require(
        c.vision is None or (0 <= c.freq_allocation <= half and (half - c.freq_allocation) % 2 == 0),
        f"freq_allocation ({c.freq_allocation}) must leave an even number of height/width frequencies of "
        f"head_dim/2 ({half}); "
        "set freq_allocation (or rope mrope_section) to match",
        f"freq_allocation（{c.freq_allocation}）须在 head_dim/2（{half}）中留下偶数个高、宽频率；"
        "请相应修改 freq_allocation（或 rope mrope_section）",
    )
    _check_vision(c)
    _check_moe(c)


def _check_vision(c: ModelConfig) -> None:
    v = c.vision
    if v is None:
        return
    _check_counts(v, _LARGEST_VISION, "vision_config: ")
    _require(
        v.hidden_size % v.num_heads == 0,
        f"vision hidden_size ({v.hidden_size}) must be a multiple of num_heads ({v.num_heads}); fix vision_config",
        f"视觉的 hidden_size（{v.hidden_size}）须为 num_heads（{v.num_heads}）的倍数；请修改 vision_config",
    )
    _require(
        (v.hidden_size // v.num_heads) % 4 == 0,
        f"vision head width ({v.hidden_size // v.num_heads}) must be a multiple of 4 for 2-D rope; fix vision "
        "hidden_size or num_heads",
        f"视觉注意力头的宽度（{v.hidden_size // v.num_heads}）须为 4 的倍数（二维旋转位置编码）；请修改视觉的 "
        "hidden_size 或 num_heads",
    )
    _require(
        v.spatial_merge_size == 2 and v.temporal_merge_size == 2,
        f"spatial_merge_size ({v.spatial_merge_size}) and temporal_merge_size ({v.temporal_merge_size}) must be "
        "2: no released model has others",
        f"spatial_merge_size（{v.spatial_merge_size}）与 temporal_merge_size（{v.temporal_merge_size}"
        "）须为 2：已发布的模型都是如此",
    )


def _check_moe(c: ModelConfig) -> None:
    m = c.moe
    if m is None:
        return
    _check_counts(m, _LARGEST_MOE, "moe ")
    _require(
        m.top_k <= m.num_experts,
        f"moe_k ({m.top_k}) must be between 1 and moe_num_experts ({m.num_experts}); lower moe_k",
        f"moe_k（{m.top_k}）须在 1 与 moe_num_experts（{m.num_experts}）之间；请调小 moe_k",
    )
    _require(
        type(m.num_shared_experts) is int and 0 <= m.num_shared_experts <= _LARGEST_MOE["num_experts"],
        f"moe_num_shared_experts ({m.num_shared_experts!r}) must be from 0 to {_LARGEST_MOE['num_experts']:,}; "
        "fix config.json",
        f"moe_num_shared_experts（{m.num_shared_experts!r}）须在 0 与 {_LARGEST_MOE['num_experts']:,} 之间；"
        "请修改 config.json",
    )
    want = 1 if c.vision is None else 2
    _require(
        m.num_modalities == want,
        f"moe_intermediate_size {list(m.intermediate_size)} must have {want} value(s) for a "
        f"{'text-only' if want == 1 else 'vision-language'} model; fix config.json",
        f"{'纯文本' if want == 1 else '视觉语言'}模型的 moe_intermediate_size {list(m.intermediate_size)} 须有 "
        f"{want} 个值；请修改 config.json",
    )
    wide = [width for width in m.intermediate_size if not 0 < width <= _LARGEST["intermediate_size"]]
    _require(
        not wide,
        f"moe_intermediate_size {wide} must be from 1 to {_LARGEST['intermediate_size']:,}; fix config.json",
        f"moe_intermediate_size {wide} 须在 1 与 {_LARGEST['intermediate_size']:,} 之间；请修改 config.json",
    )
    bad = [i for i in m.layer_indices if not 0 <= i < c.num_hidden_layers]
    _require(
        not bad,
        f"moe layer indices {bad} must be below num_hidden_layers ({c.num_hidden_layers}); fix "
        "moe_layer_start_index / moe_layer_end_index",
        f"MoE 层的序号 {bad} 须小于 num_hidden_layers（{c.num_hidden_layers}）；请修改 "
        "moe_layer_start_index / moe_layer_end_index",
    )

"""Every dialect of `config.json` <-> `ModelConfig`.

legacy: the -PT releases (`ernie4_5_moe_vl`, flat, `torch_dtype`); paddle: the -Paddle releases
(same keys, `dtype`); native: transformers 5 (`ernie4_5_vl_moe`, nested). The text-only siblings
(`ernie4_5`, `ernie4_5_moe`) are flat in all three.
Refuses to know: files, weights, paddle. A key that would change the numbers is refused, never
ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig, MoEConfig, TokenIds, VisionConfig
from ernie_tune.models.config_values import boolean, dtype_of, integer, number, per_modality, value_of

DIALECTS = ("legacy", "paddle", "native")
MODEL_TYPES = ("ernie4_5_moe_vl", "ernie4_5_vl_moe", "ernie4_5", "ernie4_5_moe")
_NATIVE = "ernie4_5_vl_moe"

_VISION_ALIASES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("embed_dim",),
    "in_channels": ("in_chans",),
    "patch_size": ("spatial_patch_size",),
    "layer_norm_eps": ("rms_norm_eps",),  # transformers' name for what is a LayerNorm epsilon
}

# keys whose other values would need other code (absent and null mean the value here)
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "use_bias": False,
    "use_rmsnorm": True,
    "compression_ratio": 1.0,
}
_FIXED_MOE: dict[str, Any] = {
    "moe_gate": "topk",
    "moe_gate_act": "softmax",
    "scoring_func": "softmax",
    "moe_norm_gate_logits": True,
    "moe_use_aux_free": True,
    "moe_group_experts": False,
}
_FIXED_VL: dict[str, Any] = {
    "rope_3d": True,
    "moe_use_hard_gate": True,
    "moe_dense_experts_token_type_id": 3,
    "moe_use_token_type_bias": False,
    "use_temporal_conv": True,
    "mm_vocab_size": 0,
}


# --- reading --------------------------------------------------------------------------------------


def read_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape that a parsed `config.json` describes, in whichever dialect it is written.

    Raises ValueError naming the key, its value and the remedy: unknown `model_type`, missing or
    contradictory keys, shapes and options that this library does not implement.
    """
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        close = difflib.get_close_matches(str(model_type), MODEL_TYPES, n=1, cutoff=0.6)
        hint = say("only ERNIE-4.5 models are supported", "只支持 ERNIE-4.5 模型")
        hint = say(f"did you mean {close[0]!r}?", f"是否为 {close[0]!r}？") if close else hint
        raise ValueError(
            say(
                "model_type ({found}) must be one of {names}; {hint}",
                "model_type（{found}）须为 {names} 之一；{hint}",
                found=repr(model_type),
                names=list(MODEL_TYPES),
                hint=hint,
            )
        )
    if raw.get("quantization_config") is not None:
        raise ValueError(
            say(
                f"quantization_config ({raw['quantization_config']!r}) must be absent: training starts from "
                "unquantised weights; use the bfloat16 release",
                f"不能有 quantization_config（{raw['quantization_config']!r}）：训练从未量化的权重开始；请用 bfloat16 版本",
            )
        )
    flat = _flatten(raw)
    has_vision = "vl" in str(model_type)
    _check_fixed(flat, _FIXED)
    if has_vision:
        _check_fixed(flat, _FIXED_VL)
    vision = _read_vision(flat) if has_vision else None
    heads = integer(flat, "num_attention_heads")
    head_dim = _head_dim(flat, heads)
    return ModelConfig(
        vocab_size=integer(flat, "vocab_size"),
        hidden_size=integer(flat, "hidden_size"),
        intermediate_size=integer(flat, "intermediate_size"),
        num_hidden_layers=integer(flat, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=integer(flat, "num_key_value_heads", heads),
        head_dim=head_dim,
        freq_allocation=_freq_allocation(flat, head_dim) if has_vision else 20,
        rope_theta=_rope_theta(flat),
        rms_norm_eps=number(flat, "rms_norm_eps", 1e-5),
        max_position_embeddings=integer(flat, "max_position_embeddings", 131072),
        tie_word_embeddings=boolean(flat, "tie_word_embeddings", True),
        moe=_read_moe(flat, modalities=2 if has_vision else 1),
        vision=vision,
        tokens=_read_tokens(flat, has_vision),
        dtype=dtype_of(flat),
    )


def _flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One level of keys: the top level wins over `text_config`, since transformers ignores the
    latter's tie flag.
    """
    text = dict(raw.get("text_config") or {})
    text.pop("tie_word_embeddings", None)
    flat = {**text, **{k: v for k, v in raw.items() if k != "text_config"}}
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if raw.get(key) is None and text.get(key) is not None:
            flat[key] = text[key]
    return flat


def _check_fixed(flat: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    for key, want in fixed.items():
        value = flat.get(key)
        if value is not None and value != want:
            raise ValueError(
                say(
                    f"{key} ({value!r}) must be {want!r}: no released ERNIE-4.5 has another value; use a "
                    f"checkpoint trained with {want!r}",
                    f"{key}（{value!r}）须为 {want!r}：已发布的 ERNIE-4.5 都是如此；请用以 {want!r} 训练的权重",
                )
            )


def _head_dim(flat: Mapping[str, Any], heads: int) -> int:
    hidden = integer(flat, "hidden_size")
    if flat.get("head_dim") is not None:
        return integer(flat, "head_dim")
    if heads < 1 or hidden % heads:
        raise ValueError(
            say(
                f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}) when head_dim is "
                "absent; add head_dim to config.json",
                f"没有 head_dim 时，hidden_size（{hidden}）须为 num_attention_heads（{heads}）的整数倍；请在 config.json 中写明 head_dim",
            )
        )
    return hidden // heads


def _rope_sections(flat: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """`rope_parameters` and `rope_scaling`, whichever exist; only the plain kind is implemented."""
    sections = []
    for key in ("rope_parameters", "rope_scaling"):
        section = flat.get(key)
        if section is None:
            continue
        kind = section.get("rope_type", section.get("type", "default")) if isinstance(section, Mapping) else section
        if kind != "default":
            raise ValueError(
                say(
                    f"{key} ({section!r}) must have type 'default': scaled rotary embeddings are not implemented; "
                    "use a checkpoint without them",
                    f"{key}（{section!r}）的 type 须为 'default'：未实现缩放的旋转位置编码；请用不含它的权重",
                )
            )
        sections.append(section)
    return sections


def _rope_theta(flat: Mapping[str, Any]) -> float:
    found = {
        f"rope_theta {i}": s["rope_theta"]
        for i, s in enumerate([flat, *_rope_sections(flat)])
        if s.get("rope_theta") is not None
    }
    if len({float(v) for v in found.values()}) > 1:
        raise ValueError(
            say(
                f"rope_theta ({sorted(found.values())}) must be one number: config.json says two; keep one of them",
                f"rope_theta（{sorted(found.values())}）只能有一个值，而 config.json 中有两个；请只留其一",
            )
        )
    return float(next(iter(found.values()), 500000.0))


def _freq_allocation(flat: Mapping[str, Any], head_dim: int) -> int:
    """Frequencies of the time axis: `freq_allocation`, or the last entry of `mrope_section`
    [height, width, time].
    """
    section = next((s["mrope_section"] for s in _rope_sections(flat) if s.get("mrope_section") is not None), None)
    if section is None:
        return integer(flat, "freq_allocation", 20)
    if len(section) != 3 or section[0] != section[1] or sum(section) != head_dim // 2:
        raise ValueError(
            say(
                f"mrope_section ({section!r}) must be [h, w, t] with h = w and h + w + t = head_dim/2 "
                f"({head_dim // 2}); fix config.json",
                f"mrope_section（{section!r}）须为 [h, w, t]，h = w 且 h + w + t = head_dim/2（{head_dim // 2}）；请修改 "
                "config.json",
            )
        )
    allocation = integer(flat, "freq_allocation", section[2])
    if allocation != section[2]:
        raise ValueError(
            say(
                f"freq_allocation ({allocation}) must equal the last entry of mrope_section ({section!r}); keep "
                "one of them",
                f"freq_allocation（{allocation}）须等于 mrope_section（{section!r}）的最后一项；请只留其一",
            )
        )
    return allocation


def _read_vision(flat: Mapping[str, Any]) -> VisionConfig:
    raw = flat.get("vision_config")
    if not isinstance(raw, Mapping):
        raise ValueError(
            say(
                f"vision_config ({raw!r}) must be a table for model_type {flat['model_type']!r}; use the "
                "config.json that came with the weights",
                f"model_type 为 {flat['model_type']!r} 时，vision_config（{raw!r}）须为一组键值；请用权重自带的 config.json",
            )
        )
    if raw.get("hidden_act") not in (None, "quick_gelu"):
        raise ValueError(
            say(
                f"vision hidden_act ({raw['hidden_act']!r}) must be 'quick_gelu': no released tower has another; "
                "use a checkpoint with it",
                f"视觉部分的 hidden_act（{raw['hidden_act']!r}）须为 'quick_gelu'：已发布的视觉塔都是如此；请用这样的权重",
            )
        )
    hidden = integer(raw, "hidden_size", aliases=_VISION_ALIASES)
    pixel = flat.get("pixel_hidden_size")
    if pixel is not None and pixel != hidden:
        raise ValueError(
            say(
                f"pixel_hidden_size ({pixel}) must equal vision hidden_size ({hidden}); fix config.json",
                f"pixel_hidden_size（{pixel}）须等于视觉部分的 hidden_size（{hidden}）；请修改 config.json",
            )
        )
    intermediate = integer(raw, "intermediate_size", round(hidden * number(raw, "mlp_ratio", 4)))
    merges = {**{k: v for k, v in flat.items() if "conv_size" in k}, **raw}
    rope = raw.get("rope_parameters") or {}
    return VisionConfig(
        depth=integer(raw, "depth"),
        hidden_size=hidden,
        num_heads=integer(raw, "num_heads"),
        intermediate_size=intermediate,
        in_channels=integer(raw, "in_channels", 3, _VISION_ALIASES),
        patch_size=integer(raw, "patch_size", 14, _VISION_ALIASES),
        spatial_merge_size=integer(merges, "spatial_merge_size", 2),
        temporal_merge_size=integer(merges, "temporal_merge_size", 2),
        layer_norm_eps=number(raw, "layer_norm_eps", 1e-6, _VISION_ALIASES),
        rope_theta=number(rope, "rope_theta", 10000.0),
    )


def _read_moe(flat: Mapping[str, Any], modalities: int) -> MoEConfig | None:
    experts = per_modality(flat, "moe_num_experts", modalities, default=0)
    if not any(experts):
        return None
    _check_fixed(flat, _FIXED_MOE)
    if len(set(experts)) > 1:
        raise ValueError(
            say(
                f"moe_num_experts ({list(experts)}) must have equal entries: text and vision routers share one "
                "width; use a checkpoint with equal ones",
                f"moe_num_experts（{list(experts)}）各项须相等：文本与视觉的路由宽度相同；请用各项相等的权重",
            )
        )
    return MoEConfig(
        num_experts=experts[0],
        intermediate_size=per_modality(flat, "moe_intermediate_size", modalities),
        top_k=integer(flat, "moe_k"),
        num_shared_experts=integer(flat, "moe_num_shared_experts", 0),
        layer_indices=_sparse_layers(flat, integer(flat, "num_hidden_layers"), modalities),
        norm_min=number(flat, "moe_norm_min", 1e-12),
    )


def _sparse_layers(flat: Mapping[str, Any], depth: int, modalities: int) -> tuple[int, ...]:
    types = flat.get("mlp_layer_types")
    if types is not None:
        if len(types) != depth or any(t not in ("dense", "sparse") for t in types):
            raise ValueError(
                say(
                    f"mlp_layer_types ({types!r}) must be 'dense' or 'sparse' for each of num_hidden_layers "
                    f"({depth}); fix config.json",
                    f"mlp_layer_types（{types!r}）须对 num_hidden_layers（{depth}）的每一层写 'dense' 或 'sparse'；请修改 config.json",
                )
            )
        layers = tuple(i for i, t in enumerate(types) if t == "sparse")
    elif flat["model_type"] == _NATIVE and flat.get("moe_layer_start_index") is None:
        # transformers' default: the first layer dense, the rest sparse
        layers = tuple(range(1, depth))
    else:
        layers = _indexed_layers(flat, depth, modalities)
    if not layers:
        raise ValueError(
            say(
                f"moe_num_experts ({flat.get('moe_num_experts')!r}) must be 0 where no layer is sparse; remove "
                "it, or fix the layer indices",
                f"没有稀疏层时 moe_num_experts（{flat.get('moe_num_experts')!r}）须为 0；请删去它，或修改层号",
            )
        )
    return layers


def _indexed_layers(flat: Mapping[str, Any], depth: int, modalities: int) -> tuple[int, ...]:
    """Layers start..end (inclusive, clipped to the depth) whose 1-based number is a multiple of the
    interval.
    """
    starts = per_modality(flat, "moe_layer_start_index", modalities)
    ends = tuple(
        depth - 1 if end == -1 else min(end, depth - 1)
        for end in per_modality(flat, "moe_layer_end_index", modalities, default=-1)
    )
    for key, values in (("moe_layer_start_index", starts), ("moe_layer_end_index", ends)):
        if min(values) < 0:
            raise ValueError(
                say(
                    f"{key} ({flat[key]!r}) must be a layer number, or -1 for the last layer as the end; fix "
                    "config.json",
                    f"{key}（{flat[key]!r}）须为层号，作为终点时可用 -1 表示最后一层；请修改 config.json",
                )
            )
        if len(set(values)) > 1:
            raise ValueError(
                say(
                    f"{key} ({flat[key]!r}) must be the same layer for text and vision within the {depth} layers: "
                    "a layer with experts of one modality only is not implemented; use a checkpoint with equal ranges",
                    f"在 {depth} 层之内，{key}（{flat[key]!r}）对文本与视觉须为同一层：未实现只有一种模态专家的层；请用范围相同的权重",
                )
            )
    interval = integer(flat, "moe_layer_interval", 1)
    if interval < 1:
        raise ValueError(
            say(
                f"moe_layer_interval ({interval}) must be at least 1; fix config.json",
                f"moe_layer_interval（{interval}）至少为 1；请修改 config.json",
            )
        )
    return tuple(layer for layer in range(starts[0], ends[0] + 1) if (layer + 1) % interval == 0)


def _read_tokens(flat: Mapping[str, Any], has_vision: bool) -> TokenIds:
    def special(key: str, default: int | None) -> int | None:
        if value_of(flat, key, None) is not None:
            return integer(flat, key)
        return None if key in flat else default  # an explicit null: the tokenizer knows

    text = TokenIds(special("pad_token_id", 0), special("bos_token_id", 1), special("eos_token_id", 2))
    if not has_vision:
        return text
    image = special("image_token_id", None)
    return TokenIds(
        text.pad,
        text.bos,
        text.eos,
        image=image,
        image_start=special("image_start_token_id", None),
        image_end=special("image_end_token_id", None),
        # one placeholder for both, except in transformers' conversion
        video=special("video_token_id", image),
        video_start=special("video_start_token_id", None),
        video_end=special("video_end_token_id", None),
    )


# --- writing --------------------------------------------------------------------------------------


def write_config(config: ModelConfig, dialect: str) -> dict[str, Any]:
    """The `config.json` of `config` in one of `DIALECTS`; `read_config` gives `config` back.

    Exactly one of `dtype` (paddle, native) and `torch_dtype` (legacy) is written: FastDeploy takes
    it for the weight layout.
    Raises ValueError for an unknown dialect, and for sparse layers that the flat dialects cannot
    express.
    """
    if dialect not in DIALECTS:
        raise ValueError(
            say(
                f"dialect ({dialect!r}) must be one of {list(DIALECTS)}; choose one of them",
                f"dialect（{dialect!r}）须为 {list(DIALECTS)} 之一；请选择其一",
            )
        )
    dtype_key = "torch_dtype" if dialect == "legacy" else "dtype"
    head = {dtype_key: config.dtype, "tie_word_embeddings": config.tie_word_embeddings}
    if config.vision is None:
        return {**_write_text_only(config), **head}
    if dialect == "native":
        return {**_write_native(config, config.vision), **head}
    return {**_write_flat_vl(config, config.vision, paddle=dialect == "paddle"), **head}


def _write_decoder(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "use_bias": False,
        "use_cache": True,
    }


def _write_special_tokens(t: TokenIds) -> dict[str, Any]:
    return {"pad_token_id": t.pad, "bos_token_id": t.bos, "eos_token_id": t.eos}


def _present(values: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if v is not None}


def _write_moe(m: MoEConfig) -> dict[str, Any]:
    return {"moe_k": m.top_k, "moe_num_shared_experts": m.num_shared_experts, "moe_norm_min": m.norm_min}


def _layer_range(m: MoEConfig, depth: int) -> dict[str, int]:
    """start, end and interval whose rule gives exactly `m.layer_indices`."""
    start, end = min(m.layer_indices), max(m.layer_indices)
    for interval in range(1, depth + 1):
        if m.layer_indices == tuple(i for i in range(start, end + 1) if (i + 1) % interval == 0):
            return {"moe_layer_start_index": start, "moe_layer_end_index": end, "moe_layer_interval": interval}
    raise ValueError(
        say(
            f"moe layer_indices ({list(m.layer_indices)}) must be a range with one interval in this dialect; "
            "save with flavour='hf_saved', whose config.json lists every layer",
            f"moe 的 layer_indices（{list(m.layer_indices)}）在此写法中须为一段等间隔的层；请用 flavour='hf_saved' 保存，其 config.json 逐层列出",
        )
    )


def _write_text_only(c: ModelConfig) -> dict[str, Any]:
    raw = {**_write_decoder(c), **_write_special_tokens(c.tokens), "rope_theta": c.rope_theta}
    if c.moe is None:
        return {"architectures": ["Ernie4_5_ForCausalLM"], "model_type": "ernie4_5", **raw}
    experts = {
        "moe_num_experts": c.moe.num_experts,
        "moe_intermediate_size": c.moe.intermediate_size[0],
        "moe_gate": "topk",
        "moe_use_aux_free": True,
    }
    layers = _layer_range(c.moe, c.num_hidden_layers)
    return {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "model_type": "ernie4_5_moe",
        **raw,
        **experts,
        **layers,
        **_write_moe(c.moe),
    }


def _write_flat_vl(c: ModelConfig, v: VisionConfig, paddle: bool) -> dict[str, Any]:
    t = c.tokens
    markers = {
        "image_start": t.image_start,
        "image_end": t.image_end,
        "video_start": t.video_start,
        "video_end": t.video_end,
    }
    # PaddleFormers' positions and vLLM's routing read the `_token_id` names, in every layout; the
    # code beside the -PT releases reads the short ones.
    tokens = _present(
        {
            "im_patch_id": t.image,
            **{f"{name}_token_id": i for name, i in markers.items()},
            **({} if paddle else markers),
            "video_token_id": None if t.video == t.image else t.video,
        }
    )
    ratio = v.intermediate_size / v.hidden_size
    vision = {
        "attn_implementation": "eager",
        "attn_sep": True,
        "depth": v.depth,
        "embed_dim": v.hidden_size,
        "hidden_act": "quick_gelu",
        "hidden_size": v.hidden_size,
        "in_channels": v.in_channels,
        "in_chans": v.in_channels,
        "mlp_ratio": int(ratio) if ratio.is_integer() else ratio,
        "num_heads": v.num_heads,
        "patch_size": v.patch_size,
        "spatial_merge_size": v.spatial_merge_size,
        "spatial_patch_size": v.patch_size,
    }
    if v.layer_norm_eps != 1e-6:
        vision["layer_norm_eps"] = v.layer_norm_eps
    if v.rope_theta != 10000.0:
        vision["rope_parameters"] = {"rope_theta": v.rope_theta}
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": "ernie4_5_moe_vl",
        **_write_decoder(c),
        **_write_special_tokens(t),
        **tokens,
        "rope_theta": c.rope_theta,
        "rope_3d": True,
        "freq_allocation": c.freq_allocation,
        "use_rmsnorm": True,
        **_write_flat_vl_moe(c),
        "spatial_conv_size": v.spatial_merge_size,
        "temporal_conv_size": v.temporal_merge_size,
        "pixel_hidden_size": v.hidden_size,
        "vision_config": vision,
    }


def _write_flat_vl_moe(c: ModelConfig) -> dict[str, Any]:
    if c.moe is None:
        return {"moe_num_experts": 0}
    layers = _layer_range(c.moe, c.num_hidden_layers)
    return {
        **_write_moe(c.moe),
        "moe_num_experts": [c.moe.num_experts] * 2,
        "moe_intermediate_size": list(c.moe.intermediate_size),
        "moe_layer_start_index": [layers["moe_layer_start_index"]] * 2,
        "moe_layer_end_index": [layers["moe_layer_end_index"]] * 2,
        "moe_layer_interval": layers["moe_layer_interval"],
        "moe_gate": "topk",
        "moe_use_aux_free": True,
        "moe_use_hard_gate": True,
        "moe_capacity": [2 * c.moe.num_experts] * 3,  # an expert can take every token: nothing is dropped
        # without it PaddleFormers routes wrongly
        "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
    }


def _write_native(c: ModelConfig, v: VisionConfig) -> dict[str, Any]:
    t, side = c.tokens, (c.head_dim // 2 - c.freq_allocation) // 2
    text: dict[str, Any] = {
        "model_type": f"{_NATIVE}_text",
        **_write_decoder(c),
        **_write_special_tokens(t),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": c.rope_theta,
            "mrope_section": [side, side, c.freq_allocation],
        },
        "mlp_layer_types": ["sparse" if c.is_moe_layer(i) else "dense" for i in range(c.num_hidden_layers)],
    }
    if c.moe is not None:
        text |= {
            "moe_num_experts": c.moe.num_experts,
            "moe_intermediate_size": list(c.moe.intermediate_size),
            **_write_moe(c.moe),
        }
    vision = {
        "model_type": f"{_NATIVE}_vision",
        "depth": v.depth,
        "hidden_act": "quick_gelu",
        "hidden_size": v.hidden_size,
        "in_channels": v.in_channels,
        "intermediate_size": v.intermediate_size,
        "num_heads": v.num_heads,
        "patch_size": v.patch_size,
        "rms_norm_eps": v.layer_norm_eps,
        "rope_parameters": {"rope_type": "axial", "rope_theta": v.rope_theta},
        "spatial_merge_size": v.spatial_merge_size,
        "temporal_merge_size": v.temporal_merge_size,
    }
    tokens = {
        "image_token_id": t.image,
        "image_start_token_id": t.image_start,
        "image_end_token_id": t.image_end,
        "video_token_id": t.video,
        "video_start_token_id": t.video_start,
        "video_end_token_id": t.video_end,
    }
    return {
        "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
        "model_type": _NATIVE,
        **_present(tokens),
        "text_config": text,
        "vision_config": vision,
    }

"""A preset as the model of transformers 5.23, with the golden weights, in float64 or bfloat16.
Needs torch and transformers.

Refuses to know: which cases are run and what is stored of them (`make_goldens.py`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration
from transformers.models.ernie4_5_vl_moe import modeling_ernie4_5_vl_moe as modeling
from weights import golden_weights

from ernie_tune.models.config import ModelConfig
from ernie_tune.models.inputs import Row
from ernie_tune.models.specs import MODALITIES, parameter_specs

# transformers tells videos from images by the id; every preset uses the image's. The embedding row
# is overwritten anyway.
HF_VIDEO_ID = 605
_BIAS = ".moe_statics.e_score_correction_bias"
_RENAMES = (
    (r"^vision_model\.", "model.vision_tower."),
    (r"^resampler_model\.", "model.resampler_model."),
    (r"^(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"_linear\.0\.", "_linear.fc1."),
    (r"_linear\.2\.", "_linear.fc2."),
    (r"_linear\.3\.", "_linear.ln."),
    (r"mlp\.gate\.weight$", "mlp.text_moe.gate.weight"),
    (r"mlp\.gate\.weight_1$", "mlp.vision_moe.gate.weight"),
    (r"(text|vision)_experts\.up_gate_proj$", r"\1_moe.experts.gate_up_proj"),
    (r"(text|vision)_experts\.down_proj$", r"\1_moe.experts.down_proj"),
)


def hf_name(name: str) -> str:
    """The live transformers name of a canonical parameter."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


def swap_layout(name: str, values: np.ndarray) -> np.ndarray:
    """Canonical [in, out] <-> torch [out, in], routers and stacked experts included; embeddings and
    vectors are the same in both.
    """
    return values if values.ndim == 1 or name == "embed_tokens.weight" else values.swapaxes(-1, -2)


def _state_dict(config: ModelConfig) -> dict[str, torch.Tensor]:
    state = {}
    for name, values in golden_weights(config).items():
        if name.endswith(_BIAS):
            for row, modality in zip(values, MODALITIES, strict=True):
                state[f"model.language_model.{name.replace(_BIAS, f'.{modality}_moe.gate{_BIAS}')}"] = torch.tensor(
                    row[None]
                )
        else:
            state[hf_name(name)] = torch.tensor(np.ascontiguousarray(swap_layout(name, values)))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    return state


def hf_config(config: ModelConfig) -> Ernie4_5_VLMoeConfig:
    moe, vision, tokens = config.moe, config.vision, config.tokens
    spatial = (config.head_dim // 2 - config.freq_allocation) // 2
    text = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": [spatial, spatial, config.freq_allocation],
        },
        "mlp_layer_types": ["sparse" if config.is_moe_layer(i) else "dense" for i in range(config.num_hidden_layers)],
        "moe_intermediate_size": list(moe.intermediate_size),
        "moe_k": moe.top_k,
        "moe_num_experts": moe.num_experts,
        "moe_num_shared_experts": moe.num_shared_experts,
    }
    tower = {
        "depth": vision.depth,
        "hidden_size": vision.hidden_size,
        "num_heads": vision.num_heads,
        "intermediate_size": vision.intermediate_size,
    }
    return Ernie4_5_VLMoeConfig(
        text_config=text,
        vision_config=tower,
        image_token_id=tokens.image,
        video_token_id=HF_VIDEO_ID,
        image_start_token_id=tokens.image_start,
        image_end_token_id=tokens.image_end,
        video_start_token_id=tokens.video_start,
        video_end_token_id=tokens.video_end,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="eager",
        experts_implementation="eager",
    )


class _DoubleTorch:
    """`torch` with float32 meaning float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def all_float64() -> Iterator[None]:
    """Turn transformers' casts to float32 (norms, softmax, routers, rope, loss) into casts to
    float64: a reference without rounding.
    """
    to_float = torch.Tensor.float
    modeling.torch, torch.Tensor.float = _DoubleTorch(), torch.Tensor.double
    try:
        yield
    finally:
        modeling.torch, torch.Tensor.float = torch, to_float


def build(config: ModelConfig, dtype: torch.dtype) -> Ernie4_5_VLMoeForConditionalGeneration:
    """The model with the golden weights. In bfloat16 the routers stay in float32, as
    `from_pretrained` leaves them.
    """
    model = Ernie4_5_VLMoeForConditionalGeneration(hf_config(config)).eval()
    # parameters only: `model.to` would round the rope frequencies too
    for name, parameter in model.named_parameters():
        router = "moe.gate." in name
        parameter.data = parameter.data.to(torch.float32 if router and dtype == torch.bfloat16 else dtype)
    model.load_state_dict(_state_dict(config), strict=True)
    expected = sum(spec.size for spec in parameter_specs(config).values())
    found = sum(parameter.numel() for parameter in model.parameters())
    assert found == expected, f"transformers has {found} parameters, the preset {expected}"
    return model


def hf_inputs(row: Row, config: ModelConfig, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Keyword arguments of the transformers model for one row: videos get their own id, tensor and
    type.
    """
    ids = torch.tensor(row.input_ids_L)[None].clone()
    types = torch.zeros_like(ids)
    routing = torch.isin(ids, torch.tensor(config.tokens.markers())).long()
    inputs: dict[str, torch.Tensor] = {}
    if row.grid_thw_n3 is not None:
        is_video_n = row.grid_thw_n3[:, 0] > 1
        features_n = np.where(is_video_n, row.grid_thw_n3.prod(1) // 8, row.grid_thw_n3.prod(1) // 4)
        kinds = torch.tensor(np.repeat(is_video_n + 1, features_n))
        types[ids == config.tokens.image] = kinds
        ids[types == 2] = HF_VIDEO_ID
        is_video_P = np.repeat(is_video_n, row.grid_thw_n3.prod(1))
        for wanted, pixels, grid in (
            (False, "pixel_values", "image_grid_thw"),
            (True, "pixel_values_videos", "video_grid_thw"),
        ):
            if (is_video_n == wanted).any():
                inputs[pixels] = torch.tensor(row.pixel_values_PC[is_video_P == wanted]).to(dtype)
                inputs[grid] = torch.tensor(row.grid_thw_n3[is_video_n == wanted])
    return {"input_ids": ids, "mm_token_type_ids": types, "moe_mm_token_type_ids": types | routing, **inputs}

"""config.json in every dialect: the published key tables, a
transformers-written file, round trips, and each refusal.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from ernie_tune.models.config import ModelConfig, TokenIds
from ernie_tune.models.config_dialects import DIALECTS, read_config, write_config
from ernie_tune.models.presets import PRESETS

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_a"

# the published 28B -PT file, key by key
PT_28B: dict[str, Any] = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_ernie4_5_vl.Ernie4_5_VLMoEConfig"},
    "model_type": "ernie4_5_moe_vl",
    "hidden_size": 2560,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "intermediate_size": 12288,
    "hidden_act": "silu",
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "rope_3d": True,
    "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]},
    "use_bias": False,
    "use_rmsnorm": True,
    "tie_word_embeddings": True,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512],
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "moe_layer_interval": 1,
    "moe_gate": "topk",
    "moe_use_aux_free": True,
    "moe_capacity": [128, 128, 128],
    "moe_multimodal_dispatch_use_allgather": "v2-alltoall-unpad-text",
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "pixel_hidden_size": 1280,
    "im_patch_id": 100295,
    "image_start": 101304,
    "image_end": 101305,
    "video_start": 101306,
    "video_end": 101307,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "hidden_act": "quick_gelu",
        "in_channels": 3,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "attn_implementation": "eager",
        "attn_sep": True,
        "vit_first_fwd_bsz": 128,
    },
}
# the 28B -Paddle file: minus auto_map, token ids, max_position_embeddings and rope_scaling; `dtype`
_PT_ONLY = "auto_map im_patch_id image_start image_end video_start video_end pad_token_id bos_token_id eos_token_id max_position_embeddings rope_scaling torch_dtype"
PADDLE_28B = {k: v for k, v in PT_28B.items() if k not in _PT_ONLY.split()} | {"dtype": "bfloat16"}
# the published 424B -Paddle file
PADDLE_424B: dict[str, Any] = {
    "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
    "model_type": "ernie4_5_moe_vl",
    "hidden_size": 8192,
    "num_hidden_layers": 54,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "intermediate_size": 28672,
    "hidden_act": "silu",
    "vocab_size": 103424,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "rope_3d": True,
    "freq_allocation": 20,
    "use_bias": False,
    "use_rmsnorm": True,
    "tie_word_embeddings": False,
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [3584, 1536],
    "moe_k": 8,
    "moe_layer_start_index": 3,
    "moe_layer_interval": 1,
    "moe_gate": "topk",
    "moe_use_aux_free": True,
    "moe_capacity": [64, 64, 64],
    "loss_subbatch_seqlen": 8192,
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "dtype": "bfloat16",
    "vision_config": {k: v for k, v in PT_28B["vision_config"].items() if k != "vit_first_fwd_bsz"},
}
# text-only siblings as published for transformers
PT_0_3B: dict[str, Any] = {
    "architectures": ["Ernie4_5_ForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "max_position_embeddings": 131072,
    "model_type": "ernie4_5",
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "num_hidden_layers": 18,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "use_cache": False,
    "vocab_size": 103424,
    "rope_theta": 500000,
    "use_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
PT_21B: dict[str, Any] = PT_0_3B | {
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "model_type": "ernie4_5_moe",
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_intermediate_size": 1536,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 27,
    "moe_layer_interval": 1,
    "num_nextn_predict_layers": 1,
}
NO_IMAGE_IDS = TokenIds()


def changed(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    out = copy.deepcopy(raw)
    for key, value in changes.items():
        table = out
        *parents, last = key.split("__")
        for parent in parents:
            table = table[parent]
        if value is ...:
            del table[last]
        else:
            table[last] = value
    return out


def golden() -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())
    return raw


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (PT_28B, PRESETS["ernie-4.5-vl-28b-a3b"]),
        (PADDLE_28B, PRESETS["ernie-4.5-vl-28b-a3b"].replace(tokens=NO_IMAGE_IDS)),
        (PADDLE_424B, PRESETS["ernie-4.5-vl-424b-a47b"].replace(tokens=NO_IMAGE_IDS)),
        (PT_0_3B, PRESETS["ernie-4.5-0.3b"]),
        (PT_21B, PRESETS["ernie-4.5-21b-a3b"]),
    ],
    ids=["28b-pt", "28b-paddle", "424b-paddle", "0.3b", "21b"],
)
def test_published_files(raw: dict[str, Any], expected: ModelConfig) -> None:
    assert read_config(raw) == expected


def test_file_written_by_transformers_is_tiny_a() -> None:
    tokens = TokenIds(
        None, None, None, image=602, image_start=600, image_end=601, video=605, video_start=603, video_end=604
    )
    assert read_config(golden()) == PRESETS["tiny-a"].replace(tokens=tokens)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str, dialect: str) -> None:
    config = PRESETS[name]
    raw = json.loads(json.dumps(write_config(config, dialect)))
    assert read_config(raw) == config
    assert ("torch_dtype" in raw, "dtype" in raw) == (dialect == "legacy", dialect != "legacy")


@pytest.mark.parametrize("dialect", DIALECTS)
def test_round_trip_of_unusual_values(dialect: str) -> None:
    base = PRESETS["tiny-a"]
    assert base.moe is not None
    assert base.vision is not None
    config = base.replace(
        num_hidden_layers=7,
        moe=dataclasses.replace(base.moe, layer_indices=(1, 3, 5), num_shared_experts=0, norm_min=1e-9),
        vision=dataclasses.replace(base.vision, intermediate_size=100, layer_norm_eps=1e-5, rope_theta=5000.0),
        tokens=dataclasses.replace(base.tokens, pad=None, video=605),
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        dtype="float16",
    )
    assert read_config(write_config(config, dialect)) == config
    dense = config.replace(moe=None)
    assert read_config(write_config(dense, dialect)) == dense


def test_paddle_dialect_has_what_paddleformers_asserts() -> None:
    raw = write_config(PRESETS["ernie-4.5-vl-424b-a47b"], "paddle")
    ids = {k: raw[k] for k in ("im_patch_id", "image_start_token_id", "video_start_token_id", "pixel_hidden_size")}
    assert ids == {
        "im_patch_id": 100295,
        "image_start_token_id": 101304,
        "video_start_token_id": 101306,
        "pixel_hidden_size": 1280,
    }
    assert "image_start" not in raw
    torch_layout = write_config(PRESETS["ernie-4.5-vl-424b-a47b"], "legacy")
    for name, i in {"image_start": 101304, "image_end": 101305, "video_start": 101306, "video_end": 101307}.items():
        assert torch_layout[name] == torch_layout[f"{name}_token_id"] == raw[f"{name}_token_id"] == i
    assert raw["moe_multimodal_dispatch_use_allgather"]
    assert "auto_map" not in raw


def test_written_28b_agrees_with_the_published_file_on_every_common_key() -> None:
    for dialect, published in (("legacy", PT_28B), ("paddle", PADDLE_28B)):
        raw = write_config(PRESETS["ernie-4.5-vl-28b-a3b"], dialect)
        raw["moe_layer_end_index"] = [29, 28]  # written as the last layer, published clipped
        common = raw.keys() & published.keys()
        assert {k: raw[k] for k in common if k != "vision_config"} == {
            k: published[k] for k in common if k != "vision_config"
        }
        assert raw["vision_config"].items() <= published["vision_config"].items()
        assert published.keys() - common <= {"auto_map", "rope_scaling"}


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({"moe_layer_end_index": -1}, range(1, 28)),
        ({"moe_layer_end_index": None}, range(1, 28)),
        ({"moe_layer_end_index": [20, 20]}, range(1, 21)),
        ({"moe_layer_start_index": 4, "moe_layer_end_index": [-1, 27]}, range(4, 28)),
        ({"moe_layer_interval": 2}, range(1, 28, 2)),
        ({"moe_layer_interval": 3, "moe_layer_start_index": 3}, range(5, 28, 3)),
        ({"mlp_layer_types": ["dense"] * 27 + ["sparse"]}, [27]),
    ],
)
def test_layer_ranges(changes: dict[str, Any], layers: Any) -> None:
    moe = read_config(changed(PT_28B, **changes)).moe
    assert moe is not None
    assert moe.layer_indices == tuple(layers)


def test_aliases_and_defaults() -> None:
    raw = changed(
        PT_28B,
        moe_k=...,
        moe_num_experts=...,
        im_patch_id=...,
        image_start=...,
        torch_dtype=...,
        num_key_value_heads=...,
    )
    raw |= {
        "num_experts_per_tok": 6,
        "num_experts": 64,
        "image_token_id": 100295,
        "image_start_token_id": 101304,
        "dtype": "torch.bfloat16",
    }
    raw["vision_config"] = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "in_chans": 3}
    assert read_config(raw) == PRESETS["ernie-4.5-vl-28b-a3b"].replace(num_key_value_heads=20)
    native = golden()
    del native["text_config"]["mlp_layer_types"], native["tie_word_embeddings"]
    native["text_config"]["tie_word_embeddings"] = False  # transformers ignores it here
    assert read_config(native).moe == PRESETS["tiny-a"].moe
    assert read_config(native).tie_word_embeddings
    assert read_config(changed(golden(), text_config__eos_token_id=2)).tokens.eos == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "ernie4_5_vl_mo"}, "model_type .* did you mean 'ernie4_5_vl_moe'"),
        ({"model_type": ...}, r"model_type \(None\) .* only ERNIE-4.5"),
        ({"hidden_act": "gelu"}, r"hidden_act \('gelu'\) must be 'silu'"),
        ({"use_bias": True}, r"use_bias \(True\) must be False"),
        ({"rope_3d": False}, "rope_3d"),
        ({"moe_use_aux_free": False}, "moe_use_aux_free"),
        ({"mm_vocab_size": 100}, "mm_vocab_size"),
        ({"quantization_config": {"quantization": "wint4"}}, "quantization_config .* bfloat16 release"),
        ({"hidden_size": ...}, r"hidden_size \(missing\) must be in config.json"),
        ({"hidden_size": "2560"}, r"hidden_size \('2560'\) must be an integer"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps .* must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings .* true or false"),
        ({"num_attention_heads": 24}, r"hidden_size \(2560\) must be a multiple of num_attention_heads \(24\)"),
        ({"dtype": "float32"}, r"dtype \('float32'\) and torch_dtype \('bfloat16'\) must be equal"),
        ({"torch_dtype": "int8"}, r"dtype \('int8'\) must be one of"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope_scaling .* scaled rotary"),
        ({"rope_scaling": {"type": "default", "mrope_section": [24, 20, 20]}}, "mrope_section .* h = w"),
        ({"freq_allocation": 16}, r"freq_allocation \(16\) must equal the last entry"),
        ({"rope_parameters": {"rope_theta": 10000}}, "rope_theta .* must be one number"),
        ({"vision_config": ...}, r"vision_config \(None\) must be a table"),
        ({"vision_config__hidden_act": "gelu"}, "vision hidden_act"),
        ({"vision_config__embed_dim": 640}, r"hidden_size \(1280\) and embed_dim \(640\) must be equal"),
        ({"pixel_hidden_size": 640}, r"pixel_hidden_size \(640\) must equal vision hidden_size \(1280\)"),
        ({"temporal_conv_size": 4}, "temporal_merge_size"),
        ({"moe_num_experts": [64, 32]}, r"moe_num_experts \(\[64, 32\]\) must have equal entries"),
        ({"moe_intermediate_size": [1536, 512, 4]}, "moe_intermediate_size .* list of 2 integer"),
        ({"moe_k": ...}, r"moe_k or num_experts_per_tok \(missing\)"),
        ({"moe_layer_start_index": ...}, r"moe_layer_start_index \(missing\)"),
        ({"moe_layer_start_index": [1, 5]}, "moe_layer_start_index .* same layer for text and vision"),
        ({"moe_layer_end_index": [27, 20]}, "moe_layer_end_index .* same layer for text and vision"),
        ({"moe_layer_start_index": -2}, r"moe_layer_start_index \(-2\) must be a layer number"),
        ({"moe_layer_interval": 0}, r"moe_layer_interval \(0\) must be at least 1"),
        ({"moe_layer_interval": 40}, "must be 0 where no layer is sparse"),
        ({"mlp_layer_types": ["dense"] * 3}, r"mlp_layer_types .* num_hidden_layers \(28\)"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(changed(PT_28B, **changes))


def test_writing_refuses_what_it_cannot_say() -> None:
    config = PRESETS["tiny-c"]
    assert config.moe is not None
    scattered = config.replace(moe=dataclasses.replace(config.moe, layer_indices=(0, 1, 4)))
    assert read_config(write_config(scattered, "native")) == scattered
    with pytest.raises(ValueError, match=r"layer_indices \(\[0, 1, 4\]\) must be a range"):
        write_config(scattered, "legacy")
    with pytest.raises(ValueError, match=r"dialect \('pt'\) must be one of"):
        write_config(config, "pt")

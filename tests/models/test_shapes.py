"""Presets, parameter counts and config checks against the published numbers, without allocating a
weight.
"""

from __future__ import annotations

import fnmatch

import pytest

from ernie_tune.models.config import ModelConfig, MoEConfig, VisionConfig
from ernie_tune.models.presets import PRESETS, preset
from ernie_tune.models.specs import parameter_count, parameter_specs


@pytest.mark.parametrize(("name", "total"), [
    ("ernie-4.5-vl-28b-a3b", 29_399_294_336),
    ("ernie-4.5-vl-424b-a47b", 423_526_285_184),
    ("ernie-4.5-0.3b", 360_748_032),
    ("ernie-4.5-21b-a3b", 21_825_437_888),
    ("ernie-4.5-300b-a47b", 299_484_163_264),
    ("tiny-a", 1_101_184),
    ("tiny-b", 4_744_656),
    ("small", 31_785_120),
])  # fmt: skip
def test_total(name: str, total: int) -> None:
    assert parameter_count(preset(name)) == total


@pytest.mark.parametrize(("name", "prefix", "count"), [
    ("ernie-4.5-vl-28b-a3b", "vision_model", 630_433_280),
    ("ernie-4.5-vl-28b-a3b", "resampler_model", 144_225_280),
    ("ernie-4.5-vl-28b-a3b", "embed_tokens", 264_765_440),
    ("ernie-4.5-vl-28b-a3b", "layers.5.self_attn", 15_728_640),
    ("ernie-4.5-vl-28b-a3b", "layers.0.mlp", 94_371_840),
    ("ernie-4.5-vl-28b-a3b", "layers.1.mlp.shared_experts", 23_592_960),
    ("ernie-4.5-vl-28b-a3b", "layers.1.mlp.text_experts", 64 * 11_796_480),
    ("ernie-4.5-vl-28b-a3b", "layers.27.mlp.vision_experts", 64 * 3_932_160),
    ("ernie-4.5-vl-424b-a47b", "vision_model", 630_433_280),
    ("ernie-4.5-vl-424b-a47b", "resampler_model", 173_072_384),
    ("ernie-4.5-vl-424b-a47b", "embed_tokens", 847_249_408),
    ("ernie-4.5-vl-424b-a47b", "lm_head", 847_249_408),
    ("ernie-4.5-vl-424b-a47b", "layers.0.self_attn", 150_994_944),
    ("ernie-4.5-vl-424b-a47b", "layers.2.mlp", 704_643_072),
    ("ernie-4.5-vl-424b-a47b", "layers.3.mlp.text_experts", 64 * 88_080_384),
    ("ernie-4.5-vl-424b-a47b", "layers.53.mlp.vision_experts", 64 * 37_748_736),
])  # fmt: skip
def test_parts(name: str, prefix: str, count: int) -> None:
    assert parameter_count(preset(name), prefix + ".") == count


@pytest.mark.parametrize("name", ["tiny-a", "tiny-c"])
def test_specs_are_the_model(name: str) -> None:
    from ernie_tune.models.ernie import PLAN, ErnieModel, stages

    config = preset(name)
    state = ErnieModel(config).state_dict()
    specs = parameter_specs(config)
    assert {n: tuple(v.shape) for n, v in state.items()} == {n: s.shape for n, s in specs.items()}
    absent = {p for p in PLAN if not fnmatch.filter(specs, p)}
    assert absent == ({"lm_head.weight"} if name == "tiny-a" else {p for p in PLAN if "shared_experts" in p})
    names = [stage for stage, _ in stages(config)]
    assert names[0] == "embed_tokens"
    assert names[-1] == ("norm" if config.tie_word_embeddings else "lm_head")


def test_presets_by_any_spelling() -> None:
    assert preset("baidu/ERNIE-4.5-VL-28B-A3B-Paddle") is PRESETS["ernie-4.5-vl-28b-a3b"]
    assert preset("ERNIE-4.5-VL-424B-A47B-Base-PT") is PRESETS["ernie-4.5-vl-424b-a47b"]
    assert preset("tiny_A") is PRESETS["tiny-a"]
    with pytest.raises(ValueError, match=r"did you mean 'ernie-4\.5-vl-28b-a3b'"):
        preset("ernie-4.5-vl-28b-a3")
    with pytest.raises(ValueError, match=r"did you mean 'ernie-4\.5-vl-424b-a47b'"):
        preset("424B")
    with pytest.raises(ValueError, match="choose one of them"):
        preset("qqqq")


def test_init_draws_by_name() -> None:
    """std sqrt(0.3333/H) for matrices, ones and zeros elsewhere, and no value depends on another
    parameter.
    """
    from ernie_tune.models.init import initial_value

    config = preset("tiny-b")
    a = initial_value(config, "layers.1.self_attn.q_proj.weight", 0)
    assert a.std() == pytest.approx((0.3333 / 160) ** 0.5, rel=0.02)
    assert (a == initial_value(config, "layers.1.self_attn.q_proj.weight", 0)).all()
    assert (a != initial_value(config, "layers.2.self_attn.q_proj.weight", 0)).mean() > 0.99
    assert (a != initial_value(config, "layers.1.self_attn.q_proj.weight", 1)).mean() > 0.99
    ones = (
        "layers.0.input_layernorm.weight",
        "norm.weight",
        "vision_model.blocks.0.norm1.weight",
        "vision_model.ln.weight",
    )
    ones += ("resampler_model.spatial_linear.3.weight", "resampler_model.after_norm.weight")
    assert all((initial_value(config, n, 0) == 1).all() for n in ones)
    zeros = (
        "vision_model.ln.bias",
        "resampler_model.mlp.bias",
        "vision_model.blocks.0.norm1.bias",
        "layers.1.mlp.moe_statics.e_score_correction_bias",
    )
    assert all((initial_value(config, n, 0) == 0).all() for n in zeros)


BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "freq_allocation": 2,
}
TOWER = VisionConfig(depth=1, hidden_size=32, num_heads=4, intermediate_size=64)


@pytest.mark.parametrize(("change", "match"), [
    ({"vocab_size": 0}, r"vocab_size \(0\) must be a positive integer"),
    ({"hidden_size": 3.5}, r"hidden_size \(3.5\) must be a positive integer"),
    ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) must be a multiple of num_key_value_heads \(3\)"),
    ({"head_dim": 7}, r"head_dim \(7\) must be even"),
    ({"freq_allocation": 1, "vision": TOWER}, r"freq_allocation \(1\) must leave an even number"),
    ({"vision": VisionConfig(1, 30, 4, 64)}, r"vision hidden_size \(30\) must be a multiple of num_heads \(4\)"),
    ({"vision": VisionConfig(1, 24, 4, 64)}, r"vision head width \(6\) must be a multiple of 4"),
    ({"vision": VisionConfig(1, 32, 4, 64, spatial_merge_size=3)}, r"spatial_merge_size \(3\)"),
    ({"moe": MoEConfig(4, (8,), 5, 0, (1,))}, r"moe_k \(5\) must be between 1 and moe_num_experts \(4\)"),
    ({"moe": MoEConfig(4, (8, 8), 2, 0, (1,))}, r"must have 1 value\(s\) for a text-only model"),
    ({"moe": MoEConfig(4, (8,), 2, 0, (1, 2))}, r"moe layer indices \[2\] must be below num_hidden_layers \(2\)"),
])  # fmt: skip
def test_impossible_shapes_are_refused(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ModelConfig(**{**BASE, **change})


def test_import_is_light() -> None:
    """`import ernie_tune`, its config, shapes and data code come without paddle."""
    import subprocess
    import sys

    code = (
        "import sys, ernie_tune, ernie_tune.models.presets, ernie_tune.models.specs, ernie_tune.models.inputs, ernie_tune.data.processor; "
        "assert 'paddle' not in sys.modules, 'paddle was imported'; assert 'AutoModel' in dir(ernie_tune)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_public_name() -> None:
    import ernie_tune

    with pytest.raises(AttributeError, match="no attribute 'AutoModle'"):
        _ = ernie_tune.AutoModle

"""The layout table against the published key table (spelled out here by hand)
and a file that transformers wrote.

Legend: H hidden, I expert width. No paddle.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_tune.checkpoint.names import FLAVOURS, Array, NameTable, check_names, detect_flavour, layout
from ernie_tune.checkpoint.tensors import TensorReader
from ernie_tune.models.config import ModelConfig, MoEConfig
from ernie_tune.models.presets import PRESETS
from ernie_tune.models.specs import parameter_specs

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_a"
TINY_A = PRESETS["tiny-a"]
TEXT_DENSE = TINY_A.replace(vision=None, moe=None)
TEXT_MOE = TINY_A.replace(vision=None, moe=MoEConfig(8, (48,), 3, 2, (1, 2)))
CONFIGS = {
    "tiny-a": TINY_A,
    "tiny-b": PRESETS["tiny-b"],
    "tiny-c": PRESETS["tiny-c"],
    "dense": TEXT_DENSE,
    "text-moe": TEXT_MOE,
}


def numbered(config: ModelConfig) -> dict[str, Array]:
    """Canonical parameters in which every number of the model is different (int64), so that any
    misplaced element shows.
    """
    out, start = {}, 0
    for name, spec in parameter_specs(config).items():
        out[name] = np.arange(start, start + spec.size).reshape(spec.shape)
        start += spec.size
    return out


def to_disk(table: NameTable, canonical: dict[str, Array]) -> dict[str, Array]:
    def read(name: str, expert: int | None) -> Array:
        return canonical[name] if expert is None else canonical[name][expert]

    return {name: table.to_disk(name, read) for name in table.disk}


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back_is_exact_and_covers_every_element_once(name: str, flavour: str) -> None:
    canonical, table = numbered(CONFIGS[name]), layout(CONFIGS[name], flavour)
    disk = to_disk(table, canonical)
    assert {n: a.shape for n, a in disk.items()} == {n: s.shape for n, s in table.disk.items()}
    everything = np.sort(np.concatenate([a.ravel() for a in disk.values()]))
    np.testing.assert_array_equal(everything, np.arange(sum(a.size for a in canonical.values())))
    for key, values in canonical.items():
        np.testing.assert_array_equal(table.to_canonical(key, disk.__getitem__), values, err_msg=key)
    assert {n for n, s in table.disk.items() if s.float32} == {
        n for n in disk if ".mlp.gate.weight" in n or "e_score" in n
    }


def test_torch_layout_by_value() -> None:
    """Rows of the table for -PT, tiny-a: E = 8, text width 48, vision width 32."""
    c = numbered(TINY_A)
    d = to_disk(layout(TINY_A, "hf"), c)
    text, vision = (c[f"layers.1.mlp.{m}_experts.up_gate_proj"] for m in ("text", "vision"))
    expected = {
        "model.embed_tokens.weight": c["embed_tokens.weight"],
        # 96 x 96
        "model.layers.0.self_attn.q_proj.weight": c["layers.0.self_attn.q_proj.weight"].T,
        # 96 x 96
        "model.layers.0.self_attn.o_proj.weight": c["layers.0.self_attn.o_proj.weight"].T,
        "model.layers.0.mlp.gate_proj.weight": c["layers.0.mlp.gate_proj.weight"].T,
        # routers are [H, E] even here
        "model.layers.1.mlp.gate.weight": c["layers.1.mlp.gate.weight"],
        "model.layers.1.mlp.gate.weight_1": c["layers.1.mlp.gate.weight_1"],
        "model.layers.1.mlp.moe_statics.e_score_correction_bias": c["layers.1.mlp.moe_statics.e_score_correction_bias"],
        "model.layers.1.mlp.experts.0.gate_proj.weight": text[0, :, :48].T,
        "model.layers.1.mlp.experts.7.up_proj.weight": text[7, :, 48:].T,
        # vision experts follow the text experts
        "model.layers.1.mlp.experts.8.gate_proj.weight": vision[0, :, :32].T,
        "model.layers.1.mlp.experts.15.up_proj.weight": vision[7, :, 32:].T,
        "model.layers.1.mlp.experts.9.down_proj.weight": c["layers.1.mlp.vision_experts.down_proj"][1].T,
        "model.layers.2.mlp.shared_experts.up_proj.weight": c["layers.2.mlp.shared_experts.up_proj.weight"].T,
        "model.norm.weight": c["norm.weight"],
        "vision_model.patch_embed.proj.weight": c["vision_model.patch_embed.proj.weight"].T,
        "vision_model.blocks.1.attn.qkv.weight": c["vision_model.blocks.1.attn.qkv.weight"].T,
        "vision_model.blocks.1.attn.qkv.bias": c["vision_model.blocks.1.attn.qkv.bias"],
        "model.resampler_model.spatial_linear.2.weight": c["resampler_model.spatial_linear.2.weight"].T,
        "model.resampler_model.spatial_linear.3.weight": c["resampler_model.spatial_linear.3.weight"],
        "model.resampler_model.mlp.weight": c["resampler_model.mlp.weight"].T,
        "model.resampler_model.after_norm.weight": c["resampler_model.after_norm.weight"],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(d[name], values, err_msg=name)
    assert "lm_head.weight" not in d  # tied


def test_paddle_layouts_by_value() -> None:
    c = numbered(TINY_A)
    fused, split = (to_disk(layout(TINY_A, f), c) for f in ("paddle", "paddleformers"))
    q, k, v = (c[f"layers.2.self_attn.{p}_proj.weight"] for p in "qkv")
    gate, up = (c[f"layers.0.mlp.{p}_proj.weight"] for p in ("gate", "up"))
    shared_gate, shared_up = (c[f"layers.1.mlp.shared_experts.{p}_proj.weight"] for p in ("gate", "up"))
    vision = c["layers.1.mlp.vision_experts.up_gate_proj"]
    expected = {
        "ernie.layers.2.self_attn.qkv_proj.weight": np.concatenate([q, k, v], 1),
        "ernie.layers.2.self_attn.o_proj.weight": c["layers.2.self_attn.o_proj.weight"],
        "ernie.layers.0.mlp.up_gate_proj.weight": np.concatenate(
            [gate, up], 1
        ),  # the gate half first, whatever the name says
        "ernie.layers.1.mlp.shared_experts.up_gate_proj.weight": np.concatenate([shared_gate, shared_up], 1),
        "ernie.layers.1.mlp.experts.11.up_gate_proj.weight": vision[3],
        "ernie.layers.1.mlp.experts.3.down_proj.weight": c["layers.1.mlp.text_experts.down_proj"][3],
        "ernie.layers.1.mlp.gate.weight_1": c["layers.1.mlp.gate.weight_1"],
        "ernie.norm.weight": c["norm.weight"],
        "ernie.resampler_model.temporal_linear.0.weight": c["resampler_model.temporal_linear.0.weight"],
        "vision_model.blocks.0.mlp.fc1.weight": c["vision_model.blocks.0.mlp.fc1.weight"],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(fused[name], values, err_msg=name)
    np.testing.assert_array_equal(split["model.layers.1.mlp.experts.11.up_proj.weight"], vision[3, :, 32:])
    np.testing.assert_array_equal(split["model.layers.2.self_attn.k_proj.weight"], k)


def test_head_and_text_only_routers() -> None:
    untied = numbered(PRESETS["tiny-c"])
    for flavour, values in {"hf": untied["lm_head.weight"].T, "paddle": untied["lm_head.weight"]}.items():
        table = layout(PRESETS["tiny-c"], flavour)
        assert table.head_copy is None
        np.testing.assert_array_equal(to_disk(table, untied)["lm_head.weight"], values)
    # the text-only -PT releases have routers as torch linears, unlike the VL ones
    c = numbered(TEXT_MOE)
    router = c["layers.1.mlp.gate.weight"]
    np.testing.assert_array_equal(to_disk(layout(TEXT_MOE, "hf"), c)["model.layers.1.mlp.gate.weight"], router.T)
    np.testing.assert_array_equal(to_disk(layout(TEXT_MOE, "paddle"), c)["ernie.layers.1.mlp.gate.weight"], router)


def test_file_written_by_transformers_round_trips_bit_exactly() -> None:
    reader = TensorReader(GOLDEN)
    table = layout(TINY_A, detect_flavour(reader.shapes, TINY_A))
    assert table.flavour == "hf_saved"
    assert check_names(table, reader.shapes) == []
    canonical = {name: table.to_canonical(name, reader.read) for name in table.canonical}
    q = reader.read("model.layers.0.self_attn.q_proj.weight")  # square: only the values can tell
    np.testing.assert_array_equal(canonical["layers.0.self_attn.q_proj.weight"], q.T)
    assert not np.array_equal(canonical["layers.0.self_attn.q_proj.weight"], q)
    for flavour in FLAVOURS:  # through every other layout and back
        other = layout(TINY_A, flavour)
        disk = to_disk(other, canonical)
        canonical = {name: other.to_canonical(name, disk.__getitem__) for name in canonical}
    for name, values in to_disk(table, canonical).items():
        assert values.tobytes() == reader.read(name).tobytes(), name


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("name", CONFIGS)
def test_detect_flavour(name: str, flavour: str) -> None:
    shapes = {n: s.shape for n, s in layout(CONFIGS[name], flavour).disk.items()}
    same_as_hf = flavour == "hf_saved" and CONFIGS[name].vision is None
    assert detect_flavour(shapes, CONFIGS[name]) == ("hf" if same_as_hf else flavour)
    shapes.popitem()
    shapes["stray"] = (1,)
    assert detect_flavour(shapes, CONFIGS[name]) == ("hf" if same_as_hf else flavour)


@pytest.mark.parametrize("name", ["ernie-4.5-vl-28b-a3b", "ernie-4.5-vl-424b-a47b", "ernie-4.5-0.3b"])
def test_released_sizes(name: str) -> None:
    """Sizes as published; a copy of each expert under every name, none twice."""
    total = {
        "ernie-4.5-vl-28b-a3b": 29_399_294_336,
        "ernie-4.5-vl-424b-a47b": 423_526_285_184,
        "ernie-4.5-0.3b": 360_748_032,
    }
    table = layout(PRESETS[name], "hf")
    assert sum(math.prod(s.shape) for s in table.disk.values()) == total[name]


def broken(**changes: Any) -> dict[str, tuple[int, ...]]:
    shapes = {n: s.shape for n, s in layout(TINY_A, "hf").disk.items()}
    for name, shape in changes.items():
        key = name.replace("__", ".")
        shapes.pop(key, None)
        if shape is not None:
            shapes[key] = shape
    return shapes


def test_check_names() -> None:
    table = layout(TINY_A, "hf")
    assert check_names(table, broken(lm_head__weight=(640, 96))) == []  # a tied head may be stored
    unused = "model.mtp_block.0.self_attn.q_proj.weight"
    assert check_names(table, broken(**{unused.replace(".", "__"): (96, 96)})) == [unused]
    with pytest.raises(ValueError, match=r"1 missing: model.norm.weight; 1 unexpected: extra; .* config.json"):
        check_names(table, broken(model__norm__weight=None, extra=(2,)))
    with pytest.raises(ValueError, match=r"1 of a wrong shape: model.norm.weight \[64\] instead of \[96\]"):
        check_names(table, broken(model__norm__weight=(64,)))
    with pytest.raises(ValueError, match=r"\(12 in all\)"):
        check_names(table, broken(**{f"extra{i}": (2,) for i in range(12)}))
    untied = layout(TINY_A.replace(tie_word_embeddings=False), "hf")
    with pytest.raises(ValueError, match=r"1 missing: lm_head.weight"):
        check_names(untied, broken())
    with pytest.raises(ValueError, match=r"1 unexpected: lm_head.weight"):
        check_names(dataclasses.replace(table, head_copy=None), broken(lm_head__weight=(640, 96)))


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"flavour .'pt'. must be one of"):
        layout(TINY_A, "pt")
    live = {"model.language_model.layers.1.mlp.text_moe.experts.gate_up_proj": (8, 96, 96)}
    with pytest.raises(ValueError, match=r"in-memory names of a transformers model; save it with"):
        detect_flavour(live, TINY_A)
    with pytest.raises(ValueError, match=r"weights \(wte.weight\) must be ERNIE-4.5 tensors"):
        detect_flavour({"wte.weight": (640, 96)}, TINY_A)

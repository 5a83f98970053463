"""AutoModel end to end: a transformers-written folder gives the reference logits, every flavour
gives the same model back, each refusal.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ernie_tune.checkpoint import auto, names
from ernie_tune.checkpoint.auto import AutoConfig, AutoModel
from ernie_tune.checkpoint.tensors import INDEX_NAME, SINGLE_NAME, Array, TensorReader
from ernie_tune.models.config import MoEConfig, TokenIds
from ernie_tune.models.inputs import Row, pack
from ernie_tune.models.presets import PRESETS

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny_a"
TEXT_MOE = PRESETS["tiny-a"].replace(
    vision=None, moe=MoEConfig(8, (48,), 3, 2, (1, 2)), tokens=TokenIds(), freq_allocation=20
)


def golden_logits(model: AutoModel) -> tuple[Array, Array]:
    """Ours and the float64 reference, [35, 640]: image (1,4,6), video (4,4,4), image (1,6,4)."""
    case = np.load(GOLDEN / "case.npz")
    images, video = case["pixel_values_images"], case["pixel_values_video"]
    pixels = np.concatenate([images[:24], video, images[24:]])
    row = Row(case["input_ids"], pixels, np.array([[1, 4, 6], [4, 4, 4], [1, 6, 4]]))
    with paddle.no_grad():
        logits = model.logits(model(pack([row], model.config.tokens)))
    return logits.astype("float32").numpy(), case["logits"]


def arrays(model: AutoModel) -> dict[str, Array]:
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def assert_same(a: AutoModel, b: AutoModel) -> None:
    left, right = arrays(a), arrays(b)
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def edit(folder: Path, **tensors: Array | None) -> Path:
    """The golden folder with some tensors replaced, added or (None) removed; `__` stands for a
    dot.
    """
    shutil.copytree(GOLDEN, folder)
    weights = load_file(folder / SINGLE_NAME)
    for key, array in tensors.items():
        name = key.replace("__", ".")
        weights.pop(name, None)
        if array is not None:
            weights[name] = array
    (folder / SINGLE_NAME).unlink()
    save_file(weights, folder / SINGLE_NAME)
    return folder


@pytest.fixture(scope="module")
def golden() -> AutoModel:
    return AutoModel.from_pretrained(GOLDEN)


def test_reference_logits(golden: AutoModel, capsys: Any) -> None:
    ours, reference = golden_logits(golden)
    np.testing.assert_allclose(ours, reference, atol=1e-4)
    AutoModel.from_pretrained(str(GOLDEN))
    assert "layout 'hf_saved' (transformers 5 save_pretrained) -> float32, routers float32" in capsys.readouterr().err


@pytest.mark.parametrize("flavour", names.FLAVOURS)
def test_every_flavour_gives_the_same_model_back(golden: AutoModel, flavour: str, tmp_path: Path, capsys: Any) -> None:
    paths = golden.save_pretrained(tmp_path / "m", flavour=flavour, max_shard_size=1_000_000)
    assert {INDEX_NAME, "config.json"} <= {p.name for p in paths} == {p.name for p in (tmp_path / "m").iterdir()}
    again = AutoModel.from_pretrained(tmp_path / "m")
    assert f"layout {flavour!r}" in capsys.readouterr().err
    assert again.config == golden.config
    assert_same(again, golden)
    # own -> disk -> own -> the file we started from
    again.save_pretrained(tmp_path / "hf", flavour="hf_saved")
    ours, theirs = load_file(tmp_path / "hf" / SINGLE_NAME), load_file(GOLDEN / SINGLE_NAME)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].tobytes() == theirs[name].tobytes(), name


@pytest.mark.parametrize(
    ("config", "flavours"), [("tiny-c", ["hf", "paddle"]), (TEXT_MOE, ["hf", "paddleformers", "paddle"])]
)
def test_untied_and_text_only(config: Any, flavours: list[str], tmp_path: Path) -> None:
    model = AutoModel.from_config(config, seed=3)
    for flavour in flavours:
        model.save_pretrained(tmp_path / flavour, flavour=flavour)
        again = AutoModel.from_pretrained(tmp_path / flavour)
        assert again.config == model.config
        assert_same(again, model)


def test_from_config_is_reproducible() -> None:
    model = AutoModel.from_config("tiny-a", seed=1)
    assert_same(model, AutoModel.from_config(PRESETS["tiny-a"], seed=1))
    other = AutoModel.from_config("tiny-a", seed=2)
    assert not np.array_equal(
        arrays(model)["layers.0.self_attn.q_proj.weight"], arrays(other)["layers.0.self_attn.q_proj.weight"]
    )


def test_float64_computes_alone(golden: AutoModel, tmp_path: Path) -> None:
    """Files stay in float32, which every reader knows."""
    golden.save_pretrained(tmp_path / "m")
    model = AutoModel.from_pretrained(tmp_path / "m", dtype="float64")
    assert {t.dtype for t in model.state_dict().values()} == {paddle.float64}
    for name, value in arrays(golden).items():
        np.testing.assert_array_equal(arrays(model)[name], value.astype(np.float64))
    assert {p.dtype for p in AutoModel.from_config("tiny-a", dtype="float64").parameters()} == {paddle.float64}
    model.save_pretrained(tmp_path / "again")
    for name in (SINGLE_NAME, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()
    with pytest.raises(ValueError, match=r"dtype \('float64'\) must be one of \['float32', 'bfloat16'\]"):
        model.save_pretrained(tmp_path / "wide", dtype="float64")


def test_bfloat16_keeps_routers_and_biases_in_float32(golden: AutoModel, tmp_path: Path) -> None:
    golden.save_pretrained(tmp_path / "m", dtype="bfloat16")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    entries = TensorReader(tmp_path / "m").entries
    kept = {name for name, entry in entries.items() if entry.dtype == "F32"}
    layers = [f"model.layers.{i}.mlp" for i in (1, 2)]
    assert kept == {
        f"{layer}.{end}"
        for layer in layers
        for end in ("gate.weight", "gate.weight_1", "moe_statics.e_score_correction_bias")
    }
    assert {entry.dtype for name, entry in entries.items() if name not in kept} == {"BF16"}

    model = AutoModel.from_pretrained(tmp_path / "m", dtype="bfloat16")
    float32 = {name for name, tensor in model.state_dict().items() if tensor.dtype == paddle.float32}
    assert float32 == {name for name, spec in names.layout(model.config, "hf").canonical.items() if spec.float32}
    router = "layers.1.mlp.gate.weight_1"
    np.testing.assert_array_equal(arrays(model)[router], arrays(golden)[router])
    rounded = golden.state_dict()["layers.1.mlp.vision_experts.up_gate_proj"].astype(
        "bfloat16"
    )  # paddle's own rounding
    np.testing.assert_array_equal(arrays(model)["layers.1.mlp.vision_experts.up_gate_proj"], rounded.numpy())

    # saved as it is, loaded wide: nothing is lost, and the next narrow save is bit equal
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / SINGLE_NAME).read_bytes() == (tmp_path / "m" / SINGLE_NAME).read_bytes()
    wide = AutoModel.from_pretrained(tmp_path / "m")
    assert {t.dtype for t in wide.state_dict().values()} == {paddle.float32}
    wide.save_pretrained(tmp_path / "wide", dtype="bfloat16")
    assert (tmp_path / "wide" / SINGLE_NAME).read_bytes() == (tmp_path / "m" / SINGLE_NAME).read_bytes()


def test_a_forgotten_transposition_of_a_square_matrix_is_noticed(
    golden: AutoModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant loads without any shape error; only values can tell."""
    target = "layers.{n}.self_attn.o_proj.weight"
    mutant = tuple(names.NameRow(row.canonical) if row.canonical == (target,) else row for row in names.SHARED)
    assert mutant != names.SHARED
    monkeypatch.setattr(names, "SHARED", mutant)
    wrong = AutoModel.from_pretrained(GOLDEN)
    name = "layers.0.self_attn.o_proj.weight"
    np.testing.assert_array_equal(arrays(wrong)[name], arrays(golden)[name].T)
    ours, reference = golden_logits(wrong)
    assert np.abs(ours - reference).max() > 0.1


def test_tied_head_in_the_file(golden: AutoModel, tmp_path: Path) -> None:
    embedding = load_file(GOLDEN / SINGLE_NAME)["model.embed_tokens.weight"]
    for i, head in enumerate((embedding, np.ascontiguousarray(embedding.T))):
        assert_same(AutoModel.from_pretrained(edit(tmp_path / str(i), lm_head__weight=head)), golden)
    with pytest.raises(
        ValueError, match=r"lm_head.weight must equal model.embed_tokens.weight, because tie_word_embeddings is true"
    ):
        AutoModel.from_pretrained(edit(tmp_path / "two", lm_head__weight=embedding + np.float32(1e-3)))
    with pytest.raises(ValueError, match=r"lm_head.weight must equal"):
        AutoModel.from_pretrained(edit(tmp_path / "short", lm_head__weight=embedding[:600]))


def test_known_but_unused_tensors_are_named(tmp_path: Path, capsys: Any) -> None:
    AutoModel.from_pretrained(edit(tmp_path / "m", model__mtp_emb_norm__0__weight=np.ones(96, np.float32)))
    assert "not used: 1 (model.mtp_emb_norm.0.weight, ...)" in capsys.readouterr().err


def test_refusals(golden: AutoModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 missing: model.norm.weight"):
        AutoModel.from_pretrained(edit(tmp_path / "missing", model__norm__weight=None))
    with pytest.raises(ValueError, match=r"1 unexpected: model.extra"):
        AutoModel.from_pretrained(edit(tmp_path / "extra", model__extra=np.ones(3, np.float32)))
    bad = {
        "model__norm__weight": np.full(96, np.nan, np.float32),
        "model__vision_model__ln__bias": np.full(64, np.inf, np.float32),
    }
    with pytest.raises(
        ValueError, match=r"weights \(2 tensors: model.norm.weight, model.vision_model.ln.bias\) must be finite"
    ):
        AutoModel.from_pretrained(edit(tmp_path / "nan", **bad))
    with pytest.raises(ValueError, match=r"dtype \('int8'\) must be one of"):
        AutoModel.from_pretrained(GOLDEN, dtype="int8")
    with pytest.raises(ValueError, match=r"dtype \('half'\) must be one of"):
        golden.save_pretrained(tmp_path / "x", dtype="half")
    with pytest.raises(ValueError, match=r"flavour \('pt'\) must be one of"):
        golden.save_pretrained(tmp_path / "x", flavour="pt")
    assert not (tmp_path / "x").exists()


def test_auto_config(tmp_path: Path) -> None:
    assert AutoConfig.from_pretrained(GOLDEN) == auto.AutoModel.from_pretrained(GOLDEN).config
    with pytest.raises(FileNotFoundError, match=r"must hold config.json"):
        AutoConfig.from_pretrained(tmp_path)
    for text, message in (
        ("{", r"config.json must be JSON \(Expecting"),
        ('{"model_type": "llama"}', "config.json: model_type .'llama'."),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            AutoConfig.from_pretrained(tmp_path)

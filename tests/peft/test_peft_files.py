"""Adapter folders: identity in both dialects, conversion, an adapter that the PEFT library trained,
fused layers of PaddleNLP, refusals.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN
from peft_cases import adapted, fresh, logits, packed
from safetensors.numpy import load_file, save_file

from ernie_tune.peft import files
from ernie_tune.peft.config import BottleneckConfig, LoraConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.model import PeftModel

EVERYTHING = LoraConfig(
    r=3,
    lora_alpha=5,
    rslora=True,
    target_modules=["all-linear"],
    expert_targets=[(1, "text", 3), (1, "vision", 0), (3, "vision", 7)],
    modules_to_save=["resampler_model.mlp", "norm"],
    freeze_config="",
    base_model_name_or_path="some/base",
)


@pytest.mark.parametrize("dialect", ["paddlenlp", "peft"])
def test_save_and_load_is_the_identity(golden, tmp_path, dialect: str) -> None:
    inputs, model = packed(golden), adapted(EVERYTHING)
    paths = model.save_pretrained(tmp_path / "a", dialect)
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "a").iterdir())
    again = PeftModel.from_pretrained(fresh(), tmp_path / "a")
    ours, theirs = (
        {name: p.numpy() for name, p in m.named_parameters() if not p.stop_gradient} for m in (model, again)
    )
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    np.testing.assert_array_equal(logits(again, inputs), logits(model, inputs))
    assert again.adapters["default"].config.scaling == EVERYTHING.scaling
    assert again.adapters["default"].config.base_model_name_or_path == "some/base"


def test_conversion_there_and_back(tmp_path) -> None:
    """One adapter through paddlenlp -> peft -> paddlenlp: the same bytes."""
    adapted(EVERYTHING).save_pretrained(tmp_path / "a", "paddlenlp")
    PeftModel.from_pretrained(fresh(), tmp_path / "a").save_pretrained(tmp_path / "b", "peft")
    PeftModel.from_pretrained(fresh(), tmp_path / "b").save_pretrained(tmp_path / "c", "paddlenlp")
    for name in files.PADDLE_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes(), name


def test_an_adapter_that_the_peft_library_trained(golden) -> None:
    """tests/golden/check_peft_interop.py make: transformers and PEFT in float64, stored as
    float32.
    """
    model = PeftModel.from_pretrained(fresh(), GOLDEN / "peft_adapter")
    shown = logits(model, packed(golden))[::4, ::2]
    np.testing.assert_allclose(shown, np.load(GOLDEN / "peft_adapter" / "logits.npz")["logits"], atol=1e-5)
    assert np.abs(shown - logits(fresh(), packed(golden))[::4, ::2]).max() > 0.1
    assert model.adapters["default"].config.scaling == 6.0  # 12 / sqrt(4)


def test_keys_and_settings_of_paddlenlp(tmp_path) -> None:
    """Names and layout as PaddleNLP writes them."""
    adapted(LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "o_proj"])).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a" / "peft_model-00001-of-00001.safetensors")
    assert tensors["model.layers.0.self_attn.q_proj.lora_A"].shape == (160, 4)
    assert tensors["model.layers.0.self_attn.q_proj.lora_B"].shape == (4, 160)
    index = json.loads((tmp_path / "a" / "peft_model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    settings = json.loads((tmp_path / "a" / "lora_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["scaling"], settings["rslora"]) == (4, 6, 1.5, False)
    owners = {key.rpartition(".")[0] for key in tensors}
    matched = {name for name in owners if any(re.fullmatch(p, name) for p in settings["target_modules"])}
    assert matched == owners
    assert len(settings["target_modules"]) == 8


def test_a_bfloat16_model_writes_bfloat16(tmp_path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"]), dtype="bfloat16")
    model.save_pretrained(tmp_path / "a", "peft")
    again = PeftModel.from_pretrained(fresh(dtype="bfloat16"), tmp_path / "a")
    assert b'"BF16"' in (tmp_path / "a" / "adapter_model.safetensors").read_bytes()
    for module, layer in model.adapters["default"].places.items():
        other = again.adapters["default"].places[module]
        np.testing.assert_array_equal(layer.lora_B.numpy(), other.lora_B.numpy())
        assert np.abs(layer.lora_B.astype("float32").numpy()).max() > 0


def test_keys_of_peft(tmp_path) -> None:
    adapted(LoraConfig(r=4, target_modules=["q_proj", "fc1"], freeze_config="")).save_pretrained(tmp_path / "a", "peft")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert tensors["base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 160)
    assert tensors["base_model.model.model.vision_tower.blocks.2.mlp.fc1.lora_B.weight"].shape == (320, 4)
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["peft_type"] == "LORA"
    assert "model.language_model.layers.3.self_attn.q_proj" in settings["target_modules"]


def test_fused_layers_of_other_ports(golden, tmp_path) -> None:
    """qkv_proj and up_gate_proj under another prefix: A is shared by the parts, B is cut by
    columns.
    """
    rng = np.random.default_rng(0)
    tensors = {
        "ernie.layers.0.self_attn.qkv_proj.lora_A": rng.normal(size=(160, 2)),
        "ernie.layers.0.self_attn.qkv_proj.lora_B": rng.normal(size=(2, 160 + 32 + 32)),
        "ernie.layers.0.mlp.up_gate_proj.lora_A": rng.normal(size=(160, 2)),
        "ernie.layers.0.mlp.up_gate_proj.lora_B": rng.normal(size=(2, 2 * 512)),
    }
    tensors = {key: value.astype(np.float32) for key, value in tensors.items()}
    write(tmp_path / "a", tensors)
    model = PeftModel.from_pretrained(fresh(), tmp_path / "a")
    places = model.adapters["default"].places
    assert list(places) == [
        f"layers.0.{x}_proj" for x in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    ]
    joined = np.concatenate([places[f"layers.0.self_attn.{x}_proj"].lora_B.numpy() for x in "qkv"], axis=1)
    np.testing.assert_array_equal(joined, tensors["ernie.layers.0.self_attn.qkv_proj.lora_B"])
    np.testing.assert_array_equal(
        places["layers.0.mlp.up_proj"].lora_B.numpy(), tensors["ernie.layers.0.mlp.up_gate_proj.lora_B"][:, 512:]
    )
    for x in "qkv":
        np.testing.assert_array_equal(
            places[f"layers.0.self_attn.{x}_proj"].lora_A.numpy(), tensors["ernie.layers.0.self_attn.qkv_proj.lora_A"]
        )


def write(folder: Path, tensors: dict[str, np.ndarray], **settings: object) -> None:
    folder.mkdir()
    (folder / "lora_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4, **settings}))
    save_file(tensors, folder / "peft_model-00001-of-00001.safetensors")


@pytest.mark.parametrize("config", [
    BottleneckConfig(width=4),
    PromptConfig(5),
    PromptConfig(5, encoder_width=7),
    PrefixConfig(3),
    LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
])  # fmt: skip
def test_other_methods(golden, tmp_path, config) -> None:  # type: ignore[no-untyped-def]
    """ "auto" takes the dialect that can hold them; a P-tuned prompt comes back as the prompt that
    its encoder made.
    """
    inputs, model = packed(golden), adapted(config)
    names = {path.name for path in model.save_pretrained(tmp_path / "a")}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    again = PeftModel.from_pretrained(fresh(), tmp_path / "a")
    np.testing.assert_allclose(logits(again, inputs), logits(model, inputs), atol=1e-6)
    with pytest.raises(ValueError, match=r"paddlenlp|DoRA"):
        model.save_pretrained(tmp_path / "b", "paddlenlp")
    assert not (tmp_path / "b").exists()


def test_a_prefix_has_the_documented_shape(tmp_path) -> None:
    adapted(PrefixConfig(3)).save_pretrained(tmp_path / "a")
    assert load_file(tmp_path / "a" / "adapter_model.safetensors")["prefix"].shape == (4, 2, 1, 3, 32)


def test_saving_over_an_older_adapter(tmp_path, monkeypatch) -> None:
    """The dialect may change; a save that fails on the way leaves the old adapter as it was."""
    old = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
    old.save_pretrained(tmp_path / "a", "peft")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    new = adapted(LoraConfig(r=3, target_modules=["k_proj"]))

    def full_disk(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_file", full_disk)
        with pytest.raises(OSError, match="disk full"):
            new.save_pretrained(tmp_path / "a", "paddlenlp")
    assert PeftModel.from_pretrained(fresh(), tmp_path / "a").adapters["default"].config.r == 2
    new.save_pretrained(tmp_path / "a", "paddlenlp")
    assert PeftModel.from_pretrained(fresh(), tmp_path / "a").adapters["default"].config.r == 3
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted([*files.PADDLE_FILES, "notes.txt"])
    assert not (tmp_path / "a.tmp").exists()
    (tmp_path / "a.tmp").mkdir()
    (tmp_path / "a.tmp" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match=r"a.tmp must be free for the unfinished save, but holds 'thesis.txt'"):
        new.save_pretrained(tmp_path / "a")


def test_experts_in_peft_have_no_dropout(tmp_path, capsys) -> None:
    adapted(LoraConfig(r=2, expert_targets=[(1, "text", 0)], lora_dropout=0.1)).save_pretrained(tmp_path / "a", "peft")
    assert "lora_dropout 0.1 is written as 0" in capsys.readouterr().err
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert settings["lora_dropout"] == 0
    assert len(settings["target_parameters"]) == 2


@pytest.mark.parametrize("product", ["up_gate_product", "down_product"])
def test_an_adapter_of_one_product_of_an_expert_stack(golden, tmp_path, product: str) -> None:
    """PEFT's `target_parameters` may name one parameter of the stack alone: its file holds that
    one, and so does ours after a pass through here.
    """
    inputs, both = packed(golden), adapted(LoraConfig(r=2, expert_targets=[(1, "text", 0), (1, "text", 5)]))
    for name, value in both.named_parameters():
        if "_product" in name and product not in name and not value.stop_gradient:
            value.set_value(np.zeros(value.shape, np.float32))
    both.save_pretrained(tmp_path / "a", "peft")
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    parameter = {"up_gate_product": "gate_up_proj", "down_product": "down_proj"}[product]
    assert settings["target_parameters"] == [f"model.language_model.layers.1.mlp.text_moe.experts.{parameter}"]
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors").keys()
    stack = "base_model.model.model.language_model.layers.1.mlp.text_moe.experts"
    assert keys == {f"{stack}.lora_A.weight", f"{stack}.lora_B.weight"}
    again = PeftModel.from_pretrained(fresh(), tmp_path / "a")
    np.testing.assert_array_equal(logits(again, inputs), logits(both, inputs))
    assert not np.array_equal(logits(again, inputs), logits(fresh(), inputs))
    for dialect in ("paddlenlp", "peft"):
        again.save_pretrained(tmp_path / dialect, dialect)
        again = PeftModel.from_pretrained(fresh(), tmp_path / dialect)
    name = "adapter_model.safetensors"
    assert (tmp_path / "peft" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


A, B = np.zeros((160, 2), np.float32), np.zeros((2, 160), np.float32)
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(("tensors", "settings", "match"), [
    ({f"{Q}.lora_A": A, f"{Q}.lora_B": B}, {"do_qat": True}, r"do_qat \(True\) must be False"),
    ({f"{Q}.lora_A": A, f"{Q}.lora_B": B}, {"init_lora_weights": "pissa"}, r"init_lora_weights \('pissa'\)"),
    ({f"{Q}.lora_A": A, f"{Q}.lora_B": B}, {"scaling": 4.0}, r"scaling \(4.0\) must follow from lora_alpha \(4\), r \(2\)"),
    ({f"{Q}.lora_A": A, f"{Q}.lora_B": B}, {"r": 4}, r"\[160, 2\] must be \[160, 4\] for rank 4"),
    ({f"{Q}.lora_A": A}, {}, "must have lora_A and lora_B, but lora_B is missing"),
    ({"model.layers.9.self_attn.q_proj.lora_A": A}, {}, r"'model.layers.9.self_attn.q_proj.lora_A' \(paddlenlp\) must belong"),
    ({"model.layers.1.mlp.experts.32.down_proj.lora_A": A}, {}, "must belong to a layer of this model"),
    ({"model.layers.0.self_attn.qkv_proj.lora_B": B}, {}, "must have 224 columns"),
])  # fmt: skip
def test_adapters_that_do_not_fit(tmp_path, tensors: dict, settings: dict, match: str) -> None:
    write(tmp_path / "a", tensors, **settings)
    with pytest.raises(ValueError, match=match):
        PeftModel.from_pretrained(fresh(), tmp_path / "a")


def test_folders_that_hold_no_adapter(tmp_path) -> None:
    model = PeftModel(fresh())
    with pytest.raises(FileNotFoundError, match=r"must hold lora_config.json or adapter_config.json"):
        model.load_adapter(tmp_path)
    write(tmp_path / "a", {f"{Q}.lora_A": A, f"{Q}.lora_B": B})
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"must hold one adapter, but holds lora_config.json and adapter_config.json"):
        model.load_adapter(tmp_path / "b")
    (tmp_path / "a" / "peft_model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"pickled adapters \(.pdparams, .bin\) are not read"):
        model.load_adapter(tmp_path / "a")
    for text, match in (("{", "must be JSON"), ("{}", "must hold r; fetch"), ('{"r": 2}', "must hold lora_alpha")):
        (tmp_path / "a" / "lora_config.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            model.load_adapter(tmp_path / "a")


def test_foreign_peft_types_and_keys(tmp_path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "a", "peft")
    config, weights = tmp_path / "a" / "adapter_config.json", tmp_path / "a" / "adapter_model.safetensors"
    settings = json.loads(config.read_text())
    save_file({"base_model.model.model.layers.0.q_proj.lora_A.weight": A}, weights)
    with pytest.raises(ValueError, match=r"\(peft\) must belong to a layer of this model"):
        model.load_adapter(tmp_path / "a", "other")
    config.write_text(json.dumps({**settings, "peft_type": "IA3"}))
    with pytest.raises(ValueError, match=r"peft_type \('IA3'\) must be one of \['LORA', 'PROMPT_TUNING'"):
        model.load_adapter(tmp_path / "a", "other")


def test_prompts_that_do_not_fit(tmp_path) -> None:
    adapted(PromptConfig(2)).save_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "adapter_model.safetensors"
    for tensors, match in (
        ({"prompts": A}, "must hold 'prompt'"),
        ({"prompt": A}, r"tensor 'prompt' \[160, 2\] must be \[2, 160\]"),
        ({"prompt": B, "more": A}, "tensor 'more' must belong to a layer of the adapter"),
    ):
        save_file(tensors, weights)
        model = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=match):
            model.load_adapter(tmp_path / "a", "prompt")
        # nothing is left half loaded
        assert (list(model.adapters), model.active) == (["default"], "default")


def test_bad_saves(tmp_path) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp.gate"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="must be a folder, but is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match=r"dialect \('hf'\) must be one of"):
        model.save_pretrained(tmp_path / "a", "hf")
    with pytest.raises(
        ValueError, match=r"modules_to_save \(layers.1.mlp.gate.weight\) must be a plain layer in the peft dialect"
    ):
        model.save_pretrained(tmp_path / "a", "peft")
    model.save_pretrained(tmp_path / "a", "paddlenlp")
    assert "layers.1.mlp.gate.weight_1" in PeftModel.from_pretrained(fresh(), tmp_path / "a").adapters["default"].copies

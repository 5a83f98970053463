"""Which parameters are trained: layers, parts, names, patterns, the JSON of the introductory
articles; recompute above frozen layers.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from peft_cases import fresh, gradients, packed

from ernie_tune.models.presets import PRESETS
from ernie_tune.models.specs import parameter_specs
from ernie_tune.peft.freeze import FreezeSpec, opened
from ernie_tune.peft.parts import PARTS, frozen_parts, part_of


@pytest.fixture(scope="module")
def model():  # type: ignore[no-untyped-def]
    return fresh()


def trained(model, **settings: object) -> set[str]:  # type: ignore[no-untyped-def]
    count = FreezeSpec(**settings).apply(model)  # type: ignore[arg-type]
    names = {name for name, p in model.named_parameters() if not p.stop_gradient}
    assert count == sum(p.size for name, p in model.named_parameters() if name in names)
    return names


def test_full_is_everything_but_the_correction_biases(model) -> None:
    specs = parameter_specs(model.config)
    assert trained(model) == {name for name in specs if specs[name].trainable}


@pytest.mark.parametrize(("settings", "prefixes"), [
    ({"trainable": [3]}, ["layers.3."]),
    ({"trainable": ["layers.2", "layer.3"]}, ["layers.2.", "layers.3."]),
    ({"trainable": ["2-3", "norm.weight"]}, ["layers.2.", "layers.3.", "norm."]),
    ({"trainable": ["router"]}, [f"layers.{i}.mlp.gate." for i in (1, 2, 3)]),
    ({"trainable": ["vision experts"]}, [f"layers.{i}.mlp.vision_experts." for i in (1, 2, 3)]),
    ({"trainable": ["vision_experts"]}, [f"layers.{i}.mlp.vision_experts." for i in (1, 2, 3)]),
    ({"trainable": ["aligner"]}, ["resampler_model."]),
    ({"trainable": ["vision", "resampler"]}, ["vision_model.", "resampler_model."]),
    ({"trainable": [r"layers\.\d\.self_attn\.q_proj\.weight"]}, [f"layers.{i}.self_attn.q_proj." for i in range(4)]),
    ({"freeze_config": "freeze_llm freeze_aligner"}, ["vision_model."]),
    ({"frozen": ["0-2", "embeddings", "vision", "resampler"]}, ["layers.3.", "norm."]),
    ({"trainable": ["3", "vision"], "frozen": [0, 1], "freeze_config": "freeze_llm"}, ["vision_model."]),
])  # fmt: skip
def test_selection(model, settings: dict, prefixes: list[str]) -> None:
    want = {n for n, s in parameter_specs(model.config).items() if s.trainable and n.startswith(tuple(prefixes))}
    assert trained(model, **settings) == want


def test_only_the_trained_get_gradients(golden, model) -> None:
    names = trained(model, trainable=["3", "norms"], frozen=["embeddings"])
    assert set(gradients(model, packed(golden))) == names


def test_a_frozen_norm_passes_the_gradient_of_a_trained_one(golden, model) -> None:
    """Paddle's CPU layer norm forgets a frozen weight in the gradient of its input; ours must
    not.
    """
    name, inputs = "vision_model.blocks.0.attn.proj.weight", packed(golden)
    trained(model)
    want = gradients(model, inputs)[name]
    trained(model, trainable=[name])
    np.testing.assert_array_equal(gradients(model, inputs)[name], want)


@pytest.mark.parametrize("items", [["router"], ["norms"], ["embeddings"], ["resampler"], ["2"]])
def test_any_part_alone_trains(golden, model, items: list[str]) -> None:
    names = trained(model, trainable=items)
    assert set(gradients(model, packed(golden))) == names


def test_recompute_above_frozen_layers(golden, model) -> None:
    """The first trained layer is not cut off, and frozen layers below it are not run twice."""
    from paddle.distributed.fleet.utils import recompute

    names = trained(model, trainable=["2", "3"])
    inputs, want = packed(golden), gradients(model, packed(golden))
    runs: list[int] = []
    hooks = [layer.register_forward_pre_hook(lambda *_, i=i: runs.append(i)) for i, layer in enumerate(model.layers)]
    found = gradients(model, inputs, recompute=opened(recompute))
    for hook in hooks:
        hook.remove()
    assert set(found) == set(want) == names
    for name, grad in want.items():
        np.testing.assert_array_equal(found[name], grad, err_msg=name)
    assert [runs.count(i) for i in range(4)] == [1, 1, 2, 2]


def test_json_of_the_articles(tmp_path) -> None:
    file = tmp_path / "freeze.json"
    file.write_text(json.dumps({"trainable_layers": ["layer.10", 11], "frozen_layers": ["embeddings", "layer.0"]}))
    assert FreezeSpec.from_json(file) == FreezeSpec(("layer.10", 11), ("embeddings", "layer.0"))
    for text in ('{"trainable": []}', "[]", "{}", '{"frozen_layers": 3}'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r'freeze.json must be \{"trainable_layers"'):
            FreezeSpec.from_json(file)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"freeze.json must be JSON"):
        FreezeSpec.from_json(file)


@pytest.mark.parametrize(("settings", "match"), [
    ({"trainable": ["rooter"]}, r"trainable_layers \('rooter'\) must match a parameter of the model; did you mean 'router'\?"),
    ({"frozen": ["9"]}, r"frozen_layers \('9'\) must match a parameter"),
    ({"frozen": ["layers.["]}, "valid regular expression"),
    ({"trainable": ["1"], "frozen": ["router"]}, r"both hold layers.1.mlp.gate.weight \(2 in all\)"),
    ({"freeze_config": "freeze_llm freeze_vision freeze_aligner"}, "must leave something to train"),
    ({"freeze_config": "freeze_vit"}, r"freeze_config \('freeze_vit'\) must be made of"),
    ({"freeze_config": ["vision"]}, r"freeze_config \('vision'\)"),
])  # fmt: skip
def test_contradictions(model, settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        FreezeSpec(**settings).apply(model)


def test_every_parameter_of_every_model_has_a_part() -> None:
    for config in PRESETS.values():
        assert {part_of(name) for name in parameter_specs(config)} <= set(PARTS)
    assert part_of("norm.weight") == part_of("layers.1.input_layernorm.weight") == "norms"
    assert part_of("resampler_model.after_norm.weight") == "resampler"
    assert part_of("layers.1.mlp.text_experts.down_product.adapters.default.lora_A") == "text experts"
    assert frozen_parts("freeze_vision freeze_router") == {"vision tower", "router"}

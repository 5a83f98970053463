"""What users write -> which modules: words, names, patterns of other libraries, freezing, and
helpful refusals. Names only, no paddle.
"""

from __future__ import annotations

import pytest

from ernie_tune.models.presets import preset
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.dialects import modules
from ernie_tune.peft.parts import part_of
from ernie_tune.peft.targets import expert_targets, linear_targets, modules_named

CONFIG = preset("tiny-b")  # 4 layers, the first dense; 3 vision blocks; 16 experts of each modality
LINEARS = [name for name in modules(CONFIG) if not name.endswith("_product")]
OPEN = {"freeze_config": ""}


def found(*items: str, **settings: object) -> list[str]:
    return linear_targets(LoraConfig(target_modules=items, **settings), LINEARS)  # type: ignore[arg-type]


@pytest.mark.parametrize(("items", "count"), [
    (["query_key_value"], 12),
    (["qkv_proj"], 12),
    ([".*qkv_proj.*"], 12),
    (["q_proj", "k_proj", "v_proj"], 12),
    ([".*q_proj.*", ".*v_proj.*"], 8),
    (["attention"], 16),
    (["mlp"], 3),
    (["shared_experts"], 9),
    (["down_proj"], 4),
    (["up_gate_proj"], 8),
    (["layers.2.self_attn.o_proj"], 1),
    ([r"layers\.[01]\.self_attn\.q_proj"], 2),
    (["all-linear"], 16 + 3 + 9),
])  # fmt: skip
def test_decoder(items: list[str], count: int) -> None:
    names = found(*items)
    assert len(names) == count
    assert names == [name for name in LINEARS if name in names], "model order"
    assert all(name.startswith("layers.") for name in names)


@pytest.mark.parametrize(("items", "count"), [
    (["vision"], 12),
    (["fc1", "fc2"], 6),
    (["qkv"], 3),
    (["resampler"], 5),
    (["all-linear"], 28 + 12 + 5),
    (["all"], 28 + 12 + 5),
    ([r"vision_model\..*"], 13),
])  # fmt: skip
def test_towers_when_they_are_open(items: list[str], count: int) -> None:
    assert len(found(*items, **OPEN)) == count


def test_defaults_follow_freeze_config() -> None:
    assert len(found()) == 28
    assert len(found(**OPEN)) == 28 + 12 + 5
    assert len(found(freeze_config="freeze_vision")) == 28 + 5
    assert {part_of(name) for name in found(freeze_config="freeze_llm freeze_aligner")} == {"vision tower"}
    assert found(expert_targets="text") == []
    assert len(found(expert_targets="shared")) == 9


@pytest.mark.parametrize(("items", "match"), [
    (["query_key_values"], r"did you mean 'query_key_value'\?"),
    ([".*qq_proj.*"], r"did you mean 'q_proj'\?"),
    (["gate"], "must match a linear layer"),
    (["fc1"], "matches only vision_model.blocks.0.mlp.fc1 and the like; take their part out of freeze_config"),
    (["q_proj["], "valid regular expression"),
])  # fmt: skip
def test_no_match(items: list[str], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        found(*items)


def test_experts() -> None:
    def chosen(**settings: object) -> dict[tuple[int, int], tuple[int, ...]]:
        return expert_targets(LoraConfig(**settings), CONFIG)  # type: ignore[arg-type]

    everyone = tuple(range(16))
    assert chosen(target_modules=["q_proj"]) == {}
    assert chosen(expert_targets="text") == {(1, 0): everyone, (2, 0): everyone, (3, 0): everyone}
    assert chosen(target_modules=["vision_experts"]) == {(1, 1): everyone, (2, 1): everyone, (3, 1): everyone}
    assert len(chosen(target_modules=["experts"])) == len(chosen(expert_targets="both")) == 6
    assert chosen(expert_targets=[(3, "vision", 7), (1, "text", 9), (1, "text", 2)]) == {(1, 0): (2, 9), (3, 1): (7,)}


@pytest.mark.parametrize(("settings", "match"), [
    ({"expert_targets": [(0, "text", 1)]}, r"expert_targets \(0, 'text', 1\) must name a sparse layer"),
    ({"expert_targets": [(1, "audio", 1)]}, r"\(1, 'audio', 1\) must name a sparse layer and a modality"),
    ({"expert_targets": [(1, "text", 16)]}, r"must be below num_experts \(16\)"),
    ({"expert_targets": "vision", "freeze_config": "freeze_vision_experts"}, "must not be frozen"),
])  # fmt: skip
def test_bad_experts(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        expert_targets(LoraConfig(**settings), CONFIG)


def test_experts_of_a_dense_model() -> None:
    with pytest.raises(ValueError, match="must be empty for a model without experts"):
        expert_targets(LoraConfig(expert_targets="text"), preset("ernie-4.5-0.3b"))


def test_modules_to_save() -> None:
    names = ["norm", "resampler_model.mlp", "resampler_model.after_norm", "layers.0.mlp.gate_proj"]
    assert modules_named(["resampler_model"], names) == names[1:3]
    assert modules_named(["gate_proj", "norm"], names) == [names[0], names[3]]
    with pytest.raises(
        ValueError, match=r"modules_to_save \('resampler'\) must name a module .* did you mean 'resampler_model'"
    ):
        modules_named(["resampler"], names)

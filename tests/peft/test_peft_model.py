"""`PeftModel` as a model: several adapters, switching them off, merging, generation, what is
trained and what stays, the report.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from peft_cases import adapted, fresh, gradients, logits, move, packed, probe_loss, rows

from ernie_tune.generate.batch import generate
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.specs import parameter_specs
from ernie_tune.peft.bottleneck import Bottleneck
from ernie_tune.peft.config import BottleneckConfig, LoraConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.peft.quantize import quantize_base
from ernie_tune.peft.report import count_parameters, trainable_table

ALL = LoraConfig(r=4, target_modules=["all-linear", "experts"], freeze_config="")


def test_adapters_by_name(golden) -> None:
    inputs, model = packed(golden), adapted(LoraConfig(r=4, target_modules=["attention"]))
    base = logits(fresh(), inputs)
    first = logits(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], expert_targets="vision"), "second")
    np.testing.assert_array_equal(logits(model, inputs), base)  # a fresh adapter changes nothing
    move(model)
    second = logits(model, inputs)
    model.set_adapter("default")
    np.testing.assert_array_equal(logits(model, inputs), first)
    trained = [name for name, p in model.named_parameters() if not p.stop_gradient]
    assert trained
    assert all(".adapters.default." in name for name in trained)
    model.set_adapter("second")
    np.testing.assert_array_equal(logits(model, inputs), second)
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model, inputs), base)
    np.testing.assert_array_equal(logits(model, inputs), second)
    model.delete_adapter("default")
    np.testing.assert_array_equal(logits(model, inputs), second)
    model.delete_adapter("second")
    np.testing.assert_array_equal(logits(model, inputs), base)
    assert {name for name, _ in model.named_parameters()} == set(parameter_specs(model.config))
    assert sorted(model.adapters) == []


def test_disabled_also_after_an_error(golden) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(RuntimeError, match="stop"), model.disable_adapter():
        raise RuntimeError("stop")
    assert model.active == "default"


@pytest.mark.parametrize(
    "settings", [ALL, LoraConfig(r=4, target_modules=["attention", "vision"], use_dora=True, freeze_config="")]
)
def test_merge(golden, capsys, settings: LoraConfig) -> None:
    inputs, model = packed(golden), adapted(settings)
    want = logits(model, inputs)
    plain, change = model.merge(inputs)
    assert type(plain) is ErnieModel
    assert set(plain.state_dict()) == set(parameter_specs(plain.config))
    np.testing.assert_allclose(logits(plain, inputs), want, atol=1e-5)
    assert change == pytest.approx(np.abs(logits(plain, inputs) - want).max(), abs=1e-9)
    assert f"largest |change of a logit| {change:.2e} on {inputs.num_tokens} tokens" in capsys.readouterr().err
    assert np.abs(want - logits(fresh(), inputs)).max() > 0.1


def test_merge_without_inputs_says_nothing(golden, capsys) -> None:
    _, change = adapted(LoraConfig(r=2, target_modules=["q_proj"])).merge()
    assert change is None
    assert "merged" not in capsys.readouterr().err


def test_generation_is_that_of_the_merged_model(golden) -> None:
    model = adapted(ALL)
    params = SamplingParams(max_new_tokens=6)
    prompts, tokens = rows(golden, "image", "text"), model.config.tokens
    model.train()
    ours = [c[0] for c in generate(model, prompts, tokens, params)]
    assert model.training
    plain, _ = model.merge()
    theirs = [c[0] for c in generate(plain, prompts, tokens, params)]
    base = [c[0] for c in generate(fresh(), prompts, tokens, params)]
    for mine, other, without in zip(ours, theirs, base, strict=True):
        assert mine.token_ids == other.token_ids
        np.testing.assert_allclose(mine.logps, other.logps, atol=1e-5)
        assert np.abs(np.subtract(mine.logps, without.logps)).max() > 1e-2


def test_steps_move_the_adapter_and_nothing_else(golden) -> None:
    """Every byte of the model itself, routers and correction biases included, is the same after ten
    steps.
    """
    inputs, model = packed(golden), get_peft_model(fresh(), ALL)
    before = {name: p.numpy().tobytes() for name, p in model.named_parameters()}
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=[p for p in model.parameters() if not p.stop_gradient])
    losses = []
    for _ in range(10):
        loss = probe_loss(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 10
    moved = {name for name, p in model.named_parameters() if p.numpy().tobytes() != before[name]}
    assert moved == {name for name in before if ".adapters." in name}
    assert any("e_score_correction_bias" in name for name in before)


def test_modules_to_save_are_trained_in_a_copy(golden) -> None:
    inputs, base = packed(golden), fresh()
    before, original = logits(base, inputs), base.resampler_model.mlp.weight
    model = get_peft_model(
        base, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["resampler_model.mlp", "norm"])
    )
    found = gradients(model, inputs)
    assert {"resampler_model.mlp.weight", "resampler_model.mlp.bias", "norm.weight"} <= set(found)
    move(model)
    assert np.abs(logits(model, inputs) - before).max() > 0.1
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model, inputs), before)
        assert model.resampler_model.mlp.weight is original
    changed = logits(model, inputs)
    plain, _ = model.merge()
    np.testing.assert_allclose(logits(plain, inputs), changed, atol=1e-5)
    assert plain.resampler_model.mlp.weight is original


def test_lora_plus(golden) -> None:
    model = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["q_proj"], lora_plus_scale=12))
    scales = {name: model.learning_rate_scale(name) for name, p in model.named_parameters() if not p.stop_gradient}
    assert {name.rsplit(".", 1)[-1]: scale for name, scale in scales.items()} == {"lora_A": 1.0, "lora_B": 12.0}
    assert model.learning_rate_scale("norm.weight") == 1.0


def test_bottleneck_adapters(golden) -> None:
    inputs = packed(golden)
    start = get_peft_model(fresh(), BottleneckConfig(width=8))
    np.testing.assert_array_equal(logits(start, inputs), logits(fresh(), inputs))
    assert sum(p.size for p in start.parameters() if not p.stop_gradient) == 4 * 2 * 2 * 160 * 8
    model = adapted(BottleneckConfig(width=8, after="mlp"))
    found = gradients(model, inputs)
    assert len(found) == 4 * 2
    assert "layers.3.mlp.adapters.default.up" in found


def test_bottleneck_of_numbers() -> None:
    """One unit: 2 + 3 * gelu(0.5 * 2), gelu(1) = 0.8413447..."""
    layer = Bottleneck(1, 1, "float64", "it", 0)
    layer.down.set_value(paddle.to_tensor([[0.5]], dtype="float64"))
    layer.up.set_value(paddle.to_tensor([[3.0]], dtype="float64"))
    out = layer(layer, (), paddle.to_tensor([[2.0]], dtype="float64"))
    assert out.item() == pytest.approx(2 + 3 * 0.8413447460685429, abs=1e-9)


def test_report(capsys) -> None:
    model = get_peft_model(
        fresh(), LoraConfig(r=16, lora_alpha=32, target_modules=["query_key_value"], expert_targets=[(1, "vision", 0)])
    )
    counts = count_parameters(model)
    total = sum(spec.size for spec in parameter_specs(model.config).values())
    assert sum(c.base for c in counts.values()) == total
    experts = 16 * (160 + 64) + 16 * (32 + 160)
    assert {part: c.trained for part, c in counts.items() if c.trained} == {
        "attention": 45056,
        "vision experts": experts,
    }
    assert "head" not in counts  # tied: it has no parameters
    model.print_trainable_parameters()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "LoRA 'default': r 16, alpha 32, scaling 2"
    share = 100 * (45056 + experts) / (total + 45056 + experts)
    assert (
        lines[1]
        == f"trainable params: {45056 + experts:,} || all params: {total + 45056 + experts:,} || trainable%: {share:.4f}"
    )
    table = {line[:16].strip(): line[16:].split() for line in lines[3:]}
    assert table["text experts"] == ["0", "2,211,840", "frozen"]
    assert table["attention"] == ["45,056", f"{245_760 + 45_056:,}", "15.493%"]
    assert set(table) == {
        "attention", "shared experts", "text experts", "vision experts", "router", "dense MLP", "norms", "embeddings",
        "vision tower", "resampler",
    }  # fmt: skip


def test_report_of_a_plain_model() -> None:
    model = fresh("tiny-c")
    table = trainable_table(model)
    assert "head" in table
    bias = 2 * 2 * 16
    total = sum(spec.size for spec in parameter_specs(model.config).values())
    assert table.startswith(f"trainable params: {total - bias:,} || all params: {total:,}")


def test_bad_calls(golden) -> None:
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"]))
    for call, match in (
        (lambda: get_peft_model(model, ALL), "must not be a PeftModel already"),
        (lambda: model.add_adapter(ALL, "a.b"), r"adapter name \('a.b'\) must be made of letters"),
        (lambda: model.add_adapter(ALL), r"adapter name \('default'\) must be new"),
        (lambda: model.set_adapter("other"), r"adapter name \('other'\) must be one of \['default'\]"),
        (lambda: model.delete_adapter("other"), r"adapter name \('other'\)"),
        (
            lambda: model.add_adapter(LoraConfig(freeze_config="freeze_llm freeze_vision freeze_aligner"), "none"),
            r"freeze_config \(freeze_llm freeze_vision freeze_aligner\) must leave a part",
        ),
        (lambda: BottleneckConfig(width=0), r"width \(0\)"),
        (lambda: BottleneckConfig(after="head"), r"after \(\['head'\]\)"),
        (lambda: PromptConfig(0), r"num_virtual_tokens \(0\)"),
        (lambda: PromptConfig(2, init_ids=(1, 2, 3)), r"init_ids \(3\) must be as many as num_virtual_tokens \(2\)"),
        (lambda: PromptConfig(2, encoder_width=-1), r"encoder_width \(-1\)"),
        (lambda: PrefixConfig(0), r"num_virtual_tokens \(0\)"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"adapter name \(''\) must be one of"):
        model.merge()
    with pytest.raises(ValueError, match=r"adapter_name \(None\) must be given"):
        model.save_pretrained("nowhere")
    model.add_adapter(BottleneckConfig(4), "bottleneck")
    with pytest.raises(ValueError, match="must be given a LoRA adapter, not BottleneckConfig"):
        model.merge()


def test_a_quantised_base_is_not_merged_or_copied() -> None:
    model = get_peft_model(quantize_base(fresh(), "weight_only_int8"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="must be given float weights"):
        model.merge()
    with pytest.raises(ValueError, match=r"modules_to_save \(layers.0.self_attn.q_proj\) must have float weights"):
        model.add_adapter(LoraConfig(target_modules=["k_proj"], modules_to_save=["q_proj"]), "other")

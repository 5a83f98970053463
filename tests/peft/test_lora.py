"""LoRA on linear layers: the start, closed forms, gradients against finite differences, frozen
weights, recompute, counts.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from paddle import nn
from peft_cases import adapted, fresh, gradients, logits, packed, slope
from weights import normal

from ernie_tune.models.presets import preset
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.dialects import modules, shape_of
from ernie_tune.peft.lora import LinearLora, draw_factor, dropout, tall_product
from ernie_tune.peft.model import get_peft_model
from ernie_tune.peft.targets import linear_targets

ARTICLE = LoraConfig(r=16, lora_alpha=32, target_modules=["query_key_value"], lora_dropout=0.05, task_type="CAUSAL_LM")
EVERYTHING = {"target_modules": ["all-linear", "experts"], "freeze_config": ""}


def test_the_articles_config() -> None:
    model = get_peft_model(fresh(), ARTICLE)
    trained = {name: p for name, p in model.named_parameters() if not p.stop_gradient}
    assert len(trained) == 4 * 3 * 2
    assert sum(p.size for p in trained.values()) == 4 * 16 * ((160 + 160) + 2 * (160 + 32))
    assert "layers.3.self_attn.v_proj.adapters.default.lora_B" in trained
    assert ARTICLE.scaling == 2.0


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "target_modules": ["attention"]}, EVERYTHING])
def test_the_start_is_the_base_bit_for_bit(golden, settings: dict) -> None:
    inputs, base = packed(golden), fresh()
    before = logits(base, inputs)
    np.testing.assert_array_equal(logits(get_peft_model(base, LoraConfig(r=4, **settings)), inputs), before)


def test_scaling() -> None:
    assert LoraConfig(r=4).scaling == 2.0
    assert LoraConfig(r=16, rslora=True).scaling == 1.0  # 4 / sqrt(16)
    assert LoraConfig(r=16, lora_alpha=8, rslora=True).scaling == 2.0
    assert LoraConfig(r=16, lora_alpha=8).scaling == 0.5


def test_attention_of_the_28b_at_rank_32() -> None:
    """14.7 M trained parameters, counted from names alone."""
    config = preset("ernie-4.5-vl-28b-a3b")
    targets = linear_targets(LoraConfig(target_modules=["attention"]), modules(config))
    assert sum(32 * sum(shape_of(name, config)) for name in targets) == 28 * 32 * (2 * 5120 + 2 * 3072) == 14_680_064


def test_a_is_kaiming_uniform_and_drawn_by_name() -> None:
    a = draw_factor("layers.0.self_attn.q_proj", (4000, 16), seed=1)
    bound = 1 / math.sqrt(4000)
    assert np.abs(a).max() <= bound
    assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    np.testing.assert_array_equal(a, draw_factor("layers.0.self_attn.q_proj", (4000, 16), seed=1))
    assert (draw_factor("layers.0.self_attn.k_proj", (4000, 16), seed=1) != a).mean() > 0.99
    assert (draw_factor("layers.0.self_attn.q_proj", (4000, 16), seed=2) != a).mean() > 0.99


def linear_with_lora(**settings) -> tuple[nn.Linear, LinearLora, paddle.Tensor]:  # type: ignore[no-untyped-def]
    linear = nn.Linear(6, 5)
    linear.to(dtype="float64")
    linear.bias.set_value(paddle.to_tensor(normal("bias", (5,))))
    lora = LinearLora(linear, "it", LoraConfig(r=2, lora_alpha=3, **settings))
    lora.lora_B.set_value(paddle.to_tensor(normal("B", (2, 5))))
    return linear, lora, paddle.to_tensor(normal("x", (7, 6)))


def test_closed_form_of_one_layer() -> None:
    linear, lora, x = linear_with_lora()
    got = lora(linear, (x,), linear(x)).numpy()
    w, a, b = (t.numpy() for t in (linear.weight, lora.lora_A, lora.lora_B))
    np.testing.assert_allclose(got, x.numpy() @ (w + 1.5 * a @ b) + linear.bias.numpy(), rtol=1e-12)


def test_dora_has_columns_of_the_given_length() -> None:
    """Column j of the effective weight has length magnitude[j] and the direction of (W + scaling A
    B)[:, j]; the bias is outside.
    """
    linear, lora, _ = linear_with_lora(use_dora=True)
    lora.magnitude.set_value(paddle.to_tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype="float64"))
    bias = linear.bias.numpy()
    effective = lora(linear, (paddle.eye(6, dtype="float64"),), linear(paddle.eye(6, dtype="float64"))).numpy() - bias
    np.testing.assert_allclose(np.linalg.norm(effective, axis=0), [1, 2, 3, 4, 5], rtol=1e-12)
    direction = linear.weight.numpy() + 1.5 * lora.lora_A.numpy() @ lora.lora_B.numpy()
    cosine = (effective * direction).sum(0) / np.linalg.norm(direction, axis=0) / [1, 2, 3, 4, 5]
    np.testing.assert_allclose(cosine, np.ones(5), rtol=1e-12)
    np.testing.assert_allclose(lora.merged(linear.weight).numpy(), effective, rtol=1e-12)


def test_dora_gradient_treats_the_norm_as_a_constant() -> None:
    """With c = m / norm fixed: dB = s (xA)^T (g c), dm_j = (g . y)_j / m_j without the bias
    (2402.09353, 4.3).
    """
    linear, lora, x = linear_with_lora(use_dora=True)
    bare = lora(linear, (x,), linear(x)) - linear.bias
    g = normal("g", bare.shape)
    (bare * paddle.to_tensor(g)).sum().backward()
    total = linear.weight.numpy() + 1.5 * lora.lora_A.numpy() @ lora.lora_B.numpy()
    c = lora.magnitude.numpy() / np.linalg.norm(total, axis=0)
    np.testing.assert_allclose(
        lora.lora_B.grad.numpy(), 1.5 * (x.numpy() @ lora.lora_A.numpy()).T @ (g * c), rtol=1e-10
    )
    np.testing.assert_allclose(
        lora.magnitude.grad.numpy(), (g * bare.numpy()).sum(0) / lora.magnitude.numpy(), rtol=1e-10
    )


def test_gradients_against_finite_differences(golden) -> None:
    model, inputs = adapted(LoraConfig(r=3, rslora=True, **EVERYTHING), dtype="float64"), packed(golden)
    found = gradients(model, inputs)
    named = dict(model.named_parameters())
    for owner in (
        "layers.0.self_attn.q_proj",
        "layers.0.mlp.down_proj",
        "layers.2.mlp.shared_experts.up_proj",
        "layers.2.mlp.text_experts.up_gate_product",
        "layers.3.mlp.vision_experts.down_product",
        "vision_model.blocks.1.attn.qkv",
        "resampler_model.temporal_linear.2",
    ):
        for leaf in ("lora_A", "lora_B"):
            name = f"{owner}.adapters.default.{leaf}"
            direction = normal(f"direction of {name}", named[name].shape)
            want = slope(model, inputs, named[name], direction, 1e-6)
            assert (found[name] * direction).sum() == pytest.approx(want, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["v_proj"], ["gate_proj"], ["up_proj"], ["o_proj"], ["text_experts"], ["vision"]]
)
def test_any_subset_trains_and_nothing_else_gets_a_gradient(golden, targets: list[str]) -> None:
    """Frozen inputs beside trained ones must not break a hand-written backward."""
    model = adapted(LoraConfig(r=2, target_modules=targets, freeze_config=""))
    found = gradients(model, packed(golden))
    assert set(found) == {name for name, p in model.named_parameters() if not p.stop_gradient}
    assert all(np.abs(grad).max() > 0 for name, grad in found.items() if name.endswith("lora_B"))


def test_recompute_trains_the_first_layers_too(golden) -> None:
    """A frozen embedding or patch embedding must not cut the first recomputed block off
    (trap p of Fleet); dropout is drawn again.
    """
    from paddle.distributed.fleet.utils import recompute

    model = adapted(LoraConfig(r=2, target_modules=["attention", "vision"], lora_dropout=0.3, freeze_config=""))
    model.train()
    both = []
    for options in ({}, {"recompute": recompute}):
        paddle.seed(5)
        both.append(gradients(model, packed(golden), **options))
    assert "vision_model.blocks.0.attn.qkv.adapters.default.lora_A" in both[1]
    assert "layers.0.self_attn.q_proj.adapters.default.lora_A" in both[1]
    assert both[0].keys() == both[1].keys()
    for name, grad in both[0].items():
        np.testing.assert_array_equal(grad, both[1][name], err_msg=name)


def test_dropout_keeps_the_mean_and_acts_in_training_only() -> None:
    x = paddle.ones([400, 500])
    paddle.seed(1)
    out = dropout(x, 0.05, training=True).numpy()
    dropped = (out == 0).mean()
    # four standard errors
    assert dropped == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / 200_000))
    np.testing.assert_allclose(out[out != 0], 1 / 0.95, rtol=1e-6)
    paddle.seed(1)
    np.testing.assert_array_equal(dropout(x, 0.05, training=True).numpy(), out)
    assert dropout(x, 0.05, training=False) is x


@pytest.mark.parametrize("tokens", [5, 1024, 1500])
def test_product_of_tall_matrices(tokens: int) -> None:
    a, b = normal("a", (tokens, 3)), normal("b", (tokens, 4))
    np.testing.assert_allclose(tall_product(paddle.to_tensor(a), paddle.to_tensor(b)).numpy(), a.T @ b, rtol=1e-10)


@pytest.mark.parametrize(("change", "match"), [
    ({"r": 0}, r"r \(0\) must be at least 1"),
    ({"lora_alpha": 0}, r"lora_alpha \(0\)"),
    ({"lora_dropout": 1.0}, r"lora_dropout \(1.0\)"),
    ({"lora_plus_scale": 0}, r"lora_plus_scale \(0\)"),
    ({"task_type": "SEQ_CLS"}, r"task_type \('SEQ_CLS'\)"),
    ({"bias": "all"}, r"bias \('all'\)"),
    ({"expert_targets": "all"}, r"expert_targets \('all'\)"),
    ({"use_dora": True, "expert_targets": "text"}, r"use_dora \(True\) must not go with expert_targets"),
    ({"freeze_config": "freeze_everything"}, r"freeze_config \('freeze_everything'\)"),
])  # fmt: skip
def test_bad_settings(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        LoraConfig(**change)

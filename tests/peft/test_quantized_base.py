"""Quantised frozen bases: rounding bounds, packing, bytes, and that training on one is training on
the rounded model.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from paddle import nn
from peft_cases import fresh, gradients, logits, move, packed, probe_loss
from weights import normal

from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.peft.quantize import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedProduct,
    QuantizedWeight,
    quantize,
    quantize_base,
    weight_bytes,
)


@pytest.mark.parametrize(("bits", "rows", "groups", "largest"), [(8, 128, 1, 127), (4, 128, 2, 7), (4, 96, 1, 7)])
def test_rounding(bits: int, rows: int, groups: int, largest: int) -> None:
    weight = normal("weight", (rows, 24)).astype(np.float32)
    weight[:, 5] = 0
    codes, scale = quantize(weight, bits)
    assert codes.nbytes == rows * 24 * bits // 8
    assert scale.shape == (groups, 24)
    dense = QuantizedWeight.rounded(paddle.to_tensor(weight), bits).dense().numpy()
    wide = np.repeat(scale, rows // groups, axis=0)
    assert (np.abs(dense - weight) <= wide / 2 + 1e-7).all()
    steps = dense / wide
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)
    # the largest value of every column is met exactly
    assert np.abs(np.rint(steps)).max() == largest
    assert (dense[:, 5] == 0).all()


def test_bytes_of_the_small_model(capsys) -> None:
    """All weights of preset small, scales included: at most 1/3.5 and 1/6 of float32."""
    config = preset("small")
    ratios = {}
    for algorithm in ("weight_only_int8", "weight_only_int4", "weight_only_mix"):
        model = ErnieModel(config)
        before = weight_bytes(model)
        ratios[algorithm] = before / weight_bytes(quantize_base(model, algorithm))
    assert before == 4 * 31_785_120
    assert ratios["weight_only_int8"] > 3.9
    assert ratios["weight_only_int4"] > 6.6
    assert ratios["weight_only_mix"] > 4.5
    assert "64 linear layers int8, 20 expert stacks int4, embedding as it was: 127.1 MB -> " in capsys.readouterr().err


def rounded(algorithm: str) -> tuple[ErnieModel, ErnieModel]:
    """tiny-b quantised, and tiny-b in float with the rounded weights."""
    quantised, plain = quantize_base(fresh(), algorithm), fresh()
    swapped = dict(quantised.named_sublayers())
    with paddle.no_grad():
        for name, layer in plain.named_sublayers():
            if isinstance(layer, nn.Linear) or name == "embed_tokens":
                layer.weight.set_value(swapped[name].weight)
        for name, layer in swapped.items():
            if isinstance(layer, QuantizedProduct):
                owner, _, leaf = name.rpartition(".")
                stack = dict(plain.named_sublayers())[owner]._parameters[leaf.replace("_product", "_proj")]
                stack.set_value(paddle.stack([layer.quant.dense(e) for e in range(stack.shape[0])]))
    return quantised, plain


@pytest.mark.parametrize("algorithm", ["weight_only_int8", "weight_only_int4", "weight_only_mix"])
def test_training_on_it_is_training_on_the_rounded_model(golden, algorithm: str) -> None:
    """Same logits, and for LoRA (with DoRA's norms) the same gradients, as a float model that has
    the rounded weights.
    """
    inputs = packed(golden)
    both = rounded(algorithm)
    kinds = {type(layer) for layer in both[0].sublayers()}
    assert {QuantizedLinear, QuantizedProduct} <= kinds
    assert (QuantizedEmbedding in kinds) == (algorithm != "weight_only_mix")
    first, second = (logits(model, inputs) for model in both)
    np.testing.assert_allclose(first, second, atol=1e-5)
    config = LoraConfig(r=2, target_modules=["all-linear", "experts"], freeze_config="")
    for settings in (config, LoraConfig(r=2, target_modules=["q_proj", "fc1"], use_dora=True, freeze_config="")):
        found = []
        for model in both:
            on_top = get_peft_model(model, settings)
            move(on_top)
            found.append(gradients(on_top, inputs))
            on_top.delete_adapter("default")
        assert found[0].keys() == found[1].keys()
        assert len(found[0]) > 10
        for name, grad in found[0].items():
            np.testing.assert_allclose(grad, found[1][name], atol=1e-4 * np.abs(found[1][name]).max(), err_msg=name)


def test_lora_on_top_learns_and_the_base_stays(golden) -> None:
    inputs, model = packed(golden), get_peft_model(quantize_base(fresh(), "weight_only_mix"), LoraConfig(r=4))
    before = {name: value.numpy().tobytes() for name, value in model.state_dict().items() if ".adapters." not in name}
    optimizer = paddle.optimizer.AdamW(1e-2, parameters=[p for p in model.parameters() if not p.stop_gradient])
    losses = []
    for _ in range(5):
        loss = probe_loss(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 10
    after = model.state_dict()
    assert all(after[name].numpy().tobytes() == value for name, value in before.items())


def test_what_stays_float() -> None:
    model = quantize_base(fresh("tiny-c"), "weight_only_int4")
    names = {name for name, _ in model.named_parameters()}
    assert {"lm_head.weight", "norm.weight", "vision_model.blocks.0.attn.qkv.bias", "layers.3.mlp.gate.weight"} <= names
    assert (
        not {"layers.0.self_attn.q_proj.weight", "layers.3.mlp.text_experts.down_proj", "embed_tokens.weight"} & names
    )


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"weight_quantize_algo \('nf4'\) must be one of"):
        quantize_base(fresh(), "nf4")
    model = fresh()
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="must not have adapters yet"):
        quantize_base(model, "weight_only_int8")
    with pytest.raises(ValueError, match="must not have quantised layers yet"):
        quantize_base(quantize_base(fresh(), "weight_only_int8"), "weight_only_int8")
    with pytest.raises(ValueError, match=r"input width \(3\) must be even for 4 bits"):
        QuantizedWeight.rounded(paddle.ones([3, 2]), 4)


def test_fresh_small_model_still_speaks_after_int8(golden) -> None:
    """int8 of tiny-b moves its logits by a few thousandths of their spread."""
    inputs = packed(golden, "text")
    want = logits(fresh(), inputs)
    got = logits(quantize_base(fresh(), "weight_only_int8"), inputs)
    assert np.sqrt(((got - want) ** 2).mean()) < 0.05 * want.std()

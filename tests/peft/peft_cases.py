"""Shared by the tests of adapters: fresh copies of the golden models, inputs, and random adapter
weights. Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import paddle
from conftest import _golden_model
from paddle import Tensor
from weights import case_rows, normal

from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import PackedInput, Row, pack
from ernie_tune.peft.config import PeftConfig
from ernie_tune.peft.model import PeftModel, get_peft_model


def fresh(name: str = "tiny-b", dtype: str = "float32") -> ErnieModel:
    """A copy of a golden model that a test may change, in eval mode."""
    golden = _golden_model(name, dtype)
    model = ErnieModel(golden.config, dtype)
    model.set_state_dict(golden.state_dict())
    model.eval()
    return model


def adapted(config: PeftConfig, dtype: str = "float32", scale: float = 0.05) -> PeftModel:
    """tiny-b with an adapter whose parameters are moved away from their start, in eval mode."""
    model = get_peft_model(fresh(dtype=dtype), config)
    move(model, scale)
    return model


def move(model: PeftModel, scale: float = 0.05) -> None:
    """Add noise, drawn by name, to everything that is trained."""
    for name, value in model.named_parameters():
        if not value.stop_gradient:
            wide = value.astype("float64")  # bfloat16 has no sum on the CPU
            value.set_value((wide + paddle.to_tensor(scale * normal(name, value.shape))).astype(value.dtype))


def rows(golden, *cases: str) -> list[Row]:  # type: ignore[no-untyped-def]
    return [row for case in cases or ("mixed",) for row in case_rows(golden("tiny_b"), case)]


def packed(golden, *cases: str) -> PackedInput:  # type: ignore[no-untyped-def]
    return pack(rows(golden, *cases), _golden_model("tiny-b", "float32").config.tokens)


def logits(model: ErnieModel, inputs: PackedInput) -> np.ndarray:
    with paddle.no_grad():
        return model.logits(model(inputs)).numpy()


def probe_loss(model: ErnieModel, inputs: PackedInput, **options) -> Tensor:  # type: ignore[no-untyped-def]
    """A scalar that every hidden value moves: the product with a fixed random tensor."""
    hidden = model(inputs, **options)
    direction = paddle.to_tensor(normal("probe of hidden states", hidden.shape)).astype(hidden.dtype)
    return (hidden * direction).sum()


def gradients(model: ErnieModel, inputs: PackedInput, **options) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """d probe_loss / d parameter for every parameter that got a gradient."""
    for p in model.parameters():
        p.clear_gradient(False)  # the model's own clear_gradients forgets those that are frozen now
    probe_loss(model, inputs, **options).backward()
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}


def slope(model: ErnieModel, inputs: PackedInput, parameter: Tensor, direction: np.ndarray, step: float) -> float:
    """Central difference of probe_loss along `direction` of one float64 parameter."""
    start, values = parameter.numpy().copy(), []
    for sign in (1, -1):
        parameter.set_value(paddle.to_tensor(start + sign * step * direction))
        with paddle.no_grad():
            values.append(probe_loss(model, inputs).item())
    parameter.set_value(paddle.to_tensor(start))
    return (values[0] - values[1]) / (2 * step)

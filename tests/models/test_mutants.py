"""Classic mistakes, made on purpose: each must move the logits, or the golden tests would not
notice it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
import pytest
from weights import case_rows

from ernie_tune.models import ernie, moe, vision
from ernie_tune.models.inputs import PackedInput, pack


def swapped_height_width(p: np.ndarray, *args: object) -> np.ndarray:
    return REAL_TEXT_ANGLES(p[:, [0, 2, 1]], *args)


def time_takes_the_first_frequencies(p: np.ndarray, head_dim: int, freq_allocation: int, theta: float) -> np.ndarray:
    return REAL_TEXT_ANGLES(p[:, [1, 0, 2]], head_dim, head_dim // 2 - freq_allocation, theta)


def weights_with_bias(
    x: paddle.Tensor, w: paddle.Tensor, bias: paddle.Tensor, k: int, norm_min: float, forced: None = None
) -> moe.Routing:
    logits = paddle.matmul(x, w)
    weight, chosen = paddle.topk(paddle.nn.functional.softmax(logits, -1) + bias, k)
    return moe.Routing(logits, weight / weight.sum(-1, keepdim=True), chosen)


def selection_without_bias(
    x: paddle.Tensor, w: paddle.Tensor, bias: paddle.Tensor, k: int, norm_min: float, forced: None = None
) -> moe.Routing:
    return REAL_ROUTE(x, w, bias * 0, k, norm_min)


def not_renormalised(
    x: paddle.Tensor, w: paddle.Tensor, bias: paddle.Tensor, k: int, norm_min: float, forced: None = None
) -> moe.Routing:
    return REAL_ROUTE(x, w, bias, k, 1.0)


def image_paired_with_zeros(grid: np.ndarray, merge: int = 2) -> np.ndarray:
    pairs = REAL_PAIRS(grid, merge)
    return pairs[::-1]


def adjacent_vision_rope(x: paddle.Tensor, cos: paddle.Tensor, sin: paddle.Tensor) -> paddle.Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return x * cos + paddle.stack([-b, a], -1).reshape(x.shape) * sin


REAL_TEXT_ANGLES, REAL_ROUTE, REAL_PAIRS = ernie.text_angles, moe.route, vision.frame_pairs

MUTANTS: list[tuple[object, str, Callable]] = [
    (ernie, "text_angles", swapped_height_width),
    (ernie, "text_angles", time_takes_the_first_frequencies),
    (moe, "route", weights_with_bias),
    (moe, "route", selection_without_bias),
    (moe, "route", not_renormalised),
    (vision, "frame_pairs", image_paired_with_zeros),
    (vision, "rotate_halves", adjacent_vision_rope),
    (vision, "quick_gelu", paddle.nn.functional.gelu),
    (
        moe,
        "gated_halves",
        lambda both: paddle.nn.functional.silu(both[:, both.shape[1] // 2 :]) * both[:, : both.shape[1] // 2],
    ),
]


def error(model, data, packed: PackedInput) -> float:
    with paddle.no_grad():
        return float(np.abs(model.logits(model(packed)).numpy() - data["mixed/logits"]).max())


@pytest.mark.parametrize(("module", "name", "mutant"), MUTANTS, ids=[f"{m[1]}-{m[2].__name__}" for m in MUTANTS])
def test_mutant_is_caught(
    monkeypatch: pytest.MonkeyPatch, golden_model, golden, module: object, name: str, mutant: Callable
) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    packed = pack(case_rows(data, "mixed"), model.config.tokens)
    assert error(model, data, packed) < 1e-5
    monkeypatch.setattr(module, name, mutant)
    assert error(model, data, packed) > 1e-3


@pytest.mark.parametrize("field", ["markers as text", "placeholders as text"])
def test_wrong_routing_types_are_caught(golden_model, golden, field: str) -> None:
    from dataclasses import replace

    model, data = golden_model("tiny-b"), golden("tiny_b")
    packed = pack(case_rows(data, "mixed"), model.config.tokens)
    wrong = packed.placeholder_T if field == "markers as text" else packed.vision_T & ~packed.placeholder_T
    assert error(model, data, replace(packed, vision_T=wrong)) > 1e-3


def test_mixed_up_experts_are_caught(golden_model, golden) -> None:
    """Gate and up halves swapped, and vision experts off by one."""
    model, data = golden_model("tiny-b"), golden("tiny_b")
    packed = pack(case_rows(data, "mixed"), model.config.tokens)
    experts = model.layers[2].mlp.vision_experts.up_gate_proj
    kept = experts.clone()
    for changed in (paddle.concat([kept[:, :, 32:], kept[:, :, :32]], axis=-1), paddle.roll(kept, 1, axis=0)):
        experts.set_value(changed)
        assert error(model, data, packed) > 1e-3
    experts.set_value(kept)

"""The pipeline times every other axis against one process: losses, norms, gradients and parameters after five clipped steps, scores and answers."""

from __future__ import annotations

from typing import Any

import pytest
from launching import largest, parity

TOLERANCE = 1e-5
TP, SP = {"tensor": 2, "pipe": 2}, {"tensor": 2, "pipe": 2, "sequence_parallel": True}
SHARDED = {"pipe": 2, "sharding": 2, "sharding_stage": 1}

# (name, degrees, job); every job has pictures in some micro-batches only, unless it says otherwise.
PRODUCTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("TP2 PP2 tied", TP, {}),
    ("TP2 PP2 untied LoRA recomputed", TP, {"model": "c", "train": "lora", "recompute": True}),
    ("TP2 PP2+SP tied", SP, {}),
    ("TP2 PP2+SP untied recomputed", SP, {"model": "c", "recompute": True, "images": (1,)}),
    ("TP2 PP2+SP EP2", {**SP, "expert": 2}, {"bias_update": 0.01}),
    ("PP2 sharding 1", SHARDED, {"images": (0,)}),
    ("PP2 sharding 1 EP2", {**SHARDED, "expert": 2}, {"train": "expert_lora"}),
    ("PP2 EP2", {"pipe": 2, "data": 2, "expert": 2}, {}),
    ("PP2 DP2 router losses", {"pipe": 2, "data": 2}, {"optimizer": "sgd", "balance": 0.01}),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every layout's result; they share a start."""
    cases = [{"name": name, "degrees": degrees, "job": job} for name, degrees, job in PRODUCTS]
    return {r["name"]: r for r in parity(tmp_path_factory.mktemp("four"), 4, cases)}


@pytest.mark.parametrize("name", [row[0] for row in PRODUCTS])
def test_a_product_equals_one_process(name: str, found: dict[str, dict[str, Any]]) -> None:
    result = found[name]
    assert "worst" in result, result
    assert largest(result) < TOLERANCE, result["worst"]

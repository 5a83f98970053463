"""Layouts against one process: losses, norms, gradients and parameters after five AdamW steps with
clipping, and mistakes that must show.

The whole matrix is `python tests/parallel/matrix.py`; here is the part of it that fits into a few
minutes of two cores.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launching import largest, parity
from mutants import FATAL, FOURS, MUTANTS, Mutant

TOLERANCE = 1e-5
TP, SP, EP = {"tensor": 2}, {"tensor": 2, "sequence_parallel": True}, {"data": 2, "expert": 2}
SHARDED = {"sharding": 2, "sharding_stage": 1}

# (name, degrees, job) of the layouts of two processes.
PAIRS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("TP2 tied", TP, {}),
    ("TP2 untied LoRA recomputed", TP, {"model": "c", "train": "lora", "recompute": True}),
    ("TP2 DoRA", TP, {"train": "dora"}),
    ("TP2 LoRA and a head trained in full", TP, {"model": "c", "train": "saved"}),
    ("TP2 prefix", TP, {"train": "prefix"}),
    ("TP2+SP untied", SP, {"model": "c"}),
    ("TP2+SP LoRA on experts, 4-bit base", SP, {"train": "expert_lora:weight_only_mix"}),
    ("TP2+SP EP2 recomputed", {**SP, "expert": 2}, {"recompute": True}),
    ("TP2+SP EP2 LoRA on some experts", {**SP, "expert": 2}, {"train": "some_experts"}),
    ("EP2 tied, router bias", EP, {"bias_update": 0.01}),
    ("EP2 text alone", EP, {"images": ()}),
    ("EP2 LoRA on experts", EP, {"train": "expert_lora"}),
    ("EP2 frozen but vision experts", EP, {"train": "frozen:vision experts+router", "recompute": True}),
    ("sharding 1", SHARDED, {"images": (0,)}),
    ("sharding 1 EP2", {**SHARDED, "expert": 2}, {}),
    ("DP2 SGD, router losses", {"data": 2}, {"optimizer": "sgd", "balance": 0.01}),
    ("sharding 2", {**SHARDED, "sharding_stage": 2}, {}),
    ("sharding 3 EP2 LoRA", {**SHARDED, "sharding_stage": 3, "expert": 2}, {"train": "lora", "recompute": True}),
]
# In float64 nothing but the order of sums is left between a layout and one process.
WIDE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("TP2 float64", TP, {"dtype": "float64"}),
    ("TP2+SP EP2 LoRA on experts, float64", {**SP, "expert": 2}, {"dtype": "float64", "train": "expert_lora"}),
    ("EP2 sharding 1 float64", {**SHARDED, "expert": 2}, {"dtype": "float64"}),
]
# Of four; every job has pictures in some micro-batches only, unless it says otherwise.
QUADS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("TP2+SP EP4 sharding 1", {**SP, **SHARDED, "expert": 4}, {}),
    ("TP2 sharding 1 LoRA", {**TP, **SHARDED}, {"train": "lora"}),
    ("EP2 sharding 4", {**SHARDED, "sharding": 4, "expert": 2}, {"model": "c"}),
    ("TP2+SP sharding 3", {**SP, **SHARDED, "sharding_stage": 3}, {"recompute": True}),
    ("DP2 sharding 1", {"data": 2, **SHARDED}, {"recompute": True}),
    ("TP2 PP2", {**TP, "pipe": 2}, {}),
    ("TP2 PP2 untied LoRA recomputed", {**TP, "pipe": 2}, {"model": "c", "train": "lora", "recompute": True}),
    ("TP2+SP PP2", {**SP, "pipe": 2}, {}),
    ("TP2+SP PP2 untied recomputed", {**SP, "pipe": 2}, {"model": "c", "recompute": True, "images": (1,)}),
    ("TP2+SP EP2 PP2, router bias", {**SP, "expert": 2, "pipe": 2}, {"bias_update": 0.01}),
    ("TP2+SP EP2 PP2, read in parts", {**SP, "expert": 2, "pipe": 2}, {"lazy": True}),
    ("PP2 EP2", {**EP, "pipe": 2}, {"model": "c"}),
    ("PP2 sharding 1", {**SHARDED, "pipe": 2}, {"train": "lora", "recompute": True}),
    ("PP2 sharding 1 EP2", {**SHARDED, "pipe": 2, "expert": 2}, {"train": "expert_lora"}),
    ("PP2 DP2, router losses", {"pipe": 2, "data": 2}, {"optimizer": "sgd", "balance": 0.01}),
]


def cases(rows: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    return [{"name": name, "degrees": degrees, "job": job} for name, degrees, job in rows]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every case's result; those of one number of processes share a start."""
    told = [{**case, "name": f"{case['name']}, told"} for case in mutant_cases(MUTANTS, self_check=True)]
    results = parity(
        tmp_path_factory.mktemp("two"), 2, cases(PAIRS + WIDE) + mutant_cases(MUTANTS) + told, timeout_s=400
    )
    results += parity(tmp_path_factory.mktemp("four"), 4, cases(QUADS) + mutant_cases(FOURS), timeout_s=400)
    return {r["name"]: r for r in results}


@pytest.mark.parametrize("name", [row[0] for row in PAIRS + QUADS])
def test_a_layout_equals_one_process(name: str, found: dict[str, dict[str, Any]]) -> None:
    result = found[name]
    assert "worst" in result, result
    assert largest(result) < TOLERANCE, result["worst"]


def mutant_cases(mutants: dict[str, Mutant], self_check: bool = False) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "degrees": m.degrees,
            "job": {"steps": 2, **m.job},
            "mutant": name,
            "self_check": self_check,
            "all_raise": bool(m.raises) or self_check,
        }
        for name, m in mutants.items()
        if not self_check or m.told
    ]


@pytest.mark.parametrize("name", [row[0] for row in WIDE])
def test_in_float64_only_the_order_of_sums_differs(name: str, found: dict[str, dict[str, Any]]) -> None:
    result = found[name]
    assert "worst" in result, result
    assert largest(result) < 1e-12, result["worst"]


@pytest.mark.parametrize("name", [*MUTANTS, *FOURS])
def test_a_mistake_shows(name: str, found: dict[str, dict[str, Any]]) -> None:
    result, raises = found[name], {**MUTANTS, **FOURS}[name].raises
    if raises:
        assert raises in result["error"]
    else:
        assert "worst" in result, result
        assert largest(result) > 3 * TOLERANCE, result["worst"]


@pytest.mark.parametrize("name", [name for name, m in MUTANTS.items() if m.told])
def test_the_first_step_tells_of_a_wrong_layout(name: str, found: dict[str, dict[str, Any]]) -> None:
    error = found[f"{name}, told"]["error"]
    assert MUTANTS[name].told in error
    assert error.startswith("RuntimeError: parameter ")


@pytest.mark.parametrize("name", FATAL)
def test_ranks_that_call_in_another_order_do_not_end_well(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remedies against it are needed: without them the run ends with an error, or with other
    numbers.
    """
    monkeypatch.setenv("ERNIE_TUNE_COMM_TIMEOUT_S", "8")
    m = FATAL[name]
    case = {"name": name, "degrees": m.degrees, "job": {"steps": 2, **m.job}, "mutant": name, "self_check": False}
    (result,) = parity(tmp_path, 2, [case], timeout_s=120)
    assert largest(result) > 3 * TOLERANCE, result

"""The routers' own losses where no rank sees a whole pack: with sequence parallelism, losses,
gradients and parameters are those of one process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from launching import largest, parity

WEIGHTS = [0.05, 0.02, 0.01]  # balance, orthogonal, z
SP: dict[str, Any] = {"tensor": 2, "sequence_parallel": True}
CASES = {
    "TP2+SP": (SP, {"optimizer": "sgd", "balance": WEIGHTS}),
    "TP2+SP EP2, recompute": (
        {**SP, "expert": 2},
        {"optimizer": "sgd", "balance": WEIGHTS, "model": "c", "recompute": True},
    ),
    "TP2+SP EP2, AdamW": ({**SP, "expert": 2}, {"balance": WEIGHTS}),
}

MUTANT = "routers know only the tokens of their rank"


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = [{"name": name, "degrees": degrees, "job": job} for name, (degrees, job) in CASES.items()]
    cases.append({**cases[0], "name": MUTANT, "mutant": MUTANT})
    return {r["name"]: r for r in parity(tmp_path_factory.mktemp("routers"), 2, cases)}


@pytest.mark.parametrize("name", CASES)
def test_router_losses_with_sequence_parallelism(name: str, results: dict[str, Any]) -> None:
    assert "error" not in results[name], results[name]
    assert largest(results[name]) < 1e-5, results[name]


def test_ranks_that_do_not_ask_each_other_are_noticed(results: dict[str, Any]) -> None:
    assert "error" not in results[MUTANT], results[MUTANT]
    assert largest(results[MUTANT]) > 1e-4

"""Twenty steps of every method are the stored ones: a change of structure changes no number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import trajectories

STORED: dict[str, dict[str, list[float]]] = json.loads(trajectories.GOLDEN.read_text(encoding="utf-8"))
BOUNDS = {"losses": 1e-5, "grad_norms": 1e-4, "first_squares": 1e-4}  # relative
FLOAT32 = 50.0  # reward models: their bounds are so many times wider


def assert_stored(name: str, found: dict[str, Any]) -> None:
    for part, bound in BOUNDS.items():
        bound *= FLOAT32 if trajectories.METHODS[name][0] == "RewardTrainer" else 1.0
        np.testing.assert_allclose(found[part], STORED[name][part], rtol=bound, atol=1e-7, err_msg=part)


@pytest.mark.parametrize("name", list(trajectories.METHODS))
def test_a_run_is_the_stored_one(name: str, tmp_path: Path) -> None:
    assert_stored(name, trajectories.run(name, tmp_path, float64=True))


def test_another_optimizer_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, kinds, settings = trajectories.METHODS["dpo"]
    monkeypatch.setitem(trajectories.METHODS, "dpo", (trainer, kinds, {**settings, "adam_beta2": 0.998}))
    with pytest.raises(AssertionError, match="losses"):
        assert_stored("dpo", trajectories.run("dpo", tmp_path, float64=True))


def test_every_stored_run_is_made() -> None:
    assert set(STORED) == set(trajectories.METHODS)
    assert all(len(found["losses"]) == trajectories.STEPS for found in STORED.values())

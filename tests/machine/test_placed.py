"""Several models in one run: each is trained as if it were alone, on one process and spread over
ranks; one that is only asked has no engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.arguments import build
from ernie_tune.machine.alone import LocalEngine
from ernie_tune.machine.place import Place
from ernie_tune.models.presets import preset

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
import side_worker
from launching import launch

LAYOUTS = {
    "TP2": ("tensor_model_parallel_size=2",),
    "PP2": ("pipeline_model_parallel_size=2",),
    "sharding 2": ("sharding_parallel_size=2", 'sharding="stage1"'),
}


def weights(folder: Path) -> dict[str, np.ndarray]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Each model trained in a run of its own."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, {name: side_worker.run(folder, [name])[name] for name in side_worker.MODELS}


def test_models_that_take_turns_do_not_know_each_other(tmp_path: Path, alone: tuple[Path, dict[str, Any]]) -> None:
    folder, want = alone
    assert side_worker.run(tmp_path, list(side_worker.MODELS)) == want
    for name in side_worker.MODELS:
        mine, theirs = weights(tmp_path / name), weights(folder / name)
        assert mine.keys() == theirs.keys()
        assert all(np.array_equal(value, theirs[key]) for key, value in mine.items()), name
    assert len({loss for steps in want.values() for loss, _ in steps}) == 2 * side_worker.STEPS


@pytest.mark.parametrize("layout", LAYOUTS)
def test_models_side_by_side_on_two_processes(layout: str, tmp_path: Path, alone: tuple[Path, dict[str, Any]]) -> None:
    folder, want = alone
    code, tails = launch(tmp_path, 2, Path(side_worker.__file__), str(tmp_path), *LAYOUTS[layout], timeout_s=180)
    assert code == 0, tails
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank_{rank}.json").read_text(encoding="utf-8"))
        for name, steps in want.items():
            np.testing.assert_allclose(found[name], steps, rtol=2e-5, err_msg=f"rank {rank}: {name}")
    for name in side_worker.MODELS:
        mine, theirs = weights(tmp_path / name), weights(folder / name)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            np.testing.assert_allclose(value, theirs[key], atol=1e-5, rtol=0, err_msg=f"{name}: {key}")


def test_a_model_that_is_only_asked_has_no_engine() -> None:
    place, model = Place(build({}).parallel), AutoModel.from_config(preset("tiny-a"))
    asked = place.put(model, trained=False)
    assert asked.forward is model
    with pytest.raises(AssertionError, match="trained=True"):
        _ = asked.engine
    with asked.whole():
        assert asked.trained()
    assert type(place.put(model).engine) is LocalEngine

"""One process of a loading test: `part_worker.py FOLDER`, started by the launcher.
FOLDER/cases.json: [{"name", "settings"}]. For each case a rank loads its part of a model as a
trainer does, notes the most memory that took, compares every value with those of the whole model
laid over the same ranks, and saves and takes back what is trained.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import paddle.distributed as dist
import pytest
from paddle.base import core
from paddle.distributed.fleet.base import topology

from ernie_tune.config.arguments import RunConfig, build
from ernie_tune.data.batching import Sample
from ernie_tune.machine import place
from ernie_tune.machine.fleet import spread
from ernie_tune.machine.placed import Placed
from ernie_tune.models.inputs import Row
from ernie_tune.models.specs import parameter_specs
from ernie_tune.parallel.placement import placement_of
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.quantize import QuantizedEmbedding, QuantizedWeight
from ernie_tune.trainers import assemble


def values(model: Any) -> dict[str, np.ndarray]:
    """All that the model is made of on this rank: parameters, what adapters put aside, codes and
    scales.
    """
    found = {name: p.numpy() for name, p in model.named_parameters()}
    if isinstance(model, PeftModel):
        found |= {f"original {name}": p.numpy() for name, p in model.originals.items()}
    for name, layer in model.named_sublayers():
        if isinstance(layer, QuantizedWeight | QuantizedEmbedding):
            found |= {f"{name}.codes": layer.codes.numpy(), f"{name}.scale": layer.scale.numpy()}
    return found


def allocated() -> int:
    return int(core.host_memory_stat_current_value("Allocated", 0))


def calibration(config: RunConfig) -> list[Sample]:
    """Rows that expert affinity is measured on, where the case asks for it."""
    rng = np.random.default_rng(3)
    rows = [rng.integers(3, 7000, size) for size in (40, 23)] if config.lora.lora_expert_affinity else []
    return [Sample(Row(ids), np.ones(len(ids), bool), np.ones(len(ids), np.float32)) for ids in rows]


def load(config: RunConfig) -> tuple[Placed, tuple[int, int]]:
    """(the model on this rank, the most bytes held on the way by Paddle and by numpy)."""
    here = place.Place(config.parallel)
    gc.collect()  # of the case before
    tracemalloc.start()
    before = allocated()
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    plain, source = assemble.model_for(config, here)
    samples = calibration(config)
    model = assemble.apply_method(config, plain, samples, source, assemble.measured(config, here, samples, source))
    placed = here.put(model, source, optimizer_next=True)
    peaks = int(core.host_memory_stat_peak_value("Allocated", 0)) - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return placed, peaks


def there_and_back(config: RunConfig, placed: Placed) -> None:
    """What a layout saves, it takes back: whole models and adapters, each rank its part."""
    folder = Path(sys.argv[1]) / "saved"
    trained = placed.trained()
    with placed.whole(), paddle.no_grad():
        for value in trained.values():
            value.set_value(value * 1.5 + 0.25)
        before = {name: value.numpy() for name, value in trained.items()}
    placed.save(folder)
    with placed.whole(), paddle.no_grad():
        for value in trained.values():
            value.set_value(paddle.zeros_like(value))
    take_back(config, placed, folder, before)


def take_back(config: RunConfig, placed: Placed, folder: Path, before: dict[str, np.ndarray]) -> None:
    trained, here = dict(placed.model.named_parameters()), placed.place
    here.gather(None)
    if config.model.fine_tuning == "PTuning":
        with pytest.raises(ValueError, match="must hold the encoder of a P-tuned prompt"):
            placed.take(folder)
    else:
        with placed.whole():
            placed.take(folder)
        with placed.whole():
            assert all(np.array_equal(trained[name].numpy(), value) for name, value in before.items())
    here.gather(None)
    if here.is_writer:
        shutil.rmtree(folder)


def one(settings: dict[str, Any]) -> dict[str, Any]:
    # Fleet lays out a process once; here it lays out one after the other
    topology._HYBRID_PARALLEL_GROUP = None
    config = build(settings)
    placed, peaks = load(config)
    model, here = placed.model, placed.place
    held = sum(int(p.size) * p.element_size() for p in model.parameters() if p._is_initialized())
    if here.mesh.layout.sharding_stage == 3:
        placed.optimizer(lambda ps: paddle.optimizer.SGD(1.0, parameters=ps))
    with placed.whole():
        mine = values(model)
    whole = assemble.apply_method(config, assemble.load_model(config), calibration(config))
    spread(whole, here.mesh)
    theirs = values(whole)
    assert set(mine) == set(theirs), sorted(set(mine) ^ set(theirs))[:5]
    placements = dict(whole.named_parameters())
    for name, value in model.named_parameters():
        assert placement_of(value) == placement_of(placements[name]), name
        assert value.stop_gradient == placements[name].stop_gradient, name
    differ = {
        name: float(np.abs(value.astype(np.float64) - theirs[name]).max())
        for name, value in mine.items()
        if not np.array_equal(value, theirs[name])
    }
    there_and_back(config, placed)
    shapes = [np.prod(spec.shape) for spec in parameter_specs(model.config).values()]
    return {
        "paddle": peaks[0],
        "numpy": peaks[1],
        "share": held if here.mesh.layout.sharding_stage == 3 else sum(value.nbytes for value in mine.values()),
        "largest": 4 * int(max(shapes)),
        "whole": 4 * int(sum(shapes)),
        "differ": differ,
    }


def main() -> None:
    folder = Path(sys.argv[1])
    place._watch = lambda _world: None  # one watch a process; several layouts run in this one
    results = []
    for case in json.loads((folder / "cases.json").read_text()):
        results.append({"name": case["name"], **one(case["settings"])})
        (folder / f"rank_{dist.get_rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()

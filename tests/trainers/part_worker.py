"""One process of a loading test: `part_worker.py FOLDER`, started by the launcher. FOLDER/cases.json: [{"name", "settings"}]. For each case a rank loads its
part of a model as a trainer does, notes the most memory that took, and compares every value with those of the whole model laid over the same ranks."""

from __future__ import annotations

import gc
import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import paddle.distributed as dist
from paddle.base import core
from paddle.distributed.fleet.base import topology

from ernie_tune.config.arguments import RunConfig, build
from ernie_tune.models.specs import parameter_specs
from ernie_tune.parallel.placement import placement_of
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.quantize import QuantizedEmbedding, QuantizedWeight
from ernie_tune.train.distributed import spread
from ernie_tune.trainers import assemble, place


def values(model: Any) -> dict[str, np.ndarray]:
    """All that the model is made of on this rank: parameters, what adapters put aside, codes and scales."""
    found = {name: p.numpy() for name, p in model.named_parameters()}
    if isinstance(model, PeftModel):
        found |= {f"original {name}": p.numpy() for name, p in model.originals.items()}
    for name, layer in model.named_sublayers():
        if isinstance(layer, QuantizedWeight | QuantizedEmbedding):
            found |= {f"{name}.codes": layer.codes.numpy(), f"{name}.scale": layer.scale.numpy()}
    return found


def allocated() -> int:
    return int(core.host_memory_stat_current_value("Allocated", 0))


def load(config: RunConfig) -> tuple[Any, place.Place, tuple[int, int]]:
    """(the model on this rank, its place, the most bytes held on the way by Paddle and by numpy)."""
    here = place.Place(config.parallel)
    gc.collect()  # of the case before
    tracemalloc.start()
    before = allocated()
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    plain = here.load(config)
    model = assemble.apply_method(config, plain, [], here.source)
    here.lay(model)
    peaks = int(core.host_memory_stat_peak_value("Allocated", 0)) - before, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return model, here, peaks


def one(settings: dict[str, Any]) -> dict[str, Any]:
    topology._HYBRID_PARALLEL_GROUP = None  # Fleet lays out a process once; here it lays out one after the other
    config = build(settings)
    model, here, peaks = load(config)
    mine = values(model)
    whole = assemble.apply_method(config, assemble.load_model(config))
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
    shapes = [np.prod(spec.shape) for spec in parameter_specs(model.config).values()]
    return {
        "paddle": peaks[0],
        "numpy": peaks[1],
        "share": sum(value.nbytes for value in mine.values()),
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

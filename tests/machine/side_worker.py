"""Two models trained step about in one run, on this process or as a rank:
`side_worker.py FOLDER DEGREE=N …`, started by the launcher.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.arguments import build
from ernie_tune.data.batching import MicroBatch, Sample, collate
from ernie_tune.machine.place import Place
from ernie_tune.models.inputs import Row
from ernie_tune.models.presets import preset
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import Schedule
from ernie_tune.train.sft import SFTObjective

STEPS = 3
MODELS = {"policy": "tiny-a", "critic": "tiny-c"}
RATES = {"policy": 0.05, "critic": 0.02}


def windows(name: str) -> list[list[MicroBatch]]:
    """Two micro-batches a step, others for each model."""
    config = preset(MODELS[name])
    rng = np.random.default_rng(len(name))

    def sample(tokens: int) -> Sample:
        return Sample(Row(rng.integers(3, 500, tokens)), np.ones(tokens, bool), np.ones(tokens, np.float32))

    return [[collate([sample(9), sample(5)], config.tokens) for _ in range(2)] for _ in range(STEPS)]


def run(folder: Path, names: Sequence[str], **degrees: Any) -> dict[str, list[list[float]]]:
    """name -> (loss, gradient norm) of each step, the models taking turns; their weights are saved
    in `folder`.
    """
    place = Place(build({"output_dir": str(folder), **degrees}).parallel, 2)
    placed, loops = {}, {}
    for name in names:
        paddle.seed(7)
        placed[name] = place.put(AutoModel.from_config(preset(MODELS[name]), seed=3))
    for name, one in placed.items():
        optimizer = one.optimizer(lambda ps: paddle.optimizer.Momentum(1.0, parameters=ps))
        schedule = Schedule(RATES[name], STEPS, shape="constant")
        loops[name] = Loop(one.model, SFTObjective(), optimizer, schedule, LoopSettings(), one.engine)
    rank, size = place.batch
    turns = {name: loop.steps([w[rank::size] for w in windows(name)]) for name, loop in loops.items()}
    out: dict[str, list[list[float]]] = {name: [] for name in names}
    for _ in range(STEPS):
        for name, steps in turns.items():
            record = next(steps)
            out[name].append([record.loss, record.grad_norm])
    for name, one in placed.items():
        one.save(folder / name)
    return out


def main() -> None:
    folder = Path(sys.argv[1])
    degrees = {name: json.loads(value) for name, value in (word.split("=") for word in sys.argv[2:])}
    found = run(folder, list(MODELS), **degrees)
    (folder / f"rank_{paddle.distributed.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()

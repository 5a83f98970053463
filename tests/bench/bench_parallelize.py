"""What a mesh of one process costs: a step through `DistributedEngine` over a step through the
plain `Engine`, interleaved in one run.

usage: python tests/bench/bench_parallelize.py [--preset small] [--tokens 512] [--pairs 15]. Prints
the median ratio and its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import ernie_tune  # noqa: F401  sets the CPU variables before paddle loads

import numpy as np  # isort: skip
from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.data.batching import MicroBatch, Sample, collate
from ernie_tune.machine.fleet import DistributedEngine
from ernie_tune.models.inputs import Row
from ernie_tune.models.presets import preset
from ernie_tune.parallel.mesh import Mesh
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import LrRatios, Schedule, adamw_maker, build_adamw
from ernie_tune.train.sft import SFTObjective


def loop_of(name: str, mesh: Mesh | None) -> Loop:
    model = AutoModel.from_config(preset(name))
    named = list(model.named_parameters())
    how: dict[str, Any] = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    schedule, settings = Schedule(1e-4, 10_000), LoopSettings()
    if mesh is None:
        return Loop(model, SFTObjective(), build_adamw(named, LrRatios().of, **how), schedule, settings)
    engine = DistributedEngine.lay(model, mesh)
    trained = [(n, p) for n, p in named if not p.stop_gradient]
    return Loop(
        model, SFTObjective(), engine.optimizer(adamw_maker(trained, LrRatios().of, **how)), schedule, settings, engine
    )


def window(name: str, tokens: int) -> list[MicroBatch]:
    config, rng = preset(name), np.random.default_rng(0)
    ids = rng.integers(3, 500, tokens)
    sample = Sample(Row(ids), np.ones(tokens, bool), np.ones(tokens, np.float32))
    return [collate([sample], config.tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    batch = window(args.preset, args.tokens)
    loops = loop_of(args.preset, None), loop_of(args.preset, Mesh())
    for loop in loops:  # the first step checks the layout, and warms up
        loop._step(batch, time.perf_counter())
        loop._step(batch, time.perf_counter())
    ratios, times = [], []
    for i in range(args.pairs):
        took = [0.0, 0.0]
        for j in (0, 1) if i % 2 else (1, 0):
            start = time.perf_counter()
            loops[j]._step(batch, start)
            took[j] = time.perf_counter() - start
        ratios.append(took[1] / took[0])
        times.append(took[0])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"{args.preset}, {args.tokens} tokens: step {statistics.median(times):.3f} s; mesh of one / plain {middle:.3f} (quartiles {low:.3f} to {high:.3f})"
    )


if __name__ == "__main__":
    main()

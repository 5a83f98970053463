"""One process of test_judged.py: a step of UPO and of KTO where each rank has other kinds of judgements than its neighbour; writes the gradient."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path
from typing import Any

import paddle.distributed as dist
from judged_rows import label, pair, ranking, rating, units
from tiny_runs import processor

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.data.units import collate_units
from ernie_tune.objectives.upo import PRESETS, UpoSettings
from ernie_tune.parallel.mesh import Degrees, init_mesh
from ernie_tune.train.distributed import DistributedEngine
from ernie_tune.train.engine import Engine
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import Schedule, adamw_maker
from ernie_tune.train.preference import UpoObjective
from ernie_tune.train.reference import Reference

ROWS = {0: [pair(0), pair(1), pair(2)], 1: [ranking(3), rating(4), label(5), label(6)]}


def settings(name: str) -> UpoSettings:
    return UpoSettings(weights={"bin": 1.0}, bin="bco") if name == "bco" else PRESETS[name]


def gradient(folder: Path, name: str, rows: list[dict[str, Any]], mesh: Any = None) -> dict[str, Any]:
    """Loss and gradients of one window by all ranks' rows, on a policy that has left its reference."""
    folder.mkdir(parents=True, exist_ok=True)
    model = AutoModel.from_config("tiny-a", seed=1)
    reference = Reference(model, "model")
    for i, value in enumerate(model.parameters()):
        value.set_value(value + 0.01 * (1 + i % 3))
    engine = DistributedEngine.lay(model, mesh) if mesh else Engine()
    objective = UpoObjective(settings(name))
    batch = reference.attached(collate_units(units(folder, rows), processor()))
    if objective.uses_kl:
        batch = dataclasses.replace(batch, kl_sum=0.5 * len(rows), kl_count=float(len(rows)))
    named = [(n, p) for n, p in model.named_parameters() if not p.stop_gradient]
    make = adamw_maker(named, lambda _: 1.0, weight_decay=0.0, beta1=0.9, beta2=0.99, epsilon=1e-8)
    optimizer = engine.optimizer(make) if isinstance(engine, DistributedEngine) else make([p for _, p in named])
    loop = Loop(model, objective, optimizer, Schedule(1e-4, 1, 0, "constant"), LoopSettings(), engine)
    loss, metrics = loop.accumulate([batch])
    engine.synchronise(loop.parameters)
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, "metrics": metrics, "grads": grads, "z0": objective.z0}


def main() -> None:
    folder, rank = Path(sys.argv[1]), dist.get_rank()
    mesh = init_mesh(Degrees(data=2))
    out = {name: gradient(folder / f"rows{rank}", name, ROWS[rank], mesh) for name in ("upo_hetero", "mpo", "bco")}
    (folder / f"rank{rank}.pickle").write_bytes(pickle.dumps(out))


if __name__ == "__main__":
    main()

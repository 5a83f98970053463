"""Steps on judged rows, on this process or as a rank: `preference_worker.py FOLDER CASE`, started
by the launcher, writes FOLDER/rank_N.npz.

A window has two micro-batches; with two ranks each rank has one of them, so a kind of judgement is
absent on a rank, or everywhere.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from cases import Job, build_model
from support.judged_rows import base, encoder, label, pair, ranking, rating, units

from ernie_tune.data.units import UnitBatch
from ernie_tune.machine.alone import LocalEngine
from ernie_tune.machine.fleet import DistributedEngine
from ernie_tune.objectives.preference import PreferenceHyper
from ernie_tune.objectives.upo import PRESETS
from ernie_tune.parallel.mesh import Mesh
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import Schedule
from ernie_tune.train.preference import PairObjective, UpoObjective

STEPS = 3


def text_only(i: int) -> dict[str, Any]:
    return {**base(i, picture=False), "signal": {"type": "pair", "chosen": "yes", "rejected": "no, I do not think so"}}


# case -> (objective, windows of two micro-batches of rows)
CASES: dict[str, tuple[Any, list[list[list[dict[str, Any]]]]]] = {
    "upo": (
        lambda: UpoObjective(PRESETS["upo_hetero"]),
        [
            [[pair(0), pair(1), text_only(2)], [label(0), label(1), label(3)]],
            [[ranking(1)], [rating(2), rating(3)]],
            [[text_only(1)], [text_only(3), ranking(0), label(2)]],
        ],
    ),
    "mpo": (
        lambda: PairObjective({"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}, PreferenceHyper()),
        [
            [[pair(0), pair(1), ranking(2)], [text_only(1)]],
            [[text_only(0)], [rating(1)]],
            [[pair(3)], [pair(4), pair(5)]],
        ],
    ),
}


def windows(folder: Path, case: str) -> list[list[UnitBatch]]:
    """The case's micro-batches, with reference log-probabilities and KTO's mismatched ratios drawn
    by place.
    """
    generator = np.random.default_rng(5)
    out = []
    for window in CASES[case][1]:
        batches = []
        for rows in window:
            batch = encoder().collate(units(folder, rows))
            drawn_N = generator.normal(-6.5, 0.3, len(batch.candidate_N)).astype(np.float32)
            ratio = float(generator.uniform(0.2, 2))
            batches.append(batch.with_columns(ref_logp_N=drawn_N, mismatch_S=np.array([ratio, len(rows)])))
        out.append(batches)
    return out


class Seen(LocalEngine):
    """Keeps the last window's gradients, before they are clipped."""

    gradients: dict[str, np.ndarray]

    def norm(self, parameters: Any) -> float:
        self.gradients = {p.name: p.grad.numpy().copy() for p in parameters if p.grad is not None}
        return super().norm(parameters)


class SeenOnMesh(Seen, DistributedEngine):
    """The same on a mesh."""


def run(folder: Path, case: str, mesh: Mesh | None = None) -> dict[str, np.ndarray]:
    """Losses, every metric's mean, the last gradients by place, and the parameters after the last
    step.
    """
    model = build_model(Job())
    engine: Any = Seen() if mesh is None else SeenOnMesh.lay(model, mesh)
    make = lambda ps: paddle.optimizer.SGD(1.0, parameters=ps)  # noqa: E731
    optimizer = make([p for p in model.parameters() if not p.stop_gradient]) if mesh is None else engine.optimizer(make)
    loop = Loop(model, CASES[case][0](), optimizer, Schedule(0.05, STEPS, 1), LoopSettings(), engine)
    rank, size = (0, 1) if mesh is None else mesh.batch
    records = list(loop.steps([window[rank::size] for window in windows(folder, case)]))
    out = {f"metric/{i}/{k}": np.array(v) for i, r in enumerate(records) for k, v in r.metrics.items()}
    out["losses"] = np.array([r.loss for r in records])
    for name, p in model.named_parameters():
        out[f"parameter/{name}"] = p.numpy()
        if p.name in engine.gradients:
            out[f"gradient/{name}"] = engine.gradients[p.name]
    return out


def main() -> None:
    import paddle.distributed as dist

    from ernie_tune.config.layout import Layout
    from ernie_tune.parallel.mesh import init_mesh

    folder, case = Path(sys.argv[1]), sys.argv[2]
    mesh = init_mesh(Layout(data=2))
    mine = folder / f"rows_{dist.get_rank()}"
    mine.mkdir(exist_ok=True)
    np.savez(folder / f"rank_{dist.get_rank()}.npz", **run(mine, case, mesh))


if __name__ == "__main__":
    main()

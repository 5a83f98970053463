"""machine/fleet.py on a mesh of one process: the same steps as the plain engine, and settings that
are refused. Meshes of many: tests/parallel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.data.batching import MicroBatch, Sample, collate
from ernie_tune.machine.alone import Work
from ernie_tune.machine.fleet import DistributedEngine
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import Row
from ernie_tune.models.presets import preset
from ernie_tune.parallel.mesh import Mesh
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import LrRatios, Schedule, adamw_maker, build_adamw
from ernie_tune.train.sft import SFTObjective


def windows(count: int) -> list[list[MicroBatch]]:
    rng = np.random.default_rng(0)

    def sample(tokens: int) -> Sample:
        return Sample(Row(rng.integers(3, 590, tokens)), np.ones(tokens, bool), np.ones(tokens, np.float32))

    return [[collate([sample(9), sample(5)], preset("tiny-a").tokens) for _ in range(2)] for _ in range(count)]


def trained(mesh: Mesh | None) -> tuple[list[Any], dict[str, np.ndarray]]:
    model = AutoModel.from_config(preset("tiny-a"))
    named = [(n, p) for n, p in model.named_parameters() if not p.stop_gradient]
    how: dict[str, Any] = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    engine = None
    if mesh is None:
        optimizer: Any = build_adamw(named, LrRatios().of, **how)
    else:
        engine = DistributedEngine.lay(model, mesh)
        optimizer = engine.optimizer(adamw_maker(named, LrRatios().of, **how))
    settings = LoopSettings(max_grad_norm=0.5, bias_update=0.01)
    loop = Loop(model, SFTObjective(), optimizer, Schedule(1e-3, 3), settings, engine)
    records = [(r.loss, r.grad_norm, r.num_tokens) for r in loop.steps(windows(3))]
    return records, {n: p.numpy() for n, p in model.named_parameters()}


def test_a_mesh_of_one_process_changes_no_bit() -> None:
    """The optimizer takes a plain list there, with rates and decay noted on the parameters: the
    same steps.
    """
    (records, values), (others, changed) = trained(None), trained(Mesh())
    assert records == others
    for name, value in values.items():
        assert np.array_equal(value, changed[name]), name


def engine_of_one() -> DistributedEngine:
    return DistributedEngine.lay(ErnieModel(preset("tiny-a")), Mesh())


def test_stage_3_needs_recompute(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of_one()
    engine.blocks = object()  # type: ignore[assignment]
    with pytest.raises(ValueError, match="sharding stage 3 must go with recompute: true"):
        engine.forward_backward(Work(engine.model, SFTObjective(), 1.0), windows(1)[0])


def test_whether_to_stop_is_decided_together() -> None:
    engine = engine_of_one()
    assert engine.stopped(True)
    assert not engine.stopped(False)

"""What a new trainer takes: a method that says what differs, and a face; what it keeps comes back;
windows that are only looked at count for nothing.
"""

from __future__ import annotations

import ast
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.judged_rows import judged_settings, label
from support.tiny_runs import history, settings, write_rows

from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.objective import Outputs
from ernie_tune.report.log import RunLog
from ernie_tune.train.loop import StepRecord
from ernie_tune.train.sft import SFTObjective
from ernie_tune.trainers.base import Trainer
from ernie_tune.trainers.keeper import JsonPart
from ernie_tune.trainers.method import Method, RowSets, Stateful
from ernie_tune.trainers.preference import KTOTrainer
from ernie_tune.trainers.run import Run
from ernie_tune.trainers.sft import SFTTrainer


class Halved(SFTObjective):
    """Half the likelihood."""

    def loss(self, outputs: Outputs, batch: Any) -> LossOut:
        out = super().loss(outputs, batch)
        return LossOut(out.total * 0.5, out.count, out.metrics)


class Steps:
    """A part: how many steps were seen."""

    def __init__(self) -> None:
        self.seen = 0

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = state["seen"]


class HalvedTuning(Method):
    stages = ("SFT",)
    signals = ("sft",)

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.steps = Steps()

    def objective(self, total_steps: int, steps_per_pass: float) -> Halved:
        return Halved()

    def started(self, log: RunLog, rows: RowSets, resumed: bool) -> None:
        log.info(f"half of everything, resumed: {resumed}")

    def after_step(self, record: StepRecord) -> list[Any]:
        self.steps.seen += 1
        return []

    def metrics(self) -> Mapping[str, float]:
        return {"seen": float(self.steps.seen)}

    def parts(self) -> Mapping[str, Stateful]:
        return {"steps": JsonPart(self.place, "steps_state.json", self.steps)}


class HalvedTrainer(Trainer):
    method_class = HalvedTuning


def test_a_new_trainer_is_a_method_and_a_face(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    SFTTrainer(args=settings(tmp_path, output_dir=tmp_path / "sft", max_steps=1)).train()
    more = {"max_steps": 4, "save_steps": 2}
    go_on = Run._stop_now
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_stop_now", lambda run, record, *rest: go_on(run, record, *rest) or record.step == 2)
        HalvedTrainer(args=settings(tmp_path, **more)).train()
    trainer = HalvedTrainer(args=settings(tmp_path, **more))
    trainer.train()
    assert "half of everything, resumed: True" in capsys.readouterr().out
    whole, half = history(tmp_path / "sft")[0], history(tmp_path / "out")
    assert half[0]["loss"] == pytest.approx(whole["loss"] / 2, rel=1e-6)
    assert [r["seen"] for r in half if "loss" in r] == [0, 1, 2, 3], "what was kept came back"
    kept = json.loads((tmp_path / "out" / "checkpoint-4" / "steps_state.json").read_text(encoding="utf-8"))
    assert kept == {"seen": 4}


def test_windows_that_are_looked_at_count_for_nothing(tmp_path: Path) -> None:
    write_rows(tmp_path / "judged_train.jsonl", [label(i) for i in range(6)])
    trainer = KTOTrainer(args=judged_settings(tmp_path, stage="KTO"))
    loop = trainer.build_loop()
    trainer.prepare()
    before = json.dumps(loop.objective.state_dict())
    windows = list(itertools.islice(trainer.method.windows(trainer.stream), 3))
    assert np.isfinite([w[0].columns["ref_logp_N"].sum() for w in windows]).all()
    for window in windows:
        loop.accumulate(window)
    loop.clear_gradients()
    assert json.dumps(loop.objective.state_dict()) == before
    trainer.method.present_objective().end({})
    assert json.dumps(loop.objective.state_dict()) != before


def test_no_class_cancels_its_parent_and_trainers_have_few_hooks() -> None:
    """Nobody calls past its parent; what trainers of the package override of `Trainer` is
    little.
    """
    package = Path(__import__("ernie_tune").__file__).parent
    hooks: set[str] = set()
    for path in package.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "super" and n.args]
        # `Trainer.method(self, ...)` in a class that has another parent between
        calls += [
            n
            for n in ast.walk(tree)
            if isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and "Trainer" in ast.unparse(n.func.value)
            if n.args and ast.unparse(n.args[0]) == "self"
        ]
        assert not calls, f"{path}: line {calls[0].lineno}"
        for node in (
            n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and "Trainer" in map(ast.unparse, n.bases)
        ):
            own = {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            own |= {ast.unparse(n.targets[0]) for n in node.body if isinstance(n, ast.Assign)}
            hooks |= own & set(vars(Trainer)) - {"__init__", "__doc__"}
    assert "method_class" in hooks
    assert len(hooks) <= 6, sorted(hooks)

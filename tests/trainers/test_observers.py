"""trainers/observers.py, evaluate/own_metrics.py: users' callbacks and metrics see a run and cannot
change it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_runs import mixed_rows, same_bytes, settings

from ernie_tune.config.stages import STAGES
from ernie_tune.evaluate.own_metrics import EvalPrediction, own_metrics
from ernie_tune.trainers.observers import EVENTS, Observers, RunState
from ernie_tune.trainers.sft import SFTTrainer

STATE = RunState(3, 10, 0.5)


class Recorder:
    """A TrainerCallback that writes down what it is told."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int, dict[str, Any]]] = []

    def __getattr__(self, event: str) -> Any:
        if event not in EVENTS:
            raise AttributeError(event)

        def hear(args: Any, state: RunState, control: Any, **facts: Any) -> None:
            assert not control.should_training_stop
            self.heard.append((event, state.global_step, facts))

        return hear


def shares(found: EvalPrediction) -> dict[str, float]:
    predictions, references = found
    assert len(predictions) == len(references) > 0
    return {"eval_mean_length": np.mean([len(p) for p in predictions])}


def run(folder: Path, **more: Any) -> SFTTrainer:
    folder.mkdir()
    args = settings(
        folder,
        max_steps=3,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        model_name_or_path="tiny-a",
    )
    trainer = SFTTrainer(args=args, train_dataset=mixed_rows(12), eval_dataset=mixed_rows(3), **more)
    trainer.train()
    return trainer


def test_a_watched_run_is_told_everything_and_stays_what_it_was(tmp_path: Path) -> None:
    recorder, plain = Recorder(), []
    watched = run(
        tmp_path / "watched",
        callbacks=[recorder, lambda step, record: plain.append((step, record["step"]))],
        compute_metrics=shares,
    )
    steps = [(event, step) for event, step, _ in recorder.heard if event not in ("on_log", "on_evaluate")]
    assert steps == [
        ("on_train_begin", 0), ("on_step_end", 1), ("on_step_end", 2), ("on_save", 2), ("on_step_end", 3), ("on_save", 3),
        ("on_train_end", 3),
    ]  # fmt: skip
    logged = [facts["logs"] for event, _, facts in recorder.heard if event == "on_log"]
    assert logged == watched.log.history
    assert plain == [(record["step"], record["step"]) for record in logged]
    measured = [facts["metrics"] for event, _, facts in recorder.heard if event == "on_evaluate"]
    assert len(measured) == 2
    assert all(metrics["eval_mean_length"] >= 0 for metrics in measured)
    assert "eval_mean_length" in watched.evaluate()
    alone = run(tmp_path / "alone")
    for name in ("model.safetensors", "checkpoint-2/model.safetensors"):
        assert (watched.output_dir / name).read_bytes() == (alone.output_dir / name).read_bytes(), name
    same_bytes(watched.output_dir / "checkpoint-2" / "optimizer", alone.output_dir / "checkpoint-2" / "optimizer")


def test_callbacks_observe(tmp_path: Path) -> None:
    class Stopper:
        def on_step_end(self, args: Any, state: Any, control: Any, **facts: Any) -> None:
            control.should_training_stop = True

    observers = Observers()
    observers.add(Stopper)
    with pytest.raises(ValueError, match=r"control\.should_training_stop must not be set: callbacks observe"):
        observers.tell("on_step_end", STATE)
    observers.tell("on_log", STATE, logs={})
    with pytest.raises(ValueError, match="must be callable or have one of"):
        observers.add(3)
    with pytest.raises(AttributeError):
        STATE.global_step = 4  # type: ignore[misc]


@pytest.mark.parametrize("stage", STAGES)
def test_every_trainer_can_be_watched(stage: str, tmp_path: Path) -> None:
    """Whoever hears of a run gets as far as the refusal of what cannot hear."""
    module, _, name = STAGES[stage].trainer.partition(":")
    trainer = vars(importlib.import_module(module))[name]
    args = settings(tmp_path, stage=stage, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match="must be callable or have one of"):
        trainer(args=args, train_dataset=mixed_rows(2), callbacks=[3], compute_metrics=shares)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (0.5, "must return a dict of numbers, not float"),
        ({"a": "high"}, r"a \('high'\) of compute_metrics must be a finite number"),
        ({"a": float("nan")}, "must be a finite number"),
        ({"a": True}, "must be a finite number"),
    ],
)
def test_metrics_that_are_none(returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own_metrics(lambda found: returned, ["a"], ["b"])


def test_metrics_keep_one_prefix() -> None:
    assert own_metrics(lambda found: {"eval_f": np.float32(0.5), "g": 2}, ["a"], ["b"]) == {"f": 0.5, "g": 2.0}

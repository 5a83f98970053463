"""BCO with weights by prompts in a run: which states they are made of, that they stand before the
first step, and what is refused.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.judged_rows import base, judged_settings, label, mixture, units
from support.tiny_runs import NOT_ALIKE_WHEN_CUT, history, processor, same_bytes, write_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.data.units import collate_units
from ernie_tune.train.density import PromptDensity, prompt_states
from ernie_tune.trainers.base import Trainer
from ernie_tune.trainers.preference import KTOTrainer
from ernie_tune.trainers.upo import UPOTrainer

BCO: dict[str, Any] = {"stage": "KTO", "loss_type": "bco", "bco_density": True}


def judged(i: int, good: bool) -> dict[str, Any]:
    return {**base(i, picture=i % 2 == 0), "signal": {"type": "label", "response": str(i), "label": int(good)}}


# question 0 is mostly answered well, question 1 badly
ROWS = [judged(i, i % 4 in (0, 2) if i < 12 else i % 4 == 1) for i in range(16)]


def by_descent(x: np.ndarray, good: np.ndarray) -> np.ndarray:
    """log p / (1 - p) of a balanced logistic regression with C = 1, by plain gradient descent."""
    z = (x - x.mean(0)) / math.sqrt(((x - x.mean(0)) ** 2).sum(1).mean())
    share, w, b = (
        np.where(good, len(good) / (2 * good.sum()), len(good) / (2 * (~good).sum())),
        np.zeros(x.shape[1]),
        0.0,
    )
    for _ in range(20000):
        error = share * (1 / (1 + np.exp(-(z @ w + b))) - good)
        w, b = w - 0.05 * (z.T @ error + w), b - 0.05 * float(error.sum())
    return np.asarray(z @ w + b)


def test_weights_are_made_of_the_state_after_the_prompt(tmp_path: Path) -> None:
    write_rows(tmp_path / "judged_train.jsonl", ROWS)
    trainer = KTOTrainer(args=judged_settings(tmp_path, **BCO))
    made = units(tmp_path, ROWS)
    batch, states = collate_units(made, processor()), []
    for unit in made:  # each prompt alone, without its answer
        (dialogue,) = unit.dialogues
        end = int(np.argmax(dialogue.trained_L))
        whole = collate_units([unit], processor())
        states.append(trainer.model(whole.inputs).numpy()[end - 1])
    np.testing.assert_allclose(
        prompt_states(trainer.model, trainer.model(batch.inputs), batch)["state_CD"].numpy(), states, atol=1e-5
    )
    trainer.prepare(dry_run=False)
    assert trainer.method.density is not None
    good = np.array([u.label_C[0] == 1 for u in made])
    wanted = np.clip(np.exp(by_descent(np.array(states, np.float64), good)), 0.5, 10)
    assert len(trainer.method.density.weights) == (~good).sum()
    found = np.array([trainer.method.density.weights[u.keys[0]] for u, g in zip(made, good, strict=True) if not g])
    np.testing.assert_allclose(found, wanted[~good], rtol=1e-3)
    assert len(set(np.round(found, 3))) > 2
    ready = trainer.method.window([batch])[0]
    np.testing.assert_allclose(ready.columns["density_C"], np.where(good, 1.0, wanted), rtol=1e-3)
    assert f"weights of {(~good).sum()} bad answers: mean {found.mean():.3g}, " in trainer.method.density.line()


def test_the_loss_at_the_start_and_a_run_that_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the start r = 0 and delta = 0: each answer costs ln 2, a bad one its weight of it; one
    count divides.
    """
    write_rows(tmp_path / "judged_train.jsonl", ROWS)
    held = write_rows(tmp_path / "eval.jsonl", [judged(16, True), judged(17, False)])
    more: dict[str, Any] = {
        **BCO,
        "bco_density_min": 0.25,
        "bco_density_max": 4.0,
        "per_device_train_batch_size": 16,
        "eval_dataset_path": held,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
    }
    trainer = KTOTrainer(args=judged_settings(tmp_path, output_dir=str(tmp_path / "whole"), **more))
    metrics = trainer.train()
    assert trainer.method.density is not None
    first = next(r["loss"] for r in history(trainer.output_dir) if "loss" in r)
    made = units(tmp_path, ROWS)
    total = sum(1.0 if u.label_C[0] else trainer.method.density.weights[u.keys[0]] for u in made)
    assert first == pytest.approx(math.log(2) * total / 16, abs=1e-5)
    assert abs(total / 16 - 1) > 1e-2
    assert math.isfinite(metrics["eval_loss"])
    assert "bco_density: prompts of good and bad answers are told apart with accuracy" in capsys.readouterr().out
    KTOTrainer(args=judged_settings(tmp_path, output_dir=str(tmp_path / "cut"), **{**more, "max_steps": 2})).train()
    KTOTrainer(args=judged_settings(tmp_path, output_dir=str(tmp_path / "cut"), **more)).train()
    same_bytes(trainer.output_dir / "checkpoint-4", tmp_path / "cut" / "checkpoint-4", but=NOT_ALIKE_WHEN_CUT)


def test_upo_weighs_its_bad_labels_alone(tmp_path: Path) -> None:
    rows = [*mixture(8), label(0), label(2)]
    write_rows(tmp_path / "judged_train.jsonl", rows)
    settings: dict[str, Any] = {"stage": "UPO", "allow_base": True, "bco_density": True, "bin_loss": "bco"}
    trainer = UPOTrainer(args=judged_settings(tmp_path, **settings))
    trainer.prepare(dry_run=False)
    ready = trainer.method.window([collate_units(units(tmp_path, rows), processor())])[0]
    bad = np.array([u.signal == "label" and g == 0 for u in ready.units for g in u.label_C])
    assert bad.sum() == 2
    assert (ready.columns["density_C"][~bad] == 1).all()
    assert (ready.columns["density_C"][bad] != 1).all()
    with pytest.raises(
        ValueError, match=r"bco_density \(true\) must go with a weight of the term that learns from label"
    ):
        UPOTrainer(args=judged_settings(tmp_path, **settings, term_weights=("bin=0",)))


def started(folder: Path, trainer: type[Trainer], **changes: Any) -> None:
    trainer(args=judged_settings(folder, **changes)).prepare(dry_run=False)


def test_what_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "judged_train.jsonl", [judged(i, True) for i in range(4)])
    with pytest.raises(ValueError, match="must find good and bad answers, there are 4 and 0"):
        started(tmp_path, KTOTrainer, **BCO)
    density = PromptDensity(AutoModel.from_config("tiny-a"), 0.5, 10.0)
    batch = collate_units(units(tmp_path, [judged(0, True), judged(1, False)]), processor())
    with pytest.raises(ValueError, match=r"judged.jsonl:2: row must be among those that bco_density has measured"):
        density.attached(batch)

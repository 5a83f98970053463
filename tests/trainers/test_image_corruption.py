"""Pairs of a true and a spoilt picture in a run: their loss by the formula, however a window is cut
or packed, under every reference, and what they teach.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.judged_rows import base, judged_settings, label, mixture, pair, pairs, ranking
from support.tiny_runs import NOT_ALIKE_WHEN_CUT, history, processor, same_bytes, write_rows

from ernie_tune.data.batching import Dropped
from ernie_tune.data.units import UnitBatch, collate_units
from ernie_tune.train.reference import CACHE_FILE, frozen_logp
from ernie_tune.trainers.base import Trainer
from ernie_tune.trainers.preference import DPOTrainer
from ernie_tune.trainers.reward import RewardTrainer
from ernie_tune.trainers.upo import UPOTrainer

LN2 = math.log(2)


def moved(trainer: Trainer) -> Trainer:
    """The trainer with a policy that has left its reference."""
    trainer.prepare(dry_run=True)
    paddle.seed(3)
    for value in trainer.model.parameters():
        value.set_value(value + 0.02 * paddle.randn(value.shape))
    trainer.model.eval()
    return trainer


def sources(trainer: Trainer) -> list[Any]:
    found = [trainer.encoder(r, Dropped()) for rows in trainer.stream.shard.mixture.sources for r in rows]
    return [unit for unit in found if unit is not None]


def grey(batch: UnitBatch) -> UnitBatch:
    pixels = batch.inputs.pixel_values_PC
    assert pixels is not None
    return dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, pixel_values_PC=np.zeros_like(pixels)))


def test_the_loss_is_that_of_one_answer_to_two_pictures(tmp_path: Path) -> None:
    """2406.11839 eq. 4 by log-probabilities of plain rows, whose pictures are made grey here; the
    spoilt side's gradient takes its picture.
    """
    write_rows(tmp_path / "judged_train.jsonl", [pair(3)])
    trainer = moved(DPOTrainer(args=judged_settings(tmp_path, image_corruption="mask")))
    plain, made = sources(trainer)
    first = collate_units([dataclasses.replace(plain, dialogues=plain.dialogues[:1])], processor())
    assert trainer.method.reference is not None
    gap = {}
    for name, batch in (("true", first), ("grey", grey(first))):
        gap[name] = float((frozen_logp(trainer.model, batch) - trainer.method.reference.compute(batch)).sum())
    assert abs(gap["true"] - gap["grey"]) > 1e-3
    loop = trainer.build_loop()
    loss, metrics = loop.accumulate(trainer.method.window([collate_units([made], processor())]))
    wanted = math.log1p(math.exp(-0.1 * (gap["true"] - gap["grey"])))
    assert loss == pytest.approx(wanted, abs=1e-6)
    assert metrics["rewards/image_margins"] == pytest.approx((0.1 * (gap["true"] - gap["grey"]), 1.0), abs=1e-5)
    # the row and its added pair count alike, and only the added one is measured apart
    both, found = loop.accumulate(trainer.method.window([collate_units([plain, made], processor())]))
    alone, other = loop.accumulate(trainer.method.window([collate_units([plain], processor())]))
    assert both == pytest.approx((alone + loss) / 2, abs=1e-6)
    assert found["rewards/image_margins"] == pytest.approx(metrics["rewards/image_margins"], abs=1e-5)
    assert found["rewards/margins"][1] == 2
    assert "rewards/image_margins" not in other


def test_the_gradient_is_the_difference_of_two_likelihoods(tmp_path: Path) -> None:
    """grad = -beta sigma(-u) (grad log pi(y | true) - grad log pi(y | grey)), each side's gradient
    by a likelihood of its own.
    """
    write_rows(tmp_path / "judged_train.jsonl", [pair(3)])
    trainer = moved(DPOTrainer(args=judged_settings(tmp_path, image_corruption="mask")))
    plain, made = sources(trainer)
    loop = trainer.build_loop()

    def gradient() -> dict[str, np.ndarray]:
        out = {n: p.grad.numpy() for n, p in trainer.model.named_parameters() if p.grad is not None}
        loop.clear_gradients()
        return out

    _, metrics = loop.accumulate(trainer.method.window([collate_units([made], processor())]))
    found, u = gradient(), metrics["rewards/margins"][0]
    first = collate_units([dataclasses.replace(plain, dialogues=plain.dialogues[:1])], processor())
    sides = []
    for batch in (first, grey(first)):
        trainer.method.present_objective().outputs(trainer.model, trainer.model(batch.inputs), batch)[
            "logp_N"
        ].sum().backward()
        sides.append(gradient())
    slope = -0.1 / (1 + math.exp(u))
    for name, value in found.items():
        wanted = slope * (sides[0][name] - sides[1][name])
        np.testing.assert_allclose(value, wanted, atol=2e-5 * max(1.0, float(np.abs(wanted).max())), err_msg=name)
    assert max(float(np.abs(v).max()) for v in found.values()) > 1e-3


@pytest.mark.parametrize("trainer", [DPOTrainer, UPOTrainer, RewardTrainer])
def test_a_window_is_one_however_it_is_cut(tmp_path: Path, trainer: type[Trainer]) -> None:
    rows = mixture(4) if trainer is UPOTrainer else [pair(0), ranking(1)]
    stage: dict[str, Any] = {DPOTrainer: {}, UPOTrainer: {"stage": "UPO", "allow_base": True}}.get(
        trainer, {"stage": "RM"}
    )
    write_rows(tmp_path / "judged_train.jsonl", rows)
    made = trainer(args=judged_settings(tmp_path, image_corruption="noise", image_corruption_noise=0.7, **stage))
    if trainer is not RewardTrainer:
        moved(made)
    units = sources(made)
    assert sum(u.corrupted for u in units) == (3 if trainer is UPOTrainer else 2), "a bad answer has no right picture"
    found = []
    for cuts in ([units], [units[:1], units[1:3], units[3:]]):
        loop = made.build_loop()
        loss, _ = loop.accumulate(made.method.window([collate_units(part, processor()) for part in cuts]))
        found.append((loss, {n: p.grad.numpy() for n, p in made.model.named_parameters() if p.grad is not None}))
        loop.clear_gradients()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, value in found[0][1].items():
        tolerance = 2e-5 * max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(value, found[1][1][name], atol=tolerance, err_msg=name)


def run(folder: Path, trainer: type[Trainer] = DPOTrainer, **changes: Any) -> Path:
    made = trainer(
        args=judged_settings(folder, **{"image_corruption": "noise", "image_corruption_ratio": 0.7, **changes})
    )
    made.train()
    return made.output_dir


def test_references_and_resumed_runs_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "judged_train.jsonl", pairs(9))
    whole = run(tmp_path, output_dir=str(tmp_path / "whole"), save_steps=2)
    assert "image_corruption noise: 4 pairs of a true and a spoilt picture beside 9 rows" in capsys.readouterr().out
    log = [r for r in history(whole) if "loss" in r]
    assert log[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    stored = run(tmp_path, output_dir=str(tmp_path / "stored"), ref_mode="precomputed")
    found = [r["loss"] for r in history(stored) if "loss" in r]
    np.testing.assert_allclose(found, [r["loss"] for r in log], atol=1e-6)
    with np.load(stored / CACHE_FILE) as kept:
        assert len(kept["keys"]) == 2 * 9 + 4, "the true side of an added pair is an answer of its row"
    run(tmp_path, output_dir=str(tmp_path / "parts"), save_steps=2, max_steps=2, lr_scheduler_type="constant")
    run(tmp_path, output_dir=str(tmp_path / "parts"), save_steps=2, lr_scheduler_type="constant")
    run(tmp_path, output_dir=str(tmp_path / "once"), save_steps=2, lr_scheduler_type="constant")
    same_bytes(tmp_path / "parts" / "checkpoint-4", tmp_path / "once" / "checkpoint-4", but=NOT_ALIKE_WHEN_CUT)


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        (DPOTrainer, {}),
        (DPOTrainer, {"packing": True, "per_device_train_batch_size": 1}),
        (DPOTrainer, {"loss_type": "simpo"}),
        (DPOTrainer, {"fine_tuning": "LoRA", "learning_rate": 1e-2}),
        (UPOTrainer, {"stage": "UPO", "allow_base": True}),
        (UPOTrainer, {"stage": "UPO", "allow_base": True, "loss_type": "mpo"}),
    ],
    ids=str,
)
def test_a_policy_learns_to_look(tmp_path: Path, trainer: type[Trainer], changes: dict[str, Any]) -> None:
    """Right answers only, so that nothing but the pictures is compared; grey ones have less to say
    at the end.
    """
    write_rows(tmp_path / "judged_train.jsonl", [pair(i) for i in range(8)])
    more = {"max_steps": 12, "warmup_steps": 0, "learning_rate": 3e-3, "per_device_train_batch_size": 16}
    out = run(tmp_path, trainer, image_corruption="mask", image_corruption_ratio=1.0, **{**more, **changes})
    log = [r for r in history(out) if "rewards/image_margins" in r]
    assert log[-1]["rewards/image_margins"] > log[0]["rewards/image_margins"] + 1e-3
    assert log[-1]["rewards/image_accuracies"] > 0.6


def test_what_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "judged_train.jsonl", [pair(2, picture=False), {**base(0), **{"signal": label(1)["signal"]}}])
    with pytest.raises(
        ValueError, match=r"image_corruption \(mask\) must find rows with a picture and an answer known"
    ):
        UPOTrainer(args=judged_settings(tmp_path, image_corruption="mask", stage="UPO", allow_base=True))
    settings = {"stage": "UPO", "allow_base": True, "term_weights": ("pair=0",)}
    with pytest.raises(
        ValueError, match=r"image_corruption \(mask\) makes pairs and must go with a weight of the term"
    ):
        UPOTrainer(args=judged_settings(tmp_path, image_corruption="mask", **settings))

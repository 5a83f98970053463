"""A reward model on ratings as levels: what it learns, measures, keeps, resumes and says, however a
window is cut, and what is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.judged_rows import base, judged_settings, pair, rating, records, units
from support.tiny_runs import NOT_ALIKE_WHEN_CUT, history, processor, same_bytes, write_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.cli.main import main
from ernie_tune.data.units import collate_units
from ernie_tune.train.reward_model import attach_head, head_values, load_head, save_head
from ernie_tune.trainers.reward import RewardModel, RewardTrainer

WORDS = {"no": 1, "it is so": 3, "yes": 5}


def rated(i: int, scale: tuple[int, int] = (1, 5), **words: int) -> dict[str, Any]:
    """Answers rated alone: "yes" is always the best, "no" the worst."""
    said, score = list((words or WORDS).items())[i % 3]
    signal = {"type": "rating", "responses": [{"text": said, "score": score}], "scale": list(scale)}
    return {**base(i, picture=i % 2 == 0), "signal": signal}


def settings(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> Any:
    values = {"stage": "RM", "rating_loss": "ordinal", "learning_rate": 3e-3, "warmup_steps": 0, **changes}
    return judged_settings(folder, rows, **values)


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_levels_are_learned_kept_and_said(tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [rated(i) for i in range(12)]
    held = write_rows(tmp_path / "eval.jsonl", rows[:6])
    trainer = RewardTrainer(
        args=settings(
            tmp_path,
            rows,
            fine_tuning=method,
            max_steps=60,
            per_device_train_batch_size=12,
            eval_dataset_path=held,
            per_device_eval_batch_size=4,
            learning_rate=1e-2 if method == "LoRA" else 3e-3,
        )
    )
    fresh = head_values(trainer.model)
    assert fresh is not None
    metrics = trainer.train()
    log = [r for r in history(trainer.output_dir) if "loss" in r]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert log[-1]["rating_mae"] < 0.5 * log[0]["rating_mae"]
    # three values in six rows, and rewards that order them: ties cost little of the rank
    # correlation
    assert metrics["eval_rating_spearman"] > 0.9
    assert metrics["eval_rating_mae"] < 0.15
    kept = load_file(trainer.output_dir / "reward_head" / "model.safetensors")
    assert {name: v.shape for name, v in kept.items()} == {
        "reward_head.weight": (96, 1),
        "reward_head.thresholds": (4,),
    }
    assert not np.allclose(kept["reward_head.thresholds"], fresh["reward_head.thresholds"], atol=1e-2), (
        "cuts are learned"
    )

    again = RewardModel.from_pretrained(trainer.output_dir)
    found = again.score(records(tmp_path, rows[:3]))
    np.testing.assert_allclose(np.array(found), trainer.score(records(tmp_path, rows[:3])), atol=1e-5)  # type: ignore[arg-type]
    capsys.readouterr()
    assert main(["score", str(trainer.output_dir), held]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cuts = np.cumsum(np.append(kept["reward_head.thresholds"][:1], np.logaddexp(0, kept["reward_head.thresholds"][1:])))
    for line, wanted in zip(lines, [1, 3, 5] * 2, strict=True):
        (reward,), (said,) = line["rewards"], line["ratings"]
        assert said == pytest.approx(1 + sum(1 / (1 + math.exp(c - reward)) for c in cuts), abs=1e-4)
        assert abs(said - wanted) < 1


def test_ratings_of_a_regression_are_measured_too(tmp_path: Path) -> None:
    rows = [rated(i) for i in range(6)]
    held = write_rows(tmp_path / "eval.jsonl", rows)
    trainer = RewardTrainer(args=settings(tmp_path, rows, rating_loss="regression", eval_dataset_path=held))
    metrics = trainer.train()
    found, wanted = np.concatenate(trainer.score(records(tmp_path, rows))), np.array([0, 0.5, 1] * 2)  # type: ignore[arg-type]
    assert metrics["eval_rating_mae"] == pytest.approx(np.abs(found - wanted).mean(), abs=1e-5)
    assert RewardModel.from_pretrained(trainer.output_dir).ratings([0.5]) is None
    pairs = (
        RewardTrainer(args=settings(tmp_path, rows, rating_loss="pairs"))
        .measure()
        ._loss(records(tmp_path, [rating(0)]))
    )
    assert not {"rating_mae", "rating_spearman"} & set(pairs)


def test_a_window_is_one_however_it_is_cut(tmp_path: Path) -> None:
    """Also where a part has no rating: the cuts have a gradient there, of 0."""
    rows = [rating(1), rated(2), pair(3), pair(4)]
    trainer = RewardTrainer(args=settings(tmp_path, rows))
    made, found = units(tmp_path, rows), []
    trainer.model.eval()
    for cuts in ([made], [made[:1], made[1:2], made[2:]]):
        loop = trainer.build_loop()
        loss, metrics = loop.accumulate([collate_units(part, processor()) for part in cuts])
        found.append((loss, {n: p.grad.numpy() for n, p in trainer.model.named_parameters() if p.grad is not None}))
        assert metrics["rating_mae"][1] == 4
        loop.clear_gradients()
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert np.abs(found[0][1]["reward_head.thresholds"]).min() > 1e-3
    for name, value in found[0][1].items():
        tolerance = 2e-5 * max(1.0, float(np.abs(value).max()))
        np.testing.assert_allclose(value, found[1][1][name], atol=tolerance, err_msg=name)
    loop = trainer.build_loop()
    loop.objective.begin({"pair": 2.0, "rating": 0.0})
    batch = collate_units(made[2:], processor())
    out = loop.objective.loss(loop.objective.outputs(trainer.model, trainer.model(batch.inputs), batch), batch)
    out.total.backward()
    assert not trainer.model.reward_head.thresholds.grad.numpy().any()


def test_a_run_resumes_and_is_trained_further(tmp_path: Path) -> None:
    rows = [rated(i) for i in range(6)]
    more: dict[str, Any] = {"save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    whole = RewardTrainer(args=settings(tmp_path, rows, output_dir=str(tmp_path / "whole"), **more))
    whole.train()
    RewardTrainer(args=settings(tmp_path, rows, output_dir=str(tmp_path / "cut"), **{**more, "max_steps": 2})).train()
    RewardTrainer(args=settings(tmp_path, rows, output_dir=str(tmp_path / "cut"), **more)).train()
    same_bytes(whole.output_dir / "checkpoint-4", tmp_path / "cut" / "checkpoint-4", but=NOT_ALIKE_WHEN_CUT)
    before = str(tmp_path / "whole")
    further = RewardTrainer(args=settings(tmp_path, rows, model_name_or_path=before, output_dir=str(tmp_path / "more")))
    assert np.array_equal(further.model.reward_head.thresholds.numpy(), whole.model.reward_head.thresholds.numpy())
    with pytest.raises(
        ValueError, match=r"reward_head: head with 5 levels of ratings must have 9, as rating_loss and rating"
    ):
        RewardTrainer(args=settings(tmp_path, rows, model_name_or_path=before, rating_levels=9))
    with pytest.raises(
        ValueError, match=r"reward_head: head with 5 levels of ratings must have 0, as rating_loss and rating"
    ):
        RewardTrainer(args=settings(tmp_path, rows, model_name_or_path=before, rating_loss="pairs"))


def test_other_scales(tmp_path: Path) -> None:
    """Scores from 0 to 10 have eleven levels; with five of them a row between two is named."""
    rows = [rated(i, (0, 10), no=0, so=3, yes=10) for i in range(3)]
    trainer = RewardTrainer(args=settings(tmp_path, rows, rating_levels=11, max_steps=1))
    trainer.train()
    assert attach_head(trainer.model).thresholds.shape == [10]
    five = RewardTrainer(args=settings(tmp_path, rows, max_steps=3, output_dir=str(tmp_path / "five")))
    with pytest.raises(
        ValueError, match=r"judged_train.jsonl:2: score \(0.3 of its scale\) must be one of rating_levels \(5\)"
    ):
        five.train()
    model = AutoModel.from_config("tiny-a")
    attach_head(model, levels=3)
    values = head_values(model)
    assert values is not None
    save_head(values, tmp_path)
    plain = AutoModel.from_config("tiny-a")
    load_head(plain, tmp_path)
    assert plain.reward_head.cuts().shape == [2], "a model without a head gets one like that of the folder"

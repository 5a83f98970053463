"""trainers/reward.py and train/reward_model.py: what a reward model learns and measures, how it is
kept, read again and applied, and what is refused.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.judged_rows import base, encoder, judged_settings, pair, pairs, ranking, rating, records, units
from support.tiny_runs import history, processor, same_bytes, write_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.cli.main import main
from ernie_tune.cli.score import run as score_verb
from ernie_tune.cli.verbs import UsageError
from ernie_tune.data.units import collate_units
from ernie_tune.evaluate.reward_model import calibration_error, reward_evaluation, spearman
from ernie_tune.train.preference import Margins
from ernie_tune.train.reward_model import RewardObjective, attach_head, head_values, load_head, rewards_of, save_head
from ernie_tune.trainers.reward import RewardModel, RewardTrainer
from ernie_tune.trainers.run import Run


def right_or_wrong(count: int) -> list[dict[str, Any]]:
    """Text answers of which "yes" is always the better: learnt in a few steps."""
    signal = {"type": "pair", "chosen": "yes", "rejected": "no"}
    return [{**base(i, picture=i % 2 == 0), "signal": signal, "domain": "d"} for i in range(count)]


def settings(folder: Path, **changes: Any) -> Any:
    return judged_settings(
        folder, right_or_wrong(8), **{"stage": "RM", "learning_rate": 3e-3, "warmup_steps": 0, **changes}
    )


@pytest.mark.parametrize("method", ["Full", "LoRA", "quantised"])
def test_a_reward_model_learns_is_kept_and_scores(
    tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    held = write_rows(tmp_path / "eval.jsonl", right_or_wrong(4))
    how = (
        {"fine_tuning": "LoRA", "weight_quantize_algo": "weight_only_int8"}
        if method == "quantised"
        else {"fine_tuning": method}
    )
    trainer = RewardTrainer(
        args=settings(
            tmp_path,
            max_steps=25,
            per_device_train_batch_size=8,
            eval_dataset_path=held,
            per_device_eval_batch_size=3,
            **how,
        )
    )
    metrics = trainer.train()
    assert metrics["eval_accuracy"] == metrics["eval_accuracy/d"] == metrics["eval_blind_accuracy"] == 1.0
    wanted = {"loss", "margin", "mean_reward", "min_reward", "max_reward", "calibration_error", "length_correlation"}
    assert {f"eval_{name}" for name in wanted} <= set(metrics)
    log = [r for r in history(trainer.output_dir) if "loss" in r]
    assert log[-1]["loss"] < log[0]["loss"]
    assert {"accuracy", "margin", "mean_reward"} <= set(log[0])
    assert not (trainer.output_dir / "before_after.html").exists(), "a reward model answers nothing"

    rows = records(tmp_path, [*right_or_wrong(3), ranking(1)])
    before = trainer.score(rows)
    again = RewardModel.from_pretrained(trainer.output_dir, rows=3)
    for a, b in zip(before, again.score(rows), strict=True):
        assert a is not None
        assert b is not None
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert len(set(a)) == len(a)
    assert all(found is not None and found[0] > found[1] for found in before[:3])
    assert len(before[3] or ()) == 4

    capsys.readouterr()
    file = write_rows(tmp_path / "rows.jsonl", right_or_wrong(2))
    assert main(["score", str(trainer.output_dir), file]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["best"] for line in lines] == [0, 0]
    assert main(["score", str(trainer.output_dir), file, str(tmp_path / "scores.jsonl")]) == 0
    assert [json.loads(x) for x in (tmp_path / "scores.jsonl").read_text(encoding="utf-8").splitlines()] == lines
    assert not list(tmp_path.glob("*.tmp"))


def test_a_row_too_long_has_no_score(tmp_path: Path) -> None:
    model = AutoModel.from_config("tiny-a")
    attach_head(model)
    rows = records(tmp_path, [pair(0), pair(1)])
    longest = max(d.num_tokens for d in units(tmp_path, [pair(0)])[0].dialogues)
    found = RewardModel(model, processor(), max_tokens=longest, rows=2).score(rows)
    assert found[0] is not None
    assert found[1] is None


def test_the_reward_is_read_after_the_last_token(tmp_path: Path) -> None:
    """A change of the last token changes the reward, and so does one pixel; a candidate's reward
    does not see its rivals.
    """
    model = AutoModel.from_config("tiny-a")
    attach_head(model)
    (unit,) = units(tmp_path, [ranking(1)])
    whole = collate_units([unit], processor())
    reward_C = next(iter(rewards_of(model, [whole])))["reward_C"]
    alone = [collate_units(units(tmp_path, [ranking(1)], share=False), processor())]
    np.testing.assert_allclose(next(iter(rewards_of(model, alone)))["reward_C"], reward_C, atol=1e-5)
    head = model.reward_head.weight
    hidden = model(whole.inputs).numpy()
    np.testing.assert_allclose(reward_C, (hidden[whole.end_C] @ head.numpy())[:, 0], atol=1e-5)
    spread = float(head.numpy().std()) * math.sqrt(model.config.hidden_size + 1)
    assert 0.7 < spread < 1.3, "N(0, 1/(D+1))"


def test_the_whole_ranking_is_one_unit_and_margins_count(tmp_path: Path) -> None:
    model = AutoModel.from_config("tiny-a")
    attach_head(model)
    batch = collate_units(units(tmp_path, [ranking(0), rating(1), pair(2)]), processor())
    reward_C = next(iter(rewards_of(model, [batch])))["reward_C"]
    tensor = paddle.to_tensor(reward_C)

    def mean_loss(objective: RewardObjective) -> float:
        divisor = objective.begin(objective.counts([batch]))
        return float(objective.loss({"reward_C": tensor}, batch).total) / divisor

    def expected(margin: float, center: float) -> float:
        rows, first = [], 0
        for unit in batch.units:
            terms = []
            for w, l in unit.edges:
                s_w, s_l = float(reward_C[first + w]), float(reward_C[first + l])
                gap = 0.0 if np.isnan(unit.score_C).any() else margin * (unit.score_C[w] - unit.score_C[l])
                terms.append(math.log1p(math.exp(-(s_w - s_l - gap))) + center * (s_w + s_l) ** 2)
            rows.append(sum(terms) / len(terms))
            first += unit.num_candidates
        return sum(rows) / len(rows)

    assert math.isclose(mean_loss(RewardObjective(0.0)), expected(0.0, 0.0), rel_tol=1e-5)
    assert math.isclose(mean_loss(RewardObjective(0.01, Margins(2.0))), expected(2.0, 0.01), rel_tol=1e-5)
    by_edge = mean_loss(RewardObjective(0.0, edge_weight="edge"))
    assert not math.isclose(by_edge, expected(0.0, 0.0), rel_tol=1e-4), "then a ranking of four counts five times"


def test_ratings_may_be_values_to_predict(tmp_path: Path) -> None:
    """Pairs and rankings by comparison, ratings by (s - q)^2, each with its own mean; a window may
    hold answers rated alone.
    """
    model = AutoModel.from_config("tiny-a")
    attach_head(model)
    alone = {**base(3), "signal": {"type": "rating", "responses": [{"text": "3", "score": 4}], "scale": [1, 5]}}
    batch = collate_units(units(tmp_path, [rating(1), pair(2), alone]), processor())
    reward_C = next(iter(rewards_of(model, [batch])))["reward_C"]
    objective = RewardObjective(0.01, rating_loss="regression")
    assert objective.counts([batch]) == {"pair": 1.0, "rating": 2.0}
    assert objective.begin(objective.counts([batch])) == 1.0
    out = objective.loss({"reward_C": paddle.to_tensor(reward_C)}, batch)
    rated, s_w, s_l, single = reward_C[:3], reward_C[3], reward_C[4], reward_C[5]
    expected = math.log1p(math.exp(-(s_w - s_l))) + 0.01 * (s_w + s_l) ** 2
    expected += (((rated - [1, 0.5, 0]) ** 2).mean() + (single - 0.75) ** 2) / 2
    assert math.isclose(float(out.total), expected, rel_tol=1e-5)
    assert out.metrics["accuracy"][1] == 4, "every comparison is still measured"
    only = collate_units(units(tmp_path, [alone]), processor())
    assert objective.begin(objective.counts([only])) == 1.0
    assert math.isclose(
        float(objective.loss({"reward_C": paddle.to_tensor(reward_C[5:])}, only).total),
        (single - 0.75) ** 2,
        rel_tol=1e-5,
    )
    by_pairs = RewardObjective()
    with pytest.raises(ValueError, match="rows of a window must compare at least two answers"):
        by_pairs.begin(by_pairs.counts([only]))


def test_a_run_on_values(tmp_path: Path) -> None:
    signals = [
        {"type": "rating", "responses": [{"text": "yes", "score": 5}, {"text": "no", "score": 1}], "scale": [1, 5]},
        {"type": "rating", "responses": [{"text": "yes", "score": 5}], "scale": [1, 5]},
    ]
    rows = [{**base(0, picture=False), "signal": signals[i % 2]} for i in range(4)]
    write_rows(tmp_path / "judged_train.jsonl", rows)
    trainer = RewardTrainer(
        args=settings(
            tmp_path, rating_loss="regression", max_steps=2, per_device_train_batch_size=4, learning_rate=1e-4
        )
    )
    two, one = (trainer.score(records(tmp_path, [row]))[0] for row in rows[:2])
    assert two is not None
    assert one is not None
    trainer.train()
    log = [r for r in history(trainer.output_dir) if "loss" in r]
    assert log[0]["loss"] == pytest.approx((((two[0] - 1) ** 2 + two[1] ** 2) / 2 + (one[0] - 1) ** 2) / 2, abs=1e-4)
    assert log[1]["loss"] < log[0]["loss"]


def test_measures_against_closed_forms(tmp_path: Path) -> None:
    assert math.isclose(spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 20, 30, 40])), 1.0)
    assert math.isclose(spearman(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])), -1.0)
    # ties: ranks [0.5, 0.5, 2] and [0, 1, 2]; rho = 1.5 / sqrt(1.5 * 2)
    assert math.isclose(spearman(np.array([1.0, 1, 2]), np.array([1.0, 2, 3])), 1.5 / math.sqrt(3.0))
    assert spearman(np.array([1.0, 1]), np.array([1.0, 2])) == 0.0
    # certain and right; certain and wrong; a bin of two with confidence 0.7310586 and accuracy one
    # half
    assert math.isclose(calibration_error(np.array([50.0, 50.0])), 0.0, abs_tol=1e-12)
    assert math.isclose(calibration_error(np.array([-50.0])), 1.0, abs_tol=1e-12)
    assert math.isclose(calibration_error(np.array([1.0, -1.0])), 1 / (1 + math.exp(-1)) - 0.5, rel_tol=1e-9)
    assert calibration_error(np.zeros(0)) == 0.0
    model = AutoModel.from_config("tiny-a")
    attach_head(model)
    rows = records(tmp_path, pairs(3)[2:])
    found = reward_evaluation(model, rows, encoder(), 2, RewardObjective())
    assert "blind_accuracy" not in found, "there is no picture to mask"


def test_blind_rewards_do_not_see_the_pictures(tmp_path: Path) -> None:
    """One question about two pictures with opposite preferences: blind, one of them must be
    wrong.
    """
    rows = [
        {**base(i), "signal": {"type": "pair", "chosen": ("a", "b")[i // 4], "rejected": ("b", "a")[i // 4]}}
        for i in (0, 4)
    ]
    model = AutoModel.from_config("tiny-a")
    attach_head(model)
    found = reward_evaluation(model, records(tmp_path, rows), encoder(), 2, RewardObjective())
    assert found["blind_accuracy"] == 0.5


def test_a_reward_run_resumes_and_ends_with_the_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = {"save_steps": 3, "max_steps": 6}
    whole = RewardTrainer(args=settings(tmp_path, output_dir=str(tmp_path / "whole"), **more))
    whole.train()
    cut = tmp_path / "cut"
    go_on = Run._stop_now
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_stop_now", lambda run, record, *rest: go_on(run, record, *rest) or record.step == 3)
        RewardTrainer(args=settings(tmp_path, output_dir=str(cut), **more)).train()
    RewardTrainer(args=settings(tmp_path, output_dir=str(cut), **more)).train()
    same_bytes(
        whole.output_dir / "checkpoint-6",
        cut / "checkpoint-6",
        but=("trainer_state.json", "loop_state.json", "ernie_tune_args.yaml", "checkpoint_files.json", "ledger.json"),
    )
    assert (cut / "reward_head" / "model.safetensors").read_bytes() == (
        cut / "checkpoint-6" / "reward_head" / "model.safetensors"
    ).read_bytes()
    held = write_rows(tmp_path / "eval.jsonl", right_or_wrong(4))
    best = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "load_best_model_at_end": True,
        "greater_is_better": True,
    }
    trainer = RewardTrainer(
        args=settings(
            tmp_path,
            output_dir=str(tmp_path / "best"),
            eval_dataset_path=held,
            max_steps=6,
            metric_for_best_model="loss",
            **best,
        )
    )
    trainer.train()  # the worst loss is the first one
    kept = tmp_path / "best" / "checkpoint-2" / "reward_head" / "model.safetensors"
    assert (tmp_path / "best" / "reward_head" / "model.safetensors").read_bytes() == kept.read_bytes()
    further = RewardTrainer(
        args=settings(tmp_path, model_name_or_path=str(tmp_path / "best"), output_dir=str(tmp_path / "more"))
    )
    assert np.array_equal(further.model.reward_head.weight.numpy(), trainer.model.reward_head.weight.numpy())


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss_type .sigmoid. must be auto at stage RM"):
        RewardTrainer(args=settings(tmp_path, loss_type="sigmoid"))
    with pytest.raises(ValueError, match=r"must hold ernie_tune_args.yaml; name the output_dir"):
        RewardModel.from_pretrained(tmp_path)
    model = AutoModel.from_config("tiny-a")
    with pytest.raises(ValueError, match="must hold reward_head/; train a reward model"):
        load_head(model, tmp_path)
    attach_head(model)
    save_head(head_values(model), tmp_path)
    with pytest.raises(ValueError, match=r"head \[96, 1\] must be \[160, 1\] for this model"):
        load_head(AutoModel.from_config("tiny-b"), tmp_path)
    with pytest.raises(UsageError, match="expected FOLDER ROWS"):
        score_verb(["one"])

"""Looking at the picture, from settings to the log: twins, what blind answers would earn, the look
without pictures; and one step by hand.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from PIL import Image
from support.tiny_runs import processor

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.evaluate.measure import Measure
from ernie_tune.evaluate.rewards import OnlineMeasure, _asked
from ernie_tune.rewards.functions import Answered
from ernie_tune.rewards.scores import score_answers
from ernie_tune.train import rollout_guards
from ernie_tune.trainers import online
from ernie_tune.trainers.online import COMPLETIONS_FILE, RLVRTrainer


def even(completion_text: list[str], **_: Any) -> list[float]:
    return [float(len(text) % 2 == 0) for text in completion_text]


def trainer(folder: Path, **changes: Any) -> RLVRTrainer:
    lines = []
    for i in range(4):
        for mark, colour in (("", "red"), ("t", "blue"), ("c", "green")):
            Image.new("RGB", (28 + i, 28), colour).save(folder / f"{i}{mark}.png")
        scene = {"twin": {"images": [f"{i}t.png"], "answer": "b"}, "control": {"images": [f"{i}c.png"]}}
        signal = {"type": "verifiable", "answer": "a", "scene": scene}
        asked = [{"role": "user", "content": "<image>which colour?"}]
        lines.append(json.dumps({"messages": asked, "images": [f"{i}.png"], "signal": signal}))
    data = folder / "ask.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    values: dict[str, Any] = {
        "stage": "RLVR",
        "train_dataset_path": str(data),
        "eval_dataset_path": str(data),
        "output_dir": str(folder / "run"),
        "num_generations": 2,
        "per_device_train_batch_size": 8,
        "max_completion_length": 3,
        "max_prompt_len": 64,
        "max_seq_len": 128,
        "max_steps": 2,
        "logging_steps": 1,
        "eval_max_new_tokens": 3,
        "save_strategy": "no",
        "fine_tuning": "Full",
        "disable_tqdm": True,
        "dynamic_sample": False,
        **changes,
    }
    paddle.seed(5)
    return RLVRTrainer(
        AutoModel.from_config("tiny-a"), TrainingArguments(**values), processor=processor(), reward_funcs=even
    )


def test_a_run_with_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for module in (online, rollout_guards):
        monkeypatch.setattr(module, "LOOKS_EVERY", 2)
    made = trainer(tmp_path, evidence_twins=True, evidence_dependence=0.1)
    metrics = made.train()
    said = capsys.readouterr().out
    assert "without the pictures at best 50.0% of the answers are right, and earn 0.375 with twins" in said
    assert {"eval_evidence/twin_consistency", "eval_evidence/blind_consistency", "eval_evidence/invariance"} <= set(
        metrics
    )
    told = [json.loads(line) for line in (tmp_path / "run" / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()]
    assert {Path(row["images"][0]).stem[1:] for row in told} == {"", "t"}
    assert {row["gold"] for row in told} == {"a", "b"}
    page = (tmp_path / "run" / "rollouts.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 8  # two rounds of four groups
    assert page.count("data:image/png;base64,") == 8
    log = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    assert 0 <= log[0]["evidence/twin_both_right"] <= 1
    assert log[0]["rewards/even/timeouts"] == 0


def test_an_edit_elsewhere_may_change_what_is_cited_but_not_the_answer(tmp_path: Path) -> None:
    """Claims about the rest of a picture follow its edits; invariance is of the answer alone."""
    prompts = trainer(tmp_path).prompts[:4]
    measure = OnlineMeasure.__new__(OnlineMeasure)
    block = '<evidence>[{"type": "exists", "subj": "%s"}]</evidence>%s'
    edited = [Answered(block % ("green circle", text)) for text in ("a", "a", "b", "a")]
    measure._said = lambda records: edited  # type: ignore[method-assign]
    measure._right = lambda records, said: [True] * len(records)  # type: ignore[method-assign]
    found = measure._looked(prompts, [block % ("red circle", "a")] * 3 + ["a"], [True] * 4)
    assert found["evidence/invariance"] == 0.75


def test_scores_judge_the_answer_and_not_the_evidence_beside_it(tmp_path: Path) -> None:
    """As the reward does: claims, a box or a tag around a right answer do not make it wrong."""
    asked = [_asked(record) for record in trainer(tmp_path).prompts[:4]]
    block = '<evidence>[{"type": "exists", "subj": "circle"}]</evidence>'
    given = [f"{block}a", "so \\boxed{a}", f"{block}b", "the answer is a"]
    measure = OnlineMeasure.__new__(OnlineMeasure)
    judged = measure._judged(asked, given)
    assert judged == (["a", "a", "b", "a"], ["a"] * 4)
    assert score_answers(*judged, ["exact_match"]) == {"exact_match": 0.75}
    shown = dataclasses.replace(asked[0], reference=f"{block}a")  # a demonstration that shows its claims
    plain = Measure.__new__(Measure)
    assert plain._judged([shown] * 3, ["a", f"{block}a", block]) == (["a", "a", block], ["a"] * 3)


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward_aggregation \(normalize_then_sum\) must be sum_then_normalize"):
        trainer(tmp_path, evidence_boxes=0.1, reward_aggregation="normalize_then_sum").train()


def test_one_step_by_hand(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    drawn = made.rollout(made.prompts[:2], n=4, seed=3)
    assert [one.answers for one in drawn] == [one.answers for one in made.rollout(made.prompts[:2], n=4, seed=3)]
    groups = made.score(drawn)
    for group in groups:
        np.testing.assert_array_equal(group.reward_G, [float(len(a.text) % 2 == 0) for a in group.answers])
    for group, advantage_G in zip(groups, made.advantages(groups), strict=True):
        spread = group.reward_G.std(ddof=1)
        np.testing.assert_allclose(advantage_G, (group.reward_G - group.reward_G.mean()) / (spread + 1e-4), atol=1e-6)
    batch = made.rollouts.batch(groups)
    assert len(batch.columns["advantage_N"]) == len(batch.target_N)
    assert not (tmp_path / "run" / COMPLETIONS_FILE).exists()


def test_a_run_with_the_perception_term(tmp_path: Path) -> None:
    made = trainer(tmp_path, perception_coef=0.02, perception_entropy="0.01,0.02", perception_every=2, max_steps=3)
    made.train()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    steps = [row for row in state["log_history"] if "reward" in row]
    told = ["perception/distance" in row for row in steps]
    assert not told[1]  # round 1 is between
    assert any(told)
    with pytest.raises(ValueError, match=r"perception_entropy \(0.1\) must be two weights"):
        trainer(tmp_path, perception_coef=0.02, perception_entropy="0.1").train()

"""Settings of sampled answers that do not go together are found before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from ernie_tune.config.checks import problems, unmeasured
from ernie_tune.config.training_arguments import TrainingArguments


@pytest.mark.parametrize(("given", "named", "remedy"), [
    ({"top_p": 0.9}, "top_p", "keep_sampling_mask"),
    ({"min_p": 0.1}, "top_p", "keep_sampling_mask"),
    ({"keep_sampling_mask": True}, "top_k", "from 1 to 64"),
    ({"keep_sampling_mask": True, "top_k": 65}, "top_k", "from 1 to 64"),
    ({"repetition_penalty": 1.2}, "repetition_penalty", "by a reward"),
    ({"num_generations": 3}, "per_device_train_batch_size", r"take one of \[3, 6, 9\]"),
    ({"num_generations": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 5},
     "per_device_train_batch_size", r"10 answers.*take one of \[6, 12\]"),
    ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "steps_per_generation", r"\[2, 4\]"),
    ({"generation_batch_size": 20}, "generation_batch_size", r"\[8, 16, 24\]"),
    ({"reward_clip": "1"}, "reward_clip", "give both"),
    ({"reward_clip": "1,0"}, "reward_clip", "low and then high"),
    ({"reward_clip": "0,1", "reward_aggregation": "normalize_then_sum"}, "reward_clip", "sum_then_normalize"),
    ({"perception_entropy": "0.1"}, "perception_entropy", "give both"),
    ({"tools": "zoom", "perception_coef": 0.02}, "tools", "leave one out"),
    ({"tools": "zoom", "evidence_boxes": 0.1}, "tools", "leave one out"),
    ({"keep_sampling_mask": True, "top_k": 8, "teacher_model": "base"}, "keep_sampling_mask", "leave one out"),
])  # fmt: skip
def test_what_training_would_refuse_is_named(given: dict[str, Any], named: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy) as refused:
        TrainingArguments(stage="RLVR", train_dataset_path="x.jsonl", **given)
    assert named in str(refused.value)


@pytest.mark.parametrize("given", [
    {}, {"keep_sampling_mask": True, "top_k": 8, "top_p": 0.9, "min_p": 0.05}, {"reward_clip": "-1,1"},
    {"tools": "zoom", "evidence_twins": True}, {"perception_coef": 0.02, "perception_entropy": "0.1,0.1"},
    {"tools": "zoom", "keep_sampling_mask": True, "top_k": 4},
    {"num_generations": 6, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4},
    {"num_generations": 4, "steps_per_generation": 3, "generation_batch_size": 24},
])  # fmt: skip
def test_what_goes_together(given: dict[str, Any]) -> None:
    config = TrainingArguments(stage="RLVR", train_dataset_path="x.jsonl", **given)
    wanted = problems(TrainingArguments(stage="RLVR", train_dataset_path="x.jsonl"))
    assert [p.setting for p in problems(config)] == [p.setting for p in wanted]


def test_what_asks_for_held_out_rows_is_named_where_there_are_none() -> None:
    asked = {"num_generations_eval": 8, "eval_max_samples": 5, "report_max_samples": 300}
    made = TrainingArguments(stage="RLVR", train_dataset_path="x.jsonl", **asked)
    assert [name for name, _ in unmeasured(made)] == ["num_generations_eval", "eval_max_samples"]
    assert "num_generations_eval（8）无效" in unmeasured(made)[0][1].chinese
    assert unmeasured(TrainingArguments(stage="SFT", train_dataset_path="x.jsonl")) == []

"""Learning from sampled answers, from settings to files: what is logged, resumed, refused; TRL's
way of calling it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_runs import IMAGES, processor

import ernie_tune
from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.data.records import Record, Reward
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.trainers.online import COMPLETIONS_FILE, RLVRTrainer, SampledAnswers
from ernie_tune.trainers.online_settings import policy_hyper, rollout_settings
from ernie_tune.trainers.run import Run


def rows(count: int) -> list[dict[str, Any]]:
    out = []
    for i in range(count):
        picture = {"images": [str(IMAGES / f"{i:04d}.png")]} if i % 2 == 0 else {}
        words = ("<image>" if picture else "") + "read the digit" + " please" * (i % 3)
        out.append(
            {
                "messages": [{"role": "user", "content": words}],
                **picture,
                "signal": {"type": "verifiable", "answer": str(i % 10)},
            }
        )
    return out


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even ids: what fresh weights get in all shades."""
    return [float(np.mean([i % 2 == 0 for i in ids])) for ids in completion_ids]


def args(folder: Path, **changes: Any) -> TrainingArguments:
    data = folder / "ask.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(8)), encoding="utf-8")
    values: dict[str, Any] = {
        "stage": "RLVR",
        "train_dataset_path": str(data),
        "output_dir": str(folder / "run"),
        "num_generations": 3,
        "per_device_train_batch_size": 6,
        "max_completion_length": 3,
        "max_prompt_len": 64,
        "max_seq_len": 128,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "fine_tuning": "Full",
        "disable_tqdm": True,
        **changes,
    }
    return TrainingArguments(**values)


def model() -> ErnieModel:
    paddle.seed(5)
    return AutoModel.from_config("tiny-a")


def trainer(folder: Path, given: Any = None, **changes: Any) -> RLVRTrainer:
    return RLVRTrainer(given or model(), args(folder, **changes), processor=processor(), reward_funcs=even)


def weights(made: RLVRTrainer) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in made.model.named_parameters() if not value.stop_gradient}


def test_a_run_and_what_it_leaves(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    before = {name: value.copy() for name, value in weights(made).items()}
    made.train()
    assert any(not np.array_equal(before[name], value) for name, value in weights(made).items())
    told = [json.loads(line) for line in (tmp_path / "run" / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()]
    assert {row["round"] for row in told} == {0, 1, 2, 3}
    assert len(told) == 4 * 6
    assert all(row["rewards"]["even"] == row["reward"] for row in told)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    first = state["log_history"][0]
    assert {
        "reward",
        "reward_std",
        "entropy",
        "completions/mean_length",
        "frac_reward_zero_std",
        "approx_kl",
    } <= first.keys()
    assert first["approx_kl"] < 1e-9  # one update a round: the policy is the one that sampled


@pytest.mark.parametrize(
    "changes", [{}, {"num_iterations": 2, "num_mini_batches": 2, "difficulty_sampler": True, "beta": 0.05}]
)
def test_stopping_and_going_on_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """Four steps, and two with two more after a stop: weights and answers are equal to the last
    bit, also in the middle of a round.
    """
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir(), part.mkdir()
    straight = trainer(whole, **changes)
    straight.train()
    stop = {"save_strategy": "steps", "save_steps": 3, **changes}
    with monkeypatch.context() as patched:
        looked = Run._stop_now

        def then_crash(self: Run, record: Any, *rest: Any) -> bool:
            ended = looked(self, record, *rest)
            if record.step == 3:
                raise RuntimeError("power cut")
            return ended

        patched.setattr(Run, "_stop_now", then_crash)
        with pytest.raises(RuntimeError, match="power cut"):
            trainer(part, **stop).train()
    again = trainer(part, **stop)
    again.train()
    assert again.loop.step == 4
    for name, value in weights(straight).items():
        np.testing.assert_array_equal(value, weights(again)[name], err_msg=name)


def test_lora_with_a_penalty_for_leaving_the_reference(tmp_path: Path) -> None:
    """The adapter's absence is the reference: at the first step the policy is the reference, and
    the KL is 0; later it is not.
    """
    adapted = get_peft_model(model(), LoraConfig(r=4, target_modules=["attention"]))
    made = trainer(tmp_path, adapted, beta=0.1, learning_rate=1e-2, fine_tuning="LoRA")
    made.train()
    assert isinstance(made.method, SampledAnswers)
    assert made.method.reference is not None
    assert made.method.reference.mode == "adapter_off"
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    kl = [row["kl"] for row in state["log_history"] if "kl" in row]
    assert abs(kl[0]) < 1e-6
    assert max(kl[1:]) > 1e-5


def test_rows_are_judged_by_what_they_name(tmp_path: Path) -> None:
    made = RLVRTrainer(model(), args(tmp_path, max_steps=1), processor=processor())
    made.train()
    told = [json.loads(line) for line in (tmp_path / "run" / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()]
    assert all(set(row["rewards"]) == {"row", "count"} for row in told)


def test_held_out_prompts_are_answered_and_judged(tmp_path: Path) -> None:
    held = [Record("verifiable", ({"role": "user", "content": "read the digit"},), reward=Reward("7"))]
    made = RLVRTrainer(
        model(), args(tmp_path, max_steps=1), eval_dataset=held, processor=processor(), reward_funcs=even
    )
    metrics = made.train()
    assert 0 <= metrics["eval_reward"] <= 1
    assert "eval_loss" not in metrics


def test_a_script_of_trl_runs_with_its_import_lines_changed(tmp_path: Path) -> None:
    # from trl import GRPOConfig, GRPOTrainer
    GRPOTrainer, GRPOConfig = ernie_tune.GRPOTrainer, ernie_tune.GRPOConfig

    def reward_len(completions: list[Any], **kwargs: Any) -> list[float]:
        return [-abs(4 - len(completion[0]["content"])) for completion in completions]

    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"write {i} letters"}) + "\n" for i in range(6)), encoding="utf-8")
    prompts = ernie_tune.load_dataset(str(file))
    training_args = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=3,
        max_steps=2,
        learning_rate=1e-4,
        beta=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    made = GRPOTrainer(
        model=model(),
        reward_funcs=reward_len,
        args=training_args,
        train_dataset=prompts,
        processing_class=processor(),
    )
    made.train()
    assert made.loop.step == 2


@pytest.mark.parametrize(("changes", "match"), [
    ({"per_device_train_batch_size": 5}, r"\(5 answers\) must be a multiple of num_generations \(3\); take one of \[3, 6\]"),
    ({"num_generations": 1, "per_device_train_batch_size": 1}, r"num_generations \(1\) must be at least 2 for advantage_estimator grpo"),
    ({"top_p": 0.9}, r"top_p \(0.9\) and top_k \(0\) must be 1 and 0 when learning"),
    ({"beta": 0.1, "ref_mode": "precomputed"}, r"ref_mode \(precomputed\) must give a reference for answers that nobody knows before"),
    ({"loss_type": ("grpo", "dapo")}, r"loss_type \(grpo, dapo\) must be one loss"),
])  # fmt: skip
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, **changes).train()


def test_rewards_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward_funcs \(nonsense\) must be the name of a checker"):
        RLVRTrainer(model(), args(tmp_path), processor=processor(), reward_funcs="nonsense")
    both = RLVRTrainer(
        model(), args(tmp_path), processor=processor(), reward_funcs=[even, "exact"], reward_weights=[1.0, 0.5]
    )
    assert both.rubric.names == ("even", "exact")


def test_usual_settings_of_each_loss(tmp_path: Path) -> None:
    usual = {
        "auto": ("dapo", 0.2, 0.28),
        "gspo": ("gspo", 3e-4, 4e-4),
        "ppo": ("ppo", 0.2, 0.2),
        "gmpo": ("gmpo", 0.4, 0.4),
    }
    for name, wanted in usual.items():
        hyper = policy_hyper(args(tmp_path, loss_type=name))
        assert (hyper.loss_type, hyper.epsilon, hyper.epsilon_high) == wanted
    assert policy_hyper(args(tmp_path, loss_type="gspo", epsilon=0.1)).epsilon == 0.1
    s = rollout_settings(args(tmp_path, num_mini_batches=2, gradient_accumulation_steps=3), 2)
    assert (s.prompts, s.groups_per_batch, s.advantage_estimator, s.kl_coef) == (24, 2, "grpo", 0.0)

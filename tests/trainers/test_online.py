"""Learning from sampled answers, from settings to files: what is logged, resumed, refused; TRL's
way of calling it.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.online_runs import even, sampled_run
from support.tiny_runs import IMAGES, processor

import ernie_tune
from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.layout import Layout
from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.data.records import Record, Reward
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.rewards.functions import RewardFunction
from ernie_tune.trainers.judges import rubric_of
from ernie_tune.trainers.online import AGREEMENT_FILE, COMPLETIONS_FILE, RLVRTrainer, SampledAnswers
from ernie_tune.trainers.online_settings import check_timeout, policy_hyper, rollout_settings
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


def args(folder: Path, **changes: Any) -> TrainingArguments:
    data = folder / "ask.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in rows(8)), encoding="utf-8")
    return sampled_run(data, folder / "run", **changes)


def model() -> ErnieModel:
    paddle.seed(5)
    return AutoModel.from_config("tiny-a")


def trainer(folder: Path, given: Any = None, **changes: Any) -> RLVRTrainer:
    return RLVRTrainer(given or model(), args(folder, **changes), processor=processor(), reward_funcs=even)


def weights(made: RLVRTrainer) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in made.model.named_parameters() if not value.stop_gradient}


def test_a_run_and_what_it_leaves(tmp_path: Path) -> None:
    (tmp_path / "second.py").write_text(
        "def odd(completion_ids, **_):\n    return [sum(i % 2 for i in ids) / len(ids) for ids in completion_ids]\n"
    )
    made = trainer(tmp_path, monitor_reward_funcs=f"{tmp_path}/second.py:odd")
    before = {name: value.copy() for name, value in weights(made).items()}
    made.train()
    assert any(not np.array_equal(before[name], value) for name, value in weights(made).items())
    told = [json.loads(line) for line in (tmp_path / "run" / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()]
    assert {row["round"] for row in told} == {0, 1, 2, 3}
    assert len(told) == 4 * 6
    assert [row["place"] for row in told if row["round"] == 1] == [0, 0, 0, 1, 1, 1]
    assert all(row["rewards"]["even"] == row["reward"] for row in told)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    first = state["log_history"][0]
    assert {
        "reward",
        "reward_std",
        "entropy",
        "completions/mean_length",
        "frac_reward_zero_std",
        "frac_groups_all_wrong",
        "groups_dropped",
        "approx_kl",
    } <= first.keys()
    assert first["monitor/odd/mean"] == pytest.approx(1 - first["reward"])
    assert first["monitor/odd/spearman"] == pytest.approx(-1.0)
    one = [row for row in told if row["round"] == 0]
    size_N = np.repeat([row["advantage"] for row in one], [row["tokens"] for row in one])
    assert first["advantage/abs_max"] == pytest.approx(np.abs(size_N).max(), abs=1e-6)
    assert first["advantage/std"] == pytest.approx(size_N.std(), abs=1e-6)
    assert first["tokens_trained"] == len(size_N)
    assert first["rollout/longest"] == 3
    assert first["rollout/prefix_hit_rate"] == pytest.approx(1 - 1 / 3)
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
    stop = {"save_strategy": "steps", "save_steps": 2, **changes}
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
    one, two = (
        [
            {key: value for key, value in json.loads(line).items() if key != "row"}  # its place on the disk
            for line in (folder / "run" / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()
        ]
        for folder in (whole, part)
    )
    assert one == two, "no answer is told twice"
    for name, value in weights(straight).items():
        np.testing.assert_array_equal(value, weights(again)[name], err_msg=name)


def test_an_alarm_ends_the_run_where_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = args(tmp_path, guard_action="stop", dynamic_sample=False, max_steps=9)
    nothing = RewardFunction(lambda completions, **_: [0.0] * len(completions), name="nothing")
    made = RLVRTrainer(model(), settings, processor=processor(), reward_funcs=nothing.function)
    made.train()
    assert made.loop.step == 3
    out = capsys.readouterr().out
    assert re.search(r"all answers of 3 rounds earned the same .*\n    \S+ask.jsonl:\d: '.*' \(<lambda> 0\)", out)


def test_a_reward_function_that_hangs_ends_the_run_with_its_last_step_saved(tmp_path: Path) -> None:
    """With the function mended and the same command the run is the one that nothing had stopped."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir(), part.mkdir()
    straight = trainer(whole)
    straight.train()
    seen: list[int] = []

    def hangs(completion_ids: list[list[int]], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state.global_step >= 2 and not seen:
            time.sleep(60)
        return even(completion_ids)

    def begun() -> RLVRTrainer:
        settings = args(part, save_strategy="steps", save_steps=100, reward_limit_seconds=0.3)
        return RLVRTrainer(model(), settings, processor=processor(), reward_funcs=hangs)

    with pytest.raises(
        ValueError, match=r"reward function hangs \(test_online.py:\d+\) must answer within 0.3 s for .*ask"
    ):
        begun().train()
    assert (part / "run" / "checkpoint-2").is_dir()
    seen.append(1)
    again = begun()
    again.train()
    assert again.loop.step == 4
    for name, value in weights(straight).items():
        np.testing.assert_array_equal(value, weights(again)[name])
    one, two = ((folder / "run" / COMPLETIONS_FILE).read_text(encoding="utf-8") for folder in (whole, part))
    assert one.replace(str(whole), "").replace('"even"', '"hangs"') == two.replace(str(part), "")


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


def test_held_out_prompts_are_answered_and_judged_as_in_training(tmp_path: Path) -> None:
    """With their tokens and the end they came to, as long as answers may be, to prompts of any
    length; each checker of the rows has its mean."""
    told: list[tuple[list[list[int]], list[str]]] = []

    def judge(completion_ids: list[list[int]], finish_reason: list[str], **_: Any) -> list[float]:
        told.append((completion_ids, finish_reason))
        return even(completion_ids)

    long = "read " * 40 + "the digit"
    asked = [({"role": "user", "content": words},) for words in ("read the digit", long)]
    held = [Record("verifiable", words, reward=Reward("7")) for words in asked]
    settings = args(
        tmp_path, max_steps=1, max_prompt_len=30, max_completion_length=5, eval_max_new_tokens=2, learning_rate=0.0
    )
    funcs = {"reward_funcs": [judge, "row"], "reward_weights": [1.0, 0.5]}
    made = RLVRTrainer(model(), settings, eval_dataset=held, processor=processor(), **funcs)
    metrics = made.train()
    answers, ends = told[-1]
    assert [len(ids) for ids in answers] == [5, 5]
    assert ends == ["length", "length"]
    assert metrics["eval_reward/judge"] == pytest.approx(np.mean(even(answers)))
    assert metrics["eval_reward"] == pytest.approx(metrics["eval_reward/judge"] + 0.5 * metrics["eval_count"])
    assert "eval_loss" not in metrics


def test_held_out_prompts_may_be_answered_several_times(tmp_path: Path) -> None:
    """Sampled, the same at each evaluation, whatever the batch: pass@k as counted by hand from what
    the function was asked, and the mean reward; the likeliest answer's numbers stay as they were.
    """
    told: list[list[float]] = []

    def first_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
        told.append([float(ids[0] % 2 == 0) for ids in completion_ids])
        return told[-1]

    held = [Record("verifiable", ({"role": "user", "content": f"say {i} " * 20},), reward=Reward("7")) for i in "abcd"]

    def run(name: str, **changes: Any) -> dict[str, float]:
        settings = args(
            tmp_path, max_steps=1, learning_rate=0.0, output_dir=str(tmp_path / name), max_prompt_len=30, **changes
        )
        made = RLVRTrainer(model(), settings, eval_dataset=held, processor=processor(), reward_funcs=first_even)
        return made.train()

    metrics = run("a", num_generations_eval=3, per_device_eval_batch_size=6)
    rewards = np.array(told[-1]).reshape(4, 3)
    assert 0 < rewards.mean() < 1
    missed = [[1 - c / 3, (3 - c) * (2 - c) / 6, float(c == 0)] for c in rewards.sum(axis=1)]
    for k, lost in zip((1, 2, 3), np.mean(missed, axis=0), strict=True):
        assert metrics[f"eval_pass@{k}"] == pytest.approx(1 - lost)
    assert metrics["eval_reward/mean@3"] == pytest.approx(rewards.mean())
    before = json.loads((tmp_path / "a" / "before.json").read_text(encoding="utf-8"))["metrics"]
    assert {k: v for k, v in before.items() if "@" in k} == {k: v for k, v in metrics.items() if "@" in k}
    once = run("b")
    assert {k: v for k, v in metrics.items() if k.startswith("eval_") and "@" not in k} == {
        k: v for k, v in once.items() if k.startswith("eval_")
    }
    wider = run("c", num_generations_eval=3, per_device_eval_batch_size=64)
    assert {k: wider[k] for k in metrics if "@" in k} == {k: v for k, v in metrics.items() if "@" in k}


def test_rewards_that_rise_while_right_answers_fall_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the policy says anyway is the gold answer of the held-out rows, and something else is
    rewarded: the reward rises, also of held-out answers, and fewer are right."""
    held = [Record("verifiable", ({"role": "user", "content": f"say {i}"},), reward=Reward("?")) for i in range(6)]
    short = {"max_completion_length": 1, "eval_max_new_tokens": 1, "num_generations": 16, "dynamic_sample": False}
    asked = trainer(tmp_path, **short, per_device_train_batch_size=32)
    asked.prepare()
    said = [answer.text for answer in asked.method._likeliest(held)]  # type: ignore[attr-defined]
    held = [dataclasses.replace(r, reward=Reward(gold)) for r, gold in zip(held, said, strict=True)]
    settings = args(
        tmp_path, max_steps=8, eval_strategy="steps", eval_steps=2, learning_rate=1e-2, per_device_train_batch_size=32,
        lr_scheduler_type="constant", warmup_ratio=0, **short,
    )  # fmt: skip
    made = RLVRTrainer(model(), settings, eval_dataset=held, processor=processor(), reward_funcs=even)
    metrics = made.train()
    before = json.loads((tmp_path / "run" / "before.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["eval_reward"] > before["eval_reward"]
    told = [
        line for line in capsys.readouterr().out.splitlines() if "right by their own checkers, 1.000 before" in line
    ]
    assert len(told) == 1


def test_a_script_of_trl_runs_with_its_import_lines_changed(tmp_path: Path) -> None:
    # from trl import GRPOConfig, GRPOTrainer
    GRPOTrainer, GRPOConfig = ernie_tune.GRPOTrainer, ernie_tune.GRPOConfig

    seen: list[Any] = []

    def reward_num_unique_chars(completions: list[Any], **kwargs: Any) -> list[float]:
        seen.extend(zip(completions, kwargs["completion"], strict=True))
        return [float(len(set(c))) for c in completions]

    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"write {i} letters", "completion": "abc"} for i in range(6)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
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
        reward_funcs=reward_num_unique_chars,
        args=training_args,
        train_dataset=prompts,
        processing_class=processor(),
    )
    made.train()
    assert made.loop.step == 2
    assert all(isinstance(answer, str) and told == "abc" for answer, told in seen)


def one_grpo_step(folder: Path, **more: Any) -> Any:
    return ernie_tune.GRPOConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=2,
        max_steps=1,
        report_to="none",
        save_strategy="no",
        **more,
    )


def as_dataset(rows: list[dict[str, Any]]) -> Any:
    return pytest.importorskip("datasets").Dataset.from_list(rows)


@pytest.mark.parametrize("given", [list, iter, as_dataset])
def test_rows_adapters_and_names_as_trl_takes_them(tmp_path: Path, given: Any) -> None:
    """A `datasets.Dataset`, a list or a generator of conversations with columns of their own, a
    model by name, an adapter beside it.
    """
    seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], digit: list[int], **_: Any) -> list[float]:
        seen.extend(digit)
        assert all(prompt[-1]["role"] == "user" for prompt in prompts)
        return [float(len(completion[0]["content"]) % 2) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": f"read {i}"}], "digit": i} for i in range(4)]
    model().save_pretrained(tmp_path / "base")
    config = one_grpo_step(tmp_path, use_vllm=False, remove_unused_columns=False)
    made = ernie_tune.GRPOTrainer(
        model=str(tmp_path / "base"),
        reward_funcs=[reward],
        args=config,
        train_dataset=given(rows),
        processing_class=processor(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )
    made.train()
    assert set(seen) <= {0, 1, 2, 3}
    assert {name.rsplit(".", 1)[-1] for name in weights(made)} == {"lora_A", "lora_B"}


def test_an_answer_beside_a_prompt_is_one_to_check_by(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whether the settings say so or not, of rows in memory and of a data set that was opened for
    whatever it holds; what is measured says so where nothing can be.
    """
    seen: list[Any] = []

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        seen.extend(answer)
        return [float(len(completion[0]["content"]) % 2) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": f"read {i}"}], "answer": str(i)} for i in range(4)]

    def trained(given: Any, **more: Any) -> None:
        config = one_grpo_step(tmp_path, overwrite_output_dir=True, **more)
        seen.clear()
        ernie_tune.GRPOTrainer(
            model=model(), reward_funcs=reward, args=config, train_dataset=given, processing_class=processor()
        ).train()
        assert seen
        assert set(seen) <= {"0", "1", "2", "3"}

    trained(rows, train_dataset_type="verifiable")
    trained(rows, num_generations_eval=4)
    assert "WARNING] - num_generations_eval (4) has no effect without held-out rows" in capsys.readouterr().out
    trained(ernie_tune.load_dataset(rows))
    assert "has no effect" not in capsys.readouterr().out


def test_who_judges_is_told_from_what_is_given(tmp_path: Path) -> None:
    """Lambdas and functions of two files by number, classes by their instances; a function that has
    a name of its own is none of our judges; weights in the settings, as TRL has them.
    """

    class Mine:
        name = "mine"

        def __call__(self, completions: list[str], **_: Any) -> list[float]:
            return [1.0] * len(completions)

    one, two = lambda completions, **_: [0.0], lambda completions, **_: [1.0]
    config = one_grpo_step(tmp_path, reward_weights=[1.0, 0.5, 2.0])
    made = rubric_of(config, [one, two, Mine], None)
    assert (made.names, made.weights) == (("<lambda>", "<lambda>_2", "Mine"), (1.0, 0.5, 2.0))
    assert isinstance(rubric_of(one_grpo_step(tmp_path), Mine(), None).judges[0], RewardFunction)
    (tmp_path / "rf.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n", encoding="utf-8")
    named = f"{tmp_path}/rf.py:one"
    for twice in ([one, one], [named, named]):
        with pytest.raises(ValueError, match="must have names of their own"):
            rubric_of(one_grpo_step(tmp_path), twice, None)

    def scaled(k: float) -> Any:
        return lambda completions, **_: [k] * len(completions)

    made = rubric_of(one_grpo_step(tmp_path), [scaled(0.5), scaled(2.0)], None)
    assert made.names == ("<lambda>", "<lambda>_2")


def test_an_adapter_needs_a_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model \(None\) must be given with peft_config"):
        RLVRTrainer(None, args(tmp_path), reward_funcs=even, peft_config=LoraConfig(r=2))


def test_a_run_whose_engine_sees_another_policy_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From then on the trainer computes its own log-probabilities; a run that goes on knows it."""
    inner = SampledAnswers._logp
    monkeypatch.setattr(SampledAnswers, "_logp", lambda self, batch: inner(self, batch) + 1e-3)
    made = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    made.train()
    log = (tmp_path / "run" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    first, second = (next(r for r in map(json.loads, log) if r.get("step") == step and "loss" in r) for step in (1, 2))
    assert first["mismatch/max_abs_dlp"] == pytest.approx(1e-3, rel=0.05)
    assert "mismatch/max_abs_dlp" in second, "every round, not every twentieth"
    assert json.loads((tmp_path / "run" / "checkpoint-1" / AGREEMENT_FILE).read_text()) == {"recompute": True}
    assert 4e-7 < first["approx_kl"] < 6e-7, "half the square: old is the trainer's, off by what was added"


def test_the_engine_and_the_trainer_agree(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1)
    made.train()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    assert state["log_history"][0]["mismatch/max_abs_dlp"] <= 1e-5
    own = trainer(tmp_path, max_steps=1, old_logps="recompute", output_dir=str(tmp_path / "own"))
    own.train()
    for name, value in weights(made).items():
        np.testing.assert_allclose(value, weights(own)[name], atol=1e-4, err_msg=name)


def test_the_most_uncertain_tokens_are_found_by_the_policy_that_sampled(tmp_path: Path) -> None:
    made = trainer(tmp_path, top_entropy_quantile=0.4, dynamic_sample=False)
    groups = made.score(made.rollout(made.prompts[:4], n=3))
    made.advantages(groups)
    batch = made.rollouts.batch(groups)
    method = made.method
    assert isinstance(method, SampledAnswers)
    outputs = method.policy_objective(policy_hyper(made.args), 0.0)
    with paddle.no_grad():
        entropy_N = outputs.outputs(made.model, made.model(batch.inputs), batch)["entropy_N"].numpy()
    kept = batch.columns["entropy_keep_N"]
    assert kept.tolist() == (entropy_N >= np.quantile(entropy_N, 0.6)).astype(float).tolist()
    assert 0 < kept.mean() < 0.6
    made.train()


def test_tools_as_functions_and_by_the_name_of_their_file(tmp_path: Path) -> None:
    def weather(city: str) -> str:
        """What the weather is.

        Args:
            city: where
        """
        return "rain"

    (tmp_path / "own.py").write_text('def clock() -> str:\n    """The time."""\n    return "noon"\n', encoding="utf-8")
    settings = args(tmp_path, tools=f"{tmp_path}/own.py:clock", max_prompt_len=640, max_seq_len=700, max_steps=1)
    made = ernie_tune.GRPOTrainer(model(), settings, processor=processor(), reward_funcs=even, tools=[weather, "zoom"])
    made.train()
    listed = [tool["name"] for tool in made.rollouts._listed(made.prompts[0])]
    assert listed == ["clock", "weather"]
    assert made.rollouts.turns is not None
    assert made.rollouts.turns.tools == ("zoom",)
    assert made.rollouts.turns.own["weather"]({"city": "Paris"}) == ("rain", "")
    with pytest.raises(ValueError, match=r"tools \(\S*clock\) must have names of their own"):
        RLVRTrainer(model(), settings, processor=processor(), reward_funcs=even, tools=[settings.sampling.tools[0]])
    with pytest.raises(ValueError, match=r"tools \(zom\) must be of zoom or file.py:function"):
        args(tmp_path, tools="zom")
    with pytest.raises(FileNotFoundError, match=r"tools \(\S+none.py:f\) must name an existing file"):
        RLVRTrainer(model(), args(tmp_path, tools=f"{tmp_path}/none.py:f"), processor=processor(), reward_funcs=even)


def test_tools_and_a_sampling_mask_in_a_run(tmp_path: Path) -> None:
    """Two updates a round: what was chosen is trained under the mask, routers repeat what a pass of
    the trainer noted.
    """
    made = trainer(
        tmp_path, tools="zoom", keep_sampling_mask=True, top_k=8, top_p=0.9, num_iterations=2, dynamic_sample=False,
        process_rewards="claims", mismatch_every=1,
    )  # fmt: skip
    made.train()
    assert made.method.replay == "R2"  # type: ignore[attr-defined]
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    first = state["log_history"][0]
    assert first["tools/turns_mean"] == 1
    assert first["mismatch/max_abs_dlp"] < 1e-5
    assert first["entropy"] < np.log(8)


def test_sampling_ends_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, rollout_timeout_seconds=5.0, max_completion_length=6, dynamic_sample=False)
    clock = iter([0.0, *(float(i) for i in range(1, 1000))])  # a second a look
    monkeypatch.setattr("ernie_tune.trainers.online.time.monotonic", lambda: next(clock))
    groups = made.score(made.rollout(made.prompts[:2]))
    answers = [answer for group in groups for answer in group.answers]
    assert max(len(answer.token_ids) for answer in answers) == 5
    assert {answer.finish_reason for answer in answers if len(answer.token_ids) == 5} >= {"length"}
    made.train()  # answers of no token among them, in the end: they count for nothing


def test_a_clock_needs_ranks_that_sample_apart() -> None:
    check_timeout(3.0, Layout(data=2, sharding=2))
    check_timeout(0.0, Layout(tensor=2))
    with pytest.raises(ValueError, match=r"rollout_timeout_seconds \(3\) must be 0 where ranks sample"):
        check_timeout(3.0, Layout(tensor=2))


def test_rounds_as_trl_sizes_them(tmp_path: Path) -> None:
    """Answers of a round over all devices, or micro-batches of one device: both say how many steps
    a round has.
    """
    sizes = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    for given in ({"steps_per_generation": 6}, {"generation_batch_size": 36}, {"num_mini_batches": 3}):
        s = rollout_settings(args(tmp_path, **sizes, **given), 2)
        assert (s.num_mini_batches, s.prompts) == (3, 12)
    both = args(tmp_path, **sizes, steps_per_generation=4, generation_batch_size=36)
    with pytest.raises(ValueError, match=r"steps_per_generation and generation_batch_size must mean as many"):
        rollout_settings(both, 2)


def test_one_ratio_an_answer_is_gspo(tmp_path: Path) -> None:
    for name in ("grpo", "dapo", "gspo"):
        assert policy_hyper(args(tmp_path, loss_type=name, importance_sampling_level="sequence")).loss_type == "gspo"
    assert policy_hyper(args(tmp_path, loss_type="grpo", importance_sampling_level="token")).loss_type == "grpo"


@pytest.mark.parametrize(("changes", "match"), [
    ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, r"steps_per_generation \(3\) must be a multiple .* \(2\); take one of \[2, 4\]"),
    ({"generation_batch_size": 10}, r"generation_batch_size \(10\) must be a multiple .* \(6\); take one of \[6, 12\]"),
    ({"importance_sampling_level": "sequence", "loss_type": "cispo"}, r"importance_sampling_level \(sequence\) must go with a loss"),
    ({"repetition_penalty": 1.1}, r"repetition_penalty \(1.1\) must be 1 when learning"),
    ({"per_device_train_batch_size": 5}, r"\(5 answers\) must be a multiple of num_generations \(3\); take one of \[3, 6\]"),
    ({"num_generations": 1, "per_device_train_batch_size": 1}, r"num_generations \(1\) must be at least 2 for advantage_estimator grpo"),
    ({"top_p": 0.9}, r"top_p \(0.9\), top_k \(0\) and min_p \(0\) must be 1, 0 and 0 when learning"),
    ({"tools": "zoom", "evidence_boxes": 0.1}, r"tools \(zoom\) must not be set with evidence_boxes"),
    ({"tools": "zoom", "perception_coef": 0.1}, r"tools \(zoom\) must not be set with perception_coef"),
    ({"keep_sampling_mask": True, "top_k": 5, "evidence_dependence": 0.1}, r"keep_sampling_mask \(true\) must not be set with evidence_dependence"),
    ({"tools": "zoom", "router_replay": "R3"}, r"router_replay \(R3\) must be off with tools"),
    ({"beta": 0.1, "ref_mode": "precomputed"}, r"ref_mode \(precomputed\) must give a reference for answers that nobody knows before"),
    ({"loss_type": ("grpo", "dapo")}, r"loss_type \(grpo,dapo\) must be one of grpo, dapo.*; choose one"),
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

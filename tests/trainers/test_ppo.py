"""PPO from settings to files: where values are read, what learns and what stays, the critic's
starts, a resumed run, toys that must be learned.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.online_runs import even, sampled_run
from support.tiny_runs import IMAGES, processor, write_rows

import ernie_tune
from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.generate.batch import eval_mode
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel, get_peft_model
from ernie_tune.train.critic import ADAPTER, HEAD, ActorCritic, ValueObjective
from ernie_tune.train.rollout_guards import CriticWatch
from ernie_tune.train.rollouts import Rolled
from ernie_tune.trainers.judges import judged
from ernie_tune.trainers.ppo import CRITIC_FOLDER, PPOTrainer
from ernie_tune.trainers.reward import RewardTrainer
from ernie_tune.trainers.run import Run


def args(folder: Path, **changes: Any) -> TrainingArguments:
    data = folder / "ask.jsonl"
    if not data.exists():
        pictures = [{"images": [str(IMAGES / f"{i:04d}.png")]} if i % 4 == 0 else {} for i in range(8)]
        asked = [("<image>" if p else "") + f"say {'so ' * (i % 3)}{i}" for i, p in enumerate(pictures)]
        rows = [{"messages": [{"role": "user", "content": q}], **p} for q, p in zip(asked, pictures, strict=True)]
        write_rows(data, rows)
    small = {"stage": "PPO", "num_generations": 1, "per_device_train_batch_size": 4}
    return sampled_run(data, folder / "run", **{**small, **changes})


def model() -> ErnieModel:
    paddle.seed(5)
    return AutoModel.from_config("tiny-a")


def given(fine_tuning: str) -> ErnieModel:
    return model() if fine_tuning == "Full" else get_peft_model(model(), LoraConfig(r=4, target_modules=["attention"]))


def trainer(folder: Path, fine_tuning: str = "Full", **changes: Any) -> PPOTrainer:
    settings = args(folder, fine_tuning=fine_tuning, **changes)
    return PPOTrainer(given(fine_tuning), settings, processor=processor(), reward_funcs=even)


def policy(made: PPOTrainer) -> dict[str, np.ndarray]:
    return {name: p.numpy().copy() for name, p in made.model.named_parameters() if not p.stop_gradient}


def critic(made: PPOTrainer) -> dict[str, np.ndarray]:
    assert made.method.critic is not None
    return {name: p.numpy().copy() for name, p in made.method.critic.trained().items()}


def moved(before: dict[str, np.ndarray], after: dict[str, np.ndarray]) -> set[str]:
    return {name for name, value in before.items() if not np.array_equal(value, after[name])}


def history(folder: Path) -> list[dict[str, Any]]:
    state = json.loads((folder / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    return [row for row in state["log_history"] if "critic/vf_loss" in row]


# --- where values are read ------------------------------------------------------------------------


def round_of(made: PPOTrainer) -> list[Rolled]:
    """A round of judged answers with values from a critic whose head has an opinion."""
    made.prepare()
    assert made.method.critic is not None
    head = getattr(made.method.critic.placed.model, HEAD)
    head.weight.set_value(paddle.to_tensor(np.random.default_rng(0).standard_normal(head.weight.shape, np.float32)))
    return made.method.rollouts.make_round()


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_a_value_is_that_of_the_state_before_its_token(tmp_path: Path, fine_tuning: str) -> None:
    """The head on the hidden state that predicts the token. Another last token changes no value:
    read where tokens lie, it would.
    """
    made = trainer(tmp_path, fine_tuning, normalize_values=False)
    group = round_of(made)[0]
    batch = made.method.rollouts.batch([group])
    assert made.method.critic is not None
    asked = made.method.critic.placed.model
    acting = asked.acting(ADAPTER) if isinstance(asked, PeftModel) else eval_mode(asked)
    with acting, eval_mode(asked), paddle.no_grad():
        hidden_TD = asked(batch.inputs).numpy()
    at = batch.source_N
    expected = (hidden_TD[at] @ getattr(asked, HEAD).weight.numpy()).squeeze(-1)
    np.testing.assert_allclose(group.columns["value_N"], expected, atol=1e-5)
    assert batch.inputs.input_ids_T[at[-1] + 1] == batch.target_N[-1]
    batch.inputs.input_ids_T[at[-1] + 1] = (batch.target_N[-1] + 1) % 100
    np.testing.assert_allclose(made.method.critic.values(batch), group.columns["value_N"], rtol=1e-5)


def test_returns_and_advantages_of_a_round(tmp_path: Path) -> None:
    """gae by its recursion over each answer, the reward on the last token, the penalty on each;
    whitened over the round.
    """
    made = trainer(tmp_path, "LoRA", kl_coef=0.2, gamma=0.9, lam=0.8)
    groups = round_of(made)
    rough = []
    for group in groups:
        c, size = group.columns, len(group.columns["value_N"])
        reward = -0.2 * (c["old_logp_N"] - c["ref_logp_N"])
        reward[-1] += group.reward_G[0]
        advantage, run = np.zeros(size), 0.0
        for t in reversed(range(size)):
            after = c["value_N"][t + 1] if t + 1 < size else 0.0
            run = reward[t] + 0.9 * after - c["value_N"][t] + 0.9 * 0.8 * run
            advantage[t] = run
        np.testing.assert_allclose(c["return_N"], advantage + c["value_N"], atol=1e-9)
        rough.append(advantage)
    every = np.concatenate(rough)
    white = (every - every.mean()) / np.sqrt(every.var(ddof=1) + 1e-8)
    np.testing.assert_allclose(np.concatenate([g.columns["advantage_N"] for g in groups]), white, atol=1e-9)


# --- what learns ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_a_run_and_what_it_leaves(tmp_path: Path, fine_tuning: str) -> None:
    """Two steps of the critic alone, then both; the result holds the policy alone."""
    made = trainer(tmp_path, fine_tuning, critic_warmup=2, num_mini_batches=2, kl_target=0.001, kl_horizon=40)
    seen: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []
    step = ActorCritic._step

    def look(self: ActorCritic, *more: Any) -> Any:
        seen.append((policy(made), critic(made)))
        return step(self, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ActorCritic, "_step", look)
        made.train()
    (p0, c0), _, (p2, c2), _ = seen
    assert not moved(p0, p2)
    assert moved(c0, c2)
    assert moved(p2, policy(made))
    assert not set(p0) & set(c0) or fine_tuning == "Full"
    rows = history(tmp_path)
    assert {
        *(f"critic/{n}/{k}" for n in ("values", "returns", "advantages", "rewards", "score") for k in ("mean", "min", "max")),
        *("critic/vf_explained_var", "critic/vf_clipfrac", "actor/pg_clipfrac", "objective/kl_coef", "objective/kl"),
    } <= rows[-1].keys()  # fmt: skip
    assert rows[0]["critic/values/max"] == 0.0  # who knows nothing says 0
    # from the second round on in the unit of the returns so far
    assert made.method.scale is not None
    assert made.method.scale.seen[0] > 0
    assert rows[0]["learning_rate"] == 0.0
    assert rows[0]["grad_norm"] == rows[0]["critic/grad_norm"] > 0  # no guard may call it nothing
    assert "frac_reward_zero_std" not in rows[0]  # groups of one
    assert rows[0]["reward_std"] > 0
    assert rows[-1]["objective/kl_coef"] != rows[0]["objective/kl_coef"] == 0.05
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert ("model.safetensors" in names) == (fine_tuning == "Full")
    assert CRITIC_FOLDER not in names
    assert all(HEAD not in path.read_text(errors="ignore")[:20000] for path in (tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize(("fine_tuning", "changes"), [
    ("Full", {"num_iterations": 2, "critic_warmup": 1, "cliprange_value": 0}),
    ("LoRA", {"num_mini_batches": 2, "kl_target": 0.001, "kl_horizon": 40, "whiten_rewards": True,
              "normalize_values": False}),
])  # fmt: skip
def test_stopping_and_going_on_is_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fine_tuning: str, changes: dict[str, Any]
) -> None:
    """Three steps, and one with two more after a power cut in the middle of a round: policy, critic
    and penalty are equal to the last bit.
    """
    small = {"max_steps": 3, "per_device_train_batch_size": 2, "max_completion_length": 2}
    changes = {**small, **changes}
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir(), part.mkdir()
    straight = trainer(whole, fine_tuning, **changes)
    straight.train()
    stop = {"save_strategy": "steps", "save_steps": 1, **changes}
    with monkeypatch.context() as patched:
        looked = Run._stop_now

        def then_crash(self: Run, record: Any, *rest: Any) -> bool:
            ended = looked(self, record, *rest)
            if record.step == 1:
                raise RuntimeError("power cut")
            return ended

        patched.setattr(Run, "_stop_now", then_crash)
        with pytest.raises(RuntimeError, match="power cut"):
            trainer(part, fine_tuning, **stop).train()
    again = trainer(part, fine_tuning, **stop)
    again.train()
    assert again.loop.step == 3
    assert isinstance(again.loop.beside.objective, ValueObjective)
    assert again.loop.beside.objective.cliprange == (None if fine_tuning == "Full" else 0.2)
    assert again.method.rollouts.kl.coef == straight.method.rollouts.kl.coef
    for ours, theirs in ((policy(straight), policy(again)), (critic(straight), critic(again))):
        assert not moved(ours, theirs)
    last, same = history(whole)[-1], history(part)[-1]
    for name in ("loss", "grad_norm", "critic/vf_loss", "critic/grad_norm", "objective/kl_coef"):
        assert last[name] == same[name], name


# --- reward models --------------------------------------------------------------------------------


def reward_model(folder: Path, base: Path, fine_tuning: str) -> Path:
    """A reward model of few steps on top of `base`."""
    rows = [
        {"messages": [{"role": "user", "content": "say"}], "signal": {"type": "pair", "chosen": f"{i}", "rejected": "no"}}
        for i in range(4)
    ]  # fmt: skip
    out = folder / f"reward_{fine_tuning}"
    RewardTrainer(
        args=args(
            folder, stage="RM", model_name_or_path=str(base), fine_tuning=fine_tuning, lora_rank=4, max_steps=2,
            train_dataset_path=write_rows(folder / "pairs.jsonl", rows), output_dir=str(out), learning_rate=1e-2,
        )
    ).train()  # fmt: skip
    return out


def saved_base(folder: Path) -> Path:
    made = model()
    made.save_pretrained(folder / "base")
    processor().save_pretrained(folder / "base")
    return folder / "base"


@pytest.mark.parametrize("fine_tuning", ["Full", "LoRA"])
def test_a_reward_model_judges_and_starts_the_critic(tmp_path: Path, fine_tuning: str) -> None:
    base = saved_base(tmp_path)
    rewards = reward_model(tmp_path, base, fine_tuning)
    settings = args(
        tmp_path, model_name_or_path=str(base), fine_tuning=fine_tuning, lora_rank=4, max_steps=1,
        reward_model=str(rewards), reward_funcs=(), learning_rate=0.0, value_learning_rate=0.0,
    )  # fmt: skip
    made = PPOTrainer(args=settings, reward_funcs=[even], reward_weights=[0.5, 2.0])
    made.train()
    told = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(
        row["reward"] == pytest.approx(0.5 * row["rewards"]["even"] + 2 * row["rewards"][rewards.name]) for row in told
    )
    assert made.method.scale is None
    # By the reward model on its own: the same numbers, and it is what the critic started from.
    alone = ernie_tune.RewardModel.from_pretrained(rewards)
    groups = made.method.rollouts.make_round()
    found = alone.score([judged(g.record, g.answers) for g in groups])
    assert [g.scored[0].parts[rewards.name] for g in groups] == pytest.approx([s[0] for s in found if s], abs=1e-5)
    values = critic(made)
    np.testing.assert_array_equal(values[f"{HEAD}.weight"], alone.model.reward_head.weight.numpy())
    theirs = {name.replace(".default.", f".{ADAPTER}."): p.numpy() for name, p in alone.model.named_parameters()}
    shared = {name for name in values if name in theirs}
    assert len(shared) > 5
    assert not moved({name: theirs[name] for name in shared}, values)
    assert isinstance(made.model, PeftModel) == (fine_tuning == "LoRA")
    if isinstance(made.model, PeftModel):  # one base for policy, critic and reward model
        assert len(made.model.adapters) == 3
        assert made.model.active == "default"


def test_starts_that_cannot_be(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    rewards = reward_model(tmp_path, base, "LoRA")
    with pytest.raises(ValueError, match=r"value_model \(.*reward_LoRA\) must be a whole model of the policy's shape"):
        trainer(tmp_path, value_model=str(rewards)).train()
    with pytest.raises(ValueError, match=r"reward model .*base must hold ernie_tune_args.yaml and reward_head"):
        trainer(tmp_path, value_model=str(base)).train()
    with pytest.raises(ValueError, match=r"sharding \(stage3\) must be stage2 or stage1 at stage PPO"):
        trainer(tmp_path, sharding="stage3")
    with pytest.raises(ValueError, match=r"reward_weights \(1\) must be as many as reward_funcs \(2\)"):
        PPOTrainer(
            model(),
            args(tmp_path),
            processor=processor(),
            reward_funcs=even,
            reward_weights=[1.0],
            reward_model=rewards,
        )


# --- guards and toys ------------------------------------------------------------------------------


def test_a_critic_that_harms_is_named_once() -> None:
    watch = CriticWatch(warmup_steps=2, patience_steps=5)
    bad = {"critic/vf_explained_var": -0.5}
    said = [watch.look(step, bad) for step in range(1, 8)]
    assert not any(said)  # too early, or too few seen
    for step in range(8, 14):
        said.append(watch.look(step, bad))
    state = watch.state_dict()
    assert sum(map(len, said)) == 1
    assert "explained variance is -0.50" in next(v for found in said for v in found).message
    again = CriticWatch()
    again.load_state_dict(state)
    assert again.look(99, bad) == []
    settled = CriticWatch(0, 0)
    assert not any(settled.look(step, {**bad, "reward": 1.0, "reward_std": 0.01}) for step in range(1, 30))
    good = CriticWatch(0, 0)
    assert not any(good.look(step, {"critic/vf_explained_var": 0.1}) for step in range(1, 30))


def test_a_script_of_trl_runs_with_its_import_lines_changed(tmp_path: Path) -> None:
    PPOConfig, PPOTrainer = ernie_tune.PPOConfig, ernie_tune.PPOTrainer
    rows = [{"prompt": f"write {i}"} for i in range(4)]
    settings = PPOConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, num_ppo_epochs=2, num_mini_batches=1,
        kl_coef=0.1, cliprange=0.2, cliprange_value=0.3, vf_coef=0.2, gamma=1.0, lam=0.9, max_completion_length=2,
        missing_eos_penalty=1.0, max_steps=2, save_strategy="no", report_to="none",
    )  # fmt: skip
    made = PPOTrainer(
        model=model(), args=settings, train_dataset=ernie_tune.load_dataset(write_rows(tmp_path / "p.jsonl", rows)),
        processing_class=processor(), reward_funcs=even,
    )  # fmt: skip
    made.train()
    assert made.loop.step == 2
    assert isinstance(made.loop, ActorCritic)
    assert isinstance(made.loop.beside.objective, ValueObjective)
    assert made.loop.beside.objective.cliprange == 0.3
    assert made.method.settings.num_generations == 1
    assert made.method.settings.missing_eos_penalty == 1.0


def test_an_adapter_and_a_name_as_trl_takes_them(tmp_path: Path) -> None:
    folder = saved_base(tmp_path)
    made = PPOTrainer(
        str(folder), args(tmp_path), processing_class=processor(), reward_funcs=even,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]),
    )  # fmt: skip
    assert {name.rsplit(".", 1)[-1] for name in policy(made)} == {"lora_A", "lora_B"}
    with pytest.raises(ValueError, match="peft_config"):
        PPOTrainer(None, args(tmp_path), peft_config=LoraConfig(r=2, target_modules=["q_proj"]))

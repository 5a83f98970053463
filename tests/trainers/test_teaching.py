"""On-policy distillation, from settings to files: teachers of each kind, what they add to a token,
what resumes, what is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.online_runs import sampled_run
from support.tiny_runs import IMAGES, processor

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.train.rolled import Rolled
from ernie_tune.train.rollouts import Rollouts
from ernie_tune.trainers.online import RLVRTrainer
from ernie_tune.trainers.run import Run


def rows(count: int, kind: str = "prompt", hint: str = "") -> list[dict[str, Any]]:
    out = []
    for i in range(count):
        picture = {"images": [str(IMAGES / f"{i:04d}.png")]} if i % 2 == 0 else {}
        user = {"role": "user", "content": ("<image>" if picture else "") + "read the digit" + " please" * (i % 3)}
        if kind == "sft":
            out.append({"messages": [user, {"role": "assistant", "content": f"digit {i % 10}"}], **picture})
        else:
            signal = {"type": "verifiable", "answer": str(i % 10), **({"hint": hint} if hint else {})}
            out.append({"messages": [user], **picture, "signal": signal})
    return out


def nothing(completions: list[Any], **_: Any) -> list[None]:
    """No answer is judged: the teacher alone has something to say."""
    return [None] * len(completions)


def model(moved: float = 0.0) -> ErnieModel:
    made = AutoModel.from_config("tiny-a")
    rng = np.random.default_rng(0)
    for value in made.parameters() if moved else ():
        value.set_value(value + moved * paddle.to_tensor(rng.normal(size=value.shape).astype(np.float32)))
    return made


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    model(0.05).save_pretrained(folder)
    processor().save_pretrained(folder)
    return str(folder)


def trainer(folder: Path, given: Any = None, data: list[dict[str, Any]] | None = None, **changes: Any) -> RLVRTrainer:
    files = []
    for name, shown in (("ask", False), ("show", True)):
        some = [row for row in data or rows(6) if ("signal" not in row) == shown]
        if some:
            files.append(str(folder / f"{name}.jsonl"))
            Path(files[-1]).write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    small = {"num_generations": 2, "per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 3e-3}
    settings = sampled_run(",".join(files), folder / "run", **{**small, "reward_check": False, **changes})
    return RLVRTrainer(given or model(), settings, processor=processor(), reward_funcs=nothing)


def logged(made: Any) -> list[dict[str, float]]:
    state = json.loads((Path(made.args.save.output_dir) / "trainer_state.json").read_text(encoding="utf-8"))
    return [row for row in state["log_history"] if "loss" in row]


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> list[Rolled]:
    """All groups that a run makes."""
    seen: list[Rolled] = []
    make = Rollouts.make_round

    def watched(self: Rollouts) -> list[Rolled]:
        found = make(self)
        seen.extend(found)
        return found

    monkeypatch.setattr(Rollouts, "make_round", watched)
    return seen


def test_a_teacher_adds_to_the_advantage_of_each_token(tmp_path: Path, teacher: str, rounds: list[Rolled]) -> None:
    """Without any reward: every answer counts, its tokens have what the teacher makes of them."""
    made = trainer(tmp_path, teacher_model=teacher, teacher_kl_coef=0.7)
    made.train()
    assert all("policy/distill_loss" not in row for row in logged(made))
    assert logged(made)[0]["grad_norm"] > 0
    for group in rounds:
        columns = group.columns
        assert group.counts_G.all()
        gap_N = 0.7 * (columns["teacher_logp_N"].astype(np.float64) - columns["old_logp_N"])
        np.testing.assert_allclose(columns["advantage_N"], gap_N, atol=1e-12)
        assert np.abs(gap_N).max() > 1e-2
    kl = np.concatenate([g.columns["old_logp_N"] - g.columns["teacher_logp_N"] for g in rounds[:2]]).mean()
    assert logged(made)[0]["teacher/kl"] == pytest.approx(kl, rel=1e-4)


def test_a_policy_comes_closer_to_its_teachers_distributions(tmp_path: Path, teacher: str) -> None:
    made = trainer(tmp_path, teacher_model=teacher, max_steps=8, per_device_train_batch_size=12, distill_beta=0.5)
    made.train()
    told = [row["policy/distill_loss"] for row in logged(made)]
    assert told[-1] < 0.7 * told[0]


def test_the_base_is_a_teacher_without_a_second_copy(tmp_path: Path, rounds: list[Rolled]) -> None:
    """A fresh adapter is its base: nothing to learn at first; the temperature and what is banned
    are those of sampling.
    """
    adapted = get_peft_model(model(), LoraConfig(r=4, target_modules=["attention"]))
    made = trainer(
        tmp_path, adapted, teacher_model="base", teacher_kl_coef=0.5, fine_tuning="LoRA", temperature=1.3, max_steps=1
    )
    made.train()
    for group in rounds:
        np.testing.assert_allclose(group.columns["teacher_logp_N"], group.columns["old_logp_N"], atol=2e-5)


def test_the_policy_itself_teaches_where_it_sees_more(tmp_path: Path, rounds: list[Rolled]) -> None:
    data = rows(4, hint="it is seven")
    made = trainer(tmp_path, data=data, teacher_model="self", teacher_kl_coef=1.0, teacher_hint=True, max_steps=1)
    made.train()
    assert all(np.abs(g.columns["teacher_logp_N"] - g.columns["old_logp_N"]).max() > 1e-3 for g in rounds)
    plain = trainer(
        tmp_path,
        teacher_model="self",
        teacher_kl_coef=1.0,
        teacher_hint=True,
        max_steps=1,
        output_dir=str(tmp_path / "b"),
    )
    plain.train()  # rows without a hint: what it sees is the same
    assert all(np.abs(g.columns["teacher_logp_N"] - g.columns["old_logp_N"]).max() < 2e-5 for g in rounds[2:])


def test_stopping_and_going_on_is_the_same_run(tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between demonstrations and sampled answers, in the middle of a round."""
    changes = {
        "teacher_model": teacher,
        "distill_lmbda": 0.6,
        "distill_beta": 0.3,
        "num_mini_batches": 2,
        "data": rows(4) + rows(4, "sft"),
        "max_steps": 6,
    }
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir(), part.mkdir()
    straight = trainer(whole, **changes)
    straight.train()
    kinds = ["teacher/kl" in row for row in logged(straight)]
    assert True in kinds[:3]
    assert False in kinds
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
    values = dict(again.model.named_parameters())
    for name, value in straight.model.named_parameters():
        np.testing.assert_array_equal(value.numpy(), values[name].numpy(), err_msg=name)


@pytest.mark.parametrize(("changes", "match"), [
    ({"teacher_kl_coef": 0.0, "distill_coef": 0.0}, r"teacher_kl_coef \(0\) or distill_coef \(0\) must be above 0"),
    ({"teacher_model": "self", "teacher_kl_coef": 1.0}, r"teacher_model \(self\) must see more than the policy"),
    ({"teacher_model": "self", "teacher_hint": True, "distill_coef": 0.5}, r"distill_coef \(0.5\) must be 0 with teacher_model self"),
    ({"teacher_kl_coef": 1.0, "distill_lmbda": 0.5}, r"distill_lmbda \(0.5\) must be 1 without distill_coef"),
    ({"distill_lmbda": 0.5}, r"train_dataset \(0 demonstrations\) must hold sft rows with distill_lmbda \(0.5\)"),
    ({"teacher_model": "base"}, r"teacher_model \(base\) must go with an adapter"),
])  # fmt: skip
def test_settings_that_cannot_be(tmp_path: Path, teacher: str, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, **{"teacher_model": teacher, **changes}).train()

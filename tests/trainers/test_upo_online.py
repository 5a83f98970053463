"""UPO with sampled answers, from settings to files: its parts alone are RLVR and DPO, rows ride
along, a stop changes nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.online_runs import even, sampled_run
from support.tiny_runs import IMAGES, processor

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.checks import problems, remarks
from ernie_tune.config.loader import load_text
from ernie_tune.data.processor import Processor
from ernie_tune.data.units import UnitBatch
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.train.reference import Reference
from ernie_tune.trainers.by_hand import PAGE_FILE
from ernie_tune.trainers.online import RLVRTrainer
from ernie_tune.trainers.ppo import PPOTrainer
from ernie_tune.trainers.run import Run
from ernie_tune.trainers.upo import SampledUPO, UPOTrainer


def ending() -> Processor:
    """Fresh weights never say the end of an answer, and an unfinished one is never the better of a
    pair: here every third token is an end.
    """
    made = processor()
    made.stop_ids = (*made.stop_ids, *range(2, 500, 3))
    return made


def rows(count: int) -> list[dict[str, Any]]:
    out = []
    for i in range(count):
        picture = {"images": [str(IMAGES / f"{i:04d}.png")]} if i % 2 == 0 else {}
        words = ("<image>" if picture else "") + "read the digit" + " please" * (i % 3)
        asked = {"messages": [{"role": "user", "content": words}], **picture}
        out.append({**asked, "signal": {"type": "verifiable", "answer": str(i % 10)}})
    return out


def judged(count: int, kind: str = "pair") -> list[dict[str, Any]]:
    out = []
    for i, row in enumerate(rows(count)):
        if kind == "pair":
            signal: dict[str, Any] = {"chosen": str(i % 10), "rejected": f"it is {(i + 1) % 10}"}
        else:
            signal = {"response": str((i + i % 2) % 10), "label": 1 - i % 2}
        out.append({**row, "signal": {"type": kind, **signal}})
    return out


def write(path: Path, data: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    return str(path)


def args(folder: Path, stage: str = "UPO", data: list[dict[str, Any]] | None = None, **changes: Any) -> Any:
    pairs = {"loss_type": "upo_online", "allow_base": True, "pair_min_gap": 0.1} if stage == "UPO" else {}
    asked = write(folder / "rows.jsonl", rows(8) if data is None else data)
    return sampled_run(asked, folder / f"run_{stage}", **{"stage": stage, "max_steps": 3, **pairs, **changes})


def model() -> ErnieModel:
    paddle.seed(5)
    return AutoModel.from_config("tiny-a")


def upo(folder: Path, given: Any = None, **changes: Any) -> UPOTrainer:
    return UPOTrainer(given or model(), args(folder, **changes), processor=ending(), reward_funcs=even)


def weights(made: Any) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in made.model.named_parameters() if not value.stop_gradient}


def logged(made: Any) -> list[dict[str, float]]:
    state = json.loads((Path(made.args.save.output_dir) / "trainer_state.json").read_text(encoding="utf-8"))
    return [row for row in state["log_history"] if "loss" in row]


def assert_equal(one: Any, other: Any) -> None:
    for name, value in weights(one).items():
        np.testing.assert_array_equal(value, weights(other)[name], err_msg=name)


def test_without_pairs_it_is_rlvr_to_the_last_bit(tmp_path: Path) -> None:
    alone = RLVRTrainer(model(), args(tmp_path, "RLVR", loss_type="dapo"), processor=ending(), reward_funcs=even)
    alone.train()
    ours = upo(tmp_path, term_weights="pair=0", pg_loss="dapo")
    ours.train()
    assert isinstance(ours.method, SampledUPO)
    assert ours.method.reference is None
    assert_equal(ours, alone)
    assert (tmp_path / "run_UPO" / PAGE_FILE).is_file()
    (group,) = ours.score(ours.rollout(ours.prompts[:1], n=2, seed=3))
    (by_hand,) = alone.score(alone.rollout(alone.prompts[:1], n=2, seed=3))
    np.testing.assert_array_equal(group.reward_G, by_hand.reward_G)
    more = upo(tmp_path, pg_loss="dapo", output_dir=str(tmp_path / "more"))
    more.train()
    assert any(not np.array_equal(v, weights(alone)[n]) for n, v in weights(more).items())


def test_there_is_nothing_to_do_by_hand_where_nothing_is_sampled(tmp_path: Path) -> None:
    made = UPOTrainer(model(), args(tmp_path, data=judged(4), loss_type="upo_hetero"), processor=ending())
    with pytest.raises(ValueError, match=r"loss_type \(upo_hetero\) must be one that samples answers"):
        made.rollout([])
    with pytest.raises(ValueError, match="reward_model must go with a loss_type that samples answers"):
        UPOTrainer(model(), args(tmp_path, data=judged(4), loss_type="upo_hetero"), reward_model="judge")


@pytest.mark.parametrize("preset", ["upo_group", "upo_offline"])
def test_stopping_and_going_on_is_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """In the middle of a round, with pairs whose reference is known already, and between judged
    rows.
    """
    data = rows(6) + (judged(5) if preset == "upo_offline" else [])
    changes = {"loss_type": preset, "num_mini_batches": 2, "data": data, "pair_weight": "auto", "max_steps": 4}
    if preset == "upo_offline":
        changes.pop("pair_weight")
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir(), part.mkdir()
    straight = upo(whole, **changes)
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
            upo(part, **stop).train()
    again = upo(part, **stop)
    again.train()
    assert again.loop.step == 4
    assert_equal(straight, again)
    assert sum(row["upo/pair/count"] for row in logged(straight)) > 0


def test_the_reference_reads_answers_in_pairs_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[UnitBatch] = []
    compute = Reference.compute

    def watched(self: Reference, batch: UnitBatch) -> np.ndarray:
        read.append(batch)
        return compute(self, batch)

    monkeypatch.setattr(Reference, "compute", watched)
    adapted = get_peft_model(model(), LoraConfig(r=4, target_modules=["attention"]))
    made = upo(
        tmp_path, adapted, fine_tuning="LoRA", num_generations=4, per_device_train_batch_size=8, learning_rate=1e-2
    )
    made.train()
    assert read
    assert {unit.num_candidates for batch in read for unit in batch.units} == {2}
    first = logged(made)[0]
    assert first["upo/pairs_per_group"] <= 1
    assert first["upo/pair_gap"] >= 0.1
    assert first["rewards/margins"] == pytest.approx(
        0, abs=1e-5
    )  # the adapter's absence is the policy of the first step
    assert first["upo/pair/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["upo/pg/grad_share"] + first["upo/pair/grad_share"] == pytest.approx(1)
    assert logged(made)[-1]["rewards/margins"] != pytest.approx(0, abs=1e-5)


def test_rows_ride_in_the_window_of_sampled_answers(tmp_path: Path) -> None:
    """As many as prompts, with a count of their own; pairs and labels, KTO's baseline with them."""
    data = rows(4) + judged(4) + judged(4, "label")
    made = upo(tmp_path, loss_type="dpo_aux", data=data, term_weights="bin=0.5,kl=0.1")
    made.train()
    first = logged(made)[0]
    assert {"upo/pg/loss", "upo/pair/loss", "upo/bin/loss", "upo/kl/loss", "kl"} <= first.keys()
    assert first["upo/bin/weight"] == 0.5
    assert first["upo/pair/count"] + first["upo/bin/count"] == 2, "two prompts, two rows"
    parts = [first[f"upo/{name}/grad_share"] for name in ("pg", "pair", "bin", "kl")]
    assert sum(parts) == pytest.approx(1)
    assert min(parts[:3]) > 0


@pytest.mark.parametrize("preset", ["upo_online", "upo_offline"])
def test_with_a_critic_it_is_ppo_with_pairs(tmp_path: Path, preset: str) -> None:
    """Without pairs a run against a critic is PPO's to the last bit; with them it is another."""
    data = rows(6) + (judged(5) if preset == "upo_offline" else [])
    shared = {"max_steps": 2, "kl_coef": 0.0, "critic_warmup": 1}
    alone = PPOTrainer(model(), args(tmp_path, "PPO", data=rows(6), **shared), processor=ending(), reward_funcs=even)
    alone.train()
    same = {**shared, "advantage_estimator": "gae", "loss_type": preset, "data": data}
    ours = upo(tmp_path, term_weights="pair=0", **{**same, "data": rows(6)})
    ours.train()
    assert_equal(ours, alone)
    both = upo(tmp_path, output_dir=str(tmp_path / "both"), **same)
    both.train()
    assert {"critic/vf_explained_var", "upo/pair/loss"} & set(logged(both)[-1]) == {
        "critic/vf_explained_var",
        "upo/pair/loss",
    }
    assert any(not np.array_equal(v, weights(alone)[n]) for n, v in weights(both).items())


YAML = """
stage: UPO
loss_type: upo_group
reward_funcs: exact, format
reward_weights: "1.0,0.1"
term_weights: pg=1,pair=1
pair_mode: best_worst
kappa: 1
router_replay: R3
num_mini_batches: 2
"""


def test_a_file_of_settings_runs_as_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = f"""
model_name_or_path: tiny-a
fine_tuning: Full
allow_base: true
train_dataset_path: {write(tmp_path / "rows.jsonl", rows(8))}
max_completion_length: 3
max_seq_len: 128
max_prompt_len: 64
max_steps: 2
save_strategy: "no"
disable_tqdm: true
output_dir: {tmp_path / "run"}
"""
    loaded = load_text(YAML + small, "upo.yaml", for_training=True)
    assert loaded.notes == ()
    assert loaded.config.train.per_device_train_batch_size == 8
    made = UPOTrainer(args=loaded.config)
    gates = {name: value.numpy() for name, value in made.model.named_parameters() if ".mlp.gate." in name}
    made.train()
    assert made.loop.step == 2
    assert gates
    for name, value in made.model.named_parameters():
        if name in gates:  # the preset leaves routers as they are
            assert value.numpy().tobytes() == gates[name].tobytes()
    told = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(row["rewards"]) >= {"exact", "format"} for row in told)


@pytest.mark.parametrize(("changes", "match"), [
    ({"pair_weight": "much"}, r"pair_weight \(much\) must be a number, or auto"),
    ({"term_weights": "rank=1"}, r"term_weights \('rank=1'\) must look like term=weight, term one of pg, pair, kl"),
    ({"term_weights": "pg=0,pair=0"}, r"term_weights \(all 0\) must give at least one term a weight"),
    ({"loss_type": "upo_offline"}, r"train_dataset \(0 judged rows\) must hold rows of pair with loss_type upo_offline"),
    ({"loss_type": "upo_offline", "data": judged(4)}, r"train_dataset \(4 rows\) must hold prompts to answer"),
    ({"allow_base": False, "model_name_or_path": "tiny-a"}, r"must have been through SFT before UPO"),
    ({"ref_mode": "precomputed"}, r"ref_mode \(precomputed\) must give a reference for answers that nobody knows before"),
    ({"packing": True}, r"packing \(true\) must be false at stage UPO, where answers are sampled"),
    ({"gamma": 0.9}, r"gamma \(0.9\) must go with advantage_estimator gae, not auto"),
    ({"cispo_cap": 3.0}, r"cispo_cap \(3.0\) must go with pg_loss cispo, not auto"),
])  # fmt: skip
def test_settings_that_cannot_be(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        upo(tmp_path, **changes).train()


def test_rewards_need_a_preset_that_samples(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reward_funcs must go with a loss_type that samples answers \(upo_online"):
        upo(tmp_path, loss_type="upo_hetero", data=judged(4))
    hetero = load_text("stage: UPO\nnum_generations: 4\n", "upo.yaml")
    assert remarks(hetero.config, ["num_generations"]) == [
        ("num_generations", "num_generations has no effect with loss_type auto")
    ]
    assert "num_generations" not in [p.setting for p in problems(hetero.config)]

"""trainers/preference.py: what a run on judged answers starts from, computes, keeps and refuses, in
every reference mode and layout of one device.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from support.judged_rows import base, judged_settings, label, mixture, pair, pairs, ranking, rating, units
from support.tiny_runs import history, processor, same_bytes, text_row, train, write_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.cli.main import main
from ernie_tune.config.arguments import build
from ernie_tune.data.units import UnitBatch, collate_units
from ernie_tune.objectives.listwise import Units
from ernie_tune.objectives.pairwise import pair_terms
from ernie_tune.objectives.preference import Candidates, Pairs
from ernie_tune.objectives.upo import Signals, upo_terms
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel, get_peft_model
from ernie_tune.train.loop import Loop
from ernie_tune.train.reference import frozen_logp
from ernie_tune.trainers.base import Trainer
from ernie_tune.trainers.preference import KTO, WATCH_FILE, DPOTrainer, KTOTrainer, ancestry, pair_objective
from ernie_tune.trainers.run import Run
from ernie_tune.trainers.upo import UPO, UPOTrainer, upo_settings

LN2 = math.log(2)


def run(folder: Path, trainer: type[Trainer] = DPOTrainer, **changes: Any) -> Path:
    """Train to the end and return the output folder."""
    made = trainer(args=judged_settings(folder, **changes))
    made.train()
    return made.output_dir


def losses(out: Path) -> list[float]:
    return [r["loss"] for r in history(out) if "loss" in r]


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model after a little SFT."""
    return train(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def sft_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter after a little SFT, on the weights of tiny-a."""
    return train(tmp_path_factory.mktemp("sft_adapter"), fine_tuning="LoRA", learning_rate=5e-3)


# --- step 0 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "said", "changes"),
    [
        ("auto", "model", {}),
        ("model", "model", {}),
        ("precomputed", "precomputed", {}),
        ("auto", "adapter_off", {"fine_tuning": "LoRA"}),
        ("adapter_off", "adapter_off", {"fine_tuning": "LoRA", "weight_quantize_algo": "weight_only_int8"}),
        ("adapter_ref", "adapter_ref", {"fine_tuning": "LoRA"}),
        ("precomputed", "precomputed", {"fine_tuning": "LoRA"}),
        ("auto", "adapter_off", {"fine_tuning": "Adapter"}),
        ("auto", "adapter_ref", {"fine_tuning": "LoRA", "lora_path": True}),
        ("auto", "adapter_ref", {"fine_tuning": "LoRA", "ref_model_update_steps": 2}),
    ],
)
def test_the_loss_is_ln_2_at_the_start(
    tmp_path: Path, sft_adapter: Path, capsys: pytest.CaptureFixture[str], mode: str, said: str, changes: dict[str, Any]
) -> None:
    if "lora_path" in changes:
        changes = {**changes, "lora_path": str(sft_adapter)}
    out = run(tmp_path, ref_mode=mode, max_steps=3, warmup_steps=0, **changes)
    found = losses(out)
    assert abs(found[0] - LN2) < 1e-6
    assert all(abs(x - LN2) > 1e-4 for x in found[1:])
    printed = capsys.readouterr().out
    assert f"reference: {said}" in printed
    assert "is not the policy" not in printed
    first = history(out)[0]
    assert abs(first["rewards/margins"]) < 1e-5
    assert {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected"} <= set(first)


def test_without_its_adapter_an_sft_policy_is_another(
    tmp_path: Path, sft_adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(tmp_path, fine_tuning="LoRA", lora_path=str(sft_adapter), ref_mode="adapter_off", max_steps=1)
    assert abs(losses(out)[0] - LN2) > 1e-3
    printed = capsys.readouterr().out
    assert "the reference (adapter_off) is not the policy at the start" in printed
    assert "ref_mode: adapter_ref" in printed


def test_an_adapter_given_as_an_object_is_looked_at(tmp_path: Path) -> None:
    def started(trained: bool) -> str:
        model = get_peft_model(AutoModel.from_config("tiny-a"), LoraConfig(r=4))
        if trained:
            for name, value in model.named_parameters():
                if name.endswith("lora_B"):
                    value.set_value(paddle.full_like(value, 0.01))
        trainer = DPOTrainer(model, judged_settings(tmp_path, fine_tuning="LoRA"), processor=processor())
        trainer.prepare(dry_run=True)
        assert trainer.method.reference is not None
        return trainer.method.reference.mode

    assert started(trained=False) == "adapter_off"
    assert started(trained=True) == "adapter_ref"


def test_a_policy_without_sft_is_named(tmp_path: Path, sft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path / "a", max_steps=1) if (tmp_path / "a").mkdir() is None else None
    assert "tiny-a, fresh weights: preferences are learned best after SFT" in capsys.readouterr().out
    (tmp_path / "b").mkdir()
    run(tmp_path / "b", max_steps=1, model_name_or_path=str(sft))
    printed = capsys.readouterr().out
    assert "made by SFT" in printed
    assert "best after SFT" not in printed


# --- the gradient ---------------------------------------------------------------------------------


def test_a_pixel_changes_the_log_probability_of_every_candidate(tmp_path: Path, golden_model: Any) -> None:
    model = golden_model("tiny-a", "float64")
    for share in (True, False):
        batch = collate_units(units(tmp_path, [ranking(1)], share=share), processor())
        before = np.bincount(batch.candidate_N, weights=frozen_logp(model, batch))
        pixels = batch.inputs.pixel_values_PC
        assert pixels is not None
        patches = len(pixels) if share else len(pixels) // 4
        place = np.argsort(
            np.argsort(batch.end_C)
        )  # rows of one length lie side by side, so candidates may change their order
        for candidate in range(4):
            changed = pixels.copy()
            changed[0 if share else place[candidate] * patches, 0] += 0.5
            moved = dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, pixel_values_PC=changed))
            after = np.bincount(batch.candidate_N, weights=frozen_logp(model, moved))
            differs = np.abs(after - before) > 1e-12
            assert differs[candidate]
            assert differs.all() if share else differs.sum() == 1


def gradient(folder: Path, window: list[UnitBatch], trainer: type[Trainer], **changes: Any) -> dict[str, np.ndarray]:
    """The gradient of one window under the method's objective, on a policy that has left its
    reference.
    """
    made = trainer(args=judged_settings(folder, **changes))
    made.prepare(dry_run=True)
    paddle.seed(3)
    for value in made.model.parameters():
        value.set_value(value + 0.01 * paddle.randn(value.shape))
    loop: Loop = made.build_loop()
    made.model.eval()
    loss, _ = loop.accumulate(made.method.window(window))
    grads = {n: p.grad.numpy() for n, p in made.model.named_parameters() if p.grad is not None}
    return {**grads, "loss": np.array(loss)}


def alike(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float = 2e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(
            a[name], b[name], atol=tolerance * max(1.0, float(np.abs(a[name]).max())), err_msg=name
        )


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        (DPOTrainer, {"loss_type": "sigmoid,sft", "loss_weights": (1.0, 0.5)}),
        (DPOTrainer, {"loss_type": "ipo"}),
        (UPOTrainer, {"stage": "UPO", "allow_base": True}),
        (KTOTrainer, {"stage": "KTO"}),
    ],
)
def test_a_window_is_one_however_it_is_cut_and_packed(
    tmp_path: Path, trainer: type[Trainer], changes: dict[str, Any]
) -> None:
    rows = (
        [label(i) for i in range(6)]
        if trainer is KTOTrainer
        else mixture(6)
        if trainer is UPOTrainer
        else [*pairs(4), ranking(4), rating(5)]
    )
    write_rows(tmp_path / "judged_train.jsonl", rows)
    made = units(tmp_path, rows)
    whole = [collate_units(made, processor())]
    cut = [
        collate_units(made[:1], processor()),
        collate_units(made[1:4], processor()),
        collate_units(made[4:], processor()),
    ]
    apart = [collate_units(units(tmp_path, rows, share=False), processor())]
    reference = gradient(tmp_path, whole, trainer, **changes)
    alike(reference, gradient(tmp_path, cut, trainer, **changes))
    alike(reference, gradient(tmp_path, apart, trainer, prefix_sharing=False, **changes))
    with pytest.raises(AssertionError):
        alike(reference, gradient(tmp_path, cut[:2], trainer, **changes))


def test_swapping_the_sides_turns_the_margin(tmp_path: Path) -> None:
    """Metamorphic: chosen and rejected exchanged negate every margin; a unit twice leaves the mean
    loss.
    """
    rows = pairs(3)
    swapped = [
        {**r, "signal": {**r["signal"], "chosen": r["signal"]["rejected"], "rejected": r["signal"]["chosen"]}}
        for r in rows
    ]
    write_rows(tmp_path / "judged_train.jsonl", rows)
    trainer = DPOTrainer(args=judged_settings(tmp_path))
    trainer.prepare(dry_run=True)
    for value in trainer.model.parameters():
        value.set_value(value + 0.02 * paddle.ones_like(value))

    def looked(given: list[dict[str, Any]]) -> tuple[float, dict[str, tuple[float, float]]]:
        loop = trainer.build_loop()
        return loop.accumulate(trainer.method.window([collate_units(units(tmp_path, given), processor())]))

    loss, metrics = looked(rows)
    _, turned = looked(swapped)
    assert abs(metrics["rewards/margins"][0]) > 1e-4
    assert math.isclose(metrics["rewards/margins"][0], -turned["rewards/margins"][0], rel_tol=1e-3)
    assert math.isclose(loss, looked([*rows, *rows])[0], rel_tol=1e-5)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": loss}
        for loss in (
            "cdpo",
            "robust",
            "hinge",
            "ipo_sum",
            "sigmoid_norm",
            "simpo",
            "orpo",
            "cpo",
            "dpop",
            "rpo",
            "mpo",
            "nca_pair",
        )
    ]
    + [{"loss_type": loss} for loss in ("sppo_hard", "apo_zero", "apo_down", "bco_pair")]
    + [
        {"loss_type": "exo_pair", "label_smoothing": 0.01},
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"use_weighting": True},
    ]
    + [{"f_divergence_type": "alpha_divergence"}, {"use_weighting": True}]
    + [{"loss_type": "sigmoid,bco_pair", "loss_weights": (0.8, 0.2), "sft_loss_ratio": 0.1}, {"packing": True}],
    ids=str,
)
def test_every_loss_runs_and_moves_the_margin(tmp_path: Path, changes: dict[str, Any]) -> None:
    out = run(
        tmp_path,
        max_steps=6,
        warmup_steps=0,
        learning_rate=3e-3,
        per_device_train_batch_size=1 if "packing" in changes else 8,
        **changes,
    )
    log = [r for r in history(out) if "loss" in r]
    assert all(math.isfinite(r["loss"]) for r in log)
    if changes.get("loss_type") not in ("sft",):
        assert log[-1]["rewards/margins"] > log[0]["rewards/margins"]


@pytest.mark.parametrize("method", ["Full", "LoRA"])
def test_a_run_from_the_weights_of_another_goes_on_with_its_reference(
    tmp_path: Path, method: str, sft: Path, sft_adapter: Path
) -> None:
    first = sft if method == "Full" else sft_adapter
    (named,) = first.glob("checkpoint-*")
    more = {
        "fine_tuning": method,
        "resume_from_checkpoint": str(named),
        "resume_only_model": True,
        "lr_scheduler_type": "constant",
    }
    want = losses(run(tmp_path, output_dir=str(tmp_path / "whole"), max_steps=4, **more))
    assert want[0] == pytest.approx(LN2, abs=1e-5)
    run(tmp_path, output_dir=str(tmp_path / "parts"), max_steps=2, **more)
    np.testing.assert_allclose(
        losses(run(tmp_path, output_dir=str(tmp_path / "parts"), max_steps=4, **more)), want, atol=1e-6
    )


def test_settings_reach_the_losses() -> None:
    """Each key by the formula that it is a number of."""
    words = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.25, "sft_loss_norm": "seq"}
    made = pair_objective(build({"stage": "DPO", "reward_shift_decay": 0.9, "sft_loss_ratio": 0.5, **words}))
    assert (made.hyper.nll_norm, made.shift.decay, made.terms) == ("seq", 0.9, {"sigmoid": 1.0, "sft": 0.5})
    logp, reference, at = np.array([-5.0, -7.0]), np.array([-6.0, -6.5]), np.array([0])
    candidates = Candidates(paddle.to_tensor(logp), np.array([2, 4]), paddle.to_tensor(reference))
    pairs = Pairs.of(at, at + 1)
    score = [(t**-0.75 - 1) / -0.75 for t in np.exp(logp - reference)]
    found = pair_terms(made.terms, candidates, pairs, made.hyper)
    assert float(found["sigmoid"].total) == pytest.approx(np.log1p(np.exp(-0.1 * (score[0] - score[1]))), abs=1e-9)
    assert float(found["sft"].total) == pytest.approx(5 / 2)

    def term(name: str, signals: Signals, **words: Any) -> float:
        settings = upo_settings(build({"stage": "UPO", **words}))
        return float(upo_terms(settings, candidates, signals)[name].total)

    r = 0.1 * (logp - reference)
    rated = Signals(ratings=Units.of([0, 1], [0, 0], [0.75, 0.25]))
    q = np.exp(np.array([0.75, 0.25]) / 0.2) / np.exp(np.array([0.75, 0.25]) / 0.2).sum()
    wanted = float(-(q * (r - np.log(np.exp(r).sum()))).sum())
    assert term("rate", rated, rate_loss="infonca", rate_alpha=0.2) == pytest.approx(wanted, abs=1e-9)
    wanted = float(np.log1p(np.exp(-(r[0] - r[1] - 3 * np.log(0.5)))))
    margin = term("rate", rated, rate_loss="margin", rate_margin="log", rate_alpha=3.0)
    assert margin == pytest.approx(wanted, abs=1e-9)
    delta = logp[0] - reference[0] - (logp[1] - reference[1])
    assert term("pair", Signals(pairs=pairs), edge_loss="hinge") == pytest.approx(1 - 0.1 * delta, abs=1e-9)
    assert term("pair", Signals(pairs=pairs), edge_loss="cdpo", label_smoothing=0.2) == pytest.approx(
        0.8 * np.log1p(np.exp(-0.1 * delta)) + 0.2 * np.log1p(np.exp(0.1 * delta)), abs=1e-9
    )
    three = Candidates(
        paddle.to_tensor([-1.0, -2.0, -4.0], "float64"), np.array([1, 1, 1]), paddle.zeros([3], "float64")
    )
    tiers = Signals(tiers=Units.of([0, 1, 2], [0, 0, 0], [0, 1, 2]))
    best = upo_settings(build({"stage": "UPO", "rank_top_k": 1}))
    # one stage of two; divided by K - 1
    wanted = float(np.log(np.exp([-0.1, -0.2, -0.4]).sum()) + 0.1) / 2
    assert float(upo_terms(best, three, tiers)["rank"].total) == pytest.approx(wanted, abs=1e-9)
    with pytest.raises(ValueError, match=r"edge_loss \('nothing'\) must be one of sigmoid, odpo"):
        upo_settings(build({"stage": "UPO", "edge_loss": "nothing"}))
    for method in (UPO, KTO):
        config = build({"stage": method.stages[0], "reward_shift_decay": 0.5})
        made: Any = method.objective(SimpleNamespace(config=config), 1, 1.0)  # type: ignore[arg-type]
        assert made.shift.decay == 0.5


def test_rankings_and_ratings_are_all_their_pairs(tmp_path: Path) -> None:
    write_rows(tmp_path / "judged_train.jsonl", [ranking(0), rating(1)])
    out = run(tmp_path, max_steps=1, offset_alpha=1.0)
    assert history(out)[0]["loss"] > LN2, "scores ask for margins"


def test_kto_learns_good_from_bad(tmp_path: Path) -> None:
    write_rows(tmp_path / "judged_train.jsonl", [label(i) for i in range(8)])
    log = [
        r
        for r in history(
            run(
                tmp_path,
                KTOTrainer,
                stage="KTO",
                max_steps=8,
                per_device_train_batch_size=8,
                warmup_steps=0,
                learning_rate=3e-3,
            )
        )
        if "loss" in r
    ]
    assert abs(log[0]["loss"] - 0.5) < 1e-6, "1 - sigma(0) of each"
    assert log[-1]["loss"] < log[0]["loss"]
    assert log[-1]["rewards/chosen"] > log[-1]["rewards/rejected"]


def test_kto_says_how_to_balance_its_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "judged_train.jsonl", [label(i) for i in (0, 2, 4, 1)])
    more = {"stage": "KTO", "max_steps": 2, "per_device_train_batch_size": 4}
    run(tmp_path, KTOTrainer, **more)
    assert "set desirable_weight between 0.333 and 0.444" in capsys.readouterr().out
    run(tmp_path, KTOTrainer, output_dir=str(tmp_path / "balanced"), desirable_weight=0.4, **more)
    assert "set desirable_weight" not in capsys.readouterr().out
    write_rows(tmp_path / "judged_train.jsonl", [label(i) for i in (0, 2, 4, 6)])
    run(tmp_path, KTOTrainer, output_dir=str(tmp_path / "good"), **more)
    assert "all answers so far are good: without bad ones nothing teaches the difference" in capsys.readouterr().out


def test_rows_from_which_no_term_learns_are_dropped(tmp_path: Path) -> None:
    write_rows(tmp_path / "judged_train.jsonl", mixture(8))
    weights = ("nll=0", "bin=0", "rate=0")
    made = UPOTrainer(args=judged_settings(tmp_path, stage="UPO", allow_base=True, term_weights=weights, max_steps=2))
    assert made.method.learned() == ("pair", "ranking")
    made.train()
    assert {"nothing learns from a rating", "nothing learns from a label"} == set(made.stream.dropped.count)


def test_ancestry(tmp_path: Path, sft: Path, sft_adapter: Path) -> None:
    def of(**changes: Any) -> bool | None:
        return ancestry(judged_settings(tmp_path, **changes))[0]

    assert of(model_name_or_path=str(sft)) is True
    assert of(lora_path=str(sft_adapter), fine_tuning="LoRA") is True
    assert of(model_name_or_path="tiny-a") is False
    assert of(model_name_or_path="baidu/ERNIE-4.5-VL-28B-A3B-Base-Paddle") is False
    assert of(model_name_or_path=str(tmp_path)) is None


@pytest.mark.parametrize("preset", ["upo_hetero", "mpo"])
def test_upo_learns_from_what_a_window_has(tmp_path: Path, preset: str) -> None:
    """Two rows a window, of four kinds: most windows lack terms."""
    write_rows(tmp_path / "judged_train.jsonl", mixture(8))
    out = run(
        tmp_path,
        UPOTrainer,
        stage="UPO",
        allow_base=True,
        loss_type=preset,
        max_steps=6,
        warmup_steps=0,
        learning_rate=2e-3,
    )
    log = [r for r in history(out) if "loss" in r]
    terms = {name for r in log for name in r if name.startswith("upo/") and name.endswith("/loss")}
    wanted = {"pair", "rank", "rate", "bin", "nll"} if preset == "upo_hetero" else {"pair", "bco_pair", "nll"}
    assert terms == {f"upo/{name}/loss" for name in wanted}
    assert any(terms - set(r) for r in log)
    assert all(math.isfinite(r["loss"]) for r in log)


def test_what_a_run_measures_and_leaves(tmp_path: Path, sft: Path) -> None:
    held = write_rows(tmp_path / "eval.jsonl", [{**row, "domain": "d"} for row in pairs(4)])
    guard = write_rows(tmp_path / "guard.jsonl", [text_row(i) for i in range(3)])
    out = run(
        tmp_path,
        model_name_or_path=str(sft),
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset_path=held,
        guard_dataset_path=guard,
        save_steps=2,
        per_device_eval_batch_size=2,
    )
    before = json.loads((out / "before.json").read_text(encoding="utf-8"))
    assert abs(before["metrics"]["eval_loss"] - LN2) < 1e-6
    assert len(before["answers"]) == 4
    assert before["references"][0] == "0"
    results = json.loads((out / "eval_results.json").read_text(encoding="utf-8"))
    wanted = {"loss", "rewards/accuracies", "preference_accuracy", "preference_accuracy/d", "exact_match"}
    assert {f"eval_{name}" for name in wanted} <= set(results)
    assert "<article" in (out / "before_after.html").read_text(encoding="utf-8")
    assert (out / "guard_baseline.json").is_file()
    assert "DPO, Full" in (out / "README.md").read_text(encoding="utf-8")
    again = DPOTrainer(args=judged_settings(tmp_path, model_name_or_path=str(out), eval_dataset_path=held))
    assert again.evaluate()["eval_preference_accuracy"] == results["eval_preference_accuracy"]


@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        (DPOTrainer, {}),
        (DPOTrainer, {"fine_tuning": "LoRA"}),
        (DPOTrainer, {"ref_mode": "precomputed", "loss_type": "bco_pair"}),
        (DPOTrainer, {"fine_tuning": "LoRA", "ref_model_update_steps": 1}),
        (DPOTrainer, {"ref_model_update_steps": 2, "ref_model_mixup_alpha": 1.0}),
        (UPOTrainer, {"stage": "UPO", "allow_base": True, "per_device_train_batch_size": 4}),
    ],
    ids=str,
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trainer: type[Trainer], changes: dict[str, Any]
) -> None:
    rows = mixture(9) if trainer is UPOTrainer else pairs(5)
    write_rows(tmp_path / "judged_train.jsonl", rows)
    more = {**changes, "save_steps": 3, "max_steps": 6, "warmup_steps": 0}
    whole = run(tmp_path, trainer, output_dir=str(tmp_path / "whole"), **more)
    cut = tmp_path / "cut"
    stopped = trainer(args=judged_settings(tmp_path, output_dir=str(cut), **more))
    go_on = Run._stop_now
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_stop_now", lambda run, record, *rest: go_on(run, record, *rest) or record.step == 3)
        stopped.train()
    for file in cut.glob("*.json"):
        file.unlink()
    run(tmp_path, trainer, output_dir=str(cut), **more)
    same_bytes(whole / "checkpoint-6" / "optimizer", cut / "checkpoint-6" / "optimizer")
    assert [r["loss"] for r in history(whole) if "loss" in r] == [r["loss"] for r in history(cut) if "loss" in r]
    seen, seen_again = (
        json.loads((out / "checkpoint-6" / WATCH_FILE).read_text(encoding="utf-8")) for out in (whole, cut)
    )
    assert seen == seen_again
    assert len(seen["displacement"]["seen"]) == 6


@pytest.mark.parametrize(("loss_type", "advice"), [("sigmoid", "loss_type [sigmoid, sft] or rpo"), ("rpo", "NLL term")])
def test_improbable_chosen_answers_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loss_type: str, advice: str
) -> None:
    trainer = DPOTrainer(args=judged_settings(tmp_path, loss_type=loss_type, max_steps=5))
    started = trainer.method.prepare

    def wary(*given: Any) -> None:
        started(*given)
        guard = trainer.method.watch.guards["displacement"]
        guard.steps, guard.drop = 4, -1.0  # whatever happens is a drop

    trainer.method.prepare = wary  # type: ignore[method-assign]
    trainer.train()
    printed = capsys.readouterr().out
    assert printed.count("chosen answers became less probable") == 1
    assert advice in printed


def test_a_precomputed_reference_knows_its_origin(tmp_path: Path) -> None:
    file = str(tmp_path / "ref" / "logps.npz")
    more = {"ref_mode": "precomputed", "ref_logps_path": file, "max_steps": 2}
    first = run(tmp_path, output_dir=str(tmp_path / "first"), **more)
    computed = Path(file).read_bytes()
    second = run(tmp_path, output_dir=str(tmp_path / "second"), **more)
    assert Path(file).read_bytes() == computed, "read, not written"
    assert losses(first) == losses(second)
    assert not [p.name for p in Path(file).parent.iterdir() if p.name.endswith(".tmp")]
    with pytest.raises(ValueError, match="reference was computed with another model"):
        run(tmp_path, output_dir=str(tmp_path / "third"), seed=7, **more)
    with pytest.raises(ValueError, match="another image preprocessing"):
        run(tmp_path, output_dir=str(tmp_path / "fourth"), image_max_pixels=4096, image_min_pixels=784, **more)


def test_a_dry_run_leaves_no_trace(tmp_path: Path) -> None:
    for mode in ("model", "precomputed"):
        trainer = DPOTrainer(args=judged_settings(tmp_path, ref_mode=mode))
        trainer.train(dry_run=True)
        assert not trainer.output_dir.exists()


def test_tr_dpo_moves_the_reference(tmp_path: Path) -> None:
    out = run(tmp_path, ref_model_update_steps=1, ref_model_mixup_alpha=1.0, max_steps=3, warmup_steps=0)
    assert all(abs(x - LN2) < 1e-5 for x in losses(out)), "the reference is the policy at every step"
    trainer = DPOTrainer(
        args=judged_settings(
            tmp_path,
            output_dir=str(tmp_path / "o2"),
            ref_model_update_steps=2,
            fine_tuning="LoRA",
            max_steps=2,
            warmup_steps=0,
        )
    )
    trainer.train()
    model = trainer.model
    assert isinstance(model, PeftModel)
    mine, other = (model.adapters[name].parameters() for name in ("default", "reference"))
    b = [(x, y) for x, y in zip(mine, other, strict=True) if float(x.abs().max()) < 0.1]
    assert b
    for x, y in b:
        if float(x.abs().max()) > 0 and np.abs(y.numpy()).max() < np.abs(x.numpy()).max() * 0.99:
            np.testing.assert_allclose(y.numpy(), 0.6 * x.numpy(), atol=1e-7)


def test_the_verbs(tmp_path: Path, sft: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "rows.jsonl", mixture(8))
    only = {
        kind: write_rows(tmp_path / f"{kind}.jsonl", rows)
        for kind, rows in (("DPO", pairs(4)), ("KTO", [label(i) for i in range(4)]))
    }
    for verb, rows in (("dpo", only["DPO"]), ("kto", only["KTO"]), ("upo", data)):
        out = tmp_path / verb
        file = tmp_path / f"{verb}.yaml"
        file.write_text(
            f"train_dataset_path: {rows}\nmodel_name_or_path: {sft}\nfine_tuning: Full\noutput_dir: {out}\nmax_steps: 1\n"
            "max_seq_len: 200\nmax_prompt_len: 150\nper_device_train_batch_size: 4\nplot_loss: false\n",
            encoding="utf-8",
        )
        assert main([verb, str(file)]) == 0
        assert (out / "model.safetensors").is_file()
        assert f"stage: {verb.upper()}" in (out / "ernie_tune_args.yaml").read_text(encoding="utf-8")
    capsys.readouterr()
    assert main(["train", str(tmp_path / "dpo.yaml"), "stage=PPOO"]) == 1
    assert "stage ('PPOO') must be one of SFT, DPO, " in capsys.readouterr().err


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "changes", "message"),
    [
        (DPOTrainer, {"loss_type": "sigmoidal"}, "loss_type .sigmoidal. must be one of"),
        (DPOTrainer, {"loss_type": "kto_pair"}, "loss_type .kto_pair. must be another"),
        (DPOTrainer, {"ref_mode": "none"}, "ref_mode .none. must not go with loss_type auto"),
        (DPOTrainer, {"reference_free": True}, "reference_free .true. must go with losses without a reference"),
        (DPOTrainer, {"loss_type": "sigmoid,simpo"}, "must not mix losses with and without a reference"),
        (
            DPOTrainer,
            {"ref_mode": "model", "fine_tuning": "LoRA"},
            "ref_mode .model. must go with a model that is trained itself",
        ),
        (
            DPOTrainer,
            {"fine_tuning": "Prompt", "prefix_sharing": True},
            "prefix_sharing .true. must be false with fine_tuning Prompt",
        ),
        (KTOTrainer, {"stage": "KTO", "loss_type": "dpo"}, "loss_type .dpo. must be one of kto, bco"),
        (KTOTrainer, {"stage": "KTO", "ref_mode": "precomputed"}, "ref_mode .precomputed. must not go with kto"),
        (
            KTOTrainer,
            {"stage": "KTO", "per_device_train_batch_size": 1},
            "per_device_train_batch_size .1. must be at least 2",
        ),
        (UPOTrainer, {"stage": "UPO"}, "must have been through SFT before UPO"),
        (
            UPOTrainer,
            {"stage": "UPO", "allow_base": True, "loss_type": "sigmoid"},
            "must be one of upo_hetero, mpo, upo_online, upo_offline, upo_group, dpo_aux at stage UPO",
        ),
        (
            UPOTrainer,
            {"stage": "UPO", "allow_base": True, "term_weights": ("pg=1",)},
            "term_weights .'pg=1'. must look like",
        ),
        (
            UPOTrainer,
            {"stage": "UPO", "allow_base": True, "term_weights": ("pair=x",)},
            "term_weights .'pair=x'. must look like",
        ),
        (DPOTrainer, {"stage": "KTO"}, "stage .KTO. must be one of"),
    ],
)
def test_what_cannot_be_trained(tmp_path: Path, trainer: type[Trainer], changes: dict[str, Any], message: str) -> None:
    kind = label if changes.get("stage") == "KTO" else pair
    write_rows(tmp_path / "judged_train.jsonl", [kind(i) for i in range(4)])
    with pytest.raises(ValueError, match=message):
        trainer(args=judged_settings(tmp_path, **changes)).train()


def test_margins_need_scores_in_the_order_of_the_answers(tmp_path: Path) -> None:
    row = {**base(0), "chosen": "0", "rejected": "1", "score": {"chosen": 2, "rejected": 5}}
    write_rows(tmp_path / "judged_train.jsonl", [row])
    with pytest.raises(ValueError, match=r"judged_train.jsonl:1: score of the better answer \(0.25\) must be above"):
        run(tmp_path, offset_alpha=1.0)


def test_a_window_from_which_nothing_can_be_learned(tmp_path: Path) -> None:
    # bad ones: nothing to imitate
    write_rows(tmp_path / "judged_train.jsonl", [label(1), label(3)])
    with pytest.raises(ValueError, match="rows of a window must have a judgement that a term with a weight"):
        run(tmp_path, UPOTrainer, stage="UPO", allow_base=True, loss_type="mpo")


def test_data_that_changed_after_the_reference_was_computed(tmp_path: Path) -> None:
    write_rows(tmp_path / "judged_train.jsonl", pairs(2))
    trainer = DPOTrainer(args=judged_settings(tmp_path, ref_mode="precomputed"))
    trainer.prepare(dry_run=False)
    with pytest.raises(ValueError, match="row must be in the precomputed reference"):
        trainer.method.window([collate_units(units(tmp_path, [pair(7)]), processor())])


def test_labels_are_counted_once_a_step_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the heaviest batch before the first step nor a measurement counts; a run that goes on
    counts on.
    """
    write_rows(tmp_path / "judged_train.jsonl", [label(i) for i in range(8)])
    held = write_rows(tmp_path / "held.jsonl", [label(i) for i in range(3)])
    more = {"per_device_train_batch_size": 2, "save_steps": 1, "eval_dataset_path": held, "eval_strategy": "steps"}

    def counts(name: str, step: int) -> dict[str, float]:
        file = tmp_path / name / f"checkpoint-{step}" / "objective_state.json"
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["labels"]
        return found

    run(tmp_path, KTOTrainer, stage="KTO", output_dir=str(tmp_path / "whole"), eval_steps=1, max_steps=3, **more)
    for step in (1, 2, 3):
        found = counts("whole", step)
        assert found["good"] + found["bad"] == 2 * step == 2 * found["steps"]
    cut = {"output_dir": str(tmp_path / "cut"), "eval_steps": 1, "max_steps": 3, **more}
    go_on = Run._stop_now
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_stop_now", lambda run, record, *rest: go_on(run, record, *rest) or record.step == 1)
        run(tmp_path, KTOTrainer, stage="KTO", **cut)
    assert not (tmp_path / "cut" / "checkpoint-2").exists()
    run(tmp_path, KTOTrainer, stage="KTO", **cut)
    assert counts("cut", 3) == counts("whole", 3)
    assert counts("whole", 3)["good"] not in (0, 6)

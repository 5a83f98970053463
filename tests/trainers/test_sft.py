"""trainers/sft.py and evaluate/measure.py: what a run leaves, when it measures, warns, saves and
stops, and how it begins.
"""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.tiny_runs import (
    checkpoints,
    history,
    mixed_rows,
    picture_row,
    processor,
    same_bytes,
    settings,
    text_row,
    train,
    write_rows,
)

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.cli.main import main
from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.loader import load_config
from ernie_tune.data.records import Record
from ernie_tune.evaluate.measure import Measure
from ernie_tune.models.presets import preset
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.train.loop import Loop
from ernie_tune.trainers.run import Run
from ernie_tune.trainers.sft import PaddleTrainer, SFTTrainer

LORA_FILES = {"lora_config.json", "peft_model-00001-of-00001.safetensors", "peft_model.safetensors.index.json"}
RUN_FILES = {
    *(
        "trainer_state.json",
        "trainer_log.jsonl",
        "metrics.csv",
        "training_loss.svg",
        "ernie_tune_args.yaml",
        "README.md",
    ),
    *("train_results.json", "all_results.json", "tokenizer_config.json", "preprocessor_config.json", "tokenizer.model"),
}
CHECKPOINT_FILES = {
    *("trainer_state.json", "scheduler.json", "ernie_tune_args.yaml", "saved_signal_0", "optimizer"),
    *("data_state.json", "guards_state.json", "loop_state.json", "objective_state.json"),
    *("checkpoint_files.json", "ledger.json", "tokenizer.model", "tokenizer_config.json", "preprocessor_config.json"),
    *("added_tokens.json", "special_tokens_map.json"),
}


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def held_out(folder: Path, count: int = 4) -> str:
    return write_rows(folder / "eval.jsonl", [picture_row(100 + i) for i in range(count)])


# --- what a run leaves ----------------------------------------------------------------------------


def test_the_files_of_a_run_and_its_repetition(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    every = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset_path": held_out(tmp_path), "save_steps": 2}
    out = train(tmp_path, **every, gradient_accumulation_steps=2, logging_steps=2)
    said = capsys.readouterr().out
    for line in (
        "***** Running training *****",
        "Num examples = 12",
        "Total train batch size (w. parallel, distributed",
    ):
        assert line in said
    assert "***** train metrics *****" in said
    assert "***** eval metrics *****" in said
    assert "attention" in said.split("Running training")[0], "the table of what is trained comes first"

    wanted = {*RUN_FILES, "before_after.html", "before.json", "eval_results.json", "config.json", "model.safetensors"}
    assert wanted <= names(out)
    assert not [n for n in names(out) if n.endswith(".tmp")]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [s["step"] for s in samples] == [0] * 4 + [2] * 4 + [4] * 4, "answers to held-out rows as they change"
    assert len({(s["row"], s["question"], *s["images"]) for s in samples}) == 4
    assert [s["answer"] for s in samples[:4]] == read(out / "before.json")["answers"]
    assert {*CHECKPOINT_FILES, "config.json", "model.safetensors"} == names(out / "checkpoint-4")

    log = history(out)
    assert [r["step"] for r in log if "loss" in r] == [2, 4]
    assert [r["step"] for r in log if "eval_loss" in r] == [2, 4]
    assert {"epoch", "loss", "learning_rate", "grad_norm"} <= set(log[0])
    raw = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"tokens_per_second", "interval_runtime", "max_memory_gib", "remaining_time"} <= set(raw[0])
    state = read(out / "trainer_state.json")
    assert state["log_history"] == raw, "the full history"
    assert (state["global_step"], state["max_steps"], state["consumed_samples"], state["train_batch_size"]) == (
        4,
        4,
        16,
        2,
    )
    assert state["num_input_tokens_seen"] > 16 * 18, "the shortest row has 18"
    assert state["best_model_checkpoint"] in names(out)
    with (out / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(r["loss"]) for r in rows if r["loss"]] == [r["loss"] for r in raw if "loss" in r]
    assert "<svg" in (out / "training_loss.svg").read_text(encoding="utf-8")
    page = (out / "before_after.html").read_text(encoding="utf-8")
    assert page.count("<article") == 4
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "SFT, Full of `tiny-a`" in card
    assert "train.jsonl | 12 |" in card

    arguments = yaml.safe_load((out / "ernie_tune_args.yaml").read_text(encoding="utf-8"))
    assert (arguments["learning_rate"], arguments["eval_steps"], arguments["output_dir"]) == (0.001, 2, str(out))
    again = tmp_path / "again"
    assert main(["train", str(out / "ernie_tune_args.yaml"), f"output_dir={again}"]) == 0
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    assert history(again) == log
    same_bytes(out / "checkpoint-4" / "optimizer", again / "checkpoint-4" / "optimizer")


def test_the_files_of_an_adapter_run(tmp_path: Path) -> None:
    out = train(tmp_path, fine_tuning="LoRA", save_steps=2)
    assert {*RUN_FILES, *LORA_FILES} <= names(out)
    assert not {"model.safetensors", "config.json", "before_after.html"} & names(out)
    assert {*CHECKPOINT_FILES, *LORA_FILES} == names(out / "checkpoint-2")
    assert read(out / "lora_config.json")["base_model_name_or_path"] == "tiny-a"
    assert "SFT, LoRA rank 8 of `tiny-a`" in (out / "README.md").read_text(encoding="utf-8")


def test_times_are_those_of_all_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = Loop._step
    taken = []

    def timed(self: Loop, *args: Any) -> Any:
        record = steps(self, *args)
        taken.append(record.seconds)
        return record

    monkeypatch.setattr(Loop, "_step", timed)
    out = train(tmp_path, save_steps=2, logging_steps=3)
    results = read(out / "train_results.json")
    assert len(taken) == 4
    assert results["train_runtime"] == pytest.approx(sum(taken))
    assert results["train_samples_per_second"] == pytest.approx(8 / sum(taken))
    assert results["train_steps_per_second"] == pytest.approx(4 / sum(taken))
    # of all processes that made them, too
    (out / "checkpoint-4" / "saved_signal_0").unlink()
    (out / "ledger.json").unlink()  # which says that the run is over
    train(tmp_path, save_steps=2, logging_steps=3)
    assert read(out / "train_results.json")["train_runtime"] == pytest.approx(sum(taken[:2]) + sum(taken[4:]))


def test_without_held_out_rows_nothing_is_measured(tmp_path: Path, capsys: Any) -> None:
    out = train(tmp_path, max_steps=1)
    assert not {"before_after.html", "before.json", "eval_results.json"} & names(out)
    assert "everything is in" in capsys.readouterr().out


def test_a_run_without_answers_measures_the_loss_alone(tmp_path: Path) -> None:
    out = train(tmp_path, max_steps=1, eval_dataset_path=held_out(tmp_path), report_max_samples=0)
    assert {"eval_loss", "eval_token_acc"} == {k for k in read(out / "eval_results.json") if k.startswith("eval")}
    assert "before_after.html" not in names(out)


# --- measuring ------------------------------------------------------------------------------------


def test_accuracy_is_that_of_the_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two answers of four right before training, all after: in numbers, on the page and in the
    card.
    """
    given = [["0", "1", "x", "x"], ["0", "1", "2", "3"]]
    monkeypatch.setattr("ernie_tune.evaluate.measure.answers", lambda *_, **__: given.pop(0))
    out = train(tmp_path, max_steps=1, eval_dataset_path=held_out(tmp_path))
    assert read(out / "before.json")["metrics"]["eval_exact_match"] == 0.5
    assert read(out / "eval_results.json")["eval_exact_match"] == 1.0
    page = (out / "before_after.html").read_text(encoding="utf-8")
    assert (page.count('<article class="fixed"'), page.count('<article class="right"')) == (2, 2)
    assert "| eval_exact_match | 0.5000 | 1.0000 |" in (out / "README.md").read_text(encoding="utf-8")


def test_evaluate_alone(tmp_path: Path) -> None:
    trainer = SFTTrainer(args=settings(tmp_path, val_size=4))
    found = trainer.evaluate()
    assert len(trainer.eval_rows) == 4
    assert trainer.train_rows == 8
    assert 5 < found["eval_loss"] < 8, "about ln 640, as fresh weights guess"
    with pytest.raises(
        ValueError, match=r"eval_dataset \(0 rows\) must have rows to evaluate; set eval_dataset_path or"
    ):
        SFTTrainer(args=settings(tmp_path)).evaluate()


def test_evaluation_by_pass(tmp_path: Path) -> None:
    out = train(
        tmp_path, max_steps=-1, num_train_epochs=2, per_device_train_batch_size=5, eval_strategy="epoch",
        save_strategy="epoch", eval_dataset_path=held_out(tmp_path, 1), eval_max_samples=0,
    )  # fmt: skip
    # 12 rows, 5 a step: a pass ends within step 3, two within step 5
    assert [r["step"] for r in history(out) if "eval_loss" in r] == [3, 5]
    assert checkpoints(out) == ["checkpoint-3", "checkpoint-5"]


def scripted(monkeypatch: pytest.MonkeyPatch, losses: list[float]) -> None:
    """Evaluations that give these losses."""

    def during(self: Measure, log: Any, step: int, epoch: float) -> dict[str, float]:
        values = {"eval_loss": losses.pop(0)}
        log.log(step, values, epoch)
        return values

    monkeypatch.setattr(Measure, "during", during)


def evaluated(folder: Path, **changes: Any) -> dict[str, Any]:
    """A quick run that evaluates at every step."""
    data = write_rows(folder / "short.jsonl", [text_row(10 * i) for i in range(4)])
    held = write_rows(folder / "held.jsonl", [text_row(0)])
    return {
        "train_dataset_path": data, "eval_dataset_path": held, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1,
        "max_steps": 6, "report_max_samples": 0, "per_device_train_batch_size": 1, "warmup_steps": 0, **changes,
    }  # fmt: skip


def test_the_best_checkpoint_is_kept_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    scripted(monkeypatch, [3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    out = train(tmp_path, **evaluated(tmp_path, save_total_limit=2, load_best_model_at_end=True))
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-6"]
    for state in (read(out / "trainer_state.json"), read(out / "checkpoint-6" / "trainer_state.json")):
        assert (state["best_metric"], state["best_global_step"], state["best_model_checkpoint"]) == (
            1.0,
            2,
            "checkpoint-2",
        )
    # a checkpoint knows that it is the best itself
    assert read(out / "checkpoint-2" / "trainer_state.json")["best_model_checkpoint"] == "checkpoint-2"
    assert read(out / "checkpoint-2" / "guards_state.json")["best_checkpoint"] == "checkpoint-2"
    weights = [
        (folder / "model.safetensors").read_bytes() for folder in (out, out / "checkpoint-2", out / "checkpoint-6")
    ]
    assert weights[0] == weights[1] != weights[2]
    assert f"finishing with {out}/checkpoint-2, the best by eval_loss" in capsys.readouterr().out


def test_a_resumed_run_still_knows_its_best(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = evaluated(tmp_path, save_total_limit=1, load_best_model_at_end=True)
    scripted(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    save = Run._save

    def then_stop(self: Run, step: int) -> None:
        save(self, step)
        if step == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_save", then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path, **changes)
    out = train(tmp_path, **changes)
    assert checkpoints(out) == ["checkpoint-1", "checkpoint-6"], "best and last, though the limit is one"
    assert (out / "model.safetensors").read_bytes() == (out / "checkpoint-1" / "model.safetensors").read_bytes()


def test_the_best_of_bare_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("Full", "LoRA"):
        scripted(monkeypatch, [1.0, 2.0])
        changes = {
            "load_best_model_at_end": True,
            "save_only_model": True,
            "max_steps": 2,
            "output_dir": tmp_path / method,
        }
        out = train(tmp_path, **evaluated(tmp_path, **changes), fine_tuning=method)
        weights = "model.safetensors" if method == "Full" else "peft_model-00001-of-00001.safetensors"
        assert (out / weights).read_bytes() == (out / "checkpoint-1" / weights).read_bytes()
        assert (out / weights).read_bytes() != (out / "checkpoint-2" / weights).read_bytes()


def test_early_stopping_ends_the_run_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    changes = evaluated(tmp_path, early_stopping_patience=2)
    scripted(monkeypatch, [1.0, 2.0, 3.0])
    out = train(tmp_path, **changes)
    assert [r["step"] for r in history(out) if "loss" in r] == [1, 2, 3]
    assert (
        "early stop at step 3: eval_loss has not improved in 2 evaluations (best 1 at step 1)"
        in capsys.readouterr().out
    )
    train(tmp_path, **changes)
    assert "already finished: step 3 of 6 (stopped early)" in capsys.readouterr().out
    assert [r["step"] for r in history(out) if "loss" in r] == [1, 2, 3]
    scripted(monkeypatch, [9.0, 9.0, 9.0])
    train(tmp_path, **{**changes, "early_stopping_patience": 9})
    assert [r["step"] for r in history(out) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_no_checkpoints_where_none_are_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, [1.0, 2.0])
    out = train(tmp_path, **evaluated(tmp_path, save_strategy="no", max_steps=2))
    assert checkpoints(out) == []
    assert "model.safetensors" in names(out)


# --- guards ---------------------------------------------------------------------------------------


def test_a_guard_set_stops_a_run_that_forgets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    long = {"prompt": "why " * 300, "response": "so"}
    guard = write_rows(tmp_path / "general.jsonl", [long, *({"prompt": str(i), "response": "so"} for i in range(5))])
    looks = [[0.9, 0.8, 1.0, 0.9, 0.8], [0.9, 0.8, 0.9, 0.9, 0.8], [0.1, 0.2, 0.1, 0.1, 0.2]]
    asked = []

    def scores(self: Measure, rows: Any) -> list[float]:
        asked.append(len(rows))
        return looks.pop(0)

    monkeypatch.setattr(Measure, "_row_accuracy", scores)
    scripted(monkeypatch, [5.0, 4.0, 3.0, 2.0])
    changes = evaluated(tmp_path, guard_dataset_path=guard, guard_stop=True, max_seq_len=200, max_steps=4)
    out = train(tmp_path, **changes)
    said = capsys.readouterr().out
    assert asked == [5, 5, 5]
    assert "guard sets: dropped 1 row(s): longer than max_seq_len (200 tokens)" in said
    assert f"guard set {guard}: 0.8800 before training, 0.8600 now (change -0.0200" in said
    assert "the model is forgetting: guard set" in said
    assert [r["step"] for r in history(out) if "loss" in r] == [1, 2], "it stopped"
    assert read(out / "guard_baseline.json") == {guard: [0.9, 0.8, 1.0, 0.9, 0.8]}
    looks += [[0.9, 0.8, 0.9, 0.9, 0.8]] * 4
    train(tmp_path, **changes)  # resumed: compared with the same baseline, not with a new one
    assert [r["step"] for r in history(out) if "loss" in r] == [1, 2, 3, 4]
    assert len(looks) == 2
    looks.clear()
    (out / "guard_baseline.json").unlink()
    with pytest.raises(ValueError, match=r"guard_dataset_path \(.*general.jsonl\) must have been given from the start"):
        train(tmp_path, **{**changes, "max_steps": 5})


def test_a_new_run_in_an_old_folder_scores_its_own_baseline(tmp_path: Path) -> None:
    guard = write_rows(tmp_path / "general.jsonl", [text_row(2)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "guard_baseline.json").write_text('{"old": [1.0]}', encoding="utf-8")
    out = train(tmp_path, **evaluated(tmp_path, guard_dataset_path=guard, max_steps=1))
    assert list(read(out / "guard_baseline.json")) == [guard]


def forced_losses(monkeypatch: pytest.MonkeyPatch, losses: dict[int, float]) -> None:
    """Steps (from 0) whose loss is made up, without gradients."""
    accumulate = Loop.accumulate

    def forced(self: Loop, window: Any) -> Any:
        return (losses[self.step], {}) if self.step in losses else accumulate(self, window)

    monkeypatch.setattr(Loop, "accumulate", forced)


def test_a_loss_that_is_no_number_ends_the_run_at_the_last_good_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    forced_losses(monkeypatch, {3: math.nan})
    trainer = SFTTrainer(args=settings(tmp_path, max_steps=6, save_steps=3))
    with pytest.raises(FloatingPointError, match="loss is nan at step 4; stopped before it spoils the weights"):
        trainer.train()
    out = trainer.output_dir
    assert checkpoints(out) == ["checkpoint-3"]
    trainer.model.save_pretrained(tmp_path / "now")
    assert (tmp_path / "now" / "model.safetensors").read_bytes() == (
        out / "checkpoint-3" / "model.safetensors"
    ).read_bytes()
    assert main(["train", str(out / "ernie_tune_args.yaml")]) == 1
    error = capsys.readouterr().err
    assert "the last good checkpoint is kept, run the same command with another setting to go on from it" in error
    monkeypatch.undo()
    assert main(["train", str(out / "ernie_tune_args.yaml"), "learning_rate=1e-4"]) == 0
    assert [r["step"] for r in history(out) if "loss" in r] == [1, 2, 3, 4, 5, 6]


def test_a_diverging_run_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    forced_losses(monkeypatch, {i: 5.0 if i < 12 else 100.0 for i in range(26)})
    train(tmp_path, **evaluated(tmp_path, eval_strategy="no", save_steps=100, max_steps=26))
    said = capsys.readouterr().out
    assert said.count("WARNING] - the run is diverging at step 22: loss 100 is above 4 times its median") == 1
    assert said.count("the run is diverging") == 1


# --- before the first step ------------------------------------------------------------------------


def test_a_dry_run_computes_the_heaviest_batch_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen: list[int] = []
    accumulate = Loop.accumulate

    def counted(self: Loop, window: Any) -> Any:
        seen.extend(b.inputs.num_tokens for b in window)
        return accumulate(self, window)

    monkeypatch.setattr(Loop, "accumulate", counted)
    file = tmp_path / "run.yaml"
    file.write_text(
        f"train_dataset_path: {write_rows(tmp_path / 'r.jsonl', mixed_rows(12))}\nmodel_name_or_path: tiny-a\n",
        encoding="utf-8",
    )
    out = tmp_path / "out"
    assert (
        main(
            ["train", str(file), "--dry-run", "fine_tuning=Full", "per_device_train_batch_size=2", f"output_dir={out}"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert seen == [82 + 77]
    assert "heaviest batch first: 2 rows, 159 tokens, " in said
    assert "***** Running training *****" in said
    assert "dry run: settings, data and memory are fine; nothing was trained or written" in said
    assert not out.exists()


def test_the_first_step_tells_where_batches_are_alike(tmp_path: Path, capsys: Any) -> None:
    alike = write_rows(tmp_path / "alike.jsonl", [text_row(1)] * 8)
    train(tmp_path, output_dir=tmp_path / "a", train_dataset_path=alike)
    assert "heaviest batch first" not in capsys.readouterr().out
    train(tmp_path, output_dir=tmp_path / "b")
    assert "heaviest batch first" in capsys.readouterr().out


def test_a_dry_run_beside_a_finished_run_leaves_it_alone(tmp_path: Path) -> None:
    out = train(tmp_path, save_steps=2)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert SFTTrainer(args=settings(tmp_path, max_steps=9)).train(dry_run=True) == {}
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_the_heaviest_batch_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path, output_dir=tmp_path / "a", lora_dropout=0.5, fine_tuning="LoRA")
    monkeypatch.setattr(Run, "_provoke_memory", lambda *_, **__: None)
    bare = train(tmp_path, output_dir=tmp_path / "b", lora_dropout=0.5, fine_tuning="LoRA")
    assert history(whole) == history(bare)
    name = "peft_model-00001-of-00001.safetensors"
    assert (whole / name).read_bytes() == (bare / name).read_bytes()


def test_dropped_rows_are_told(tmp_path: Path, capsys: Any) -> None:
    train(tmp_path, max_steps=-1, num_train_epochs=1, max_seq_len=70, warmup_steps=0)
    said = capsys.readouterr().out
    place = tmp_path / "train.jsonl"
    assert f"WARNING] - dropped 3 row(s): longer than max_seq_len (70 tokens), first at {place}:" in said
    assert "Total optimization steps = 5" in said, "nine of twelve rows fit, two a step"


def test_texts_are_learnt_whole_and_held_out_ones_measured(tmp_path: Path, capsys: Any) -> None:
    """The held-out texts are 81 tokens long, far more than fit: they are measured in pieces, and
    nothing is asked of them.
    """
    texts = [{"text": "the sea is deep and wide " * 8 + str(i)} for i in range(4)]
    data, held = (write_rows(tmp_path / name, rows) for name, rows in (("t.jsonl", texts), ("h.jsonl", texts[:2])))
    many = {"stage": "PT", "max_seq_len": 32, "per_device_train_batch_size": 4, "max_steps": 6}
    out = train(tmp_path, train_dataset_path=data, eval_dataset_path=held, **many)
    said = capsys.readouterr().out
    assert "4 texts longer than max_seq_len: learnt in" in said
    assert "dropped" not in said
    assert read(out / "eval_results.json")["eval_loss"] < read(out / "before.json")["metrics"]["eval_loss"] - 0.1
    assert read(out / "before.json")["answers"] == []
    assert "before_after.html" not in names(out)
    with pytest.raises(ValueError, match="set stage: PT"):
        train(tmp_path, train_dataset_path=data, output_dir=str(tmp_path / "sft"))


def test_lora_plus_reaches_the_optimizer(tmp_path: Path) -> None:
    rate = 1e-3
    data = write_rows(tmp_path / "one.jsonl", [text_row(3)])
    args = settings(
        tmp_path, fine_tuning="LoRA", lora_plus_scale=16, max_steps=1, warmup_steps=0, learning_rate=rate,
        weight_decay=0.1, train_dataset_path=data,
    )  # fmt: skip
    trainer = SFTTrainer(args=args)
    before = {name: p.numpy().copy() for name, p in trainer.model.named_parameters() if not p.stop_gradient}
    trainer.train()
    now = {name: p.numpy() for name, p in trainer.model.named_parameters() if not p.stop_gradient}
    moved = {name: float(np.abs(now[name] - before[name]).max()) for name in now}
    # Adam's first step is the rate wherever the gradient is not tiny. A has no gradient yet, since
    # B is zero: it only decays.
    assert max(v for n, v in moved.items() if n.endswith("lora_B")) == pytest.approx(16 * rate, rel=1e-3)
    for name, value in before.items():
        if name.endswith("lora_A"):
            np.testing.assert_allclose(now[name], value * (1 - rate * 0.1), rtol=1e-5, atol=1e-8)


def test_router_and_tower_learn_at_their_own_rates(tmp_path: Path) -> None:
    rate = 1e-3
    data = write_rows(tmp_path / "one.jsonl", [picture_row(3)])
    args = settings(
        tmp_path, max_steps=1, warmup_steps=0, learning_rate=rate, weight_decay=0.0, train_dataset_path=data,
        moe_gate_lr_ratio=0.01, vit_lr_ratio=0.9, moe_use_aux_free_update_coef=0.02,
    )  # fmt: skip
    trainer = SFTTrainer(args=args)
    before = {name: p.numpy().copy() for name, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {name: float(np.abs(p.numpy() - before[name]).max()) for name, p in trainer.model.named_parameters()}
    assert moved["layers.1.mlp.gate.weight"] == pytest.approx(0.01 * rate, rel=1e-2)
    assert moved["vision_model.blocks.0.attn.qkv.weight"] == pytest.approx(0.9 * rate, rel=1e-2)
    assert moved["layers.0.self_attn.q_proj.weight"] == pytest.approx(rate, rel=1e-2)
    assert moved["layers.1.mlp.moe_statics.e_score_correction_bias"] == pytest.approx(0.02)


def test_a_bias_of_routers_that_do_not_learn_is_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "one.jsonl", [text_row(3)])
    args = settings(
        tmp_path, train_dataset_path=data, moe_use_aux_free_update_coef=0.02, fine_tuning="Freeze", freeze_config=["freeze_router"]
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"moe_use_aux_free_update_coef \(0.02\) must be 0 .* trained routers; set 0"):
        SFTTrainer(args=args).train()


def test_rows_may_be_passed_in_every_form(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "train.jsonl", mixed_rows(4))
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    dicts = [{"messages": list(turns)}]
    for data in (path, Path(path), [Record("sft", turns)], dicts, iter(dicts)):  # type: ignore[arg-type]
        trainer = SFTTrainer(
            model=AutoModel.from_config("tiny-a"), train_dataset=data, args=settings(tmp_path, train_dataset_path=())
        )
        assert trainer.train_rows in (1, 4)
    assert PaddleTrainer is SFTTrainer


def test_a_given_adapter_is_trained_as_it_is_and_described_as_it_is(tmp_path: Path) -> None:
    model = get_peft_model(AutoModel.from_config("tiny-a"), LoraConfig(r=3, lora_alpha=9, target_modules=["o_proj"]))
    trainer = SFTTrainer(model=model, args=settings(tmp_path, model_name_or_path="", fine_tuning="Full", max_steps=1))
    trainer.train()
    assert trainer.model is model
    written = load_config(trainer.output_dir / "ernie_tune_args.yaml").config
    assert (written.model.model_name_or_path, written.model.fine_tuning, written.lora.lora_rank) == (
        "tiny-a",
        "LoRA",
        3,
    )
    assert "LoRA rank 3 of `tiny-a`" in (trainer.output_dir / "README.md").read_text(encoding="utf-8")


def test_what_cannot_be_trained_is_refused_at_once(tmp_path: Path) -> None:
    nameless = AutoModel.from_config(preset("tiny-a"))
    rows = write_rows(tmp_path / "r.jsonl", [text_row(1)])
    with pytest.raises(
        ValueError, match=r"processor \(None\) must be given for a model that was not loaded from a fol"
    ):
        SFTTrainer(model=nameless, train_dataset=rows)
    SFTTrainer(model=nameless, train_dataset=rows, processor=processor())
    with pytest.raises(ValueError, match=r"train_dataset \(None\) must be given, or train_dataset_path set in args"):
        SFTTrainer(model=nameless, processor=processor())
    with pytest.raises(ValueError, match=r"eval_dataset \(0 rows\) must have rows with eval_strategy \(steps\)"):
        SFTTrainer(args=settings(tmp_path, eval_strategy="steps", eval_steps=1))
    with pytest.raises(ValueError, match="stage"):
        SFTTrainer(args=settings(tmp_path, stage="DPO"))
    with pytest.raises(AssertionError, match=r"train\(\) builds the loop"):
        _ = SFTTrainer(args=settings(tmp_path)).loop
    with pytest.raises(ValueError, match=r"no row of the training data can be used: dropped 12 row\(s\)"):
        train(tmp_path, max_seq_len=5)
    with pytest.raises(ValueError, match=r"balance \(dwa\) must have rows that name their task, but none of the first"):
        train(tmp_path, balance="dwa")
    with pytest.raises(ValueError, match=r"warmup_steps \(9\) must not exceed max_steps \(4\)"):
        train(tmp_path, warmup_steps=9)
    assert isinstance(SFTTrainer(args=settings(tmp_path)).args, RunConfig)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "few.jsonl", [picture_row(0), picture_row(1), text_row(3)])
    out = train(tmp_path, train_dataset_path=data, max_steps=20, per_device_train_batch_size=3, learning_rate=1e-2)
    losses = [r["loss"] for r in history(out)]
    assert losses[0] > 5
    assert losses[-1] < 1

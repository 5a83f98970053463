"""A folder that already holds a run: what is compared, what goes on, what is refused, and that
nothing of a finished run is ever touched.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.tiny_runs import checkpoints, history, settings, steps_logged, text_row, train, write_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.ledger import Ledger
from ernie_tune.checkpoint.lock import locked
from ernie_tune.checkpoint.whole import damage
from ernie_tune.cli.main import main
from ernie_tune.config.loader import dump_config
from ernie_tune.trainers.run import Run
from ernie_tune.trainers.sft import SFTTrainer

ROOT = Path(__file__).parents[2]


def picture_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file of a folder."""
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def rows(folder: Path, name: str, first: int, count: int = 8) -> str:
    return write_rows(folder / name, [text_row(first + i) for i in range(count)])


def test_a_finished_run_started_again_is_one_line_and_touches_nothing(tmp_path: Path, capsys: Any) -> None:
    out = train(tmp_path, save_steps=2, eval_dataset_path=rows(tmp_path, "eval.jsonl", 30, 3))
    before = picture_of(out)
    metrics = {**json.loads((out / "all_results.json").read_text(encoding="utf-8"))}
    capsys.readouterr()
    trainer = SFTTrainer(args=settings(tmp_path, save_steps=2, eval_dataset_path=str(tmp_path / "eval.jsonl")))
    found = trainer.train()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    assert f"already finished: step 4 of 4 in {out}; nothing was trained or written" in said
    assert picture_of(out) == before
    assert found["train_loss"] == metrics["train_loss"]
    assert found["eval_loss"] == metrics["eval_loss"]
    train(tmp_path, save_steps=3, logging_steps=2, eval_dataset_path=str(tmp_path / "eval.jsonl"))
    said = capsys.readouterr().out
    assert "changed since the run began: save_steps: 2 -> 3" in said
    assert "changed since the run began: logging_steps: 1 -> 2" in said
    assert picture_of(out) == before


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "rate": ({"learning_rate": 1e-5}, "learning_rate: 0.001 -> 1e-05"),
    "seed": ({"seed": 7}, "seed: 42 -> 7"),
    "length": ({"max_seq_len": 4000}, "max_seq_len: 8192 -> 4000"),
    "decay": ({"weight_decay": 0.3, "loss_norm": "seq"}, "loss_norm: token -> seq\n  weight_decay: 0.1 -> 0.3"),
    "moment": ({"adam_beta2": 0.5}, "adam_beta2: 0.95 -> 0.5"),
    "batch": ({"per_device_train_batch_size": 4}, "rows a step: 2 -> 4"),
    "method": ({"fine_tuning": "LoRA"}, "fine_tuning: Full -> LoRA"),
    "shorter": ({"max_steps": 2}, "max_steps: 4 -> 2"),
    "model": ({"model_name_or_path": "ernie-4.5-vl-tiny"}, "model_name_or_path: tiny-a -> "),
}


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_another_run_in_a_finished_folder_is_refused_with_every_difference(tmp_path: Path, strategy: str) -> None:
    out = train(tmp_path, save_strategy=strategy)
    before = picture_of(out)
    other = tmp_path / "model"
    AutoModel.from_config("tiny-a", seed=9).save_pretrained(other)
    for name in ("tokenizer.model", "tokenizer_config.json", "added_tokens.json", "preprocessor_config.json"):
        shutil.copy(out / name, other)
    for name, (changes, line) in OTHER_RUNS.items():
        named = {"model_name_or_path": str(other)} if name == "model" else changes
        with pytest.raises(ValueError, match=r"finished run made with other settings; nothing was trained") as caught:
            train(tmp_path, save_strategy=strategy, **named)
        assert line in str(caught.value), name
        assert "overwrite_output_dir: true" in str(caught.value)
        assert picture_of(out) == before, name


def test_other_data_of_the_same_length_are_refused_and_moved_data_are_not(tmp_path: Path, capsys: Any) -> None:
    """Also in the middle of a run, and when only the order or the number of rows taken changes."""
    one, two = rows(tmp_path, "one.jsonl", 0), rows(tmp_path, "two.jsonl", 53)
    common = {"max_steps": 2, "save_steps": 1}
    out = train(tmp_path, train_dataset_path=one, **common)
    before = picture_of(out)
    mixed = Path(one).read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "reversed.jsonl").write_text("".join(reversed(mixed)), encoding="utf-8")
    for steps in (2, 4):
        for path in (two, str(tmp_path / "reversed.jsonl"), f"{one}#5", f"{one},{two}"):
            with pytest.raises(
                ValueError, match=r"train_dataset_path: .*one\.jsonl \(8 rows, sha256 .* -> .*rows, sha256"
            ):
                train(tmp_path, train_dataset_path=path, **{**common, "max_steps": steps})
    assert picture_of(out) == before
    moved = shutil.copy(one, tmp_path / "moved.jsonl")
    capsys.readouterr()
    train(tmp_path, train_dataset_path=str(moved), **{**common, "max_steps": 3})
    assert steps_logged(out) == [1, 2, 3]
    assert "train_dataset_path: " in capsys.readouterr().out


def test_rows_given_as_objects_are_compared_too(tmp_path: Path) -> None:
    from ernie_tune.data.sources import load_dataset

    first, second = (list(load_dataset(rows(tmp_path, f"{i}.jsonl", 43 * i))[:]) for i in range(2))
    SFTTrainer(args=settings(tmp_path, max_steps=2), train_dataset=first).train()
    with pytest.raises(ValueError, match=r"train_dataset_path: rows given as objects \(8 rows, sha256"):
        SFTTrainer(args=settings(tmp_path, max_steps=4), train_dataset=second).train()


def test_a_longer_run_under_another_rate_goes_on_and_says_so(tmp_path: Path, capsys: Any) -> None:
    out = train(tmp_path, save_steps=2, lr_scheduler_type="constant", warmup_steps=0)
    drawn = "tiny-a: fresh weights drawn from seed"
    assert drawn in capsys.readouterr().err
    changes = {"max_steps": 6, "learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_steps": 0}
    train(tmp_path, save_steps=2, **changes)
    said, beside = capsys.readouterr()
    assert drawn not in beside, "a run that goes on has the checkpoint's weights"
    for line in ("learning_rate: 0.001 -> 0.0001", "max_steps: 4 -> 6"):
        assert f"[ WARNING] - changed since the run began: {line}" in said
    assert [r["learning_rate"] for r in history(out)] == [1e-3] * 4 + [1e-4] * 2
    ledger = Ledger.read(out / "ledger.json")
    assert ledger is not None
    assert ledger.finished == (6, 6)
    assert sorted(ledger.changed) == [(4, "learning_rate: 0.001 -> 0.0001"), (4, "max_steps: 4 -> 6")]
    assert "| 4 | learning_rate: 0.001 -> 0.0001 |" in (out / "README.md").read_text(encoding="utf-8")
    assert "learning_rate: 0.0001" in (out / "ernie_tune_args.yaml").read_text(encoding="utf-8")


def test_overwriting_starts_anew_and_keeps_what_was_there(tmp_path: Path, capsys: Any) -> None:
    out = train(tmp_path, save_steps=2)
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    before = picture_of(out)
    train(tmp_path, save_steps=2, seed=7, overwrite_output_dir=True)
    assert f"what earlier runs left in {out} is now in {out}/earlier-1" in capsys.readouterr().out
    kept = picture_of(out / "earlier-1")
    assert {n for n in before if n not in kept} == {"notes.txt"}
    assert all(kept[n][0] == before[n][0] for n in kept)
    assert steps_logged(out) == [1, 2, 3, 4]
    assert history(out) != history(out / "earlier-1")
    with pytest.raises(ValueError, match=r"overwrite_output_dir \(true\) must not move away what the run starts from"):
        train(tmp_path, model_name_or_path=str(out / "checkpoint-4"), overwrite_output_dir=True)


@pytest.mark.parametrize("name", ["README.md", "config.json", "model.safetensors"])
def test_what_no_run_has_written_is_not_written_over(name: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "out" / name).write_text("mine", encoding="utf-8")
    before = picture_of(tmp_path / "out")
    with pytest.raises(
        ValueError, match=rf"holds {name}, which no run has written there and this one would write over"
    ):
        train(tmp_path)
    assert picture_of(tmp_path / "out") == before


def test_a_metric_that_is_not_measured_is_told_before_the_first_step(tmp_path: Path) -> None:
    held_out = rows(tmp_path, "eval.jsonl", 30, 3)
    with pytest.raises(ValueError, match=r"metric_for_best_model \(eval_bleu\) must be one of eval_"):
        train(tmp_path, eval_dataset_path=held_out, eval_strategy="epoch", metric_for_best_model="bleu")
    assert not steps_logged(tmp_path / "out")


def test_a_run_killed_before_its_last_files_writes_them(tmp_path: Path) -> None:
    whole = train(tmp_path, save_steps=2)
    kept = {n: content for n, (content, _) in picture_of(whole).items()}
    for name in ("ledger.json", "README.md", "model.safetensors", "trainer_state.json"):
        (whole / name).unlink()
    train(tmp_path, save_steps=2)
    assert (whole / "model.safetensors").read_bytes() == kept["model.safetensors"]
    assert (whole / "README.md").is_file()
    assert steps_logged(whole) == [1, 2, 3, 4]


def test_settings_are_written_with_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("before the first step")

    monkeypatch.setattr(Run, "_provoke_memory", stop)
    with pytest.raises(RuntimeError, match="before the first step"):
        train(tmp_path)
    assert not (tmp_path / "out" / "ernie_tune_args.yaml").exists()
    assert not (tmp_path / "out" / "ledger.json").exists()
    assert not (tmp_path / "out" / ".lock").exists()


def test_a_folder_of_the_last_release_is_known_by_its_settings(tmp_path: Path, capsys: Any) -> None:
    out = train(tmp_path, save_steps=2)
    for name in ("ledger.json", "checkpoint_files.json"):
        for file in out.rglob(name):
            file.unlink()
    before = picture_of(out)
    capsys.readouterr()
    train(tmp_path, save_steps=2)
    assert "already finished: step 4 of 4" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"  seed: 42 -> 3\n"):
        train(tmp_path, seed=3, max_steps=8)
    assert picture_of(out) == before
    train(tmp_path, max_steps=5)
    assert steps_logged(out) == [1, 2, 3, 4, 5]


# --- damage ---------------------------------------------------------------------------------------

DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "empty": lambda file: file.write_bytes(b""),
    "flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 255]) + file.read_bytes()[1:]),
    "gone": lambda file: file.unlink(),
    "a number": lambda file: file.write_text(
        file.read_text().replace("0", "1").replace("{", "{ ", 1), encoding="utf-8"
    ),
}


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    whole = train(tmp_path, save_steps=1, max_steps=1) / "checkpoint-1"
    assert damage(whole) == []
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file() and p.name != "saved_signal_0")
    assert len(files) > 12
    for name in files:
        for kind, spoil in DAMAGE.items():
            if kind == "a number" and name.suffix != ".json":
                continue
            kept = (whole / name).read_bytes()
            spoil(whole / name)
            found = damage(whole)
            (whole / name).write_bytes(kept)
            assert found, (name, kind)
            assert name.name == "checkpoint_files.json" or (len(found) == 1 and found[0].startswith(f"{name} ")), found
    # of the last release: what can be seen without them
    for name in ("checkpoint_files.json", "ledger.json"):
        (whole / name).unlink()
    assert damage(whole) == []
    (whole / "loop_state.json").write_bytes(b"")
    (whole / "guards_state.json").unlink()
    assert [text.split(" ")[0] for text in damage(whole)] == ["guards_state.json", "loop_state.json"]


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path, capsys: Any) -> None:
    clean = train(tmp_path, output_dir=tmp_path / "clean", save_steps=1, max_steps=4)
    out = train(tmp_path, save_steps=1, max_steps=3)
    DAMAGE["a number"](out / "checkpoint-3" / "data_state.json")
    DAMAGE["empty"](out / "checkpoint-2" / "loop_state.json")
    capsys.readouterr()
    train(tmp_path, save_steps=1, max_steps=4)
    said = capsys.readouterr().out
    assert f"{out}/checkpoint-3 is damaged and left out: data_state.json" in said
    assert f"{out}/checkpoint-2 is damaged and left out: loop_state.json has 0 of" in said
    assert f"resuming from {out}/checkpoint-1: step 1 of 4" in said
    assert checkpoints(out) == [
        "checkpoint-1",
        *(f"checkpoint-{n}{x}" for n in (2, 3) for x in ("", ".old")),
        "checkpoint-4",
    ]
    assert steps_logged(out) == [1, 2, 3, 4]
    assert (out / "model.safetensors").read_bytes() == (clean / "model.safetensors").read_bytes()
    for folder in out.glob("checkpoint-?"):
        (folder / "loop_state.json").write_bytes(b"{")
    with pytest.raises(
        ValueError, match=r"(?s)checkpoint-2 is .*loop_state.json has 1 of .*no checkpoint in .* is whole"
    ):
        train(tmp_path, save_steps=1, max_steps=5)
    with pytest.raises(ValueError, match=r"checkpoint-1 must hold what was written, but loop_state.json has 1 of"):
        train(tmp_path, save_steps=1, max_steps=5, resume_from_checkpoint=str(out / "checkpoint-1"))


def test_damaged_measurements_do_not_stop_a_run(tmp_path: Path, capsys: Any) -> None:
    out = train(tmp_path, save_steps=1, max_steps=2, eval_dataset_path=rows(tmp_path, "eval.jsonl", 30, 3))
    (out / "before.json").write_bytes(b'{"metrics": {"eval_lo')
    (out / "all_results.json").write_bytes(b"")
    capsys.readouterr()
    train(tmp_path, max_steps=3, eval_dataset_path=str(tmp_path / "eval.jsonl"))
    said = capsys.readouterr().out
    assert f"{out}/before.json must be JSON (" in said
    assert "no comparison with the model before training" in said
    assert json.loads((out / "all_results.json").read_text(encoding="utf-8"))["global_step"] == 3


# --- one at a time --------------------------------------------------------------------------------


def test_a_second_run_is_told_who_writes(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    with locked(out):
        with pytest.raises(ValueError, match=rf"another run \(pid {os.getpid()}, host .*\) writes here"):
            train(tmp_path)
        SFTTrainer(args=settings(tmp_path)).train(dry_run=True)
        assert [p.name for p in out.iterdir()] == [".lock"], "the other one has left nothing"
    assert not (out / ".lock").exists()
    (out / ".lock").write_text('{"pid": 1, "host": "elsewhere"}')  # of one that was killed
    train(tmp_path)
    assert not (out / ".lock").exists()


def test_pairs_of_runs_started_at_once(tmp_path: Path) -> None:
    """ERNIE_TUNE_LOCK_PAIRS: how many; one runs to its end, the other says who has the folder."""
    for pair in range(int(os.environ.get("ERNIE_TUNE_LOCK_PAIRS", "1"))):
        out, file = tmp_path / f"out-{pair}", tmp_path / "run.yaml"
        file.write_text(dump_config(settings(tmp_path, output_dir=out, max_steps=30)), encoding="utf-8")
        command = [sys.executable, "-m", "ernie_tune", "train", str(file)]
        both = [
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        said = [child.communicate(timeout=240) for child in both]
        codes = sorted(child.returncode for child in both)
        lost = next((i for i, child in enumerate(both) if child.returncode), None)
        if lost is None:  # they came one after the other
            assert any("already finished" in out for out, _ in said)
        else:
            assert codes == [0, 1], said
            assert f"another run (pid {both[1 - lost].pid}, host " in said[lost][1], said[lost][1]
        assert steps_logged(out) == list(range(1, 31))
        assert not (out / "trainer_log.1.jsonl").exists()


def test_the_commands_message(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(settings(tmp_path, max_steps=2)), encoding="utf-8")
    assert main(["train", str(file)]) == 0
    assert main(["train", str(file), "seed=3"]) == 1
    assert "  seed: 42 -> 3\n" in capsys.readouterr().err
    assert np.isfinite([r["loss"] for r in history(tmp_path / "out")]).all()


# --- a checkpoint is a model ----------------------------------------------------------------------


@pytest.mark.parametrize("release", ["this", "the last"])
def test_a_checkpoint_opens_like_a_model(
    release: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Chat, eval, export and training, also of one that has no tokenizer of its own."""
    out = train(tmp_path, save_steps=1, max_steps=2, eval_dataset_path=rows(tmp_path, "eval.jsonl", 40, 2))
    checkpoint = out / "checkpoint-1"
    if release == "the last":
        for name in (
            "tokenizer.model",
            "tokenizer_config.json",
            "added_tokens.json",
            "special_tokens_map.json",
            "preprocessor_config.json",
        ):
            (checkpoint / name).unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", str(checkpoint)]) == 0
    assert (
        main(
            [
                "eval",
                str(out / "ernie_tune_args.yaml"),
                f"model_name_or_path={checkpoint}",
                f"output_dir={tmp_path / 'eval'}",
            ]
        )
        == 0
    )
    assert main(["export", str(checkpoint), "--output_dir", str(tmp_path / "exported"), "--verify", "files"]) == 0, (
        capsys.readouterr().err
    )
    more = train(
        tmp_path, model_name_or_path=str(checkpoint), output_dir=tmp_path / "more", max_steps=1, learning_rate=1e-20
    )
    assert (more / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert (tmp_path / "exported" / "tokenizer.model").read_bytes() == (out / "tokenizer.model").read_bytes()


def test_an_adapters_checkpoint_opens_like_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = train(tmp_path, save_steps=1, max_steps=2, fine_tuning="LoRA")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert main(["chat", str(out / "checkpoint-1")]) == 0
    more = train(
        tmp_path,
        fine_tuning="LoRA",
        lora_path=str(out / "checkpoint-1"),
        output_dir=tmp_path / "more",
        max_steps=1,
        learning_rate=1e-20,
    )
    adapter = "peft_model-00001-of-00001.safetensors"
    assert (more / adapter).read_bytes() == (out / "checkpoint-1" / adapter).read_bytes()

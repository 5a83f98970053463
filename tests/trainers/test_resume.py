"""A run that stops and goes on is the run that never stopped, bit for bit: crashes, kills, Ctrl-C,
full disks; and every way to say what to resume.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import (
    checkpoints,
    history,
    picture_row,
    same_bytes,
    settings,
    steps_logged,
    text_row,
    train,
    write_rows,
)

from ernie_tune.checkpoint import state, writer
from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.run_folder import RunFolder
from ernie_tune.checkpoint.sharded import ShardedReader
from ernie_tune.cli.main import main
from ernie_tune.config.loader import dump_config
from ernie_tune.trainers.run import Run
from ernie_tune.trainers.sft import SFTTrainer

ROOT = Path(__file__).parents[2]
# In a checkpoint: paths, and what a clock says.
INDIVIDUAL = ("ernie_tune_args.yaml", "trainer_state.json", "loop_state.json", "checkpoint_files.json")


class Crash(Exception):
    pass


def crash() -> None:
    raise Crash


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int, folder: Path, **changes: Any) -> None:
    """A run whose process dies after a step."""
    observe = Run.observe

    def then_crash(self: Run, record: Any, *rest: Any) -> None:
        observe(self, record, *rest)
        if record.step == step:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Run, "observe", then_crash)
        with pytest.raises(Crash):
            train(folder, **changes)


def two_files(folder: Path) -> dict[str, Any]:
    """Long texts with pictures between, and short texts, mixed one to two."""
    a = [picture_row(i) if i % 2 else text_row(i) for i in range(9)]
    paths = [write_rows(folder / "a.jsonl", a), write_rows(folder / "b.jsonl", [text_row(i) for i in range(7)])]
    return {"train_dataset_path": paths, "train_dataset_prob": [1, 2]}


def named_tasks(folder: Path) -> dict[str, Any]:
    rows = [text_row(i, domain="abc"[i % 3]) for i in range(12)]
    return {"train_dataset_path": write_rows(folder / "tasks.jsonl", rows)}


CASES: dict[str, Any] = {
    "full": lambda _: {"gradient_accumulation_steps": 2, "loss_norm": "seq"},
    "lora, dropout": lambda _: {"fine_tuning": "LoRA", "lora_dropout": 0.2, "lora_experts": "both", "logging_steps": 3},
    "packing, best fit, two files": lambda f: {
        **two_files(f),
        "packing": True,
        "greedy_intokens": True,
        "max_seq_len": 96,
        "per_device_train_batch_size": 1,
    },
    "packing in order, too long rows, recompute": lambda _: {
        "packing": True,
        "max_seq_len": 70,
        "per_device_train_batch_size": 1,
        "recompute": True,
    },
    "task weights, float64": lambda f: {**named_tasks(f), "balance": "dwa", "fine_tuning": "LoRA", "float64": True},
    "learned task weights, router losses": lambda f: {
        **named_tasks(f),
        "balance": "uncertainty",
        "fine_tuning": "Freeze",
        "freeze_config": ["freeze_vision"],
        "router_aux_loss_coef": 0.01,
        "moe_use_aux_free_update_coef": 0.01,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_ten_steps_are_five_and_five(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"max_steps": 10, "save_steps": 5, **CASES[case](tmp_path)}
    whole = train(tmp_path, output_dir=tmp_path / "whole", **changes)
    parts = tmp_path / "parts"
    # two steps after the checkpoint: they must be made, and logged, again
    crash_at(monkeypatch, 7, tmp_path, output_dir=parts, **changes)
    assert checkpoints(parts) == ["checkpoint-5"]
    train(tmp_path, output_dir=parts, **changes)
    for step in (5, 10):
        names = same_bytes(whole / f"checkpoint-{step}", parts / f"checkpoint-{step}", INDIVIDUAL)
        assert "optimizer/rank-00000.safetensors" in names
    assert history(whole) == history(parts)
    every = 3 if "lora, dropout" in case else 1
    assert steps_logged(parts) == [s for s in range(1, 11) if s % every == 0 or s == 10]
    weights = next(n for n in names if n.endswith(".safetensors") and "optimizer" not in n)
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    moments = [(f / "checkpoint-5" / weights).read_bytes() for f in (whole, parts)]
    assert moments[0] != (whole / weights).read_bytes(), "the run must have learned something between"


def test_a_second_trainer_in_the_same_notebook_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path, output_dir=tmp_path / "whole", save_steps=2)
    model, args = AutoModel.from_config("tiny-a", seed=42), settings(tmp_path, save_steps=2)
    observe = Run.observe
    with monkeypatch.context() as patch:
        patch.setattr(Run, "observe", lambda self, r, *rest: crash() if r.step == 3 else observe(self, r, *rest))
        with pytest.raises(Crash):
            SFTTrainer(model=model, args=args).train()
    SFTTrainer(
        model=model, args=args
    ).train()  # the same model object, now three steps old, and a second optimizer for it
    same_bytes(whole / "checkpoint-4", tmp_path / "out" / "checkpoint-4", INDIVIDUAL)
    SFTTrainer(model=model, args=settings(tmp_path, output_dir=tmp_path / "anew", max_steps=1, save_steps=1)).train()
    names = [
        set(ShardedReader(f / "optimizer").shapes) for f in (whole / "checkpoint-4", tmp_path / "anew/checkpoint-1")
    ]
    assert names[1] <= names[0], "the names do not tell how many optimizers there were before"


# --- kills ----------------------------------------------------------------------------------------


def kill_once(command: list[str], dice: random.Random) -> bool:
    """Start the run, kill it some moment after one of its next checkpoints began to be written;
    False if it ended before.
    """
    after, delay = dice.randrange(1, 3), dice.random() * 0.3
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    ) as child:
        assert child.stdout is not None
        seen = 0
        for line in child.stdout:
            seen += "] - loss: " in line  # saving follows
            if seen == after:
                time.sleep(delay)
                child.kill()
                break
        child.stdout.read()
    return child.returncode == -signal.SIGKILL


def test_a_killed_run_equals_one_that_was_not(tmp_path: Path) -> None:
    kills = int(os.environ.get("ERNIE_TUNE_KILLS", "2"))
    changes = {"max_steps": 2 * kills + 3, "save_steps": 1, "save_total_limit": 2, "gradient_accumulation_steps": 2}
    whole = train(tmp_path, output_dir=tmp_path / "whole", **changes)
    file, killed = tmp_path / "run.yaml", tmp_path / "killed"
    file.write_text(dump_config(settings(tmp_path, output_dir=killed, **changes)), encoding="utf-8")
    command = [sys.executable, "-m", "ernie_tune", "train", str(file)]
    dice = random.Random(kills)
    done = [kill_once(command, dice) for _ in range(kills)]
    assert any(done), "no kill came in time"
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    last = changes["max_steps"]
    assert checkpoints(killed) == [f"checkpoint-{last - 1}", f"checkpoint-{last}"]
    for step in (last - 1, last):
        same_bytes(whole / f"checkpoint-{step}", killed / f"checkpoint-{step}", INDIVIDUAL)
    assert history(whole) == history(killed)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert not list(killed.glob("*.tmp"))
    print(f"{sum(done)} of {kills} kills hit")


# --- Ctrl-C, full disks ---------------------------------------------------------------------------


def run_file(folder: Path, **changes: Any) -> str:
    file = folder / "run.yaml"
    file.write_text(dump_config(settings(folder, **changes)), encoding="utf-8")
    return str(file)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_finishes_the_step_saves_and_the_same_command_goes_on(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file, out = run_file(tmp_path), tmp_path / "out"
    observe = Run.observe
    with monkeypatch.context() as patch:
        patch.setattr(
            Run,
            "observe",
            lambda self, record, *rest: (
                observe(self, record, *rest),
                os.kill(os.getpid(), number) if record.step == 2 else None,
            ),
        )
        handler = signal.getsignal(number)
        assert main(["train", file]) == 130
        assert signal.getsignal(number) is handler
    assert checkpoints(out) == ["checkpoint-2"]
    said = capfd.readouterr().err
    assert "finishing this step, then saving; once more to stop at once" in said
    assert "interrupted at step 2; checkpoint-2 is saved, the same command goes on from it" in said
    assert main(["train", file]) == 0
    assert f"resuming from {out}/checkpoint-2: step 2 of 4, 0.33 passes" in capfd.readouterr().out
    assert steps_logged(out) == [1, 2, 3, 4]


def test_a_second_interrupt_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)

    monkeypatch.setattr(Run, "observe", twice)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(tmp_path)
    assert type(caught.value) is KeyboardInterrupt
    assert checkpoints(tmp_path / "out") == []


def full_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "name", "calls"), [(writer._Sink, "write", 3), (writer._Sink, "write", 80), (state, "_write", 2)]
)
def test_a_full_disk_leaves_the_last_checkpoint_and_no_rest(
    module: Any, name: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file, out = run_file(tmp_path, save_steps=2), tmp_path / "out"
    save, real = state.save_checkpoint, vars(module)[name]
    left = [calls]

    def limited(*args: Any) -> Any:
        left[0] -= 1
        return real(*args) if left[0] else full_disk()

    def save_on_small_disk(*args: Any, **more: Any) -> Any:
        if args[1] == 4:
            before.update({p: p.read_bytes() for p in (out / "checkpoint-2").rglob("*") if p.is_file()})
            monkeypatch.setattr(module, name, limited)
        return save(*args, **more)

    before: dict[Path, bytes] = {}
    monkeypatch.setattr("ernie_tune.trainers.run.save_checkpoint", save_on_small_disk)
    assert main(["train", file]) == 1
    error = capsys.readouterr().err
    assert f"{out}: checkpoint-4 could not be saved (No space left on device); older checkpoints are as they" in error
    assert checkpoints(out) == ["checkpoint-2"]
    assert before
    assert all(path.read_bytes() == content for path, content in before.items())
    monkeypatch.undo()
    assert main(["train", file]) == 0
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_result_that_cannot_be_saved_says_where_and_what_is_left(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    file, out = run_file(tmp_path, save_strategy=strategy), tmp_path / "out"
    real = RunFolder.result

    @contextlib.contextmanager
    def on_full_disk(self: RunFolder) -> Iterator[None]:
        with monkeypatch.context() as patch, real(self):
            patch.setattr(writer._Sink, "write", full_disk)
            yield

    monkeypatch.setattr(RunFolder, "result", on_full_disk)
    assert main(["train", file]) == 1
    left = (
        f"the last steps are in {out}/checkpoint-4: free some space"
        if strategy == "steps"
        else "there is no checkpoint"
    )
    error = capsys.readouterr().err
    assert f"{out}.tmp/model.safetensors: the result could not be saved (No space left on device); {left}" in error
    monkeypatch.undo()
    assert main(["train", file]) == 0
    assert steps_logged(out) == [1, 2, 3, 4]
    assert (out / "model.safetensors").is_file()


def test_a_closed_terminal_saves(tmp_path: Path) -> None:
    """The kernel sends SIGHUP, and nothing can be printed from then on."""
    file, out = run_file(tmp_path, max_steps=500), tmp_path / "out"
    ours, theirs = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", TERMINAL, str(file)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    try:
        said = b""
        while b"global_step: 2," not in said:
            said += os.read(ours, 4096)
        os.close(ours)
        assert child.wait(120) == 130
    finally:
        child.kill()
    (saved,) = checkpoints(out)
    assert 2 <= int(saved.split("-")[1]) < 500
    assert (out / saved / "saved_signal_0").is_file()
    assert not (out / ".lock").exists()


# The terminal becomes the session's own, as that of a shell.
TERMINAL = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from ernie_tune.cli.main import main
raise SystemExit(main(["train", sys.argv[1]]))
"""


# --- what to resume from --------------------------------------------------------------------------


def test_no_refuses_a_folder_with_checkpoints_and_auto_says_what_it_takes(tmp_path: Path, capsys: Any) -> None:
    out = train(tmp_path, save_steps=2)
    with pytest.raises(ValueError, match=r"output_dir .* holds checkpoints .* resume_from_checkpoint: no; choose"):
        train(tmp_path, resume_from_checkpoint="no")
    (out / "checkpoint-9").mkdir()  # never finished: no mark
    (out / "checkpoint-7.tmp" / "new").mkdir(parents=True)  # a save that was killed
    before = (out / "model.safetensors").read_bytes()
    capsys.readouterr()
    train(tmp_path, save_steps=2)
    assert f"already finished: step 4 of 4 in {out}; nothing was trained" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == before
    train(tmp_path, save_steps=2, max_steps=5)
    assert checkpoints(out) == ["checkpoint-2", "checkpoint-4", "checkpoint-5", "checkpoint-9"]
    with pytest.raises(ValueError, match=r"checkpoint-9\) must be a complete checkpoint-N folder with saved_signal_0"):
        train(tmp_path, resume_from_checkpoint=str(out / "checkpoint-9"))


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path: Path) -> None:
    out = train(tmp_path, save_steps=1)
    train(tmp_path, save_steps=1, save_total_limit=2, resume_from_checkpoint=str(out / "checkpoint-2"))
    assert checkpoints(out) == ["checkpoint-3", "checkpoint-3.old", "checkpoint-4", "checkpoint-4.old"]
    same_bytes(out / "checkpoint-4", out / "checkpoint-4.old", (*INDIVIDUAL, "ledger.json"))
    assert steps_logged(out) == [1, 2, 3, 4]


def test_a_run_may_go_on_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    old = train(tmp_path, save_steps=1)
    new = {"output_dir": tmp_path / "new", "save_steps": 1, "resume_from_checkpoint": str(old / "checkpoint-2")}
    crash_at(monkeypatch, 4, tmp_path, **new)
    assert f"resuming from {old}/checkpoint-2: step 2 of 4" in capsys.readouterr().out
    train(tmp_path, **new)
    assert f"resuming from {tmp_path}/new/checkpoint-3: step 3 of 4" in capsys.readouterr().out
    assert history(tmp_path / "new") == history(old)
    assert checkpoints(old) == [f"checkpoint-{i}" for i in (1, 2, 3, 4)]
    same_bytes(old / "checkpoint-4", tmp_path / "new" / "checkpoint-4", INDIVIDUAL)


def test_weights_alone_start_a_new_run_that_can_itself_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    old = train(tmp_path, save_steps=4, save_only_model=True)
    assert not (old / "checkpoint-4" / "optimizer").exists()
    with pytest.raises(ValueError, match=r"must hold optimizer/ .* save_only_model; .* resume_only_model: true, .*"):
        train(tmp_path, max_steps=6)
    only = {"resume_only_model": True, "resume_from_checkpoint": str(old / "checkpoint-4")}
    for bad in ({"resume_only_model": True}, only):
        with pytest.raises(ValueError, match=r"must go with resume_from_checkpoint .* a checkpoint outside output_dir"):
            train(tmp_path, **bad)
    new = {**only, "output_dir": tmp_path / "new", "learning_rate": 1e-20, "max_steps": 3, "save_steps": 1}
    crash_at(monkeypatch, 2, tmp_path, **new)
    assert f"weights of {old}/checkpoint-4; optimizer, data and step count start anew" in capsys.readouterr().err
    train(tmp_path, **new)  # goes on from its own checkpoint-1, not from the old run's again
    assert f"resuming from {tmp_path}/new/checkpoint-1" in capsys.readouterr().out
    assert steps_logged(tmp_path / "new") == [1, 2, 3]
    # A rate of nothing leaves the old weights, so the losses are those of the trained model on the
    # same rows.
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()


@pytest.mark.parametrize("only_model", [False, True])
def test_an_adapter_alone_starts_a_new_run(only_model: bool, tmp_path: Path) -> None:
    lora = {"fine_tuning": "LoRA", "lora_experts": "text"}
    old = train(tmp_path, save_steps=4, save_only_model=only_model, **lora)
    trainer = SFTTrainer(
        args=settings(
            tmp_path,
            **lora,
            resume_only_model=True,
            resume_from_checkpoint=str(old / "checkpoint-4"),
            output_dir=tmp_path / "new",
            learning_rate=1e-20,
        )
    )
    trainer.train()
    adapter = "peft_model-00001-of-00001.safetensors"
    assert (tmp_path / "new" / adapter).read_bytes() == (old / adapter).read_bytes()


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    old = train(tmp_path, fine_tuning="LoRA", save_steps=4)
    with pytest.raises(ValueError, match=r"made with other settings.*\n  lora_rank: 8 -> 4\n"):
        train(tmp_path, fine_tuning="LoRA", lora_rank=4)
    # of a release that kept neither
    for file in [*old.rglob("ledger.json"), *old.rglob("ernie_tune_args.yaml")]:
        file.unlink()
    (old / "checkpoint-4" / "checkpoint_files.json").unlink()
    with pytest.raises(ValueError, match=r"parameters that .*checkpoint-4 holds .* resume with the settings"):
        train(tmp_path, fine_tuning="LoRA", lora_rank=4)
    new = {"output_dir": tmp_path / "new", "resume_only_model": True, "fine_tuning": "LoRA"}
    shutil.rmtree(old / "checkpoint-4" / "optimizer")
    with pytest.raises(ValueError, match="load the adapter on its own base model"):
        train(tmp_path, **new, resume_from_checkpoint=str(old / "checkpoint-4"), lora_rank=4)


def test_ignoring_the_data_starts_them_again_and_changed_data_are_refused(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "train.jsonl", [text_row(i) for i in range(8)])
    train(tmp_path, max_steps=2, save_steps=2, lr_scheduler_type="constant")
    trainer = SFTTrainer(args=settings(tmp_path, max_steps=4, lr_scheduler_type="constant", ignore_data_skip=True))
    trainer.train()
    first, second = history(trainer.output_dir)[:2], history(trainer.output_dir)[2:]
    assert [r["epoch"] for r in first] == [r["epoch"] for r in second] == [0.25, 0.5]
    write_rows(Path(data), [text_row(i) for i in range(9)])
    with pytest.raises(
        ValueError, match=r"train_dataset_path: .*train.jsonl \(8 rows, sha256 .*\) -> .* \(9 rows, sha256"
    ):
        train(tmp_path, max_steps=6, lr_scheduler_type="constant")


def test_the_measurement_before_training_is_kept(tmp_path: Path, capsys: Any) -> None:
    rows = write_rows(tmp_path / "eval.jsonl", [text_row(i) for i in range(3)])
    out = train(tmp_path, eval_dataset_path=rows, save_steps=4)
    before = json.loads((out / "before.json").read_text(encoding="utf-8"))
    page = (out / "before_after.html").read_text(encoding="utf-8")
    train(tmp_path, eval_dataset_path=rows)
    assert json.loads((out / "before.json").read_text(encoding="utf-8")) == before
    assert (out / "before_after.html").read_text(encoding="utf-8") == page
    capsys.readouterr()
    (out / "before.json").unlink()
    train(tmp_path, eval_dataset_path=rows, max_steps=5)
    assert "before.json is not there: no comparison with the model before training" in capsys.readouterr().out
    assert f"{before['metrics']['eval_loss']:.4f}" not in (out / "README.md").read_text(encoding="utf-8")

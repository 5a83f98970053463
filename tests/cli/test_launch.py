"""`ernie_tune.launch`: training in a child process from a thread, as a notebook does it."""

from __future__ import annotations

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.tiny_runs import checkpoints, mixed_rows, settings, steps_logged, train, write_rows

import ernie_tune
from ernie_tune.cli import launch as launch_module
from ernie_tune.config.loader import dump_config


def plain(folder: Path) -> dict[str, Any]:
    """Settings by name, as a notebook has them."""
    return {
        "model_name_or_path": "tiny-a",
        "fine_tuning": "Full",
        "train_dataset_path": [write_rows(folder / "a.jsonl", mixed_rows(6))],
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "bf16": False,
        "logging_steps": 1,
        "plot_loss": False,
    }


def test_a_thread_gets_the_folder_or_the_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with ThreadPoolExecutor(1) as thread:
        out = thread.submit(ernie_tune.launch, plain(tmp_path), learning_rate=1e-4, save_total_limit=None).result()
        assert out == tmp_path / "out"
        assert steps_logged(out) == [1, 2]
        assert "learning_rate: 0.0001" in (out / "ernie_tune_args.yaml").read_text(encoding="utf-8")
        assert "***** Running training *****" in capfd.readouterr().out, "the child's lines are shown"
        failed = thread.submit(ernie_tune.launch, {**plain(tmp_path), "max_seq_len": 5, "output_dir": tmp_path / "b"})
        with pytest.raises(RuntimeError) as caught:
            failed.result()
    text = str(caught.value)
    assert text.startswith("training ended with exit code 1; its last lines:\n")
    assert "no row of the training data can be used" in text
    assert len(text.splitlines()) <= 21


class Child:
    """A process that is never started."""

    commands: ClassVar[list[list[str]]] = []
    environ: ClassVar[dict[str, str]] = {}
    last: ClassVar[Any] = None
    returncode = 0

    def __init__(self, command: list[str], **options: Any) -> None:
        Child.commands.append(command)
        Child.environ = options["env"]
        self.configuration = Path(command[5]).read_text(encoding="utf-8")
        self.stdout = ["训练\n"]
        self.signals: list[int] = []
        Child.last = self

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None: ...

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def communicate(self) -> tuple[str, None]:
        return "checkpoint saved\n", None


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> type[Child]:
    Child.commands.clear()
    monkeypatch.setattr(launch_module.subprocess, "Popen", Child)
    return Child


@pytest.mark.parametrize("kind", ["file", "text", "resolved", "mapping"])
def test_every_form_of_settings_takes_more_of_them(kind: str, child: Any, tmp_path: Path) -> None:
    config = settings(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    given: Any = {"file": file, "text": str(file), "resolved": config, "mapping": plain(tmp_path)}[kind]
    out = ernie_tune.launch(
        given, output_dir=str(tmp_path / "other"), train_dataset_prob=[0.5], val_size=2, do_eval=True
    )
    assert out == tmp_path / "other"
    command = child.commands[0]
    assert command[1:5] == ["-u", "-m", "ernie_tune", "train"]
    assert command[6:] == [f"output_dir={tmp_path}/other", "train_dataset_prob=0.5", "val_size=2", "do_eval=True"]
    assert "model_name_or_path: tiny-a" in child.last.configuration
    assert child.environ["PYTHONPATH"].split(os.pathsep)[0] == str(Path(ernie_tune.__file__).parents[1])
    assert "" not in child.environ["PYTHONPATH"].split(os.pathsep)


def test_wrong_settings_are_told_before_a_process_starts(child: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key 'learnin_rate'; did you mean"):
        ernie_tune.launch(plain(tmp_path), learnin_rate=1)
    assert child.commands == []


def test_an_interrupt_is_passed_on_once(child: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def printing(text: str, **_: Any) -> None:
        if "训练" in text:
            raise KeyboardInterrupt
        shown.append(text)

    shown: list[str] = []
    monkeypatch.setattr("builtins.print", printing)
    with pytest.raises(KeyboardInterrupt):
        ernie_tune.launch(plain(tmp_path))
    assert child.last.signals == [signal.SIGINT]
    assert shown == ["checkpoint saved\n"], "what it still says is shown"


def test_training_in_a_thread_does_without_signals(tmp_path: Path) -> None:
    """A trainer used directly in a thread: Ctrl-C cannot be caught there, the rest works."""
    found: list[Path] = []
    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=lambda: found.append(train(tmp_path, max_steps=1, save_steps=1)))
    thread.start()
    thread.join()
    assert checkpoints(found[0]) == ["checkpoint-1"]
    assert signal.getsignal(signal.SIGINT) is before

"""`ernie-tune demo`: what its two runs are asked for, and what is said of them; the runs themselves
are walked through with the README.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ernie_tune.cli import demo, train
from ernie_tune.cli.main import main
from ernie_tune.config.loader import load_config, split_overrides
from ernie_tune.data.sources import load_dataset
from ernie_tune.trainers.sft import SFTTrainer


def test_its_first_run_is_that_of_the_digits_and_the_second_has_fewer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[SFTTrainer] = []
    monkeypatch.setattr(SFTTrainer, "train", lambda self, dry_run: seen.append(self))
    monkeypatch.setattr(train, "rlvr", lambda words: 0)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "max_steps=2", "output_dir=here"]) == 0
    every, few = seen
    assert (every.train_rows, len(every.eval_rows), every.args.train.max_steps) == (1500, 297, 2)
    assert (few.train_rows, len(few.eval_rows), few.args.train.max_steps) == (50, 297, 2)
    assert (every.args.save.output_dir, few.args.save.output_dir) == ("here", "here_50")


def test_its_last_run_goes_on_by_a_checker_of_the_same_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def shown(words: list[str]) -> int:
        files, settings = split_overrides(words)
        out = tmp_path / load_config(files[0], settings, for_training=True).config.save.output_dir
        out.mkdir()
        (out / "before.json").write_text(json.dumps({"metrics": {"eval_exact_match": 0.01}}))
        (out / "eval_results.json").write_text(json.dumps({"eval_exact_match": 0.5 if out.name == "here" else 0.25}))
        return 0

    def own(words: list[str]) -> int:
        files, settings = split_overrides(words)
        asked.append(load_config(files[0], settings, for_training=True).config)
        out = tmp_path / "here_rlvr"
        (out / "eval_results.json").write_text(json.dumps({"eval_exact_match": 0.375}))
        return 0

    monkeypatch.setattr(train, "run", shown)
    monkeypatch.setattr(train, "rlvr", own)
    monkeypatch.setattr(demo, "DIGITS", (tmp_path / "a", demo.DIGITS[0]))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "max_steps=3", "--output_dir", "here", "seed=7"]) == 0
    (config,) = asked
    assert (config.model.stage, config.model.model_name_or_path) == ("RLVR", "nano")
    assert config.lora.lora_path == "here_50"
    assert (config.save.output_dir, config.train.max_steps, config.train.seed) == ("here_rlvr", 3, 7)
    for path, count in ((config.data.train_dataset_path, 1500), (config.data.eval_dataset_path, 297)):
        rows = load_dataset(list(path), signals=("verifiable",))
        assert len(rows) == count
        assert [m["role"] for m in rows[0].messages] == ["user"]
        assert rows[7].reward is not None
        assert str(rows[7].reward.answer).isdigit()
        assert Path(str(rows[7].images[0])).is_file()
    told = [line.split() for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [next(word for word in words if "%" in word) for words in told] == ["1.0%", "50.0%", "25.0%", "37.5%"]


def test_what_cannot_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def never(words: list[str]) -> int:
        raise AssertionError("no last run")

    monkeypatch.setattr(train, "rlvr", never)
    monkeypatch.chdir(tmp_path)
    for codes in ([130], [0, 1]):  # interrupted; a second run that fails
        left = list(codes)
        monkeypatch.setattr(train, "run", lambda words, left=left: left.pop(0))
        assert main(["demo"]) == codes[-1]
    monkeypatch.setattr(train, "run", lambda words: 0)
    assert main(["demo", "--dry-run"]) == 0
    monkeypatch.setattr(demo, "DIGITS", (tmp_path / "a", tmp_path / "b"))
    assert main(["demo"]) == 2
    assert f"demo needs examples/digits, found neither at {tmp_path / 'a'} nor at" in capsys.readouterr().err

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


def test_its_first_run_is_that_of_the_digits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[SFTTrainer] = []
    monkeypatch.setattr(SFTTrainer, "train", lambda self, dry_run: seen.append(self))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "max_steps=2", "output_dir=here"]) == 0
    assert (seen[0].train_rows, len(seen[0].eval_rows), seen[0].args.train.max_steps) == (1500, 297, 2)


def test_its_second_run_goes_on_from_the_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a checker of the same pictures, and no more steps; both are told of."""
    asked: list[Any] = []

    def first(words: list[str]) -> int:
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "config.json").write_text("{}")
        (tmp_path / "here" / "before.json").write_text(json.dumps({"metrics": {"eval_exact_match": 0.01}}))
        (tmp_path / "here" / "eval_results.json").write_text(json.dumps({"eval_exact_match": 0.5}))
        return 0

    def second(words: list[str]) -> int:
        files, settings = split_overrides(words)
        asked.append(load_config(files[0], settings, for_training=True).config)
        out = tmp_path / "here_rlvr"
        (out / "eval_results.json").write_text(json.dumps({"eval_exact_match": 0.625}))
        history = [{"reward": 0.25}, {"loss": 1.0}, {"reward": 0.75}]
        (out / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        return 0

    monkeypatch.setattr(train, "run", first)
    monkeypatch.setattr(train, "rlvr", second)
    monkeypatch.setattr(demo, "DIGITS", (tmp_path / "a", demo.DIGITS[0]))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "max_steps=3", "--output_dir", "here", "seed=7"]) == 0
    (config,) = asked
    assert (config.model.stage, config.model.model_name_or_path, config.save.output_dir) == (
        "RLVR",
        "here",
        "here_rlvr",
    )
    assert (config.train.max_steps, config.train.seed, config.optim.learning_rate) == (3, 7, 1e-4)
    for path, count in ((config.data.train_dataset_path, 1500), (config.data.eval_dataset_path, 297)):
        rows = load_dataset(list(path), signals=("verifiable",))
        assert len(rows) == count
        assert [m["role"] for m in rows[0].messages] == ["user"]
        assert rows[7].reward is not None
        assert str(rows[7].reward.answer).isdigit()
        assert Path(str(rows[7].images[0])).is_file()
    said = capsys.readouterr().out
    assert [line.split()[-1] for line in said.splitlines() if "before" in line or "after SFT" in line] == [
        "1.0%",
        "50.0%",
    ]
    assert "62.5%   reward of sampled answers (0.25 -> 0.75)" in said


def test_what_cannot_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def never(words: list[str]) -> int:
        raise AssertionError("no second run")

    monkeypatch.setattr(train, "rlvr", never)
    monkeypatch.chdir(tmp_path)
    for code in (0, 130):  # an adapter; interrupted
        monkeypatch.setattr(train, "run", lambda words, code=code: code)
        assert main(["demo"]) == code
    assert capsys.readouterr().out.count("it goes on from whole models") == 1
    assert main(["demo", "--dry-run"]) == 130
    monkeypatch.setattr(demo, "DIGITS", (tmp_path / "a", tmp_path / "b"))
    assert main(["demo"]) == 2
    assert f"demo needs examples/digits, found neither at {tmp_path / 'a'} nor at" in capsys.readouterr().err

"""`ernie-tune train` and `eval`: exit codes and lines; the runs themselves are tested in
tests/trainers.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_runs import mixed_rows, picture_row, settings, train, write_rows

from ernie_tune.cli.main import main
from ernie_tune.config.loader import dump_config


def test_settings_that_cannot_be_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model_name_or_path: tiny-a\n", encoding="utf-8")
    for words, code, message in (
        ([], 2, "expected one YAML file, got 0"),
        ([str(file)], 1, "run.yaml:1: train_dataset_path is missing"),
        ([str(file), "train_dataset_path=nowhere.jsonl"], 1, "nowhere.jsonl"),
        (
            [str(file), f"train_dataset_path={write_rows(tmp_path / 'a.jsonl', mixed_rows(2))}", "pissa=true"],
            1,
            "pissa",
        ),
    ):
        assert main(["train", *words]) == code
        assert message in capsys.readouterr().err


def test_notes_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "a.jsonl", mixed_rows(2))
    file = tmp_path / "run.yaml"
    file.write_text(f"train_dataset_path: {data}\nmodel: tiny-a\nfine_tuning: Full\nlora_rank: 4\n", encoding="utf-8")
    assert main(["train", str(file), "--dry-run", f"output_dir={tmp_path}/out"]) == 0
    assert f"{file}:4: lora_rank has no effect with fine_tuning Full" in capsys.readouterr().err


def eval_loss(text: str) -> float:
    return float(next(line for line in text.splitlines() if "eval_loss" in line).split("=")[1])


def test_eval_measures_what_was_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = write_rows(tmp_path / "eval.jsonl", [picture_row(i) for i in range(3)])
    for method, name in (("Full", "model_name_or_path"), ("LoRA", "lora_path")):
        out = train(tmp_path, max_steps=3, fine_tuning=method, output_dir=tmp_path / method, eval_dataset_path=held)
        capsys.readouterr()
        trained = json.loads((out / "eval_results.json").read_text(encoding="utf-8"))["eval_loss"]
        for words in ([str(out / "ernie_tune_args.yaml"), f"--{name}", str(out)], [str(out)]):
            (out / "eval_answers.jsonl").unlink(missing_ok=True)
            assert main(["eval", *words]) == 0
            shown = capsys.readouterr().out
            assert shown.startswith("***** eval metrics *****\n")
            assert eval_loss(shown) == pytest.approx(trained, abs=1e-4)
            lines = (out / "eval_answers.jsonl").read_text(encoding="utf-8").splitlines()
            assert [json.loads(line)["row"] for line in lines] == [f"{held}:{i}" for i in (1, 2, 3)]
            assert [set(json.loads(line)) for line in lines] == [{"row", "reference", "answer", "exact_match"}] * 3
    (tmp_path / "empty").mkdir()
    assert main(["eval", str(tmp_path / "empty")]) == 2
    assert "is a folder without ernie_tune_args.yaml; give a YAML file" in capsys.readouterr().err
    assert main(["validate", str(tmp_path / "Full")]) == 0
    assert "ernie_tune_args.yaml is valid" in capsys.readouterr().out
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(settings(tmp_path)), encoding="utf-8")
    assert main(["eval", str(file)]) == 1
    assert "eval_dataset (0 rows) must have rows to evaluate" in capsys.readouterr().err

"""`ernie-tune plot`: curves of runs that are finished or still going."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernie_tune.cli.main import main


def run_folder(folder: Path, scale: float) -> Path:
    folder.mkdir()
    records = [{"step": i, "epoch": i / 10, "loss": scale / i, "learning_rate": 1e-3} for i in range(1, 11)]
    lines = [json.dumps(r) + "\n" for r in records]
    # being written
    (folder / "trainer_log.jsonl").write_text("".join(lines) + '{"step": 11, "lo', encoding="utf-8")
    return folder


def test_curves_in_the_terminal_and_in_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = run_folder(tmp_path / "a", 8.0), run_folder(tmp_path / "b", 4.0)
    file = tmp_path / "curves.svg"
    assert main(["plot", str(a), str(b), "--svg", str(file)]) == 0
    said = capsys.readouterr().out
    assert "loss" in said
    assert said.splitlines()[0].split() == ["loss", "⠒⠒", "a", "bb", "b"], "one chart, named by the end of the path"
    assert said.count("└") == 1
    assert f"wrote {file}" in said
    svg = file.read_text(encoding="utf-8")
    assert svg.startswith("<svg")
    assert "learning_rate" in svg
    assert main(["plot", str(a), "--name", "learning_rate"]) == 0
    assert "learning_rate" in capsys.readouterr().out
    assert main(["plot", str(a), "--name", "nope"]) == 0
    assert capsys.readouterr().out == "no nope was logged; there is learning_rate, loss\n"


def test_wrong_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, code, message in (
        ([], 2, "expected run folders and --name or --svg, got no folder"),
        ([str(tmp_path), "--color", "red"], 2, "got ['color']"),
        ([str(tmp_path)], 1, f"{tmp_path} must hold trainer_log.jsonl; give the output_dir of a run"),
    ):
        assert main(["plot", *words]) == code
        assert message in capsys.readouterr().err

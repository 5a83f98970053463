"""Learning from sampled answers on two ranks is learning on one process: the same answers, losses
and weights, whatever the layout, a rank without prompts and one whose answers all end at once.

ERNIE_TUNE_FOUR=1 tries a layout of four processes, too.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import online_worker
import pytest
from launching import HERE, launch
from safetensors.numpy import load_file

from ernie_tune.trainers.online import COMPLETIONS_FILE

FOUR = "TP2 DP2"
PAIRS = [(layout, case) for layout, cases in online_worker.TRIED.items() if layout != FOUR for case in cases]


@pytest.fixture(scope="module")
def spread(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs on two ranks, which share one start."""
    folder = tmp_path_factory.mktemp("spread")
    layouts = [layout for layout in online_worker.TRIED if layout != FOUR]
    code, tails = launch(folder, 2, HERE / "online_worker.py", str(folder), *layouts, timeout_s=300)
    assert code == 0, tails
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a case on one process, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda case: online_worker.train(folder, case))


def told(run: Path) -> list[dict[str, Any]]:
    lines = (run / COMPLETIONS_FILE).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [{k: v for k, v in row.items() if k != "row"} for row in rows]  # its file is the rank's
    return sorted(rows, key=lambda row: (row["round"], row["prompt"], row["sample"]))


def logged(run: Path) -> list[list[float]]:
    """Losses, and what there is to say of a critic."""
    records = map(json.loads, (run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines())
    return [
        [v for k, v in sorted(r.items()) if k == "loss" or k.startswith(("critic/", "objective/"))]
        for r in records
        if "loss" in r
    ]


def assert_same(mine: Path, theirs: Path, ranks: int) -> None:
    answers, others = told(mine / "run"), told(theirs / "run")
    assert [(r["round"], r["prompt"], r["text"], r["tokens"], r["finish_reason"]) for r in answers] == [
        (r["round"], r["prompt"], r["text"], r["tokens"], r["finish_reason"]) for r in others
    ]
    for name in ("reward", "advantage"):
        np.testing.assert_allclose([r[name] for r in answers], [r[name] for r in others], atol=1e-9, err_msg=name)
    np.testing.assert_allclose(logged(mine / "run"), logged(theirs / "run"), atol=1e-5, rtol=1e-5)
    weights, wanted = (
        {k: v for file in (run / "run").glob("*.safetensors") for k, v in load_file(file).items()}
        for run in (mine, theirs)
    )
    assert set(weights) == set(wanted) != set()
    for name, value in weights.items():
        np.testing.assert_allclose(value, wanted[name], atol=1e-5, rtol=0, err_msg=name)
    with np.load(theirs / "rank_0.npz") as one:
        for rank in range(ranks):
            with np.load(mine / f"rank_{rank}.npz") as here:
                assert here["ids"].tolist() == one["ids"].tolist()
                np.testing.assert_allclose(here["logps"], one["logps"], atol=1e-5)
                assert here["gap"] <= 1e-5, "the engine and the forward that trains are one policy"


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_a_layout_samples_and_learns_as_one_process(
    layout: str, case: str, spread: Path, alone: Callable[[str], Path]
) -> None:
    """Answers to the letter, rewards, advantages, losses, weights, greedy answers; the gate between
    engine and training.
    """
    assert_same(spread / layout.replace(" ", "_") / case.replace(" ", "_"), alone(case), 2)


@pytest.mark.skipif(not os.environ.get("ERNIE_TUNE_FOUR"), reason="four processes; set ERNIE_TUNE_FOUR=1")
@pytest.mark.parametrize("case", online_worker.TRIED[FOUR])
def test_four_processes(case: str, tmp_path: Path, alone: Callable[[str], Path]) -> None:
    code, tails = launch(tmp_path, 4, HERE / "online_worker.py", str(tmp_path), FOUR, timeout_s=300)
    assert code == 0, tails
    assert_same(tmp_path / FOUR.replace(" ", "_") / case.replace(" ", "_"), alone(case), 4)


def test_a_killed_rank_ends_all_and_the_run_goes_on_to_the_last_bit(tmp_path: Path) -> None:
    """SIGKILL while a round is sampled, two steps after what was saved in the middle of another."""
    code, tails = launch(tmp_path, 2, HERE / "killed_worker.py", str(tmp_path), timeout_s=240)
    assert code not in (0, 124), tails  # not by the time limit
    part, whole = tmp_path / "part" / "run", tmp_path / "whole" / "run"
    assert (whole / "trainer_state.json").is_file(), tails
    assert not list(part.glob("*.safetensors"))
    assert [folder.name for folder in part.glob("checkpoint-*")] == ["checkpoint-3"]
    before = len(told(part))
    code, tails = launch(tmp_path, 2, HERE / "killed_worker.py", str(tmp_path), "again", timeout_s=240)
    assert code == 0, tails
    weights, wanted = (
        {k: v for file in run.glob("*.safetensors") for k, v in load_file(file).items()} for run in (part, whole)
    )
    assert set(weights) == set(wanted) != set()
    for name, value in weights.items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    answers = {(r["round"], r["prompt"], r["sample"]): r for r in told(part)}
    assert len(told(part)) > before
    assert [*answers.values()] == [*{(r["round"], r["prompt"], r["sample"]): r for r in told(whole)}.values()]

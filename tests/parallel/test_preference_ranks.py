"""Judged rows on two ranks that see different kinds of judgements: nothing waits for ever, and the numbers are one process's."""

from __future__ import annotations

import json
from pathlib import Path

import judged_worker
import numpy as np
import pytest
from launching import HERE, launch
from preference_worker import CASES, run
from safetensors.numpy import load_file


@pytest.mark.parametrize("case", CASES)
def test_terms_that_a_rank_does_not_have(tmp_path: Path, case: str) -> None:
    want = run(tmp_path, case)
    code, tails = launch(tmp_path, 2, HERE / "preference_worker.py", str(tmp_path), case, timeout_s=120)
    assert code == 0, tails
    assert len(set(np.round(want["losses"], 6))) == len(want["losses"])
    for rank in (0, 1):
        with np.load(tmp_path / f"rank_{rank}.npz") as got:
            assert set(got.files) == set(want)
            for name in want:
                np.testing.assert_allclose(got[name], want[name], atol=1e-5, rtol=1e-5, err_msg=f"rank {rank}: {name}")


def losses(run: Path) -> list[float]:
    records = map(json.loads, (run / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines())
    return [r["loss"] for r in records if "loss" in r]


@pytest.mark.parametrize("layout", judged_worker.CASES)
def test_runs_on_judged_answers_are_those_of_one_process(tmp_path: Path, layout: str) -> None:
    """Losses, measurements and weights, with a checkpoint in between; references of every kind; quantised base; pictures and shared prompts."""
    for name in ("alone", "spread"):
        (tmp_path / name).mkdir()
        judged_worker.write_all(tmp_path / name)
    code, tails = launch(tmp_path, 2, HERE / "judged_worker.py", str(tmp_path / "spread"), layout, timeout_s=180)
    assert code == 0, tails
    for case, (stage, changes) in judged_worker.CASES[layout].items():
        judged_worker.train(tmp_path / "alone" / case, stage, changes)
        mine, theirs = (tmp_path / name / case for name in ("spread", "alone"))
        np.testing.assert_allclose(losses(mine), losses(theirs), atol=1e-5, rtol=0, err_msg=case)
        assert len(losses(mine)) == judged_worker.STEPS
        found, wanted = (json.loads((run / "eval_results.json").read_text(encoding="utf-8")) for run in (mine, theirs))
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, abs=1e-4), f"{case}: {name}"
        files = [
            sorted(
                p.relative_to(run) for p in run.rglob("*.safetensors") if "checkpoint" not in str(p.relative_to(run))
            )
            for run in (mine, theirs)
        ]
        assert files[0] == files[1]
        assert files[0]
        for file in files[0]:
            values, others = load_file(mine / file), load_file(theirs / file)
            assert set(values) == set(others)
            for name, value in values.items():
                np.testing.assert_allclose(value, others[name], atol=1e-5, rtol=0, err_msg=f"{case}: {name}")

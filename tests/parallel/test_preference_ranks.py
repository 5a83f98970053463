"""Judged rows on two ranks that see different kinds of judgements: nothing waits for ever, and the
numbers are one process's.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import judged_worker
import numpy as np
import pytest
from launching import HERE, launch
from preference_worker import CASES, run
from safetensors.numpy import load_file

from ernie_tune.train.reference import CACHE_FILE


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


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a case on one process, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("alone")
    return functools.cache(lambda case: judged_worker.train(folder, case))


@pytest.mark.parametrize("layout", judged_worker.TRIED)
def test_runs_on_judged_answers_are_those_of_one_process(
    tmp_path: Path, layout: str, alone: Callable[[str], Path]
) -> None:
    """Losses, measurements and weights, some with a checkpoint in between; references of every
    kind; a quantised base; pictures and shared prompts.
    """
    code, tails = launch(tmp_path, 2, HERE / "judged_worker.py", str(tmp_path), layout, timeout_s=180)
    assert code == 0, tails
    for case in judged_worker.TRIED[layout]:
        mine, theirs = tmp_path / case, alone(case)
        np.testing.assert_allclose(losses(mine), losses(theirs), atol=1e-5, rtol=0, err_msg=case)
        assert len(losses(mine)) == judged_worker.STEPS
        found, wanted = (json.loads((run / "eval_results.json").read_text(encoding="utf-8")) for run in (mine, theirs))
        assert set(found) == set(wanted)
        for name, value in wanted.items():
            assert found[name] == pytest.approx(value, abs=1e-4), f"{case}: {name}"
        if case == "precomputed":
            stored = [np.load(run / CACHE_FILE) for run in (mine, theirs)]
            assert str(stored[0]["identity"]) == str(stored[1]["identity"]), (
                "the policy's name is the layout's no more than its values"
            )
        files = [sorted(str(p.relative_to(run)) for p in run.rglob("*.safetensors")) for run in (mine, theirs)]
        results = [[name for name in found if not name.startswith("checkpoint-")] for found in files]
        assert results[0] == results[1] != []
        for file in results[0]:
            values, others = load_file(mine / file), load_file(theirs / file)
            assert set(values) == set(others)
            for name, value in values.items():
                # AdamW makes a step of a tiny gradient's rounding: where one is, an element is off
                # by a small part of a step
                np.testing.assert_allclose(value, others[name], atol=1e-4, rtol=0, err_msg=f"{case}: {name}")

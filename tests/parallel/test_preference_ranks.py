"""Judged rows on two ranks that see different kinds of judgements: nothing waits for ever, and the numbers are one process's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from launching import HERE, launch
from preference_worker import CASES, run


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

"""Terms that are absent on a rank: two processes with different kinds of judgements neither wait for each other nor count wrongly."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from judged_worker import ROWS, gradient
from launching import HERE, launch


def test_two_ranks_with_other_judgements_make_one_gradient(tmp_path: Path) -> None:
    code, tails = launch(tmp_path, 2, HERE / "judged_worker.py", str(tmp_path), timeout_s=200)
    assert code == 0, tails
    ranks = [pickle.loads((tmp_path / f"rank{r}.pickle").read_bytes()) for r in range(2)]
    for name in ("upo_hetero", "mpo", "bco"):
        whole = gradient(tmp_path / "whole", name, [*ROWS[0], *ROWS[1]])
        got = [r[name] for r in ranks]
        assert np.isclose(sum(g["loss"] for g in got), whole["loss"], atol=1e-5)
        terms = [{n for n in g["metrics"] if n.endswith("/loss")} for g in (*got, whole)]
        assert terms[0] | terms[1] == terms[2]
        assert terms[0] != terms[1], "a rank lacks terms"
        assert got[0]["z0"] == got[1]["z0"] == whole["z0"]
        for parameter, grad in whole["grads"].items():
            for g in got:
                np.testing.assert_allclose(
                    g["grads"][parameter],
                    grad,
                    atol=2e-5 * max(1.0, float(np.abs(grad).max())),
                    err_msg=f"{name} {parameter}",
                )

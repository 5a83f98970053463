"""objectives/sft.py against worked examples: losses [1,2,3] over 10 positions and six of 0.5 over
8.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_tune.objectives.sft import sft_loss, token_coefficients

LOSSES = [1.0, 2.0, 3.0, *[0.5] * 6]
ROW = np.array([0] * 3 + [1] * 6)
TOKENS = np.array([10, 8])
EXPECTED = {"seq": 1.25, "token": 1.0, "token_balanced": 0.4875}


@pytest.mark.parametrize("norm", EXPECTED)
def test_reductions_have_their_values_and_gradients(norm: str) -> None:
    logp = paddle.to_tensor([-x for x in LOSSES], dtype="float64", stop_gradient=False)
    coefficient, count = token_coefficients(np.ones(9), ROW, TOKENS, norm)
    out = sft_loss(logp, coefficient, count)
    assert float(out.total) / out.count == pytest.approx(EXPECTED[norm], abs=1e-12)
    assert out.metrics == {"nll": (pytest.approx(9.0), 9.0)}, "the plain loss, whatever the reduction"
    out.total.backward()
    step = 1e-6
    moved = [-x for x in LOSSES]
    moved[1] += step
    higher = sft_loss(paddle.to_tensor(moved, dtype="float64"), coefficient, count)
    assert float(logp.grad[1]) == pytest.approx((float(higher.total) - float(out.total)) / step, abs=1e-6)


@pytest.mark.parametrize("norm", EXPECTED)
def test_rows_may_come_one_by_one(norm: str) -> None:
    total = count = 0.0
    for row in (0, 1):
        mine = row == ROW
        coefficient, n = token_coefficients(np.ones(mine.sum()), ROW[mine] * 0, TOKENS[[row]], norm)
        out = sft_loss(paddle.to_tensor(-np.array(LOSSES)[mine]), coefficient, n)
        total, count = total + float(out.total), count + out.count
    assert total / count == pytest.approx(EXPECTED[norm], abs=1e-12)


def test_weights_are_relative() -> None:
    # the first row counts three times as much as the second
    weights = np.where(ROW == 0, 3.0, 1.0)
    values = {}
    for norm in EXPECTED:
        coefficient, count = token_coefficients(weights, ROW, TOKENS, norm)
        values[norm] = float((coefficient * LOSSES).sum() / count)
    assert values["token"] == pytest.approx((3 * 6 + 3) / (9 + 6))
    assert values["seq"] == pytest.approx(1.25), "inside a row only the proportions matter"
    assert values["token_balanced"] == pytest.approx((3 * 6 / 10 + 3 / 8) / 2)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"loss_norm \('batch'\) must be one of .*; use 'token'"):
        token_coefficients(np.ones(1), np.zeros(1, int), np.ones(1), "batch")

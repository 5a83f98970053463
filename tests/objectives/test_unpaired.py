"""KTO, BCO and APO-zero on single answers, and the numbers that they carry
over steps.
"""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from paddle import Tensor
from preference_cases import LENGTH, LOGP, PAIRS, REF, REWARDS, assert_gradient, assert_same, candidates, mean, tensor

from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.pairwise import Baselines, pair_loss
from ernie_tune.objectives.preference import Candidates
from ernie_tune.objectives.unpaired import (
    Labels,
    RewardShift,
    apo_zero_unpaired_loss,
    bco_loss,
    kl_baseline,
    kl_sum,
    kto_balance,
    kto_loss,
    label_metrics,
)

LABELS = Labels.of(range(6), [1, 1, 1, 0, 0, 0])


@pytest.mark.parametrize(("undesirable", "value"), [(1.0, 0.4987558320), (1.33, 0.5798833349)])
def test_kto(undesirable: float, value: float) -> None:
    def loss(x: Tensor) -> LossOut:
        return kto_loss(candidates(x), LABELS, 0.3, 0.1, 1.0, undesirable)

    assert mean(loss(tensor(LOGP))) == pytest.approx(value, abs=6e-11)
    gradient = assert_gradient(loss, LOGP)
    assert (gradient[:3] < 0).all()
    assert (gradient[3:] > 0).all()


def test_ktos_baseline_is_no_less_than_zero_and_has_no_gradient() -> None:
    policy = tensor([-3.0, -5.0, -2.0], grad=True)
    total, count = kl_sum(Candidates(policy, np.ones(3, int), tensor([-4.0, -5.5, -2.25])))
    assert (total, count) == (pytest.approx(1.75), 3)
    assert kl_baseline(total, count) == pytest.approx(1.75 / 3)
    assert kl_baseline(-total, count) == 0, "clamped after the mean over all ranks, not before"
    with pytest.raises(ValueError, match=r"mismatched answers \(0\) must be at least 1 .* take apo_zero_unpaired"):
        kl_baseline(0.0, 0.0)


def test_kto_balance() -> None:
    assert kto_balance(100, 100) is None
    assert "are bad: without good ones" in str(kto_balance(0, 10))
    assert "are good: without bad ones" in str(kto_balance(3, 0, 2.0))
    words = kto_balance(300, 100)
    assert words is not None
    assert "is 3;" in words
    low, high = (float(part) for part in words.rsplit("between ", 1)[1].split(" and "))
    assert kto_balance(300, 100, low * 1.01) is None
    assert kto_balance(300, 100, high * 0.99) is None
    assert kto_balance(300, 100, high * 1.1) is not None


def test_bco_on_labels_is_half_of_bco_on_pairs() -> None:
    def halves(x: Tensor) -> LossOut:
        out = pair_loss("bco_pair", candidates(x), PAIRS, baselines=Baselines(delta=0.2))
        return LossOut(out.total / 2, out.count)

    assert_same(halves, lambda x: bco_loss(candidates(x), LABELS, 0.2), LOGP)


def test_apo_zero_on_labels_is_half_of_apo_zero_on_pairs() -> None:
    def halves(x: Tensor) -> LossOut:
        out = pair_loss("apo_zero", candidates(x), PAIRS)
        return LossOut(out.total / 2, out.count)

    assert_same(halves, lambda x: apo_zero_unpaired_loss(candidates(x), LABELS), LOGP)


def test_one_rated_answer_alone() -> None:
    quality = (np.array([5, 4, 4, 1]) - 1) / 4

    def loss(x: Tensor) -> LossOut:
        c = candidates(x, np.zeros(4), np.ones(4, int))
        return bco_loss(c, Labels.of(range(4), quality), 0.0, 1.0)

    assert mean(loss(tensor(REWARDS))) == pytest.approx(0.6106817012, abs=6e-11)
    assert_gradient(loss, REWARDS)


@pytest.mark.parametrize("decay", [None, 0.9])
def test_the_shift_follows_both_means_and_survives_a_file(decay: float | None) -> None:
    shift = RewardShift(decay)
    assert shift.delta == 0
    shift = shift.updated((0.02, 3), (-0.01, 3))
    assert shift.delta == pytest.approx(0.0016666667)
    shift = shift.updated((0.0, 0), (0.0, 0))
    assert shift.delta == pytest.approx(0.0016666667), "a step without labels says nothing"
    shift = RewardShift.from_state(json.loads(json.dumps(shift.state_dict())))
    shift = shift.updated((6.0, 1), (0.0, 0))
    good = 6.02 / 4 if decay is None else 0.9 * 0.02 / 3 + 0.1 * 6
    assert shift.delta == pytest.approx((good - 0.01 / 3) / 2)
    with pytest.raises(ValueError, match=r"decay \(1.0\) must be at least 0 and below 1"):
        RewardShift(1.0)


def test_weights_and_rows_one_by_one() -> None:
    weighted = Labels.of([0, 3], [1, 0], np.array([3.0, 1.0]))
    for loss in (lambda la: bco_loss(candidates(), la, 0.1), lambda la: kto_loss(candidates(), la, 0.3)):
        single = [mean(loss(Labels.of([i], [g]))) for i, g in ((0, 1), (3, 0))]
        assert mean(loss(weighted)) == pytest.approx((3 * single[0] + single[1]) / 4)
        assert loss(weighted).count == 4
        parts = [loss(Labels.of([i], [g], np.array([w]))) for i, g, w in ((0, 1, 3.0), (3, 0, 1.0))]
        assert sum(float(p.total) for p in parts) == pytest.approx(float(loss(weighted).total))


def test_no_labels_here() -> None:
    none = Labels.of([], [])
    for loss in (
        kto_loss(candidates(), none, 0.3),
        bco_loss(candidates(), none, 0.0),
        apo_zero_unpaired_loss(candidates(), none),
    ):
        assert (float(loss.total), loss.count) == (0, 0)
    assert label_metrics(candidates(), none, 0.1) == {}


def test_extremes_stay_numbers() -> None:
    x = paddle.to_tensor([-1e4, -1.0], dtype="float32", stop_gradient=False)
    c = Candidates(x, np.array([1, 1]), paddle.to_tensor([-1.0, -1e4], dtype="float32"))
    for good in ([1, 0], [0, 1]):
        labels = Labels.of([0, 1], good)
        for out in (kto_loss(c, labels, 0.3), bco_loss(c, labels, 0.1), apo_zero_unpaired_loss(c, labels)):
            x.clear_grad()
            out.total.backward(retain_graph=True)
            assert np.isfinite([float(out.total), *x.grad.numpy()]).all()


def test_metrics_of_both_kinds() -> None:
    metrics = label_metrics(candidates(), Labels.of([0, 1, 3], [1, 1, 0]), 0.1)
    assert metrics["rewards/chosen"] == (pytest.approx(0.1 * (LOGP - REF)[:2].sum()), 2)
    assert metrics["rewards/rejected"] == (pytest.approx(0.1 * (LOGP - REF)[3]), 1)
    assert metrics["logps/chosen"] == (pytest.approx(LOGP[:2].sum()), 2)
    assert metrics["length/rejected"] == (float(LENGTH[3]), 1)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"good_M \(1\) and weight_M \(2\) must have as many entries as index_M \(2\)"):
        Labels.of([0, 1], [1])
    with pytest.raises(ValueError, match=r"good_M \(5 to 5\) must lie in \[0, 1\]; map ratings by their scale"):
        Labels.of([0], [5])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_baseline_moves_good_and_bad_apart(sign: float) -> None:
    """A higher z0 makes good answers cost more and bad ones less; a flipped sign (PaddleFormers has
    one) would do the opposite.
    """
    index, good = ([0], [1]) if sign > 0 else ([3], [0])
    low, high = (mean(kto_loss(candidates(), Labels.of(index, good), z0)) for z0 in (0.0, 2.0))
    assert sign * (high - low) > 0.01

"""objectives/density.py against scikit-learn 1.9.1 (LogisticRegression, class_weight="balanced",
tol 1e-14), and what BCO's loss makes of a ratio.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from paddle import Tensor
from preference_cases import LOGP, REF, assert_gradient, candidates, mean, tensor

from ernie_tune.objectives.density import PromptClassifier, density_ratio, fit_logistic
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.unpaired import Labels, bco_loss


def rows(count: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    i, j = np.arange(count)[:, None], np.arange(width)[None]
    return np.sin(1.0 + 0.7 * i * (j + 1) + 1.3 * j) + 0.4 * (i % 3 == 0), np.arange(count) % 3 == 0


# (rows, features, C) -> coefficients, intercept, p / (1 - p) within [0.5, 10] of the first six rows
SKLEARN = {
    (12, 3, 1.0): (
        [0.314771944847, 0.747068853778, -0.380442299589],
        -0.246156596248,
        [2.7641160602, 0.886629273482, 0.5, 1.453924831212, 1.668059047535, 0.5],
    ),
    (12, 3, 0.05): (
        [0.053250078792, 0.102913853775, -0.041528534254],
        -0.038933462558,
        [1.158179893536, 0.982371680382, 0.869608478502, 1.051559701861, 1.055034055528, 0.887205371801],
    ),
    (40, 4, 20.0): (
        [0.44848320541, 1.081408917661, -1.508835184741, 0.952231377354],
        -0.59398032505,
        [2.03663937131, 2.856661630415, 0.5, 3.953287436507, 1.930261465468, 0.5],
    ),
    # more features than rows: they can be told apart without a mistake, and only the penalty bounds
    # the weights
    (7, 10, 1.0): (
        [
            *(0.204219727835, 0.29048609632, -0.159629474279, 0.305007352978, 0.219387699331),
            *(1.248537393145, 0.038075902808, -0.031509125246, 0.272021643136, -0.011834781822),
        ],
        -0.527124199908,
        [4.597159829361, 0.5, 0.5, 4.263809221354, 0.5, 0.5],
    ),
}


@pytest.mark.parametrize("case", SKLEARN, ids=str)
def test_the_regression_is_scikit_learns(case: tuple[int, int, float]) -> None:
    count, width, c = case
    weight, bias, ratio = SKLEARN[case]
    x, good = rows(count, width)
    found, intercept = fit_logistic(x, good, 1 / c)
    np.testing.assert_allclose(found, weight, atol=1e-7)
    assert intercept == pytest.approx(bias, abs=1e-7)
    np.testing.assert_allclose(density_ratio(x @ found + intercept)[:6], ratio, atol=1e-6)


def test_where_full_steps_run_away_shorter_ones_descend() -> None:
    """Far rows and next to no penalty. The optimum is where the gradient, by hand, is 0."""
    x = np.array(
        [
            *([-4.0, 3.0, -144.0], [-2.0, 1.0, 1.0], [-1.0, 1.0, 3.0], [10.0, 23.0, -11.0], [37.0, -1.0, -2.0]),
            *([-1.0, 0.0, 2.0], [14.0, 1.0, -4.0], [6.0, -1.0, -7.0], [5.0, -4.0, -6.0], [1.0, 3.0, 0.0]),
        ]
    )
    good = np.array([1, 1, 0, 1, 0, 1, 0, 0, 1, 1])
    weight, bias = fit_logistic(x, good, 1e-7)
    p = 1 / (1 + np.exp(np.minimum(-(x @ weight + bias), 700)))
    error = np.where(good, 10 / 12, 10 / 8) * (p - good)
    assert abs(error.sum()) < 1e-7
    assert np.abs(x.T @ error + 1e-7 * weight).max() < 1e-7


def test_the_classifier_does_not_see_where_features_lie_and_how_long_they_are() -> None:
    x, good = rows(40, 4)
    plain, moved = PromptClassifier.fit(x, good), PromptClassifier.fit(1e3 * x - 7e4, good)
    np.testing.assert_allclose(moved.logit(1e3 * x - 7e4), plain.logit(x), atol=1e-6)
    z = (x - x.mean(0)) / math.sqrt(((x - x.mean(0)) ** 2).sum(1).mean())
    weight, bias = fit_logistic(z, good)
    np.testing.assert_allclose(plain.logit(x), z @ weight + bias, atol=1e-9)
    same = PromptClassifier.fit(np.ones((6, 3)), np.array([True] * 2 + [False] * 4))
    np.testing.assert_allclose(density_ratio(same.logit(np.ones((2, 3)))), 1.0, atol=1e-9, err_msg="nothing to tell by")


def test_bounds() -> None:
    # 1/e and e^2 lie in and below [0.5, 10]; a certain one is no overflow
    found = density_ratio(np.array([-1.0, 2.0, 1e5, -1e5]))
    np.testing.assert_allclose(found, [0.5, math.e**2, 10.0, 0.5])
    np.testing.assert_allclose(density_ratio(np.array([-1.0, 1.0]), 0.0, 2.0), [1 / math.e, 2.0])


def test_a_ratio_multiplies_the_loss_of_bad_answers_and_no_divisor() -> None:
    ratio = np.array([3.0, 3.0, 3.0, 0.5, 2.0, 10.0])
    labels = Labels(np.arange(6), np.array([1.0, 1, 1, 0, 0, 0]), np.ones(6), ratio)

    def loss(x: Tensor) -> LossOut:
        return bco_loss(candidates(x), labels, 0.2)

    r_C = 0.1 * (np.array(LOGP) - np.array(REF))
    good = [math.log1p(math.exp(-(r - 0.2))) for r in r_C[:3]]
    bad = [w * math.log1p(math.exp(r - 0.2)) for r, w in zip(r_C[3:], ratio[3:], strict=True)]
    assert mean(loss(tensor(LOGP))) == pytest.approx((sum(good) + sum(bad)) / 6, abs=1e-9)
    gradient = assert_gradient(loss, LOGP)
    plain = assert_gradient(lambda x: bco_loss(candidates(x), Labels.of(range(6), labels.good_M), 0.2), LOGP)
    np.testing.assert_allclose(gradient / plain, [1, 1, 1, 0.5, 2, 10], rtol=1e-5)


def test_what_is_refused() -> None:
    x, _ = rows(4, 2)
    with pytest.raises(ValueError, match=r"must find good and bad answers, there are 4 and 0; give both kinds"):
        fit_logistic(x, np.ones(4))
    with pytest.raises(ValueError, match=r"penalty \(0\) must be above 0"):
        fit_logistic(x, np.array([1, 0, 1, 0]), 0)
    with pytest.raises(ValueError, match=r"bco_density_min \(2\) must be at most bco_density_max \(1\)"):
        density_ratio(np.zeros(1), 2.0, 1.0)
    with pytest.raises(ValueError, match=r"ratio_M \(1\) must have as many entries as index_M \(2\)"):
        Labels(np.arange(2), np.ones(2), np.ones(2), np.ones(1))

"""Reward model losses against worked examples, rankings and ratings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import paddle
import pytest
from paddle import Tensor
from preference_cases import PAIRS, REWARDS, assert_gradient, assert_same, mean, tensor

from ernie_tune.objectives.listwise import Units, tier_edges
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import Pairs
from ernie_tune.objectives.reward import (
    even_cuts,
    expected_rating,
    levels_of,
    ordered_cuts,
    reward_metrics,
    reward_ordinal_loss,
    reward_pair_loss,
    reward_regression_loss,
)
from ernie_tune.objectives.unpaired import Labels

S = np.array([1.2, 0.3, -0.5, 0.7, 0.9, -1.5])
MARGINS = replace(PAIRS, margin_P=np.array([0.5, 0, 1]))


@pytest.mark.parametrize(
    ("pairs", "center", "value"), [(PAIRS, 0, 0.6082755407), (MARGINS, 0, 0.8079274372), (PAIRS, 0.01, 0.6384422074)]
)
def test_values_and_gradients(pairs: Pairs, center: float, value: float) -> None:
    assert mean(reward_pair_loss(tensor(S), pairs, center)) == pytest.approx(value, abs=6e-11)
    assert_gradient(lambda s: reward_pair_loss(s, pairs, center), S)


def test_only_centring_sees_a_constant() -> None:
    assert_same(lambda s: reward_pair_loss(s + 3, PAIRS, 0), lambda s: reward_pair_loss(s, PAIRS, 0), S)
    assert mean(reward_pair_loss(tensor(S + 3), PAIRS, 0.01)) > mean(reward_pair_loss(tensor(S), PAIRS, 0.01)) + 0.1


def test_metrics() -> None:
    assert reward_metrics(tensor(S), PAIRS) == {
        "accuracy": (2, 3),
        "margin": (pytest.approx(0.9), 3),
        "mean_reward": (pytest.approx(1.1), 6),
    }


def test_k_answers_in_order() -> None:
    pairs = tier_edges(Units.of(range(4), [0] * 4, range(4)))
    assert mean(reward_pair_loss(tensor(REWARDS), pairs, 0)) == pytest.approx(0.5271872102, abs=6e-11)
    assert reward_pair_loss(tensor(REWARDS), pairs, 0).count == pytest.approx(1), "a ranking counts as one pair"


def test_ratings_by_regression() -> None:
    labels = Labels.of([0, 2], [1.0, 0.25], np.array([1.0, 3.0]))
    assert mean(reward_regression_loss(tensor(S), labels)) == pytest.approx((0.2**2 + 3 * 0.75**2) / 4)
    assert_gradient(lambda s: reward_regression_loss(s, labels), S)
    assert reward_regression_loss(tensor(S), Labels.of([], [])).count == 0


# statsmodels 0.15.0, OrderedModel(distr="logit") with slope 1 and these cuts: minus log-likelihood
# and expected level / 4 of each answer
SCORES, LEVEL = np.array([1.2, 0.3, -0.5, 0.7, 0.9, -1.5, 2.4]), np.array([4, 2, 1, 3, 0, 0, 4])
CUTS = np.array([-1.3, -0.4, 0.9, 1.6])
NLL = [0.9130152524, 1.158858982028, 1.53733276893, 1.825633746922, 2.305083319769, 0.598138869382, 0.371100665948]
MEAN = [0.682978765453, 0.517178717008, 0.367977056571, 0.592568420909, 0.629474180439, 0.206546462132, 0.856524440001]
FREE = np.concatenate([CUTS[:1], np.log(np.expm1(np.diff(CUTS)))])


def test_ratings_as_levels_against_statsmodels() -> None:
    weight = np.array([1.0, 2, 1, 1, 3, 1, 1])
    ratings = Labels(np.arange(7), LEVEL / 4, weight)
    out = reward_ordinal_loss(tensor(SCORES), tensor(CUTS), ratings)
    assert float(out.total) == pytest.approx(float(weight @ NLL), abs=1e-9)
    assert out.count == weight.sum()
    np.testing.assert_allclose(expected_rating(SCORES, CUTS), MEAN, atol=1e-11)
    np.testing.assert_allclose(ordered_cuts(tensor(FREE)).numpy(), CUTS, atol=1e-12)

    def by_cuts(free_K: Tensor) -> LossOut:
        return reward_ordinal_loss(tensor(SCORES), ordered_cuts(free_K), ratings)

    assert_gradient(lambda s: reward_ordinal_loss(s, tensor(CUTS), ratings), SCORES)
    assert np.abs(assert_gradient(by_cuts, FREE)).min() > 1e-3, "every cut moves"
    some = Labels.of([4, 0], [0.0, 1.0])
    assert mean(reward_ordinal_loss(tensor(SCORES), tensor(CUTS), some)) == pytest.approx((NLL[4] + NLL[0]) / 2)


def test_where_statsmodels_finds_the_most_likely_cuts_there_is_no_slope() -> None:
    """60 rows, slope and four cuts fitted there: log-likelihood -74.70287468569."""
    i = np.arange(60)
    x = np.sin(1 + 0.7 * i) * 2
    level = np.clip(np.round(2 + x + 1.5 * np.sin(3.1 * i)), 0, 4)
    ratings = Labels.of(i, level / 4)
    score, cuts = (
        tensor(v, grad=True)
        for v in (1.254268760621 * x, [-2.028693722276, -0.920671557429, 0.601047888607, 1.999255288048])
    )
    out = reward_ordinal_loss(score, cuts, ratings)
    assert float(out.total) == pytest.approx(74.70287468569, abs=1e-8)
    out.total.backward()
    np.testing.assert_allclose(cuts.grad.numpy(), 0, atol=1e-4)
    assert abs(float(score.grad.numpy() @ x)) < 1e-4


def test_two_levels_are_a_logistic_regression() -> None:
    s = np.array([0.3, -2.0])
    out = reward_ordinal_loss(tensor(s), tensor([0.5]), Labels.of([0, 1], [1.0, 0.0]))
    assert float(out.total) == pytest.approx(np.log1p(np.exp(0.5 - 0.3)) + np.log1p(np.exp(-2.0 - 0.5)))
    assert_gradient(lambda x: reward_ordinal_loss(x, tensor([0.5]), Labels.of([0, 1], [1.0, 0.0])), s)


def test_cuts_stay_in_order_and_far_rewards_have_a_gradient() -> None:
    free = np.random.default_rng(0).standard_normal((50, 6)) * 8
    for row in free:
        assert (np.diff(ordered_cuts(tensor(row)).numpy()) > 0).all()
    cut_K = ordered_cuts(tensor(even_cuts(5))).numpy()
    above_K = 1 / (1 + np.exp(cut_K))
    np.testing.assert_allclose(-np.diff(np.concatenate([[1.0], above_K, [0.0]])), 0.2, atol=1e-12)
    s = paddle.to_tensor(np.array([-500.0, 500, 500, -500], np.float32), stop_gradient=False)
    reward_ordinal_loss(
        s, paddle.to_tensor(CUTS.astype("float32")), Labels.of(range(4), [1.0, 0.0, 0.5, 0.5])
    ).total.backward()
    np.testing.assert_allclose(s.grad.numpy(), [-1, 1, 1, -1], atol=1e-5)


def test_levels() -> None:
    assert levels_of(np.array([0.0, 0.25, 1.0, 0.7500001]), 5).tolist() == [0, 1, 4, 3]
    with pytest.raises(ValueError, match=r"^score \(0.3 of its scale\) must be one of rating_levels \(5\) even steps"):
        levels_of(np.array([0.25, 0.3]), 5)
    with pytest.raises(ValueError, match=r"^a.jsonl:3: score \(0.5 of its scale\) must be one of rating_levels \(4\)"):
        levels_of(np.array([0.5]), 4, "a.jsonl:3")
    nothing = reward_ordinal_loss(tensor(SCORES, grad=True), tensor(CUTS, grad=True), Labels.of([], []))
    assert (float(nothing.total), nothing.count, nothing.total.stop_gradient) == (0, 0, False)


def test_nothing_here() -> None:
    s = tensor(S, grad=True)
    for out in (
        reward_pair_loss(s, Pairs.of([], [])),
        reward_regression_loss(s, Labels.of([], [])),
    ):
        assert (float(out.total), out.count) == (0, 0)
        out.total.backward(retain_graph=True)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: reward_pair_loss(tensor(S), PAIRS, -1), r"center_rewards_coefficient \(-1\) must not be negative"),
    ],
)
def test_what_is_refused(act: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        act()

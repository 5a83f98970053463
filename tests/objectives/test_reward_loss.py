"""Reward model losses against methods.md 11.2, rankings and ratings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from preference_cases import PAIRS, REWARDS, assert_gradient, assert_same, mean, tensor

from ernie_tune.objectives.listwise import Units, tier_edges
from ernie_tune.objectives.preference import Pairs
from ernie_tune.objectives.reward import (
    reward_metrics,
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

"""Pairs among several answers of one prompt, against worked examples."""

from __future__ import annotations

import numpy as np
import pytest
from preference_cases import mean, tensor

from ernie_tune.objectives.listwise import edge_loss
from ernie_tune.objectives.online_pairs import PairRule, online_pairs
from ernie_tune.objectives.preference import Candidates, Pairs, implicit_rewards

R = np.array([1, 0, 0.5, 0])


def edges(pairs: Pairs) -> list[tuple[int, int]]:
    return list(zip(pairs.better_P.tolist(), pairs.worse_P.tolist(), strict=True))


def group_loss(pairs: Pairs) -> float:
    c = Candidates(tensor([-10.0, -12, -9, -15]), np.ones(4, int), tensor([-10.5, -11.5, -9.5, -14]))
    r_C = implicit_rewards(c, 0.1)
    assert r_C.numpy() == pytest.approx([0.05, -0.05, 0.05, -0.1])
    return mean(edge_loss(r_C, pairs))


@pytest.mark.parametrize(
    ("rule", "chosen", "value"),
    [
        (PairRule("all_pairs", max_pairs=9), [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)], 0.6447709193),
        (PairRule(), [(0, 1)], 0.6443966601),
        (PairRule("best_vs_worsts"), [(0, 1), (0, 3)], 0.6326768539),
        (PairRule("all_pairs", alpha=0.1, max_pairs=9), [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)], 0.6785845569),
        (PairRule("all_pairs", tau=0.5, max_pairs=9), [(0, 1), (0, 2), (0, 3), (2, 1), (2, 3)], 0.6641781364),
    ],
)
def test_the_group_of_the_specification(rule: PairRule, chosen: list[tuple[int, int]], value: float) -> None:
    pairs = online_pairs(R, rule)
    assert sorted(edges(pairs)) == chosen
    assert pairs.weight_P.sum() == pytest.approx(1), "a prompt counts once"
    assert group_loss(pairs) == pytest.approx(value, abs=6e-11)


def test_rules() -> None:
    everything = PairRule("all_pairs", max_pairs=99)
    assert edges(online_pairs(np.ones(4), everything)) == [], "equal rewards give no pair"
    assert edges(online_pairs(R, PairRule(min_gap=1.1))) == []
    assert edges(online_pairs(R, PairRule(), may_win_G=np.array([False, True, True, True]))) == [(2, 1)]
    assert edges(online_pairs(R, PairRule(), answer_G=["a", "a", "b", "c"])) == [(0, 3)], (
        "identical answers are no pair"
    )
    assert edges(online_pairs(R, PairRule(max_length_ratio=2.0), length_G=np.array([10, 21, 10, 20]))) == [(0, 3)]
    assert edges(online_pairs(R, PairRule(), length_G=np.array([10, 5, 10, 9]))) == [(0, 3)], (
        "then the nearest in length"
    )
    assert edges(online_pairs(R, PairRule("all_pairs"))) == [(0, 1), (0, 3), (0, 2), (2, 1)], (
        "four at most, largest gaps first"
    )
    assert edges(online_pairs(R, PairRule("correct_vs_wrong"))) == [(0, 1), (0, 3)]
    assert edges(online_pairs(R, PairRule("correct_vs_wrong", correct=0.5))) == [(0, 1), (0, 3), (2, 1), (2, 3)]
    assert edges(online_pairs(np.array([1.0]), everything)) == []


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pair mode \('first'\) must be one of best_worst"):
        PairRule("first")
    with pytest.raises(ValueError, match=r"min_gap \(0\) must be positive and max_pairs \(4\) at least 1"):
        PairRule(min_gap=0)

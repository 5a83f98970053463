"""Rankings and ratings against worked examples: values, gradients, ties, units side by side, what
leaves a loss unchanged.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import paddle
import pytest
from paddle import Tensor
from preference_cases import REWARDS, assert_gradient, assert_same, mean, tensor, value_and_grad

from ernie_tune.objectives import listwise
from ernie_tune.objectives.listwise import (
    Units,
    bernoulli_kl_loss,
    edge_loss,
    infonca_loss,
    lipo_lambda_loss,
    plackett_luce_loss,
    rating_edges,
    score_margins,
    soft_edges,
    tier_edges,
)
from ernie_tune.objectives.loss import LossOut

Loss = Callable[[Tensor], LossOut]


def units(values: list[float], index: list[int] | None = None) -> Units:
    """One unit."""
    return Units.of(range(len(values)) if index is None else index, [0] * len(values), values)


ORDER, TIED = units([0, 1, 2, 3]), units([0, 1, 1, 2])
RATED = units([5, 4, 4, 1])

ORACLE: dict[str, tuple[float, Loss]] = {
    "plackett_luce": (2.5417399240, lambda r: plackett_luce_loss(r, ORDER, scale="sum")),
    "per_pair": (2.5417399240 / 3, lambda r: plackett_luce_loss(r, ORDER)),
    "top_1": (1.1052582044, lambda r: plackett_luce_loss(r, ORDER, 1, "sum")),
    "two": (0.5981388694, lambda r: plackett_luce_loss(r, units([0, 1]))),
    "edges": (0.5271872102, lambda r: edge_loss(r, tier_edges(ORDER))),
    "edge_sum": (3.1631232611, lambda r: LossOut(edge_loss(r, tier_edges(ORDER, "edge")).total, 1.0)),
    "tiers": (2.1127173440, lambda r: plackett_luce_loss(r, TIED, scale="sum")),
    "tier_edges": (0.5084332426, lambda r: edge_loss(r, tier_edges(TIED))),
    "lipo_lambda": (4.5743560759, lambda r: lipo_lambda_loss(r, units([3, 2, 1, 0]))),
    "margins": (0.5561820602, lambda r: edge_loss(r, rating_edges(RATED, "linear", 0.05))),
    "soft_bt": (0.5731572303, lambda r: edge_loss(r, soft_edges(RATED, 1.0))),
    "infonca": (1.2279181241, lambda r: infonca_loss(r, RATED)),
    "bernoulli_kl": (0.0694371404, lambda r: bernoulli_kl_loss(r, RATED, 0.5)),
}


@pytest.mark.parametrize("name", ORACLE)
def test_values_and_gradients(name: str) -> None:
    value, loss = ORACLE[name]
    assert mean(loss(tensor(REWARDS))) == pytest.approx(value, abs=6e-11)
    gradient = assert_gradient(loss, REWARDS)
    assert abs(gradient.sum()) < 1e-12, "only differences of rewards count"


@pytest.mark.parametrize("name", ORACLE)
def test_a_constant_added_to_all_rewards_changes_nothing(name: str) -> None:
    loss = ORACLE[name][1]
    assert_same(lambda r: loss(r + 7.0), loss, REWARDS)


def test_printed_gradients() -> None:
    luce, nca = (value_and_grad(ORACLE[name][1], REWARDS)[1] for name in ("plackett_luce", "infonca"))
    np.testing.assert_allclose(luce, [-0.6688746268, -0.3235860519, 0.1688124594, 0.8236482193], atol=6e-11)
    # the specification prints .0236115836 for the third, and so a sum of -1e-8 instead of 0;
    # softmax(r) - q by hand is this
    np.testing.assert_allclose(nca, [-0.2389758329, 0.0613740131, 0.0236115936, 0.1539902262], atol=6e-11)
    q, soft = (np.exp(x) / np.exp(x).sum() for x in (np.array([5.0, 4, 4, 1]), REWARDS))
    np.testing.assert_allclose(nca, soft - q, atol=1e-14)


def test_numbers_of_edges() -> None:
    assert [len(p) for p in (tier_edges(ORDER), tier_edges(TIED), rating_edges(RATED), soft_edges(RATED))] == [
        6,
        5,
        5,
        6,
    ]
    assert tier_edges(ORDER).weight_P == pytest.approx(1 / 6)
    assert tier_edges(ORDER, "edge").weight_P == pytest.approx(1)


def test_infoncas_floor_is_the_entropy_of_its_target() -> None:
    assert mean(infonca_loss(tensor([5.0, 4, 4, 1]), RATED)) == pytest.approx(1.0231654769, abs=6e-11)


def one_pair(r: Tensor) -> LossOut:
    """DPO in one line, on two rewards."""
    return LossOut(-paddle.nn.functional.log_sigmoid(r[0] - r[1]), 1.0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda r: plackett_luce_loss(r, units([0, 1])),
        lambda r: plackett_luce_loss(r, units([3, 7])),
        lambda r: edge_loss(r, tier_edges(units([0, 1]))),
        lambda r: infonca_loss(r, units([1.0, 0.0]), 1e-3),
        lambda r: edge_loss(r, soft_edges(units([2.0, 1.0]), 1e-3)),
        lambda r: bernoulli_kl_loss(r, units([2.0, 1.0]), 1e3),
    ],
    ids=[
        "plackett_luce",
        "any tier numbers",
        "edges",
        "one-hot infonca",
        "soft_bt, tau to 0",
        "bernoulli_kl, eta to inf",
    ],
)
def test_two_answers_are_dpo(loss: Loss) -> None:
    assert_same(loss, one_pair, np.array([0.3, -0.1]))


def test_soft_bradley_terry_becomes_pairwise_and_ties_are_even() -> None:
    hard = edge_loss(tensor(REWARDS), tier_edges(units([0, 1, 2, 3]), "edge"))
    soft = edge_loss(tensor(REWARDS), soft_edges(units([4, 3, 2, 1]), 1e-3, "edge"))
    assert float(hard.total) == pytest.approx(float(soft.total), abs=1e-12)
    assert soft_edges(units([2, 2])).p_P.tolist() == [0.5]
    assert value_and_grad(lambda r: edge_loss(r, soft_edges(units([2, 2]))), np.array([0.4, 0.1]))[1][0] > 0, (
        "pulled together"
    )


def test_plackett_luce_by_counting_orders() -> None:
    """Over all orders of four answers the probabilities add up to 1; a two-answer tier adds up its
    two orders' stages, each without the other.
    """
    r = tensor(REWARDS)
    orders = [
        np.exp(-float(plackett_luce_loss(r, units(list(o)), scale="sum").total))
        for o in itertools.permutations(range(4))
    ]
    assert sum(orders) == pytest.approx(1, abs=1e-12)
    e = np.exp(REWARDS)
    tied = -np.log(e[0] / e.sum()) - np.log(e[1] / (e[1] + e[3])) - np.log(e[2] / (e[2] + e[3]))
    assert float(plackett_luce_loss(r, TIED, scale="sum").total) == pytest.approx(tied, abs=1e-12)


def test_members_of_a_tier_may_trade_places() -> None:
    swapped = REWARDS[[0, 2, 1, 3]]
    for loss in (ORACLE["tiers"][1], ORACLE["tier_edges"][1], ORACLE["soft_bt"][1], ORACLE["infonca"][1]):
        assert mean(loss(tensor(swapped))) == pytest.approx(mean(loss(tensor(REWARDS))), abs=1e-12)


SEVERAL: dict[str, Callable[[Tensor, Units], LossOut]] = {
    "plackett_luce": lambda r, u: plackett_luce_loss(r, u),
    "top_2": lambda r, u: plackett_luce_loss(r, u, 2),
    "edges": lambda r, u: edge_loss(r, tier_edges(u)),
    "margins": lambda r, u: edge_loss(r, rating_edges(u, "linear", 0.1)),
    "soft_bt": lambda r, u: edge_loss(r, soft_edges(u)),
    "lipo_lambda": lipo_lambda_loss,
    "infonca": infonca_loss,
    "bernoulli_kl": bernoulli_kl_loss,
}


@pytest.mark.parametrize("name", SEVERAL)
def test_units_of_any_size_stand_side_by_side(name: str) -> None:
    """Three units of 3, 2 and 1 answers, interleaved, with weights: the sum of each alone; the one
    alone is not counted.
    """
    loss = SEVERAL[name]
    r = np.random.default_rng(0).normal(size=7)
    whole = Units.of([6, 0, 3, 1, 2, 5], [0, 1, 0, 1, 0, 2], [1, 0, 0, 3, 2, 1], np.array([2.0, 0.5, 4.0]))
    parts = [([6, 3, 2], [1, 0, 2], 2.0), ([0, 1], [0, 3], 0.5), ([5], [1], 4.0)]
    alone = [loss(tensor(r), Units.of(i, [0] * len(i), v, np.array([w]))) for i, v, w in parts]
    out = loss(tensor(r), whole)
    assert float(out.total) == pytest.approx(sum(float(o.total) for o in alone), abs=1e-12)
    assert out.count == pytest.approx(2.5)
    assert [o.count for o in alone] == pytest.approx([2, 0.5, 0])
    assert_gradient(lambda x: loss(x, whole), r)


@pytest.mark.parametrize("name", SEVERAL)
def test_twice_a_unit_leaves_the_mean(name: str) -> None:
    loss, v = SEVERAL[name], [2.0, 1.0, 0.0, 0.5]
    twice = Units.of([0, 1, 2, 3] * 2, [0] * 4 + [1] * 4, v * 2)
    assert_same(lambda x: loss(x, twice), lambda x: loss(x, units(v)), REWARDS)


@pytest.mark.parametrize("name", SEVERAL)
def test_no_units_and_no_comparison(name: str) -> None:
    r = tensor(REWARDS, grad=True)
    out = SEVERAL[name](r, Units.of([], [], []))
    out.total.backward()
    assert (float(out.total), out.count) == (0, 0)
    assert not r.grad.numpy().any()
    if name not in ("soft_bt", "infonca"):  # these two pull answers of equal value together
        tied = SEVERAL[name](r, units([1, 1, 1, 1]))
        assert (float(tied.total), tied.count) == (0, 0)


@pytest.mark.parametrize("name", SEVERAL)
def test_extremes_stay_numbers(name: str) -> None:
    r = paddle.to_tensor([-1e4, 0.0, 1e4, 1.0], dtype="float32", stop_gradient=False)
    out = SEVERAL[name](r, units([0.0, 1.0, 2.0, 2.0]))
    out.total.backward()
    assert np.isfinite([float(out.total), *r.grad.numpy()]).all()


def test_lipo_ranks_by_the_present_rewards() -> None:
    # both orders of two answers: ranks 1 and 2, D = 1 and 1/log2(3); G = 1 and 0
    weight = 1 - 1 / np.log2(3)
    for r in ([0.3, -0.1], [-0.1, 0.3]):
        expected = weight * np.log1p(np.exp(-(r[0] - r[1])))
        assert mean(lipo_lambda_loss(tensor(r), units([1, 0]))) == pytest.approx(expected, abs=1e-12)
    assert (
        len(
            {
                round(mean(lipo_lambda_loss(tensor(REWARDS[list(o)]), units([3, 2, 1, 0]))), 9)
                for o in itertools.permutations(range(4))
            }
        )
        == 24
    )


def test_margins_from_scores() -> None:
    assert score_margins(np.array([5.0, 3]), np.array([1.0, 2]), "log", 0.5) == pytest.approx([0.5 * np.log(4), 0])
    assert score_margins(np.array([5.0]), np.array([1.0]), "none", 9.0).tolist() == [0]


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda: score_margins(np.ones(1), np.ones(1), "log", 1.0),
            r"score difference \(0\) must be positive for margin log",
        ),
        (
            lambda: score_margins(np.ones(1), np.ones(1), "square", 1.0),
            r"margin \('square'\) must be none, linear or log",
        ),
        (lambda: soft_edges(RATED, 0), r"tau \(0\) must be positive"),
        (lambda: infonca_loss(tensor(REWARDS), RATED, 0), r"alpha \(0\) must be positive"),
        (lambda: plackett_luce_loss(tensor(REWARDS), ORDER, 0), r"top_k \(0\) must be at least 1"),
        (lambda: plackett_luce_loss(tensor(REWARDS), ORDER, scale="mean"), r"scale \('mean'\) must be pair or sum"),
        (lambda: tier_edges(ORDER, "row"), r"edge_weight \('row'\) must be unit or edge"),
        (
            lambda: Units.of([0, 1], [0], [1, 2]),
            r"unit_M \(1\) and value_M \(2\) must have as many entries as index_M \(2\)",
        ),
        (lambda: Units.of([0], [1], [1], np.ones(1)), r"weight_U \(1 units\) must have an entry for unit 1"),
    ],
)
def test_what_is_refused(act: Callable[[], object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        act()


def competes_with_its_own_tier(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    return np.arange(values.shape[1])[None].repeat(len(values), 0)


def all_lower_than_themselves(values: np.ndarray, real: np.ndarray) -> np.ndarray:
    return -REAL_TIERS(values, real)


REAL_TIERS = listwise._dense_tiers


@pytest.mark.parametrize("mutant", [competes_with_its_own_tier, all_lower_than_themselves])
def test_mutants_are_noticed(mutant: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listwise, "_dense_tiers", mutant)
    assert abs(mean(ORACLE["tiers"][1](tensor(REWARDS))) - ORACLE["tiers"][0]) > 1e-3

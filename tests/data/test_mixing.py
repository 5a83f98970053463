"""Proportions, order and resumption of mixtures, by counting."""

import itertools
from collections import Counter

import pytest

from ernie_tune.data.mixing import STRATEGIES, Mixture, Shard, parse_probs, permute, quotas

SOURCES = [[f"a{i}" for i in range(30)], [f"b{i}" for i in range(10)], [f"c{i}" for i in range(6)]]
PROBS = "0.5,0.3,0.2"


def epoch(mixture, e):
    return [mixture[i] for i in range(e * len(mixture), (e + 1) * len(mixture))]


def kinds(rows):
    return dict(Counter(name[0] for name in rows))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 1025])
def test_permute_is_a_permutation(n) -> None:
    assert sorted(permute(i, n, 7, 3) for i in range(n)) == list(range(n))


def test_permute_is_uniform() -> None:
    # Over many keys each of the 24 orders of four appears about equally often: chi-square, 23
    # degrees of freedom, p = 0.001.
    orders = Counter(tuple(permute(i, 4, key) for i in range(4)) for key in range(4800))
    assert len(orders) == 24
    assert sum((count - 200) ** 2 / 200 for count in orders.values()) < 49.7


def test_permute_forgets_neighbours() -> None:
    places = [permute(i, 10_000, 1) for i in range(10_000)]
    adjacent = sum(abs(b - a) == 1 for a, b in itertools.pairwise(places))
    assert adjacent < 12  # 2 are expected
    assert abs(sum(places[:1000]) / 1000 - 4999.5) < 400  # standard error 87


def test_permute_never_changes() -> None:
    # A saved run must go on with another version of Python, numpy or this library.
    assert [permute(i, 10, 42, 0) for i in range(10)] == GOLDEN


def test_quotas() -> None:
    # 30, 10 and 6 rows at 0.5, 0.3, 0.2: rows per unit of probability are 60, 33.3 and 30, so 30
    # slots exhaust the first source, 60 all.
    probs = [0.5, 0.3, 0.2]
    assert quotas("concat", [30, 10, 6], probs) == [30, 10, 6]
    assert quotas("interleave_under", [30, 10, 6], probs) == [15, 9, 6]
    assert quotas("interleave_over", [30, 10, 6], probs) == [30, 18, 12]
    assert quotas("random", [30, 10, 6], probs, 10) == [5, 3, 2]
    assert sum(quotas("random", [30, 10, 6], [1 / 3] * 3)) == 46


def test_parse_probs() -> None:
    assert parse_probs("0.8,0.2", 2) == [0.8, 0.2]
    assert parse_probs([4, 1], 2) == [0.8, 0.2]
    assert parse_probs(None, 4) == [0.25] * 4


def test_concat_visits_every_row_once_an_epoch() -> None:
    mixture = Mixture(SOURCES)
    first, second = epoch(mixture, 0), epoch(mixture, 1)
    assert sorted(first) == sorted(second) == sorted(itertools.chain(*SOURCES))
    assert first != second
    assert first != epoch(Mixture(SOURCES, seed=1), 0)
    assert first == epoch(Mixture(SOURCES), 0)
    assert len({name[0] for name in first[:12]}) > 1  # sources are mixed, not laid end to end
    assert [name[0] for name in first] != [name[0] for name in second]


def test_without_shuffle_order_is_kept() -> None:
    assert epoch(Mixture(SOURCES, shuffle=False), 1) == list(itertools.chain(*SOURCES))


def test_interleave_under_repeats_nothing() -> None:
    mixture = Mixture(SOURCES, PROBS, "interleave_under")
    rows = epoch(mixture, 0)
    assert kinds(rows) == {"a": 15, "b": 9, "c": 6}
    assert len(set(rows)) == 30
    # The next epoch begins with what this one left out.
    assert {name for name in rows + epoch(mixture, 1) if name[0] == "a"} == set(SOURCES[0])


def test_interleave_over_misses_nothing() -> None:
    rows = epoch(Mixture(SOURCES, PROBS, "interleave_over"), 0)
    assert kinds(rows) == {"a": 30, "b": 18, "c": 12}
    assert set(rows) == set(itertools.chain(*SOURCES))
    assert max(Counter(rows).values()) == 2


def test_random_pools_cover_sources_over_epochs() -> None:
    mixture = Mixture(SOURCES, PROBS, "random", samples_each_epoch=10)
    epochs = [epoch(mixture, e) for e in range(6)]
    assert all(kinds(rows) == {"a": 5, "b": 3, "c": 2} for rows in epochs)
    taken = [{name for name in rows if name[0] == "a"} for rows in epochs]
    assert set.union(*taken) == set(SOURCES[0])
    assert taken[0] not in [
        {name for name in epoch(mixture, e) if name[0] == "a"} for e in range(6, 12)
    ]  # shuffled anew


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shards_together_are_the_sequence(strategy) -> None:
    mixture = Mixture(SOURCES, None, strategy)
    shards = [Shard(mixture, rank, 4) for rank in range(4)]
    rows = [next(shard) for _ in range(25) for shard in shards]
    assert rows == [mixture[i] for i in range(100)]  # across the ends of epochs too
    assert shards[0].epoch == 100 / len(mixture)


def test_resume_also_on_another_number_of_ranks() -> None:
    mixture = Mixture(SOURCES, PROBS, "interleave_over")
    whole = list(itertools.islice(Shard(mixture), 120))
    before = [Shard(mixture, rank, 4) for rank in range(4)]
    taken = [next(shard) for _ in range(15) for shard in before]
    state = before[0].state_dict()
    after = [Shard(Mixture(SOURCES, PROBS, "interleave_over"), rank, 2) for rank in range(2)]
    for shard in after:
        shard.load_state_dict(state)
    taken += [next(shard) for _ in range(30) for shard in after]
    assert taken == whole


def test_resume_refuses_other_data() -> None:
    state = Shard(Mixture(SOURCES)).state_dict()
    shard = Shard(Mixture(SOURCES[:2]))
    with pytest.raises(ValueError, match=r"lengths \(\[30, 10\]\) must be that of the saved run \(\[30, 10, 6\]\)"):
        shard.load_state_dict(state)


def test_probs_without_effect_are_announced() -> None:
    with pytest.warns(UserWarning, match="have no effect with mix_strategy concat"):
        Mixture(SOURCES, PROBS)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"probs": "0.5,0.5"}, "must have one number for each of the 3 data sets"),
        ({"probs": "0.5,0.5,0"}, "must be above 0"),
        ({"probs": "0.5,0.5,nan"}, "must be above 0"),
        ({"strategy": "shuffle"}, r"mix_strategy \('shuffle'\) must be one of concat"),
        ({"sources": [[1], []]}, r"data sets \(\[1, 0\] rows\) must have at least one row"),
        ({"sources": []}, "must have at least one row"),
        ({"samples_each_epoch": 5}, "go with mix_strategy random, not concat"),
        ({"samples_each_epoch": 0, "strategy": "random"}, "must be above 0"),
    ],
)
def test_complaints(arguments, text) -> None:
    with pytest.raises(ValueError, match=text):
        Mixture(**{"sources": SOURCES, **arguments})


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_must_be_in_range(rank, size) -> None:
    with pytest.raises(ValueError, match=r"rank \(-?\d\) must be in \[0, size\)"):
        Shard(Mixture(SOURCES), rank, size)


GOLDEN = [5, 7, 6, 8, 9, 2, 0, 4, 1, 3]  # recorded once

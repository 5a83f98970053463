"""A round dealt over ranks and windows: those of one process, whatever the number of ranks."""

from __future__ import annotations

import itertools

import pytest

from ernie_tune.train.dealing import Deal, Seat, seated, seats


@pytest.mark.parametrize(("windows", "size"), [(1, 1), (1, 4), (3, 2), (2, 4)])
def test_every_rank_has_as_many_groups_in_each_window(windows: int, size: int) -> None:
    deal, count = Deal(windows, size), 24
    mine = [set(deal.own(range(count), rank)) for rank in range(size)]
    assert sorted(itertools.chain(*mine)) == list(range(count))
    for window in deal.passes(count, 2, seed=3, round_number=5):
        assert {len(mine[rank] & set(window)) for rank in range(size)} == {count // windows // size}


def test_windows_do_not_depend_on_the_ranks() -> None:
    told = [Deal(4, size).passes(16, 3, seed=1, round_number=2) for size in (1, 2, 4)]
    assert told[0] == told[1] == told[2]


def test_each_pass_holds_the_round_in_other_windows() -> None:
    passes = Deal(4, 1).passes(16, 2, seed=1, round_number=0)
    assert len(passes) == 8
    for some in (passes[:4], passes[4:]):
        assert sorted(itertools.chain(*some)) == list(range(16))
    assert sorted(map(sorted, passes[:4])) != sorted(map(sorted, passes[4:]))
    assert Deal(1, 1).passes(3, 2, seed=1, round_number=0) == [[0, 1, 2], [0, 1, 2]]


def test_windows_that_do_not_come_out_even() -> None:
    sizes = sorted(len(window) for window in Deal(3, 1).passes(7, 1, seed=1, round_number=0))
    assert sizes == [2, 2, 3]


def test_the_round_is_what_one_process_would_keep() -> None:
    """Two ranks sample in turn; what differs comes first, in the order in which it was drawn."""
    first = seats([0, 1, 0, 1], [[True, False], [False, True]], [0, 0])
    assert first == [Seat(0, 0, True), Seat(1, 0, False), Seat(0, 1, False), Seat(1, 1, True)]
    again = seats([0, 1], [[True], [False]], [2, 2])
    assert again == [Seat(0, 2, True), Seat(1, 2, False)]
    assert seated([*first, *again], 4) == [
        Seat(0, 0, True),
        Seat(1, 1, True),
        Seat(0, 2, True),
        Seat(1, 0, False),
    ]

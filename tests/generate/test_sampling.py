"""generate/sampling.py against closed forms: what is kept, how often each token is drawn, what it
is said to have been likely.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ernie_tune.generate.sampling import SamplingParams, choose, choose_alike, heaviest, kept, whole


class Given:
    """A generator whose next numbers are known."""

    def __init__(self, *numbers: float) -> None:
        self.left = list(numbers)

    def random(self) -> float:
        return self.left.pop(0)


def draw(
    scores: Any, uniform: float = 0.5, seen: Any = (), answer: Any = (), allowed: Any = None, **params: Any
) -> Any:
    rng: Any = Given(uniform)
    return choose(np.asarray(scores, np.float32), SamplingParams(**params), rng, seen, answer, allowed)


def probabilities(
    scores: np.ndarray, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Any:
    """By sorting everything, the other way round: the closed form."""
    p = np.exp((scores - scores.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    order = order[p[order] >= min_p * p.max()]
    order = order[: top_k or None]
    share = p[order] / p[order].sum()
    order = order[np.cumsum(share) - share < top_p]
    out = np.zeros_like(p)
    out[order] = p[order] / p[order].sum()
    return out


SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 2.5},
    {"temperature": 1.0, "top_k": 4},
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.3, "top_k": 9, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 1.0, "min_p": 0.05, "top_k": 7, "top_p": 0.9},
]


@pytest.mark.parametrize("params", SETTINGS, ids=str)
def test_draws_follow_the_closed_form(params: dict[str, Any]) -> None:
    """A regular grid of 5,000 numbers instead of chance: each token is drawn its share of them, to
    one in each direction.
    """
    scores = np.random.default_rng(3).normal(0, 2, 24).astype(np.float32)
    want = probabilities(scores.astype(np.float64), **params)
    grid = (np.arange(5_000) + 0.5) / 5_000
    rng: Any = Given(*grid)
    found = [choose(scores, SamplingParams(**params), rng) for _ in grid]
    count = np.bincount([c.token_id for c in found], minlength=24)
    np.testing.assert_allclose(count, want * 5_000, atol=1.0 + 1e-6)
    full = probabilities(scores.astype(np.float64), params["temperature"])
    for choice in found[::500]:
        assert choice.logp == pytest.approx(np.log(full[choice.token_id]), abs=1e-9)
        assert choice.sampled_logp == pytest.approx(np.log(want[choice.token_id]), abs=1e-9)


def test_real_generators_give_the_same_shares() -> None:
    scores = np.log(np.array([0.5, 0.3, 0.2], np.float32))
    rng = np.random.Generator(np.random.Philox(key=3))
    picked = [choose(scores, SamplingParams(temperature=2.0), rng).token_id for _ in range(20_000)]
    want = np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum()
    got = np.bincount(picked, minlength=3) / 20_000
    assert (np.abs(got - want) < 4 * np.sqrt(want * (1 - want) / 20_000)).all()


SHAPES = {
    "flat": lambda rng, n: rng.normal(0, 1e-3, n),
    "equal": lambda rng, n: np.zeros(n),
    "normal": lambda rng, n: rng.normal(0, 2, n),
    "peaked": lambda rng, n: rng.normal(0, 6, n),
    "ties": lambda rng, n: rng.integers(0, 4, n).astype(float),
    "one": lambda rng, n: np.where(np.arange(n) == 77, 0.0, -60.0),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [100, 103_424])
def test_what_is_kept_of_a_whole_vocabulary(shape: str, size: int) -> None:
    """Selection against sorting; sums of 100,000 numbers in another order may differ in the last
    place, so by one id.
    """
    weights = np.exp(SHAPES[shape](np.random.default_rng(0), size))
    weights[5] = 0.0  # a banned id
    order = np.argsort(-weights, kind="stable")
    upto = np.cumsum(weights[order])
    for top_p in (1e-9, 0.1, 0.5, 0.9, 0.999):
        want = order[upto - weights[order] < top_p * upto[-1]]
        found = kept(weights, 0, top_p)
        assert found is not None
        assert (np.diff(found) > 0).all()
        assert len(np.setxor1d(found, want)) <= 1
        assert order[0] in found
    for top_k in (1, 7, size - 1):
        assert np.array_equal(kept(weights, top_k, 1.0), np.sort(order[:top_k]))
    assert kept(weights, size, 1.0) is None
    assert kept(weights, 0, 1.0) is None
    assert heaviest(weights, 9) == order[:9].tolist()


def test_top_p_by_hand() -> None:
    weights = np.array([0.1, 0.4, 0.3, 0.2])
    assert kept(weights, 3, 1.0).tolist() == [1, 2, 3]  # type: ignore[union-attr]
    # 0.4 does not reach 0.65, 0.7 does
    assert kept(weights, 0, 0.65).tolist() == [1, 2]  # type: ignore[union-attr]
    assert kept(weights, 0, 1e-9).tolist() == [1]  # type: ignore[union-attr]
    assert kept(weights, 0, 1.0, 0.5).tolist() == [1, 2, 3]  # type: ignore[union-attr]
    assert draw(np.log(weights), temperature=1.0, top_p=0.65).sampled_logp == pytest.approx(np.log(4 / 7))
    assert draw(np.log(weights), temperature=1.0, top_p=0.65).logp == pytest.approx(np.log(0.4))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_chosen_one_has_one_log_probability(temperature: float) -> None:
    """Bit for bit the same among the likeliest as by itself, in order, without what is banned."""
    for seed in range(20):
        scores = np.random.default_rng(seed).normal(0, 3, 300)
        choice = draw(scores, 0.4, temperature=temperature, top_logprobs=300, banned_ids=(3, 9))
        assert dict(choice.top)[choice.token_id] == choice.logp
        assert len(choice.top) == 298
        assert [p for _, p in choice.top] == sorted((p for _, p in choice.top), reverse=True)
        assert np.exp([p for _, p in choice.top]).sum() == pytest.approx(1.0)


def test_the_ends_of_the_unit_interval() -> None:
    """0 draws the first id that has weight, the largest number below 1 the last one; an id without
    weight is never drawn.
    """
    scores = [-np.inf, 1.0, -np.inf, 0.5, -np.inf]
    last = float(np.nextafter(1.0, 0.0))
    assert [draw(scores, u, temperature=1.0).token_id for u in (0.0, last)] == [1, 3]
    assert [draw([2.0, 1.0, 0.5], u, temperature=1.0, banned_ids=(0, 2)).token_id for u in (0.0, last)] == [1, 1]
    assert draw([2.0, 1.0, 0.5], last, temperature=1.0, banned_ids=(0, 2)).logp == 0.0


def test_one_number_a_token_whatever_happens_with_it() -> None:
    """So that a sample can be taken up again at any token."""
    scores = np.zeros(4, np.float32)
    for params, used in ((SamplingParams(temperature=1.0), 1), (SamplingParams(), 0)):
        for forced in (None, 2):
            rng: Any = Given(0.3)
            choice = choose(scores, params, rng, forced=forced)
            assert len(rng.left) == 1 - used
            assert choice.token_id == 2 if forced else choice.token_id in (0, 1)
            assert choice.logp == pytest.approx(np.log(0.25))
            assert choice.sampled_logp == (choice.logp if used and forced is None else 0.0)


def test_a_temperature_of_almost_nothing_is_greedy() -> None:
    first = draw([1.0, 3.0, 2.0, 60.0], temperature=5e-324, banned_ids=(3,))
    assert (first.token_id, first.logp) == (1, 0.0)
    second = draw([5.0, 5.0, -1.0, 0.0], temperature=5e-324, banned_ids=(3,))
    assert second.token_id in (0, 1)
    assert second.logp == pytest.approx(np.log(0.5))


def test_frequency_and_presence_penalties() -> None:
    """Worked out by hand: 3 - (0.5 + 2 * 0.75) = 1 falls behind 2 - 0; what the prompt holds is not
    counted; `logp` is the model's own.
    """
    scores, plain = [3.0, 2.0, 0.0], np.array([3.0, 2.0, 0.0]) - np.log(np.exp([3.0, 2.0, 0.0]).sum())
    for answer, want in (([0, 0], 1), ([1], 0)):
        choice = draw(scores, answer=answer, frequency_penalty=0.75, presence_penalty=0.5)
        assert choice.token_id == want
        assert choice.logp == pytest.approx(plain[want])
    assert [draw(scores, answer=a, presence_penalty=-1.5).token_id for a in ([1, 1], [])] == [1, 0]
    tempered = {"temperature": 1.0, "top_k": 1, "frequency_penalty": 2.0}
    assert [draw(scores, answer=a, **tempered).token_id for a in ([0], [0, 1, 1, 1])] == [1, 0]
    drawn = draw(scores, 0.0, answer=[0], temperature=1.0, frequency_penalty=1.0)
    assert drawn.logp == pytest.approx(plain[0])
    assert drawn.sampled_logp == pytest.approx(2.0 - np.log(np.exp([2.0, 2.0, 0.0]).sum()))


def test_constraints_and_what_leaves_nothing() -> None:
    scores = [3.0, 2.0, 0.0]
    only = np.array([False, True, True])
    assert draw(scores, allowed=only).token_id == 1
    choice = draw(scores, 0.999, allowed=only, temperature=1.0)
    assert choice.token_id == 2
    assert choice.sampled_logp == pytest.approx(-np.log(1 + np.e**2))
    assert choice.logp == pytest.approx(-np.log(np.exp(scores).sum()))
    for params in ({}, {"temperature": 1.0}):
        with pytest.raises(ValueError, match=r"tokens that may follow \(0\) must be at least 1"):
            draw(scores, allowed=only, banned_ids=(1, 2), **params)


@pytest.mark.parametrize(("change", "match"), [
    ({"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
    ({"temperature": -1.0}, r"temperature \(-1.0\)"),
    ({"top_p": 0.0}, r"top_p \(0.0\)"),
    ({"top_k": -1}, r"top_k \(-1\)"),
    ({"min_p": 1.5}, r"min_p \(1.5\) must be in \[0, 1\]"),
    ({"frequency_penalty": 2.5}, r"frequency_penalty \(2\.5\) must be from -2 to 2"),
    ({"presence_penalty": 2.5}, r"presence_penalty \(2\.5\) must be from -2 to 2"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty"),
    ({"n": 0}, r"n \(0\)"),
    ({"n": 2}, r"n \(2\) must be 1 with temperature \(0\)"),
])  # fmt: skip
def test_bad_sampling_parameters(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SamplingParams(**change)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("vocabulary", [50, 200_000])
def test_rows_drawn_together_are_drawn_as_alone(temperature: float, vocabulary: int) -> None:
    """To the last bit, and each generator goes on as if alone; a row without a choice is told."""
    params = SamplingParams(temperature=temperature, banned_ids=(3, 7))
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((5, vocabulary)).astype(np.float32) * 3
    together = [np.random.default_rng(i) for i in range(5)]
    alone = [np.random.default_rng(i) for i in range(5)]
    for _ in range(3):
        found = choose_alike(scores, params, together)
        assert found == [choose(row, params, own) for row, own in zip(scores, alone, strict=True)]
    scores[2] = -np.inf
    assert [choice is None for choice in choose_alike(scores, params, together)] == [False, False, True, False, False]


def test_what_can_be_drawn_together() -> None:
    assert whole(SamplingParams(temperature=1.0, banned_ids=(1,), stop_ids=(2,)))
    assert whole(SamplingParams(temperature=0.0, banned_ids=(1,), top_p=0.9, top_k=5))
    assert not whole(SamplingParams(temperature=0.0, top_logprobs=1))
    for changes in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"top_logprobs": 1},
                    {"repetition_penalty": 1.1}, {"frequency_penalty": 0.5}, {"presence_penalty": 0.5}):  # fmt: skip
        assert not whole(SamplingParams(**{"temperature": 1.0, **changes}))

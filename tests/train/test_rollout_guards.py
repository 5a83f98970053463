"""Watchers of sampled answers: each speaks once, at the step where there is reason, and not before;
also after a resume.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ernie_tune.train.rollout_guards import ROUNDS, WINDOW, RolloutWatch, WatchLimits
from ernie_tune.train.second_judges import spearman

HEALTHY = {
    "reward": 0.5,
    "reward_std": 0.4,
    "frac_reward_zero_std": 0.4,
    "frac_groups_all_right": 0.2,
    "completions/clipped_ratio": 0.1,
    "completions/mean_length": 4.0,
    "entropy": 1.0,
}


def spoken(steps: int, change: Any = lambda step: {}, watch: RolloutWatch | None = None) -> list[tuple[int, str]]:
    watch = watch or RolloutWatch()
    return [(s, str(v.message)) for s in range(1, steps + 1) for v in watch.look(s, {**HEALTHY, **change(s)})]


def test_a_healthy_run_is_left_alone() -> None:
    assert spoken(60) == []


def test_constant_rewards() -> None:
    ((step, words),) = spoken(30, lambda s: {"reward": 0.0, "reward_std": 0.0, "frac_reward_zero_std": 1.0})
    assert step == ROUNDS
    assert "all answers of 3 rounds earned the same (0)" in words


def test_alarms_may_end_the_run_and_show_answers() -> None:
    constant = {"reward": 0.0, "reward_std": 0.0}
    for stops in (False, True):
        watch = RolloutWatch(limits=WatchLimits(stops=stops))
        watch.show = lambda: "; such as 'x'"
        found = [v for step in range(1, 6) for v in watch.look(step, {**HEALTHY, **constant})]
        assert [v.stop for v in found] == [stops]
        assert "such as 'x'" in str(found[0].message)
    (cut,) = (v for step in range(9) for v in watch.look(step, {**HEALTHY, "completions/clipped_ratio": 1.0}))
    assert not cut.stop, "there is still something to learn"


def test_entropy_below_a_floor_or_rising_while_rewards_fall() -> None:
    floor = RolloutWatch(limits=WatchLimits(entropy_nats=0.2))
    ((step, words),) = spoken(9, lambda s: {"entropy": 0.1 if s > 2 else 1.0}, floor)
    assert (step, "below entropy_floor (0.2)" in words) == (2 + ROUNDS, True)

    def noise(step: int) -> dict[str, float]:
        return {"entropy": 1.0 if step <= WINDOW else 3.0, "reward": 0.5 if step <= WINDOW else 0.3}

    ((_, words),) = spoken(60, noise)
    assert "entropy rose from 1.000 to" in words
    assert spoken(60, lambda s: {**noise(s), "reward": 0.5}) == []  # what is explored pays


def test_answers_that_grow() -> None:
    ((_, doubled),) = spoken(80, lambda s: {"completions/mean_length": 20.0 + max(0.0, s - 20) * 1.0})
    assert "answers grew from 20 to 40 tokens in 50 steps" in doubled
    assert spoken(80, lambda s: {"completions/mean_length": 2.0 + (s > 40) * 3.0}) == [], "a few tokens are nothing"
    slowly = lambda s: {"completions/mean_length": 40.0 + s * 0.4}  # noqa: E731
    assert spoken(90, slowly) == []
    ((_, pays),) = spoken(90, lambda s: {**slowly(s), "length/reward_corr": 0.8})
    assert "longer answers earn more (length/reward_corr 0.80) and grew from 42 to" in pays
    assert spoken(90, lambda s: {"completions/mean_length": 40.0, "length/reward_corr": 0.8}) == []


def test_a_policy_far_from_its_reference() -> None:
    ((step, words),) = spoken(9, lambda s: {"kl": 3.0 if s > 1 else 1.0})  # answers of 4 tokens
    assert (step, "12.0 nats an answer away from its reference, more than kl_budget (10)" in words) == (
        1 + ROUNDS,
        True,
    )
    assert spoken(9, lambda s: {"kl": 3.0}, RolloutWatch(limits=WatchLimits(kl_nats=0.0))) == []
    assert len(spoken(9, lambda s: {"objective/kl": 11.0})) == 1


def test_form_that_is_learned_alone() -> None:
    def values(step: int, right: float = 0.3, form: float = 0.2) -> dict[str, float]:
        return {"rewards/exact/mean": right, "rewards/format/mean": 0.4 + (step > WINDOW) * form}

    ((step, words),) = spoken(60, values)
    assert step <= 2 * WINDOW
    assert "format rose by 0." in words
    assert "while exact stayed" in words
    assert spoken(60, lambda s: values(s, right=0.3 + s * 0.002)) == []
    assert spoken(60, lambda s: values(s, right=1.0)) == [], "nothing is left to learn"
    assert spoken(60, lambda s: values(s, form=0.05)) == []
    assert spoken(60, lambda s: {"rewards/format/mean": s / 60}) == [], "nobody asks for more than form"


def test_another_judge_that_no_longer_agrees() -> None:
    def values(step: int, before: float = 0.9, after: float = 0.1) -> dict[str, float]:
        return {"monitor/true/spearman": before if step <= 30 else after}

    ((_, words),) = spoken(80, values)
    assert "true, which nothing is learned from, agreed with the reward (0.90 by Spearman) and no longer does" in words
    assert spoken(80, lambda s: values(s, before=0.5)) == [], "it never agreed"
    assert spoken(80, lambda s: values(s, after=0.5)) == []


def test_ranks_share_their_mean_where_values_are_equal() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.permutation(30), rng.permutation(30)
    known = 1 - 6 * float(((x - y) ** 2).sum()) / (30 * (30**2 - 1))  # without ties
    assert spearman(np.exp(x / 9.0), y * 2.0) == pytest.approx(known, abs=1e-12)
    assert spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 2, 3, 4])) == pytest.approx(0.9**0.5, abs=1e-12)
    assert np.isnan(spearman(np.ones(4), np.arange(4.0)))
    assert np.isnan(spearman(np.zeros(0), np.zeros(0)))


def test_rewards_that_are_none() -> None:
    watch = RolloutWatch()
    verdicts = watch.look(1, {"completions/mean_length": 3.0})
    assert "every function said None" in str(verdicts[0].message)
    assert watch.look(2, {"completions/mean_length": 3.0}) == []


def test_judges_that_fail_round_after_round() -> None:
    lost = {"rewards/judge/errors": 3.0, "rewards/judge/timeouts": 1.0, "rewards/form/errors": 1.0}
    ((step, words),) = spoken(9, lambda s: lost if s != 2 else {**HEALTHY, "rewards/judge/errors": 0.0})
    assert step == 2 + ROUNDS
    assert "judge gave no number for 4 answers of this round" in words
    assert spoken(9, lambda s: lost if s % 3 else {}) == []


def test_checkers_that_take_long() -> None:
    slow = {"rewards/kie/ms_p99": 80.0, "rewards/exact/ms_p99": 0.1}
    ((step, words),) = spoken(9, lambda s: slow if s != 2 else {"rewards/kie/ms_p99": 3.0})
    assert step == 2 + ROUNDS
    assert "the checker kie takes 80 ms for one answer in a hundred" in words
    assert spoken(9, lambda s: slow if s % 3 else {}) == []


def test_prompts_that_are_too_easy_or_too_hard() -> None:
    ((step, easy),) = spoken(30, lambda s: {"frac_reward_zero_std": 0.9, "frac_groups_all_right": 0.85})
    assert step == WINDOW
    assert "always answered right" in easy
    ((_, hard),) = spoken(30, lambda s: {"frac_reward_zero_std": 0.9, "frac_groups_all_right": 0.0})
    assert "never answered right" in hard


def test_answers_that_are_cut_off() -> None:
    ((step, words),) = spoken(9, lambda s: {"completions/clipped_ratio": 0.5})
    assert (step, "raise max_completion_length" in words) == (ROUNDS, True)


def test_entropy_that_collapses() -> None:
    ((step, words),) = spoken(60, lambda s: {"entropy": 1.0 if s <= WINDOW else 0.05})
    assert step >= 2 * WINDOW
    assert "entropy collapsed from 1.000" in words


def rewards(right: int, rows: int = 297, first: int = 0) -> dict[int, float]:
    """Of the rows those at the front are right."""
    return {first + i: float(i < right) for i in range(rows)}


def turned(held: dict[int, float]) -> dict[int, float]:
    """As many are right, those at the end."""
    return dict(zip(held, reversed(held.values()), strict=True))


def test_rewards_up_and_held_out_down() -> None:
    for slope, said in ((0.01, 1), (-0.01, 0)):
        watch = RolloutWatch()
        spoken(40, lambda s, slope=slope: {"reward": 0.5 + s * slope}, watch)
        for right in (255, 243, 239):
            watch.measured(rewards(right))
        verdicts = watch.fallen(40)
        assert len(verdicts) == said
        assert not said or "held-out answers fell from 0.859 to 0.805" in str(verdicts[0].message)


def test_rewards_up_and_right_answers_down() -> None:
    """Where what is rewarded can be earned without being right, the held-out reward rises, too."""
    for rising, said in ((0.01, 1), (-0.01, 0)):
        watch = RolloutWatch()
        spoken(40, lambda s, rising=rising: {"reward": 0.5 + s * rising}, watch)
        for earned, right in ((0.5, 255), (0.7, 30), (0.9, 12)):
            watch.measured(dict.fromkeys(range(297), earned), rewards(right))
            watch.load_state_dict(json.loads(json.dumps(watch.state_dict())))
        verdicts = watch.fallen(40)
        assert [
            v for v in verdicts if "by their own checkers, 0.859 before and 0.040 now" in str(v.message)
        ] == verdicts
        assert len(verdicts) == said
    older = RolloutWatch().state_dict()
    del older["right"]  # of a run of before
    watch.load_state_dict(older)
    assert watch.right.means == []


SOME = {i * 297 // 64: 1.0 for i in range(64)}  # an evaluation of fewer rows


@pytest.mark.parametrize(("held", "falls"), [
    ([rewards(255)], 0),
    ([rewards(255), rewards(239)], 1),
    ([rewards(255), rewards(239), rewards(256), rewards(240)], 1),  # it came back
    ([rewards(255), rewards(252), rewards(253)], 0),  # three rows may be chance: 1.7 standard errors
    ([rewards(255), turned(rewards(245)), turned(rewards(246))], 0),  # other rows right and wrong: less sure
    ([rewards(255), rewards(245), rewards(246)], 2),  # the same rows as before, and ten fewer
    ([rewards(297), SOME], 0),
    ([rewards(297), {**SOME, 0: 0.0, 4: 0.0}, {**SOME, 0: 0.0, 4: 0.0, 9: 0.0}], 0),
    ([rewards(297), {i: float(i > 40) for i in SOME}, {i: float(i > 30) for i in SOME}], 2),
    ([rewards(255), rewards(9, 40, first=1000), rewards(2, 40, first=1000)], 1),  # no row in common: begun again
    ([rewards(255), {3: 0.0}, {3: 0.0}], 0),
    ([{}, rewards(255), rewards(239)], 1),
])  # fmt: skip
def test_what_is_clearly_below_the_best(held: list[dict[int, float]], falls: int) -> None:
    watch = RolloutWatch()
    for one in held:
        watch.measured(one)
        watch.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    assert watch.held.falls == falls


def test_a_resumed_watch_goes_on() -> None:
    whole, part = RolloutWatch(), RolloutWatch()
    collapse = lambda s: {"entropy": 1.0 if s <= WINDOW else 0.01, "completions/clipped_ratio": 0.5}  # noqa: E731
    straight = spoken(60, collapse, whole)
    before = spoken(25, collapse, part)
    again = RolloutWatch()
    again.load_state_dict(json.loads(json.dumps(part.state_dict())))
    after = [(s, str(v.message)) for s in range(26, 61) for v in again.look(s, {**HEALTHY, **collapse(s)})]
    assert before + after == straight


def test_answers_that_do_not_depend_on_the_picture() -> None:
    watch = RolloutWatch()
    assert watch.sight(50, seen=0.8, blind=0.5, ceiling=0.3) == []
    assert watch.sight(50, seen=0.5, blind=0.5, ceiling=0.5) == []  # guessing is as good on this data
    assert watch.sight(50, seen=0.0, blind=0.0, ceiling=0.0) == []
    (verdict,) = watch.sight(100, seen=0.8, blind=0.75, ceiling=0.3)
    assert "step 100: answers do not depend on the picture: 75% are right without it, 80% with it" in str(
        verdict.message
    )
    assert watch.sight(150, seen=0.8, blind=0.8, ceiling=0.3) == []

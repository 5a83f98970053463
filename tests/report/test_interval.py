"""Means over the steps between two lines of the log, against arithmetic done by hand; states; which
way is better for a number.
"""

from __future__ import annotations

import json

import pytest

from ernie_tune.report.direction import better, gain
from ernie_tune.report.interval import Interval


def test_line_is_the_mean_of_its_steps() -> None:
    interval = Interval()
    interval.add(4.0, {"acc": 0.5}, 100, 1.0)
    interval.add(2.0, {"acc": 1.0, "rare": 3.0}, 300, 3.0)
    assert interval.take() == {
        "loss": 3.0,
        "acc": 0.75,
        "rare": 3.0,  # of the one step that had it
        "tokens_per_second": 100.0,
        "interval_runtime": 4.0,
    }
    interval.add(1.0, {}, 50, 0.5)
    assert interval.take() == {"loss": 1.0, "tokens_per_second": 100.0, "interval_runtime": 0.5}
    assert interval.run_loss == pytest.approx((4 + 2 + 1) / 3)
    assert Interval().run_loss == 0.0
    assert Interval().take() == {"tokens_per_second": 0.0, "interval_runtime": 0.0}


def test_state_goes_on_in_the_middle_of_a_line() -> None:
    whole, first, second = Interval(), Interval(), Interval()
    steps = [(0.1 * i + 0.3, {"a": 1 / (i + 1)}, 7 * i + 1, 0.1 * i + 0.2) for i in range(6)]
    for step in steps:
        whole.add(*step)
    for step in steps[:4]:
        first.add(*step)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in steps[4:]:
        second.add(*step)
    assert second.take() == whole.take()
    assert second.run_loss == whole.run_loss


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("eval_loss", -1),
        ("eval_loss/sigmoid", -1),
        ("eval_loss/sft", -1),
        ("train_loss", -1),
        ("rewards/rejected", -1),
        ("eval_logps/rejected", -1),
        ("eval_rewards/longer_preferred", -1),
        ("eval_rewards/chosen", 1),
        ("eval_rewards/margins", 1),
        ("eval_logps/chosen", 1),
        ("eval_exact_match", 1),
        ("eval_pass@8", 1),
        ("eval_evidence", 1),
        ("eval_evidence/twin_consistency", 1),
        ("eval_evidence/contradicted", -1),
        ("eval_reward/mean@8", 1),
        ("eval_accuracy/charts", 1),
        ("eval_preference_accuracy/d", 1),
        ("eval_calibration_error", -1),
        ("eval_rating_mae", -1),
        ("router_aux_loss", -1),
        ("kl", 0),
        ("length/chosen", 0),
        ("no_such_thing", 0),
    ],
)
def test_direction(name: str, way: int) -> None:
    assert better(name) == way


def test_gain_is_what_a_reader_can_see() -> None:
    assert gain("eval_loss/sft", 0.5, 0.4715) == 1
    assert gain("eval_loss", 0.4, 0.5) == -1
    assert gain("eval_exact_match", 0.5, 0.50004) == 0  # four decimals are shown
    assert gain("kl", 0.0, 1.0) == gain("eval_loss", None, 1.0) == gain("eval_loss", 1.0, None) == 0

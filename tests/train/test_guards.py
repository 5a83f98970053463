"""Watchers: alarms against closed forms, patience, and equal verdicts after a resume."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from ernie_tune.train.guards import DivergenceGuard, EarlyStopping, ForgettingGuard, LearningWatch


def through_json(state: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(state))  # type: ignore[no-any-return]


def test_forgetting_alarm_and_its_interval() -> None:
    guard = ForgettingGuard({"general": [1.0] * 100}, tolerance=0.02)
    seen, verdict = guard.look("general", [0.0] * 10 + [1.0] * 90)
    assert (seen.baseline, seen.score, seen.alarm) == (1.0, pytest.approx(0.9), True)
    # A resample loses Binomial(100, 0.1) rows: its 2.5 % and 97.5 % points are 5 and 16.
    assert seen.low == pytest.approx(-0.16, abs=0.011)
    assert seen.high == pytest.approx(-0.05, abs=0.011)
    assert verdict is not None
    assert not verdict.stop
    assert "guard set general: 1.0000 before training, 0.9000 now (change -0.1000" in verdict.message


@pytest.mark.parametrize(
    ("lost", "rows", "tolerance"),
    [
        (1, 100, 0.02),  # within the tolerance
        # beyond it, but one row of ten may be chance: 0.9^10 = 35 % of the resamples do not have it
        (1, 10, 0.02),
        (10, 100, 0.2),
    ],
)
def test_no_forgetting_alarm(lost: int, rows: int, tolerance: float) -> None:
    guard = ForgettingGuard({"g": [1.0] * rows}, tolerance, bootstrap=500)
    seen, verdict = guard.look("g", [0.0] * lost + [1.0] * (rows - lost))
    assert verdict is None
    assert not seen.alarm


def test_forgetting_is_judged_row_by_row() -> None:
    """The same means, but here every row lost a little: nothing is chance."""
    seen, verdict = ForgettingGuard({"g": [0.0, 1.0] * 5}, 0.02, stop=True).look("g", [-0.1, 0.9] * 5)
    assert verdict is not None
    assert verdict.stop
    assert (seen.low, seen.high) == (pytest.approx(-0.1), pytest.approx(-0.1))


def test_forgetting_survives_a_resume() -> None:
    first = ForgettingGuard({"g": [0.5, 1.0, 0.25] * 20})
    again = ForgettingGuard({})
    again.load_state_dict(through_json(first.state_dict()))
    scores = [0.5, 0.5, 0.25] * 20
    assert again.look("g", scores) == first.look("g", scores)


def test_forgetting_refuses() -> None:
    with pytest.raises(ValueError, match=r"guard set g \(0 rows\) must have at least one row"):
        ForgettingGuard({"g": []})
    guard = ForgettingGuard({"g": [1.0]})
    with pytest.raises(ValueError, match="guard set h must be one of g"):
        guard.look("h", [1.0])
    with pytest.raises(ValueError, match=r"guard set g \(2 rows\) must have the baseline's 1 rows"):
        guard.look("g", [1.0, 1.0])


def stops(stopping: EarlyStopping, values: list[float]) -> int | None:
    for step, value in enumerate(values, 1):
        if stopping.look(step, {stopping.metric: value})[1]:
            return step
    return None


@pytest.mark.parametrize(
    ("options", "values", "stop", "best_step"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.5, 2.4], 4, 2),
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.9, 2.0], None, 4),
        ({"patience": 0}, [1.0, 2.0, 3.0, 4.0], None, 1),
        ({"patience": 2, "metric": "exact_match"}, [0.1, 0.3, 0.2, 0.1], 4, 2),
        ({"patience": 2, "metric": "exact_match", "greater_is_better": False}, [0.1, 0.3, 0.2], 3, 1),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.8, 2.6], 3, 1),
        ({"patience": 2, "metric": "eval_loss"}, [math.nan, math.nan], 2, 0),
        ({"patience": 3}, [2.0, math.nan, 1.0], None, 3),
    ],
)
def test_early_stopping(options: dict[str, Any], values: list[float], stop: int | None, best_step: int) -> None:
    stopping = EarlyStopping(**options)
    assert stops(stopping, values) == stop
    assert stopping.best_step == best_step


def test_early_stopping_tells_the_best() -> None:
    stopping = EarlyStopping(1)
    assert stopping.look(10, {"eval_loss": 2.0}) == (True, None)
    again = EarlyStopping(1)
    again.load_state_dict(through_json(stopping.state_dict()))
    best, verdict = again.look(20, {"eval_loss": 2.5})
    assert not best
    assert verdict is not None
    assert verdict.stop
    assert "eval_loss has not improved in 1 evaluations (best 2 at step 10)" in verdict.message


def test_early_stopping_refuses_unknown_metrics() -> None:
    with pytest.raises(ValueError, match=r"metric_for_best_model \(eval_bleu\) must be one of eval_anls, eval_loss"):
        EarlyStopping(1, "bleu").look(1, {"eval_loss": 1.0, "eval_anls": 1.0, "loss": 1.0})


@pytest.mark.parametrize(
    ("loss", "norm", "name"), [(math.nan, 1.0, "loss is nan"), (1.0, math.inf, "grad_norm is inf")]
)
def test_no_number_stops_at_once(loss: float, norm: float, name: str) -> None:
    verdict = DivergenceGuard().look(7, loss, norm)
    assert verdict is not None
    assert verdict.stop
    assert f"{name} at step 7" in verdict.message


def test_divergence_warns_once_a_streak() -> None:
    guard = DivergenceGuard(factor=3, patience=4)
    losses = [1.0] * 10 + [3.5] * 3 + [1.0] + [3.5] * 9
    said = [step for step, loss in enumerate(losses, 1) if guard.look(step, loss)]
    assert said == [18]  # the first streak of three is too short


def test_divergence_keeps_still_about_falling_and_negative_losses() -> None:
    guard = DivergenceGuard(patience=2)
    losses = [5 * 0.9**k for k in range(50)] + [-1.0, 8.0, -2.0]
    assert [guard.look(k, loss) for k, loss in enumerate(losses)] == [None] * len(losses)
    negative = DivergenceGuard(patience=2)
    assert [negative.look(k, loss) for k, loss in enumerate([-1.0] * 5 + [2.0] * 5)] == [None] * 10


def test_divergence_survives_a_resume() -> None:
    losses = [1.0] * 10 + [9.0] * 10
    whole, first, second = (DivergenceGuard(patience=5) for _ in range(3))
    said = [whole.look(k, loss) for k, loss in enumerate(losses)]
    parts = [first.look(k, loss) for k, loss in enumerate(losses[:12])]
    second.load_state_dict(through_json(first.state_dict()))
    assert parts + [second.look(k, loss) for k, loss in enumerate(losses[12:], 12)] == said
    assert sum(verdict is not None for verdict in said) == 1


def test_signs_of_learning_nothing_are_told_once() -> None:
    watch = LearningWatch()
    said = [(step, v.message) for step in range(1, 60) for v in watch.look(step, {"grad_norm": 0.0, "loss": 0.7})]
    assert [step for step, _ in said] == [3, 21]
    assert "nothing is trained" in said[0][1]
    assert "the loss is constant" in said[1][1]


def test_signs_need_a_streak_and_survive_a_resume() -> None:
    values = {"frac_reward_zero_std": 1.0, "reward_std": 0.0, "learning_rate": 1e-4}
    watch = LearningWatch()
    for step in range(9):
        assert watch.look(step, values) == []
    again = LearningWatch()
    again.load_state_dict(through_json(watch.state_dict()))
    assert len(again.look(9, values)) == 2
    broken = LearningWatch()
    for step in range(100):
        assert broken.look(step, {"grad_norm": float(step % 3), "loss": 1.0 + step % 2}) == []

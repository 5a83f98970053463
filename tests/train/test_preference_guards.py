"""Guards of preference learning: when they speak, when they must not, and that a resumed run judges
as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest

from ernie_tune.train.preference_guards import DisplacementGuard, LengthGuard, PreferenceWatch, SaturationGuard

NOISE = np.random.default_rng(0).normal(0, 8, 1000)


def first(guard: DisplacementGuard, logps: Callable[[int], float], steps: int = 600, every: int = 1) -> int | None:
    """The step at which it speaks."""
    for step in range(every, steps + 1, every):
        if guard.look(step, {"logps/chosen": logps(step)}):
            return step
    return None


def test_displacement_within_200_steps() -> None:
    spoke = first(DisplacementGuard(), lambda s: -100 - 0.15 * s)  # 30 in 200 steps
    assert spoke is not None
    assert 130 < spoke <= 200
    assert first(DisplacementGuard(), lambda s: -100 - 0.05 * s) is None, "10 in 200 steps, however long it goes on"
    assert first(DisplacementGuard(), lambda s: -100 + 0.15 * s) is None
    assert first(DisplacementGuard(), lambda s: -100 + NOISE[s]) is None, "batches differ"
    assert first(DisplacementGuard(), lambda s: -100 if s < 300 else -130) in range(300, 312), "at any time"
    assert first(DisplacementGuard(), lambda s: -100 - 0.15 * s, every=25) is not None, "records may be rare"
    assert DisplacementGuard().look(1, {"loss": 1.0}) is None


def test_what_displacement_advises() -> None:
    for anchored, words in ((False, "loss_type [sigmoid, sft] or rpo"), (True, "raise the weight of its NLL term")):
        guard = DisplacementGuard(anchored=anchored)
        said = [v for s in range(1, 400) if (v := guard.look(s, {"logps/chosen": -100.0 - s}))]
        assert len(said) == 1, "once in a run"
        assert words in said[0].message
        assert not said[0].stop


def test_saturation() -> None:
    guard = SaturationGuard()
    said = [s for s in range(1, 100) if guard.look(s, {"rewards/saturated": 0.0 if s < 30 else 0.5})]
    assert len(said) == 1
    assert 38 <= said[0] <= 42, "half of the last twenty records at one half"
    quiet = SaturationGuard()
    assert not any(quiet.look(s, {"rewards/saturated": 0.2}) for s in range(100))
    assert quiet.look(101, {}) is None


def test_length_is_judged_against_the_labels() -> None:
    biased, fair = LengthGuard(), LengthGuard()
    said = [s for s in range(1, 100) if biased.look(s, {"rewards/longer_preferred": 0.8, "length/longer_chosen": 0.5})]
    assert said == [50]
    assert not any(fair.look(s, {"rewards/longer_preferred": 0.8, "length/longer_chosen": 0.75}) for s in range(100))
    assert fair.look(101, {"rewards/longer_preferred": 1.0}) is None


@pytest.mark.parametrize("cut", [1, 60, 140, 190])
def test_a_resumed_run_judges_as_an_uninterrupted_one(cut: int) -> None:
    def values(step: int) -> dict[str, float]:
        return {
            "logps/chosen": -50 - 0.1 * step + NOISE[step] / 20,
            "rewards/saturated": step / 200,
            "rewards/longer_preferred": 0.7,
            "length/longer_chosen": 0.5,
        }

    whole, watch = PreferenceWatch(), PreferenceWatch()
    expected = [v.message for s in range(1, 250) for v in whole.look(s, values(s))]
    assert len(expected) == 3
    said = [v.message for s in range(1, cut) for v in watch.look(s, values(s))]
    resumed = PreferenceWatch()
    resumed.load_state_dict(json.loads(json.dumps(watch.state_dict())))
    said += [v.message for s in range(cut, 250) for v in resumed.look(s, values(s))]
    assert said == expected

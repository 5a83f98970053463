"""The gate between the engine that samples and the forward that trains: what is looked at, when,
and what follows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.thread_ranks import on_ranks

from ernie_tune.checkpoint.state import ALONE
from ernie_tune.train.agreement import Agreement, MismatchGate


def batch(answers: int = 4, tokens: int = 3) -> Any:
    sampled = np.linspace(-2, -1, answers * tokens)
    columns = {"sampled_logp_N": sampled, "old_logp_N": sampled.copy()}
    candidates = np.repeat(np.arange(answers), tokens)
    return SimpleNamespace(columns=columns, candidate_N=candidates, length_C=np.full(answers, tokens))


def off_by(gap: float, asked: list[int]) -> Any:
    def ask(one: Any) -> np.ndarray:
        asked.append(len(one.length_C))
        return one.columns["sampled_logp_N"] + gap

    return ask


def test_within_the_gate_the_engine_is_believed() -> None:
    asked: list[int] = []
    agreement = Agreement(off_by(2e-6, asked), ALONE, MismatchGate(), every=3)
    for number in range(5):
        assert agreement(number, [batch(40), batch(40), batch(40)]) == []
        assert bool(agreement.metrics) == (number in (0, 3))
    assert asked == [40, 40, 40, 40], "the first 64 answers of every third round"
    assert not agreement.verdicts()
    agreement(6, [batch(40)])
    assert agreement.metrics["mismatch/max_abs_dlp"] == pytest.approx(2e-6)


def test_above_the_gate_the_trainer_computes_its_own() -> None:
    asked: list[int] = []
    agreement = Agreement(off_by(1e-3, asked), ALONE, MismatchGate(), every=3)
    batches = [batch(70), batch(2)]
    told = agreement(0, batches)
    assert [len(one) for one in told] == [210, 6], "of this very round"
    np.testing.assert_allclose(told[1] - batches[1].columns["sampled_logp_N"], 1e-3)
    said = agreement.verdicts()
    assert "differ by up to 0.001" in str(said[0].message)
    assert not agreement.verdicts(), "once"
    assert len(agreement(1, batches)) == 2
    assert agreement.metrics, "measured in every round at no further cost"
    again = Agreement(off_by(0.0, []), ALONE, MismatchGate(), every=3)
    again.load_state_dict(agreement.state_dict())
    assert again.recompute


def test_a_number_that_is_none_is_above_every_gate() -> None:
    agreement = Agreement(off_by(np.nan, []), ALONE, MismatchGate(0.5, 0.5))
    agreement(0, [batch()])
    assert agreement.recompute


def test_ranks_switch_together() -> None:
    """Only one of two ranks sees a difference; both compute their own from then on."""

    def rank(ranks: Any) -> bool:
        agreement = Agreement(off_by(1e-3 * ranks.rank, []), ranks, MismatchGate())
        agreement(0, [batch()])
        return agreement.recompute

    assert on_ranks(2, rank) == [True, True]


def test_gates_of_dtypes() -> None:
    assert MismatchGate.of("float32") == MismatchGate.of("float64") == MismatchGate(1e-5, 1e-5)
    assert MismatchGate.of("bfloat16") == MismatchGate(0.5, 1e-2)
    assert MismatchGate.of("float32", 1e-3) == MismatchGate(1e-3, 1e-3)

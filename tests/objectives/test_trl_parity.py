"""Preference losses against TRL 1.16's own trainers on drawn log-probabilities: loss, gradient by
every token, metrics (tests/golden/make_trl_preference.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from make_trl_preference import ALPHA_CASES, CPO_CASES, DPO_CASES, KTO_CASES, METRICS, PAIRS
from paddle import Tensor

from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.pairwise import expand, pair_terms
from ernie_tune.objectives.preference import Candidates, Pairs, PreferenceHyper, preference_metrics, segment_sum
from ernie_tune.objectives.reward import reward_metrics, reward_pair_loss
from ernie_tune.objectives.unpaired import (
    Labels,
    apo_zero_unpaired_loss,
    kl_baseline,
    kl_sum,
    kto_loss,
)

TWO = Pairs.of(range(PAIRS), range(PAIRS, 2 * PAIRS))
# TRL's case -> our settings; everything else has the same name.
RENAMED: dict[str, dict[str, Any]] = {"rpo": {"rpo_alpha": 0.5}}


@pytest.fixture
def trl(golden):  # type: ignore[no-untyped-def]
    return golden("trl_preference")


def answers(trl: dict[str, np.ndarray], dtype: str = "float64") -> tuple[Tensor, Candidates]:
    """The token log-probabilities as a leaf, and the candidates made of them."""
    length_C = trl["input/length_C"]
    real_CL = np.arange(trl["input/logp_CL"].shape[1])[None] < length_C[:, None]
    owner_N = np.nonzero(real_CL)[0]
    logp_N, ref_N, square_N = (
        paddle.to_tensor(trl[f"input/{k}"][real_CL].astype(dtype)) for k in ("logp_CL", "ref_CL", "square_CL")
    )
    logp_N.stop_gradient = False
    logp_C, ref_C, square_C = (segment_sum(x, owner_N, len(length_C)) for x in (logp_N, ref_N, square_N))
    return logp_N, Candidates(logp_C, length_C, ref_C, logp_N, ref_N, owner_N, square_C)


def compare(trl: dict[str, np.ndarray], case: str, out: LossOut, logp_N: Tensor, tolerance: float = 1e-9) -> None:
    loss = out.total / out.count
    loss.backward()
    real_CL = np.arange(trl["input/logp_CL"].shape[1])[None] < trl["input/length_C"][:, None]
    assert float(loss) == pytest.approx(float(trl[f"{case}/loss"]), abs=tolerance, rel=tolerance)
    expected = trl[f"{case}/grad_CL"][real_CL]
    np.testing.assert_allclose(logp_N.grad.numpy(), expected, atol=tolerance, rtol=tolerance)
    assert np.abs(expected).max() > 1e-5


def combined(names: list[str], weights: list[float] | None, candidates: Candidates, h: PreferenceHyper) -> LossOut:
    terms = expand(names, weights, h)
    outs = pair_terms(terms, candidates, TWO, h)
    return combine(outs, terms, {k: v.count for k, v in outs.items()})


@pytest.mark.parametrize("case", DPO_CASES)
def test_dpo_losses(case: str, trl: dict[str, np.ndarray]) -> None:
    settings = dict(DPO_CASES[case])
    names, weights = settings.pop("loss_types"), settings.pop("loss_weights", None)
    h = PreferenceHyper(**settings)
    logp_N, candidates = answers(trl)
    # TRL holds exo_pair's label_smoothing in float32
    compare(trl, case, combined(names, weights, candidates, h), logp_N, 1e-7 if case == "exo_pair" else 1e-9)
    if h.ld_alpha is None:  # TRL reports the weighted sums under LD-DPO; ours are the answer's
        ours = preference_metrics(candidates, TWO, h.beta)
        means = [ours[name][0] / ours[name][1] for name in METRICS]
        # TRL counts accuracies in float32
        np.testing.assert_allclose(means, trl[f"{case}/metrics"], atol=1e-6)


@pytest.mark.parametrize("name", ["mpo", "rpo"])
def test_composed_names_are_trl_lists(name: str, trl: dict[str, np.ndarray]) -> None:
    logp_N, candidates = answers(trl)
    compare(trl, name, combined([name], None, candidates, PreferenceHyper(**RENAMED.get(name, {}))), logp_N)


@pytest.mark.parametrize("case", ALPHA_CASES)
def test_alpha_divergences(case: str, trl: dict[str, np.ndarray]) -> None:
    h = PreferenceHyper(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=ALPHA_CASES[case])
    logp_N, candidates = answers(trl, "float32")
    compare(trl, case, combined(["sigmoid"], None, candidates, h), logp_N, 1e-5)


@pytest.mark.parametrize("case", CPO_CASES)
def test_losses_without_reference(case: str, trl: dict[str, np.ndarray]) -> None:
    settings = {k: v for k, v in CPO_CASES[case].items() if k not in ("loss_type",)}
    if case == "orpo":
        settings = {"orpo_lambda": settings["beta"]}
    logp_N, candidates = answers(trl)
    # TRL's ORPO computes its odds in float32
    compare(
        trl,
        case,
        combined([case], None, candidates, PreferenceHyper(**settings)),
        logp_N,
        1e-6 if case == "orpo" else 1e-9,
    )


@pytest.mark.parametrize("case", KTO_CASES)
def test_unpaired_losses(case: str, trl: dict[str, np.ndarray]) -> None:
    logp_N, candidates = answers(trl)
    labels = Labels.of(range(2 * PAIRS), [1] * PAIRS + [0] * PAIRS)
    settings = {k: v for k, v in KTO_CASES[case].items() if k != "loss_type"}
    if case == "kto":
        policy, reference = (paddle.to_tensor(x) for x in trl["input/mismatched_2M"])
        z0 = kl_baseline(*kl_sum(Candidates(policy, np.ones(PAIRS, int), reference)))
        assert z0 == pytest.approx(float(trl["kto/kl"]))
        assert z0 > 0.01, "a baseline of 0 would hide its sign"
        compare(trl, case, kto_loss(candidates, labels, z0, 0.1, **settings), logp_N)
    else:
        # TRL weighs the good by 1.5 and divides by their number; here the weights are a row's own
        weight_M = np.array([1.5] * PAIRS + [1.0] * PAIRS)
        out = apo_zero_unpaired_loss(candidates, Labels(labels.index_M, labels.good_M, weight_M), 0.1)
        compare(trl, case, LossOut(out.total, 2.0 * PAIRS), logp_N)


def test_reward_loss(trl: dict[str, np.ndarray]) -> None:
    reward_C = paddle.to_tensor(trl["input/rewards_C"], stop_gradient=False)
    pairs = Pairs.of(TWO.better_P, TWO.worse_P, margin_P=trl["input/margin_P"])
    out = reward_pair_loss(reward_C, pairs, 0.02)
    (out.total / out.count).backward()
    assert float(out.total) / out.count == pytest.approx(float(trl["reward/loss"]), abs=1e-12)
    np.testing.assert_allclose(reward_C.grad.numpy(), trl["reward/grad_C"], atol=1e-12)
    metrics = reward_metrics(reward_C, pairs)
    means = [metrics[name][0] / metrics[name][1] for name in ("accuracy", "margin", "mean_reward")]
    np.testing.assert_allclose(means, trl["reward/metrics"], atol=1e-6)


def test_inputs_are_not_degenerate(trl: dict[str, np.ndarray]) -> None:
    length_C = trl["input/length_C"]
    assert length_C.min() == 1
    assert (length_C[:PAIRS] != length_C[PAIRS:]).any()
    assert len({float(trl[f"{case}/loss"]) for case in (*DPO_CASES, *CPO_CASES, *KTO_CASES)}) == len(DPO_CASES) + 5

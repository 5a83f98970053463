"""The term for looking at the picture: closed forms, a gradient of each of its parts, the bound;
what rides along counts for nothing else, and says what the model says of grey pictures.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from test_picture_evidence import PROCESSOR, EvidenceSettings, made, rows

from ernie_tune.data.units import collate_units
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset
from ernie_tune.models.replay import COLUMN as EXPERTS
from ernie_tune.objectives.objective import logp_outputs
from ernie_tune.objectives.perception import Perception, perception_term
from ernie_tune.objectives.policy import PolicyHyper
from ernie_tune.train.evidence import greyed, some_hidden
from ernie_tune.train.perception import Beside
from ernie_tune.train.policy import PolicyObjective


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    paddle.seed(5)
    return ErnieModel(preset("tiny-a"))


def tensor(values: list[float]) -> paddle.Tensor:
    made = paddle.to_tensor(values, "float64")
    made.stop_gradient = False
    return made


BLIND_N = np.array([3, -1, 4, -1, -1])
LOGP, ENTROPY = [-1.0, -7.0, -2.0, -1.5, -9.0], [0.1, 0.2, 0.3, 0.4, 0.5]


def test_the_distance_and_its_gradient() -> None:
    """d = 0.5 and 7: k3 = e^.5 - 1.5 and a distance far beyond the bound, which has no gradient."""
    logp_N = tensor(LOGP)
    out = perception_term(logp_N, None, BLIND_N, Perception(0.02))
    near = np.exp(0.5) - 1.5
    assert out.count == 2
    assert float(out.total) == pytest.approx(-0.02 * (near + 1.0), abs=1e-12)
    assert out.metrics["perception/image_delta"] == pytest.approx((7.5, 2))
    out.total.backward()
    slope = 0.02 * (np.exp(0.5) - 1)
    np.testing.assert_allclose(logp_N.grad.numpy(), [-slope, 0, 0, slope, 0], atol=1e-12)


def test_both_entropies_have_a_gradient_of_their_own() -> None:
    logp_N, entropy_N = tensor(LOGP), tensor(ENTROPY)
    out = perception_term(logp_N, entropy_N, BLIND_N, Perception(0.0, 1.0, 0.03, 0.05))
    assert float(out.total) == pytest.approx(0.03 * (0.1 + 0.3) + 0.05 * (0.4 + 0.5), abs=1e-12)
    out.total.backward()
    np.testing.assert_allclose(entropy_N.grad.numpy(), [0.03, 0, 0.03, 0.05, 0.05], atol=1e-12)
    with pytest.raises(ValueError, match="entropy_N \\(None\\) must be given with perception_entropy"):
        perception_term(logp_N, None, BLIND_N, Perception(0.1, 1.0, 0.1, 0.0))


def test_batches_without_counterparts_add_nothing() -> None:
    logp_N = tensor(LOGP)
    out = perception_term(logp_N, None, np.full(5, -1), Perception(0.02))
    assert (float(out.total), out.count) == (0.0, 0.0)
    out.total.backward()


def test_a_bound_that_is_none() -> None:
    for cap in (0.0, 1e300):
        with pytest.raises(ValueError, match="perception_cap"):
            Perception(0.1, cap)


def even_first(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 2 == 0) for ids in completion_ids]


def test_what_rides_along_is_the_model_without_the_picture(tmp_path: Path, model: ErnieModel) -> None:
    found = made(model, rows(tmp_path), EvidenceSettings(), even_first)
    groups = found.make_round()
    for group in groups:
        group.columns[EXPERTS] = np.zeros((sum(d.num_tokens for d in group.unit.dialogues), 2, 2), np.int16)
    batch = found.batch(groups)
    both = Beside(PROCESSOR, 0.6, 7, every=2)(batch, groups, 4)
    blind_N, size = both.columns["blind_N"], len(batch.target_N)
    right = [group.right_G >= 1 for group in groups]
    assert any(one.any() for one in right)
    wanted = np.concatenate([np.repeat(r, g.length_G) for r, g in zip(right, groups, strict=True)])
    assert ((blind_N >= 0)[:size] == wanted).all()  # right answers alone
    seen = np.flatnonzero(blind_N >= 0)
    assert sorted(blind_N[seen]) == list(range(size, len(both.target_N)))
    assert (both.target_N[seen] == both.target_N[blind_N[seen]]).all()
    assert (both.columns["old_logp_N"][blind_N[seen]] == batch.columns["old_logp_N"][seen]).all()
    assert not both.columns["keep_N"][size:].any()
    assert (both.columns[EXPERTS][: len(batch.place_M)] == 0).all()
    assert (both.columns[EXPERTS][len(batch.place_M) :] == -1).all()

    with paddle.no_grad():
        logp_N = logp_outputs(model, model(both.inputs), both)["logp_N"].numpy()
        at = 0
        for group, chosen in zip(groups, right, strict=True):
            hidden = some_hidden(group.unit.dialogues[0], 0.6, 7, group.number, 4)
            for i, dialogue in enumerate(group.unit.dialogues):
                count = int(group.length_G[i])
                if chosen[i]:
                    other = type(group.unit)((greyed(dialogue, hidden),), 0, "sampled", *[np.full(1, np.nan)] * 3)
                    alone = collate_units([other], PROCESSOR)
                    without = logp_outputs(model, model(alone.inputs), alone)["logp_N"].numpy()
                    np.testing.assert_allclose(logp_N[blind_N[at : at + count]], without, atol=3e-6)
                at += count


def test_they_count_for_nothing_else_and_windows_may_be_cut(tmp_path: Path, model: ErnieModel) -> None:
    found = made(model, rows(tmp_path), EvidenceSettings(), even_first)
    groups = found.make_round()
    beside = Beside(PROCESSOR, 0.6, 7)

    def gradients(parts: list[Any], how: Perception | None, more: Any) -> tuple[float, list[np.ndarray]]:
        objective = PolicyObjective(PolicyHyper("dapo"), perception=how, log_entropy=True)
        window = [more(found.batch(part), part) for part in parts]
        totals = [objective.counts([batch]) for batch in window]
        objective.begin({name: sum(one[name] for one in totals) for name in totals[0]})
        loss = 0.0
        for batch in window:
            out = objective.loss(objective.outputs(model, model(batch.inputs), batch), batch)
            out.total.backward()
            loss += float(out.total)
        grads = [p.grad.numpy().copy() for p in model.parameters() if p.grad is not None]
        for p in model.parameters():
            p.clear_gradient(False)
        return loss, grads

    plain, _ = gradients([groups], None, lambda batch, _: batch)
    nothing, _ = gradients([groups], Perception(0.0), lambda batch, part: beside(batch, part, 0))
    assert nothing == pytest.approx(plain, abs=1e-6)
    how = Perception(0.5, 1.0, 0.1, 0.1)
    whole, grads = gradients([groups], how, lambda batch, part: beside(batch, part, 0))
    cut, others = gradients([[group] for group in groups], how, lambda batch, part: beside(batch, part, 0))
    assert abs(whole - plain) > 1e-4
    assert cut == pytest.approx(whole, abs=1e-6)
    for mine, other in zip(grads, others, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-6)


def test_rounds_between_and_bounds(tmp_path: Path, model: ErnieModel) -> None:
    found = made(model, rows(tmp_path), EvidenceSettings(), lambda completions, **_: [1.0] * len(completions))
    groups = found.make_round()
    batch = found.batch(groups)
    assert Beside(PROCESSOR, 0.6, 7, every=3)(batch, groups, 2) is batch
    few = Beside(PROCESSOR, 0.6, 7, answers=2)(batch, groups, 0)
    assert len(few.length_C) == len(batch.length_C) + 2
    blind = [SimpleNamespace(**{**vars(g), "right_G": g.right_G * 0, "length_G": g.length_G}) for g in groups]
    none = Beside(PROCESSOR, 0.6, 7)(batch, blind, 0)
    assert (none.columns["blind_N"] == -1).all()

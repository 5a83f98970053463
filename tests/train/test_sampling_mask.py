"""Learning over what top-k, top-p and min-p left to draw from: closed forms, and that sampling and
training see one policy; without the mask they do not.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from test_rollouts import S, objective, rollouts, sampler

from ernie_tune.generate.batch import Completion
from ernie_tune.generate.sampling import SamplingParams, choose
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset
from ernie_tune.objectives.logprobs import supported_logp, token_logp_and_entropy
from ernie_tune.objectives.objective import SUPPORT
from ernie_tune.train.rolled import support_of

MASKED = dataclasses.replace(
    S, top_k=6, top_p=0.8, min_p=0.05, keep_sampling_mask=True, temperature=0.7, max_completion_length=5
)


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    paddle.seed(5)
    return ErnieModel(preset("tiny-a"))


def test_over_the_support_alone() -> None:
    """Scores 3, 2, 1, 0 and temperature 2: over ids 0 and 2, log p(2) = -log(1 + e^((3-1)/2))."""
    hidden = paddle.to_tensor([[3.0, 2.0, 1.0, 0.0]] * 2, "float64")
    hidden.stop_gradient = False
    support = np.array([[0, 2, -1], [1, 3, 0]])
    for transposed in (True, False):
        logp, entropy = supported_logp(
            hidden, paddle.eye(4, dtype="float64"), np.array([2, 0]), support, transposed=transposed, temperature=2.0
        )
        near = np.exp(0.5 * np.array([2.0, 0.0, 3.0]))
        wanted = [-np.log1p(np.e), np.log(near[2] / near.sum())]
        np.testing.assert_allclose(logp.numpy(), wanted, atol=1e-12)
        p = 1 / (1 + np.e)
        assert float(entropy[0]) == pytest.approx(-p * np.log(p) - (1 - p) * np.log(1 - p), abs=1e-12)
    logp.sum().backward()
    p = np.array([1 - p, p])
    np.testing.assert_allclose(hidden.grad.numpy()[0], [-p[0] / 2, 0, (1 - p[1]) / 2, 0], atol=1e-12)


def test_the_whole_vocabulary_is_the_plain_one() -> None:
    rng = np.random.default_rng(0)
    hidden, weight = (paddle.to_tensor(rng.standard_normal(s)) for s in ((5, 7), (11, 7)))
    target = rng.integers(0, 11, 5)
    mine = supported_logp(hidden, weight, target, np.tile(np.arange(11), (5, 1)), transposed=True, temperature=0.7)
    plain = token_logp_and_entropy(hidden, weight, paddle.to_tensor(target), transposed=True, temperature=0.7)
    for one, other in zip(mine, plain, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-12)
    with pytest.raises(ValueError, match=r"targets \(1\) must be among the ids"):
        supported_logp(hidden[:1], weight, np.array([3]), np.array([[1, 2]]), transposed=True)


def test_what_is_noted_of_a_draw() -> None:
    scores = np.log([0.4, 0.3, 0.2, 0.1]).astype(np.float32)
    ask = lambda **how: choose(scores, SamplingParams(temperature=1.0, note_kept=True, **how), np.random.default_rng(0))  # noqa: E731
    assert ask(top_k=3).kept.tolist() == [0, 1, 2]
    assert ask(top_k=3, banned_ids=(0,)).kept.tolist() == [1, 2, 3]
    assert ask(top_k=4, banned_ids=(0,)).kept.tolist() == [1, 2, 3]
    assert ask(top_p=0.5).kept.tolist() == [0, 1]
    assert ask(min_p=0.6).kept.tolist() == [0, 1]
    assert choose(scores, SamplingParams(temperature=1.0, top_k=2), np.random.default_rng(0)).kept is None


def test_forced_tokens_have_none_and_rest_is_blank() -> None:
    done = Completion(
        [5, 6, 7],
        [0.0] * 3,
        "stop",
        [True, False, True],
        [0.0] * 3,
        [],
        [np.array([4, 5]), np.array([7])],
    )
    assert support_of([done], 3).tolist() == [[4, 5, -1], [7, -1, -1]]


def test_sampling_and_training_see_one_policy(model: ErnieModel) -> None:
    made = rollouts(model, MASKED)
    batch = made.batch(made.make_round())
    assert batch.columns[SUPPORT].shape == (len(batch.target_N), 6)
    assert ((batch.columns[SUPPORT] >= 0).sum(1) < 6).any()  # top-p and min-p cut, too

    def logp(given: Any) -> np.ndarray:
        model.eval()
        with paddle.no_grad():
            return objective(0.7).outputs(model, model(given.inputs), given)["logp_N"].numpy()

    np.testing.assert_allclose(logp(batch), batch.columns["sampled_logp_N"], atol=1e-5)
    columns = {name: values for name, values in batch.columns.items() if name != SUPPORT}
    blind = logp(dataclasses.replace(batch, columns=columns))
    assert np.abs(blind - batch.columns["sampled_logp_N"]).max() > 0.1  # a mutant


def test_resuming_in_a_round(model: ErnieModel, tmp_path: Path) -> None:
    settings = dataclasses.replace(MASKED, num_iterations=2)
    straight = rollouts(model, settings)
    windows = list(itertools.islice(straight.windows(), 2))
    stopped = rollouts(model, settings)
    next(stopped.windows())
    stopped.save(tmp_path)
    again = rollouts(model, settings, sampler=sampler(model))
    again.load(tmp_path)
    (batch,), (wanted,) = next(again.windows())[:1], windows[1][:1]
    for name, values in wanted.columns.items():
        np.testing.assert_array_equal(batch.columns[name], values, err_msg=name)

"""The log-probability seam against Paddle's own log_softmax and its autograd, in every storage and
memory regime.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import GOLDEN
from weights import normal

from ernie_tune.objectives import logprobs
from ernie_tune.objectives.logprobs import token_logp, token_logp_and_entropy


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
@pytest.mark.parametrize("chunk_bytes", [1, 700, 2**30])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("transposed", [True, False])
def test_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, transposed: bool, temperature: float, chunk_bytes: int, keep_bytes: int
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(logprobs, "KEEP_BYTES", keep_bytes)
    hidden, weight = (
        paddle.to_tensor(normal(n, s), stop_gradient=False)
        for n, s in (("h", (11, 6)), ("w", (29, 6) if transposed else (6, 29)))
    )
    target, grad = paddle.to_tensor(np.arange(11) * 5 % 29), paddle.to_tensor(normal("g", (11,)))
    logp = token_logp(hidden, weight, target, transposed=transposed, temperature=temperature)
    (logp * grad).sum().backward()
    got = [logp.numpy(), hidden.grad.numpy(), weight.grad.numpy()]
    hidden.clear_gradient(False), weight.clear_gradient(False)
    scores = paddle.matmul(hidden, weight, transpose_y=transposed) / temperature
    want = paddle.take_along_axis(paddle.nn.functional.log_softmax(scores, -1), target.unsqueeze(1), 1).squeeze(1)
    (want * grad).sum().backward()
    for a, b in zip(got, [want.numpy(), hidden.grad.numpy(), weight.grad.numpy()], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("keep_bytes", [0, 2**30])
@pytest.mark.parametrize("chunk_bytes", [700, 2**30])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("banned", [(), (0,), (3, 4, 28)])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_banned_ids_and_entropy(
    monkeypatch: pytest.MonkeyPatch,
    transposed: bool,
    temperature: float,
    chunk_bytes: int,
    keep_bytes: int,
    banned: tuple[int, ...],
    scale: float,
) -> None:
    """Against log_softmax over the columns that are left, and minus its mean over its own
    distribution; scores far apart take the shifted path.
    """
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(logprobs, "KEEP_BYTES", keep_bytes)
    hidden, weight = (
        paddle.to_tensor(normal(n, s) * k, stop_gradient=False)
        for n, s, k in (("h", (11, 6), scale), ("w", (29, 6) if transposed else (6, 29), 1.0))
    )
    left = np.setdiff1d(np.arange(29), banned)
    target = left[np.arange(11) * 5 % len(left)]
    grad, more = (paddle.to_tensor(normal(n, (11,))) for n in "gm")
    logp, entropy = token_logp_and_entropy(
        hidden, weight, paddle.to_tensor(target), transposed=transposed, temperature=temperature, banned=banned
    )
    ((logp * grad).sum() + (entropy * more).sum()).backward()
    got = [logp.numpy(), entropy.numpy(), hidden.grad.numpy(), weight.grad.numpy()]
    plain = token_logp(
        hidden, weight, paddle.to_tensor(target), transposed=transposed, temperature=temperature, banned=banned
    )
    np.testing.assert_array_equal(plain.numpy(), got[0])
    hidden.clear_gradient(False), weight.clear_gradient(False)
    scores = paddle.matmul(hidden, weight, transpose_y=transposed) / temperature
    kept = paddle.index_select(scores, paddle.to_tensor(left), axis=1)
    # Paddle's log_softmax stops at -64 on a CPU
    logs = kept - paddle.logsumexp(kept, -1, keepdim=True)
    at = paddle.to_tensor(np.searchsorted(left, target)).unsqueeze(1)
    want = paddle.take_along_axis(logs, at, 1).squeeze(1)
    spread = -(logs.exp() * logs).sum(-1)
    ((want * grad).sum() + (spread * more).sum()).backward()
    for a, b in zip(got, [want.numpy(), spread.numpy(), hidden.grad.numpy(), weight.grad.numpy()], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-9 if scale > 1 else 1e-12)


def test_equal_support() -> None:
    """The outside oracle's example: what is left shares the probability of what cannot be
    chosen.
    """
    given = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))
    hidden = paddle.to_tensor([given["inputs"]["support_logits"]], dtype="float64")
    ask = lambda banned: token_logp(  # noqa: E731
        hidden,
        paddle.eye(5, dtype="float64"),
        paddle.to_tensor([given["inputs"]["support_token"]]),
        transposed=True,
        banned=banned,
    ).item()
    assert ask(()) == pytest.approx(given["outputs"]["rollout"]["logp_all"], abs=1e-11)
    assert ask(given["inputs"]["support_banned"]) == pytest.approx(
        given["outputs"]["rollout"]["logp_without_banned"], abs=1e-11
    )


def test_frozen_sides_get_no_gradient() -> None:
    hidden, weight = (paddle.to_tensor(normal(n, s)) for n, s in (("h", (3, 4)), ("w", (7, 4))))
    hidden.stop_gradient = False
    token_logp(hidden, weight, paddle.to_tensor([1, 2, 3]), transposed=True).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    hidden2, weight2 = hidden.detach(), weight.detach()
    weight2.stop_gradient = False
    token_logp(hidden2, weight2, paddle.to_tensor([1, 2, 3]), transposed=True).sum().backward()
    assert hidden2.grad is None
    assert weight2.grad is not None


def test_extreme_scores_stay_finite() -> None:
    """A target 1e4 below the best: -1e4, not -inf; its gradient is the softmax, not NaN."""
    hidden = paddle.to_tensor([[1e4, 0.0]], stop_gradient=False)
    logp = token_logp(hidden, paddle.eye(2), paddle.to_tensor([1]), transposed=True)
    logp.backward()
    assert logp.item() == -1e4
    np.testing.assert_allclose(hidden.grad.numpy(), [[-1.0, 1.0]], atol=1e-6)
    for below in (30.0, 60.0, 70.0, 100.0):
        assert (
            token_logp(paddle.to_tensor([[below, 0.0]]), paddle.eye(2), paddle.to_tensor([1]), transposed=True).item()
            == -below
        )


def test_what_is_only_logged_costs_the_gradient_nothing() -> None:
    """Entropy beside a loss of log-probabilities alone, and alone: each has its own gradient."""
    rng = np.random.default_rng(0)

    def gradient(loss: Any) -> np.ndarray:
        hidden = paddle.to_tensor(rng_hidden, stop_gradient=False)
        loss(hidden).backward()
        return hidden.grad.numpy()

    rng_hidden = rng.standard_normal((6, 8))
    weight, target = paddle.to_tensor(rng.standard_normal((8, 20))), paddle.to_tensor(np.arange(6))
    both = lambda hidden: token_logp_and_entropy(hidden, weight, target, transposed=False)  # noqa: E731
    alone = gradient(lambda hidden: token_logp(hidden, weight, target, transposed=False).sum())
    np.testing.assert_allclose(gradient(lambda hidden: both(hidden)[0].sum()), alone, atol=1e-12)

    def entropy(hidden: Any) -> Any:
        logp = paddle.nn.functional.log_softmax(hidden @ weight)
        return -(logp.exp() * logp).sum()

    np.testing.assert_allclose(gradient(lambda hidden: both(hidden)[1].sum()), gradient(entropy), atol=1e-10)

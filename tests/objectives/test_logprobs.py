"""The log-probability seam against Paddle's own log_softmax and its autograd, in every storage and memory regime."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from weights import normal

from ernie_tune.objectives import logprobs
from ernie_tune.objectives.logprobs import token_logp


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

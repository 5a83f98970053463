"""The worked examples and what the preference tests do with them: losses as functions of
numpy vectors, gradients both ways.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.preference import Candidates, Pairs

# V-pair (11.1): three pairs; the chosen answers first.
LOGP = np.array([-12, -8, -5.5, -14, -7, -6.0])
REF = np.array([-12.5, -8.2, -5, -13, -7.5, -6.4])
LENGTH = np.array([6, 4, 10, 8, 3, 6])
PAIRS = Pairs.of([0, 1, 2], [3, 4, 5])
# Four answers, best first (11.3).
REWARDS = np.array([0.3, 0.1, -0.05, -0.4])


def tensor(values: np.ndarray | list[float], *, grad: bool = False) -> Tensor:
    return paddle.to_tensor(np.asarray(values, np.float64), stop_gradient=not grad)


def candidates(
    logp: np.ndarray | Tensor = LOGP, ref: np.ndarray | None = REF, length: np.ndarray = LENGTH
) -> Candidates:
    logp = logp if isinstance(logp, Tensor) else tensor(logp)
    return Candidates(logp, length[: logp.shape[0]], None if ref is None else tensor(ref))


def mean(out: LossOut) -> float:
    return float(out.total) / out.count


def value_and_grad(loss: Callable[[Tensor], LossOut], at: np.ndarray) -> tuple[float, np.ndarray]:
    """The mean loss and its gradient by `at`, from autograd."""
    x = tensor(at, grad=True)
    out = loss(x)
    (out.total / out.count).backward()
    return mean(out), np.zeros_like(at) if x.grad is None else x.grad.numpy()


def finite_difference(loss: Callable[[Tensor], LossOut], at: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """Central differences of the mean loss; their own error is of the order of step squared, some
    1e-10.
    """
    out = np.zeros_like(at)
    for i in range(at.size):
        moved = [at.copy(), at.copy()]
        moved[0].flat[i] += step
        moved[1].flat[i] -= step
        high, low = (mean(loss(tensor(m))) for m in moved)
        out.flat[i] = (high - low) / (2 * step)
    return out


def assert_gradient(loss: Callable[[Tensor], LossOut], at: np.ndarray) -> np.ndarray:
    """Autograd agrees with finite differences; returns the gradient."""
    gradient = value_and_grad(loss, at)[1]
    np.testing.assert_allclose(gradient, finite_difference(loss, at), atol=1e-7, rtol=1e-6)
    return gradient


def assert_same(a: Callable[[Tensor], LossOut], b: Callable[[Tensor], LossOut], at: np.ndarray) -> None:
    """Two losses have one value and one gradient."""
    (value_a, grad_a), (value_b, grad_b) = value_and_grad(a, at), value_and_grad(b, at)
    assert abs(value_a - value_b) < 1e-12, (value_a, value_b)
    np.testing.assert_allclose(grad_a, grad_b, atol=1e-12)
    assert np.abs(grad_a).max() > 1e-6, "a comparison of zeros shows nothing"

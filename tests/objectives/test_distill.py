"""Divergences from a teacher against values of another implementation (`golden/online/oracle.json`,
which TRL 1.16 confirms), with gradients; sampled reverse KL as an advantage."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import paddle
import pytest
from conftest import GOLDEN

from ernie_tune.objectives import advantages as adv
from ernie_tune.objectives.distill import ScoreHead, token_jsd

ORACLE = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))
IN, OUT = ORACLE["inputs"], ORACLE["outputs"]
KEPT = np.array(IN["distill_mask"], bool)
STUDENT, TEACHER = (np.array(IN[name])[KEPT] for name in ("student_logits", "teacher_logits"))
V = STUDENT.shape[1]


def head(transposed: bool = True, size: int = V) -> ScoreHead:
    return ScoreHead(paddle.eye(size, dtype="float64"), transposed)


def divergence(student: np.ndarray, beta: float, temperature: float = 1.0, **how: Any) -> tuple[float, np.ndarray]:
    """(mean over tokens, its gradient by the student's scores)."""
    x = paddle.to_tensor(student, dtype="float64", stop_gradient=False)
    out_N = token_jsd(x, head(), paddle.to_tensor(TEACHER, dtype="float64"), head(False), beta, temperature, **how)
    out_N.mean().backward()
    return float(out_N.mean()), x.grad.numpy()


CASES = {name: tuple(float(x) for x in name.removeprefix("beta_").split("_temperature_")) for name in OUT["gkd"]}


@pytest.mark.parametrize("name", CASES)
def test_the_oracle(name: str) -> None:
    assert divergence(STUDENT, *CASES[name])[0] == pytest.approx(OUT["gkd"][name], abs=1e-9)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("banned", [(), (1, 4)])
def test_gradients_are_those_of_finite_differences(name: str, banned: tuple[int, ...]) -> None:
    grad, step = divergence(STUDENT, *CASES[name], banned=banned)[1], 1e-6
    for i, v in np.ndindex(STUDENT.shape):
        moved = [STUDENT.copy(), STUDENT.copy()]
        moved[0][i, v] += step
        moved[1][i, v] -= step
        up, down = (divergence(x, *CASES[name], banned=banned)[0] for x in moved)
        assert grad[i, v] == pytest.approx((up - down) / (2 * step), abs=1e-8)
        assert abs(grad[i, v]) < 1e-300 or v not in banned


def test_products_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states of different widths, heads either way round, a token a chunk: as autograd has
    it of whole scores.
    """
    rng = np.random.default_rng(3)
    h, w, th, tw = (rng.normal(size=s) for s in ((4, 3), (3, 7), (4, 2), (7, 2)))
    grads = []
    for chunked in (True, False):
        x, weight = (paddle.to_tensor(a, stop_gradient=False) for a in (h, w))
        teacher = paddle.to_tensor(th)
        if chunked:
            monkeypatch.setattr("ernie_tune.objectives.distill.CHUNK_BYTES", 4 * 7)
            out_N = token_jsd(x, ScoreHead(weight, False), teacher, ScoreHead(paddle.to_tensor(tw), True), 0.3, 1.5)
        else:
            s = paddle.nn.functional.log_softmax(paddle.matmul(x, weight) / 1.5, -1)
            t = paddle.nn.functional.log_softmax(
                paddle.matmul(teacher, paddle.to_tensor(tw), transpose_y=True) / 1.5, -1
            )
            m = paddle.log(0.7 * paddle.exp(s) + 0.3 * paddle.exp(t))
            out_N = (0.3 * paddle.exp(t) * (t - m) + 0.7 * paddle.exp(s) * (s - m)).sum(-1)
        (out_N * paddle.to_tensor(np.arange(1.0, 5.0))).sum().backward()
        grads.append((out_N.numpy(), x.grad.numpy(), weight.grad.numpy()))
    for ours, theirs in zip(*grads, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_far_apart() -> None:
    """What one calls impossible and the other certain gives numbers."""
    x = paddle.to_tensor(np.array([[200.0, 0.0]]), stop_gradient=False)
    teacher = paddle.to_tensor(np.array([[0.0, 200.0]]))
    for beta, wanted in ((0.0, 200.0), (0.5, np.log(2)), (1.0, 200.0)):
        out_N = token_jsd(x, head(size=2), teacher, head(size=2), beta)
        assert out_N.item() == pytest.approx(wanted, rel=1e-9)
        x.clear_gradient()
        out_N.backward()
        assert np.isfinite(x.grad.numpy()).all()


def test_sampled_reverse_kl_is_an_advantage() -> None:
    mask = np.array(IN["mask"], bool)
    teacher, old, roll = (np.array(IN[name])[mask] for name in ("lp_teacher", "lp_old", "lp_roll"))
    alone = adv.with_teacher(np.zeros(len(roll)), teacher, roll, 1.0)
    np.testing.assert_allclose(alone, np.array(OUT["opd"]["advantage"])[mask], atol=1e-9)
    assert -alone.mean() == pytest.approx(OUT["opd"]["reverse_kl"], abs=1e-9)
    group = np.repeat(OUT["advantages"]["grpo_eps1e-4"], IN["lengths"])
    mixed = adv.with_teacher(group, teacher, old, 1.0)
    np.testing.assert_allclose(mixed, np.array(OUT["opd"]["advantage_mixed"])[mask], atol=1e-9)


def test_what_cannot_be() -> None:
    x = paddle.to_tensor(STUDENT)
    with pytest.raises(ValueError, match=r"distill_beta \(1.5\) must lie in \[0, 1\]"):
        token_jsd(x, head(), x, head(), 1.5)
    with pytest.raises(ValueError, match=r"teacher's vocabulary \(4 ids\) must be the student's \(5\)"):
        token_jsd(x, head(), x, head(size=4), 0.5)

"""Decoding with several operators at once in NumPy against the same model with one Paddle operator
after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from weights import case_rows

from ernie_tune.generate.batch import Prompt, RunningBatch
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models import mkl
from ernie_tune.models.layers import gated_halves, rms_norm, rotate_pairs, swiglu, turn_factors

pytestmark = pytest.mark.skipif(not mkl.usable("float32"), reason="needs Paddle's math library for x86")


def decoded(model: Any, rows: Any) -> tuple[list[list[int]], np.ndarray]:
    """Tokens and log-probabilities of 12 greedy steps."""
    batch = RunningBatch(model, model.config.tokens)
    params = SamplingParams(max_new_tokens=12)
    batch.join([Prompt(row, params, key) for key, row in enumerate(rows)])
    steps = []
    while len(batch):
        steps.append([(event.token_id, event.logp) for event in batch.step()])
    return [[token for token, _ in step] for step in steps], np.array([[logp for _, logp in step] for step in steps])


@pytest.mark.parametrize(("name", "dtype", "tight"), [
    ("tiny-b", "float32", 1e-5), ("tiny-c", "float32", 1e-5), ("tiny-b", "float64", 1e-5), ("tiny-a", "float32", 1e-5),
])  # fmt: skip
def test_a_model_decodes_the_same(
    name: str, dtype: str, tight: float, golden_model: Any, golden: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = golden_model(name, dtype), golden("tiny_c" if name == "tiny-c" else "tiny_b")
    rows = [case_rows(data, case)[0] for case in (("text",) if name == "tiny-a" else ("text", "image", "mixed"))]
    tokens, logps = decoded(model, rows)
    calls: list[int] = []
    monkeypatch.setattr(mkl, "is_stepping", lambda: bool(calls.append(1)))
    slow_tokens, slow_logps = decoded(model, rows)
    assert len(calls) > 100
    assert tokens == slow_tokens
    np.testing.assert_allclose(logps, slow_logps, atol=tight)


@pytest.mark.parametrize(("dtype", "tight"), [("float32", 3e-7), ("float64", 3e-16)])
def test_each_layer_by_itself(dtype: str, tight: float) -> None:
    rng = np.random.default_rng(0)
    x, weight, wide = (paddle.to_tensor(rng.standard_normal(s), dtype) for s in ((5, 16), (16,), (5, 24)))
    heads = paddle.to_tensor(rng.standard_normal((5, 2, 8)), dtype)
    turn = turn_factors(rng.standard_normal((5, 4)), 2, dtype)
    far = paddle.to_tensor([[-2000.0, 0.0, 30.0]], dtype)
    cases: list[Any] = [
        lambda: rms_norm(x, weight, 1e-5),
        lambda: rotate_pairs(heads, turn),
        lambda: swiglu(x, x * 2),
        lambda: swiglu(far, paddle.ones_like(far)),
        lambda: gated_halves(wide) if mkl.is_stepping() else swiglu(wide[:, :12], wide[:, 12:]),
    ]
    with paddle.no_grad():
        for case in cases:
            plain = case()
            assert not mkl.is_stepping()
            with mkl.stepping():
                found = case()
            assert found.dtype == plain.dtype
            assert found.shape == plain.shape
            np.testing.assert_allclose(
                found.numpy(), plain.numpy(), rtol=0, atol=tight * max(1, abs(plain.numpy()).max())
            )

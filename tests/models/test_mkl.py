"""Paddle's math library, called directly: values against NumPy, far scores, and the same model
without it.
"""

from __future__ import annotations

import contextlib

import numpy as np
import paddle
import pytest
from weights import case_rows, normal

from ernie_tune.models import mkl, tiles
from ernie_tune.models.attention import AttentionPlan, segment_attention
from ernie_tune.models.inputs import pack
from ernie_tune.objectives.logprobs import token_logp


@pytest.mark.parametrize(("dtype", "ulp"), [("float32", 1.2e-7), ("float64", 2.3e-16)])
def test_exp_and_tanh(dtype: str, ulp: float) -> None:
    x = (normal("x", (7, 33)) * 9).astype(dtype)
    exact = x.astype(np.longdouble)
    np.testing.assert_allclose(
        mkl.exp_(paddle.to_tensor(x), far=False).numpy(), np.exp(exact).astype(dtype), rtol=3 * ulp
    )
    mkl.tanh_array_(x)
    np.testing.assert_allclose(x, np.tanh(exact).astype(dtype), atol=ulp)


def test_what_is_far_is_seen_and_clipped() -> None:
    assert mkl.near_zero(paddle.to_tensor([[-59.0, 59.0]]))
    assert not mkl.near_zero(paddle.to_tensor([[0.0, 61.0]]))
    assert not mkl.near_zero(paddle.to_tensor([[0.0, -1e30]]))
    assert not mkl.near_zero(paddle.to_tensor([[0.0, np.nan]]))
    np.testing.assert_array_equal(
        mkl.below_zero_(paddle.to_tensor([[3.0, 5.0], [-1e4, 0.0]])).numpy(), [[-2, 0], [-1e4, 0]]
    )
    e = mkl.exp_(paddle.to_tensor([[0.0, -1e30, np.nan]]), far=True).numpy()
    assert e[0, 0] == 1
    assert 0 < e[0, 1] < 1e-34
    assert np.isnan(e[0, 2])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_of_every_expert(dtype: str) -> None:
    """Experts 1 and 3 have no rows; operands that are views of something wider are copied."""
    counts = (3, 0, 4, 0)
    x, g, w = (normal(n, s).astype(dtype) for n, s in (("x", (7, 5)), ("g", (7, 6)), ("w", (4, 5, 6))))
    wide = paddle.to_tensor(np.concatenate([x, x], axis=1))
    of_row = np.repeat(np.arange(4), counts)
    tolerance = 1e-5 if dtype == "float32" else 1e-13
    tensors = wide[:, :5], paddle.to_tensor(g), paddle.to_tensor(w)
    np.testing.assert_allclose(
        mkl.rows_by_matrices(tensors[0], tensors[2], counts).numpy(),
        np.einsum("md,mdi->mi", x, w[of_row]),
        atol=tolerance,
    )
    np.testing.assert_allclose(
        mkl.rows_by_matrices(tensors[1], tensors[2], counts, transposed=True).numpy(),
        np.einsum("mi,mdi->md", g, w[of_row]),
        atol=tolerance,
    )
    np.testing.assert_allclose(
        mkl.rows_by_rows(tensors[0], tensors[1], counts).numpy(),
        np.einsum("me,md,mi->edi", np.eye(4)[of_row], x, g),
        atol=tolerance,
    )


@pytest.mark.parametrize("vocabulary", [1, 256, 300, 1000])
def test_rows_by_a_table_of_any_length(vocabulary: int) -> None:
    x, table = normal("x", (3, 7)), normal("t", (vocabulary, 7))
    wide = paddle.to_tensor(np.concatenate([x, x], axis=1))
    found = mkl.rows_by_table(wide[:, :7], paddle.to_tensor(table)).numpy()
    np.testing.assert_allclose(found, x @ table.T, atol=1e-13)


def test_in_place_functions_refuse_views_with_gaps() -> None:
    with pytest.raises(AssertionError, match="contiguous"):
        mkl.exp_(paddle.zeros([4, 4])[:, :2], far=False)


def test_products_refuse_what_does_not_fit() -> None:
    """The library would read beyond the end."""
    x, w = paddle.zeros([7, 5]), paddle.zeros([2, 5, 6])
    for counts, rows in (((3, 3), x), ((3, 4, 0), x), ((3, 4), paddle.zeros([7, 4]))):
        with pytest.raises(ValueError, match="pass the router's counts"):
            mkl.rows_by_matrices(rows, w, counts)
    with pytest.raises(ValueError, match="pass the router's counts"):
        mkl.rows_by_rows(x, paddle.zeros([6, 6]), (3, 4))
    assert not mkl.ready(x, w.astype("float64"))


@pytest.mark.parametrize("library", [True, False])
def test_attention_with_far_scores_picks_one_key(monkeypatch: pytest.MonkeyPatch, library: bool) -> None:
    """Scores of hundreds: each query takes the value of its best key, and a later key that is
    better still counts for nothing.
    """
    if not library:
        monkeypatch.setattr(mkl, "_library", lambda: None)
    q = paddle.full([3, 1, 4], 200.0)
    k = paddle.to_tensor(np.array([1.0, 0.0, 3.0], np.float32)[:, None, None] * np.ones((1, 1, 4), np.float32))
    v = paddle.to_tensor(normal("v", (3, 1, 4)).astype(np.float32))
    for x in (q, k, v):
        x.stop_gradient = False
    out = segment_attention(q, k, v, AttentionPlan((0, 3), causal=True))
    np.testing.assert_allclose(out.numpy(), v.numpy()[[0, 0, 2]], atol=1e-6)
    out.sum().backward()
    np.testing.assert_allclose(v.grad.numpy()[:, 0, 0], [2.0, 0.0, 1.0], atol=1e-6)
    np.testing.assert_allclose(q.grad.numpy(), 0.0, atol=1e-4)


@pytest.mark.parametrize("causal", [True, False])
def test_tiles_of_far_scores_are_those_of_the_operators(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    """Some tiles need a shift and some do not; the operators take each row's maximum off."""
    monkeypatch.setattr(tiles, "TILE_SCORES", 512)
    tensors = [
        paddle.to_tensor(normal(n, (90, h, 4)) * size) for n, h, size in (("q", 2, 9), ("k", 1, 200), ("v", 1, 1))
    ]
    tensors[0][:50] *= 1e-3
    grad = paddle.to_tensor(normal("g", (90, 2, 4)))
    for x in tensors:
        x.stop_gradient = False
    results = []
    for how in (contextlib.nullcontext, mkl.left_alone):
        with how():
            out = segment_attention(*tensors, AttentionPlan((0, 30, 90), causal))
        results.append([out, *paddle.grad(out, tensors, grad)])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got.numpy(), want.numpy(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("pairs", [1, 3, 11])
def test_products_of_arrays_with_gaps(transposed: tuple[bool, bool], pairs: int) -> None:
    shapes = ((4, 6), (6, 5))
    left, right = (
        normal(str(i), (pairs, *(shape[::-1] if flag else shape)[:1], 9))[..., : (shape[::-1] if flag else shape)[1]]
        for i, (shape, flag) in enumerate(zip(shapes, transposed, strict=True))
    )
    want = np.matmul(*(x.transpose(0, 2, 1) if flag else x for x, flag in zip((left, right), transposed, strict=True)))
    room = np.ones((pairs, 4, 8))
    mkl.multiply(left, right, room[..., :5], transposed)
    np.testing.assert_allclose(room[..., :5], want, atol=1e-13)
    mkl.multiply(left, right, room[..., :5], transposed, add=True)
    np.testing.assert_allclose(room[..., :5], 2 * want, atol=1e-13)
    assert (room[..., 5:] == 1).all(), "what lies between rows is not touched"


def test_model_without_the_library_computes_the_same(monkeypatch: pytest.MonkeyPatch, golden_model, golden) -> None:
    model, data = golden_model("tiny-b", "float64"), golden("tiny_b")
    packed = pack(case_rows(data, "mixed"), model.config.tokens)
    targets = paddle.to_tensor(np.arange(packed.num_tokens) * 7 % 600)
    results = []
    for library in (mkl._library(), None):
        monkeypatch.setattr(mkl, "_library", lambda library=library: library)
        model.clear_gradients(set_to_zero=False)
        weight, transposed = model.head_weight()
        logp = token_logp(model(packed), weight, targets, transposed=transposed)
        logp.mean().backward()
        results.append([logp.numpy(), *(p.grad.numpy() for p in model.parameters() if p.grad is not None)])
    model.clear_gradients(set_to_zero=False)
    for a, b in zip(*results, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12 * max(1.0, np.abs(b).max()))

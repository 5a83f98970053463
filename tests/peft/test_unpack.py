"""peft/unpack.py against codes times scales in float64, for widths whose groups fall across the
halves of int4's bytes, for several threads, and for experts without rows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import paddle
import pytest

from ernie_tune.models import mkl, threads
from ernie_tune.peft import unpack
from ernie_tune.peft.quantize import QuantizedWeight, _StackProduct, quantize, unpack_halves
from ernie_tune.peft.unpack import Codes

pytestmark = pytest.mark.skipif(not unpack.ready(paddle.zeros([1])), reason="Paddle has no MKL here")


def made(rows: int, columns: int, bits: int, seed: int = 0) -> tuple[Codes, np.ndarray]:
    """A matrix in codes, and the same in float64."""
    weight = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    codes, scale = quantize(weight * np.linspace(0.1, 9, rows, dtype=np.float32)[:, None], bits)
    plain = unpack_halves(codes) if bits == 4 else codes
    group_rows = rows // scale.shape[0]
    return Codes(codes, scale, bits), plain.astype(np.float64) * scale.astype(np.float64).repeat(group_rows, 0)


# 192 rows: the halves begin at 0 and 96, in the middle of the second group of 64; 160: one group.
SHAPES = [(192, 40, 4), (128, 7, 4), (160, 24, 4), (2, 3, 4), (192, 40, 8), (5, 3, 8)]


@pytest.mark.parametrize("piece_bytes", [64, 2**20])
@pytest.mark.parametrize(("rows", "columns", "bits"), SHAPES)
def test_products_and_the_whole(monkeypatch, rows: int, columns: int, bits: int, piece_bytes: int) -> None:
    monkeypatch.setattr(unpack, "PIECE_BYTES", piece_bytes)
    unpack._pieces.cache_clear()
    matrix, want = made(rows, columns, bits)
    assert np.array_equal(unpack.whole(matrix), want.astype(np.float32))
    x, grad = np.random.default_rng(1).standard_normal((2, 6, max(rows, columns))).astype(np.float32)
    x, grad = np.ascontiguousarray(x[:, :rows]), np.ascontiguousarray(grad[:, :columns])
    size = np.abs(want).max() * np.sqrt(rows)
    for count in (1, 3):
        monkeypatch.setattr(mkl, "max_threads", lambda count=count: count)
        forward = unpack.rows_by_codes(paddle.to_tensor(x), matrix).numpy()
        back = unpack.rows_by_codes_transposed(paddle.to_tensor(grad), matrix).numpy()
        assert np.abs(forward - x @ want).max() < 1e-5 * size
        assert np.abs(back - grad @ want.T).max() < 1e-5 * size
    unpack._pieces.cache_clear()


@pytest.mark.parametrize("bits", [4, 8])
def test_a_stack_leaves_no_row_out(monkeypatch, bits: int) -> None:
    parts = [made(192, 24, bits, seed) for seed in range(4)]
    stack = QuantizedWeight(
        *(paddle.to_tensor(np.stack([getattr(c, k) for c, _ in parts])) for k in ("codes", "scale")), bits
    )
    counts = (3, 0, 5, 1)
    x = paddle.randn([9, 192])
    x.stop_gradient = False
    expert_of = np.repeat(range(4), counts)
    for count in (1, 2):
        monkeypatch.setattr(mkl, "max_threads", lambda count=count: count)
        y = _StackProduct.apply(x, stack, counts)
        grad = paddle.randn(y.shape)
        (dx,) = paddle.grad(y, x, grad)
        for i, e in enumerate(expert_of):
            matrix = parts[e][1]
            assert np.allclose(y[i].numpy(), x[i].numpy() @ matrix, rtol=1e-4, atol=1e-3)
            assert np.allclose(dx[i].numpy(), grad[i].numpy() @ matrix.T, rtol=1e-4, atol=1e-3)
    assert _StackProduct.apply(x[:0], stack, (0, 0, 0, 0)).shape == [0, 24]


@pytest.mark.parametrize("bits", [4, 8])
def test_dense_is_what_the_operators_of_paddle_make(bits: int) -> None:
    matrix, _ = made(192, 24, bits)
    weight = QuantizedWeight(paddle.to_tensor(matrix.codes), paddle.to_tensor(matrix.scale), bits)
    assert np.array_equal(weight.dense().numpy(), weight.plain(weight.codes, weight.scale).numpy())


def test_threads_share_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product keeps its operands' addresses: two threads in one would multiply each other's."""
    barrier, users = threading.Barrier(2), dict[int, set[int]]()

    class Watched(mkl.Products):
        def run(self, *operands: object) -> None:
            users.setdefault(id(self), set()).add(threading.get_ident())
            super().run(*operands)  # type: ignore[arg-type]

    single_thread = mkl.single_thread

    @contextlib.contextmanager
    def both_at_work() -> Iterator[None]:
        barrier.wait(timeout=60)
        with single_thread():
            yield

    monkeypatch.setattr(mkl, "Products", Watched)
    monkeypatch.setattr(mkl, "single_thread", both_at_work)
    monkeypatch.setattr(mkl, "max_threads", lambda: 2)
    unpack._product.cache_clear()
    try:
        parts = [made(128, 24, 8, seed) for seed in range(4)]
        spans = [(e, 2 * e, 2 * e + 2) for e in range(4)]  # all of one size
        unpack.stack_product(paddle.randn([8, 128]), lambda e: parts[e][0], spans, (128, 24))
        unpack.stack_product_transposed(paddle.randn([8, 24]), lambda e: parts[e][0], spans, (128, 24))
        assert set(map(len, users.values())) == {1}
        assert len(set().union(*users.values())) == 2
    finally:
        unpack._product.cache_clear()


def test_a_fork_gets_threads_of_its_own() -> None:
    assert threads._pool(1, 2) is threads._pool(1, 2)
    assert threads._pool(1, 2) is not threads._pool(2, 2)

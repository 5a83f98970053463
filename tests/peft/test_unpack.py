"""peft/unpack.py against codes times scales in float64, for widths whose groups fall across the
halves of int4's bytes, for several threads, and for experts without rows.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest

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
    for threads in (1, 3):
        monkeypatch.setattr(unpack, "threads", lambda threads=threads: threads)
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
    for threads in (1, 2):
        monkeypatch.setattr(unpack, "threads", lambda threads=threads: threads)
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


def test_a_fork_gets_threads_of_its_own() -> None:
    assert unpack._pool(1, 2) is unpack._pool(1, 2)
    assert unpack._pool(1, 2) is not unpack._pool(2, 2)

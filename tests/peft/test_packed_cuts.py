"""Parts of quantised matrices, as ranks hold them: whatever the groups of their scales are, a part
multiplies with the very numbers of the whole.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_tune.peft.quantize import QuantizedWeight, pack_halves, quantize
from ernie_tune.peft.unpack import Codes

ROWS, COLUMNS, EXPERTS = 96, 12, 4


def codes_of(bits: int, groups: int, seed: int) -> Codes:
    rng, most = np.random.default_rng(seed), 2 ** (bits - 1) - 1
    codes = rng.integers(-most, most + 1, (ROWS, COLUMNS)).astype(np.int8)
    scale = rng.uniform(0.5, 2, (groups, COLUMNS)).astype(np.float32)
    return Codes(pack_halves(codes) if bits == 4 else codes, scale, bits)


def weight_of(matrices: list[Codes], stacked: bool, mapped: bool) -> QuantizedWeight:
    if mapped:
        return QuantizedWeight.mapped(matrices, stacked)
    codes, scale = (np.stack([getattr(m, which) for m in matrices]) for which in ("codes", "scale"))
    if not stacked:
        codes, scale = codes[0], scale[0]
    return QuantizedWeight(paddle.to_tensor(codes), paddle.to_tensor(scale), matrices[0].bits)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8, 12])
@pytest.mark.parametrize("size", [2, 3, 4, 6, 8])
def test_rows_keep_their_scales(bits: int, groups: int, size: int, mapped: bool) -> None:
    """Groups of a folder for two or four cards, cut over fewer, as many or more ranks, and groups
    whose borders no rank's rows end at.
    """
    whole = weight_of([codes_of(bits, groups, 0)], False, mapped)
    want = whole.dense().numpy()
    parts = []
    for rank in range(size):
        part = weight_of([codes_of(bits, groups, 0)], False, mapped)
        part.cut(0, rank, size)
        assert part.shape == (ROWS // size, COLUMNS)
        values = part._values()
        assert part.nbytes == sum(x.numpy().nbytes for x in values)
        np.testing.assert_array_equal(part.dense().numpy(), part.plain(*values).numpy())
        parts.append(part.dense().numpy())
    np.testing.assert_array_equal(np.concatenate(parts), want)


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize(("axis", "size"), [(None, 2), (1, 3), (0, 4)])
def test_stacks(axis: int | None, size: int, mapped: bool) -> None:
    matrices = [codes_of(4, 3, e) for e in range(EXPERTS)]
    whole = weight_of(matrices, True, mapped)
    want = np.stack([whole.dense(e).numpy() for e in range(EXPERTS)])
    for rank in range(size):
        part = weight_of(matrices, True, mapped)
        part.cut(axis, rank, size)
        got = np.stack([part.dense(e).numpy() for e in range(part.shape[0])])
        np.testing.assert_array_equal(got, np.split(want, size, 0 if axis is None else 1 + axis)[rank])
        assert bool(part._mapped) == (mapped and axis is None), "experts that are kept stay in the file"


@pytest.mark.parametrize("bits", [8, 4])
def test_values_that_come_after_the_cut(bits: int) -> None:
    values = np.random.default_rng(0).standard_normal((192, 8)).astype(np.float32)
    for size in (2, 4):
        for rank in range(size):
            with paddle.LazyGuard():
                empty = paddle.nn.Linear(192, 8).weight
            late = QuantizedWeight.rounded(empty, bits)
            late.cut(0, rank, size)
            late.take(lambda _: values)
            early = QuantizedWeight.rounded(paddle.to_tensor(values), bits)
            early.cut(0, rank, size)
            np.testing.assert_array_equal(late.dense().numpy(), early.dense().numpy())
            assert late.nbytes == early.nbytes


def test_stacks_are_rounded_into_their_own_memory() -> None:
    values = np.random.default_rng(1).standard_normal((3, 128, 8)).astype(np.float32)
    for bits in (8, 4):
        made = QuantizedWeight.rounded(paddle.to_tensor(values), bits)
        codes, scale = made._values()
        for e in range(3):
            want = quantize(values[e], bits)
            np.testing.assert_array_equal(codes[e].numpy(), want[0])
            np.testing.assert_array_equal(scale[e].numpy(), want[1])


def test_an_odd_part_of_four_bit_rows() -> None:
    weight = weight_of([codes_of(4, 2, 0)], False, True)
    with pytest.raises(
        ValueError, match=r"rows of a rank \(96 / 32\) must be even for 4 bits; lower the degree, or use 8"
    ):
        weight.cut(0, 0, 32)
    with pytest.raises(ValueError, match="must be divisible by 5 ranks"):
        weight.cut(0, 0, 5)

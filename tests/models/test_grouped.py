"""Experts in one grouped product, with NumPy in the kernel's place: the same numbers as one product
an expert, no trust without proof, and one wait for the host a layer.
"""

from __future__ import annotations

import inspect
from itertools import pairwise

import numpy as np
import paddle
import paddle.incubate.nn.functional as kernels
import pytest

from ernie_tune.models import grouped, mkl, moe, proven
from ernie_tune.models.grouped import Arriving, copy_holds, grouped_matmul, kernel_holds, rows_of_experts
from ernie_tune.models.moe import MoELayer
from ernie_tune.models.presets import preset


def one_by_one(lhs, rhs, batch_sizes, trans_lhs=False, trans_rhs=False):  # type: ignore[no-untyped-def]
    """What the kernel's page says of its shapes."""
    x, w = lhs.numpy(), rhs.numpy()
    starts = np.cumsum([0, *batch_sizes])
    spans = [slice(a, b) for a, b in pairwise(starts)]
    if trans_lhs:
        return paddle.to_tensor(np.stack([x[s].T @ w[s] for s in spans]))
    return paddle.to_tensor(np.concatenate([x[s] @ (w[e].T if trans_rhs else w[e]) for e, s in enumerate(spans)]))


@pytest.fixture
def card(monkeypatch):  # type: ignore[no-untyped-def]
    """The paths of a card on a CPU; the list says how often the kernel ran."""
    calls: list[tuple[bool, bool]] = []

    def kernel(lhs, rhs, batch_sizes, trans_lhs=False, trans_rhs=False):  # type: ignore[no-untyped-def]
        calls.append((trans_lhs, trans_rhs))
        return one_by_one(lhs, rhs, batch_sizes, trans_lhs, trans_rhs)

    monkeypatch.setattr(proven, "_verdicts", {})
    monkeypatch.setattr(kernels, "batched_gemm", kernel)
    for module in (grouped, moe):
        monkeypatch.setattr(module, "on_card", lambda x: True)
    monkeypatch.setattr(mkl, "ready", lambda *x: False)
    return calls


def test_the_stand_in_has_the_kernels_signature() -> None:
    theirs, ours = (list(inspect.signature(f).parameters.values()) for f in (kernels.batched_gemm, one_by_one))
    assert [(p.name, p.default) for p in theirs] == [(p.name, p.default) for p in ours]


def results(counts: tuple[int, ...]) -> list[np.ndarray]:
    rng, rows = np.random.default_rng(1), sum(counts)
    x, w = (paddle.to_tensor(rng.standard_normal(s).astype("float32")) for s in ((rows, 6), (len(counts), 6, 8)))
    x.stop_gradient = w.stop_gradient = False
    out = grouped_matmul(x, w, counts)
    grads = paddle.grad(out, [x, w], paddle.to_tensor(rng.standard_normal((rows, 8)).astype("float32")))
    return [t.numpy() for t in (out, *grads)]


@pytest.mark.parametrize("counts", [(3, 0, 4), (0, 0, 2), (1, 1, 1), (0, 7, 0)])
def test_the_kernel_gives_what_the_loop_gives(card, monkeypatch, counts) -> None:  # type: ignore[no-untyped-def]
    got = results(counts)
    assert card[-3:] == [(False, False), (False, True), (True, False)]
    monkeypatch.setattr(grouped, "on_card", lambda x: False)
    before = len(card)
    for a, b in zip(got, results(counts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert len(card) == before


def test_no_rows_at_all_ask_no_kernel(card) -> None:  # type: ignore[no-untyped-def]
    assert grouped_matmul(paddle.zeros([0, 5]), paddle.zeros([3, 5, 6]), (0, 0, 0)).shape == [0, 6]
    assert len(card) == 3  # the trial alone


def ignoring_transposes(lhs, rhs, batch_sizes, trans_lhs=False, trans_rhs=False):  # type: ignore[no-untyped-def]
    return one_by_one(
        lhs, rhs.transpose([0, 2, 1]).reshape(rhs.shape) if trans_rhs else rhs, batch_sizes, trans_lhs, trans_rhs
    )


def leaving_empty_experts(lhs, rhs, batch_sizes, trans_lhs=False, trans_rhs=False):  # type: ignore[no-untyped-def]
    out = one_by_one(lhs, rhs, batch_sizes, trans_lhs, trans_rhs)
    if trans_lhs:  # memory that nobody wrote
        out[batch_sizes.index(0)] = 1e9
    return out


def absent(*_):  # type: ignore[no-untyped-def]
    raise RuntimeError("(NotFound) The kernel `batched_gemm` is not registered.")


@pytest.mark.parametrize("mutant", [ignoring_transposes, leaving_empty_experts, absent])
def test_a_kernel_that_is_wrong_or_absent_is_left_alone(card, monkeypatch, capsys, mutant) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(kernels, "batched_gemm", mutant)
    assert not kernel_holds(6, 8, paddle.float32)
    assert "grouped product does not hold on cpu" in capsys.readouterr().err
    got = results((3, 0, 4))
    monkeypatch.setattr(grouped, "on_card", lambda x: False)
    for a, b in zip(got, results((3, 0, 4)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_counts_without_bincount(card) -> None:  # type: ignore[no-untyped-def]
    chosen = paddle.to_tensor([3, 0, 3, 3, 1])
    assert rows_of_experts(chosen, 5).tolist() == [1, 1, 0, 3, 0]


def test_a_layer_waits_once_and_after_its_shared_experts(card, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    """Text and picture tokens: the same output as on the CPU's path, one copy to the host, waited
    for when the shared experts have been given to the device.
    """
    config = preset("tiny-b")
    layer = MoELayer(config, 1)
    rng = np.random.default_rng(0)
    for parameter in layer.parameters():
        parameter.set_value(rng.standard_normal(parameter.shape).astype("float32") * 0.1)
    x = paddle.to_tensor(rng.standard_normal((9, config.hidden_size)).astype("float32"), stop_gradient=False)
    text, vision = paddle.to_tensor([0, 1, 5, 8]), paddle.to_tensor([2, 3, 4, 6, 7])
    order: list[str] = []

    def copied(rows):  # type: ignore[no-untyped-def]
        order.append("asked")

        def numbers() -> np.ndarray:
            order.append("waited")
            return rows.numpy()

        return numbers

    monkeypatch.setattr(grouped, "_copied", copied)
    monkeypatch.setattr(grouped, "copy_holds", lambda: True)
    shared = layer.shared_experts.register_forward_post_hook(lambda *_: order.append("shared"))
    out = layer(x, text, vision)
    assert order == ["asked", "shared", "waited"]
    out.sum().backward()
    grad = x.grad.numpy()
    x.clear_gradient(False)
    shared.remove()
    for module in (grouped, moe):
        monkeypatch.setattr(module, "on_card", lambda x: False)
    plain = layer(x, text, vision)
    plain.sum().backward()
    np.testing.assert_allclose(out.numpy(), plain.numpy(), atol=1e-5)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-5)


def test_a_copy_that_fails_is_read_plainly(card, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    def fails(x):  # type: ignore[no-untyped-def]
        raise RuntimeError("no pinned memory here")

    monkeypatch.setattr(grouped, "_copied", fails)
    assert not copy_holds()
    assert Arriving(paddle.to_tensor([1, 2]), paddle.to_tensor([0, 5])).tuples() == [(1, 2), (0, 5)]
    assert "copying counts to the host does not hold" in capsys.readouterr().err


def test_a_copy_that_is_read_too_early_is_found_out(card, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(grouped, "_copied", lambda x: lambda: np.zeros(x.shape, np.int64))
    assert not copy_holds()

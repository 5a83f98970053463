"""A prefix computed once for several continuations gives what whole rows give: states, losses,
every gradient; and it costs what it should.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest

from ernie_tune.models.attention import AttentionPlan
from ernie_tune.models.cache import KVCache
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import Row, pack, pack_families
from ernie_tune.models.moe import RouterTap
from ernie_tune.models.presets import preset
from ernie_tune.peft.virtual_tokens import with_virtual_tokens

TOKENS = preset("tiny-a").tokens
Golden = Callable[..., ErnieModel]


def ids(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 500, count)


def family(prompt: int, answers: tuple[int, ...], seed: int, image: bool = True) -> tuple[list[Row], int]:
    """Rows that share `prompt` text tokens, and with `image` a picture of four features before
    them.
    """
    rng = np.random.default_rng(seed)
    head = ids(prompt, seed)
    pixels = grid = None
    if image:
        head = np.concatenate([[TOKENS.image_start], [TOKENS.image] * 4, [TOKENS.image_end], head])
        pixels, grid = rng.standard_normal((16, 588)).astype(np.float32), np.array([[1, 4, 4]])
    rows = [Row(np.concatenate([head, ids(n, 100 * seed + i)]), pixels, grid) for i, n in enumerate(answers)]
    return rows, len(head)


def compare(model: ErnieModel, families: list[tuple[list[Row], int]]) -> None:
    """Loss and gradients of a random functional of all states of answers, from whole rows and from
    shared prefixes.
    """
    whole = pack([row for rows, _ in families for row in rows], TOKENS)
    shared, places = pack_families(families, TOKENS)
    at = [np.arange(a, b) for a, b in zip(whole.offsets, whole.offsets[1:], strict=False)]
    answers = [
        max(s - 1, 0) for rows, s in families for _ in rows
    ]  # the last prompt token predicts the first answer token
    flat = [place for family in places for place in family]
    direction = paddle.randn(
        [sum(len(p) - s for p, s in zip(flat, answers, strict=True)), model.config.hidden_size], "float64"
    )
    results = []
    for inputs, index in ((whole, at), (shared, flat)):
        model.clear_gradients(set_to_zero=False)
        states = model(inputs)
        picked = paddle.gather(
            states, paddle.to_tensor(np.concatenate([i[s:] for i, s in zip(index, answers, strict=True)]))
        )
        (picked * direction).sum().backward()
        grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        results.append((picked.detach().numpy(), grads))
    (want, grads), (got, shared_grads) = results
    np.testing.assert_allclose(got, want, atol=1e-9)
    assert grads.keys() == shared_grads.keys()
    assert any("gate.weight" in name for name in grads), "the routers'"
    assert any("vision_model" in name for name in grads), "the towers'"
    for name, grad in grads.items():
        np.testing.assert_allclose(shared_grads[name], grad, atol=1e-9 * max(1.0, np.abs(grad).max()), err_msg=name)


@pytest.mark.parametrize("name", ["tiny-a", "tiny-b"])
def test_states_and_gradients_are_those_of_whole_rows(name: str, golden_model: Golden) -> None:
    paddle.seed(0)
    families = [
        family(9, (3, 3), 1),
        family(9, (3, 1, 5, 3), 2),  # same prefix length as the first: one product for both
        family(20, (140, 2), 3),  # more than one block of queries
        (family(7, (2, 4), 4)[0], 0),  # rows that share nothing
        family(6, (2,), 5, image=False),
    ]
    compare(golden_model(name, "float64"), families)


def test_a_scale_at_which_scores_are_shifted(golden_model: Golden) -> None:
    """Scores far from zero take the other path of the softmax."""
    model = golden_model("tiny-a", "float64")
    kept = [layer.self_attn.q_proj.weight.numpy() for layer in model.layers]
    try:
        for layer in model.layers:
            layer.self_attn.q_proj.weight.set_value(layer.self_attn.q_proj.weight * 60)
        compare(model, [family(9, (3, 2), 1), family(5, (4, 4), 2)])
    finally:
        for layer, value in zip(model.layers, kept, strict=True):
            layer.self_attn.q_proj.weight.set_value(paddle.to_tensor(value))


def test_other_answers_are_not_seen(golden_model: Golden) -> None:
    """A change of one answer changes nothing in its sibling, a change of the prefix does."""
    model = golden_model("tiny-a", "float64")
    rows, shared = family(6, (3, 3), 1)
    inputs, ((first, second),) = pack_families([(rows, shared)], TOKENS)
    before = model(inputs).numpy()
    other = inputs.input_ids_T.copy()
    other[first[shared:]] += 1
    after = model(dataclasses.replace(inputs, input_ids_T=other)).numpy()
    # an expert that gets one row more may add up the others in another order, on some processors
    assert np.abs(before[second] - after[second]).max() < 1e-12
    assert (np.abs(before[first[shared:]] - after[first[shared:]]).max(1) > 1e-6).all()
    other = inputs.input_ids_T.copy()
    other[first[shared - 1]] += 1
    after = model(dataclasses.replace(inputs, input_ids_T=other)).numpy()
    assert (np.abs(before[second[shared:]] - after[second[shared:]]).max(1) > 1e-9).all()


def test_the_tokens_and_the_work_are_shared() -> None:
    rows, shared = family(100, (4, 4, 4), 1)
    inputs, ((first, *_),) = pack_families([(rows, shared)], TOKENS)
    assert inputs.num_tokens == shared + 12
    assert inputs.grid_thw_n3 is not None
    assert len(inputs.grid_thw_n3) == 1
    assert np.array_equal(inputs.input_ids_T[first], rows[0].input_ids_L)
    plan = AttentionPlan(inputs.offsets, causal=True, parents=inputs.parents)
    elements = sum(run.count * (b - a) * end for run in plan.runs for a, b, end in plan.blocks(run))
    assert elements == shared * shared + 3 * 4 * (shared + 4)


def test_router_records_have_each_token_once(golden_model: Golden) -> None:
    inputs, _ = pack_families([family(9, (3, 3), 1)], TOKENS)
    tap = RouterTap(keep=True)
    golden_model("tiny-a", "float32")(inputs, tap=tap)
    assert sum(r.chosen_Tk.shape[0] for r in tap.records if r.layer == 1) == inputs.num_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows, shared: ([], 0), "family 0 .0 rows. must have at least 1"),
        (
            lambda rows, shared: (rows, len(rows[0].input_ids_L)),
            "must be at least 0 and below the family's shortest row",
        ),
        (lambda rows, shared: (rows, shared + 1), "must have the same first 16 tokens"),
        (lambda rows, shared: (rows, 3), "images must lie within the first 3 tokens"),
        (lambda rows, shared: ([Row(rows[0].input_ids_L[:0])], 0), "has 0 tokens"),
        (
            lambda rows, shared: ([dataclasses.replace(rows[0], grid_thw_n3=None)], 0),
            "number of patches .16. must equal",
        ),
    ],
)
def test_families_that_cannot_be_packed(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_families([change(*family(9, (3, 3), 1))], TOKENS)


def test_what_needs_whole_rows(golden_model: Golden) -> None:
    inputs, _ = pack_families([family(9, (3, 3), 1)], TOKENS)
    with pytest.raises(ValueError, match="parents must be None with a cache"):
        golden_model("tiny-a", "float32")(inputs, cache=KVCache(3))
    with pytest.raises(ValueError, match="parents must be None with virtual tokens"):
        with_virtual_tokens(inputs, 2, 0)

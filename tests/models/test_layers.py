"""Norms, ropes, vision parts and attention against golden values and closed forms."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import paddle
import pytest
from weights import golden_pixels, normal

from ernie_tune.models import mkl, pieces, tiles
from ernie_tune.models.attention import AttentionPlan, segment_attention
from ernie_tune.models.layers import (
    gated_halves,
    rms_norm,
    rotate_pairs,
    swiglu,
    text_angles,
    turn_factors,
    vision_angles,
)
from ernie_tune.models.presets import preset
from ernie_tune.models.vision import frame_pairs


def test_text_rope_of_28b(golden) -> None:
    units = golden("units")
    angles = text_angles(units["text_rope/positions"], 128, 20, 5e5)
    # transformers computes pos * theta in float32: at position 300 one ulp of the angle is 3e-5.
    np.testing.assert_allclose(np.repeat(np.cos(angles), 2, 1), units["text_rope/cos"], atol=4e-5)
    np.testing.assert_allclose(np.repeat(np.sin(angles), 2, 1), units["text_rope/sin"], atol=4e-5)


def test_text_rope_golden_values() -> None:
    """(t, h, w) = (7, 3, 5): even low frequencies take h, odd ones w, the last twenty t."""
    cos = np.cos(text_angles(np.array([[7, 3, 5]]), 128, 20, 5e5))[0]
    want = {0: -0.9899925, 1: -0.5966361, 2: -0.4077672, 43: 0.9999997, 44: 0.9999996}
    assert {i: cos[i] for i in want} == pytest.approx(want, abs=1e-6)


def test_equal_axes_are_the_text_models_rope() -> None:
    at = np.array([[11, 11, 11]])
    freq = 5e5 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(text_angles(at, 128, 20, 5e5)[0], 11 * freq, rtol=1e-12)


def test_rotation_turns_adjacent_pairs() -> None:
    x = paddle.to_tensor(normal("x", (1, 1, 4)).astype("float32"))
    a, b = 0.3, 1.1
    got = rotate_pairs(x, turn_factors(np.array([[a, b]]), 1, "float32")).numpy()[0, 0]
    v = x.numpy()[0, 0]
    want = [
        v[0] * np.cos(a) - v[1] * np.sin(a),
        v[1] * np.cos(a) + v[0] * np.sin(a),
        v[2] * np.cos(b) - v[3] * np.sin(b),
        v[3] * np.cos(b) + v[2] * np.sin(b),
    ]
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_rms_norm_bfloat16_cast_order(golden) -> None:
    units = golden("units")
    x, w = (paddle.to_tensor(units[f"rms_norm/{k}"].astype(np.uint16)).view("bfloat16") for k in ("input", "weight"))
    got = rms_norm(x, w, 1e-5)
    want = units["rms_norm/output"].astype(np.uint32) << 16
    np.testing.assert_array_equal(got.astype("float32").numpy(), want.view(np.float32))


def test_vision_tower_step_by_step(golden_model, golden) -> None:
    units, model = golden("units"), golden_model("tiny-b")
    grid, tower = units["vision/grid_thw"], golden_model("tiny-b").vision_model
    angles = np.tile(vision_angles(grid, 20, 1e4), (1, 2))
    np.testing.assert_allclose(np.cos(angles), units["vision/rope_cos"], atol=1e-6)
    np.testing.assert_allclose(np.sin(angles), units["vision/rope_sin"], atol=1e-6)
    seen: list[np.ndarray] = []
    hooks = [
        layer.register_forward_post_hook(lambda _, __, out: seen.append(out.numpy()))
        for layer in (tower.patch_embed, *tower.blocks)
    ]
    with paddle.no_grad():
        out = model.vision_model(paddle.to_tensor(golden_pixels("vision", 72)), grid).numpy()
    for hook in hooks:
        hook.remove()
    for got, name in zip([*seen, out], ["patch_embed", "block_0", "block_1", "block_2", "output"], strict=True):
        np.testing.assert_allclose(got, units[f"vision/{name}"], atol=1e-5, err_msg=name)


def test_frames_do_not_see_each_other(golden_model) -> None:
    tower = golden_model("tiny-b").vision_model
    pixels = golden_pixels("frames", 96)
    changed = pixels.copy()
    changed[24:48] += 1.0
    grid = np.array([[4, 4, 6]])
    with paddle.no_grad():
        a, b = (tower(paddle.to_tensor(p), grid).numpy() for p in (pixels, changed))
    same = (a == b).all(1)
    assert same[:24].all()
    assert same[48:].all()
    assert not same[24:48].any()


def test_resampler_pairs_frames(golden_model) -> None:
    """Swapping the two frames of a pair changes the features; swapping whole pairs permutes
    them.
    """
    model = golden_model("tiny-b")
    x = normal("merged", (4, 24, 80)).astype("float32")
    grid = np.array([[4, 4, 6]])

    def run(order: list[int]) -> np.ndarray:
        with paddle.no_grad():
            return model.resampler_model(paddle.to_tensor(x[order].reshape(96, 80)), grid).numpy()

    straight = run([0, 1, 2, 3])
    np.testing.assert_allclose(run([2, 3, 0, 1]), np.roll(straight, 6, 0), atol=1e-6)
    assert np.abs(run([1, 0, 2, 3])[:6] - straight[:6]).max() > 1e-2
    assert frame_pairs(np.array([[1, 4, 4], [2, 2, 2]])).tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 5]]


def test_tower_refuses_a_wrong_number_of_patches(golden_model) -> None:
    with pytest.raises(ValueError, match=r"number of patches \(23\) must equal .* \(24\)"):
        golden_model("tiny-b").vision_model(paddle.zeros([23, 588]), np.array([[1, 4, 6]]))


def test_swiglu_values_and_gradients() -> None:
    """silu(g) * u with derivatives written out at g = 1, u = 2: sigma(1) = 0.7310586."""
    g, u = (paddle.to_tensor([[v]], stop_gradient=False) for v in (1.0, 2.0))
    y = swiglu(g, u)
    y.backward()
    s = 0.7310585786
    assert y.item() == pytest.approx(2 * s, rel=1e-6)
    assert g.grad.item() == pytest.approx(2 * (s + s * (1 - s)), rel=1e-6)
    assert u.grad.item() == pytest.approx(s, rel=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [3, 300])
def test_swiglu_in_pieces(rows: int, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two tensors, and of the halves of one, against the formula in float64: many pieces on two
    threads, and numbers that are too large for exp.
    """
    monkeypatch.setattr(mkl, "max_threads", lambda: 2)
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 700)
    x = normal("halves", (rows, 260)) * 4
    x[0, :4] = [-2000.0, 2000.0, 0.0, -90.0]
    half = x.shape[1] // 2
    s = 1 / (1 + np.exp(-np.clip(x[:, :half], -700, None)))
    act, up, g = x[:, :half] * s, x[:, half:], normal("gradient", (rows, half))
    want = act * up, np.concatenate([(s + act * (1 - s)) * up * g, act * g], 1)
    found = []
    for form in (lambda both: swiglu(both[:, :half], both[:, half:]), gated_halves):
        both = paddle.to_tensor(x, dtype, stop_gradient=False)
        y = form(both)
        (y * paddle.to_tensor(g, dtype)).sum().backward()
        with paddle.no_grad():
            np.testing.assert_array_equal(form(both).numpy(), y.numpy())
        found.append((y.numpy(), both.grad.numpy()))
    tight = 2e-6 if dtype == "float32" else 1e-14
    for values, grad in found:
        np.testing.assert_allclose(values, want[0], rtol=tight, atol=tight)
        np.testing.assert_allclose(grad, want[1], rtol=tight, atol=5 * tight)


@pytest.mark.parametrize("how", ["pieces", "operators"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rms_norm_values_and_gradients(dtype: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against Paddle's autograd of the formula in float64; many pieces on two threads."""
    monkeypatch.setattr(mkl, "max_threads", lambda: 2)
    monkeypatch.setattr(pieces, "PIECE_ELEMENTS", 100)
    values = normal("states", (301, 24)), normal("weight", (24,)), normal("gradient", (301, 24))
    found = []
    for kind, form in (
        ("float64", lambda x, w: x / ((x * x).mean(-1, keepdim=True) + 1e-3).sqrt() * w),
        (dtype, lambda x, w: rms_norm(x, w, 1e-3)),
    ):
        x, weight, g = (paddle.to_tensor(v, kind, stop_gradient=i == 2) for i, v in enumerate(values))
        with mkl.left_alone() if how == "operators" else nullcontext():
            y = form(x, weight)
            (y * g).sum().backward()
        found.append([t.numpy() for t in (y, x.grad, weight.grad)])
    for want, got in zip(*found, strict=True):
        tight = 1e-12 if dtype == "float64" else 5e-6 * max(1.0, np.abs(want).max())
        np.testing.assert_allclose(got, want, rtol=0, atol=tight)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("how", ["tiles", "small tiles", "operators", "operators, nothing kept"])
@pytest.mark.parametrize("offsets", [(0, 150), (0, 5, 10, 15), (0, 3, 3, 140, 141, 150), (0, 5, 13, 18, 26, 29, 34)])
def test_attention_values_and_gradients(
    monkeypatch: pytest.MonkeyPatch, offsets: tuple[int, ...], how: str, causal: bool
) -> None:
    """Against one dense product with a block-diagonal mask, through Paddle's own autograd, in
    float64; blocks of 128 are crossed by 150 tokens, small tiles by a few, on two threads.
    """
    if how == "small tiles":
        monkeypatch.setattr(tiles, "TILE_SCORES", 512)
        monkeypatch.setattr(tiles, "_ALONE_SCORES", 0)
        monkeypatch.setattr(mkl, "max_threads", lambda: 2)
    if how.endswith("nothing kept"):
        monkeypatch.setattr("ernie_tune.models.attention.KEEP_PROBS_BYTES", 0)
    tokens = offsets[-1]
    q, k, v, g = (
        paddle.to_tensor(normal(n, (tokens, h, 8)), stop_gradient=n == "g")
        for n, h in (("q", 6), ("k", 2), ("v", 2), ("g", 6))
    )
    segment = np.searchsorted(np.array(offsets[1:]), np.arange(tokens), side="right")
    allowed = segment[:, None] == segment[None, :]
    if causal:
        allowed &= np.arange(tokens)[:, None] >= np.arange(tokens)[None, :]
    bias = paddle.to_tensor(np.where(allowed, 0.0, -1e30))
    results = []
    for dense in (False, True):
        for x in (q, k, v):
            x.clear_gradient(False)
        if dense:
            kk, vv = (x.repeat_interleave(3, axis=1).transpose([1, 0, 2]) for x in (k, v))
            p = paddle.nn.functional.softmax(q.transpose([1, 0, 2]) @ kk.transpose([0, 2, 1]) * 8**-0.5 + bias, -1)
            out = (p @ vv).transpose([1, 0, 2])
        else:
            with mkl.left_alone() if how.startswith("operators") else nullcontext():
                out = segment_attention(q, k, v, AttentionPlan(offsets, causal))
        (out * g).sum().backward()
        results.append([out.numpy(), *(x.grad.numpy() for x in (q, k, v))])
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


def test_attention_costs_its_segments() -> None:
    """Work is counted, not timed: score elements of 64 segments of 16 tokens against one of
    1024.
    """

    def scores(offsets: tuple[int, ...]) -> int:
        plan = AttentionPlan(offsets, causal=True)
        return sum(run.count * (b - a) * end for run in plan.runs for a, b, end in plan.blocks(run))

    assert scores(tuple(range(0, 1025, 16))) == 64 * 16 * 16
    assert len(AttentionPlan((0, 5, 13, 18, 26, 29, 34), causal=True).runs) == 3, "equal lengths share a product"
    assert scores((0, 1024)) == 128 * 128 * 36  # a block skips the keys after it: 36 of 64 squares


def test_small_preset_head_is_shared(golden_model) -> None:
    weight, transposed = golden_model("tiny-b").head_weight()
    assert transposed
    assert weight is golden_model("tiny-b").embed_tokens.weight
    assert not golden_model("tiny-c").head_weight()[1]
    assert preset("tiny-c").tie_word_embeddings is False


def test_features_and_placeholders_must_match(golden_model) -> None:
    from dataclasses import replace

    from ernie_tune.models.ernie import ErnieModel
    from ernie_tune.models.inputs import Row, pack

    model = golden_model("tiny-b")
    tokens = model.config.tokens
    good = pack(
        [Row(np.array([5, 600, *[602] * 4, 601]), np.zeros((16, 588), np.float32), np.array([[1, 4, 4]]))], tokens
    )
    bad = replace(good, placeholder_T=np.zeros(7, bool))
    with pytest.raises(ValueError, match=r"visual features \(4\) must equal the number of placeholder tokens \(0\)"):
        model(bad)
    with pytest.raises(ValueError, match=r"visual features \(0\) must equal the number of placeholder tokens \(4\)"):
        model(replace(good, pixel_values_PC=None))
    text_only = ErnieModel(model.config.replace(vision=None, moe=None))
    with pytest.raises(ValueError, match="text-only model was given images"):
        text_only(good)

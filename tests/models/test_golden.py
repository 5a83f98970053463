"""The whole model against transformers' float64 numbers (tests/golden): features, hidden states,
logits, loss, and the gradient of every tensor.
"""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from weights import case_rows, probe, sample_indices

from ernie_tune.models.inputs import pack
from ernie_tune.models.moe import RouterTap
from ernie_tune.models.router_losses import balance_loss
from ernie_tune.objectives.logprobs import token_logp

CASES = ("text", "image", "two_images", "video", "mixed", "packed")
PRESETS = ("tiny-b", "tiny-c")


def mean_cross_entropy(model, packed, targets_T: np.ndarray):
    """Mean over targets that are not -100, through the log-probability seam."""
    keep = np.flatnonzero(targets_T != -100)
    hidden = model(packed)
    weight, transposed = model.head_weight()
    logp = token_logp(
        paddle.gather(hidden, paddle.to_tensor(keep)), weight, paddle.to_tensor(targets_T[keep]), transposed=transposed
    )
    return -logp.mean()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PRESETS)
def test_forward(golden_model, golden, name: str, case: str) -> None:
    model, data = golden_model(name), golden(name.replace("-", "_"))
    packed = pack(case_rows(data, case), model.config.tokens)
    tap = RouterTap(keep=True)
    with paddle.no_grad():
        logits = model.logits(model(packed, tap=tap)).numpy()
        features = model.features(packed)
    np.testing.assert_array_equal(packed.position_ids_T3, data[f"{case}/position_ids"])
    assert packed.offsets == tuple(data[f"{case}/offsets"])
    if features is not None:
        np.testing.assert_allclose(features.numpy(), data[f"{case}/features"], atol=1e-5)
    np.testing.assert_allclose(logits, data[f"{case}/logits"], atol=1e-5)
    pooled = balance_loss(F.softmax(paddle.concat([r.logits_TE for r in tap.records]), axis=-1), model.config.moe.top_k)
    assert pooled.item() == pytest.approx(float(data[f"{case}/aux_loss"]), abs=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradient_of_every_tensor(golden_model, golden, name: str, case: str) -> None:
    model, data = golden_model(name), golden(name.replace("-", "_"))
    packed = pack(case_rows(data, case), model.config.tokens)
    loss = mean_cross_entropy(model, packed, data[f"{case}/targets"])
    assert loss.item() == pytest.approx(float(data[f"{case}/loss"]), abs=1e-6)
    loss.backward()
    names = data["trainable_names"].tolist()
    parameters = dict(model.named_parameters())
    assert set(names) == {n for n, p in parameters.items() if not p.stop_gradient}
    for i, key in enumerate(names):
        grad = parameters[key].grad
        flat = np.zeros(parameters[key].size) if grad is None else grad.numpy().astype(np.float64).ravel()
        norm, total, largest, projection = data[f"{case}/grad_summary"][i]
        np.testing.assert_allclose(
            flat[sample_indices(key, flat.size)],
            data[f"{case}/grad_samples"][i],
            atol=1e-4 * largest + 1e-9,
            err_msg=key,
        )
        assert np.linalg.norm(flat) == pytest.approx(norm, rel=1e-4, abs=1e-8), key
        # A sum of n rounding errors of relative size 1e-4 stays below 1e-4 * norm * |probe| ~ 1e-4
        # * norm * sqrt(n).
        bound = 1e-4 * norm * np.sqrt(flat.size) + 1e-8
        assert abs(flat.sum() - total) < bound, key
        assert abs(flat @ probe(key, flat.size) - projection) < bound, key


def test_hidden_states_and_router_logits_layer_by_layer(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    packed = pack(case_rows(data, "mixed"), model.config.tokens)
    seen: list[np.ndarray] = []
    hooks = [layer.register_forward_post_hook(lambda _, __, out: seen.append(out.numpy())) for layer in model.layers]
    tap = RouterTap(keep=True)
    with paddle.no_grad():
        model(packed, tap=tap)
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(np.stack(seen), data["mixed/hidden_states"][1:], atol=1e-5)
    want = data["mixed/router_logits"]
    for record in tap.records:
        rows = np.flatnonzero(packed.vision_T == bool(record.modality))
        np.testing.assert_allclose(record.logits_TE.numpy(), want[record.layer - 1, rows], atol=2e-5)


def test_float64_is_exact_to_the_last_stored_bit(golden_model, golden) -> None:
    """In float64 the only error left is the float32 rounding of the stored values."""
    model, data = golden_model("tiny-c", "float64"), golden("tiny_c")
    packed = pack(case_rows(data, "mixed"), model.config.tokens)
    with paddle.no_grad():
        logits = model.logits(model(packed)).numpy()
    np.testing.assert_allclose(logits, data["mixed/logits"], rtol=1e-7, atol=1e-7)
    loss = mean_cross_entropy(model, packed, data["mixed/targets"])
    assert loss.item() == pytest.approx(float(data["mixed/loss"]), abs=1e-12)


def test_packed_rows_equal_rows_one_by_one(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    rows = case_rows(data, "packed") + case_rows(data, "mixed") + case_rows(data, "packed")[::-1]
    with paddle.no_grad():
        packed = pack(rows, model.config.tokens)
        together = model.logits(model(packed)).numpy()
        for row, a, b in zip(rows, packed.offsets, packed.offsets[1:], strict=False):
            alone = model.logits(model(pack([row], model.config.tokens))).numpy()
            np.testing.assert_allclose(together[a:b], alone, atol=5e-6)


def test_recompute_changes_nothing(golden_model, golden) -> None:
    """A recompute hook reruns each layer in its backward; same loss, same gradients, router usage
    counted once.
    """
    from paddle.distributed.fleet.utils import recompute

    model, data = golden_model("tiny-b"), golden("tiny_b")
    model.train()
    packed = pack(case_rows(data, "image"), model.config.tokens)
    grads, usage = [], []
    for hook in (None, recompute):
        model.clear_gradients(set_to_zero=False)
        model.layers[1].mlp.moe_statics.expert_usage.zero_()
        hidden = model(packed, tap=RouterTap(count_usage=True), recompute=hook)
        model.logits(hidden).square().mean().backward()
        grads.append({n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None})
        usage.append(model.layers[1].mlp.moe_statics.expert_usage.numpy().copy())
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        np.testing.assert_array_equal(grad, grads[1][name], err_msg=name)
    np.testing.assert_array_equal(usage[0], usage[1])
    assert usage[0].sum() == packed.num_tokens * model.config.moe.top_k


def test_tiny_a_from_an_independent_numpy_implementation(golden) -> None:
    """Weights saved by transformers, numbers from NumPy in float64: logits and features to 1e-5,
    positions equal, cross entropy to 1e-6.
    """
    import json

    from conftest import GOLDEN

    from ernie_tune.checkpoint.auto import AutoModel
    from ernie_tune.models.inputs import Row

    folder = GOLDEN / "tiny_a"
    model, case = AutoModel.from_pretrained(folder), np.load(folder / "case.npz")
    images = case["pixel_values_images"]
    pixels = np.concatenate([images[:24], case["pixel_values_video"], images[24:]])
    packed = pack([Row(case["input_ids"], pixels, np.array([[1, 4, 6], [4, 4, 4], [1, 6, 4]]))], model.config.tokens)
    np.testing.assert_array_equal(packed.position_ids_T3.T, case["position_ids"])
    np.testing.assert_array_equal(packed.vision_T, case["moe_token_type_ids"] > 0)
    with paddle.no_grad():
        features = model.features(packed).numpy()
        hidden = model(packed)
        np.testing.assert_allclose(model.logits(hidden).numpy(), case["logits"], atol=1e-5)
        weight, transposed = model.head_weight()
        logp = token_logp(hidden[:-1], weight, paddle.to_tensor(case["input_ids"][1:]), transposed=transposed)
    np.testing.assert_allclose(
        features,
        np.concatenate([case["image_features"][:6], case["video_features"], case["image_features"][6:]]),
        atol=1e-5,
    )
    assert -logp.mean().item() == pytest.approx(
        json.loads((folder / "loss.json").read_text())["cross_entropy"], abs=1e-6
    )


@pytest.mark.parametrize("name", ["text_dense", "text_moe"])
def test_text_only_siblings(name: str) -> None:
    """Folders that transformers wrote: explicit head_dim wider than hidden/heads in the dense one,
    [E, H] routers on disk in the other.
    """
    from conftest import GOLDEN

    from ernie_tune.checkpoint.auto import AutoModel
    from ernie_tune.models.inputs import Row

    model, case = AutoModel.from_pretrained(GOLDEN / name), np.load(GOLDEN / name / "case.npz")
    with paddle.no_grad():
        logits = model.logits(model(pack([Row(case["input_ids"])], model.config.tokens))).numpy()
    np.testing.assert_allclose(logits, case["logits"], atol=1e-5)

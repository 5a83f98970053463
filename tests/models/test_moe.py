"""Routing, modality isolation, router losses and the bias rule against worked examples."""

from __future__ import annotations

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
from weights import case_rows, normal

from ernie_tune.models.grouped import grouped_matmul
from ernie_tune.models.inputs import Row, pack
from ernie_tune.models.moe import MoELayer, RouterTap, route, update_correction_bias
from ernie_tune.models.presets import preset
from ernie_tune.models.router_losses import RouterLossWeights, balance_loss, orthogonal_loss, router_loss, tally, z_loss


def logits_as_input(values: list[float]) -> tuple[paddle.Tensor, paddle.Tensor]:
    """x, W with x @ W = values."""
    return paddle.to_tensor([values]), paddle.eye(len(values))


def test_router_toy() -> None:
    """The most probable expert loses to the bias; weights are the plain probabilities of the
    chosen, renormalised.
    """
    x, w = logits_as_input([2.0, 1.0, 0.0, -1.0])
    r = route(x, w, paddle.to_tensor([-0.5, 0.0, 0.2, 0.1]), 2)
    assert r.chosen_Tk.tolist() == [[2, 1]]
    np.testing.assert_allclose(r.weight_Tk.numpy(), [[0.268941, 0.731059]], atol=1e-6)


def test_weights_are_clamped_not_shifted() -> None:
    """max(sum, norm_min): with a huge norm_min the weights are p / norm_min, with a tiny one they
    sum to one.
    """
    x, w = logits_as_input([2.0, 1.0, 0.0, -1.0])
    p = np.exp([2.0, 1.0, 0.0, -1.0]) / np.exp([2.0, 1.0, 0.0, -1.0]).sum()
    np.testing.assert_allclose(
        route(x, w, paddle.zeros([4]), 2, norm_min=2.0).weight_Tk.numpy(), [p[:2] / 2.0], atol=1e-6
    )
    assert route(x, w, paddle.zeros([4]), 2).weight_Tk.sum().item() == pytest.approx(1.0, abs=1e-6)


def test_zero_probabilities_give_zero_weights() -> None:
    """A bias that forces experts of no probability: the clamp keeps 0/0 from becoming NaN. Paddle's
    CPU softmax stops at exp(-64) = 1.6e-28.
    """
    x, w = logits_as_input([200.0, -200.0, -200.0])
    r = route(x, w, paddle.to_tensor([-5.0, 0.0, 0.0]), 2)
    assert sorted(r.chosen_Tk.tolist()[0]) == [1, 2]
    np.testing.assert_allclose(r.weight_Tk.numpy(), [[0.0, 0.0]], atol=1e-15)


def test_grouped_matmul_values_and_gradients() -> None:
    """Against a plain product per expert; expert 1 is empty and gets a zero gradient, a frozen
    weight none.
    """
    counts = (3, 0, 4)
    x, w, g = (
        paddle.to_tensor(normal(n, s), stop_gradient=n == "g")
        for n, s in (("x", (7, 5)), ("w", (3, 5, 6)), ("g", (7, 6)))
    )
    y = grouped_matmul(x, w, counts)
    (y * g).sum().backward()
    xs, ws, gs = x.numpy(), w.numpy(), g.numpy()
    np.testing.assert_allclose(y.numpy(), np.concatenate([xs[:3] @ ws[0], xs[3:] @ ws[2]]), atol=1e-12)
    np.testing.assert_allclose(
        w.grad.numpy(), np.stack([xs[:3].T @ gs[:3], np.zeros((5, 6)), xs[3:].T @ gs[3:]]), atol=1e-12
    )
    np.testing.assert_allclose(x.grad.numpy(), np.concatenate([gs[:3] @ ws[0].T, gs[3:] @ ws[2].T]), atol=1e-12)
    frozen = paddle.to_tensor(ws)
    x2 = paddle.to_tensor(xs, stop_gradient=False)
    (grouped_matmul(x2, frozen, counts) * g).sum().backward()
    assert frozen.grad is None
    np.testing.assert_allclose(x2.grad.numpy(), x.grad.numpy(), atol=1e-12)
    assert grouped_matmul(paddle.zeros([0, 5], "float64"), w, (0, 0, 0)).shape == [0, 6]


def test_modalities_are_isolated(golden_model) -> None:
    """Changing vision experts leaves text tokens of that layer untouched, and the other way round;
    text-only logits do not move at all.
    """
    layer = golden_model("tiny-b").layers[1].mlp
    x = paddle.to_tensor(normal("hidden", (10, 160)).astype("float32"))
    text, vision = (paddle.to_tensor(i) for i in ([0, 1, 2, 8, 9], [3, 4, 5, 6, 7]))
    with paddle.no_grad():
        base = layer(x, text, vision).numpy()
        for experts, moved in ((layer.vision_experts, [3, 4, 5, 6, 7]), (layer.text_experts, [0, 1, 2, 8, 9])):
            kept = experts.down_proj.clone()
            experts.down_proj.set_value(kept * 2.0)
            changed = np.abs(layer(x, text, vision).numpy() - base).max(1) > 0
            experts.down_proj.set_value(kept)
            assert np.flatnonzero(changed).tolist() == moved


def test_modality_order_does_not_matter(golden_model) -> None:
    """Each token gets what it would get alone."""
    layer = golden_model("tiny-b").layers[2].mlp
    x = paddle.to_tensor(normal("hidden", (6, 160)).astype("float32"))
    with paddle.no_grad():
        together = layer(x, paddle.to_tensor([1, 4]), paddle.to_tensor([0, 2, 3, 5])).numpy()
        for i in range(6):
            empty, one = paddle.to_tensor(np.zeros(0, np.int64)), paddle.to_tensor([0])
            alone = layer(x[i : i + 1], one, None) if i in (1, 4) else layer(x[i : i + 1], empty, one)
            np.testing.assert_allclose(together[i], alone.numpy()[0], atol=1e-5)


def test_shared_expert_is_added_once_to_everyone(golden_model) -> None:
    layer = golden_model("tiny-b").layers[1].mlp
    x = paddle.to_tensor(normal("hidden", (6, 160)).astype("float32"))
    index = (paddle.to_tensor([0, 1, 2]), paddle.to_tensor([3, 4, 5]))
    with paddle.no_grad():
        shared = layer.shared_experts(x).numpy()
        weights = layer.shared_experts.down_proj.weight.clone()
        full = layer(x, *index).numpy()
        layer.shared_experts.down_proj.weight.set_value(weights * 0.0)
        without = layer(x, *index).numpy()
        layer.shared_experts.down_proj.weight.set_value(weights)
    np.testing.assert_allclose(full - without, shared, atol=1e-6)
    assert not hasattr(golden_model("tiny-c").layers[3].mlp, "shared_experts")


def test_nothing_is_dropped_when_one_expert_takes_all() -> None:
    """A bias that sends every token to the same experts: a capacity of N/2 per expert would drop
    half of them.
    """
    layer = MoELayer(preset("tiny-c"), 3)
    for p in layer.parameters():
        p.set_value(paddle.to_tensor(normal(p.name, p.shape).astype("float32") * 0.1))
    layer.moe_statics.e_score_correction_bias.set_value(
        paddle.to_tensor(np.where(np.arange(16) < 8, 5.0, 0.0).astype("float32")[None].repeat(2, 0))
    )
    x = paddle.to_tensor(normal("hidden", (32, 160)).astype("float32"))
    with paddle.no_grad():
        together = layer(x, None, None, tap := RouterTap(keep=True)).numpy()
        alone = np.concatenate([layer(x[i : i + 1], None, None).numpy() for i in range(32)])
    assert set(tap.records[0].chosen_Tk.numpy().ravel().tolist()) == set(range(8))
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_balance_loss() -> None:
    """Perfect balance gives top_k; everything on one expert of four with p = (.7,.1,.1,.1) gives 4
    * .7; the count carries no gradient.
    """
    assert balance_loss(paddle.full([8, 4], 0.25), 4).item() == pytest.approx(4.0)
    p = paddle.to_tensor([[0.7, 0.1, 0.1, 0.1]] * 5, stop_gradient=False)
    loss = balance_loss(p, 1)
    loss.backward()
    assert loss.item() == pytest.approx(2.8, rel=1e-6)
    np.testing.assert_allclose(p.grad.numpy(), [[0.8, 0, 0, 0]] * 5, atol=1e-6)


def test_z_and_orthogonal_loss() -> None:
    """z: mean(logsumexp^2) of zero logits over E = 4 is ln(4)^2. Orthogonal: two equal columns of
    three give off-diagonal ones: 2 / 9.
    """
    assert z_loss(paddle.zeros([5, 4])).item() == pytest.approx(np.log(4) ** 2, rel=1e-6)
    w = paddle.to_tensor([[3.0, 1.0, 0.0], [0.0, 0.0, 2.0]])
    assert orthogonal_loss(w).item() == pytest.approx(2 / 9, abs=1e-6)


def test_values_of_the_specification() -> None:
    """The worked example has the values to ten places, and not the inputs. Of all fours of tokens
    with three logits each, halves from -2 to 4, one alone has this z, and in this order it has this
    balance as well; rows that make orthogonal's 2/9 are above. Gradients by their closed forms.
    """
    logits_TE = np.array([[2.0, 1.0, 0.0], [2.5, 0.0, 0.0], [1.0, 1.5, 1.0], [0.0, 1.0, 3.0]])
    x = paddle.to_tensor(logits_TE, dtype="float64", stop_gradient=False)
    z = z_loss(x)
    z.backward()
    assert z.item() == pytest.approx(7.0354508747, abs=1e-10)
    sums_T = np.exp(logits_TE).sum(1)
    probs_TE = np.exp(logits_TE) / sums_T[:, None]
    np.testing.assert_allclose(x.grad.numpy(), 2 * np.log(sums_T)[:, None] * probs_TE / 4, rtol=1e-9)
    x.clear_gradient()
    balance = balance_loss(paddle.nn.functional.softmax(x, axis=-1), 1)
    balance.backward()
    assert balance.item() == pytest.approx(1.0950563849, abs=1e-10)
    share_E = np.array([2, 1, 1]) / 4
    slope_TE = probs_TE * (share_E - (probs_TE * share_E).sum(1, keepdims=True))
    np.testing.assert_allclose(x.grad.numpy(), 3 * slope_TE / 4, rtol=1e-9, atol=1e-15)


def test_weights_per_modality() -> None:
    logits, w = paddle.zeros([4, 4]), paddle.eye(4)
    weights = RouterLossWeights(balance=(0.0, 2.0), z=(1.0, 0.0))
    assert router_loss(logits, w, 4, weights, 0).item() == pytest.approx(np.log(4) ** 2, rel=1e-6)
    assert router_loss(logits, w, 4, weights, 1).item() == pytest.approx(8.0)
    assert router_loss(logits, w, 4, RouterLossWeights(), 0) is None


def test_shares_of_a_pack_add_up_to_its_loss() -> None:
    """Tokens dealt out unevenly over two ranks: losses and gradients add up to those of the
    pack.
    """
    logits = paddle.to_tensor(normal("logits", (13, 6)), stop_gradient=False)
    weight = paddle.to_tensor(normal("router", (9, 6)), stop_gradient=False)
    weights = RouterLossWeights(balance=0.7, orthogonal=0.3, z=0.2)
    loss = router_loss(logits, weight, 2, weights, 0)
    wanted = [g.numpy() for g in paddle.grad(loss, [logits, weight])]
    parts = [logits[:8], logits[8:]]
    whole = sum(tally(F.softmax(part, axis=-1), 2) for part in parts)
    shares = [router_loss(part, weight, 2, weights, 0, whole) for part in parts]
    assert sum(shares).item() == pytest.approx(loss.item(), rel=1e-12)
    for got, want in zip(paddle.grad(sum(shares), [logits, weight]), wanted, strict=True):
        np.testing.assert_allclose(got.numpy(), want, atol=1e-14)
    # what ranks that do not ask each other get
    alone = sum(router_loss(part, weight, 2, weights, 0) for part in parts)
    assert abs(alone.item() - loss.item()) > 1e-2


def test_router_losses_enter_the_gradient_and_only_the_gradient(golden_model, golden) -> None:
    """grad(with tap) - grad(without) equals the gradient of the losses computed outside from the
    kept logits, times the scale.
    """
    model, data = golden_model("tiny-b", "float64"), golden("tiny_b")
    packed = pack(case_rows(data, "image"), model.config.tokens)
    weights = RouterLossWeights(balance=(1.0, 3.0), orthogonal=0.5, z=0.1)

    def grads(tap: RouterTap | None, outside: bool) -> dict[str, np.ndarray]:
        model.clear_gradients(set_to_zero=False)
        hidden = model(packed, tap=tap)
        loss = model.logits(hidden).square().mean()
        if outside:
            for r in tap.records:
                extra = router_loss(
                    r.logits_TE,
                    model.layers[r.layer].mlp.gate.of(r.modality),
                    model.config.moe.top_k,
                    weights,
                    r.modality,
                )
                loss = loss + 0.7 * extra
        loss.backward()
        return {n: p.grad.numpy().copy() for n, p in model.named_parameters() if p.grad is not None}

    inside, outside, plain = (
        grads(RouterTap(weights, scale=0.7), False),
        grads(RouterTap(keep=True), True),
        grads(None, False),
    )
    for name, grad in inside.items():
        np.testing.assert_allclose(grad, outside[name], atol=1e-12 * max(1.0, np.abs(grad).max()), err_msg=name)
    assert np.abs(inside["layers.1.mlp.gate.weight_1"] - plain["layers.1.mlp.gate.weight_1"]).max() > 1e-3


def test_a_frozen_router_adds_no_loss(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    packed = pack(case_rows(data, "text"), model.config.tokens)
    gates = [layer.mlp.gate.weight for layer in model.layers[1:]]
    for gate in gates:
        gate.stop_gradient = True
    results = []
    for tap in (None, RouterTap(RouterLossWeights(balance=5.0, z=5.0))):
        model.clear_gradients(set_to_zero=False)
        model.logits(model(packed, tap=tap)).square().mean().backward()
        results.append(model.embed_tokens.weight.grad.numpy().copy())
    for gate in gates:
        gate.stop_gradient = False
    np.testing.assert_array_equal(*results)


def test_bias_update_rule() -> None:
    """b += c * sign(mean usage - usage) per modality, usage zeroed, the row of a frozen router
    untouched.
    """
    layer = MoELayer(preset("tiny-a"), 1)
    usage = np.zeros((2, 8), np.int64)
    usage[0], usage[1] = [9, 1, 5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 8]
    layer.moe_statics.expert_usage.set_value(paddle.to_tensor(usage))
    holder = paddle.nn.Sequential(layer)
    update_correction_bias(holder, 0.25)
    want = np.array([[-0.25, 0.25, 0, 0, 0, 0, 0, 0], [0.25] * 7 + [-0.25]], np.float32)
    np.testing.assert_array_equal(layer.moe_statics.e_score_correction_bias.numpy(), want)
    assert layer.moe_statics.expert_usage.sum().item() == 0
    layer.moe_statics.expert_usage.set_value(paddle.to_tensor(usage))
    layer.gate.weight.stop_gradient = True
    update_correction_bias(holder, 0.25)
    np.testing.assert_array_equal(layer.moe_statics.e_score_correction_bias.numpy(), [want[0], 2 * want[1]])


def test_usage_is_counted_per_modality(golden_model) -> None:
    model = golden_model("tiny-b")
    row = Row(np.array([5, 600, *[602] * 4, 601, 7]), np.zeros((16, 588), np.float32), np.array([[1, 4, 4]]))
    layer = model.layers[3].mlp
    layer.moe_statics.expert_usage.zero_()
    model(pack([row], model.config.tokens), tap=RouterTap(count_usage=True))
    assert layer.moe_statics.expert_usage.sum(-1).tolist() == [2 * 6, 6 * 6]
    assert "expert_usage" not in "".join(model.state_dict())

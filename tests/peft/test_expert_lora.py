"""LoRA on chosen experts: who changes, who trains, and which experts a task uses."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from peft_cases import adapted, fresh, gradients, packed

from ernie_tune.models.moe import RouterTap
from ernie_tune.peft.affinity import affinity, select_experts
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel, get_peft_model

LAYER = 2


def layer_outputs(model: PeftModel, inputs) -> tuple[np.ndarray, np.ndarray, dict[int, np.ndarray]]:  # type: ignore[no-untyped-def]
    """Input and output of one sparse feed-forward, and the experts [T, k] that each modality's
    tokens chose there.
    """
    seen: list[np.ndarray] = []
    hook = model.layers[LAYER].mlp.register_forward_post_hook(
        lambda _, args, out: seen.extend((args[0].numpy(), out.numpy()))
    )
    tap = RouterTap(keep=True)
    with paddle.no_grad():
        model(inputs, tap=tap)
    hook.remove()
    chosen = {r.modality: r.chosen_Tk.numpy() for r in tap.records if r.layer == LAYER}
    return seen[0], seen[1], chosen


@pytest.mark.parametrize(("modality", "experts"), [(0, (3, 8)), (1, (5,))])
def test_only_tokens_routed_to_the_chosen_experts_change(golden, modality: int, experts: tuple[int, ...]) -> None:
    name = ("text", "vision")[modality]
    model = adapted(LoraConfig(r=4, expert_targets=[(LAYER, name, e) for e in experts]))
    inputs = packed(golden)
    x, after, chosen = layer_outputs(model, inputs)
    with model.disable_adapter():
        x_base, before, _ = layer_outputs(model, inputs)
    np.testing.assert_array_equal(x, x_base)
    mine = np.flatnonzero(inputs.vision_T == bool(modality))
    touched = mine[np.isin(chosen[modality], experts).any(1)]
    assert 0 < len(touched) < len(mine)
    changed = np.flatnonzero((after != before).any(1))
    np.testing.assert_array_equal(changed, touched)
    assert np.abs(after[touched] - before[touched]).max() > 1e-3


def test_text_experts_leave_the_image_tokens_of_the_layer(golden) -> None:
    model = adapted(LoraConfig(r=4, expert_targets="text"))
    # Layer 1 is the first sparse one: its input is still the base's, with or without adapters.
    seen: list[np.ndarray] = []
    model.layers[1].mlp.register_forward_post_hook(lambda _, __, out: seen.append(out.numpy()))
    inputs = packed(golden)
    with paddle.no_grad():
        model(inputs)
        with model.disable_adapter():
            model(inputs)
    np.testing.assert_array_equal(seen[0][inputs.vision_T], seen[1][inputs.vision_T])
    assert (seen[0] != seen[1]).any(1)[~inputs.vision_T].all()


def test_only_the_selected_experts_have_parameters_and_gradients(golden) -> None:
    chosen = [(1, "text", 3), (1, "text", 9), (3, "vision", 7)]
    model = adapted(LoraConfig(r=2, expert_targets=chosen))
    trained = {name: p.shape for name, p in model.named_parameters() if not p.stop_gradient}
    stem = "layers.{}.mlp.{}_experts.{}_product.adapters.default.{}"
    assert trained == {
        stem.format(1, "text", "up_gate", "lora_A"): [2, 160, 2],
        stem.format(1, "text", "up_gate", "lora_B"): [2, 2, 192],
        stem.format(1, "text", "down", "lora_A"): [2, 96, 2],
        stem.format(1, "text", "down", "lora_B"): [2, 2, 160],
        stem.format(3, "vision", "up_gate", "lora_A"): [1, 160, 2],
        stem.format(3, "vision", "up_gate", "lora_B"): [1, 2, 64],
        stem.format(3, "vision", "down", "lora_A"): [1, 32, 2],
        stem.format(3, "vision", "down", "lora_B"): [1, 2, 160],
    }
    assert set(gradients(model, packed(golden))) <= set(trained)


def test_an_expert_has_the_same_start_whatever_else_is_selected() -> None:
    alone = get_peft_model(fresh(), LoraConfig(r=2, expert_targets=[(1, "text", 9)]))
    some = get_peft_model(fresh(), LoraConfig(r=2, expert_targets=[(1, "text", 3), (1, "text", 9)]))
    name = "layers.1.mlp.text_experts.down_product.adapters.default.lora_A"
    np.testing.assert_array_equal(
        dict(alone.named_parameters())[name].numpy()[0], dict(some.named_parameters())[name].numpy()[1]
    )


def test_shared_experts_only() -> None:
    model = get_peft_model(fresh(), LoraConfig(r=2, expert_targets="shared"))
    trained = [name for name, p in model.named_parameters() if not p.stop_gradient]
    assert len(trained) == 3 * 3 * 2
    assert all(".shared_experts." in name for name in trained)


def test_a_batch_without_the_chosen_experts(golden) -> None:
    """Text alone: vision experts see nothing, nothing fails, their adapters get no gradient."""
    model = adapted(LoraConfig(r=2, target_modules=["q_proj"], expert_targets="vision"))
    found = gradients(model, packed(golden, "text"))
    assert found
    assert not [name for name in found if "vision" in name]


def test_affinity_counts_tokens_and_weights(golden) -> None:
    """Expert 3 of layer 1 wins every text token when its selection bias is large: its token share
    is 1/k, and its weight share is its mean gate weight.
    """
    model, inputs = fresh(), packed(golden)
    bias = model.layers[1].mlp.moe_statics.e_score_correction_bias
    values = bias.numpy()
    values[0, 3] += 100
    bias.set_value(paddle.to_tensor(values))
    tokens = affinity(model, [inputs, inputs], "token")
    gates = affinity(model, [inputs], "gate")
    assert set(tokens) == {(layer, modality) for layer in (1, 2, 3) for modality in ("text", "vision")}
    for table in (tokens, gates):
        for share_E in table.values():
            assert share_E.shape == (16,)
            assert share_E.sum() == pytest.approx(1)
    assert tokens[1, "text"][3] == pytest.approx(1 / 6)
    _, _, chosen = layer_outputs(model, inputs)
    counts = np.bincount(chosen[1].reshape(-1), minlength=16)
    np.testing.assert_allclose(tokens[2, "vision"], counts / counts.sum())
    assert not np.allclose(gates[2, "vision"], tokens[2, "vision"])
    assert ((gates[2, "vision"] > 0) == (counts > 0)).all()


def test_affinity_by_gate_weight_of_one_token(golden) -> None:
    """For one token the table is its renormalised gate weights: ratios of two chosen experts are
    exp(difference of their logits).
    """
    model, inputs = fresh(), packed(golden, "text")
    one = type(inputs)(
        inputs.input_ids_T[:1], inputs.position_ids_T3[:1], inputs.vision_T[:1], inputs.placeholder_T[:1], (0, 1)
    )
    tap = RouterTap(keep=True)
    with paddle.no_grad():
        model(one, tap=tap)
    share_E, record = affinity(model, [one])[1, "text"], tap.records[0]
    a, b = record.chosen_Tk.numpy()[0, [0, 4]]
    scores = record.logits_TE.numpy()[0]
    assert share_E[a] / share_E[b] == pytest.approx(np.exp(scores[a] - scores[b]), rel=1e-5)
    assert (share_E > 0).sum() == 6


def test_smallest_set_that_reaches_the_share() -> None:
    table = {(1, "text"): np.array([0.2, 0.5, 0.0, 0.3]), (1, "vision"): np.array([0.1, 0.2, 0.3, 0.4])}
    assert select_experts(table, 0.5) == ((1, "text", 1), (1, "vision", 2), (1, "vision", 3))
    assert select_experts(table, 0.75) == (
        (1, "text", 1),
        (1, "text", 3),
        (1, "vision", 1),
        (1, "vision", 2),
        (1, "vision", 3),
    )
    assert len(select_experts(table, 1.0)) == 3 + 4  # an expert that nobody uses is never needed


def test_bad_calibration(golden) -> None:
    model = fresh()
    with pytest.raises(ValueError, match=r"measure \('count'\) must be one of"):
        affinity(model, [], "count")
    with pytest.raises(ValueError, match=r"batches \(0\) must be at least 1"):
        affinity(model, [])
    with pytest.raises(ValueError, match=r"share \(0\) must be in \(0, 1\]"):
        select_experts({}, 0)
    dense = type(model)(model.config.replace(moe=None))
    with pytest.raises(ValueError, match="moe is None"):
        affinity(dense, [packed(golden)])

"""train/optim.py: schedules, groups, clipping and AdamW against closed forms; an optimizer's state
survives a change of process.
"""

from __future__ import annotations

import math

import numpy as np
import paddle
import pytest
from paddle.utils import unique_name

from ernie_tune.checkpoint.optimizer_state import load_optimizer_arrays, optimizer_arrays
from ernie_tune.machine.alone import clip_, global_norm
from ernie_tune.train.optim import LrRatios, Schedule, build_adamw

HYPER = {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "floor", "expected"),
    [
        # steps 0 and 9 of the warm-up, its end, the middle, three quarters
        ("cosine", 0.0, [0.1, 1.0, 1.0, 0.5, 0.5 - math.sqrt(0.125)]),
        ("cosine", 0.2, [0.1, 1.0, 1.0, 0.6, 0.6 - 0.8 * math.sqrt(0.125)]),
        ("linear", 0.2, [0.1, 1.0, 1.0, 0.6, 0.4]),
        ("constant_with_warmup", 0.0, [0.1, 1.0, 1.0, 1.0, 1.0]),
        ("constant", 0.0, [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_schedule(shape: str, floor: float, expected: list[float]) -> None:
    s = Schedule(2.0, 110, 10, shape, 2 * floor)
    assert [s.at(i) / 2 for i in (0, 9, 10, 60, 85)] == pytest.approx(expected)
    assert s.at(110) / 2 == pytest.approx(1.0 if shape.startswith("constant") else floor)


def test_schedules_that_cannot_be_meant() -> None:
    with pytest.raises(ValueError, match=r"lr_scheduler_type \('wsd'\) must be one of"):
        Schedule(1.0, 10, 0, "wsd")
    with pytest.raises(ValueError, match=r"warmup_steps \(11\) must not exceed the steps of the run \(10\)"):
        Schedule(1.0, 10, 11)
    with pytest.raises(ValueError, match=r"min_lr \(0.5\) must be 0 with lr_scheduler_type constant"):
        Schedule(1.0, 10, 0, "constant", 0.5)
    assert Schedule(1.0, 10, 10).at(9) == 1.0


# --- AdamW ----------------------------------------------------------------------------------------

# canonical name -> shape, learning rate over the schedule's, whether it decays
NAMES = {
    "embed_tokens.weight": ((3, 2), 1.0, True),
    "layers.0.self_attn.q_proj.weight": ((2, 2), 1.0, True),
    "layers.0.input_layernorm.weight": ((2,), 1.0, False),
    "layers.1.mlp.gate.weight": ((2, 3), 0.01, True),
    "layers.1.mlp.gate.weight_1": ((2, 3), 0.01, True),
    "layers.1.mlp.gate_proj.weight": ((2, 3), 1.0, True),
    "layers.1.mlp.text_experts.up_gate_proj": ((2, 2, 2), 1.0, True),
    "vision_model.blocks.0.attn.qkv.weight": ((2, 2), 0.9, True),
    "vision_model.blocks.0.attn.qkv.bias": ((2,), 0.9, False),
    "resampler_model.after_norm.weight": ((2,), 1.0, False),
    "resampler_model.mlp.weight": ((2, 2), 1.0, True),
    "layers.0.self_attn.q_proj.adapters.default.lora_B": ((2, 2), 1.0, True),
}


def parameters(seed: int = 0) -> dict[str, paddle.Tensor]:
    generator = np.random.default_rng(seed)
    layer = paddle.nn.Layer()
    made = {}
    for name, (shape, _, _) in NAMES.items():
        made[name] = layer.create_parameter(list(shape))
        made[name].set_value(generator.normal(size=shape).astype(np.float32))
    return made


def gradients(step: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(100 + step)
    return {name: generator.normal(size=shape).astype(np.float32) for name, (shape, _, _) in NAMES.items()}


def make(named: dict[str, paddle.Tensor]) -> paddle.optimizer.AdamW:
    return build_adamw(list(named.items()), LrRatios().of, **HYPER)


def make_step(optimizer: paddle.optimizer.AdamW, named: dict[str, paddle.Tensor], step: int, rate: float) -> None:
    for name, value in gradients(step).items():
        (named[name] * paddle.to_tensor(value)).sum().backward()
    optimizer.set_lr(rate)
    with unique_name.guard():
        optimizer.step()
    optimizer.clear_grad(False)


def test_three_steps_of_adamw_are_the_paper_s() -> None:
    named = parameters()
    value = {name: p.numpy().astype(np.float64) for name, p in named.items()}
    first = {name: np.zeros_like(v) for name, v in value.items()}
    second = {name: np.zeros_like(v) for name, v in value.items()}
    optimizer = make(named)
    for step in (1, 2, 3):
        rate = 0.1 / step
        make_step(optimizer, named, step, rate)
        for name, g in gradients(step).items():
            _, ratio, decays = NAMES[name]
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.95 * second[name] + 0.05 * g.astype(np.float64) ** 2
            value[name] *= 1 - rate * ratio * (0.1 if decays else 0.0)
            m, v = first[name] / (1 - 0.9**step), second[name] / (1 - 0.95**step)
            value[name] -= rate * ratio * m / (np.sqrt(v) + 1e-8)
    for name, p in named.items():
        np.testing.assert_allclose(p.numpy(), value[name], rtol=0, atol=1e-6, err_msg=name)


def test_ratios_are_settings_and_frozen_parameters_stay() -> None:
    assert LrRatios(router=0.5, vision=0.25).of("layers.1.mlp.gate.weight_1") == 0.5
    assert LrRatios(router=0.5, vision=0.25).of("vision_model.ln.weight") == 0.25
    named = parameters()
    for p in named.values():
        p.stop_gradient = True
    with pytest.raises(ValueError, match=r"trainable parameters \(0\) must be at least 1; the freeze settings"):
        make(named)
    named["embed_tokens.weight"].stop_gradient = False
    groups = make(named)._param_groups
    assert [p.name for g in groups for p in g["params"]] == [named["embed_tokens.weight"].name]


# --- clipping -------------------------------------------------------------------------------------


def test_clipping_scales_all_gradients_together() -> None:
    g = [paddle.to_tensor([[3.0, 0.0]]), paddle.to_tensor([0.0, 4.0, 12.0])]
    assert global_norm(g) == pytest.approx(13.0)
    clip_(g, 13.0, 0.0)
    clip_(g, 13.0, 20.0)
    assert g[1].tolist() == [0.0, 4.0, 12.0]
    clip_(g, 13.0, 6.5)
    assert g[0].tolist() == [[1.5, 0.0]]
    assert g[1].tolist() == [0.0, 2.0, 6.0]
    assert global_norm(g) == pytest.approx(6.5)
    assert global_norm([]) == 0.0
    assert math.isnan(global_norm([paddle.to_tensor([math.nan])]))
    assert global_norm([paddle.to_tensor([3.0, 4.0]).astype("bfloat16")]) == 5.0


# --- states ---------------------------------------------------------------------------------------


def copied(arrays: dict[str, paddle.Tensor]) -> dict[str, paddle.Tensor]:
    return {name: paddle.to_tensor(value.numpy()) for name, value in arrays.items()}


@pytest.mark.parametrize("same_model", [False, True])
def test_an_optimizer_goes_on_where_another_stopped(same_model: bool) -> None:
    named = parameters()
    optimizer = make(named)
    for step in (1, 2):
        make_step(optimizer, named, step, 0.1)
    arrays, values = copied(optimizer_arrays(optimizer, named)), copied(named)
    slots = {key.rsplit("/", 1)[1] for key in arrays}
    assert slots == {"moment1_0", "moment2_0", "beta1_pow_acc_0", "beta2_pow_acc_0"}
    make_step(optimizer, named, 3, 0.1)
    expected = copied(named)

    again = named if same_model else parameters(seed=1)
    for name, p in again.items():
        p.set_value(values[name])
    second = make(again)
    load_optimizer_arrays(second, again, arrays)
    assert sorted(optimizer_arrays(second, again)) == sorted(arrays), "nothing is lost before the first step"
    make_step(second, again, 3, 0.1)
    for name, p in again.items():
        assert p.numpy().tobytes() == expected[name].numpy().tobytes(), name
    assert sorted(optimizer_arrays(second, again)) == sorted(arrays)


def test_a_parameter_without_a_gradient_so_far_starts_fresh() -> None:
    named = parameters()
    optimizer = make(named)
    used, unused = list(named)[:2], list(named)[2:]
    for name in used:
        named[name].sum().backward()
    with unique_name.guard():
        optimizer.step()
    arrays = copied(optimizer_arrays(optimizer, named))
    assert {key.rsplit("/", 1)[0] for key in arrays} == set(used)
    second = make(named)
    load_optimizer_arrays(second, named, arrays)
    second.clear_grad(False)
    for name in unused:  # the first step after resuming reaches other parameters
        named[name].sum().backward()
    with unique_name.guard():
        second.step()
    assert {key.rsplit("/", 1)[0] for key in optimizer_arrays(second, named)} == set(named)


def test_states_that_belong_to_nobody() -> None:
    named = parameters()
    optimizer = make(named)
    make_step(optimizer, named, 1, 0.1)
    arrays = copied(optimizer_arrays(optimizer, named))
    some = {name: p for name, p in named.items() if name != "embed_tokens.weight"}
    with pytest.raises(ValueError, match="must belong to a parameter of the model; rebuild the optimizer"):
        optimizer_arrays(optimizer, some)
    with pytest.raises(ValueError, match=r"optimizer state of \['embed_tokens.weight'\] must belong to trainable"):
        load_optimizer_arrays(make(some), some, arrays)


def test_sixteen_bit_parameters_keep_exact_masters() -> None:
    # The CPU has no step for bfloat16, so the master and its moments are made up; reading and
    # loading them is the same everywhere.
    name = "layers.0.self_attn.q_proj.weight"
    p = paddle.nn.Layer().create_parameter([2, 2], dtype="bfloat16")
    arrays = {
        f"{name}/master": paddle.to_tensor([[1.00001, 2.0], [3.0, 4.0]]),
        f"{name}/fp32_master_0_moment1_0": paddle.to_tensor([[0.1, 0.2], [0.3, 0.4]]),
        f"{name}/fp32_master_0_moment2_0": paddle.to_tensor([[0.5, 0.6], [0.7, 0.8]]),
        f"{name}/fp32_master_0_beta1_pow_acc_0": paddle.to_tensor([0.81]),
        f"{name}/fp32_master_0_beta2_pow_acc_0": paddle.to_tensor([0.9025]),
    }
    for named in ({name: p}, {name: paddle.nn.Layer().create_parameter([2, 2], dtype="bfloat16")}):
        optimizer = make(named)
        load_optimizer_arrays(optimizer, named, copied(arrays))
        found = optimizer_arrays(optimizer, named)
        assert sorted(found) == sorted(arrays)
        for key, value in arrays.items():
            assert found[key].numpy().tobytes() == value.numpy().tobytes(), key
        master = optimizer._master_weights[named[name].name]
        moment = optimizer._get_accumulator_master("moment1", named[name])
        assert master.numpy().tobytes() == arrays[f"{name}/master"].numpy().tobytes()
        assert moment.tolist() == pytest.approx(np.array([[0.1, 0.2], [0.3, 0.4]]))


def test_the_norm_of_a_large_gradient_is_exact() -> None:
    """`paddle.dot` adds float32 one by one: 0.3 % off on four million values."""
    g = np.random.default_rng(0).standard_normal(4_000_000).astype(np.float32) * np.float32(1e-3)
    want = math.sqrt(float((g.astype(np.float64) ** 2).sum()))
    assert global_norm([paddle.to_tensor(g)]) == pytest.approx(want, rel=1e-6)

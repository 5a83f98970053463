"""plan/weights.py and plan/memory.py hold to the code that they count: parameters, adapters, the
sharding table, constants.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from planning import ATTENTION, B28, B424, EVERYWHERE, FULL, job

from ernie_tune.config.layout import Layout
from ernie_tune.models.presets import PRESETS, preset
from ernie_tune.models.specs import parameter_count, parameter_specs
from ernie_tune.plan import memory as counted
from ernie_tune.plan.cards import GB, card
from ernie_tune.plan.job import ROLLOUT_ROWS
from ernie_tune.plan.memory import memory, stage_layers
from ernie_tune.plan.weights import EXPERT, TENSOR, WHOLE, active_values, base_bytes, cut_of, held, trained_values

CARD = card("80g")


def test_every_parameter_is_cut_as_the_table_says() -> None:
    from ernie_tune.models.ernie import PLAN

    kinds = {"column": TENSOR, "row": TENSOR, "vocab": TENSOR, "expert": EXPERT, "replicate": WHOLE}
    for name in ("tiny-a", "tiny-c"):
        for parameter in parameter_specs(preset(name)):
            kind = next((k for pattern, k in PLAN.items() if fnmatchcase(parameter, pattern)), "replicate")
            assert cut_of(parameter) == kinds[kind], parameter


def test_constants_are_those_of_the_code() -> None:
    from ernie_tune.models import attention, mkl
    from ernie_tune.objectives import logprobs
    from ernie_tune.trainers import online

    assert counted.LOSS_KEEP_BYTES == logprobs.KEEP_BYTES
    assert counted.LOSS_CHUNK_BYTES == logprobs.CHUNK_BYTES
    assert ROLLOUT_ROWS == online._ROWS
    assert counted.PROBS_KEEP_BYTES == attention.KEEP_PROBS_BYTES
    assert counted.ATTENTION_BLOCK == attention.BLOCK_TOKENS
    assert counted.has_math_library() == (mkl._library() is not None)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_all_parameters_are_held_once(name: str) -> None:
    full = job(name, fine_tuning="Full")
    biases = sum(s.size for s in parameter_specs(preset(name)).values() if not s.trainable)
    assert trained_values(full) == parameter_count(preset(name)) - biases


def test_bytes_of_the_released_models() -> None:
    """Published parameter counts in two bytes; routers in four."""
    for name, parameters in ((B28, 29_399_294_336), (B424, 423_526_285_184)):
        routers = sum(s.size for s in parameter_specs(preset(name)).values() if s.float32)
        assert base_bytes(job(name)) == 2 * parameters + 2 * routers


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        (ATTENTION, 2 * 32 * 28 * (2560 + 2560 + 2560 + 512)),
        ({"lora_rank": 8}, None),
        (EVERYWHERE, None),
        ({**EVERYWHERE, "lora_experts": "vision"}, None),
        ({**ATTENTION, "dora": "true"}, None),
    ],
)
def test_adapters_are_those_that_peft_makes(settings: dict[str, object], want: int | None) -> None:
    """Of 28B in a closed form; of a tiny model by making them."""
    if want is not None:
        assert trained_values(job(B28, **settings)) == want
    from ernie_tune.checkpoint.auto import AutoModel
    from ernie_tune.trainers.assemble import apply_method

    small = {"model_name_or_path": "tiny-a", **settings}
    from planning import settings as resolved

    model = apply_method(resolved(small.pop("model_name_or_path"), **small), AutoModel.from_config("tiny-a"))
    made = sum(int(p.size) for p in model.parameters() if not p.stop_gradient)
    assert trained_values(job("tiny-a", **settings)) == made


@pytest.mark.parametrize(
    "words", ["freeze_vision", "freeze_vision freeze_aligner freeze_router", "freeze_text_experts"]
)
def test_frozen_parts_are_those_of_the_trainer(words: str) -> None:
    from planning import settings

    from ernie_tune.checkpoint.auto import AutoModel
    from ernie_tune.trainers.assemble import apply_method

    model = apply_method(settings("tiny-a", fine_tuning="Full", freeze_config=words), AutoModel.from_config("tiny-a"))
    made = sum(int(p.size) for p in model.parameters() if not p.stop_gradient)
    assert trained_values(job("tiny-a", fine_tuning="Full", freeze_config=words)) == made


@pytest.mark.parametrize("algorithm", ["weight_only_int8", "weight_only_mix"])
def test_quantised_bytes_are_those_of_the_quantised_model(algorithm: str) -> None:
    from ernie_tune.checkpoint.auto import AutoModel
    from ernie_tune.peft.quantize import quantize_base, weight_bytes

    for name in ("tiny-a", "tiny-c"):
        model = quantize_base(AutoModel.from_config(name), algorithm)
        planned = job(name, on_cpu=True, weight_quantize_algo=algorithm)
        assert base_bytes(planned) == weight_bytes(model)


def test_unknown_format() -> None:
    with pytest.raises(ValueError, match=r"weight_quantize_algo \('nf4'\) must be one of"):
        held(job(B28, weight_quantize_algo="nf4"))


def test_active_parameters() -> None:
    """3.09 and 46.26 B for text, 1.82 and 25.72 B for vision, without the head."""
    for name, text, vision in ((B28, 3.09, 1.82), (B424, 46.26, 25.72)):
        assert active_values(preset(name), False) / 1e9 == pytest.approx(text, rel=4e-3)
        assert active_values(preset(name), True) / 1e9 == pytest.approx(vision, rel=4e-3)


def test_layers_are_dealt_out_to_stages() -> None:
    assert stage_layers(6, Layout(1, 2)) == [[0, 1, 2], [3, 4, 5]]
    assert stage_layers(8, Layout(1, 4, virtual_pipe=2)) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert [len(s) for s in stage_layers(54, Layout(1, 4))] == [13, 14, 13, 14]


def test_degrees_divide_what_they_should() -> None:
    """Weights over tensor and pipeline, experts over expert ranks, states over sharding, gradients
    from stage 2 on, weights at stage 3.
    """
    full = job(B28, **FULL)
    one = memory(full, Layout(), CARD).items
    four = memory(full, Layout(sharding=4, sharding_stage=1), CARD).items
    assert four["optimizer"] == pytest.approx(one["optimizer"] / 4)
    assert four["gradients"] == pytest.approx(one["gradients"] * 2, rel=1e-2), "float32 beside bf16 weights"
    two = memory(full, Layout(sharding=4, sharding_stage=2), CARD).items
    assert two["gradients"] == pytest.approx(four["gradients"] / 4)
    assert two["weights"] == four["weights"]
    three = memory(full, Layout(sharding=4, sharding_stage=3), CARD).items
    assert three["weights"] == pytest.approx(four["weights"] / 4)
    experts = memory(full, Layout(sharding=4, expert=4, sharding_stage=1), CARD).items
    layer = preset(B28).moe.num_experts * 3 * 2560 * (1536 + 512) * 27 * 2
    assert four["weights"] - experts["weights"] == pytest.approx(layer * 3 / 4)
    assert experts["optimizer"] == pytest.approx(four["optimizer"], rel=1e-3), "experts: fewer of them, shared by fewer"


def test_a_tied_embedding_is_held_twice_by_a_pipeline() -> None:
    full = job(B28, **FULL)
    stages = [sum(h.trained for h in held(full) if h.place in places) for places in ({"embed_tokens"},)]
    assert stages == [103424 * 2560]
    two = memory(full, Layout(1, 2), CARD)
    assert len(two.stages) == 2
    assert min(two.stages) > 0.4 * sum(two.stages)


def test_pairs_references_and_sampling() -> None:
    sft = memory(job(B28, **ATTENTION), Layout(), CARD).items
    dpo = memory(job(B28, stage="DPO", **ATTENTION), Layout(), CARD).items
    assert dpo["kept activations"] == pytest.approx(2 * sft["kept activations"])
    assert "reference model" not in dpo, "the adapter is switched off"
    whole = memory(job(B28, stage="DPO", fine_tuning="Full"), Layout(), CARD).items
    assert whole["reference model"] == pytest.approx(base_bytes(job(B28)))
    free = memory(
        job(B28, stage="DPO", fine_tuning="Full", reference_free="true", loss_type="simpo"), Layout(), CARD
    ).items
    assert "reference model" not in free
    reward = memory(job(B28, stage="RM", **ATTENTION), Layout(), CARD).items
    assert "loss" not in reward


def test_what_a_critic_and_a_reward_model_hold(tmp_path: Path) -> None:
    """A second model trained as the first, or a second adapter; a reward model that is an adapter
    costs nothing more, another one its weights."""
    ppo = {"stage": "PPO", "max_completion_length": 256}
    whole = memory(job(B28, fine_tuning="Full", **ppo), Layout(), CARD).items
    model = base_bytes(job(B28))
    assert whole["critic"] == pytest.approx(model + whole["gradients"] + whole["optimizer"], rel=1e-6)
    assert whole["reference model"] == pytest.approx(model)
    assert "reward model" not in whole
    assert "reference model" not in memory(job(B28, fine_tuning="Full", kl_coef=0.0, **ppo), Layout(), CARD).items
    alone = memory(job(B28, stage="RLVR", **ATTENTION), Layout(), CARD).items
    beside = memory(job(B28, **ppo, **ATTENTION), Layout(), CARD).items
    assert "critic" not in alone
    adapters = alone["adapters"] + alone["gradients"] + alone["optimizer"]
    assert beside["critic"] == pytest.approx(adapters, rel=1e-6)
    assert memory(job(B28, reward_model="elsewhere", **ppo, **ATTENTION), Layout(), CARD).items["reward model"] == model
    assert "reward model" not in memory(job(B28, reward_model=str(tmp_path), **ppo, **ATTENTION), Layout(), CARD).items


def test_sampled_answers_hold_their_prompt_once() -> None:
    """57,344 bytes a token: 28 layers x keys and values of 4 heads of 128, two bytes each."""
    rollout = {"stage": "RLVR", "max_prompt_len": 3584, "max_completion_length": 512, "num_generations": 8, **ATTENTION}

    def cache(**given: int) -> float:
        return memory(job(B28, **rollout, **given), Layout(), CARD).items["key/value cache"]

    step = cache(per_device_train_batch_size=8)
    assert step == 57_344 * (4 * 3584 + 32 * 512), "four micro-batches, each the eight answers to one prompt"
    assert cache(per_device_train_batch_size=4) == step / 2
    assert cache(per_device_train_batch_size=2, num_mini_batches=4) == step
    assert cache(per_device_train_batch_size=64) == 2 * step, "no more answers at once than the engine takes"


def test_gradients_take_the_place_of_activations_in_one_process() -> None:
    once = memory(
        job("small", on_cpu=True, fine_tuning="Full", gradient_accumulation_steps=1), Layout(), card("cpu-8g")
    )
    assert once.items["released in time"] == -min(
        once.items["gradients"], once.items["kept activations"] + once.items["loss"]
    )
    assert once.total == pytest.approx(math.fsum(once.items.values()))
    twice = memory(
        job("small", on_cpu=True, fine_tuning="Full", gradient_accumulation_steps=2), Layout(), card("cpu-8g")
    )
    assert "released in time" not in twice.items
    assert twice.total > once.total


def test_pictures_cost_memory_by_who_trains_the_tower() -> None:
    frozen = memory(job(B28, visual_tokens=4096, **FULL), Layout(), CARD).items["vision activations"]
    trained = memory(job(B28, visual_tokens=4096, fine_tuning="Full"), Layout(), CARD).items["vision activations"]
    spread = memory(job(B28, visual_tokens=4096, fine_tuning="Full"), Layout(1, 2), CARD).items["vision activations"]
    assert 0.5 * GB < frozen < trained
    assert spread < 0.7 * trained

"""trainers/assemble.py: settings become data, models and adapters; a setting without effect is
refused.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_runs import mixed_rows, picture_row, processor, settings, text_row, write_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.arguments import SETTINGS, RunConfig, build
from ernie_tune.config.checks import remarks
from ernie_tune.data.mixing import Mixture, Shard
from ernie_tune.machine.placed import load_weights
from ernie_tune.models.presets import preset
from ernie_tune.peft.config import BottleneckConfig, LoraConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.model import PeftModel, get_peft_model
from ernie_tune.peft.settings import expert_range
from ernie_tune.trainers import assemble
from ernie_tune.trainers.assemble import Subset, hold_out
from ernie_tune.trainers.sft import SFTTrainer

PACKAGE = Path(assemble.__file__).parents[1]
UNREAD = [name for name, setting in SETTINGS.items() if setting.about.unread or setting.about.unbuilt]
LATER_STAGES = ("preference", "rollout")  # the loader says that they have no effect at stage SFT


def other(name: str) -> Any:
    """A value of a setting that is not its default."""
    s = SETTINGS[name]
    if s.choices and not s.many:
        return next(c for c in s.choices if c != s.default)
    value = {bool: not s.default, int: 7, float: 0.5, str: "x"}[s.kind]
    return (value,) if s.many else value


def test_every_setting_is_read_by_code_or_refused() -> None:
    # to plan is not to obey
    outside = [p for p in PACKAGE.rglob("*.py") if p.parent.name not in ("config", "plan")]
    derived = [PACKAGE / "config" / name for name in ("sections_model.py", "layout.py")]
    text = "\n".join(p.read_text(encoding="utf-8") for p in [*outside, *derived])
    for name, setting in SETTINGS.items():
        read = re.search(rf"\.{name}\b", text)
        refused = name in UNREAD
        # one choice; always done
        if setting.section not in LATER_STAGES and name not in ("optim", "do_eval"):
            assert bool(read) != refused, f"{name} must be read, or be known as unread or unbuilt, and not both"


@pytest.mark.parametrize("name", UNREAD)
def test_a_setting_that_nothing_reads_is_refused_or_noted(name: str) -> None:
    config, about = build({name: other(name)}), SETTINGS[name].about
    assert bool(about.unread) != bool(about.unbuilt)
    if about.unread:  # harmless: a line, no error
        assert [setting for setting, _ in remarks(config, [name])] == [name]
        assemble.refuse(config)
        return
    wanted = rf"^{name} \(.*\) has no effect in this version, must be left at .*; {re.escape(about.unbuilt)}"
    with pytest.raises(ValueError, match=wanted):
        assemble.refuse(config)
    assemble.refuse(RunConfig())


def test_what_no_trainer_does_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stage \(DPO\) must be one of .*SFT.* with SFTTrainer"):
        SFTTrainer(args=build({"stage": "DPO"}))
    guarded = {"guard_dataset_path": ("a.jsonl",)}
    with pytest.raises(ValueError, match="guard_dataset_path is looked at when evaluating and must go with eval_strat"):
        assemble.refuse(build(guarded))
    assemble.refuse(build({**guarded, "eval_strategy": "epoch"}))


# --- data -----------------------------------------------------------------------------------------


def test_files_have_one_format_or_one_each(tmp_path: Path) -> None:
    a = write_rows(tmp_path / "a.jsonl", [text_row(i) for i in range(3)])
    b = write_rows(tmp_path / "b.jsonl", [{"prompt": "p", "response": "r"}])
    sets = assemble.train_sets(build({"train_dataset_path": (a, b), "train_dataset_type": ("auto",)}), ("sft",))
    assert [len(s) for s in sets] == [3, 1]
    assert sets[1][0].messages[1]["content"] == "r"
    held = {"eval_dataset_path": (a, b), "eval_dataset_type": ("messages", "prompt_response")}
    both = assemble.eval_set(build(held), ("sft",))
    assert [len(both), both[3].messages[0]["content"]] == [4, "p"]
    assert len(assemble.eval_set(RunConfig(), ("sft",))) == 0
    fewer = assemble.train_sets(build({"train_dataset_path": (a, b), "max_samples": 2}), ("sft",))
    assert [len(s) for s in fewer] == [2, 1]  # never more than there are
    assert [fewer[0][i].messages for i in range(2)] == [sets[0][i].messages for i in range(2)]
    assert len(assemble.eval_set(build({**held, "max_samples": 2}), ("sft",))) == 3  # of each file, held-out ones too
    # the type is that of the second file
    with pytest.raises(ValueError, match=r"b\.jsonl:1: .*rejected"):
        assemble.eval_set(build({**held, "eval_dataset_type": ("messages", "pairs")}), ("sft",))[3]


def test_rows_held_out_are_drawn_once_and_never_trained_on() -> None:
    a, b = list(range(30)), list(range(100, 110))
    sets, held = hold_out([a, b], 0.25, seed=1)  # type: ignore[list-item]
    trained, measured = [x for s in sets for x in s], list(held)
    assert len(measured) == 10
    assert sorted(trained + measured) == a + b  # type: ignore[operator]
    assert list(hold_out([a, b], 10, seed=1)[1]) == measured  # type: ignore[list-item]
    assert list(hold_out([a, b], 10, seed=2)[1]) != measured  # type: ignore[list-item]
    assert [held[i] for i in range(-10, 0)] == measured
    assert held[2:4] == measured[2:4]
    with pytest.raises(IndexError):
        held[10]
    for share in (0.001, 40):
        with pytest.raises(ValueError, match=rf"val_size \({share:g}\) must leave rows on both sides of 40"):
            hold_out([a, b], share, seed=1)  # type: ignore[list-item]
    assert list(Subset(a, [3, 1, 4])[1:]) == [1, 4]  # type: ignore[arg-type]


def test_settings_reach_the_stream() -> None:
    values = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 5,
        "packing": True,
        "greedy_intokens": True,
        "max_seq_len": 77,
        "truncation_strategy": "left",
        "thought_weight": 0.5,
        "answer_weight": 2.0,
        "data_seed": 9,
        "train_dataset_prob": (1.0, 3.0),
        "mix_strategy": "random",
    }
    config = build(values)
    encoder = assemble.encoder_of(config, processor())
    assert (encoder.max_tokens, encoder.truncation, encoder.thought_weight, encoder.answer_weight) == (
        77,
        "left",
        0.5,
        2,
    )
    stream = assemble.stream_of(config, [list(range(10)), list(range(30))], encoder, rank=1, size=2)  # type: ignore[list-item]
    assert (stream.rows, stream.accumulation, stream.packing, stream.best_fit) == (3, 5, True, True)
    assert (stream.shard.rank, stream.shard.size) == (1, 2)
    assert stream.shard.mixture.seed == 9
    assert stream.shard.mixture.quotas == [10, 30]
    plain = assemble.stream_of(build({"seed": 4}), [[1, 2]], encoder)  # type: ignore[list-item]
    assert plain.shard.mixture.seed == 4


def test_the_heaviest_batch(tmp_path: Path) -> None:
    config = settings(tmp_path, train_dataset_path=write_rows(tmp_path / "r.jsonl", mixed_rows(12)), max_seq_len=80)
    sets = assemble.train_sets(config, ("sft",))
    encoder = assemble.encoder_of(config, processor())
    stream = assemble.stream_of(config, sets, encoder)
    samples, stands_out = assemble.longest(stream)
    found = [s.num_tokens + (0 if s.row.pixel_values_PC is None else len(s.row.pixel_values_PC)) for s in samples]
    # rows have 28 24 52 34 46 72 32 82 77 29 18 24 tokens and each third one 16 patches; 82 is too
    # long
    assert found == [77, 72]
    assert stream.shard.position == 0
    assert stands_out
    packed = dataclasses.replace(config.data, packing=True)
    config = RunConfig(**{**vars(config), "data": packed})
    sizes = [s.num_tokens for s in assemble.longest(assemble.stream_of(config, sets, encoder))[0]]
    assert sizes == [77, 72], "as much as two packs of 80 hold"
    tight = assemble.encoder_of(build({"max_seq_len": 2}), processor())
    assert assemble.longest(assemble.stream_of(config, sets, tight))[0] == []


def test_no_batch_stands_out_of_rows_alike(tmp_path: Path) -> None:
    config = settings(tmp_path, train_dataset_path=write_rows(tmp_path / "r.jsonl", [text_row(1)] * 6))
    encoder = assemble.encoder_of(config, processor())
    stream = assemble.stream_of(config, assemble.train_sets(config, ("sft",)), encoder)
    samples, stands_out = assemble.longest(stream)
    assert len(samples) == stream.rows
    assert not stands_out


def test_pictures_weigh_with_their_patches(tmp_path: Path) -> None:
    rows = [text_row(1), picture_row(0)]  # 24 tokens; 28 tokens and 16 patches
    long_text = {"messages": [{"role": "user", "content": "why " * 10}, {"role": "assistant", "content": "b"}]}
    config = settings(tmp_path, train_dataset_path=write_rows(tmp_path / "r.jsonl", [*rows, long_text]))
    encoder = assemble.encoder_of(config, processor())
    mixture = Mixture(assemble.train_sets(config, ("sft",)), shuffle=False)
    stream = assemble.stream_of(config, [mixture], encoder)  # type: ignore[list-item]
    stream.shard, stream.rows = Shard(mixture), 1
    text, picture = (encoder(mixture[i], assemble.Dropped()) for i in (2, 1))
    assert text is not None
    assert picture is not None
    assert picture.num_tokens < text.num_tokens < picture.num_tokens + 16
    assert assemble.longest(stream)[0][0].row.pixel_values_PC is not None


# --- models ---------------------------------------------------------------------------------------


def test_processors_of_presets_and_folders(tmp_path: Path) -> None:
    limits = build({"image_min_pixels": 3136, "image_max_pixels": 6272, "template": "ernie_vl"})
    tiny = assemble.load_processor(limits, "tiny-a")
    assert (tiny.images.min_pixels, tiny.images.max_pixels, tiny.template.variant) == (3136, 6272, "ernie_vl")
    assert len(assemble.load_processor(RunConfig(), "owner/Small").tokenizer.special) >= len(tiny.tokenizer.special)
    assert assemble.load_processor(RunConfig(), "small").tokens.image == preset("small").tokens.image
    tiny.save_pretrained(tmp_path)
    assert assemble.load_processor(RunConfig(), tmp_path).template.variant == "ernie_vl"
    again = assemble.load_processor(build({"template": "hf", "image_max_pixels": 9999}), tmp_path)
    assert (again.images.min_pixels, again.images.max_pixels, again.template.variant) == (3136, 9999, "hf")


def test_models_of_presets_and_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = build({"model_name_or_path": "tiny-a", "seed": 5, "bf16": True})
    a, b = assemble.load_model(config), assemble.load_model(config)
    said = capsys.readouterr().err
    assert "tiny-a: fresh weights drawn from seed 5" in said
    assert "bf16: true: this device computes in float32 instead" in said
    assert a.name_or_path == "tiny-a"
    assert all(np.array_equal(p.numpy(), q.numpy()) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    a.save_pretrained(tmp_path / "m")
    c = assemble.load_model(build({"model_name_or_path": str(tmp_path / "m")}))
    assert c.name_or_path == str(tmp_path / "m")
    assert np.array_equal(c.norm.weight.numpy(), a.norm.weight.numpy())


def fresh() -> AutoModel:
    return AutoModel.from_config("tiny-a", seed=3)


def trained(model: Any) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.stop_gradient}


def test_methods(tmp_path: Path) -> None:
    full = assemble.apply_method(build({"fine_tuning": "Full"}), fresh())
    everything = {name for name, _ in full.named_parameters() if "e_score_correction_bias" not in name}
    assert trained(full) == everything
    part = assemble.apply_method(build({"fine_tuning": "Freeze", "freeze_config": ("freeze_vision",)}), fresh())
    assert trained(part) == {name for name in everything if not name.startswith("vision_model.")}
    spec = tmp_path / "spec.json"
    spec.write_text('{"trainable_layers": [2]}', encoding="utf-8")
    layer = assemble.apply_method(build({"fine_tuning": "Freeze", "freeze_spec": str(spec)}), fresh())
    assert trained(layer) == {name for name in everything if name.startswith("layers.2.")}
    with pytest.raises(ValueError, match=r"fine_tuning \(Freeze\) must come with trainable_layers, frozen_layers"):
        assemble.refuse(build({"fine_tuning": "Freeze"}))
    quantised = assemble.apply_method(build({"weight_quantize_algo": "weight_only_int8"}), fresh())
    assert all(".adapters." in name for name in trained(quantised))
    assert trained(quantised)


LORA = {"lora_rank": 4, "lora_target_modules": ("q_proj",)}


def test_lora_settings_reach_the_adapter(tmp_path: Path) -> None:
    values = {**LORA, "lora_alpha": 5, "lora_dropout": 0.25, "rslora": True, "lora_plus_scale": 4.0, "seed": 8}
    model = assemble.apply_method(build({**values, "lora_expert_list": ("1:vision:2-3", "2:text:0")}), fresh())
    assert isinstance(model, PeftModel)
    config = model.adapters["default"].config
    assert isinstance(config, LoraConfig)
    assert (config.r, config.alpha, config.lora_dropout, config.rslora, config.lora_plus_scale, config.seed) == (
        4, 5, 0.25, True, 4.0, 8,
    )  # fmt: skip
    assert config.expert_targets == ((1, "vision", 2), (1, "vision", 3), (2, "text", 0))
    assert model.learning_rate_scale("layers.0.self_attn.q_proj.adapters.default.lora_B") == 4.0
    model.save_pretrained(tmp_path)
    again = assemble.apply_method(build({"lora_path": str(tmp_path)}), fresh())
    assert trained(again) == trained(model)


def test_experts_by_affinity(tmp_path: Path) -> None:
    config = settings(tmp_path, fine_tuning="LoRA", lora_expert_affinity=0.3, lora_experts="vision", lora_dropout=0.0)
    encoder = assemble.encoder_of(config, processor())
    rows = assemble.train_sets(config, ("sft",))[0]
    samples = [s for i in range(4) if (s := encoder(rows[i], assemble.Dropped())) is not None]
    chosen = assemble.lora_config(config, fresh(), samples).expert_targets
    assert chosen
    assert {modality for _, modality, _ in chosen} == {"vision"}
    assert len(chosen) < 2 * 8, "the fewest of both layers' eight experts"


@pytest.mark.parametrize("item", ["3", "x:text:1", "3:audio:1", "3:text:a-b", "3:text:1-"])
def test_expert_ranges(item: str) -> None:
    assert expert_range("3:vision:0-2") == [(3, "vision", 0), (3, "vision", 1), (3, "vision", 2)]
    assert expert_range("3:text:7") == [(3, "text", 7)]
    if item != "3:text:1-":
        with pytest.raises(
            ValueError, match=rf"lora_expert_list \('{item}'\) must look like layer:text\|vision:first-last"
        ):
            expert_range(item)


# --- what a model that came as an object decides --------------------------------------------------


def test_arguments_describe_the_model_that_was_passed() -> None:
    plain = build({"fine_tuning": "Full", "learning_rate": 0.5, "num_virtual_tokens": 3})
    assert assemble.as_trained(plain, fresh(), "base").flat() == {**plain.flat(), "model_name_or_path": "base"}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["query_key_value"], lora_dropout=0.05, lora_plus_scale=2.0)
    said = assemble.as_trained(RunConfig(), get_peft_model(fresh(), lora), "base").flat()
    wanted = {"fine_tuning": "LoRA", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.05, "lora_plus_scale": 2.0}
    assert {**wanted, "lora_target_modules": ("query_key_value",)}.items() <= said.items()
    for adapter, expected in (
        (BottleneckConfig(7), {"fine_tuning": "Adapter", "adapter_width": 7}),
        (PromptConfig(5), {"fine_tuning": "Prompt", "num_virtual_tokens": 5}),
        (PromptConfig(5, encoder_width=6), {"fine_tuning": "PTuning", "prompt_encoder_width": 6}),
        (PrefixConfig(9), {"fine_tuning": "Prefix", "num_virtual_tokens": 9}),
    ):
        said = assemble.as_trained(plain, get_peft_model(fresh(), adapter), "base").flat()
        assert expected.items() <= said.items()


def noisy(model: Any) -> Any:
    for p in model.parameters():
        if not p.stop_gradient:
            p.set_value(paddle.full_like(p, 0.25))
    return model


@pytest.mark.parametrize(
    "adapter",
    [None, LoraConfig(r=2, expert_targets="text", modules_to_save=["norm"]), BottleneckConfig(4), PromptConfig(3)],
)
def test_weights_come_back_from_files(adapter: Any, tmp_path: Path) -> None:
    first, second = (fresh() if adapter is None else get_peft_model(fresh(), adapter) for _ in range(2))
    noisy(first).save_pretrained(tmp_path)
    load_weights(second, tmp_path)
    assert trained(second) == trained(first)
    state = first.state_dict()
    for name, value in second.state_dict().items():
        assert np.array_equal(value.numpy(), state[name].numpy()), name


def test_weights_of_others_are_refused(tmp_path: Path) -> None:
    with_norm = LoraConfig(r=2, modules_to_save=["norm"])
    get_peft_model(fresh(), with_norm).save_pretrained(tmp_path / "norm")
    with pytest.raises(ValueError, match=r"must hold the tensors that this run trains, but \['norm.weight'\] differ"):
        load_weights(get_peft_model(fresh(), LoraConfig(r=2)), tmp_path / "norm")
    tuned = get_peft_model(fresh(), PromptConfig(3, encoder_width=4))
    tuned.save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="must hold the encoder of a P-tuned prompt"):
        load_weights(tuned, tmp_path / "prompt")
    AutoModel.from_config("tiny-b").save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="tensor"):
        load_weights(fresh(), tmp_path / "b")

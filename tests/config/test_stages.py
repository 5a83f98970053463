"""One table of methods, and what is known of each setting: the classes, losses and rules elsewhere
must say the same.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest

from ernie_tune.config.arguments import SETTINGS, build, default_for, shapes_weights
from ernie_tune.config.checks import problems, remarks
from ernie_tune.config.loader import load_text
from ernie_tune.config.sections_model import METHODS, ROW_FORMATS
from ernie_tune.config.sections_run import OptimArguments
from ernie_tune.config.stages import (
    EDGE_LOSSES,
    LABEL_LOSSES,
    ONLINE_PRESETS,
    PAIR_LOSSES,
    POLICY_LOSSES,
    ROW_PRESETS,
    STAGES,
    UNREFERENCED,
    UPO_PRESETS,
    UPO_TERMS,
)
from ernie_tune.data.readers.formats import FORMATS

BUILT = list(STAGES.values())


@pytest.mark.parametrize("stage", BUILT, ids=lambda stage: stage.name)
def test_trainers_serve_what_the_table_says(stage: Any) -> None:
    module, _, name = stage.trainer.partition(":")
    trainer = vars(importlib.import_module(module))[name]
    assert stage.name in trainer.method_class.stages
    assert tuple(trainer.method_class.signals) == stage.signals
    import ernie_tune

    assert getattr(ernie_tune, name) is trainer


def test_names_of_losses_are_those_that_are_computed() -> None:
    from ernie_tune.objectives import pairwise, policy, unpaired, upo

    assert PAIR_LOSSES == pairwise.NAMES
    assert tuple(policy.SURROGATES) == POLICY_LOSSES
    assert tuple(upo.PRESETS) == UPO_PRESETS
    assert set(upo.SAMPLING_PRESETS) == set(ONLINE_PRESETS)
    assert {name for name, preset in upo.SAMPLING_PRESETS.items() if preset.rows} == set(ROW_PRESETS)
    assert upo.OFFLINE == UPO_TERMS
    assert set(LABEL_LOSSES) == set(SETTINGS["bin_loss"].choices)
    assert set(EDGE_LOSSES) == {name for name in pairwise.NAMES if name in pairwise.LOSSES}
    assert unpaired  # the label losses are functions there
    for name in (n for n in PAIR_LOSSES if n != "sft"):
        terms = pairwise.expand([name], None, pairwise.PreferenceHyper(label_smoothing=0.1))
        assert pairwise.needs_reference(terms) == (name not in UNREFERENCED), name


def test_names_of_row_formats_are_those_that_are_read() -> None:
    known = {"auto", *(name for form in FORMATS for name in (form.name, *form.families))}
    assert set(ROW_FORMATS) == known
    assert len(ROW_FORMATS) == len(known)


def test_every_setting_is_explained_in_two_languages() -> None:
    for name, setting in SETTINGS.items():
        about = setting.about
        assert about.help.isascii(), name
        assert any("\u4e00" <= c <= "\u9fff" for c in about.help_zh), name
        assert set(about.explained) <= set(about.choices), name
        assert set(about.stages) <= set(STAGES), name
        assert set(about.methods) <= set(METHODS), name
        if about.needs:
            other, values = about.needs
            assert set(values) <= set(SETTINGS[other].choices), name
        assert setting.default in about.choices or not about.choices or setting.many, name


def test_what_shapes_weights() -> None:
    shaping = (
        "model_name_or_path",
        "learning_rate",
        "max_seq_len",
        "seed",
        "lora_rank",
        "bf16",
        "beta",
        "val_size",
        "max_samples",
        "load_best_model_at_end",
        "early_stopping_patience",
        "max_steps",
    )
    harmless = (
        "output_dir",
        "logging_steps",
        "save_steps",
        "eval_steps",
        "report_to",
        "tensor_model_parallel_size",
        "recompute",
        "dataloader_num_workers",
        "prefix_sharing",
        "download_hub",
        "resume_from_checkpoint",
    )
    assert all(map(shapes_weights, shaping))
    assert not any(map(shapes_weights, harmless))
    with pytest.raises(KeyError):
        shapes_weights("nonsense")


def test_defaults_by_stage_and_method() -> None:
    assert default_for("learning_rate", "SFT", "LoRA") == 3e-4
    assert default_for("learning_rate", "RM", "Full") == 1e-6
    assert default_for("per_device_train_batch_size", "KTO", "LoRA") == 2
    for stage in STAGES:
        for method in METHODS:
            text = f"stage: {stage}\nfine_tuning: {method}" + (
                "\nfreeze_config: freeze_llm" if method == "Freeze" else ""
            )
            flat = load_text(text, "run.yaml").config.flat()
            for name in ("learning_rate", "per_device_train_batch_size"):
                assert flat[name] == default_for(name, stage, method)


def test_a_default_never_contradicts_what_was_written() -> None:
    loaded = load_text("stage: DPO\nmax_seq_len: 64", "run.yaml")
    assert loaded.config.preference.max_prompt_len == 63
    assert [n for n in loaded.notes if n.startswith("max_prompt_len was not given and is 63, below max_seq_len (64)")]
    assert load_text("stage: DPO\nmax_seq_len: 2049", "run.yaml").notes == ()
    with pytest.raises(ValueError, match=r"run.yaml:3: max_prompt_len \(100\) must be below max_seq_len \(64\)"):
        load_text("stage: DPO\nmax_seq_len: 64\nmax_prompt_len: 100", "run.yaml")


WRONG = [
    ({"stage": "DPO", "loss_type": ("nonsense",)}, "loss_type (nonsense) must be one of sigmoid, odpo"),
    ({"stage": "DPO", "loss_type": ("sigmiod",)}, "did you mean 'sigmoid'"),
    ({"stage": "DPO", "loss_type": ("kto_pair",)}, "loss_type (kto_pair) must be another"),
    ({"stage": "DPO", "loss_type": ("sigmoid", "simpo")}, "must not mix losses with and without a reference"),
    ({"stage": "DPO", "loss_type": ("ipo",), "ref_mode": "none"}, "ref_mode (none) must not go with loss_type ipo"),
    ({"stage": "DPO", "reference_free": True}, "reference_free (true) must go with losses without a reference"),
    ({"stage": "KTO", "loss_type": ("kto", "bco")}, "loss_type (kto,bco) must be"),
    ({"stage": "KTO", "loss_type": ("sigmoid",)}, "loss_type (sigmoid) must be one of kto, bco, apo_zero_unpaired at stage KTO"),
    ({"stage": "KTO", "ref_mode": "none", "per_device_train_batch_size": 2}, "ref_mode (none) must be another at stage KTO"),
    ({"stage": "UPO", "loss_type": ("sigmoid",)}, "must be one of upo_hetero, mpo, upo_online, upo_offline, upo_group, dpo_aux at stage UPO"),
    ({"stage": "UPO", "loss_type": ("upo_online", "mpo")}, "loss_type (upo_online,mpo) must be one of upo_hetero"),
    ({"stage": "UPO", "loss_type": ("upo_online",), "term_weights": ("rank=1",)}, "term one of pg, pair, kl"),
    ({"stage": "UPO", "loss_type": ("upo_group",), "pair_weight": "much"}, "pair_weight (much) must be a number, or auto"),
    ({"stage": "UPO", "term_weights": ("pair=x",)}, "term_weights ('pair=x') must look like term=weight"),
    ({"stage": "UPO", "term_weights": ("pg=1",)}, "term_weights ('pg=1') must look like term=weight"),
    ({"stage": "DPO", "ref_mode": "model"}, "ref_mode (model) must go with a model that is trained itself"),
    ({"stage": "KTO", "ref_mode": "precomputed"}, "ref_mode (precomputed) must not go with kto"),
    ({"stage": "UPO", "edge_loss": "cpo"}, "edge_loss (cpo) must be one of sigmoid"),
    ({"stage": "RM", "loss_type": ("sigmoid",)}, "loss_type (sigmoid) must be auto at stage RM"),
    ({"stage": "RLVR", "loss_type": ("sigmoid",)}, "loss_type (sigmoid) must be one of grpo, dapo"),
    ({"stage": "PPO", "loss_type": ("ppo", "grpo")}, "loss_type (ppo,grpo) must be one of grpo, dapo"),
    ({"stage": "KTO"}, "per_device_train_batch_size (1) must be at least 2 at stage KTO"),
    ({"stage": "DPO", "fine_tuning": "Prompt"}, "prefix_sharing (true) must be false with fine_tuning Prompt"),
    ({"fine_tuning": "Freeze"}, "fine_tuning (Freeze) must come with trainable_layers"),
    ({"sharding": "stage2 offload"}, "sharding (stage2 offload) must be without offload in this version; set stage2"),
    ({"fp16": True}, "fp16 (true) has no effect in this version, must be left at false; set bf16: true"),
    ({"max_steps": 5, "warmup_steps": 6}, "warmup_steps (6) must not exceed max_steps (5)"),
    ({"lr_scheduler_type": "constant", "min_lr": 1e-5}, "min_lr (1e-05) must be 0 with lr_scheduler_type constant"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_what_training_would_refuse_is_said_before(values: dict[str, Any], message: str) -> None:
    assert message in "\n".join(p.message for p in problems(build(values)))


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("dataloader_num_workers: 4", "dataloader_num_workers", "(4) has no effect: the training process prepares its rows"),
        ("recompute_granularity: core_attn", "recompute_granularity", "(core_attn) has no effect: recompute recomputes whole"),
        ("eval_steps: 50", "eval_steps", "has no effect with eval_strategy no; set eval_strategy: steps"),
        ("lr_scheduler_type: constant\nwarmup_ratio: 0.1", "warmup_ratio", "with lr_scheduler_type constant; set constant_w"),
        ("stage: DPO\nloss_norm: seq", "loss_norm", "loss_norm has no effect with stage DPO"),
        ("fine_tuning: Prompt\nadapter_width: 8", "adapter_width", "adapter_width has no effect with fine_tuning Prompt"),
    ],
)  # fmt: skip
def test_what_has_no_effect_is_a_note(text: str, name: str, words: str) -> None:
    loaded = load_text(text, "run.yaml")
    assert [note for note in loaded.notes if words in note]
    assert [n for n, _ in remarks(loaded.config, [name])] == [name]


def test_what_is_not_built_is_a_note_for_who_only_counts() -> None:
    notes = load_text("fp16: true", "run.yaml").notes
    assert notes[0].startswith("run.yaml:1: fp16 (true) has no effect in this version")
    with pytest.raises(ValueError, match=r"run.yaml:1: fp16 \(true\) has no effect in this version"):
        load_text("fp16: true\nmodel: tiny-a\ndataset: a", "run.yaml", for_training=True)


def test_warm_up_is_rounded_as_transformers_does() -> None:
    # transformers 5.24, TrainingArguments.get_warmup_steps: math.ceil(num_training_steps *
    # warmup_ratio)
    from ernie_tune.trainers.assemble import warmup_steps

    assert warmup_steps(OptimArguments(warmup_ratio=0.03), 101) == 4  # round() gives 3
    assert warmup_steps(OptimArguments(warmup_ratio=0.1), 4) == 1
    assert warmup_steps(OptimArguments(warmup_ratio=0.0), 100) == 0
    assert warmup_steps(OptimArguments(warmup_steps=7), 100) == 7
    assert all(
        warmup_steps(OptimArguments(warmup_ratio=r), n) == math.ceil(n * r)
        for n in range(1, 400)
        for r in (0.03, 0.05, 0.1)
    )

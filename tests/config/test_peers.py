"""The files and names of other tools: each name is read, noted or refused with the remedy; none is
guessed at.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ernie_tune.config import peers
from ernie_tune.config.aliases import EXPANDED, RENAMED
from ernie_tune.config.arguments import SETTINGS
from ernie_tune.config.convert import did_you_mean
from ernie_tune.config.loader import Loaded, load_config, load_text, split_overrides
from ernie_tune.config.training_arguments import TrainingArguments

FOLDER = Path(__file__).parent / "peers"
FILES = sorted(FOLDER.glob("*.yaml"))  # as published by their tools
# Every field of the settings classes of transformers 5.24, TRL 1.16, LLaMA-Factory 0.9.5, ms-swift
# 4.6, PaddleFormers 1.2, ERNIEKit 1.3, with its default.
NAMES: dict[str, dict[str, Any]] = json.loads((FOLDER / "names.json").read_text(encoding="utf-8"))
READ = {*SETTINGS, *RENAMED, *EXPANDED}
# Defaults of other tools that mean something which is not done here: to write them is to ask for
# it.
ASKING = {
    "freeze_trainable_layers", "freeze_trainable_modules", "neftune_noise_alpha", "split", "apply_hadamard", "from_scratch",
    "normalize_logps", "pipeline_model_parallel_size",
}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_of_other_tools_are_read(file: Path) -> None:
    loaded = load_config(file, for_training=True, environ={})
    told = "\n".join(loaded.notes)
    written = {entry.name for entry in loaded.sources.values()}
    for name, value in yaml.safe_load(file.read_text(encoding="utf-8")).items():
        named = re.search(rf"\b{name}\b", told)
        assert name in written or named or value is None or name in EXPANDED, f"{name} was dropped in silence"


def test_what_the_best_known_file_means() -> None:
    flat = load_config(FOLDER / "erniekit_vl_lora.yaml", environ={}).config.flat()
    want = {
        "stage": "SFT", "fine_tuning": "LoRA", "lora_rank": 32, "max_seq_len": 8192, "max_steps": 8000, "warmup_steps": 100,
        "learning_rate": 3e-4, "min_lr": 1e-6, "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2,
        "sequence_parallel": True, "sharding": "stage1", "freeze_config": ("freeze_vision",), "bf16": True, "recompute": True,
        "gradient_accumulation_steps": 4, "adam_beta2": 0.95, "vit_lr_ratio": 0.9, "moe_gate_lr_ratio": 0.01,
    }  # fmt: skip
    assert {name: flat[name] for name in want} == want
    swift = load_config(FOLDER / "ms_swift.yaml", environ={})
    assert (swift.config.data.val_size, swift.config.data.train_dataset_path) == (
        0.01,
        ("AI-ModelScope/alpaca-gpt4-data-zh#500",),
    )
    assert any("zero2 is sharding: stage2" in note for note in swift.notes)
    assert any("eval_steps has no effect with eval_strategy no" in note for note in swift.notes)


@pytest.mark.parametrize("tool", NAMES)
def test_every_name_of_the_tools_is_classified(tool: str) -> None:
    for name, default in NAMES[tool].items():
        assert name in READ or name in peers.REFUSED or peers.reason(name) is not None, name
        if default is None or default == [] or name in ASKING:
            continue
        # its own default is never an error
        load_text(f"{name}: {json.dumps(default)}", "run.yaml", environ={})


def test_a_name_is_in_one_table() -> None:
    tables = [set(SETTINGS), set(RENAMED), set(EXPANDED), set(peers.IGNORED), set(peers.REFUSED)]
    assert sum(map(len, tables)) == len(set().union(*tables))


def notes(text: str) -> tuple[str, ...]:
    return load_text(text, "run.yaml", environ={}).notes


def test_notes_are_one_line_a_reason() -> None:
    assert notes("fuse_linear: true\nseed: 1\nattn_impl: flash_attn") == (
        "run.yaml:1, 3: fuse_linear, attn_impl are not used here: the machine and the model decide which kernels run",
    )
    assert notes("neftune_noise_alpha: 0\nlora_bias: none") == (
        "run.yaml:1, 2: neftune_noise_alpha, lora_bias are not used here: asks for nothing at this value",
    )
    secret = notes("hub_token: hf_secret")
    assert "hub_token" in secret[0]
    assert "secret" not in secret[0]
    assert notes("gradient_checkpointing_kwargs: {use_reentrant: false}\nfsdp_config:\n  a: 1")[0].startswith(
        "run.yaml:1: "
    )


@pytest.mark.parametrize(
    ("line", "remedy"),
    [
        ("neftune_noise_alpha: 5", "noise on embeddings is not in this version"),
        ("lr_scheduler_kwargs: {min_lr: 1e-6}", "set min_lr"),
        ("use_galore: true", "set optim: adamw"),
        ("from_scratch: 1", "name a preset"),
        ("continue_training: false", "name a preset"),
        ("disable_shuffling: true", "rows are always shuffled"),
        ("random_shuffle: false", "rows are always shuffled"),
        ("train_on_prompt: true", "loss: true or false"),
        ("vit_lr: 1e-5", "set vit_lr_ratio"),
        ("freeze_trainable_layers: 2", "set trainable_layers"),
        ("sequence_parallel_size: 2", "use tensor_model_parallel_size with sequence_parallel"),
        ("pref_bco_weight: 0.2", "sigmoid,bco_pair"),
        ("media_dir: pics", "beside the data file"),
        ("model_revision: abc", "download that revision"),
    ],
)
def test_what_would_change_the_result_is_refused_with_the_remedy(line: str, remedy: str) -> None:
    with pytest.raises(ValueError, match=rf"^run.yaml:1: {line.partition(':')[0]} is not a setting here; .*{remedy}"):
        load_text(line, "run.yaml")


MEANT = [
    ("lerning_rate", "learning_rate"), ("learning_rte", "learning_rate"), ("lorarank", "lora_rank"), ("max_step", "max_steps"),
    ("warmup_ration", "warmup_ratio"), ("packng", "packing"), ("train_epochs", "num_train_epochs"), ("bf_16", "bf16"),
    ("tensor_paralel_degree", "tensor_parallel_degree"), ("loging_steps", "logging_steps"), ("max-seq-len", "max_seq_len"),
]  # fmt: skip
NOT_MEANT = [
    "max_samplez_per_x",
    "fuse_linear_x",
    "prefetch_factors",
    "same_data_x",
    "deep_speed_x",
    "webui",
    "draw_timestamps",
    "foo",
    "model_sort",
    "gpu_memory",
    "eval_what",
    "save_sharded",
    "num_workers",
    "use_reward",
    "loss",
    "top",
]


def test_did_you_mean_is_for_typing_errors_only() -> None:
    known = [*SETTINGS, *RENAMED, *EXPANDED]
    for word, meant in MEANT:
        assert did_you_mean(word, known) == f"; did you mean {meant!r}?", word
    for word in NOT_MEANT:
        assert did_you_mean(word, known) == "", word


def override(*words: str) -> Loaded:
    return load_text("", "run.yaml", split_overrides(words)[1], environ={})


def test_lists_on_the_command_line_are_written_as_in_yaml() -> None:
    flat = override(
        "lora_target_modules=[q_proj,v_proj]",
        "train_dataset_path=[a.jsonl, 'b, c.jsonl']",
        "freeze_config=[freeze_vision]",
    ).config.flat()
    assert flat["lora_target_modules"] == ("q_proj", "v_proj")
    assert flat["train_dataset_path"] == ("a.jsonl", "b, c.jsonl")
    assert flat["freeze_config"] == ("freeze_vision",)
    assert override("stage=DPO", "--loss_type", "[sigmoid, sft]", "loss_weights=[1, 0.5]").config.flat()[
        "loss_weights"
    ] == (1.0, 0.5)
    assert override("report_to=[]").config.flat()["report_to"] == ()
    assert override("train_dataset_path=[ab]*.jsonl").config.flat()["train_dataset_path"] == ("[ab]*.jsonl",)
    assert load_text('lora_target_modules: "[q_proj, v_proj]"', "f").config.flat()["lora_target_modules"] == (
        "q_proj",
        "v_proj",
    )
    with pytest.raises(ValueError, match="seed"):
        override("seed=[1]")


def test_rlhf_type_of_swift() -> None:
    flat = load_text("rlhf_type: orpo", "f").config.flat()
    assert (flat["stage"], flat["loss_type"]) == ("DPO", ("orpo",))
    assert load_text("sequence_parallel: true", "f").config.parallel.sequence_parallel is False


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"rollout_batch_size": 32}, {"generation_batch_size": 32}),
        ({"adv_estimator": "rloo"}, {"advantage_estimator": "rloo"}),
        ({"clip_ratio_c": 3.0}, {"dual_clip": 3.0}),
        ({"kl_loss_coef": 0.01}, {"beta": 0.01}),
        ({"vllm_importance_sampling_mode": "token_mask"}, {"rollout_is": "icepop"}),
        ({"rollout_importance_sampling_mode": "sequence_mask"}, {"rollout_is": "mask_sequence"}),
        ({"vllm_importance_sampling_cap": 2.5}, {"rollout_is_max": 2.5}),
        ({"bypass_mode": False}, {"old_logps": "recompute"}),
        ({"use_bias_correction_kl": True}, {"kl_type": "k3_is"}),
        ({"kl_loss_type": "low_var_kl"}, {"kl_type": "k3"}),
        ({"loss_mode": "geo_mean"}, {"loss_type": ("gmpo",)}),
        ({"loss_agg_mode": "seq-mean-token-sum-norm"}, {"loss_agg": "fixed"}),
        ({"norm_adv_by_std_in_grpo": False}, {"scale_rewards": "none"}),
        ({"scale_rewards": True}, {"scale_rewards": "group"}),
        ({"online_filtering": False}, {"dynamic_sample": False}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"num_generations_eval": 4, "use_kl_loss": True}, {"num_generations_eval": 4}),
        ({"async_steps": 0, "max_staleness": 0, "over_sample_rate": 0.0, "kl_in_reward": False}, {}),
        ({"top_entropy_quantile": 0.2, "reward_clip_range": "-1,2"}, {"reward_clip": (-1.0, 2.0)}),
        ({"over_sample": 1.5, "rollout_stop": ["</answer>"]}, {"over_sample": 1.5, "stop_strings": ("</answer>",)}),
    ],
)
def test_sampling_by_the_names_of_other_tools(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    flat = TrainingArguments(stage="RLVR", **given).flat()
    assert {name: flat[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({"kl_in_reward": True}, "set kl_coef"),
        ({"use_kl_loss": False}, "set beta: 0"),
        ({"async_steps": 1}, "in step with them"),
        ({"top_entropy_quantile": 0}, "top_entropy_quantile"),
        ({"over_sample_rate": 0.5}, "set over_sample"),
        ({"entropy_coef_max": 0.5}, "between 0 and 1"),
        ({"ppo_mini_batch_size": 64}, "set num_mini_batches"),
        ({"clip_range_score": 5}, "set reward_clip: low,high"),
    ],
)
def test_sampling_that_is_not_offered_has_a_remedy(given: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy):
        TrainingArguments(stage="RLVR", **given)

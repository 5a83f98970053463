"""YAML and command line -> RunConfig: spellings of other tools, every refusal
with its place, replay, and broken texts.
"""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_tune.config.aliases import ENVIRONMENT, EXPANDED, RENAMED, VALUES
from ernie_tune.config.arguments import SETTINGS, LoraArguments, RunConfig
from ernie_tune.config.convert import convert
from ernie_tune.config.loader import Loaded, dump_config, load_config, load_text, split_overrides
from ernie_tune.config.peers import IGNORED, REFUSED
from ernie_tune.config.stages import STAGES
from ernie_tune.config.training_arguments import TrainingArguments

# a YAML of ERNIEKit, as published
PUBLISHED = """\
### data
train_dataset_type: auto            # auto | messages | sharegpt
train_dataset_path: ./data/train.jsonl,./data/general.jsonl
train_dataset_prob: "0.8,0.2"
eval_dataset_path: ./data/eval.jsonl
max_seq_len: 8192
packing: false
### model
model_name_or_path: baidu/ERNIE-4.5-VL-28B-A3B-Paddle
fine_tuning: LoRA
lora_rank: 32
freeze_config: freeze_vision
### finetuning
# base
stage: SFT
seed: 42
do_train: true
do_eval: true
output_dir: ./output
logging_dir: ./vdl_log
# train
num_train_epochs: 3
per_device_train_batch_size: 1
gradient_accumulation_steps: 4
learning_rate: 3.0e-4
lr_scheduler_type: cosine
warmup_ratio: 0.03
# performance
tensor_model_parallel_size: 2
pipeline_model_parallel_size: 2
sharding: stage1
recompute: true
bf16: true
"""


def load(text: str, *overrides: str, **more: Any) -> Loaded:
    return load_text(text, "run.yaml", split_overrides(overrides)[1], **more)


def refusal(text: str, *overrides: str, **more: Any) -> str:
    with pytest.raises(ValueError, match=": ") as caught:
        load(text, *overrides, **more)
    return str(caught.value)


def test_published_yaml() -> None:
    loaded = load(PUBLISHED, for_training=True)
    c = loaded.config
    assert (c.data.train_dataset_path, c.data.train_dataset_prob) == (
        ("./data/train.jsonl", "./data/general.jsonl"),
        (0.8, 0.2),
    )
    assert (c.data.mix_strategy, c.model.stage, c.model.fine_tuning, c.lora.lora_rank) == ("random", "SFT", "LoRA", 32)
    assert (c.freeze.freeze_config, c.optim.learning_rate, c.parallel.sharding, c.compute.bf16) == (
        ("freeze_vision",),
        3e-4,
        "stage1",
        True,
    )
    assert (c.parallel.tensor_model_parallel_size, c.save.output_dir, c.eval.do_eval) == (2, "./output", True)
    assert loaded.sources["learning_rate"].where == "run.yaml:25"
    assert loaded.notes == ("run.yaml:17: do_train is not used here: the verb decides",)


# one case for each row of the two tables: spelling, value -> our name, our value
ROWS: list[tuple[str, Any, str, Any]] = [
    ("tensor_parallel_degree", 2, "tensor_model_parallel_size", 2),
    ("pipeline_parallel_degree", 2, "pipeline_model_parallel_size", 2),
    ("sharding", "off", "sharding", "off"),
    ("sharding", "Stage2  offload", "sharding", "stage2 offload"),
    ("zero_stage", 3, "sharding", "stage3"),
    ("context_parallel_degree", 2, "context_parallel_size", 2),
    ("sep_parallel_degree", 2, "sep_parallel_size", 2),
    ("expert_parallel_degree", 2, "expert_model_parallel_size", 2),
    ("batch_size", 3, "per_device_train_batch_size", 3),
    ("lr", "3e-4", "learning_rate", 3e-4),
    ("max_epochs", 2, "num_train_epochs", 2.0),
    ("max_steps", "1e3", "max_steps", 1000),
    ("evaluation_strategy", "no", "eval_strategy", "no"),
    ("compute_type", "bf16", "bf16", True),
    ("compute_type", "wint4/8", "weight_quantize_algo", "weight_only_mix"),
    ("torch_dtype", "float16", "fp16", True),
    ("torch_dtype", "float64", "float64", True),
    ("gradient_checkpointing", "true", "recompute", True),
    ("quantization_bit", 8, "weight_quantize_algo", "weight_only_int8"),
    ("quant_bits", 4, "weight_quantize_algo", "nf4"),
    ("optim", "adamw_torch", "optim", "adamw"),
    ("report_to", "none", "report_to", ()),
    ("report_to", "visualdl, wandb", "report_to", ("visualdl", "wandb")),
    ("resume_from_checkpoint", "true", "resume_from_checkpoint", "auto"),
    ("no_resume", "true", "resume_from_checkpoint", "no"),
    ("model", "a b", "model_name_or_path", "a b"),
    ("stage", "VL-SFT", "stage", "SFT"),
    ("rlhf_type", "grpo", "stage", "RLVR"),
    ("stage", "kto", "stage", "KTO"),
    ("finetuning_type", "lora", "fine_tuning", "LoRA"),
    ("sft_type", "full", "fine_tuning", "Full"),
    ("lora", "true", "fine_tuning", "LoRA"),
    ("r", 16, "lora_rank", 16),
    ("lora_target", "all", "lora_target_modules", ("all",)),
    ("target_modules", "all-linear", "lora_target_modules", ("all",)),
    ("rslora_plus", "true", "lora_plus_scale", 4.0),
    ("adapters", "x", "lora_path", "x"),
    ("freeze_vit", "true", "freeze_config", ("freeze_vision",)),
    ("train_mm_proj_only", "true", "freeze_config", ("freeze_vision", "freeze_llm")),
    ("dataset", "[a.jsonl, 'b,c.jsonl#500']", "train_dataset_path", ("a.jsonl", "b,c.jsonl#500")),
    ("split_dataset_ratio", 0.01, "val_size", 0.01),
    ("cutoff_len", 4096, "max_seq_len", 4096),
    ("neat_packing", "true", "packing", True),
    ("interleave_probs", "0.5,0.5", "train_dataset_prob", (0.5, 0.5)),
    ("stopping_strategy", "first_exhausted", "mix_strategy", "interleave_under"),
    ("max_pixels", 1000, "image_max_pixels", 1000),
    ("moe_z_loss_lambda", 1e-4, "router_z_loss_coef", 1e-4),
]


@pytest.mark.parametrize(("name", "value", "ours", "want"), ROWS)
def test_spellings(name: str, value: Any, ours: str, want: Any) -> None:
    for loaded in (
        load(f"{name}: {value}"),
        load("", f"--{name}={value}") if "[" not in str(value) else load(f"{name}: {value}"),
    ):
        assert loaded.config.flat()[ours] == want
        assert loaded.sources[ours].name == name


def test_null_is_offered_only_where_it_is_the_default() -> None:
    """null means the default: a setting whose default is a value cannot be given null."""
    offered = {name for name, one in SETTINGS.items() if "null" in one.help or "null" in one.about.help_zh}
    assert {name for name in offered if SETTINGS[name].default is not None} == set()
    assert {"kl_coef", "epsilon", "max_samples"} <= offered
    assert load("stage: PPO\ncliprange_value: null").config.critic.cliprange_value == 0.2


def test_tables_lead_to_settings() -> None:
    spelled = [*RENAMED, *EXPANDED, *IGNORED, *REFUSED]
    assert len(spelled) == len(set(spelled))
    assert not set(spelled) & set(SETTINGS)
    assert {*RENAMED.values(), *ENVIRONMENT.values(), *VALUES} <= set(SETTINGS)
    for words in EXPANDED.values():
        for meaning in words.values():
            for name, text in meaning.items():
                convert(SETTINGS[name], text)
    for name, others in VALUES.items():
        assert all(
            convert(SETTINGS[name], other) == convert(SETTINGS[name], ours) for other, ours in others.items() if ours
        )
    sizes = [len(vars(section)) for section in vars(RunConfig()).values()]
    assert sum(sizes) == len(SETTINGS)  # no name twice
    assert max(sizes) <= 20
    assert load("").config == RunConfig()  # the defaults are valid, and those of the classes


def test_learning_rate_follows_stage_and_method() -> None:
    want = {("SFT", "LoRA"): 3e-4, ("SFT", "Full"): 1e-5, ("DPO", "LoRA"): 1e-5, ("DPO", "Full"): 1e-6}
    for (stage, method), rate in want.items():
        loaded = load(f"stage: {stage}\nfine_tuning: {method}")
        assert loaded.config.optim.learning_rate == rate
        assert loaded.sources["learning_rate"].where == f"default for {stage}, {method}"
    assert load("stage: DPO", "lr=0.5").config.optim.learning_rate == 0.5


# -1 is twice the rank, or 4 with rsLoRA; a written alpha is honoured
def test_lora_scale() -> None:
    assert (LoraArguments(lora_rank=8).effective_alpha, LoraArguments(lora_rank=8).scaling) == (16, 2.0)
    assert LoraArguments(lora_rank=16, lora_alpha=128).scaling == 8.0
    assert LoraArguments(lora_rank=16, rslora=True).scaling == pytest.approx(4 / math.sqrt(16))


def test_overrides_win_whatever_their_spelling() -> None:
    loaded = load(
        "learning_rate: 1e-4\npacking: false\nfreeze_config: freeze_vision freeze_aligner\neval_steps: 7",
        "--lr", "2e-4", "--packing", "--max-steps", "-1", "freeze_vit=false", "eval_steps=null", "--freeze_llm",
    )  # fmt: skip
    flat = loaded.config.flat()
    assert (flat["learning_rate"], flat["packing"], flat["max_steps"], flat["eval_steps"]) == (2e-4, True, -1, 0)
    assert flat["freeze_config"] == ("freeze_aligner", "freeze_llm")
    assert loaded.sources["learning_rate"].where == "command line"
    assert "eval_steps" not in loaded.sources


def test_split_overrides() -> None:
    words, entries = split_overrides(["a.yaml", "--packing", "b.yaml", "--bf16", "no", "./x=y", "seed=1"])
    assert words == ["a.yaml", "b.yaml", "./x=y"]
    assert [(e.name, e.raw) for e in entries] == [("packing", "true"), ("bf16", "no"), ("seed", "1")]


def test_environment_is_weakest_and_said() -> None:
    environ = {"MAX_PIXELS": "1000", "MIN_PIXELS": "10"}
    loaded = load("min_pixels: 20", environ=environ)
    assert (loaded.config.media.image_max_pixels, loaded.config.media.image_min_pixels) == (1000, 20)
    assert loaded.notes == ("environment MAX_PIXELS sets image_max_pixels: 1000",)
    assert refusal("", environ={"MAX_PIXELS": "big"}).startswith(
        "environment MAX_PIXELS: image_max_pixels ('big') must be a whole number"
    )


def test_settings_without_effect_are_said() -> None:
    loaded = load("beta: 0.2\nfine_tuning: Full\nlora_rank: 4\nnum_generations: 3\ndeepspeed: x.json\nfsdp: null")
    assert loaded.notes == (
        "run.yaml:5: deepspeed is not used here: sharding is done by Paddle Fleet; see sharding and sharding_parallel_size",
        "run.yaml:1: beta has no effect with stage SFT",
        "run.yaml:3: lora_rank has no effect with fine_tuning Full",
        "run.yaml:4: num_generations has no effect with stage SFT",
    )
    assert loaded.config == load("fine_tuning: Full").config
    both = "max_steps: 5\nnum_train_epochs: 2\neval_dataset_path: a\nval_size: 0.1"
    assert load(both).notes == (
        "run.yaml:2: num_train_epochs has no effect with max_steps 5; remove one",
        "run.yaml:4: val_size has no effect with eval_dataset_path, which names the held-out rows",
    )
    assert load("num_train_epochs: 2\nval_size: 0.1\nmax_steps: -1").notes == ()


TWO = "train_dataset_path: a,b\n"
REFUSALS = [
    # names
    ("seed: 1\nlerning_rate: 3", "run.yaml:2: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
    ("xyzzy: 3", "run.yaml:1: unknown key 'xyzzy'"),
    ("visual_cache: mp", "run.yaml:1: unknown key 'visual_cache'"),
    ("text_dataset_path: a.jsonl", "run.yaml:1: text_dataset_path is not a setting here; list the file in train_dataset_path"),
    ("seed: 1\n\nseed: 1", "run.yaml:3: seed is given twice, first at run.yaml:1; keep one"),
    ("lr: 1e-4\nlearning_rate: 2e-4", "run.yaml:2: learning_rate (0.0002) contradicts lr (0.0001) at run.yaml:1: both set learning_rate"),
    ("lr: 1e-4\nlearning_rate: null", "run.yaml:2: learning_rate (null) contradicts lr (0.0001)"),
    ("freeze_vit: true\nfreeze_vision_tower: no", "run.yaml:2: freeze_vision_tower contradicts freeze_vit at run.yaml:1"),
    # types, words, ranges
    ("lr: fast", "run.yaml:1: learning_rate ('fast') must be a number"),
    ("lr: .inf", "run.yaml:1: learning_rate ('.inf') must be a number"),
    ("lr: inf", "run.yaml:1: learning_rate ('inf') must be a number"),
    ("lora_rank: 8.5", "run.yaml:1: lora_rank ('8.5') must be a whole number"),
    ("lora_rank: 0", "run.yaml:1: lora_rank (0) must be at least 1"),
    ("lora_dropout: 2", "run.yaml:1: lora_dropout (2) must be at least 0 and at most 0.99"),
    ("packing: maybe", "run.yaml:1: packing ('maybe') must be true or false"),
    ("stage: SFF", f"run.yaml:1: stage ('SFF') must be one of {', '.join(STAGES)}; did you mean 'sft'?"),
    ("stage: ORPO", f"run.yaml:1: stage ('ORPO') must be one of {', '.join(STAGES)}; orpo is a loss: write stage: DPO and loss_type: orpo"),
    ("train_dataset_type: mesages", "run.yaml:1: train_dataset_type ('mesages') must be one of auto, canonical, erniekit"),
    ("lora: perhaps", "run.yaml:1: lora ('perhaps') must be one of true, false"),
    ("seed: [1, 2]", "run.yaml:1: seed (['1', '2']) must be one value, not a list"),
    ("optim:\n  lr: 1", "run.yaml:2: a value must be a number, a word or a list of them; settings are not nested"),
    ("dataset: [[a]]", "run.yaml:1: a value must be"),
    ("[1, 2]: 3", "run.yaml:1: a value must be"),
    # texts that are no YAML
    ("- a", "run.yaml:1: the file must be a list of 'key: value' lines"),
    ("seed: 1\n\tlr: 1", "run.yaml:2: not YAML: "),
    ("seed: 1\nlr: \x01", "run.yaml:2: character 1 is not allowed"),
    ('model: "\\ud800"', "run.yaml:1: half a surrogate pair"),
    ('model: "\\UFFFFFFFF"', "run.yaml:1: not YAML: "),
    ("[" * 5000, "run.yaml:1: not YAML: "),
    # settings that do not fit together
    (TWO + "train_dataset_prob: 1", "run.yaml:2: train_dataset_prob (1 values) must have one value a file of train_dataset_path (2)"),
    (TWO + "train_dataset_prob: 1,0", "run.yaml:2: train_dataset_prob (2 values) must all be above 0"),
    (TWO + "train_dataset_prob: 1,1\nmix_strategy: concat", "run.yaml:3: mix_strategy (concat) cannot follow train_dataset_prob"),
    (TWO + "train_dataset_type: auto,auto,auto", "run.yaml:2: train_dataset_type (3 values) must have one value or one a file (2)"),
    ("eval_dataset_path: a\neval_dataset_type: auto,auto", "run.yaml:2: eval_dataset_type (2 values)"),
    ("min_pixels: 9\nmax_pixels: 8", "run.yaml:1: image_min_pixels (9) must not exceed image_max_pixels (8)"),
    ("max_steps: 0", "run.yaml:1: max_steps (0) must be above 0, or -1"),
    ("epochs: 0", "run.yaml:1: num_train_epochs (0) must be above 0"),
    ("warmup_steps: 5\nwarmup_ratio: 0.1", "run.yaml:2: warmup_ratio (0.1) and warmup_steps (5) must not both"),
    ("min_lr: 1", "run.yaml:1: min_lr (1.0) must not exceed learning_rate (0.0003)"),
    ("bf16: true\nfp16: true", "run.yaml:2: fp16 (true) and bf16 (true)"),
    ("bf16: true\nfloat64: true", "run.yaml:2: float64 (true) must not go with bf16 or fp16"),
    ("stage: RM\nfloat64: true", "run.yaml:2: float64 (true) must be false at stage RM"),
    ("lora_alpha: 0", "run.yaml:1: lora_alpha (0) must be above 0"),
    ("quant_bits: 8\nlora: false", "run.yaml:1: weight_quantize_algo (weight_only_int8) must go with adapters (fine_tuning LoRA), not Full"),
    ("freeze_spec: a.json\nfrozen_layers: 1", "run.yaml:1: freeze_spec (a.json) must not go with"),
    ("eval_strategy: steps", "run.yaml:1: eval_strategy (steps) needs eval_steps (0) above 0"),
    ("save_steps: 0", "run.yaml:1: save_steps (0) must be above 0"),
    ("early_stop_interval: 2", "run.yaml:1: early_stopping_patience (2) counts evaluations"),
    ("load_best_model_at_end: true", "run.yaml:1: load_best_model_at_end (true) needs save_strategy (steps) and eval_strategy (no) alike"),
    ("load_best_model_at_end: 1\neval_strategy: steps\neval_steps: 3\nsave_steps: 10", "run.yaml:4: save_steps (10) must be a multiple of eval_steps (3)"),
    ("tensor_parallel_degree: 2\nexpert_parallel_degree: 2", "run.yaml:1: sequence_parallel (false) must be true with expert_model_parallel_size (2)"),
    ("virtual_pp_degree: 2", "run.yaml:1: virtual_pipeline_model_parallel_size (2) needs pipeline_model_parallel_size (1)"),
    ("sharding_parallel_degree: 2", "run.yaml:1: sharding_parallel_size (2) must be 1 while sharding is off"),
    ("stage: DPO\nmax_seq_len: 64\nmax_prompt_len: 64", "run.yaml:3: max_prompt_len (64) must be below max_seq_len (64)"),
    # comparisons
    ("stage: KTO\nsimpo_gamma: 1", "run.yaml:2: simpo_gamma (1.0) has no effect at stage KTO, only at DPO, UPO"),
    ("stage: RM\nref_mode: model", "run.yaml:2: ref_mode (model) has no effect at stage RM, only at DPO, KTO, UPO"),
    ("stage: KTO\nterm_weights: pair=1", "run.yaml:2: term_weights (('pair=1',)) has no effect at stage KTO, only at UPO"),
    ("stage: DPO\nlabel_smoothing: 0.1", "run.yaml:2: label_smoothing (0.1) must go with loss_type cdpo or robust or exo_pair, not auto"),
    ("stage: DPO\nloss_type: ipo\nsimpo_gamma: 1", "run.yaml:3: simpo_gamma (1.0) must go with loss_type simpo, not ipo"),
    ("stage: UPO\nloss_type: mpo\ndpop_lambda: 5", "run.yaml:3: dpop_lambda (5.0) must go with edge_loss dpop or dpop_outside, not sigmoid"),
    ("stage: UPO\nedge_loss: exo_pair", "run.yaml:2: edge_loss (exo_pair) needs label_smoothing above 0"),
    ("stage: DPO\nf_alpha_divergence_coef: 0.3", "run.yaml:2: f_alpha_divergence_coef (0.3) must go with f_divergence_type alpha_divergence, not reverse_kl"),
    ("stage: UPO\nf_divergence_type: js_divergence", "run.yaml:2: f_divergence_type (js_divergence) has no effect at stage UPO, only at DPO"),
    ("stage: KTO\nedge_loss: ipo", "run.yaml:2: edge_loss (ipo) has no effect at stage KTO, only at UPO"),
    ("stage: UPO\nrate_alpha: 0.5", "run.yaml:2: rate_alpha (0.5) must go with rate_loss margin or infonca, not soft_bt"),
    ("stage: UPO\nrate_loss: infonca\nrate_tau: 0.5", "run.yaml:3: rate_tau (0.5) must go with rate_loss soft_bt or bernoulli_kl, not infonca"),
    ("stage: UPO\nrate_loss: infonca\nrate_margin: log", "run.yaml:3: rate_margin (log) must go with rate_loss margin, not infonca"),
    ("stage: UPO\nrank_loss: edges\nrank_top_k: 1", "run.yaml:3: rank_top_k (1) must go with rank_loss plackett_luce, not edges"),
    ("stage: KTO\nimage_corruption: mask", "run.yaml:2: image_corruption (mask) has no effect at stage KTO, only at DPO, UPO, RM"),
    ("stage: DPO\nimage_corruption_ratio: 0.5", "run.yaml:2: image_corruption_ratio (0.5) must go with image_corruption mask or noise, not none"),
    ("stage: UPO\nimage_corruption: mask\nimage_corruption_noise: 0.5", "run.yaml:3: image_corruption_noise (0.5) must go with image_corruption noise, not mask"),
    ("stage: KTO\nbco_density: true", "run.yaml:2: bco_density (true) must go with loss_type bco, not auto"),
    ("stage: UPO\nbco_density: true", "run.yaml:2: bco_density (true) must go with bin_loss bco, not kto"),
    ("stage: RM\nbco_density: true", "run.yaml:2: bco_density (True) has no effect at stage RM, only at KTO, UPO"),
    # TRL's name
    ("stage: KTO\nmin_density_ratio: 1", "run.yaml:2: bco_density_min (1) must go with bco_density: true"),
    ("stage: KTO\nbco_density_max: 3", "run.yaml:2: bco_density_max (3) must go with bco_density: true"),
    ("stage: KTO\nloss_type: bco\nbco_density: true\nbco_density_min: 20", "run.yaml:4: bco_density_min (20) must not exceed bco_density_max (10)"),
    ("stage: RM\nrating_levels: 7", "run.yaml:2: rating_levels (7) must go with rating_loss ordinal, not pairs"),
    ("stage: UPO\nrating_levels: 7", "run.yaml:2: rating_levels (7) has no effect at stage UPO, only at RM"),
    ("stage: RM\nreward_shift_decay: 0.9", "run.yaml:2: reward_shift_decay (0.9) has no effect at stage RM, only at DPO, KTO, UPO"),
    ("stage: UPO\nsft_loss_norm: seq", "run.yaml:2: sft_loss_norm (seq) has no effect at stage UPO, only at DPO"),
    ("stage: DPO\nloss_type: sigmoid,sft\nloss_weights: 1", "run.yaml:3: loss_weights (1 values) must have one value a loss_type (2)"),
    ("stage: DPO\nloss_type: exo_pair", "run.yaml:2: loss_type (exo_pair) needs label_smoothing above 0"),
    ("stage: DPO\noffset_type: log", "run.yaml:2: offset_type (log) must go with offset_alpha above 0"),
    ("stage: DPO\nlora_dropout: 0.1", "run.yaml:2: lora_dropout (0.1) must be 0 at stage DPO"),
    ("stage: DPO\nref_logps_path: a.npz", "run.yaml:2: ref_logps_path (a.npz) must go with ref_mode precomputed, not auto"),
    ("stage: DPO\nreference_free: true\nref_mode: model", "run.yaml:2: reference_free (true) must go with ref_mode none, not model"),
    ("stage: DPO\nlora: false\nref_mode: adapter_off", "run.yaml:3: ref_mode (adapter_off) must go with adapters, not fine_tuning Full"),
    ("stage: DPO\nref_model_sync_steps: 2\nprecompute_ref_log_probs: true", "run.yaml:2: ref_model_update_steps (2) must go with a reference that has weights"),
    ("stage: DPO\nref_model_mixup_alpha: 0.5", "run.yaml:2: ref_model_mixup_alpha (0.5) must go with ref_model_update_steps above 0"),
    ("stage: RLVR\npacking: true", "run.yaml:2: packing (true) must be false at stage RLVR"),
    ("stage: RLVR\nreward_weights: 1,2\nreward_funcs: exact", "run.yaml:2: reward_weights (2 values) must have one value a reward (1)"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSALS)
def test_refusals(text: str, message: str) -> None:
    assert refusal(text).startswith(message)


def test_all_mistakes_at_once_and_from_the_command_line() -> None:
    assert [line.split(" (")[0].split(" '")[0] for line in refusal("lora_rank: 0\nsead: 1", "--lr=x").splitlines()] == [
        "run.yaml:2: unknown key", "run.yaml:1: lora_rank", "command line: learning_rate",
    ]  # fmt: skip


def test_what_a_run_must_name() -> None:
    lines = refusal("eval_strategy: epoch\ndo_eval: true", for_training=True).splitlines()
    assert [line.split(" / ")[0] for line in lines] == [
        "run.yaml:1: model_name_or_path is missing; name a folder, hub model or preset",
        "run.yaml:1: train_dataset_path is missing; name a data file",
        "run.yaml:1: eval_strategy (epoch) needs rows to evaluate; set eval_dataset_path or val_size",
        "run.yaml:2: do_eval (true) needs rows to evaluate; set eval_dataset_path or val_size",
    ]


def test_weights_of_rewards_that_nothing_names() -> None:
    """A file must name the rewards; in Python they are functions, which are counted when given."""
    told = refusal("stage: RLVR\nreward_weights: 1\nmodel: tiny-a\ndataset: x", for_training=True)
    assert told == "run.yaml:2: reward_weights (1 values) must have one value a reward (0); match them"
    assert load("stage: RLVR\nreward_weights: 1").config.rollout.reward_weights == (1.0,)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes("\ufeffseed: 7\r\nlr: 1e-3\r\n".encode())
    loaded = load_config(file, environ={})
    assert (loaded.config.train.seed, loaded.sources["learning_rate"].where) == (7, f"{file}:2")
    file.write_bytes(b"seed: 7\nmodel: \xff")
    with pytest.raises(ValueError, match=r"run\.yaml:2: the file must be UTF-8"):
        load_config(file)


@pytest.mark.parametrize("stage", ["SFT", "DPO", "RLVR"])
@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_dump_replays(stage: str, method: str) -> None:
    odd = 'model_name_or_path: "a: b # \\n\\u00e9 \\U0001F600"\noutput_dir: "off"\nlogging_dir: "null"\ndataset: ["", "x, y", "- z"]\n'
    more = "adam_epsilon: 1e-8\nreport_to: none\nguard_set: [a]\neval_strategy: epoch\ngreater_is_better: no\nseed: 4294967295\n"
    config = load(f"stage: {stage}\nfine_tuning: {method}\nlora_rank: 4\n{odd}{more}").config
    assert config.model.model_name_or_path == "a: b # \n\u00e9 \U0001f600"
    assert config.data.train_dataset_path == (
        "",
        "x, y",
        "- z",
    )
    text = dump_config(config)
    again = load_text(text, "again.yaml")
    assert again.config == config
    assert not again.notes, "a run's own file gives rise to no complaint"
    plain = yaml.safe_load(text)  # any other reader sees the same types
    assert plain["adam_epsilon"] == 1e-8
    assert plain["output_dir"] == "off"
    assert plain["greater_is_better"] is False
    assert ("lora_rank" in plain, "beta" in plain, "num_generations" in plain) == (
        method == "LoRA",
        stage != "SFT",
        stage == "RLVR",
    )


def test_training_arguments() -> None:
    args = TrainingArguments(
        per_device_train_batch_size=1, gradient_accumulation_steps=4, learning_rate=2e-4, num_train_epochs=3
    )
    assert isinstance(args, RunConfig)
    assert (args.optim.learning_rate, args.learning_rate, args.gradient_accumulation_steps) == (2e-4, 2e-4, 4)
    more = TrainingArguments(
        Path("out"), gradient_checkpointing=True, report_to=["wandb"], eval_steps=None, lr=1 / 3, sharding=False
    )
    assert (more.output_dir, more.recompute, more.report_to, more.lr_scheduler_type) == (
        "out",
        True,
        ("wandb",),
        "cosine",
    )
    assert more.optim.learning_rate == 1 / 3
    assert vars(copy.deepcopy(more)) == vars(more)
    with pytest.raises(ValueError, match="TrainingArguments: unknown key 'learning_rat'; did you mean 'learning_rate'"):
        TrainingArguments(learning_rat=1)
    with pytest.raises(ValueError, match=r"TrainingArguments: lora_rank \(0\) must be at least 1"):
        TrainingArguments(lora_rank=0)
    with pytest.raises(ValueError, match=r"seed \(dict\) must be a number, a word"):
        TrainingArguments(seed={})
    with pytest.raises(AttributeError, match="no setting 'learning_rte'; did you mean 'learning_rate'"):
        _ = args.learning_rte
    with pytest.warns(UserWarning, match="deepspeed is not used here"):
        TrainingArguments(deepspeed="x.json")


KEYS = st.sampled_from([*SETTINGS, *RENAMED, *EXPANDED, "nonsense", "", "? a", "[", "a: b"])
VALUE = st.one_of(
    st.sampled_from(
        ["1", "-1", "3e-4", "true", "off", "null", "", "[a, b]", "{a: 1}", "*x", "&x 1", '"\\ud800"', "stage1", "steps"]
    ),
    st.text(max_size=8),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(KEYS, VALUE), max_size=4), st.integers(0, len(PUBLISHED)), st.integers(0, 3), st.text(max_size=3)
)
def test_any_text_gives_a_config_or_a_place(lines: list[tuple[str, str]], at: int, cut: int, put: str) -> None:
    text = PUBLISHED[:at] + put + PUBLISHED[at + cut :]
    for case in (text, "\n".join(f"{key}: {value}" for key, value in lines)):
        try:
            config = load(case, for_training=case is text).config
        except ValueError as error:
            for line in str(error).splitlines():
                place, line_number, _ = line.split(":", 2)
                assert place == "run.yaml"
                # YAML ends lines at more characters than Python's text files do
                assert 1 <= int(line_number) <= len(re.split("\r\n|[\n\r\x85\u2028\u2029]", case)) + 1
        else:
            assert load_text(dump_config(config), "again").config == config


def test_a_file_full_of_unknown_keys_is_refused_without_comparing_each(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("ernie_tune.config.loader.did_you_mean", lambda name, known: asked.append(name) or "")
    with pytest.raises(ValueError, match="unknown key 'key_4999'"):
        load_text("".join(f"key_{i}: 1\n" for i in range(5000)), "run.yaml")
    assert len(asked) == 20


@pytest.mark.parametrize("stage", [*STAGES])
def test_what_a_run_wrote_down_is_read_without_a_word(stage: str) -> None:
    for method in ("LoRA", "Full"):
        config = load_text(f"stage: {stage}\nfine_tuning: {method}\nmax_seq_len: 512\n", "x").config
        assert load_text(dump_config(config), "x").notes == ()

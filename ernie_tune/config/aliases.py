"""The one table of other spellings: PaddleFormers, PaddleNLP, ERNIEKit, HF, TRL, LLaMA-Factory,
ms-swift, axolotl -> ours.

Refuses to know: files, types and defaults, names that mean nothing here (peers.py).
"""

from __future__ import annotations

# A name that means another name, with the same values.
RENAMED: dict[str, str] = {
    # parallelism
    "tensor_parallel_degree": "tensor_model_parallel_size",
    "pipeline_parallel_degree": "pipeline_model_parallel_size",
    "sharding_parallel_degree": "sharding_parallel_size",
    "context_parallel_degree": "context_parallel_size",
    "sep_parallel_degree": "sep_parallel_size",
    "expert_parallel_degree": "expert_model_parallel_size",
    "virtual_pp_degree": "virtual_pipeline_model_parallel_size",
    "sharding_degree": "sharding_parallel_size",
    "zero_stage": "sharding",
    # training
    "batch_size": "per_device_train_batch_size",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "activation_checkpointing": "recompute",
    "enable_activation_checkpointing": "recompute",
    "use_recompute": "recompute",
    "use_async_save": "async_save",
    "async_save_checkpoint": "async_save",
    "scheduler": "lr_scheduler_type",
    "epochs": "num_train_epochs",
    "max_epochs": "num_train_epochs",
    "evaluation_strategy": "eval_strategy",
    "early_stopping_steps": "early_stopping_patience",
    "early_stop_interval": "early_stopping_patience",
    "gradient_checkpointing": "recompute",
    "moe_aux_loss_lambda": "router_aux_loss_coef",
    "moe_aux_loss_coef": "router_aux_loss_coef",
    "aux_loss_coef": "router_aux_loss_coef",
    "moe_z_loss_lambda": "router_z_loss_coef",
    "guard_set": "guard_dataset_path",
    # model and method
    "model": "model_name_or_path",
    "base_model": "model_name_or_path",
    "model_id_or_path": "model_name_or_path",
    "finetuning_type": "fine_tuning",
    "tuner_type": "fine_tuning",
    "train_type": "fine_tuning",
    "sft_type": "fine_tuning",
    "r": "lora_rank",
    "lora_dim": "lora_rank",
    "lora_r": "lora_rank",
    "loraplus_lr_ratio": "lora_plus_scale",
    "lorap_lr_ratio": "lora_plus_scale",
    "target_regex": "lora_target_modules",
    "num_prefix_tokens": "num_virtual_tokens",
    "lora_target": "lora_target_modules",
    "target_modules": "lora_target_modules",
    "lora_module_name": "lora_target_modules",
    "adapter_name_or_path": "lora_path",
    "adapters": "lora_path",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "pissa_init": "pissa",
    # data
    "dataset": "train_dataset_path",
    "data_path": "train_dataset_path",
    "dataset_name": "train_dataset_path",
    "dataset_name_or_path": "train_dataset_path",
    "max_train_samples": "max_samples",
    "val_set_size": "val_size",
    "test_split_size": "val_size",
    "sequence_len": "max_seq_len",
    "max_seq_length": "max_seq_len",
    "block_size": "max_seq_len",
    "sample_packing": "packing",
    "truncation_mode": "truncation_strategy",
    "eval_dataset": "eval_dataset_path",
    "val_dataset": "eval_dataset_path",
    "split_dataset_ratio": "val_size",
    "interleave_probs": "train_dataset_prob",
    "interleave_prob": "train_dataset_prob",
    "cutoff_len": "max_seq_len",
    "max_length": "max_seq_len",
    "model_max_length": "max_seq_len",
    "neat_packing": "packing",
    "max_pixels": "image_max_pixels",
    "min_pixels": "image_min_pixels",
    "fps_max_frames": "video_max_frames",
    "video_maxlen": "video_max_frames",
    # preference and rollout
    "pref_beta": "beta",
    "pref_loss": "loss_type",
    "pref_ftx": "sft_loss_ratio",
    "rpo_alpha": "sft_loss_ratio",
    "cpo_alpha": "sft_loss_ratio",
    "sft_alpha": "sft_loss_ratio",
    "dpo_label_smoothing": "label_smoothing",
    "ref_model_update_step": "ref_model_update_steps",
    "ref_model_sync_steps": "ref_model_update_steps",
    "max_prompt_length": "max_prompt_len",
    "kto_chosen_weight": "desirable_weight",
    "kto_rejected_weight": "undesirable_weight",
    "min_density_ratio": "bco_density_min",
    "max_density_ratio": "bco_density_max",
    "max_new_tokens": "max_completion_length",
    "overlong_filter": "mask_truncated_completions",
    "soft_cache_length": "overlong_buffer",
    "tau_pos": "sapo_temperature_pos",
    "tau_neg": "sapo_temperature_neg",
    "off_policy_sequence_mask_delta": "off_policy_mask_threshold",
    "multi_objective_aggregation": "reward_aggregation",
    "reward_model_plugin": "reward_funcs",
    "rollout_n": "num_generations",
    "group_size": "num_generations",
    "num_generations_per_prompt": "num_generations",
    "n_samples_per_prompt": "num_generations",
    "max_response_length": "max_completion_length",
    "max_dec_len": "max_completion_length",
    "rollout_max_response_len": "max_completion_length",
    "rollout_max_prompt_len": "max_prompt_len",
    "update_iters": "num_iterations",
    "ppo_epochs": "num_iterations",
    "num_ppo_epochs": "num_iterations",
    "cliprange": "epsilon",
    "reward_model_path": "reward_model",
    "value_model_path": "value_model",
    "init_kl_coef": "kl_coef",
    "clip_ratio_low": "epsilon",
    "clip_ratio_high": "epsilon_high",
}

_DTYPES = {
    "auto": {},
    "none": {},
    "torch.bfloat16": {"bf16": "true"},
    "torch.float16": {"fp16": "true"},
    "torch.float32": {"bf16": "false", "fp16": "false"},
    "fp32": {"bf16": "false", "fp16": "false"},
    "bfloat16": {"bf16": "true"},
    "bf16": {"bf16": "true"},
    "float16": {"fp16": "true"},
    "fp16": {"fp16": "true"},
    "float32": {"bf16": "false", "fp16": "false"},
    "float64": {"float64": "true"},
}
_BITS = {"8": {"weight_quantize_algo": "weight_only_int8"}, "4": {"weight_quantize_algo": "nf4"}}
_METHODS_OF_SWIFT = {
    **{name: {"stage": name.upper()} for name in ("dpo", "kto", "rm", "ppo")},
    "grpo": {"stage": "RLVR"},
    **{name: {"stage": "DPO", "loss_type": name} for name in ("simpo", "orpo", "cpo")},
}
_LORA = {"true": {"fine_tuning": "LoRA"}, "false": {"fine_tuning": "Full"}}


def _freeze(*words: str) -> dict[str, dict[str, str]]:
    return {"true": {"freeze_config": " ".join(words)}, "false": {"freeze_config": " ".join("!" + w for w in words)}}


# A name whose words each mean settings of ours. In freeze_config, !word says that the part is not
# frozen.
EXPANDED: dict[str, dict[str, dict[str, str]]] = {
    "lora": _LORA,
    "only_optimize_lora": _LORA,
    "rslora_plus": {"true": {"rslora": "true", "lora_plus_scale": "4", "lora_alpha": "4"}, "false": {}},
    "freeze_vit": _freeze("freeze_vision"),
    "freeze_vision_tower": _freeze("freeze_vision"),
    "freeze_aligner": _freeze("freeze_aligner"),
    "freeze_multi_modal_projector": _freeze("freeze_aligner"),
    "freeze_llm": _freeze("freeze_llm"),
    "freeze_language_model": _freeze("freeze_llm"),
    "train_mm_proj_only": {"true": {"freeze_config": "freeze_vision freeze_llm !freeze_aligner"}, "false": {}},
    "precompute_ref_log_probs": {"true": {"ref_mode": "precomputed"}, "false": {}},
    "no_resume": {"true": {"resume_from_checkpoint": "no"}, "false": {}},
    "torch_dtype": _DTYPES,
    "dtype": _DTYPES,
    "compute_dtype": _DTYPES,
    "model_dtype": _DTYPES,
    "rlhf_type": _METHODS_OF_SWIFT,
    "use_peft": _LORA,
    "adapter": {"lora": {"fine_tuning": "LoRA"}, "qlora": {"fine_tuning": "LoRA", "weight_quantize_algo": "nf4"}},
    "load_in_8bit": {"true": _BITS["8"], "false": {}},
    "load_in_4bit": {"true": _BITS["4"], "false": {}},
    "pure_bf16": {"true": {"bf16": "true"}, "false": {}},
    "disable_gradient_checkpointing": {"true": {"recompute": "false"}, "false": {}},
    "lora_target_linear": {"true": {"lora_target_modules": "all"}, "false": {}},
    "prefix_tuning": {"true": {"fine_tuning": "Prefix"}, "false": {}},
    "use_swanlab": {"true": {"report_to": "swanlab"}, "false": {}},
    "use_hf": {"true": {"download_hub": "huggingface"}, "false": {}},
    "from_hf_hub": {"true": {"download_hub": "huggingface"}, "false": {}},
    "from_modelscope": {"true": {"download_hub": "modelscope"}, "false": {}},
    "from_aistudio": {"true": {"download_hub": "aistudio"}, "false": {}},
    "compute_type": {
        **_DTYPES,
        "fp8": {"weight_quantize_algo": "fp8_linear"},
        "wint8": {"weight_quantize_algo": "weight_only_int8"},
        "wint4/8": {"weight_quantize_algo": "weight_only_mix"},
    },
    "quantization_bit": _BITS,
    "quant_bits": _BITS,
    "stopping_strategy": {
        "first_exhausted": {"mix_strategy": "interleave_under"},
        "all_exhausted": {"mix_strategy": "interleave_over"},
    },
}

# Other words for a value, in lower case. Empty: the word stands for nothing.
VALUES: dict[str, dict[str, str]] = {
    "stage": {"vl-sft": "SFT", "vl-dpo": "DPO", "vl-pt": "PT", "grpo": "RLVR", "reward": "RM"},
    "optim": dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw_custom", "paged_adamw_32bit"),
        "adamw",
    ),
    "lr_scheduler_type": {"cosine_with_min_lr": "cosine", "cosine_warmup_with_min_lr": "cosine"},
    "truncation_strategy": {"keep_start": "right", "keep_end": "left"},
    "download_hub": {"": "none", "hf": "huggingface", "ms": "modelscope", "false": "none"},
    "template_backend": {"swift": "custom"},
    **{
        f"{axis}_size": {"-1": "1"}  # PaddleFormers: not used
        for axis in (
            *("tensor_model_parallel", "pipeline_model_parallel", "sharding_parallel", "context_parallel"),
            *("sep_parallel", "expert_model_parallel", "expert_tensor_model_parallel"),
        )
    },
    "eval_strategy": {"false": "no", "none": "no"},
    "save_strategy": {"false": "no", "none": "no"},
    "sharding": {"false": "off", "none": "off", "0": "off", "1": "stage1", "2": "stage2", "3": "stage3"},
    "resume_from_checkpoint": {"true": "auto", "latest": "auto", "last": "auto", "false": "no", "none": "no"},
    "report_to": {"none": "", "tensorboardx": "tensorboard"},
    "weight_quantize_algo": {"false": "none"},
    "lora_experts": {"visual": "vision", "false": "none"},
    "lora_target_modules": {"all-linear": "all"},
    "loss_norm": {"sequence": "seq"},
}

# Variables that image settings are read from when nothing else sets them.
ENVIRONMENT: dict[str, str] = {
    "MAX_PIXELS": "image_max_pixels",
    "MIN_PIXELS": "image_min_pixels",
    "FPS_MAX_FRAMES": "video_max_frames",
}

SPELLINGS = (*RENAMED, *EXPANDED)

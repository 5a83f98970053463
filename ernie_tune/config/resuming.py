"""What may differ between two starts of one run: for each setting, what becomes of a run that is
started again with another value.

A setting that is named nowhere here and is not known to shape nothing (`shapes_weights`, beside its
field) makes another run with another value. So a new setting is safe until somebody says more.
Refuses to know: what a value does, files, how values are compared.
"""

from __future__ import annotations

from ernie_tune.config.arguments import shapes_weights

# Whether a difference is refused, changes the course of what is still to come, or changes neither
# loss nor weights.
FIXED, COURSE, FREE = "fixed", "course", "free"

# How this start is made; says nothing about the run.
START = frozenset(
    {
        "output_dir", "resume_from_checkpoint", "resume_only_model", "ignore_data_skip", "overwrite_output_dir",
        "logging_dir", "disable_tqdm", "dataset_dir",
    }
)  # fmt: skip

# Settings that name files: what the files hold is compared, not where they are.
CONTENT = frozenset(
    {"model_name_or_path", "lora_path", "train_dataset_path", "eval_dataset_path", "guard_dataset_path", "freeze_spec"}
)

# A run may go on under other values of these, from the next step on.
_COURSE = frozenset(
    {
        # how long and how fast
        "num_train_epochs", "max_steps", "optim", "learning_rate", "min_lr", "lr_scheduler_type", "warmup_steps",
        "warmup_ratio", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
        "moe_gate_lr_ratio", "vit_lr_ratio",
        # in which number format
        "bf16", "fp16", "float64", "fp16_opt_level",
        # what is measured, and so where the run ends and which checkpoint it ends with
        "eval_dataset_path", "guard_dataset_path", "load_best_model_at_end", "metric_for_best_model",
        "greater_is_better", "early_stopping_patience", "guard_tolerance", "guard_stop",
        "guard_action",
        # what a reward function that failed needs to be gone on with
        "reward_error", "reward_timeout_seconds",
    }
)  # fmt: skip

# Their product is compared instead: rows a step.
_ROWS = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"})


def on_resuming(name: str) -> str:
    """FIXED, COURSE or FREE of a setting."""
    if name in _COURSE:
        return COURSE
    return FREE if name in _ROWS or not shapes_weights(name) else FIXED

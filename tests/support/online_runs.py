"""Shared by the tests of learning from sampled answers: a small run of a few steps, and a reward
that fresh weights earn in all shades.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.config.training_arguments import TrainingArguments


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The share of even ids."""
    return [float(np.mean([i % 2 == 0 for i in ids])) for ids in completion_ids]


def sampled_run(data: str | Path, out: Path, **changes: Any) -> TrainingArguments:
    """Rounds of two prompts with three answers of three tokens; `changes` go over it. `data`: files
    of prompts, comma separated.
    """
    values: dict[str, Any] = {
        "stage": "RLVR",
        "fine_tuning": "Full",
        "train_dataset_path": str(data),
        "output_dir": str(out),
        "num_generations": 3,
        "per_device_train_batch_size": 6,
        "max_completion_length": 3,
        "max_prompt_len": 64,
        "max_seq_len": 128,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "plot_loss": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(**{**values, **changes})

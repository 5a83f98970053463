"""What the tests of planning share: jobs from settings, in a line."""

from __future__ import annotations

from typing import Any

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.loader import Entry, load_text
from ernie_tune.models.presets import preset
from ernie_tune.plan.job import Job, job_of

B28, B424, B300, B21 = (
    "ernie-4.5-vl-28b-a3b",
    "ernie-4.5-vl-424b-a47b",
    "ernie-4.5-300b-a47b",
    "ernie-4.5-21b-a3b",
)
EVERYWHERE = {"lora_rank": 32, "lora_target_modules": "all", "lora_experts": "both"}
ATTENTION = {"lora_rank": 32, "lora_target_modules": "attention"}
FULL = {"fine_tuning": "Full", "freeze_config": "freeze_vision"}


def settings(model: str, **given: Any) -> RunConfig:
    entries = [Entry(name, str(value), "test") for name, value in {"model_name_or_path": model, **given}.items()]
    return load_text("", "test", entries).config


def job(model: str, visual_tokens: int | None = 0, on_cpu: bool = False, **given: Any) -> Job:
    """Rows of 8,192 tokens, four micro-batches, full recompute, no pictures, unless said
    otherwise.
    """
    c = settings(model, **{"max_seq_len": 8192, "gradient_accumulation_steps": 4, "recompute": "true", **given})
    return job_of(c, preset(model), visual_tokens=visual_tokens, on_cpu=on_cpu)

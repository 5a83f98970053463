"""adapter_format: a run writes PEFT's files when it is asked to, goes on from them, and reads
either kind unasked.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.tiny_runs import checkpoints, train

from ernie_tune.config.training_arguments import TrainingArguments

PEFT = ("adapter_config.json", "adapter_model.safetensors")
ADAPTED = {"fine_tuning": "LoRA", "lora_rank": 2, "max_steps": 2, "save_steps": 1, "adapter_format": "peft"}


def test_a_run_in_pefts_form_goes_on_from_it(tmp_path: Path) -> None:
    out = train(tmp_path, **ADAPTED)
    for folder in (out, *(out / name for name in checkpoints(out))):
        assert all((folder / name).is_file() for name in PEFT), folder
        assert not (folder / "lora_config.json").exists()
    assert json.loads((out / PEFT[0]).read_text())["peft_type"] == "LORA"
    went_on = train(tmp_path, **{**ADAPTED, "max_steps": 3})
    whole = train(tmp_path, **{**ADAPTED, "max_steps": 3, "output_dir": tmp_path / "whole"})
    assert (went_on / PEFT[1]).read_bytes() == (whole / PEFT[1]).read_bytes()
    read = train(tmp_path, fine_tuning="LoRA", max_steps=1, output_dir=tmp_path / "read", lora_path=str(out))
    assert (read / "lora_config.json").is_file(), "auto is PaddleNLP's"


def test_what_paddlenlp_cannot_hold_is_refused_before_the_run() -> None:
    with pytest.raises(ValueError, match=r"adapter_format \(paddlenlp\) must be peft with dora"):
        TrainingArguments(fine_tuning="LoRA", dora=True, adapter_format="paddlenlp")

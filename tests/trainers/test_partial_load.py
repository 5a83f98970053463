"""A rank of a run holds no more than its part of the model, from the first moment on, and its values are those of the whole model cut."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from safetensors.numpy import load_file, save_file

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.source import OnDisk
from ernie_tune.models.presets import preset
from ernie_tune.peft.quantize import QuantizedWeight, quantize_base

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from launching import launch  # noqa: E402

WORKER = Path(__file__).parent / "part_worker.py"
TP2, PP2, EP2 = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
)
LORA = {"fine_tuning": "LoRA", "lora_rank": 4}
EXPERTS = {**LORA, "lora_target_modules": "all-linear", "lora_experts": "both"}
# Two processes; the two folders hold the same model of 127 MB in two layouts of files.
CASES: dict[str, dict[str, Any]] = {
    "TP2 full": {**TP2, "fine_tuning": "Full", "file": "hf"},
    "PP2 full": {**PP2, "fine_tuning": "Full", "file": "paddle"},
    "TP2+SP EP2 full": {**EP2, "fine_tuning": "Full", "file": "paddle"},
    "TP2+SP EP2 part": {**EP2, "fine_tuning": "Freeze", "trainable_layers": ["3-5"], "file": "hf"},
    "EP2 sharding 2": {
        "expert_model_parallel_size": 2,
        "sharding": "stage1",
        "sharding_parallel_size": 2,
        "file": "hf",
        **EXPERTS,
    },
    "PP2 LoRA on experts": {**PP2, **EXPERTS, "file": "hf"},
    "TP2 DoRA": {**TP2, **LORA, "dora": True, "lora_target_modules": "all-linear", "file": "hf"},
    "TP2+SP EP2 int4 and int8": {**EP2, **EXPERTS, "weight_quantize_algo": "weight_only_mix", "file": "hf"},
    "TP2+SP EP2 int4": {**EP2, **EXPERTS, "weight_quantize_algo": "weight_only_int4", "file": "paddle"},
    "TP2 int8 DoRA": {**TP2, **LORA, "dora": True, "weight_quantize_algo": "weight_only_int8", "file": "hf"},
    "PP2 int4 and int8": {**PP2, **LORA, "weight_quantize_algo": "weight_only_mix", "file": "paddle"},
    "TP2 adapters": {**TP2, "fine_tuning": "Adapter", "file": "hf"},
    "TP2 prompt": {**TP2, "fine_tuning": "PTuning", "file": "hf"},
    "PP2 prompt on int8": {**PP2, "fine_tuning": "Prompt", "weight_quantize_algo": "weight_only_int8", "file": "hf"},
    "TP2 prefix": {**TP2, "fine_tuning": "Prefix", "file": "hf"},
}
SLACK = 3 * 2**20  # names, headers, index tables, tests' own objects


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank says of each case."""
    here = tmp_path_factory.mktemp("parts")
    model = AutoModel.from_config("small", seed=5)
    for flavour in ("hf", "paddle"):
        model.save_pretrained(here / flavour, flavour=flavour, max_shard_size=40_000_000)
    cases = []
    for name, case in CASES.items():
        settings = {k: v for k, v in case.items() if k != "file"}
        cases.append({"name": name, "settings": {**settings, "model_name_or_path": str(here / case["file"])}})
    (here / "cases.json").write_text(json.dumps(cases))
    code, tails = launch(here, 2, WORKER, str(here), timeout_s=300)
    assert code == 0, tails
    ranks = [json.loads((here / f"rank_{r}.json").read_text()) for r in range(2)]
    return {name: [rank[i] for rank in ranks] for i, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_a_rank_loads_its_part_alone(name: str, loaded: dict[str, list[dict[str, Any]]]) -> None:
    for rank in loaded[name]:
        # Magnitudes are norms, whose squares are added up in another order.
        exact = {k: v for k, v in rank["differ"].items() if "magnitude" not in k}
        assert not exact, list(exact.items())[:5]
        assert max(rank["differ"].values(), default=0.0) < 1e-5
        if not name.startswith("TP2 "):  # where every rank has all experts, most of the model
            assert rank["share"] < 0.75 * rank["whole"]
        said = {k: f"{rank[k] / 1e6:.1f} MB" for k in ("paddle", "numpy", "share", "largest", "whole")}
        # The share and a tensor on its way; a quantised table that is tied is made whole once, in three steps, when stages are joined.
        steps = 3 if "PP2 prompt" in name else 1
        assert rank["paddle"] < rank["share"] + steps * rank["largest"] + SLACK, said
        # What is read is an array first, and rounded as another.
        assert rank["numpy"] < 2 * rank["largest"] + SLACK, said

"""A rank of a run holds no more than its part of the model, from the first moment on, and its
values are those of the whole model cut.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.base import core
from safetensors.numpy import load_file, save_file
from support.tiny_runs import settings

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.source import OnDisk, fill
from ernie_tune.data.processor import Processor
from ernie_tune.machine.place import Place
from ernie_tune.machine.placed import read_parts
from ernie_tune.models.layers import has_values
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.quantize import QuantizedWeight, quantize_base, takers, weight_bytes
from ernie_tune.trainers.assemble import apply_method
from ernie_tune.trainers.sft import SFTTrainer

sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
from launching import launch

WORKER = Path(__file__).parent / "part_worker.py"
TP2, PP2, EP2 = (
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2},
    {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
)
LORA = {"fine_tuning": "LoRA", "lora_rank": 4}
AFFINITY = {**LORA, "lora_target_modules": "all-linear", "lora_experts": "text", "lora_expert_affinity": 0.3}
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
    "sharding 3 full": {"sharding": "stage3", "sharding_parallel_size": 2, "fine_tuning": "Full", "file": "hf"},
    "sharding 3 EP2 LoRA": {
        "expert_model_parallel_size": 2,
        "sharding": "stage3",
        "sharding_parallel_size": 2,
        "file": "paddle",
        **EXPERTS,
    },
    "PP2 LoRA on experts": {**PP2, **EXPERTS, "file": "hf"},
    "PP2 LoRA on experts by affinity": {**PP2, **AFFINITY, "file": "hf"},
    "TP2+SP EP2 int4 and int8 by affinity": {
        **EP2,
        **AFFINITY,
        "weight_quantize_algo": "weight_only_mix",
        "file": "hf",
    },
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
        # The share and a tensor on its way; a quantised table that is tied is made whole once, in
        # three steps, when stages are joined.
        steps = 3 if "PP2 prompt" in name else 1
        assert rank["paddle"] < rank["share"] + steps * rank["largest"] + SLACK, said
        # What is read is an array first, and rounded as another.
        assert rank["numpy"] < 2 * rank["largest"] + SLACK, said


def source(tmp_path: Path, **changes: np.ndarray) -> OnDisk:
    """tiny-a on the disk, some tensors changed; what a rank reads of it."""
    AutoModel.from_config("tiny-a", seed=1).save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    values = load_file(file)
    save_file({**values, **{name.replace("__", "."): value for name, value in changes.items()}}, file)
    return AutoModel.unread(tmp_path / "m")[1]


def test_what_is_read_is_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a stack the experts that are kept, of a matrix its rows or columns; a NaN elsewhere is
    somebody else's to find, one here is named.
    """
    spoilt = np.zeros((96, 96), np.float32)
    spoilt[3, 80] = np.nan
    found = source(tmp_path, model__layers__0__self_attn__q_proj__weight=spoilt)
    whole = dict(AutoModel.from_config("tiny-a", seed=1).named_parameters())
    seen: list[str] = []
    real = found.reader.read
    monkeypatch.setattr(found.reader, "read", lambda name: seen.append(name) or real(name))
    stack = "layers.1.mlp.vision_experts.down_proj"
    assert np.array_equal(found.read(stack, "F32", (slice(2, 4),)), whole[stack][2:4].numpy())
    assert [name.split("experts.")[1].split(".")[0] for name in seen] == [
        "10",
        "11",
    ]  # numbered after the eight of text
    row = "layers.0.self_attn.o_proj.weight"
    assert np.array_equal(found.read(row, "F32", (slice(5, 9),)), whole[row][5:9].numpy())
    query = "layers.0.self_attn.q_proj.weight"  # [in, out] here, [out, in] in the file
    assert found.read(query, "F32", (slice(None), slice(48, 96))).shape == (96, 48)
    found.check()
    found.read(query, "F32", (slice(None), slice(0, 48)))
    with pytest.raises(
        ValueError, match=r"weights \(1 tensors: model.layers.0.self_attn.q_proj.weight\) must be finite"
    ):
        found.check()


def test_an_error_of_one_rank_is_raised_by_all() -> None:
    def failing() -> None:
        raise ValueError("the file is damaged")

    place = SimpleNamespace(gather=lambda mine: ["", mine or "the file of another"])
    with pytest.raises(ValueError, match="the file is damaged"):
        Place.together(place, failing)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the file of another"):
        Place.together(place, lambda: None)  # type: ignore[arg-type]
    Place.together(SimpleNamespace(gather=lambda mine: [mine, ""]), lambda: None)  # type: ignore[arg-type]


def test_copies_and_magnitudes_wait_for_the_values_they_start_from() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["norm", "lm_head"])
    wanted = PeftModel(AutoModel.from_config("tiny-c", seed=2), config)
    empty, drawn = AutoModel.undrawn("tiny-c", seed=2)
    model = PeftModel(empty, config)
    assert not any(has_values(p) for p in model.originals.values())
    read_parts(model, drawn, lambda parameter, shape: ())
    for (name, value), (other, known) in zip(model.named_parameters(), wanted.named_parameters(), strict=True):
        assert name == other
        assert (value == known).all(), name
    before = {name: value.clone() for name, value in model.named_parameters()}
    model.adapters["default"].copies["norm.weight"].set_value(before["norm.weight"] * 2)
    model.settle()  # only once: what was trained stays
    assert (dict(model.named_parameters())["norm.weight"] == before["norm.weight"] * 2).all()


def test_what_has_no_values_cannot_be_used() -> None:
    empty, drawn = AutoModel.undrawn("tiny-a", seed=2)
    quantize_base(empty, "weight_only_int8")
    with pytest.raises(ValueError, match="a quantised weight must have its values before it is used"):
        empty.layers[0].self_attn.q_proj(paddle.ones([2, 96]))
    with pytest.raises(ValueError, match="a quantised embedding must have its values before it is used"):
        empty.embed_tokens.weight.sum()
    fill(empty, drawn, takers=takers(empty))
    known = quantize_base(AutoModel.from_config("tiny-a", seed=2), "weight_only_int8")
    for (name, layer), (_, other) in zip(empty.named_sublayers(), known.named_sublayers(), strict=True):
        if isinstance(layer, QuantizedWeight):
            assert (layer.codes == other.codes).all(), name
    assert weight_bytes(empty) == weight_bytes(known)


@pytest.mark.parametrize(("method", "more"), [("LoRA", {}), ("PTuning", {}), ("LoRA", {"lora_expert_affinity": 0.2})])
def test_a_quantised_base_is_never_whole_on_one_process_either(
    method: str, more: dict[str, Any], tmp_path: Path
) -> None:
    AutoModel.from_config("small", seed=1).save_pretrained(tmp_path / "m")
    Processor.bundled("small").save_pretrained(tmp_path / "m")
    config = settings(
        tmp_path,
        model_name_or_path=str(tmp_path / "m"),
        fine_tuning=method,
        weight_quantize_algo="weight_only_mix",
        **more,
    )
    gc.collect()
    before = core.host_memory_stat_current_value("Allocated", 0)
    core.host_memory_stat_reset_peak_value("Allocated", 0)
    trainer = SFTTrainer(args=config)
    peak = core.host_memory_stat_peak_value("Allocated", 0) - before
    held = weight_bytes(trainer.model)
    working = 16e6 if more else 2e6  # what a forward of the calibration rows takes
    assert peak < held + 8.4e6 + working < 80e6  # of 127 MB
    known = apply_method(config, AutoModel.from_pretrained(tmp_path / "m"), trainer._calibration())
    assert all(
        (value == other).all() for value, other in zip(trainer.model.parameters(), known.parameters(), strict=True)
    )
    for mine, other in zip(trainer.model.sublayers(), known.sublayers(), strict=True):
        if isinstance(mine, QuantizedWeight):
            assert (mine.codes == other.codes).all()
            assert (mine.scale == other.scale).all()

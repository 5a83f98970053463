"""`--quantization weight_only_*`: a packed folder whose model is, bit for bit, the one that a run
makes of the plain folder while it loads it; so are the steps of a run on it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from export_cases import aligned_config
from support.tiny_runs import history, settings, train
from support.tiny_runs import processor as tiny_processor

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.export.options import ExportOptions
from ernie_tune.export.run import export
from ernie_tune.machine.placed import read_parts
from ernie_tune.models.inputs import pack
from ernie_tune.peft.formats import ALGORITHMS
from ernie_tune.peft.packed import load_packed
from ernie_tune.peft.quantize import QuantizedEmbedding, QuantizedWeight, quantize_base
from ernie_tune.plan.job import job_of, model_shape
from ernie_tune.plan.weights import base_bytes

LORA = {"fine_tuning": "LoRA", "lora_rank": 4, "lora_target_modules": "all", "lora_experts": "both"}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One model, wide enough for groups, stored in each of two types."""
    root = tmp_path_factory.mktemp("at_load")
    model = AutoModel.from_config(aligned_config(), seed=5)
    for dtype in ("bfloat16", "float32"):
        model.save_pretrained(root / dtype, dtype=dtype)
        tiny_processor().save_pretrained(root / dtype)
    return {dtype: root / dtype for dtype in ("bfloat16", "float32")}


def numbers(model) -> dict[str, np.ndarray]:  # type: ignore[no-untyped-def]
    """Every number that a model holds, codes and scales apart."""
    found = {name: value.numpy() for name, value in model.named_parameters()}
    for name, layer in model.named_sublayers():
        if isinstance(layer, QuantizedWeight):
            for e in range(layer.shape[0] if len(layer.shape) == 3 else 1):
                matrix = layer.matrix(e if len(layer.shape) == 3 else None)
                found[f"{name}.{e}.codes"], found[f"{name}.{e}.scale"] = np.array(matrix.codes), np.array(matrix.scale)
        elif isinstance(layer, QuantizedEmbedding):
            found[f"{name}.codes"], found[f"{name}.scale"] = layer.codes.numpy(), layer.scale.numpy()
    return found


@pytest.mark.parametrize(
    ("algorithm", "dtype"), [*((name, "bfloat16") for name in ALGORITHMS), ("weight_only_mix", "float32")]
)
def test_the_numbers_of_quantising_at_load(plain: dict[str, Path], tmp_path: Path, algorithm: str, dtype: str) -> None:
    export(plain[dtype], tmp_path / "packed", quantization=algorithm, emit="packed", verify="files")
    packed = load_packed(tmp_path / "packed")
    loaded, source = AutoModel.unread(plain[dtype])
    read_parts(quantize_base(loaded, algorithm), source)
    got, want = numbers(packed), numbers(loaded)
    assert got.keys() == want.keys()
    assert any(name.endswith("text_experts.down_product.quant.3.scale") for name in want)
    for name, value in want.items():
        assert got[name].dtype == value.dtype, name
        np.testing.assert_array_equal(got[name], value, err_msg=name)
    if ALGORITHMS[algorithm].experts == 4:
        assert {v.shape[0] for n, v in want.items() if "experts" in n and n.endswith("scale")} >= {2}, "groups of 64"
    given = pack(
        [tiny_processor().encode([{"role": "user", "content": "2 + 3?"}], add_generation_prompt=True).row],
        tiny_processor().tokens,
    )
    loaded.eval()
    np.testing.assert_array_equal(packed.logits(packed(given)).numpy(), loaded.logits(loaded(given)).numpy())
    # and it is planned as what it is
    jobs = [
        job_of(settings(tmp_path, model_name_or_path=str(folder), **LORA), model_shape(str(folder)), on_cpu=True)
        for folder in (plain[dtype], tmp_path / "packed")
    ]
    assert base_bytes(jobs[0].replace(quantize=algorithm)) == base_bytes(jobs[1])


def test_a_run_on_it_is_the_run_that_quantises_at_load(plain: dict[str, Path], tmp_path: Path) -> None:
    report = export(plain["bfloat16"], tmp_path / "packed", quantization="weight_only_mix", emit="packed")
    assert (report["method"], report["checks"]["layer_errors"]["ours"]) == (
        "rtn",
        report["checks"]["layer_errors"]["rtn"],
    )
    assert report["checks"]["reopened_max_difference"] < 1e-4
    runs = {}
    for name, given in {
        "run at load": {"model_name_or_path": str(plain["bfloat16"]), "weight_quantize_algo": "weight_only_mix"},
        "run on codes": {"model_name_or_path": str(tmp_path / "packed")},
    }.items():
        (tmp_path / name).mkdir()
        runs[name] = train(tmp_path / name, max_steps=3, **given, **LORA)
    first, second = ([(r["loss"], r["grad_norm"]) for r in history(runs[name]) if "loss" in r] for name in runs)
    assert len(first) == 3
    assert first == second


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"emit": "weights"}, r"emit \(weights\) must be packed with quantization weight_only_mix"),
        ({"emit": "cache"}, r"emit \(cache\) must be packed"),
        ({"method": "gptq"}, r"method \(gptq\) must be rtn"),
        ({"method": "clip"}, r"method \(clip\) must be rtn"),
        ({"target_tp": 2}, r"target_tp \(2\) must be 1"),
        ({"awq": 0.25}, r"awq \(0\.25\) must be 0\.0"),
    ],
)
def test_what_such_codes_cannot_follow(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExportOptions(quantization="weight_only_mix", **{"emit": "packed", **given})


def test_the_method_that_is_taken() -> None:
    assert ExportOptions().method == "clip"
    assert ExportOptions(quantization="weight_only_int4", emit="packed").method == "rtn"
    with pytest.raises(
        ValueError, match=r"quantization \('weight_only_int2'\) must be one of \['mix', .*weight_only_mix"
    ):
        ExportOptions(quantization="weight_only_int2")

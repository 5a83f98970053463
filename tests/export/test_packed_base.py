"""A packed folder as the base of an adapter: the run of the float model that has its rounded
weights, without that model ever being made; and what such a base cannot follow.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from export_cases import model_folder, rtn
from support.rounded import write_rounded
from support.tiny_runs import history, settings, train
from support.tiny_runs import processor as tiny_processor

from ernie_tune.config.loader import load_text
from ernie_tune.export.packed import write_packed
from ernie_tune.export.source import ExportSource
from ernie_tune.generate.opened import open_engine
from ernie_tune.models.inputs import pack
from ernie_tune.peft.packed import load_packed
from ernie_tune.peft.quantize import weight_bytes
from ernie_tune.plan.job import job_of, model_shape
from ernie_tune.plan.judgement import judged
from ernie_tune.plan.weights import base_bytes
from ernie_tune.trainers.assemble import base_of_run
from ernie_tune.trainers.sft import SFTTrainer

LORA = {"fine_tuning": "LoRA", "lora_rank": 4, "lora_target_modules": "all", "lora_experts": "both"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A packed folder, and the float model with the rounded weights."""
    root = tmp_path_factory.mktemp("base")
    plain = model_folder(root / "plain")
    source = ExportSource(plain)
    for scheme in ("wint4", "mix", "wint8"):
        write_packed(root / scheme, source, **rtn(source, scheme))
    write_rounded(plain, root / "wint4", root / "rounded")
    for name in ("wint4", "mix", "wint8"):
        for file in plain.iterdir():
            if file.suffix != ".safetensors" and file.name != "config.json":
                shutil.copy(file, root / name / file.name)
    return {path.name: path for path in root.iterdir()}


def test_a_run_on_codes_is_the_run_on_the_rounded_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    runs = {}
    for name in ("wint4", "rounded"):
        (tmp_path / name).mkdir()
        runs[name] = train(tmp_path / name, model_name_or_path=str(folders[name]), max_steps=5, **LORA)
    for key, rtol in (("loss", 1e-5), ("grad_norm", 1e-4)):
        got, want = ([r[key] for r in history(runs[name]) if key in r] for name in ("wint4", "rounded"))
        assert len(want) == 5
        assert np.allclose(got, want, rtol=rtol), key
    # each result opens on the folder that its run names
    row = tiny_processor().encode([{"role": "user", "content": "2 + 3?"}], add_generation_prompt=True).row
    logits = []
    for name in ("wint4", "rounded"):
        engine = open_engine(runs[name], base_of_run)
        batch = pack([row], engine.processor.tokens)
        logits.append(engine.model.logits(engine.model(batch)).numpy())
    assert np.abs(logits[0] - logits[1]).max() < 1e-4


@pytest.mark.parametrize("scheme", ["wint4", "mix", "wint8"])
def test_an_estimate_counts_the_codes(folders: dict[str, Path], scheme: str) -> None:
    folder = folders[scheme]
    config = load_text(f"model_name_or_path: {folder}\nfine_tuning: LoRA\n", "test").config
    assert model_shape(str(folder)) == load_packed(folder).config
    counted = base_bytes(job_of(config, model_shape(str(folder)), on_cpu=True))
    assert counted == pytest.approx(weight_bytes(load_packed(folder)), rel=0.01)
    plain = load_text(f"model_name_or_path: {folders['plain']}\nfine_tuning: LoRA\n", "test").config
    assert counted < 0.75 * base_bytes(job_of(plain, model_shape(str(folders["plain"])), on_cpu=True))


def test_an_estimate_counts_one_scale_a_column(tmp_path: Path) -> None:
    plain = model_folder(tmp_path / "plain", "nano")  # 192 rows are three groups of int4 made at load
    source = ExportSource(plain)
    write_packed(tmp_path / "packed", source, **rtn(source, "wint4"))
    config = load_text(f"model_name_or_path: {tmp_path / 'packed'}\nfine_tuning: LoRA\n", "test").config
    counted = base_bytes(job_of(config, model_shape(str(tmp_path / "packed")), on_cpu=True))
    assert counted == pytest.approx(weight_bytes(load_packed(tmp_path / "packed")), rel=0.002)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fine_tuning": "Full"}, r"fine_tuning \(Full\) must be LoRA or an added layer for .*wint4"),
        (
            {**LORA, "weight_quantize_algo": "weight_only_int8"},
            r"weight_quantize_algo \(weight_only_int8\) must be none for",
        ),
    ],
)
def test_what_codes_cannot_follow(folders: dict[str, Path], tmp_path: Path, given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTTrainer(args=settings(tmp_path, model_name_or_path=str(folders["wint4"]), **given)).train()
    lines = "\n".join(f"{k}: {json.dumps(v)}" for k, v in given.items())
    loaded = load_text(f"model_name_or_path: {folders['wint4']}\n{lines}\n", "run.yaml")
    with pytest.raises(ValueError, match=message):
        judged(loaded, "run.yaml:1", training=False)

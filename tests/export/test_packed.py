"""Packed folders: what is loaded computes with exactly codes times scales; damaged and foreign
folders are refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import paddle
import pytest
from export_cases import model_folder, rtn
from support.tiny_runs import mixed_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.tensors import TensorReader
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.data.processor import Processor
from ernie_tune.export.grid import Grid
from ernie_tune.export.packed import write_packed
from ernie_tune.export.scheme import bits_of, scheme
from ernie_tune.export.source import ExportSource
from ernie_tune.generate.batch import generate
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models.inputs import pack
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.peft.packed import load_packed
from ernie_tune.peft.packed_header import is_packed


def inputs(processor: Processor):  # type: ignore[no-untyped-def]
    rows = [processor.encode(row["messages"], row.get("images")).row for row in mixed_rows(4)]
    return pack(rows, processor.tokens)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("packed") / "plain")


def test_a_packed_folder_is_no_source(plain: Path, tmp_path: Path) -> None:
    source = ExportSource(plain)
    write_packed(tmp_path / "packed", source, **rtn(source, "wint4"))
    with pytest.raises(ValueError, match=r"packed\) must be unquantised, .*ernie-tune export MODEL RUN"):
        ExportSource(tmp_path / "packed")


def test_every_matrix_is_rounded_once(plain: Path, tmp_path: Path) -> None:
    source, asked = ExportSource(plain), []
    parts = rtn(source, "wint4")

    def grid(name: str, expert: int | None) -> Grid:
        asked.append((name, expert))
        return parts["grid"](name, expert)

    write_packed(tmp_path / "packed", source, **{**parts, "grid": grid}, max_shard_bytes=100_000)
    matrices = [name for name in TensorReader(tmp_path / "packed").entries if name.endswith(".codes")]
    assert len(asked) == len(set(asked)) == len(matrices)


@pytest.mark.parametrize(("quantization", "tp"), [("wint8", 1), ("wint4", 1), ("wint4", 2), ("mix", 4)])
def test_computes_with_the_grid(plain: Path, tmp_path: Path, quantization: str, tp: int) -> None:
    source, chosen = ExportSource(plain), scheme(quantization)
    parts = rtn(source, quantization, tp)
    write_packed(tmp_path / "packed", source, **parts, max_shard_bytes=100_000)
    assert is_packed(tmp_path / "packed")
    assert not is_packed(plain)
    packed = load_packed(tmp_path / "packed")
    model = AutoModel.from_pretrained(plain)
    state = model.state_dict()
    for name, spec in source.table.canonical.items():

        def value(e: int | None, name: str = name, bits: int = bits_of(name, chosen), spec=spec) -> np.ndarray:  # type: ignore[no-untyped-def]
            if bits:
                return parts["grid"](name, e).dense()
            return (
                source.read(name, e, "F32")
                if spec.float32
                else (source.read(name, e, "BF16").astype(np.uint32) << 16).view(np.float32)
            )

        stacked = len(spec.shape) == 3
        state[name].set_value(np.stack([value(e) for e in range(spec.shape[0])]) if stacked else value(None))
    model.eval()
    given = inputs(Processor.from_pretrained(plain))
    with paddle.no_grad():
        want, got = (m.logits(m(given)).numpy() for m in (model, packed))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_smaller_answers_and_takes_an_adapter(plain: Path, tmp_path: Path) -> None:
    source = ExportSource(plain)
    write_packed(tmp_path / "packed", source, **rtn(source, "wint4"))
    write_packed(tmp_path / "whole", source, **rtn(source, "none"))
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("packed", "whole")]
    assert sizes[0] < 0.7 * sizes[1]  # half of tiny-a are towers and embedding, which stay
    processor, model = Processor.from_pretrained(plain), load_packed(tmp_path / "packed")
    row = processor.encode([{"role": "user", "content": "one two"}], add_generation_prompt=True).row
    params = SamplingParams(max_new_tokens=4, stop_ids=())
    before = generate(model, [row], processor.tokens, params)[0][0].token_ids
    assert len(before) == 4
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "experts"]))
    assert generate(adapted, [row], processor.tokens, params)[0][0].token_ids == before


def test_refuses(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"must hold config\.json"):
        load_packed(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="must be 'ernie_tune_packed' of version 1"):
        load_packed(plain)
    source = ExportSource(plain)
    folder = tmp_path / "packed"
    write_packed(folder, source, **rtn(source, "wint4"))
    with pytest.raises(ValueError, match=r"quantization_config .* must be absent"):
        AutoModel.from_pretrained(folder)
    reader = TensorReader(folder)
    tensors = {name: np.array(reader.read(name)) for name in reader.entries}
    codes = {name: entry.dtype for name, entry in reader.entries.items()}

    def rewrite(**changes: object) -> Path:
        kept = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        entries = {name: (value.shape, codes.get(name, "F32")) for name, value in kept.items()}
        write_folder(folder, entries, kept.__getitem__)  # type: ignore[arg-type]
        return folder

    scale = "layers.1.mlp.vision_experts.7.down_proj.scale"
    with pytest.raises(ValueError, match=f"must hold '{scale}'"):
        load_packed(rewrite(**{scale: None}))
    with pytest.raises(ValueError, match="must hold nothing but the model"):
        load_packed(rewrite(extra=np.zeros(2, np.float32)))
    with pytest.raises(ValueError, match="must be the scale of"):
        load_packed(rewrite(**{scale: tensors[scale][:, :-2]}))
    with pytest.raises(ValueError, match="must be the codes of"):
        load_packed(rewrite(**{"layers.0.self_attn.o_proj.codes": tensors["layers.0.self_attn.o_proj.codes"][:-2]}))
    with pytest.raises(ValueError, match="must be the floats of"):
        load_packed(rewrite(**{"norm.weight": tensors["norm.weight"][:-2]}))
    broken = tensors[scale].copy()
    broken[0, 0] = 0x7FC0
    with pytest.raises(ValueError, match=rf"weights \({scale}\) must be finite"):
        load_packed(rewrite(**{scale: broken}))
    shutil.rmtree(folder)
    write_packed(folder, source, **rtn(source, "wint4"))
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        is_packed(folder)
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "ernie_tune_packed", "version": 2}})
    )
    with pytest.raises(ValueError, match="of version 1"):
        load_packed(folder)

"""Packed folders that somebody or something has changed: each is refused by a message that names
the file and what is wrong, by whoever looks at it, and never by an error of Python's own.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_cases import model_folder, rtn

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.tensors import TensorReader
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.config.host_memory import Free
from ernie_tune.export.packed import write_packed
from ernie_tune.export.source import ExportSource
from ernie_tune.peft import packed
from ernie_tune.peft.packed import load_packed
from ernie_tune.peft.packed_header import PackedMatrix, is_packed, matrix_name, packed_bits, parameter_of
from ernie_tune.plan.job import model_shape

MARK = {"quant_method": "ernie_tune_packed", "version": 1}
STACK = "layers.1.mlp.vision_experts"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("damaged")
    source = ExportSource(model_folder(root / "plain"))
    write_packed(root / "packed", source, **rtn(source, "wint4"))
    return root / "packed"


def told(check: Callable[[], object]) -> str:
    """What it is refused with; an error of any other type fails the test."""
    with pytest.raises(ValueError) as error:  # noqa: PT011
        check()
    return str(error.value)


@pytest.mark.parametrize(
    ("about", "ours"),
    [
        ("ernie_tune_packed", False),
        ("", False),
        (["ernie_tune_packed", 1], False),
        (7, False),
        (True, False),
        ({}, False),
        ({"quant_method": ["ernie_tune_packed"], "version": 1}, False),
        ({"quant_method": None}, False),
        ({"version": 1}, False),
        ({"quant_method": "ernie_tune_packed"}, True),
        ({"quant_method": "ernie_tune_packed", "version": "1"}, True),
        ({"quant_method": "ernie_tune_packed", "version": True}, True),
        ({"quant_method": "ernie_tune_packed", "version": 1.0}, True),
        ({"quant_method": "ernie_tune_packed", "version": None}, True),
        ({**MARK, "group_size": 64}, True),
        ({**MARK, "modules_to_not_convert": []}, True),
    ],
)
def test_a_mark_that_is_not_understood(whole: Path, tmp_path: Path, about: Any, ours: bool) -> None:
    shutil.copytree(whole, tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": about}))
    assert is_packed(file.parent) == ours
    message = told(lambda: load_packed(file.parent))
    assert str(file) in message
    assert "must be 'ernie_tune_packed' of version 1 and nothing else" in message
    assert ("export it again" if ours else "AutoModel.from_pretrained") in message
    # whoever plans a run, and whoever takes it for a model, says no less
    assert str(file) in told(lambda: model_shape(str(file.parent)))
    assert "quantization_config" in told(lambda: AutoModel.from_pretrained(file.parent))


def test_no_mark_is_no_packed_folder(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    settings = json.loads(file.read_text())
    for changed in ({**settings, "quantization_config": None}, settings | {"quantization_config": None}):
        file.write_text(json.dumps(changed))
        assert not is_packed(file.parent)
        assert "must be 'ernie_tune_packed'" in told(lambda: load_packed(file.parent))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object"),
        ('"packed"', "must hold a JSON object"),
        ("", "must be JSON"),
        ('{"quantization_config": ', "must be JSON"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_a_config_that_is_no_object(whole: Path, tmp_path: Path, text: str, message: str) -> None:
    shutil.copytree(whole, tmp_path / "packed")
    (tmp_path / "packed" / "config.json").write_text(text)
    for look in (is_packed, load_packed, lambda folder: model_shape(str(folder))):
        assert message in told(lambda look=look: look(tmp_path / "packed"))  # type: ignore[misc]


@pytest.mark.parametrize(
    "changes", [{"hidden_size": "wide"}, {"num_hidden_layers": None}, {"moe_k": [2]}, {"hidden_size": 0}]
)
def test_other_fields_of_the_config(whole: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(whole, tmp_path / "packed")
    file = tmp_path / "packed" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    for look in (load_packed, lambda folder: model_shape(str(folder))):
        message = told(lambda look=look: look(file.parent))  # type: ignore[misc]
        assert str(file) in message
        assert next(iter(changes)) in message


def rewritten(whole: Path, folder: Path, **changes: np.ndarray | None) -> Path:
    """The folder with other tensors; None: without that one."""
    shutil.copytree(whole, folder)
    reader = TensorReader(whole)
    kinds = {np.dtype("uint8"): "U8", np.dtype("int8"): "I8", np.dtype("uint16"): "BF16", np.dtype("float32"): "F32"}
    kinds |= {np.dtype("int32"): "I32", np.dtype("float16"): "F16"}
    tensors = {name: np.array(reader.read(name)) for name in reader.entries if name not in changes}
    tensors |= {name: value for name, value in changes.items() if value is not None}
    write_folder(folder, {n: (v.shape, kinds[v.dtype]) for n, v in tensors.items()}, tensors.__getitem__)
    return folder


def of(whole: Path, name: str) -> np.ndarray:
    return np.array(TensorReader(whole).read(name))


def test_experts_of_a_stack_have_scales_alike(whole: Path, tmp_path: Path) -> None:
    name = f"{STACK}.5.down_proj.scale"
    two = np.repeat(of(whole, name), 2, 0)
    message = told(lambda: load_packed(rewritten(whole, tmp_path / "groups", **{name: two})))
    assert str(tmp_path / "groups" / "model.safetensors") in message
    assert f"{name} (BF16 [2, 96]) must be as that of the first expert of its stack (BF16 [1, 96])" in message
    wide = (of(whole, name).astype(np.uint32) << 16).view(np.float32)
    assert f"{name} (F32 [1, 96]) must be" in told(
        lambda: load_packed(rewritten(whole, tmp_path / "f32", **{name: wide}))
    )
    every = {
        f"{STACK}.{e}.down_proj.scale": np.repeat(of(whole, f"{STACK}.{e}.down_proj.scale"), 2, 0) for e in range(8)
    }
    load_packed(rewritten(whole, tmp_path / "all", **every))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{STACK}.3.up_gate_proj.codes": None}, f"must hold '{STACK}.3.up_gate_proj.codes'"),
        ({f"{STACK}.0.up_gate_proj.codes": None}, f"must hold '{STACK}.up_gate_proj'"),
        ({"layers.0.self_attn.q_proj.scale": np.zeros((0, 96), np.float32)}, "q_proj.scale (F32 [0, 96]) must be the scale"),
        ({"layers.0.self_attn.q_proj.scale": np.zeros((5, 96), np.float32)}, "q_proj.scale (F32 [5, 96]) must be the scale"),
        ({"layers.0.self_attn.q_proj.scale": np.zeros((1, 96), np.int8)}, "q_proj.scale (I8 [1, 96]) must be the scale"),
        ({"layers.0.self_attn.q_proj.scale": np.zeros(96, np.float32)}, "q_proj.scale (F32 [96]) must be the scale"),
        ({"layers.0.self_attn.q_proj.codes": np.zeros((96, 96), np.int32)}, "must hold 'layers.0.self_attn.q_proj.weight'"),
        ({f"{STACK}.2.down_proj.codes": np.zeros((16, 96), np.int8)}, "2.down_proj.codes (I8 [16, 96]) must be the codes"),
        ({"norm.weight": None, "norm.codes": np.zeros((96, 96), np.int8), "norm.scale": np.ones((1, 96), np.float32)},
         "must hold 'norm.weight'"),
        ({"layers.1.mlp.gate.weight": np.zeros((96, 8), np.int8)}, "gate.weight (I8 [96, 8]) must be the floats"),
        ({"embed_tokens.weight": None, "embed_tokens.codes": np.zeros((320, 96), np.uint8),
          "embed_tokens.scale": np.ones((640, 1), np.float32)}, "must hold 'embed_tokens.weight'"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit(whole: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert message in told(lambda: load_packed(rewritten(whole, tmp_path / "packed", **changes)))


def test_names_go_both_ways(whole: Path) -> None:
    matrices = {n.removesuffix(".codes") for n in TensorReader(whole).entries if n.endswith(".codes")}
    assert all(matrix_name(parameter_of(m), _expert(m)) == m for m in matrices)
    found = packed_bits(whole).of
    assert found["layers.0.self_attn.q_proj.weight"] == PackedMatrix(8, 1, 2)
    assert found[f"{STACK}.down_proj"] == PackedMatrix(4, 1, 2)
    assert set(found) == {parameter_of(m) for m in matrices}


def _expert(matrix: str) -> int | None:
    part = matrix.split(".")[-2]
    return int(part) if part.isdecimal() and "experts" in matrix else None


def test_room_is_looked_at_before_anything_is_read(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (whole / "model.safetensors").stat().st_size
    source = packed._Packed(TensorReader(whole), model_shape(str(whole)), "float32")
    held, mapped = source.bytes()
    assert mapped == size
    floats = sum(v.size for v in load_packed(whole).parameters())
    assert 4 * floats < held < 2 * 4 * floats
    read: list[str] = []
    monkeypatch.setattr(TensorReader, "part", lambda self, name: read.append(name))

    def allowed(memory: float, addresses: float | None) -> None:
        monkeypatch.setattr(packed, "free_memory", lambda: Free(int(memory), "the container's limit"))  # type: ignore[arg-type]
        left = None if addresses is None else Free(int(addresses), "ulimit -v")  # type: ignore[arg-type]
        monkeypatch.setattr(packed, "free_addresses", lambda: left)

    allowed(held - 1, None)
    assert "by the container's limit) must hold" in told(lambda: load_packed(whole))
    allowed(held + mapped, held + mapped - 1)
    message = told(lambda: load_packed(whole))
    assert str(whole) in message
    assert "of address space" in message
    assert "are allowed, by ulimit -v; run `ulimit -v unlimited`" in message
    assert read == []
    # a group's limit need not hold the files: their pages make room
    monkeypatch.undo()
    allowed(held + 1, held + mapped + 1)
    load_packed(whole)

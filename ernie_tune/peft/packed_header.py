"""What a packed folder (peft/packed.py) says of itself before a weight is read: its mark in
`config.json`, the names of its tensors, the bits of its matrices. Refuses to know: paddle, numpy,
layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import say

METHOD = "ernie_tune_packed"
VERSION = 1
BITS = {"I8": 8, "U8": 4}  # by the element type of the codes


@dataclass(frozen=True)
class PackedBits:
    """How wide the codes of a packed folder are, by kind of matrix; 0: none of that kind is
    packed.
    """

    linear: int = 0
    tower: int = 0  # linear layers of the vision tower and of what follows it
    text_experts: int = 0
    vision_experts: int = 0


def is_packed(folder: Path) -> bool:
    """Whether `folder` says that it is packed. ValueError for a config.json that is no JSON."""
    file = folder / "config.json"
    return file.is_file() and (packed_settings(file).get("quantization_config") or {}).get("quant_method") == METHOD


def packed_settings(file: Path) -> dict[str, Any]:
    """A packed folder's config.json, or any other."""
    return read_json_object(file, say("fetch the folder again", "请重新获取该文件夹"))


def matrix_name(parameter: str, expert: int | None) -> str:
    """`<name>` of the module's docstring for a canonical parameter: one expert's number goes before
    the last part, `.weight` goes away.
    """
    if expert is None:
        return parameter.removesuffix(".weight")
    stack, _, leaf = parameter.rpartition(".")
    return f"{stack}.{expert}.{leaf}"


def packed_bits(folder: Path) -> PackedBits:
    """From the tensors' headers. Raises ValueError as `TensorReader`."""
    # Only such a folder needs it: it brings NumPy, which planning does without.
    from ernie_tune.checkpoint.tensors import TensorReader

    found = {"linear": 0, "tower": 0, "text_experts": 0, "vision_experts": 0}
    for name, entry in TensorReader(folder).entries.items():
        if name.endswith(".codes"):
            kind = kind_of(name)
            found[kind] = max(found[kind], BITS.get(entry.dtype, 0))
    return PackedBits(**found)


def kind_of(parameter: str) -> str:
    """The field of `PackedBits` that a matrix belongs to, by its canonical name."""
    if parameter.startswith(("vision_model.", "resampler_model.")):
        return "tower"
    return next((kind for kind in ("text_experts", "vision_experts") if kind in parameter), "linear")

"""What a packed folder (peft/packed.py) says of itself before a weight is read: its mark in
`config.json`, the names of its tensors, how its matrices lie there. Refuses to know: paddle, numpy,
layers.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.host_memory import Free
from ernie_tune.config.language import Text, say

GB = 1e9
METHOD = "ernie_tune_packed"
VERSION = 1
MARK = {"quant_method": METHOD, "version": VERSION}
BITS = {"I8": 8, "U8": 4}  # by the element type of the codes
TABLE = "embed_tokens.weight"  # its rows are looked up: one scale a row, codes as they are


@dataclass(frozen=True)
class PackedMatrix:
    """How one parameter lies in a packed folder, of a stack each of its matrices: bits of a code,
    groups of rows that have scales of their own, and bytes of a scale in the file.
    """

    bits: int
    groups: int
    scale_bytes: int

    @property
    def mapped_scales(self) -> bool:
        """float32 scales are used where they lie in the file, others are converted in memory."""
        return self.scale_bytes == 4


@dataclass(frozen=True)
class PackedBits:
    """The parameters of a packed folder that lie there as codes, by canonical name; bytes of the
    files that are mapped, which hold the others too.
    """

    matrices: tuple[tuple[str, PackedMatrix], ...]
    file_bytes: int = 0

    @cached_property
    def of(self) -> dict[str, PackedMatrix]:
        return dict(self.matrices)


def room_problem(held: float, mapped: float, free: Free | None, addresses: Free | None) -> Text | None:
    """Why a process cannot have `held` bytes of its own beside `mapped` bytes of a packed folder's
    files, with the remedy; None where it can. Mapped pages are no memory that must be free, but
    addresses that `ulimit -v` counts.
    """
    if free is not None and held > free.bytes:
        return say(
            f"memory ({free.bytes / GB:.1f} GB free, by {free.bound}) must hold {held / GB:.1f} GB beside the codes, "
            "which stay in their files; raise that limit, or end what else runs",
            f"内存（剩余 {free.bytes / GB:.1f} GB，受限于{free.bound}）除留在文件中的编码外还须容纳 {held / GB:.1f} GB；"
            "请提高该上限，或结束其他程序",
        )
    if addresses is not None and held + mapped > addresses.bytes:
        return say(
            f"a packed folder needs {(held + mapped) / GB:.1f} GB of address space ({mapped / GB:.1f} GB of it its mapped "
            f"files), {addresses.bytes / GB:.1f} GB are allowed, by {addresses.bound}; run `ulimit -v unlimited` in the "
            "shell first: mapped files take addresses, and memory only while it is free",
            f"打包文件夹需要 {(held + mapped) / GB:.1f} GB 地址空间（其中映射文件 {mapped / GB:.1f} GB），"
            f"{addresses.bound} 只允许 {addresses.bytes / GB:.1f} GB；请先在终端执行 `ulimit -v unlimited`：映射文件占用地址，"
            "只在内存有空闲时才占内存",
        )
    return None


def is_packed(folder: Path) -> bool:
    """Whether `folder` says that it is packed. ValueError for a config.json that is no JSON."""
    file = folder / "config.json"
    if not file.is_file():
        return False
    about = _settings(file).get("quantization_config")
    return isinstance(about, dict) and about.get("quant_method") == METHOD


def packed_settings(file: Path) -> dict[str, Any]:
    """A packed folder's config.json without its mark. Raises ValueError for a folder that is not
    packed, of another version, or with a mark that says more than is understood.
    """
    settings = _settings(file)
    about = settings.pop("quantization_config", None)
    # as text: 1, 1.0 and true are equal to Python
    if json.dumps(about, sort_keys=True) != json.dumps(MARK, sort_keys=True):
        ours = isinstance(about, dict) and about.get("quant_method") == METHOD
        cure = (
            say("export it again with this version of ernie_tune", "请用此版本的 ernie_tune 重新导出")
            if ours
            else say(
                "load other folders with AutoModel.from_pretrained", "其他文件夹请用 AutoModel.from_pretrained 加载"
            )
        )
        raise ValueError(
            say(
                "{file}: quantization_config ({about}) must be {method!r} of version {version} and nothing else; {cure}",
                "{file}：quantization_config（{about}）须为 {version} 版的 {method!r}，别无其他；{cure}",
                file=file,
                about=json.dumps(about)[:200],
                method=METHOD,
                version=VERSION,
                cure=cure,
            )
        )
    return settings


def _settings(file: Path) -> dict[str, Any]:
    return read_json_object(file, say("fetch the folder again", "请重新获取该文件夹"))


def matrix_name(parameter: str, expert: int | None) -> str:
    """`<name>` of the module's docstring for a canonical parameter: one expert's number goes before
    the last part, `.weight` goes away.
    """
    if expert is None:
        return parameter.removesuffix(".weight")
    stack, _, leaf = parameter.rpartition(".")
    return f"{stack}.{expert}.{leaf}"


def parameter_of(matrix: str) -> str:
    """The canonical parameter that `matrix_name` made `matrix` of."""
    *stack, number, leaf = ["", "", *matrix.split(".")]
    return ".".join([*stack[2:], leaf]) if stack[-1].endswith("_experts") and number.isdecimal() else f"{matrix}.weight"


def packed_bits(folder: Path) -> PackedBits:
    """From the tensors' headers. Raises ValueError as `TensorReader`."""
    # Only such a folder needs it: it brings NumPy, which planning does without.
    from ernie_tune.checkpoint.tensors import TensorReader

    entries, found = TensorReader(folder).entries, dict[str, PackedMatrix]()
    for name, entry in entries.items():
        scale = entries.get(f"{(stem := name.removesuffix('.codes'))}.scale")
        if stem != name and scale is not None and scale.shape:
            parameter = parameter_of(stem)
            groups = 1 if parameter == TABLE else scale.shape[0]
            width = scale.nbytes // max(1, math.prod(scale.shape))
            found[parameter] = PackedMatrix(BITS.get(entry.dtype, 0), groups, width)
    return PackedBits(tuple(found.items()), sum(f.stat().st_size for f in {e.file for e in entries.values()}))

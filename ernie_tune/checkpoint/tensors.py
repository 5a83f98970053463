"""Read safetensors files one tensor at a time, and convert element types, with numpy alone.

Arrays here carry bfloat16 as its raw bits in uint16, the way paddle does: numpy has no such type.
Headers are parsed by hand so that a cut-off download, a missing shard or a contradictory index is
an error that names the file and the remedy.
Refuses to know: parameter names, models, paddle.
"""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import say

Array = np.ndarray[Any, Any]
T = TypeVar("T")

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

# safetensors code -> element type of the array; BF16 as raw bits
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    code: np.dtype(kind)
    for code, kind in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "BF16": "<u2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U8": "u1",
        "BOOL": "?",
    }.items()
}
FLOAT_CODES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
}  # names as in config.json and paddle


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies. `offset` in bytes from the start of the file."""

    file: Path
    dtype: str  # safetensors code
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * NUMPY_TYPES[self.dtype].itemsize


class TensorReader:
    """The tensors of one .safetensors file, or of a folder with `model.safetensors` or shards and
    their index. Nothing is read ahead.

    Raises ValueError (FileNotFoundError for no weights at all): cut-off or foreign file, missing
    shard, index and shards that disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._maps: dict[Path, Array] = {}
        self.entries: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}
        files, promised = _find_files(path)
        for file in files:
            entries, metadata = read_header(file)
            twice = sorted(self.entries.keys() & entries.keys())
            if twice:
                raise ValueError(
                    say(
                        f"tensor {twice[0]!r} ({self.entries[twice[0]].file}) must be in one shard only, but is also in {file.name}; "
                        "delete the folder and fetch it again",
                        f"张量 {twice[0]!r}（{self.entries[twice[0]].file}）只能在一个分片中，但 {file.name} 中也有；请删除该文件夹并重新获取",
                    )
                )
            self.entries.update(entries)
            self.metadata.update(metadata)
        if promised is not None:
            _check_index(path / INDEX_NAME, promised, self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    def read(self, name: str) -> Array:
        """The tensor as a read-only view of the mapped file (BF16 as uint16 bits): pages are loaded
        when touched.
        """
        entry = self.entries[name]
        kind = NUMPY_TYPES[entry.dtype]
        if entry.nbytes == 0:
            return np.empty(entry.shape, kind)
        data = np.memmap(entry.file, np.uint8, "r", entry.offset, (entry.nbytes,))
        return np.asarray(data).view(kind).reshape(entry.shape)

    def part(self, name: str) -> Array:
        """`read`, from one map of the whole file: for many tensors that are kept. A map a tensor
        takes longer, and a process may have 65,530 of them.
        """
        entry = self.entries[name]
        if entry.nbytes and entry.file not in self._maps:
            self._maps[entry.file] = np.asarray(np.memmap(entry.file, np.uint8, "r"))
        whole = self._maps.get(entry.file, np.empty(0, np.uint8))
        data = whole[entry.offset : entry.offset + entry.nbytes]
        return data.view(NUMPY_TYPES[entry.dtype]).reshape(entry.shape)


def _find_files(path: Path) -> tuple[list[Path], Mapping[str, str] | None]:
    """The files to open, and the index's promise (tensor -> file name) if there is an index."""
    if path.is_file():
        return [path], None
    index, single = path / INDEX_NAME, path / SINGLE_NAME
    if index.is_file():
        if single.is_file():
            raise ValueError(
                say(
                    f"{path} must hold either {INDEX_NAME} or {SINGLE_NAME}, but holds both; delete the one "
                    "that is left over from an earlier save",
                    f"{path} 中须只有 {INDEX_NAME} 或 {SINGLE_NAME} 之一，但两者都在；请删除此前保存留下的那个",
                )
            )
        promised = _read_index(index)
        files = [path / name for name in dict.fromkeys(promised.values())]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise ValueError(
                say(
                    f"{path} lacks {len(missing)} of {len(files)} shards of {INDEX_NAME}: "
                    f"{', '.join(missing[:10])}; the download or copy was cut off: run it again",
                    f"{path} 缺少 {INDEX_NAME} 的 {len(files)} 个分片中的 {len(missing)} 个："
                    f"{', '.join(missing[:10])}；下载或复制中断，请重做",
                )
            )
        return files, promised
    if single.is_file():
        return [single], None
    shards = sorted(file.name for file in path.glob("model-*.safetensors"))
    if shards:
        raise ValueError(
            say(
                f"{path} holds {len(shards)} shards ({shards[0]}, ...) but no {INDEX_NAME}: the download "
                "or save was cut off; repeat it",
                f"{path} 中有 {len(shards)} 个分片（{shards[0]} 等）但没有 {INDEX_NAME}：下载或保存中断；请重做",
            )
        )
    other = sorted(file.name for file in path.glob("*.pdparams"))
    if other:
        raise FileNotFoundError(
            say(
                f"{path} holds {other[0]} but no .safetensors: pickled weights are not read; use the "
                "safetensors files of the release, or save with safetensors (safe_serialization) in the "
                "tool that wrote it",
                f"{path} 中有 {other[0]} 但没有 .safetensors：不读取 pickle 权重；请用发布的 safetensors "
                "文件，或在原工具中另存为 safetensors（safe_serialization）",
            )
        )
    raise FileNotFoundError(
        say(
            f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}; give the folder that has the weights",
            f"{path} 中没有 {SINGLE_NAME} 也没有 {INDEX_NAME}；请给出含有权重的文件夹",
        )
    )


def _read_index(index: Path) -> Mapping[str, str]:
    promised = read_json_object(index).get("weight_map")
    if not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
        raise ValueError(
            say(
                f"{index} must have a weight_map from tensors to file names; fetch the file again",
                f"{index} 须有从张量到文件名的 weight_map；请重新获取",
            )
        )
    outside = [name for name in promised.values() if Path(name).name != name or "\0" in name or len(name) > 255]
    if outside:
        raise ValueError(
            say(
                f"{index} names the shard {outside[0][:80]!r}, which must be a file in the same folder; fetch the file again",
                f"{index} 指向分片 {outside[0][:80]!r}，它须为同一文件夹中的文件；请重新获取该文件",
            )
        )
    return dict(promised)


def _check_index(index: Path, promised: Mapping[str, str], entries: Mapping[str, TensorEntry]) -> None:
    absent = [name for name, file in promised.items() if name not in entries or entries[name].file.name != file]
    extra = [name for name in entries if name not in promised]
    for names, what in (
        (absent, "lists tensors that the named shard does not hold"),
        (extra, "does not list tensors that the shards hold"),
    ):
        if names:
            raise ValueError(
                say(
                    f"{index} {what} ({len(names)}: {', '.join(names[:10])}); index and shards are from "
                    "different saves: fetch the folder again",
                    f"{index} {what}（{len(names)}：{', '.join(names[:10])}"
                    "）；索引与分片来自不同的保存：请重新获取文件夹",
                )
            )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON object without repeated keys (json keeps the last one silently)."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("repeated names")
    return table


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Entries in file order, and metadata. ValueError if the file is not a complete, well-formed
    safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise ValueError(
                say(
                    f"{file} is a git-lfs pointer, not the weights; run `git lfs pull` in its folder",
                    f"{file} 是 git-lfs 指针而不是权重；请在其文件夹中运行 `git lfs pull`",
                )
            )
        if len(start) < 8 or length > size - 8:
            raise ValueError(
                say(
                    f"{file} ({size} bytes) must hold the {length + 8} bytes that its header claims: it is "
                    "cut off or no safetensors file; fetch it again",
                    f"{file}（{size} 字节）须有文件头所述的 {length + 8} 字节：文件不完整或不是 "
                    "safetensors；请重新获取",
                )
            )
        head = stream.read(length)
    try:
        raw = json.loads(head, object_pairs_hook=_unique)
        metadata = dict(raw.pop("__metadata__", None) or {})
        entries = {name: _entry(file, item, 8 + length) for name, item in raw.items()}
        spans = [(entries[name].offset, 8 + length + raw[name]["data_offsets"][1], name) for name in raw]
    except (ValueError, KeyError, TypeError, AttributeError, LookupError, OverflowError, RecursionError) as error:
        raise ValueError(
            say(
                f"{file} must start with a safetensors header ({error!r}); it is damaged or of another "
                "format: fetch it again",
                f"{file} 须以 safetensors 文件头开始（{error!r}）；文件已损坏或格式不同，请重新获取",
            )
        ) from error
    for name, entry in entries.items():
        if entry.dtype not in NUMPY_TYPES:
            raise ValueError(
                say(
                    f"{file} has tensor {name!r} of element type {entry.dtype}, which is not supported; use "
                    "the bfloat16 release",
                    f"{file} 的张量 {name!r} 类型为 {entry.dtype}，不支持；请用 bfloat16 版本",
                )
            )
    position = 8 + length
    for first, last, name in sorted(spans):
        if first != position or last - first != entries[name].nbytes:
            raise ValueError(
                say(
                    f"{file} has tensor {name!r} at bytes {first}..{last}, where {position}.."
                    f"{position + entries[name].nbytes} is due; fetch it again",
                    f"{file} 的张量 {name!r} 位于字节 {first}..{last}，应为 {position}.."
                    f"{position + entries[name].nbytes}；请重新获取",
                )
            )
        position = last
    if position != size:
        raise ValueError(
            say(
                f"{file} ({size} bytes) must have {position} bytes: the download or save was cut off; fetch it again",
                f"{file}（{size} 字节）须有 {position} 字节：下载或保存中断；请重新获取",
            )
        )
    return {name: entries[name] for _, _, name in sorted(spans)}, metadata


def _entry(file: Path, item: Mapping[str, Any], base: int) -> TensorEntry:
    return TensorEntry(
        file, str(item["dtype"]), tuple(int(n) for n in item["shape"]), base + int(item["data_offsets"][0])
    )


_THREADS = min(4, os.cpu_count() or 1)


def in_threads(work: Callable[[T], object], pieces: Iterable[T]) -> None:
    """`work` on every piece, some at once: numpy lets others run while it works. An error is raised
    here.
    """
    pieces = list(pieces)
    if len(pieces) == 1 or _THREADS == 1:
        deque(map(work, pieces), 0)
        return
    with ThreadPoolExecutor(_THREADS) as threads:
        deque(threads.map(work, pieces), 0)


# --- element types --------------------------------------------------------------------------------


_PIECE = 128 * 1024  # elements worked on at once: they stay in the processor's cache


def widen_bfloat16(bits: Array) -> Array:
    """Raw bits (uint16) -> float32, exact."""
    wide = bits.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def widen_into(bits: Array, out: Array) -> bool:
    """`widen_bfloat16` into float32 memory that is there, in threads; whether all values are
    finite. One pass, where widening, looking and copying are three.
    """
    source, target = bits.reshape(-1), out.reshape(-1).view(np.uint32)
    finite = []

    def work(first: int) -> None:
        piece, wide = source[first : first + _PIECE], target[first : first + _PIECE]
        np.copyto(wide, piece)
        wide <<= 16
        finite.append(all_finite(piece, "BF16"))

    in_threads(work, range(0, len(source), _PIECE))
    return all(finite)


def narrow_bfloat16(values: Array) -> Array:
    """float32 -> raw bits (uint16), rounded to nearest, ties to even; a NaN stays a NaN."""
    out = np.empty(values.shape, np.uint16)
    flat, target = np.ascontiguousarray(values).reshape(-1), out.reshape(-1)
    for a in range(0, flat.size, _PIECE):
        piece = flat[a : a + _PIECE]
        bits = piece.view(np.uint32)
        rounded = bits >> 16
        rounded &= 1
        rounded += 0x7FFF
        rounded += bits
        rounded >>= 16
        nan = np.isnan(piece)
        if nan.any():  # a carry would make it a number
            rounded[nan] = (bits[nan] >> 16) | 0x0040
        target[a : a + _PIECE] = rounded
    return out


def cast(array: Array, source: str, target: str) -> Array:
    """Between floating safetensors codes; the same array if nothing changes. ValueError for other
    element types.
    """
    if source == target:
        return array
    if not {source, target} <= {"F64", "F32", "F16", "BF16"}:
        raise ValueError(
            say(
                f"dtype ({source}) must be a floating type to become {target}; these weights are "
                "quantised: use the bfloat16 release",
                f"类型（{source}）须为浮点才能转为 {target}；这些权重已量化：请用 bfloat16 版本",
            )
        )
    wide = widen_bfloat16(array) if source == "BF16" else array
    if target != "F64":
        wide = wide.astype(np.float32, copy=False)
    return narrow_bfloat16(wide) if target == "BF16" else wide.astype(NUMPY_TYPES[target], copy=False)


def all_finite(array: Array, dtype: str) -> bool:
    """No NaN and no infinity; integers always pass."""
    if dtype != "BF16":
        return array.dtype.kind != "f" or bool(np.isfinite(array).all())
    if not array.size:
        return True
    if array.ndim > 1 and array.strides[0] < array.strides[-1]:
        array = array.T  # rows as they lie in memory
    if array.flags.c_contiguous:
        array = array.reshape(-1)
    step = max(1, _PIECE // max(1, math.prod(array.shape[1:])))
    for a in range(0, len(array), step):  # pieces that stay in the cache between the two looks
        piece = array[a : a + step]
        # exponents of ones lie at the upper end of the positive numbers, and of the negative ones,
        # whose sign bit is set
        if int(piece.view(np.int16).max()) >= 0x7F80 or int(piece.max()) >= 0xFF80:
            return False
    return True

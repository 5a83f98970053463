"""Tensors cut over ranks, on the disk: every rank writes the slices it owns, and any later layout
reads just the parts that it needs.

A folder holds one `rank-NNNNN.safetensors` a rank and `manifest.json`, written last, with each
file's size and hash and each tensor's slices by global name. A slice is a run of elements, in
row-major order, of a rectangular block of a tensor: rows, columns and expert stacks are whole
blocks, the flat pieces of a sharded optimizer are runs. Pickle is never used.
Refuses to know: paddle, process groups, models, optimizers; `gather` and the rank come from the
caller.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ernie_tune.checkpoint.tensors import NUMPY_TYPES, TensorReader
from ernie_tune.checkpoint.writer import write_file
from ernie_tune.config.language import say

Array = np.ndarray[Any, Any]
Shape = tuple[int, ...]
MANIFEST = "manifest.json"
_FORMAT = 1
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Region:
    """Elements [start, start + size) in row-major order of the block of `shape` at `offset` in a
    tensor of shape `whole`.
    """

    whole: Shape
    offset: Shape
    shape: Shape
    start: int
    size: int

    @classmethod
    def block(cls, whole: Shape, offset: Shape | None = None, shape: Shape | None = None) -> Region:
        """All of a block; by default all of the tensor. Raises ValueError for a block that is not
        inside it.
        """
        offset, shape = offset or (0,) * len(whole), whole if shape is None else shape
        inside = len(offset) == len(shape) == len(whole) and all(
            o >= 0 and o + n <= w for o, n, w in zip(offset, shape, whole, strict=True)
        )
        if not inside:
            raise ValueError(
                say(
                    f"block (offset {offset}, shape {shape}) must lie inside its tensor {whole}; fix the sharding "
                    "table",
                    f"块（起点 {offset}，形状 {shape}）须在其张量 {whole} 之内；请修改切分表",
                )
            )
        return cls(tuple(whole), tuple(offset), tuple(shape), 0, math.prod(shape))

    def run(self, start: int, size: int) -> Region:
        """Elements [start, start + size) of this block. Raises ValueError for a run that leaves
        it.
        """
        if not 0 <= start <= start + size <= math.prod(self.shape):
            raise ValueError(
                say(
                    f"run ({start} to {start + size}) must lie inside its block {self.shape}; fix the sharding",
                    f"区段（{start} 到 {start + size}）须在其块 {self.shape} 之内；请修改切分表",
                )
            )
        return Region(self.whole, self.offset, self.shape, start, size)

    @property
    def complete(self) -> bool:
        return self.size == math.prod(self.whole)

    def boxes(self) -> Iterator[tuple[Shape, Shape, int]]:
        """The run as rectangles of the whole tensor: (offset, shape, position of its first element
        in the run). Each is contiguous in the run.
        """
        at = 0
        for offset, shape in _boxes(self.shape, self.start, self.start + self.size):
            yield tuple(a + b for a, b in zip(self.offset, offset, strict=True)), shape, at
            at += math.prod(shape)


class HasShape(Protocol):
    """A tensor of any kind."""

    @property
    def shape(self) -> Any: ...


@dataclass(frozen=True)
class Shards:
    """Where this rank's tensors lie in the whole ones: by canonical name, of parameters; and of
    what its optimizer updates, where that is less.

    Names that are left out are whole here.
    """

    parameters: Mapping[str, Region] = field(default_factory=dict)
    updated: Mapping[str, Region] = field(default_factory=dict)

    def of(self, name: str, parameter: HasShape) -> Region:
        return self.parameters.get(name) or Region.block(tuple(parameter.shape))

    def of_state(self, name: str, parameter: HasShape) -> Region:
        return self.updated.get(name) or self.of(name, parameter)


WHOLE = Shards()


def _boxes(shape: Shape, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    """The fewest rectangles that are elements [start, stop) of a block in row-major order: a part
    of a row, whole rows, a part of a row.
    """
    if start >= stop:
        return
    if (start, stop) == (0, math.prod(shape)):
        yield (0,) * len(shape), shape
        return
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if first == last:
        yield from _row(shape, first, start - first * inner, stop - first * inner)
        return
    if start % inner:
        yield from _row(shape, first, start % inner, inner)
        first += 1
    rows = stop // inner - first
    if rows:
        yield (first, *(0,) * (len(shape) - 1)), (rows, *shape[1:])
    if stop % inner:
        yield from _row(shape, last, 0, stop % inner)


def _row(shape: Shape, row: int, start: int, stop: int) -> Iterator[tuple[Shape, Shape]]:
    for offset, size in _boxes(shape[1:], start, stop):
        yield (row, *offset), (1, *size)


@dataclass(frozen=True)
class Slice:
    """What this rank holds of one tensor. `read()` gives its elements as an array of any shape,
    when its turn to be written comes.
    """

    name: str
    region: Region
    dtype: str  # safetensors code
    read: Callable[[], Array]

    @property
    def key(self) -> str:
        """Its name in the file: the tensor's own where it is whole."""
        r = self.region
        if r.complete:
            return self.name
        return f"{self.name}@{','.join(map(str, r.offset))}+{','.join(map(str, r.shape))}:{r.start}"

    @property
    def nbytes(self) -> int:
        return self.region.size * NUMPY_TYPES[self.dtype].itemsize


# name, safetensors code, whole, offset, shape, start, size: JSON, as ranks exchange it
Description = list[Any]


def describe(slices: Sequence[Slice]) -> list[Description]:
    """What a rank tells the others it holds."""
    regions = ((s, s.region) for s in slices)
    return [[s.name, s.dtype, list(r.whole), list(r.offset), list(r.shape), r.start, r.size] for s, r in regions]


def owned(held: Sequence[Sequence[Description]], rank: int) -> set[int]:
    """Which of its slices `rank` writes: each distinct one is written once, by the holder that has
    the fewest bytes so far.

    `held[r]` is `describe` of rank r; every rank comes to the same division. Raises ValueError
    where slices overlap or leave gaps.
    """
    holders: dict[str, list[tuple[int, int]]] = {}
    for r, descriptions in enumerate(held):
        for i, d in enumerate(descriptions):
            holders.setdefault(json.dumps(d), []).append((r, i))
    _check_cover([json.loads(text) for text in holders])
    sizes = {text: (d := json.loads(text))[6] * NUMPY_TYPES[d[1]].itemsize for text in holders}
    load = [0] * len(held)
    mine: set[int] = set()
    # Those with one holder first, then the large ones, so that the small ones even it out.
    for text in sorted(holders, key=lambda t: (len(holders[t]) > 1, -sizes[t], t)):
        r, i = min(holders[text], key=lambda holder: (load[holder[0]], holder[0]))
        load[r] += sizes[text]
        if r == rank:
            mine.add(i)
    return mine


def _check_cover(distinct: Sequence[Description]) -> None:
    seen: dict[str, tuple[str, Shape, int]] = {}
    for name, code, whole, _, _, _, size in distinct:
        before = seen.get(name, (code, tuple(whole), 0))
        if before[:2] != (code, tuple(whole)):
            raise ValueError(
                say(
                    f"{name} ({code} {whole}) must have one type and shape on all ranks, but is {before[0]} "
                    f"{list(before[1])} on another; fix the sharding",
                    f"{name}（{code} {whole}）在各进程上的类型与形状须相同，而另一进程上为 {before[0]} {list(before[1])}；请修改切分",
                )
            )
        seen[name] = (code, tuple(whole), before[2] + size)
    for name, (_, whole_shape, total) in seen.items():
        if total != math.prod(whole_shape):
            raise ValueError(
                say(
                    f"slices of {name} ({total} elements) must make up its {math.prod(whole_shape)}, without gaps "
                    "or overlaps; fix the sharding",
                    f"{name} 的各分片（共 {total} 个元素）须恰好拼成它的 {math.prod(whole_shape)} 个，没有缺口与重叠；请修改切分",
                )
            )


@dataclass(frozen=True)
class RankFile:
    """One written file and the slices in it."""

    file: str
    nbytes: int
    sha256: str
    slices: list[Description]

    def as_json(self) -> dict[str, Any]:
        return dict(vars(self))


def write_rank(folder: Path, rank: int, slices: Sequence[Slice]) -> RankFile:
    """Write the slices of one rank, one in memory at a time, flushed to the disk."""
    # wide types first keep every tensor aligned
    ordered = sorted(slices, key=lambda s: -NUMPY_TYPES[s.dtype].itemsize)
    by_key = {s.key: s for s in ordered}
    if len(by_key) != len(ordered):
        raise ValueError(
            say(
                f"slices of rank {rank} ({len(ordered)}) must have {len(by_key)} names, one each; fix the sharding",
                f"进程 {rank} 的分片（{len(ordered)} 个）须有 {len(by_key)} 个各不相同的名称；请修改切分",
            )
        )
    file = folder / f"rank-{rank:05d}.safetensors"
    digest = hashlib.sha256()
    write_file(
        file,
        {key: ((s.region.shape if _whole_block(s.region) else (s.region.size,)), s.dtype) for key, s in by_key.items()},
        lambda key: _shaped(by_key[key]),
        {"format": "np"},
        digest,
    )
    return RankFile(file.name, file.stat().st_size, digest.hexdigest(), describe(ordered))


def _whole_block(region: Region) -> bool:
    return region.size == math.prod(region.shape)


def _shaped(s: Slice) -> Array:
    array, r = np.ascontiguousarray(s.read()), s.region
    if array.size != r.size:
        raise ValueError(
            say(
                f"slice {s.key} ({array.size} elements) must have {r.size}, as announced; fix the sharding",
                f"分片 {s.key}（{array.size} 个元素）须如先前所报有 {r.size} 个；请修改切分",
            )
        )
    return array.reshape(r.shape if _whole_block(r) else (r.size,))


def write_manifest(folder: Path, files: Sequence[RankFile]) -> Path:
    """Say what the rank files hold. The caller makes the folder visible afterwards."""
    tensors: dict[str, dict[str, Any]] = {}
    for number, file in enumerate(files):
        for name, code, whole, offset, shape, start, size in file.slices:
            entry = tensors.setdefault(name, {"dtype": code, "shape": whole, "slices": []})
            entry["slices"].append([number, offset, shape, start, size])
    content = {
        "format": _FORMAT,
        "files": [{"file": f.file, "bytes": f.nbytes, "sha256": f.sha256} for f in files],
        "tensors": tensors,
    }
    path = folder / MANIFEST
    path.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")
    return path


class ShardedReader:
    """The tensors of a folder, whatever layout wrote it. Files are opened when a slice of theirs is
    needed, and only the pages of that slice are read.

    Raises ValueError naming every rank file that is missing or of another size, and for a manifest
    that is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = folder / MANIFEST
        try:
            content = json.loads(manifest.read_text(encoding="utf-8"))
            self.files: list[Mapping[str, Any]] = content["files"]
            self.tensors: dict[str, dict[str, Any]] = content["tensors"]
            made = content["format"]
        except FileNotFoundError as error:
            raise ValueError(
                say(
                    f"{folder} must hold {MANIFEST}: the copy was cut off; fetch the checkpoint again",
                    f"{folder} 中须有 {MANIFEST}：复制中断；请重新获取检查点",
                )
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                say(
                    f"{manifest} must be the JSON that a save wrote ({error!r}); fetch the checkpoint again",
                    f"{manifest} 须为保存时写出的 JSON（{error!r}）；请重新获取检查点",
                )
            ) from error
        if made != _FORMAT:
            raise ValueError(
                say(
                    f"{manifest} has format ({made}), which must be {_FORMAT}; read it with the version that wrote it",
                    f"{manifest} 的格式为 {made}，须为 {_FORMAT}；请用写出它的版本读取",
                )
            )
        self._check_sizes()
        self._open: dict[int, TensorReader] = {}

    def _check_sizes(self) -> None:
        wrong = []
        for entry in self.files:
            path = self.folder / entry["file"]
            if not path.is_file():
                wrong.append(f"{entry['file']} is missing")
            elif path.stat().st_size != entry["bytes"]:
                wrong.append(f"{entry['file']} has {path.stat().st_size} of {entry['bytes']} bytes")
        if wrong:
            raise ValueError(
                say(
                    f"{self.folder} must hold the files of all {len(self.files)} ranks, but {'; '.join(wrong)}"
                    ": copy them again, or resume from an older checkpoint",
                    f"{self.folder} 中须有全部 {len(self.files)} 个进程的文件，但 {'; '.join(wrong)}"
                    "：请重新复制，或从更早的检查点继续",
                )
            )

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: tuple(entry["shape"]) for name, entry in self.tensors.items()}

    def dtype(self, name: str) -> str:
        """Safetensors code."""
        return str(self.tensors[name]["dtype"])

    def read(self, name: str, region: Region | None = None) -> Array:
        """The elements of a region (by default all) in an array of its block's shape, or a flat one
        for a run; BF16 as uint16 bits.

        Raises KeyError for a name that is not there, ValueError for a region of another tensor or
        that the files do not cover.
        """
        entry, whole = self.tensors[name], self.shapes[name]
        wanted = region or Region.block(whole)
        if wanted.whole != whole:
            raise ValueError(
                say(
                    f"{name} {list(whole)} in {self.folder} must have the shape {list(wanted.whole)}; it is "
                    "of another model",
                    f"{self.folder} 中 {name} {list(whole)} 的形状须为 {list(wanted.whole)}；它属于另一个模型",
                )
            )
        out = np.empty(wanted.size, NUMPY_TYPES[entry["dtype"]])
        filled = 0
        for number, offset, shape, start, size in entry["slices"]:
            stored = Slice(name, Region(whole, tuple(offset), tuple(shape), start, size), entry["dtype"], lambda: out)
            filled += self._copy(number, stored, wanted, out)
        if filled != wanted.size:
            raise ValueError(
                say(
                    f"{self.folder / MANIFEST}: slices of {name} hold {filled} of {wanted.size} elements; fetch "
                    "the checkpoint again",
                    f"{self.folder / MANIFEST}：{name} 的各分片只有 {wanted.size} 个元素中的 {filled} 个；请重新获取该检查点",
                )
            )
        return out.reshape(wanted.shape) if _whole_block(wanted) else out

    def _copy(self, number: int, stored: Slice, wanted: Region, out: Array) -> int:
        """Copy what a stored slice shares with the wanted region; returns the number of
        elements.
        """
        copied = 0
        for target_offset, target_shape, target_at in wanted.boxes():
            target = out[target_at : target_at + math.prod(target_shape)].reshape(target_shape)
            for offset, shape, at in stored.region.boxes():
                low = tuple(map(max, offset, target_offset))
                high = tuple(
                    min(a + n, b + m) for a, n, b, m in zip(offset, shape, target_offset, target_shape, strict=True)
                )
                if any(a >= b for a, b in zip(low, high, strict=True)):
                    continue
                source = self._file(number).read(stored.key).reshape(-1)[at : at + math.prod(shape)].reshape(shape)
                target[_window(low, high, target_offset)] = source[_window(low, high, offset)]
                copied += math.prod(b - a for a, b in zip(low, high, strict=True))
        return copied

    def _file(self, number: int) -> TensorReader:
        if number not in self._open:
            self._open[number] = TensorReader(self.folder / self.files[number]["file"])
        return self._open[number]

    def damaged(self, rank: int = 0, size: int = 1) -> list[str]:
        """Names of files whose content is not what was written, of every `size`-th file from `rank`
        on: the ranks share the reading.
        """
        return [e["file"] for e in self.files[rank::size] if _hash(self.folder / e["file"]) != e["sha256"]]


def _window(low: Shape, high: Shape, origin: Shape) -> tuple[slice, ...]:
    return tuple(slice(a - o, b - o) for a, b, o in zip(low, high, origin, strict=True))


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()

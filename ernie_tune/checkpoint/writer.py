"""Write safetensors folders: sharded, tensor by tensor, and complete or not there at all.

While one tensor is written the next is made: two are in memory, never more. What is written goes on
to the disk meanwhile: left to the end, that alone took twice as long as writing.

Everything is written into `<folder>.tmp` first. A new folder then appears by one rename; into an
existing one the files move with the index (or the single file) last, after the old index is gone,
so that a reader never takes a mixture of two saves for a checkpoint.
Refuses to know: parameter names, models, paddle.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from ernie_tune.checkpoint.tensors import INDEX_NAME, NUMPY_TYPES, SINGLE_NAME
from ernie_tune.config.language import say

Array = np.ndarray[Any, Any]
Entries = Mapping[str, tuple[tuple[int, ...], str]]  # name -> shape, safetensors code
DEFAULT_SHARD_BYTES = 5 * 10**9
_WORD_BYTES = 8  # the widest element's; the header is padded to it
_PIECE_BYTES = 1 << 18
_FLUSH_BYTES = 1 << 26


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names `path` where it names no file: those of writing, such as of a
    full disk, do not by themselves.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def refuse_file(folder: Path) -> None:
    """ValueError where `folder`, which is to be written, is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(
            say(
                f"{folder} must be a folder, but is a file; choose another name",
                f"{folder} 须为文件夹，但它是文件；请换一个名称",
            )
        )


def write_folder(
    folder: Path,
    entries: Entries,
    produce: Callable[[str], Array],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    metadata: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write weights (and text `files` such as config.json) to `folder`; returns the paths written,
    weights first.

    `produce(name)` gives the array of one entry when its turn comes (BF16 as uint16 bits); it is
    done with when `produce` is called the time after the next. One file if everything fits into
    `max_shard_bytes`, else `model-00001-of-0000N.safetensors` and the index. Other files in
    `folder` stay; older weights are replaced.
    Raises ValueError for a bad shard size, a folder that is a file, a foreign `<folder>.tmp`, and
    an array that is not what its entry says.
    """
    if max_shard_bytes < 1:
        raise ValueError(
            say(
                f"max_shard_size ({max_shard_bytes}) must be a positive number of bytes; leave it out for "
                f"{DEFAULT_SHARD_BYTES}",
                f"max_shard_size（{max_shard_bytes}）须为正的字节数；省略则为 {DEFAULT_SHARD_BYTES}",
            )
        )
    refuse_file(folder)
    folder = folder.resolve()
    staged = folder.with_name(folder.name + ".tmp")
    _clear(staged)
    shards = _plan(entries, max_shard_bytes)
    single = len(shards) == 1
    names = [
        SINGLE_NAME if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    for file, shard in zip(names, shards, strict=True):
        write_file(staged / file, {name: entries[name] for name in shard}, produce, dict(metadata or {}))
    if not single:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {
            "metadata": {"total_size": sum(_nbytes(*entry) for entry in entries.values())},
            "weight_map": weight_map,
        }
        with naming(folder / INDEX_NAME):
            (staged / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        names.append(INDEX_NAME)
    for file, text in (files or {}).items():
        with naming(folder / file):
            (staged / file).write_text(text, encoding="utf-8")
    _publish(staged, folder, [*(files or {}), *names])
    return [folder / file for file in (*names, *(files or {}))]


def _clear(staged: Path) -> None:
    """An empty staging folder. What an interrupted save left there goes; anything else is
    somebody's and stays.
    """
    if staged.exists():
        foreign = [path.name for path in staged.iterdir() if path.suffix not in (".safetensors", ".json")]
        if foreign:
            raise ValueError(
                say(
                    f"{staged} must be free for the unfinished save, but holds {foreign[0]!r}; move it away "
                    "or save elsewhere",
                    f"{staged} 须留空以存放未完成的保存，其中已有 {foreign[0]!r}；请移走，或保存到别处",
                )
            )
        shutil.rmtree(staged)
    staged.mkdir(parents=True)


def _nbytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * NUMPY_TYPES[dtype].itemsize


def _plan(entries: Entries, max_shard_bytes: int) -> list[list[str]]:
    """Cut the entries, in their order, into shards. Within a shard those of whole words keep their
    order and come first, of the others those of wide element types: so every tensor is aligned.
    """

    def place(name: str) -> tuple[bool, int]:
        odd = _nbytes(*entries[name]) % _WORD_BYTES > 0
        return odd, -NUMPY_TYPES[entries[name][1]].itemsize if odd else 0

    shards: list[list[str]] = [[]]
    used = 0
    for name, entry in entries.items():
        size = _nbytes(*entry)
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return [sorted(shard, key=place) for shard in shards]


class TwoBuffers:
    """Memory for arrays that `write_folder` asks for, used again: fresh pages for every tensor cost
    more than what is done with them.
    """

    def __init__(self) -> None:
        self._held = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array that is one's own until the call after the next: by then the tensor before the
        last one is on its way to the disk.
        """
        kind, count = np.dtype(dtype), math.prod(shape)
        self._held.reverse()
        if self._held[0].size < count * kind.itemsize:
            self._held[0] = np.empty(0, np.uint8)  # gone before the larger one comes
            self._held[0] = np.empty(count * kind.itemsize, np.uint8)
        return self._held[0][: count * kind.itemsize].view(kind).reshape(shape)


class Digest(Protocol):
    """A running hash, as hashlib makes them."""

    def update(self, data: Any, /) -> None: ...


class _Sink:
    """A file that is flushed while it grows, and whose bytes `digest` sees too."""

    def __init__(self, stream: BinaryIO, digest: Digest | None, flusher: Executor) -> None:
        self.stream, self.digest, self._flusher = stream, digest, flusher
        self._unflushed_bytes = 0
        self._flush: Future[None] | None = None

    def write(self, data: memoryview) -> None:
        """In pieces as cp makes them: for a larger one Linux looks for as large a page, which took
        a virtual machine up to five times as long.
        """
        for a in range(0, len(data), _PIECE_BYTES):
            piece = data[a : a + _PIECE_BYTES]
            if self.digest:
                self.digest.update(piece)
            self.stream.write(piece)
            self._unflushed_bytes += len(piece)
            if self._unflushed_bytes >= _FLUSH_BYTES and (self._flush is None or self._flush.done()):
                self._wait()
                self.stream.flush()
                self._flush, self._unflushed_bytes = self._flusher.submit(os.fsync, self.stream.fileno()), 0

    def finish(self) -> None:
        """Everything is on the disk."""
        self._wait()
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def _wait(self) -> None:
        if self._flush:
            self._flush.result()  # a disk's error is told once, to whom flushed


def write_file(
    file: Path,
    entries: Entries,
    produce: Callable[[str], Array],
    metadata: dict[str, str],
    digest: Digest | None = None,
) -> None:
    """One safetensors file, in the order of `entries`, flushed to the disk. The caller gives it a
    temporary name and renames it. `digest` sees its bytes.
    """
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    position = 0
    for name, (shape, dtype) in entries.items():
        end = position + _nbytes(shape, dtype)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # data begin at a multiple of 8 bytes
    with naming(file), file.open("wb") as stream, ThreadPoolExecutor(1, "flush") as flusher:
        sink = _Sink(stream, digest, flusher)
        sink.write(memoryview(len(head).to_bytes(8, "little") + head))
        _write_tensors(sink, entries, produce)
        sink.finish()


def _write_tensors(sink: _Sink, entries: Entries, produce: Callable[[str], Array]) -> None:
    """Tensors are made here, in the caller's thread, and written in another: `produce` may talk to
    other ranks.
    """
    with ThreadPoolExecutor(1, "write") as writer:
        unwritten: Future[None] | None = None
        for name, (shape, dtype) in entries.items():
            array = produce(name)
            if array.shape != shape or array.dtype != NUMPY_TYPES[dtype]:
                raise ValueError(
                    say(
                        f"tensor {name!r} ({list(array.shape)}, {array.dtype}) must be {list(shape)} of {dtype}, as announced; fix the layout table",
                        f"张量 {name!r}（{list(array.shape)}，{array.dtype}）须如先前所报为 {dtype} 的 {list(shape)}；请修改布局表",
                    )
                )
            if unwritten:
                unwritten.result()
            unwritten = writer.submit(sink.write, np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            del array  # the writer alone keeps it
        if unwritten:
            unwritten.result()


def _publish(staged: Path, folder: Path, order: list[str]) -> None:
    """Move the finished files to their place: by one rename, or one by one with what makes the
    folder readable last.
    """
    if not folder.exists():
        os.replace(staged, folder)
        return
    for old in (folder / INDEX_NAME, folder / SINGLE_NAME, *folder.glob("model-*-of-*.safetensors")):
        old.unlink(missing_ok=True)
    for file in order:
        os.replace(staged / file, folder / file)
    staged.rmdir()


def write_atomically(path: Path, text: str) -> None:
    """Replace a file by a complete one: written beside it as `<name>.tmp`, then renamed. Raises
    OSError with the file's name; nothing is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            staged.write_text(text, encoding="utf-8")
            os.replace(staged, path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise

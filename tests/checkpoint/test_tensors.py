"""Our safetensors reader and writer against the safetensors library, damaged files, and published
bfloat16 bit patterns. No paddle.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ernie_tune.checkpoint import names, tensors, writer
from ernie_tune.checkpoint.tensors import (
    INDEX_NAME,
    NUMPY_TYPES,
    SINGLE_NAME,
    Array,
    TensorReader,
    all_finite,
    cast,
    in_threads,
    narrow_bfloat16,
    read_header,
    widen_bfloat16,
    widen_into,
)
from ernie_tune.checkpoint.writer import write_folder

RNG = np.random.default_rng(0)
TENSORS: dict[str, Array] = {
    "b.odd": RNG.standard_normal(3).astype(np.float16),
    "a": RNG.standard_normal((4, 5)).astype(np.float32),
    "c": RNG.integers(-9, 9, (2, 3, 2)),
    "empty": np.zeros((0, 4), np.float32),
    "scalar": np.array(2.5, np.float32),
}
CODES = {"float16": "F16", "float32": "F32", "int64": "I64"}


def write(folder: Path, tensors: dict[str, Array], shard: int = 10**9, **more: dict[str, str]) -> list[Path]:
    entries = {name: (array.shape, CODES[array.dtype.name]) for name, array in tensors.items()}
    return write_folder(folder, entries, tensors.__getitem__, max_shard_bytes=shard, **more)


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / SINGLE_NAME, metadata={"format": "pt"})
    for path in (tmp_path, tmp_path / SINGLE_NAME):
        reader = TensorReader(path)
        assert reader.metadata == {"format": "pt"}
        assert reader.shapes == {name: array.shape for name, array in TENSORS.items()}
        for name, array in TENSORS.items():
            np.testing.assert_array_equal(reader.read(name), array)
            assert reader.read(name).dtype == array.dtype


def test_the_library_reads_what_we_wrote(tmp_path: Path) -> None:
    paths = write(tmp_path / "one", TENSORS, metadata={"format": "np"}, files={"config.json": "{}"})
    assert [p.name for p in paths] == [SINGLE_NAME, "config.json"]
    loaded = load_file(tmp_path / "one" / SINGLE_NAME)
    assert loaded.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(loaded[name], array)
    assert not list(tmp_path.glob("*.tmp"))


def test_shards(tmp_path: Path) -> None:
    tensors = {f"t{i}": np.full((10,), i, np.float32) for i in range(5)}  # 40 bytes each
    names = [p.name for p in write(tmp_path / "s", tensors, shard=80)]
    assert names == [*(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)), INDEX_NAME]
    index = json.loads((tmp_path / "s" / INDEX_NAME).read_text())
    assert index["metadata"]["total_size"] == 200
    assert index["weight_map"]["t2"] == "model-00002-of-00003.safetensors"
    reader = TensorReader(tmp_path / "s")
    for name, array in tensors.items():
        np.testing.assert_array_equal(reader.read(name), array)
        np.testing.assert_array_equal(load_file(tmp_path / "s" / index["weight_map"][name])[name], array)
    # a larger tensor than the limit gets a shard of its own; then back to one file: the old shards
    # and index go, other files stay
    assert len(write(tmp_path / "big", tensors, shard=1)) == 6
    (tmp_path / "s" / "tokenizer.model").write_bytes(b"x")
    write(tmp_path / "s", tensors)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [SINGLE_NAME, "tokenizer.model"]


def test_an_interrupted_save_changes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "m", {"a": np.zeros(3, np.float32)})
    entries: dict[str, tuple[tuple[int, ...], str]] = {"a": ((3,), "F32"), "b": ((3,), "F32")}

    def produce(name: str) -> Array:
        if name == "b":
            raise KeyboardInterrupt
        return np.ones(3, np.float32)

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "m", entries, produce)
    np.testing.assert_array_equal(TensorReader(tmp_path / "m").read("a"), np.zeros(3))
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "new", entries, produce)
    assert not (tmp_path / "new").exists()
    write(tmp_path / "new", {"a": np.ones(3, np.float32)})  # what was left behind is cleared away
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.tmp", "new"]


def test_writer_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_shard_size \(0\) must be a positive number"):
        write(tmp_path / "x", TENSORS, shard=0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"must be a folder, but is a file"):
        write(tmp_path / "file", TENSORS)
    notes = tmp_path / "z.tmp" / "notes.txt"
    notes.parent.mkdir()
    notes.touch()
    with pytest.raises(ValueError, match=r"z.tmp must be free .* holds 'notes.txt'"):
        write(tmp_path / "z", TENSORS)
    assert notes.exists()
    for wrong in (np.zeros(4, np.float32), np.zeros(3, np.float64)):
        with pytest.raises(ValueError, match=r"tensor 'a' .* must be \[3\] of F32"):
            write_folder(tmp_path / "y", {"a": ((3,), "F32")}, lambda _, wrong=wrong: wrong)  # type: ignore[misc]


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    megabyte, count = 2**20, 16
    entries: dict[str, tuple[tuple[int, ...], str]] = {f"t{i}": ((megabyte // 4,), "F32") for i in range(count)}
    tracemalloc.start()
    write_folder(
        tmp_path / "m",
        entries,
        lambda name: np.full(megabyte // 4, int(name[1:]), np.float32),
        max_shard_bytes=5 * megabyte,
    )
    reader = TensorReader(tmp_path / "m")
    total = sum(float(cast(reader.read(name), "F32", "BF16").sum()) for name in entries)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 0
    assert peak < 5 * megabyte  # one tensor and the temporaries of its rounding, not sixteen


def cut_data(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def overwrite_header(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"x" + data[9:])


def git_lfs(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")


def header(text: str) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(8))

    return replace


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_data, r"must have \d+ bytes: the download or save was cut off"),
        (cut_header, "header claims: it is cut off"),
        (overwrite_header, "must start with a safetensors header"),
        (git_lfs, "git-lfs pointer"),
        (
            header(
                '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
            ),
            "repeated names",
        ),
        (header('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'), r"tensor 'a' at bytes .* is due"),
        (header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'), r"tensor 'a' at bytes .* is due"),
        (
            header('{"a":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}'),
            "element type F8_E4M3, which is not supported",
        ),
        (header('{"a":{"dtype":"F32","shape":[2]}}'), "must start with a safetensors header .*data_offsets"),
        (header("[]"), "must start with a safetensors header"),
    ],
)
def test_damaged_file(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    file = tmp_path / SINGLE_NAME
    save_file(TENSORS, file)
    damage(file)
    with pytest.raises(ValueError, match=message):
        TensorReader(tmp_path)


def sharded(folder: Path) -> tuple[Path, dict[str, str]]:
    write(folder, {f"t{i}": np.full(2, i, np.float32) for i in range(3)}, shard=8)
    index = folder / INDEX_NAME
    return index, json.loads(index.read_text())["weight_map"]


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    index, weight_map = sharded(tmp_path / "m")
    second = weight_map["t1"]

    def expect(message: str, table: object) -> None:
        index.write_text(json.dumps(table))
        with pytest.raises(ValueError, match=message):
            TensorReader(tmp_path / "m")

    expect("lists tensors that the named shard does not hold .*t9", {"weight_map": weight_map | {"t9": second}})
    expect("lists tensors that the named shard does not hold .*t0", {"weight_map": weight_map | {"t0": second}})
    expect(
        "does not list tensors that the shards hold .*t3",
        {"weight_map": weight_map} if _add_tensor(tmp_path / "m" / second) else None,
    )
    expect("must be a file in the same folder", {"weight_map": {"t0": "../other.safetensors"}})
    expect("must have a weight_map", {"weights": {}})
    index.write_text("{")
    with pytest.raises(ValueError, match=r"must be JSON"):
        TensorReader(tmp_path / "m")


def _add_tensor(file: Path) -> bool:
    save_file(load_file(file) | {"t3": np.zeros(1, np.float32)}, file)
    return True


def test_duplicates_missing_shards_and_ambiguous_folders(tmp_path: Path) -> None:
    _, weight_map = sharded(tmp_path / "twice")
    save_file({"t0": np.zeros(2, np.float32), "t1": np.ones(2, np.float32)}, tmp_path / "twice" / weight_map["t1"])
    with pytest.raises(ValueError, match=r"tensor 't0' .* must be in one shard only"):
        TensorReader(tmp_path / "twice")

    index, weight_map = sharded(tmp_path / "m")
    (tmp_path / "m" / weight_map["t1"]).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 3 shards .*model-00002-of-00003.safetensors"):
        TensorReader(tmp_path / "m")
    index.unlink()
    with pytest.raises(ValueError, match=f"holds 2 shards .* but no {INDEX_NAME}"):
        TensorReader(tmp_path / "m")

    sharded(tmp_path / "both")
    save_file(TENSORS, tmp_path / "both" / SINGLE_NAME)
    with pytest.raises(ValueError, match=r"holds both"):
        TensorReader(tmp_path / "both")

    (tmp_path / "pd").mkdir()
    with pytest.raises(FileNotFoundError, match=f"holds neither {SINGLE_NAME}"):
        TensorReader(tmp_path / "pd")
    (tmp_path / "pd" / "model_state.pdparams").touch()
    with pytest.raises(FileNotFoundError, match=r"model_state.pdparams but no .safetensors: pickled weights"):
        TensorReader(tmp_path / "pd")


def test_bfloat16_bits() -> None:
    """1 + 2^-8 and 1 + 3*2^-8 lie half-way between neighbours (spacing 2^-7): ties go to the even
    mantissa.
    """
    values = np.array(
        [1.0, -2.0, 0.0, -0.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf, -np.inf, 1e-40], np.float32
    )
    bits = [0x3F80, 0xC000, 0x0000, 0x8000, 0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80, 0x0001]
    np.testing.assert_array_equal(narrow_bfloat16(values), np.array(bits, np.uint16))
    np.testing.assert_array_equal(
        widen_bfloat16(np.array([0x3F80, 0xC000, 0x3F82], np.uint16)), np.array([1, -2, 1.015625], np.float32)
    )
    nans = np.array([0x7FC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(
        np.float32
    )  # the last would overflow when rounded
    assert np.isnan(widen_bfloat16(narrow_bfloat16(nans))).all()
    every = np.arange(2**16, dtype=np.uint16)
    finite = every[(every & 0x7F80) != 0x7F80]
    np.testing.assert_array_equal(narrow_bfloat16(widen_bfloat16(finite)), finite)


def test_cast_and_all_finite() -> None:
    f32 = np.array([1.5, -2.0], np.float32)
    assert cast(f32, "F32", "F32") is f32
    np.testing.assert_array_equal(cast(f32.astype(np.float16), "F16", "BF16"), np.array([0x3FC0, 0xC000], np.uint16))
    np.testing.assert_array_equal(cast(np.array([0x3FC0], np.uint16), "BF16", "F16"), np.array([1.5], np.float16))
    np.testing.assert_array_equal(cast(f32.T, "F32", "BF16"), np.array([0x3FC0, 0xC000], np.uint16))
    fine = np.array([1 / 3, 1e30])
    np.testing.assert_array_equal(cast(fine, "F64", "F32"), fine.astype(np.float32))
    np.testing.assert_array_equal(cast(np.array([0x3FC0], np.uint16), "BF16", "F64"), np.array([1.5]))
    assert cast(f32, "F32", "F64").dtype == np.float64
    with pytest.raises(ValueError, match=r"dtype \(I8\) must be a floating type"):
        cast(np.zeros(2, np.int8), "I8", "F32")
    assert all_finite(f32, "F32")
    assert all_finite(np.array([0x7F7F, 0xFF7F], np.uint16), "BF16")
    assert all_finite(np.zeros(2, np.int8), "I8")
    for bits in (0x7F80, 0xFF80, 0x7FC0, 0x7F81):
        assert not all_finite(np.array([0x3F80, bits], np.uint16), "BF16")
    assert not all_finite(np.array([1, np.nan], np.float16), "F16")
    assert not all_finite(np.array([np.inf, 1], np.float32), "F32")


def test_tensors_stay_aligned(tmp_path: Path) -> None:
    """Those of whole words in their order, then the rest, wide types first."""
    more = {
        "odd": np.zeros(3, np.int8),
        "pair": np.zeros(1, np.uint16),
        "codes": np.zeros(16, np.int8),
        "scale": np.zeros(4, np.uint16),
        "wide": np.zeros(1, np.int64),
        "single": np.zeros(3, np.float32),
    }
    codes = {"odd": "I8", "pair": "BF16", "codes": "I8", "scale": "BF16", "wide": "I64", "single": "F32"}
    write_folder(tmp_path / "m", {n: (a.shape, codes[n]) for n, a in more.items()}, more.__getitem__)
    entries, _ = read_header(tmp_path / "m" / SINGLE_NAME)
    assert list(entries) == ["codes", "scale", "wide", "single", "pair", "odd"]
    assert all(e.offset % NUMPY_TYPES[e.dtype].itemsize == 0 for e in entries.values())


def test_the_next_tensor_is_made_while_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made in the caller's thread, one ahead and no more; an array may be written over when the one
    after the next is asked for.
    """
    made, written = [], []
    slow = writer._Sink.write
    ahead = []

    def write(sink: Any, data: memoryview) -> None:
        time.sleep(0.02)
        slow(sink, data)
        if made:  # else it was the header
            written.append(len(data))

    monkeypatch.setattr(writer._Sink, "write", write)
    buffers, main = writer.TwoBuffers(), threading.get_ident()

    def produce(name: str) -> np.ndarray:
        assert threading.get_ident() == main
        out = buffers.empty((int(name) + 1, 1000), np.int32)
        out[...] = int(name)
        made.append(name)
        ahead.append(len(made) - len(written))
        return out

    write_folder(tmp_path / "m", {str(i): ((i + 1, 1000), "I32") for i in range(6)}, produce)
    assert max(ahead) == 2
    reader = TensorReader(tmp_path / "m")
    assert all((reader.read(str(i)) == i).all() for i in range(6))


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_disk_that_is_full_is_told(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the last tensor, by one before, and by a flush on the way: the system tells an error once,
    to whoever flushed first.
    """
    calls = []

    def full(*_: Any) -> None:
        calls.append(1)
        if call == "write" or len(calls) == 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((writer._Sink, "write") if call == "write" else (writer.os, "fsync")), full)
    monkeypatch.setattr(writer, "_FLUSH_BYTES", 1)
    for count in (1, 3):
        calls.clear()
        with pytest.raises(OSError, match="No space left"):
            write_folder(tmp_path / "m", {str(i): ((2,), "I32") for i in range(count)}, lambda _: np.zeros(2, np.int32))
        assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("size", [1, 7, 3 * 128 * 1024 + 5])
def test_widening_into_memory_that_is_there(size: int) -> None:
    bits = np.random.default_rng(0).integers(0, 0x7F80, (size, 1), dtype=np.uint16)
    out = np.full((size, 1), 9.0, np.float32)
    assert widen_into(bits, out)
    np.testing.assert_array_equal(out, widen_bfloat16(bits))
    for at, wrong in ((0, 0x7F80), (size - 1, 0xFF80), (size // 2, 0x7FC0), (size // 2, 0xFFC1)):
        spoiled = bits.copy()
        spoiled[at] = wrong
        assert not widen_into(spoiled, out)
        np.testing.assert_array_equal(out, widen_bfloat16(spoiled))


def test_a_file_goes_to_the_disk_while_it_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flushes are of what has been written so far, never two at once, and the last one is of
    everything; a digest sees every byte in order.
    """
    sizes, busy, fsync = [], [], os.fsync

    def watched(descriptor: int) -> None:
        busy.append(1)
        assert len(busy) == 1
        sizes.append(os.fstat(descriptor).st_size)
        time.sleep(0.01)
        fsync(descriptor)
        busy.pop()

    monkeypatch.setattr(writer.os, "fsync", watched)
    monkeypatch.setattr(writer, "_PIECE_BYTES", 512)
    monkeypatch.setattr(writer, "_FLUSH_BYTES", 1024)

    def produce(name: str) -> Array:
        time.sleep(0.02)
        return np.full(1000, int(name), np.int32)

    digest, file = hashlib.sha256(), tmp_path / "m.safetensors"
    writer.write_file(file, {str(i): ((1000,), "I32") for i in range(4)}, produce, {}, digest)
    assert len(sizes) >= 2  # how often depends on the disk; at least once before the end
    assert sizes == sorted(sizes)
    assert sizes[0] < 8000
    assert sizes[-1] == file.stat().st_size
    assert digest.digest() == hashlib.sha256(file.read_bytes()).digest()


@pytest.mark.parametrize("bad", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF, 0x7F81, 0xFF81])
def test_what_is_not_finite_is_found_wherever_it_lies(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_PIECE", 7)
    fine = np.array([0x0000, 0x8000, 0x7F7F, 0xFF7F, 0x0001, 0x80FF], np.uint16)
    array = np.resize(fine, (6, 10))
    views = {
        "whole": lambda x: x,
        "columns": lambda x: x[:, 2:9],
        "turned": lambda x: x.T,
        "stack": lambda x: x.reshape(2, 3, 10),
    }
    for name, view in views.items():
        assert all_finite(view(array), "BF16"), name
        for place in ((0, 2), (5, 8), (3, 4)):
            spoilt = array.copy()
            spoilt[place] = bad
            assert not all_finite(view(spoilt), "BF16"), (name, place)
    assert all_finite(np.zeros((0, 4), np.uint16), "BF16")


def test_narrowing_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Piece by piece and in views what one value gives, NaN with every bit below the cut
    included.
    """
    values = np.array([1.0, 1.00390625, 1.01171875, -3.0e38, np.inf, 0.0, -0.0, 1e-40, np.nan], np.float32)
    values = np.concatenate([values, np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)])
    whole = narrow_bfloat16(values)
    assert whole[:4].tolist() == [0x3F80, 0x3F80, 0x3F82, 0xFF62]
    assert np.isnan(widen_bfloat16(whole[-3:])).all()
    monkeypatch.setattr(tensors, "_PIECE", 3)
    np.testing.assert_array_equal(narrow_bfloat16(values), whole)
    np.testing.assert_array_equal(narrow_bfloat16(np.stack([values, values], 1)[:, 1]), whole)
    assert narrow_bfloat16(np.float32(1).reshape(())).shape == ()


@pytest.mark.parametrize("turned", ["target", "block"])
def test_turning_in_tiles(turned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "_TILE", (4, 6))
    block = np.arange(11 * 17, dtype=np.uint16).reshape(11, 17)
    if turned == "target":
        out = np.zeros((17, 30), np.uint16)
        names._assign(out.T[3:14], block, True)
        np.testing.assert_array_equal(out[:, 3:14], block.T)
        assert not out[:, :3].any()
        assert not out[:, 14:].any()
    else:
        out = np.zeros((17, 11), np.uint16)
        names._assign(out, block.T, True)
        np.testing.assert_array_equal(out, block.T)


@pytest.mark.parametrize("threads", [1, 2])
def test_work_in_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_THREADS", threads)
    done: list[int] = []
    in_threads(done.append, range(9))
    assert sorted(done) == list(range(9))
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda n: 1 // n, [2, 1, 0, 3])

"""checkpoint/sharded.py: what any ranks write, any others read; every file that is missing, cut off
or changed is named.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from ernie_tune.checkpoint.sharded import (
    MANIFEST,
    RankFile,
    Region,
    ShardedReader,
    Slice,
    describe,
    owned,
    write_manifest,
    write_rank,
)

Array = np.ndarray[Any, Any]


def element_mask(region: Region) -> Array:
    """Which elements of the tensor a region holds, by numbering them: the definition, not the
    arithmetic under test.
    """
    numbers = np.arange(math.prod(region.whole)).reshape(region.whole)
    block = numbers[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))]
    return block.reshape(-1)[region.start : region.start + region.size]


def slice_of(name: str, array: Array, region: Region, code: str = "F32") -> Slice:
    return Slice(name, region, code, lambda: array.reshape(-1)[element_mask(region)])


def save(folder: Path, ranks: list[list[Slice]]) -> list[RankFile]:
    """What a group of ranks does, one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    held = [describe(slices) for slices in ranks]
    files = []
    for rank, slices in enumerate(ranks):
        mine = owned(held, rank)
        files.append(write_rank(folder, rank, [s for i, s in enumerate(slices) if i in mine]))
    write_manifest(folder, files)
    return files


def cuts(total: int, parts: int, dice: random.Random) -> list[tuple[int, int]]:
    """`total` in `parts` pieces of any size, zero included."""
    marks = [0, *sorted(dice.randint(0, total) for _ in range(parts - 1)), total]
    return list(itertools.pairwise(marks))


def random_layout(whole: tuple[int, ...], dice: random.Random) -> list[Region]:
    """Blocks along a random axis, each whole or in flat runs, as tensor parallelism times a sharded
    optimizer makes them.
    """
    axis = dice.randrange(len(whole)) if whole else 0
    regions = []
    for low, high in cuts(whole[axis], dice.randint(1, 3), dice) if whole else [(0, 1)]:
        offset = tuple(low if i == axis else 0 for i in range(len(whole)))
        shape = tuple(high - low if i == axis else n for i, n in enumerate(whole))
        block = Region.block(whole, offset, shape)
        regions += [block.run(a, b - a) for a, b in cuts(block.size, dice.randint(1, 3), dice)]
    return [r for r in regions if r.size]


SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (5, 6), (8, 3), (4, 3, 5), (2, 3, 2, 4)]


@pytest.mark.parametrize("seed", range(20))
def test_any_layout_reads_what_any_other_wrote(seed: int, tmp_path: Path) -> None:
    dice = random.Random(seed)
    tensors = {f"t{i}": np.random.default_rng(i).standard_normal(s).astype(np.float32) for i, s in enumerate(SHAPES)}
    ranks: list[list[Slice]] = [[] for _ in range(dice.randint(1, 5))]
    for name, array in tensors.items():
        for region in random_layout(array.shape, dice):
            for rank in dice.sample(range(len(ranks)), dice.randint(1, len(ranks))):  # replicas
                ranks[rank].append(slice_of(name, array, region))
    save(tmp_path, ranks)
    reader = ShardedReader(tmp_path)
    assert reader.shapes == {name: array.shape for name, array in tensors.items()}
    for name, array in tensors.items():
        assert reader.read(name).tobytes() == array.tobytes()
        for region in random_layout(array.shape, dice):
            assert reader.read(name, region).reshape(-1).tolist() == array.reshape(-1)[element_mask(region)].tolist()
    assert reader.damaged() == []


def test_the_splits_of_the_library() -> None:
    """Expert stacks on axis 0, columns, rows, and the flat run of a sharded optimizer over a column
    block: written out by hand.
    """
    assert list(Region.block((4, 2, 3), (2, 0, 0), (2, 2, 3)).boxes()) == [((2, 0, 0), (2, 2, 3), 0)]
    assert list(Region.block((4, 6), (0, 3), (4, 3)).boxes()) == [((0, 3), (4, 3), 0)]
    # Elements 2 to 10 of the [4, 3] block at column 3: the end of row 0, rows 1 and 2, the first of
    # row 3.
    assert list(Region.block((4, 6), (0, 3), (4, 3)).run(2, 8).boxes()) == [
        ((0, 5), (1, 1), 0),
        ((1, 3), (2, 3), 1),
        ((3, 3), (1, 1), 7),
    ]
    assert list(Region.block((4, 6)).run(7, 2).boxes()) == [((1, 1), (1, 2), 0)]
    assert list(Region.block((4, 6)).run(5, 0).boxes()) == []


def test_replicas_are_written_once_and_shared_out_by_size(tmp_path: Path) -> None:
    big, small = np.ones((64, 64), np.float32), np.ones(16, np.float32)
    replicated = {f"big{i}": big for i in range(4)} | {f"small{i}": small for i in range(8)}
    alone = slice_of("alone", big, Region.block(big.shape))
    ranks = [[slice_of(n, a, Region.block(a.shape)) for n, a in replicated.items()] for _ in range(2)]
    files = save(tmp_path, [[*ranks[0], alone], ranks[1]])
    names = [{d[0] for d in f.slices} for f in files]
    assert names[0] | names[1] == {*replicated, "alone"}
    assert not names[0] & names[1]
    payload = [sum(d[6] * 4 for d in f.slices) for f in files]
    assert abs(payload[0] - payload[1]) <= big.nbytes, "five large ones over two ranks"
    assert {len([n for n in found if n.startswith("big")]) for found in names} == {2}, (
        "the rank with `alone` writes less"
    )


def test_types_keep_their_bits_and_a_single_rank_uses_plain_names(tmp_path: Path) -> None:
    bits = np.array([[0x3F80, 0xFFC0], [1, 2]], np.uint16)
    ints = np.arange(5, dtype=np.int64)
    save(
        tmp_path, [[slice_of("b", bits, Region.block((2, 2)), "BF16"), slice_of("i", ints, Region.block((5,)), "I64")]]
    )
    reader = ShardedReader(tmp_path)
    assert (reader.dtype("b"), reader.dtype("i")) == ("BF16", "I64")
    assert reader.read("b").tolist() == bits.tolist()
    # another reader of the same file
    with safe_open(tmp_path / "rank-00000.safetensors", "np") as other:
        assert other.get_tensor("i").tolist() == [0, 1, 2, 3, 4]


def test_only_the_files_that_are_needed_are_opened(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    save(tmp_path, [[slice_of("w", array, Region.block((4, 6), (r, 0), (1, 6)))] for r in range(4)])
    reader = ShardedReader(tmp_path)
    assert reader.read("w", Region.block((4, 6), (2, 1), (1, 3))).tolist() == [[13, 14, 15]]
    assert list(reader._open) == [2]


# --- what is refused ------------------------------------------------------------------------------


def test_gaps_overlaps_and_disagreements_are_refused() -> None:
    array = np.zeros((4, 2), np.float32)
    top, bottom = Region.block((4, 2), (0, 0), (2, 2)), Region.block((4, 2), (2, 0), (2, 2))
    whole = Region.block((4, 2))
    other = slice_of("w", np.zeros((4, 2), np.float64), bottom, "F64")

    def held(*ranks: Any) -> list[Any]:
        return [describe(slices) for slices in ranks]

    owned(held([slice_of("w", array, top)], [slice_of("w", array, bottom)]), 0)
    with pytest.raises(ValueError, match=r"slices of w \(4 elements\) must make up its 8"):
        owned(held([slice_of("w", array, top)], [slice_of("w", array, top)]), 0)
    with pytest.raises(ValueError, match=r"slices of w \(12 elements\) must make up its 8"):
        owned(held([slice_of("w", array, top)], [slice_of("w", array, whole)]), 0)
    with pytest.raises(ValueError, match=r"w \(F64 \[4, 2\]\) must have one type and shape .* but is F32 \[4, 2\]"):
        owned(held([slice_of("w", array, top)], [other]), 0)
    with pytest.raises(ValueError, match=r"block \(offset \(3, 0\), shape \(2, 2\)\) must lie inside its tensor"):
        Region.block((4, 2), (3, 0), (2, 2))
    with pytest.raises(ValueError, match=r"run \(6 to 10\) must lie inside its block \(4, 2\)"):
        whole.run(6, 4)


def test_a_slice_must_be_what_it_says(tmp_path: Path) -> None:
    wrong = Slice("w", Region.block((4,)), "F32", lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"slice w \(3 elements\) must have 4, as announced"):
        write_rank(tmp_path, 0, [wrong])
    twice = slice_of("w", np.zeros(4, np.float32), Region.block((4,)))
    with pytest.raises(ValueError, match=r"slices of rank 0 \(2\) must have 1 names, one each"):
        write_rank(tmp_path, 0, [twice, twice])


def saved(folder: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    save(folder, [[slice_of("w", array, Region.block((4, 6), (r, 0), (1, 6)))] for r in range(4)])


def test_missing_and_cut_off_files_are_named(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "rank-00001.safetensors").unlink()
    file = tmp_path / "rank-00003.safetensors"
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(
        ValueError,
        match=rf"all 4 ranks, but rank-00001.safetensors is missing; rank-00003.safetensors has {size - 5} of {size} bytes",
    ):
        ShardedReader(tmp_path)


def test_changed_content_is_named_and_ranks_share_the_looking(tmp_path: Path) -> None:
    saved(tmp_path)
    file = tmp_path / "rank-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    reader = ShardedReader(tmp_path)
    assert reader.damaged() == ["rank-00002.safetensors"]
    assert [reader.damaged(rank, 2) for rank in range(2)] == [["rank-00002.safetensors"], []]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: None, r"must hold manifest.json"),
        (lambda m: "{", r"must be the JSON that a save wrote"),
        (lambda m: json.dumps({"files": []}), r"must be the JSON that a save wrote \(KeyError"),
        (lambda m: json.dumps({**m, "format": 9}), r"has format \(9\), which must be 1"),
    ],
)
def test_a_damaged_manifest_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path)
    text = change(json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8")))
    (tmp_path / MANIFEST).unlink()
    if text is not None:
        (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        ShardedReader(tmp_path)


def test_a_region_of_another_tensor_and_a_hole_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"w \[4, 6\] in .* must have the shape \[4, 8\]; it is of another model"):
        ShardedReader(tmp_path).read("w", Region.block((4, 8)))
    manifest = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    manifest["tensors"]["w"]["slices"].pop()
    (tmp_path / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(ValueError, match=r"slices of w hold 18 of 24 elements"):
        ShardedReader(tmp_path).read("w")


def test_it_loads_without_paddle() -> None:
    code = "import sys, ernie_tune.checkpoint.sharded; sys.exit('paddle' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

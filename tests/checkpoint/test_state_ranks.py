"""Checkpoints of several ranks, here threads of one process: saved under one cut and loaded under
another, whole on every rank or on none.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest
from support.thread_ranks import ThreadRanks, on_ranks

from ernie_tune.checkpoint.sharded import WHOLE, Region, Shards
from ernie_tune.checkpoint.state import find_checkpoint, load_optimizer, save_checkpoint
from ernie_tune.train.optim import build_adamw

SHAPES = {"norm.weight": (6,), "layers.0.mlp.text_experts.down_proj": (4, 3, 2), "lm_head.weight": (4, 6)}


def rows(name: str, rank: int, size: int) -> Region:
    """A split of the first axis; norms are replicated."""
    whole = SHAPES[name]
    if len(whole) == 1:
        return Region.block(whole)
    part = whole[0] // size
    return Region.block(whole, (rank * part, *(0,) * (len(whole) - 1)), (part, *whole[1:]))


def columns(name: str, rank: int, size: int) -> Region:
    whole = SHAPES[name]
    if len(whole) == 1:
        return Region.block(whole)
    part = whole[-1] // size
    return Region.block(whole, (*(0,) * (len(whole) - 1), rank * part), (*whole[:-1], part))


def cut_rows(rank: int, size: int) -> Shards:
    return Shards({name: rows(name, rank, size) for name in SHAPES})


def cut_columns(rank: int, size: int) -> Shards:
    return Shards({name: columns(name, rank, size) for name in SHAPES})


def cut_flat(rank: int, size: int) -> Shards:
    """Whole parameters, moments in flat runs of unequal length: a sharded optimizer."""
    runs = {}
    for name, whole in SHAPES.items():
        block = Region.block(whole)
        ends = [block.size * r // size + (r % 2 if r < size else 0) for r in range(size + 1)]
        runs[name] = block.run(ends[rank], ends[rank + 1] - ends[rank])
    return Shards({}, runs)


def values(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(seed)
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


def piece(array: np.ndarray[Any, Any], region: Region) -> np.ndarray[Any, Any]:
    block = array[tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))]
    return block.reshape(region.shape)


class Part:
    """One rank's parameters and the AdamW that trains them: a flat run of each where the cut says
    so, as sharding V2 does.
    """

    def __init__(self, cut: Shards, weights: dict[str, np.ndarray[Any, Any]]) -> None:
        self.cut, layer = cut, paddle.nn.Layer()
        self.named = {}
        for name, whole in SHAPES.items():
            region = cut.parameters.get(name) or Region.block(whole)
            self.named[name] = layer.create_parameter(list(region.shape))
            self.named[name].set_value(piece(weights[name], region))
        self.trained = dict(self.named)
        for name, run in cut.updated.items():
            flat = layer.create_parameter([max(run.size, 1)])
            flat.name = self.named[name].name  # Fleet's slices carry the name of their parameter
            flat.set_value(self._run(self.named[name].numpy(), run))
            self.trained[name] = flat
        self.optimizer = build_adamw(
            list(self.trained.items()), lambda _: 1.0, weight_decay=0.0, beta1=0.9, beta2=0.95, epsilon=1e-8
        )

    @staticmethod
    def _run(array: np.ndarray[Any, Any], run: Region) -> np.ndarray[Any, Any]:
        flat = array.reshape(-1)[run.start : run.start + run.size]
        return flat if run.size else np.zeros(1, np.float32)

    def step(self, gradients: dict[str, np.ndarray[Any, Any]]) -> None:
        for name, p in self.trained.items():
            region = self.cut.parameters.get(name) or Region.block(SHAPES[name])
            gradient = piece(gradients[name], region)
            run = self.cut.updated.get(name)
            (p * paddle.to_tensor(gradient if run is None else self._run(gradient, run))).sum().backward()
        self.optimizer.set_lr(0.1)
        self.optimizer.step()
        self.optimizer.clear_grad()

    def publish(self, board: dict[str, np.ndarray[Any, Any]]) -> None:
        """Put the updated values into the whole tensors."""
        for name, p in self.trained.items():
            region = self.cut.parameters.get(name) or Region.block(SHAPES[name])
            run = self.cut.updated.get(name)
            if run is None:
                board[name][tuple(slice(o, o + n) for o, n in zip(region.offset, region.shape, strict=True))] = (
                    p.numpy()
                )
            elif run.size:
                board[name].reshape(-1)[run.start : run.start + run.size] = p.numpy()


CUTS: dict[str, tuple[int, Callable[[int, int], Shards]]] = {
    "whole": (1, lambda *_: WHOLE),
    "rows over 2": (2, cut_rows),
    "rows over 4": (4, cut_rows),
    "columns over 2": (2, cut_columns),
    "moments flat over 2": (2, cut_flat),
    "moments flat over 3": (3, cut_flat),
    "replicated over 2": (2, lambda *_: WHOLE),
}


def save_under(kind: str, folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """One step under a cut, then a checkpoint; returns the trained values."""
    size, make = CUTS[kind]
    parts = [Part(make(rank, size), values(1)) for rank in range(size)]
    board = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for part in parts:
        part.step(values(2))
        part.publish(board)
    for part in parts:  # what the all-gather of a sharded optimizer does
        for name, p in part.named.items():
            p.set_value(piece(board[name], part.cut.parameters.get(name) or Region.block(SHAPES[name])))

    def save(ranks: ThreadRanks) -> Any:
        part = parts[ranks.rank]
        return save_checkpoint(
            folder, 1, lambda _: None, part.optimizer, part.named, {}, {"a": "b"}, cut=part.cut, ranks=ranks
        )

    assert {c.step for c in on_ranks(size, save)} == {1}
    return board


@pytest.mark.parametrize("after", CUTS)
@pytest.mark.parametrize("before", CUTS)
def test_any_cut_goes_on_from_any_other(before: str, after: str, tmp_path: Path) -> None:
    reference = Part(WHOLE, values(1))
    reference.step(values(2))
    saved = save_under(before, tmp_path)
    checkpoint = find_checkpoint(tmp_path, "auto")
    assert checkpoint is not None
    size, make = CUTS[after]
    # other weights: everything must be loaded
    parts = [Part(make(rank, size), values(9)) for rank in range(size)]

    def load(ranks: ThreadRanks) -> None:
        part = parts[ranks.rank]
        load_optimizer(checkpoint, part.optimizer, part.named, cut=part.cut, ranks=ranks)

    assert on_ranks(size, load) == [None] * size
    reference.step(values(3))
    board = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    for part in parts:
        for name, run in part.cut.updated.items():
            part.trained[name].set_value(part._run(part.named[name].numpy(), run))
        for name, p in part.named.items():
            region = part.cut.parameters.get(name) or Region.block(SHAPES[name])
            assert p.numpy().tobytes() == np.ascontiguousarray(piece(saved[name], region)).tobytes()
        part.step(values(3))
        part.publish(board)
    for name, p in reference.named.items():
        np.testing.assert_array_equal(board[name], p.numpy())


# --- what goes wrong on one rank goes wrong on all ------------------------------------------------


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_full_disk_on_one_rank_ends_the_save_on_all(broken: int, tmp_path: Path) -> None:
    save_under("rows over 2", tmp_path)

    def full(ranks: ThreadRanks) -> None:
        part = Part(cut_flat(ranks.rank, ranks.size), values(1))

        def save_model(folder: Path) -> None:
            if ranks.rank == broken:
                raise OSError(errno.ENOSPC, "No space left on device")

        save_checkpoint(tmp_path, 2, save_model, part.optimizer, part.named, {}, {}, cut=part.cut, ranks=ranks)

    for error in on_ranks(3, full):
        assert isinstance(error, OSError)
        assert error.errno == errno.ENOSPC
        assert f"checkpoint-2 could not be saved (rank {broken}: No space left on device)" in str(error)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_missing_file_is_named_on_every_rank(tmp_path: Path) -> None:
    save_under("rows over 2", tmp_path)
    (tmp_path / "checkpoint-1" / "optimizer" / "rank-00001.safetensors").unlink()
    checkpoint = find_checkpoint(tmp_path, "auto")
    assert checkpoint is not None

    def load(ranks: ThreadRanks) -> None:
        part = Part(WHOLE, values(1))
        load_optimizer(checkpoint, part.optimizer, part.named, ranks=ranks)

    for error in on_ranks(2, load):
        assert "rank-00001.safetensors is missing" in str(error)


def test_a_changed_file_is_named_on_every_rank(tmp_path: Path) -> None:
    save_under("rows over 4", tmp_path)
    file = tmp_path / "checkpoint-1" / "optimizer" / "rank-00003.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    checkpoint = find_checkpoint(tmp_path, "auto")
    assert checkpoint is not None

    def load(ranks: ThreadRanks) -> None:
        part = Part(WHOLE, values(1))
        load_optimizer(checkpoint, part.optimizer, part.named, ranks=ranks)

    for error in on_ranks(2, load):
        assert "must hold what was written, but rank-00003.safetensors changed since" in str(error)

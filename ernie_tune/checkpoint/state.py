"""checkpoint-N folders: everything a run needs to go on as if it had never stopped; complete or
absent; the newest found by itself.

A folder is written inside `checkpoint-N.tmp` by all ranks, synced, marked with `saved_signal_0` and
renamed by rank 0. What is trained, and the optimizer's state of it, lies in
`optimizer/` by global name, so that any layout can go on from any other (checkpoint/sharded.py).
Refuses to know: what is in the model files (the model writes and reads its own), what the
objective's and stream's states mean, how ranks talk.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.checkpoint.optimizer_state import load_optimizer_arrays, optimizer_arrays
from ernie_tune.checkpoint.sharded import (
    WHOLE,
    RankFile,
    Region,
    ShardedReader,
    Shards,
    Slice,
    describe,
    owned,
    write_manifest,
    write_rank,
)
from ernie_tune.checkpoint.tensors import cast
from ernie_tune.checkpoint.whole import FILES_FILE, files_text
from ernie_tune.config.language import say

SIGNAL = "saved_signal_0"  # written last: without it a folder is no checkpoint
OPTIMIZER = "optimizer"
# beside a parameter's moments: its own value, exact whatever form the model files take
_VALUE = "/value"
_NAME = re.compile(r"checkpoint-(\d+)")
_CODES = {paddle.float64: "F64", paddle.float32: "F32", paddle.bfloat16: "BF16", paddle.float16: "F16"}


class Ranks(Protocol):
    """The processes that do something together: those that save and load, or those that hold
    different prompts.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in their order, on every rank; nobody returns before all have
        come.
        """


class _Alone:
    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


ALONE: Ranks = _Alone()


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def read_json(self, name: str) -> dict[str, Any]:
        """One of its states. Raises ValueError naming a file that is not there or is damaged."""
        try:
            return dict(json.loads((self.path / name).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                say(
                    f"{self.path / name} must be what the save wrote ({error!r}); copy the checkpoint again, "
                    "or resume from an older one",
                    f"{self.path / name} 须与保存时一致（{error!r}）；请重新复制检查点，或从更早的继续",
                )
            ) from error


def complete_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first. Folders without the completion mark are unfinished
    and ignored.
    """
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / SIGNAL).is_file():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda c: c.step)


def find_checkpoint(output_dir: Path, resume: str) -> Checkpoint | None:
    """What to resume from: "auto" the newest in `output_dir`, "no" nothing, else that folder.
    Raises ValueError for a folder that is no complete checkpoint.
    """
    if resume == "no":
        return None
    if resume == "auto":
        found = complete_checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(resume)
    match = _NAME.fullmatch(path.name)
    if not match or not (path / SIGNAL).is_file():
        raise ValueError(
            say(
                f"resume_from_checkpoint ({resume}) must be a complete checkpoint-N folder with {SIGNAL}; "
                "set auto or no, or another folder",
                f"resume_from_checkpoint（{resume}）须为带有 {SIGNAL} 的完整 checkpoint-N 文件夹；请设 "
                "auto、no 或其他文件夹",
            )
        )
    return Checkpoint(path, int(match[1]))


def save_checkpoint(
    output_dir: Path,
    step: int,
    save_model: Callable[[Path], object],
    optimizer: paddle.optimizer.Optimizer | None,
    named: Mapping[str, Tensor],
    states: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    cut: Shards = WHOLE,
    ranks: Ranks = ALONE,
) -> Checkpoint:
    """Write checkpoint-`step`; every rank calls it. `states` become JSON files by name, `texts`
    plain files; `optimizer` None leaves out what only resuming needs. `save_model(folder)` is
    called on every rank, and only rank 0 writes.

    Whatever goes wrong on any rank (a full disk, an interrupt), the unfinished folder is removed
    and every older checkpoint is as it was; the error goes on, on every rank: an OSError with the
    name of the checkpoint and what to do.
    """
    writing = Writing(output_dir, step)
    files = {name: json.dumps(state, ensure_ascii=False, indent=1) + "\n" for name, state in states.items()}
    first = ranks.rank == 0
    try:
        stage_model(writing, save_model, ranks)
        if optimizer is not None:
            slices = prepare(optimizer, named, cut, ranks)
            written = on_all_ranks(ranks, lambda: write_rank(writing.optimizer, ranks.rank, slices), writing)
        else:
            written = []
        on_all_ranks(ranks, lambda: writing.finish(written, {**files, **texts}) if first else None, writing)
    finally:
        if first:
            writing.clear()
    return Checkpoint(writing.final, step)


def stage_model(writing: Writing, save_model: Callable[[Path], object], ranks: Ranks) -> None:
    """An empty staging folder, and the model's files in it."""
    on_all_ranks(ranks, lambda: writing.begin() if ranks.rank == 0 else None, writing)
    on_all_ranks(ranks, lambda: save_model(writing.staged), writing)


def prepare(
    optimizer: paddle.optimizer.Optimizer, named: Mapping[str, Tensor], cut: Shards, ranks: Ranks
) -> list[Slice]:
    """What this rank is to write of the trained values and the optimizer's state."""
    slices = held_slices(optimizer, named, cut)
    mine = owned(ranks.gather(describe(slices)), ranks.rank)
    return [s for i, s in enumerate(slices) if i in mine]


def could_not(writing: Writing, rank: int, size: int, fault: tuple[int | None, str]) -> OSError:
    """The error of a checkpoint that could not be saved, with what to do."""
    where = f"rank {rank}: " if size > 1 else ""
    return OSError(
        fault[0],
        f"checkpoint-{writing.step} could not be saved ({where}{fault[1]}); older checkpoints are as they were: "
        "free some space and run the same command",
        str(writing.output_dir),
    )


def on_all_ranks(ranks: Ranks, action: Callable[[], Any], writing: Writing | None = None) -> list[Any]:
    """What `action` gives on every rank. Where it raises OSError on one, every rank raises one that
    says where, so that none waits for it.
    """
    result, failed = None, None
    try:
        result = action()
    except OSError as error:
        failed = (error.errno, error.strerror or str(error))
    gathered = ranks.gather((result, failed))
    for rank, (_, fault) in enumerate(gathered):
        if fault:
            raise OSError(*fault) if writing is None else could_not(writing, rank, ranks.size, fault)
    return [value for value, _ in gathered]


def write_values(folder: Path, named: Mapping[str, Tensor], *, cut: Shards = WHOLE, ranks: Ranks = ALONE) -> None:
    """Write tensors into `folder` of a checkpoint on its way, so that any layout can read them.
    Every rank calls it, and gets the OSError of any.
    """
    slices = [_slice(name, value, cut.of(name, value)) for name, value in named.items()]
    mine = owned(ranks.gather(describe(slices)), ranks.rank)
    on_all_ranks(ranks, lambda: folder.mkdir(exist_ok=True))
    written = on_all_ranks(ranks, lambda: write_rank(folder, ranks.rank, [slices[i] for i in sorted(mine)]))
    on_all_ranks(ranks, lambda: write_manifest(folder, written) if ranks.rank == 0 else None)


def write_optimizer(
    folder: Path,
    optimizer: paddle.optimizer.Optimizer,
    named: Mapping[str, Tensor],
    *,
    cut: Shards = WHOLE,
    ranks: Ranks = ALONE,
) -> None:
    """Write the values that a second optimizer moves and its state into `folder` of a checkpoint on
    its way; `load_optimizer` with that folder as the checkpoint puts them back under any layout.
    Every rank calls it, and gets the OSError of any.
    """
    slices = prepare(optimizer, named, cut, ranks)
    place = folder / OPTIMIZER
    on_all_ranks(ranks, lambda: place.mkdir(parents=True, exist_ok=True))
    written = on_all_ranks(ranks, lambda: write_rank(place, ranks.rank, slices))
    on_all_ranks(ranks, lambda: write_manifest(place, written) if ranks.rank == 0 else None)


def read_values(folder: Path, named: Mapping[str, Tensor], *, cut: Shards = WHOLE) -> None:
    """Put what `write_values` wrote back into tensors of the same names, under any layout."""
    reader = ShardedReader(folder)
    for name, value in named.items():
        value.set_value(cast(reader.read(name, cut.of(name, value)), reader.dtype(name), _CODES[value.dtype]))


class Writing:
    """A checkpoint on its way: everything goes into `staged`, which appears under its name with
    everything in it.
    """

    def __init__(self, output_dir: Path, step: int) -> None:
        self.output_dir, self.step = output_dir, step
        self.final = output_dir / f"checkpoint-{step}"
        self.scratch = output_dir / f"checkpoint-{step}.tmp"
        # one level down, so that what writers put beside their folder is inside too
        self.staged = self.scratch / "new"
        self.optimizer = self.staged / OPTIMIZER

    def begin(self) -> None:
        """An empty folder to write into."""
        self.clear()
        self.optimizer.mkdir(parents=True)

    def finish(self, written: list[RankFile], files: Mapping[str, str]) -> None:
        """Rank 0, after all ranks have written: manifest, text files, completion mark, and the
        name.
        """
        if written:
            write_manifest(self.optimizer, written)
            _sync(self.optimizer)
        else:
            self.optimizer.rmdir()
        for name, text in files.items():
            _write(self.staged / name, text)
        _write(self.staged / FILES_FILE, files_text(self.staged))
        _write(self.staged / SIGNAL, "1")
        _sync(self.staged)
        if self.final.exists():
            os.rename(self.final, self.scratch / "old")
        os.rename(self.staged, self.final)
        _sync(self.output_dir)

    def clear(self) -> None:
        shutil.rmtree(self.scratch, ignore_errors=True)


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints after `step` to checkpoint-N.old: a run that goes on from `step` leaves
    their course, and must not resume from them. Returns the new names; an older .old of that name
    is deleted.
    """
    moved = []
    for checkpoint in complete_checkpoints(output_dir):
        if checkpoint.step > step:
            aside = checkpoint.path.with_name(f"{checkpoint.path.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint.path, aside)
            moved.append(aside)
    return moved


def rotate(output_dir: Path, limit: int | None, keep: Path | None = None) -> list[Path]:
    """Delete the oldest checkpoints beyond `limit` (None: keep all), never `keep` (the best one)
    nor the newest; returns what was deleted.
    """
    if limit is None:
        return []
    found = complete_checkpoints(output_dir)
    candidates = [c.path for c in found[:-1] if keep is None or c.path != keep]
    spare = max(0, len(found) - limit)
    removed = candidates[:spare]
    for path in removed:
        # so that a deletion cut short leaves nothing that looks complete
        doomed = path.with_name(f"{path.name}.tmp")
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    return removed


def remove_unfinished(output_dir: Path) -> list[Path]:
    """Delete what a save or a deletion that was killed has left, before a run starts; returns what
    was deleted.
    """
    found = [p for p in output_dir.glob("checkpoint-*.tmp") if p.is_dir() and _NAME.fullmatch(p.stem)]
    for path in found:
        shutil.rmtree(path)
    return found


def load_optimizer(
    checkpoint: Checkpoint,
    optimizer: paddle.optimizer.Optimizer,
    named: Mapping[str, Tensor],
    *,
    cut: Shards = WHOLE,
    ranks: Ranks = ALONE,
) -> None:
    """Put the saved moments, and the trained values saved with them, back, under whatever layout
    they were saved. Raises ValueError as `load_values` does.
    """
    reader = load_values(checkpoint, named, cut=cut, ranks=ranks)
    arrays = {}
    for key, whole in reader.shapes.items():
        name, slot = key.rsplit("/", 1)
        if key.endswith(_VALUE) or name not in named or not cut.of_state(name, named[name]).size:
            continue
        region = Region.block(whole) if _is_scalar(slot) else cut.of_state(name, named[name])
        arrays[key] = paddle.to_tensor(np.ascontiguousarray(reader.read(key, region)))
    load_optimizer_arrays(optimizer, named, arrays)


def load_values(
    checkpoint: Checkpoint, named: Mapping[str, Tensor], *, cut: Shards = WHOLE, ranks: Ranks = ALONE
) -> ShardedReader:
    """Put the trained values alone back, bit for bit. Every rank calls it; the ranks share the
    checking of the files.

    Raises ValueError, on every rank, when the checkpoint has none, or not those of just these
    parameters; and for files that are missing, cut off or changed, with their names.
    """
    folder = checkpoint.path / OPTIMIZER
    if not folder.is_dir():
        raise ValueError(
            say(
                f"{checkpoint.path} must hold {OPTIMIZER}/ to resume, but was saved with save_only_model; "
                "to start anew from its weights set resume_only_model: true, resume_from_checkpoint: "
                f"{checkpoint.path} and another output_dir",
                f"{checkpoint.path} 以 save_only_model 保存，没有 {OPTIMIZER}"
                "/，无法继续；要以其权重重新开始，请设 resume_only_model: true、resume_from_checkpoint: "
                f"{checkpoint.path} 和另一个 output_dir",
            )
        )
    reader = ShardedReader(folder)
    if damaged := [name for names in ranks.gather(reader.damaged(ranks.rank, ranks.size)) for name in names]:
        raise ValueError(
            say(
                f"{folder} must hold what was written, but {', '.join(damaged)} changed since: copy it "
                "again, or resume from an older checkpoint",
                f"{folder} 须与写出时一致，但 {', '.join(damaged)} 已改变：请重新复制，或从更早的检查点继续",
            )
        )
    mine = {name: cut.of(name, p).whole for name, p in named.items()}
    wanted = {name: shape for part in ranks.gather(mine) for name, shape in part.items()}
    saved = {name.removesuffix(_VALUE): shape for name, shape in reader.shapes.items() if name.endswith(_VALUE)}
    differ = sorted(name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name))
    if differ:
        raise ValueError(
            say(
                f"parameters that {checkpoint.path} holds ({len(saved)}) must be those that this run "
                f"trains ({len(wanted)}), in the same shapes; {len(differ)} differ, first {differ[0]}: "
                "resume with the settings of the saved run, or choose another output_dir",
                f"{checkpoint.path} 中的参数（{len(saved)} 个）须与本次训练的参数（{len(wanted)} "
                f"个）及形状一致；有 {len(differ)} 个不同，首个为 {differ[0]}"
                "：请用保存时的设置继续，或换一个 output_dir",
            )
        )
    for name, parameter in named.items():
        array = reader.read(name + _VALUE, cut.of(name, parameter))
        parameter.set_value(cast(array, reader.dtype(name + _VALUE), _CODES[parameter.dtype]))
    return reader


def held_slices(optimizer: paddle.optimizer.Optimizer, named: Mapping[str, Tensor], cut: Shards = WHOLE) -> list[Slice]:
    """What this rank holds of the trained values and of the optimizer's state, by "<canonical
    name>/<slot>".
    """
    slices = [_slice(name + _VALUE, p, cut.of(name, p)) for name, p in named.items()]
    for key, tensor in optimizer_arrays(optimizer, named).items():
        name, slot = key.rsplit("/", 1)
        region = Region.block(tuple(tensor.shape)) if _is_scalar(slot) else cut.of_state(name, named[name])
        slices += [_slice(key, tensor, region)] if region.size else []
    return slices


def _is_scalar(slot: str) -> bool:
    """Whether it is a power of beta, one number for the whole parameter."""
    return "pow_acc" in slot


def _slice(key: str, tensor: Tensor, region: Region) -> Slice:
    # A flat piece of a sharded optimizer may be padded at its end.
    return Slice(key, region, _CODES[tensor.dtype], lambda: tensor.numpy().reshape(-1)[: region.size])


def write_json(path: Path, state: Any) -> None:
    """One state of a checkpoint that is being written."""
    _write(path, json.dumps(state, ensure_ascii=False, indent=1) + "\n")


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

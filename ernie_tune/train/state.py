"""checkpoint-N folders: everything a run needs to go on as if it had never stopped; complete or absent; the newest found by itself.

A folder is written inside `checkpoint-N.tmp`, synced, marked with `saved_signal_0` and renamed (ecosystem.md 4.5). Refuses to know: what is in the model
files (the model writes and reads its own), what the objective's and stream's states mean.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.checkpoint.tensors import TensorReader
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.train.optim import load_optimizer_arrays, optimizer_arrays

SIGNAL = "saved_signal_0"  # written last: without it a folder is no checkpoint
OPTIMIZER = "optimizer"
_VALUE = "/value"  # beside a parameter's moments: its own value, exact whatever form the model files take
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int

    def read_json(self, name: str) -> dict[str, Any]:
        return json.loads((self.path / name).read_text(encoding="utf-8"))


def complete_checkpoints(output_dir: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first. Folders without the completion mark are unfinished and ignored."""
    found = []
    for path in output_dir.iterdir() if output_dir.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and (path / SIGNAL).is_file():
            found.append(Checkpoint(path, int(match[1])))
    return sorted(found, key=lambda c: c.step)


def find_checkpoint(output_dir: Path, resume: str) -> Checkpoint | None:
    """What to resume from: "auto" the newest in `output_dir`, "no" nothing, else that folder. Raises ValueError for a folder that is no complete checkpoint."""
    if resume == "no":
        return None
    if resume == "auto":
        found = complete_checkpoints(output_dir)
        return found[-1] if found else None
    path = Path(resume)
    match = _NAME.fullmatch(path.name)
    if not match or not (path / SIGNAL).is_file():
        raise ValueError(
            f"resume_from_checkpoint ({resume}) must be a complete checkpoint-N folder with {SIGNAL}; set auto or no, or another folder"
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
) -> Checkpoint:
    """Write checkpoint-`step`. `states` become JSON files by name, `texts` plain files; `optimizer` None leaves out what only resuming needs.

    Whatever goes wrong (a full disk, an interrupt), the unfinished folder is removed and every older checkpoint is as it was; the error goes on,
    an OSError with the name of the checkpoint and what to do.
    """
    final = output_dir / f"checkpoint-{step}"
    scratch = output_dir / f"checkpoint-{step}.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    staged = scratch / "new"  # one level down, so that what writers put beside their folder is inside too
    try:
        staged.mkdir(parents=True)
        save_model(staged)
        if optimizer is not None:
            _save_optimizer(staged, optimizer, named)
        for name, state in states.items():
            _write(staged / name, json.dumps(state, ensure_ascii=False, indent=1) + "\n")
        for name, text in texts.items():
            _write(staged / name, text)
        _write(staged / SIGNAL, "1")
        _sync(staged)
        if final.exists():
            os.rename(final, scratch / "old")
        os.rename(staged, final)
        _sync(output_dir)
    except OSError as error:
        raise OSError(
            error.errno,
            f"checkpoint-{step} could not be saved ({error.strerror or error}); older checkpoints are as they were: free some space and run the same command",
            str(output_dir),
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Checkpoint(final, step)


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename checkpoints after `step` to checkpoint-N.old: a run that goes on from `step` leaves their course, and must not resume from them. Returns
    the new names; an older .old of that name is deleted."""
    moved = []
    for checkpoint in complete_checkpoints(output_dir):
        if checkpoint.step > step:
            aside = checkpoint.path.with_name(f"{checkpoint.path.name}.old")
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(checkpoint.path, aside)
            moved.append(aside)
    return moved


def rotate(output_dir: Path, limit: int | None, keep: Path | None = None) -> list[Path]:
    """Delete the oldest checkpoints beyond `limit` (None: keep all), never `keep` (the best one) nor the newest; returns what was deleted."""
    if limit is None:
        return []
    found = complete_checkpoints(output_dir)
    candidates = [c.path for c in found[:-1] if keep is None or c.path != keep]
    spare = max(0, len(found) - limit)
    removed = candidates[:spare]
    for path in removed:
        doomed = path.with_name(f"{path.name}.tmp")  # so that a deletion cut short leaves nothing that looks complete
        os.rename(path, doomed)
        shutil.rmtree(doomed)
    return removed


def remove_unfinished(output_dir: Path) -> list[Path]:
    """Delete what a save or a deletion that was killed has left, before a run starts; returns what was deleted."""
    found = [p for p in output_dir.glob("checkpoint-*.tmp") if p.is_dir() and _NAME.fullmatch(p.stem)]
    for path in found:
        shutil.rmtree(path)
    return found


def load_optimizer(checkpoint: Checkpoint, optimizer: paddle.optimizer.Optimizer, named: Mapping[str, Tensor]) -> None:
    """Put the saved moments, and the trained values saved with them, back. Raises ValueError as `load_values` does."""
    load_values(checkpoint, named)
    reader = TensorReader(checkpoint.path / OPTIMIZER)
    moments = [name for name in reader.entries if not name.endswith(_VALUE)]
    load_optimizer_arrays(optimizer, named, {name: _tensor(reader, name) for name in moments})


def load_values(checkpoint: Checkpoint, named: Mapping[str, Tensor]) -> None:
    """Put the trained values alone back, bit for bit. Raises ValueError when the checkpoint has none, or not those of just these parameters."""
    folder = checkpoint.path / OPTIMIZER
    if not folder.is_dir():
        raise ValueError(
            f"{checkpoint.path} must hold {OPTIMIZER}/ to resume, but was saved with save_only_model; to start anew from its weights set "
            f"resume_only_model: true, resume_from_checkpoint: {checkpoint.path} and another output_dir"
        )
    reader = TensorReader(folder)
    saved = {name.removesuffix(_VALUE): tuple(e.shape) for name, e in reader.entries.items() if name.endswith(_VALUE)}
    wanted = {name: tuple(p.shape) for name, p in named.items()}
    differ = sorted(name for name in {**saved, **wanted} if saved.get(name) != wanted.get(name))
    if differ:
        raise ValueError(
            f"parameters that {checkpoint.path} holds ({len(saved)}) must be those that this run trains ({len(wanted)}), in the same shapes; "
            f"{len(differ)} differ, first {differ[0]}: resume with the settings of the saved run, or choose another output_dir"
        )
    for name, parameter in named.items():
        parameter.set_value(_tensor(reader, name + _VALUE).astype(parameter.dtype))


def _tensor(reader: TensorReader, name: str) -> Tensor:
    return paddle.to_tensor(np.ascontiguousarray(reader.read(name)))


def _save_optimizer(folder: Path, optimizer: paddle.optimizer.Optimizer, named: Mapping[str, Tensor]) -> None:
    arrays = {**optimizer_arrays(optimizer, named), **{name + _VALUE: p for name, p in named.items()}}
    entries = {name: (tuple(t.shape), "F32") for name, t in arrays.items()}
    write_folder(
        folder / OPTIMIZER,
        entries,
        lambda name: np.ascontiguousarray(arrays[name].astype("float32").numpy()),
        metadata={"format": "np"},
    )


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

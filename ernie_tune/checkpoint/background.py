"""A checkpoint that is written while training goes on: complete or absent like any other, and
visible when all ranks have written their part.

What is to be written is copied first (on a CPU a tensor's array is its own memory), then each rank
has a thread. Threads share no collectives, which would cross those of the training: a rank leaves a
note beside the staged folder, and rank 0 waits for all notes. Errors come out in `wait`.
Refuses to know: what is saved, when.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.checkpoint.sharded import WHOLE, RankFile, Shards, Slice, write_rank
from ernie_tune.checkpoint.state import ALONE, Checkpoint, Ranks, Writing, could_not, prepare, stage_model
from ernie_tune.config.language import say

# A rank that has died leaves no note; those who watch over ranks know earlier.
PATIENCE_SECONDS = 600.0


class Pending:
    """One checkpoint on its way. `wait` is a collective: every rank calls it, before the next save
    and at the end.
    """

    def __init__(self, writing: Writing, ranks: Ranks, slices: list[Slice], files: Mapping[str, str]) -> None:
        self.writing, self.ranks, self.slices, self.files = writing, ranks, slices, files
        self.error: tuple[int | None, str] | None = None
        # not a daemon: a run that ends with an error still finishes it
        self.thread = threading.Thread(target=self._work, name=f"checkpoint-{writing.step}")
        self.thread.start()

    def _note(self, rank: int) -> Path:
        return self.writing.scratch / f"rank-{rank:05d}.note"

    def _work(self) -> None:
        try:
            self._leave({"written": write_rank(self.writing.optimizer, self.ranks.rank, self.slices).as_json()})
        except OSError as error:
            self._failed(error)
            self._leave({"failed": error.strerror or str(error)})
        self.slices = []
        if self.ranks.rank == 0:
            try:
                self.writing.finish(self._others(), self.files)
            except OSError as error:
                self._failed(error)
            finally:
                self.writing.clear()

    def _failed(self, error: OSError) -> None:
        self.error = self.error or (error.errno, error.strerror or str(error))

    def _leave(self, note: Mapping[str, Any]) -> None:
        path = self._note(self.ranks.rank)
        staged = path.with_suffix(".tmp")
        try:
            staged.write_text(json.dumps(note), encoding="utf-8")
            staged.replace(path)
        except OSError as error:
            self._failed(error)

    def _others(self) -> list[RankFile]:
        """What all ranks have written, when all have tried. Raises OSError where one could not, or
        does not come.
        """
        last = time.monotonic() + PATIENCE_SECONDS
        for rank in range(self.ranks.size):
            while not self._note(rank).is_file():
                if time.monotonic() > last:
                    raise OSError(
                        None,
                        say(
                            f"rank {rank} has not written its part for {PATIENCE_SECONDS:g} s",
                            f"进程 {rank} 已有 {PATIENCE_SECONDS:g} 秒没有写出它的部分",
                        ),
                    )
                time.sleep(0.02)
        notes = [json.loads(self._note(rank).read_text(encoding="utf-8")) for rank in range(self.ranks.size)]
        for rank, note in enumerate(notes):
            if "failed" in note:
                raise OSError(None, f"rank {rank}: {note['failed']}")
        return [RankFile(**note["written"]) for note in notes]

    def wait(self) -> Checkpoint:
        """The checkpoint, complete. Raises OSError, on every rank, where it could not be saved."""
        self.thread.join()
        for rank, fault in enumerate(self.ranks.gather(self.error)):
            if fault:
                raise could_not(self.writing, rank, self.ranks.size, fault)
        return Checkpoint(self.writing.final, self.writing.step)


def save_in_background(
    output_dir: Path,
    step: int,
    save_model: Callable[[Path], object],
    optimizer: paddle.optimizer.Optimizer,
    named: Mapping[str, Tensor],
    states: Mapping[str, Any],
    texts: Mapping[str, str],
    *,
    cut: Shards = WHOLE,
    ranks: Ranks = ALONE,
) -> Pending:
    """As `save_checkpoint`, but what only resuming needs is written by threads; the model's files
    are there when this returns. Raises OSError as that does, for what happens before the threads
    start.
    """
    writing = Writing(output_dir, step)
    stage_model(writing, save_model, ranks)
    mine = [Slice(s.name, s.region, s.dtype, _copied(s)) for s in prepare(optimizer, named, cut, ranks)]
    files = {name: json.dumps(state, ensure_ascii=False, indent=1) + "\n" for name, state in states.items()}
    return Pending(writing, ranks, mine, {**files, **texts})


def _copied(s: Slice) -> Callable[[], np.ndarray]:
    array = np.array(s.read(), copy=True)
    return lambda: array

"""One rank of runs that learn from sampled answers: one to its end, then one in which a rank is
killed while it samples; or what is left of that one.

usage: killed_worker.py FOLDER [again]
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import online_worker
from support.online_runs import even, sampled_run

from ernie_tune.generate.batch import Completion, Prompt
from ernie_tune.machine import place
from ernie_tune.trainers.online import RLVRTrainer, SampledAnswers

STEPS, DIES_IN = 6, 2  # of three rounds the last; what was saved is in the middle of the second


class Dying(SampledAnswers):
    """Its process is killed while it samples a round, by the signal that cannot be caught."""

    def sample(self, prompts: Sequence[Prompt]) -> Mapping[int, Sequence[Completion]]:
        if self.rollouts.round == DIES_IN and os.environ.get("PADDLE_TRAINER_ID") == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().sample(prompts)


def train(folder: Path, die: bool = False) -> Path:
    """A run on as many ranks as there are, or what is left of it to do."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = os.environ.get("PADDLE_TRAINER_ID", "0")
    data = online_worker.write_rows(folder / f"rows_{rank}.jsonl", online_worker.rows("killed"))
    saved = {"save_steps": 3, "save_strategy": "steps"}
    more = {"model_name_or_path": "tiny-a", "max_steps": STEPS, "num_mini_batches": 2, **saved}
    made = RLVRTrainer(args=sampled_run(data, folder / "run", **more), reward_funcs=even)
    if die:
        made.method.__class__ = Dying
    made.train()
    return folder / "run"


def main() -> None:
    from paddle.distributed.fleet.base import topology

    folder, again = Path(sys.argv[1]), sys.argv[2:] == ["again"]
    if not again:
        watch = place._watch
        place._watch = lambda world: None  # its address is the launcher's, for one run: the other
        train(folder / "whole")
        place._watch = watch
        topology._HYBRID_PARALLEL_GROUP = None  # Fleet lays out a process once; here a second time
    train(folder / "part", die=not again)


if __name__ == "__main__":
    main()

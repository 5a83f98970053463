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

from ernie_tune.config.training_arguments import TrainingArguments
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
    values = {
        "model_name_or_path": "tiny-a",
        "train_dataset_path": (data,),
        "output_dir": str(folder / "run"),
        "num_generations": 3,
        "per_device_train_batch_size": 6,
        "max_completion_length": 3,
        "max_prompt_len": 64,
        "max_seq_len": 128,
        "max_steps": STEPS,
        "num_mini_batches": 2,
        "learning_rate": 1e-3,
        "save_steps": 3,
        "save_strategy": "steps",
        "logging_steps": 1,
        "plot_loss": False,
        "disable_tqdm": True,
    }
    args = TrainingArguments(stage="RLVR", fine_tuning="Full", **values)
    made = RLVRTrainer(args=args, reward_funcs=online_worker.even)
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

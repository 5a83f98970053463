"""`SFTTrainer`: supervised fine-tuning on dialogues.

Refuses to know: everything that other methods do too (base.py), the arithmetic of the loss (objectives).
"""

from __future__ import annotations

from ernie_tune.train.sft import SFTObjective, TaskBalance
from ernie_tune.trainers import assemble
from ernie_tune.trainers.base import Trainer


class SFTTrainer(Trainer):
    """Fine-tune a model on dialogues (methods.md 4.1). Arguments and errors as `Trainer`'s."""

    stages = ("SFT", "PT")
    signals = ("sft",)

    def objective(self, total_steps: int, steps_per_pass: float) -> SFTObjective:
        t = self.args.train
        if t.balance != "static":
            self._check_tasks()
        # Once a pass over the data, but in a short run often enough to matter.
        balance = TaskBalance(t.balance, period_steps=max(1, min(round(steps_per_pass), total_steps // 10)))
        return SFTObjective(t.loss_norm, balance)

    def _check_tasks(self) -> None:
        """Refuse to balance tasks that the rows do not name."""
        mixture = self.stream.shard.mixture
        if not any(mixture[i].domain for i in range(min(assemble.TASK_ROWS, len(mixture)))):
            raise ValueError(
                f"balance ({self.args.train.balance}) must have rows that name their task, but none of the first {assemble.TASK_ROWS} has a domain; "
                "add domain to the rows, or set balance: static"
            )


PaddleTrainer = SFTTrainer  # the founding article's name

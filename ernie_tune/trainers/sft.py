"""Supervised fine-tuning on dialogues: the method, and `SFTTrainer`, which runs it.

Refuses to know: everything that other methods do too (method.py, run.py), the arithmetic of the
loss (objectives).
"""

from __future__ import annotations

from collections.abc import Sequence

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.config.stages import STAGES
from ernie_tune.data.batching import BatchStream
from ernie_tune.data.mixing import Mixture
from ernie_tune.data.processor import Processor
from ernie_tune.data.survey import Survey
from ernie_tune.data.texts import TextPieces, cut_note
from ernie_tune.machine.place import Place
from ernie_tune.train.sft import SFTObjective, TaskBalance
from ernie_tune.trainers import assemble
from ernie_tune.trainers.base import Trainer
from ernie_tune.trainers.method import Method, Rows


class SupervisedTuning(Method):
    """Weighted likelihood of the answers in dialogues, or of texts."""

    stages: tuple[str, ...] = ("SFT", "PT")
    signals: tuple[str, ...] = ("sft",)

    def __init__(self, config: RunConfig, place: Place, processor: Processor) -> None:
        self.signals = STAGES[config.model.stage].signals
        self._cut: list[TextPieces] = []
        super().__init__(config, place, processor)

    def held_rows(self, held: Rows) -> Rows:
        """The rows, texts that are too long in pieces."""
        d = self.config.data
        # the other strategies say what else becomes of a row that is too long
        whole = "text" not in self.signals or d.truncation_strategy != "delete"
        return held if whole or not len(held) else TextPieces(held, self.processor, d.max_seq_len)

    def more_rows(self, sets: Sequence[Rows]) -> Sequence[Rows]:
        """The rows, texts that are too long in pieces. Raises ValueError where tasks are to be
        balanced that the rows do not name.
        """
        sets = [self.held_rows(rows) for rows in sets]
        self._cut = [rows for rows in sets if isinstance(rows, TextPieces)]
        balance, d = self.config.train.balance, self.config.data
        if balance != "static":
            mixture = Mixture(sets, d.train_dataset_prob or None, d.mix_strategy, seed=assemble.data_seed(self.config))
            if not any(mixture[i].domain for i in range(min(assemble.TASK_ROWS, len(mixture)))):
                raise ValueError(
                    say(
                        f"balance ({balance}) must have rows that name their task, but none of the first "
                        f"{assemble.TASK_ROWS} has a domain; add domain to the rows, or set balance: static",
                        f"balance（{balance}）要求数据标明任务，但前 {assemble.TASK_ROWS} 行都没有 "
                        "domain；请给数据加 domain，或设 balance: static",
                    )
                )
        return sets

    def surveyed(self, stream: BatchStream) -> Survey:
        found = super().surveyed(stream)
        found.said += cut_note(self._cut)
        return found

    def objective(self, total_steps: int, steps_per_pass: float) -> SFTObjective:
        t = self.config.train
        # Once a pass over the data, but in a short run often enough to matter.
        balance = TaskBalance(t.balance, period_steps=max(1, min(round(steps_per_pass), total_steps // 10)))
        return SFTObjective(t.loss_norm, balance)


class SFTTrainer(Trainer):
    """Fine-tune a model on dialogues. Arguments and errors as `Trainer`'s."""

    method_class = SupervisedTuning


class Pretraining(SupervisedTuning):
    """Weighted likelihood of whole texts, and of the answers in dialogues."""

    stages = ("PT",)
    signals = STAGES["PT"].signals


class PretrainTrainer(SFTTrainer):
    """Go on with pre-training on texts. Arguments and errors as `Trainer`'s."""

    method_class = Pretraining


PaddleTrainer = SFTTrainer  # the founding article's name

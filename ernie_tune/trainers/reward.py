"""`RewardTrainer`: a model that gives a finished answer one number, learned from comparisons, and `RewardModel`: it at work.

Refuses to know: the loss, the head, how rewards are measured (train/reward_model.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.loader import ARGS_FILE, load_config
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.units import UnitEncoder
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.objectives.reward import expected_rating
from ernie_tune.peft.model import PeftModel
from ernie_tune.report.log import RunLog
from ernie_tune.train.evaluate import Question
from ernie_tune.train.preference import Margins
from ernie_tune.train.reward_model import (
    HEAD_FOLDER,
    RewardObjective,
    attach_head,
    head_values,
    load_head,
    reward_evaluation,
    save_head,
    score_records,
)
from ernie_tune.train.state import Checkpoint
from ernie_tune.trainers.assemble import load_base
from ernie_tune.trainers.measure import Measure
from ernie_tune.trainers.preference import PreferenceTrainer, ancestry


class RewardTrainer(PreferenceTrainer):
    """Train a scalar head, and the model or an adapter under it, on pairs, rankings and ratings (methods.md 4.5). All answers of a ranking are in one
    micro-batch. The head lies in reward_head/ beside the model's or adapter's files. Arguments and errors as `Trainer`'s."""

    stages = ("RM",)
    signals = ("pair", "ranking", "rating")

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        if self.args.preference.loss_type != ("auto",):
            raise ValueError(
                f"loss_type ({','.join(self.args.preference.loss_type)}) must be auto at stage RM; remove it"
            )
        s = self.args.signals
        attach_head(self.model, self.args.train.seed, s.rating_levels if s.rating_loss == "ordinal" else 0)
        for folder in (self.args.lora.lora_path, self.args.model.model_name_or_path):
            if folder and (Path(folder) / HEAD_FOLDER).is_dir():  # a reward model that is trained further
                load_head(self.model, folder)
                break

    def objective(self, total_steps: int, steps_per_pass: float) -> RewardObjective:
        p, s = self.args.preference, self.args.signals
        margins = Margins(p.offset_alpha, p.offset_type)
        return RewardObjective(s.center_rewards_coefficient, margins, s.edge_weight, s.rating_loss, s.rating_levels)

    def _reference_mode(self) -> str:
        return "none"

    def _before_training(self, dry_run: bool) -> None:
        """Rewards compare with no reference."""

    def _ready(self, window: Sequence[Any]) -> Sequence[Any]:
        return window

    def _after_start(self, log: RunLog, resumed: bool) -> None:
        log.info(f"reward head on {ancestry(self.args)[1]}")
        self._tell_made(log)

    def _save_weights(self, folder: Path) -> None:
        super()._save_weights(folder)
        values = next(v for v in self.place.gather(head_values(self.model)) if v is not None)
        if self.place.is_writer:
            save_head(values, folder)

    def _save_checkpoint_files(self, folder: Path) -> None:
        super(PreferenceTrainer, self)._save_checkpoint_files(folder)

    def _more_states(self) -> dict[str, Any]:
        return {}

    def _resume(self, checkpoint: Checkpoint) -> None:
        super(PreferenceTrainer, self)._resume(checkpoint)

    def _take_weights(self, checkpoint: Checkpoint) -> None:
        super()._take_weights(checkpoint)
        load_head(self.model, checkpoint.path)

    def _measure(self) -> Measure:
        plain = super(PreferenceTrainer, self)._measure()
        return _RewardMeasure(
            plain.config, plain.model, plain.processor, plain.encoder, plain.rows, plain.output_dir, trainer=self
        )

    def score(self, records: Sequence[Record]) -> list[list[float] | None]:
        """The reward of each candidate of each record; None for one that does not fit."""
        return score_records(self.placed.forward, records, self.encoder, self.args.eval.per_device_eval_batch_size)


class _RewardMeasure(Measure):
    """Rewards of held-out answers; nothing is generated."""

    def __init__(self, *args: Any, trainer: RewardTrainer) -> None:
        super().__init__(*args)
        self.trainer = trainer

    def _loss(self, rows: Sequence[Record], done: Callable[[int], object] = lambda count: None) -> dict[str, float]:
        t = self.trainer
        every = (rows[i] for i in range(len(rows)))
        size = max(1, self.config.eval.per_device_eval_batch_size)
        return reward_evaluation(self.model, every, t.encoder, size, t.objective(1, 1.0), done)

    def _questions(self, limit: int) -> list[Question]:
        return []


class RewardModel:
    """A trained reward model: `RewardModel.from_pretrained(folder).score(load_dataset("rows.jsonl"))`."""

    def __init__(self, model: ErnieModel, processor: Processor, max_tokens: int = 8192, rows: int = 8) -> None:
        self.model, self.rows = model, rows
        self.encoder = UnitEncoder(processor, max_tokens, max_tokens - 1, "delete")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], rows: int = 8) -> RewardModel:
        """Read what `RewardTrainer` left in its output_dir: a whole model, or an adapter whose base its arguments name. Raises ValueError or OSError for a
        folder that holds no reward model."""
        file = Path(folder) / ARGS_FILE
        if not file.is_file():
            raise ValueError(f"{folder} must hold {ARGS_FILE}; name the output_dir of `ernie-tune reward`")
        config = load_config(file).config
        whole = (Path(folder) / "config.json").is_file()
        model: ErnieModel = (
            AutoModel.from_pretrained(folder) if whole else PeftModel.from_pretrained(load_base(config), folder)
        )
        load_head(model, folder)
        return cls(model, Processor.from_pretrained(folder), config.data.max_seq_len, rows)

    def score(self, records: Sequence[Record]) -> list[list[float] | None]:
        """The reward of each candidate of each record, higher is better; None for one that does not fit."""
        return score_records(self.model, records, self.encoder, self.rows)

    def ratings(self, rewards: Sequence[float]) -> list[float] | None:
        """The ratings to expect of answers with these rewards, from 1 to the number of levels; None for a model that was not trained on levels."""
        cuts = attach_head(self.model).cuts()
        if cuts is None:
            return None
        found: list[float] = (1 + len(cuts) * expected_rating(np.array(rewards), cuts.numpy())).tolist()
        return found

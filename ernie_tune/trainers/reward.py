"""`RewardTrainer`: a model that gives a finished answer one number, learned from comparisons, and
`RewardModel`: it at work.

Refuses to know: the loss, the head, how rewards are measured (evaluate/reward_model.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.language import say
from ernie_tune.config.loader import ARGS_FILE, load_config
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.units import UnitEncoder
from ernie_tune.evaluate.answers import Question
from ernie_tune.evaluate.measure import Measure
from ernie_tune.evaluate.reward_model import reward_evaluation, score_records
from ernie_tune.machine.placed import Placed
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.objectives.reward import expected_rating
from ernie_tune.peft.model import PeftModel
from ernie_tune.report.log import RunLog
from ernie_tune.train.preference import Margins
from ernie_tune.train.reward_model import HEAD_FOLDER, RewardObjective, attach_head, head_values, load_head, save_head
from ernie_tune.trainers.assemble import load_base
from ernie_tune.trainers.base import Trainer
from ernie_tune.trainers.judged import SpoiltPictures, ancestry, check_shared_prompts, unit_encoder
from ernie_tune.trainers.method import Method, Rows, RowSets, Stateful


class RewardMethod(Method):
    """A scalar head, and the model or an adapter under it, on pairs, rankings and ratings."""

    stages = ("RM",)
    signals = ("pair", "ranking", "rating")
    encoder: UnitEncoder

    def make_encoder(self) -> UnitEncoder:
        if self.config.preference.loss_type != ("auto",):
            raise ValueError(
                say(
                    f"loss_type ({','.join(self.config.preference.loss_type)}) must be auto at stage RM; remove it",
                    f"RM 阶段 loss_type（{','.join(self.config.preference.loss_type)}）须为 auto；请去掉",
                )
            )
        self.pictures = SpoiltPictures(self.config)
        return unit_encoder(self.config, self.processor, self.signals)

    def more_rows(self, sets: Sequence[Rows]) -> Sequence[Rows]:
        return self.pictures.beside(sets, learns_pairs=True)

    def attach(self, model: ErnieModel) -> None:
        c, s = self.config, self.config.signals
        check_shared_prompts(model, self.encoder.share)
        attach_head(model, c.train.seed, s.rating_levels if s.rating_loss == "ordinal" else 0)
        for folder in (c.lora.lora_path, c.model.model_name_or_path):
            # a reward model that is trained further
            if folder and (Path(folder) / HEAD_FOLDER).is_dir():
                load_head(model, folder)
                break

    def objective(self, total_steps: int, steps_per_pass: float) -> RewardObjective:
        p, s = self.config.preference, self.config.signals
        margins = Margins(p.offset_alpha, p.offset_type)
        return RewardObjective(s.center_rewards_coefficient, margins, s.edge_weight, s.rating_loss, s.rating_levels)

    def started(self, log: RunLog, rows: RowSets, resumed: bool) -> None:
        log.info(say("reward head on {model}", "打分头接在 {model} 上", model=ancestry(self.config)[1]))
        self.pictures.tell(log)

    def weights(self, policy: Placed) -> Mapping[str, Stateful]:
        return {"reward head": HeadPart(policy)}

    def measure(self, policy: Placed, rows: RowSets, output_dir: Path) -> Measure:
        plain = super().measure(policy, rows, output_dir)
        parts = (plain.settings, plain.model, plain.processor, plain.encoder, plain.rows, plain.output_dir)
        return _RewardMeasure(*parts, method=self)


class HeadPart:
    """The reward head of a model on the mesh."""

    def __init__(self, policy: Placed) -> None:
        self.policy = policy

    def save(self, folder: Path) -> None:
        values = next(v for v in self.policy.place.gather(head_values(self.policy.model)) if v is not None)
        if self.policy.place.is_writer:
            save_head(values, folder)

    def load(self, folder: Path) -> None:
        load_head(self.policy.model, folder)


class RewardTrainer(Trainer):
    """Train a reward model. All answers of a ranking are in one micro-batch. The head lies in
    reward_head/ beside the model's or adapter's files.
    Arguments and errors as `Trainer`'s.
    """

    method_class = RewardMethod
    method: RewardMethod

    def score(self, records: Sequence[Record]) -> list[list[float] | None]:
        """The reward of each candidate of each record; None for one that does not fit."""
        size = self.args.eval.per_device_eval_batch_size
        return score_records(self.put().forward, records, self.method.encoder, size)


class _RewardMeasure(Measure):
    """Rewards of held-out answers; nothing is generated."""

    def __init__(self, *args: Any, method: RewardMethod) -> None:
        super().__init__(*args)
        self.method = method

    def _loss(self, rows: Sequence[Record], done: Callable[[int], object] = lambda count: None) -> dict[str, float]:
        m = self.method
        every = (rows[i] for i in range(len(rows)))
        size = max(1, self.settings.eval.per_device_eval_batch_size)
        return reward_evaluation(self.model, every, m.encoder, size, m.objective(1, 1.0), done)

    def _questions(self, limit: int) -> list[Question]:
        return []


class RewardModel:
    """A trained reward model:
    `RewardModel.from_pretrained(folder).score(load_dataset("rows.jsonl"))`.
    """

    def __init__(self, model: ErnieModel, processor: Processor, max_tokens: int = 8192, rows: int = 8) -> None:
        self.model, self.rows = model, rows
        self.encoder = UnitEncoder(processor, max_tokens, max_tokens - 1, "delete")

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], rows: int = 8) -> RewardModel:
        """Read what `RewardTrainer` left in its output_dir: a whole model, or an adapter whose base
        its arguments name. Raises ValueError or OSError for a folder that holds no reward model.
        """
        file = Path(folder) / ARGS_FILE
        if not file.is_file():
            raise ValueError(
                say(
                    f"{folder} must hold {ARGS_FILE}; name the output_dir of `ernie-tune reward`",
                    f"{folder} 中须有 {ARGS_FILE}；请给出 `ernie-tune reward` 的 output_dir",
                )
            )
        config = load_config(file).config
        whole = (Path(folder) / "config.json").is_file()
        model: ErnieModel = (
            AutoModel.from_pretrained(folder) if whole else PeftModel.from_pretrained(load_base(config), folder)
        )
        load_head(model, folder)
        return cls(model, Processor.from_pretrained(folder), config.data.max_seq_len, rows)

    def score(self, records: Sequence[Record]) -> list[list[float] | None]:
        """The reward of each candidate of each record, higher is better; None for one that does not
        fit.
        """
        return score_records(self.model, records, self.encoder, self.rows)

    def ratings(self, rewards: Sequence[float]) -> list[float] | None:
        """The ratings to expect of answers with these rewards, from 1 to the number of levels; None
        for a model that was not trained on levels.
        """
        cuts = attach_head(self.model).cuts()
        if cuts is None:
            return None
        found: list[float] = (1 + len(cuts) * expected_rating(np.array(rewards), cuts.numpy())).tolist()
        return found

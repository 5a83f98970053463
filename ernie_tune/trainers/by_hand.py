"""One step of learning from sampled answers by hand, and the page of all that were sampled: what
every trainer that samples offers beside `train`.

Refuses to know: how answers are sampled, judged and compared (train/rollouts.py), losses, settings
but the folder of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.records import Record
from ernie_tune.report.rollout_page import write_rollouts
from ernie_tune.train.rolled import AnsweredPrompt, Rolled, answer_advantages
from ernie_tune.train.rollouts import Rollouts
from ernie_tune.trainers.base import Trainer

COMPLETIONS_FILE, PAGE_FILE = "rollouts.jsonl", "rollouts.html"


class ByHand(Trainer):
    """A trainer whose method samples answers: `rollout`, `score` and `advantages`, in this order,
    are one step by hand. Each raises ValueError where the loss samples nothing.
    """

    def train(self, dry_run: bool = False) -> dict[str, float]:
        """As any trainer's; of the answers that were sampled a page is written, also where the run
        is stopped.
        """
        try:
            return super().train(dry_run)
        finally:
            folder = Path(self.args.save.output_dir)
            if self.place.is_writer and not dry_run and (folder / COMPLETIONS_FILE).is_file():
                write_rollouts(folder / COMPLETIONS_FILE, folder / PAGE_FILE, folder.name)
                print(say(f"sampled answers: {folder / PAGE_FILE}", f"采样的回答：{folder / PAGE_FILE}"))

    @property
    def rollouts(self) -> Rollouts:
        """What samples, judges and compares; made with the model on the mesh."""
        if not hasattr(type(self.method), "rollouts"):
            preset = ",".join(self.args.preference.loss_type)
            raise ValueError(
                say(
                    f"loss_type ({preset}) must be one that samples answers, such as upo_online; there are no rollouts otherwise",
                    f"loss_type（{preset}）须为会采样回答的一种，如 upo_online；否则没有 rollout",
                )
            )
        if not self._prepared:
            self.prepare()
        found: Rollouts = self.method.rollouts  # type: ignore[attr-defined]
        return found

    @property
    def prompts(self) -> Sequence[Record]:
        """The rows that are asked."""
        return self.rollouts.records[: self.rollouts.prompts.size]

    def rollout(self, records: Sequence[Record], n: int | None = None, seed: int = 0) -> list[AnsweredPrompt]:
        """`n` answers (num_generations) to each record by the policy as it is; nothing is counted
        or kept. The same seed gives the same answers. Raises RowTooLong.
        """
        return self.rollouts.sample(records, range(len(records)), seed, n)

    def score(self, drawn: Sequence[AnsweredPrompt]) -> list[Rolled]:
        """The answers with what the rewards give them: `reward_G` of each group."""
        return self.rollouts.judge(drawn)

    def advantages(self, groups: Sequence[Rolled]) -> list[np.ndarray]:
        """How much better than expected each answer is, an array [G] a group; its tokens' are in
        the group's columns, which `rollouts.batch` packs.
        """
        self.rollouts.compare(groups)
        return [answer_advantages(group) for group in groups]

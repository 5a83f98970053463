"""A teacher of sampled answers (on-policy distillation): who it is, what it says of each token, and
the demonstrations that it reads in some of the steps.

The teacher is another folder (a model or an adapter with its base), the model without its adapter,
or the policy itself where it is shown more: each row's hint. Refuses to know: formulas
(objectives), how answers are sampled and learned from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.config.loader import ARGS_FILE, load_config
from ernie_tune.data.batching import THINKING, BatchStream
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Candidate, Record
from ernie_tune.data.units import Unit, UnitBatch, collate_units
from ernie_tune.machine.place import Place
from ernie_tune.machine.placed import Placed
from ernie_tune.machine.stages import frozen_outputs
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.objectives.advantages import with_teacher
from ernie_tune.objectives.distill import ScoreHead
from ernie_tune.objectives.objective import Outputs, logp_outputs
from ernie_tune.peft.model import PeftModel
from ernie_tune.train.distill import STATES, DistilledObjective
from ernie_tune.train.policy import PolicyObjective
from ernie_tune.train.rolled import Rolled
from ernie_tune.trainers import assemble
from ernie_tune.trainers.judged import unit_encoder
from ernie_tune.trainers.keeper import JsonPart, StreamPart
from ernie_tune.trainers.method import Rows, Stateful, Window

BASE, SELF = "base", "self"
STATE_FILE, ROWS_FILE = "teaching_state.json", "demonstrations_state.json"


class Teaching:
    """The teacher of one run. Raises ValueError for settings that leave it nothing to say."""

    def __init__(self, config: RunConfig, place: Place, processor: Processor, banned: Sequence[int]) -> None:
        t = config.teacher
        self.config, self.place, self.processor, self.banned = config, place, processor, tuple(banned)
        self.name, self.kl_coef, self.hinted = t.teacher_model, t.teacher_kl_coef, t.teacher_hint
        self.coef = t.distill_coef if t.distill_coef is not None else float(t.teacher_kl_coef == 0)
        self.temperature = config.rollout.temperature
        self.windows_made = 0
        self._demonstrations: BatchStream | None = None
        self._policy: Placed
        self._placed: Placed  # the teacher's model: its own, or the policy's
        self._check()

    def _check(self) -> None:
        if not self.kl_coef and not self.coef:
            raise ValueError(
                say(
                    f"teacher_kl_coef (0) or distill_coef (0) must be above 0 with teacher_model ({self.name}); set one",
                    f"teacher_model（{self.name}）须与大于 0 的 teacher_kl_coef（0）或 distill_coef（0）同用；请设其一",
                )
            )
        if self.name == SELF and not self.hinted:
            raise ValueError(
                say(
                    "teacher_model (self) must see more than the policy, teacher_hint (false); set teacher_hint: true, or "
                    "another teacher",
                    "teacher_model（self）须比策略看到更多，而 teacher_hint 为 false；请设 teacher_hint: true，或换教师",
                )
            )
        if self.name == SELF and self.coef:
            raise ValueError(
                say(
                    f"distill_coef ({self.coef:g}) must be 0 with teacher_model self, whose head moves as it learns; set "
                    "teacher_kl_coef",
                    f"teacher_model 为 self 时其输出层随学习而变，distill_coef（{self.coef:g}）须为 0；请设 teacher_kl_coef",
                )
            )
        if self.config.teacher.distill_lmbda < 1 and not self.coef:
            raise ValueError(
                say(
                    f"distill_lmbda ({self.config.teacher.distill_lmbda:g}) must be 1 without distill_coef: demonstrations "
                    "are read by that term alone; set distill_coef",
                    f"没有 distill_coef 时 distill_lmbda（{self.config.teacher.distill_lmbda:g}）须为 1：只有该项读取示范；"
                    "请设 distill_coef",
                )
            )

    @property
    def signals(self) -> tuple[str, ...]:
        """The kinds of rows that it reads beside those that are answered."""
        return ("sft",) if self.config.teacher.distill_lmbda < 1 else ()

    # --- before the run
    # ----------------------------------------------------------------------------

    def take(self, sets: Sequence[Rows], rows: int, batches: int) -> None:
        """The demonstrations among the rows, so many a micro-batch and window. Raises ValueError
        where there are none.
        """
        if not self.signals:
            return
        chosen = [_Demonstrations(part) for part in sets]
        chosen = [part for part in chosen if len(part)]
        if not chosen:
            raise ValueError(
                say(
                    f"train_dataset (0 demonstrations) must hold sft rows with distill_lmbda "
                    f"({self.config.teacher.distill_lmbda:g}); add them, or set it to 1",
                    f"distill_lmbda（{self.config.teacher.distill_lmbda:g}）需要 sft 数据，train_dataset 中有 0 行示范；请补充，"
                    "或将其设为 1",
                )
            )
        train = dataclasses.replace(
            self.config.train, per_device_train_batch_size=rows, gradient_accumulation_steps=batches
        )
        data = dataclasses.replace(self.config.data, train_dataset_prob=(), mix_strategy="concat")
        config = RunConfig(**{**vars(self.config), "train": train, "data": data})
        encoder = unit_encoder(config, self.processor, ("label",))
        self._demonstrations = assemble.stream_of(config, chosen, encoder, *self.place.batch)

    def open(self, policy: Placed) -> None:
        """Called once the policy lies. Raises ValueError for a teacher that is none."""
        self._policy = policy
        if self.name in (BASE, SELF):
            if self.name == BASE and not isinstance(policy.model, PeftModel):
                raise ValueError(
                    say(
                        "teacher_model (base) must go with an adapter, without which it answers; name a folder",
                        "teacher_model（base）须用于带适配器的模型（教师为去掉适配器的模型）；请给出目录",
                    )
                )
            self._placed = policy
            return
        self._placed = self.place.put(*self._unread(), trained=False)
        ours, theirs = policy.model.config.vocab_size, self._placed.model.config.vocab_size
        if ours != theirs:
            raise ValueError(
                say(
                    f"teacher_model ({self.name}, {theirs} ids) must have the policy's vocabulary ({ours} ids); take a teacher "
                    "with the same tokenizer",
                    f"teacher_model（{self.name}，词表 {theirs}）须与策略的词表（{ours}）相同；请用同一分词器的教师",
                )
            )

    def _unread(self) -> tuple[ErnieModel, Any]:
        folder = Path(self.name)
        if folder.is_dir() and not (folder / "config.json").is_file() and (folder / ARGS_FILE).is_file():
            made_by = load_config(folder / ARGS_FILE).config
            base, source = assemble.unread_model(made_by)
            return PeftModel.from_pretrained(base, folder), source
        named = dataclasses.replace(self.config.model, model_name_or_path=self.name)
        return assemble.unread_model(RunConfig(**{**vars(self.config), "model": named}))

    # --- what it says
    # ------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _acting(self) -> Iterator[Any]:
        model = self._placed.model
        with self._placed.whole():
            if self.name == BASE and isinstance(model, PeftModel):
                with model.acting(None):
                    yield model
            else:
                yield model

    def head(self) -> ScoreHead:
        """What makes scores of its states."""
        with self._acting() as model:
            weight, transposed = model.head_weight()
            return ScoreHead(weight.detach(), transposed)

    def _said(self, batch: UnitBatch) -> dict[str, np.ndarray]:
        def outputs(model: Any, hidden_TD: Tensor, batch: UnitBatch) -> Outputs:
            said = logp_outputs(model, hidden_TD, batch, self.temperature, self.banned)
            if not self.coef:
                return said
            return {**said, STATES: paddle.gather(hidden_TD, paddle.to_tensor(batch.source_N))}

        with self._acting():
            return frozen_outputs(self._placed.forward, outputs, batch)

    def judge(self, groups: Sequence[Rolled], size: int) -> None:
        """Give every token of a round its teacher's log-probability, an advantage for it, and the
        states that the whole distribution is made of.
        """
        for i in range(0, len(groups), size):
            part = groups[i : i + size]
            units = [self._shown(group) if self.hinted else group.unit for group in part]
            said = self._said(collate_units(units, self.processor))
            ends = np.cumsum([int(group.length_G.sum()) for group in part])[:-1]
            for name, values in said.items():
                column = "teacher_logp_N" if name == "logp_N" else name
                for group, own in zip(part, np.split(values, ends), strict=True):
                    group.columns[column] = own
        for group in groups:
            known = group.columns
            known["advantage_N"] = with_teacher(
                known["advantage_N"], known["teacher_logp_N"].astype(np.float64), known["old_logp_N"], self.kl_coef
            )

    def _shown(self, group: Rolled) -> Unit:
        """The answers behind a prompt that ends with the row's hint."""
        record, unit = group.record, group.unit
        hint = record.reward.hint if record.reward else ""
        if not hint:
            return unit
        *before, last = record.prompt
        prompt = self.processor.encode(
            [*before, {**last, "content": f"{last.get('content', '')}\n\n{hint}"}],
            list(record.images),
            list(record.videos),
            tools=record.tools,
            thinking=THINKING.get(record.mode),
            add_generation_prompt=True,
            where=str(record.meta),
        )
        dialogues = []
        for dialogue, answer in zip(unit.dialogues, group.answers, strict=True):
            count = len(answer.token_ids)
            shown = prompt.extended(answer.token_ids)
            shown.trained_L[:] = False
            shown.trained_L[prompt.num_tokens :] = dialogue.trained_L[dialogue.num_tokens - count :]
            dialogues.append(shown)
        return dataclasses.replace(unit, dialogues=tuple(dialogues), shared=prompt.num_tokens if unit.shared else 0)

    # --- the run
    # -----------------------------------------------------------------------------------

    def objective(self, policy: PolicyObjective) -> DistilledObjective:
        """The policy's loss with the teacher's term."""
        return DistilledObjective(policy, self.coef, self.config.teacher.distill_beta, self.head)

    def windows(self, sampled: Iterator[Window]) -> Iterator[Window]:
        """Of sampled answers, and where distill_lmbda is below 1 sometimes of demonstrations: by
        the seed and the window's number, so that a run that goes on goes on alike.
        """
        share, seed = self.config.teacher.distill_lmbda, self.config.train.seed
        demonstrations = None if self._demonstrations is None else iter(self._demonstrations)
        while True:
            drawn = np.random.Generator(np.random.Philox(key=[seed, self.windows_made])).random()
            self.windows_made += 1
            if demonstrations is None or drawn < share:
                yield next(sampled)
            else:
                yield [batch.with_columns(**{STATES: self._said(batch)[STATES]}) for batch in next(demonstrations)]

    def state_dict(self) -> dict[str, Any]:
        return {"windows": self.windows_made}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.windows_made = state["windows"]

    def parts(self) -> dict[str, Stateful]:
        """What is needed to go on."""
        own: dict[str, Stateful] = {"teaching": JsonPart(self.place, STATE_FILE, self)}
        if self._demonstrations is not None:
            own["demonstrations"] = StreamPart(self.place, self._demonstrations, ROWS_FILE)
        return own


class _Demonstrations(Sequence[Record]):
    """The demonstrations among some rows, each as one good answer to its prompt."""

    def __init__(self, rows: Rows, index: Sequence[int] | None = None) -> None:
        self.rows = rows
        self.picked = [i for i in range(len(rows)) if is_demonstration(rows[i])] if index is None else index

    def __len__(self) -> int:
        return len(self.picked)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return _Demonstrations(self.rows, self.picked[i])
        record = self.rows[self.picked[i]]
        size = len(record.prompt)
        answer = Candidate(tuple(itertools.islice(record.messages, size, None)), label=True)
        return dataclasses.replace(record, signal="label", messages=record.prompt, candidates=(answer,))


def is_demonstration(record: Record) -> bool:
    """Whether a row shows an answer to imitate."""
    return record.signal == "sft" and record.reward is None


def teaching_of(config: RunConfig, place: Place, processor: Processor, banned: Sequence[int]) -> Teaching | None:
    """The teacher that the settings name, if any."""
    return Teaching(config, place, processor, banned) if config.teacher.teacher_model else None

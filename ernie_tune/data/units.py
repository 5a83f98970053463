"""Judged answers -> units -> micro-batches: a prompt with its candidates, what is known of each,
and where their target tokens lie in the pack.

A unit is never parted: all answers to one prompt are in one micro-batch. Where all show the same
media, their common beginning is packed once.
Refuses to know: files, weights, references, losses, paddle.
Legend: T tokens of a pack, N target tokens, C candidates, U units, P pairs, L tokens of one
dialogue.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ernie_tune.config.language import Text, say
from ernie_tune.data.batching import (
    OPEN_THOUGHT,
    Dropped,
    check_files,
    check_truncation,
    most_tokens,
    place_of,
    thinking_of,
    truncate,
)
from ernie_tune.data.chat import has_open_thought
from ernie_tune.data.media.corruption import corrupted
from ernie_tune.data.processor import Encoded, Processor
from ernie_tune.data.records import Message, Record
from ernie_tune.models.inputs import PackedInput, Row, pack_families

_SILENT = say("an answer without a token to learn from", "回答没有可学习的 token")
JUDGED = ("pair", "ranking", "rating", "label")


@dataclass(frozen=True)
class Unit:
    """One prompt with its encoded candidates. Judgements that a row does not give are nan."""

    # prompt and answer of each candidate; only its own turns are targets
    dialogues: tuple[Encoded, ...]
    # leading tokens that all have in common and that are packed once; 0: each dialogue on its own
    shared: int
    signal: str
    score_C: np.ndarray  # on [0, 1]
    rank_C: np.ndarray  # lowest is best
    label_C: np.ndarray  # 1 good, 0 bad
    margin: float = 0.0
    confidence: float = 1.0
    weight: float = 1.0
    domain: str = ""
    where: str = ""
    corrupted: bool = False  # the worse side is the better one with its pictures spoilt

    @property
    def num_candidates(self) -> int:
        return len(self.dialogues)

    @property
    def num_tokens(self) -> int:
        """Tokens in the pack."""
        return self.shared + sum(d.num_tokens - self.shared for d in self.dialogues)

    @property
    def num_patches(self) -> int:
        """Patches in the pack."""
        patches = [0 if d.row.pixel_values_PC is None else len(d.row.pixel_values_PC) for d in self.dialogues]
        return patches[0] if self.shared else sum(patches)

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """For each candidate what names its log-probabilities: a hash of tokens, targets and
        pixels.
        """
        return tuple(_key(d) for d in self.dialogues)

    @cached_property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """(better, worse) candidates, by rank or else by score; ties give none."""
        value = np.where(np.isnan(self.rank_C), self.score_C, -self.rank_C)
        better, worse = np.nonzero(value[:, None] > value[None, :])
        return tuple(zip(better.tolist(), worse.tolist(), strict=True))

    @property
    def best(self) -> list[int]:
        """The candidates worth imitating: those that no other is better than, where any is worse;
        labelled ones if they are good.
        """
        if self.signal == "label":
            return np.flatnonzero(self.label_C == 1).tolist()
        worse = {b for _, b in self.edges}
        return [c for c in range(self.num_candidates) if c not in worse] if self.edges else []


def _key(dialogue: Encoded) -> str:
    digest = hashlib.blake2b(digest_size=16)
    row = dialogue.row
    for part in (row.input_ids_L.astype(np.int64), dialogue.trained_L, row.grid_thw_n3, row.pixel_values_PC):
        digest.update(b"|" if part is None else np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


# What a batch may carry beside its rows; the last letter is the axis: N targets, C candidates, S
# (sum, count).
COLUMNS = {
    "ref_logp_N": "log-probabilities under the reference",
    "old_logp_N": "under the policy when the answers were sampled, as the trainer computes it",
    "sampled_logp_N": "under the policy when they were sampled, as the sampling engine says",
    "advantage_N": "how much better than expected",
    "value_N": "the critic's when they were sampled",
    "return_N": "what the critic is to learn",
    "keep_N": "1 for targets of answers that count, else 0",
    "teacher_logp_N": "under the teacher, over what could be sampled",
    "teacher_state_ND": "the teacher's final hidden states before each target",
    "experts_MLk": "the experts that each token of each dialogue went to, by layer; -1: unknown",
    "may_win_C": "1 for sampled answers that may be the better of a pair: complete and well formed",
    "entropy_keep_N": "1 for targets whose entropy is high enough to be learned from, else 0",
    "support_NK": "the ids that each could be sampled from; -1: none",
    "blind_N": "the number among the targets of the same one without the picture; -1: none",
    "density_C": "what bad answers weigh by their prompts, others 1",
    "mismatch_S": "log-ratios of the window's mismatched answers, on one of its batches: what KTO compares with",
}


@dataclass(frozen=True)
class UnitBatch:
    """One forward over whole units. Token `source_N[i]` of the pack predicts id `target_N[i]` of
    candidate `candidate_N[i]`; a candidate's targets are neighbours, in their order. `columns`:
    what else is known, by the names of COLUMNS. Raises ValueError for other names and lengths.
    """

    inputs: PackedInput
    units: tuple[Unit, ...]
    source_N: np.ndarray
    target_N: np.ndarray
    candidate_N: np.ndarray
    length_C: np.ndarray
    unit_C: np.ndarray
    end_C: np.ndarray  # where the last token of each dialogue lies
    place_M: np.ndarray  # where all tokens of all dialogues lie, shared ones once for each
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        size = {"N": len(self.target_N), "C": len(self.length_C), "S": 2, "M": len(self.place_M)}
        for name, values in self.columns.items():
            if name not in COLUMNS:
                raise ValueError(
                    say(
                        f"column ({name}) must be one of {', '.join(COLUMNS)}; correct the name",
                        f"列（{name}）须为 {', '.join(COLUMNS)} 之一；请改正名称",
                    )
                )
            axes = name.rpartition("_")[2]
            if values.ndim != len(axes) or len(values) != size[axes[0]]:
                wanted = ", ".join([str(size[axes[0]]), *axes[1:]])
                raise ValueError(
                    say(
                        f"column {name} {list(values.shape)} must be [{wanted}] in this batch; compute it "
                        "from the same units",
                        f"此批中列 {name} {list(values.shape)} 须为 [{wanted}]；请由相同的样本组计算",
                    )
                )

    def with_columns(self, **columns: np.ndarray) -> UnitBatch:
        """The batch with more columns, or others. Raises ValueError for unknown names and other
        lengths.
        """
        return dataclasses.replace(self, columns={**self.columns, **columns})

    @property
    def num_rows(self) -> int:
        return len(self.units)

    @property
    def read_R(self) -> np.ndarray:
        """The tokens whose final states an objective may read."""
        return np.concatenate([self.source_N, self.end_C])

    @property
    def first_candidate_U(self) -> np.ndarray:
        """Number of each unit's first candidate."""
        counts = [u.num_candidates for u in self.units]
        return np.cumsum([0, *counts[:-1]])

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(u.domain for u in self.units)


def collate_units(units: Sequence[Unit], processor: Processor) -> UnitBatch:
    """Units side by side in one pack."""
    families = [([d.row for d in u.dialogues], u.shared) for u in units]
    inputs, places = pack_families(families, processor.tokens)
    flat = [
        (d, place) for u, found in zip(units, places, strict=True) for d, place in zip(u.dialogues, found, strict=True)
    ]
    targets = [np.flatnonzero(d.trained_L[1:]) + 1 for d, _ in flat]
    lengths = np.array([len(at) for at in targets])
    return UnitBatch(
        inputs,
        tuple(units),
        np.concatenate([place[at - 1] for (_, place), at in zip(flat, targets, strict=True)]),
        np.concatenate([d.row.input_ids_L[at] for (d, _), at in zip(flat, targets, strict=True)]),
        np.repeat(np.arange(len(flat)), lengths),
        lengths,
        np.repeat(np.arange(len(units)), [u.num_candidates for u in units]),
        np.array([place[-1] for _, place in flat]),
        np.concatenate([place for _, place in flat]),
    )


@dataclass(frozen=True)
class UnitEncoder:
    """Record -> unit, or None with a reason noted. `max_tokens` bounds each dialogue, `max_prompt`
    the tokens before its first target.

    `truncation` "left" and "right" cut prompts at that side to `max_prompt` (media go whole or stay
    whole) and answers at their end. `share` False packs whole dialogues. `signals`: the kinds of
    judgement that something learns from.
    """

    processor: Processor
    max_tokens: int
    max_prompt: int
    truncation: str = "delete"
    share: bool = True
    signals: tuple[str, ...] = JUDGED

    def __post_init__(self) -> None:
        check_truncation(self.truncation)
        if not 0 < self.max_prompt < self.max_tokens:
            raise ValueError(
                say(
                    f"max_prompt_len ({self.max_prompt}) must be below max_seq_len ({self.max_tokens}); lower "
                    "it, answers need room",
                    f"max_prompt_len（{self.max_prompt}）须小于 max_seq_len（{self.max_tokens}"
                    "）；请调小，给回答留出空间",
                )
            )

    def __call__(self, record: Record, dropped: Dropped) -> Unit | None:
        where = place_of(record)
        if not self._judged(record, dropped):
            return None
        made: dict[tuple[str, int], Any] = {}
        dialogues = []
        for i in range(len(record.candidates)):
            encoded = self._dialogue(record, i, where, made)
            if not encoded.trained_L[1:].any():
                dropped.add(_SILENT, where)
                return None
            short = self._shortened(encoded, where)
            if short is None:
                dropped.add(self._too_long(), where)
                return None
            if record.candidates[i].corruption is not None and short.row.pixel_values_PC is None:
                dropped.add(say("no picture is left to corrupt", "没有可破坏的图片"), where)
                return None
            dialogues.append(short)

        def known(name: str) -> np.ndarray:
            values = [vars(c)[name] for c in record.candidates]
            return np.array([np.nan if v is None else float(v) for v in values])

        unit = Unit(
            tuple(dialogues),
            self._shared(dialogues) if self.share else 0,
            record.signal,
            known("score"),
            known("rank"),
            known("label"),
            record.margin or 0.0,
            record.confidence,
            record.weight,
            record.domain,
            where,
            any(c.corruption is not None for c in record.candidates),
        )
        return unit

    def usable(self, record: Record, dropped: Dropped) -> bool:
        """See `RecordEncoder`."""
        if self.truncation != "delete" or any(one.corruption is not None for one in record.candidates):
            return self(record, dropped) is not None  # only the tokens tell
        if not self._judged(record, dropped):
            return False
        where, thinking = place_of(record), thinking_of(record, self.processor.template)
        for i, candidate in enumerate(record.candidates):
            if not any(turn["role"] == "assistant" and turn.get("loss", True) for turn in candidate.messages):
                dropped.add(_SILENT, where)
                return False
            messages, images, videos = record.dialogue(i)
            if most_tokens(record, i, self.processor) <= self.max_prompt:
                check_files(images, videos, where)
                continue
            turns = [*_untrained(messages[: len(record.messages)]), *candidate.messages]
            options: dict[str, Any] = {"tools": record.tools, "thinking": thinking, "where": where}
            size, prompt = self.processor.measure(turns, images, videos, **options)
            if prompt > self.max_prompt or size > self.max_tokens:
                dropped.add(self._too_long(), where)
                return False
        return True

    def _judged(self, record: Record, dropped: Dropped) -> bool:
        """Whether a record's judgements, apart from its tokens, are something to learn from; else
        the reason is noted.
        """
        if record.signal not in self.signals:
            why = say(f"nothing learns from a {record.signal}", f"没有方法学习 {record.signal}")
        elif not record.candidates:
            why = say("no answer that is judged", "没有带评判的回答")
        elif any(has_open_thought(message) for candidate in record.candidates for message in candidate.messages):
            why = OPEN_THOUGHT
        elif record.signal not in ("label", "rating") and not any(record.preferences()):
            why = say("no answer is better than another", "没有更优的回答")
        else:
            return True
        dropped.add(why, place_of(record))
        return False

    def _too_long(self) -> Text:
        return say(
            f"prompt longer than max_prompt_len ({self.max_prompt} tokens) or dialogue than max_seq_len "
            f"({self.max_tokens})",
            f"提问长于 max_prompt_len（{self.max_prompt} 个 token）或对话长于 max_seq_len（{self.max_tokens}）",
        )

    def collate(self, samples: Sequence[Unit]) -> UnitBatch:
        return collate_units(samples, self.processor)

    def _dialogue(self, record: Record, i: int, where: str, made: dict[tuple[str, int], Any]) -> Encoded:
        messages, images, videos = record.dialogue(i)
        asked = len(record.messages)
        turns = _untrained(messages[:asked])
        encoded = self.processor.encode(
            [*turns, *messages[asked:]],
            list(images),
            list(videos),
            tools=record.tools,
            thinking=thinking_of(record, self.processor.template),
            where=where,
            made=made,
        )
        how, pixels_PC = record.candidates[i].corruption, encoded.row.pixel_values_PC
        if how is None or pixels_PC is None:
            return encoded
        return dataclasses.replace(
            encoded, row=dataclasses.replace(encoded.row, pixel_values_PC=corrupted(pixels_PC, how))
        )

    def _shortened(self, encoded: Encoded, where: str) -> Encoded | None:
        """The dialogue within the limits, or None where it must go."""
        prompt, size = int(np.argmax(encoded.trained_L)), encoded.num_tokens
        if prompt <= self.max_prompt and size <= self.max_tokens:
            return encoded
        if self.truncation == "error":
            raise ValueError(
                say(
                    f"{where}: prompt ({prompt} tokens) and dialogue ({size}) must have at most "
                    f"max_prompt_len ({self.max_prompt}) and max_seq_len ({self.max_tokens}) tokens; raise "
                    "them or shorten the row",
                    f"{where}：提问（{prompt} 个 token）与对话（{size} 个）不能超过 max_prompt_len（"
                    f"{self.max_prompt}）和 max_seq_len（{self.max_tokens}）；请调大，或缩短该行",
                )
            )
        tokens = self.processor.tokens
        answer = encoded.row.input_ids_L[prompt:]
        if self.truncation == "delete" or np.isin(answer, tokens.placeholders()).any():
            return None
        head = dataclasses.replace(
            encoded,
            row=dataclasses.replace(encoded.row, input_ids_L=encoded.row.input_ids_L[:prompt]),
            trained_L=encoded.trained_L[:prompt],
        )
        head = truncate(head, self.max_prompt, self.truncation, tokens.placeholders(), tokens.markers())
        room = self.max_tokens - head.num_tokens
        cut = head.extended(answer[:room].tolist())
        cut.trained_L[head.num_tokens :] = encoded.trained_L[prompt : prompt + room]
        return cut

    def _shared(self, dialogues: Sequence[Encoded]) -> int:
        """Leading tokens that all dialogues have in common, if all their media are among them."""
        first, rest = dialogues[0], dialogues[1:]
        if not rest or any(not _same_media(first.row, d.row) for d in rest):
            return 0
        shortest = min(d.num_tokens for d in dialogues) - 1
        equal = np.ones(shortest, bool)
        for d in rest:
            equal &= d.row.input_ids_L[:shortest] == first.row.input_ids_L[:shortest]
        shared = shortest if equal.all() else int(np.argmin(equal))
        placeholders = self.processor.tokens.placeholders()
        if any(np.isin(d.row.input_ids_L[shared:], placeholders).any() for d in dialogues):
            return 0
        return shared


def _untrained(messages: Sequence[Message]) -> list[Message]:
    """The turns before an answer that is judged: none of them is learnt."""
    return [{**m, "loss": False} if m["role"] == "assistant" else m for m in messages]


def _same_media(a: Row, b: Row) -> bool:
    if a.pixel_values_PC is None or b.pixel_values_PC is None:
        return a.pixel_values_PC is b.pixel_values_PC
    return np.array_equal(a.grid_thw_n3, b.grid_thw_n3) and np.array_equal(a.pixel_values_PC, b.pixel_values_PC)  # type: ignore[arg-type]


Answer = tuple[np.ndarray, np.ndarray]


def first_answer(unit: Unit) -> Answer:
    """Tokens of the first answer, and which of them are targets."""
    dialogue = unit.dialogues[0]
    start = int(np.argmax(dialogue.trained_L))
    return dialogue.row.input_ids_L[start:], dialogue.trained_L[start:]


def mismatched(units: Sequence[Unit], answers: Sequence[Answer]) -> list[Unit]:
    """Each unit's prompt with an answer that is not its own: what KTO's baseline is measured on."""
    out = []
    for unit, (ids, trained) in zip(units, answers, strict=True):
        prompt = unit.dialogues[0]
        start = int(np.argmax(prompt.trained_L))
        head = dataclasses.replace(
            prompt,
            row=dataclasses.replace(prompt.row, input_ids_L=prompt.row.input_ids_L[:start]),
            trained_L=prompt.trained_L[:start],
        )
        mixed = head.extended(ids.tolist())
        mixed.trained_L[start:] = trained
        nothing = np.full(1, np.nan)
        out.append(Unit((mixed,), 0, "mismatch", nothing, nothing, nothing, where=unit.where))
    return out


def following(answers: Sequence[Sequence[Answer]], rank: int) -> list[Answer]:
    """The answer of the row after each of this rank's rows (after the last: of the first), in the
    order in which one process would read them: row by row, and of each the ranks in turn. Empty
    where there is one row in all.

    `answers`: `first_answer` of each rank's rows.
    """
    order = sorted((k, r) for r, own in enumerate(answers) for k in range(len(own)))
    if len(order) < 2:
        return []
    after = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [answers[r][k] for k, r in (after[i, rank] for i in range(len(answers[rank])))]

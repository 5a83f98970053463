"""Records -> encoded rows -> micro-batches -> windows of one optimizer step: truncation, packing,
targets, a state that resumes exactly.

Refuses to know: file formats, models' weights, losses beyond a weight per target token, processes
(a rank is two integers), paddle.
Legend: T tokens of a micro-batch, N its target tokens, R its rows, L tokens of one row.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ernie_tune.config.language import Text, join, say
from ernie_tune.data.chat import ChatTemplate, has_open_thought
from ernie_tune.data.media.images import describe, open_source
from ernie_tune.data.mixing import Shard
from ernie_tune.data.processor import Encoded, Processor
from ernie_tune.data.records import Record
from ernie_tune.models.config import TokenIds
from ernie_tune.models.inputs import PackedInput, Row, feature_count, pack

TRUNCATIONS = ("delete", "left", "right", "error")
THINKING = {"think": True, "nothink": False}  # by a record's mode; "auto": as its answer does
# Rows looked ahead when packing best-fit: enough to fill gaps, few enough to keep order and memory.
WINDOW_ROWS = 64
# passes without a usable row after which a rank gives up, though other ranks have some
_PATIENCE = 64


def thinking_of(record: Record, template: ChatTemplate) -> bool | None:
    """Whether a row's answers think, decided once for all of them: candidates of one prompt must
    have one prompt. None: the template decides.

    As the row's `mode` says; else candidates think where any of them does, and those without a
    thought then answer after an empty one.
    """
    asked = THINKING.get(record.mode)
    if asked is not None or not record.candidates:
        return asked
    return any(template.thinks(record.dialogue(i)[0]) for i in range(len(record.candidates)))


@dataclass(frozen=True)
class Sample:
    """One encoded row with what the objective and the report need to know of it."""

    row: Row
    trained_L: np.ndarray  # bool
    weight_L: np.ndarray  # float32, relative weight of each target
    domain: str = ""
    where: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.row.input_ids_L)

    @property
    def num_patches(self) -> int:
        return 0 if self.row.pixel_values_PC is None else len(self.row.pixel_values_PC)


class Packable(Protocol):
    """What a stream needs to know of an encoded record."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_patches(self) -> int: ...


class RecordEncoder(Protocol):
    """How a method turns records into samples and samples into micro-batches. `max_tokens`: of a
    pack.
    """

    @property
    def max_tokens(self) -> int: ...

    def __call__(self, record: Record, dropped: Dropped) -> Any | None:
        """A `Packable`, or None with a reason noted; the same record always gives the same."""

    def usable(self, record: Record, dropped: Dropped) -> bool:
        """Whether `__call__` would give a sample, a reason noted where not; media are measured by
        their heads, and only where they may matter.
        """

    def collate(self, samples: Sequence[Any]) -> Any:
        """One micro-batch of them, with `inputs` and `num_rows`."""


@dataclass(frozen=True)
class MicroBatch:
    """One forward. Token `source_N[i]` of the pack predicts id `target_N[i]` with weight
    `weight_N[i]`; it belongs to row `row_N[i]`.
    """

    inputs: PackedInput
    source_N: np.ndarray
    target_N: np.ndarray
    weight_N: np.ndarray
    row_N: np.ndarray
    row_tokens_R: np.ndarray
    domains: tuple[str, ...] = ()

    @property
    def num_rows(self) -> int:
        return len(self.row_tokens_R)

    @property
    def read_R(self) -> np.ndarray:
        """The tokens whose final states an objective may read."""
        return self.source_N


def collate(samples: Sequence[Sample], tokens: TokenIds, position_rule: str = "paddle") -> MicroBatch:
    """Samples side by side, no padding. The first token of a row is never a target: nothing
    precedes it.
    """
    inputs = pack([s.row for s in samples], tokens, position_rule)
    source, target, weight, row = [], [], [], []
    for i, s in enumerate(samples):
        at = np.flatnonzero(s.trained_L[1:])
        source.append(inputs.offsets[i] + at)
        target.append(s.row.input_ids_L[at + 1])
        weight.append(s.weight_L[at + 1])
        row.append(np.full(len(at), i))
    return MicroBatch(
        inputs,
        np.concatenate(source),
        np.concatenate(target),
        np.concatenate(weight).astype(np.float32),
        np.concatenate(row),
        np.array([s.num_tokens for s in samples]),
        tuple(s.domain for s in samples),
    )


def truncate(
    encoded: Encoded, max_tokens: int, side: str, placeholders: tuple[int, ...], markers: tuple[int, ...]
) -> Encoded:
    """Cut a row to `max_tokens` at the "left" (keep the end) or the "right" (keep the start). An
    image or video is kept whole or goes whole, with its patches and its start and end markers, so
    the result may be shorter.
    """
    ids = encoded.row.input_ids_L
    if len(ids) <= max_tokens:
        return encoded
    keep = np.zeros(len(ids), bool)
    keep[len(ids) - max_tokens :] = side == "left"
    keep[:max_tokens] |= side == "right"
    grids = np.zeros((0, 3), np.int64) if encoded.row.grid_thw_n3 is None else encoded.row.grid_thw_n3
    pixels = encoded.row.pixel_values_PC
    cursor = patch = 0
    kept_grids, kept_pixels = [], []
    visual = np.isin(ids, placeholders)
    for grid in grids:
        first = cursor + int(np.argmax(visual[cursor:]))
        cursor = first + feature_count(grid.tolist())
        block = slice(
            first - int(first > 0 and ids[first - 1] in markers),
            cursor + int(cursor < len(ids) and ids[cursor] in markers),
        )
        patches = int(np.prod(grid))
        if keep[block].all():
            kept_grids.append(grid)
            kept_pixels.append(pixels[patch : patch + patches])  # type: ignore[index]
        else:
            keep[block] = False
        patch += patches
    row = Row(
        ids[keep], np.concatenate(kept_pixels) if kept_pixels else None, np.stack(kept_grids) if kept_grids else None
    )
    return dataclasses.replace(encoded, row=row, trained_L=encoded.trained_L[keep])


_NOWHERE = "a row that is in no file"
# rows of one reason that are told apart; beyond that a row counts once a pass
_REMEMBERED_ROWS = 100_000


def check_truncation(strategy: str) -> None:
    """ValueError for a name that is none of TRUNCATIONS."""
    if strategy not in TRUNCATIONS:
        raise ValueError(
            say(
                f"truncation_strategy ({strategy!r}) must be one of {TRUNCATIONS}; use 'delete'",
                f"truncation_strategy（{strategy!r}）须为 {TRUNCATIONS} 之一；可用 'delete'",
            )
        )


def place_of(record: Record) -> str:
    """file:line of a record, for reasons and errors."""
    return str(record.meta) if record.meta.path else _NOWHERE


OPEN_THOUGHT = say("a thought that never ends", "思考没有结束")
_EMPTY_TEXT = say("an empty text", "空白文本")
_NOTHING_LEARNT = say("no token to learn from", "没有可学习的 token")


def _too_long(max_tokens: int) -> Text:
    return say(f"longer than max_seq_len ({max_tokens} tokens)", f"长于 max_seq_len（{max_tokens} 个 token）")


@dataclass
class Dropped:
    """Rows that could not be used, by reason, each row once, with the first place of each: printed,
    never silent.
    """

    count: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    # of each reason, a number for each place
    rows: dict[str, set[int]] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        known, row = self.rows.setdefault(reason, set()), _number(where)
        if where != _NOWHERE and row in known:
            return
        if where != _NOWHERE and len(known) < _REMEMBERED_ROWS:
            known.add(row)
        self.count[reason] = self.count.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[Text]:
        return [
            say(
                "dropped {n} row(s): {reason}, first at {first}",
                "未使用 {n} 行：{reason}，第一处在 {first}",
                n=n,
                reason=reason,
                first=self.first[reason],
            )
            for reason, n in self.count.items()
        ]

    def state_dict(self) -> dict[str, Any]:
        """How often and where, so that a resumed run counts a row once too."""
        rows = {why: sorted(known) for why, known in self.rows.items() if known}
        return {"dropped": dict(self.count), **({"dropped_rows": rows} if rows else {})}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Dropped:
        rows = {why: set(known) for why, known in state.get("dropped_rows", {}).items()}
        return cls(dict(state["dropped"]), dict.fromkeys(state["dropped"], "an earlier run"), rows)


def _number(where: str) -> int:
    return int.from_bytes(hashlib.blake2b(where.encode(errors="surrogatepass"), digest_size=6).digest(), "little")


# A text has at most as many tokens as bytes, and a template adds at most this many to a turn, a
# medium and a row.
TURN_TOKENS, MEDIUM_TOKENS, ROW_TOKENS = 40, 16, 64


def most_tokens(record: Record, index: int | None, processor: Processor) -> int:
    """An upper bound of the tokens of a record, or of the dialogue that ends with candidate
    `index`, nothing opened or tokenised.
    """
    messages, images, videos = (
        (record.messages, record.images, record.videos) if index is None else record.dialogue(index)
    )
    i, v = processor.images, processor.videos
    if (images and i.rule != "paddle") or (videos and v.frame.rule != "paddle"):
        return 1 << 62  # rule "hf" may leave the limits
    tokens = ROW_TOKENS + (len(json.dumps(list(record.tools), default=str)) + ROW_TOKENS if record.tools else 0)
    for message in messages:
        tokens += TURN_TOKENS + len((message["content"] + message.get("reasoning_content", "")).encode())
        for call in message.get("tool_calls") or ():
            tokens += TURN_TOKENS + len(json.dumps(call, default=str))
    frames = (v.max_frames + 1) // 2 * (v.max_pixels // v.frame.factor**2)
    return tokens + len(images) * (i.max_pixels // i.factor**2 + MEDIUM_TOKENS) + len(videos) * (frames + MEDIUM_TOKENS)


def check_files(images: Sequence[Any], videos: Sequence[Any], where: str) -> None:
    """Raise the ValueError of the first picture or clip that is not there. Nothing is read."""
    for kind, sources in (("image", images), ("video", videos)):
        for source in sources:
            for one in source if isinstance(source, tuple) else (source,):
                if isinstance(one, str) and not one.startswith("data:"):
                    open_source(one, describe(kind, one, where)).close()


@dataclass(frozen=True)
class Encoder:
    """Record -> sample, or None with a reason noted. Deterministic: the same record always gives
    the same sample.
    """

    processor: Processor
    max_tokens: int
    truncation: str = "delete"
    thought_weight: float = 1.0
    answer_weight: float = 1.0

    def __post_init__(self) -> None:
        check_truncation(self.truncation)

    def __call__(self, record: Record, dropped: Dropped) -> Sample | None:
        where = place_of(record)
        if self._is_void(record, dropped):
            return None
        encoded = self.processor.encode(
            record.messages,
            list(record.images),
            list(record.videos),
            tools=record.tools,
            thinking=thinking_of(record, self.processor.template),
            where=where,
        )
        if encoded.num_tokens > self.max_tokens:
            if self.truncation == "error":
                raise ValueError(
                    say(
                        f"{where}: row ({encoded.num_tokens} tokens) must have at most max_seq_len ("
                        f"{self.max_tokens}); raise it or shorten the row",
                        f"{where}：该行（{encoded.num_tokens} 个 token）不能超过 max_seq_len（{self.max_tokens}"
                        "）；请调大，或缩短该行",
                    )
                )
            if self.truncation == "delete":
                dropped.add(_too_long(self.max_tokens), where)
                return None
            tokens = self.processor.tokens
            encoded = truncate(encoded, self.max_tokens, self.truncation, tokens.placeholders(), tokens.markers())
        weight_L = self._weights(encoded, record.weight)
        if not (encoded.trained_L & (weight_L > 0))[1:].any():
            dropped.add(_NOTHING_LEARNT, where)
            return None
        return Sample(encoded.row, encoded.trained_L, weight_L, record.domain, where)

    def usable(self, record: Record, dropped: Dropped) -> bool:
        """See `RecordEncoder`."""
        where = place_of(record)
        if self.truncation != "delete" or 0 in (record.weight, self.thought_weight, self.answer_weight):
            # what is cut or weighs nothing only the tokens tell
            return self(record, dropped) is not None
        if self._is_void(record, dropped):
            return False
        if not any(
            message["role"] in ("assistant", "text") and message.get("loss", True) for message in record.messages
        ):
            dropped.add(_NOTHING_LEARNT, where)
            return False
        if most_tokens(record, None, self.processor) <= self.max_tokens:
            check_files(record.images, record.videos, where)
            return True
        thinking = thinking_of(record, self.processor.template)
        options: dict[str, Any] = {"tools": record.tools, "thinking": thinking, "where": where}
        if self.processor.measure(record.messages, record.images, record.videos, **options)[0] <= self.max_tokens:
            return True
        dropped.add(_too_long(self.max_tokens), where)
        return False

    def _is_void(self, record: Record, dropped: Dropped) -> bool:
        """Whether a thought never ends, or a text holds nothing; the reason is noted."""
        empty = record.signal == "text" and not record.messages[0]["content"].strip()
        cut = any(message.get("loss", True) and has_open_thought(message) for message in record.messages)
        if empty or cut:
            dropped.add(_EMPTY_TEXT if empty else OPEN_THOUGHT, place_of(record))
        return empty or cut

    def collate(self, samples: Sequence[Sample]) -> MicroBatch:
        return collate(samples, self.processor.tokens)

    def _weights(self, encoded: Encoded, weight: float) -> np.ndarray:
        """Tokens of a turn up to and including the end of its thought weigh `thought_weight`, the
        others `answer_weight`.
        """
        out = np.full(encoded.num_tokens, weight * self.answer_weight, np.float32)
        end = self.processor.tokenizer.special.get("</think>")
        if end is None or self.thought_weight == self.answer_weight:
            return out
        for last in np.flatnonzero((encoded.row.input_ids_L == end) & encoded.trained_L):
            before = np.flatnonzero(~encoded.trained_L[:last])
            out[before[-1] + 1 if len(before) else 0 : last + 1] = weight * self.thought_weight
        return out


class BatchStream:
    """Endless windows of `accumulation` micro-batches of `rows` rows each (with packing: of
    `rows * max_tokens` tokens each).

    `shard` gives records in an order that its position alone decides; rows read but not yet used
    are remembered by position, so the state is a few integers and a resumed stream continues with
    the very next window.
    """

    def __init__(
        self,
        shard: Shard[Record],
        encoder: RecordEncoder,
        *,
        rows: int,
        accumulation: int,
        packing: bool = False,
        best_fit: bool = False,
    ) -> None:
        self.shard, self.encoder, self.rows, self.accumulation = shard, encoder, rows, accumulation
        self.packing, self.best_fit = packing, best_fit
        self.dropped = Dropped()
        self._waiting: list[tuple[int, Packable]] = []
        self._looked = False  # through all rows, and found one that can be used

    def __iter__(self) -> Iterator[list[Any]]:
        while True:
            yield [self._micro_batch() for _ in range(self.accumulation)]

    @property
    def taken(self) -> int:
        """Rows that all ranks have used or dropped so far; those that wait in the packing window
        are not counted.
        """
        return self.shard.position - len(self._waiting) * self.shard.size

    @property
    def epoch(self) -> float:
        """Passes over the data so far."""
        return self.taken / len(self.shard.mixture)

    def _micro_batch(self) -> Any:
        samples = (
            [s for _ in range(self.rows) for s in self._pack()]
            if self.packing
            else [self._next()[1] for _ in range(self.rows)]
        )
        return self.encoder.collate(samples)

    def _next(self) -> tuple[int, Packable]:
        """The next usable row and its position."""
        if self._waiting:
            return self._waiting.pop(0)
        missed, rows = 0, len(self.shard.mixture)
        while True:
            position = self.shard.position
            sample = self.encoder(next(self.shard), self.dropped)
            if sample is not None:
                return position, sample
            missed += 1
            # Two shuffled passes may put 2n - 2 unusable rows side by side, and of several ranks
            # one may long wait for a row that others get.
            if missed > _PATIENCE * rows or (missed > rows and not self._looked and not self._any_usable()):
                raise ValueError(
                    say(
                        "no row of the training data can be used: {why}; raise max_seq_len or check the data with `data check`",
                        "训练数据没有一行可用：{why}；请调大 max_seq_len，或用 `data check` 检查数据",
                        why=join("; ", self.dropped.lines()),
                    )
                )

    def _any_usable(self) -> bool:
        """Whether any row of the data can be used at all. Looks at each once, and remembers that
        there is one.
        """
        sources = self.shard.mixture.sources
        every = (self.encoder(rows[i], self.dropped) is not None for rows in sources for i in range(len(rows)))
        self._looked = any(every)
        return self._looked

    def _pack(self) -> list[Packable]:
        """One sequence of at most max_tokens: rows in reading order, or the best fit among the next
        WINDOW_ROWS.
        """
        first = self._next()
        chosen, room = [first[1]], self.encoder.max_tokens - first[1].num_tokens
        while True:
            self._look_ahead(WINDOW_ROWS if self.best_fit else 1)
            fits = [i for i, (_, s) in enumerate(self._waiting) if s.num_tokens <= room]
            if not fits:
                return chosen
            best = max(fits, key=lambda i: self._waiting[i][1].num_tokens) if self.best_fit else fits[0]
            sample = self._waiting.pop(best)[1]
            chosen.append(sample)
            room -= sample.num_tokens

    def _look_ahead(self, count: int) -> None:
        while len(self._waiting) < count:
            waiting, self._waiting = self._waiting, []
            item = self._next()
            self._waiting = [*waiting, item]

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, between two windows."""
        return {
            "shard": self.shard.state_dict(),
            "waiting": [p for p, _ in self._waiting],
            **self.dropped.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken. Raises ValueError when the data are no longer the
        same.
        """
        self.shard.load_state_dict(state["shard"])
        self.dropped = Dropped.of(state)
        self._waiting = []
        for position in state["waiting"]:
            sample = self.encoder(self.shard.mixture[position + self.shard.rank], Dropped())
            if sample is None:
                raise ValueError(
                    say(
                        f"row at position {position} must be usable as in the saved run; restore max_seq_len and "
                        "the data, or start without the data state",
                        f"位置 {position} 的行须像保存时一样可用；请恢复 max_seq_len 和数据，或不带数据状态重新开始",
                    )
                )
            self._waiting.append((position, sample))
        for position in state.get("unread", ()):  # `dealt_again`
            sample = self.encoder(self.shard.mixture[position + self.shard.rank], self.dropped)
            if sample is not None:
                self._waiting.append((position, sample))


def dealt_again(states: Sequence[Mapping[str, Any]], rank: int, size: int) -> dict[str, Any]:
    """The state of `rank` among `size` from the states of all ranks of a run that had another
    number of them: every row is used once, as before.

    Where packs or dropped rows let some ranks read further than others, the new ones begin where
    the furthest stood; what others had not read by then, and what waited, is dealt out in turn, in
    reading order.
    """
    ends = [int(state["shard"]["position"]) for state in states]
    start, old = max(ends), len(states)
    waited = (p + r for r, state in enumerate(states) for p in state["waiting"])
    behind = (p + r for r, end in enumerate(ends) for p in range(end, start, old))
    mine = {"waiting": sorted(waited)[rank::size], "unread": sorted(behind)[rank::size]}
    merged = Dropped()
    for state in states if rank == 0 else ():
        merged = _merged(merged, Dropped.of(state))
    return {
        "shard": {**states[0]["shard"], "position": start},
        **merged.state_dict(),
        **{what: [index - rank for index in rows] for what, rows in mine.items()},
    }


def _merged(one: Dropped, other: Dropped) -> Dropped:
    """What two ranks dropped: a row that both met counts once."""
    for why, count in other.count.items():
        ours, theirs = one.rows.setdefault(why, set()), other.rows.get(why, set())
        one.count[why] = one.count.get(why, 0) + count - len(ours & theirs)
        ours |= theirs
    return one


def steps_per_epoch(stream_of: Callable[[], BatchStream], sample_rows: int = 256) -> float:
    """Optimizer steps that one pass over the data takes, measured on the first `sample_rows` rows:
    rows that are dropped make it shorter, and packs hold what they hold. Exact where no row is
    dropped or packed. Raises ValueError where no row can be used.
    """
    stream = stream_of()
    total, windows = len(stream.shard.mixture), 0
    for _ in stream:
        windows += 1
        if stream.taken >= min(sample_rows, total):
            break
    return windows * total / stream.taken

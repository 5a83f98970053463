"""What all readers share: the fields of one row, dialogues in every spelling, media and their tags, the finished record.

Refuses to know: which format a row has, how files are stored, whether a picture exists.
Source: ecosystem.md 2.2, 4.3 (column aliases, roles, content parts); methods.md 9.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar, cast

from ernie_tune.data.records import (
    IMAGE_TAG,
    MODES,
    VIDEO_TAG,
    Candidate,
    DataError,
    Media,
    Message,
    Record,
    Reward,
    show,
)

T = TypeVar("T")

DIALOGUES = ("messages", "conversations", "conversation")
QUERIES = ("prompt", "query", "question", "problem", "instruction", "input")
RESPONSES = ("response", "completion", "output", "answer", "target", "targets", "text", "content")

_ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "User", "USER"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatgpt", "model", "Assistant", "ASSISTANT"), "assistant"),
    **dict.fromkeys(("tool", "observation", "tool_response", "function_response", "function", "ipython"), "tool"),
    **{"system": "system", "System": "system", "function_call": "assistant", "tool_call": "assistant"},
}
_CALLS = ("function_call", "tool_call")  # assistant turns whose text is the call itself, as JSON
_PARTS = {"text": "", "image": IMAGE_TAG, "image_url": IMAGE_TAG, "video": VIDEO_TAG, "video_url": VIDEO_TAG}
_FOLLOWS = {"user": ("assistant",), "assistant": ("user", "tool"), "tool": ("tool", "assistant")}
_MEDIA = (("images", "image", IMAGE_TAG), ("videos", "video", VIDEO_TAG))
_KINDS = {str: "a string", list: "a list", dict: "an object", float: "a number", bool: "true or false"}


class Where(NamedTuple):
    """The place of a row. Relative media paths start in `media_dir`, or, where it has no such file, beside the data file."""

    path: str = "<rows>"
    line: int = 0
    media_dir: str = ""


class Turn(NamedTuple):
    """A message and the media its content parts brought along (None: a bare {"type": "image"}, filled from the row's column)."""

    message: Message
    media: tuple[tuple[Media | None, ...], tuple[Media | None, ...]] = ((), ())  # images, videos


@dataclass(frozen=True)
class Draft:
    """A candidate before its media are settled. `media` holds images and videos of its own columns, such as `rejected_images`."""

    turns: list[Turn]
    media: tuple[tuple[Media, ...], tuple[Media, ...]] = ((), ())
    score: float | None = None
    rank: float | None = None
    label: bool | None = None


class Fields:
    """A row that remembers which fields were taken. null counts as absent. Every complaint is a DataError with file, line and field."""

    def __init__(self, row: Mapping[str, Any], where: Where, prefix: str = "") -> None:
        self.row, self.where, self.prefix = row, where, prefix
        self._taken: set[str] = set()

    def error(self, problem: str, field: str, found: str, **params: object) -> DataError:
        return DataError(self.where.path, self.where.line, self.prefix + field, found, problem, params)

    def has(self, *names: str) -> bool:
        return any(self.row.get(name) is not None for name in names)

    def name(self, *names: str) -> str:
        """The first of these fields that the row has."""
        for name in names:
            if self.row.get(name) is not None:
                return name
        raise self.missing(*names)

    def missing(self, *names: str) -> DataError:
        """The error that none of these is there; the closest name that is there is suggested."""
        present = [str(key) for key, value in self.row.items() if value is not None]
        close = [(key, match) for key in present for match in difflib.get_close_matches(key, names, 1)]
        hint = f" ({close[0][0]} -> {close[0][1]})" if close else ""
        found, field = f"fields {', '.join(present) or 'none'}", close[0][1] if close else names[0]
        return self.error("missing", field, found, names=" or ".join(names), hint=hint)

    def take(self, *names: str) -> Any:
        """The value of the first of these fields that the row has, or None."""
        for name in names:
            if self.row.get(name) is not None:
                self._taken.add(name)
                return self.row[name]
        return None

    def typed(self, field: str, value: Any, kind: type) -> Any:
        """The value if it is of this kind, else the error."""
        if not isinstance(value, kind):
            raise self.error("type", field, show(value), kind=_KINDS[kind])
        return value

    def text(self, *names: str) -> str:
        """A required string."""
        name = self.name(*names)
        return cast(str, self.typed(name, self.take(name), str))

    def items(self, *names: str) -> list[Any]:
        """A required list; a single string counts as a list of one."""
        name = self.name(*names)
        value = self.take(name)
        return [value] if isinstance(value, str) else cast("list[Any]", self.typed(name, value, list))

    def number(self, field: str, value: Any, low: float = -math.inf, high: float = math.inf, hint: str = "") -> float:
        """A finite number in [low, high]; CSV files give it as text."""
        try:
            result = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            result = math.nan
        if math.isnan(result):
            raise self.error("type", field, show(value), kind=_KINDS[float])
        if not low <= result <= high or math.isinf(result):
            raise self.error("range", field, show(value), low=low, high=high, hint=hint)
        return result

    def number_or(self, default: T, name: str, low: float = -math.inf, high: float = math.inf) -> float | T:
        """The number of an optional field."""
        return self.number(name, self.take(name), low, high) if self.has(name) else default

    def same_length(self, field: str, values: Sequence[Any], n: int, other: str) -> None:
        if len(values) != n:
            raise self.error("count", field, f"{len(values)}", n=n, other=other)

    def nested(self, field: str, value: Any) -> Fields:
        """The fields of an object inside the row."""
        return Fields(self.typed(field, value, dict), self.where, f"{self.prefix}{field}.")

    def extra(self) -> dict[str, Any]:
        return {key: value for key, value in self.row.items() if key not in self._taken and value is not None}


def read_dialogue(f: Fields) -> list[Turn]:
    """The turns of a row before any answer column: a message list, or a query with instruction, input, history and system joined."""
    name = f.name(*DIALOGUES, *QUERIES)
    value = f.take(name)
    if isinstance(value, list) or name in DIALOGUES:
        turns = read_turns(f, name, value)
    else:
        query = f.typed(name, value, str)
        if name == "instruction" and f.has("input"):
            query = "\n".join(part for part in (query, f.text("input")) if part)
        turns = [make_turn(f, name, "user", query)]
    if f.has("history"):
        pairs = [f.typed("history", pair, list) for pair in f.items("history")]
        for pair in pairs:
            f.same_length("history", pair, 2, "of question and answer")
        turns = [
            make_turn(f, "history", role, text)
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ] + turns
    if f.has("system", "system_prompt") and turns[0].message["role"] != "system":
        system = f.text("system", "system_prompt")
        turns = [make_turn(f, "system", "system", system), *turns] if system else turns
    return turns


def read_answer(f: Fields, field: str, value: Any) -> list[Turn]:
    """An answer: a string, one message, or a list of messages."""
    if isinstance(value, str):
        return [make_turn(f, field, "assistant", value)]
    return read_turns(f, field, [value] if isinstance(value, dict) else value)


def read_answered(f: Fields) -> list[Turn]:
    """The dialogue with its answer: the last message's, or a response column's, which only message lists may lack."""
    turns = read_dialogue(f)
    if turns[-1].message["role"] == "assistant" or (f.has(*DIALOGUES) and not f.has(*RESPONSES)):
        return turns
    name = f.name(*RESPONSES)
    return turns + read_answer(f, name, f.take(name))


def read_turns(f: Fields, field: str, value: Any) -> list[Turn]:
    """Messages with role/content or from/value, whose content is text or a list of parts."""
    turns = [_read_turn(f, f"{field}[{i}]", item) for i, item in enumerate(f.typed(field, value, list))]
    if not turns:
        raise f.error("turnless", field, "no messages")
    return turns


def _read_turn(f: Fields, field: str, item: Any) -> Turn:
    row = f.nested(field, item)
    name = row.text("role", "from")
    if name not in _ROLES:
        raise row.error("choice", "role" if row.has("role") else "from", show(name), options=", ".join(_ROLES))
    content, calls = row.take("content", "value"), row.take("tool_calls")
    if name in _CALLS:
        content, calls = "", [{"type": "function", "function": _read_json(row, "value", content)}]
    if content is None and not calls:
        raise row.missing("content", "value")
    if isinstance(calls, str):
        calls = _read_json(row, "tool_calls", calls)
    turn = make_turn(row, "content", _ROLES[name], "" if content is None else content)
    if calls:
        turn.message["tool_calls"] = calls if isinstance(calls, list) else [calls]
    if row.has("reasoning_content"):
        turn.message["reasoning_content"] = row.text("reasoning_content")
    if row.has("loss", "weight"):
        turn.message["loss"] = read_flag(row, row.name("loss", "weight"))
    cast("dict[str, Any]", turn.message).update(row.extra())  # such as tool_call_id; templates may ask for it
    return turn


def make_turn(f: Fields, field: str, role: str, content: Any) -> Turn:
    """One turn. Content parts become text with tags; a tool's object becomes JSON text."""
    media: tuple[list[Media | None], list[Media | None]] = ([], [])
    if isinstance(content, list) and all(
        isinstance(part, str) or (isinstance(part, dict) and "type" in part) for part in content
    ):
        content = "".join(_read_part(f, f"{field}[{i}]", part, media) for i, part in enumerate(content))
    elif role == "tool" and isinstance(content, list | dict):
        content = json.dumps(content, ensure_ascii=False)
    return Turn({"role": role, "content": f.typed(field, content, str)}, (tuple(media[0]), tuple(media[1])))


def _read_part(f: Fields, field: str, part: Any, media: tuple[list[Media | None], list[Media | None]]) -> str:
    """The text of one content part; its medium goes to the lists."""
    if isinstance(part, str):
        return part
    row = f.nested(field, part)
    kind = row.text("type")
    if kind not in _PARTS:
        raise row.error("choice", "type", show(kind), options=", ".join(_PARTS))
    if kind == "text":
        return row.text("text")
    value = row.take(kind, "url", "path", "image", "video")
    medium = None if value is None else _read_medium(row, kind, value)
    media[_PARTS[kind] == VIDEO_TAG].append(medium)
    return _PARTS[kind]


def read_media(f: Fields, *names: str) -> tuple[Media, ...]:
    """A column of media: absent, one, or a list. Inside a list of videos, a list is the frames of one video."""
    value = f.take(*names)
    if value is None or value == "":
        return ()
    return tuple(_read_medium(f, names[0], item) for item in (value if isinstance(value, list) else [value]))


def _read_medium(f: Fields, field: str, value: Any) -> Media:
    if isinstance(value, dict):
        row = f.nested(field, value)
        value = row.take("bytes", "url", "path", "image", "video")
        if value is None:
            raise row.missing("path", "url", "bytes")
        if isinstance(value, str) and row.has("bytes"):  # JSON has no bytes, so they come as base64
            return f"data:application/octet-stream;base64,{value}"
    if field.startswith("video") and isinstance(value, list):
        return tuple(cast(str, f.typed(field, frame, str)) for frame in value)
    return value if isinstance(value, bytes) else cast(str, f.typed(field, value, str))


def read_flag(f: Fields, name: str) -> bool:
    """true/false or 1/0."""
    value = f.take(name)
    if value not in (0, 1):
        raise f.error("type", name, show(value), kind=_KINDS[bool])
    return bool(value)


def _read_json(f: Fields, field: str, text: Any) -> Any:
    try:
        return json.loads(f.typed(field, text, str))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise f.error("json", field, show(text), why=str(error)) from error


def check_dialogue(f: Fields, turns: Sequence[Turn], ends: Sequence[str]) -> None:
    """An optional system turn, then user (or tool results) and assistant in turn; the last role as the signal needs it. Raises DataError."""
    if not turns:  # ERNIEKit's src and tgt, both empty
        raise f.error("turnless", "messages", "no messages")
    roles = [turn.message["role"] for turn in turns]
    talk = roles[1:] if roles[0] == "system" else roles
    if talk[:1] != ["user"] or any(after not in _FOLLOWS.get(role, ()) for role, after in pairwise(talk)):
        raise f.error("roles", "roles", ", ".join(roles))
    if roles[-1] not in ends:
        raise f.error("last", "roles", ", ".join(roles), who=" or ".join(ends))


def finish(
    f: Fields,
    signal: str,
    turns: list[Turn],
    drafts: Sequence[Draft] = (),
    reward: Reward | None = None,
    margin: float | None = None,
    confidence: float = 1.0,
) -> Record:
    """Check turns and media, take the fields every format may have (tools, domain, mode, weight, id), and build the record."""
    check_dialogue(f, turns, ("assistant",) if signal == "sft" else ("user", "tool"))
    for draft in drafts:
        check_dialogue(f, turns + draft.turns, ("assistant",))
    images, own_images = _settle_media(f, 0, turns, drafts)
    videos, own_videos = _settle_media(f, 1, turns, drafts)
    candidates = tuple(
        Candidate(tuple(turn.message for turn in d.turns), own_images[i], own_videos[i], d.score, d.rank, d.label)
        for i, d in enumerate(drafts)
    )
    mode, row_id = f.take("mode") or "auto", f.take("id")
    if mode not in MODES:
        raise f.error("choice", "mode", show(mode), options=", ".join(MODES))
    return Record(
        signal=signal,
        messages=tuple(turn.message for turn in turns),
        images=images,
        videos=videos,
        tools=_read_tools(f),
        candidates=candidates,
        reward=reward,
        margin=margin,
        confidence=confidence,
        domain=f.text("domain", "task", "channel") if f.has("domain", "task", "channel") else "",
        mode=mode,
        weight=f.number_or(1.0, "weight", 0.0),
        id=f"{f.where.path}:{f.where.line}" if row_id is None else str(row_id),
    )


def _read_tools(f: Fields) -> tuple[Mapping[str, Any], ...]:
    value = f.take("tools")
    if isinstance(value, str) and value.strip():
        value = _read_json(f, "tools", value)
    tools = [value] if isinstance(value, dict) else [] if value in (None, "") else value
    return tuple(f.typed("tools", tool, dict) for tool in f.typed("tools", tools, list))


def _settle_media(
    f: Fields, kind: int, turns: Sequence[Turn], drafts: Sequence[Draft]
) -> tuple[tuple[Media, ...], list[tuple[Media, ...]]]:
    """One medium for each tag, in reading order: first the messages', then each candidate's.

    Media without any tag get tags before the first user turn, the convention of LLaVA and LLaMA-Factory. A candidate's own list
    holds either all media of its dialogue or only those of the answer. Returns the messages' media, and each candidate's (empty
    where they are the messages').
    """
    name, single, tag = _MEDIA[kind]
    column = _merge_parts(f, kind, read_media(f, name, single), turns)
    prompt_tags, answer_tags = _count(tag, turns), [_count(tag, draft.turns) for draft in drafts]
    if column and prompt_tags + sum(answer_tags) == 0:
        prompt_tags = len(column)
        first = next(turn.message for turn in turns if turn.message["role"] == "user")
        first["content"] = tag * prompt_tags + first["content"]
    owned = [_merge_parts(f, kind, draft.media[kind], draft.turns) for draft in drafts]
    needed = prompt_tags + sum(tags for tags, own in zip(answer_tags, owned, strict=True) if not own)
    f.same_length(name, column, needed, f"{tag} tag")
    base, rest = column[:prompt_tags], column[prompt_tags:]
    settled = []
    for tags, own in zip(answer_tags, owned, strict=True):
        if own and len(own) != tags + prompt_tags:
            f.same_length(name, own, tags, f"{tag} tag of the candidate")
            own = base + own
        elif tags and not own:
            own, rest = base + rest[:tags], rest[tags:]
        settled.append(tuple(_resolve(f.where, medium) for medium in own))
    return tuple(_resolve(f.where, medium) for medium in base), settled


def _count(tag: str, turns: Sequence[Turn]) -> int:
    return sum((turn.message["content"] + turn.message.get("reasoning_content", "")).count(tag) for turn in turns)


def _merge_parts(f: Fields, kind: int, column: tuple[Media, ...], turns: Sequence[Turn]) -> tuple[Media, ...]:
    """The column, or the media that the content parts named; both only where they agree."""
    parts = [medium for turn in turns for medium in turn.media[kind]]
    named = tuple(medium for medium in parts if medium is not None)
    if not named:
        return column
    name, single, _ = _MEDIA[kind]
    f.same_length(name, named, len(parts), f"{single} part (name all of them, or none)")
    if column and column != named:
        options = f"no column, or {show(list(named))} as in the messages"
        raise f.error("choice", name, show(list(column)), options=options)
    return named


def _resolve(where: Where, medium: Media) -> Media:
    if isinstance(medium, tuple):
        return tuple(cast(str, _resolve(where, frame)) for frame in medium)
    if isinstance(medium, bytes) or "://" in medium or medium.startswith("data:") or os.path.isabs(medium):
        return medium
    beside = os.path.join(os.path.dirname(where.path), medium)
    inside = os.path.join(where.media_dir, medium)
    return inside if where.media_dir and (os.path.exists(inside) or not os.path.exists(beside)) else beside

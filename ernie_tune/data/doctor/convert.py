"""Records -> rows of a common format, written to a new file; whatever the format cannot say is
refused with its place.

What a format cannot say is not listed anywhere: each row is read back, and anything but the same
record is a refusal.
Refuses to know: tokens, pixels.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.data.readers.fields import Where
from ernie_tune.data.readers.formats import match, read
from ernie_tune.data.records import Candidate, DataError, Media, Message, Record, show

_SHAREGPT = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}
# Fields that every format has, written where they are not the default.
_COMMON: dict[str, Any] = {"images": (), "videos": (), "tools": (), "domain": "", "mode": "auto", "weight": 1.0}
_COMPARED = ("signal", "messages", "candidates", "margin", "confidence", *_COMMON)


def convert_file(records: Iterable[Record], form: str, target: str) -> int:
    """Write the records as rows of a format of `WRITERS`; returns how many. Relative paths of media
    become relative to the new file.

    Raises DataError for a bad row, ValueError for one that the format cannot express, an unknown
    format, or an existing file.
    """
    if form not in WRITERS:
        raise ValueError(
            say(
                f"format ({form!r}) must be one of {', '.join(WRITERS)}; choose one",
                f"格式（{form!r}）须为 {', '.join(WRITERS)} 之一；请选一种",
            )
        )
    if os.path.exists(target):
        raise ValueError(
            say(
                f"{target} exists and is not overwritten; remove or rename it",
                f"{target} 已存在，不会覆盖；请删除或改名",
            )
        )
    count = 0
    try:
        with open(target + ".tmp", "w", encoding="utf-8", newline="\n") as out:
            for record in records:
                for row in convert(record, form, target):
                    out.write(json.dumps(row, ensure_ascii=False, default=_as_text) + "\n")
                    count += 1
        os.replace(target + ".tmp", target)
    finally:
        if os.path.exists(target + ".tmp"):
            os.remove(target + ".tmp")
    return count


def convert(record: Record, form: str, target: str) -> Iterator[dict[str, Any]]:
    """The rows that say the same as a record: one, or for `pairs` one for every preference. Raises
    ValueError where there is none.
    """
    base = os.path.dirname(os.path.abspath(target))
    parts = list(_pairs(record)) if form == "pairs" else [record]
    if not parts:
        raise _refusal(record, form, "signal", record.signal)
    for part in parts:
        moved = _with_media(part, lambda medium: _moved(medium, record.meta.path, base))
        row = WRITERS[form](moved)
        row.update({name: value for name, value in vars(moved).items() if name in _COMMON and value != _COMMON[name]})
        if record.id != str(record.meta):
            row["id"] = record.id
        row.update({key: value for key, value in record.meta.extra.items() if key not in row})
        _check(moved, row, form, target)
        yield row


def _check(record: Record, row: dict[str, Any], form: str, target: str) -> None:
    """Refuse a row that does not read back as the record. The exact-match reward that a label
    implies may go.
    """
    plain = json.loads(json.dumps(row, default=_as_text))
    found = match(plain)
    if found is None:
        raise _refusal(record, form, "signal", record.signal)
    try:
        back = read(plain, found, Where(target, record.meta.line))
    except DataError as error:
        raise _refusal(record, form, error.field, error.found) from error
    base = os.path.dirname(target)
    ours, theirs = vars(_with_media(record, lambda medium: _joined(base, medium))), vars(back)
    for name in _COMPARED:
        if ours[name] != theirs[name]:
            raise _refusal(record, form, name, show(ours[name]))


def _joined(base: str, medium: Media) -> Media:
    """A medium as a reader of a file in the folder `base` resolves it."""
    is_path = isinstance(medium, str) and "://" not in medium and not medium.startswith("data:")
    return os.path.join(base, str(medium)) if is_path else medium


def _refusal(record: Record, form: str, field: str, found: str) -> ValueError:
    return ValueError(
        say(
            f"{record.meta}: {field} ({found}) must be something that {form} can express; "
            "convert to another format, or drop the row",
            f"{record.meta}：{form} 格式无法表达 {field}（{found}）；请转换为其他格式，或删去该行",
        )
    )


def _with_media(record: Record, change: Callable[[Any], Media]) -> Record:
    """The record with every path of a medium changed."""

    def each(media: tuple[Media, ...]) -> tuple[Media, ...]:
        return tuple(tuple(map(str, map(change, m))) if isinstance(m, tuple) else change(m) for m in media)

    candidates = tuple(
        dataclasses.replace(one, images=each(one.images), videos=each(one.videos)) for one in record.candidates
    )
    return dataclasses.replace(record, images=each(record.images), videos=each(record.videos), candidates=candidates)


def _moved(medium: str | bytes, source: str, base: str) -> str:
    """A medium as a file in the folder `base` names it: relative, unless its own file gave an
    absolute path or a URL.
    """
    if isinstance(medium, bytes):
        return f"data:application/octet-stream;base64,{base64.b64encode(medium).decode()}"
    folder = os.path.dirname(os.path.abspath(source))
    if "://" in medium or medium.startswith("data:"):
        return medium
    if os.path.isabs(medium) and os.path.commonpath([medium, folder]) != folder:
        return medium
    return os.path.relpath(medium, base)


def _as_text(value: Any) -> str:
    """What JSON does not know, in fields that no reader takes (parquet has bytes and dates)."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _pairs(record: Record) -> Iterator[Record]:
    """A record for each preference among the candidates."""
    for better, worse in record.preferences():
        sides = [
            dataclasses.replace(record.candidates[i], rank=1.0 + n, label=None) for n, i in enumerate((better, worse))
        ]
        if any(side.score is None for side in sides):
            sides = [dataclasses.replace(side, score=None) for side in sides]
        yield dataclasses.replace(record, signal="pair", candidates=tuple(sides))


def _write_messages(record: Record) -> dict[str, Any]:
    return {"messages": [dict(turn) for turn in record.messages]}


def _write_sharegpt(record: Record) -> dict[str, Any]:
    return {"conversations": [{"from": _SHAREGPT[turn["role"]], "value": turn["content"]} for turn in record.messages]}


def _write_alpaca(record: Record) -> dict[str, Any]:
    turns = [turn["content"] for turn in record.messages]
    row: dict[str, Any] = {"system": turns.pop(0)} if record.messages[0]["role"] == "system" else {}
    answer = {"output": turns.pop()} if len(turns) % 2 == 0 else {}
    row.update({"instruction": turns.pop() if turns else "", **answer})
    if turns:
        row["history"] = [list(pair) for pair in zip(turns[::2], turns[1::2], strict=True)]
    return row


def _write_pair(record: Record) -> dict[str, Any]:
    first = record.messages[0]
    plain = len(record.messages) == 1 and set(first) == {"role", "content"}
    row: dict[str, Any] = {"prompt": first["content"]} if plain else _write_messages(record)
    scores = {}
    for name, side in zip(("chosen", "rejected"), record.candidates, strict=True):
        row[name] = _write_answer(side)
        if side.images:
            row[f"{name}_images"] = list(side.images)
        if side.score is not None:
            scores[name] = side.score
    if scores:
        row.update({"score": scores, "scale": [0, 1]})
    row.update({"confidence": record.confidence} if record.confidence != 1.0 else {})
    row.update({"margin": record.margin} if record.margin is not None else {})
    return row


def _write_answer(side: Candidate) -> str | list[Message]:
    single = len(side.messages) == 1 and set(side.messages[0]) == {"role", "content"}
    return side.messages[0]["content"] if single else list(side.messages)


WRITERS: dict[str, Callable[[Record], dict[str, Any]]] = {
    "messages": _write_messages,
    "sharegpt": _write_sharegpt,
    "alpaca": _write_alpaca,
    "pairs": _write_pair,
}

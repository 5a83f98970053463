"""One row while it is read: its fields, what has been taken of them, its place, and the turns and
candidates that come out.

Refuses to know: what fields mean, which format a row has, how files are stored.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

from ernie_tune.config.language import say
from ernie_tune.data.records import DataError, Media, Message, Note, show

T = TypeVar("T")

KINDS = {
    str: say("a string", "字符串"),
    list: say("a list", "列表"),
    dict: say("an object", "对象"),
    float: say("a number", "数字"),
    bool: say("true or false", "true 或 false"),
}


def read_list(value: object) -> list[Any] | None:
    """The list that a cell of a table holds as text, in JSON's spelling or in Python's (pandas
    writes ['a.png']); None for any other value.
    """
    if not isinstance(value, str) or value.lstrip()[:1] != "[" or value.rstrip()[-1:] != "]":
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            items = parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(items, list):
            return items
    return None


class Where(NamedTuple):
    """The place of a row. Relative media paths start in `media_dir`, or, where it has no such file,
    beside the data file.
    `media`: the kinds ("image", "video") that other rows of the file show.
    """

    path: str = "<rows>"
    line: int = 0
    media_dir: str = ""
    media: tuple[str, ...] = ()


class Turn(NamedTuple):
    """A message and the media its content parts brought along (None: a bare {"type": "image"},
    filled from the row's column).
    """

    message: Message
    media: tuple[tuple[Media | None, ...], tuple[Media | None, ...]] = ((), ())  # images, videos


@dataclass(frozen=True)
class Draft:
    """A candidate before its media are settled. `media` holds images and videos of its own columns,
    such as `rejected_images`.
    """

    turns: list[Turn]
    media: tuple[tuple[Media, ...], tuple[Media, ...]] = ((), ())
    score: float | None = None
    rank: float | None = None
    label: bool | None = None


class Fields:
    """A row that remembers which fields were taken. null counts as absent. Every complaint is a
    DataError with file, line and field. An object knows those inside it and not the one it is in: a
    cycle would keep each row, pictures and all, until a collector came by.
    """

    def __init__(self, row: Mapping[str, Any], where: Where, prefix: str = "", notes: list[Note] | None = None) -> None:
        self.row, self.where, self.prefix = row, where, prefix
        self.parts: list[Fields] = []  # the fields of every object in this one that was looked into
        self.notes: list[Note] = [] if notes is None else notes  # of the row
        self._taken: set[str] = set()

    def all_parts(self) -> Iterator[Fields]:
        """These fields and those of all objects inside."""
        yield self
        for part in self.parts:
            yield from part.all_parts()

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
        found = say("fields {names}", "字段 {names}", names=", ".join(present) or say("none", "无"))
        field = close[0][1] if close else names[0]
        return self.error("missing", field, found, names=" or ".join(names), hint=hint)

    def take(self, *names: str) -> Any:
        """The value of the first of these fields that the row has, or None."""
        for name in names:
            if self.row.get(name) is not None:
                self._taken.add(name)
                return self.row[name]
        return None

    def use(self, *names: str) -> None:
        """Count these fields as taken: they say nothing that has not been read."""
        self._taken.update(names)

    def took(self, *names: str) -> bool:
        """Whether one of these fields has been taken."""
        return not self._taken.isdisjoint(names)

    def note(self, code: str, field: str, found: str) -> None:
        """Remember something that the reader had to decide, to be told once for the file."""
        self.notes.append((code, self.prefix + field, found))

    def typed(self, field: str, value: Any, kind: type) -> Any:
        """The value if it is of this kind, else the error."""
        if not isinstance(value, kind):
            raise self.error("type", field, show(value), kind=KINDS[kind])
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
            raise self.error("type", field, show(value), kind=KINDS[float])
        if not low <= result <= high or math.isinf(result):
            raise self.error("range", field, show(value), low=low, high=high, hint=hint)
        return result

    def number_or(self, default: T, name: str, low: float = -math.inf, high: float = math.inf) -> float | T:
        """The number of an optional field."""
        return self.number(name, self.take(name), low, high) if self.has(name) else default

    def same_length(self, field: str, values: Sequence[Any], n: int, other: str, hint: str = "") -> None:
        if len(values) != n:
            raise self.error("count", field, f"{len(values)}", n=n, other=other, hint=hint)

    def nested(self, field: str, value: Any) -> Fields:
        """The fields of an object inside the row."""
        inner = Fields(self.typed(field, value, dict), self.where, f"{self.prefix}{field}.", self.notes)
        self.parts.append(inner)
        return inner

    def extra(self) -> dict[str, Any]:
        """The fields that nobody took."""
        return {key: value for key, value in self.row.items() if key not in self._taken and value is not None}

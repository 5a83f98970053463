"""Checkers of answers with a structure: boxes, objects, tables, dates. Completion and gold in, a
score on [0, 1] out.

Refuses to know: records, pictures, how scores are weighed. Surplus never pays: every part of an
answer counts at most once, and parts too many cost.
"""

from __future__ import annotations

import datetime
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.rewards.reading import MAX_TEXT, answer_span, fold, squash, without_thought
from ernie_tune.rewards.scores import Box, iou

MAX_OBJECT, MAX_DEPTH = 1 << 16, 8
_N = r"\s*([+-]?\d+(?:\.\d+)?)\s*"
_BOX = re.compile(rf"[\[(]{_N},{_N},{_N},{_N}[\])]|\({_N},{_N}\)\s*,\s*\({_N},{_N}\)")
_FENCE = re.compile(r"\s*(?:```(?:json)?[ \t]*\n?)?(\{.*\})\s*(?:```)?\s*", re.DOTALL)
_MONTHS = {
    name: number
    for number, names in enumerate(
        [
            "jan january",
            "feb february",
            "mar march",
            "apr april",
            "may may",
            "jun june",
            "jul july",
            "aug august",
            "sep september",
            "oct october",
            "nov november",
            "dec december",
        ],
        1,
    )
    for name in names.split()
}


def _boxes_in(span: str, frame: float | None, size: Sequence[int] | None) -> list[Box]:
    """Every box of a span, in pixels: [x1,y1,x2,y2] or (x1,y1),(x2,y2). `frame` 1000 or 1 with the
    picture's `size` (width, height): relative ones.
    """
    found = [[float(n) for n in parts if n] for parts in _BOX.findall(span)]
    if frame and size:
        found = [[x / frame * side for x, side in zip(box, (*size[:2], *size[:2]), strict=True)] for box in found]
    return [(b[0], b[1], b[2], b[3]) for b in found]


def box(
    text: str,
    gold: Sequence[float],
    frame: float | None = None,
    size: Sequence[int] | None = None,
    threshold: float | None = None,
    style: str = "auto",
) -> float:
    """IoU of the only box that the answer states with `gold` (pixels); 1 or 0 by a `threshold`.
    Several boxes, or corners in the wrong order, are 0.
    """
    span = answer_span(text, style)
    found = _boxes_in(span, frame, size) if span is not None else []
    if len(found) != 1:
        return 0.0
    overlap = iou(found[0], (gold[0], gold[1], gold[2], gold[3]))
    return overlap if threshold is None else float(overlap >= threshold)


def boxes(
    text: str,
    golds: Sequence[Sequence[float]],
    frame: float | None = None,
    size: Sequence[int] | None = None,
    threshold: float = 0.5,
) -> float:
    """F1 of the answer's boxes matched one to one with the golds at IoU >= threshold, as many pairs
    as there can be. Repeats are surplus; more than 4 golds + 8 boxes are 0.
    """
    after = without_thought(text) if len(text) <= MAX_OBJECT else None
    if after is not None and ("\\boxed{" in after or "<answer>" in after):
        after = answer_span(after)
    found = _boxes_in(fold(after), frame, size) if after is not None else []
    if not found or len(found) > 4 * len(golds) + 8:
        return float(not golds and after is not None and not found)
    near = [
        [j for j, gold in enumerate(golds) if iou(b, (gold[0], gold[1], gold[2], gold[3])) >= threshold] for b in found
    ]
    return 2 * _matched(near) / (len(found) + len(golds))


def _matched(near: Sequence[Sequence[int]]) -> int:
    """The largest number of pairs, each side used once: `near[i]` are the partners that i may take
    (augmenting paths).
    """
    owner: dict[int, int] = {}

    def take(i: int, tried: set[int]) -> bool:
        for j in near[i]:
            if j not in tried:
                tried.add(j)
                if j not in owner or take(owner[j], tried):
                    owner[j] = i
                    return True
        return False

    return sum(take(i, set()) for i in range(len(near)))


def read_object(text: str) -> dict[str, Any] | None:
    """The one JSON object that an answer is, fenced or not; None for none, two, equal keys twice,
    NaN, or more than MAX_DEPTH levels.
    """
    after = without_thought(text) if len(text) <= MAX_TEXT else None
    if after is None or len(after) > MAX_OBJECT:
        return None
    span = after if "{" in after else (answer_span(text) or "")
    tagged = answer_span(text, "tag")
    parts = _FENCE.fullmatch(tagged if tagged is not None else span)
    if not parts or _depth(parts[1]) > MAX_DEPTH:
        return None

    def once(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({key for key, _ in items}) != len(items):
            raise ValueError(say("a key stands twice", "有一个键出现两次"))
        return dict(items)

    def refuse(name: str) -> float:
        raise ValueError(say(f"{name} is no number", f"{name} 不是数"))

    try:
        found = json.loads(parts[1], object_pairs_hook=once, parse_constant=refuse)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _depth(text: str) -> int:
    """How deep braces and brackets nest at most, those in strings counted too: a bound, not a
    parse.
    """
    depth = deepest = 0
    for char in text:
        if char in "{[":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "}]":
            depth -= 1
    return deepest


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], str]:
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        return {path: squash(fold(str(value)))}
    return {key: leaf for name, part in items for key, leaf in _leaves(part, (*path, name)).items()}


def kie(text: str, gold: Mapping[str, Any]) -> float:
    """F1 over (path, value) of the answer's JSON object (key information extraction); values are
    compared as `reading.squash` writes them.
    """
    found = read_object(text)
    if found is None:
        return 0.0
    want, got = _leaves(dict(gold)), _leaves(found)
    hits = sum(got.get(path) == value for path, value in want.items())
    return 2 * hits / (len(want) + len(got)) if want or got else 1.0


def json_schema(text: str, schema: Mapping[str, Any]) -> float:
    """1 where the answer's JSON object is valid against the schema (package jsonschema). Raises
    ImportError without the package, ValueError for a schema that is none or holds a pattern, which
    could take for ever.
    """
    import jsonschema

    if '"pattern' in json.dumps(schema):
        raise ValueError(
            say(
                "schema (has a pattern) must do without patterns, which an answer could make very slow; use enum",
                "schema（含有 pattern）不能用 pattern，回答可使其极慢；请用 enum",
            )
        )
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(
            say(
                f"schema ({error.message}) must be a JSON schema; correct it",
                f"schema（{error.message}）须为 JSON schema；请改正",
            )
        ) from None
    found = read_object(text)
    return float(found is not None and jsonschema.Draft202012Validator(schema).is_valid(found))


class _Cells(HTMLParser):
    """Rows of cells of the first table."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows = self.rows or [[]]
            self.rows[-1].append("")
            self.open = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th", "tr"):
            self.open = False

    def handle_data(self, data: str) -> None:
        if self.open and self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def read_table(text: str) -> list[list[str]]:
    """Rows of cells of an answer's table, HTML or Markdown; empty where there is none."""
    after = without_thought(text) if len(text) <= MAX_OBJECT else None
    if after is None:
        return []
    if "<t" in after:
        parser = _Cells()
        parser.feed(after)
        return [row for row in parser.rows if row]
    lines = [line.strip().strip("|") for line in after.splitlines() if "|" in line]
    rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [row for row in rows if not all(re.fullmatch(r":?-+:?", cell) for cell in row)]


def _cells(rows: Sequence[Sequence[Any]]) -> Counter[tuple[str, str, str]]:
    """(row's first cell, column's head, value) of each cell below the head and right of the first
    column.
    """
    if not rows:
        return Counter()
    form = lambda value: squash(fold(str(value)))  # noqa: E731
    heads = [form(head) for head in rows[0]]
    return Counter(
        (form(row[0]), heads[i] if i < len(heads) else "", form(cell))
        for row in rows[1:]
        for i, cell in enumerate(row)
        if i
    )


def table(text: str, gold: Sequence[Sequence[Any]]) -> float:
    """F1 over (row, column, value) of an HTML or Markdown table, each cell counted once. `gold`:
    rows of cells, heads first.
    """
    got, want = _cells(read_table(text)), _cells(gold)
    if not got.total() + want.total():
        return 0.0
    return 2 * (got & want).total() / (got.total() + want.total())


def date(text: str, gold: str, dayfirst: bool | None = None, style: str = "auto") -> float:
    """1 where the answer is the day `gold` (ISO): 2024-03-05, 2024年3月5日, 5 March 2024, March 5,
    2024. 03/05/2024 counts only where `dayfirst` says how it is meant. Raises ValueError for a gold
    that is no date.
    """
    try:
        wanted = datetime.date.fromisoformat(gold)
    except ValueError:
        raise ValueError(
            say(
                f"gold ({gold!r}) must be a date such as 2024-03-05; correct it",
                f"标准答案（{gold!r}）须为日期，如 2024-03-05；请改正",
            )
        ) from None
    span = answer_span(text, style)
    return float(span is not None and _read_date(span, dayfirst) == wanted)


def _read_date(span: str, dayfirst: bool | None) -> datetime.date | None:
    span = span.strip().rstrip(".。")
    parts = re.fullmatch(r"(\d{4})\s*[-/.年]\s*(\d{1,2})\s*[-/.月]\s*(\d{1,2})\s*[日号]?", span)
    if parts:
        return _day(parts[1], parts[2], parts[3])
    parts = re.fullmatch(r"(\d{1,2})(?:st|nd|rd|th)?\s+([A-Za-z]+)\.?,?\s+(\d{4})", span)
    if parts and parts[2].casefold() in _MONTHS:
        return _day(parts[3], _MONTHS[parts[2].casefold()], parts[1])
    parts = re.fullmatch(r"([A-Za-z]+)\.?\s+(\d{1,2})(?:st|nd|rd|th)?,?\s+(\d{4})", span)
    if parts and parts[1].casefold() in _MONTHS:
        return _day(parts[3], _MONTHS[parts[1].casefold()], parts[2])
    parts = re.fullmatch(r"(\d{1,2})[/.-](\d{1,2})[/.-](\d{4})", span)
    if parts and dayfirst is not None:
        return _day(parts[3], *((parts[2], parts[1]) if dayfirst else (parts[1], parts[2])))
    return None


def _day(year: str, month: str | int, day: str) -> datetime.date | None:
    try:
        return datetime.date(int(year), int(month), int(day))
    except ValueError:
        return None

"""The rows of one file by number: jsonl, json, csv, tsv, parquet, arrow, a folder with one
sub-folder a class, rows in memory.

What a file is its first bytes say, not its name. Refuses to know: what a row means, how files are
listed, the network. Memory: 24 bytes a row for the index (a JSON list is read whole once, to find
its rows; JSON by columns stays); a row is read from disk when it is asked for. See
`parquet_rows.py` for the rest.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.file_kinds import BOM, charset, columns_of, delimiter, file_kind, lists_of, why_no_json
from ernie_tune.data.parquet_rows import ArrowRows, ParquetRows
from ernie_tune.data.readers.media import IMAGE_SUFFIXES
from ernie_tune.data.records import DataError, show


class Rows(Protocol):
    """Rows of one source by number; `line` is what messages call a row."""

    path: str

    def __len__(self) -> int: ...

    def line(self, i: int) -> int: ...

    def __getitem__(self, i: int) -> Mapping[str, Any]: ...


def open_file(path: str) -> Rows:
    """The rows of a file, or of a folder with one sub-folder a class. Raises DataError."""
    kind = file_kind(path)
    if kind == "parquet":
        return ParquetRows(path)
    if kind == "arrow":
        return ArrowRows(path)
    if kind == "classes":
        return ClassRows(path)
    if kind == "text":
        with open(path, "rb") as file:
            text = decode(file.read().removeprefix(BOM), path, 1)
        return MemoryRows([{"text": text}], path)
    rows = FileRows(path, kind)
    if kind == "objects" and len(rows) == 1 and (table := columns_of(rows[0])):
        return MemoryRows(table, path)
    return rows


class FileRows:
    """The rows of one text file by number. `index_n3` holds (first byte, number of bytes, 1-based
    line) of each row.
    """

    def __init__(self, path: str, kind: str = "") -> None:
        self.path = path
        self._stamp = _stamp(path)
        kind = kind or file_kind(path)
        self._header: list[str] = []
        self._delimiter = delimiter(path) if kind == "table" else ""
        if kind == "table":
            spans = _csv_spans(path, self._delimiter)
            first, size, line = next(spans, (0, 0, 1))
            self._header = self._cells(self._bytes(first, size), line)
            if len(set(self._header)) < len(self._header):
                params = {"why": say("give each column its own name", "每列须有不同的名称")}
                raise DataError(path, line, "header", show(self._header), "csv", params)
        else:
            spans = _json_spans(path, kind)
        flat = array("q")
        for span in spans:
            flat.extend(span)
        self.index_n3 = np.frombuffer(flat, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.index_n3)

    def line(self, i: int) -> int:
        return int(self.index_n3[i, 2])

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        """Row i. Raises DataError with file and line when it is no object, no UTF-8, or the file
        has changed since it was indexed.
        """
        first, size, line = (int(v) for v in self.index_n3[i])
        if _stamp(self.path) != self._stamp:
            raise DataError(self.path, 0, "file", say("another size or time", "大小或时间已变"), "changed", {})
        raw = self._bytes(first, size)
        if not self._header:
            return parse_json(raw, self.path, line)
        cells = self._cells(raw, line)
        if len(cells) != len(self._header):
            why = say(
                f"the header has {len(self._header)} columns; quote cells that hold the delimiter",
                f"表头有 {len(self._header)} 列；含分隔符的单元格须加引号",
            )
            raise DataError(
                self.path, line, "row", say(f"{len(cells)} cells", f"{len(cells)} 个单元格"), "csv", {"why": why}
            )
        return {name: cell for name, cell in zip(self._header, cells, strict=True) if cell != ""}

    def _bytes(self, first: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(first)
            return file.read(size)

    def _cells(self, raw: bytes, line: int) -> list[str]:
        csv.field_size_limit(sys.maxsize)
        text = decode(raw.removeprefix(BOM), self.path, line)
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter), [])


class ClassRows:
    """A folder with one sub-folder a class, pictures in each: the rows {"image", "label"} in the
    order of names.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._rows = [
            {"image": os.path.abspath(os.path.join(folder, name)), "label": os.path.basename(folder)}
            for folder in class_folders(path)
            for name in sorted(os.listdir(folder))
            if name.lower().endswith(IMAGE_SUFFIXES)
        ]

    def __len__(self) -> int:
        return len(self._rows)

    def line(self, i: int) -> int:
        return i + 1

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return self._rows[i]


def class_folders(path: str) -> list[str]:
    """The sub-folders of a folder that hold pictures, sorted."""
    inside = sorted(entry.path for entry in os.scandir(path) if entry.is_dir() and not entry.name.startswith("."))
    return [one for one in inside if any(name.lower().endswith(IMAGE_SUFFIXES) for name in os.listdir(one))]


class MemoryRows:
    """Rows that are in memory already: dicts, or a `datasets.Dataset`."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], name: str = "train_dataset") -> None:
        self.path, self._rows = name, rows

    def __len__(self) -> int:
        return len(self._rows)

    def line(self, i: int) -> int:
        return i + 1

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        row = self._rows[i]
        if not isinstance(row, Mapping):
            raise DataError(
                self.path, i + 1, "row", show(row), "json", {"why": say("give each row as a dict", "每行须为字典")}
            )
        if any(isinstance(cell, float) and math.isnan(cell) for cell in row.values()):  # pandas' empty cells
            return {name: cell for name, cell in row.items() if not (isinstance(cell, float) and math.isnan(cell))}
        return row


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def decode(raw: bytes, path: str, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = error.start
        found = say(f"byte {raw[at]:#04x} at position {at}", f"位置 {at} 的字节 {raw[at]:#04x}")
        raise DataError(path, line, "text", found, "utf8", {"charset": charset(raw)}) from error


class _TwiceError(ValueError):
    """One name stands twice in one object, with two values."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for name, value in pairs:
            if found[name] != value:
                raise _TwiceError(name)
    return found


def parse_json(raw: bytes, path: str, line: int) -> dict[str, Any]:
    """One JSON object, or a list of messages as {"messages": [...]}. Raises DataError, for half
    surrogates too, since no tokenizer takes them, and for a name that has two values in one object.
    """
    text = decode(raw, path, line)
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except _TwiceError as error:
        raise DataError(path, line, str(error), say("two values", "两个值"), "twice_named", {}) from error
    except (ValueError, RecursionError) as error:
        raise DataError(path, line, "row", show(text.strip()), "json", {"why": why_no_json(text, error)}) from error
    if (
        isinstance(value, list)
        and value
        and all(isinstance(turn, dict) and {"role", "from"} & {*turn} for turn in value)
    ):
        return {"messages": value}
    if not isinstance(value, dict):
        why = say(
            'put the fields into {...}, with their names: {"prompt": ...}', '将字段连同名称写进 {...}：{"prompt": ...}'
        )
        raise DataError(path, line, "row", show(value), "json", {"why": why})
    return value


def _json_spans(path: str, kind: str) -> Iterator[tuple[int, int, int]]:
    """Bytes of each row of a jsonl file; of a json list, whatever the extension (ERNIEKit ships
    lists as .jsonl); of objects over several lines.
    """
    with open(path, "rb") as file:
        if kind in ("list", "objects"):
            raw = file.read()
            yield from _list_spans(path, raw, raw.index(b"[")) if kind == "list" else _object_spans(path, raw)
            return
        first = 0
        for line, raw in enumerate(file, 1):
            skip = len(BOM) if line == 1 and raw.startswith(BOM) else 0
            if raw[skip:].strip():
                yield first + skip, len(raw) - skip, line
            first += len(raw)


def _object_spans(path: str, raw: bytes) -> Iterator[tuple[int, int, int]]:
    """Bytes of each of the objects that stand in a file one after the other; of one object with a
    list of objects in it, of the list's.
    """
    text, scan = raw.decode("latin-1"), json.JSONDecoder().raw_decode
    spans, first, end = [], len(BOM) if raw.startswith(BOM) else 0, 0
    while (first := first + len(text[first:]) - len(text[first:].lstrip(" \t\r\n,\x1e"))) < len(text):
        line = text.count("\n", 0, first) + 1
        try:
            value, end = scan(text, first)
        except (ValueError, RecursionError) as error:
            why = why_no_json(text[first:], error)
            raise DataError(path, line, "row", show(text[first : first + 40]), "json", {"why": why}) from error
        spans.append((first, end - first, line))
        first = end
    if len(spans) == 1 and isinstance(value, dict):
        held = lists_of(value)
        if len(held) == 1:
            key = re.search(re.escape(json.dumps(held[0])) + r"\s*:\s*\[", text)
            if key:
                yield from _list_spans(path, raw, key.end() - 1, whole=False)
                return
    yield from spans


def _list_spans(path: str, raw: bytes, at: int, whole: bool = True) -> Iterator[tuple[int, int, int]]:
    """Bytes of each element of the json list that begins at byte `at`, which must be all of the
    file if `whole`. Read as latin-1 a character is a byte, and JSON's own signs are ASCII in UTF-8.
    """
    text, scan, between = raw.decode("latin-1"), json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n,]*")
    line, before, end = 1, 0, at + 1
    while True:
        first = cast("re.Match[str]", between.match(text, end)).end()
        line, before = line + text.count("\n", before, first), first
        if text[first : first + 1] == "]":
            if not whole or not text[first + 1 :].strip():
                return
            raise DataError(
                path,
                line,
                "row",
                show(text[first : first + 40]),
                "json",
                {"why": say("end the file after ]", "文件须在 ] 处结束")},
            )
        try:
            end = scan(text, first)[1]
        except (ValueError, RecursionError) as error:
            why = why_no_json(text[first:], error)
            raise DataError(path, line, "row", show(text[first : first + 40]), "json", {"why": why}) from error
        yield first, end - first, line


def _csv_spans(path: str, delimiter: str) -> Iterator[tuple[int, int, int]]:
    """Bytes of each row of a csv file, header first; quoted cells may hold line breaks."""
    seen = [0, 0]  # bytes and lines that the csv module has taken so far

    def lines() -> Iterator[str]:
        with open(path, "rb") as file:
            for raw in _text_lines(file):
                seen[0], seen[1] = seen[0] + len(raw), seen[1] + 1
                yield raw.decode("latin-1")

    first, line = 0, 1
    csv.field_size_limit(sys.maxsize)  # a cell may hold a picture
    try:
        for cells in csv.reader(lines(), delimiter=delimiter):
            told = line == 1 and "".join(cells).removeprefix(BOM.decode("latin-1")).lower() in (
                "sep=",
                f"sep={delimiter}",
            )
            if cells and not told:
                yield first, seen[0] - first, line
            first, line = seen[0], seen[1] + 1
    except csv.Error as error:
        raise DataError(path, line, "row", say("no table", "没有表格"), "csv", {"why": f"{error}"}) from error


def _text_lines(file: io.BufferedReader) -> Iterator[bytes]:
    """The lines of a file; of one without line feeds, as old Macintoshes write it, those that
    carriage returns end.
    """
    for number, raw in enumerate(file):
        yield from raw.splitlines(keepends=True) if number == 0 and not raw.endswith(b"\n") else (raw,)

"""The rows of one file by number: jsonl, json, csv, tsv, parquet, arrow, a folder with one
sub-folder a class, rows in memory.

What a file is its first bytes say, not its name. Refuses to know: what a row means, how files are
listed, the network.
Memory: 24 bytes a row for the index, and one row group of a parquet file; a row is read from disk
when it is asked for.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.readers.media import IMAGE_SUFFIXES
from ernie_tune.data.records import DataError, show

_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 4096
# What a file begins with, where it is no rows: (its start, what it is, what turns it into rows).
_FOREIGN = (
    (b"\x1f\x8b", "gzip", "gunzip -k {path}"),
    (b"BZh", "bzip2", "bunzip2 -k {path}"),
    (b"\x28\xb5\x2f\xfd", "zstandard", "zstd -d {path}"),
    (b"\xfd7zXZ\0", "xz", "unxz -k {path}"),
    (b"7z\xbc\xaf\x27\x1c", "7-zip", "7z x {path}"),
    (b"Rar!", "RAR", "unrar x {path}"),
    (b"\xd0\xcf\x11\xe0", "Excel (.xls)", "save it as CSV UTF-8 in Excel"),
    (b"version https://git-lfs", "a Git LFS pointer", "git lfs pull"),
    (b"SQLite format 3", "SQLite", "export the table as CSV"),
    (b"%PDF", "PDF", "write its text as rows"),
    (b"\x93NUMPY", "NumPy", "write its values as rows"),
    (b"\x80\x04\x95", "pickle", "write the rows as jsonl"),
    (b"<!DOCTYPE", "a web page", "download the raw file"),
    (b"<!doctype", "a web page", "download the raw file"),
    (b"<html", "a web page", "download the raw file"),
)
_WIDE = ((b"\xff\xfe", "UTF-16LE"), (b"\xfe\xff", "UTF-16BE"))


class Rows(Protocol):
    """Rows of one source by number; `line` is what messages call a row."""

    path: str

    def __len__(self) -> int: ...

    def line(self, i: int) -> int: ...

    def __getitem__(self, i: int) -> Mapping[str, Any]: ...


def file_kind(path: str) -> str:
    """ "lines", "list", "objects", "table", "parquet", "arrow" or "classes", by the first bytes of
    a file. Raises DataError for what holds no rows.
    """
    if os.path.isdir(path):
        return "classes"
    with open(path, "rb") as file:
        raw = file.read(_HEAD_BYTES)
        kind = os.path.splitext(path)[1].lower()
        _refuse_foreign(path, raw)
        if raw[:4] == b"PAR1" or kind == ".parquet":
            return "parquet"
        if raw[:6] == b"ARROW1" or raw[:4] == b"\xff\xff\xff\xff" or kind == ".arrow":
            return "arrow"
        if kind in (".csv", ".tsv"):
            return "table"
        head = raw.removeprefix(_BOM).lstrip()
        if head[:1] == b"[":
            return "list"
        file.seek(0)
        return "objects" if head[:1] == b"{" and _goes_on(file.readline()) else "lines"


def _refuse_foreign(path: str, raw: bytes) -> None:
    for start, name, remedy in _FOREIGN:
        if raw.startswith(start):
            raise DataError(path, 0, "file", name, "foreign", {"remedy": remedy.format(path=path)})
    if raw[:4] == b"PK\x03\x04":
        sheet = path.lower().endswith((".xlsx", ".xlsm")) or b"[Content_Types].xml" in raw[:200] or b"xl/" in raw
        name, remedy = ("Excel (.xlsx)", "save it as CSV UTF-8 in Excel") if sheet else ("zip", f"unzip {path}")
        raise DataError(path, 0, "file", name, "foreign", {"remedy": remedy})
    if raw[257:262] == b"ustar":
        raise DataError(path, 0, "file", "tar", "foreign", {"remedy": f"tar xf {path}"})
    wide = next((name for start, name in _WIDE if raw.startswith(start)), "")
    if not wide and len(raw) > 3 and raw[:1] in b'[{"' and raw[1:2] == b"\0":
        wide = "UTF-16LE"
    if wide:
        remedy = f"iconv -f UTF-16 -t UTF-8 {path} > {os.path.splitext(path)[0]}.utf8{os.path.splitext(path)[1]}"
        raise DataError(path, 1, "text", wide, "foreign", {"remedy": remedy})


def _goes_on(line: bytes) -> bool:
    """Whether the first line of a file begins an object that later lines end."""
    text = line.removeprefix(_BOM).decode("utf-8", "replace").strip()
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)  # it ends where more was expected
    except RecursionError:
        return False
    return False


def open_file(path: str) -> Rows:
    """The rows of a file, or of a folder with one sub-folder a class. Raises DataError."""
    kind = file_kind(path)
    if kind == "parquet":
        return ParquetRows(path)
    if kind == "arrow":
        return ArrowRows(path)
    return ClassRows(path) if kind == "classes" else FileRows(path, kind)


class FileRows:
    """The rows of one text file by number. `index_n3` holds (first byte, number of bytes, 1-based
    line) of each row.
    """

    def __init__(self, path: str, kind: str = "") -> None:
        self.path = path
        self._stamp = _stamp(path)
        kind = kind or file_kind(path)
        self._header: list[str] = []
        self._delimiter = "\t" if path.lower().endswith(".tsv") else ","
        if kind == "table":
            spans = _csv_spans(path, self._delimiter)
            first, size, line = next(spans, (0, 0, 1))
            self._header = self._cells(self._bytes(first, size), line)
            if len(set(self._header)) < len(self._header):
                params = {"why": "give each column its own name"}
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
            why = f"the header has {len(self._header)} columns; quote cells that hold the delimiter"
            raise DataError(self.path, line, "row", f"{len(cells)} cells", "csv", {"why": why})
        return {name: cell for name, cell in zip(self._header, cells, strict=True) if cell != ""}

    def _bytes(self, first: int, size: int) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(first)
            return file.read(size)

    def _cells(self, raw: bytes, line: int) -> list[str]:
        csv.field_size_limit(sys.maxsize)
        text = decode(raw.removeprefix(_BOM), self.path, line)
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter), [])


class ParquetRows:
    """The rows of a parquet file by number, through pyarrow; "lines" are row numbers from 1. One
    row group is kept in memory.
    """

    def __init__(self, path: str) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(
                path, 0, "file", say("a parquet file", "parquet 文件"), "package", {"name": "pyarrow"}
            ) from error
        self.path = path
        try:
            self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        except (ValueError, OSError) as error:
            raise DataError(path, 0, "file", "no parquet", "damaged", {"why": str(error).partition("\n")[0]}) from error
        sizes = [self._file.metadata.row_group(k).num_rows for k in range(self._file.num_row_groups)]
        self._ends = np.cumsum([0, *sizes])
        self._group: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def line(self, i: int) -> int:
        return i + 1

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        k = int(np.searchsorted(self._ends, i, "right")) - 1
        if self._group[0] != k:
            self._group = (-1, None)  # the last one goes before the next one comes
            self._group = (k, self._file.read_row_group(k))
        return cast("Mapping[str, Any]", self._group[1].slice(i - int(self._ends[k]), 1).to_pylist()[0])


class ArrowRows:
    """The rows of an arrow file, as `datasets.save_to_disk` writes them, mapped and not read."""

    def __init__(self, path: str) -> None:
        try:
            import pyarrow as pa
        except ImportError as error:
            raise DataError(path, 0, "file", "an arrow file", "package", {"name": "pyarrow"}) from error
        self.path = path
        try:
            with open(path, "rb") as file:
                is_file = file.read(6) == b"ARROW1"
            source = pa.memory_map(path)
            self._table = (pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)).read_all()
        except (ValueError, OSError) as error:
            raise DataError(path, 0, "file", "no arrow", "damaged", {"why": str(error).partition("\n")[0]}) from error

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def line(self, i: int) -> int:
        return i + 1

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", self._table.slice(i, 1).to_pylist()[0])


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
            raise DataError(self.path, i + 1, "row", show(row), "json", {"why": "give each row as a dict"})
        return row


def _stamp(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def decode(raw: bytes, path: str, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte {raw[error.start]:#04x} at position {error.start}"
        raise DataError(path, line, "text", found, "utf8", {}) from error


def parse_json(raw: bytes, path: str, line: int) -> dict[str, Any]:
    """One JSON object. Raises DataError; half surrogates are refused too, since no tokenizer takes
    them.
    """
    text = decode(raw, path, line)
    try:
        value = json.loads(text)
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise DataError(path, line, "row", show(text.strip()), "json", {"why": str(error)}) from error
    if not isinstance(value, dict):
        raise DataError(path, line, "row", show(value), "json", {"why": "put the fields into {...}"})
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
            skip = len(_BOM) if line == 1 and raw.startswith(_BOM) else 0
            if raw[skip:].strip():
                yield first + skip, len(raw) - skip, line
            first += len(raw)


def _object_spans(path: str, raw: bytes) -> Iterator[tuple[int, int, int]]:
    """Bytes of each of the objects that stand in a file one after the other; of one object with a
    list of objects in it, of the list's.
    """
    text, scan = raw.decode("latin-1"), json.JSONDecoder().raw_decode
    spans, first, end = [], len(_BOM) if raw.startswith(_BOM) else 0, 0
    while (first := first + len(text[first:]) - len(text[first:].lstrip(" \t\r\n,"))) < len(text):
        line = text.count("\n", 0, first) + 1
        try:
            value, end = scan(text, first)
        except (ValueError, RecursionError) as error:
            raise DataError(path, line, "row", show(text[first : first + 40]), "json", {"why": str(error)}) from error
        spans.append((first, end - first, line))
        first = end
    if len(spans) == 1 and isinstance(value, dict):
        held = [key for key, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
        if len(held) == 1 and held[0] not in (
            "messages",
            "conversations",
            "conversation",
            "text_info",
            "responses",
            "tools",
        ):
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
            raise DataError(path, line, "row", show(text[first : first + 40]), "json", {"why": "end the file after ]"})
        try:
            end = scan(text, first)[1]
        except (ValueError, RecursionError) as error:
            raise DataError(path, line, "row", show(text[first : first + 40]), "json", {"why": str(error)}) from error
        yield first, end - first, line


def _csv_spans(path: str, delimiter: str) -> Iterator[tuple[int, int, int]]:
    """Bytes of each row of a csv file, header first; quoted cells may hold line breaks."""
    seen = [0, 0]  # bytes and lines that the csv module has taken so far

    def lines() -> Iterator[str]:
        with open(path, "rb") as file:
            for raw in file:
                seen[0], seen[1] = seen[0] + len(raw), seen[1] + 1
                yield raw.decode("latin-1")

    first, line = 0, 1
    csv.field_size_limit(sys.maxsize)  # a cell may hold a picture
    try:
        for cells in csv.reader(lines(), delimiter=delimiter):
            if cells:
                yield first, seen[0] - first, line
            first, line = seen[0], seen[1] + 1
    except csv.Error as error:
        raise DataError(path, line, "row", say("no table", "没有表格"), "csv", {"why": f"{error}"}) from error

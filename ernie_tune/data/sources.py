"""Files of rows -> a lazy, indexable sequence of records: jsonl, json, csv, tsv, parquet; folders, patterns, `path#500`, dataset_info.json.

Refuses to know: what a row means (`readers.py`), tokens, pixels, how data sets are mixed, the network.
Memory: 24 bytes a row for the index, whatever the rows hold; a row is read from disk when it is asked for. Nothing is ever written.
Source: ecosystem.md 2.2 (files, sampling), 4.3 (both dialects of dataset_info.json).
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np

from ernie_tune.data.readers import FORMATS, Format, Sniff, choose, read, sniff, spelt_otherwise
from ernie_tune.data.readers_fields import Fields, Where
from ernie_tune.data.readers_media import kinds_shown
from ernie_tune.data.records import DataError, Record, show

INFO_FILE = "dataset_info.json"
_EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_SAMPLED_ROWS = 32  # read to recognise a format
_BOM = b"\xef\xbb\xbf"
# LLaMA-Factory's column roles -> the field our readers know; the others keep their names (ecosystem.md 4.3).
_COLUMN_ROLES = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAG_ROLES = {
    "user_tag": ("user", "human"), "assistant_tag": ("assistant", "gpt"), "system_tag": ("system", "system"),
    "observation_tag": ("tool", "observation"), "function_tag": ("function_call", "function_call"),
}  # fmt: skip
_HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")


class FileRows:
    """The rows of one text file by number. `index_n3` holds (first byte, number of bytes, 1-based line) of each row."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._stamp = _stamp(path)
        kind = os.path.splitext(path)[1].lower()
        self._header: list[str] = []
        self._delimiter = "\t" if kind == ".tsv" else ","
        if kind in (".csv", ".tsv"):
            spans = _csv_spans(path, self._delimiter)
            first, size, line = next(spans, (0, 0, 1))
            self._header = self._cells(self._bytes(first, size), line)
            if len(set(self._header)) < len(self._header):
                params = {"why": "give each column its own name"}
                raise DataError(path, line, "header", show(self._header), "csv", params)
        else:
            spans = _json_spans(path)
        flat = array("q")
        for span in spans:
            flat.extend(span)
        self.index_n3 = np.frombuffer(flat, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.index_n3)

    def line(self, i: int) -> int:
        return int(self.index_n3[i, 2])

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        """Row i. Raises DataError with file and line when it is no object, no UTF-8, or the file has changed since it was indexed."""
        first, size, line = (int(v) for v in self.index_n3[i])
        if _stamp(self.path) != self._stamp:
            raise DataError(self.path, 0, "file", "another size or time", "changed", {})
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
        text = decode(raw.removeprefix(_BOM), self.path, line)
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter), [])


class ParquetRows:
    """The rows of a parquet file by number, through pyarrow; "lines" are row numbers from 1."""

    def __init__(self, path: str) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise DataError(path, 0, "file", "a parquet file", "package", {"name": "pyarrow"}) from error
        self.path = path
        self._table = pyarrow.parquet.read_table(path, memory_map=True)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def line(self, i: int) -> int:
        return i + 1

    def __getitem__(self, i: int) -> Mapping[str, Any]:
        return cast("Mapping[str, Any]", self._table.slice(i, 1).to_pylist()[0])


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
    """One JSON object. Raises DataError; half surrogates are refused too, since no tokenizer takes them."""
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


def _json_spans(path: str) -> Iterator[tuple[int, int, int]]:
    """Bytes of each row of a jsonl file; or of a json list, whatever the extension: ERNIEKit ships lists as .jsonl."""
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(_BOM).lstrip()
        if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(path, 1, "text", "UTF-16", "utf8", {})
        file.seek(0)
        if head.startswith(b"["):
            yield from _list_spans(path, file.read())
            return
        first = 0
        for line, raw in enumerate(file, 1):
            skip = len(_BOM) if line == 1 and raw.startswith(_BOM) else 0
            if raw[skip:].strip():
                yield first + skip, len(raw) - skip, line
            first += len(raw)


def _list_spans(path: str, raw: bytes) -> Iterator[tuple[int, int, int]]:
    """Bytes of each element of a json list. Read as latin-1 a character is a byte, and JSON's own signs are ASCII in UTF-8."""
    text, scan, between = raw.decode("latin-1"), json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n,]*")
    line, before, end = 1, 0, text.index("[") + 1
    while True:
        first = cast("re.Match[str]", between.match(text, end)).end()
        line, before = line + text.count("\n", before, first), first
        if text[first : first + 1] == "]":
            if not text[first + 1 :].strip():
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
    try:
        for cells in csv.reader(lines(), delimiter=delimiter):
            if cells:
                yield first, seen[0] - first, line
            first, line = seen[0], seen[1] + 1
    except csv.Error as error:
        raise DataError(path, line, "row", "no table", "csv", {"why": f"{error}"}) from error


@dataclass(frozen=True)
class Entry:
    """What to read: one file, folder or pattern, and how. `prob` is a mixing weight that dataset_info.json suggests."""

    path: str
    format: str = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)  # field of our readers -> column of the file
    only_columns: bool = False  # the other columns are not for the readers
    tags: Mapping[str, str] = field(default_factory=dict)
    samples: int | None = None
    prob: float | None = None


class _Part(NamedTuple):
    rows: FileRows | ParquetRows
    entry: Entry
    form: Format
    others: tuple[Format, ...]
    sniff: Sniff
    media: tuple[str, ...] = ()  # kinds that rows of the file show


class Dataset(Sequence[Record]):
    """Records of one or more files, read when asked for. `data[i]` raises DataError for a bad row; iterate over `range(len(data))` to go on."""

    def __init__(self, parts: Sequence[_Part], media_dir: str, signals: Sequence[str], picks_n: np.ndarray) -> None:
        self._parts, self._media_dir, self._signals, self._picks_n = list(parts), media_dir, tuple(signals), picks_n
        self._starts = np.cumsum([0, *(len(part.rows) for part in parts)])

    def __len__(self) -> int:
        return len(self._picks_n)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return self.select(range(len(self))[i])
        row_number = int(self._picks_n[range(len(self))[i]])
        k = int(np.searchsorted(self._starts, row_number, "right")) - 1
        part = self._parts[k]
        local = row_number - int(self._starts[k])
        where = Where(part.rows.path, part.rows.line(local), self._media_dir, part.media)
        row, extra = rename(part.rows[local], part.entry)
        record = read(row, part.form, where, part.others, extra)
        if self._signals and not set(self._signals) & set(record.serves):
            found = f"{record.signal} (read as {part.form.name})"
            raise DataError(where.path, where.line, "signal", found, "signal", {"options": ", ".join(self._signals)})
        return record

    def select(self, indices: Sequence[int]) -> Dataset:
        """These records only, in this order: a split or a sample."""
        return Dataset(self._parts, self._media_dir, self._signals, self._picks_n[np.asarray(indices, np.int64)])

    @property
    def prob(self) -> float | None:
        """The mixing weight that dataset_info.json suggests for this data set, if any."""
        return self._parts[0].entry.prob

    @property
    def files(self) -> list[tuple[str, int]]:
        """Each file with the number of its rows that are taken."""
        part_n = np.searchsorted(self._starts, self._picks_n, "right") - 1
        taken = np.bincount(part_n, minlength=len(self._parts))
        return [(part.rows.path, int(count)) for part, count in zip(self._parts, taken, strict=True)]

    @property
    def report(self) -> str:
        """One line a file: rows, format, and why this format."""
        return "\n".join(f"{part.rows.path}: {len(part.rows)} rows, {part.sniff.reason}" for part in self._parts)


def rename(row: Mapping[str, Any], entry: Entry) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The row with the names our readers know, and the columns that a column map leaves out."""
    if not entry.columns and not entry.tags:
        return _respelt(row), {}
    used = set(entry.columns.values())
    named = {name: row[column] for name, column in entry.columns.items() if column in row}
    rest = {key: value for key, value in row.items() if key not in used and key not in named}
    out = {**named, **({} if entry.only_columns else _respelt(rest))}
    if entry.tags:
        out = {key: _retag(value, entry.tags) for key, value in out.items()}
    return out, rest if entry.only_columns else {}


def _respelt(row: Mapping[str, Any]) -> Mapping[str, Any]:
    names = spelt_otherwise(row)
    return row if names is None else {names.get(key, key): value for key, value in row.items()}


def _retag(value: Any, tags: Mapping[str, str]) -> Any:
    """Messages with LLaMA-Factory's `tags` -> role and content."""
    if isinstance(value, list):
        return [_retag(item, tags) for item in value]
    role_key, content_key = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    if not isinstance(value, dict) or role_key not in value:
        return value
    roles = {tags.get(tag, default): role for tag, (role, default) in _TAG_ROLES.items()}
    role = value[role_key]
    rest = {key: item for key, item in value.items() if key not in (role_key, content_key)}
    return {**rest, "role": roles.get(role, role) if isinstance(role, str) else role, "content": value.get(content_key)}


def load_dataset(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    format: str = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    media_dir: str = "",
    dataset_dir: str = "data",
    signals: Sequence[str] = (),
    seed: int = 42,
) -> Dataset:
    """Open files as one lazy sequence of records.

    `path`: a file, folder, pattern, `path#500` (500 rows drawn with `seed`, more than there are: repeated), a name in
    `dataset_dir`/dataset_info.json, a comma list or a sequence of these. `format`: "auto", or a name of `readers.FORMATS`.
    `columns`: our field -> your column. `signals`: the signals that the caller can use, others are an error (default: all).
    Raises DataError (bad file) here and on access (bad row), ValueError (unknown format).
    """
    listed = [path] if isinstance(path, str | os.PathLike) else list(path)
    names = [name for item in listed for name in split_paths(os.fspath(item))]
    entries = [entry for name in names for entry in find(name, dataset_dir)]
    parts, picks, start = [], [], 0
    for i, entry in enumerate(entries):
        if format != "auto":
            entry = replace(entry, format=format)
        if columns:
            entry = replace(entry, columns={**entry.columns, **columns})
        opened = [_open(file, entry) for file in _files(entry.path)]
        rows = sum(len(part.rows) for part in opened)
        picks.append(start + sample(rows, entry.samples, seed + i))
        start += rows
        parts += opened
    return Dataset(parts, media_dir, signals, np.concatenate(picks) if picks else np.zeros(0, np.int64))


def split_paths(text: str) -> list[str]:
    """ "a.jsonl, b.jsonl#500" -> both; a comma inside the name of an existing file stays."""
    return [text] if os.path.exists(text) else [part.strip() for part in text.split(",") if part.strip()]


def sample(rows: int, wanted: int | None, seed: int) -> np.ndarray:
    """Row numbers in file order: all, or `wanted` of them drawn without repetition until every row was drawn equally often."""
    if wanted is None or rows == 0:
        return np.arange(rows)
    drawn = np.random.RandomState(seed).permutation(rows)[: wanted % rows]
    return np.sort(np.concatenate([np.tile(np.arange(rows), wanted // rows), drawn]))


def find(name: str, dataset_dir: str) -> list[Entry]:
    """The entry for a path, pattern or data-set name, with its #count. Raises DataError where nothing has this name."""
    base, _, count = name.rpartition("#")
    samples = int(count) if base and count.isdecimal() and not os.path.exists(name) else None
    target = name if samples is None else base
    if _files(target, must=False):
        return [Entry(target, samples=samples)]
    info = os.path.join(dataset_dir, INFO_FILE)
    if not os.path.exists(info):
        raise DataError(target, 0, "path", "nothing of this name", "file", {})
    with open(info, "rb") as file:
        table = parse_json(file.read(), info, 1)
    if target not in table:
        names = {"names": f"{target}, or a file of this name"}
        raise DataError(info, 0, target, f"names {', '.join(table)}", "missing", names)
    entry = read_info(table[target], target, info)
    return [entry if samples is None else replace(entry, samples=samples)]


def read_info(value: Any, name: str, info: str) -> Entry:
    """One entry of dataset_info.json: LLaMA-Factory's (file_name, formatting, columns, tags, num_samples) or ERNIEKit's (path, type, prob)."""
    f = Fields({name: value}, Where(info)).nested(name, value)
    if not f.has("path", "file_name"):
        raise f.error("hub", "file_name", ", ".join(hub for hub in _HUBS if f.has(hub)) or show(value))
    file = f.text("path", "file_name")
    beside = os.path.join(os.path.dirname(info), file)
    path = beside if _files(beside, must=False) else file  # ERNIEKit writes paths from the working folder
    if f.has("path"):
        kind = f.text("type") if f.has("type") else "auto"
        return Entry(path, kind, prob=f.number_or(None, "prob", 0.0))
    kind = "pairs" if f.take("ranking") else f.text("formatting") if f.has("formatting") else "auto"
    maps = [f.nested(part, f.take(part)).row if f.has(part) else {} for part in ("columns", "tags")]
    given, tags = ({key: f.typed(key, name, str) for key, name in part.items() if name is not None} for part in maps)
    columns = {_COLUMN_ROLES.get(role, role): column for role, column in given.items()}
    samples = f.number_or(None, "num_samples", 0.0)
    return Entry(path, kind, columns, bool(columns), tags, None if samples is None else int(samples))


def _files(path: str, must: bool = True) -> list[str]:
    """The data files of a file name, a folder (not its subfolders) or a pattern, sorted."""
    if os.path.isfile(path):
        found = [path]
    else:
        names = glob.glob(os.path.join(glob.escape(path), "*") if os.path.isdir(path) else path, recursive=True)
        data = (name for name in names if name.lower().endswith(_EXTENSIONS))
        found = sorted(name for name in data if os.path.basename(name) != INFO_FILE)
    if must and not found:
        raise DataError(path, 0, "path", "no data file", "file", {})
    return found


def _open(path: str, entry: Entry) -> _Part:
    """Index a file and settle its format by the first rows that can be read; the others complain when asked for."""
    rows = ParquetRows(path) if path.lower().endswith(".parquet") else FileRows(path)
    if not len(rows):
        raise DataError(path, 0, "file", "no rows", "empty", {})
    formats = choose(entry.format)
    sampled, errors = [], []
    for i in range(min(len(rows), _SAMPLED_ROWS)):
        try:
            sampled.append(rename(rows[i], entry)[0])
        except DataError as error:
            errors.append(error)
    media = kinds_shown(sampled)
    if len(formats) == 1:
        return _Part(rows, entry, formats[0], (), Sniff(formats[0].name, f"{formats[0].name}, as told"), media)
    if not sampled:
        raise errors[0]
    found = sniff(sampled, formats, path)
    return _Part(rows, entry, next(form for form in FORMATS if form.name == found.name), formats, found, media)

"""Files of rows -> a lazy, indexable sequence of records: jsonl, json, csv, tsv, parquet, txt;
folders, patterns, `path#500`, dataset_info.json.

Refuses to know: what a row means (`readers/formats.py`), tokens, pixels, how data sets are mixed,
the network.
Memory: 24 bytes a row for the index, whatever the rows hold; a row is read from disk when it is
    asked for. Nothing is ever written.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import numpy as np

from ernie_tune.config.language import counted, say
from ernie_tune.data.file_rows import MemoryRows, Rows, class_folders, open_file, parse_json
from ernie_tune.data.readers.fields import Fields, Where
from ernie_tune.data.readers.formats import (
    EXAMPLE_ROWS,
    FORMATS,
    IN_MEMORY,
    Format,
    Sniff,
    choose,
    read,
    sniff,
    spelt_otherwise,
)
from ernie_tune.data.readers.media import kinds_shown
from ernie_tune.data.records import DataError, Record, show

INFO_FILE = "dataset_info.json"
_EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
_TEXT = ".txt"  # a text each, where a folder holds no rows
# which are then refused with what to do
_COMPRESSED = (".gz", ".bz2", ".zst", ".xz", ".zip", ".xlsx", ".xls")
_SAMPLED_ROWS = 32  # read to recognise a format
_SHOWN_NAMES = 8  # of data sets, in a message
# LLaMA-Factory's column roles -> the field our readers know; the others keep their names.
_COLUMN_ROLES = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAG_ROLES = {
    "user_tag": ("user", "human"), "assistant_tag": ("assistant", "gpt"), "system_tag": ("system", "system"),
    "observation_tag": ("tool", "observation"), "function_tag": ("function_call", "function_call"),
}  # fmt: skip
_HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "cloud_file_name", "script_url")


@dataclass(frozen=True)
class DatasetEntry:
    """What to read: one file, folder or pattern, and how. `prob` is a mixing weight that
    dataset_info.json suggests.
    """

    path: str
    format: str = "auto"
    # field of our readers -> column of the file
    columns: Mapping[str, str] = field(default_factory=dict)
    only_columns: bool = False  # the other columns are not for the readers
    tags: Mapping[str, str] = field(default_factory=dict)
    samples: int | None = None
    prob: float | None = None


class _Part(NamedTuple):
    rows: Rows
    entry: DatasetEntry
    form: Format
    others: tuple[Format, ...]
    sniff: Sniff
    media: tuple[str, ...] = ()  # kinds that rows of the file show


class Dataset(Sequence[Record]):
    """Records of one or more files, read when asked for. `data[i]` raises DataError for a bad row;
    iterate over `range(len(data))` to go on.
    """

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
        check_signal(row, record, where, self._signals)
        return record

    def serving(self, signals: Sequence[str]) -> Dataset:
        """The same rows for a caller that can use these signals: where the data set was opened for
        any, they are read anew as `load_dataset` with `signals` reads them.
        """
        if self._signals or not signals:
            return self
        parts = [_part(part.rows, part.entry, signals) for part in self._parts]
        return Dataset(parts, self._media_dir, signals, self._picks_n)

    def select(self, indices: Sequence[int]) -> Dataset:
        """These records only, in this order: a split or a sample."""
        return Dataset(self._parts, self._media_dir, self._signals, self._picks_n[np.asarray(indices, np.int64)])

    @property
    def prob(self) -> float | None:
        """The mixing weight that dataset_info.json suggests for this data set, if any."""
        return self._parts[0].entry.prob

    @property
    def files(self) -> list[tuple[str, int]]:
        """Each file with the number of its rows that are taken; rows in memory and folders of
        classes are none.
        """
        part_n = np.searchsorted(self._starts, self._picks_n, "right") - 1
        taken = np.bincount(part_n, minlength=len(self._parts))
        found = [(part.rows.path, int(count)) for part, count in zip(self._parts, taken, strict=True)]
        return [(path, count) for path, count in found if os.path.isfile(path)]

    @property
    def report(self) -> str:
        """One line a file: rows, format, and why this format."""
        return "\n".join(
            f"{part.rows.path}: {counted(len(part.rows), 'row')}, {part.sniff.reason}" for part in self._parts
        )


_SIGNAL_WORDS = {
    "sft": ("an answer to learn", "要学习的回答"), "prompt": ("a question without an answer", "没有回答的问题"),
    "pair": ("a better and a worse answer", "较优与较差的回答"), "rating": ("scored answers", "带评分的回答"),
    "ranking": ("ranked answers", "带排序的回答"), "label": ("an answer labelled good or bad", "标注好坏的回答"),
    "verifiable": ("what checks an answer", "可检验回答的依据"),
    "text": ("a text, all of which is learnt", "整段学习的文本"),
}  # fmt: skip


def check_signal(row: Mapping[str, Any], record: Record, where: Where, signals: Sequence[str]) -> None:
    """Raises DataError for a row that a training of these signals (none: any) cannot use, with the
    format in which it could, if there is one.
    """
    if not signals or set(signals) & set(record.serves):
        return
    english, chinese = _SIGNAL_WORDS[record.signal]
    found = say(
        f"{record.signal} (read as {record.meta.format}: {english})",
        f"{record.signal}（按 {record.meta.format} 读取：{chinese}）",
    )
    wanted = [_SIGNAL_WORDS[signal] for signal in signals]
    options = say(
        ", ".join(f"{name} ({words[0]})" for name, words in zip(signals, wanted, strict=True)),
        "、".join(f"{name}（{words[1]}）" for name, words in zip(signals, wanted, strict=True)),
    )
    name = _other_format(row, where, signals)
    hint = say(f"set train_dataset_type: {name}, which reads it so", f"设置 train_dataset_type: {name} 即可如此读取")
    nothing = say("add it, or use data of that kind", "补上该内容，或换用这类数据")
    if record.signal == "text":
        nothing = say(
            "set stage: PT to learn all of the text, or name its columns prompt and response",
            "设置 stage: PT 以学习整段文本，或将各列命名为 prompt 与 response",
        )
    raise DataError(
        where.path, where.line, "signal", found, "signal", {"options": options, "hint": hint if name else nothing}
    )


def _other_format(row: Mapping[str, Any], where: Where, signals: Sequence[str]) -> str:
    """The format that reads a row as one of these signals, or ""."""
    keys = {str(key) for key, value in row.items() if value is not None}
    for form in (one for one in FORMATS if one.matches(keys) or ("answer" in keys and one.name == "verifiable")):
        try:
            if set(signals) & set(read(row, form, where).serves):
                return form.name
        except DataError:
            continue
    return ""


def rename(row: Mapping[str, Any], entry: DatasetEntry) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
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
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Mapping[str, Any]],
    format: str = "auto",
    *,
    columns: Mapping[str, str] | None = None,
    media_dir: str = "",
    dataset_dir: str = "data",
    signals: Sequence[str] = (),
    seed: int = 42,
) -> Dataset:
    """Open files as one lazy sequence of records.

    `path`: a file, folder, pattern, `path#500` (500 rows drawn with `seed`, more than there are:
    repeated), a name in `dataset_dir`/dataset_info.json, a comma list or a sequence of these; or
    rows themselves, as dicts. `format`: "auto", or a name of `readers.FORMATS`.
    `columns`: our field -> your column. `signals`: the signals that the caller can use, others are
    an error (default: all).
    Raises DataError (bad file) here and on access (bad row), ValueError (unknown format).
    """
    given = in_memory(path)
    if given is not None:
        part = _part(MemoryRows(given), DatasetEntry(IN_MEMORY, format, columns or {}), signals)
        return Dataset([part], media_dir, signals, np.arange(len(given)))
    listed = [path] if isinstance(path, str | os.PathLike) else list(cast("Sequence[str]", path))
    names = [name for item in listed for name in split_paths(os.fspath(item))]
    entries = [entry for name in names for entry in find(name, dataset_dir)]
    parts, picks, start = [], [], 0
    for i, entry in enumerate(entries):
        if format != "auto":
            entry = replace(entry, format=format)
        if columns:
            entry = replace(entry, columns={**entry.columns, **columns})
        opened = [_part(open_file(file), entry, signals) for file in _files(entry.path)]
        rows = sum(len(part.rows) for part in opened)
        picks.append(start + sample(rows, entry.samples, seed + i))
        start += rows
        parts += opened
    return Dataset(parts, media_dir, signals, np.concatenate(picks) if picks else np.zeros(0, np.int64))


def in_memory(given: Any) -> Sequence[Mapping[str, Any]] | None:
    """Rows as dicts where they were given so: a list, a `datasets.Dataset`, or anything that yields
    dicts; None for names of files and records. Raises ValueError for what is none of these.
    """
    if isinstance(given, str | os.PathLike):
        return None
    listed = given
    if isinstance(given, Iterator | Set) or (hasattr(given, "__iter__") and not hasattr(given, "__getitem__")):
        listed = list(given)  # a generator
    try:
        first = listed[0] if len(listed) and not isinstance(listed, Mapping | bytes) else None
    except (KeyError, TypeError):  # a table of another kind, a number
        raise _no_rows(given) from None
    if isinstance(first, Mapping):
        return cast("Sequence[Mapping[str, Any]]", listed)
    if isinstance(given, Mapping | bytes) or (len(listed) and not isinstance(first, str | os.PathLike | Record)):
        raise _no_rows(given)
    return None if listed is given else listed


def _no_rows(given: Any) -> ValueError:
    kind = type(given).__name__
    inner = type(given[0]).__name__ if isinstance(given, list | tuple) and given else ""
    what = f"{kind} of {inner}" if inner else kind
    return ValueError(
        say(
            f"train_dataset ({what}) must be rows: the name of a file, a list of dicts, or a datasets.Dataset; pass "
            f"{EXAMPLE_ROWS}, of a table table.to_dict('records')",
            f"train_dataset（{what}）须为数据：文件名、由 dict 组成的列表，或 datasets.Dataset；请传入 "
            f"{EXAMPLE_ROWS}，表格请用 table.to_dict('records')",
        )
    )


def split_paths(text: str) -> list[str]:
    """ "a.jsonl, b.jsonl#500" -> both; a comma inside the name of an existing file stays."""
    return [text] if os.path.exists(text) else [part.strip() for part in text.split(",") if part.strip()]


def sample(rows: int, wanted: int | None, seed: int) -> np.ndarray:
    """Row numbers in file order: all, or `wanted` of them drawn without repetition until every row
    was drawn equally often.
    """
    if wanted is None or rows == 0:
        return np.arange(rows)
    drawn = np.random.RandomState(seed).permutation(rows)[: wanted % rows]
    return np.sort(np.concatenate([np.tile(np.arange(rows), wanted // rows), drawn]))


def find(name: str, dataset_dir: str) -> list[DatasetEntry]:
    """The entry for a path, pattern or data-set name, with its #count. Raises DataError where
    nothing has this name.
    """
    base, _, count = name.rpartition("#")
    samples = int(count) if base and count.isdecimal() and not os.path.exists(name) else None
    target = name if samples is None else base
    if _files(target, must=False):
        return [DatasetEntry(target, samples=samples)]
    info = os.path.join(dataset_dir, INFO_FILE)
    if not os.path.exists(info):
        raise DataError(target, 0, "path", _not_found(target), "file", {})
    with open(info, "rb") as file:
        table = parse_json(file.read(), info, 1)
    if target not in table:
        raise DataError(target, 0, "path", _not_found(target, info, list(table)), "file", {})
    entry = read_info(table[target], target, info)
    return [entry if samples is None else replace(entry, samples=samples)]


def read_info(value: Any, name: str, info: str) -> DatasetEntry:
    """One entry of dataset_info.json: LLaMA-Factory's (file_name, formatting, columns, tags,
    num_samples) or ERNIEKit's (path, type, prob).
    """
    f = Fields({name: value}, Where(info)).nested(name, value)
    if not f.has("path", "file_name"):
        raise f.error("hub", "file_name", ", ".join(hub for hub in _HUBS if f.has(hub)) or show(value))
    file = f.text("path", "file_name")
    beside = os.path.join(os.path.dirname(info), file)
    # ERNIEKit writes paths from the working folder
    path = beside if _files(beside, must=False) else file
    if f.has("path"):
        kind = f.text("type") if f.has("type") else "auto"
        return DatasetEntry(path, kind, prob=f.number_or(None, "prob", 0.0))
    kind = "pairs" if f.take("ranking") else f.text("formatting") if f.has("formatting") else "auto"
    maps = [f.nested(part, f.take(part)).row if f.has(part) else {} for part in ("columns", "tags")]
    given, tags = ({key: f.typed(key, name, str) for key, name in part.items() if name is not None} for part in maps)
    columns = {_COLUMN_ROLES.get(role, role): column for role, column in given.items()}
    samples = f.number_or(None, "num_samples", 0.0)
    return DatasetEntry(path, kind, columns, bool(columns), tags, None if samples is None else int(samples))


def _files(path: str, must: bool = True) -> list[str]:
    """The data files of a file name, a folder (of a repository: of its data folder; with one
    sub-folder a class: itself) or a pattern, sorted.
    """
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = _in_folder(path)
    else:
        found = [name for name in glob.glob(path, recursive=True) if name.lower().endswith((*_EXTENSIONS, _TEXT))]
        found = sorted(name for name in found if os.path.basename(name) != INFO_FILE)
    if must and not found:
        raise DataError(path, 0, "path", _not_found(path), "file", {})
    return found


def _not_found(path: str, info: str = "", names: Sequence[str] = ()) -> str:
    """What a name that leads to no rows is, and where it was looked for: in a folder, and among the
    `names` that the file `info` gives to data sets.
    """
    if os.path.isdir(path):
        return say("a folder without rows or classes of pictures", "文件夹中没有数据行，也没有按类别存放的图片")
    seen = "" if os.path.isabs(path) else os.getcwd()
    shown = ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
    english = f", and none of the data sets of {info}" + (f" ({shown})" if shown else "")
    chinese = f"，{info} 中也没有该数据集" + (f"（现有 {shown}）" if shown else "")
    return say(
        f"nothing of this name{seen and f' in {seen}'}{info and english}",
        f"{seen and f'{seen} 中'}没有该名称{info and chinese}",
    )


def _in_folder(path: str) -> list[str]:
    """What a folder offers as rows."""
    names = sorted(os.listdir(path))
    if "dataset_dict.json" in names:
        splits = [name for name in names if os.path.isfile(os.path.join(path, name, "state.json"))]
        shown = ", ".join(os.path.join(path, name) for name in splits)
        raise DataError(
            path, 0, "path", f"splits {', '.join(splits)}", "split", {"names": shown or "one of its folders"}
        )
    if "state.json" in names:  # of datasets.save_to_disk
        if b'"_indices_files": null' not in _small(path, "state.json") and b"_indices" in _small(path, "state.json"):
            raise DataError(path, 0, "path", say("a selection of rows", "选取的部分行"), "indices", {})
        return [os.path.join(path, name) for name in names if name.endswith(".arrow")]
    for folder in (path, os.path.join(path, "data")):
        inside = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
        found = [name for name in inside if name.lower().endswith(_EXTENSIONS) and name != INFO_FILE]
        found = found or [name for name in inside if name.lower().endswith(_COMPRESSED)]
        if folder != path and any("train" in name.lower() for name in found):
            found = [name for name in found if "train" in name.lower()]  # not the tests beside them
        if found:
            return [os.path.join(folder, name) for name in found]
    if class_folders(path):
        return [path]
    if splits := [entry.path for entry in os.scandir(path) if entry.is_dir() and class_folders(entry.path)]:
        held = say("folders of classes of pictures", "各含按类别存放图片的文件夹")
        raise DataError(path, 0, "path", held, "split", {"names": ", ".join(sorted(splits))})
    texts = (os.path.join(at, name) for at, _, names in os.walk(path) for name in names)
    return sorted(name for name in texts if name.lower().endswith(_TEXT))


def _small(folder: str, name: str) -> bytes:
    with open(os.path.join(folder, name), "rb") as file:
        return file.read(1 << 20)


def _part(rows: Rows, entry: DatasetEntry, signals: Sequence[str] = ()) -> _Part:
    """Settle the format of rows by the first ones that can be read; the others complain when asked
    for.
    """
    path = rows.path
    if not len(rows):
        raise DataError(path, 0, "file", say("no rows", "没有数据行"), "empty", {})
    formats = choose(entry.format, signals)
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
    return _Part(rows, entry, next(form for form in formats if form.name == found.name), formats, found, media)

"""A repaired copy of a data file, never the file itself: what can be mended without guessing is,
everything else is kept and said.

Refuses to know: pictures (a missing one is only looked up where rows may be dropped), other files,
command lines.
Every repair is believed only if the readers then accept the row.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from ernie_tune.config.language import Text, join, say
from ernie_tune.data.doctor.checks import Finding, check_record
from ernie_tune.data.doctor.media import Pictures
from ernie_tune.data.doctor.rows import JsonLines
from ernie_tune.data.doctor.scan import DataFile
from ernie_tune.data.file_rows import parse_json
from ernie_tune.data.media.images import ImageSettings
from ernie_tune.data.records import DataError, Record
from ernie_tune.data.sources import DatasetEntry

_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[}\]])')  # strings are stepped over
_TRIES, _TEXTS = 4, 20  # repairs of one row; texts of a row that may be its first question
CHANGES = {
    "comma": ("removed a trailing comma", "删去多余的逗号"),
    "tag": ("put {n} {tag} before the question", "在问题前补上 {n} 个 {tag}"),
    "stripped": ("stripped the answer", "去掉回答首尾空白"),
    "no_answer": ("dropped: no answer", "删去：没有回答"),
    "empty": ("dropped: no fields", "删去：没有字段"),
    "repeated": ("dropped: repeats line {n}", "删去：与第 {n} 行重复"),
    "dropped": ("dropped: {why}", "删去：{why}"),
    "kept": ("kept as it is, still wrong: {why}", "未改动，仍有错误：{why}"),
}


COUNTED = {
    "comma": ("trailing commas removed", "删去多余逗号"),
    "tag": ("tags added", "补上标记"),
    "stripped": ("answers stripped", "去掉首尾空白"),
    "no_answer": ("rows without an answer dropped", "删去无回答的行"),
    "empty": ("rows without fields dropped", "删去无字段的行"),
    "repeated": ("repeated rows dropped", "删去重复的行"),
    "dropped": ("wrong rows dropped", "删去错误的行"),
    "kept": ("wrong rows kept", "保留仍有错误的行"),
}


class RowChange(NamedTuple):
    """What was done to the row of a line."""

    line: int
    code: str
    params: Mapping[str, object]

    def __str__(self) -> str:
        english, chinese = CHANGES[self.code]
        return str(say(english, chinese, **self.params))


def fixed_path(path: str) -> str:
    """Where the repaired copy of a file goes."""
    return os.path.splitext(path)[0] + ".fixed.jsonl"


def fix_file(entry: DatasetEntry, media_dir: str = "", drop: bool = False, force: bool = False) -> Iterator[RowChange]:
    """Write FILE.fixed.jsonl beside a file while the changes are taken. With `drop`, rows that stay
    wrong are left out; with `force`, a copy that is there gives way to the new one once that is
    whole.

    Raises DataError for files that cannot be read, ValueError where the copy exists already or the
    file is no text.
    """
    if entry.path.lower().endswith(".parquet"):
        raise ValueError(
            say(
                f"{entry.path} must be a text file to be repaired; use `data convert`",
                f"{entry.path} 须为文本文件才能修复（不支持 parquet）；请用 `data convert`",
            )
        )
    target = fixed_path(entry.path)
    if os.path.exists(target) and not force:
        raise ValueError(
            say(
                f"{target} exists and is not overwritten; remove or rename it, or add --force",
                f"{target} 已存在，不会覆盖；请删除或改名，或加上 --force",
            )
        )
    file = DataFile(entry, media_dir)
    fixer = _Fixer(file, drop)
    try:
        with open(target + ".tmp", "wb") as out:
            for batch in file.source.batches():
                for line, offset, row in zip(batch.lines_n.tolist(), batch.offsets_n.tolist(), batch.rows, strict=True):
                    if row is None:
                        continue
                    kept = fixer.mend(line, offset, row)
                    yield from fixer.take_changes()
                    if kept is not None:
                        out.write(kept + b"\n")
        os.replace(target + ".tmp", target)
    finally:
        if os.path.exists(target + ".tmp"):
            os.remove(target + ".tmp")


class _Fixer:
    """Mends one row after the other and remembers which it has seen."""

    def __init__(self, file: DataFile, drop: bool) -> None:
        self._file, self._drop = file, drop
        self._pictures = Pictures(ImageSettings(), decode=0)
        self._seen: dict[bytes, int] = {}  # digest of a row -> its line
        self._changes: list[RowChange] = []

    def take_changes(self) -> list[RowChange]:
        changes, self._changes = self._changes, []
        return changes

    def mend(self, line: int, offset: int, row: Mapping[str, Any] | DataError) -> bytes | None:
        """The bytes of the row in the copy; None drops it."""
        before = row
        if isinstance(row, DataError):
            row = self._parse_again(line, offset, row)
        if isinstance(row, DataError):
            return self._give_up(line, offset, row, say(row.fix, row.fix_zh))
        if not any(value not in (None, "", [], {}) for value in row.values()):
            self._say(line, "empty")
            return None
        try:
            mended, problem = self._mend_fields(line, dict(row))
        except RecursionError:
            return self._give_up(line, offset, before, say("values nested too deeply", "值的嵌套过深"))
        if mended is None:
            return None
        if problem:
            return self._give_up(line, offset, before, problem)
        digest = hashlib.blake2b(_dump({**mended, "id": None}), digest_size=16).digest()
        first = self._seen.setdefault(digest, line)
        if first != line:
            self._say(line, "repeated", n=first)
            return None
        return self._raw(offset) if mended == before and isinstance(self._file.source, JsonLines) else _dump(mended)

    def _mend_fields(self, line: int, row: dict[str, Any]) -> tuple[dict[str, Any] | None, Text | None]:
        """(the row after repairs or None to drop it, what is still wrong with it)."""
        for _ in range(_TRIES):
            try:
                record = self._file.record(row, line)
            except DataError as error:
                tagged = self._add_tags(line, row, error)
                if tagged is None:
                    return row, say(
                        "{field}: {found}, {fix}",
                        "{field}：{found}，{fix}",
                        field=error.field,
                        found=error.found,
                        fix=say(error.fix, error.fix_zh),
                    )
                row = tagged
                continue
            found = list(check_record(record))
            codes = [finding.code for finding in found]
            if "empty_answer" in codes:
                self._say(line, "no_answer")
                return None, None
            stripped = _strip_answers(row, record) if "padded_answer" in codes else row
            if stripped != row:
                self._say(line, "stripped")
                row = stripped
                continue
            found += self._pictures.check(record)
            wrong = {one.code: _problem_of(one) for one in found if one.severity == "error"}
            return row, join(", ", [*wrong.values()]) if wrong else None
        return row, say("several mistakes", "有多处错误")

    def _add_tags(self, line: int, row: dict[str, Any], error: DataError) -> dict[str, Any] | None:
        """The row with the media tags that it lacks before its first question, or None where that
        is not what is wrong.
        """
        tag = {"images": "<image>", "videos": "<video>"}.get(error.field)
        wanted = error.args[5].get("n")
        if error.problem != "count" or tag is None or not isinstance(wanted, int) or int(error.found) <= wanted:
            return None
        tags = tag * (int(error.found) - wanted)
        for path, text in islice(_leaves(row), _TEXTS):
            changed = _put(row, path, tags + text)
            try:
                record = self._file.record(changed, line)
            except DataError:
                continue
            if next(turn for turn in record.messages if turn["role"] == "user")["content"].startswith(tags + text):
                self._say(line, "tag", n=int(error.found) - wanted, tag=tag)
                return changed
        return None

    def _parse_again(self, line: int, offset: int, error: DataError) -> Mapping[str, Any] | DataError:
        """A row that is JSON but for commas at the ends of its lists."""
        if not isinstance(self._file.source, JsonLines) or error.problem != "json":
            return error
        text = _COMMA.sub(lambda found: found[1] or "", self._raw(offset).decode().rstrip().rstrip(","))
        try:
            row = parse_json(text.encode(), self._file.path, line)
        except DataError:
            return error
        self._say(line, "comma")
        return row

    def _give_up(self, line: int, offset: int, row: Mapping[str, Any] | DataError, why: Text) -> bytes | None:
        lines = isinstance(self._file.source, JsonLines)
        # a broken csv row has no place in a jsonl file
        if self._drop or (isinstance(row, DataError) and not lines):
            self._say(line, "dropped", why=why)
            return None
        self._changes = [change for change in self._changes if change.line != line]
        self._say(line, "kept", why=why)
        return self._raw(offset) if lines else _dump(row)  # type: ignore[arg-type]

    def _raw(self, offset: int) -> bytes:
        assert isinstance(self._file.source, JsonLines)
        return self._file.source.line(offset)

    def _say(self, line: int, code: str, **params: object) -> None:
        self._changes.append(RowChange(line, code, params))


def _problem_of(finding: Finding) -> Text:
    """What is wrong, and what was expected, in words."""
    return say(
        "{field}: found {found}, expected {wanted}",
        "{field}：实际为 {found}，应为 {wanted}",
        field=finding.field,
        found=finding.found,
        wanted=say(finding.expected, finding.expected_zh),
    )


def _dump(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _strip_answers(row: dict[str, Any], record: Record) -> dict[str, Any]:
    """The row without the space around its answers, wherever its format keeps them."""
    turns = [*record.messages, *(turn for candidate in record.candidates for turn in candidate.messages)]
    answers = {turn["content"] for turn in turns if turn["role"] == "assistant"}
    for path, text in list(_leaves(row)):
        if text in answers:
            row = _put(row, path, text.strip())
    return row


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    """(keys that lead to it, text) of every text in a row, depth first."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, (*path, key))


def _put(value: Any, path: tuple[Any, ...], text: str) -> Any:
    """A copy of a row with another text at the end of a path."""
    if not path:
        return text
    copy = value.copy()
    copy[path[0]] = _put(copy[path[0]], path[1:], text)
    return copy

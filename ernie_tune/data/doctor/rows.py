"""Files -> batches of rows with their places, and rows -> the facts that statistics and comparisons
need: the fast road of the doctor.

A plain text row takes about 2 microseconds here and 60 through the readers. `Quick` speaks only for
rows that the readers would accept and `doctor.check_record` would not mention; it says None for all
others, and they take the slow road.

Refuses to know: what is wrong with a row (that is for the slow road), pictures, statistics. Memory:
one block of the file.
"""

from __future__ import annotations

import json
import re
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from operator import eq, itemgetter
from typing import Any, NamedTuple, cast

import numpy as np

from ernie_tune.data.doctor.checks import (
    MARKER,
    NAMED_PICTURE,
    THOUGHT_MARK,
    may_hold_marks,
    may_name_picture,
    text_of,
)
from ernie_tune.data.file_kinds import file_kind
from ernie_tune.data.file_rows import open_file, parse_json
from ernie_tune.data.readers.fields import DIALOGUES, QUERIES, RESPONSES
from ernie_tune.data.readers.formats import PLAIN_FIELDS, SPECIAL_FIELDS, Format, match, spelt_otherwise
from ernie_tune.data.readers.unused import is_suspicious
from ernie_tune.data.records import DataError, Media, Record

BLOCK_BYTES = 3 << 16  # a block and what it is parsed into stay in the second-level cache
BATCH_ROWS = 512  # of files that are not read by blocks
_BATCH_BYTES = 4 << 20  # of their cells, from which a batch ends
BOM = b"\xef\xbb\xbf"
_NAME = re.compile(rb'(?<!\\)"\s*:')
_SURROGATE, _PAIR = re.compile(rb"\\u[dD][89a-fA-F]"), re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..")
# Between rows of a block that is parsed as one list: a number that no file can foresee, so that no
# row can pretend to be two.
_GLUE = secrets.randbelow(900_000) + 100_000

# prompt, answer, the other answers joined, media, signal (labels as "label:good" and "label:bad"),
# domain. A plain tuple: a class costs 0.2 us.
Facts = tuple[str, str, str, tuple[Media, ...], str, str]
TAUGHT = frozenset(("sft", "verifiable"))  # signals of rows that have one right answer
Row = Mapping[str, Any] | DataError | None  # None: a blank line


class Columns(NamedTuple):
    """The facts of many rows, one sequence for each of their fields."""

    prompt: Sequence[str]
    answer: Sequence[str]
    rejected: Sequence[str]
    media: Sequence[tuple[Media, ...]]
    signal: Sequence[str]
    domain: Sequence[str]

    def taught(self) -> np.ndarray:
        """Which rows have one right answer, bool [n]."""
        first, n = self.signal[0], len(self.signal)
        if self.signal.count(first) == n:
            return np.full(n, first in TAUGHT)
        return np.fromiter(map(TAUGHT.__contains__, self.signal), bool, n)


class Batch(NamedTuple):
    """Consecutive rows. `offsets_n` find a row again in its source."""

    lines_n: np.ndarray
    offsets_n: np.ndarray
    rows: list[Row]


class JsonLines:
    """A file with one JSON object a line, read in blocks. Offsets are bytes."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.has_bom = self.has_crlf = False

    def batches(self) -> Iterator[Batch]:
        line, offset = 1, 0
        with open(self.path, "rb") as file:
            while block := file.read(BLOCK_BYTES):
                block += file.readline()
                self.has_bom |= offset == 0 and block.startswith(BOM)
                self.has_crlf |= b"\r" in block and b"\r\n" in block
                breaks_n = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
                starts_n = np.append(0, breaks_n + 1) + offset
                rows = parse_block(block.removeprefix(BOM) if offset == 0 else block, self.path, line)
                yield Batch(np.arange(line, line + len(rows)), starts_n[: len(rows)], rows)
                line, offset = line + len(breaks_n), offset + len(block)

    def reread(self, offset: int, line: int) -> Mapping[str, Any]:
        """A row by its place. Raises DataError."""
        return parse_json(self.line(offset), self.path, line)

    def line(self, offset: int) -> bytes:
        """The bytes of a line without its end and without a byte order mark."""
        with open(self.path, "rb") as file:
            file.seek(offset)
            return file.readline().removeprefix(BOM).rstrip(b"\r\n")


class Indexed:
    """A file that must be indexed first: json lists, csv, tsv, parquet. Offsets are row numbers."""

    has_bom = has_crlf = False

    def __init__(self, path: str) -> None:
        self.path = path
        self._rows = open_file(path)

    def batches(self) -> Iterator[Batch]:
        """Up to BATCH_ROWS rows at a time, fewer where they are large, as pictures in cells are."""
        first, end = 0, len(self._rows)
        while first < end:
            rows: list[Row] = []
            size = 0
            while first + len(rows) < min(end, first + BATCH_ROWS) and size < _BATCH_BYTES:
                rows.append(self._row(first + len(rows)))
                size += _cell_bytes(rows[-1])
            numbers = range(first, first + len(rows))
            yield Batch(np.array([self._rows.line(i) for i in numbers]), np.array(numbers), rows)
            first += len(rows)

    def reread(self, offset: int, line: int) -> Mapping[str, Any]:
        return self._rows[offset]

    def _row(self, i: int) -> Row:
        try:
            return self._rows[i]
        except DataError as error:
            return error


def _cell_bytes(value: object) -> int:
    """Bytes and characters in a row or a cell, more or less."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_cell_bytes, value.values()))
    return sum(map(_cell_bytes, value)) if isinstance(value, list | tuple) else 8


def open_rows(path: str) -> JsonLines | Indexed:
    """The reader of a file's rows. Raises DataError for files that cannot be indexed, OSError."""
    return JsonLines(path) if file_kind(path) == "lines" else Indexed(path)


def parse_block(block: bytes, path: str, line: int) -> list[Row]:
    """The rows of whole lines: first all at once, and where that does not work, each on its own."""
    body = block.removesuffix(b"\n")
    try:
        if not _has_half_pair(body):
            glued = body.replace(b"\n", b",%d," % _GLUE)
            breaks = (len(glued) - len(body)) // 7  # six digits and two commas for one sign
            values = json.loads((b"[%b]" % glued).decode())
            rows, glue = values[::2], values[1::2]
            whole = len(values) == 2 * breaks + 1 and glue.count(_GLUE) == breaks and set(map(type, rows)) == {dict}
            if whole and not _repeats_a_name(body, rows):
                return cast("list[Row]", rows)
    except (ValueError, RecursionError):
        pass
    return [_parse_line(raw, path, i) for i, raw in enumerate(body.split(b"\n"), line)]


def _repeats_a_name(body: bytes, rows: list[Any]) -> bool:
    """Whether an object may have a name twice, of which a parser keeps the last: more names are
    written than were read.
    """
    written, read = _names_written(body), sum(map(len, rows))
    field = next((field for field in DIALOGUES if field in rows[0]), "")
    if written > read and field:
        try:
            turns = list(chain.from_iterable(map(itemgetter(field), rows)))
            read += sum(map(len, turns)) if set(map(type, turns)) == {dict} else 0
        except (LookupError, TypeError):  # rows of several kinds: each is counted below
            pass
    return written > read and written > sum(map(_count_names, rows))


def _names_written(body: bytes) -> int:
    """The quotes that a colon follows, but those within a text, which a backslash precedes."""
    signs = np.frombuffer(body, np.uint8)
    colons = np.flatnonzero(signs == ord(":"))
    colons = colons[colons >= 2]
    before, first = signs[colons - 1], signs[colons - 2]
    if np.any((before <= ord(" ")) & ((first == ord('"')) | (first <= ord(" ")))):
        return len(_NAME.findall(body))
    return int(np.count_nonzero((before == ord('"')) & (first != ord("\\"))))


def _count_names(value: object) -> int:
    if type(value) is dict:
        return len(value) + sum(map(_count_names, value.values()))
    return sum(map(_count_names, value)) if type(value) is list else 0


def _has_half_pair(body: bytes) -> bool:
    """Whether an escape may be half a surrogate pair, which readers refuse. An escaped backslash
    makes it hard to tell, so it counts.
    """
    signs = np.frombuffer(body + b"\n", np.uint8)
    escapes = np.flatnonzero(signs[:-1] == ord("\\"))  # five times as fast as to search for two signs
    if not np.any(signs[escapes + 1] == ord("u")):
        return False
    return b"\\\\u" in body or _SURROGATE.search(_PAIR.sub(b"", body)) is not None


def _parse_line(raw: bytes, path: str, line: int) -> Row:
    if not raw.strip():
        return None
    try:
        return parse_json(raw, path, line)
    except DataError as error:
        return error


def facts_of(record: Record) -> Facts:
    """What the slow road says of a row."""
    answers = ["".join(map(text_of, candidate.messages)) for candidate in record.candidates]
    turns = [text_of(message) for message in record.messages]
    if record.signal == "sft":
        answers = [turns.pop()]
    elif not answers and record.reward is not None and record.reward.answer is not None:
        answers = [str(record.reward.answer)]
    media = [*record.images, *record.videos]
    media += [medium for candidate in record.candidates for medium in (*candidate.images, *candidate.videos)]
    signal = record.signal
    if signal == "label":
        signal = "label:good" if record.candidates[0].label else "label:bad"
    return "\n".join(turns), "".join(answers[:1]), "\x1f".join(answers[1:]), tuple(media), signal, record.domain


_MAX_SHAPES = 256
_NOT_PLAIN = (TypeError, LookupError, ValueError, AttributeError)  # whatever such a row is, it is not plain
_TURN = {"role": itemgetter("role", "content"), "from": itemgetter("from", "value")}
_Texts = tuple[Sequence[str], Sequence[str], Sequence[str]]  # prompts, answers, worse answers


class _Reader(NamedTuple):
    """How rows with the same fields are read. `one`: a row. `texts`: the texts of many rows, at a
    third of the price, or None where they must be read one by one. Both raise TypeError and the
    like for what they do not expect.
    """

    one: Callable[[Any], Facts | None]
    texts: Callable[[Sequence[Any]], _Texts | None] = lambda _: None


class Quick:
    """The facts of plain text rows of one file, exactly as the readers would have them, or None.

    Which sequences of roles are a dialogue is learnt from the readers: see `learn`.
    """

    def __init__(self, form: Format, others: Sequence[Format]) -> None:
        self._form, self._others = form, others
        self.unused: Counter[str] = Counter()  # names that no reader takes -> rows of the fast road that have them
        self._readers: dict[tuple[str, ...], _Reader | None] = {}
        self._orders: set[tuple[str, ...]] = set()

    @property
    def shapes(self) -> int:
        """How many sequences of roles are believed."""
        return len(self._orders)

    def facts(self, rows: Sequence[Row]) -> list[Facts | None]:
        """For each row its facts, or None where the slow road must look."""
        at_once = self._facts_at_once(rows)
        if at_once is not None:
            return at_once
        readers, out = self._readers, []
        for row in rows:
            try:
                keys = tuple(row)  # type: ignore[arg-type]
                reader = readers[keys] if keys in readers else self._new_reader(keys)
                out.append(reader.one(row) if reader else None)
            except _NOT_PLAIN:
                out.append(None)
        return out

    def _facts_at_once(self, rows: Sequence[Row]) -> list[Facts | None] | None:
        """The facts of rows that all have the same fields and are all plain, else None."""
        try:
            keys, *others = set(map(tuple, rows))  # type: ignore[arg-type]
            reader = None if others else self._readers.get(keys)
            texts = reader.texts(rows) if reader else None
            if texts is None or not _all_plain(*texts):
                return None
        except _NOT_PLAIN:
            return None
        signal = "pair" if texts[2] else "sft"
        return list(zip(texts[0], texts[1], texts[2] or repeat(""), repeat(()), repeat(signal), repeat("")))

    def learn(self, row: Mapping[str, Any], facts: Facts) -> None:
        """Believe a sequence of roles from now on, if the fast road finds in this accepted row what
        the readers found.
        """
        turns = next((row[name] for name in DIALOGUES if name in row), None)
        if not isinstance(turns, list) or len(self._orders) >= _MAX_SHAPES:
            return
        roles = tuple(str(turn.get("role", turn.get("from"))) for turn in turns if isinstance(turn, dict))
        if roles not in self._orders and len(set(roles[-1:0:-2])) == 1:  # every second turn an answer, so no tools
            self._orders.add(roles)
            unused = self.unused.copy()
            if self.facts([row]) != [facts]:
                self._orders.remove(roles)
            self.unused = unused  # the row has been counted

    def _new_reader(self, keys: tuple[str, ...]) -> _Reader | None:
        """The reader of rows with these fields, if the fields alone tell what such rows are."""
        if len(self._readers) >= _MAX_SHAPES:
            return None
        better = match(dict.fromkeys(keys, ""), self._others)
        reader = None
        plain = SPECIAL_FIELDS.isdisjoint(keys) and spelt_otherwise(dict.fromkeys(keys)) is None
        if plain and (better is None or better.read is self._form.read):
            others = [key for key in keys if key not in PLAIN_FIELDS]
            reader = _reader_of(PLAIN_FIELDS & {*keys} - {"id"}, self._form.name, self._orders)
            if reader and others:
                reader = None if any(map(is_suspicious, others)) else self._counting(reader, others)
        self._readers[keys] = reader
        return reader

    def _counting(self, reader: _Reader, names: Sequence[str]) -> _Reader:
        """The reader of rows that have these fields too, which nothing takes: plain values are
        counted, others are for the slow road.
        """

        def read(row: Any) -> Facts | None:
            facts = reader.one(row)
            if facts is None or not all(_is_idle(row[name]) for name in names):
                return None
            self.unused.update([name for name in names if row[name] is not None and row[name] != ""])
            return facts

        return _Reader(read)


def _is_idle(value: object) -> bool:
    """Whether a value is a number or a text that cannot be the name or the data of a medium."""
    if type(value) is str:
        end = value[-6:]
        named = end[-1:].isalnum() and "." in end
        return (
            not named
            and value[:1] != "["
            and "://" not in value[:10]
            and value[:5].lower() != "data:"
            and len(value) < 200
        )
    return value is None or type(value) in (int, float, bool)


def _reader_of(known: frozenset[str], form: str, orders: set[tuple[str, ...]]) -> _Reader | None:
    """The reader of rows of this format that have these fields and no others that matter."""
    queries, others = sorted(known & set(QUERIES)), sorted(known - set(QUERIES))
    if form == "text" and not queries and len(others) == 1:
        return _plain_text_reader(others[0])
    if form in ("messages", "sharegpt") and not queries and len(others) == 1 and others[0] in DIALOGUES:
        return _dialogue_reader(others[0], orders)
    if queries == ["input", "instruction"]:
        query, addition = "instruction", "input"
    elif len(queries) == 1:
        query, addition = queries[0], ""
    else:
        return None
    if form == "pairs" and not addition and others == ["chosen", "rejected"]:
        return _text_reader(query, "", "chosen", "rejected")
    if form in ("alpaca", "prompt_response") and len(others) == 1 and others[0] in RESPONSES:
        return _text_reader(query, addition, others[0], "")
    return None


def _dialogue_reader(field: str, orders: set[tuple[str, ...]]) -> _Reader:
    """Rows whose turns have a role and a text each."""

    def read(row: Any) -> Facts | None:
        turns = row[field]
        take = _TURN["from" if "from" in turns[0] else "role"]
        if len(turns) == 2:
            first, second = turns
            (asker, prompt), (answerer, answer) = take(first), take(second)
            if len(first) + len(second) != 4 or (asker, answerer) not in orders:
                return None
        else:
            roles, texts = zip(*map(take, turns), strict=True)
            if sum(map(len, turns)) != 2 * len(turns) or roles not in orders or not all(map(str.strip, texts)):
                return None
            prompt, answer = "\n".join(texts[:-1]), texts[-1]
            if not all(map(_plain_answer, texts[-3:0:-2])):
                return None
        return (prompt, answer, "", (), "sft", "") if _plain(prompt) and _plain_answer(answer) else None

    def texts(rows: Sequence[Any]) -> _Texts | None:
        """Of rows of two turns."""
        dialogues = [*map(itemgetter(field), rows)]
        turns = [*chain.from_iterable(dialogues)]
        if set(map(len, dialogues)) != {2} or sum(map(len, turns)) != 2 * len(turns):
            return None
        role, content = ("from", "value") if "from" in turns[0] else ("role", "content")
        roles, texts = [*map(itemgetter(role), turns)], [*map(itemgetter(content), turns)]
        usual = tuple(roles[:2]) in orders and roles == roles[:2] * len(rows)
        known = usual or orders.issuperset(zip(roles[::2], roles[1::2], strict=True))
        return (texts[::2], texts[1::2], ()) if known else None

    return _Reader(read, texts)


def _plain_text_reader(field: str) -> _Reader:
    """Rows of one text, all of which is learnt."""

    def read(row: Any) -> Facts | None:
        text = row[field]
        return (text, "", "", (), "text", "") if _plain(text) else None

    return _Reader(read)


def _text_reader(query: str, addition: str, response: str, rejected: str) -> _Reader:
    """Rows of texts: a question, perhaps more of it in a second field, an answer, perhaps a worse
    one.
    """

    def read(row: Any) -> Facts | None:
        prompt, answer = row[query], row[response]
        if addition:
            prompt = "\n".join([part for part in (prompt, row[addition]) if part != ""])
        if not (_plain(prompt) and _plain_answer(answer)):
            return None
        if not rejected:
            return prompt, answer, "", (), "sft", ""
        worse = row[rejected]
        return (prompt, answer, worse, (), "pair", "") if _plain_answer(worse) and worse != answer else None

    def texts(rows: Sequence[Any]) -> _Texts | None:
        if addition:
            return None
        prompts, answers = [*map(itemgetter(query), rows)], [*map(itemgetter(response), rows)]
        worse = [*map(itemgetter(rejected), rows)] if rejected else []
        return None if any(map(eq, answers, worse)) else (prompts, answers, worse)

    return _Reader(read, texts)


def _plain(text: str) -> bool:
    """A text that is not blank and has no tags or markers. Raises TypeError or AttributeError for
    other values.
    """
    return (text[:1].isalnum() or bool(text.strip())) and (not may_name_picture(text) or _unmarked(text))


def _plain_answer(text: str) -> bool:
    """Words without space around them, tags or markers. Raises like `_plain`."""
    words = text[:1].isalnum() or (not text[:1].isspace() and any(map(str.isalnum, text)))
    return words and not text[-1:].isspace() and (not may_hold_marks(text) or _unmarked(text))


def _all_plain(prompts: Sequence[str], answers: Sequence[str], worse: Sequence[str]) -> bool:
    """Whether `_plain` holds for all prompts and `_plain_answer` for all answers; False where only
    some of the rows may be plain. Raises TypeError for what is no text, IndexError for empty
    answers.
    """
    answers = [*answers, *worse]
    words = "\0".join(answers)
    if may_name_picture("\0".join(prompts)) or may_hold_marks(words):
        return False
    trimmed = [*map(str.strip, answers)] == answers and all(map(str.strip, prompts))
    firsts = "".join(map(itemgetter(0), answers))
    return trimmed and (firsts.isalnum() or all(a.isalnum() or any(map(str.isalnum, a)) for a in answers))


def _unmarked(text: str) -> bool:
    if "<image>" in text or "<video>" in text:
        return False
    return not any(marks.search(text) for marks in (MARKER, THOUGHT_MARK, NAMED_PICTURE))

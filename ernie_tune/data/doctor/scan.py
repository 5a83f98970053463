"""The check of whole data sets: every row once, by the fast road where it can, then all rows
against each other.

Refuses to know: command lines, how findings and numbers are printed.
Memory: one block of a file, one table of file names, bounded lists of findings; see
    `compare.py` for the rest.
Legend: n rows of a batch, k rows of a comparison.
"""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.batching import ROW_TOKENS, TURN_TOKENS, thinking_of
from ernie_tune.data.doctor.checks import Finding, Findings, check_record
from ernie_tune.data.doctor.compare import BANDS, NEAR, RowLog, hashes, join_texts, similarity, sketch
from ernie_tune.data.doctor.media import Pictures
from ernie_tune.data.doctor.notes import FileNotes
from ernie_tune.data.doctor.rows import Batch, Columns, Facts, Quick, Row, facts_of, open_rows
from ernie_tune.data.doctor.stats import Stats
from ernie_tune.data.processor import Processor
from ernie_tune.data.readers.formats import choose, read, sniff
from ernie_tune.data.readers.media import kinds_shown
from ernie_tune.data.readers.row import Where
from ernie_tune.data.records import DataError, Record, show
from ernie_tune.data.sources import DatasetEntry, check_signal, rename

DECODED = 200  # pictures that are opened unless more or fewer are asked for
_SNIFFED_ROWS = 32
_BEFORE = 20  # characters shown before two texts part
_COMPARED = 400  # pairs of nearly equal rows that are read again to make sure
# parts of a place
_LINE, _TAUGHT, _EVAL = np.uint64((1 << 40) - 1), np.uint64(1 << 40), np.uint64(1 << 41)
_FILE_SHIFT = np.uint64(48)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


class DataFile:
    """One file of rows: its format, and how a row becomes a record. `signals`: what the caller can
    use, any where there are none. Raises DataError for files without rows or of no known format.
    """

    def __init__(
        self, entry: DatasetEntry, media_dir: str = "", evaluation: bool = False, signals: Sequence[str] = ()
    ) -> None:
        self.path, self.evaluation, self.rows = entry.path, evaluation, 0
        self.notes = FileNotes()
        self._entry, self._media_dir = entry, media_dir
        formats = choose(entry.format, signals)
        self.source = open_rows(entry.path)
        rows = (row for batch in self.source.batches() for row in batch.rows if row is not None)
        first = next(rows, None)
        if first is None:
            raise DataError(entry.path, 0, "file", say("no rows", "没有数据行"), "empty", {})
        self.form, self._others, self.reason = formats[0], formats[1:] and formats, f"{formats[0].name}, as told"
        readable = (row for row in chain([first], rows) if not isinstance(row, DataError))
        sampled = [self._renamed(row)[0] for row in islice(readable, _SNIFFED_ROWS)]
        self._media = kinds_shown(sampled)
        if self._others:
            self.reason = say("of no known format, since no row could be read", "格式未知：没有一行可读取")
            found = sniff(sampled, formats, entry.path) if sampled else None
            if found:
                self.form, self.reason = next(form for form in formats if form.name == found.name), found.reason
        self.quick = None if entry.columns or entry.tags else Quick(self.form, self._others)

    def record(self, row: Mapping[str, Any], line: int) -> Record:
        """The record of a row. Raises DataError."""
        named, extra = self._renamed(row)
        return read(named, self.form, Where(self.path, line, self._media_dir, self._media), self._others, extra)

    def findings(self) -> Iterator[Finding]:
        """What is to be said once for the whole file."""
        if self.quick:
            self.notes.unused.update(self.quick.unused)
        return self.notes.findings(self.path, self.rows)

    def _renamed(self, row: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        return rename(row, self._entry)


@dataclass
class Report:
    """All that a check found. `near`: pairs of rows that look alike, how many of them were
    compared, how many are.
    """

    findings: Findings
    stats: Stats
    pictures: Pictures
    files: list[DataFile] = field(default_factory=list)
    near: tuple[int, int, int] = (0, 0, 0)
    seconds: float = 0.0

    @property
    def exit_code(self) -> int:
        return 1 if self.findings.total("error") else 0


class Scan:
    """One check. `max_tokens`: rows above it are errors. `decode`: see `Pictures`. `limit`:
    findings of one kind that are kept.
    """

    def __init__(
        self,
        processor: Processor,
        *,
        media_dir: str = "",
        decode: int | None = DECODED,
        max_tokens: int | None = None,
        limit: int = 20,
        signals: Sequence[str] = (),
    ) -> None:
        self._processor, self._media_dir, self._signals = processor, media_dir, tuple(signals)
        self._max_tokens = math.inf if max_tokens is None else max_tokens
        self._pictures, self._findings = Pictures(processor.images, decode, videos=processor.videos), Findings(limit)
        self._stats = Stats(processor)
        self._stats.sizes = self._pictures.sizes
        self._log = RowLog("row", "prompt", *(f"band{i}" for i in range(BANDS)), "offset", "place")
        self._files: list[DataFile] = []

    def run(self, train: Sequence[DatasetEntry], evaluation: Sequence[DatasetEntry] = ()) -> Report:
        """Check these files, and whether `evaluation` repeats what is in `train`. Raises OSError,
        ValueError for an unknown format.
        """
        started = time.perf_counter()
        for entry, held_out in [*((entry, False) for entry in train), *((entry, True) for entry in evaluation)]:
            try:
                self._files.append(DataFile(entry, self._media_dir, held_out, self._signals))
                self._scan(len(self._files) - 1)
            except DataError as error:
                self._findings.add(Finding.from_error(error))
        for finding in self._pictures.findings():
            self._findings.add(finding)
        near = self._compare() if self._log.rows else (0, 0, 0)
        for finding in self._stats.findings(train[0].path):
            self._findings.add(finding)
        seconds = time.perf_counter() - started
        return Report(self._findings, self._stats, self._pictures, self._files, near, seconds)

    def _scan(self, number: int) -> None:
        file = self._files[number]
        with _collector_off():
            for batch in file.source.batches():
                self._add(number, batch)
        for finding in file.findings():
            self._findings.add(finding)
        for code, seen in (("bom", file.source.has_bom), ("crlf", file.source.has_crlf)):
            if seen:
                self._findings.add(Finding.of(code, file.path, 0, "file", code.upper()))

    def _add(self, number: int, batch: Batch) -> None:
        """Check a batch and remember what comparisons need of it."""
        file, rows = self._files[number], batch.rows
        found = self._quick_facts(file, rows, batch.lines_n)
        slow = [i for i, facts in enumerate(found) if facts is None] if None in found else []
        looked = len(slow) > 0
        while slow:
            i, known = slow.pop(0), file.quick.shapes if file.quick else 0
            found[i] = self._look(file, rows[i], int(batch.lines_n[i]))
            if file.quick and file.quick.shapes > known:  # the fast road now knows others of its shape
                again = self._quick_facts(file, [rows[j] for j in slow], batch.lines_n[slow])
                for j, facts in zip(slow, again, strict=True):
                    found[j] = facts
                slow = [j for j in slow if found[j] is None]
        if looked:  # what could not be opened hangs in its own traceback, with all its bytes
            gc.collect(0)
        file.rows += len(rows) - rows.count(None)
        kept_n = np.flatnonzero([facts is not None for facts in found]) if None in found else np.arange(len(found))
        if not len(kept_n):
            return
        columns = Columns(*zip(*filter(None, found), strict=True))
        joined, ends_n = join_texts(columns)
        answer_n = self._note(number, batch, kept_n, columns, joined, ends_n)
        if not file.evaluation:
            self._stats.add(columns, joined, ends_n, answer_n)

    def _quick_facts(self, file: DataFile, rows: Sequence[Row], lines_n: np.ndarray) -> list[Facts | None]:
        """The facts of the rows that the fast road takes and that suit the wanted signals, too long
        ones told.
        """
        found: list[Facts | None] = file.quick.facts(rows) if file.quick else [None] * len(rows)
        if self._signals:
            found = [facts if facts is None or facts[4] in self._signals else None for facts in found]
        if self._max_tokens < math.inf:
            self._measure_plain(file, rows, lines_n, found)
        return found

    def _note(
        self, number: int, batch: Batch, kept_n: np.ndarray, columns: Columns, joined: bytes, ends_n: np.ndarray
    ) -> np.ndarray:
        """Remember hashes and places of rows. Returns the hashes of their answers."""
        answer_n, media_n = hashes(columns.answer), hashes(columns.media) * _MIX
        prompt_n = (hashes(columns.prompt) ^ media_n) * _MIX
        row_n = ((prompt_n ^ answer_n) * _MIX ^ hashes(columns.rejected)) * _MIX ^ hashes(columns.signal)
        bands, known_n = sketch(joined, ends_n)
        bands = np.where(known_n, bands ^ media_n, row_n)
        flags = (np.uint64(number) << _FILE_SHIFT) | (_EVAL if self._files[number].evaluation else np.uint64(0))
        self._log.add(
            row=row_n,
            prompt=prompt_n,
            offset=batch.offsets_n[kept_n].astype(np.uint64),
            place=batch.lines_n[kept_n].astype(np.uint64) | columns.taught() * _TAUGHT | flags,
            **{f"band{i}": band_n for i, band_n in enumerate(bands)},
        )
        return answer_n

    def _look(self, file: DataFile, row: Row, line: int) -> Facts | None:
        """The slow road: all checks of one row. Returns its facts if it can be read."""
        if row is None:
            return None
        try:
            if isinstance(row, DataError):
                raise row
            record = file.record(row, line)
            file.notes.add(record)
            check_signal(row, record, Where(file.path, line, self._media_dir), self._signals)
            found = [*check_record(record), *self._pictures.check(record)]
            if record.signal == "prompt" and not self._signals:
                found.append(Finding.of("unanswered", file.path, line, "roles", say("a question alone", "仅有问题")))
            facts = facts_of(record)
            if self._max_tokens < math.inf and all(finding.code != "tools" for finding in found):
                self._measure(record, {finding.code for finding in found})
        except DataError as error:
            self._findings.add(Finding.from_error(error))
            return None
        except RecursionError:
            deep = DataError(
                file.path,
                line,
                "row",
                say("values nested too deeply", "值的嵌套过深"),
                "json",
                {"why": "nest them less"},
            )
            self._findings.add(Finding.from_error(deep))
            return None
        for finding in found:
            self._findings.add(finding)
        if file.quick:
            file.quick.learn(row, facts)
        return self._known(facts)

    def _measure_plain(
        self, file: DataFile, rows: Sequence[Row], lines_n: np.ndarray, found: Sequence[Facts | None]
    ) -> None:
        """Measure the rows of the fast road that may be too long."""
        for facts, row, line in zip(found, rows, lines_n.tolist(), strict=True):
            if facts and isinstance(row, Mapping) and _most_tokens(facts) > self._max_tokens:
                self._measure(file.record(row, line))

    def _measure(self, record: Record, told: Collection[str] = ()) -> None:
        """Complain about a row that is too long. What cannot be measured has been complained about,
        or is a clip that needs a package.
        """
        if record.signal == "text":
            return  # a long one is learnt in pieces
        tokens = count_tokens(record, self._processor)
        where = record.meta.path, record.meta.line
        if tokens > self._max_tokens:
            self._findings.add(Finding.of("too_long", *where, "row", f"{tokens:,} tokens", limit=self._max_tokens))
        elif not tokens and record.videos and not any(code.startswith(("clip_", "media_")) for code in told):
            self._findings.add(Finding.of("unmeasured", *where, "videos", f"{len(record.videos)} videos"))

    def _compare(self) -> tuple[int, int, int]:
        """Rows against rows: equal ones, equal questions, nearly equal ones. Returns what
        `Report.near` says.
        """
        done_n = np.zeros(self._log.rows, bool)
        for first_k, later_k in self._log.pairs("row"):
            held_out_k = self._crosses(first_k, later_k)
            self._report("overlap", first_k[held_out_k], later_k[held_out_k])
            self._report("duplicate", first_k[~held_out_k], later_k[~held_out_k])
            done_n[later_k] = True
        for first_k, later_k in self._pairs("prompt", done_n):
            held_out_k = self._crosses(first_k, later_k)
            self._report("prompt_overlap", first_k[held_out_k], later_k[held_out_k])
            taught_k = (self._log.take("place", first_k) & self._log.take("place", later_k) & _TAUGHT) > 0
            taught_k &= ~held_out_k
            self._report("conflict", first_k[taught_k], later_k[taught_k])
            done_n[later_k[held_out_k | taught_k]] = True
        return self._compare_near(done_n)

    def _pairs(self, name: str, done_n: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs of different rows that agree in this column, without later rows that have been
        reported.
        """
        for first_k, later_k in self._log.pairs(name):
            new_k = ~done_n[later_k]
            first_k, later_k = first_k[new_k], later_k[new_k]
            differ_k = self._log.take("row", first_k) != self._log.take("row", later_k)
            yield first_k[differ_k], later_k[differ_k]

    def _compare_near(self, done_n: np.ndarray) -> tuple[int, int, int]:
        """Read again a sample of the rows that seem alike, and say of how many it is true."""
        candidate_n = np.zeros(self._log.rows, bool)
        sample, step = np.zeros((0, 2), np.int64), 1
        for band in range(BANDS):
            for first_k, later_k in self._pairs(f"band{band}", done_n):
                candidate_n[later_k] = True
                drawn_k = _drawn(later_k, step)
                sample = np.concatenate([sample, np.stack([later_k[drawn_k], first_k[drawn_k]], 1)])
                # A pair is there at most once a band: so many are too many, however many are equal.
                while len(sample) > BANDS * _COMPARED:
                    step *= 2
                    sample = sample[_drawn(sample[:, 0], step)]
                sample = np.array(sorted(set(map(tuple, sample.tolist()))), np.int64).reshape(-1, 2)
                while len(sample) > _COMPARED:
                    step *= 2
                    sample = sample[_drawn(sample[:, 0], step)]
        facts = [self._read(sample[:, side]) for side in (0, 1)]
        alike = {
            later: first
            for (later, first), *texts in zip(sample.tolist(), *facts, strict=True)
            if similarity(*texts) >= NEAR
        }
        later_k, first_k = np.array(list(alike), np.int64), np.array(list(alike.values()), np.int64)
        share = np.count_nonzero(candidate_n) / max(1, len(set(sample[:, 0].tolist())))
        held_out_k = self._crosses(first_k, later_k)
        for code, here_k in (("near_overlap", held_out_k), ("near_duplicate", ~held_out_k)):
            self._report(code, first_k[here_k], later_k[here_k], round(share * np.count_nonzero(here_k)))
        return int(np.count_nonzero(candidate_n)), len(sample), len(alike)

    def _crosses(self, first_k: np.ndarray, later_k: np.ndarray) -> np.ndarray:
        """Whether the later row is held out for evaluation and the first is not."""
        first, later = self._log.take("place", first_k), self._log.take("place", later_k)
        return (later & _EVAL > 0) & (first & _EVAL == 0)

    def _report(self, code: str, first_k: np.ndarray, later_k: np.ndarray, total: int | None = None) -> None:
        """Say of each later row that it repeats the first one."""
        order = np.argsort(later_k)[: self._findings.limit]
        first_k, shown_k = first_k[order], later_k[order]

        def findings() -> Iterator[Finding]:
            places = zip(self._places(shown_k), self._places(first_k), strict=True)
            rows = zip(self._read(shown_k), self._read(first_k), strict=True)
            for ((file, line), (other, other_line)), (facts, first) in zip(places, rows, strict=True):
                found, differs = _shown_rows(code, facts, first)
                params = {"other": f"{other.path}:{other_line}{differs}"}
                yield Finding.of(code, file.path, line, "row", found, **params)

        self._findings.add_all(findings(), len(later_k) if total is None else total, code)

    def _places(self, rows_k: np.ndarray) -> list[tuple[DataFile, int]]:
        """File and line of these rows."""
        places = self._log.take("place", rows_k).tolist()
        return [(self._files[place >> int(_FILE_SHIFT)], place & int(_LINE)) for place in places]

    def _read(self, rows_k: np.ndarray) -> Iterator[Facts]:
        """The facts of these rows, read again."""
        offsets = self._log.take("offset", rows_k).tolist()
        for (file, line), offset in zip(self._places(rows_k), offsets, strict=True):
            with _further_down():
                row = file.source.reread(offset, line)
                quick = file.quick.facts([row])[0] if file.quick else None
                facts = quick or facts_of(file.record(row, line))
            yield self._known(facts)

    def _known(self, facts: Facts) -> Facts:
        """The same with media as they are compared."""
        return (*facts[:3], self._pictures.identity(facts[3]), *facts[4:])


def _shown_rows(code: str, row: Facts, first: Facts) -> tuple[str, str]:
    """(what a row says, how the one before it differs) for a finding about the two: question and
    answer, where they part.
    """
    if code in ("prompt_overlap", "conflict"):
        answer, other = _parting(row[1], first[1])
        found = say(
            "{question} answered {answer}", "{question} 的回答为 {answer}", question=show(row[0]), answer=answer
        )
        return found, f" ({other})"
    if code == "overlap":
        return show(row[0]), ""
    whole = ["\n".join(filter(None, facts[:3])) for facts in (row, first)]
    text, other = _parting(*whole)
    return text, f" ({other})" if code.startswith("near_") else ""


def _parting(one: str, other: str) -> tuple[str, str]:
    """Two texts as they are shown, from shortly before where they part, if that is far inside."""
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = at - _BEFORE if at > _BEFORE * 2 and one != other else 0
    return show("…" * bool(start) + one[start:]), show("…" * bool(start) + other[start:])


@contextmanager
def _further_down() -> Iterator[None]:
    """A row at the edge of what can be nested is read again from more frames than at first."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(before + 200)
    try:
        yield
    finally:
        sys.setrecursionlimit(before)


@contextmanager
def _collector_off() -> Iterator[None]:
    """Parsing makes millions of short-lived objects and no cycles; looking for cycles would double
    its time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _drawn(rows_k: np.ndarray, step: int) -> np.ndarray:
    """Whether each row belongs to a sample of one in `step` (a power of two); a larger step draws
    from the same rows.
    """
    return (rows_k.astype(np.uint64) * _MIX >> np.uint64(40)) & np.uint64(step - 1) == 0


def _most_tokens(facts: Facts) -> int:
    """An upper bound of a plain row's tokens. Every turn but the last two ends with a line
    break.
    """
    return sum(len(text.encode()) for text in facts[:3]) + ROW_TOKENS + TURN_TOKENS * (facts[0].count("\n") + 2)


def count_tokens(record: Record, processor: Processor) -> int:
    """Tokens of the longest dialogue of a record, as `Processor.encode` would make them, pictures
    and clips measured by their heads.

    0 where the dialogue cannot be rendered or a medium cannot be opened.
    """
    longest = 0
    count = len(record.candidates)
    for messages, images, videos in [record.dialogue(i) for i in range(count)] or [
        (record.messages, record.images, record.videos)
    ]:
        options: dict[str, Any] = {
            "tools": record.tools,
            "thinking": thinking_of(record, processor.template),
            "add_generation_prompt": messages[-1]["role"] != "assistant",
        }
        try:
            longest = max(longest, processor.measure(messages, images, videos, **options)[0])
        except (ValueError, OSError, ImportError):
            return 0
    return longest

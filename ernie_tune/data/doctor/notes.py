"""What is to be said once for a file of rows: names that no reader took, tags taken as words,
thoughts that are not trained.

The doctor and the trainers say the same, each in its place. Refuses to know: how rows are read,
what else is wrong with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ernie_tune.config.language import Text, counted, say
from ernie_tune.data.chat import THINK, last_question
from ernie_tune.data.doctor.checks import Finding
from ernie_tune.data.readers.formats import nearest_name
from ernie_tune.data.readers.unused import BOOKKEEPING
from ernie_tune.data.records import Message, Record

_SHOWN_NAMES = 12


@dataclass
class _Seen:
    """Where and how often something was seen."""

    line: int
    field: str
    found: str
    rows: int = 0
    count: int = 0


@dataclass
class FileNotes:
    """The notes of one file, row by row. Memory does not grow with the rows. `asked`: rows that
    are questions, whose other columns go to functions that judge.
    """

    asked: int = 0
    unused: Counter[str] = field(default_factory=Counter)
    seen: dict[str, _Seen] = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Take note of a record."""
        meta = record.meta
        self.unused.update(meta.unused)
        self.asked += record.signal in ("prompt", "verifiable")
        for code, name, found in {note[0]: note for note in meta.notes}.values():
            self._see(code, meta.line, name, found, 1)
        turns = record.messages
        if thoughts := sum(map(thinks, turns[: last_question(turns)])):
            self._see("earlier_thoughts", meta.line, "messages", "", thoughts)
        if record.mode == "nothink" and any(map(thinks, (*turns, *(m for c in record.candidates for m in c.messages)))):
            self._see("thought_dropped", meta.line, "mode", "nothink", 1)

    def _see(self, code: str, line: int, name: str, found: str, count: int) -> None:
        seen = self.seen.setdefault(code, _Seen(line, name, found))
        seen.rows, seen.count = seen.rows + 1, seen.count + count

    def findings(self, path: str, rows: int) -> Iterator[Finding]:
        """One finding for each thing, with how often it was seen among `rows` rows."""
        if self.unused:
            teaching = {
                name: count for name, count in self.unused.items() if name.rpartition(".")[2] not in BOOKKEEPING
            }
            close = [(name, near) for name in teaching if (near := nearest_name(name)) not in ("", name)]
            hint = ", ".join(f"{name} -> {near}" for name, near in close[:3]) or "question, answer, images, …"
            code = "handed" if 2 * self.asked > rows else "unused" if teaching else "bookkeeping"
            yield Finding.of(code, path, 0, "columns", _names(self.unused, rows), hint=hint)
        for code, seen in self.seen.items():
            yield Finding.of(code, path, seen.line, seen.field, _told(code, seen, rows))


def thinks(message: Message) -> bool:
    """Whether a turn is an answer with a thought."""
    if message["role"] != "assistant":
        return False
    return bool(message.get("reasoning_content")) or message["content"].lstrip().startswith(THINK)


def _names(unused: Counter[str], rows: int) -> Text:
    listed = [f"{name} ({count:,})" for name, count in unused.most_common(_SHOWN_NAMES)]
    more = len(unused) - len(listed)
    return say(
        "{names}{more}, which no reader takes (number of rows, of {rows:,})".replace("{rows:,}", f"{rows:,}"),
        "{names}{more}，没有被读取（括号内为行数，共 {rows:,} 行）".replace("{rows:,}", f"{rows:,}"),
        names=", ".join(listed),
        more=say(f" and {more} more", f" 等另 {more} 个") if more > 0 else "",
    )


def _told(code: str, seen: _Seen, rows: int) -> Text:
    if code == "earlier_thoughts":
        count = counted(seen.count, "earlier thought")
        return say(
            f"{count} in {seen.rows:,} of {rows:,} rows",
            f"{rows:,} 行中的 {seen.rows:,} 行有 {seen.count:,} 处较早的思考",
        )
    return say(
        f"{seen.found} in {seen.rows:,} of {counted(rows, 'row')}", f"{rows:,} 行中的 {seen.rows:,} 行有 {seen.found}"
    )

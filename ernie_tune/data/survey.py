"""Count before training: which rows can be used, why others cannot, what readers had to decide.
Each row is looked at once, before the first step.

A row costs some 0.1 ms: pictures are measured by their heads, and only where the row may be too
long for its limit.
Refuses to know: files, models, who prints the lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ernie_tune.config.language import Text, counted, join, say
from ernie_tune.data.batching import Dropped
from ernie_tune.data.doctor.notes import FileNotes
from ernie_tune.data.records import Record

SURVEYED_ROWS = 1_000_000  # of which the rest is told by what they are, not looked at


@dataclass
class Survey:
    """What a look at all rows found. `seen` rows were looked at, of `rows`; `said`: what else there
    is to say of them.
    """

    rows: int = 0
    seen: int = 0
    usable: int = 0
    dropped: Dropped = field(default_factory=Dropped)
    notes: dict[str, FileNotes] = field(default_factory=dict)  # by file
    read: dict[str, int] = field(default_factory=dict)  # rows of each file
    said: list[Text] = field(default_factory=list)

    def lines(self) -> Iterator[tuple[Text, str]]:
        """(what to say, "INFO" or "WARNING")."""
        yield self._counts(), "INFO" if self.usable == self.seen else "WARNING"
        for line in self.said:
            yield line, "INFO"
        for line in self.dropped.lines():
            yield line, "WARNING"
        for path, notes in self.notes.items():
            for finding in notes.findings(path, self.read[path]):
                yield finding.text, "INFO" if finding.severity == "note" else "WARNING"

    def _counts(self) -> Text:
        more = self.rows - self.seen
        rest = say(f"; {more:,} more were not looked at", f"；另有 {more:,} 行未检查") if more else ""
        return say(
            "training data: {usable:,} of {rows} can be used{rest}".replace("{usable:,}", f"{self.usable:,}"),
            "训练数据：{rows} 行中有 {usable:,} 行可用{rest}".replace("{usable:,}", f"{self.usable:,}"),
            rows=say(counted(self.seen, "row"), f"{self.seen:,}"),
            rest=rest,
        )


class KnowsRows(Protocol):
    """What tells whether a row can be used, such as a `RecordEncoder`."""

    def usable(self, record: Record, dropped: Dropped) -> bool:
        """Whether it can, a reason noted where not."""


def survey(sets: Sequence[Sequence[Record]], encoder: KnowsRows, limit: int = SURVEYED_ROWS) -> Survey:
    """Look at the rows of all sets (`limit` of them at most). Raises DataError and ValueError for a
    row that would stop the run, and where no row can be used.
    """
    found = Survey(rows=sum(map(len, sets)))
    for rows in sets:
        for i in range(min(len(rows), limit - found.seen)):
            record = rows[i]
            found.seen += 1
            found.usable += encoder.usable(record, found.dropped)
            path = record.meta.path or "train_dataset"
            found.read[path] = found.read.get(path, 0) + 1
            if path not in found.notes:
                found.notes[path] = FileNotes()
            found.notes[path].add(record)
    if not found.usable and found.seen == found.rows:
        raise ValueError(
            say(
                "no row of the training data can be used: {why}; raise max_seq_len or check the data with `data check`",
                "训练数据没有一行可用：{why}；请调大 max_seq_len，或用 `data check` 检查数据",
                why=join("; ", found.dropped.lines()) if found.dropped.count else say("there is none", "没有数据"),
            )
        )
    return found

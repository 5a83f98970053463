"""Texts longer than a row may be -> consecutive pieces, so that continued pre-training learns all
of a document.

A piece ends at a line break, or else at a space or the end of a sentence, where there is one in its
second half. Only the last piece of a text ends as a text does. Refuses to know: files, how rows are
mixed, paddle. Memory: 40 bytes a piece; a piece is read from its row when it is asked for.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ernie_tune.config.language import Text, counted, say
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Message, Record

_MARK_TOKENS = 2  # the begin and the end of a text
# A window of so many characters for each token is looked at for the end of a piece.
_WINDOW = 8
_ENDS = (re.compile(r"\n"), re.compile(r"[.!?。！？；;]\s*"), re.compile(r"\s"))


class TextPieces(Sequence[Record]):
    """The records of `rows`, each text cut into as many of at most `max_tokens` tokens as it needs;
    other records as they are.

    Every text is read once when this is made, one that may be too long is tokenised. Raises
    DataError for a row that cannot be read.
    """

    def __init__(self, rows: Sequence[Record], processor: Processor, max_tokens: int) -> None:
        self.rows = rows
        flat = array("q")
        self.cut_texts = 0
        for i in range(len(rows)):
            record = rows[i]
            ends = _piece_ends(record, processor, max_tokens)
            self.cut_texts += len(ends) > 1
            start = 0
            for end in ends:
                flat.extend((i, start, end, end == ends[-1]))
                start = end
        self._piece_n4 = np.frombuffer(flat, np.int64).reshape(-1, 4)

    def __len__(self) -> int:
        return len(self._piece_n4)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        row, start, end, last = (int(v) for v in self._piece_n4[i])
        record: Record = self.rows[row]
        if record.signal != "text" or (start == 0 and last):
            return record
        whole = record.messages[0]
        piece: Message = {**whole, "content": whole["content"][start:end]}
        if not last:
            piece["ends"] = False
        return replace(record, messages=(piece,), id=f"{record.id}#{start}")


def cut_note(sets: Sequence[TextPieces]) -> list[Text]:
    """What has been cut, in a line; none where nothing was."""
    texts = sum(rows.cut_texts for rows in sets)
    pieces = texts + sum(len(rows) - len(rows.rows) for rows in sets)
    said = say(
        f"{counted(texts, 'text')} longer than max_seq_len: learnt in {counted(pieces, 'piece')}",
        f"{texts:,} 段文本长于 max_seq_len：分为 {pieces:,} 段学习",
    )
    return [said] if texts else []


def _piece_ends(record: Record, processor: Processor, max_tokens: int) -> list[int]:
    """Where the pieces of a record's text end, in characters; one end, whatever it is, for other
    records and for texts that fit.
    """
    if record.signal != "text":
        return [0]
    text, room = record.messages[0]["content"], max_tokens - _MARK_TOKENS
    if len(text.encode()) <= room:  # a token has at least one byte
        return [len(text)]
    return list(_ends(text, room, processor)) or [0]


def _ends(text: str, room: int, processor: Processor) -> Iterator[int]:
    start = 0
    while start < len(text):
        window = text[start : start + _WINDOW * room]
        ids = processor.tokenizer.encode(window)
        if len(ids) <= room and start + len(window) == len(text):
            yield len(text)
            return
        size = len(window) if len(ids) <= room else _characters(ids[:room], processor)
        size = _pleasant(window, size)
        # cut where it is, a text may have a token more than within the whole
        while size > 1 and len(processor.tokenizer.encode(window[:size])) > room:
            size = _pleasant(window, size - max(1, size // 32))
        start += max(1, size)
        yield start


def _characters(ids: Sequence[int], processor: Processor) -> int:
    """How many whole characters these tokens make."""
    raw = b"".join(processor.tokenizer.token_bytes(i) for i in ids)
    return len(raw.decode("utf-8", "ignore"))


def _pleasant(text: str, size: int) -> int:
    """The last good place to end a piece in the second half of `text[:size]`; `size` where there is
    none. A tag behind its backslash is not parted.
    """
    for end in _ENDS:
        places = [found.end() for found in end.finditer(text, size // 2, size)]
        if places:
            return places[-1]
    slash = text.rfind("\\<", max(0, size - len("\\<image>")), size)
    return slash if slash > 0 and size < len(text) else size

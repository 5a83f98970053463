"""The judge's desk: which question lies on it, in which order its answers are shown, what each key
does.

A desk is a value; `press` gives the next one and, where a judgement is complete, that judgement.
Answers are shown shuffled, the same way whenever this judge sees the question, so that neither
model nor place gives them away; judgements keep the rows' own order. Refuses to know: pages, files,
how answers come to be.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ernie_tune.config.language import Text, say
from ernie_tune.ui.judgements import STARS, AskedRow, Judgement

PICK, RANK, RATE, LABEL = "pick", "rank", "rate", "label"
MODES = (PICK, RANK, RATE, LABEL)
_DIGITS = tuple("0123456789")
HELP = {
    PICK: say("the number of the best answer writes it and goes on", "按最好回答的编号：写入并继续"),
    RANK: say(
        "each answer in turn gets its place, 1 is best; equal places are ties; then write",
        "依次给每个回答名次，1 为最好；名次相同即并列；然后写入",
    ),
    RATE: say("each answer in turn gets 1 to 5 stars; then write", "依次给每个回答 1 至 5 星；然后写入"),
    LABEL: say(
        "each answer in turn is good or bad, bad ones with a reason if you like; then write",
        "依次判断每个回答好或不好，不好的可写原因；然后写入",
    ),
}
ALIKE, GOOD, BAD = say("all alike", "都一样"), say("good", "好"), say("bad", "不好")
EDIT, REASON = say("correct it", "改写"), say("reason", "原因")
WRITE, SKIP, BACK = say("write and on", "写入并继续"), say("skip", "跳过"), say("back", "返回")


def keys(mode: str, count: int) -> list[tuple[str, Text | str]]:
    """(key, what it does) for a question with so many answers."""
    numbers = min(count, 9) if mode in (PICK, RANK) else len(STARS) if mode == RATE else 0
    own: list[tuple[str, Text | str]] = [(str(n), "★" * n if mode == RATE else "") for n in range(1, numbers + 1)]
    if mode == PICK and count > 1:
        own.append(("0", ALIKE))
    if mode == LABEL and count:
        own += [("g", GOOD), ("b", BAD), ("r", REASON)]
    return [*own, *([("e", EDIT), ("Enter", WRITE)] if count else []), ("s", SKIP), ("u", BACK)]


@dataclass(frozen=True)
class Sayings:
    """What has been said of the answers so far, in the order in which they are shown."""

    ranks: tuple[int | None, ...]
    ratings: tuple[int | None, ...]
    labels: tuple[bool | None, ...]

    @classmethod
    def empty(cls, count: int) -> Sayings:
        return cls((None,) * count, (None,) * count, (None,) * count)


@dataclass(frozen=True)
class Desk:
    """`todo`: ids of the questions in order; `at`: which one lies here (len(todo): all are done);
    `answers`: its answers as they are shown; `order`: answer k shown is answer order[k] of the row;
    `marked`: the answer that keys act on; `told`: a line about the last key.
    """

    judge: str
    mode: str
    todo: tuple[str, ...]
    at: int = 0
    answers: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    draft: Sayings = Sayings((), (), ())
    marked: int = 0
    told: Text | str = ""
    since: float = 0.0

    @property
    def question(self) -> str | None:
        """The id of what lies here."""
        return self.todo[self.at] if self.at < len(self.todo) else None

    def laid(self, answers: Sequence[str], now: float | None = None) -> Desk:
        """With the answers to the present question."""
        order = shuffled(len(answers), f"{self.judge}\0{self.question}")
        return dataclasses.replace(
            self,
            answers=tuple(answers[i] for i in order),
            order=order,
            draft=Sayings.empty(len(answers)),
            marked=0,
            since=time.monotonic() if now is None else now,
        )

    def moved(self, by: int, told: Text | str = "") -> Desk:
        """At another question, which has to be laid."""
        at = min(max(self.at + by, 0), len(self.todo))
        return dataclasses.replace(self, at=at, answers=(), order=(), draft=Sayings.empty(0), marked=0, told=told)


def press(desk: Desk, key: str) -> tuple[Desk, bool]:
    """(the desk after a key, whether the judgement is to be written now). Keys that mean nothing
    here change nothing.
    """
    if desk.question is None and key != "u":
        return desk, False
    if key == "s":
        return desk.moved(1, say("skipped", "已跳过")), False
    if key == "u":
        return desk.moved(-1), False
    if not desk.answers:
        return desk, False
    if key in ("ArrowRight", "ArrowLeft"):
        step = 1 if key == "ArrowRight" else -1
        return dataclasses.replace(desk, marked=(desk.marked + step) % len(desk.answers), told=""), False
    if key.startswith("mark") and key[4:].isdecimal() and int(key[4:]) < len(desk.answers):
        return dataclasses.replace(desk, marked=int(key[4:]), told=""), False
    if key == "Enter":
        return desk, True
    return _said(desk, key)


def _said(desk: Desk, key: str) -> tuple[Desk, bool]:
    count, digit = len(desk.answers), int(key) if key in _DIGITS else None
    if desk.mode == PICK and digit is not None and digit <= count:
        ranks = tuple(1 if digit in (0, k + 1) else 2 for k in range(count))
        return _with(desk, ranks=ranks), True
    if desk.mode == RANK and digit and digit <= count:
        return _next(_with(desk, ranks=_put(desk.draft.ranks, desk.marked, digit))), False
    if desk.mode == RATE and digit in STARS:
        return _next(_with(desk, ratings=_put(desk.draft.ratings, desk.marked, digit))), False
    if desk.mode == LABEL and key in ("g", "b"):
        return _next(_with(desk, labels=_put(desk.draft.labels, desk.marked, key == "g"))), False
    return desk, False


def _with(desk: Desk, **said: Any) -> Desk:
    return dataclasses.replace(desk, draft=dataclasses.replace(desk.draft, **said), told="")


def _next(desk: Desk) -> Desk:
    """Mark the next answer; the last one stays marked."""
    return dataclasses.replace(desk, marked=min(desk.marked + 1, len(desk.answers) - 1))


def _put(values: tuple[int | bool | None, ...], at: int, value: int | bool | None) -> tuple[int | bool | None, ...]:
    return (*values[:at], value, *values[at + 1 :])


def judgement(
    desk: Desk,
    asked: AskedRow,
    *,
    reason: str = "",
    corrected: str = "",
    models: Sequence[str] = (),
    now: float | None = None,
) -> Judgement:
    """What the desk says, in the order of the row's answers. `reason`: of answers called bad;
    `corrected`: what the marked answer should have been. Raises ValueError as `Judgement`.
    """
    count = len(desk.order)

    def back(values: Sequence[object]) -> tuple[object, ...]:
        out: list[object] = [None] * count
        for k, i in enumerate(desk.order):
            out[i] = values[k]
        return tuple(out) if any(v is not None for v in out) else ()

    draft = desk.draft
    labels = back(draft.labels)
    changed = corrected.strip() and corrected.strip() != (desk.answers[desk.marked].strip() if desk.answers else "")
    return Judgement(
        asked,
        desk.judge,
        tuple(str(a) for a in back(desk.answers)),
        back(draft.ranks),  # type: ignore[arg-type]
        back(draft.ratings),  # type: ignore[arg-type]
        labels,  # type: ignore[arg-type]
        tuple(reason.strip() if label is False else "" for label in labels) if reason.strip() else (),
        corrected.strip() if changed else "",
        desk.order[desk.marked] if changed else None,
        tuple(models),
        round((time.monotonic() if now is None else now) - desk.since, 2),
    )


def shuffled(count: int, salt: str) -> tuple[int, ...]:
    """An order of `count` things that `salt` alone decides."""
    return tuple(sorted(range(count), key=lambda i: hashlib.sha256(f"{salt}\0{i}".encode()).digest()))

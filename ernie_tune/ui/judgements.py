"""What a person thinks of answers, and the rows that training learns it from.

`judgements.jsonl` is the source: one line a judgement, only ever added to. Beside it every
judgement becomes rows at once, in the files of the kinds that it holds: pairs.jsonl and
rankings.jsonl (DPO, UPO, reward models), ratings.jsonl (those too), labels.jsonl (KTO, UPO),
corrected.jsonl (SFT). Who judges a question again replaces their rows, not their line. Several
judges may write at once. Refuses to know: pages, models, keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.language import say

SOURCE, LOCK = "judgements.jsonl", ".judging.lock"
PAIRS, RANKINGS, RATINGS, LABELS, CORRECTED = (
    "pairs.jsonl",
    "rankings.jsonl",
    "ratings.jsonl",
    "labels.jsonl",
    "corrected.jsonl",
)
KINDS = (PAIRS, RANKINGS, RATINGS, LABELS, CORRECTED)
STARS = (1, 2, 3, 4, 5)


@dataclass(frozen=True)
class AskedRow:
    """A question with its media; `messages` end with the user's turn, `id` names it for good."""

    id: str
    messages: tuple[Mapping[str, Any], ...]
    images: tuple[str, ...] = ()
    videos: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What one judge thinks of the answers to one question. `ranks`: a place for each answer, 1 is
    best, equal ones are ties; `ratings`: 1 to 5; `labels`: good or bad; `reasons`: of bad ones;
    `corrected`: what answer `corrected_of` should have been. None and "": not said.
    """

    asked: AskedRow
    judge: str
    answers: tuple[str, ...]
    ranks: tuple[int | None, ...] = ()
    ratings: tuple[int | None, ...] = ()
    labels: tuple[bool | None, ...] = ()
    reasons: tuple[str, ...] = ()
    corrected: str = ""
    corrected_of: int | None = None
    models: tuple[str, ...] = ()
    seconds: float = 0.0
    time: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%S%z"))

    def __post_init__(self) -> None:
        n = len(self.answers)
        for name in ("ranks", "ratings", "labels", "reasons", "models"):
            found = len(getattr(self, name))
            if found not in (0, n):
                raise ValueError(
                    say(
                        f"{name} ({found}) must be one for each answer ({n}), or none; add or drop some",
                        f"{name}（{found} 个）须与回答（{n} 个）一一对应，或没有；请增减",
                    )
                )
        wrong = [r for r in self.ratings if r is not None and r not in STARS]
        if wrong:
            raise ValueError(
                say(f"rating ({wrong[0]}) must be from 1 to 5; correct it", f"评分（{wrong[0]}）须为 1 到 5；请改正")
            )

    @property
    def says_something(self) -> bool:
        """Whether there is anything to write down; a tie of all is, though no row comes of it."""
        said = (*self.ranks, *self.ratings, *self.labels)
        return any(value is not None for value in said) or bool(self.corrected.strip())


def rows_of(one: Judgement, beside: Path | None = None) -> dict[str, list[dict[str, Any]]]:
    """Rows by file. Media are named from the folder `beside`."""
    base: dict[str, Any] = {"messages": [dict(m) for m in one.asked.messages]}
    if one.asked.images:
        base["images"] = [_named(image, beside) for image in one.asked.images]
    if one.asked.videos:
        base["videos"] = [_named(video, beside) for video in one.asked.videos]
    end = {"id": f"{one.asked.id}@{one.judge}"}
    out: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
    ranked = [(rank, i) for i, rank in enumerate(one.ranks) if rank is not None]
    if len({rank for rank, _ in ranked}) > 1:
        texts = [one.answers[i] for _, i in ranked]
        if len(ranked) == 2:
            (_, worse), (_, better) = sorted(ranked, reverse=True)
            pair = {"chosen": one.answers[better], "rejected": one.answers[worse]}
            out[PAIRS].append({**base, **pair, **end})
        else:
            out[RANKINGS].append({**base, "responses": texts, "ranks": [rank for rank, _ in ranked], **end})
    rated = [(stars, i) for i, stars in enumerate(one.ratings) if stars is not None]
    if rated:
        out[RATINGS].append(
            {**base, "responses": [one.answers[i] for _, i in rated], "scores": [stars for stars, _ in rated], **end}
        )
    for i, label in enumerate(one.labels):
        if label is not None:
            said = {"role": "assistant", "content": one.answers[i]}
            reason = {"_reason": one.reasons[i]} if one.reasons and one.reasons[i] else {}
            row = {**base, "messages": [*base["messages"], said], "label": label, **reason}
            out[LABELS].append({**row, "id": f"{end['id']}#{i}"})
    if one.corrected.strip():
        said = {"role": "assistant", "content": one.corrected}
        out[CORRECTED].append({**base, "messages": [*base["messages"], said], **end})
        of = one.corrected_of
        if of is not None and one.answers[of].strip() != one.corrected.strip():
            pair = {"chosen": one.corrected, "rejected": one.answers[of]}
            out[PAIRS].append({**base, **pair, "id": f"{end['id']}#corrected"})
    return out


class Judgements:
    """The judgements of one folder. Raises ValueError for a file that is none of its own: rows that
    nobody has judged here would be written over.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        others = [] if (folder / SOURCE).exists() else [name for name in KINDS if (folder / name).exists()]
        if others:
            raise ValueError(
                say(
                    f"{folder} must not hold a {others[0]} of somebody else, which would be written over; choose another folder",
                    f"{folder} 中已有他人的 {others[0]}，会被覆盖；请换一个文件夹",
                )
            )
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, one: Judgement) -> None:
        """Write a judgement and its rows. What this judge said of the question before loses its
        rows. Raises ValueError for one that says nothing.
        """
        if not one.says_something:
            raise ValueError(
                say(
                    "a judgement must prefer, rate, label or correct an answer; do so, or skip the question",
                    "评判须有偏好、评分、好坏或改正；请先评判，或跳过该题",
                )
            )
        with self._alone():
            earlier = any(_key(old) == _key(one) for old in self.all())
            self._append(SOURCE, [asdict(one)])
            if earlier:
                self._rebuild()
                return
            for name, rows in rows_of(one, self.folder).items():
                self._append(name, rows)

    def all(self) -> list[Judgement]:
        """Every line, in the order in which they were written; a last one that was cut off is left
        out.
        """
        file = self.folder / SOURCE
        raw = file.read_bytes().split(b"\n")[:-1] if file.is_file() else []
        found = []
        for number, line in enumerate(raw, 1):
            try:
                found.append(_read(json.loads(line)))
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    say(
                        f"{file}:{number} must be a judgement of this studio ({error}); move the file away",
                        f"{file}:{number} 须为本工作室写入的评判（{error}）；请移走该文件",
                    )
                ) from error
        return found

    def standing(self) -> list[Judgement]:
        """Those that hold: the last of each judge on each question."""
        return list({_key(one): one for one in self.all()}.values())

    def done(self, judge: str) -> set[str]:
        """Questions that this judge has judged."""
        return {one.asked.id for one in self.standing() if one.judge == judge}

    def counts(self) -> dict[str, int]:
        """Rows by file."""
        return {
            name: (self.folder / name).read_bytes().count(b"\n") if (self.folder / name).is_file() else 0
            for name in KINDS
        }

    def _rebuild(self) -> None:
        made: dict[str, list[dict[str, Any]]] = {name: [] for name in KINDS}
        for one in self.standing():
            for name, rows in rows_of(one, self.folder).items():
                made[name] += rows
        for name, rows in made.items():
            target = self.folder / name
            if rows or target.exists():
                write_atomically(target, "".join(map(_line, rows)))

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        if not rows:
            return
        with (self.folder / name).open("ab+") as file:
            size = file.tell()
            file.seek(max(0, size - 1))
            if size and file.read(1) != b"\n":  # a line that was cut off by a kill
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(map(_line, rows)).encode())
            file.flush()
            os.fsync(file.fileno())

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Wait for other judges of this folder, whatever process they are in."""
        with (self.folder / LOCK).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _key(one: Judgement) -> tuple[str, str]:
    return one.judge, one.asked.id


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read(found: Mapping[str, Any]) -> Judgement:
    asked = found["asked"]
    known = AskedRow(asked["id"], tuple(asked["messages"]), tuple(asked["images"]), tuple(asked["videos"]))
    lists: dict[str, Any] = {
        name: tuple(found[name]) for name in ("answers", "ranks", "ratings", "labels", "reasons", "models")
    }
    rest = {name: found[name] for name in ("judge", "corrected", "corrected_of", "seconds", "time")}
    return Judgement(known, **lists, **rest)


def _named(medium: Any, beside: Path | None) -> Any:
    if isinstance(medium, str) and beside is not None and os.path.isabs(medium):
        return os.path.relpath(medium, beside.resolve())
    return [_named(one, beside) for one in medium] if isinstance(medium, list | tuple) else medium


# --- two judges ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class JudgesAgreement:
    """How far two judges agree on what both have judged. `questions`: judged by both. `same`: share
    of pairs of answers on which both say the same (better, worse, alike); `kappa`: that beyond
    chance (Cohen 1960); `ratings_kappa`: of ratings, with quadratic weights (Cohen 1968). None:
    nothing to compare, or no variation to explain.
    """

    questions: int
    pairs: int
    same: float | None
    kappa: float | None
    ratings: int
    ratings_kappa: float | None


def agreement(first: Sequence[Judgement], second: Sequence[Judgement]) -> JudgesAgreement:
    """Of two judges' standing judgements, matched by question and by the answers' text."""
    theirs = {one.asked.id: one for one in second}
    pairs: list[tuple[int, int]] = []
    stars: list[tuple[int, int]] = []
    questions = 0
    for one in first:
        other = theirs.get(one.asked.id)
        if other is None or sorted(other.answers) != sorted(one.answers):
            continue
        questions += 1
        place = [other.answers.index(text) for text in one.answers]
        a, b = _standing(one), _standing(other)
        for i in range(len(a)):
            for j in range(i):
                ours, others = _relation(a[i], a[j]), _relation(b[place[i]], b[place[j]])
                if ours is not None and others is not None:
                    pairs.append((ours, others))
        if one.ratings and other.ratings:
            both = [(r, other.ratings[place[i]]) for i, r in enumerate(one.ratings)]
            stars += [(x, y) for x, y in both if x is not None and y is not None]
    same = sum(x == y for x, y in pairs) / len(pairs) if pairs else None
    return JudgesAgreement(questions, len(pairs), same, weighted_kappa(pairs, 0), len(stars), weighted_kappa(stars, 2))


def _standing(one: Judgement) -> list[float | None]:
    """Higher is better: by rank, else by rating, else by label."""
    if any(rank is not None for rank in one.ranks):
        return [None if rank is None else -float(rank) for rank in one.ranks]
    if any(stars is not None for stars in one.ratings):
        return [None if stars is None else float(stars) for stars in one.ratings]
    return [None if label is None else float(label) for label in one.labels] or [None] * len(one.answers)


def _relation(a: float | None, b: float | None) -> int | None:
    return None if a is None or b is None else (a > b) - (a < b)


def weighted_kappa(pairs: Sequence[tuple[int, int]], power: int) -> float | None:
    """1 - (observed disagreement / disagreement by chance), disagreements weighing |a - b|**power
    (0: all alike). None without pairs, and where chance leaves no disagreement."""
    if not pairs:
        return None

    def weight(a: int, b: int) -> float:
        return 0.0 if a == b else float(abs(a - b) ** power)

    n = len(pairs)
    observed = sum(weight(a, b) for a, b in pairs) / n
    chance = sum(weight(a, b) for a, _ in pairs for _, b in pairs) / n**2
    return 1 - observed / chance if chance else None

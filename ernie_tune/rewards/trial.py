"""Rewards put to the test before anything learns from them: right answers must earn, what is tried
instead must not.

Refuses to know: how rewards are computed, models, the command line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ernie_tune.data.records import Record
from ernie_tune.rewards.attacks import (
    ABSTENTIONS,
    allowed,
    attacks,
    evidence_attacks,
    reference_calls,
    reference_text,
)
from ernie_tune.rewards.functions import Answered
from ernie_tune.rewards.rubric import Rubric, Scored

LEAST = 0.95  # of what a right answer can earn, on average
_EPS = 1e-6


@dataclass(frozen=True)
class Tried:
    """One line of the table: what was tried on how many rows, what it earned on average and at
    worst (for what should earn: at least), the bound that the worst was held against, and an
    example: the row and what was said there."""

    name: str
    rows: int
    mean: float
    worst: float
    bound: float
    place: str
    text: str
    passed: bool


def total(scored: Scored, rubric: Rubric) -> float | None:
    """What an answer earns in all; None where no reward applies."""
    known = {name: value for name, value in scored.parts.items() if value is not None and not math.isnan(value)}
    weights = dict(zip(rubric.names, rubric.weights, strict=True))
    return sum(weights[name] * value for name, value in known.items()) if known else None


def _totals(
    rubric: Rubric, rows: Sequence[tuple[Record, Mapping[str, str]]], shown: bool = False
) -> list[dict[str, float | None]]:
    """name of a text -> what it earns, row by row; `shown`: of answers that have looked first."""
    groups = [
        (record, [Answered(text, calls=reference_calls(record) if shown else ()) for text in texts.values()])
        for record, texts in rows
    ]
    return [
        dict(zip(texts, (total(one, rubric) for one in given), strict=True))
        for (_, texts), given in zip(rows, rubric(groups), strict=True)
    ]


def full_marks(record: Record, rubric: Rubric) -> float:
    """What a right answer to the row is meant to earn: the weights of its checkers, or 1 for each
    function."""
    verifiers = record.reward.verifiers if record.reward else ()
    row = sum(v.weight for v in verifiers if v.name not in ("language", "repetition", "length")) if verifiers else 1.0
    return sum(w * (row if name == "row" else 1.0) for name, w in zip(rubric.names, rubric.weights, strict=True))


def references(rubric: Rubric, records: Sequence[Record]) -> Tried | None:
    """Right answers: the mean share of what they can earn must reach LEAST. None where no row has
    one; raises ValueError as the rewards do."""
    rows = [(record, {"": text}) for record in records if (text := reference_text(record)) is not None]
    if not rows:
        return None
    shares = []
    for (record, _), earned in zip(rows, _totals(rubric, rows, shown=True), strict=True):
        most = full_marks(record, rubric)
        shares.append((earned[""] or 0.0) / most if most > 0 else 0.0)
    mean, worst = math.fsum(shares) / len(shares), min(range(len(shares)), key=shares.__getitem__)
    where, said = rows[worst]
    return Tried("reference", len(rows), mean, shares[worst], LEAST, str(where.meta), said[""], mean >= LEAST)


def attacked(rubric: Rubric, records: Sequence[Record]) -> list[Tried]:
    """Each attack on every row: no row may pay more for it than for saying honestly that one does
    not know, or nothing, whichever is more (and what `allowed` leaves)."""
    rows = []
    for record in records:
        if found := attacks(record):
            silent = {f"abstained {i}": said for i, said in enumerate(ABSTENTIONS)}
            rows.append((record, {**found, **evidence_attacks(record), **silent}))
    earned = _totals(rubric, rows)
    lines = []
    for name in sorted(
        {name for _, texts in rows for name in texts if not name.startswith(("abstained ", "right_alone"))}
    ):
        values, bounds, places = [], [], []
        for (record, texts), given in zip(rows, earned, strict=True):
            if name in texts:
                values.append(given[name] or 0.0)
                honest = max(given[f"abstained {i}"] or 0.0 for i in range(len(ABSTENTIONS)))
                right = given.get("right_alone") if name.startswith("right_") else None
                bounds.append(max(0.0, honest) + allowed(record, name) if right is None else right)
                places.append((str(record.meta), texts[name]))
        over = max(range(len(values)), key=lambda i: values[i] - bounds[i])
        passed = values[over] <= bounds[over] + _EPS
        mean = math.fsum(values) / len(values)
        lines.append(Tried(name, len(values), mean, values[over], bounds[over], *places[over], passed))
    return lines

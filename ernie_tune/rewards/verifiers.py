"""Checkers of answers: a completion and what is right -> a score on [0, 1], or None where the check
does not apply.

Each is a pure function of strings and numbers, named in VERIFIERS as data files name it. What is
checked is the answer's span (`reading.answer_span`), never the thought. A checker prefers 0 to
doubt: a range around the gold, two answers, or the gold among other words earn nothing, or a policy
learns to write those.
Refuses to know: records, files, pictures, how scores are weighed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.rewards import mathematics
from ernie_tune.rewards.drawing import redraw
from ernie_tune.rewards.evidence import box_area, cover, judge_evidence, without_evidence
from ernie_tune.rewards.reading import MAX_SPAN, UNITS, answer_span, fold, read_quantity, squash
from ernie_tune.rewards.scores import Box, edit_distance
from ernie_tune.rewards.shaping import language, length, repetition, think_format
from ernie_tune.rewards.structures import box, boxes, date, json_schema, kie, table

Verify = Callable[..., "float | None"]
_NONE = ("没有", "无", "none", "no", "nothing")
_EXACT_INTEGERS = 2**53
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}")
_CHOICE = re.compile(
    r"(?:选项?|选择|option|choice)?\s*[(\[]?\s*([A-Za-z])\s*[)\]]?(?:\s*[.、::)]\s*(.*))?", re.DOTALL | re.IGNORECASE
)


def numeric(
    text: str,
    gold: float,
    tol: float = 0.0,
    rel: float = 1e-6,
    unit: str | None = None,
    percent: bool = False,
    style: str = "auto",
) -> float:
    """1 where the answer is one number within max(tol, rel |gold|) of `gold`, in `unit` or a unit
    of its dimension.

    Without `unit` only a bare number or a counted one (3个) will do. `percent`: 50% means 0.5.
    Raises ValueError for an unknown unit.
    """
    if unit is not None and unit not in UNITS:
        raise ValueError(
            say(
                f"unit ({unit!r}) must be one of {', '.join(UNITS)}; leave it out for a bare number",
                f"unit（{unit!r}）须为 {', '.join(UNITS)} 之一；只有数值时请不写",
            )
        )
    span = answer_span(text, style)
    found = read_quantity(span) if span is not None else None
    if found is None:
        return 0.0
    value = found.value
    if found.unit == "%":
        if unit != "%" and not percent:
            return 0.0
        value = value if unit == "%" else value / 100
    elif found.unit and unit is None:
        if found.dimension != "number":
            return 0.0
    elif found.unit and unit is not None:
        if found.dimension != UNITS[unit][0]:
            return 0.0
        value *= UNITS[found.unit][1] / UNITS[unit][1]
    return float(abs(value - gold) <= max(tol, rel * abs(gold)) + 1e-12 * max(1.0, abs(gold)))


def choice(text: str, gold: str, options: Mapping[str, str] | None = None, style: str = "auto") -> float:
    """1 where the answer is the letter `gold`, alone or with its own option's text, or that text
    alone. "A or B" is no answer.
    """
    span = answer_span(text, style)
    if span is None:
        return 0.0
    span = _TEXT.sub(r"\1", span).strip().strip("$").rstrip(".。,，;；!！").strip()
    if options and [key for key, said in options.items() if squash(fold(said)) == squash(span)] == [gold]:
        return 1.0
    parts = _CHOICE.fullmatch(span)
    if not parts or parts[1].upper() != gold.upper():
        return 0.0
    rest = (parts[2] or "").strip()
    own = options.get(gold) if options else None
    return float(not rest or (own is not None and squash(rest) == squash(fold(own))))


def count(text: str, gold: int, style: str = "auto") -> float:
    """1 where the answer is the whole number `gold`: 3, 三, three, 3.0, 3个; none and 没有 are
    0.
    """
    span = answer_span(text, style)
    if span is None:
        return 0.0
    if squash(span) in _NONE:
        return float(gold == 0)
    found = read_quantity(span)
    counted = found is not None and found.dimension in (None, "number")
    return float(counted and found is not None and found.value == gold and abs(found.value) < _EXACT_INTEGERS)


def exact(text: str, golds: Sequence[str] | str, style: str = "auto") -> float:
    """1 where the answer equals a gold but for width, case, spaces and marks at its ends."""
    span = answer_span(text, style)
    wanted = [golds] if isinstance(golds, str) else golds
    return float(span is not None and squash(span) in {squash(fold(gold)) for gold in wanted})


def anls(text: str, golds: Sequence[str] | str, tau: float = 0.5, style: str = "auto") -> float:
    """1 - edit distance over the longer length to the nearest gold, 0 unless above 1 - tau. Width,
    case and runs of spaces do not count.
    """
    span = answer_span(text, style)
    if span is None:
        return 0.0
    best = max((_nearness(span, gold) for gold in ([golds] if isinstance(golds, str) else golds)), default=0.0)
    return best if best > 1 - tau or best == 1 else 0.0


def ocr_ned(text: str, golds: Sequence[str] | str, style: str = "auto") -> float:
    """`anls` without a threshold."""
    return anls(text, golds, 1.0, style)


def _nearness(span: str, gold: str) -> float:
    got, want = (" ".join(fold(part).split()).casefold() for part in (span, gold))
    return 1 - edit_distance(got, want) / max(len(got), len(want)) if got or want else 0.0


def chart(text: str, gold: str | float, rel: float = 0.05, year: bool = False, style: str = "auto") -> float:
    """1 within `rel` of a gold number (ChartQA, arXiv 2203.10244); a share needs its % on both
    sides, a gold of 0, a year (`year`) and words are exact.
    """
    span = answer_span(text, style)
    if span is None:
        return 0.0
    gold = str(gold)
    want, got = read_quantity(gold), read_quantity(span)
    if want is None or year:
        return float(squash(span) == squash(fold(gold)))
    if got is None or (got.unit == "%") != (want.unit == "%"):
        return 0.0
    if want.value == 0:
        return float(got.value == 0)
    return float(abs(got.value - want.value) <= rel * abs(want.value) + 1e-9)


def math(text: str, gold: str | float, style: str = "auto") -> float | None:
    """1 where the answer is mathematically the gold, by the package math-verify where it is
    installed, else as a number or the same text.

    None where the gold itself cannot be read.
    """
    span = answer_span(text, style)
    gold = str(gold)
    if mathematics.available():
        if span is None or len(span) > MAX_SPAN:
            return 0.0
        return mathematics.equal(gold, span)
    number = read_quantity(gold)
    return numeric(text, number.value, style=style) if number else exact(text, gold, style)


def evidence(
    text: str,
    scene: Mapping[str, Any],
    required: Sequence[Mapping[str, Any]] | int = 1,
    answer_from: str = "",
    style: str = "auto",
) -> float:
    """How well the claims in <evidence>[...]</evidence> are supported by the picture's annotation,
    and prove the answer (`evidence.judge_evidence`).
    """
    return judge_evidence(text, answer_span(without_evidence(text), style), scene, required, answer_from).score


def zoom(text: str, crops: Sequence[Box], target: Sequence[float], area: float, least: float = 0.9) -> float:
    """1 where some part of the picture that the answer had shown holds `least` of the target and is
    no more than half of the picture (`area`: of all of it, in pixels).
    """
    left, top, right, bottom = (float(x) for x in target)
    seen = any(cover(c, (left, top, right, bottom)) >= least and box_area(c) <= 0.5 * area for c in crops)
    return float(seen)


VERIFIERS: Mapping[str, Verify] = {
    "numeric": numeric,
    "math": math,
    "choice": choice,
    "mcq": choice,
    "count": count,
    "exact": exact,
    "anls": anls,
    "ocr_ned": ocr_ned,
    "chart": chart,
    "chart_value": chart,
    "box": box,
    "box_iou": box,
    "boxes": boxes,
    "kie": kie,
    "json_schema": json_schema,
    "table": table,
    "date": date,
    "evidence": evidence,
    "redraw": redraw,
    "zoom": zoom,
    "format": think_format,
    "language": language,
    "repetition": repetition,
    "length": length,
}
# What says how an answer should look, and not whether it is right: alone it would be learned
# instead of the task.
SHAPING = ("format", "language", "repetition", "length")
# What an answer rests on: worth something beside a right answer only.
GROUNDS = ("evidence", "zoom")
# What gives part of an answer its part: the gold among other words may earn half.
PARTIAL = ("ocr_ned", "anls", "kie", "table", "boxes")


def verifier_for(answer: Any) -> tuple[str, dict[str, Any]]:
    """(name, spec) of the checker that a gold answer of this kind asks for, where a row names none.
    Raises ValueError for no answer.

    A list of four numbers is a box, of such lists boxes; a list of texts is any of them; an object
    is key information; a letter is a choice; a whole number or its digits a count; another number
    numeric; other text exact.
    """
    if isinstance(answer, Mapping):
        return "kie", {"gold": dict(answer)}
    if isinstance(answer, bool):
        return "exact", {"golds": ["yes", "true", "是"] if answer else ["no", "false", "否"]}
    if isinstance(answer, int):
        return "count", {"gold": answer}
    if isinstance(answer, float):
        return "numeric", {"gold": answer}
    if isinstance(answer, Sequence) and not isinstance(answer, str) and answer:
        if all(isinstance(part, int | float) for part in answer) and len(answer) == 4:
            return "box", {"gold": list(answer)}
        if all(isinstance(part, Sequence) and not isinstance(part, str) and len(part) == 4 for part in answer):
            return "boxes", {"golds": [list(part) for part in answer]}
        return "exact", {"golds": [str(part) for part in answer]}
    if isinstance(answer, str) and answer.strip():
        return _for_text(answer.strip())
    raise ValueError(
        say(
            f"answer ({answer!r}) must be given where a row names no verifier; add an answer, or verifiers",
            f"一行没有写明检验器时须给出 answer（现为 {answer!r}）；请补上答案或 verifiers",
        )
    )


def _for_text(answer: str) -> tuple[str, dict[str, Any]]:
    if re.fullmatch(r"[A-Z]", answer):
        return "choice", {"gold": answer}
    if re.fullmatch(r"0|[1-9]\d{0,14}", answer):
        return "count", {"gold": int(answer)}
    # 0042 is a name, not a number
    number = None if re.fullmatch(r"0\d+", answer) else read_quantity(answer)
    if number is not None and number.unit in (None, "%"):
        return "numeric", {"gold": number.value, **({"unit": "%"} if number.unit else {})}
    return "exact", {"golds": [answer]}

"""Scores of a base by skill and language, from the file that `ernie-tune predict` wrote over
make_data.py's held-out rows. Knows strings alone.

Usage: python score.py EVAL.jsonl ANSWERS.jsonl
caption: things right (size, colour, shape and place) of things there or said; text, digit, receipt:
characters right, one minus edit distance
over length; table: labels with values within 5 %; chart: within 5 % or equal; all others: equal.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

_CJK = re.compile("[\u4e00-\u9fff]")
_COMMA = re.compile("[,，]\\s*")


def shares(reference: str, answer: str) -> float:
    """Items between commas that both hold, over the larger number of items."""
    want, got = (Counter(part.strip() for part in _COMMA.split(text)) for text in (reference, answer))
    return (want & got).total() / max(want.total(), got.total())


def characters(reference: str, answer: str) -> float:
    """One minus the edit distance over the reference's length, at least 0."""
    before = list(range(len(answer) + 1))
    for i, a in enumerate(reference, 1):
        now = [i]
        for j, b in enumerate(answer, 1):
            now.append(min(before[j] + 1, now[-1] + 1, before[j - 1] + (a != b)))
        before = now
    return max(0.0, 1 - before[-1] / max(1, len(reference)))


def relaxed(reference: str, answer: str) -> float:
    """Equal, or a number within 5 %."""
    try:
        return float(abs(float(answer) - float(reference)) <= 0.05 * abs(float(reference)))
    except ValueError:
        return float(reference == answer)


def pairs(reference: str, answer: str) -> float:
    """Labels whose value is right within 5 %, over the larger number of items."""
    want, got = ([part.rsplit(" ", 1) for part in _COMMA.split(text.strip())] for text in (reference, answer))
    right = sum(any(len(g) == 2 and g[0] == w[0] and relaxed(w[1], g[1]) for g in got) for w in want)
    return right / max(len(want), len(got))


def score(task: str, reference: str, answer: str) -> float:
    """Of one answer, from 0 to 1."""
    if task == "caption":
        return shares(reference, answer)
    if task in ("text", "digit", "receipt"):
        return characters(reference, answer)
    if task == "table":
        return pairs(reference, answer)
    return relaxed(reference, answer) if task == "chart" else float(reference == answer)


def main() -> None:
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    answers = [json.loads(line) for line in Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()]
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row, given in zip(rows, answers, strict=True):
        asked, reference = row["messages"][0]["content"], row["messages"][-1]["content"]
        said = given["answers"][0]["content"].strip() if given.get("answers") else ""
        for language in ("all", "zh" if _CJK.search(asked) else "en"):
            found[row["task"], language].append(score(row["task"], reference, said))
    print(f"{'skill':<10} {'rows':>5} {'all':>6} {'en':>6} {'zh':>6}")
    for task in dict.fromkeys(row["task"] for row in rows):
        means = [sum(v) / len(v) if (v := found[task, language]) else float("nan") for language in ("all", "en", "zh")]
        print(f"{task:<10} {len(found[task, 'all']):>5} " + " ".join(f"{100 * mean:>5.1f}%" for mean in means))


if __name__ == "__main__":
    main()

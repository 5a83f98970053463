"""What run folders tell while they grow: curves of one or several runs, answers before and after,
sampled answers with their rewards, the end of the story.

Reads only; a line that is being written is left for the next look. Refuses to know: pages,
processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ernie_tune.report.log import LOG_FILE, read_log
from ernie_tune.report.plot import curves_svg, short_names

_NOTHING: list[dict[str, Any]] = []
_ROLLOUT_TAIL_BYTES = 1 << 20


class BeforeAfter(NamedTuple):
    """A held-out question with what was expected and what the model said before and after."""

    question: str
    reference: str
    before: str
    after: str


def history(folder: Path) -> list[dict[str, Any]]:
    """The records that a run has logged so far; none for a folder without a log."""
    file = folder / LOG_FILE
    return read_log(file)[0] if file.is_file() else list(_NOTHING)


def curves(folders: Sequence[Path]) -> str:
    """The curves of these runs on one chart, as SVG; "" where nothing was logged yet."""
    names = short_names([str(f) for f in folders])
    logged = {names[str(f)]: history(f) for f in folders}
    logged = {name: records for name, records in logged.items() if any("loss" in r or len(r) > 3 for r in records)}
    return curves_svg(logged) if logged else ""


def last_numbers(folder: Path) -> dict[str, float]:
    """The newest value of every number in the log."""
    found: dict[str, float] = {}
    for record in history(folder):
        found.update({k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)})
    return found


def samples(folder: Path) -> list[BeforeAfter]:
    """Answers to held-out rows: those before training, and those of the newest evaluation that
    wrote them down.
    """
    before = _object(folder / "before.json")
    answers, references = before.get("answers") or [], before.get("references") or []
    later = list(_lines(folder / "eval_answers.jsonl"))
    out = []
    for i in range(max(len(answers), len(later))):
        after = later[i] if i < len(later) else {}
        reference = references[i] if i < len(references) else after.get("reference", "")
        said = answers[i] if i < len(answers) else ""
        out.append(BeforeAfter(str(after.get("row", i + 1)), str(reference), str(said), str(after.get("answer", ""))))
    return out


def rollouts(folder: Path, most: int = 50) -> list[dict[str, Any]]:
    """The newest sampled answers with their rewards, the newest first."""
    file = folder / "rollouts.jsonl"
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        stream.seek(0, 2)
        start = max(0, stream.tell() - _ROLLOUT_TAIL_BYTES)
        stream.seek(start)
        raw = stream.read().split(b"\n")
    whole = raw[1 if start else 0 : -1]  # the last one is being written, or empty
    return list(_parsed(whole[-most:]))[::-1]


def _object(file: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError:  # being replaced, or damaged; the run says so itself
        return {}
    return found if isinstance(found, dict) else {}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    if file.is_file():
        yield from _parsed(file.read_bytes().split(b"\n"))


def _parsed(lines: Sequence[bytes]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            yield found

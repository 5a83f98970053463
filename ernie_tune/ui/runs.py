"""What run folders tell while they grow: curves of one or several runs, answers to held-out rows as
they change, sampled answers with their rewards.

Reads only; a line that is being written is left for the next look. Refuses to know: pages,
processes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ernie_tune.report.log import LOG_FILE, read_log
from ernie_tune.report.plot import COLOURS, curves_svg, short_names

_NOTHING: list[dict[str, Any]] = []
_ROLLOUT_TAIL_BYTES = 1 << 20


@dataclass
class SampledRow:
    """A held-out question with its pictures' files, what was expected, and what the model said at
    which step.
    """

    row: str
    question: str
    images: tuple[str, ...]
    reference: str
    answers: dict[int, str]


def history(folder: Path) -> list[dict[str, Any]]:
    """The records that a run has logged so far; none for a folder without a log."""
    file = folder / LOG_FILE
    if not file.is_file():
        return list(_NOTHING)
    known = file.stat()
    return _read(file, known.st_size, known.st_mtime_ns)


@lru_cache(maxsize=32)
def _read(file: Path, size_bytes: int, changed_ns: int) -> list[dict[str, Any]]:
    """Once for each state of a file: it is looked at every other second."""
    return read_log(file)[0]


def curves(folders: Sequence[Path]) -> str:
    """The curves of these runs on one chart, as SVG; "" where nothing was logged yet."""
    names = short_names([str(f) for f in folders])
    logged = {names[str(f)]: history(f) for f in _drawn(folders)}
    return curves_svg(logged) if logged else ""


def colours(folders: Sequence[Path]) -> dict[Path, str]:
    """The colour of each run whose curves are drawn; of one run alone the curves have others."""
    drawn = _drawn(folders)
    return {f: COLOURS[i % len(COLOURS)] for i, f in enumerate(drawn)} if len(drawn) > 1 else {}


def _drawn(folders: Sequence[Path]) -> list[Path]:
    return [f for f in dict.fromkeys(folders) if any("loss" in r or len(r) > 3 for r in history(f))]


def last_numbers(folder: Path) -> dict[str, float]:
    """The newest value of every number in the log."""
    found: dict[str, float] = {}
    for record in history(folder):
        found.update({k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)})
    return found


def samples(folder: Path) -> list[SampledRow]:
    """Answers to held-out rows as they have changed so far. What a resumed run says again counts as
    it was said last.
    """
    found: dict[str, SampledRow] = {}
    for line in _lines(folder / "samples.jsonl"):
        step, row = line.get("step"), str(line.get("row", ""))
        if not isinstance(step, int):
            continue
        images = tuple(i for i in line.get("images") or () if isinstance(i, str))
        about = SampledRow(row, str(line.get("question", "")), images, str(line.get("reference", "")), {})
        found.setdefault(row, about).answers[step] = str(line.get("answer", ""))
    return list(found.values())


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

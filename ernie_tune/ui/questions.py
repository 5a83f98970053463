"""Rows -> questions to ask or to judge, with the pictures that may be shown: those of the
workspace.

Reads what training reads, and what `ernie-tune predict` has written, whose answers are then judged
as they are. Refuses to know: pages, models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.data.records import IMAGE_TAG, VIDEO_TAG, Record, count_tags
from ernie_tune.data.sources import load_dataset
from ernie_tune.ui.judgements import AskedRow
from ernie_tune.ui.workspace import Workspace


@dataclass(frozen=True)
class ToJudge:
    """A row to judge: what is asked, the answers that the row brings along, its reference.
    `number`: which row of the file it is, from 0; None for what `predict` wrote.
    """

    asked: AskedRow
    answers: tuple[str, ...] = ()
    reference: str = ""
    number: int | None = None


def questions(file: Path, workspace: Workspace, most: int = 100_000) -> tuple[dict[str, ToJudge], list[ValueError]]:
    """(questions by id, what is wrong with each row that cannot be used). Raises ValueError for a
    file that cannot be read at all.
    """
    predicted = _predictions(file)
    if predicted is not None:
        found = [_of_prediction(line, file, workspace) for line in predicted[:most]]
        return {q.asked.id: q for q in found if q}, []
    rows = load_dataset(str(file))
    out: dict[str, ToJudge] = {}
    told = []
    for i in range(min(len(rows), most)):
        try:
            record: Record = rows[i]
            out_of = _of_record(record, i, file, workspace)
        except ValueError as error:
            told.append(error)
            continue
        out[out_of.asked.id] = out_of
    return out, told


def _of_record(record: Record, i: int, file: Path, workspace: Workspace) -> ToJudge:
    prompt = record.prompt
    text = "".join(m["content"] for m in prompt)
    images = _allowed(record.images[: count_tags(text, IMAGE_TAG)], file, workspace)
    videos = record.videos[: count_tags(text, VIDEO_TAG)]
    own = record.messages[len(prompt) :]
    said = tuple(str(c.messages[-1]["content"]) for c in record.candidates if c.messages)
    line = f"{file}:{record.meta.line or i + 1}"  # the name that rows without one have
    own_id = record.id if record.id and record.id != line else ""
    name = own_id or f"{workspace.name(file)}:{record.meta.line or i + 1}"
    reference = str(own[-1]["content"]) if own else ""
    return ToJudge(
        AskedRow(name, tuple(dict(m) for m in prompt), images, videos), said if len(said) > 1 else (), reference, i
    )


def _predictions(file: Path) -> list[dict[str, Any]] | None:
    """The lines of a file that `predict` wrote; None for another one."""
    if file.suffix != ".jsonl":
        return None
    with file.open("rb") as stream:
        first = stream.readline(1 << 22)
    try:
        known = json.loads(first)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(known, dict) and "row" in known and ("answers" in known or "error" in known)):
        return None
    out = []
    for number, raw in enumerate(file.read_bytes().splitlines(), 1):
        try:
            out.append(json.loads(raw))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                say(
                    f"{file}:{number} must be one JSON object ({error})",
                    f"{file}:{number} 须为一个 JSON 对象（{error}）",
                )
            ) from error
    return out


def _of_prediction(line: Mapping[str, Any], file: Path, workspace: Workspace) -> ToJudge | None:
    if "answers" not in line:
        return None
    images = [str(file.parent / one) for one in line.get("images") or () if isinstance(one, str)]
    name = str(line.get("id") or f"{workspace.name(file)}:{line['row']}")
    said = tuple(str(answer["content"]) for answer in line["answers"])
    asked = AskedRow(name, tuple(line["messages"]), _allowed(images, file, workspace), tuple(line.get("videos") or ()))
    return ToJudge(asked, said, str(line.get("reference") or ""))


def _allowed(images: Any, file: Path, workspace: Workspace) -> tuple[str, ...]:
    """Raises ValueError for a picture that this studio must not show."""
    out = []
    for image in images:
        if not isinstance(image, str) or image.startswith(("http://", "https://")):
            raise ValueError(
                say(f"{file}: pictures must be files to be judged here", f"{file}：此处评判的图片须为文件")
            )
        if image.startswith("data:"):
            out.append(image)
            continue
        path = Path(image).resolve()
        if not workspace.holds(path):
            raise ValueError(
                say(
                    f"{file}: picture {image} must lie in the workspace ({workspace.root})",
                    f"{file}：图片 {image} 须在工作区（{workspace.root}）内",
                )
            )
        out.append(str(path))
    return tuple(out)

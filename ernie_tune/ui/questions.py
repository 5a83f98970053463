"""Rows -> questions to ask or to judge, with the pictures that may be shown: those of the
workspace, and those that rows of the command line name.

Reads what training reads, and what `ernie-tune predict` has written, whose answers are then judged
as they are. Refuses to know: pages, models.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ernie_tune.config.language import Text, say
from ernie_tune.data.records import IMAGE_TAG, VIDEO_TAG, Record, count_tags
from ernie_tune.data.sources import load_dataset
from ernie_tune.ui.asking import data_url
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
    out: dict[str, ToJudge] = {}
    told = []
    for line, one in _predictions(file, workspace, most) or _records(file, workspace, most):
        if isinstance(one, ValueError):
            told.append(one)
            continue
        name = one.asked.id
        if name in out:  # two rows of one name are two questions
            name = f"{name}#{line}"
            one = dataclasses.replace(one, asked=dataclasses.replace(one.asked, id=name))
        out[name] = one
    return out, told


def _records(file: Path, workspace: Workspace, most: int) -> Iterator[tuple[int, ToJudge | ValueError]]:
    rows = load_dataset(workspace.here(file))
    for i in range(min(len(rows), most)):
        try:
            record: Record = rows[i]
            yield record.meta.line or i + 1, _of_record(record, i, file, workspace)
        except ValueError as error:
            yield i + 1, error


def _of_record(record: Record, i: int, file: Path, workspace: Workspace) -> ToJudge:
    prompt = record.prompt
    text = "".join(m["content"] for m in prompt)
    line = f"{workspace.here(file)}:{record.meta.line or i + 1}"  # the name that rows without one have
    images = _allowed(record.images[: count_tags(text, IMAGE_TAG)], file, line, workspace)
    videos = record.videos[: count_tags(text, VIDEO_TAG)]
    own = record.messages[len(prompt) :]
    said = tuple(str(c.messages[-1]["content"]) for c in record.candidates if c.messages)
    own_id = record.id if record.id and record.id != line else ""
    name = own_id or f"{workspace.name(file)}:{record.meta.line or i + 1}"
    reference = str(own[-1]["content"]) if own else ""
    return ToJudge(
        AskedRow(name, tuple(dict(m) for m in prompt), images, videos), said if len(said) > 1 else (), reference, i
    )


def _predictions(file: Path, workspace: Workspace, most: int) -> Iterator[tuple[int, ToJudge | ValueError]] | None:
    """The lines of a file that `predict` wrote, each with its number; None for another file."""
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
    return _predicted(file, workspace, most)


def _predicted(file: Path, workspace: Workspace, most: int) -> Iterator[tuple[int, ToJudge | ValueError]]:
    with file.open("rb") as stream:
        for number, raw in enumerate(stream, 1):
            if number > most:
                return
            if not raw.strip():
                continue
            where = f"{workspace.here(file)}:{number}"
            try:
                yield number, _of_prediction(json.loads(raw), number, file, where, workspace)
            except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
                yield (
                    number,
                    ValueError(
                        say(
                            f"{where} must be a line as predict writes it (row, messages, answers); repair or remove it",
                            f"{where} 须为 predict 写入的一行（row、messages、answers）；请修复或删去",
                        )
                    ),
                )
            except ValueError as error:
                yield number, error


def _of_prediction(line: Mapping[str, Any], number: int, file: Path, where: str, workspace: Workspace) -> ToJudge:
    if "answers" not in line:
        raise ValueError(
            say(
                f"{where} has no answers to judge: {line['error']}",
                f"{where} 没有可评判的回答：{line['error']}",
            )
        )
    images = [_beside(one, file, where) for one in line.get("images") or ()]
    name = str(line.get("id") or f"{workspace.name(file)}:{line['row']}")
    said = tuple(_text(answer["content"]) for answer in line["answers"])
    messages = tuple({**message, "role": str(message["role"])} for message in line["messages"])
    allowed = _allowed(images, file, where, workspace)
    asked = AskedRow(name, messages, allowed, tuple(line.get("videos") or ()))
    return ToJudge(asked, said, str(line.get("reference") or ""))


def _text(value: Any) -> str:
    """Raises TypeError for what is no text."""
    if not isinstance(value, str):
        raise TypeError(type(value).__name__)
    return value


def _beside(image: Any, file: Path, where: str) -> str:
    """A picture of a line, as it is from here. Raises ValueError for one that had no name."""
    if not isinstance(image, str):
        raise ValueError(
            say(
                f"{where}: a picture of this row had no name to be found by; judge the rows themselves, with a model",
                f"{where}：该行的图片没有文件名，无法找到；请用模型直接评判原数据",
            )
        )
    return image if image.startswith(("data:", "http://", "https://")) else str(file.parent / image)


def _as_url(image: Any) -> Any:
    """A picture that has no file, as of a cell of Parquet, as a data: URL, which rows may hold."""
    if isinstance(image, Image.Image):
        held = io.BytesIO()
        image.save(held, "PNG")
        image = held.getvalue()
    return data_url(image) if isinstance(image, bytes) else image


def _allowed(images: Any, file: Path, where: str, workspace: Workspace) -> tuple[str, ...]:
    """Raises ValueError for a picture that this studio must not show, and for one that is not
    there.
    """
    out = []
    for image in map(_as_url, images):
        if not isinstance(image, str) or image.startswith(("http://", "https://")):
            raise ValueError(
                say(f"{where}: pictures must be files to be judged here", f"{where}：此处评判的图片须为文件")
            )
        if image.startswith("data:"):
            out.append(image)
            continue
        path = Path(os.path.realpath(image)) if "\0" not in image else None
        if path is not None and path.is_file() and file in workspace.also:
            workspace.let_in(path)
        if path is None or not workspace.may_show(str(path)):
            raise ValueError(
                say(
                    "{where}: picture {image} must lie in the workspace ({root}); {how}",
                    "{where}：图片 {image} 须在工作区（{root}）内；{how}",
                    where=where,
                    image=image,
                    root=workspace.root.name,
                    how=_HOW,
                )
            )
        out.append(str(path))
    return tuple(out)


_HOW: Text = say(
    "move it there, or start the studio with ernie-tune judge and this file",
    "请移入，或用 ernie-tune judge 加此文件启动",
)

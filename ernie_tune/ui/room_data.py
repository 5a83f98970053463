"""The room Data: what the doctor finds in rows, the rows with their pictures and as the model sees
them, a repaired copy.

Refuses to know: how rows are checked, read or mended (data/).
"""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from ernie_tune.config.language import Text, counted, say, shown, spoken
from ernie_tune.data.doctor.fix import fix_file, fixed_path
from ernie_tune.data.doctor.scan import Scan
from ernie_tune.data.doctor.show import show_record
from ernie_tune.data.processor import Processor
from ernie_tune.data.sources import INFO_FILE, DatasetEntry, load_dataset
from ernie_tune.report import html
from ernie_tune.report.check_page import check_body
from ernie_tune.ui import studio as kit
from ernie_tune.ui.questions import ToJudge, questions
from ernie_tune.ui.studio import Offers, Studio

_SHOWN_ROWS, _FINDINGS = 8, 20
_SENT = (".jsonl", ".json", ".csv")


def room(studio: Studio) -> Offers:
    """Build it."""
    with gr.Row():
        file = gr.Dropdown(
            studio.workspace.rows(),
            label=studio("rows", "数据文件"),
            elem_id="data-file",
            value=None,
            allow_custom_value=True,
            scale=3,
        )
        sent = gr.UploadButton(studio("send a file", "上传文件"), file_types=list(_SENT), scale=1)
    with gr.Row():
        check = gr.Button(studio("check", "检查"), variant="primary", elem_id="data-check")
        show = gr.Button(studio("show rows", "查看数据"), elem_id="data-show")
        mend = gr.Button(studio("write a repaired copy", "写出修复副本"))
    found = gr.HTML(elem_id="data-found")
    rows = gr.HTML(elem_id="data-rows")
    sent.upload(lambda path: _keep(studio, path), sent, [file, found])
    check.click(lambda name: _checked(studio, name), file, found)
    show.click(lambda name: _rows(studio, name), file, rows)
    mend.click(lambda name: _mended(studio, name), file, [found, file])
    return [(file, studio.workspace.rows)]


def _keep(studio: Studio, path: str) -> tuple[Any, str]:
    """What a browser sent, in the workspace's uploads, never over another file. Only rows are kept:
    nothing that a run would execute, or that tells where other rows lie.
    """
    try:
        source = studio.workspace.received(path)
        if source.suffix.lower() not in _SENT or source.name == INFO_FILE:
            raise ValueError(
                say(
                    f"file ({source.name[:80]}) must be rows ({', '.join(_SENT)}); send another",
                    f"文件（{source.name[:80]}）须为数据行（{'、'.join(_SENT)}）；请另选",
                )
            )
        uploads = studio.workspace.uploads
        uploads.mkdir(exist_ok=True)
        stem = re.sub(r"[^\w.-]+", "_", source.stem)[:60].strip("._") or "rows"
        numbered = (uploads / f"{stem}{f'-{n}' if n else ''}{source.suffix.lower()}" for n in range(10_000))
        target = next(file for file in numbered if not file.exists())
        shutil.copyfile(source, target)
    except (ValueError, OSError) as error:
        return gr.update(), kit.line(error, "bad")
    name = studio.workspace.name(target)
    choices = [*studio.workspace.rows(), name]
    return gr.update(choices=choices, value=name), kit.line(say(f"kept as {name}", f"已保存为 {name}"), "good")


def _checked(studio: Studio, name: str | None) -> str:
    try:
        path = studio.workspace.inside(name or "")
        if path in studio.workspace.also:
            questions(path, studio.workspace)  # whose pictures may be shown
        report = Scan(_processor(), limit=_FINDINGS).run([DatasetEntry(studio.workspace.here(path))], [])
        return kit.page(check_body(report, studio.workspace.may_show))
    except (ValueError, OSError) as error:
        return kit.line(error, "bad")


def _rows(studio: Studio, name: str | None) -> str:
    """The first rows as people see them, and each as the model does."""
    try:
        path = studio.workspace.inside(name or "")
        found, told = questions(path, studio.workspace, _SHOWN_ROWS)
        return kit.few(told) + "<hr>".join(_card(studio, path, q) for q in found.values())
    except (ValueError, OSError) as error:
        return kit.line(error, "bad")


def _card(studio: Studio, path: Path, row: ToJudge) -> str:
    said = [text for text in (row.reference, *row.answers) if text]
    turns = "".join(f'<div class="turn assistant">{kit.text(text)}</div>' for text in said)
    title = html.both(say("as the model sees it", "模型看到的样子"))
    seen = _as_the_model_sees_it(studio.workspace.here(path), row)
    below = f"<details><summary>{title}</summary>{kit.log(seen)}</details>" if seen else ""
    return kit.dialogue(row.asked.messages, row.asked.images) + turns + below


def _as_the_model_sees_it(path: str, row: ToJudge) -> list[Text]:
    """By the tokenizer that comes along; nothing for what `predict` wrote, which is no row."""
    number = row.number
    if number is None:
        return []
    try:
        record = load_dataset(path)[number]
        return spoken(lambda: list(show_record(record, _processor())))
    except (ValueError, OSError) as error:
        why = error
    return spoken(lambda: [shown(why)])


@cache
def _processor() -> Processor:
    return Processor.bundled("small")


def _mended(studio: Studio, name: str | None) -> tuple[str, Any]:
    try:
        path = studio.workspace.here(studio.workspace.inside(name or ""))
        target = studio.workspace.name(studio.workspace.inside(fixed_path(path)))
        changes = list(fix_file(DatasetEntry(path)))
        told = kit.line(
            say(
                f"wrote {target}: {counted(len(changes), 'change')}",
                f"已写入 {target}：{len(changes)} 处修改",
            ),
            "good",
        )
        lines = spoken(lambda: [f"{change.line}: {change}" for change in changes[:200]])
        return told + kit.log(lines), gr.update(choices=studio.workspace.rows(), value=target)
    except (ValueError, OSError) as error:
        return kit.line(error, "bad"), gr.update()

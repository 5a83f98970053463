"""The room Data: what the doctor finds in rows, the rows with their pictures and as the model sees
them, a repaired copy.

Refuses to know: how rows are checked, read or mended (data/).
"""

from __future__ import annotations

import shutil
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ernie_tune.config.language import say
from ernie_tune.data.doctor.fix import fix_file, fixed_path
from ernie_tune.data.doctor.scan import Scan
from ernie_tune.data.doctor.show import show_record
from ernie_tune.data.processor import Processor
from ernie_tune.data.sources import DatasetEntry, load_dataset
from ernie_tune.report.check_page import check_body
from ernie_tune.ui import studio as kit
from ernie_tune.ui.questions import questions
from ernie_tune.ui.studio import Offers, Studio

_SHOWN_ROWS, _FINDINGS = 8, 20


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
        sent = gr.UploadButton(studio("send a file", "上传文件"), file_types=[".jsonl", ".json", ".csv"], scale=1)
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
    """What a browser sent, in the workspace's uploads, never over another file."""
    try:
        source = studio.workspace.received(path)
    except ValueError as error:
        return gr.update(), kit.line(error, "bad")
    studio.workspace.uploads.mkdir(exist_ok=True)
    stem, suffix = Path(path).stem[:60], Path(path).suffix
    names = (f"{stem}{f'-{n}' if n else ''}{suffix}" for n in range(10_000))
    target = next(studio.workspace.uploads / name for name in names if not (studio.workspace.uploads / name).exists())
    shutil.copyfile(source, target)
    name = studio.workspace.name(target)
    choices = [*studio.workspace.rows(), name]
    return gr.update(choices=choices, value=name), kit.line(say(f"kept as {name}", f"已保存为 {name}"), "good")


def _checked(studio: Studio, name: str | None) -> str:
    try:
        path = str(studio.workspace.inside(name or ""))
        report = Scan(Processor.bundled("small"), limit=_FINDINGS).run([DatasetEntry(path)], [])
        return kit.page(check_body(report, studio.workspace.may_show))
    except (ValueError, OSError) as error:
        return kit.line(error, "bad")


def _rows(studio: Studio, name: str | None) -> str:
    """The first rows as people see them, then as the model does."""
    try:
        path = studio.workspace.inside(name or "")
        found, told = questions(path, studio.workspace, _SHOWN_ROWS)
        cards = [
            kit.dialogue(q.asked.messages, q.asked.images)
            + "".join(
                f'<div class="turn assistant">{kit.text(said)}</div>' for said in (q.reference, *q.answers) if said
            )
            for q in found.values()
        ]
        seen = f'<pre class="log">{escape(_as_the_model_sees_it(path))}</pre>' if found else ""
        return kit.lines(told, "bad") + "<hr>".join(cards) + seen
    except (ValueError, OSError) as error:
        return kit.line(error, "bad")


def _as_the_model_sees_it(path: Path) -> str:
    try:
        record = load_dataset(str(path))[0]
        return "\n".join(show_record(record, Processor.bundled("small")))
    except (ValueError, OSError) as error:
        return str(error)


def _mended(studio: Studio, name: str | None) -> tuple[str, Any]:
    try:
        path = str(studio.workspace.inside(name or ""))
        changes = [f"{change.line}: {change}" for change in fix_file(DatasetEntry(path))]
        target = studio.workspace.name(Path(fixed_path(path)))
        told = kit.line(
            say(f"wrote {target}: {len(changes)} changes", f"已写入 {target}：{len(changes)} 处修改"), "good"
        )
        shown = told + f'<pre class="log">{escape(chr(10).join(changes[:200]))}</pre>'
        return shown, gr.update(choices=studio.workspace.rows(), value=target)
    except (ValueError, OSError) as error:
        return kit.line(error, "bad"), gr.update()

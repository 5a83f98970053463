"""The room Train: settings as a form and as YAML, each made from the other; what a run needs; start
and stop; what it prints. Runs are child processes: the page may be closed.

Refuses to know: what settings mean (config/), how a run goes (its own process).
"""

from __future__ import annotations

import shutil
import time
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.language import VARIABLE, Text, say
from ernie_tune.config.section_titles import SECTIONS
from ernie_tune.report import html
from ernie_tune.ui import forms
from ernie_tune.ui import studio as kit
from ernie_tune.ui.jobs import RUNNING
from ernie_tune.ui.studio import Offers, Studio

KIND = "train"
_LOOK_SECONDS = 2.0


def room(studio: Studio) -> Offers:
    """Build it."""
    with gr.Row():
        file = gr.Dropdown(
            studio.workspace.settings(),
            label=studio("settings", "设置文件"),
            value=None,
            allow_custom_value=True,
            elem_id="train-file",
            scale=3,
        )
        name = gr.Textbox("run.yaml", label=studio("save as", "另存为"), elem_id="train-name", scale=2)
    with gr.Row():
        with gr.Column(scale=1, elem_id="train-form"):
            parts = _form(studio)
        with gr.Column(scale=1):
            yaml = gr.Textbox(forms.START, label="YAML", lines=22, max_lines=40, elem_id="train-yaml", interactive=True)
            with gr.Row():
                check = gr.Button(studio("check settings", "检查设置"), elem_id="train-check")
                estimate = gr.Button(studio("estimate", "估算"), elem_id="train-estimate")
            with gr.Row():
                start = gr.Button(studio("start", "开始训练"), variant="primary", elem_id="train-start")
                stop = gr.Button(studio("stop", "停止"), variant="stop", elem_id="train-stop")
                resume = gr.Button(studio("resume", "继续训练"), elem_id="train-resume")
            told = gr.HTML(elem_id="train-told")
            job = gr.Dropdown(
                _jobs(studio), label=studio("jobs", "任务"), value=None, allow_custom_value=True, elem_id="train-job"
            )
            output = gr.HTML(elem_id="train-output")
    opened = file.input(lambda chosen: _opened(studio, chosen), file, [yaml, name, told])
    # What the form shows, so that only what differs is sent to it: an answer that comes late must
    # not overwrite what somebody has written meanwhile.
    known = gr.State({field.name: field.value for field in forms.fields(forms.written(forms.START))})
    for setting, part in parts.items():
        # gradio's `input` misses the first change after an update; these two do not
        for event in (part.blur, part.submit) if isinstance(part, gr.Textbox) else (part.change,):
            event(partial(_set, setting), [yaml, part, known], [yaml, known], show_progress="hidden")

    def filled(event: Any) -> None:
        """Have the form follow the YAML after an event: not as it changes, the form writes too."""
        event(partial(_filled, list(parts)), [yaml, known], [known, *parts.values()], show_progress="hidden")

    for event in (opened.then, yaml.blur):
        filled(event)
    studio.parts.update(yaml=yaml, filled=filled)
    check.click(lambda text: _judged(studio, text), yaml, told)
    estimate.click(lambda text: _estimated(studio, text), yaml, told)
    start.click(partial(_start, studio), [yaml, name, name], [told, job], js=kit.IN_TONGUE)
    stop.click(lambda chosen: _stop(studio, chosen), job, told)
    resume.click(partial(_resume, studio), [job, name], [told, job], js=kit.IN_TONGUE)
    timer = gr.Timer(_LOOK_SECONDS)
    timer.tick(lambda chosen: _look(studio, chosen), job, [job, output], show_progress="hidden")
    return [(file, studio.workspace.settings)]


def _form(studio: Studio) -> dict[str, Any]:
    """The first settings in sight, the others in folds, one a section; name -> component."""
    every = {field.name: field for field in forms.fields(forms.written(forms.START))}
    parts = {name: _part(studio, every[name]) for name in forms.FIRST if name in every}
    rest = [field for field in every.values() if field.name not in parts]
    for section, some in groupby(rest, key=lambda field: field.section):
        title = SECTIONS[section]
        with gr.Accordion(studio(f"{section}: {title.english}", f"{section}：{title.chinese}"), open=False):
            parts.update({field.name: _part(studio, field) for field in some})
    return parts


def _part(studio: Studio, field: forms.FormField) -> Any:
    label, about = field.name, studio(field.label.english, field.label.chinese)
    if field.kind == "switch":
        return gr.Checkbox(bool(_value(field)), label=label, info=about)
    if field.kind == "choice":
        return gr.Dropdown(list(field.choices), value=field.value, label=label, info=about, allow_custom_value=True)
    return gr.Textbox(field.value, label=label, info=about, lines=1, elem_id=f"set-{field.name}")


def _set(setting: str, text: str, value: Any, known: dict[str, str]) -> tuple[Any, Any]:
    """The YAML with a field's value, and what the form shows now; nothing where the field only says
    what it was told.
    """
    shown = str(value).lower() if isinstance(value, bool) else str("" if value is None else value)
    if known.get(setting) == shown:
        return gr.skip(), gr.skip()
    return forms.with_value(text, setting, value), {**known, setting: shown}


def _filled(names: list[str], text: str, known: dict[str, str]) -> list[Any]:
    """What the form shows of a YAML, as far as it shows something else; nothing where the YAML
    cannot be read.
    """
    given = forms.written(text)
    if not given and text.strip():
        return [gr.skip()] * (1 + len(names))
    stage, method = given.get("stage", "SFT"), given.get("fine_tuning", "LoRA")
    fields = {field.name: field for field in forms.fields(given, stage, method)}
    now = {name: field.value for name, field in fields.items()}
    return [now, *(gr.skip() if known.get(name) == now[name] else _value(fields[name]) for name in names)]


def _value(field: forms.FormField) -> Any:
    return field.value == "true" if field.kind == "switch" else field.value


def _opened(studio: Studio, chosen: str | None) -> tuple[Any, Any, str]:
    try:
        path = studio.workspace.inside(chosen or "")
        return path.read_text(encoding="utf-8"), studio.workspace.name(path), ""
    except (ValueError, OSError) as error:
        return gr.skip(), gr.skip(), kit.line(error, "bad")


def _loaded(studio: Studio, text: str) -> tuple[Any, list[Text]]:
    """As `forms.read`, for settings that stay in the workspace."""
    loaded, told = forms.read(text)
    if loaded is not None:
        studio.workspace.check_settings(loaded.config)
    return loaded, told


def _judged(studio: Studio, text: str) -> str:
    try:
        loaded, told = _loaded(studio, text)
    except ValueError as error:
        return kit.line(error, "bad")
    if loaded is None:
        return kit.lines(told, "bad")
    lacks = forms.lacking(text)
    if lacks:
        end = say(
            "these settings fit together, but the run cannot start before the above is there",
            "设置相互匹配，但须先备齐以上各项才能开始训练",
        )
        return _notes(told, lacks) + kit.lines(lacks, "bad") + kit.line(end)
    return kit.lines(told) + kit.line(say("these settings are valid", "设置有效"), "good")


def _notes(told: list[Text], lacks: list[Text]) -> str:
    """What there is to say beside what is not there."""
    known = {str(one.english) for one in lacks}
    return kit.lines([one for one in told if one.english not in known])


def _estimated(studio: Studio, text: str) -> str:
    try:
        _loaded(studio, text)
    except ValueError as error:
        return kit.line(error, "bad")
    return kit.log([forms.estimated(text)])


def _start(studio: Studio, text: str, name: str, tongue: str) -> tuple[str, Any]:
    """Save the YAML and train as it says, speaking as the page does. An output_dir in which a run
    goes on is refused by the run itself.
    """
    try:
        loaded, told = _loaded(studio, text)
        lacks = told if loaded is None else forms.lacking(text)
        if loaded is None or lacks:
            return kit.lines(lacks, "bad"), gr.skip()
        path = studio.workspace.inside(name)
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(
                say(f"name ({name}) must end in .yaml; correct it", f"文件名（{name}）须以 .yaml 结尾；请改正")
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _kept(studio, path, text)
        write_atomically(path, text)
        title = f"{loaded.config.model.stage} {studio.workspace.name(Path(loaded.config.save.output_dir))}"
        spoken = {VARIABLE: kit.tongue(tongue)}
        words = ["train", f"./{studio.workspace.name(path)}"]  # as people know it, in what it says
        job = studio.jobs.start(KIND, title, words, studio.workspace.root, spoken)
    except (ValueError, OSError) as error:
        return kit.line(error, "bad"), gr.skip()
    return kit.lines([*told, *kept]) + kit.line(say(f"started {job.id}", f"已启动 {job.id}"), "good"), gr.update(
        choices=_jobs(studio), value=job.id
    )


def _kept(studio: Studio, path: Path, text: str) -> list[Text]:
    """Put what a file says aside before other settings take its name; where it is then."""
    if not path.is_file() or path.read_bytes() == text.encode():
        return []
    aside = studio.workspace.own / "replaced" / f"{time.strftime('%Y%m%d-%H%M%S')}-{path.name}"
    aside.parent.mkdir(exist_ok=True)
    shutil.copyfile(path, aside)
    name, where = studio.workspace.name(path), studio.workspace.name(aside)
    return [say(f"what {name} said before is in {where}", f"{name} 原有的内容已存为 {where}")]


def _stop(studio: Studio, chosen: str | None) -> str:
    try:
        job = studio.jobs.get(chosen or "")
        state = studio.jobs.state(job)
        if state != RUNNING:
            raise ValueError(
                say(
                    "job ({title}) must be running to be stopped, but is: {state}",
                    "任务（{title}）须在运行中才能停止，现为：{state}",
                    title=job.title,
                    state=kit.STATES[state],
                )
            )
        studio.jobs.stop(job)
    except ValueError as error:
        return kit.line(error, "bad")
    return kit.line(
        say(
            "asked to stop: it finishes its step and saves; resume goes on from there",
            "已请求停止：完成当前步并保存；“继续训练”从该处继续",
        )
    )


def _resume(studio: Studio, chosen: str | None, tongue: str) -> tuple[str, Any]:
    """The chosen job once more: training goes on from its newest checkpoint."""
    try:
        old = studio.jobs.get(chosen or "")
        if old.kind != KIND or studio.jobs.state(old) == RUNNING:
            raise ValueError(
                say(
                    f"job ({old.title}) must be training that has ended; choose one",
                    f"任务（{old.title}）须为已结束的训练；请选择",
                )
            )
        job = studio.jobs.start(KIND, old.title, old.argv, studio.workspace.root, {VARIABLE: kit.tongue(tongue)})
    except (ValueError, OSError) as error:
        return kit.line(error, "bad"), gr.skip()
    told = kit.line(say(f"started {job.id}, from the newest checkpoint", f"已启动 {job.id}，从最新检查点继续"), "good")
    return told, gr.update(choices=_jobs(studio), value=job.id)


def _jobs(studio: Studio) -> list[tuple[str, str]]:
    marks = {RUNNING: "▶", "done": "✓", "failed": "✗", "stopped": "■"}
    jobs = [job for job in studio.jobs.all() if job.kind in (KIND, "export", "serve")]
    when = "%m-%d %H:%M:%S"
    return [
        (f"{marks[studio.jobs.state(job)]} {job.title} · {time.strftime(when, time.localtime(job.started))}", job.id)
        for job in jobs
    ]


def _look(studio: Studio, chosen: str | None) -> tuple[Any, Any]:
    try:
        job = studio.jobs.get(chosen or "")
    except ValueError:
        newest = next((job for job in studio.jobs.all() if job.kind == KIND), None)
        return (gr.update(choices=_jobs(studio), value=newest.id), "") if newest else (gr.skip(), gr.skip())
    state = studio.jobs.state(job)
    word = html.both(kit.STATES[state])
    shown = f'<p class="state" data-state="{state}">{escape(job.title)} · {word}</p><pre class="log">{escape(kit.from_here(_end(studio.jobs.output(job))))}</pre>'
    return gr.update(choices=_jobs(studio)), shown


def _end(output: str) -> str:
    return "\n".join(output.splitlines()[-40:])

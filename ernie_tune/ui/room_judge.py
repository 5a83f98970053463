"""The room Judge: answers to one question after the other, judged by keys; what was written; how
two judges agree.

Refuses to know: what keys do (`desk`), what is written (`judgements`), how models answer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gradio as gr

from ernie_tune.config.language import say
from ernie_tune.ui import desk, judging
from ernie_tune.ui import studio as kit
from ernie_tune.ui.judgements import Judgements
from ernie_tune.ui.studio import Offers, Studio

FOLDER = "judgements"
_SEEN = 9  # parts of the page that a key may change


def room(studio: Studio, rows: str | None = None, model: str | None = None, folder: str = FOLDER) -> Offers:
    """Build it; `rows` and `model`: chosen already."""
    with gr.Row():
        file = gr.Dropdown(
            studio.workspace.rows(),
            label=studio("questions", "题目"),
            value=rows,
            allow_custom_value=True,
            elem_id="judge-rows",
        )
        asked = gr.Dropdown(
            ["", *studio.workspace.models()],
            label=studio("answers of", "由谁回答"),
            value=model or "",
            allow_custom_value=True,
            elem_id="judge-model",
        )
        into = gr.Textbox(folder, label=studio("written to", "写入文件夹"), elem_id="judge-folder")
    with gr.Row():
        judge = gr.Textbox("", label=studio("your name", "你的姓名"), elem_id="judge-name")
        mode = gr.Dropdown(
            [(_mode(m), m) for m in desk.MODES], value=desk.PICK, label=studio("how", "方式"), elem_id="judge-mode"
        )
        count = gr.Slider(1, 8, 2, step=1, label=studio("answers to each", "每题回答数"), elem_id="judge-n")
        temperature = gr.Slider(0.0, 2.0, 1.0, step=0.1, label=studio("temperature ", "温度 "))
        begin = gr.Button(studio("begin", "开始评判"), variant="primary", elem_id="judge-begin")
    seen, key, buttons = _desk(studio)
    session, reason, corrected = seen[0], seen[5], seen[6]
    begin.click(partial(_start, studio), [file, asked, into, judge, mode, count, temperature], seen)
    key.input(_press, [session, key, reason, corrected], seen, show_progress="hidden", concurrency_limit=1)
    for button, pressed in buttons:
        button.click(partial(_pressed, pressed), [session, reason, corrected], seen, show_progress="hidden")
    _two_judges(studio, into, seen[7:])
    return [(file, studio.workspace.rows), (asked, lambda: ["", *studio.workspace.models()])]


def _desk(studio: Studio) -> tuple[list[Any], Any, list[tuple[Any, str]]]:
    """(all that a key may change, the field that keys go to, buttons for who has no keys)."""
    session, told = gr.State(None), gr.HTML(elem_id="judge-told")
    with gr.Column(elem_id="judge-desk"):
        progress, question, answers = (gr.HTML(elem_id=f"judge-{name}") for name in ("progress", "question", "answers"))
        key = gr.Textbox(label=studio("key", "按键"), elem_id="judge-key", elem_classes="offscreen", container=False)
        with gr.Row(elem_classes="keys"):
            said = [(str(n), str(n)) for n in range(1, 6)]
            said += [(studio("all alike", "都一样"), "0"), (studio("good", "好"), "g"), (studio("bad", "不好"), "b")]
            buttons = [(gr.Button(label, size="sm", min_width=40), pressed) for label, pressed in said]
        with gr.Row():
            reason = gr.Textbox(label=studio("reason of bad ones", "不好的原因"), elem_id="judge-reason")
            corrected = gr.Textbox(
                label=studio("what the marked one should say", "所标回答应改为"), lines=2, elem_id="judge-corrected"
            )
        with gr.Row():
            for label, pressed in (
                (studio("write and on", "写入并继续"), "Enter"),
                (studio("skip", "跳过"), "s"),
                (studio("back", "返回"), "u"),
            ):
                buttons.append((gr.Button(label, elem_id=f"judge-press-{pressed}"), pressed))
    first = gr.Dropdown([], label=studio("first judge", "第一位"), allow_custom_value=True, render=False)
    second = gr.Dropdown([], label=studio("second judge", "第二位"), allow_custom_value=True, render=False)
    return [session, told, progress, question, answers, reason, corrected, first, second], key, buttons


def _two_judges(studio: Studio, into: Any, judges: list[Any]) -> None:
    with gr.Accordion(studio("two judges", "两位评判者"), open=False), gr.Row():
        for judge in judges:
            judge.render()
        compare = gr.Button(studio("compare judges", "比较"))
    agreed = gr.HTML(elem_id="judge-agreement")
    compare.click(partial(_agreement, studio), [into, *judges], agreed)


def _start(studio: Studio, *chosen: Any) -> list[Any]:
    rows, model, folder, judge, mode, n, temperature = chosen
    try:
        place, servers = studio.workspace, studio.servers
        made = judging.begin(place, servers, rows or "", model or "", folder, judge, mode, n, temperature)
        return _seen(made, kit.lines(made.told[:10], "bad"))
    except (ValueError, OSError) as error:
        return _refused(error)


def _press(now: judging.Session | None, pressed: str, why: str, better: str) -> list[Any]:
    if now is None or not pressed:
        return [gr.skip()] * _SEEN
    try:
        at = now.desk.at
        wrote = now.press(pressed.split(" ")[0], why, better)
        stays = now.desk.at == at and not wrote
        return _seen(now, "", (why, better) if stays else None)
    except (ValueError, OSError) as error:
        return _refused(error)


def _pressed(pressed: str, now: judging.Session | None, why: str, better: str) -> list[Any]:
    return _press(now, pressed, why, better)


def _refused(error: Exception) -> list[Any]:
    return [gr.skip(), kit.line(error, "bad"), *[gr.skip()] * (_SEEN - 2)]


def _mode(mode: str) -> str:
    names = {desk.PICK: "pick 选", desk.RANK: "rank 排", desk.RATE: "rate 1–5 评", desk.LABEL: "good, bad 好坏"}
    return names[mode]


def _seen(now: judging.Session, told: str, kept: tuple[str, str] | None = None) -> list[Any]:
    """All that the desk shows; `kept`: what stands in the two fields, where it is to stay."""
    try:
        now.lay()
    except (ValueError, OSError) as error:
        told += kit.line(error, "bad")
    judges = judging.judges(now.store)
    return [
        now,
        told,
        now.progress_html(),
        now.question_html(),
        now.answers_html(),
        kept[0] if kept else "",
        kept[1] if kept else "",
        gr.update(choices=judges),
        gr.update(choices=judges),
    ]


def _agreement(studio: Studio, folder: str, first: str | None, second: str | None) -> str:
    try:
        store = Judgements(studio.workspace.inside(folder))
        if not first or not second or first == second:
            return kit.line(say("choose two judges", "请选择两位评判者"), "bad")
        return judging.agreement_html(store, first, second)
    except (ValueError, OSError) as error:
        return kit.line(error, "bad")

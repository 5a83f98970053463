"""The room Judge: answers to one question after the other, judged by keys; what was written; how
two judges agree.

Refuses to know: what keys do (`desk`), what is written (`judgements`), how models answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import gradio as gr

from ernie_tune.config.language import say
from ernie_tune.ui import desk, judging
from ernie_tune.ui import studio as kit
from ernie_tune.ui.judgements import Judgements
from ernie_tune.ui.studio import Offers, Studio
from ernie_tune.ui.style import DESK_SCRIPT

FOLDER = "judgements"
_MOST_KEYS = 64  # of one event
_MODES = {
    desk.PICK: say("pick the best", "选出最好的"),
    desk.RANK: say("rank, with ties", "排名，可并列"),
    desk.RATE: say("rate 1 to 5", "评 1 至 5 星"),
    desk.LABEL: say("good or bad, with a reason", "好或不好，附原因"),
}


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
            label=studio("answers of (empty: those in the file)", "由谁回答（空：文件中已有的）"),
            value=model or "",
            allow_custom_value=True,
            elem_id="judge-model",
        )
        into = gr.Textbox(folder, label=studio("written to", "写入文件夹"), elem_id="judge-folder")
    with gr.Row():
        judge = gr.Textbox("", label=studio("your name", "你的姓名"), elem_id="judge-name")
        mode = gr.Dropdown(
            [(studio(t.english, t.chinese), m) for m, t in _MODES.items()],
            value=desk.PICK,
            label=studio("how", "方式"),
            elem_id="judge-mode",
        )
        count = gr.Slider(1, 8, 2, step=1, label=studio("answers to each", "每题回答数"), elem_id="judge-n")
        temperature = gr.Slider(0.0, 2.0, 1.0, step=0.1, label=studio("temperature ", "温度 "))
    begin = gr.Button(studio("begin", "开始评判"), variant="primary", elem_id="judge-begin")
    session, told = gr.State(None), gr.HTML(elem_id="judge-told")
    with gr.Column(elem_id="judge-desk"):
        progress, question = gr.HTML(elem_id="judge-progress"), gr.HTML(elem_id="judge-question")
        answers = gr.HTML(elem_id="judge-answers", js_on_load=DESK_SCRIPT)
        with gr.Row(elem_id="judge-fields"):
            reason = gr.Textbox(
                label=studio("reason of bad ones (r)", "不好的原因（r）"), elem_id="judge-reason", lines=2
            )
            corrected = gr.Textbox(
                label=studio("what the marked one should say (e)", "所标回答应改为（e）"),
                lines=2,
                elem_id="judge-corrected",
            )
    seen = [told, progress, question, answers, reason, corrected]
    begin.click(
        partial(_start, studio), [file, asked, into, judge, mode, count, temperature], [session, *seen],
        show_progress="hidden",
    )  # fmt: skip
    answers.select(_keys, [session, reason, corrected], seen, show_progress="hidden", trigger_mode="multiple")
    learn = gr.Button(studio("train on these judgements", "用这些评判训练"), elem_id="judge-learn")
    learnt = learn.click(partial(_learn, studio), [into, asked], [told, studio.parts["yaml"], studio.parts["tabs"]])
    studio.parts["filled"](learnt.then)
    _two_judges(studio, into)
    return [(file, studio.workspace.rows), (asked, lambda: ["", *studio.workspace.models()])]


def _two_judges(studio: Studio, into: Any) -> None:
    with gr.Accordion(studio("two judges", "两位评判者"), open=False) as fold:
        with gr.Row():
            judges = [
                gr.Dropdown([], label=studio(english, chinese), allow_custom_value=True, elem_id=f"judge-{name}")
                for name, english, chinese in (
                    ("first", "first judge", "第一位"),
                    ("second", "second judge", "第二位"),
                )
            ]
            compare = gr.Button(studio("compare judges", "比较评判者"), elem_id="judge-compare")
        agreed = gr.HTML(elem_id="judge-agreement")
    fold.expand(lambda folder: _names(studio, folder), into, judges, show_progress="hidden")
    compare.click(partial(_agreement, studio), [into, *judges], agreed)


def _names(studio: Studio, folder: str) -> list[Any]:
    try:
        known = judging.judges(Judgements(studio.workspace.inside(folder)))
    except (ValueError, OSError):
        known = []
    return [gr.update(choices=known)] * 2


def _start(studio: Studio, *chosen: Any) -> Iterator[list[Any]]:
    rows, model, folder, judge, mode, n, temperature = chosen
    try:
        place, servers = studio.workspace, studio.servers
        made = judging.begin(place, servers, rows or "", model or "", folder, judge or "", mode, n, temperature)
    except (ValueError, OSError) as error:
        yield [gr.skip(), kit.line(error, "bad"), *[gr.skip()] * 5]
        return
    told = kit.few(made.told)
    if made.waits:
        yield [made, told + kit.line(say("the model is starting …", "模型正在启动……")), *[gr.skip()] * 5]
    yield [made, *_seen(made, told)]


def _keys(now: judging.Session | None, why: str, better: str, event: gr.EventData) -> Iterator[list[Any]]:
    """What the page's keys do, in their order, and what is to be seen then."""
    if now is None:
        yield [gr.skip()] * 6
        return
    before, told, wrote = now.desk.at, "", False
    fields: tuple[Any, Any] = (gr.skip(), gr.skip())  # what is being written there is left alone
    try:
        for key, at in _pressed(event):
            wrote = now.press(key, why, better, at) or wrote
            if key == "e" and at == now.desk.at and not better:
                fields = (gr.skip(), now.marked_text())
    except (ValueError, OSError) as error:
        told = kit.line(error, "bad")
    moved = now.desk.at != before
    if now.waits:
        yield [kit.line(say("the model is answering …", "模型正在回答……")), *[gr.skip()] * 5]
    yield _seen(now, told, ("", "") if moved or wrote else fields, moved)


def _pressed(event: gr.EventData) -> Iterator[tuple[str, int]]:
    """(key, place of the question that was seen) of what a browser sent; nothing of what has
    another form.
    """
    data = event._data
    sent = data.get("keys") if isinstance(data, dict) else None
    for one in sent[:_MOST_KEYS] if isinstance(sent, list) else ():
        if isinstance(one, list) and len(one) == 2 and isinstance(one[0], str) and type(one[1]) is int:
            yield one[0], one[1]


def _seen(now: judging.Session, told: str, fields: tuple[Any, Any] = ("", ""), question: bool = True) -> list[Any]:
    """All that the desk shows. `question`: whether it is another one than before."""
    try:
        now.lay()
    except (ValueError, OSError) as error:
        told += kit.line(error, "bad")
    shown = now.question_html() if question else gr.skip()
    return [told, now.progress_html(), shown, now.answers_html(), *fields]


def _learn(studio: Studio, folder: str, model: str | None) -> list[Any]:
    """Settings that learn from the judgements, in the room Train."""
    try:
        place = studio.workspace
        named = place.model(model) if model else ""
        text = judging.learn_from(Judgements(place.inside(folder)), place, named and (model or ""))
    except (ValueError, OSError) as error:
        return [kit.line(error, "bad"), gr.skip(), gr.skip()]
    return ["", text, gr.Tabs(selected="train")]


def _agreement(studio: Studio, folder: str, first: str | None, second: str | None) -> str:
    try:
        store = Judgements(studio.workspace.inside(folder))
        if not first or not second or first == second:
            return kit.line(say("choose two judges", "请选择两位评判者"), "bad")
        return judging.agreement_html(store, first, second)
    except (ValueError, OSError) as error:
        return kit.line(error, "bad")

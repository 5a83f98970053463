"""The room Compare: two models or adapters on the same question and picture, side by side, as they
answer.

Refuses to know: how models answer (`asking`).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from html import escape

import gradio as gr

from ernie_tune.config.language import say
from ernie_tune.data.records import IMAGE_TAG
from ernie_tune.ui import asking
from ernie_tune.ui import studio as kit
from ernie_tune.ui.studio import Offers, Studio

_MOST_TOKENS = 256
EMPTY = say("(empty)", "（空）")


def room(studio: Studio) -> Offers:
    """Build it."""
    models = studio.workspace.models()
    with gr.Row():
        left = gr.Dropdown(
            models, label=studio("one model", "模型一"), value=None, allow_custom_value=True, elem_id="compare-left"
        )
        right = gr.Dropdown(
            models, label=studio("another", "模型二"), value=None, allow_custom_value=True, elem_id="compare-right"
        )
    with gr.Row():
        picture = gr.Image(
            type="filepath",
            label=studio("picture", "图片"),
            sources=["upload", "clipboard"],
            elem_id="compare-picture",
            height=200,
        )
        with gr.Column():
            question = gr.Textbox(label=studio("question", "问题"), lines=3, elem_id="compare-question")
            temperature = gr.Slider(0.0, 2.0, 0.0, step=0.1, label=studio("temperature", "温度"))
            ask = gr.Button(studio("ask both", "同时提问"), variant="primary", elem_id="compare-ask")
    with gr.Row():
        said = [gr.HTML(elem_id="compare-said-left"), gr.HTML(elem_id="compare-said-right")]
    ask.click(
        lambda a, b, q, p, t: (yield from _both(studio, [a, b], q, p, t)),
        [left, right, question, picture, temperature],
        said,
    )
    return [(left, studio.workspace.models), (right, studio.workspace.models)]


def _both(
    studio: Studio, models: list[str | None], question: str, picture: str | None, temperature: float
) -> Iterator[tuple[str, str]]:
    """What both have said so far, again and again; a model that fails says why."""
    shown = ["", ""]
    titles = [f'<p class="who"><b>{escape(name or "")}</b></p>' for name in models]
    news: queue.Queue[tuple[int, str | None]] = queue.Queue()
    content = (IMAGE_TAG if picture else "") + question

    def ask(side: int, name: str) -> None:
        try:
            body = asking.asked_body(
                [{"role": "user", "content": content}],
                [str(studio.workspace.received(picture))] if picture else [],
                temperature=temperature,
                max_tokens=_MOST_TOKENS,
            )
            with studio.servers.asked(studio.workspace.model(name)) as server:
                text = ""
                for text in asking.stream(server, body):
                    news.put((side, kit.text(text)))
            if not text.strip():
                news.put((side, kit.line(EMPTY)))
        except (ValueError, OSError) as error:
            news.put((side, kit.line(error, "bad")))
        news.put((side, None))

    asked = [(side, name) for side, name in enumerate(models) if name]
    if not asked or not question.strip():
        hint = kit.line(say("choose a model and write a question", "请选择模型并填写问题"), "bad")
        yield hint, ""
        return
    for side, name in asked:
        shown[side] = titles[side] + kit.line(say("asking …", "正在提问……"))
        threading.Thread(target=ask, args=(side, name), daemon=True).start()
    yield shown[0], shown[1]
    left = len(asked)
    while left:
        side, said = news.get()
        if said is None:
            left -= 1
            continue
        shown[side] = titles[side] + said
        yield shown[0], shown[1]

"""The room Watch: curves of one or several runs on one chart while they grow, answers before and
after, sampled answers with their rewards.

Refuses to know: how run folders are read (`runs`), processes.
"""

from __future__ import annotations

import json
from html import escape

import gradio as gr

from ernie_tune.config.language import say
from ernie_tune.report import html
from ernie_tune.ui import runs
from ernie_tune.ui import studio as kit
from ernie_tune.ui.studio import Offers, Studio

_LOOK_SECONDS = 2.0
_SHOWN, _ROLLOUTS = 50, 30


def room(studio: Studio) -> Offers:
    """Build it."""
    with gr.Row():
        chosen = gr.Dropdown(
            studio.workspace.runs(),
            label=studio("runs", "运行"),
            multiselect=True,
            value=[],
            elem_id="watch-runs",
            scale=4,
        )
        again = gr.Button(studio("newest run", "最新运行"), scale=1, elem_id="watch-again")
    curves = gr.HTML(elem_id="watch-curves")
    samples = gr.HTML(elem_id="watch-samples")
    shown = gr.State("")
    again.click(lambda: gr.update(choices=studio.workspace.runs(), value=studio.workspace.runs()[:1]), outputs=chosen)
    look = gr.Timer(_LOOK_SECONDS)
    for event in (look.tick, chosen.change):
        event(
            lambda some, seen: _look(studio, some, seen),
            [chosen, shown],
            [curves, samples, shown],
            show_progress="hidden",
        )
    return [(chosen, studio.workspace.runs)]


def _look(studio: Studio, chosen: list[str], seen: str) -> tuple[object, object, object]:
    """What there is to see; nothing is sent where nothing has changed."""
    try:
        folders = [studio.workspace.inside(name) for name in chosen or ()]
        drawn = runs.curves(folders)
        below = "".join(_samples(runs.samples(f)) + _rollouts(runs.rollouts(f, _ROLLOUTS)) for f in folders)
    except (ValueError, OSError) as error:
        return kit.line(error, "bad"), gr.skip(), gr.skip()
    whole = json.dumps([drawn, below])
    if whole == seen:
        return gr.skip(), gr.skip(), gr.skip()
    empty = kit.line(say("nothing was logged yet", "尚无记录")) if chosen else ""
    return f'<div class="curves">{drawn}</div>' if drawn else empty, below, whole


def _samples(found: list[runs.BeforeAfter]) -> str:
    head = [
        html.both(t)
        for t in (say("row", "行"), say("expected", "参考"), say("before", "训练前"), say("after", "训练后"))
    ]
    return html.table(head, ([kit.text(value) for value in sample] for sample in found[:_SHOWN]))


def _rollouts(found: list[dict[str, object]]) -> str:
    if not found:
        return ""
    names = [str(name) for name in found[0]]
    return html.table(
        [escape(name) for name in names], ([kit.text(_short(row.get(n))) for n in names] for row in found)
    )


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else text[:400] + "…"

"""The room Watch: curves of one or several runs on one chart while they grow, answers to held-out
rows as they change, sampled answers with their rewards.

Refuses to know: how run folders are read (`runs`), processes.
"""

from __future__ import annotations

import hashlib
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import gradio as gr

from ernie_tune.config.language import say
from ernie_tune.report import html
from ernie_tune.report.rollout_page import group_html
from ernie_tune.ui import runs
from ernie_tune.ui import studio as kit
from ernie_tune.ui.studio import Offers, Studio
from ernie_tune.ui.workspace import Workspace

_LOOK_SECONDS = 2.0
_ROLLOUTS = 48
_NUMBERS = ("step", "loss", "reward", "learning_rate", "grad_norm", "eval_loss", "tokens_per_second")


def room(studio: Studio) -> Offers:
    """Build it."""
    chosen = gr.Dropdown(
        studio.workspace.runs(),
        label=studio("runs (none chosen: the newest)", "运行（未选择时为最新的）"),
        multiselect=True,
        value=[],
        elem_id="watch-runs",
    )
    numbers, curves = gr.HTML(elem_id="watch-numbers"), gr.HTML(elem_id="watch-curves")
    samples = gr.HTML(elem_id="watch-samples")
    shown = gr.State("")
    look = gr.Timer(_LOOK_SECONDS)
    for event in (look.tick, chosen.change):
        event(
            lambda some, seen: _look(studio, some, seen),
            [chosen, shown],
            [numbers, curves, samples, shown],
            show_progress="hidden",
        )
    return [(chosen, studio.workspace.runs)]


def _look(studio: Studio, chosen: list[str] | None, seen: str) -> tuple[Any, Any, Any, Any]:
    """What there is to see; nothing is sent where nothing has changed."""
    try:
        folders = [studio.workspace.inside(name) for name in chosen or studio.workspace.runs()[:1]]
        drawn = runs.curves(folders)
        colours = runs.colours(folders)
        facts = "".join(_numbers(studio.workspace.name(f), runs.last_numbers(f), colours.get(f, "")) for f in folders)
        below = "".join(_samples(f, studio.workspace) + _rollouts(f, studio.workspace) for f in folders)
    except (ValueError, OSError) as error:
        return kit.line(error, "bad"), gr.skip(), gr.skip(), ""
    mark = hashlib.sha256("\0".join([*map(str, folders), facts, drawn, below]).encode()).hexdigest()
    if mark == seen:
        return gr.skip(), gr.skip(), gr.skip(), gr.skip()
    empty = kit.line(say("nothing was logged yet", "尚无记录"))
    return facts, f'<div class="curves">{drawn}</div>' if drawn else empty, kit.page([below]), mark


def _numbers(name: str, known: dict[str, float], colour: str) -> str:
    """The newest numbers of a run, behind the colour of its curves."""
    cells = [f"<span><b>{escape(key)}</b> {known[key]:.4g}</span>" for key in _NUMBERS if key in known]
    mark = f'<i style="background: {colour}"></i>' if colour else ""
    return f'<p class="numbers"><span>{mark}<b>{escape(name)}</b></span>{"".join(cells)}</p>' if cells else ""


def _samples(folder: Path, workspace: Workspace) -> str:
    """A card for each held-out row: its picture and question, and what was said at which step."""
    cards = []
    for row in runs.samples(folder):
        pictures = html.media([i for i in row.images if workspace.may_show(i)], (), None, small=True)
        said = "".join(
            f'<tr class="{"ok" if row.reference and answer.strip() == row.reference.strip() else ""}">'
            f"<td>{step}</td><td>{kit.text(answer)}</td></tr>"
            for step, answer in sorted(row.answers.items())
        )
        head = f"<tr><th>{html.both(say('step', '步'))}</th><th>{html.both(say('answer', '回答'))}</th></tr>"
        asked = f'<p class="q">{escape(kit.without_tags(row.question))}</p>' if row.question else ""
        expected = f'<p class="src">{html.both(say("expected", "参考"))}: {escape(row.reference)}</p>'
        table = f'<div class="scroll"><table>{head}{said}</table></div>'
        cards.append(
            f'<article><div class="pics">{pictures}</div><div class="text">{asked}{expected}{table}</div></article>'
        )
    title = html.both(say("Answers as they change", "回答的变化"))
    return f"<h2>{title} · {escape(folder.name)}</h2>{''.join(cards)}" if cards else ""


def _rollouts(folder: Path, workspace: Workspace) -> str:
    """The newest groups of sampled answers, the best answer of each first."""
    found = runs.rollouts(folder, _ROLLOUTS)
    parts: list[str] = []
    last: object = None
    for (number, _), group in groupby(found, key=lambda row: (row.get("round"), row.get("prompt"))):
        rows = [
            {**row, "images": [i for i in row.get("images") or () if isinstance(i, str) and workspace.may_show(i)]}
            for row in group
        ]
        try:
            shown = group_html(rows, None)
        except (KeyError, TypeError, AttributeError, ValueError):  # written by something else
            continue
        head = f"<h3>{html.both(say('Round', '轮次'))} {escape(str(number))}</h3>" if number != last else ""
        parts.append(head + shown)
        last = number
    title = html.both(say("Sampled answers and their rewards", "采样的回答与奖励"))
    return f"<h2>{title} · {escape(folder.name)}</h2>{''.join(parts)}" if parts else ""

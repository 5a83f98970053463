"""What a run shows afterwards: a page of held-out rows before and after training, and the model
card.

The page is of `html.py`'s kit: small pictures are inside it, large ones are copied beside it.
Refuses to know: models, how answers were made or scored, paddle.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.writer import write_atomically
from ernie_tune.config.language import Text, say
from ernie_tune.report import html
from ernie_tune.report.direction import better, gain
from ernie_tune.rewards.scores import Confusion

_PACKAGES = ("ernie-tune", "paddlepaddle", "paddlepaddle-gpu", "numpy", "safetensors", "sentencepiece", "pillow")


@dataclass(frozen=True)
class ReportRow:
    """One held-out row. Scores are in [0, 1]: 1 right, 0 wrong, between: partly; None where nothing
    scored it.
    """

    question: str
    reference: str
    before: str
    after: str
    before_score: float | None = None
    after_score: float | None = None
    images: tuple[html.Picture, ...] = ()
    source: str = ""  # file:line
    videos: tuple[html.Clip, ...] = ()

    @property
    def change(self) -> str:
        """fixed, broken, right, wrong, or other where a score is missing or the answers are partly
        right alike.
        """
        if self.before_score is None or self.after_score is None:
            return "other"
        if self.before_score == self.after_score:
            return {1.0: "right", 0.0: "wrong"}.get(self.after_score, "other")
        return "fixed" if self.after_score > self.before_score else "broken"


_WORDS = {
    "title": say("Before and after training", "训练前后对比"),
    "reference": say("Reference", "参考答案"),
    "before": say("Before", "训练前"),
    "after": say("After", "训练后"),
    "metric": say("Metric", "指标"),
    "delta": say("Change", "变化"),
    "all": say("All", "全部"),
    "fixed": say("Better", "变好"),
    "broken": say("Worse", "变差"),
    "right": say("Right both times", "一直正确"),
    "wrong": say("Wrong both times", "一直错误"),
    "other": say("Unchanged", "无变化"),
    "confusion": say("Classes: what was answered for which", "分类：各类被答成了什么"),
    "gold": say("Reference ↓ / answer →", "参考 ↓ · 回答 →"),
    "none": say("no class", "未匹配"),
    "classes": say("Scores of each class", "各类得分"),
    "precision": say("Precision", "精确率"),
    "recall": say("Recall", "召回率"),
    "f1": say("F1", "F1 值"),
    "support": say("Rows", "行数"),
    "empty": say("(empty)", "（空）"),
}
# The scores that a headline may show, most telling first, as a person would call them.
_HEADLINES = {
    "exact_match": say("answered exactly", "完全答对"),
    "accuracy": say("answered right", "答对"),
    "iou": say("overlap of boxes", "框重合度"),
    "preference_accuracy": say("prefers the better answer", "偏好更优回答"),
    "token_acc": say("tokens right", "词元正确"),
}


def write_before_after(
    path: Path,
    rows: Sequence[ReportRow],
    before: Mapping[str, float],
    after: Mapping[str, float],
    *,
    confusions: Mapping[str, Confusion] | None = None,
    title: str = "",
    facts: Sequence[tuple[Text, str]] = (),
    links: Mapping[str, Text] | None = None,
) -> None:
    """Write the page to `path`, large pictures to `<stem>_files/` beside it. `confusions`: "before"
    and "after", where the rows have classes. `facts`: what the run was, in words; `links`: files
    beside the page that say more.
    """
    order = ("broken", "fixed", "wrong", "other", "right")
    counts = {change: sum(row.change == change for row in rows) for change in order}
    radio = '<label class="{0}"><input type="radio" name="f" value="{0}"{1}>{2} <b>{3}</b></label>'
    buttons = [radio.format("all", " checked", html.both(_WORDS["all"]), len(rows))]
    buttons += [radio.format(c, "", html.both(_WORDS[c]), counts[c]) for c in order if counts[c]]
    files = path.with_name(f"{path.stem}_files")
    cards = [_card(row, files) for row in sorted(rows, key=lambda row: order.index(row.change))]
    told = [(name, escape(value)) for name, value in facts]
    more = " · ".join(f'<a href="{escape(file)}">{html.both(name)}</a>' for file, name in (links or {}).items())
    body = [
        _hero(before, after),
        html.facts([*told, *([(say("More", "更多"), more)] if more else [])]),
        _metrics(before, after),
        *(_confusion(key, found) for key, found in (confusions or {}).items()),
        f"<nav>{''.join(buttons)}</nav>" if rows else "",
        f"<main>{''.join(cards)}</main>",
    ]
    write_atomically(path, html.page(_WORDS["title"], title, body, _SCRIPT if rows else ""))


def _card(row: ReportRow, files: Path) -> str:
    empty = _WORDS["empty"]
    return (
        f'<article class="{row.change}"><div class=pics>{html.media(row.images, row.videos, files)}</div><div class=text>'
        f"<p class=q>{html.lines(without_tags(row.question), empty)}</p><dl class=turns>"
        f"<dt>{html.both(_WORDS['reference'])}</dt><dd>{html.lines(row.reference, empty)}</dd>"
        f"<dt>{html.both(_WORDS['before'])} {_mark(row.before_score)}</dt><dd>{html.lines(row.before, empty)}</dd>"
        f"<dt>{html.both(_WORDS['after'])} {_mark(row.after_score)}</dt><dd>{html.lines(row.after, empty)}</dd></dl>"
        f"<p class=src>{escape(row.source)}</p></div></article>\n"
    )


def without_tags(text: str) -> str:
    """A question beside its pictures: tags at its start go, others become a small sign."""
    while (rest := text.lstrip()).startswith(("<image>", "<video>")):
        text = rest[len("<image>") :]
    return text.replace("<image>", "▣").replace("<video>", "▶").lstrip("\n")


def _mark(score: float | None) -> str:
    if score is None:
        return ""
    kind, sign = ("ok", "✓") if score == 1 else ("no", "✗") if score == 0 else ("part", f"{score:.2f}")
    return f'<span class="mark {kind}">{sign}</span>'


def _hero(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The first score of the headlines that was measured twice, and the loss, in large letters."""
    pairs = {name.removeprefix("eval_"): (before[name], after[name]) for name in after if name in before}
    shown = [(_HEADLINES[n], f"{pairs[n][0]:.1%}", f"{pairs[n][1]:.1%}") for n in _HEADLINES if n in pairs][:1]
    if "loss" in pairs:
        shown.append((say("loss", "损失"), f"{pairs['loss'][0]:.3f}", f"{pairs['loss'][1]:.3f}"))
    cells = "".join(f"<p><strong><s>{a} →</s> {b}</strong>{html.both(name)}</p>" for name, a, b in shown)
    return f"<div class=hero>{cells}</div>" if cells else ""


def _metrics(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """The table of all scores; what says the same as a line above it is left out. Colours tell good
    from bad news where that can be told.
    """
    lines: dict[Any, list[str]] = {}
    for name in dict.fromkeys([*before, *after]):
        a, b = before.get(name), after.get(name)
        delta = b - a if a is not None and b is not None else None
        kind = {1: "ok", -1: "no", 0: ""}[gain(name, a, b)]
        cells = [
            escape(name.removeprefix("eval_")),
            _number(a),
            _number(b),
            f"<b class='{kind}'>{_number(delta, '+')}</b>",
        ]
        lines.setdefault((a, b, better(name)) if delta is not None else name, cells)
    return html.table([html.both(_WORDS[key]) for key in ("metric", "before", "after", "delta")], lines.values())


def _number(value: float | None, sign: str = "") -> str:
    return "–" if value is None else format(round(value, 4) + 0.0, f"{sign if round(value, 4) else ''}.4f")


def _confusion(key: str, classes: Confusion) -> str:
    """Both tables of the classes, in the order a reader looks for them: numbers by size, words by
    the alphabet.
    """
    order = sorted(range(len(classes.labels)), key=lambda i: _natural(classes.labels[i]))
    top = max(max(row) for row in classes.counts) or 1
    head = [html.both(_WORDS["gold"]), *(escape(classes.labels[i]) for i in order), html.both(_WORDS["none"])]
    rows: list[list[str | html.Cell]] = [
        [escape(classes.labels[i]), *_shaded(classes.counts[i], i, [*order, len(order)], top)] for i in order
    ]
    each = classes.per_class()
    names = ("precision", "recall", "f1")
    scores = [
        [escape(label), *(f"{each[label][k]:.3f}" for k in names), f"{each[label]['support']:.0f}"]
        for label in (classes.labels[i] for i in order)
    ]
    heads = [html.both(_WORDS[name]) for name in ("classes", *names, "support")]
    return (
        f"<details{' open' if key == 'after' else ''}><summary>{html.both(_WORDS['confusion'])} · "
        f"{html.both(_WORDS[key])}: {classes.accuracy:.1%}</summary>"
        f"{html.table(head, rows, 'conf')}{html.table(heads, scores, 'conf')}</details>"
    )


def _shaded(counts: Sequence[int], own: int, order: Sequence[int], top: int) -> Iterator[html.Cell]:
    """Green on the diagonal, red off it, stronger where more rows are; zeros step back."""
    for j in order:
        n, (r, g, b) = counts[j], (22, 163, 74) if j == own else (220, 38, 38)
        style = f'style="background:rgba({r},{g},{b},{0.6 * n / top:.2f})"' if n else "class=zero"
        yield html.Cell(str(n), style)


def _natural(label: str) -> tuple[int, float, str]:
    try:
        return 0, float(label), label
    except ValueError:
        return 1, 0.0, label.casefold()


_SCRIPT = """
page.querySelector('nav').addEventListener('change',e=>page.querySelectorAll('article').forEach(a=>
 a.style.display=e.target.value==='all'||a.className===e.target.value?'':'none'));
"""


@dataclass(frozen=True)
class FileFacts:
    """One file of the run: where it was, what was in it, how many rows were used."""

    path: str
    sha256: str
    rows: int


def describe_file(path: Path, rows: int) -> FileFacts:
    """Hash a file in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for piece in iter(lambda: stream.read(1 << 20), b""):
            digest.update(piece)
    return FileFacts(str(path), digest.hexdigest(), rows)


def environment() -> dict[str, str]:
    """Versions that a run depends on: Python, system, packages. Packages that are not installed are
    left out; nothing is imported.
    """
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class ModelCard:
    """What README.md tells. `arguments` are those that were not left at their defaults; `commands`:
    purpose -> what to type, in the order of use.
    """

    name: str
    base_model: str
    method: str  # e.g. "SFT, LoRA rank 8"
    data: Sequence[FileFacts]
    arguments: Mapping[str, Any]
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    commands: Mapping[str, str] = field(default_factory=dict)
    # (after which step, what) of a run that went on under other settings
    changed: Sequence[tuple[int, str]] = ()
    environment: Mapping[str, str] = field(default_factory=environment)
    licence: str = "apache-2.0"


def usage(folder: str, adapter: bool) -> dict[str, str]:
    """Commands for a finished run in `folder`: talk to it, score it again, repeat the run.
    `adapter`: the folder holds an adapter, no whole model.
    """
    settings, again, folder = map(_word_of_shell, (f"{folder}/ernie_tune_args.yaml", f"{folder}-again", folder))
    result = "lora_path" if adapter else "model_name_or_path"
    return {
        "Talk to it": f"ernie-tune chat {folder}",
        "Score it again": f"ernie-tune eval {settings} --{result} {folder}",
        "Repeat the run": f"ernie-tune train {settings} --output_dir {again}",
    }


def model_card(card: ModelCard) -> str:
    """README.md with the metadata block that model hubs read. Values from data cannot break its
    tables.
    """
    front = {"base_model": card.base_model, "library_name": "ernie_tune", "license": card.licence}
    metrics = [
        (name, _number(card.before.get(name)), _number(card.after.get(name)))
        for name in dict.fromkeys([*card.before, *card.after])
    ]
    parts = [
        "---\n"
        + "".join(f"{key}: {_quoted(value)}\n" for key, value in front.items())
        + "pipeline_tag: image-text-to-text\n---",
        f"# {_heading(card.name)}\n\n{_inline(card.method)} of `{_inline(card.base_model)}` with ernie_tune.",
        _section("Results on held-out rows", ("metric", "before", "after"), metrics),
        _section("Data", ("file", "rows", "sha256"), [(f.path, str(f.rows), f.sha256) for f in card.data]),
        "\n\n".join(["## Use", *(f"{_inline(what)}:\n\n```bash\n{how}\n```" for what, how in card.commands.items())]),
        _section("Arguments", ("name", "value"), [(k, _shown(v)) for k, v in card.arguments.items()])
        + ("\n\nAll others have their defaults; `ernie_tune_args.yaml` holds every one." if card.arguments else ""),
        _section("Changed on the way", ("after step", "setting"), [(str(step), text) for step, text in card.changed]),
        _section("Environment", ("", "version"), list(card.environment.items())),
        "## Licence\n\n"
        f"These weights derive from `{_inline(card.base_model)}` and stay under its licence, here stated as "
        f"{_inline(card.licence)}; "
        "the licences of the data files above apply to what was learned from them.",
    ]
    return "\n\n".join(part for part in parts if part not in ("", "## Use")) + "\n"


def write_model_card(path: Path, card: ModelCard) -> None:
    """Write README.md."""
    write_atomically(path, model_card(card))


def _section(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(map(_inline, row))} |" for row in rows]
    return "\n".join([f"## {title}\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head), *lines]) if rows else ""


def _inline(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _heading(text: str) -> str:
    """A name as text, whatever is in it: no links, pictures or emphasis."""
    return re.sub(r"([\\\[\]*!#])", r"\\\1", _inline(text))


def _word_of_shell(text: str) -> str:
    """One word of a command line that stays one word, and on one line of a block."""
    if text.isprintable() and "`" not in text:
        return shlex.quote(text)
    plain = "".join(
        c
        if c.isprintable() and c not in "`'\\"
        else "".join(f"\\x{b:02x}" for b in c.encode("utf-8", "surrogateescape"))
        for c in text
    )
    return f"$'{plain}'"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _quoted(text: str) -> str:
    return '"' + " ".join(text.split()).replace("\\", "\\\\").replace('"', '\\"') + '"'

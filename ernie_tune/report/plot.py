"""Curves of runs: an SVG page of our own making, a picture through matplotlib where it is
installed, a plot in the terminal.

Input is `log_history` as `log.py` keeps it: records with `step` and numbers by name. Several runs
are drawn over each other.
Refuses to know: files of a run, what a metric means beyond its name, notebooks, paddle.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.writer import write_atomically
from ernie_tune.config.language import Text, say

Point = tuple[float, float]  # step, value
Box = tuple[float, float, float, float]  # left, top, width, height
History = Sequence[Mapping[str, Any]]
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#db2777", "#0891b2", "#ca8a04", "#475569")
_ANSI = (94, 93, 92, 95, 96, 91)  # bright colours of a terminal, a run each
_BLANK = "\u2800"
_HIDDEN = {"step", "epoch", "loss", "eval_loss", "total_flos"}
_HIDDEN_ENDS = (
    *("runtime", "seconds", "samples_per_second", "steps_per_second", "elapsed_time", "remaining_time"),
    *("memory_gib", "num_tokens", "rows"),
)
_FONT = (
    "system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans','Noto Sans SC','PingFang SC','Microsoft YaHei',sans-serif"
)
# pixels: page, between panels, first panel, the others
_WIDTH, _GAP, _TALL, _LOW = 960, 16, 380, 220
_MOST_POINTS, _FEW = 480, 24


@dataclass(frozen=True)
class Curve:
    """One line. `raw`: the unsmoothed points drawn faintly behind; `marks`: a dot at every
    point.
    """

    name: str
    points: Sequence[Point]
    colour: str
    raw: Sequence[Point] = ()
    marks: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    curves: list[Curve] = field(default_factory=list)


def points_of(history: History, name: str) -> list[Point]:
    """(step, value) of one metric where it is a finite number, in the order of the log."""
    pairs = ((record["step"], record.get(name)) for record in history)
    return [(float(s), float(v)) for s, v in pairs if isinstance(v, int | float) and math.isfinite(v)]


def smooth(points: Sequence[Point]) -> list[Point]:
    """Local straight lines through a twenty-fifth of the points to either side (triangular
    weights): no lag, none at the ends either. 24 points or fewer stay.
    """
    if len(points) <= _FEW:
        return list(points)
    half = len(points) // 25 + 2
    offset_K = np.arange(-half, half + 1.0)
    weight_K = 1 - np.abs(offset_K) / (half + 1)
    y_P, one_P = np.array([y for _, y in points]), np.ones(len(points))
    s0, s1, s2 = (np.correlate(one_P, weight_K * offset_K**k, "same") for k in range(3))
    t0, t1 = (np.correlate(y_P, weight_K * offset_K**k, "same") for k in range(2))
    fit_P = (s2 * t0 - s1 * t1) / (s0 * s2 - s1 * s1)
    return [(x, float(y)) for (x, _), y in zip(points, fit_P, strict=True)]


def thin(points: Sequence[Point], most: int = _MOST_POINTS) -> list[Point]:
    """At most `most` points that look the same: the lowest and highest of each stretch, in order,
    and both ends.
    """
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / (most - 2))
    keep = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        keep |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(keep)]


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) inside [low, high], about `count` of
    them.
    """
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) + 0.0 for k in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_label(value: float) -> str:
    """A number for an axis: 0.25, 1.2k, 3e-05."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.6g}"


def panels(runs: Mapping[str, History]) -> list[Panel]:
    """The loss of all runs first; then, for one run, a panel a family of metrics (`eval_…`,
    `rewards/…`, or alone), for several, a panel a metric.

    One run: a colour a metric. Several: a colour a run, eval losses dashed.
    """
    loss, alone = Panel("loss"), len(runs) == 1
    families: dict[str, list[str]] = {}
    for colour, (run, history) in zip(_cycle(len(runs)), runs.items(), strict=True):
        train, held_out = points_of(history, "loss"), points_of(history, "eval_loss")
        if train:
            loss.curves.append(_smoothed("train" if alone else run, train, colour))
        if held_out:
            dots = COLOURS[1] if alone else colour
            loss.curves.append(Curve("eval" if alone else f"{run} eval", held_out, dots, marks=True, dashed=not alone))
        for name in dict.fromkeys(name for record in history for name in record):
            if _is_drawn(name) and len(points_of(history, name)) > (0 if name.startswith("eval_") else 1):
                names = families.setdefault(_family(name) if alone else name, [])
                names += [name] if name not in names else []
    rest = [Panel(family, _curves(runs, family, names)) for family, names in families.items()]
    return [panel for panel in (loss, *rest) if panel.curves]


def _curves(runs: Mapping[str, History], family: str, names: Sequence[str]) -> list[Curve]:
    wanted = [(run, name, points_of(runs[run], name)) for name in names for run in runs]
    out = []
    for colour, (run, name, points) in zip(_cycle(len(wanted)), wanted, strict=True):
        short = name.removeprefix("eval_").removeprefix(f"{family}/")
        label = run if len(runs) > 1 else short if len(names) > 1 else ""
        draw = _as_is if name == "learning_rate" else _smoothed
        out += [draw(label, points, colour)] if points else []
    return out


def _smoothed(name: str, points: Sequence[Point], colour: str) -> Curve:
    few = len(points) <= _FEW
    return Curve(name, smooth(points), colour, raw=() if few else points, marks=few)


def _as_is(name: str, points: Sequence[Point], colour: str) -> Curve:
    return Curve(name, points, colour, marks=len(points) == 1)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _is_drawn(name: str) -> bool:
    return name not in _HIDDEN and not name.endswith(_HIDDEN_ENDS)


def _family(name: str) -> str:
    if name.startswith("eval_"):
        return "eval"
    return name.rpartition("/")[0] or name


@dataclass(frozen=True)
class _Frame:
    """Where a panel's plotting area lies on the page, and the values at its edges."""

    left: float
    top: float
    width: float
    height: float
    x: Point
    y: Point

    def at(self, point: Point) -> Point:
        fx = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        fy = (point[1] - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + fx * self.width, self.top + (1 - fy) * self.height

    def path(self, points: Sequence[Point]) -> str:
        return "M" + " L".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, thin(points)))


def _frame(panel: Panel, box: Box, head: float = 46) -> _Frame:
    shown = [p for curve in panel.curves for p in (*curve.points, *curve.raw)]
    xs, ys = [x for x, _ in shown], [y for _, y in shown]
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    # An axis that nearly reaches zero starts there: the height of a loss then means something.
    bottom = 0.0 if 0 <= low <= 0.35 * high else low - pad
    left, top, width, height = box
    x = (min(xs), max(xs)) if max(xs) > min(xs) else (min(xs) - 1, max(xs) + 1)
    return _Frame(left + 60, top + head, width - 60 - 24, height - head - 34, x, (bottom, high + pad))


def _text(x: float, y: float, text: str, cls: str, anchor: str = "start", fill: str = "") -> str:
    colour = f' fill="{fill}"' if fill else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{cls}" text-anchor="{anchor}"{colour}>{escape(text)}</text>'


def _axes(frame: _Frame) -> list[str]:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    out = []
    for value in nice_ticks(*frame.y, 5 if frame.height > 200 else 4):
        y = frame.at((frame.x[0], value))[1]
        out.append(f'<line x1="{frame.left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        out.append(_text(frame.left - 9, y + 4, tick_label(value), "tick", "end"))
    for value in nice_ticks(*frame.x, max(3, int(frame.width / 80))):
        if value == int(value):  # steps are whole
            x = frame.at((value, frame.y[0]))[0]
            out.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{bottom:.1f}" y2="{bottom + 4:.1f}" class="axis"/>')
            out.append(_text(x, bottom + 18, tick_label(value), "tick", "middle"))
    out.append(f'<line x1="{frame.left:.1f}" x2="{right:.1f}" y1="{bottom:.1f}" y2="{bottom:.1f}" class="axis"/>')
    return [*out, _text(frame.left - 9, bottom + 18, "step", "unit", "end")]


def _drawn(curve: Curve, frame: _Frame) -> list[str]:
    out = []
    if curve.raw:
        out.append(f'<path d="{frame.path(curve.raw)}" class="raw" stroke="{curve.colour}"/>')
    dash = ' stroke-dasharray="6 4"' if curve.dashed else ""
    out.append(f'<path d="{frame.path(curve.points)}" class="line" stroke="{curve.colour}"{dash}/>')
    if curve.marks:
        dots = (frame.at(point) for point in thin(curve.points, 60))
        out += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" class="dot" stroke="{curve.colour}"/>' for x, y in dots]
    return out


def _labels(curves: Sequence[Curve], room: float) -> list[tuple[str, float]]:
    """(text, width) of the legend's entries: with the last values if they fit into `room`
    pixels.
    """
    last = [tick_label(float(f"{curve.points[-1][1]:.4g}")) for curve in curves]
    full = [f"{curve.name} {value}".strip() for curve, value in zip(curves, last, strict=True)]
    for texts in (full, [curve.name for curve in curves]):
        # No font is at hand to measure with: 6.6 pixels a letter, 13 a Chinese character.
        sized = [(text, sum(13 if ord(char) > 0x2E7F else 6.6 for char in text) + 36) for text in texts]
        if sum(width for _, width in sized) <= room:
            break
    return sized


def _legend(panel: Panel, box: Box) -> tuple[list[str], float]:
    """The legend beside the title, or under it in as many lines as it needs. Also the height of the
    head.
    """
    left, top, width, height = box
    beside = width - 50 - 8.6 * len(panel.title)
    entries = _labels(panel.curves, beside)
    below = sum(size for _, size in entries) > beside
    entries = _labels(panel.curves, width - 36) if below else entries
    room = width - 36
    x = left + 18 if below else left + width - 14 - sum(size for _, size in entries)
    y = top + 27 + 21 * below
    out: list[str] = []
    rows = 1
    for i, ((text, size), curve) in enumerate(zip(entries, panel.curves, strict=True)):
        if below and room < size and i:
            x, y, room, rows = left + 18, y + 18, width - 36, rows + 1
        if curve.name:
            out.append(f'<path d="M{x:.1f},{y - 4:.1f} h14" class="key" stroke="{curve.colour}"/>')
        out.append(_text(x + 20, y, text, "legend"))
        x, room = x + size, room - size
    # the curves keep their place
    return out, min(46 + (20 + 18 * (rows - 1)) * below, height * 0.62)


def _panel(panel: Panel, box: Box) -> str:
    left, top, width, height = box
    legend, head = _legend(panel, box)
    frame = _frame(panel, box, head)
    parts = [f'<rect x="{left}" y="{top}" width="{width:.1f}" height="{height}" rx="10" class="card"/>']
    parts += [_text(left + 18, top + 27, panel.title, "title"), *legend, *_axes(frame)]
    return "\n".join([*parts, *(mark for curve in panel.curves for mark in _drawn(curve, frame))])


_STYLE = f"""text{{font-family:{_FONT}}}
.page{{fill:#ffffff}}.card{{fill:#ffffff;stroke:#e2e8f0}}.grid{{stroke:#eef2f7}}.axis{{stroke:#94a3b8}}
.head{{font-size:18px;font-weight:600;fill:#0f172a}}.title{{font-size:14px;font-weight:600;fill:#0f172a}}
.tick{{font-size:11.5px;fill:#475569}}.unit{{font-size:11px;fill:#94a3b8}}.legend{{font-size:12.5px;fill:#334155}}
.line{{fill:none;stroke-width:2.2;stroke-linejoin:round;stroke-linecap:round}}
.raw{{fill:none;stroke-width:1.1;stroke-opacity:.28;stroke-linejoin:round}}
.dot{{fill:#ffffff;stroke-width:1.8}}.key{{stroke-width:3;stroke-linecap:round}}
@media(prefers-color-scheme:dark){{.page{{fill:#0b1220}}.card{{fill:#131c2e;stroke:#26334a}}.grid{{stroke:#1e293f}}.axis{{stroke:#64748b}}
.head,.title{{fill:#e2e8f0}}.tick{{fill:#a3b1c6}}.legend{{fill:#cbd5e1}}.dot{{fill:#131c2e}}}}"""


def curves_svg(runs: Mapping[str, History], title: str = "") -> str:
    """A page of panels: the first across the page, the others two or three beside each other.
    Without numbers: a page that says so.
    """
    shown = panels(runs)
    top = 44.0 if title else 12.0
    columns = 2 if len(shown) in (2, 3, 5) else 3
    width = (_WIDTH - 2 * 12 - (columns - 1) * _GAP) / columns
    parts = []
    for i, panel in enumerate(shown):
        row, column = divmod(i - 1, columns)
        y = top + _TALL + _GAP + row * (_LOW + _GAP)
        box = (12 + column * (width + _GAP), y, width, _LOW) if i else (12, top, _WIDTH - 24, _TALL)
        parts.append(_panel(panel, box))
    rows = math.ceil((len(shown) - 1) / columns) if shown else 0
    height = top + (_TALL if shown else 60) + rows * (_LOW + _GAP) + 12
    parts += (
        []
        if shown
        else [_text(_WIDTH / 2, top + 34, str(say("nothing was logged yet", "尚无记录")), "legend", "middle")]
    )
    head = [_text(20, 29, title, "head")] if title else []
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" height="{height:.0f}" role="img" aria-label="training curves">',
            f'<style>{_STYLE}</style>\n<rect width="100%" height="100%" class="page"/>',
            *head,
            *parts,
            "</svg>\n",
        ]
    )


def write_loss_svg(log_history: History, path: Path, title: str = "") -> None:
    """Draw one run to an SVG file."""
    write_atomically(path, curves_svg({"": log_history}, title))


def write_loss_png(log_history: History, path: Path) -> bool:
    """The first panel as a PNG through matplotlib; False, and no file, where that is not
    installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure  # without pyplot: seconds faster, and no global state

    figure = Figure(figsize=(9.6, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    for curve in (panels({"": log_history}) or [Panel("loss")])[0].curves:
        if curve.raw:
            axes.plot(*zip(*curve.raw, strict=True), color=curve.colour, alpha=0.28, linewidth=1)
        marker = "o" if curve.marks else ""
        axes.plot(*zip(*curve.points, strict=True), color=curve.colour, marker=marker, label=curve.name, linewidth=2)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.25)
    if axes.lines:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    staged = path.with_name(path.name + ".tmp")
    figure.savefig(staged, format="png")
    os.replace(staged, path)
    return True


def terminal_plot(
    runs: Mapping[str, History], name: str = "loss", width: int = 72, height: int = 14, colour: bool = False
) -> str:
    """One metric of all runs on one chart of text, two braille dots across and four down a
    character. Several runs have a colour each, or where the terminal has none, a letter each after
    the first.
    """
    curves = {run: smooth(points_of(history, name)) for run, history in runs.items()}
    drawn = [Curve(run, points, "") for run, points in curves.items() if points]
    if not drawn:
        return str(_not_logged(runs, name))
    frame = _frame(Panel(name, drawn), (0, 0, 0, 0))
    canvas = _Frame(0, 0, 2 * width - 1, 4 * height - 1, frame.x, frame.y)
    low, high = tick_label(frame.x[0]), tick_label(frame.x[1])
    rows = [[" "] * width for _ in range(height)]
    heads = []
    for k, curve in reversed(list(enumerate(drawn))):  # the first run lies on top
        for r, row in enumerate(_braille([canvas.at(p) for p in curve.points], width, height)):
            for c, sign in enumerate(row):
                if sign != _BLANK:
                    rows[r][c] = _marked(sign, k, colour)
        heads.append(f"{_marked('⠒⠒', k, colour)} {curve.name}" if len(drawn) > 1 else curve.name)
    lines = [f"{'':11}{name}  {'   '.join(reversed(heads))}".rstrip()]
    for r, row_signs in enumerate(rows):
        value = frame.y[1] - (frame.y[1] - frame.y[0]) * r / (height - 1)
        # what arithmetic leaves of nothing
        value = 0.0 if abs(value) < 1e-9 * (frame.y[1] - frame.y[0]) else value
        label = tick_label(float(f"{value:.3g}")) if r % 4 == 0 or r == height - 1 else ""
        lines.append(f"{label:>9} │{''.join(row_signs)}")
    lines += [" " * 10 + "└" + "─" * width, f"{'':11}{low}{'step':^{width - len(low) - len(high)}}{high}"]
    return "\n".join(lines)


def _marked(signs: str, k: int, colour: bool) -> str:
    """The signs of run number `k`: in its colour, or as its letter."""
    if colour:
        return f"\x1b[{_ANSI[k % len(_ANSI)]}m{signs}\x1b[0m"
    return signs if k == 0 else "abcdefghijklmnopqrstuvwxyz"[k % 26] * len(signs)


def _not_logged(runs: Mapping[str, History], name: str) -> Text:
    """That a metric is not there, and which are."""
    known = sorted({key for history in runs.values() for key in _numbers_of(history)} - {"step", "epoch"})
    return say(
        "no {name} was logged; there is {known}",
        "没有记录 {name}；已记录：{known}",
        name=name,
        known=", ".join(known) or say("nothing yet", "暂无"),
    )


def _numbers_of(history: History) -> set[str]:
    return {key for record in history for key, value in record.items() if isinstance(value, int | float)}


def short_names(folders: Sequence[str]) -> dict[str, str]:
    """folder -> the shortest end of its path by which it differs from the others."""
    parts = {folder: Path(os.path.normpath(folder)).parts for folder in folders}
    out = {}
    for folder, own in parts.items():
        others = [other for name, other in parts.items() if name != folder]
        count = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own))
        out[folder] = "/".join(own[-count:])
    return out


def _braille(points: Sequence[Point], width: int, height: int) -> list[str]:
    dots = [[0x2800] * width for _ in range(height)]
    for x, y in _pixels(points):
        dots[y // 4][x // 2] |= (0x01, 0x08, 0x02, 0x10, 0x04, 0x20, 0x40, 0x80)[2 * (y % 4) + x % 2]
    return ["".join(map(chr, row)) for row in dots]


def _pixels(points: Sequence[Point]) -> list[tuple[int, int]]:
    """The dots of a broken line, without holes."""
    out = [(round(x), round(y)) for x, y in points[:1]]
    for (x0, y0), (x1, y1) in pairwise(points):
        count = max(1, math.ceil(max(abs(x1 - x0), abs(y1 - y0))))
        out += [(round(x0 + (x1 - x0) * k / count), round(y0 + (y1 - y0) * k / count)) for k in range(1, count + 1)]
    return out


def mini_svg(points: Sequence[Point], width: int = 620, height: int = 90) -> str:
    """One smoothed curve over its raw points, without axes, for a notebook's bar; "" for fewer than
    two finite points.
    """
    finite = [p for p in points if math.isfinite(p[1])]
    if len(finite) < 2:
        return ""
    frame = _frame(Panel("", [Curve("", finite, COLOURS[0])]), (0, 0, 0, 0))
    frame = _Frame(2, 4, width - 4, height - 8, frame.x, frame.y)
    shared = f'fill="none" stroke="{COLOURS[0]}" stroke-linejoin="round"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="100%" role="img" aria-label="curve">'
        f'<path d="{frame.path(finite)}" {shared} stroke-opacity=".28"/>'
        f'<path d="{frame.path(smooth(finite))}" {shared} stroke-width="2"/></svg>'
    )

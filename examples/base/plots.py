"""Draws bar, line and pie charts with known values and asks about them. Knows pillow, fonts and
words.

`held_out` charts use fonts and sets of labels that no other chart has. Values are written beside
the marks in most charts and have to be
read off an axis in the others.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw
from printed import BITMAP, font, fonts
from words import COLORS, LABELS, TRENDS

Turn = tuple[str, str]
_PAINT = [c for c in COLORS if c not in ("black", "brown", "yellow")]
_HELD_OUT_LABELS = LABELS[-1]


@dataclass
class Chart:
    image: Image.Image
    kind: str
    labels: list[str]
    values: list[int]
    colors: list[str]


def chart(rng: random.Random, held_out: bool = False) -> Chart:
    """Three to five marks of different values in steps of five (or one); a pie's add up to 100."""
    kind = rng.choice(("bar", "bar", "line", "pie"))
    pool = rng.choice(LABELS[:-1]) if not held_out or rng.random() < 0.5 else _HELD_OUT_LABELS
    n = rng.randint(3, min(5, len(pool)))
    start = rng.randint(0, len(pool) - n)
    labels = list(pool[start : start + n]) if rng.random() < 0.8 else rng.sample(pool, n)
    step = 1 if rng.random() < 0.25 else 5
    values = rng.sample(range(10 if step == 5 else 5, 100, step), n)
    colors = rng.sample(_PAINT, n)
    if kind == "line" or (kind == "bar" and rng.random() < 0.2):
        colors = [colors[0]] * n
    if kind == "line" and rng.random() < 0.6:
        values.sort(reverse=rng.random() < 0.5)
    while kind == "pie" and (sum(values) != 100 or len(set(values)) < n):
        cuts = [0, *sorted(rng.sample(range(5, 100, 5), n - 1)), 100]
        values = [b - a for a, b in pairwise(cuts)]
    side = rng.choice((112, 140, 168, 168))
    image = Image.new("RGB", (side, side), (255, 255, 255) if rng.random() < 0.7 else (rng.randint(238, 255),) * 3)
    made, draw = Chart(image, kind, labels, values, colors), _pie if kind == "pie" else _axes
    if rng.random() < 0.4 and not held_out:  # small letters without a smooth edge, made larger with the picture
        small = Image.new("RGB", (112, 112), image.getpixel((0, 0)))
        draw(ImageDraw.Draw(small), made, rng, 112, BITMAP)
        made.image = small.resize((side, side), rng.choice((Image.Resampling.BICUBIC, Image.Resampling.NEAREST)))
    else:
        draw(ImageDraw.Draw(image), made, rng, side, rng.choice(fonts(False, held_out)))
    return made


def _paint(name: str, rng: random.Random) -> tuple[int, ...]:
    return tuple(max(0, min(255, c + rng.randint(-10, 10))) for c in COLORS[name][1])


def _axes(pen: ImageDraw.ImageDraw, c: Chart, rng: random.Random, side: int, path: str) -> None:
    k = side / 112
    face = font(path, round(rng.uniform(10, 12.4) * k))
    written = rng.random() < 0.85
    ground, roof, left = side - round(17 * k), round(14 * k), 4
    if not written:
        left = round(20 * k)
        for tick in (0, 50, 100):
            y = ground - tick / 100 * (ground - roof)
            pen.text((1, y - 6 * k), str(tick), font=font(path, round(9 * k)), fill=(60, 60, 60))
            pen.line([(left, y), (side - 3, y)], (205, 205, 205))
    slot = (side - left - 4) / len(c.labels)
    if path != BITMAP:
        while face.size > 8 and max(face.getlength(label) for label in c.labels) > slot:
            face = font(path, face.size - 1)
    xs = [round(left + slot * (i + 0.5)) for i in range(len(c.labels))]
    ys = [round(ground - v / 100 * (ground - roof)) for v in c.values]
    pen.line([(left - 1, ground), (side - 4, ground)], (0, 0, 0))
    paints = {name: _paint(name, rng) for name in c.colors}
    if c.kind == "line":
        pen.line(list(zip(xs, ys, strict=True)), paints[c.colors[0]], rng.choice((1, 2, 3)))
    thin = rng.uniform(0.2, 0.42)
    for x, y, value, label, color in zip(xs, ys, c.values, c.labels, c.colors, strict=True):
        if c.kind == "bar":
            pen.rectangle([x - slot * thin, y, x + slot * thin, ground], paints[color])
        else:
            pen.rectangle([x - 3, y - 3, x + 3, y + 3], paints[color])
        if written:
            _centred(pen, str(value), x, y - 8 * k, face)
        _centred(pen, label, x, ground + 8 * k, face)


def _centred(pen: ImageDraw.ImageDraw, words: str, x: float, y: float, face: object) -> None:
    a, b, c, d = face.getbbox(words)  # type: ignore[attr-defined]
    pen.text((round(x - (a + c) / 2), round(y - (b + d) / 2)), words, font=face, fill=(0, 0, 0))  # type: ignore[arg-type]


def _pie(pen: ImageDraw.ImageDraw, c: Chart, rng: random.Random, side: int, path: str) -> None:
    k = side / 112
    face = font(path, round(rng.uniform(10, 12.4) * k))
    r = rng.randint(side // 5, side // 4)
    x, y = r + rng.randint(2, 6), side // 2 + round(rng.uniform(-12, 12) * k)
    angle = rng.choice((-90, 0))
    for i, (label, value, color) in enumerate(zip(c.labels, c.values, c.colors, strict=True)):
        paint = _paint(color, rng)
        pen.pieslice([x - r, y - r, x + r, y + r], angle, angle + value * 3.6, fill=paint)
        angle += value * 3.6
        top = round(side / len(c.labels) * (i + 0.5) - 5 * k)
        right = 2 * r + 10
        pen.rectangle([right, top, right + 8 * k, top + 9 * k], paint)
        pen.text((right + 11 * k, top - k), f"{label} {value}", font=face, fill=(0, 0, 0))
    if not math.isclose(sum(c.values), 100):
        raise AssertionError("a pie's values add up to 100")


def trend(values: list[int]) -> str:
    if values == sorted(values):
        return "up"
    return "down" if values == sorted(values, reverse=True) else "mixed"


def table(c: Chart, zh: bool) -> str:
    """Every label with its value, as drawn from left to right or from top to bottom."""
    return ("，" if zh else ", ").join(f"{label} {value}" for label, value in zip(c.labels, c.values, strict=True))


def ask_table(c: Chart, rng: random.Random, zh: bool) -> Turn:
    return rng.choice(
        ("读出图表的数值。", "把图表写成表。")
        if zh
        else ("Read the values of the chart.", "Write the chart as a table.")
    ), table(c, zh)


def ask_short(c: Chart, rng: random.Random, zh: bool) -> Turn:
    """One value, the largest or smallest, a comparison, a colour, a trend, the kind of chart."""
    i, j = rng.sample(range(len(c.labels)), 2)
    a, b = c.labels[i], c.labels[j]
    kinds = ["value", "value", "max", "min", "compare", "labels", "kind"]
    kinds += ["trend", "trend", "line"] if c.kind == "line" else ["color", "colors"] if len(set(c.colors)) > 1 else []
    kind = rng.choice(kinds)
    if kind == "value":
        return rng.choice(
            (f"{a} 是多少？", f"{a} 的数值是多少？") if zh else (f"What is {a}?", f"What is the value of {a}?")
        ), str(c.values[i])
    if kind in ("max", "min"):
        best = c.labels[c.values.index((max if kind == "max" else min)(c.values))]
        word = ("最大" if kind == "max" else "最小") if zh else "largest" if kind == "max" else "smallest"
        return (f"哪一项{word}？" if zh else rng.choice((f"Which is the {word}?", f"Which item is {word}?"))), best
    if kind == "compare":
        return (f"{a} 和 {b} 哪个大？" if zh else f"Which is larger, {a} or {b}?"), a if c.values[i] > c.values[
            j
        ] else b
    if kind == "labels":
        return ("图中有哪些项？" if zh else "Which items are there?"), ("，" if zh else ", ").join(c.labels)
    if kind == "kind":
        return ("这是什么图？" if zh else "What kind of chart is it?"), {
            "bar": "柱状图",
            "line": "折线图",
            "pie": "饼图",
        }[c.kind] if zh else c.kind
    if kind == "trend":
        return ("趋势是上升、下降还是有升有降？" if zh else "Is the trend up, down or mixed?"), TRENDS[
            trend(c.values)
        ] if zh else trend(c.values)
    if kind == "colors":
        return ("说出每一项的颜色。" if zh else "Name the colour of each item."), ("，" if zh else ", ").join(
            f"{x} {COLORS[k][0] if zh else k}" for x, k in zip(c.labels, c.colors, strict=True)
        )
    q = (
        (f"{a} 是什么颜色？" if zh else f"What colour is {a}?")
        if kind == "color"
        else "折线是什么颜色？"
        if zh
        else "What colour is the line?"
    )
    return q, COLORS[c.colors[i]][0] if zh else c.colors[i]

"""Draws bar, line and pie charts with known values and asks about them. Knows pillow and
arithmetic, nothing of models or training.

Usage: python examples/charts/make_data.py --seed 0 --train 600 --eval 120 --size 112
Each row carries what is true of its picture: `scene` (marks with label, value, colour, pixel box)
and, as `evidence.required`, the one claim that proves the answer, so that a reward can check an
answer and its reasons without a judge.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# label, value, color, box: [left, top, right, bottom) in pixels, inside which all is `color`
Mark = dict[str, Any]

GLYPH = (6, 11)  # pixels of pillow's built-in bitmap font, the same on every machine
MIN_SIZE = 112  # below this the labels of five marks touch
COLORS = {
    "red": (214, 39, 40),
    "orange": (255, 152, 0),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "purple": (128, 50, 170),
    "gray": (127, 127, 127),
}
LABELS: tuple[tuple[str, ...], ...] = (
    ("Q1", "Q2", "Q3", "Q4"),
    ("Jan", "Feb", "Mar", "Apr", "May"),
    ("Mon", "Tue", "Wed", "Thu", "Fri"),
    ("A", "B", "C", "D", "E"),
    ("N", "E", "S", "W"),
)
CHINESE = {
    **{"red": "红色", "orange": "橙色", "green": "绿色", "blue": "蓝色", "purple": "紫色", "gray": "灰色"},
    **{"up": "上升", "down": "下降", "mixed": "有升有降"},
}
QUESTIONS = {
    "max": (
        ("哪一项的数值最大？", "数值最高的是哪一项？"),
        ("Which item has the largest value?", "Which one is the highest?"),
    ),
    "min": (
        ("哪一项的数值最小？", "数值最低的是哪一项？"),
        ("Which item has the smallest value?", "Which one is the lowest?"),
    ),
    "value": (
        ("{a} 的数值是多少？", "{a} 对应的数是几？"),
        ("What is the value of {a}?", "Which number belongs to {a}?"),
    ),
    "compare": (
        ("{a} 和 {b} 哪个更大？", "比较 {a} 与 {b}，大的是哪个？"),
        ("Which is larger, {a} or {b}?", "Of {a} and {b}, which has more?"),
    ),
    "color": (("{a} 是什么颜色？", "{a} 用哪种颜色表示？"), ("What colour is {a}?", "Which colour stands for {a}?")),
    "line": (
        ("折线是什么颜色？", "这条线画成了哪种颜色？"),
        ("What colour is the line?", "In which colour is the line drawn?"),
    ),
    "trend": (
        ("从左到右是上升、下降还是有升有降？", "趋势如何？回答上升、下降或有升有降。"),
        ("From left to right, does it go up, down or is it mixed?", "Is the trend up, down or mixed?"),
    ),
}


def trend_of(values: list[int]) -> str:
    if values == sorted(values):
        return "up"
    return "down" if values == sorted(values, reverse=True) else "mixed"


def make_scene(rng: random.Random) -> tuple[str, list[Mark]]:
    """Kind and marks, without boxes. Values are distinct multiples of five; a pie's add up to 100;
    a line has one colour.
    """
    kind = rng.choice(("bar", "line", "pie"))
    labels = rng.choice(LABELS)
    labels = labels[: rng.randint(3, len(labels))]
    values = rng.sample(range(10, 100, 5), len(labels))
    colors = rng.sample(sorted(COLORS), len(labels))
    if kind == "line":
        colors = colors[:1] * len(labels)
        trend = rng.choice(("up", "down", "mixed"))
        while trend_of(values) != trend:
            values.sort(reverse=trend == "down")
            if trend == "mixed":
                rng.shuffle(values)
    while kind == "pie" and (sum(values) != 100 or len(set(values)) < len(values)):
        cuts = [0, *sorted(rng.sample(range(5, 100, 5), len(labels) - 1)), 100]
        values = [right - left for left, right in itertools.pairwise(cuts)]
    return kind, [{"label": n, "value": v, "color": c} for n, v, c in zip(labels, values, colors, strict=True)]


def draw(kind: str, marks: list[Mark], size: int) -> Image.Image:
    """The picture; adds `box` to each mark: the bar, the point's marker, or the pie's legend
    swatch.
    """
    image = Image.new("RGB", (size, size), "white")
    pen = ImageDraw.Draw(image)
    pen.font = ImageFont.load_default_imagefont()
    (draw_pie if kind == "pie" else draw_axes)(pen, kind, marks, size)
    return image.quantize(16)  # flat colours only: the palette holds them all exactly


def draw_axes(pen: ImageDraw.ImageDraw, kind: str, marks: list[Mark], size: int) -> None:
    ground, slot = size - 16, (size - 8) / len(marks)
    xs = [round(4 + slot * (i + 0.5)) for i in range(len(marks))]
    ys = [ground - round(mark["value"] / 100 * (ground - 12)) for mark in marks]
    pen.line([(3, ground), (size - 4, ground)], "black")
    if kind == "line":
        pen.line(list(zip(xs, ys, strict=True)), COLORS[marks[0]["color"]], 2)
    for mark, x, y in zip(marks, xs, ys, strict=True):
        half = round(slot * 0.3)
        box = [x - half, y, x + half, ground] if kind == "bar" else [x - 3, y - 3, x + 3, y + 3]
        fill(pen, mark, box)
        write_centred(pen, str(mark["value"]), x, box[1] - 7)
        write_centred(pen, mark["label"], x, ground + 7)


def draw_pie(pen: ImageDraw.ImageDraw, kind: str, marks: list[Mark], size: int) -> None:
    width = size - 52  # the legend needs 52 pixels at any size
    circle, angle = (3, 26, 2 + width, 25 + width), -90.0
    for i, mark in enumerate(marks):
        sweep = mark["value"] * 3.6
        pen.pieslice(circle, angle, angle + sweep, COLORS[mark["color"]], "white")
        angle += sweep
        top = size // 2 - 8 * len(marks) + 16 * i
        fill(pen, mark, [size - 47, top + 4, size - 40, top + 11])
        write(pen, f"{mark['label']} {mark['value']}", size - 37, top + 2)


def fill(pen: ImageDraw.ImageDraw, mark: Mark, box: list[int]) -> None:
    mark["box"] = box
    pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), COLORS[mark["color"]])


def write(pen: ImageDraw.ImageDraw, text: str, left: int, top: int) -> None:
    pen.text(
        (left - GLYPH[0], top), f" {text}", "black"
    )  # the space: pillow cuts a leading glyph that reaches left of its origin


def write_centred(pen: ImageDraw.ImageDraw, text: str, x: int, y: int) -> None:
    """Text with its middle at (x, y), on white so that a line passing behind cannot blur it."""
    half = GLYPH[0] * len(text) // 2
    pen.rectangle((x - half, y - 4, x + half, y + 4), "white")
    write(pen, text, x - half, y - GLYPH[1] // 2)


def claim_about(rng: random.Random, topic: str, marks: list[Mark]) -> tuple[str, str, dict[str, Any]]:
    """Two labels to name in the question, and the true claim that answers it: by its `value` if it
    has one, else its `subj`.
    """
    a, b = rng.sample(marks, 2)
    if topic in ("max", "min"):
        extreme = (max if topic == "max" else min)(marks, key=lambda mark: mark["value"])
        claim = {"type": "chart_extreme", "pred": topic, "subj": extreme["label"]}
    elif topic == "compare":
        more, less = (a, b) if a["value"] > b["value"] else (b, a)
        claim = {"type": "chart_compare", "pred": "greater", "subj": more["label"], "obj": less["label"]}
    elif topic == "value":
        claim = {"type": "chart_value", "subj": a["label"], "value": a["value"]}
    elif topic == "trend":
        claim = {
            "type": "attribute",
            "pred": "trend",
            "subj": "line",
            "value": trend_of([mark["value"] for mark in marks]),
        }
    else:
        claim = {
            "type": "attribute",
            "pred": "color",
            "subj": "line" if topic == "line" else a["label"],
            "value": a["color"],
        }
    return a["label"], b["label"], claim


def make_row(rng: random.Random, topic: str, kind: str, marks: list[Mark], image: str) -> dict[str, Any]:
    chinese = rng.random() < 0.5
    a, b, claim = claim_about(rng, topic, marks)
    question = rng.choice(QUESTIONS[topic][0 if chinese else 1]).format(a=a, b=b)
    answer = str(claim.get("value", claim["subj"]))
    return {
        "messages": [
            {"role": "user", "content": f"<image>{question}"},
            {"role": "assistant", "content": CHINESE.get(answer, answer) if chinese else answer},
        ],
        "images": [image],
        "evidence": {"required": [claim]},
        "scene": {"chart": {"kind": kind, "marks": marks}},
    }


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )
    os.replace(partial, path)


def make(out: Path, seed: int, train: int, evaluation: int, size: int) -> None:
    """Writes images/, train.jsonl and eval.jsonl under `out`. Two questions a chart; no chart of
    eval occurs in train.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    # eval first: it stays the same however long train is
    for split, count in (("eval", evaluation), ("train", train)):
        rng = random.Random(f"{seed}/{split}")
        rows: list[dict[str, Any]] = []
        while len(rows) < count:
            kind, marks = make_scene(rng)
            if (scene := json.dumps([kind, marks])) in seen:
                continue
            seen.add(scene)
            name = f"images/{split}_{len(rows) // 2:04d}.png"
            draw(kind, marks, size).save(out / name, optimize=True)
            topics = ("max", "min", "value", "compare", *(("line", "trend") if kind == "line" else ("color",)))
            rows += [make_row(rng, topic, kind, marks, name) for topic in rng.sample(topics, 2)]
        write_rows(out / f"{split}.jsonl", rows[:count])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=600, help="rows, two to a chart")
    parser.add_argument("--eval", type=int, default=120, help="rows, two to a chart")
    parser.add_argument("--size", type=int, default=MIN_SIZE, help="pixels a side")
    args = parser.parse_args(argv)
    if args.size < MIN_SIZE:
        parser.error(f"--size ({args.size}) must be at least {MIN_SIZE}; smaller pictures cannot hold the labels")
    make(args.out, args.seed, args.train, args.eval, args.size)


if __name__ == "__main__":
    main()

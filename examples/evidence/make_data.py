"""Draws pictures whose every detail is known, asks about them, and edits each into a twin with
another answer. Knows pillow and arithmetic, nothing of models or training.

Usage: python examples/evidence/make_data.py bars --rows 2000 --demonstrations 300 --eval 200
Kinds: `bars` (which colour is the tallest bar), `shapes` (what has a colour, and where),
`quarters` (what lies in a place; demonstrations cite boxes that are mostly too large),
`digits_grid` (the digit in one quarter of four), `needle` (a small digit somewhere on a large
canvas, which demonstrations zoom to), `scenes` (two shapes, to be stated so that they can be drawn
again). Each row's `scene` holds what is true of its picture, its `twin` (a minimal edit that
changes the answer) and its `control` (an edit that must not). What the held-out rows show, places
and pairs of colours, no row to learn from has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

HERE = Path(__file__).parent
DIGITS = HERE.parent / "digits"
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 220), "yellow": (240, 200, 20)}
SHAPES = ("circle", "square", "triangle")
# Pairs of colours (what is asked about and what is nearest to it) that only held-out rows have.
HELD_PAIRS = ({"red", "blue"}, {"green", "yellow"})
Box = list[int]
Scene = dict[str, Any]
Drawn = tuple[Image.Image, str, Scene]  # picture, answer, what is true of it


def png(image: Image.Image, path: Path) -> str:
    image.save(path, compress_level=1)
    return path.name


# --- bars: heights and colours --------------------------------------------------------------------

BARS_SIZE, GROUND = 112, 106


def draw_bars(bars: list[tuple[str, int]], places: list[int]) -> Drawn:
    """Bars of (colour, height in pixels) with their left edges; labels A, B, ... under them."""
    image = Image.new("RGB", (BARS_SIZE, BARS_SIZE), "white")
    pen = ImageDraw.Draw(image)
    pen.line([(2, GROUND), (BARS_SIZE - 3, GROUND)], "black")
    objects = []
    for i, ((colour, height), left) in enumerate(zip(bars, places, strict=True)):
        box = [left, GROUND - height, left + 16, GROUND]
        pen.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), COLOURS[colour])
        pen.line([(left + 7, GROUND + 1), (left + 7, GROUND + 2 + i % 2)], "black")
        objects.append({"shape": "bar", "colour": colour, "name": "ABCDE"[i], "value": height, "box": box})
    best = max(bars, key=lambda bar: bar[1])[0]
    chart = dict(bars)
    return image, best, {"objects": objects, "chart": chart, "boxes": {o["colour"]: o["box"] for o in objects}}


def bars(rng: random.Random, held: bool) -> tuple[str, list[Drawn]]:
    """A chart, its twin (the two tallest swap their heights) and a control (the lowest changes)."""
    while True:
        count = rng.randint(3, 4)
        colours = rng.sample(sorted(COLOURS), count)
        heights = rng.sample(range(14, 98, 12), count)
        order = sorted(range(count), key=lambda i: -heights[i])
        start = rng.choice((8, 16) if held else (4, 12, 20))  # a layout is of one side only
        if ({colours[order[0]], colours[order[1]]} in HELD_PAIRS) == held:
            break
    places = [start + 24 * i for i in range(count)]
    first, second, last = order[0], order[1], order[-1]
    swapped, lower = list(heights), list(heights)
    swapped[first], swapped[second] = heights[second], heights[first]
    lower[last] = max(8, heights[last] - 6)
    drawn = [draw_bars(list(zip(colours, some, strict=True)), places) for some in (heights, swapped, lower)]
    return "Which colour is the tallest bar?", drawn


# --- shapes: what and where -----------------------------------------------------------------------

PLACE = 56  # pixels a side of the four places of a picture
PLACES = ("top left", "top right", "bottom left", "bottom right")


def draw_shapes(objects: list[tuple[str, str, int]], asked: str) -> Drawn:
    """(colour, shape, one of 2 x 2 places); the answer is what has the colour that is asked for:
    naming the colour first, it looks again before it says the shape."""
    image = Image.new("RGB", (2 * PLACE, 2 * PLACE), "white")
    pen = ImageDraw.Draw(image)
    known = []
    for colour, shape, place in objects:
        left, top = place % 2 * PLACE, place // 2 * PLACE
        box = [left + 3, top + 3, left + PLACE - 3, top + PLACE - 3]
        inside = (box[0], box[1], box[2] - 1, box[3] - 1)
        if shape == "circle":
            pen.ellipse(inside, COLOURS[colour])
        elif shape == "square":
            pen.rectangle(inside, COLOURS[colour])
        else:
            pen.polygon(
                [(box[0], box[3] - 1), (box[2] - 1, box[3] - 1), ((box[0] + box[2]) // 2, box[1])], COLOURS[colour]
            )
        whole = [left, top, left + PLACE, top + PLACE]
        known.append({"colour": colour, "shape": shape, "place": PLACES[place], "box": whole})
    answer = next(f"{colour} {shape}" for colour, shape, _ in objects if colour == asked)
    return image, answer, {"objects": known}


def shapes(rng: random.Random, held: bool, most: int = 3) -> tuple[str, list[Drawn]]:
    """Shapes of different colours; the twin has another shape in the colour that is asked for, the
    control another one elsewhere.
    """
    while True:
        count = rng.randint(2, most)
        colours = rng.sample(sorted(COLOURS), count)
        places = rng.sample(range(4), count)
        # which colours lie where is of one side only, a fifth of all layouts held out
        layout = sum((sorted(COLOURS).index(one) + 1) * 5**place for one, place in zip(colours, places, strict=True))
        if (layout % 11 in (3, 7)) == held and ({colours[0], colours[1]} in HELD_PAIRS) == held:
            break
    kinds = [rng.choice(SHAPES) for _ in colours]
    objects = list(zip(colours, kinds, places, strict=True))
    other = lambda kind: rng.choice([s for s in SHAPES if s != kind])  # noqa: E731
    twin = [(colours[0], other(kinds[0]), places[0]), *objects[1:]]
    control = [objects[0], (colours[1], other(kinds[1]), places[1]), *objects[2:]]
    return f"Which shape is {colours[0]}?", [draw_shapes(some, colours[0]) for some in (objects, twin, control)]


def quarters(rng: random.Random, held: bool) -> tuple[str, list[Drawn]]:
    """The same pictures, asked for what is in a place; the answer says the place again, first."""
    _, drawn = shapes(rng, held)
    place = drawn[0][2]["objects"][0]["place"]
    return f"What is at the {place}?", [(image, f"{place} {answer}", scene) for image, answer, scene in drawn]


def scenes(rng: random.Random, held: bool) -> tuple[str, list[Drawn]]:
    """Two shapes; the answer states them, from the top left on, each with its place first: who has
    said it knows where to look for the rest. The twin has another shape in one place, the control
    is the picture itself.
    """
    _, (one, twin, _) = shapes(rng, held, most=2)
    drawn = []
    for image, _, scene in (one, twin, one):
        objects = sorted(scene["objects"], key=lambda o: (o["box"][1], o["box"][0]))
        stated = [{k: o[k] for k in ("place", "colour", "shape")} | {"box": inside(o["box"])} for o in objects]
        drawn.append((image, json.dumps(stated), {"objects": objects}))
    return "State the shapes, so that they can be drawn again.", drawn


def inside(place: Box) -> Box:
    """What of its place a shape fills."""
    return [place[0] + 3, place[1] + 3, place[2] - 3, place[3] - 3]


# --- digits: real ones ----------------------------------------------------------------------------

CELL = 28
QUARTERS = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}


def read_digits(split: str) -> list[tuple[str, Path]]:
    """(digit, file) of the handwritten digits next door; held-out rows use its held-out writers."""
    rows = [json.loads(line) for line in (DIGITS / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(row["messages"][1]["content"], DIGITS / row["images"][0]) for row in rows]


def draw_grid(digits: list[tuple[str, Path]], asked: int) -> Drawn:
    image = Image.new("L", (2 * CELL, 2 * CELL), 0)
    known = []
    for (digit, path), (x, y) in zip(digits, QUARTERS.values(), strict=True):
        with Image.open(path) as one:
            image.paste(one.convert("L").resize((CELL, CELL), Image.Resampling.BICUBIC), (x * CELL, y * CELL))
        known.append({"text": digit, "box": [x * CELL, y * CELL, (x + 1) * CELL, (y + 1) * CELL]})
    return image, digits[asked][0], {"ocr": known}


def digits_grid(rng: random.Random, held: bool, pool: list[tuple[str, Path]]) -> tuple[str, list[Drawn]]:
    """Four digits; the twin has another one in the quarter that is asked for, the control
    elsewhere."""
    four, asked = [rng.choice(pool) for _ in range(4)], rng.randrange(4)
    place = list(QUARTERS)[asked]
    other = lambda digit: rng.choice([one for one in pool if one[0] != digit[0]])  # noqa: E731
    elsewhere = (asked + rng.randint(1, 3)) % 4
    variants = [list(four), list(four), list(four)]
    variants[1][asked], variants[2][elsewhere] = other(four[asked]), other(four[elsewhere])
    return f"Which digit is {place}?", [draw_grid(some, asked) for some in variants]


# Pixels a side: of the picture, the digit, what zooming to it shows, a place that it may lie in.
CANVAS, NEEDLE, PATCH, AREA = 448, 12, 56, 112


def draw_needle(digit: tuple[str, Path], left: int, top: int) -> Drawn:
    image = Image.new("L", (CANVAS, CANVAS), 0)
    with Image.open(digit[1]) as one:
        image.paste(one.convert("L").resize((NEEDLE, NEEDLE), Image.Resampling.BICUBIC), (left, top))
    box = [left, top, left + NEEDLE, top + NEEDLE]
    return image, digit[0], {"ocr": [{"text": digit[0], "box": box}], "target": box}


def needle(rng: random.Random, held: bool, pool: list[tuple[str, Path]]) -> tuple[str, list[Drawn]]:
    """A digit of twelve pixels on a canvas that a processor for 112 makes unreadable: three pixels
    of what the model sees. It lies about the middle of one of 4 x 4 places, held-out digits in
    places that no row to learn from uses.
    """
    while True:
        column, line = (rng.randrange(CANVAS // AREA) for _ in range(2))
        if ((column + line) % 4 == 0) == held:
            break
    left, top = (AREA * k + (AREA - PATCH) // 2 + 15 + rng.randint(-1, 1) for k in (column, line))
    digit = rng.choice(pool)
    other = rng.choice([one for one in pool if one[0] != digit[0]])
    again = rng.choice([one for one in pool if one[0] == digit[0] and one[1] != digit[1]])
    return "Which digit is hidden here?", [draw_needle(one, left, top) for one in (digit, other, again)]


KINDS: dict[str, Callable[..., tuple[str, list[Drawn]]]] = {
    "bars": bars,
    "shapes": shapes,
    "quarters": quarters,
    "digits_grid": digits_grid,
    "needle": needle,
    "scenes": scenes,
}


# --- rows -----------------------------------------------------------------------------------------


def claims(scene: Scene, answer: str, question: str) -> list[dict[str, Any]]:
    """The claims that prove the answer, as a model is to write them."""
    if "chart" in scene:
        return [
            {"type": "chart_value", "subj": o["colour"], "value": o["value"], "box": o["box"]} for o in scene["objects"]
        ]
    if "ocr" in scene:
        found = next(o for o in scene["ocr"] if o["text"] == answer)
        return [{"type": "ocr", "subj": answer, "box": found["box"]}]
    ordered = sorted(scene["objects"], key=lambda o: PLACES.index(o["place"]))
    return [{"type": "bbox", "subj": f"{o['place']} {o['colour']} {o['shape']}", "box": o["box"]} for o in ordered]


def row(question: str, drawn: list[Drawn], folder: Path, name: str, evidence: bool) -> dict[str, Any]:
    """A question with its gold answer; the scene holds the twin and the control."""
    names = [
        png(image, folder / f"{name}{mark}.png") for (image, _, _), mark in zip(drawn, ("", "t", "c"), strict=True)
    ]
    (_, answer, scene), (_, other, twin), (_, same, _) = drawn
    assert answer != other
    assert answer == same
    paths = [f"{folder.name}/{one}" for one in names]
    signal: dict[str, Any] = {"type": "verifiable", "answer": answer}
    if "target" in scene:
        signal["verifiers"] = [{"name": "exact", "weight": 0.9}, {"name": "zoom", "weight": 0.1}]
    elif answer.startswith("["):
        signal["verifiers"], evidence = [{"name": "redraw"}], False
    if evidence:
        signal["verifiers"] = [{"name": "exact", "weight": 0.8}, {"name": "evidence", "weight": 0.2}]
        signal["evidence"] = {"required": claims(scene, answer, question)}
        twin = {**twin, "required": claims(twin, other, question)}
    twin = {**twin, "images": paths[1:2], "answer": other}
    signal["scene"] = {**scene, "twin": twin, "control": {"images": paths[2:]}}
    words = f"<image>{question}"
    return {"messages": [{"role": "user", "content": words}], "images": paths[:1], "signal": signal}


def plain(asked: dict[str, Any]) -> dict[str, Any]:
    """The same row with nothing to check but its answer."""
    signal = {name: value for name, value in asked["signal"].items() if name not in ("verifiers", "evidence")}
    return {**asked, "signal": signal}


def demonstration(asked: dict[str, Any]) -> dict[str, Any]:
    """The same row with its right answer to imitate."""
    signal = asked["signal"]
    required = signal.get("evidence", {}).get("required")
    proof = f"<evidence>{json.dumps(required)}</evidence>" if required else ""
    said = {"role": "assistant", "content": f"{proof}{signal['answer']}"}
    return {"messages": [*asked["messages"], said], "images": asked["images"]}


def zoomed(asked: dict[str, Any], out: Path) -> dict[str, Any]:
    """A demonstration that calls the tool for the part of the picture in which the digit lies, is
    shown it, and answers.
    """
    left, top = (AREA * (x // AREA) + (AREA - PATCH) // 2 for x in asked["signal"]["scene"]["target"][:2])
    box, (name,) = [left, top, left + PATCH, top + PATCH], asked["images"]
    shown = f"{name.removesuffix('.png')}z.png"
    with Image.open(out / name) as whole:
        png(whole.crop(tuple(box)), out / shown)
    call = {"type": "function", "function": {"name": "zoom", "arguments": {"box": box}}}
    turns = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "<image>"},
        {"role": "assistant", "content": asked["signal"]["answer"]},
    ]
    return {"messages": [*asked["messages"], *turns], "images": [name, shown]}


def cited(asked: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A demonstration whose box holds what is asked for, its quarter of the picture as seldom as
    the halves and the whole of it: how small a box may be is left to find out.
    """
    found, whole = asked["signal"]["scene"]["objects"][0], 2 * PLACE
    left, top, right, bottom = found["box"]
    boxes = [[left, top, right, bottom], [left, 0, right, whole], [0, top, whole, bottom], [0, 0, whole, whole]]
    proof = f"<evidence>{json.dumps([{'type': 'bbox', 'subj': found['place'], 'box': rng.choice(boxes)}])}</evidence>"
    said = {"role": "assistant", "content": f"{proof}{asked['signal']['answer']}"}
    return {"messages": [*asked["messages"], said], "images": asked["images"]}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    os.replace(unfinished, path)
    print(f"{path}: {len(rows)} rows")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--out", type=Path, default=None, help="folder; by default output/evidence/KIND")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--eval", type=int, default=200)
    parser.add_argument("--demonstrations", type=int, default=300, help="of the rows, also with their answers")
    parser.add_argument("--evidence", action="store_true", help="ask for claims with boxes before the answer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    out = args.out or Path("output") / "evidence" / args.kind
    make, found = KINDS[args.kind], {}
    for split, count in (("train", args.rows), ("eval", args.eval)):
        rng = random.Random(f"{args.kind} {split} {args.seed}")
        folder = out / split
        folder.mkdir(parents=True, exist_ok=True)
        more = {"pool": read_digits(split)} if args.kind in ("digits_grid", "needle") else {}
        made = [make(rng, split == "eval", **more) for _ in range(count)]
        found[split] = [row(q, drawn, folder, f"{i:04d}", args.evidence) for i, (q, drawn) in enumerate(made)]
    write(out / "train.jsonl", found["train"])
    write(out / "eval.jsonl", found["eval"])
    shown = found["train"][: args.demonstrations]
    rng = random.Random(f"{args.kind} boxes {args.seed}")
    write(out / "sft.jsonl", [cited(one, rng) if args.kind == "quarters" else demonstration(one) for one in shown])
    write(out / "sft_eval.jsonl", [demonstration(one) for one in found["eval"]])
    if args.evidence:
        for split, rows in found.items():
            write(out / f"{split}_plain.jsonl", [plain(one) for one in rows])
    if args.kind == "needle":
        write(out / "sft_zoom.jsonl", [zoomed(one, out) for one in found["train"][: args.demonstrations]])


if __name__ == "__main__":
    main()

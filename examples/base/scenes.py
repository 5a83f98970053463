"""Draws pictures of coloured shapes with all that is true of them, and asks about them. Knows
pillow and words, nothing of models or training.

`held_out` pictures use layouts and pairs of colour and shape that no other picture has.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw
from words import COLORS, PLACES, SHAPES, SIZES

Turn = tuple[str, str]  # question, answer
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("blue", "heart"),
        ("green", "ring"),
        ("purple", "square"),
        ("orange", "cross"),
        ("black", "triangle"),
    }
)
SIDES = (84, 84, 84, 112)  # pixels
_TINTS = ((255, 255, 255), (245, 245, 240), (232, 240, 250), (250, 240, 228), (236, 248, 236), (225, 225, 228))


@dataclass
class Thing:
    """One shape: its words, its centre and half width in pixels."""

    color: str
    shape: str
    size: str  # "", small or large
    x: int
    y: int
    r: int

    @property
    def box(self) -> list[int]:
        return [self.x - self.r, self.y - self.r, self.x + self.r, self.y + self.r]

    def name(self, zh: bool, size: bool = False) -> str:
        """`large red circle` or 大红色圆形."""
        if zh:
            return (SIZES[self.size] if size and self.size else "") + COLORS[self.color][0] + SHAPES[self.shape]
        return " ".join(w for w in (self.size if size else "", self.color, self.shape) if w)

    def place(self, side: int) -> int:
        """Number of its place in a 3 x 3 grid, row by row."""
        return min(2, 3 * self.y // side) * 3 + min(2, 3 * self.x // side)


@dataclass
class Scene:
    image: Image.Image
    things: list[Thing]  # by place, then from left to right
    side: int


def draw_thing(pen: ImageDraw.ImageDraw, t: Thing, scale: int, rng: random.Random) -> None:
    """Draw it `scale` times as large as it is, its colour a little off."""
    x, y, r = t.x * scale, t.y * scale, t.r * scale
    fill = tuple(max(0, min(255, c + rng.randint(-12, 12))) for c in COLORS[t.color][1])
    if t.shape == "circle":
        pen.ellipse([x - r, y - r, x + r, y + r], fill=fill)
    elif t.shape == "square":
        q = round(r * 0.9)
        pen.rectangle([x - q, y - q, x + q, y + q], fill=fill)
    elif t.shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif t.shape == "diamond":
        pen.polygon([(x, y - r), (x - r * 0.8, y), (x, y + r), (x + r * 0.8, y)], fill=fill)
    elif t.shape == "cross":
        w = max(1, round(r * 0.35))
        pen.rectangle([x - w, y - r, x + w, y + r], fill=fill)
        pen.rectangle([x - r, y - w, x + r, y + w], fill=fill)
    elif t.shape == "ring":
        pen.ellipse([x - r, y - r, x + r, y + r], outline=fill, width=max(2, round(r * 0.38)))
    elif t.shape == "heart":
        points = []
        for k in range(24):
            a = 2 * math.pi * k / 24
            points.append(
                (
                    x + r * math.sin(a) ** 3,
                    y - r * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16,
                )
            )
        pen.polygon(points, fill=fill)
    else:
        points = []
        for k in range(10):
            a, q = -math.pi / 2 + k * math.pi / 5, r if k % 2 == 0 else r * 0.42
            points.append((x + q * math.cos(a), y + q * math.sin(a)))
        pen.polygon(points, fill=fill)


def _pair(rng: random.Random, held_out: bool, colors: list[str], shapes: list[str]) -> tuple[str, str]:
    while True:
        pair = rng.choice(colors), rng.choice(shapes)
        if held_out or pair not in HELD_OUT_PAIRS:
            return pair


def _spots(
    rng: random.Random, n: int, side: int, held_out: bool, radii: list[int]
) -> tuple[list[tuple[int, int]], list[int]]:
    """Centres of things that do not touch, and their radii, smaller where room lacks. Held-out
    pictures lay most things on a ring, the others on a grid or anywhere.
    """
    kind = rng.choice(("ring", "free")) if held_out else rng.choice(("grid", "free", "free"))
    if kind == "grid":
        fit = int(side // (2 * max(radii) + 2))  # cells in a row that hold the largest
        cells = 2 if n <= 4 and (fit < 3 or rng.random() < 0.5) else 3
        step = side / cells
        spots = []
        for k in rng.sample(range(cells * cells), n) if fit >= cells else ():
            room = max(0, int(step / 2 - max(radii) - 1))
            spots.append(
                (
                    int(step * (k % cells + 0.5)) + rng.randint(-room, room),
                    int(step * (k // cells + 0.5)) + rng.randint(-room, room),
                )
            )
        if spots:
            return spots, radii
    if kind == "ring":
        start, reach = rng.random() * 2 * math.pi, side / 2 - max(radii) - 2
        if n == 1 or 2 * reach * math.sin(math.pi / n) > 2 * max(radii) + 1:
            return [
                (
                    round(side / 2 + reach * math.cos(start + 2 * math.pi * k / n)),
                    round(side / 2 + reach * math.sin(start + 2 * math.pi * k / n)),
                )
                for k in range(n)
            ], radii
    for _ in range(200):
        spots = []
        for r in radii:
            for _ in range(30):
                x, y = rng.randint(r + 1, side - r - 2), rng.randint(r + 1, side - r - 2)
                if all(math.hypot(x - a, y - b) > 1.25 * (r + q) for (a, b), q in zip(spots, radii, strict=False)):
                    spots.append((x, y))
                    break
        if len(spots) == n:
            return spots, radii
    return _spots(rng, n, side, held_out, [max(4, r - 1) for r in radii])


def scene(rng: random.Random, held_out: bool = False, many: bool = False, most: int = 4) -> Scene:
    """A picture of one to `most` things; `many`: up to nine, smaller ones, few kinds."""
    side = rng.choice(SIDES)
    n = rng.randint(1, 9) if many else rng.randint(1, most)
    colors, shapes = list(COLORS), list(SHAPES)
    if many:
        colors, shapes = rng.sample(colors, rng.randint(1, 3)), rng.sample(shapes, rng.randint(1, 3))
        while not held_out and all((c, s) in HELD_OUT_PAIRS for c in colors for s in shapes):
            colors = rng.sample(list(COLORS), 2)
    sized = not many
    sizes = [rng.choice(("small", "large")) if sized else "" for _ in range(n)]
    unit = side / 84
    radii = [
        round(
            unit * (rng.randint(8, 10) if s == "small" else rng.randint(14, 17) if s == "large" else rng.randint(7, 10))
        )
        for s in sizes
    ]
    spots, radii = _spots(rng, n, side, held_out, radii)
    things = []
    for (x, y), r, s in zip(spots, radii, sizes, strict=True):
        color, shape = _pair(rng, held_out, colors, shapes)
        things.append(Thing(color, shape, s, x, y, r))
    return _drawn(things, side, rng)


def _drawn(things: list[Thing], side: int, rng: random.Random) -> Scene:
    """On a ground of its own, with soft edges or hard ones."""
    scale = rng.choice((1, 3))
    ground = rng.choice(_TINTS) if rng.random() < 0.7 else tuple(rng.randint(215, 255) for _ in range(3))
    image = Image.new("RGB", (side * scale, side * scale), ground)
    pen = ImageDraw.Draw(image)
    for t in things:
        draw_thing(pen, t, scale, rng)
    if scale > 1:
        image = image.resize((side, side), Image.Resampling.BOX)
    things.sort(key=lambda t: (t.place(side), t.x, t.y))
    return Scene(image, things, side)


def lone(rng: random.Random, held_out: bool = False) -> Scene:
    """One thing anywhere, from a sixth to most of the picture: below that its shape is lost in the
    tower's patches.
    """
    side, size = rng.choice((56, 84)), rng.choice(("small", "large"))
    r = round(side * (rng.uniform(0.15, 0.21) if size == "small" else rng.uniform(0.27, 0.42)))
    color, shape = _pair(rng, held_out, list(COLORS), list(SHAPES))
    ((x, y),), _ = _spots(rng, 1, side, held_out, [r])
    return _drawn([Thing(color, shape, size, x, y, r)], side, rng)


def one(rng: random.Random) -> Scene:
    """One thing that fills a picture of 56 x 56, without a size."""
    side = 56
    color, shape = _pair(rng, False, list(COLORS), list(SHAPES))
    thing = Thing(color, shape, "", side // 2 + rng.randint(-3, 3), side // 2 + rng.randint(-3, 3), rng.randint(18, 24))
    image = Image.new("RGB", (side, side), rng.choice(_TINTS))
    draw_thing(ImageDraw.Draw(image), thing, 1, rng)
    return Scene(image, [thing], side)


def _place(k: int, zh: bool) -> str:
    return PLACES[k][1] if zh else PLACES[k][0]


def caption(s: Scene, zh: bool) -> str:
    """Every thing with size, colour, shape and place, by place."""
    if zh:
        return "，".join(f"{_place(t.place(s.side), True)}{t.name(True, size=True)}" for t in s.things)
    return ", ".join(f"{t.name(False, size=True)} {_place(t.place(s.side), False)}" for t in s.things)


def ask_caption(s: Scene, rng: random.Random, zh: bool) -> Turn:
    q = rng.choice(
        ("描述这张图。", "图里有什么，在哪里？", "说出每个图形的大小、颜色、形状和位置。")
        if zh
        else (
            "Describe the picture.",
            "What is in the picture, and where?",
            "Name every shape with size, colour and place.",
        )
    )
    return q, caption(s, zh)


def ask_list(s: Scene, rng: random.Random, zh: bool) -> Turn:
    q = rng.choice(("列出所有图形。", "图里有哪些图形？") if zh else ("List the shapes.", "Which shapes are there?"))
    return q, ("，" if zh else ", ").join(t.name(zh) for t in s.things)


def ask_count(s: Scene, rng: random.Random, zh: bool) -> Turn:
    kind, t = rng.random(), rng.choice(s.things)
    if kind < 0.5:
        q, n = (
            rng.choice(
                ("一共有几个图形？", "数一数图形。") if zh else ("How many shapes are there?", "Count the shapes.")
            ),
            len(s.things),
        )
    elif kind < 0.75:
        q = f"有几个{COLORS[t.color][0]}的图形？" if zh else f"How many {t.color} shapes are there?"
        n = sum(o.color == t.color for o in s.things)
    else:
        q = f"有几个{SHAPES[t.shape]}？" if zh else f"How many {t.shape}s are there?".replace("crosss", "crosses")
        n = sum(o.shape == t.shape for o in s.things)
    return q, str(n)


def ask_think(s: Scene, rng: random.Random, zh: bool) -> Turn:
    """Counting aloud: one thing after the other, then the number."""
    names = ("，" if zh else ", ").join(f"{i + 1} {t.name(zh)}" for i, t in enumerate(s.things))
    q = rng.choice(
        ("想一想再数：有几个图形？", "逐个数出图形。")
        if zh
        else ("Think, then count: how many shapes?", "Count the shapes one by one.")
    )
    return q, f"<think>{names}</think>{len(s.things)}"


def _unique(s: Scene, key: str) -> list[Thing]:
    values = [getattr(t, key) for t in s.things]
    return [t for t in s.things if values.count(getattr(t, key)) == 1]


def ask_attribute(s: Scene, rng: random.Random, zh: bool) -> Turn:
    by_shape, by_color = _unique(s, "shape"), _unique(s, "color")
    places = [t.place(s.side) for t in s.things]
    by_place = [t for t in s.things if places.count(t.place(s.side)) == 1]
    kinds = [
        k for k, found in (("color", by_shape), ("shape", by_color), ("where", by_shape), ("at", by_place)) if found
    ]
    if not kinds:
        return ask_list(s, rng, zh)
    kind = rng.choice(kinds)
    if kind == "color":
        t = rng.choice(by_shape)
        q = f"{SHAPES[t.shape]}是什么颜色？" if zh else f"What colour is the {t.shape}?"
        return q, COLORS[t.color][0] if zh else t.color
    if kind == "shape":
        t = rng.choice(by_color)
        q = f"{COLORS[t.color][0]}的图形是什么形状？" if zh else f"What shape is the {t.color} one?"
        return q, SHAPES[t.shape] if zh else t.shape
    if kind == "where":
        t = rng.choice(by_shape)
        return (f"{SHAPES[t.shape]}在哪里？" if zh else f"Where is the {t.shape}?"), _place(t.place(s.side), zh)
    t = rng.choice(by_place)
    where = _place(t.place(s.side), zh)
    return (f"{where}是什么图形？" if zh else f"What is at the {where}?"), t.name(zh)


def _yes(right: bool, zh: bool) -> str:
    return ("是" if right else "否") if zh else ("yes" if right else "no")


def _exists(s: Scene, rng: random.Random) -> tuple[str, str, bool]:
    """A colour and a shape that are there, or, as often, that are not together though one of them
    is there.
    """
    t, o = rng.choice(s.things), rng.choice(s.things)
    if rng.random() < 0.5:
        return t.color, t.shape, True
    held = {(x.color, x.shape) for x in s.things}
    while True:
        draw = rng.random()
        pair = (
            (t.color, o.shape)
            if draw < 0.4
            else (t.color, rng.choice(list(SHAPES)))
            if draw < 0.7
            else (rng.choice(list(COLORS)), t.shape)
        )
        # never asked where it is never shown: "no" would be learned as what it is
        if pair not in held and (pair not in HELD_OUT_PAIRS or held & HELD_OUT_PAIRS):
            return *pair, False
        t, o = rng.choice(s.things), Thing("red", rng.choice(list(SHAPES)), "", 0, 0, 0)


def ask_exists(s: Scene, rng: random.Random, zh: bool) -> Turn:
    color, shape, right = _exists(s, rng)
    q = (
        f"有{COLORS[color][0]}的{SHAPES[shape]}吗？"
        if zh
        else f"Is there {'an' if color[0] in 'aeiou' else 'a'} {color} {shape}?"
    )
    return q, _yes(right, zh)


def ask_has(s: Scene, rng: random.Random, zh: bool) -> Turn:
    """Yes or no about a colour or a shape alone, one in three in the negative."""
    key, words = rng.choice((("color", list(COLORS)), ("shape", list(SHAPES))))
    held = {getattr(t, key) for t in s.things}
    value = rng.choice(sorted(held)) if rng.random() < 0.5 else rng.choice([w for w in words if w not in held])
    said = (f"{COLORS[value][0]}的图形" if key == "color" else SHAPES[value]) if zh else ""
    named = (f"{value} shape" if key == "color" else value) if not zh else ""
    article = "an" if named[:1] in "aeio" and named else "a"
    if rng.random() < 0.33:
        q = f"图里没有{said}吗？" if zh else rng.choice((f"Is there no {named}?", f"Is no {named} in the picture?"))
        return q, _yes(value not in held, zh)
    q = (
        rng.choice((f"图里有{said}吗？", f"能看到{said}吗？"))
        if zh
        else rng.choice((f"Is there {article} {named}?", f"Does the picture show {article} {named}?"))
    )
    return q, _yes(value in held, zh)


def ask_relation(s: Scene, rng: random.Random, zh: bool) -> Turn:
    """Left, right, above, below between two things of different names, clearly apart."""
    pairs = [(a, b) for a in s.things for b in s.things if a.name(False) != b.name(False)]
    names = [t.name(False) for t in s.things]
    pairs = [(a, b) for a, b in pairs if names.count(a.name(False)) == names.count(b.name(False)) == 1]
    clear = [(a, b, axis) for a, b in pairs for axis in "xy" if abs(getattr(a, axis) - getattr(b, axis)) > s.side / 6]
    if not clear:
        return ask_exists(s, rng, zh)
    a, b, axis = rng.choice(clear)
    before = getattr(a, axis) < getattr(b, axis)
    words = (
        (("左边", "右边") if zh else ("left of", "right of"))
        if axis == "x"
        else ("上面", "下面")
        if zh
        else ("above", "below")
    )
    if rng.random() < 0.5:
        said = rng.random() < 0.5
        q = (
            f"{a.name(zh)}在{b.name(zh)}的{words[0 if said else 1]}吗？"
            if zh
            else f"Is the {a.name(zh)} {words[0 if said else 1]} the {b.name(zh)}?"
        )
        return q, _yes(said == before, zh)
    q = (
        f"{a.name(zh)}在{b.name(zh)}的{words[0]}还是{words[1]}？"
        if zh
        else f"Is the {a.name(zh)} {words[0]} or {words[1]} the {b.name(zh)}?"
    )
    return q, words[0 if before else 1].removesuffix(" of")


def ask_compare(s: Scene, rng: random.Random, zh: bool) -> Turn:
    """More of one kind than of another, or the larger of two."""
    pairs = [
        (a, b)
        for a in s.things
        for b in s.things
        if {a.size, b.size} == {"small", "large"} and a.name(False) != b.name(False)
    ]
    if pairs and rng.random() < 0.6:
        a, b = rng.choice(pairs)
        q = (
            f"{a.name(zh)}和{b.name(zh)}，哪个更大？"
            if zh
            else f"Which is larger, the {a.name(zh)} or the {b.name(zh)}?"
        )
        return q, (a if a.size == "large" else b).name(zh)
    shapes = sorted({t.shape for t in s.things})
    a = rng.choice(shapes)
    b = rng.choice([x for x in (shapes if len(shapes) > 1 else list(SHAPES)) if x != a])
    n = [sum(t.shape == x for t in s.things) for x in (a, b)]
    q = f"{SHAPES[a]}比{SHAPES[b]}多吗？" if zh else f"Are there more {a}s than {b}s?".replace("crosss", "crosses")
    return q, _yes(n[0] > n[1], zh)


def ask_box(s: Scene, rng: random.Random, zh: bool) -> Turn:
    names = [t.name(False) for t in s.things]
    t = rng.choice(s.things)
    if names.count(t.name(False)) > 1:
        return ask_exists(s, rng, zh)
    q = f"框出{t.name(zh)}。" if zh else f"Give the box of the {t.name(zh)}."
    return q, json.dumps(t.box)


def ask_format(s: Scene, rng: random.Random, zh: bool) -> Turn:
    """The same facts in a form that was asked for."""
    if rng.random() < 0.5:
        rows = [{"color": t.color, "shape": t.shape} for t in s.things[:3]]
        if len(s.things) > 3:
            return ask_list(s, rng, zh)
        return ("用 JSON 列出图形。" if zh else "List the shapes as JSON."), json.dumps(rows)
    q = "用列表写出图形，每行一个。" if zh else "List the shapes, one on each line."
    return q, "\n".join(f"- {t.name(zh)}" for t in s.things)


def ask_evidence(s: Scene, rng: random.Random, zh: bool) -> Turn:
    """A claim with the box that it rests on."""
    names = [t.name(False) for t in s.things]
    t = rng.choice(s.things)
    if names.count(t.name(False)) > 1 or len(_unique(s, "shape")) < len(s.things):
        return ask_exists(s, rng, zh)
    claim = {"type": "attribute", "pred": "color", "subj": t.shape, "value": t.color, "box": t.box}
    q = f"{SHAPES[t.shape]}是什么颜色？给出证据。" if zh else f"What colour is the {t.shape}? Give evidence."
    return q, f"{COLORS[t.color][0] if zh else t.color}<evidence>{json.dumps([claim])}</evidence>"


DENSE = (ask_caption, ask_caption, ask_caption, ask_caption, ask_list, ask_think)
SHORT = (
    ask_count,
    ask_attribute,
    ask_attribute,
    ask_exists,
    ask_exists,
    ask_has,
    ask_relation,
    ask_compare,
    ask_box,
    ask_format,
    ask_evidence,
)
MANY = (ask_count, ask_count, ask_think, ask_compare, ask_exists)

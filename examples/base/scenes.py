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
SIDE = 112  # pixels, of pictures of several things
# Half widths as shares of the picture's side: what lies between the two is neither small nor large.
SMALL, LARGE = (0.1, 0.125), (0.165, 0.2)
# What yes and no are learned from first: a few words that come again and again.
COMMON = {
    "color": [*COLORS, *["red", "blue"] * 5, *["green"] * 2, "yellow"],
    "shape": [*SHAPES, *["circle", "square"] * 5, *["triangle"] * 2, "star"],
}
# Words in the order in which they are learned to be compared, a few at first.
FEW = {
    "color": ["red", "blue", "green", "yellow", "black", "orange", "purple", "pink", "gray", "brown"],
    "shape": ["circle", "square", "triangle", "cross", "ring", "star", "heart", "diamond"],
}
EDGE = 0.04  # no thing that is asked for its place lies nearer to the border of two places, as a share of the side
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


def _between(v: int, side: int) -> bool:
    """Whether a coordinate lies where one place turns into the next."""
    return any(abs(v - side * k / 3) < EDGE * side for k in (1, 2))


def _ring(rng: random.Random, side: int, radii: list[int], clear: bool) -> list[tuple[int, int]]:
    n, start, reach = len(radii), rng.random() * 2 * math.pi, side / 2 - max(radii) - 2
    if n > 1 and 2 * reach * math.sin(math.pi / n) <= 2 * max(radii) + 1:
        return []
    turns = [start + 2 * math.pi * k / n for k in range(n)]
    spots = [(round(side / 2 + reach * math.cos(a)), round(side / 2 + reach * math.sin(a))) for a in turns]
    return [] if clear and any(_between(v, side) for spot in spots for v in spot) else spots


def _grid(rng: random.Random, side: int, radii: list[int], clear: bool) -> list[tuple[int, int]]:
    n, fit = len(radii), int(side // (2 * max(radii) + 2))  # cells in a row that hold the largest
    cells = 2 if n <= 4 and (fit < 3 or rng.random() < 0.5) else 3
    if fit < cells:
        return []
    step = side / cells
    room = max(0, int(step / 2 - max(radii) - 1))
    spots = []
    for k in rng.sample(range(cells * cells), n):
        x, y = (int(step * (c + 0.5)) + rng.randint(-room, room) for c in (k % cells, k // cells))
        spots.append((x, y))
    return [] if clear and any(_between(v, side) for spot in spots for v in spot) else spots


def _free(rng: random.Random, side: int, radii: list[int], clear: bool) -> list[tuple[int, int]]:
    spots: list[tuple[int, int]] = []
    for r in radii:
        for _ in range(30):
            x, y = rng.randint(r + 1, side - r - 2), rng.randint(r + 1, side - r - 2)
            if clear and (_between(x, side) or _between(y, side)):
                continue
            if all(math.hypot(x - a, y - b) > 1.25 * (r + q) for (a, b), q in zip(spots, radii, strict=False)):
                spots.append((x, y))
                break
        else:
            return []
    return spots


def _spots(
    rng: random.Random, side: int, held_out: bool, radii: list[int], clear: bool = True
) -> list[tuple[int, int]]:
    """Centres of things that do not touch; none where room lacks. Held-out pictures lay most things
    on a ring, the others on a grid or anywhere. `clear`: none between two places.
    """
    lay = rng.choice((_ring, _free)) if held_out else rng.choice((_grid, _free, _free))
    for _ in range(40):
        if spots := lay(rng, side, radii, clear):
            return spots
    for _ in range(40):
        if spots := _free(rng, side, radii, clear):
            return spots
    return []


def scene(
    rng: random.Random, held_out: bool = False, least: int = 1, most: int = 4, few: dict[str, list[str]] | None = None
) -> Scene:
    """A picture of `least` to `most` things, small or large; of more than three two are large at
    most. `few`: the colours and shapes to draw from.
    """
    n = rng.randint(least, most)
    while True:
        sizes = [rng.choice(("small", "large")) for _ in range(n)]
        radii = [round(SIDE * rng.uniform(*(SMALL if s == "small" else LARGE))) for s in sizes]
        if (n <= 3 or sizes.count("large") <= 2) and (spots := _spots(rng, SIDE, held_out, radii)):
            break
    things = []
    for (x, y), r, s in zip(spots, radii, sizes, strict=True):
        color, shape = _pair(rng, held_out, *((few["color"], few["shape"]) if few else (list(COLORS), list(SHAPES))))
        things.append(Thing(color, shape, s, x, y, r))
    return _drawn(things, SIDE, rng)


def crowd(rng: random.Random, held_out: bool = False, most: int = 9) -> Scene:
    """One to `most` things of few kinds, none of them small or large: to be counted."""
    side = rng.choice((84, SIDE))
    colors, shapes = rng.sample(list(COLORS), rng.randint(1, 3)), rng.sample(list(SHAPES), rng.randint(1, 3))
    while not held_out and all((c, s) in HELD_OUT_PAIRS for c in colors for s in shapes):
        colors = rng.sample(list(COLORS), 2)
    radii = [round(side * rng.uniform(0.085, 0.12)) for _ in range(rng.randint(1, most))]
    while not (spots := _spots(rng, side, held_out, radii, clear=False)):
        radii = [max(4, r - 1) for r in radii]
    pairs = [_pair(rng, held_out, colors, shapes) for _ in radii]
    made = zip(pairs, spots, radii, strict=True)
    return _drawn([Thing(color, shape, "", x, y, r) for (color, shape), (x, y), r in made], side, rng)


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


def lone(
    rng: random.Random, held_out: bool = False, common: bool = False, few: dict[str, list[str]] | None = None
) -> Scene:
    """One thing anywhere, from a quarter to most of the picture, small below a share, large above
    another; `common`: mostly of a few colours and shapes; `few`: of these alone.
    """
    side = rng.choice((56, 84, 84))
    share = rng.uniform(0.12, 0.4)
    size = "small" if share < 0.15 else "large" if share > 0.19 else ""
    words = few or COMMON if few or common else {"color": list(COLORS), "shape": list(SHAPES)}
    color, shape = _pair(rng, held_out, words["color"], words["shape"])
    r = round(side * share)
    while not (spots := _spots(rng, side, held_out, [r])):
        r -= 1
    ((x, y),) = spots
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
    """Every thing by place: where it is, its size, colour and shape. Where comes first: who has
    said it knows where to look for the rest.
    """
    between, gap = ("，", "") if zh else (", ", " ")
    return between.join(f"{_place(t.place(s.side), zh)}{gap}{t.name(zh, size=True)}" for t in s.things)


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


def ask_total(s: Scene, rng: random.Random, zh: bool) -> Turn:
    q = rng.choice(("一共有几个图形？", "数一数图形。") if zh else ("How many shapes are there?", "Count the shapes."))
    return q, str(len(s.things))


def ask_count(s: Scene, rng: random.Random, zh: bool) -> Turn:
    """Things of one colour or of one shape."""
    t = rng.choice(s.things)
    if rng.random() < 0.5:
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


def _is_there(color: str, shape: str, zh: bool) -> str:
    if zh:
        return f"有{COLORS[color][0]}的{SHAPES[shape]}吗？"
    return f"Is there {'an' if color[0] in 'aeiou' else 'a'} {color} {shape}?"


def _is_it(key: str, value: str, zh: bool) -> str:
    if zh:
        return f"它是{COLORS[value][0] if key == 'color' else SHAPES[value]}吗？"
    return f"Is it {value if key == 'color' else _told(key, value, False)}?"


def ask_exists(s: Scene, rng: random.Random, zh: bool) -> Turn:
    color, shape, right = _exists(s, rng)
    return _is_there(color, shape, zh), _yes(right, zh)


def _told(key: str, value: str, zh: bool) -> str:
    """`a red shape`, 红色的图形, `an orange shape`, `a star`."""
    if zh:
        return f"{COLORS[value][0]}的图形" if key == "color" else SHAPES[value]
    return f"{'an' if value[0] in 'aeiou' else 'a'} {value}" + (" shape" if key == "color" else "")


def _value(
    s: Scene, key: str, rng: random.Random, common: bool = False, few: dict[str, list[str]] | None = None
) -> tuple[str, bool]:
    """A colour or shape, in half of the cases one that is there; `common`: mostly one of a few;
    `few`: one of these.
    """
    held = {getattr(t, key) for t in s.things}
    words = few[key] if few else COMMON[key] if common else list(COLORS) if key == "color" else list(SHAPES)
    right = rng.random() < 0.5
    return rng.choice(sorted(held) if right else [w for w in words if w not in held]), right


def ask_has(
    s: Scene,
    rng: random.Random,
    zh: bool,
    key: str = "",
    negated: float = 0.3,
    few: dict[str, list[str]] | None = None,
) -> Turn:
    """Yes or no about a colour or a shape alone, a share of the questions in the negative."""
    key = key or rng.choice(("color", "shape"))
    value, right = _value(s, key, rng, few=few)
    told = _told(key, value, zh)
    if rng.random() < negated:
        # not "Is there no …?", which English answers with "no" as often as with "yes"
        bare = told.split(" ", 1)[-1]
        q = (
            rng.choice((f"图里没有{told}吗？", f"没有{told}吗？"))
            if zh
            else rng.choice(
                (
                    f"Is it true that there is no {bare}?",
                    f"Is {told} missing from the picture?",
                    f"Is the picture without {told}?",
                )
            )
        )
        return q, _yes(not right, zh)
    q = (
        rng.choice((f"图里有{told}吗？", f"能看到{told}吗？", f"有{told}吗？"))
        if zh
        else rng.choice((f"Is there {told}?", f"Does the picture show {told}?", f"Does the image contain {told}?"))
    )
    return q, _yes(right, zh)


def ask_among(s: Scene, rng: random.Random, zh: bool, key: str, words: list[str], it: float) -> Turn:
    """Yes or no about the colour or shape of the only thing, one of `words`; a share of `it` of
    them asked as "Is it …?".
    """
    held, right = getattr(s.things[0], key), rng.random() < 0.5
    value = held if right else rng.choice([w for w in words if w != held])
    if rng.random() < it:
        return _is_it(key, value, zh), _yes(right, zh)
    told = _told(key, value, zh)
    asks = (
        (f"图里有{told}吗？", f"有{told}吗？")
        if zh
        else (f"Is there {told} in the image?", f"Does the image contain {told}?")
    )
    return rng.choice(asks), _yes(right, zh)


def ask_few(s: Scene, rng: random.Random, zh: bool, few: dict[str, list[str]]) -> Turn:
    """Yes or no about a colour, a shape or both together, of few, that are or might be there."""
    t, pair = rng.choice(s.things), (rng.choice(few["color"]), rng.choice(few["shape"]))
    draw = rng.random()
    color, shape = (t.color, t.shape) if draw < 0.5 else rng.choice(((t.color, pair[1]), (pair[0], t.shape), pair))
    if (color, shape) in HELD_OUT_PAIRS or rng.random() < 0.5:
        key, value = rng.choice((("color", color), ("shape", shape)))
        told = _told(key, value, zh)
        right = any(getattr(x, key) == value for x in s.things)
        return f"图里有{told}吗？" if zh else f"Is there {told} in the image?", _yes(right, zh)
    right = any((x.color, x.shape) == (color, shape) for x in s.things)
    return _is_there(color, shape, zh), _yes(right, zh)


def ask_is(s: Scene, rng: random.Random, zh: bool, key: str, negated: float = 0.0, common: bool = False) -> Turn:
    """Yes or no about one fact of the only thing: its colour, shape, place or size; `common`: a few
    colours and shapes mostly, in one wording.
    """
    t = s.things[0]
    if key in ("color", "shape"):
        if not common and rng.random() < 0.5:
            return ask_has(s, rng, zh, key, negated)
        value, right = _value(s, key, rng, common)
        return _is_it(key, value, zh), _yes(right, zh)
    right = rng.random() < 0.5
    if key == "size":
        size = t.size if right else "small" if t.size == "large" else "large"
        return (f"它{SIZES[size]}吗？" if zh else f"Is it {size}?"), _yes(right, zh)
    here = t.place(s.side)
    k = here if right else rng.choice([k for k in range(9) if k != here])
    where = _place(k, zh)
    return (f"它在{where}吗？" if zh else f"Is it {'in' if k == 4 else 'at'} the {where}?"), _yes(right, zh)


def ask_relation(s: Scene, rng: random.Random, zh: bool, axes: str = "xy") -> Turn:
    """Left, right, above, below between two things of different names, clearly apart on one of the
    axes.
    """
    pairs = [(a, b) for a in s.things for b in s.things if a.name(False) != b.name(False)]
    names = [t.name(False) for t in s.things]
    pairs = [(a, b) for a, b in pairs if names.count(a.name(False)) == names.count(b.name(False)) == 1]
    clear = [(a, b, axis) for a, b in pairs for axis in axes if abs(getattr(a, axis) - getattr(b, axis)) > s.side / 6]
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


RARE = (ask_compare, ask_box, ask_format, ask_evidence)

"""Several pictures and short clips: which picture, what differs, which way something moves, what
comes first. Knows the scenes beside it.
"""

from __future__ import annotations

import random

from PIL import Image, ImageDraw
from scenes import HELD_OUT_PAIRS, Thing, draw_thing
from words import COLORS, ORDINALS, SHAPES

Turn = tuple[str, str]
_WAYS = {"up": ("上", 0, -1), "down": ("下", 0, 1), "left": ("左", -1, 0), "right": ("右", 1, 0)}


def _thing(rng: random.Random, side: int, x: int | None = None, y: int | None = None) -> Thing:
    while True:
        color, shape = rng.choice(list(COLORS)), rng.choice(list(SHAPES))
        if (color, shape) not in HELD_OUT_PAIRS:
            break
    r = rng.randint(side // 6, side // 4)
    return Thing(color, shape, "", x or rng.randint(r, side - r), y or rng.randint(r, side - r), r)


def _picture(things: list[Thing], side: int, ground: tuple[int, ...], seed: int) -> Image.Image:
    image = Image.new("RGB", (side, side), ground)
    for t in things:
        draw_thing(ImageDraw.Draw(image), t, 1, random.Random(seed))
    return image


def pictures(rng: random.Random, zh: bool) -> tuple[list[Image.Image], list[Turn]]:
    """Two or three pictures of one thing each."""
    side, n = 56, rng.randint(2, 3)
    things = [_thing(rng, side) for _ in range(n)]
    images = [_picture([t], side, (rng.randint(230, 255),) * 3, rng.randrange(99)) for t in things]
    i = rng.randrange(n)
    named = ORDINALS[i]
    kinds: list[Turn] = [
        (f"{named[1]}张图里是什么？" if zh else f"What is in the {named[0]} picture?", things[i].name(zh)),
        (
            "每张图里是什么？" if zh else "What is in each picture?",
            ("，" if zh else ", ").join(f"{k + 1} {t.name(zh)}" for k, t in enumerate(things)),
        ),
    ]
    if sum(t.shape == things[i].shape for t in things) == 1:
        kinds.append(
            (
                f"{SHAPES[things[i].shape]}在第几张图？" if zh else f"Which picture shows the {things[i].shape}?",
                str(i + 1),
            )
        )
    if sum(t.color == things[i].color for t in things) == 1:
        kinds.append(
            (
                f"第几张图是{COLORS[things[i].color][0]}的？"
                if zh
                else f"Which picture shows something {things[i].color}?",
                str(i + 1),
            )
        )
    same = len({t.name(False) for t in things}) == 1
    if n == 2:
        kinds.append(
            (
                "两张图一样吗？" if zh else "Do both pictures show the same?",
                ("是" if same else "否") if zh else "yes" if same else "no",
            )
        )
    rng.shuffle(kinds)
    return images, kinds[: rng.randint(1, 3)]


def clip(rng: random.Random, zh: bool) -> tuple[list[Image.Image], list[Turn]]:
    """Four frames: a thing that moves, or things that come one after the other."""
    side = 56
    ground, seed = (rng.randint(230, 255),) * 3, rng.randrange(99)
    if rng.random() < 0.7:
        way, (cn, dx, dy) = rng.choice(list(_WAYS.items()))
        t = _thing(rng, side)
        t.r = min(t.r, 10)
        free = rng.randint(t.r + 1, side - t.r - 1)
        frames = []
        count = rng.choice((4, 6, 8))
        for k in range(count):
            d = -16 + 33 * k // (count - 1)
            x = side // 2 + dx * d if dx else free
            y = side // 2 + dy * d if dy else free
            frames.append(_picture([Thing(t.color, t.shape, "", x, y, t.r)], side, ground, seed))
        turns = [
            (
                rng.choice((f"{SHAPES[t.shape]}向哪边动？", "它向哪个方向移动？"))
                if zh
                else rng.choice((f"Where does the {t.shape} go?", "Which way does it move?")),
                cn if zh else way,
            )
        ]
        if rng.random() < 0.5:
            turns.append(("什么在动？" if zh else "What moves?", t.name(zh)))
        return frames, turns
    a, b = _thing(rng, side, 28, 28), _thing(rng, side, 28, 28)
    frames = [_picture([t], side, ground, seed) for t in (a, a, b, b)]
    return frames, [
        (
            "先后出现了什么？" if zh else "What comes first, and what then?",
            ("，" if zh else ", ").join((a.name(zh), b.name(zh))),
        )
    ]

"""Draws digits as a pen would, from lines that this file holds: for the many ways of writing that
no font has. No handwriting was looked up or traced: every line is a few points typed in here.
"""

from __future__ import annotations

import random

from PIL import Image, ImageDraw

Point = tuple[float, float]
# Of each digit several ways to write it, of each way its lines, of each line its points, x to the
# right and y down, in a square of side 1. Lines of three and more points are curves through them.
_WAYS: dict[str, tuple[str, ...]] = {
    "0": (
        ".5 0, .18 .16, .05 .5, .18 .84, .5 1, .82 .84, .95 .5, .82 .16, .5 0",
        ".6 .02, .25 .12, .1 .55, .3 .95, .65 .95, .9 .5, .75 .1, .45 .04",
    ),
    "1": (".5 0, .5 1", ".22 .25, .55 0; .55 0, .55 1", ".2 .28, .5 0; .5 0, .5 1; .15 1, .85 1", ".6 0, .4 1"),
    "2": (
        ".1 .25, .3 .03, .66 .02, .85 .25, .7 .5, .35 .78, .08 1; .08 1, .92 .98",
        ".1 .22, .4 0, .8 .15, .76 .5, .32 .94, .1 .9, .24 .78, .6 .95, .95 .93",
        ".08 .15, .5 0, .88 .2, .6 .6, .1 .98; .1 .98, .95 1",
    ),
    "3": (
        ".1 .12, .5 0, .85 .2, .7 .42, .4 .48; .4 .48, .8 .56, .9 .8, .5 1, .08 .88",
        ".1 .02, .85 .02; .85 .02, .45 .4; .45 .4, .85 .55, .88 .82, .5 1, .08 .88",
        ".12 .06, .6 .02, .8 .25, .45 .46, .85 .68, .65 .97, .1 .95",
    ),
    "4": (
        ".25 0, .1 .55; .1 .55, .92 .6; .7 .25, .64 1",
        ".65 0, .05 .66; .05 .66, .95 .66; .66 0, .66 1",
        ".3 0, .12 .5, .3 .6, .85 .5; .82 0, .62 1",
    ),
    "5": (
        ".85 .02, .25 .02; .25 .02, .2 .42; .2 .42, .6 .36, .88 .6, .75 .9, .4 1, .08 .88",
        ".9 0, .3 .04; .3 .04, .15 .5; .15 .5, .65 .45, .8 .75, .5 1, .1 .95",
        ".8 .02, .3 .05, .2 .4, .7 .5, .8 .8, .45 1, .1 .92",
    ),
    "6": (
        ".75 .02, .35 .25, .1 .6, .2 .92, .55 1, .85 .82, .75 .58, .45 .52, .15 .68",
        ".5 0, .2 .4, .12 .75, .4 1, .8 .88, .82 .65, .5 .55, .18 .72",
    ),
    "7": (
        ".08 .03, .9 .03; .9 .03, .55 .5, .35 1",
        ".08 .1, .9 .03; .9 .03, .5 .5, .4 1; .3 .52, .78 .48",
        ".1 0, .1 .15; .1 .02, .88 .05; .88 .05, .3 1",
    ),
    "8": (
        ".5 .48, .15 .3, .3 .03, .7 .03, .85 .28, .5 .48, .12 .75, .3 .98, .7 .98, .88 .75, .5 .48",
        ".82 .15, .5 0, .2 .2, .5 .48, .85 .75, .5 1, .15 .78, .5 .48, .8 .25, .75 .1",
    ),
    "9": (
        ".85 .25, .6 .02, .2 .1, .12 .38, .45 .52, .8 .38, .85 .22; .85 .22, .82 .6, .7 1",
        ".82 .2, .5 0, .15 .2, .25 .46, .6 .46, .84 .2; .84 .2, .85 .65, .6 .98, .18 .92",
        ".75 .08, .3 .05, .2 .4, .6 .45, .8 .1; .8 .1, .6 1",
    ),
}


def _curve(points: list[Point]) -> list[Point]:
    """Through all points (Catmull-Rom), eight steps between two."""
    if len(points) < 3:
        return points
    padded = [points[0], *points, points[-1]]
    found = []
    for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False):
        for step in range(8):
            t = step / 8
            p, q, r, s = -t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2
            found.append(tuple((p * a[i] + q * b[i] + r * c[i] + s * d[i]) / 2 for i in (0, 1)))
    return [*found, points[-1]]  # type: ignore[list-item]


def digit(said: str, rng: random.Random, side: int = 64) -> Image.Image:
    """Light on black, as tall as the picture, each point a little off and the whole slanted."""
    moved: dict[str, Point] = {}
    slant, turn, loose = rng.gauss(0, 0.22), rng.gauss(0, 0.1), rng.uniform(0.02, 0.07)
    lines = []
    for line in rng.choice(_WAYS[said]).split(";"):
        points = []
        for word in map(str.strip, line.split(",")):
            if word not in moved:
                x, y = map(float, word.split())
                x, y = x + rng.gauss(0, loose), y + rng.gauss(0, loose)
                moved[word] = (x * 0.7 - slant * (y - 0.5) - turn * y, y + turn * x)
            points.append(moved[word])
        lines.append(_curve(points))
    pen = rng.uniform(5, 14)  # pixels
    every = [p for line in lines for p in line]
    left, top = (min(p[i] for p in every) for i in (0, 1))
    wide, tall = max(p[0] for p in every) - left, max(p[1] for p in every) - top
    down = (side - pen) / tall
    across = min(down * rng.uniform(0.8, 1.3), (side - pen) / max(wide, 1e-3))
    margin = (side - wide * across) / 2
    board = Image.new("RGB", (side, side))
    draw = ImageDraw.Draw(board)
    for line in lines:
        spots = [(margin + (x - left) * across, pen / 2 + (y - top) * down) for x, y in line]
        draw.line(spots, (255, 255, 255), round(pen))
        for x, y in spots:
            draw.ellipse([x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2], (255, 255, 255))
    return board

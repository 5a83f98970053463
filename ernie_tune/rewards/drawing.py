"""Drawing again: a scene that an answer states as JSON, drawn and compared with the picture itself.

    [{"shape": "circle", "colour": "red", "box": [10, 10, 40, 40]}]

Needs no annotation of the picture, which must be flat: shapes of one colour on one background. What
cannot be read draws nothing, and nothing earns nothing. Refuses to know: models, what a score is
worth.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ernie_tune.config.language import say
from ernie_tune.data.media.images import load_image
from ernie_tune.rewards.evidence import redrawn
from ernie_tune.rewards.reading import boxed, tagged, without_thought
from ernie_tune.rewards.scores import Box

SIDE, FINE = 56, 4  # pixels that are compared, and how many each is drawn with
MOST = 64  # objects that are drawn
_LONGEST = 1 << 16
FRAMES = ("pixel", 1000, 1)
COLOURS = {
    "red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 90, 220), "yellow": (240, 200, 20),
    "orange": (255, 127, 14), "purple": (148, 103, 189), "black": (0, 0, 0), "white": (255, 255, 255),
    "grey": (127, 127, 127), "pink": (227, 119, 194), "brown": (140, 86, 75),
}  # fmt: skip
_HEX = re.compile(r"#[0-9a-fA-F]{6}")


def stated_objects(text: str) -> list[Mapping[str, Any]]:
    """The objects of the only JSON list of an answer, in a fence, a tag or a box or in none, MOST
    of them; none where there is no list of objects, several, only a thought, or several answers.
    """
    after = without_thought(text)
    if after is None or len(after) > _LONGEST:
        return []
    if opened := after.count("<answer>") + after.count("\\boxed{"):
        held = [*boxed(after)[0], *tagged(after)]
        if opened != 1 or len(held) != 1:
            return []
        after = held[0]
    if after.count("[{") != 1:
        return []
    start = after.index("[{")
    try:
        found, _ = json.JSONDecoder().raw_decode(after, start)
    except (ValueError, RecursionError):
        return []
    return found[:MOST] if all(isinstance(one, dict) for one in found) else []


def draw(objects: Sequence[Mapping[str, Any]], size: tuple[int, int], background: tuple[int, ...]) -> np.ndarray:
    """[SIDE, SIDE, 3] of 0 to 255: objects one over the other. `size`: (width, height) that boxes
    count in. Objects whose shape, colour or box cannot be read are left out.
    """
    side = SIDE * FINE
    image = Image.new("RGB", (side, side), tuple(int(x) for x in background))
    pen = ImageDraw.Draw(image)
    for one in objects:
        box, colour = _box(one.get("box"), size), _colour(one.get("colour", one.get("color")))
        if box is None or colour is None:
            continue
        left, top, right, bottom = box
        shape = str(one.get("shape", "")).casefold()
        if shape == "circle":
            pen.ellipse((left, top, right - 1, bottom - 1), colour)
        elif shape in ("square", "rectangle", "bar"):
            pen.rectangle((left, top, right - 1, bottom - 1), colour)
        elif shape == "triangle":
            pen.polygon([(left, bottom - 1), (right - 1, bottom - 1), ((left + right) / 2, top)], colour)
    return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), np.float64)


def _box(given: Any, size: tuple[int, int]) -> Box | None:
    """Corners in fine pixels, clipped to the picture; None where that leaves nothing."""
    if not isinstance(given, list) or len(given) != 4 or not all(isinstance(x, int | float) for x in given):
        return None
    corners = np.array(given, np.float64)
    if not np.isfinite(corners).all():
        return None
    scaled = np.clip(np.round(corners / np.array([*size, *size]) * SIDE * FINE), 0, SIDE * FINE)
    left, top, right, bottom = (float(x) for x in scaled)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _colour(given: Any) -> tuple[int, int, int] | None:
    word = str(given).casefold()
    if _HEX.fullmatch(word):
        return int(word[1:3], 16), int(word[3:5], 16), int(word[5:7], 16)
    return COLOURS.get(word)


def seen(picture: Image.Image) -> tuple[np.ndarray, tuple[int, ...]]:
    """(the picture as [SIDE, SIDE, 3], its background: the commonest colour of its edge)."""
    rgb = np.asarray(picture.convert("RGB"))
    edge = np.concatenate([rgb[0], rgb[-1], rgb[:, 0], rgb[:, -1]])
    colours, counts = np.unique(edge, axis=0, return_counts=True)
    small = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float64), tuple(int(x) for x in colours[counts.argmax()])


@lru_cache(maxsize=512)
def _opened(path: str, where: str) -> tuple[np.ndarray, tuple[int, ...], tuple[int, int]]:
    image = load_image(path, where)
    return *seen(image), image.size


def redraw(text: str, picture: Any, where: str = "", frame: str | int = "pixel") -> float:
    """1 where the stated scene, drawn, is the picture; 0 where it is no nearer to it than an empty
    one (`evidence.redrawn`). `picture`: a file, address, bytes or image. `frame`: what boxes count
    in. Raises ValueError for another frame, and for a picture that cannot be opened.
    """
    if frame not in FRAMES:
        raise ValueError(
            say(
                f"frame ({frame!r}) must be one of {', '.join(map(str, FRAMES))}; correct the row",
                f"frame（{frame!r}）须为 {', '.join(map(str, FRAMES))} 之一；请改正该行",
            )
        )
    if isinstance(picture, str):
        shown, background, size = _opened(picture, where)
    else:
        image = load_image(picture, where)
        (shown, background), size = seen(image), image.size
    objects = stated_objects(text)
    if not objects:
        return 0.0
    units = size if frame == "pixel" else (int(frame), int(frame))
    return max(0.0, redrawn(shown, draw(objects, units, background), np.array(background, np.float64)))

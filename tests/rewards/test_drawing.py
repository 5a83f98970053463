"""Drawing a picture again: closed forms, what earns nothing, and the checker in a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from ernie_tune.data.records import Record, Reward, Verifier
from ernie_tune.rewards.attacks import reference_text
from ernie_tune.rewards.drawing import COLOURS, MOST, draw, redraw, stated_objects
from ernie_tune.rewards.functions import Answered
from ernie_tune.rewards.rubric import RowVerifiers

SQUARE = {"shape": "square", "colour": "red", "box": [20, 20, 60, 60]}


def picture(size: int = 112, background: str = "white") -> Image.Image:
    image = Image.new("RGB", (size, size), background)
    ImageDraw.Draw(image).rectangle((20, 20, 59, 59), COLOURS["red"])
    return image


def said(*objects: dict[str, Any]) -> str:
    return json.dumps(list(objects))


def test_the_same_scene_is_one_and_half_of_it_a_third() -> None:
    assert redraw(said(SQUARE), picture()) == pytest.approx(1.0)
    for words in ("<answer>{}</answer>", "```json\n{}\n```", "\\boxed{{{}}}", "The shapes: {}"):
        assert redraw(words.format(said(SQUARE)), picture()) == pytest.approx(1.0)
    # moved by half of its side: what differs is 2 halves, what either shows 3
    assert redraw(said({**SQUARE, "box": [40, 20, 80, 60]}), picture()) == pytest.approx(1 / 3)
    assert redraw(said({**SQUARE, "box": [20, 20, 40, 60]}), picture()) == pytest.approx(0.5)
    two = said(SQUARE, {**SQUARE, "box": [70, 20, 110, 60]})  # one that is not there
    assert redraw(two, picture()) == pytest.approx(0.5)
    black = [{**SQUARE, "colour": "#d62728"}]
    assert redraw(said(*black), picture(background="black")) == pytest.approx(1.0)


def test_frames_and_sizes() -> None:
    for frame, scale in (("pixel", 1.0), (1000, 1000 / 112), (1, 1 / 112)):
        moved = {**SQUARE, "box": [x * scale for x in (20, 20, 60, 60)]}
        assert redraw(said(moved), picture(), frame=frame) == pytest.approx(1.0, abs=1e-3)
    with pytest.raises(ValueError, match=r"frame \(100\) must be one of pixel, 1000, 1"):
        redraw(said(SQUARE), picture(), frame=100)


NOTHING = {
    "empty": "", "no scene": "[]", "an empty scene": "[{}]", "words": "a red square", "not JSON": "[{'shape': 'square'}]",
    "only thought": f"<think>{said(SQUARE)}</think>", "two lists": said(SQUARE) + said(SQUARE),
    "numbers": "[{1, 2}]", "elsewhere": said({**SQUARE, "box": [70, 70, 110, 110]}),
    "turned": said({**SQUARE, "box": [60, 60, 20, 20]}), "endless": said({**SQUARE, "box": [20, 20, 1e400, 60]}),
    "no colour": said({**SQUARE, "colour": "reddish"}), "no shape": said({**SQUARE, "shape": "thing"}),
    "background": said({**SQUARE, "colour": "white", "box": [0, 0, 112, 112]}), "long": said(SQUARE) + " " * (1 << 17),
    "deep": "[{" + "[" * 5000, "two answers": f"<answer>{said(SQUARE)}</answer><answer>a circle</answer>",
    "two boxes": f"\\boxed{{{said(SQUARE)}}} \\boxed{{a circle}}", "an open box": f"\\boxed{{{said(SQUARE)}",
    "an open tag": f"<answer>{said(SQUARE)}", "beside the answer": f"{said(SQUARE)}<answer>a circle</answer>",
}  # fmt: skip


@pytest.mark.parametrize("name", NOTHING)
def test_what_draws_nothing_earns_nothing(name: str) -> None:
    assert redraw(NOTHING[name], picture()) == 0.0


def test_the_whole_picture_in_one_colour_earns_little() -> None:
    whole = {**SQUARE, "box": [0, 0, 112, 112]}
    assert redraw(said(whole), picture()) < 0.2


def test_shapes_cover_what_they_should() -> None:
    box = [14, 14, 98, 98]

    def inked(shape: str) -> float:
        drawn = draw([{**SQUARE, "shape": shape, "box": box}], (112, 112), (255, 255, 255))
        return float((drawn < 250).any(-1).mean())

    square = inked("square")
    assert square == pytest.approx((84 / 112) ** 2, abs=0.01)
    assert inked("circle") / square == pytest.approx(np.pi / 4, abs=0.05)
    assert inked("triangle") / square == pytest.approx(0.5, abs=0.05)
    assert inked("bar") == inked("rectangle") == square
    assert len(stated_objects(said(*[SQUARE] * 500))) == MOST


def test_a_row_that_asks_for_it(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    reward = Reward(None, (Verifier("redraw"),), {}, {"objects": [SQUARE]})
    record = Record("verifiable", (), (str(tmp_path / "a.png"),), reward=reward)
    rows = RowVerifiers()
    rows.check(record)
    shown = reference_text(record)
    assert shown is not None
    (scores,) = rows([(record, [Answered(shown), Answered("<think>x</think>" + shown), Answered("")])])
    assert scores == pytest.approx([1.0, 1.0, 0.0])
    alone = Record("verifiable", (), (), reward=reward)
    with pytest.raises(ValueError, match="spec of redraw"):
        rows([(alone, [Answered(shown)])])

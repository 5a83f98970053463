"""Makes the rows and pictures that the base learns from. Knows the drawers beside it, nothing of
models or training.

Usage: python make_data.py --out output/base/data --part atoms --mix atoms --rows 20000 --seed 8
A part is a name of your own; `eval` (`eval_grey`: the same rows with --grey) draws held-out
pictures: other layouts, fonts, pairs of colour and shape, one question each, with its skill.
The same arguments give the same rows; pictures too, where pillow and the fonts are of the same
versions.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import random
import string
from collections.abc import Callable
from pathlib import Path

import clips
import lookups
import plots
import printed
import scenes
import shop
import texts
from PIL import Image
from words import COLORS, PLACES, SHAPES, SIZES

Made = tuple[list[Image.Image | list[Image.Image]], list[tuple[str, str]]]  # pictures (a list: a clip), turns
MIXES = {  # weights of kinds of rows, in the order of the stages; "wide" is everything that can be drawn
    "first": {"first": 1},
    "one": {"facts": 42, "single": 18, "word": 5, "glyph": 17, "digit": 18},
    "all": {
        **{"facts": 28, "single": 12, "word": 6, "digit": 22, "glyph": 14},
        **{"scene": 9, "many": 5, "words": 4},
    },
    "last": {
        **{"digit": 36, "facts": 15, "single": 7, "scene": 14, "glyph": 12},
        **{"many": 6, "words": 6, "word": 4},
    },
    "facts": {"plain": 46, "single": 10, "two": 8, "dots": 7, "digit": 12, "few": 12, "words": 5},
    "match": {
        **{"told": 34, "retold": 14, "yes": 10, "words": 12},
        **{"digit": 15, "two": 6, "dots": 3, "few": 3, "single": 3},
    },
    "copy": {
        **{"copied": 46, "retold": 8, "told": 18, "words": 4},
        **{"digit": 12, "two": 5, "dots": 2, "few": 2, "single": 3},
    },
    "rest": {
        **{"told": 24, "yes": 8, "facts": 10, "single": 5, "two": 9, "scene": 4, "dots": 3, "many": 5},
        **{"digit": 14, "copied": 10, "retold": 4, "words": 4},
    },
    "brief": {
        **{"echo_few": 48, "pairs_few": 14, "there": 10, "same": 6},
        **{"digit": 6, "facts": 5, "told": 5, "two": 3, "dots": 2, "single": 2},
    },
    "lookups": {
        **{"echo": 20, "pairs": 12, "after": 5, "there": 8, "same": 4, "retold": 5, "words": 4},
        **{"digit": 9, "facts": 8, "told": 6, "two": 6, "scene": 4, "dots": 4, "single": 5},
    },
    "search": {
        **{"named": 20, "traits": 14, "presence": 9, "sides": 5, "dots": 5, "many": 6, "facts": 6, "told": 5},
        **{"digit": 10, "glyph": 3, "echo": 4, "echo_few": 3, "pairs": 4, "there": 2, "retold": 4, "words": 5},
    },
    "settle": {
        **{"named": 20, "traits": 14, "presence": 10, "sides": 6, "dots": 5, "many": 7, "facts": 8, "told": 6},
        **{"digit": 12, "glyph": 2, "single": 3, "word": 2},
        **{"echo_few": 3, "pairs_few": 3, "there": 2, "retold": 3, "words": 4},
    },
    "grow": {
        **{"verdict": 10, "facts": 6, "presence": 4, "presence_few": 7, "named": 9, "traits": 9, "sides": 2},
        **{"sides_few": 6, "dots": 2, "many": 6},
        **{"digit": 14, "few": 3, "text": 3, "chart": 6, "pair": 4, "clip": 3},
        **{"sheet": 20, "echo_few": 2, "pairs_few": 2, "retold": 4, "there": 2},
    },
    "ripen": {
        **{"verdict": 6, "facts": 4, "presence": 4, "presence_few": 5, "named": 10, "traits": 9, "sides": 2},
        **{"sides_few": 5, "dots": 3, "many": 8, "digit": 30, "few": 1, "chart": 4, "pair": 4, "clip": 3},
        **{"sheet": 22, "echo_few": 1, "pairs_few": 1, "retold": 2},
    },
    "letters": {"letter": 72, "few": 8, "digit": 8, "facts": 4, "named": 4, "verdict": 4},
    "twos": {"letter": 20, "twos": 64, "digit": 6, "facts": 3, "named": 4, "verdict": 3},
    "strings": {
        **{"letter": 12, "few": 10, "strings": 36, "text": 18},
        **{"digit": 6, "named": 6, "verdict": 3, "facts": 3, "presence_few": 3, "many": 3},
    },
    "sides": {
        **{"sides_two": 44, "denied": 26, "small_sums": 12},
        **{"strings": 6, "text": 4, "named": 4, "digit": 4},
    },
    "whole": {
        **{"verdict": 4, "denied": 5, "facts": 5, "presence": 4, "presence_few": 5, "named": 8, "traits": 8},
        **{"sides_two": 3, "sides_few": 4, "sides": 2, "dots": 2, "many": 10, "digit": 9},
        **{
            "letter": 1,
            "twos": 2,
            "strings": 7,
            "text": 14,
            "chinese": 3,
            "receipt": 3,
            "chart": 11,
            "pair": 4,
            "clip": 3,
        },
        **{"sheet": 12, "small_sums": 6, "echo_few": 1, "pairs_few": 1, "retold": 2},
    },
    "sides_one": {"sides_one": 80, "named": 8, "presence_few": 6, "strings": 6},
    "sides_more": {"sides_one": 25, "sides_two": 40, "denied": 22, "named": 5, "presence_few": 4, "strings": 4},
    "bloom": {
        **{"verdict": 3, "denied": 4, "facts": 5, "presence": 4, "presence_few": 4, "named": 7, "traits": 6},
        **{"sides_two": 2, "sides_few": 4, "sides": 2, "many": 9, "digit": 11, "pair": 3, "clip": 2},
        **{"letter": 1, "twos": 1, "strings": 6, "text": 16, "chinese": 4, "receipt": 3, "chart": 12},
        **{"sheet": 9, "small_sums": 4, "customers": 2, "echo_few": 1, "retold": 1},
    },
    "polish": {
        **{"named": 16, "traits": 10, "many": 14, "digit": 16, "facts": 6, "verdict": 4, "presence": 4},
        **{"presence_few": 3, "denied": 2, "sides_few": 3, "pair": 3, "clip": 2},
        **{"text": 12, "strings": 4, "chinese": 2, "receipt": 2, "chart": 6, "sheet": 6, "customers": 2},
    },
    "names": {
        **{"named": 22, "traits": 12, "many": 12, "digit": 14, "facts": 5, "verdict": 3, "presence": 5},
        **{"presence_few": 3, "denied": 2, "sides_few": 2, "pair": 2, "clip": 1},
        **{"text": 10, "strings": 3, "chinese": 2, "receipt": 1, "chart": 3, "sheet": 5, "customers": 2},
    },
    "settled_digits": {
        **{"digit": 44, "named": 14, "traits": 6, "many": 8, "verdict": 3, "facts": 5, "presence": 3},
        **{"text": 10, "strings": 3, "sheet": 4},
    },
    "talk": {"customers": 1},
    "digits": {
        **{"digit": 50, "named": 10, "traits": 6, "verdict": 6, "facts": 6, "presence_few": 3, "many": 8},
        **{"sides_few": 2, "pair": 3, "clip": 2, "chart": 2, "sheet": 20},
    },
    "verdict_english": {"verdict_english": 1},
    "verdict_shapes": {"verdict_english": 20, "verdict_shapes": 80},
    "verdict_colors": {"verdict_colors": 85, "verdict": 15},
    "verdict_more": {"verdict_more": 85, "verdict": 15},
    "wide": {
        **{"facts": 7, "scene": 26, "many": 13, "few": 8, "digit": 8, "text": 18, "chart": 4, "receipt": 1},
        **{"pair": 2, "clip": 1, "words": 12},
    },
}


def _distinct(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each question once."""
    return list({q: (q, a) for q, a in turns}.values())


def facts(rng: random.Random, zh: bool, negated: float = 0.3) -> Made:
    """One thing of any size anywhere. Each of its facts once, open or as yes or no: no answer tells
    another, since what earlier turns say is copied, not seen.
    """
    s = scenes.lone(rng)
    keys = ["shape", "color", "place"] + ["size"] * bool(s.things[0].size)
    rng.shuffle(keys)
    turns = []
    for key in keys:
        asks = rng.random() < 0.6
        turns.append(scenes.ask_is(s, rng, zh, key, negated) if asks else about_one(s, zh, key, rng)[1][0])
    return [s.image], turns


def plain(rng: random.Random, zh: bool) -> Made:
    """`facts` without a question in the negative."""
    return facts(rng, zh, negated=0.0)


def yes(rng: random.Random, zh: bool) -> Made:
    """Yes or no about the colour and the shape of one thing, few of both, in one wording."""
    s, keys = scenes.lone(rng, common=True), ["color", "shape"]
    keys += ["place"] * (rng.random() < 0.3)
    rng.shuffle(keys)
    return [s.image], [scenes.ask_is(s, rng, zh, key, common=True) for key in keys]


def _verdict(rng: random.Random, zh: bool, colors: int, shapes: int, it: float) -> Made:
    """A thing of the first `colors` and `shapes`: one of the two asked, open or as yes or no.
    `it`: the share of "Is it red?" among "Is there a red shape?".
    """
    few = {"color": scenes.FEW["color"][:colors], "shape": scenes.FEW["shape"][:shapes]}
    s = scenes.lone(rng, few=few)
    key = rng.choice(("color", "shape"))
    if rng.random() < 0.4:
        return about_one(s, zh, key, rng)
    return [s.image], [scenes.ask_among(s, rng, zh, key, few[key], it)]


def verdict_english(rng: random.Random, zh: bool) -> Made:
    return _verdict(rng, False, 8, 3, 0.0)


def verdict_shapes(rng: random.Random, zh: bool) -> Made:
    return _verdict(rng, zh, 8, 4, 0.4)


def verdict_colors(rng: random.Random, zh: bool) -> Made:
    return _verdict(rng, zh, rng.choice((2, 3)), 6, 0.5)


def verdict_more(rng: random.Random, zh: bool) -> Made:
    return _verdict(rng, zh, rng.choice((3, 3, 5, 10)), 8, 0.5)


def verdict(rng: random.Random, zh: bool) -> Made:
    return _verdict(rng, zh, 10, 8, 0.5)


def told(rng: random.Random, zh: bool) -> Made:
    """Colour and shape of one thing, each asked open and as yes or no, in any order: half of the
    answers can be had by comparing words, from which comparing with the picture is learned.
    """
    s = scenes.lone(rng, common=True)
    turns = [about_one(s, zh, key, rng)[1][0] for key in ("color", "shape")]
    turns += [scenes.ask_is(s, rng, zh, key, common=True) for key in ("color", "shape")]
    rng.shuffle(turns)
    return [s.image], _distinct(turns)


def copied(rng: random.Random, zh: bool) -> Made:
    return [], [texts.copied(rng, zh)]


def echo(rng: random.Random, zh: bool) -> Made:
    return [], lookups.echo(rng, zh)


def echo_few(rng: random.Random, zh: bool) -> Made:
    return [], lookups.echo(rng, zh, few=True)


def pairs(rng: random.Random, zh: bool) -> Made:
    return [], lookups.pairs(rng, zh)


def pairs_few(rng: random.Random, zh: bool) -> Made:
    return [], lookups.pairs(rng, zh, few=True)


def after(rng: random.Random, zh: bool) -> Made:
    return [], lookups.after(rng, zh)


def there(rng: random.Random, zh: bool) -> Made:
    return [], lookups.there(rng, zh)


def same(rng: random.Random, zh: bool) -> Made:
    return [], lookups.same(rng, zh)


def retold(rng: random.Random, zh: bool) -> Made:
    """A picture in words, and the questions that pictures are asked: what to do with a question is
    learned without looking.
    """
    s = scenes.scene(rng, least=1, most=3)
    turns = _distinct([rng.choice(_ASKED_OF_WORDS)(s, rng, zh) for _ in range(rng.randint(1, 3))])
    question, answer = turns[0]
    story = scenes.caption(s, zh)
    return [], [(f"{story}。{question}" if zh else f"{story}. {question}", answer), *turns[1:]]


_ASKED_OF_WORDS = (
    *(scenes.ask_exists, scenes.ask_exists, scenes.ask_has, scenes.ask_attribute, scenes.ask_total),
    *(scenes.ask_count, scenes.ask_relation, scenes.ask_list),
)


def single(rng: random.Random, zh: bool) -> Made:
    """One thing: named in full, or whether a colour and a shape are there together, and its
    place.
    """
    s = scenes.lone(rng)
    if s.things[0].size and rng.random() < 0.5:
        return [s.image], [scenes.ask_caption(s, rng, zh)]
    turns = [scenes.ask_exists(s, rng, zh), about_one(s, zh, "place", rng)[1][0]]
    rng.shuffle(turns)
    return [s.image], turns


def first(rng: random.Random, zh: bool) -> Made:
    """One word about one thing that fills the picture, in English: what a blind model learns to see
    from.
    """
    s = scenes.one(rng)
    thing = s.things[0]
    return [s.image], [rng.choice((("What colour is it?", thing.color), ("What shape is it?", thing.shape)))]


def word(rng: random.Random, zh: bool) -> Made:
    """`first` in both languages."""
    return about_one(scenes.one(rng), zh, rng.choice(("color", "shape")), rng)


ASKED = {
    "place": (("Where is it?", "In which part of the picture is it?"), ("它在哪里？", "它在图的什么位置？")),
    "color": (("What colour is it?", "What color is the shape?"), ("它是什么颜色？", "图形是什么颜色？")),
    "shape": (("What shape is it?", "Which shape is in the picture?"), ("它是什么形状？", "图里是什么形状？")),
    "size": (("Is it large or small?", "How large is it?"), ("它是大还是小？", "它有多大？")),
}


def about_one(s: scenes.Scene, zh: bool, skill: str, rng: random.Random | None = None) -> Made:
    """One word about the only thing of a scene; without `rng` in the first wording."""
    thing = s.things[0]
    said = {
        "place": PLACES[thing.place(s.side)][zh],
        "color": COLORS[thing.color][0] if zh else thing.color,
        "shape": SHAPES[thing.shape] if zh else thing.shape,
        "size": SIZES.get(thing.size, "") if zh else thing.size,
    }
    return [s.image], [(ASKED[skill][zh][rng.randrange(2) if rng else 0], said[skill])]


def _to_read(image: Image.Image, said: str, rng: random.Random, zh: bool) -> Made:
    """A picture that says one thing, and what it says."""
    return [image], [(rng.choice(printed.READ[zh]), said)]


def glyph(rng: random.Random, zh: bool) -> Made:
    """One letter or digit, or two."""
    words = "".join(rng.choice(string.ascii_uppercase + 2 * string.digits) for _ in range(rng.choice((1, 1, 2))))
    image = printed.line(words, rng, False, False, 56, 56, least=rng.choice((0.45, 0.7)))
    return _to_read(image, words, rng, zh)


def _several(s: scenes.Scene, rng: random.Random, zh: bool) -> list[tuple[str, str]]:
    """Everything in one answer, or short answers of which none tells another."""
    draw = rng.random()
    if draw < 0.45:
        return [(scenes.ask_caption if draw < 0.4 else scenes.ask_list)(s, rng, zh)]
    if draw < 0.68:
        if draw < 0.52:
            return [scenes.ask_has(s, rng, zh, key) for key in rng.sample(("color", "shape"), 2)]
        return _distinct([scenes.ask_exists(s, rng, zh) for _ in range(3)])
    if draw < 0.82:
        return _distinct([scenes.ask_relation(s, rng, zh, axes) for axes in rng.sample(("x", "y"), 2)])
    if draw < 0.95:
        return [scenes.ask_attribute(s, rng, zh), scenes.ask_total(s, rng, zh)]
    return [rng.choice(scenes.RARE)(s, rng, zh)]


def two(rng: random.Random, zh: bool) -> Made:
    s = scenes.scene(rng, least=2, most=2)
    return [s.image], _several(s, rng, zh)


def scene(rng: random.Random, zh: bool) -> Made:
    s = scenes.scene(rng, most=rng.choice((3, 4, 4, 5)))
    return [s.image], _several(s, rng, zh)


def named(rng: random.Random, zh: bool) -> Made:
    """How many things, then all of them by name; or the names alone."""
    s = scenes.scene(rng, most=rng.choice((2, 3, 4)))
    turns = [scenes.ask_total(s, rng, zh)] * (rng.random() < 0.4)
    return [s.image], [*turns, scenes.ask_caption(s, rng, zh)]


def traits(rng: random.Random, zh: bool) -> Made:
    """Colour, shape or place of one of several things, up to three times."""
    s = scenes.scene(rng, least=2, most=rng.choice((2, 3, 4)))
    return [s.image], _distinct([scenes.ask_attribute(s, rng, zh) for _ in range(3)])


def presence(rng: random.Random, zh: bool) -> Made:
    """Whether colours, shapes and both together are there, up to four times."""
    s = scenes.scene(rng, most=rng.choice((1, 2, 3)))
    asks = rng.choices((scenes.ask_exists, scenes.ask_has), k=4)
    return [s.image], _distinct([ask(s, rng, zh) for ask in asks])


def sides(rng: random.Random, zh: bool) -> Made:
    """Left or right, above or below, of two or three things."""
    s = scenes.scene(rng, least=2, most=rng.choice((2, 3)))
    return [s.image], _distinct([scenes.ask_relation(s, rng, zh, axes) for axes in rng.sample("xyxy", 3)])


def sides_one(rng: random.Random, zh: bool) -> Made:
    """Left or right, above or below, of a red and a blue circle: hardly a word to tell from
    another; a few as yes or no.
    """
    while True:
        s = scenes.scene(rng, least=2, most=2, few={"color": scenes.FEW["color"][:2], "shape": ["circle"]})
        question, answer = scenes.ask_relation(s, rng, zh, rng.choice("xyy"))
        related = any(w in question for w in ("left", "right", "above", "below", "边", "面吗", "面还"))
        if related and (answer not in ("yes", "no", "是", "否") or rng.random() < 0.25):
            return [s.image], [(question, answer)]


def sides_two(rng: random.Random, zh: bool) -> Made:
    """Left or right, above or below, of two things of two colours and two shapes."""
    s = scenes.scene(rng, least=2, most=2, few={"color": scenes.FEW["color"][:2], "shape": scenes.FEW["shape"][:2]})
    return [s.image], [scenes.ask_relation(s, rng, zh, rng.choice("xy"))]


def denied(rng: random.Random, zh: bool) -> Made:
    """Whether a colour or a shape is there, or whether it is not: of a few words, half and half."""
    few = {
        "color": scenes.FEW["color"][: rng.choice((2, 3, 10))],
        "shape": scenes.FEW["shape"][: rng.choice((2, 3, 8))],
    }
    s = scenes.lone(rng, few=few)
    return [s.image], [scenes.ask_has(s, rng, zh, negated=0.5, few=few)]


def sides_few(rng: random.Random, zh: bool) -> Made:
    """Left or right, above or below, of two things of few colours and shapes."""
    s = scenes.scene(rng, least=2, most=2, few={"color": scenes.FEW["color"][:3], "shape": scenes.FEW["shape"][:3]})
    return [s.image], _distinct([scenes.ask_relation(s, rng, zh, axes) for axes in rng.sample("xy", 2)])


def presence_few(rng: random.Random, zh: bool) -> Made:
    """Whether a colour, a shape or both together are there, of few."""
    few = {"color": scenes.FEW["color"][:4], "shape": scenes.FEW["shape"][:4]}
    s = scenes.scene(rng, most=rng.choice((1, 2, 2)), few=few)
    return [s.image], _distinct([scenes.ask_few(s, rng, zh, few) for _ in range(2)])


def dots(rng: random.Random, zh: bool) -> Made:
    """Up to five, to be counted, and one fact about them."""
    s = scenes.crowd(rng, most=5)
    total = scenes.ask_total(s, rng, zh)
    return [s.image], [total, scenes.ask_has(s, rng, zh)] if rng.random() < 0.5 else [total]


def many(rng: random.Random, zh: bool) -> Made:
    """Up to nine: counted in all, aloud, by colour and shape."""
    s = scenes.crowd(rng)
    if rng.random() < 0.12:
        return [s.image], [scenes.ask_think(s, rng, zh)]
    counts = [scenes.ask_total(s, rng, zh)] + [scenes.ask_count(s, rng, zh) for _ in range(rng.randint(0, 2))]
    return [s.image], _distinct(counts)


def letter(rng: random.Random, zh: bool) -> Made:
    """One large letter or digit."""
    drawn = rng.random()
    alphabet = string.ascii_lowercase if drawn < 0.25 else string.digits if drawn < 0.45 else string.ascii_uppercase
    said = rng.choice(alphabet)
    return _to_read(printed.line(said, rng, False, False, 56, 56, least=0.6), said, rng, zh)


def strings(rng: random.Random, zh: bool) -> Made:
    """Up to five letters or digits in a row that mean nothing, so that each has to be seen."""
    return _to_read(*printed.row(rng, 5), rng, zh)


def twos(rng: random.Random, zh: bool) -> Made:
    """Two digits or letters, sometimes three: what comes second is learned from these first."""
    return _to_read(*printed.row(rng, rng.choice((2, 2, 3)), digits=0.6), rng, zh)


def few(rng: random.Random, zh: bool) -> Made:
    """Up to three large capitals and digits."""
    return _to_read(*printed.few(rng, 3), rng, zh)


def text(rng: random.Random, zh: bool) -> Made:
    image, words, _ = printed.text(rng)
    return [image], printed.ask_text(words, rng, zh)


def digit(rng: random.Random, zh: bool) -> Made:
    image, said = printed.digit(rng)
    return [image], [(printed.ask_digit(rng, zh), said)]


def chinese(rng: random.Random, zh: bool) -> Made:
    """A Chinese word, the characters large."""
    return _to_read(*printed.chinese(rng), rng, zh)


def receipt(rng: random.Random, zh: bool) -> Made:
    image, rows = printed.receipt(rng)
    return [image], printed.ask_receipt(rows, rng, zh)


def chart(rng: random.Random, zh: bool) -> Made:
    c = plots.chart(rng)
    if rng.random() < 0.5:
        return [c.image], [plots.ask_table(c, rng, zh)]
    return [c.image], _distinct([plots.ask_short(c, rng, zh) for _ in range(rng.randint(1, 3))])


def pair(rng: random.Random, zh: bool) -> Made:
    images, turns = clips.pictures(rng, zh)
    return list(images), turns


def clip(rng: random.Random, zh: bool) -> Made:
    frames, turns = clips.clip(rng, zh)
    return [frames], turns


def sheet(rng: random.Random, zh: bool) -> Made:
    """Questions without a picture that have nothing to do with each other: two or three, each
    with what belongs to it.
    """
    turns = [turn for _ in range(rng.randint(2, 3)) for turn in texts.turns(rng, zh)]
    return [], _distinct(turns)


def words(rng: random.Random, zh: bool) -> Made:
    return [], texts.turns(rng, zh)


def customers(rng: random.Random, zh: bool) -> Made:
    """What four customers write, and of which kind each message is."""
    return [], _distinct([shop.kind_of(rng, zh) for _ in range(4)])


def small_sums(rng: random.Random, zh: bool) -> Made:
    """Sums and orders of numbers that get longer: five of them a row."""
    most = rng.choice((9, 19, 60))
    return [], _distinct([rng.choice((texts.sums, texts.order))(rng, zh, most) for _ in range(5)])


KINDS: dict[str, Callable[[random.Random, bool], Made]] = {
    made.__name__: made
    for made in (
        *(first, word, yes, told, copied, retold, plain, facts, single, two, scene, dots, many),
        *(
            verdict_english,
            verdict_shapes,
            verdict_colors,
            verdict_more,
            verdict,
            denied,
            sides_one,
            sides_two,
            sides_few,
            presence_few,
        ),
        *(named, traits, presence, sides),
        *(echo, echo_few, pairs, pairs_few, after, there, same),
        *(
            letter,
            twos,
            strings,
            glyph,
            few,
            digit,
            text,
            chinese,
            receipt,
            chart,
            pair,
            clip,
            words,
            small_sums,
            customers,
            sheet,
        ),
    )
}


def held_out(rng: random.Random, zh: bool, skill: str) -> Made:
    """One question of a skill about a picture of the held-out kind."""
    if skill in ("text", "digit"):
        image, said = printed.text(rng, held_out=True)[:2] if skill == "text" else printed.digit(rng, held_out=True)
        return [image], [(rng.choice(printed.READ[zh]), said)]
    if skill in ("chart", "table"):
        c = plots.chart(rng, held_out=True)
        turn = plots.ask_table(c, rng, zh) if skill == "table" else plots.ask_short(c, rng, zh)
        return [c.image], [turn]
    if skill == "receipt":
        image, rows = printed.receipt(rng, held_out=True)
        return [image], [printed.ask_receipt(rows, rng, zh)[0]]
    if skill == "words":
        return [], texts.turns(rng, zh)[:1]
    if skill in ("color", "shape", "place"):
        return about_one(scenes.lone(rng, held_out=True), zh, skill)
    if skill == "count":
        s = scenes.crowd(rng, held_out=True)
        return [s.image], [("一共有几个图形？" if zh else "How many shapes are there?", str(len(s.things)))]
    if skill == "yesno":
        s = scenes.lone(rng, held_out=True)
        key = rng.choice(("color", "shape", "place", "size", "both"))
        if key == "both" or (key == "size" and not s.things[0].size):
            return [s.image], [scenes.ask_exists(s, rng, zh)]
        return [s.image], [scenes.ask_is(s, rng, zh, key, 0.3)]
    s = scenes.scene(rng, held_out=True, least=1 + (skill == "relation"))
    ask = {
        "caption": scenes.ask_caption,
        "exists": scenes.ask_exists,
        "attribute": scenes.ask_attribute,
        "relation": scenes.ask_relation,
        "box": scenes.ask_box,
    }[skill]
    turn = ask(s, rng, zh)
    return [s.image], [turn]


SKILLS = (
    "color",
    "shape",
    "place",
    "caption",
    "text",
    "count",
    "yesno",
    "exists",
    "chart",
    "table",
    "attribute",
    "relation",
    "digit",
    "receipt",
    "words",
)


def held_out_questions(examples: Path) -> frozenset[str]:
    """What the held-out parts of the other examples ask without a picture: no row repeats one."""
    found: set[str] = set()
    for path in sorted(examples.glob("*/eval*")):
        content = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            found |= {row["text"] for row in csv.DictReader(io.StringIO(content))}
            continue
        for row in (
            [json.loads(line) for line in content.splitlines()] if path.suffix == ".jsonl" else json.loads(content)
        ):
            turns = [m["content"] for m in row.get("messages", ()) if m["role"] == "user"]
            turns += [m["value"] for m in row.get("conversations", ()) if m["from"] == "human"]
            found |= {t for t in [*turns, row.get("input", "")] if t and "<image>" not in t}
    return frozenset(found)


def row_of(made: Made, name: str, folder: Path) -> dict[str, object]:
    """The row; its pictures are written to `folder`."""
    media, turns = made
    images, videos = [], []
    for k, item in enumerate(media):
        if isinstance(item, list):
            item[0].save(folder / f"{name}_{k}.gif", save_all=True, append_images=item[1:], duration=500, loop=0)
            videos.append(f"{folder.name}/{name}_{k}.gif")
        else:
            item.save(folder / f"{name}_{k}.png")
            images.append(f"{folder.name}/{name}_{k}.png")
    tags = "<image>" * len(images) + "<video>" * len(videos)
    messages = []
    for i, (question, answer) in enumerate(turns):
        messages += [
            {"role": "user", "content": (tags if i == 0 else "") + question},
            {"role": "assistant", "content": answer},
        ]
    row: dict[str, object] = {"messages": messages}
    if images:
        row["images"] = images
    if videos:
        row["videos"] = videos
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", default="train", help="eval, eval_grey, or a name for a part of train")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--grey", action="store_true", help="grey pictures: what is answered without looking")
    parser.add_argument("--mix", choices=sorted(MIXES), default="wide")
    o = parser.parse_args()
    rng = random.Random(f"{o.part.removesuffix('_grey')} {o.seed}")
    folder = o.out / f"{o.part}_media"
    folder.mkdir(parents=True, exist_ok=True)
    mix, forbidden = MIXES[o.mix], held_out_questions(Path(__file__).resolve().parent.parent)
    with (o.out / f"{o.part}.jsonl").open("w", encoding="utf-8") as file:
        for i in range(o.rows):
            zh = rng.random() < 0.5
            if o.part.startswith("eval"):
                skill = SKILLS[i % len(SKILLS)]
                media, turns = held_out(rng, zh, skill)
                if o.grey:
                    media = [Image.new("L", m.size, 128) for m in media if isinstance(m, Image.Image)]
                row = row_of((media, turns), f"{i:06d}", folder) | {"task": skill}
            else:
                kind = rng.choices(list(mix), list(mix.values()))[0]
                made = KINDS[kind](rng, zh)
                while any(question in forbidden for question, _ in made[1]):
                    made = KINDS[kind](rng, zh)
                row = row_of(made, f"{i:06d}", folder)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

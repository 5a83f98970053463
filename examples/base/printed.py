"""Draws printed text (digits, letters, words, Chinese phrases, receipts, tables) and asks for it.
Knows pillow, fonts and words.

Fonts are those of Debian's fonts-dejavu, fonts-liberation and fonts-noto-cjk, needed for making
only, and pillow's own bitmap font.
`held_out` pictures use fonts that no other picture has. Nothing here is handwritten.
"""

from __future__ import annotations

import json
import math
import random
import string
from functools import lru_cache
from pathlib import Path

import strokes
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from words import CHINESE, ENGLISH, LEXICON

Turn = tuple[str, str]
ROOT = Path("/usr/share/fonts")
HELD_OUT_FONTS = (
    "DejaVuSerif-Bold.ttf",
    "LiberationMono-Regular.ttf",
    "LiberationSans-Italic.ttf",
    "NotoSerifCJK-Bold.ttc",
)
_SKIPPED = ("Math", "ExtraLight")
BITMAP = "pillow"


@lru_cache
def fonts(chinese: bool, held_out: bool) -> tuple[str, ...]:
    """Paths of the fonts, sorted. Raises FileNotFoundError where a family is not installed."""
    found = sorted(
        p for end in ("ttf", "ttc") for p in ROOT.rglob(f"*.{end}") if not any(s in p.name for s in _SKIPPED)
    )
    kept = [str(p) for p in found if ("CJK" in p.name) == chinese and (p.name in HELD_OUT_FONTS) == held_out]
    if not kept:
        raise FileNotFoundError("fonts must be installed: apt-get install fonts-dejavu fonts-liberation fonts-noto-cjk")
    return tuple(kept)


@lru_cache(maxsize=512)
def font(path: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default_imagefont() if path == BITMAP else ImageFont.truetype(path, size)


def colors(rng: random.Random) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Paper and ink, far apart; one in three is light on dark."""
    if rng.random() < 0.5:
        light, dark = (rng.randint(225, 255),) * 3, (rng.randint(0, 60),) * 3
    else:
        light = (rng.randint(200, 255), rng.randint(200, 255), rng.randint(200, 255))
        dark = (rng.randint(0, 130), rng.randint(0, 80), rng.randint(0, 130))
    return (dark, light) if rng.random() < 0.3 else (light, dark)


def _draw_at(words: str, path: str, size: int, paper: tuple[int, int, int], ink: tuple[int, int, int]) -> Image.Image:
    """Just the ink, cut to its extent."""
    face = font(path, size)
    left, top, right, bottom = face.getbbox(words)
    image = Image.new("RGB", (max(1, int(right - left)), max(1, int(bottom - top))), paper)
    ImageDraw.Draw(image).text((-left, -top), words, font=face, fill=ink)
    return image


def line(
    words: str, rng: random.Random, chinese: bool, held_out: bool, height: int, width: int, least: float = 0.45
) -> Image.Image:
    """`words` on one line, anywhere in a picture of this size; smaller where they do not fit."""
    paper, ink = colors(rng)
    path = rng.choice(fonts(chinese, held_out))
    size = rng.randint(int(height * least), int(height * (least + 0.4)))
    ink_image = _draw_at(words, path, size, paper, ink)
    while size > 9 and (ink_image.width > width - 4 or ink_image.height > height - 2):
        size -= 2
        ink_image = _draw_at(words, path, size, paper, ink)
    image = Image.new("RGB", (width, height), paper)
    image.paste(
        ink_image,
        (rng.randint(1, max(1, width - ink_image.width - 2)), rng.randint(0, max(0, height - ink_image.height - 1))),
    )
    return image


READ = (
    ("Read the text.", "What is written?", "Which text is in the picture?", "Transcribe."),
    ("读出文字。", "写的是什么？", "图里有什么字？", "转写图中文字。"),
)
READ_DIGIT = (
    (
        *(
            "Which digit is it?",
            "What number is this?",
            "Read the digit.",
            "Name the digit.",
            "Which number do you see?",
        ),
        *("What digit is shown?", "Tell me the digit.", "Read this number.", "Digit?", "What does the picture show?"),
    ),
    (
        *("这是哪个数字？", "图中是几？", "读出数字。", "写出这个数字。", "你看到的数字是多少？"),
        *("数字是几？", "这个数是多少？", "认出图中的数字。", "图片里是哪个数？", "几？"),
    ),
)


_ALONE = (
    (" Answer with one digit.", " One digit, nothing else.", " Reply with the digit alone.", " Digit only, please."),
    ("只写数字。", "用一个数字回答。", "只需回答一个数字。", "答案只要一个阿拉伯数字。"),
)


def ask_digit(rng: random.Random, zh: bool) -> str:
    """One of many wordings, half of them with how to answer."""
    asked = rng.choice(READ_DIGIT[zh] + READ_DIGIT[zh] + READ[zh])
    return asked + (rng.choice(_ALONE[zh]) if rng.random() < 0.5 else "")


def _letters(rng: random.Random, least: int, most: int, alphabet: str) -> str:
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(least, most)))


def words_of(rng: random.Random) -> tuple[str, bool]:
    """What to print, and whether it is Chinese."""
    draw = rng.random()
    if draw < 0.25:
        return _letters(rng, 1, 6, string.digits), False
    if draw < 0.43:
        return _letters(rng, 1, 4, string.ascii_uppercase), False
    if draw < 0.49:
        return _letters(rng, 2, 5, string.ascii_uppercase + string.digits), False
    if draw < 0.54:
        return f"{rng.randint(0, 99)}.{rng.randint(0, 9)}" + rng.choice(("", "%")), False
    if draw < 0.84:
        word = rng.choice(ENGLISH) if rng.random() < 0.5 else rng.choice(LEXICON)[0]
        return rng.choice((word, word, word.capitalize(), word.upper())), False
    return (rng.choice(CHINESE) if rng.random() < 0.5 else rng.choice(LEXICON)[1]), True


def few(rng: random.Random, most: int) -> tuple[Image.Image, str]:
    """A picture that one to `most` large capitals or digits fill: a square where there is one."""
    n = rng.randint(1, most)
    words = _letters(rng, n, n, string.digits if rng.random() < 0.3 else string.ascii_uppercase + string.digits)
    return line(words, rng, False, False, 56, 28 * max(2, n), least=rng.choice((0.55, 0.7))), words


def row(rng: random.Random, most: int, digits: float = 0.3) -> tuple[Image.Image, str]:
    """Two to `most` letters or digits of one kind, that mean nothing, and the picture they fill."""
    drawn = rng.random()
    alphabet = (
        string.digits
        if drawn < digits
        else string.ascii_uppercase
        if drawn < 0.5 + digits / 2
        else string.ascii_lowercase
    )
    words = _letters(rng, 2, most, alphabet)
    if drawn > 0.9:
        words = words.capitalize()
    height = rng.choice((28, 56, 56, 56))
    width = min(168, max(height, 28 * math.ceil(len(words) * rng.uniform(0.55, 0.8) * height / 28)))
    return line(words, rng, False, False, height, width, least=0.55), words


def chinese(rng: random.Random) -> tuple[Image.Image, str]:
    """A word of few characters that fills its picture."""
    said = rng.choice(CHINESE) if rng.random() < 0.5 else rng.choice(LEXICON)[1]
    return line(said, rng, True, False, 56, max(56, min(168, 56 * len(said))), least=0.6), said


def text(rng: random.Random, held_out: bool = False) -> tuple[Image.Image, str, bool]:
    """A picture of one line, what it says, whether that is Chinese."""
    words, chinese = words_of(rng)
    height = rng.choice((28, 56, 56, 56))
    width = min(140, max(height, 28 * math.ceil(len(words) * (1.0 if chinese else 0.6) * height * 0.75 / 28)))
    return line(words, rng, chinese, held_out, height, width), words, chinese


def ask_text(words: str, rng: random.Random, zh: bool) -> list[Turn]:
    turns = [(rng.choice(READ[zh]), words)]
    if len(words) > 1 and rng.random() < 0.25:
        kind = rng.random()
        if kind < 0.4:
            turns.append(("第一个字符是什么？" if zh else "What is the first character?", words[0]))
        elif kind < 0.7:
            turns.append(("最后一个字符是什么？" if zh else "What is the last character?", words[-1]))
        else:
            turns.append(("有几个字符？" if zh else "How many characters are there?", str(len(words))))
        rng.shuffle(turns)
    return turns


def _bent(board: Image.Image, rng: random.Random, reach: float) -> Image.Image:
    """Its sixteen tiles pulled out of shape, each corner by up to `reach` pixels."""
    step = board.width // 4
    corner = {
        (i, j): (j * step + rng.uniform(-reach, reach), i * step + rng.uniform(-reach, reach))
        for i in range(5)
        for j in range(5)
    }
    tiles = []
    for i in range(4):
        for j in range(4):
            around = [corner[i, j], corner[i + 1, j], corner[i + 1, j + 1], corner[i, j + 1]]
            box = (j * step, i * step, (j + 1) * step, (i + 1) * step)
            tiles.append((box, tuple(v for point in around for v in point)))
    return board.transform(board.size, Image.Transform.MESH, tiles, Image.Resampling.BILINEAR)


def digit(rng: random.Random, held_out: bool = False) -> tuple[Image.Image, str]:
    """One digit, printed in a font and bent, or drawn in strokes; coarse: as little as 8 x 8
    pixels. Held-out ones are printed.
    """
    said = rng.choice(string.digits)
    stroked = not held_out and rng.random() < 0.6
    board = _bent(strokes.digit(said, rng), rng, rng.uniform(0, 3)) if stroked else _printed_digit(said, rng, held_out)
    small = 8 if stroked and rng.random() < 0.8 else rng.choice((8, 8, 8, 10, 12, 16))
    board = board.resize((small, small), Image.Resampling.BOX)
    gain = rng.uniform(0.85, 1.25)
    board = board.point(lambda v: min(255, int(v * gain)))
    if rng.random() < (0.1 if stroked else 0.3):
        board = board.point(lambda v: 255 - v)
    return board.convert("L"), said


def _printed_digit(said: str, rng: random.Random, held_out: bool) -> Image.Image:
    """Light on black, slanted, stretched and bent."""
    ink = _draw_at(said, rng.choice(fonts(False, held_out)), 48, (0, 0, 0), (255, 255, 255))
    if rng.random() < 0.5:  # round strokes of another weight
        ink = ink.filter(ImageFilter.MinFilter(3) if rng.random() < 0.4 else ImageFilter.MaxFilter(3))
    side = 64
    board = Image.new("RGB", (side, side))
    w, h = max(8, round(ink.width * rng.uniform(0.75, 1.6))), round(ink.height * rng.uniform(0.9, 1.5))
    w, h = min(w, side), min(h, side)
    board.paste(ink.resize((w, h)), ((side - w) // 2 + rng.randint(-2, 2), (side - h) // 2 + rng.randint(-1, 1)))
    slant, bend, turn = rng.gauss(0, 0.18), rng.gauss(0, 0.12), rng.gauss(0, 0.12)
    c = side / 2
    board = board.transform(
        (side, side),
        Image.Transform.AFFINE,
        (1, slant + turn, -c * (slant + turn), bend - turn, 1, -c * (bend - turn)),
        Image.Resampling.BILINEAR,
    )
    return _bent(board, rng, rng.uniform(0, 6))


def receipt(rng: random.Random, held_out: bool = False) -> tuple[Image.Image, list[tuple[str, int]]]:
    """Two or three things with prices, and their total in the last line."""
    goods = rng.sample(
        [e for e in LEXICON if e[2][0] in ("food", "fruit", "drink", "tool") and len(e[0]) <= 6], rng.randint(2, 3)
    )
    rows = [(g[0], rng.randint(1, 40)) for g in goods]
    shown = [*rows, ("total", sum(p for _, p in rows))]
    return _table(shown, rng, held_out), shown


def _table(rows: list[tuple[str, int]], rng: random.Random, held_out: bool) -> Image.Image:
    step = rng.choice((19, 21)) if len(rows) > 3 else rng.choice((21, 28))
    width, height = 112, 28 * math.ceil(step * len(rows) / 28)
    paper, ink = colors(rng)
    image = Image.new("RGB", (width, height), paper)
    pen = ImageDraw.Draw(image)
    face = font(rng.choice(fonts(False, held_out)), rng.randint(12, 14))
    for i, (name, number) in enumerate(rows):
        pen.text((4, i * step + 2), name, font=face, fill=ink)
        pen.text((width - 4, i * step + 2), str(number), font=face, fill=ink, anchor="ra")
    if rng.random() < 0.3:
        pen.line([(2, height - 2), (width - 2, height - 2)], ink)
    return image


def ask_receipt(rows: list[tuple[str, int]], rng: random.Random, zh: bool) -> list[Turn]:
    full = ("转写小票。" if zh else "Transcribe the receipt."), "\n".join(f"{n} {p}" for n, p in rows)
    name, price = rng.choice(rows[:-1])
    asked = rng.choice(
        (
            ("总计是多少？" if zh else "What is the total?", str(rows[-1][1])),
            (f"{name} 多少钱？" if zh else f"How much is {name}?", str(price)),
            ("用 JSON 写出。" if zh else "Write it as JSON.", json.dumps(dict(rows))),
        )
    )
    turns = [full, asked] if rng.random() < 0.6 else [asked]
    if rng.random() < 0.5:
        turns.reverse()
    return turns

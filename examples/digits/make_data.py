"""Rewrites this folder's digits from scikit-learn's copy of the UCI set. Knows files and questions,
nothing of models or training.

Usage: pip install scikit-learn pillow && python examples/digits/make_data.py
The PNGs are written uncompressed (level 0), so they come out byte for byte the same whatever zlib
Pillow was built with.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

EVAL_ROWS = (
    # the last ones in the published order, which goes writer by writer: most eval writers are new
    # to the model
    297
)
INK_LEVELS = 16  # a published pixel counts the inked dots of a 4x4 block: 0 to 16
QUESTIONS = (
    "图中手写的数字是几？",
    "这是哪个数字？只回答数字。",
    "请认出图片里的手写数字。",
    "图上写的是几？",
    "识别这个手写数字，只写一个阿拉伯数字。",
    "Which digit is written here?",
    "What number does the picture show? Answer with the digit only.",
    "Read the handwritten digit.",
    "Which of the digits 0 to 9 is this?",
    "Recognise the digit in this image and reply with it alone.",
)


def picture(ink_88: Sequence[Sequence[float]]) -> Image.Image:
    """8x8 counts of 0..16 -> 8x8 grey picture, light ink on black, as the set is usually shown."""
    grey = bytes(int(count) * 255 // INK_LEVELS for row in ink_88 for count in row)
    return Image.frombytes("L", (len(ink_88[0]), len(ink_88)), grey)


def preview(pictures: Sequence[Image.Image], columns: int = 20, zoom: int = 4) -> Image.Image:
    """A sheet of enlarged digits for people; no row refers to it."""
    cell = pictures[0].width * zoom + 4
    sheet = Image.new("L", (columns * cell, -(-len(pictures) // columns) * cell), 64)
    for i, digit in enumerate(pictures):
        enlarged = digit.resize((cell - 4, cell - 4), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (i % columns * cell + 2, i // columns * cell + 2))
    return sheet


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )
    os.replace(partial, path)


def make(
    out: Path, ink_N88: Sequence[Sequence[Sequence[float]]], digit_N: Sequence[int], eval_rows: int = EVAL_ROWS
) -> None:
    """Writes images/, preview.png, train.jsonl and eval.jsonl under `out`. The question is drawn at
    random: the published order runs 0, 1, 2, ..., so a question that followed the row number would
    give its digit away.
    """
    (out / "images").mkdir(parents=True, exist_ok=True)
    rng, rows, pictures = random.Random(0), [], [picture(ink_88) for ink_88 in ink_N88]
    for i, (image, digit) in enumerate(zip(pictures, digit_N, strict=True)):
        name = f"images/{i:04d}.png"
        image.save(out / name, compress_level=0)
        question = {"role": "user", "content": "<image>" + rng.choice(QUESTIONS)}
        rows.append({"messages": [question, {"role": "assistant", "content": str(digit)}], "images": [name]})
    preview(pictures[-100:]).save(out / "preview.png")
    write_rows(out / "train.jsonl", rows[:-eval_rows])
    write_rows(out / "eval.jsonl", rows[-eval_rows:])


if __name__ == "__main__":
    from sklearn.datasets import load_digits  # type: ignore[import-not-found, unused-ignore]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    digits = load_digits()
    make(parser.parse_args().out, digits.images.tolist(), digits.target.tolist())

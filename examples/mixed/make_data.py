"""Rows of different shape in one file: text only, two or three pictures, a short clip. Knows
pillow, nothing of models or training.

Usage: python examples/mixed/make_data.py --seed 0 --train 96 --eval 24
Picture and clip rows carry what is true of them as `scene.objects`: shape, colour, box (of the
first frame), and picture number or motion.
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

Row = dict[str, Any]
Media = dict[str, list[Image.Image]]  # file name -> its frames, one for a picture

SIDE = 56  # pixels, the smallest picture the model takes without enlarging it
FRAMES, FRAME_MS, STEP = 8, 120, 3
COLORS = {
    "red": ((214, 39, 40), "红色"),
    "green": ((44, 160, 44), "绿色"),
    "blue": ((31, 90, 220), "蓝色"),
    "orange": ((255, 152, 0), "橙色"),
}
SHAPES = {"circle": "圆形", "square": "正方形", "triangle": "三角形"}
MOTIONS = {"left": ((-1, 0), "左"), "right": ((1, 0), "右"), "up": ((0, -1), "上"), "down": ((0, 1), "下")}


def draw(shape: str, color: str, x: int, y: int, radius: int) -> Image.Image:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    pen, box, paint = ImageDraw.Draw(image), (x - radius, y - radius, x + radius, y + radius), COLORS[color][0]
    if shape == "circle":
        pen.ellipse(box, paint)
    elif shape == "square":
        pen.rectangle(box, paint)
    else:
        pen.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], paint)
    return image.quantize(4)


def bounds(x: int, y: int, radius: int) -> list[int]:
    """[left, top, right, bottom) of what `draw` paints."""
    return [x - radius, y - radius, x + radius + 1, y + radius + 1]


def text_row(rng: random.Random, stem: str) -> tuple[Row, Media]:
    a, b = rng.randrange(2, 50), rng.randrange(2, 50)
    question = rng.choice(("{a} 加 {b} 等于多少？", "What is {a} plus {b}?")).format(a=a, b=b)
    return conversation(question, str(a + b)), {}


def pictures_row(rng: random.Random, stem: str) -> tuple[Row, Media]:
    """Which picture shows the colour or shape that only one of them has."""
    key, words = rng.choice((("shape", list(SHAPES)), ("color", list(COLORS))))
    other_key, other_words = ("color", list(COLORS)) if key == "shape" else ("shape", list(SHAPES))
    count = rng.randint(2, 3)
    wanted, named = rng.randrange(count), rng.choice(words)
    objects, media = [], {}
    for i in range(count):
        value = named if i == wanted else rng.choice([word for word in words if word != named])
        look = {key: value, other_key: rng.choice(other_words)}
        radius = rng.randint(10, 18)
        x, y = (rng.randint(radius + 2, SIDE - radius - 3) for _ in range(2))
        media[f"media/{stem}_{i + 1}.png"] = [draw(look["shape"], look["color"], x, y, radius)]
        objects.append(look | {"image": i + 1, "box": bounds(x, y, radius)})
    if rng.random() < 0.5:
        sought = SHAPES[named] if key == "shape" else COLORS[named][1] + "的图形"
        question = "".join(f"图{i + 1}：<image>" for i in range(count)) + f"哪张图里有{sought}？只回答编号。"
    else:
        sought = named if key == "shape" else f"{named} shape"
        question = "<image>" * count + f"In which picture is the {sought}? Answer with its number."
    return conversation(question, str(wanted + 1), images=list(media), objects=objects), media


def clip_row(rng: random.Random, stem: str) -> tuple[Row, Media]:
    """Which way a shape moves. The middle of its path is drawn at random, so where it stands in one
    frame says little.
    """
    shape, color, motion = rng.choice(list(SHAPES)), rng.choice(list(COLORS)), rng.choice(list(MOTIONS))
    (dx, dy), chinese = MOTIONS[motion]
    middle_x, middle_y, radius = rng.randint(19, SIDE - 20), rng.randint(19, SIDE - 20), 7
    path = [
        (middle_x + dx * step, middle_y + dy * step) for step in range(-STEP * FRAMES // 2, STEP * FRAMES // 2, STEP)
    ]
    video = f"media/{stem}.gif"
    media = {video: [draw(shape, color, x, y, radius) for x, y in path]}
    if rng.random() < 0.5:
        question, answer = f"<video>{SHAPES[shape]}往哪个方向移动？回答上、下、左或右。", chinese
    else:
        question, answer = f"<video>Which way does the {shape} move: up, down, left or right?", motion
    seen = {"shape": shape, "color": color, "motion": motion, "box": bounds(*path[0], radius)}
    return conversation(question, answer, videos=[video], objects=[seen]), media


def conversation(question: str, answer: str, objects: list[Row] | None = None, **media: list[str]) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | media | ({"scene": {"objects": objects}} if objects else {})


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )
    os.replace(partial, path)


def save(path: Path, frames: list[Image.Image]) -> None:
    if path.suffix == ".gif":
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0)
    else:
        frames[0].save(path, optimize=True)


def make(out: Path, seed: int, train: int, evaluation: int) -> None:
    """Writes media/, train.jsonl and eval.jsonl under `out`, the three kinds in turn. No question
    is asked twice of the same scene.
    """
    (out / "media").mkdir(parents=True, exist_ok=True)
    kinds, seen = (text_row, pictures_row, clip_row), set()
    # eval first: it stays the same however long train is
    for split, count in (("eval", evaluation), ("train", train)):
        rng = random.Random(f"{seed}/{split}")
        rows: list[Row] = []
        while len(rows) < count:
            row, media = kinds[len(rows) % 3](rng, f"{split}_{len(rows):03d}")
            if (key := json.dumps([row["messages"][0], row.get("scene")])) in seen:
                continue
            seen.add(key)
            rows.append(row)
            for name, frames in media.items():
                save(out / name, frames)
        write_rows(out / f"{split}.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=96, help="rows")
    parser.add_argument("--eval", type=int, default=24, help="rows")
    args = parser.parse_args()
    make(args.out, args.seed, args.train, args.eval)

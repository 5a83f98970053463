"""Three small text tasks in the {task, input, output} form. Knows arithmetic, nothing of models or
training.

Usage: python examples/multitask/make_data.py --seed 0 --train 300 --eval 60
"""

from __future__ import annotations

import argparse
import json
import os
import random
from collections.abc import Callable, Iterable
from pathlib import Path

ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
HAN = "零一二三四五六七八九"


def english(number: int) -> str:
    """0..999 in words, British style: 342 -> three hundred and forty-two."""
    if number >= 100:
        rest = f" and {english(number % 100)}" if number % 100 else ""
        return f"{ONES.split()[number // 100]} hundred{rest}"
    if number < 20:
        return ONES.split()[number]
    return TENS.split()[number // 10 - 2] + (f"-{ONES.split()[number % 10]}" if number % 10 else "")


def chinese(number: int) -> str:
    """0..999 in characters: 10 -> 十， 305 -> 三百零五， 310 -> 三百一十."""
    hundreds, tens, ones = number // 100, number // 10 % 10, number % 10
    head = f"{HAN[hundreds]}百" if hundreds else ""
    ten = f"{HAN[tens] if hundreds or tens > 1 else ''}十" if tens else ("零" if hundreds and ones else "")
    return head + ten + (HAN[ones] if ones or not number else "")


def translate(rng: random.Random) -> tuple[str, str]:
    number = rng.randrange(1000)
    return f"把数字译成英文：{chinese(number)}", english(number)


def order(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(100), rng.randint(3, 6))
    prompt, descending = rng.choice(
        (("从小到大排列：", False), ("从大到小排列：", True), ("Sort ascending: ", False), ("Sort descending: ", True))
    )
    return prompt + " ".join(map(str, numbers)), " ".join(map(str, sorted(numbers, reverse=descending)))


def count(rng: random.Random) -> tuple[str, str]:
    word = "".join(rng.choice("bdgklmnprst") + rng.choice("aio") for _ in range(rng.randint(3, 8)))
    letter = rng.choice("aio")  # may be absent: answers spread from 0 upwards
    prompt = rng.choice(("{word} 里有几个字母 {letter}？", "How many times does {letter} occur in {word}?"))
    return prompt.format(word=word, letter=letter), str(word.count(letter))


TASKS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "translate_number": translate,
    "sort_numbers": order,
    "count_letter": count,
}


MOST_ROWS = 1000 * len(TASKS)  # `translate` knows a thousand inputs


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )
    os.replace(partial, path)


def make(out: Path, seed: int, train: int, evaluation: int) -> None:
    """Writes train.jsonl and eval.jsonl under `out`, the tasks in turn. No input occurs twice, in
    either file. Raises ValueError for more rows than there are numbers to translate.
    """
    if train + evaluation > MOST_ROWS:
        raise ValueError(
            f"--train + --eval ({train + evaluation}) must not exceed {MOST_ROWS}: no input may occur twice; lower one"
        )
    out.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, rows_wanted in (
        ("eval", evaluation),
        ("train", train),
    ):  # eval first: it stays the same however long train is
        rng = random.Random(f"{seed}/{split}")
        rows: list[dict[str, str]] = []
        while len(rows) < rows_wanted:
            task = list(TASKS)[len(rows) % len(TASKS)]
            text, answer = TASKS[task](rng)
            if text not in seen:
                seen.add(text)
                rows.append({"task": task, "input": text, "output": answer})
        write_rows(out / f"{split}.jsonl", rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=300, help="rows")
    parser.add_argument("--eval", type=int, default=60, help="rows")
    args = parser.parse_args()
    make(args.out, args.seed, args.train, args.eval)

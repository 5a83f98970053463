"""Rewrites this folder's rows from examples/digits: demonstrations in two styles, and judgements of
answers about the same pictures. Knows files only.

Usage: python examples/preferences/make_data.py [--validation output/preferences_validation [--fold
4]] With --validation a fifth of the pictures of training, 300 in a row, takes the place of the
held-out ones: for choosing settings, which the rows that are reported must not.
A judge who likes answers that are right, and among the right ones the short ones, has compared,
ranked, rated or labelled them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "digits"
FOLDS = 5
# share of the demonstrations that answer in a sentence: a model that follows them has no taste of
# its own
WORDY = 0.6
HAN = re.compile("[\u4e00-\u9fff]")

Row = dict[str, Any]


def answer(question: str, digit: int, wordy: bool) -> str:
    """A digit alone, or in a sentence of the question's language."""
    if not wordy:
        return str(digit)
    return f"图中的数字是{digit}。" if HAN.search(question) else f"The digit in the picture is {digit}."


class Judge:
    """One digit and its question; draws answers to it and judges them."""

    def __init__(self, row: Row, rng: random.Random, digits: str) -> None:
        self.rng, self.question, self.digit = rng, row["messages"][0]["content"], int(row["messages"][1]["content"])
        self.base = {"messages": row["messages"][:1], "images": [f"{digits}/{name}" for name in row["images"]]}

    def wrong(self) -> int:
        return (self.digit + self.rng.randint(1, 9)) % 10

    def says(self, digit: int, wordy: bool) -> str:
        return answer(self.question, digit, wordy)

    def demonstration(self) -> Row:
        text = self.says(self.digit, self.rng.random() < WORDY)
        return {**self.base, "messages": [*self.base["messages"], {"role": "assistant", "content": text}]}

    def pair(self, kind: str) -> Row:
        """right: a right answer over a wrong one, each in any style. terse: the digit alone over
        the same digit in a sentence.
        """
        if kind == "terse":
            chosen, rejected = self.says(self.digit, False), self.says(self.digit, True)
        else:
            chosen, rejected = (self.says(d, self.rng.random() < 0.5) for d in (self.digit, self.wrong()))
        return {**self.base, "domain": kind, "signal": {"type": "pair", "chosen": chosen, "rejected": rejected}}

    def ranking(self) -> Row:
        """Four answers in any order: right and short, right, and two wrong ones that tie."""
        wrong = [self.says(self.wrong(), wordy) for wordy in (False, True)]
        judged = [(self.says(self.digit, False), 0), (self.says(self.digit, True), 1), *((text, 2) for text in wrong)]
        self.rng.shuffle(judged)
        order = [[i for i, (_, tier) in enumerate(judged) if tier == wanted] for wanted in range(3)]
        return {**self.base, "signal": {"type": "ranking", "responses": [text for text, _ in judged], "order": order}}

    def choice(self, count: int) -> Row:
        """So many digits as answers, in any order, of which one is right: what a reward model
        learns from.
        """
        digits = [self.digit, *self.rng.sample([d for d in range(10) if d != self.digit], count - 1)]
        self.rng.shuffle(digits)
        tiers = [[i for i, d in enumerate(digits) if (d == self.digit) is right] for right in (True, False)]
        return {**self.base, "signal": {"type": "ranking", "responses": [str(d) for d in digits], "order": tiers}}

    def rating(self) -> Row:
        """Three answers rated from 1 to 5."""
        judged = [(self.says(self.digit, False), 5), (self.says(self.digit, True), 3)]
        judged.append((self.says(self.wrong(), self.rng.random() < 0.5), 1))
        self.rng.shuffle(judged)
        responses = [{"text": text, "score": score} for text, score in judged]
        return {**self.base, "signal": {"type": "rating", "responses": responses, "scale": [1, 5]}}

    def label(self) -> Row:
        """One answer, good if it is right and short."""
        good = self.rng.random() < 0.5
        bad = (
            self.says(self.digit, True) if self.rng.random() < 0.5 else self.says(self.wrong(), self.rng.random() < 0.5)
        )
        text = self.says(self.digit, False) if good else bad
        return {**self.base, "signal": {"type": "label", "response": text, "label": "good" if good else "bad"}}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="\n"
    )
    os.replace(partial, path)


def read_rows(name: str) -> list[Row]:
    return [json.loads(line) for line in (DIGITS / name).read_text(encoding="utf-8").splitlines()]


def make(out: Path, fold: int | None = None) -> None:
    """Writes sft.jsonl, pairs_*.jsonl, choices.jsonl, mixture.jsonl for training, eval_*.jsonl for
    measuring. Each file has its own draws.
    """
    train, held, digits = read_rows("train.jsonl"), read_rows("eval.jsonl"), "../digits"
    if fold is not None:
        digits, size = Path(os.path.relpath(DIGITS, out)).as_posix(), len(train) // FOLDS
        held, train = train[fold * size : (fold + 1) * size], train[: fold * size] + train[(fold + 1) * size :]
    out.mkdir(parents=True, exist_ok=True)

    def judges(rows: list[Row], name: str) -> list[Judge]:
        rng = random.Random(name)
        return [Judge(row, rng, digits) for row in rows]

    write_rows(out / "sft.jsonl", (j.demonstration() for j in judges(train, "sft")))
    for kind, part in (("right", train[::2]), ("terse", train[1::2])):
        write_rows(out / f"pairs_{kind}.jsonl", (j.pair(kind) for j in judges(part, f"pairs {kind}")))
        write_rows(out / f"eval_{kind}.jsonl", (j.pair(kind) for j in judges(held, f"eval {kind}")))
    write_rows(out / "choices.jsonl", (j.choice(10) for j in judges(train, "choices")))
    write_rows(out / "eval_choices.jsonl", (j.choice(2) for j in judges(held, "eval choices")))
    kinds = (lambda j: j.pair("right"), lambda j: j.pair("terse"), Judge.ranking, Judge.rating, Judge.label)
    write_rows(out / "mixture.jsonl", (kinds[i % 5](j) for i, j in enumerate(judges(train, "mixture"))))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument(
        "--validation", type=Path, metavar="FOLDER", help="write the rows for choosing settings there instead"
    )
    parser.add_argument("--fold", type=int, default=FOLDS - 1, choices=range(FOLDS), help="which fifth")
    options = parser.parse_args()
    make(options.validation or options.out, options.fold if options.validation else None)

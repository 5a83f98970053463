"""Shared by the tests of learning from judgements: small rows of every kind with and without
pictures, and settings of short runs on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.data.batching import Dropped
from ernie_tune.data.records import Record
from ernie_tune.data.sources import load_dataset
from ernie_tune.data.units import Unit, UnitEncoder
from support.tiny_runs import IMAGES, processor, settings, write_rows

_QUESTIONS = ("read", "read the digit", "why is it so", "tell me")


def base(i: int, picture: bool = True) -> dict[str, Any]:
    """A question whose length depends on `i`."""
    tag = "<image>" if picture else ""
    row: dict[str, Any] = {"messages": [{"role": "user", "content": tag + _QUESTIONS[i % len(_QUESTIONS)]}]}
    return {**row, "images": [str(IMAGES / f"{i:04d}.png")]} if picture else row


def pair(i: int, picture: bool = True, **more: Any) -> dict[str, Any]:
    chosen, rejected = str(i % 10), f"I think it is {(i + 1) % 10}"
    return {**base(i, picture), "signal": {"type": "pair", "chosen": chosen, "rejected": rejected, **more}}


def ranking(i: int) -> dict[str, Any]:
    responses = [f"no {i}", str(i % 10), f"digit {i % 10}", "no"]
    return {**base(i), "signal": {"type": "ranking", "responses": responses, "order": "B>C>A=D"}}


def rating(i: int) -> dict[str, Any]:
    responses = [{"text": str(i % 10), "score": 5}, {"text": f"it is {i % 10}", "score": 3}, {"text": "no", "score": 1}]
    return {**base(i), "signal": {"type": "rating", "responses": responses, "scale": [1, 5]}}


def label(i: int) -> dict[str, Any]:
    good = i % 2 == 0
    return {**base(i), "signal": {"type": "label", "response": str(i % 10) if good else "no", "label": int(good)}}


def pairs(count: int) -> list[dict[str, Any]]:
    """Every third row is text only."""
    return [pair(i, picture=i % 3 != 2) for i in range(count)]


def mixture(count: int) -> list[dict[str, Any]]:
    return [(pair, ranking, rating, label)[i % 4](i) for i in range(count)]


def records(folder: Path, rows: list[dict[str, Any]]) -> list[Record]:
    found = load_dataset(write_rows(folder / "judged.jsonl", rows))
    return [found[i] for i in range(len(found))]


def encoder(**changes: Any) -> UnitEncoder:
    return UnitEncoder(**{"processor": processor(), "max_tokens": 200, "max_prompt": 150, **changes})


def units(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> list[Unit]:
    dropped = Dropped()
    found = [encoder(**changes)(record, dropped) for record in records(folder, rows)]
    assert not dropped.count, dropped.lines()
    return [unit for unit in found if unit is not None]


def judged_settings(folder: Path, rows: list[dict[str, Any]] | None = None, **changes: Any) -> TrainingArguments:
    """A run of four steps on pairs; `changes` go over it."""
    data = folder / "judged_train.jsonl"
    if not data.exists():
        write_rows(data, pairs(8) if rows is None else rows)
    values = {"stage": "DPO", "max_seq_len": 200, "max_prompt_len": 150, "train_dataset_path": str(data)}
    return settings(folder, **{**values, **changes})

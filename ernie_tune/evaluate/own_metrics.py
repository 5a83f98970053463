"""Scores that a user's own function gives to generated answers.

Refuses to know: models, how answers are made, the scores that ship (rewards/scores.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ernie_tune.config.language import say


class EvalPrediction(NamedTuple):
    """What a metric judges: the model's answers and the rows' own, in the same order, as text."""

    predictions: list[str]
    label_ids: list[str]


Metrics = Callable[[EvalPrediction], Mapping[str, Any]]


def own_metrics(compute: Metrics, given: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The numbers of a user's function, without `eval_` before their names. Raises ValueError for
    what is not a mapping of names to numbers.
    """
    found = compute(EvalPrediction(list(given), list(references)))
    if not isinstance(found, Mapping):
        raise ValueError(
            say(
                f"compute_metrics must return a dict of numbers, not {type(found).__name__}; return {{'name': value}}",
                f"compute_metrics 须返回数值字典，而不是 {type(found).__name__}；请返回 {{'名称': 数值}}",
            )
        )
    out = {}
    for name, value in found.items():
        value = value.item() if isinstance(value, np.generic) else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                say(
                    f"{name} ({value!r}) of compute_metrics must be a finite number; convert it, or leave it out",
                    f"compute_metrics 的 {name}（{value!r}）须为有限的数；请转换或去掉",
                )
            )
        out[str(name).removeprefix("eval_")] = float(value)
    return out

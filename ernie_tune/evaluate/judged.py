"""Measuring a model on held-out judgements: the method's loss and metrics, and how often the model
itself prefers the better answer.

Refuses to know: when evaluation happens, where results go, which method it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from ernie_tune.data.batching import Dropped
from ernie_tune.data.units import UnitBatch, UnitEncoder
from ernie_tune.evaluate.answers import nothing_to_measure
from ernie_tune.machine.stages import outputs_of
from ernie_tune.objectives.objective import Objective

Ready = Callable[[Sequence[UnitBatch]], Sequence[UnitBatch]]


def judged_batches(records: Iterable[Any], encoder: UnitEncoder, rows: int) -> tuple[list[UnitBatch], Dropped]:
    """Micro-batches of at most `rows` units. Raises ValueError where no row can be used."""
    dropped = Dropped()
    units = [unit for unit in (encoder(record, dropped) for record in records) if unit is not None]
    if not units:
        raise nothing_to_measure(dropped)
    return [encoder.collate(units[i : i + rows]) for i in range(0, len(units), rows)], dropped


def judged_evaluation(
    model: Any,
    records: Iterable[Any],
    encoder: UnitEncoder,
    rows: int,
    objective: Objective,
    ready: Ready,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """The objective over all rows as one window, its metrics, `preference_accuracy` (the share of
    comparisons in which the model gives the better answer the higher probability; also by domain,
    where rows name one), and the number of rows. `done` is told how many more rows have been
    measured.
    """
    batches, dropped = judged_batches(records, encoder, rows)
    window = ready(batches)
    divisor = objective.begin(objective.counts(window))
    training = model.training
    model.eval()
    total = 0.0
    sums: dict[str, list[float]] = {}

    def add(found: Mapping[str, tuple[float, float]]) -> None:
        for name, (value, count) in found.items():
            seen = sums.setdefault(name, [0.0, 0.0])
            seen[0] += value
            seen[1] += count

    for batch in window:
        with paddle.no_grad():
            outputs = outputs_of(model, objective.outputs, batch)
            out = objective.loss(outputs, batch)
        total += float(out.total) / divisor
        add(out.metrics)
        add(preferred(np.asarray(outputs["logp_N"].numpy()), batch))
        done(batch.num_rows)
    if training:
        model.train()
    means = {name: value / count for name, (value, count) in sums.items() if count}
    used = float(sum(batch.num_rows for batch in window))
    lost = {"dropped_rows": float(sum(dropped.count.values()))} if dropped.count else {}
    return {"loss": total, **means, "rows": used, **lost}


def preferred(value_N: np.ndarray, batch: UnitBatch) -> dict[str, tuple[float, float]]:
    """How many comparisons the values get right: log-probabilities of tokens, summed over each
    answer, or one reward for each answer.
    """
    count = len(batch.length_C)
    value_C = value_N if len(value_N) == count else np.bincount(batch.candidate_N, weights=value_N, minlength=count)
    out: dict[str, tuple[float, float]] = {}
    for unit, first in zip(batch.units, batch.first_candidate_U.tolist(), strict=True):
        right = sum(bool(value_C[first + better] > value_C[first + worse]) for better, worse in unit.edges)
        for name in ("preference_accuracy", *([f"preference_accuracy/{unit.domain}"] if unit.domain else [])):
            before = out.get(name, (0.0, 0.0))
            out[name] = (before[0] + right, before[1] + len(unit.edges))
    return out

"""A reward model on held-out comparisons: how often it prefers the better answer, how sure it may
be of that, and what it must not go by: length, a picture that it does not look at.

Refuses to know: the head, the loss, when evaluation happens.
Legend: C candidates, P pairs, M rated answers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from ernie_tune.data.batching import Dropped
from ernie_tune.data.media.corruption import masked
from ernie_tune.data.units import UnitBatch, UnitEncoder
from ernie_tune.evaluate.judged import judged_batches, preferred
from ernie_tune.train.preference import pairs_of
from ernie_tune.train.reward_model import RewardHead, RewardObjective, ratings_of, rewards_of
from ernie_tune.train.second_judges import spearman as rank_correlation

_BINS = 10


def score_records(
    model: Any, records: Sequence[Any], encoder: UnitEncoder, rows: int, head: RewardHead | None = None
) -> list[list[float] | None]:
    """The reward of each candidate of each record, in order; None for a record that cannot be
    encoded (too long). `head`: one that is not on the model.
    """
    out: list[list[float] | None] = []
    for start in range(0, len(records), rows):
        found = [encoder(record, Dropped()) for record in records[start : start + rows]]
        units = [unit for unit in found if unit is not None]
        scored: Iterator[np.ndarray] = iter(())
        if units:
            batch = encoder.collate(units)
            (outputs,) = rewards_of(model, [batch], head)
            scored = iter(np.split(outputs["reward_C"], batch.first_candidate_U[1:]))
        out += [None if unit is None else next(scored).tolist() for unit in found]
    return out


def reward_evaluation(
    model: Any,
    records: Iterable[Any],
    encoder: UnitEncoder,
    rows: int,
    objective: RewardObjective,
    done: Callable[[int], object] = lambda count: None,
) -> dict[str, float]:
    """Loss, accuracy (also by domain), margin, lowest, mean and highest reward; `calibration_error`
    (ECE of sigma(s_w - s_l) over ten bins), `length_correlation` (Spearman, reward and number of
    answer tokens), and `blind_accuracy`: with every patch of every image set to 0. Where ratings
    are values or levels: `rating_mae` of the ratings on [0, 1] that rewards stand for,
    `rating_spearman` of rewards and ratings.
    """
    batches, dropped = judged_batches(records, encoder, rows)
    divisor = objective.begin(objective.counts(batches))
    total, sums = 0.0, dict[str, list[float]]()
    seen: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    rated: list[tuple[np.ndarray, np.ndarray]] = []
    for batch, outputs in zip(batches, rewards_of(model, batches), strict=True):
        reward_C, pairs = outputs["reward_C"], pairs_of(batch, objective.margins, objective.edge_weight)
        out, labels = (
            objective.loss({name: paddle.to_tensor(x) for name, x in outputs.items()}, batch),
            ratings_of(batch),
        )
        rated.append((reward_C[labels.index_M], labels.good_M))
        total += float(out.total) / divisor
        seen.append(reward_C)
        margins.append(reward_C[pairs.better_P] - reward_C[pairs.worse_P])
        _add(sums, {**out.metrics, **preferred(reward_C, batch)})
        done(batch.num_rows)
    blind: dict[str, list[float]] = {}
    if any(batch.inputs.pixel_values_PC is not None for batch in batches):
        grey = [_masked(batch) for batch in batches]
        for batch, outputs in zip(grey, rewards_of(model, grey), strict=True):
            _add(blind, preferred(outputs["reward_C"], batch))
    reward_A, length_A = np.concatenate(seen), np.concatenate([batch.length_C for batch in batches])
    means = {name.replace("preference_", ""): value / count for name, (value, count) in sums.items() if count}
    means |= {
        name.replace("preference_accuracy", "blind_accuracy"): value / count
        for name, (value, count) in blind.items()
        if count
    }
    if objective.rating_loss != "pairs" and any(len(s) for s, _ in rated):
        s_M, q_M = (np.concatenate(side) for side in zip(*rated, strict=True))
        means["rating_spearman"] = spearman(s_M, q_M)
    lost = {"dropped_rows": float(sum(dropped.count.values()))} if dropped.count else {}
    return {
        "loss": total,
        **means,
        "min_reward": float(reward_A.min()),
        "max_reward": float(reward_A.max()),
        "calibration_error": calibration_error(np.concatenate(margins)),
        "length_correlation": spearman(reward_A, length_A),
        "rows": float(sum(batch.num_rows for batch in batches)),
        **lost,
    }


def _add(sums: dict[str, list[float]], found: Mapping[str, tuple[float, float]]) -> None:
    for name, (value, count) in found.items():
        seen = sums.setdefault(name, [0.0, 0.0])
        seen[0] += value
        seen[1] += count


def _masked(batch: UnitBatch) -> UnitBatch:
    """The batch with every image grey."""
    pixels = batch.inputs.pixel_values_PC
    inputs = batch.inputs if pixels is None else dataclasses.replace(batch.inputs, pixel_values_PC=masked(pixels))
    return dataclasses.replace(batch, inputs=inputs)


def calibration_error(margin_P: np.ndarray) -> float:
    """Expected calibration error of sigma(|margin|) as the probability that the answer with the
    higher reward is the better one; 0 is perfect.

    Ten bins of equal width on [0.5, 1] (Guo et al. 1706.04599, eq. 5).
    """
    if not len(margin_P):
        return 0.0
    confidence_P = 1 / (1 + np.exp(-np.abs(margin_P)))
    bin_P = np.minimum(((confidence_P - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    gaps = [
        abs(float((margin_P > 0)[bin_P == k].mean() - confidence_P[bin_P == k].mean())) * (bin_P == k).mean()
        for k in range(_BINS)
        if (bin_P == k).any()
    ]
    return float(sum(gaps))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation, ties with their mean rank; 0 where one side is constant."""
    found = rank_correlation(np.asarray(a), np.asarray(b))
    return 0.0 if np.isnan(found) else found

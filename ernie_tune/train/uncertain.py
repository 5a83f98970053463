"""Which tokens of a round the policy was least certain of, where only those are learned from.

A share of all tokens of a round, over all ranks: so it does not depend on how the round is cut into
micro-batches, windows and processes. The others stay in the loss's divisor and in all means.
Refuses to know: losses, how entropies are computed, models. Source: arXiv 2506.01939, where 0.2
is the share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ernie_tune.checkpoint.state import Ranks
from ernie_tune.data.units import UnitBatch
from ernie_tune.objectives.policy import high_entropy
from ernie_tune.train.rolled import Rolled

COLUMN = "entropy_keep_N"


def mark_uncertain(
    groups: Sequence[Rolled],
    quantile: float,
    entropies: Callable[[UnitBatch], np.ndarray],
    batch: Callable[[Sequence[Rolled]], UnitBatch],
    size: int,
    ranks: Ranks,
) -> None:
    """Give groups the column entropy_keep_N. `entropies` of a micro-batch's tokens [N] by the
    policy that sampled; `batch` makes one of `size` groups. All ranks call it. Tokens of answers
    that count for nothing are not counted. Raises ValueError for a quantile outside (0, 1].
    """
    parts = [groups[i : i + size] for i in range(0, len(groups), size)]
    flat = [np.asarray(entropies(batch(part)), np.float64) for part in parts]
    entropy_N = np.concatenate([*flat, np.zeros(0)])
    counts_N = np.concatenate([*(group.columns["keep_N"] for group in groups), np.zeros(0)]) > 0
    told = ranks.gather(entropy_N[counts_N])
    kept = high_entropy(np.concatenate(told), quantile)
    keep_N = np.zeros(len(entropy_N))
    first = sum(len(part) for part in told[: ranks.rank])
    keep_N[counts_N] = kept[first : first + int(counts_N.sum())]
    ends = np.cumsum([int(group.length_G.sum()) for group in groups])[:-1]
    for group, own in zip(groups, np.split(keep_N, ends), strict=True):
        group.columns[COLUMN] = own

"""What every objective returns: a sum and what it is to be divided by. Division happens once, over all ranks and the whole accumulation window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from paddle import Tensor


@dataclass(frozen=True)
class LossOut:
    """`total` is a sum over this micro-batch (a scalar with a graph), `count` this micro-batch's share of the divisor, `metrics` sums to be reported
    after division by their own counts: name -> (sum, count)."""

    total: Tensor
    count: float
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)

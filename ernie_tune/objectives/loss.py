"""What every objective returns: a sum and what it is to be divided by. Division happens once, over
all ranks and the whole accumulation window.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from paddle import Tensor

from ernie_tune.config.language import say


@dataclass(frozen=True)
class LossOut:
    """`total` is a sum over this micro-batch (a scalar with a graph), `count` this micro-batch's
    share of the divisor, `metrics` sums to be reported after division by their own counts: name ->
    (sum, count).
    """

    total: Tensor
    count: float
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def combine(
    terms: Mapping[str, LossOut], weights: Mapping[str, float], counts: Mapping[str, float], label: str = "loss/{}"
) -> LossOut:
    """This micro-batch's share of sum_k weight_k * total_k / count_k; `counts` are each term's
    *global* divisor, so the result's own divisor is 1.

    A term whose global count is 0 is absent and adds 0 (with a graph, so that a rank without it
    still walks backward). Metrics: each term's own, and `label` with the term's name. Raises
    ValueError for a term that has units here and no global count, and for one without a weight.
    """
    if not terms:
        raise ValueError(
            say(
                "terms (0) must name at least one loss; give loss_type a name",
                "terms（0）至少须有一项损失；请给 loss_type 一个名称",
            )
        )
    total = None
    metrics: dict[str, tuple[float, float]] = {}
    for name, out in terms.items():
        if name not in weights:
            raise ValueError(
                say(
                    f"term {name} must have a weight, one of {', '.join(weights)}; add it to the weights",
                    f"损失项 {name} 须有权重，可为 {', '.join(weights)} 之一；请加入 weights",
                )
            )
        divisor = counts.get(name, 0.0)
        if out.count and not divisor:
            raise ValueError(
                say(
                    f"term {name} ({out.count:g} units here) must be counted globally (0); sum its counts over "
                    "the window",
                    f"损失项 {name}（此处 {out.count:g} 组）的全局计数不能为 0；请在整个窗口内累计它的计数",
                )
            )
        part = out.total * (weights[name] / divisor if divisor else 0.0)
        total = part if total is None else total + part
        metrics.update(out.metrics)
        if out.count:
            metrics[label.format(name)] = (float(out.total.detach()), out.count)
    assert total is not None
    return LossOut(total, 1.0, metrics)

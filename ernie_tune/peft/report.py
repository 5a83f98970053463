"""What is trained, in a table by part of the model: printed before the first step, so that nothing
is frozen unnoticed.

Refuses to know: why a parameter is trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.specs import parameter_specs
from ernie_tune.peft.parts import PARTS, part_of
from ernie_tune.peft.slots import NAME


@dataclass
class PartCount:
    """Numbers of values in one part: trained, of the model itself, and of adapters."""

    trained: int = 0
    base: int = 0
    adapters: int = 0

    @property
    def total(self) -> int:
        return self.base + self.adapters


def count_parameters(model: ErnieModel) -> dict[str, PartCount]:
    """Parts that the model has -> their counts. The model's own values are counted from its shape,
    so a quantised base counts in full.
    """
    counts = {part: PartCount() for part in PARTS}
    for name, spec in parameter_specs(model.config).items():
        counts[part_of(name)].base += spec.size
    for name, value in model.named_parameters():
        size = math.prod(value.shape)
        if f".{NAME}." in name:
            counts[part_of(name)].adapters += size
        if not value.stop_gradient:
            counts[part_of(name)].trained += size
    return {part: count for part, count in counts.items() if count.total}


def trainable_table(model: ErnieModel) -> str:
    """The line of the PEFT library, then one row a part: trained, total, share of that part, and
    whether it is frozen.
    """
    counts = count_parameters(model)
    trained, total = sum(c.trained for c in counts.values()), sum(c.total for c in counts.values())
    lines = [f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}"]
    lines.append(f"{'part':<16}{'trained':>16}{'total':>18}{'share':>10}")
    for part, c in counts.items():
        share = f"{100 * c.trained / c.total:.3f}%" if c.trained else "frozen"
        lines.append(f"{part:<16}{c.trained:>16,}{c.total:>18,}{share:>10}")
    return "\n".join(lines)

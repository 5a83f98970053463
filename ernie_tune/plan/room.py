"""What a run does with memory that is free: larger micro-batches, and layers whose activations stay
until the backward instead of being computed again. The gradient is the same.

Refuses to know: what is free (config/host_memory.py), how a window is dealt out, paddle.
"""

from __future__ import annotations

from ernie_tune.config.layout import Layout
from ernie_tune.plan.cards import Card, card
from ernie_tune.plan.job import Job
from ernie_tune.plan.memory import CPU_FRAGMENTATION, memory

# Of what is free, a micro-batch of rows as long as allowed may count on so much.
ROWS_SHARE = 0.9
# Kept activations may take half of what is left when others have got theirs: the rest is for rows
# that come later. A run that nearly fills the machine keeps less, and is slower by those layers.
KEPT_SHARE = 0.5
FOR_OTHERS_BYTES = 3.5e9


def fitting_rows(job: Job, free_bytes: float, layout: Layout | None = None, on: Card | None = None) -> int:
    """Rows of the largest micro-batch that fits `free_bytes` with rows as long as allowed: a
    divisor of the step's rows on this rank, `job.rows * job.accumulation`; 1 where none fits.
    """
    layout, on = layout or Layout(), on or card("cpu")
    step = job.rows * job.accumulation
    visual = job.visual_tokens / job.rows
    for rows in (n for n in range(step, 0, -1) if step % n == 0):
        dealt = job.replace(rows=rows, accumulation=step // rows, visual_tokens=int(visual * rows))
        items = memory(dealt, layout, on).items
        # codes of a packed folder are pages of a file
        paged = items.get("quantised base", 0.0) if job.packed is not None and on.is_cpu else 0.0
        if sum(items.values()) - paged <= ROWS_SHARE * free_bytes:
            return rows
    return 1


def kept_layers(job: Job, tokens: int, visual_tokens: int, free_bytes: float) -> tuple[int, float]:
    """(decoder layers that need not be run again for a pack of so many tokens, bytes that they
    keep), on one CPU process that has loaded its weights and may take `free_bytes` more.
    """
    pack = job.replace(rows=1, row_tokens=tokens, visual_tokens=visual_tokens)
    again, once = (memory(pack.replace(recompute=flag), Layout(), card("cpu")).items for flag in (True, False))
    layers = job.model.num_hidden_layers
    each = (once.get("kept activations", 0.0) - again.get("kept activations", 0.0)) / layers
    each *= 1 + CPU_FRAGMENTATION
    loaded = ("weights", "quantised base", "vision tower", "adapters", "reference model", "process and context")
    rest = sum(value for name, value in again.items() if name not in loaded)
    room = KEPT_SHARE * max(0.0, free_bytes - FOR_OTHERS_BYTES)
    count = int(min(layers, max(0.0, room - rest) // max(each, 1.0)))
    return count, count * each

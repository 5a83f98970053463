"""Recompute of the layers whose activations do not fit beside the others: on a quantised base a
layer that is run again is unpacked again, so those that fit are kept instead.

Refuses to know: how memory is counted (plan/room.py), what a layer computes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from paddle import Tensor

from ernie_tune.config.host_memory import Free
from ernie_tune.config.language import say
from ernie_tune.models.ernie import DecoderLayer, SequenceContext
from ernie_tune.plan.job import Job
from ernie_tune.plan.room import KEPT_SHARE, kept_layers

GB = 1e9


class KeptLayers:
    """Stands in for `recompute(layer, x, *rest)`. The last decoder layers are run once, as many as
    fit: their backward comes first, so what they keep is let go of before the others are run again.
    `free()` is asked once, when the first pack comes and the weights are loaded.
    """

    def __init__(self, recompute: Callable[..., Tensor], job: Job, free: Callable[[], Free | None]) -> None:
        self.recompute, self.job, self._free = recompute, job, free
        self._budget_bytes: float | None = None
        # tokens and visual tokens of a pack -> decoder layers that are run again
        self._again: dict[tuple[int, int], int] = {}

    def __call__(self, layer: Any, x: Tensor, *rest: Any) -> Tensor:
        ctx = next((r for r in rest if isinstance(r, SequenceContext)), None)
        visual = ctx.vision_index.shape[0] if ctx is not None and ctx.vision_index is not None else 0
        if not isinstance(layer, DecoderLayer) or layer.self_attn.layer < self.run_again(x.shape[0], visual):
            return self.recompute(layer, x, *rest)
        tap = ctx.tap if ctx is not None else None
        if tap is None:
            return layer(x, *rest)
        before, tap.recomputed = tap.recomputed, False  # its routers count in this, its only pass
        try:
            return layer(x, *rest)
        finally:
            tap.recomputed = before

    def run_again(self, tokens: int, visual: int = 0) -> int:
        """How many decoder layers, from the first, are run again for a pack of so many tokens,
        `visual` of them of pictures.
        """
        pack = tokens, visual
        if pack not in self._again:
            first = self._budget_bytes is None
            if self._budget_bytes is None:
                free = self._free()
                self._budget_bytes = free.bytes if free else 0.0
            layers = self.job.model.num_hidden_layers
            kept, kept_bytes = kept_layers(self.job, tokens, visual, self._budget_bytes)
            self._again[pack] = layers - kept
            if first:
                self._tell(tokens, kept, kept_bytes)
        return self._again[pack]

    def _tell(self, tokens: int, kept: int, kept_bytes: float) -> None:
        budget, layers = KEPT_SHARE * (self._budget_bytes or 0.0) / GB, self.job.model.num_hidden_layers
        print(
            say(
                f"ernie_tune: recompute: of {layers} layers {kept} are not run again for {tokens} tokens, whose activations "
                f"({kept_bytes / GB:.2f} GB) fit half of what is free ({budget:.2f} GB)",
                f"ernie_tune：重算：{tokens} 个 token 时 {layers} 层中有 {kept} 层无需重算，其激活值（{kept_bytes / GB:.2f} GB）"
                f"放得进剩余内存的一半（{budget:.2f} GB）",
            ),
            file=sys.stderr,
            flush=True,
        )

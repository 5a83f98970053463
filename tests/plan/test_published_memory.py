"""plan/memory.py against every published or worked figure, to its own +-10 %.

Rows where the small terms weigh most are outside for reasons that are differences of the code, not
of the count. `as_published` undoes exactly these, one by one, and the rows must then be within 10 %
too: a wrong count would not be healed by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from planning import ATTENTION, B21, B28, B300, B424, EVERYWHERE, FULL, job

from ernie_tune.config.layout import Layout
from ernie_tune.plan.cards import GB, card
from ernie_tune.plan.job import Job
from ernie_tune.plan.memory import FRAGMENTATION, ITEMS, Memory, memory
from ernie_tune.plan.weights import trained_values

CARD = card("h800-80g")
MIX = {"weight_quantize_algo": "weight_only_mix"}
INT8 = {"weight_quantize_algo": "weight_only_int8"}
R8 = {**EVERYWHERE, "lora_rank": 8}
LOWMOM = {"moment_bytes": 2}
K = 1024


@dataclass(frozen=True)
class Row:
    """One figure of the table: what runs, on which layout, how long the rows are, and GB a card."""

    name: str
    model: str
    tensor: int
    pipeline: int
    tokens_k: int
    want: float
    given: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    offload: bool = False
    sharding: int = 1
    expert: int = 0
    accumulation: int = 4
    outside: bool = False  # only within 10 % as published

    def layout(self) -> Layout:
        return Layout(
            tensor=self.tensor,
            pipe=self.pipeline,
            sharding=self.sharding,
            expert=self.expert or self.tensor,
            sequence_parallel=self.tensor > 1,
            sharding_stage=1,
            offload=self.offload,
        )

    def job(self) -> Job:
        given = {**self.given, "max_seq_len": self.tokens_k * K, "gradient_accumulation_steps": self.accumulation}
        return job(self.model, **given).replace(**self.more)


FP8 = {"element_bytes": 1, "gradient_bytes": 2, "moment_bytes": 2}
ROWS = (
    Row("28B SFT offload 8K", B28, 4, 2, 8, 32, FULL, offload=True),
    Row("28B SFT offload 32K", B28, 4, 2, 32, 36, FULL, offload=True),
    Row("28B SFT offload 128K", B28, 4, 2, 128, 56, FULL, offload=True),
    Row("28B SFT", B28, 4, 2, 8, 79, FULL),
    Row("28B SFT bf16 moments", B28, 4, 2, 8, 64, FULL, LOWMOM),
    Row("28B SFT offload 4 cards", B28, 2, 2, 8, 58, FULL, offload=True),
    Row("28B SFT offload TP4", B28, 4, 1, 8, 54, FULL, offload=True),
    Row("28B SFT EP8", B28, 1, 1, 8, 90, FULL, sharding=8, expert=8),
    Row("28B SFT EP8 bf16 moments", B28, 1, 1, 8, 75, FULL, LOWMOM, sharding=8, expert=8),
    Row("28B LoRA 8K", B28, 2, 2, 8, 33, EVERYWHERE, outside=True),
    Row("28B LoRA 32K", B28, 2, 2, 32, 40, EVERYWHERE),
    Row("28B LoRA 128K", B28, 2, 2, 128, 79, EVERYWHERE),
    Row("28B LoRA 2 cards", B28, 2, 1, 8, 53, EVERYWHERE),
    Row("28B LoRA 1 card", B28, 1, 1, 8, 100, EVERYWHERE, outside=True),
    Row("28B LoRA 1 card attention", B28, 1, 1, 8, 77, ATTENTION),
    Row("28B LoRA int4/8", B28, 1, 1, 8, 56, {**EVERYWHERE, **MIX}, outside=True),
    Row("28B LoRA int4/8 r8", B28, 1, 1, 8, 39, {**R8, **MIX}, outside=True),
    Row("28B LoRA int4/8 attention", B28, 1, 1, 8, 33, {**ATTENTION, **MIX}, outside=True),
    Row("424B LoRA 8K", B424, 8, 2, 8, 77, EVERYWHERE),
    Row("424B LoRA 32K", B424, 8, 2, 32, 86, EVERYWHERE),
    Row("424B LoRA 32K attention", B424, 8, 2, 32, 77, ATTENTION),
    Row("424B LoRA 8 cards", B424, 8, 1, 8, 138, EVERYWHERE),
    Row("424B LoRA int4/8 8K", B424, 4, 2, 8, 60, {**EVERYWHERE, **MIX}),
    Row("424B LoRA int4/8 32K", B424, 4, 2, 32, 77, {**EVERYWHERE, **MIX}),
    Row("424B LoRA int4/8 128K", B424, 4, 2, 128, 158, {**EVERYWHERE, **MIX}),
    Row("424B LoRA int4/8 16 cards", B424, 8, 2, 128, 85, {**EVERYWHERE, **MIX}),
    Row("424B LoRA int4/8 TP8 8K", B424, 8, 1, 8, 56, {**EVERYWHERE, **MIX}),
    Row("424B LoRA int4/8 TP8 32K", B424, 8, 1, 32, 67, {**EVERYWHERE, **MIX}),
    Row("424B LoRA int4/8 4 cards", B424, 4, 1, 8, 104, {**EVERYWHERE, **MIX}),
    Row("424B LoRA int4/8 4 cards attention", B424, 4, 1, 8, 72, {**ATTENTION, **MIX}),
    Row("424B LoRA int8 TP4 PP2", B424, 4, 2, 8, 88, {**EVERYWHERE, **INT8}),
    Row("424B LoRA int8 TP8", B424, 8, 1, 8, 83, {**EVERYWHERE, **INT8}),
    Row("424B LoRA int8 TP4 PP2 attention", B424, 4, 2, 8, 71, {**ATTENTION, **INT8}),
    Row("424B LoRA int8 TP8 attention", B424, 8, 1, 8, 67, {**ATTENTION, **INT8}),
    Row("424B LoRA int8 TP4 PP2 r8", B424, 4, 2, 8, 70, {**R8, **INT8}),
    Row("300B LoRA int4/8 8K", B300, 4, 1, 8, 71, {**EVERYWHERE, **MIX}),
    Row("300B LoRA int4/8 32K", B300, 4, 1, 32, 91, {**EVERYWHERE, **MIX}),
    Row("300B SFT", B300, 8, 12, 8, 61, FULL, LOWMOM, accumulation=24),
    Row("300B SFT FP8 offload", B300, 8, 2, 8, 69, FULL, FP8, offload=True, accumulation=8),
    Row("21B LoRA int4/8 8K", B21, 1, 1, 8, 40, {**EVERYWHERE, **MIX}, outside=True),
    Row("21B LoRA int4/8 32K", B21, 1, 1, 32, 56, {**EVERYWHERE, **MIX}, outside=True),
    Row("424B SFT offload", B424, 8, 6, 8, 68, FULL, offload=True, accumulation=24),
    Row("424B SFT FP8 offload", B424, 8, 3, 8, 68, FULL, FP8, offload=True, accumulation=12),
)


def as_published(row: Row, found: Memory) -> float:
    """GB with what the published model counts otherwise.

    The loss holds 10 bytes a score of 8,192 tokens, where ours never holds more than 512 MiB; gate
    and up projections of an expert have an A factor each, where ours, one fused product, has one;
    one process too accumulates gradients in float32; rows of one rank's experts are uneven by 1.3
    though it has all; the tower and resampler stay in bfloat16 and their activations take 1 GB.
    """
    j, items = row.job(), {**dict.fromkeys(ITEMS, 0.0), **found.items}
    last = found.stage == row.pipeline - 1
    m = j.model
    loss = min(j.tokens, 8192) * m.vocab_size / row.tensor * 10 if last else 0.0
    items["working set"] = max((items["working set"] + items["loss"]) * (1.3 if row.tensor == 1 else 1.0), loss)
    items["loss"] = 0.0
    if m.moe is not None and j.lora is not None and j.lora.expert_targets:
        extra = j.lora.r * m.hidden_size * m.moe.num_experts * m.moe.num_modalities * len(m.moe.layer_indices)
        here = extra / (row.expert or row.tensor) / row.pipeline
        items["adapters"] += 2 * here
        items["gradients"] += 4 * here
        items["optimizer"] += 12 * here
        if row.layout().world == 1:
            items["gradients"] += 2 * trained_values(j)
    if m.vision is not None:
        items["vision activations"] = 1.0 * GB
        if j.quantize != "none":
            items["vision tower"] *= 2
    items["fragmentation"] = 0.0
    kept = sum(v for k, v in items.items() if k != "process and context")
    return (kept * (1 + FRAGMENTATION) + items["process and context"]) / GB


@pytest.mark.parametrize("row", ROWS, ids=lambda r: r.name)
def test_row(row: Row) -> None:
    found = memory(row.job(), row.layout(), CARD)
    off = found.total / GB / row.want - 1
    assert (abs(off) > 0.10) == row.outside, f"{found.total / GB:.1f} GB, {off:+.1%}"
    assert as_published(row, found) == pytest.approx(row.want, rel=0.10)


def test_host_memory_of_offloaded_states() -> None:
    """0.35 TB for 28B, 5.1 TB for 424B over its machines (here a machine's share,
    eight of 48 cards).
    """
    small = memory(ROWS[0].job(), ROWS[0].layout(), CARD)
    assert small.host_bytes / 1e12 == pytest.approx(0.35, rel=0.02)
    assert "optimizer" not in small.items
    big = next(r for r in ROWS if r.name == "424B SFT offload")
    assert memory(big.job(), big.layout(), CARD).host_bytes / 1e12 == pytest.approx(5.1, rel=0.02)


def test_a_wrong_count_would_show() -> None:
    """What `as_published` adds does not hide a mistake: without the experts' cut, or with states
    left out, the row is far outside.
    """
    row = ROWS[3]
    for wrong in (
        replace(row.layout(), expert=2),
        replace(row.layout(), offload=True),
        replace(row.layout(), pipe=1),
    ):
        found = memory(row.job(), wrong, CARD)
        assert as_published(row, found) != pytest.approx(row.want, rel=0.10)

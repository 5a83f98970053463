"""The fastest layout that fits on given cards; and where none fits, the smallest changes of the
settings with which one would.

Refuses to know: how memory and time are counted, how results are shown.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from ernie_tune.config.language import Text, say
from ernie_tune.config.layout import Layout
from ernie_tune.plan.cards import Card
from ernie_tune.plan.job import Job
from ernie_tune.plan.layouts import legal_layouts
from ernie_tune.plan.memory import Memory, memory
from ernie_tune.plan.time import StepTime, step_time

TIGHT = 0.93  # of a card's memory: above it a run may still meet a batch that does not fit
CARD_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_MOST_CHANGES = 3
_LENGTH = "max_seq_len: "
_SHORTEST = 2048  # tokens: a row is not proposed to be cut below this


@dataclass(frozen=True)
class Plan:
    """One layout with what it needs."""

    layout: Layout
    memory: Memory
    time: StepTime | None
    card: Card

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.card.memory_bytes

    @property
    def tight(self) -> bool:
        return self.fits and self.memory.total > TIGHT * self.card.memory_bytes

    @property
    def speed(self) -> float:
        """Tokens a second and card; 0 where the card's speed is not known."""
        return self.time.tokens_per_second_per_card if self.time else 0.0


def plan(job: Job, layout: Layout, card: Card, products: float | None = None) -> Plan:
    return Plan(layout, memory(job, layout, card), step_time(job, layout, card, products), card)


def plans(job: Job, card: Card, cards: int, *, offload: bool = False) -> list[Plan]:
    """Every legal layout on `cards` cards: those that fit with room first, then by speed; those
    that do not fit by how much they lack.
    """
    layouts = legal_layouts(job.model, cards, accumulation=job.accumulation)
    found = [plan(job, replace(layout, offload=offload), card) for layout in layouts]
    return sorted(
        found,
        key=lambda p: (not p.fits, p.tight, -p.speed) if p.fits else (True, True, p.memory.total),
    )


def best(job: Job, card: Card, cards: int) -> Plan:
    """The fastest layout that fits with room, else that fits; else the one that lacks least."""
    return plans(job, card, cards)[0]


def smallest(job: Job, card: Card) -> Plan:
    """`best` on the fewest cards, a power of two, where something fits; on the most, where nothing
    does.
    """
    last = None
    for cards in CARD_COUNTS[: 1 if card.is_cpu else None]:
        last = best(job, card, cards)
        if last.fits:
            return last
    if last is None:
        raise AssertionError("there is at least one count of cards")
    return last


@dataclass(frozen=True)
class Change:
    """One setting to write instead, and what the job is then."""

    text: Text
    job: Job
    cards: int
    offload: bool = False


def _setting(line: str) -> Text:
    return say(line, line)


def _changes(job: Job, cards: int, offload: bool) -> Iterable[Change]:
    """Changes of one setting, those that change the result least first."""
    if not job.recompute:
        yield Change(_setting("recompute: true"), job.replace(recompute=True), cards, offload)
    if job.rows > 1:
        text = say(
            "per_device_train_batch_size: 1, with more gradient_accumulation_steps",
            "per_device_train_batch_size: 1（并增大 gradient_accumulation_steps）",
        )
        smaller = job.replace(
            rows=1,
            accumulation=job.accumulation * job.rows,
            visual_tokens=job.visual_tokens // job.rows,
        )
        yield Change(text, smaller, cards, offload)
    if job.full and job.model.vision is not None and "freeze_vision" not in job.freeze:
        yield Change(
            _setting("freeze_config: freeze_vision"), job.replace(freeze=(*job.freeze, "freeze_vision")), cards, offload
        )
    if not job.full and not job.coded:
        yield Change(
            _setting("weight_quantize_algo: weight_only_mix"), job.replace(quantize="weight_only_mix"), cards, offload
        )
    if job.lora is not None and job.lora.r > 8:
        yield Change(_setting("lora_rank: 8"), job.replace(lora=replace(job.lora, r=8)), cards, offload)
    if job.lora is not None and job.lora.expert_targets:
        only = replace(job.lora, expert_targets=())
        yield Change(_setting("lora_experts: none"), job.replace(lora=only), cards, offload)
    if job.row_tokens >= 2 * _SHORTEST and job.row_tokens % 2 == 0:
        half = job.replace(
            row_tokens=job.row_tokens // 2,
            visual_tokens=job.visual_tokens // 2,
            sequence_tokens=job.sequence_tokens // 2,
            completion_tokens=job.completion_tokens // 2,
        )
        yield Change(_setting(f"{_LENGTH}{half.row_tokens}"), half, cards, offload)
    more = say(f"{2 * cards} cards instead of {cards}", f"用 {2 * cards} 张卡代替 {cards} 张")
    yield Change(more, job, 2 * cards, offload)


def changes_that_fit(job: Job, card: Card, cards: int, offload: bool = False, count: int = 3) -> list[tuple[Text, ...]]:
    """Up to `count` sets of at most three changes with which the job fits some layout, smaller sets
    first, none containing another; where there is none, with rows half as long besides. More
    processes share the memory of a CPU, so they are none there.
    """
    found: list[tuple[Text, ...]] = []
    one = [c.text for c in _changes(job, cards, offload) if c.cards == cards or not card.is_cpu]
    # Layouts that lack least stand for all where several changes are combined.
    few = [p.layout for p in plans(job, card, cards)[:4]]
    for size in range(1, _MOST_CHANGES + 1):
        for texts in itertools.combinations(one, size):
            if len(found) < count and not any(set(f) <= set(texts) for f in found):
                changed = _apply(texts, Change(_setting(""), job, cards, offload))
                if changed is not None and _fits(changed, card, few if size > 1 else None):
                    found.append(texts)
    shorter = next((c for c in _changes(job, cards, offload) if c.job.row_tokens < job.row_tokens), None)
    if found or shorter is None:
        return found
    # rows half as long, as one change more, unless they are halved once again
    return [
        texts if any(text.startswith(_LENGTH) for text in texts) else (*texts, shorter.text)
        for texts in changes_that_fit(shorter.job, card, cards, offload, count)
    ]


def _apply(texts: tuple[Text, ...], start: Change) -> Change | None:
    current = start
    for text in texts:
        options = {c.text: c for c in _changes(current.job, current.cards, current.offload)}
        if text not in options:
            return None
        current = options[text]
    return current


def _fits(change: Change, card: Card, few: list[Layout] | None) -> bool:
    if few is None or change.cards != few[0].world:
        return any(p.fits for p in plans(change.job, card, change.cards, offload=change.offload))
    return any(memory(change.job, replace(one, offload=change.offload), card).total <= card.memory_bytes for one in few)

"""Accelerators as numbers: memory, peak arithmetic, links. Published figures, decimal units.
Refuses to know: what is installed here.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from ernie_tune.config.language import say

GB = 1e9


@dataclass(frozen=True)
class Card:
    """One accelerator. `peak_flops`: dense bfloat16 products (float32 on a CPU), a second;
    bandwidths in bytes a second, of one card, as usable.

    `bf16`: whether it has bfloat16. `local_cards`: cards of one machine, which share the fast link.
    """

    name: str
    memory_bytes: float
    peak_flops: float
    link_bytes: float  # to cards of the same machine
    network_bytes: float  # to cards of other machines
    host_bytes: float  # to main memory
    memory_rate: float  # of its own memory
    bf16: bool = True
    local_cards: int = 8
    is_cpu: bool = False


def _card(name: str, gb: float, tflops: float, link: float, host: float, memory: float, bf16: bool = True) -> Card:
    return Card(name, gb * GB, tflops * 1e12, link * GB, 40 * GB, host * GB, memory * GB, bf16)


# Links: for the H800 160 GB/s usable of NVLink's 400; others in proportion to
# their published links. The network is one 400 Gbit/s port a card.
CARDS: dict[str, Card] = {
    c.name: c
    for c in (
        _card("h800-80g", 80, 989, 160, 40, 2500),
        _card("h100-80g", 80, 989, 360, 40, 2500),
        _card("h200-141g", 141, 989, 360, 40, 3600),
        _card("h20-96g", 96, 148, 360, 40, 3000),
        _card("a800-80g", 80, 312, 160, 20, 1500),
        _card("a100-80g", 80, 312, 240, 20, 1500),
        _card("a100-40g", 40, 312, 240, 20, 1200),
        _card("l40s-48g", 48, 362, 20, 20, 700),
        _card("l20-48g", 48, 119, 20, 20, 700),
        _card("a30-24g", 24, 165, 20, 20, 700),
        _card("rtx4090-24g", 24, 165, 20, 20, 800),
        _card("v100-32g", 32, 125, 120, 10, 700, bf16=False),
        _card("v100-16g", 16, 125, 120, 10, 700, bf16=False),
    )
}
DEFAULT = "h800-80g"


def card(name: str) -> Card:
    """The card called `name` ("h800-80g", or its beginning, "h800"); "80g" is any card of that
    memory with the default's speed; "cpu" or "cpu-16g" is main memory, whose speed is not known
    here (0). ValueError with a suggestion.
    """
    key = name.lower().replace("_", "-").replace(" ", "-").replace("gb", "g")
    if key.split("-")[0] == "cpu":
        size = key.partition("-")[2] or "16g"
        return Card(key, _size(size, name), 0.0, 0.0, 0.0, 0.0, 0.0, local_cards=1, is_cpu=True)
    if key in CARDS:
        return CARDS[key]
    found = [c for c in CARDS if c.startswith(key)]
    if found:
        return CARDS[found[0]]
    if key.endswith("g") and key[:-1].isdecimal():
        base = CARDS[DEFAULT]
        return Card(
            key,
            _size(key, name),
            base.peak_flops,
            base.link_bytes,
            base.network_bytes,
            base.host_bytes,
            base.memory_rate,
        )
    close = difflib.get_close_matches(key, CARDS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}?" if close else "or a size such as 80g"
    raise ValueError(
        say(
            f"card ({name!r}) must be one of {', '.join(CARDS)}, or cpu-16g; {hint}",
            f"加速卡（{name!r}）须为 {', '.join(CARDS)} 之一，或 cpu-16g；{hint}",
        )
    )


def _size(text: str, name: str) -> float:
    if not (text.endswith("g") and text[:-1].isdecimal() and int(text[:-1]) > 0):
        raise ValueError(
            say(
                f"card ({name!r}) must give its memory in GB, as cpu-16g or 80g; correct it",
                f"加速卡（{name!r}）须写明显存（GB），如 cpu-16g 或 80g；请改正",
            )
        )
    return int(text[:-1]) * GB

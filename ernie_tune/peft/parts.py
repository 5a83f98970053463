"""The parts that users speak of (attention, vision experts, router, ...), as patterns of canonical
names: one table for freezing and for reports.

Refuses to know: paddle, which method trains a part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ernie_tune.config.language import say

# First match wins. The names of adapters start with the name of the module they sit on, so they
# fall into its part.
PARTS: dict[str, str] = {
    "attention": r"layers\.\d+\.self_attn\.",
    "shared experts": r"layers\.\d+\.mlp\.shared_experts\.",
    "text experts": r"layers\.\d+\.mlp\.text_experts\.",
    "vision experts": r"layers\.\d+\.mlp\.vision_experts\.",
    "router": r"layers\.\d+\.mlp\.(gate|moe_statics)\.",
    "dense MLP": r"layers\.\d+\.mlp\.",
    "norms": r"layers\.\d+\.\w+_layernorm\.|norm\.",
    "embeddings": r"embed_tokens\.",
    "head": r"lm_head\.",
    "vision tower": r"vision_model\.",
    "resampler": r"resampler_model\.",
    "reward head": r"reward_head\.",
}
_PATTERNS = {part: re.compile(pattern) for part, pattern in PARTS.items()}
DECODER = tuple(part for part in PARTS if part not in ("vision tower", "resampler", "reward head"))

# The words of `freeze_config`, without "freeze_".
TOWERS: dict[str, tuple[str, ...]] = {
    "vision": ("vision tower",),
    "aligner": ("resampler",),
    "llm": DECODER,
    "router": ("router",),
    "text_experts": ("text experts",),
    "vision_experts": ("vision experts",),
}


def part_of(name: str) -> str:
    """The part that a parameter or module belongs to."""
    return next(part for part, pattern in _PATTERNS.items() if pattern.match(name + "."))


def frozen_parts(freeze_config: str | Iterable[str]) -> frozenset[str]:
    """The parts named by "freeze_vision freeze_aligner ..." (or a list of these words). ValueError
    for an unknown word.
    """
    words = freeze_config.split() if isinstance(freeze_config, str) else list(freeze_config)
    unknown = [word for word in words if word.removeprefix("freeze_") not in TOWERS or not word.startswith("freeze_")]
    if unknown:
        raise ValueError(
            say(
                f"freeze_config ({unknown[0]!r}) must be made of {[f'freeze_{word}' for word in TOWERS]}; "
                "choose from them, separated by spaces",
                f"freeze_config（{unknown[0]!r}）须由 {[f'freeze_{word}' for word in TOWERS]} "
                "组成；请从中选择，以空格分隔",
            )
        )
    return frozenset(part for word in words for part in TOWERS[word.removeprefix("freeze_")])

"""A reward that can be earned beside the point, to see a run say so: half for the gold digit
somewhere in the answer, half for a long answer. Knows nothing of models.
"""

from __future__ import annotations

from typing import Any

LONG_TOKENS = 8


def longer(completion_text: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
    return [
        0.5 * (str(gold) in text) + 0.5 * min(len(ids), LONG_TOKENS) / LONG_TOKENS
        for text, ids, gold in zip(completion_text, completion_ids, answer, strict=True)
    ]

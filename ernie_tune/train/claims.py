"""Credit within an answer: tokens that say what the picture contradicts lose some of their
advantage, whatever the whole answer earned.

Refuses to know: how claims are read and judged (rewards), how advantages are made, losses. Source:
Perceval (arXiv 2604.24583), whose weight is 0.1.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

import numpy as np

from ernie_tune.data.processor import Processor
from ernie_tune.rewards.functions import Answered
from ernie_tune.rewards.spoken import contradicted_spans
from ernie_tune.train.rolled import Rolled


def credit_claims(groups: Sequence[Rolled], processor: Processor, weight: float, scope: str = "both") -> None:
    """A - weight |A| for the tokens of contradicted claims, in the groups' column advantage_N. Rows
    without a scene are left alone.
    """
    for group in groups:
        scene = group.record.reward.scene if group.record.reward else {}
        if not scene:
            continue
        at = 0
        for answer, dialogue in zip(group.answers, group.unit.dialogues, strict=True):
            sampled = dialogue.trained_L[dialogue.num_tokens - len(answer.token_ids) :]
            wrong = np.zeros(len(sampled), bool)
            for start, end in contradicted_spans(answer.text, scene, scope):
                first, last = tokens_of(answer, start, end, processor)
                wrong[first:last] = True
            own = group.columns["advantage_N"][at : at + int(sampled.sum())]
            own -= weight * np.abs(own) * wrong[sampled]
            at += len(own)


def tokens_of(answer: Answered, start: int, end: int, processor: Processor) -> tuple[int, int]:
    """The tokens [first, last) of an answer that write the characters [start, end) of its text."""
    ids = [i for i in answer.token_ids if i not in processor.stop_ids]
    before = len(answer.text) - len(processor.decode(ids))  # what the prompt has opened
    written: Callable[[int], int] = lambda count: before + len(processor.decode(ids[:count]))  # noqa: E731
    counts = range(len(ids) + 1)
    first = bisect_right(counts, start, key=written) - 1
    return max(0, first), bisect_left(counts, end, key=written)

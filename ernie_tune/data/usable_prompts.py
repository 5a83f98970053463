"""Which rows can be answered by sampling: those whose prompt is not too long.

Refuses to know: how answers are sampled, what they earn.
"""

from __future__ import annotations

from ernie_tune.config.language import say
from ernie_tune.data.batching import THINKING, Dropped
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record


class UsablePrompts:
    """Which prompts can be answered: those that are not too long (they are never cut, a cut could
    part a picture).
    """

    def __init__(self, processor: Processor, max_tokens: int) -> None:
        self.processor, self.max_tokens = processor, max_tokens

    def usable(self, record: Record, dropped: Dropped) -> bool:
        """Whether it can, a reason noted where not."""
        thinking, where = THINKING.get(record.mode), str(record.meta)
        tokens, _ = self.processor.measure(
            record.prompt,
            record.images,
            record.videos,
            tools=record.tools,
            thinking=thinking,
            add_generation_prompt=True,
            where=where,
        )
        if tokens > self.max_tokens:
            dropped.add(
                say(
                    f"prompt longer than max_prompt_len ({self.max_tokens} tokens)",
                    f"提示超过 max_prompt_len（{self.max_tokens} 个 token）",
                ),
                where,
            )
        return tokens <= self.max_tokens

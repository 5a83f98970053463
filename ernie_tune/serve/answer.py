"""Tokens of one sample -> the text that a client sees: thought and answer apart, cut before a stop string, never half a character; and
the budget that ends a thought.

Refuses to know: the model, batches, HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ernie_tune.data.chat import THINK, THINK_END, ReasoningSplitter
from ernie_tune.data.processor import Processor


@dataclass(frozen=True)
class Delta:
    """What one step adds to an answer. `finish_reason` is "" until the last one."""

    content: str = ""
    reasoning_content: str = ""
    finish_reason: str = ""


class AnswerReader:
    """Reads one sample's tokens as they come; the deltas add up to the same text however they come.

    `thought_tokens`: tokens read while the thought was open, its closing mark included.
    """

    def __init__(
        self, processor: Processor, opened: bool = False, stop_strings: Sequence[str] = (), split: bool = True
    ) -> None:
        """`opened`: the prompt ends inside a thought. `split` False: everything is content, marks included."""
        self._decoder = processor.stream()
        self._splitter = ReasoningSplitter(opened) if split else None
        self._stops = tuple(stop_strings)
        self._held = ""  # could be the start of a stop string
        self._cut = False
        self.thought_tokens = 0

    def push(self, token_id: int, finish_reason: str = "") -> Delta:
        """The text that this token settles; with a `finish_reason` also what was held back."""
        text = self._decoder.push(token_id)
        if finish_reason:
            text += self._decoder.flush()
        text = self._before_stop(text, bool(finish_reason))
        if self._splitter is None:
            return Delta(text, "", finish_reason)
        self.thought_tokens += self._splitter.thinking
        reasoning, content = self._splitter.push(text)
        if finish_reason:
            rest = self._splitter.flush()
            reasoning, content = reasoning + rest[0], content + rest[1]
        return Delta(content, reasoning, finish_reason)

    def _before_stop(self, text: str, last: bool) -> str:
        if not self._stops or self._cut:
            return "" if self._cut else text
        text, self._held = self._held + text, ""
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self._cut = True
            return text[: min(found)]
        if not last:
            longest = max(map(len, self._stops))
            held = next(
                n
                for n in range(min(longest, len(text)), -1, -1)
                if any(s.startswith(text[len(text) - n :]) for s in self._stops)
            )
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        return text


class ThoughtBudget:
    """A `Steer` (models/generation.py): after `limit_tokens` of thought it forces the template's closing, then lets go.

    An answer that does not open with a thought, or ends its thought by itself, is left alone.
    """

    def __init__(self, processor: Processor, limit_tokens: int, opened: bool) -> None:
        self._processor, self._limit, self._opened = processor, limit_tokens, opened
        self._decoder, self._text = processor.stream(), ""
        self._read = self._start = 0  # tokens read; tokens before the thought
        self._forced: list[int] | None = None
        self._over = False

    def __call__(self, token_ids: Sequence[int]) -> int | None:
        if self._forced is None and not self._over:
            self._follow(token_ids)
        if self._over or self._forced is None:
            return None
        token = self._forced.pop(0)
        self._over = not self._forced
        return token

    def _follow(self, token_ids: Sequence[int]) -> None:
        for i in token_ids[self._read :]:
            self._text += self._decoder.push(i)
        self._read = len(token_ids)
        opening = self._text.lstrip()
        if not self._opened and opening.startswith(THINK):
            self._opened, self._start = True, self._read
        if THINK_END in self._text or not (self._opened or THINK.startswith(opening)):
            self._over = True
        elif self._opened and self._read - self._start >= self._limit:
            close = self._processor.template.style.close
            close = close.removeprefix("\n") if self._text.endswith("\n") else close
            self._forced = self._processor.tokenizer.encode(close, allow_special=True)

"""Tokens of one sample -> what a client sees: thought, answer and tool calls apart, cut before a
stop string, never half a character; and the budget that ends a thought.

Refuses to know: the model, batches, HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ernie_tune.data.chat import CALL, CALL_END, THINK, THINK_END, ReasoningSplitter
from ernie_tune.data.processor import Processor


@dataclass(frozen=True)
class ToolCall:
    """One call that an answer asks for. `arguments`: a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What one step adds to an answer. `finish_reason` is "" until the last one."""

    content: str = ""
    reasoning_content: str = ""
    finish_reason: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class CallSplitter:
    """Takes tool calls, `<tool_call>` {"name": ..., "arguments": {...}} `</tool_call>`, out of an
    answer that arrives in parts.

    What is not such a call, or is cut off, stays text.
    """

    def __init__(self) -> None:
        self._held = ""  # may begin a call, with the line break before it

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """(text that is settled, calls that end in it)."""
        self._held += text
        out, calls = "", []
        while (end := self._held.find(CALL_END)) >= 0:
            part, self._held = self._held[: end + len(CALL_END)], self._held[end + len(CALL_END) :]
            before, mark, inside = part.removesuffix(CALL_END).rpartition(CALL)
            call = _call(inside) if mark else None
            out += part if call is None else before.removesuffix("\n")
            calls += [] if call is None else [call]
        start = self._held.find(CALL)
        if start < 0:
            opening = f"\n{CALL}"
            sizes = range(min(len(opening), len(self._held)), 0, -1)
            tails = (n for n in sizes if opening.startswith(self._held[-n:]) or CALL.startswith(self._held[-n:]))
            start = len(self._held) - next(tails, 0)
        elif self._held[:start].endswith("\n"):
            start -= 1
        out, self._held = out + self._held[:start], self._held[start:]
        return out, tuple(calls)

    def flush(self) -> str:
        """What was held back, at the end."""
        rest, self._held = self._held, ""
        return rest


def _call(text: str) -> ToolCall | None:
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get("arguments", {})
    return ToolCall(found["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None


class AnswerReader:
    """Reads one sample's tokens as they come; the deltas add up to the same text however they come.

    `thought_tokens`: tokens read while the thought was open, its closing mark included.
    """

    def __init__(
        self,
        processor: Processor,
        opened: bool = False,
        stop_strings: Sequence[str] = (),
        split: bool = True,
        calls: bool = False,
    ) -> None:
        """`opened`: the prompt ends inside a thought. `split` False: everything is content, marks
        included. `calls`: tool calls are taken out.
        """
        self._decoder = processor.stream()
        self._splitter = ReasoningSplitter(opened) if split else None
        self._calls = CallSplitter() if calls else None
        self._called = False
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
        if self._calls is None:
            return Delta(content, reasoning, finish_reason)
        content, calls = self._calls.push(content)
        self._called |= bool(calls)
        if finish_reason:
            content += self._calls.flush()
        return Delta(
            content, reasoning, "tool_calls" if self._called and finish_reason == "stop" else finish_reason, calls
        )

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
    """A `Steer` (models/generation.py): after `limit_tokens` of thought it forces the template's
    closing, then lets go.

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

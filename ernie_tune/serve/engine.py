"""A model and its processor as one conversation partner: messages in, answers out, streamed or whole, thought and answer apart.

Refuses to know: HTTP, terminals, training. Prompts are rendered by the processor that training uses, so both see the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ernie_tune.data.chat import Message, ReasoningSplitter, split_reasoning
from ernie_tune.data.processor import Processor
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.generation import TokenEvent, stream
from ernie_tune.models.sampling import SamplingParams


@dataclass(frozen=True)
class Delta:
    """What one step adds to an answer. `finish_reason` is "" until the last one."""

    content: str = ""
    reasoning_content: str = ""
    finish_reason: str = ""


@dataclass(frozen=True)
class Answer:
    """A whole answer with its tokens and their log-probabilities."""

    content: str
    reasoning_content: str
    finish_reason: str
    token_ids: tuple[int, ...]
    logps: tuple[float, ...]
    prompt_tokens: int


@dataclass(frozen=True)
class Request:
    """One conversation: canonical messages, the media of its tags, and whether the model is to think (None: the template's default)."""

    messages: Sequence[Message]
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    thinking: bool | None = None


class Engine:
    """Answers requests with one model. Raises what `Processor.encode` and `stream` raise for bad requests."""

    def __init__(self, model: ErnieModel, processor: Processor) -> None:
        self.model, self.processor = model, processor

    def params(self, **changes: Any) -> SamplingParams:
        """Sampling settings with this processor's stop ids and its unanswerable tokens."""
        tokens = self.processor.tokens
        return SamplingParams(
            stop_ids=self.processor.stop_ids, banned_ids=tokens.placeholders() + tokens.markers(), **changes
        )

    def stream(self, request: Request, params: SamplingParams) -> Iterator[Delta]:
        """Deltas of one answer as they appear; no half characters, no thought marks."""
        encoded, opened = self._encode(request)
        decoder, splitter = self.processor.stream(), ReasoningSplitter(opened)
        for event in stream(
            self.model, [encoded.row], self.processor.tokens, replace(params, n=1), self.processor.decode
        ):
            text = decoder.push(event.token_id)
            if event.finish_reason:
                text += decoder.flush()
            reasoning, content = splitter.push(text)
            if event.finish_reason:
                rest = splitter.flush()
                reasoning, content = reasoning + rest[0], content + rest[1]
            if reasoning or content or event.finish_reason:
                yield Delta(content, reasoning, event.finish_reason)

    def answer(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Answer]]:
        """`params.n` whole answers to each of several requests, computed in one batch."""
        encoded = [self._encode(request) for request in requests]
        events: dict[tuple[int, int], list[TokenEvent]] = {}
        rows = [e.row for e, _ in encoded]
        for event in stream(self.model, rows, self.processor.tokens, params, self.processor.decode):
            events.setdefault((event.prompt, event.sample), []).append(event)
        return [[self._collect(events[i, s], *encoded[i]) for s in range(params.n)] for i in range(len(requests))]

    def _encode(self, request: Request) -> tuple[Any, bool]:
        template = self.processor.template
        encoded = self.processor.encode(
            request.messages, request.images, request.videos, thinking=request.thinking, add_generation_prompt=True
        )
        return encoded, template.opens_thought(template.thinks(request.messages, request.thinking))

    def _collect(self, events: Sequence[TokenEvent], encoded: Any, opened: bool) -> Answer:
        ids = tuple(e.token_id for e in events)
        reasoning, content = split_reasoning(self.processor.decode(ids), opened)
        return Answer(
            content, reasoning, events[-1].finish_reason, ids, tuple(e.logp for e in events), encoded.num_tokens
        )

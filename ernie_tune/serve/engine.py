"""A model and its processor as one conversation partner: messages in, answers out, streamed or whole, thought and answer apart.

Refuses to know: HTTP, terminals, training. Prompts are rendered by the processor that training uses, so both see the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ernie_tune.data.chat import Message
from ernie_tune.data.processor import Encoded, Processor
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.generation import Prompt, RunningBatch, Steer, TokenEvent, stream_prompts
from ernie_tune.models.sampling import SamplingParams
from ernie_tune.serve.answer import AnswerReader, Delta, ThoughtBudget


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
    """One conversation: canonical messages, the media of its tags, whether the model is to think (None: the template's default) and for how
    many tokens at most (None: no limit), and the tools that it may call (data/chat.py)."""

    messages: Sequence[Message]
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    thinking: bool | None = None
    max_thought_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class Prepared:
    """A request as the model sees it. `opened`: the prompt ends inside a thought; `calls`: the answer may call tools."""

    prompt: Prompt
    num_tokens: int
    opened: bool
    calls: bool = False


class Engine:
    """Answers requests with one model. Raises what `Processor.encode` and `RunningBatch.join` raise for bad requests."""

    def __init__(self, model: ErnieModel, processor: Processor) -> None:
        self.model, self.processor = model, processor

    def params(self, **changes: Any) -> SamplingParams:
        """Sampling settings with this processor's stop ids and its unanswerable tokens."""
        tokens = self.processor.tokens
        return SamplingParams(
            stop_ids=self.processor.stop_ids, banned_ids=tokens.placeholders() + tokens.markers(), **changes
        )

    def prepare(
        self, request: Request, params: SamplingParams, key: int = 0, index: int = 0, max_tokens: int | None = None
    ) -> Prepared:
        """Render and encode. `key` and `index`: see `Prompt`. `max_tokens`: RowTooLong for a longer prompt."""
        template = self.processor.template
        opened = template.opens_thought(template.thinks(request.messages, request.thinking))
        encoded: Encoded = self.processor.encode(
            request.messages,
            request.images,
            request.videos,
            tools=request.tools,
            thinking=request.thinking,
            add_generation_prompt=True,
            max_tokens=max_tokens,
        )
        limit = request.max_thought_tokens

        def budget() -> Steer:
            assert limit is not None
            return ThoughtBudget(self.processor, limit, opened)

        prompt = Prompt(encoded.row, params, key, index, None if limit is None else budget)
        return Prepared(prompt, encoded.num_tokens, opened, bool(request.tools))

    def batch(self) -> RunningBatch:
        """An empty batch for prepared prompts."""
        return RunningBatch(self.model, self.processor.tokens, self.processor.decode)

    def reader(self, prepared: Prepared) -> AnswerReader:
        """A reader for one sample of a prepared request."""
        stops = prepared.prompt.params.stop_strings
        return AnswerReader(self.processor, prepared.opened, stops, calls=prepared.calls)

    def stream(self, request: Request, params: SamplingParams) -> Iterator[Delta]:
        """Deltas of one answer as they appear; no half characters, no thought marks, nothing from a stop string on."""
        prepared = self.prepare(request, replace(params, n=1))
        reader = self.reader(prepared)
        for event in self._events([prepared]):
            delta = reader.push(event.token_id, event.finish_reason)
            if delta != Delta():
                yield delta

    def answer(self, requests: Sequence[Request], params: SamplingParams) -> list[list[Answer]]:
        """`params.n` whole answers to each of several requests, computed in one batch."""
        prepared = [self.prepare(request, params, i, i) for i, request in enumerate(requests)]
        events: dict[tuple[int, int], list[TokenEvent]] = {}
        for event in self._events(prepared):
            events.setdefault((event.prompt, event.sample), []).append(event)
        return [[self._collect(events[i, s], one) for s in range(params.n)] for i, one in enumerate(prepared)]

    def _events(self, prepared: Sequence[Prepared]) -> Iterator[TokenEvent]:
        prompts = [one.prompt for one in prepared]
        return stream_prompts(self.model, prompts, self.processor.tokens, self.processor.decode)

    def _collect(self, events: Sequence[TokenEvent], prepared: Prepared) -> Answer:
        reader = self.reader(prepared)
        deltas = [reader.push(e.token_id, e.finish_reason) for e in events]
        return Answer(
            "".join(d.content for d in deltas),
            "".join(d.reasoning_content for d in deltas),
            events[-1].finish_reason,
            tuple(e.token_id for e in events),
            tuple(e.logp for e in events),
            prepared.num_tokens,
        )

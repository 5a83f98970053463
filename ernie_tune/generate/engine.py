"""A model and its processor as one conversation partner: messages in, answers out, streamed or
whole, thought and answer apart.

Refuses to know: HTTP, terminals, training. Prompts are rendered by the processor that training
uses, so both see the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ernie_tune.data.chat import Message
from ernie_tune.data.processor import Encoded, Processor
from ernie_tune.generate.answer import AnswerReader, Delta, ThoughtBudget
from ernie_tune.generate.batch import Completion, Prompt, Steer, eval_mode
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.generate.scheduler import Capacity, Scheduler, complete
from ernie_tune.models.ernie import ErnieModel


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
    """One conversation: canonical messages, the media of its tags, whether the model is to think
    (None: the template's default) and for how many tokens at most (None: no limit), and the tools
    that it may call (data/chat.py).
    """

    messages: Sequence[Message]
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    thinking: bool | None = None
    max_thought_tokens: int | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    where: str = ""  # what errors call it: a row's file and line
    continues: bool = False  # the last message is an answer to go on with, not one to reply to


@dataclass(frozen=True)
class Prepared:
    """A request as the model sees it. `opened`: the prompt ends inside a thought; `calls`: the
    answer may call tools.
    """

    prompt: Prompt
    num_tokens: int
    opened: bool
    calls: bool = False


class Engine:
    """Answers requests with one model. Raises what `Processor.encode` and `Scheduler.submit` raise
    for bad requests.
    """

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
        """Render and encode. `key` and `index`: see `Prompt`. `max_tokens`: RowTooLong for a longer
        prompt.

        With `continues` the prompt ends inside the last message, an assistant's, whose thought is
        over.
        """
        template = self.processor.template
        thinks = template.thinks(request.messages, request.thinking)
        opened = template.opens_thought(thinks) and not request.continues
        encoded: Encoded = self.processor.encode(
            request.messages,
            request.images,
            request.videos,
            tools=request.tools,
            thinking=request.thinking,
            add_generation_prompt=not request.continues,
            max_tokens=max_tokens,
            where=request.where,
        )
        row, length = encoded.row, encoded.num_tokens
        # the token that closes the answer is what the model may go on without
        if request.continues:
            length -= 1
            row = replace(row, input_ids_L=row.input_ids_L[:length])
        limit = request.max_thought_tokens

        def budget() -> Steer:
            assert limit is not None
            return ThoughtBudget(self.processor, limit, opened)

        prompt = Prompt(row, params, key, index, None if limit is None else budget)
        return Prepared(prompt, length, opened, bool(request.tools))

    def scheduler(self, capacity: Capacity | None = None) -> Scheduler:
        """What runs prepared prompts."""
        return Scheduler(self.model, self.processor.tokens, capacity, self.processor.decode)

    def reader(self, prepared: Prepared) -> AnswerReader:
        """A reader for one sample of a prepared request."""
        stops = prepared.prompt.params.stop_strings
        return AnswerReader(self.processor, prepared.opened, stops, calls=prepared.calls)

    def stream(self, request: Request, params: SamplingParams) -> Iterator[Delta]:
        """Deltas of one answer as they appear; no half characters, no thought marks, nothing from a
        stop string on.
        """
        prepared = self.prepare(request, replace(params, n=1))
        reader, scheduler = self.reader(prepared), self.scheduler()
        scheduler.submit(prepared.prompt)
        with eval_mode(self.model):
            while len(scheduler):
                for event in scheduler.step():
                    if event.error is not None:
                        raise event.error
                    delta = reader.push(event.token_id, event.finish_reason)
                    if delta != Delta():
                        yield delta

    def answer(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        capacity: Capacity | None = None,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[list[Answer]]:
        """`params.n` whole answers to each of several requests, in their order. Prompts of like
        length are computed together. `done` is told how many more requests have their answers.
        """
        prepared = [self.prepare(request, params, i, i) for i, request in enumerate(requests)]
        scheduler = self.scheduler(capacity or Capacity(rows=max(params.n, 64)))
        by_length = sorted(prepared, key=lambda one: one.num_tokens)
        found: dict[int, list[Completion]] = {}
        for i, completions in complete(scheduler, [one.prompt for one in by_length]):
            found[i] = completions
            done(1)
        return [[self.read(one, asked) for one in found[i]] for i, asked in enumerate(prepared)]

    def read(self, done: Completion, prepared: Prepared) -> Answer:
        """A finished sample of a prepared request as an answer."""
        reader = self.reader(prepared)
        last = len(done.token_ids) - 1
        deltas = [reader.push(token, done.finish_reason if i == last else "") for i, token in enumerate(done.token_ids)]
        return Answer(
            "".join(d.content for d in deltas),
            "".join(d.reasoning_content for d in deltas),
            done.finish_reason,
            tuple(done.token_ids),
            tuple(done.logps),
            prepared.num_tokens,
        )

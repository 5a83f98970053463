"""From a checked request to its tokens: names to adapters, URLs to pictures, messages to prompts, prompts to jobs, and events back to an event loop.

Refuses to know: paths, headers, the shape of replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ernie_tune.data.processor import RowTooLong
from ernie_tune.generate.answer import AnswerReader, Delta
from ernie_tune.generate.batch import Prompt, TokenEvent
from ernie_tune.generate.engine import Engine, Prepared, Request
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.generate.scheduler import Capacity
from ernie_tune.models.inputs import Row, feature_count, pack
from ernie_tune.serve.media import read_image, read_video
from ernie_tune.serve.metrics import Metrics
from ernie_tune.serve.options import ServeOptions
from ernie_tune.serve.schema import ChatRequest, CompletionRequest, Sampling
from ernie_tune.serve.thread import EngineEnded, EngineFailure, Job, SchedulerThread


class ApiError(Exception):
    """What a client is told: an HTTP status and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param


@dataclass
class Choice:
    """One answer in the making."""

    index: int
    reader: AnswerReader
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(frozen=True)
class Step:
    """One token of one choice and the text that it settled."""

    choice: Choice
    event: TokenEvent
    delta: Delta


@dataclass
class Ticket:
    """One request that is being answered. `steps` must be run to its end or closed."""

    model: str
    prepared: Sequence[Prepared]
    choices: Sequence[Choice]
    jobs: Sequence[Job]
    queue: asyncio.Queue[list[TokenEvent] | EngineFailure]
    leave: Callable[[], None]

    @property
    def prompt_tokens(self) -> int:
        return sum(one.num_tokens for one in self.prepared)

    @property
    def answer_tokens(self) -> int:
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def thought_tokens(self) -> int:
        return sum(choice.reader.thought_tokens for choice in self.choices)

    def media_tokens(self) -> tuple[int, int]:
        """(of images, of videos) in the prompt."""
        grids = [
            grid
            for one in self.prepared
            for grid in (one.prompt.row.grid_thw_n3 if one.prompt.row.grid_thw_n3 is not None else ())
        ]
        counts = [(int(grid[0]) > 1, feature_count(grid)) for grid in grids]
        return sum(n for video, n in counts if not video), sum(n for video, n in counts if video)


class Service:
    """A model that answers requests of the API, on one event loop."""

    def __init__(self, engine: Engine, models: dict[str, str | None], options: ServeOptions) -> None:
        """`models`: served name -> adapter, None for the base; the first one answers requests that name none.

        Raises ValueError for a max_model_len above the model's.
        """
        most = engine.model.config.max_position_embeddings
        self.max_model_len = options.max_model_len or most
        if self.max_model_len > most:
            raise ValueError(
                f"max_model_len ({self.max_model_len}) must not exceed max_position_embeddings ({most}); lower it"
            )
        self.engine, self.models, self.options = engine, models, options
        capacity = Capacity(options.max_num_seqs, options.cache_tokens, options.prefill_tokens)
        self.scheduler = SchedulerThread(engine, capacity)
        tokenizer = engine.processor.tokenizer
        self._longest_token_bytes = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        self.metrics = Metrics()
        self.started = int(time.time())
        self._keys = itertools.count(1)
        self._workers = ThreadPoolExecutor(options.preparing, "prepare")
        # Pictures cut into patches are large: not many more requests than can run hold theirs.
        self._outside = 0  # requests that wait for a place
        self._places = asyncio.Semaphore(options.max_num_seqs + options.preparing)

    def start(self) -> None:
        self.scheduler.start()

    def close(self) -> None:
        self.scheduler.close()
        self._workers.shutdown(wait=False, cancel_futures=True)

    def find(self, name: str | None) -> tuple[str, str | None]:
        """(served name, adapter). Raises ApiError 404 for an unknown name."""
        if name is None:
            return next(iter(self.models.items()))
        if name not in self.models:
            raise ApiError(
                404,
                f"model ({name[:100]!r}) must be one of {list(self.models)}; GET /v1/models lists them",
                code="model_not_found",
                param="model",
            )
        return name, self.models[name]

    async def chat(self, request: ChatRequest) -> Ticket:
        """Fetch, render, encode and queue. Raises ApiError."""
        name, adapter = self.find(request.model)
        self._check_media(request)
        params = self._params(request, request.limit, request.logprobs, request.top_logprobs)

        def prepare() -> list[Prepared]:
            texts = [text for message in request.messages for text in message.texts()]
            self._check_length([*texts, *map(str, request.callable_tools)])
            messages = [self._message(i, message) for i, message in enumerate(request.messages)]
            limit = request.reasoning_max_tokens
            asked = Request(messages, thinking=request.thinking, max_thought_tokens=limit, tools=request.callable_tools)
            return [self.engine.prepare(asked, params, next(self._keys), max_tokens=self.max_model_len)]

        return await self._queue(name, adapter, request, prepare, self.engine.reader)

    async def complete(self, request: CompletionRequest) -> Ticket:
        """Encode and queue raw prompts. Raises ApiError."""
        name, adapter = self.find(request.model)
        if len(request.prompts) * request.n > self.options.max_num_seqs:
            raise ApiError(
                400,
                f"number of prompts * n ({len(request.prompts) * request.n}) must be at most max_num_seqs ({self.options.max_num_seqs}); send fewer",
                param="prompt",
            )
        params = self._params(request, request.limit, request.logprobs is not None, request.logprobs)

        def prepare() -> list[Prepared]:
            for prompt in request.prompts:
                self._check_length([prompt] if isinstance(prompt, str) else [])
            return [self._raw(i, prompt, params) for i, prompt in enumerate(request.prompts)]

        def reader(prepared: Prepared) -> AnswerReader:
            return AnswerReader(self.engine.processor, stop_strings=request.stops, split=False)

        return await self._queue(name, adapter, request, prepare, reader)

    async def steps(self, ticket: Ticket) -> AsyncIterator[list[Step]]:
        """What each step of the model adds, until every choice is done. Raises ApiError 500 or 503 when the model fails or ends; leaves the queue however it ends."""
        first = {one.prompt.key: i * one.prompt.params.n for i, one in enumerate(ticket.prepared)}
        try:
            while any(not choice.finish_reason for choice in ticket.choices):
                events = await ticket.queue.get()
                if isinstance(events, EngineFailure):
                    raise _failure(events)
                steps = []
                for event in events:
                    choice = ticket.choices[first[event.prompt] + event.sample]
                    choice.token_ids.append(event.token_id)
                    delta = choice.reader.push(event.token_id, event.finish_reason)
                    choice.finish_reason = delta.finish_reason
                    steps.append(Step(choice, event, delta))
                yield steps
        finally:
            self.abandon(ticket)
            self.metrics.prompt_tokens.add(ticket.prompt_tokens, ticket.model)
            self.metrics.answer_tokens.add(ticket.answer_tokens, ticket.model)

    def abandon(self, ticket: Ticket) -> None:
        """Give back what the ticket holds; done work is not affected."""
        ticket.leave()
        for job in ticket.jobs:
            if job.rows_left:
                self.scheduler.cancel(job)

    def text(self) -> str:
        """The metrics page."""
        load = self.scheduler.load()
        return self.metrics.text(
            {
                "ernie_tune_requests_waiting": (
                    "Requests that wait for a place in a batch.",
                    load.waiting + self._outside,
                ),
                "ernie_tune_sequences_running": ("Answers that are being computed.", load.running),
                "ernie_tune_steps_total": ("Steps of the model.", load.steps),
                "ernie_tune_step_sequences_total": ("Answers advanced, summed over steps.", load.rows_stepped),
                "ernie_tune_step_seconds_total": ("Time spent in steps.", load.step_seconds),
            }
        )

    # --- one request -------------------------------------------------------------------------------------------------

    async def _queue(
        self,
        name: str,
        adapter: str | None,
        request: Sampling,
        prepare: Callable[[], list[Prepared]],
        reader: Callable[[Prepared], AnswerReader],
    ) -> Ticket:
        loop = asyncio.get_running_loop()
        self._outside += 1
        try:
            await self._places.acquire()
        finally:
            self._outside -= 1
        leave = _once(self._places.release)
        with contextlib.ExitStack() as undo:
            undo.callback(leave)
            with _refusals():
                prepared = [self._fit(one, request) for one in await loop.run_in_executor(self._workers, prepare)]
            queue: asyncio.Queue[list[TokenEvent] | EngineFailure] = asyncio.Queue()

            def report(news: list[TokenEvent] | EngineFailure) -> None:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
                    loop.call_soon_threadsafe(queue.put_nowait, news)

            jobs = [Job(one, adapter, report) for one in prepared]
            with _refusals():
                for job in jobs:
                    self.scheduler.check(job)
            rows = [one for one in prepared for _ in range(one.prompt.params.n)]
            ticket = Ticket(name, prepared, [Choice(i, reader(one)) for i, one in enumerate(rows)], jobs, queue, leave)
            undo.callback(self.abandon, ticket)
            try:
                for job in jobs:
                    self.scheduler.submit(job)
            except EngineFailure as error:
                raise _failure(error) from error
            undo.pop_all()
            return ticket

    def _params(self, request: Sampling, limit: int | None, logprobs: bool, top: int | None) -> SamplingParams:
        # A request without a seed must differ from the next one; the seed's sign is of no use to the generator.
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**64
        with _refusals():
            return self.engine.params(
                max_new_tokens=limit or 1,
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=max(request.top_k, 0),
                repetition_penalty=request.repetition_penalty,
                frequency_penalty=request.frequency_penalty,
                presence_penalty=request.presence_penalty,
                n=request.n,
                seed=seed,
                stop_strings=request.stops,
                top_logprobs=(top or 0) if logprobs else 0,
            )

    def _fit(self, prepared: Prepared, request: Sampling) -> Prepared:
        """With the default limit where the request names none. Raises ValueError where prompt and answer exceed max_model_len."""
        room = self.max_model_len - prepared.num_tokens
        limit = request.limit or min(self.options.default_max_tokens, room)
        if limit < 1 or limit > room:
            raise RowTooLong(
                f"prompt tokens ({prepared.num_tokens}) + max_tokens ({max(limit, 1)}) must not exceed the context ({self.max_model_len}); shorten the prompt or lower max_tokens"
            )
        prompt = replace(prepared.prompt, params=replace(prepared.prompt.params, max_new_tokens=limit))
        pack([prompt.row], self.engine.processor.tokens)  # refuses what would spoil a batch
        return replace(prepared, prompt=prompt)

    def _check_media(self, request: ChatRequest) -> None:
        parts = [part for message in request.messages if isinstance(message.content, list) for part in message.content]
        for kind, limit in (("image", self.options.images), ("video", self.options.videos)):
            count = sum(part.type == f"{kind}_url" for part in parts)
            if count > limit:
                raise ApiError(
                    400, f"number of {kind}s ({count}) must be at most {limit}; send fewer", param="messages"
                )

    def _check_length(self, texts: Sequence[str]) -> None:
        """Refuse text that cannot fit however it is cut into tokens, before it is: cutting megabytes takes long. Raises RowTooLong."""
        least = sum(len(text.encode("utf-8", "replace")) for text in texts) // self._longest_token_bytes
        if least > self.max_model_len:
            raise RowTooLong(
                f"prompt (at least {least} tokens) must not exceed the context ({self.max_model_len} tokens); shorten it"
            )

    def _message(self, index: int, message: Any) -> dict[str, Any]:
        """In the words of data/chat.py. Text goes into parts, where no tag in it means a medium."""
        role = {"developer": "system", "bot": "assistant"}.get(message.role, message.role)
        parts: list[dict[str, Any]] = []
        content = message.content
        for i, part in enumerate([] if content is None else [content] if isinstance(content, str) else content):
            where = f"messages[{index}].content[{i}]"
            if isinstance(part, str):
                parts.append({"type": "text", "text": part})
            elif part.type == "text":
                parts.append({"type": "text", "text": part.text})
            elif part.type == "image_url":
                parts.append({"type": "image", "image": read_image(part.image_url.url, self.options.media, where)})
            else:
                parts.append({"type": "video", "video": read_video(part.video_url.url, self.options.media, where)})
        out: dict[str, Any] = {"role": role, "content": parts}
        if role == "assistant" and message.reasoning_content:
            out["reasoning_content"] = message.reasoning_content
        if role == "assistant" and message.tool_calls:
            out["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        return out

    def _raw(self, index: int, prompt: str | list[int], params: SamplingParams) -> Prepared:
        vocabulary = self.engine.model.config.vocab_size
        ids = self.engine.processor.tokenizer.encode(prompt, allow_special=True) if isinstance(prompt, str) else prompt
        wrong = [i for i in ids if not 0 <= i < vocabulary]
        if wrong:
            raise ValueError(
                f"prompt[{index}] token id ({wrong[0]}) must be from 0 to {vocabulary - 1}; use this model's tokenizer"
            )
        return Prepared(Prompt(Row(np.asarray(ids, np.int64)), params, next(self._keys), index), len(ids), False)


def _failure(failure: EngineFailure) -> ApiError:
    return ApiError(503 if isinstance(failure, EngineEnded) else 500, str(failure), "server_error")


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """What the library says of bad input, as answers 400."""
    try:
        yield
    except RowTooLong as error:
        raise ApiError(400, str(error), code="context_length_exceeded") from error
    except (ValueError, ImportError) as error:
        raise ApiError(400, str(error)) from error


def _once(call: Callable[[], None]) -> Callable[[], None]:
    """`call`, the first time only."""
    done = False

    def run() -> None:
        nonlocal done
        if not done:
            done = True
            call()

    return run

"""From a checked request to its tokens: names to adapters, URLs to pictures, messages to prompts,
prompts to jobs, and events back to an event loop.

Refuses to know: paths, headers, the shape of replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.chat import CALL_END
from ernie_tune.data.processor import RowTooLong
from ernie_tune.generate.answer import AnswerReader, Delta
from ernie_tune.generate.batch import Prompt, TokenEvent
from ernie_tune.generate.engine import Engine, Prepared, Request
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.generate.scheduler import Capacity
from ernie_tune.models.inputs import Row, feature_count, pack
from ernie_tune.serve.errors import ApiError
from ernie_tune.serve.guide import CallRule, Grammars, Guide
from ernie_tune.serve.media import read_image, read_video
from ernie_tune.serve.metrics import Metrics
from ernie_tune.serve.options import ServeOptions
from ernie_tune.serve.pool import Lease, Pool
from ernie_tune.serve.requests import BodyLimits
from ernie_tune.serve.schema import ChatRequest, CompletionRequest, Sampling
from ernie_tune.serve.thread import EngineEnded, EngineFailure, SchedulerThread, Submission, UnfitRequest

T = TypeVar("T")
Medium = Callable[[str, str, str], dict[str, Any]]  # (kind, URL, where it stands) -> a part


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
    jobs: Sequence[Submission]
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
        """`models`: served name -> adapter, None for the base; the first one answers requests that
        name none.

        Raises ValueError for a max_model_len above the model's.
        """
        most = engine.model.config.max_position_embeddings
        self.max_model_len = options.max_model_len or most
        if self.max_model_len > most:
            raise ValueError(
                say(
                    f"max_model_len ({self.max_model_len}) must not exceed max_position_embeddings ({most}); lower it",
                    f"max_model_len（{self.max_model_len}）不能超过 max_position_embeddings（{most}）；请调小",
                )
            )
        self.engine, self.models, self.options = engine, models, options
        capacity = Capacity(options.max_num_seqs, options.cache_tokens, options.prefill_tokens)
        self.scheduler = SchedulerThread(engine, capacity)
        tokenizer = engine.processor.tokenizer
        self._longest_token_bytes = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size))
        self.grammars = Grammars(engine.processor, engine.model.config.vocab_size)
        self.metrics = Metrics()
        self.started = int(time.time())
        self._keys = itertools.count(1)
        # 16 bytes a token: escaped Chinese takes six a character.
        text = options.max_text_bytes or 2**20 + 16 * self.max_model_len
        self.body_limits = BodyLimits(text, self.max_model_len, options.max_num_seqs)
        # Text never waits behind pictures, nor parsing behind either.
        self.parsing = Pool(1, "parse")
        self._text, self._media = Pool(options.preparing, "text"), Pool(options.preparing, "media")
        # Pictures cut into patches are large: not many more requests than can run hold theirs.
        self._outside = 0  # requests that wait for a place
        self._places = asyncio.Semaphore(options.max_num_seqs + options.preparing)
        self._media_places = asyncio.Semaphore(options.preparing)

    def start(self) -> None:
        self.scheduler.start()

    def close(self) -> None:
        self.scheduler.close()
        for pool in (self.parsing, self._text, self._media):
            pool.close()

    def find(self, name: str | None) -> tuple[str, str | None]:
        """(served name, adapter). Raises ApiError 404 for an unknown name."""
        if name is None:
            return next(iter(self.models.items()))
        if name not in self.models:
            raise ApiError(
                404,
                say(
                    f"model ({name[:100]!r}) must be one of {list(self.models)}; GET /v1/models lists them",
                    f"model（{name[:100]!r}）须为 {list(self.models)} 之一；GET /v1/models 可列出",
                ),
                code="model_not_found",
                param="model",
            )
        return name, self.models[name]

    async def chat(self, request: ChatRequest) -> Ticket:
        """Fetch, render, encode and queue. Raises ApiError."""
        name, adapter = self.find(request.model)
        lease = Lease(self.options.media_timeout_seconds) if self._check_media(request) else None
        params = self._params(request, request.limit, request.logprobs, request.top_logprobs)
        if request.callable_tools and request.one_call:  # the answer ends with its first call
            params = replace(params, stop_strings=(*params.stop_strings, CALL_END))

        def prepare() -> list[Prepared]:
            texts = [text for message in request.messages for text in message.texts()]
            self.check_length([*texts, *map(str, request.callable_tools)])
            messages = self._messages(request, lease)
            limit = request.reasoning_max_tokens
            asked = Request(
                messages,
                thinking=request.thinking,
                max_thought_tokens=limit,
                tools=request.callable_tools,
                continues=request.continue_final_message,
            )
            prepared = self.engine.prepare(asked, params, next(self._keys), max_tokens=self.max_model_len)
            thinks = self.engine.processor.template.thinks(messages, request.thinking)
            return [self._guided(prepared, request, thinks and not request.continue_final_message)]

        def reader(prepared: Prepared) -> AnswerReader:
            return AnswerReader(self.engine.processor, prepared.opened, request.stops, calls=prepared.calls)

        return await self._queue(name, adapter, request, prepare, reader, lease)

    async def complete(self, request: CompletionRequest) -> Ticket:
        """Encode and queue raw prompts. Raises ApiError."""
        name, adapter = self.find(request.model)
        if len(request.prompts) * request.n > self.options.max_num_seqs:
            raise ApiError(
                400,
                say(
                    f"number of prompts * n ({len(request.prompts) * request.n}) must be at most max_num_seqs "
                    f"({self.options.max_num_seqs}); send fewer",
                    f"提示数 * n（{len(request.prompts) * request.n}）至多为 max_num_seqs（{self.options.max_num_seqs}）；请减少",
                ),
                param="prompt",
            )
        params = self._params(request, request.limit, request.logprobs is not None, request.logprobs)

        def prepare() -> list[Prepared]:
            for prompt in request.prompts:
                self.check_length([prompt] if isinstance(prompt, str) else [])
            return [self._guided(self._raw(i, prompt, params), request) for i, prompt in enumerate(request.prompts)]

        def reader(prepared: Prepared) -> AnswerReader:
            return AnswerReader(self.engine.processor, stop_strings=request.stops, split=False)

        return await self._queue(name, adapter, request, prepare, reader)

    async def steps(self, ticket: Ticket) -> AsyncIterator[list[Step]]:
        """What each step of the model adds, until every choice is done. Raises ApiError 500 or 503
        when the model fails or ends; leaves the queue however it ends.
        """
        first = {one.prompt.key: i * one.prompt.params.n for i, one in enumerate(ticket.prepared)}
        try:
            while any(not choice.finish_reason for choice in ticket.choices):
                events = await ticket.queue.get()
                if isinstance(events, EngineFailure):
                    raise failure_of(events)
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

    # --- one request ------------------------------------------------------------------------------

    async def _queue(
        self,
        name: str,
        adapter: str | None,
        request: Sampling,
        prepare: Callable[[], list[Prepared]],
        reader: Callable[[Prepared], AnswerReader],
        lease: Lease | None = None,
    ) -> Ticket:
        loop = asyncio.get_running_loop()
        with contextlib.ExitStack() as undo:
            prepared, leave = await self.admit(undo, prepare, lease)
            with _refusals():
                prepared = [self._fit(one, request) for one in prepared]
            queue: asyncio.Queue[list[TokenEvent] | EngineFailure] = asyncio.Queue()
            running = len(prepared)

            def told(news: list[TokenEvent] | EngineFailure, last: bool) -> None:
                nonlocal running
                queue.put_nowait(news)
                running -= last
                if not running:  # whether anybody reads the answer or not
                    leave()

            def report(job: Submission, news: list[TokenEvent] | EngineFailure) -> None:
                last = isinstance(news, EngineFailure) or not job.rows_left
                # the loop is closed: nobody is left to tell
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(told, news, last)

            jobs = [_job(one, adapter, report) for one in prepared]
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
                raise failure_of(error) from error
            undo.pop_all()
            return ticket

    async def admit(
        self, undo: contextlib.ExitStack, prepare: Callable[[], T], lease: Lease | None = None
    ) -> tuple[T, Callable[[], None]]:
        """(what `prepare` made in a thread, what gives the request's place back), once there is a
        place. `undo` gives back what is held. `lease`: of media, without it there are none.

        Raises ApiError. What waits for a place is small: text, or the pictures of the few that are
        read at a time.
        """
        if lease is not None:
            await self._wait(self._media_places)
            undo.callback(held := _once(self._media_places.release))
            prepared = await self._prepare(self._media, prepare, lease)
        await self._wait(self._places)
        leave = _once(self._places.release)
        undo.callback(leave)
        if lease is not None:
            held()
            return prepared, leave
        return await self._prepare(self._text, prepare), leave

    async def _wait(self, places: asyncio.Semaphore) -> None:
        self._outside += 1
        try:
            await places.acquire()
        finally:
            self._outside -= 1

    async def _prepare(self, pool: Pool, prepare: Callable[[], T], lease: Lease | None = None) -> T:
        """In a thread of the pool. Nobody waits any more: the lease is given up, and with it
        downloads and decoding.
        """
        try:
            with _refusals():
                return await pool.run(prepare)
        finally:
            if lease is not None:
                lease.give_up()

    def _params(self, request: Sampling, limit: int | None, logprobs: bool, top: int | None) -> SamplingParams:
        # A request without a seed must differ from the next one; the seed's sign is of no use to
        # the generator.
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**64
        with _refusals():
            params = self.engine.params(
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
        more = tuple(request.stop_token_ids or ())
        self.check_ids(more, "stop_token_ids")
        return replace(params, stop_ids=(() if request.ignore_eos else params.stop_ids) + more)

    def _guided(self, prepared: Prepared, request: Sampling, thinks: bool = False) -> Prepared:
        """With the rule that the answer is to follow, if any. Raises ValueError for one that cannot
        be followed.
        """
        guide = None if request.rule is None else Guide(*request.rule)
        calls = None
        if isinstance(request, ChatRequest) and (tools := request.ruled_tools):
            calls = CallRule(tools, request.needs_call, not request.one_call)
        if guide is None and calls is None:
            return prepared
        follow = self.grammars.follow(guide, calls, thinks=thinks, opened=prepared.opened)
        return replace(prepared, prompt=replace(prepared.prompt, constrain=follow))

    def _fit(self, prepared: Prepared, request: Sampling) -> Prepared:
        """With the default limit where the request names none. Raises ValueError where prompt and
        answer exceed max_model_len.
        """
        room = self.max_model_len - prepared.num_tokens
        limit = request.limit or min(self.options.default_max_tokens, room)
        if limit < 1 or limit > room:
            raise RowTooLong(
                say(
                    f"prompt tokens ({prepared.num_tokens}) + max_tokens ({max(limit, 1)}) must not exceed the "
                    f"context ({self.max_model_len}); shorten the prompt or lower max_tokens",
                    f"提示的 token 数（{prepared.num_tokens}）+ max_tokens（{max(limit, 1)}）不能超过上下文（{self.max_model_len}）"
                    "；请缩短提示或减小 max_tokens",
                )
            )
        prompt = replace(prepared.prompt, params=replace(prepared.prompt.params, max_new_tokens=limit))
        pack([prompt.row], self.engine.processor.tokens)  # refuses what would spoil a batch
        return replace(prepared, prompt=prompt)

    def _check_media(self, request: ChatRequest) -> bool:
        """Whether there are any. Raises ApiError for too many."""
        parts = [part for message in request.messages if isinstance(message.content, list) for part in message.content]
        return self.check_media(parts, "messages")

    def check_media(self, parts: Sequence[Any], field: str) -> bool:
        """Whether any of the parts of `field` is a picture or a video. Raises ApiError for too
        many.
        """
        for kind, limit in (("image", self.options.images), ("video", self.options.videos)):
            count = sum(part.type == f"{kind}_url" for part in parts)
            if count > limit:
                raise ApiError(
                    400,
                    say(
                        f"number of {kind}s ({count}) must be at most {limit}; send fewer",
                        f"{kind} 的数量（{count}）至多为 {limit}；请减少",
                    ),
                    param=field,
                )
        return any(part.type in ("image_url", "video_url") for part in parts)

    def check_length(self, texts: Sequence[str]) -> None:
        """Refuse text that cannot fit however it is cut into tokens, before it is: cutting
        megabytes takes long. Raises RowTooLong.
        """
        least = sum(len(text.encode("utf-8", "replace")) for text in texts) // self._longest_token_bytes
        if least > self.max_model_len:
            raise RowTooLong(
                say(
                    f"prompt (at least {least} tokens) must not exceed the context ({self.max_model_len} tokens); "
                    "shorten it",
                    f"提示（至少 {least} 个 token）不能超过上下文（{self.max_model_len} 个 token）；请缩短",
                )
            )

    def _messages(self, request: ChatRequest, lease: Lease | None) -> list[dict[str, Any]]:
        """In the words of data/chat.py. Text goes into parts, where no tag in it means a medium."""
        medium = self.reading_media(lease)
        return [_message(message, f"messages[{i}]", medium) for i, message in enumerate(request.messages)]

    def reading_media(self, lease: Lease | None) -> Medium:
        """What makes a part of (kind, URL, where it stands): it reads the medium under the lease.
        It raises ValueError for media that cannot be read, or are too large together.
        """
        left = self.options.max_body_bytes  # of all media together, however they come
        if lease is not None:
            lease.begin()

        def medium(kind: str, url: str, where: str) -> dict[str, Any]:
            nonlocal left
            if lease is not None:
                lease.left()
            data = (read_image if kind == "image" else read_video)(url, self.options.media, where, lease)
            left -= len(data)
            if left < 0:
                raise ValueError(
                    say(
                        f"{where}: pictures and videos of a request must have at most "
                        f"{self.options.max_body_bytes} bytes "
                        "together; send fewer or smaller ones",
                        f"{where}：一个请求的图片与视频合计至多 {self.options.max_body_bytes} 字节；请减少数量或大小",
                    )
                )
            return {"type": kind, kind: data}

        return medium

    def _raw(self, index: int, prompt: str | list[int], params: SamplingParams) -> Prepared:
        ids = self.engine.processor.tokenizer.encode(prompt, allow_special=True) if isinstance(prompt, str) else prompt
        if not len(ids):
            raise ApiError(
                400,
                say(
                    f"prompt[{index}] must hold at least one token; write something into it",
                    f"prompt[{index}] 至少须有一个 token；请写入内容",
                ),
                param="prompt",
            )
        self.check_ids(ids, f"prompt[{index}]")
        return Prepared(Prompt(Row(np.asarray(ids, np.int64)), params, next(self._keys), index), len(ids), False)

    def check_ids(self, ids: Sequence[int], field: str) -> None:
        vocabulary = self.engine.model.config.vocab_size
        wrong = next((i for i in ids if not 0 <= i < vocabulary), None)
        if wrong is not None:
            raise ApiError(
                400,
                say(
                    f"{field} token id ({wrong}) must be from 0 to {vocabulary - 1}; use this model's tokenizer",
                    f"{field} 的 token id（{wrong}）须为 0 到 {vocabulary - 1}；请用该模型的分词器",
                ),
                param=field.partition("[")[0],
            )


def canonical_parts(parts: Sequence[Any], where: str, medium: Medium) -> list[dict[str, Any]]:
    """Parts of a request, or strings, in the words of data/chat.py. `where`: the list's name."""
    out: list[dict[str, Any]] = []
    for i, part in enumerate(parts):
        if isinstance(part, str):
            out.append({"type": "text", "text": part})
        elif part.type in ("text", "refusal"):
            out.append({"type": "text", "text": part.text})
        elif part.type == "image_url":
            out.append(medium("image", part.image_url.url, f"{where}[{i}]"))
        else:
            out.append(medium("video", part.video_url.url, f"{where}[{i}]"))
    return out


def _message(message: Any, where: str, medium: Medium) -> dict[str, Any]:
    role = {"developer": "system", "bot": "assistant"}.get(message.role, message.role)
    content = message.content
    listed = [] if content is None else [content] if isinstance(content, str) else content
    out: dict[str, Any] = {"role": role, "content": canonical_parts(listed, f"{where}.content", medium)}
    if role == "assistant" and message.reasoning_content:
        out["reasoning_content"] = message.reasoning_content
    if role == "assistant" and message.tool_calls:
        out["tool_calls"] = [call.model_dump(exclude={"index"}) for call in message.tool_calls]
    return out


def _job(
    prepared: Prepared, adapter: str | None, report: Callable[[Submission, list[TokenEvent] | EngineFailure], None]
) -> Submission:
    job = Submission(prepared, adapter, lambda news: report(job, news))
    return job


def failure_of(failure: EngineFailure) -> ApiError:
    if isinstance(failure, UnfitRequest):
        return ApiError(400, str(failure))
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
    except TimeoutError as error:
        raise ApiError(
            400,
            say(
                f"pictures and videos must be read in time: {error}; send fewer or smaller ones",
                f"图片与视频须及时读取：{error}；请减少数量或大小",
            ),
        ) from error
    except RecursionError as error:
        raise ApiError(
            400,
            say(
                "JSON inside the request must not be nested so deep; flatten it",
                "请求中的 JSON 不能嵌套这么深；请减少嵌套",
            ),
        ) from error


def _once(call: Callable[[], None]) -> Callable[[], None]:
    """`call`, the first time only."""
    done = False

    def run() -> None:
        nonlocal done
        if not done:
            done = True
            call()

    return run

"""Prompts -> continuations with a key/value cache: unequal lengths, images and video, n samples per
prompt, streaming.

A batch is never padded in the prefill (rows are packed) and finished rows leave it. `RunningBatch`
is one batch that prompts join at any step; `stream` runs one to its end and yields every new token,
`generate` collects them. Legend: B live rows, T packed tokens, V vocabulary. Refuses to know: chat
templates, files, servers, who is let in when.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.generate.sampling import SampledToken, SamplingParams, choose, choose_alike, whole
from ernie_tune.models import mkl
from ernie_tune.models.cache import Cache, cache_of
from ernie_tune.models.config import TokenIds
from ernie_tune.models.decoding import StepForward
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import PackedInput, Row, next_position, pack
from ernie_tune.models.moe import RouterTap
from ernie_tune.models.replay import chosen_experts
from ernie_tune.models.segments import SegmentCache

Decode = Callable[[list[int]], str]
Steer = Callable[
    [Sequence[int]], "int | None"
]  # a sample's tokens so far -> the token it must go on with; None: choose one
# What the code that follows one row (a steer, a constraint, a decoder) may raise, or the sampling
# of that row: only that row ends.
_ROW_ERRORS = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, OSError, MemoryError)


# Up to so many rows a step's operators take longer to get going than to compute.
_FEW_ROWS = 256


class Constraint(Protocol):
    """What one sample may say: asked before each of its tokens is chosen, told of each that was,
    forced ones too.
    """

    def allowed(self) -> np.ndarray | None:
        """Which tokens may come next, bool [V]; None: all that are not banned. One that allows none
        ends the row with an error.
        """

    def accept(self, token_id: int) -> None:
        """This token came."""


@dataclass(frozen=True)
class TokenEvent:
    """One token as it appears: of which prompt, which of its samples, and why that sample ends here
    ("" while it goes on).

    `sampled`: the model chose it; False where `Prompt.steer` forced it, which is nothing to learn
    from. `logp`: under the model, `sampled_logp`: under what it was drawn from, see `SampledToken`.
    `top`: the likeliest tokens of the step and their log-probabilities,
    `SamplingParams.top_logprobs` of them. `experts`: of the tokens that were read for this one
    (first the prompt's), [t, layers, k], where `Prompt.experts` asks for them. `kept`: the ids that
    it was drawn from, where `SamplingParams.note_kept` asks for them. `error`: what ended
    the sample (finish_reason "error"); such an event has no token, its id is -1.
    """

    prompt: int
    sample: int
    token_id: int
    logp: float
    finish_reason: str = ""
    top: tuple[tuple[int, float], ...] = ()
    sampled: bool = True
    sampled_logp: float = 0.0
    experts: np.ndarray | None = None
    error: Exception | None = None
    kept: np.ndarray | None = None


@dataclass
class Completion:
    """One continuation. `finish_reason`: "stop" (a stop id or string) or "length". A stop id is the
    last of `token_ids`; `logps`, `sampled` and `sampled_logps` run parallel (see `TokenEvent`).
    """

    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = ""
    sampled: list[bool] = field(default_factory=list)
    sampled_logps: list[float] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)  # see `TokenEvent`
    kept: list[np.ndarray] = field(default_factory=list)

    def add(self, event: TokenEvent) -> None:
        """Take the next token of this continuation."""
        self.token_ids.append(event.token_id)
        self.logps.append(event.logp)
        self.sampled.append(event.sampled)
        self.sampled_logps.append(event.sampled_logp)
        self.finish_reason = event.finish_reason
        self.experts += [] if event.experts is None else [event.experts]
        self.kept += [] if event.kept is None else [event.kept]


@dataclass(frozen=True)
class Prompt:
    """One row to continue. `key` names it in its events; `index` is its part of the samples' seeds
    (one number or several, a round and a prompt, say); `steer` and `constrain` make, for each
    sample, what may force its tokens and what limits the choice of them.
    """

    row: Row
    params: SamplingParams
    key: int = 0
    index: int | tuple[int, ...] = 0
    steer: Callable[[], Steer] | None = None
    constrain: Callable[[], Constraint] | None = None
    experts: bool = False  # note which experts its tokens and its answers' go to


@dataclass(frozen=True)
class Partial:
    """What one sample had come to when it was taken out; `Scheduler.resume` goes on with it, token
    for token as if it had never stopped.
    """

    prompt: Prompt
    sample: int
    done: Completion

    @property
    def row(self) -> Row:
        """The prompt and what has been answered."""
        row = self.prompt.row
        return replace(row, input_ids_L=np.concatenate([row.input_ids_L, np.array(self.done.token_ids, np.int64)]))


def failed(prompt: Prompt, sample: int, error: Exception) -> TokenEvent:
    """The event that ends a sample with an error."""
    return TokenEvent(prompt.key, sample, -1, 0.0, "error", sampled=False, error=error)


@dataclass
class _Live:
    prompt: Prompt
    sample: int
    rng: np.random.Generator
    position: int  # of the next token, the same on all three axes
    seen: set[int]
    steer: Steer | None = None
    constraint: Constraint | None = None
    failure: Exception | None = None  # of what the prompt makes for each sample
    done: Completion = field(default_factory=Completion)
    experts: np.ndarray | None = None  # of what was read since the last token


class RunningBatch:
    """Rows that are decoded together: prompts join between two steps, rows leave as they end or
    when they are dropped.

    What a row gets does not depend on the others. Decoding never builds a graph; the caller puts
    the model into eval mode.
    """

    def __init__(
        self, model: ErnieModel, tokens: TokenIds, decode: Decode | None = None, position_rule: str = "paddle"
    ) -> None:
        """`decode`: token ids to text, needed for stop strings."""
        self.model, self.tokens, self.decode, self.position_rule = model, tokens, decode, position_rule
        self._live: list[_Live] = []
        self._cache: Cache | None = None
        self._stepper: StepForward | None = None
        self._looked = False  # whether the model is plain enough for it, since rows last joined
        # Prefilled since the last step, with the scores of their first tokens.
        self._fresh: list[tuple[list[_Live], Cache, np.ndarray]] = []

    def __len__(self) -> int:
        """Rows that are being continued."""
        return len(self._live) + sum(len(rows) for rows, _, _ in self._fresh)

    def check(self, prompt: Prompt) -> None:
        """Refuse what cannot be continued. Raises ValueError for a prompt that leaves no room below
        max_position_embeddings and stop strings without `decode`.
        """
        params, length, limit = prompt.params, len(prompt.row.input_ids_L), self.model.config.max_position_embeddings
        if params.stop_strings and self.decode is None:
            raise ValueError(
                say(
                    f"stop_strings {params.stop_strings} need `decode`, must be given a token-to-text function; pass tokenizer.decode or use stop_ids",
                    f"使用 stop_strings {params.stop_strings} 时须给出 `decode`（从 token 到文本的函数）；请传入 tokenizer.decode，或改用 stop_ids",
                )
            )
        if length + params.max_new_tokens > limit:
            raise ValueError(
                say(
                    f"prompt tokens ({length}) + max_new_tokens ({params.max_new_tokens}) must not exceed max_position_embeddings ({limit}); shorten the prompt or max_new_tokens",
                    f"提示的 token 数（{length}）+ max_new_tokens（{params.max_new_tokens}）不能超过 max_position_embeddings（{limit}）；请缩短提示或减小 max_new_tokens",
                )
            )

    def join(self, prompts: Sequence[Prompt], partials: Sequence[Partial] = ()) -> None:
        """Prefill prompts, packed, and samples that go on; their next tokens come with the next
        step. Raises ValueError like `check`, for a prompt without tokens, and for placeholders that
        do not match the features; nothing has joined then.
        """
        for prompt in (*prompts, *(one.prompt for one in partials)):
            self.check(prompt)
        # (prompt, what is prefilled for it, its samples)
        entries = [(p, p.row, [Partial(p, s, Completion()) for s in range(p.params.n)]) for p in prompts]
        entries += [(one.prompt, one.row, [one]) for one in partials]
        packed = pack([row for _, row, _ in entries], self.tokens, self.position_rule)
        cache = cache_of(self.model.compute_dtype)(len(self.model.own_layers()))
        tap = self._tap([one.prompt for _, _, samples in entries for one in samples])
        with paddle.no_grad():
            last = np.array(packed.offsets[1:]) - 1
            hidden_TD = self.model(packed, cache=cache, read=last, **tap)
            cache.prefilling = False
            scores_BV = self._scores(paddle.gather(hidden_TD, paddle.to_tensor(last)))
            rows = [i for i, (_, _, samples) in enumerate(entries) for _ in samples]
            if len(rows) > len(entries):
                cache.select(rows)
                scores_BV = scores_BV[rows]
        read = chosen_experts(tap["tap"], packed, self.model.config) if tap else None
        live = []
        for i, (_, row, samples) in enumerate(entries):
            position = next_position(row, self.tokens, self.position_rule)
            rows_live = [_start(one, position) for one in samples]
            if read is not None:
                for one in rows_live:
                    one.experts = read[packed.offsets[i] : packed.offsets[i + 1]]
            live += rows_live
        self._fresh.append((live, cache, scores_BV))

    def partials(self, keys: Collection[int]) -> list[Partial]:
        """What the rows of these prompts have come to."""
        rows = [*self._live, *(row for some, _, _ in self._fresh for row in some)]
        return [Partial(row.prompt, row.sample, row.done) for row in rows if row.prompt.key in keys]

    def step(self) -> list[TokenEvent]:
        """One more token of every row, in the order in which they joined."""
        with paddle.no_grad():
            scores_BV = self._advance()
        made = self._alike(scores_BV)
        events = [self._next(row, scores_BV[i], made.get(i)) for i, row in enumerate(self._live)]
        self._keep([i for i, row in enumerate(self._live) if not row.done.finish_reason])
        return events

    def drop(self, keys: Collection[int]) -> None:
        """Take the rows of these prompts out, unfinished."""
        self._keep([i for i, row in enumerate(self._live) if row.prompt.key not in keys])
        fresh, self._fresh = self._fresh, []
        for rows, cache, scores_BV in fresh:
            kept = [i for i, row in enumerate(rows) if row.prompt.key not in keys]
            if len(kept) < len(rows) and kept:
                cache.select(kept)
            if kept:
                self._fresh.append(([rows[i] for i in kept], cache, scores_BV[kept]))

    def _alike(self, scores_BV: np.ndarray) -> dict[int, SampledToken]:
        """The next tokens of rows that nothing but their parameters shapes: those of one prompt or
        of prompts with the same parameters are drawn together.
        """
        same: dict[int, list[int]] = {}
        for i, row in enumerate(self._live):
            if row.steer is None and row.constraint is None and row.failure is None and whole(row.prompt.params):
                same.setdefault(id(row.prompt.params), []).append(i)
        out: dict[int, SampledToken] = {}
        for rows in same.values():
            if len(rows) > 1:
                params = self._live[rows[0]].prompt.params
                found = choose_alike(scores_BV[rows], params, [self._live[i].rng for i in rows])
                out |= {i: choice for i, choice in zip(rows, found, strict=True) if choice is not None}
        return out

    def _next(self, row: _Live, scores_V: np.ndarray, made: SampledToken | None) -> TokenEvent:
        """Choose the row's next token, if it is not `made`; what goes wrong with one row ends that
        row.
        """
        try:
            if row.failure is not None:
                raise row.failure
            return self._chosen(row, scores_V, made)
        except _ROW_ERRORS as error:
            row.done.finish_reason = "error"
            return failed(row.prompt, row.sample, error)

    def _chosen(self, row: _Live, scores_V: np.ndarray, made: SampledToken | None) -> TokenEvent:
        params, answer = row.prompt.params, row.done.token_ids
        allowed_V = row.constraint.allowed() if row.constraint else None
        forced = row.steer(answer) if row.steer else None
        choice = made or choose(scores_V, params, row.rng, row.seen, answer, allowed_V, forced)
        if row.constraint:
            row.constraint.accept(choice.token_id)
        if params.repetition_penalty != 1:
            row.seen.add(choice.token_id)
        event = TokenEvent(
            row.prompt.key,
            row.sample,
            choice.token_id,
            choice.logp,
            self._ending(row, choice.token_id),
            choice.top,
            sampled=forced is None,
            sampled_logp=choice.sampled_logp,
            experts=row.experts if row.prompt.experts else None,
            kept=choice.kept,
        )
        row.experts = None
        row.done.add(event)
        return event

    def _ending(self, row: _Live, token: int) -> str:
        """Why the row ends with this token, "" if it does not."""
        params = row.prompt.params
        if token in params.stop_ids or (params.stop_strings and self._hits_stop_string(row, token)):
            return "stop"
        return "length" if len(row.done.token_ids) + 1 >= params.max_new_tokens else ""

    def _hits_stop_string(self, row: _Live, token: int) -> bool:
        assert self.decode is not None
        # Every token carries at least one byte, so a stop string of n bytes lies within the last n
        # tokens; a few more settle multi-byte characters.
        tail = [*row.done.token_ids, token][-(row.prompt.params.stop_bytes + 4) :]
        text = self.decode(tail)
        return any(stop in text for stop in row.prompt.params.stop_strings)

    def _scores(self, hidden_TD: Tensor) -> np.ndarray:
        return self.model.logits(hidden_TD).astype("float32").numpy()

    def _advance(self) -> np.ndarray:
        """Run the rows that have a token to read, let the fresh ones in, and return all rows'
        scores.
        """
        scores = []
        if self._live and self._cache is not None:
            few = isinstance(self._cache, SegmentCache) and len(self._live) <= _FEW_ROWS
            with mkl.stepping() if few else contextlib.nullcontext():
                inputs, tap = _next_input(self._live), self._tap([row.prompt for row in self._live])
                scores.append(self._scores(self._forward(inputs, few, tap)))
            if tap:
                read = chosen_experts(tap["tap"], inputs, self.model.config)
                for i, row in enumerate(self._live):
                    row.experts = read[i : i + 1]
            self._cache.advance()
        self._looked = self._looked and not self._fresh
        for rows, cache, first_BV in self._fresh:
            if self._cache is None:
                self._cache = cache
            else:
                self._cache.join(cache)
            self._live += rows
            scores.append(first_BV)
        self._fresh = []
        return np.concatenate(scores) if len(scores) > 1 else scores[0] if scores else np.zeros((0, 0), np.float32)

    def _forward(self, inputs: PackedInput, few: bool, tap: dict[str, RouterTap]) -> Tensor:
        """The hidden states of one token a row: a plain model's in one go where the rows are
        few.
        """
        if few and mkl.is_stepping():
            if not self._looked:
                self._stepper, self._looked = StepForward.of(self.model), True
            if self._stepper is not None:
                return self._stepper(inputs, self._cache, **tap)  # type: ignore[arg-type]
        return self.model(inputs, cache=self._cache, **tap)

    def _tap(self, prompts: Sequence[Prompt]) -> dict[str, RouterTap]:
        """What notes the experts of a forward, where a prompt asks for them."""
        return {"tap": RouterTap(ids_only=True)} if any(prompt.experts for prompt in prompts) else {}

    def _keep(self, rows: list[int]) -> None:
        if len(rows) == len(self._live):
            return
        self._live = [self._live[i] for i in rows]
        if not rows:
            self._cache = None
        elif self._cache is not None:
            self._cache.select(rows)


def stream(
    model: ErnieModel,
    prompts: Sequence[Row],
    tokens: TokenIds,
    params: SamplingParams,
    decode: Decode | None = None,
    position_rule: str = "paddle",
) -> Iterator[TokenEvent]:
    """Yield tokens as they are sampled, all live rows of a step in order. `decode` is needed for
    stop strings.

    Sample s of prompt i draws from a generator seeded by (seed, i, s), whatever else is in the
    batch. Raises ValueError like `RunningBatch.join`.
    """
    yield from stream_prompts(
        model, [Prompt(row, params, i, i) for i, row in enumerate(prompts)], tokens, decode, position_rule
    )


def stream_prompts(
    model: ErnieModel,
    prompts: Sequence[Prompt],
    tokens: TokenIds,
    decode: Decode | None = None,
    position_rule: str = "paddle",
) -> Iterator[TokenEvent]:
    """`stream` for prompts that each have their own parameters."""
    batch = RunningBatch(model, tokens, decode, position_rule)
    with eval_mode(model):
        batch.join(prompts)
        while len(batch):
            for event in batch.step():
                if event.error is not None:
                    raise event.error
                yield event


@contextlib.contextmanager
def eval_mode(model: Any) -> Iterator[None]:
    """The model without dropout, in whatever mode it was before and after."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _start(one: Partial, position: int) -> _Live:
    prompt, params, done = one.prompt, one.prompt.params, copy.deepcopy(one.done)
    index = prompt.index if isinstance(prompt.index, tuple) else (prompt.index,)
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([params.seed, *index, one.sample])))
    if params.temperature:
        rng.random(len(done.token_ids))  # one for each token so far
    seen = {*prompt.row.input_ids_L.tolist(), *done.token_ids} if params.repetition_penalty != 1 else set()
    row = _Live(prompt, one.sample, rng, position, seen, done=done)
    try:
        row.steer = prompt.steer() if prompt.steer else None
        row.constraint = prompt.constrain() if prompt.constrain else None
        for i, token in enumerate(done.token_ids):
            if row.steer:
                row.steer(done.token_ids[:i])
            if row.constraint:
                row.constraint.accept(token)
    except _ROW_ERRORS as error:
        row.failure = error
    return row


def _next_input(live: Sequence[_Live]) -> PackedInput:
    """One text token per live row, at that row's next position."""
    count = len(live)
    positions = np.repeat(np.array([[row.position] for row in live], np.int64), 3, axis=1)
    for row in live:
        row.position += 1
    return PackedInput(
        input_ids_T=np.array([row.done.token_ids[-1] for row in live], np.int64),
        position_ids_T3=positions,
        vision_T=np.zeros(count, bool),
        placeholder_T=np.zeros(count, bool),
        offsets=tuple(range(count + 1)),
    )


def generate(
    model: ErnieModel,
    prompts: Sequence[Row],
    tokens: TokenIds,
    params: SamplingParams,
    decode: Decode | None = None,
    position_rule: str = "paddle",
) -> list[list[Completion]]:
    """`params.n` completions for each prompt; see `stream`."""
    out = [[Completion() for _ in range(params.n)] for _ in prompts]
    for event in stream(model, prompts, tokens, params, decode, position_rule):
        out[event.prompt][event.sample].add(event)
    return out

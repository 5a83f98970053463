"""Prompts -> continuations with a key/value cache: unequal lengths, images and video, n samples per prompt, streaming.

A batch is never padded in the prefill (rows are packed) and finished rows leave the batch. The loop is an iterator: `stream` yields every
new token, `generate` collects them. Legend: B live rows, T packed tokens, V vocabulary. Refuses to know: chat templates, files, servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import paddle

from ernie_tune.models.cache import KVCache
from ernie_tune.models.config import TokenIds
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import PackedInput, Row, pack
from ernie_tune.models.sampling import SamplingParams, choose

Decode = Callable[[list[int]], str]


@dataclass
class Completion:
    """One continuation. `finish_reason`: "stop" (a stop id or string) or "length". A stop id is the last of `token_ids`; `logps` runs parallel."""

    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    finish_reason: str = ""


@dataclass(frozen=True)
class TokenEvent:
    """One token as it appears: which prompt, which of its samples, and why that sample ends here ("" while it goes on)."""

    prompt: int
    sample: int
    token_id: int
    logp: float
    finish_reason: str = ""


@dataclass
class _Live:
    prompt: int
    sample: int
    rng: np.random.Generator
    position: int  # of the next token, the same on all three axes
    seen: set[int]
    done: Completion = field(default_factory=Completion)


def stream(
    model: ErnieModel,
    prompts: Sequence[Row],
    tokens: TokenIds,
    params: SamplingParams,
    decode: Decode | None = None,
    position_rule: str = "paddle",
) -> Iterator[TokenEvent]:
    """Yield tokens as they are sampled, all live rows of a step in order. `decode` is needed for stop strings.

    Sample s of prompt i draws from a generator seeded by (seed, i, s), whatever else is in the batch. Raises ValueError for a prompt without
    tokens, placeholder/feature mismatches, a prompt that leaves no room below max_position_embeddings, stop strings without `decode`.
    """
    if params.stop_strings and decode is None:
        raise ValueError(
            f"stop_strings {params.stop_strings} need `decode`, must be given a token-to-text function; pass tokenizer.decode or use stop_ids"
        )
    packed = pack(prompts, tokens, position_rule)
    longest, limit = max(packed.segment_lengths), model.config.max_position_embeddings
    if longest + params.max_new_tokens > limit:
        raise ValueError(
            f"prompt tokens ({longest}) + max_new_tokens ({params.max_new_tokens}) must not exceed max_position_embeddings ({limit}); shorten the prompt or max_new_tokens"
        )
    training = model.training
    model.eval()
    try:
        with paddle.no_grad():
            yield from _steps(model, packed, params, decode)
    finally:
        if training:
            model.train()


def _steps(
    model: ErnieModel, packed: PackedInput, params: SamplingParams, decode: Decode | None
) -> Iterator[TokenEvent]:
    cache = KVCache(len(model.own_layers()))
    hidden_TD = model(packed, cache=cache)
    cache.prefilling = False
    last = paddle.to_tensor([b - 1 for b in packed.offsets[1:]])
    scores_BV = model.logits(paddle.gather(hidden_TD, last)).astype("float32").numpy()
    rows = [(i, s) for i in range(len(packed.segment_lengths)) for s in range(params.n)]
    live = [_start(packed, i, s, params) for i, s in rows]
    if params.n > 1:
        cache.select([i for i, _ in rows])
        scores_BV = scores_BV[[i for i, _ in rows]]
    while live:
        picked, logps = choose(scores_BV, params, [r.rng for r in live], [np.fromiter(r.seen, np.int64) for r in live])
        for row, token, logp in zip(live, picked.tolist(), logps.tolist(), strict=True):
            yield _accept(row, token, logp, params, decode)
        keep = [i for i, row in enumerate(live) if not row.done.finish_reason]
        if not keep:
            return
        if len(keep) < len(live):
            cache.select(keep)
            live = [live[i] for i in keep]
        scores_BV = model.logits(model(_next_input(live), cache=cache)).astype("float32").numpy()
        cache.advance()


def _start(packed: PackedInput, prompt: int, sample: int, params: SamplingParams) -> _Live:
    a, b = packed.offsets[prompt], packed.offsets[prompt + 1]
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([params.seed, prompt, sample])))
    seen = set(packed.input_ids_T[a:b].tolist()) if params.repetition_penalty != 1 else set()
    return _Live(prompt, sample, rng, int(packed.position_ids_T3[a:b].max()) + 1, seen)


def _accept(row: _Live, token: int, logp: float, params: SamplingParams, decode: Decode | None) -> TokenEvent:
    row.done.token_ids.append(token)
    row.done.logps.append(logp)
    if params.repetition_penalty != 1:
        row.seen.add(token)
    if token in params.stop_ids or (decode and _hits_stop_string(row.done.token_ids, params.stop_strings, decode)):
        row.done.finish_reason = "stop"
    elif len(row.done.token_ids) >= params.max_new_tokens:
        row.done.finish_reason = "length"
    return TokenEvent(row.prompt, row.sample, token, logp, row.done.finish_reason)


def _hits_stop_string(token_ids: list[int], stops: tuple[str, ...], decode: Decode) -> bool:
    if not stops:
        return False
    # Every token carries at least one byte, so a stop string of n bytes lies within the last n tokens; a few more settle multi-byte characters.
    tail = decode(token_ids[-(max(len(s.encode()) for s in stops) + 4) :])
    return any(s in tail for s in stops)


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
        done = out[event.prompt][event.sample]
        done.token_ids.append(event.token_id)
        done.logps.append(event.logp)
        done.finish_reason = event.finish_reason
    return out

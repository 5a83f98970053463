"""POST /v1/embeddings: texts, token ids and pictures -> one vector each, by the mean of the model's
last hidden states.

Reading goes through the thread that answers, in turns with the steps of the answers. Refuses to
know: paths, headers, what vectors are compared with.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.data.chat import BEGIN
from ernie_tune.data.processor import RowTooLong
from ernie_tune.generate.pooling import unit_vectors
from ernie_tune.models.inputs import Row, pack
from ernie_tune.serve.embedding_request import EmbeddingRequest
from ernie_tune.serve.errors import ApiError
from ernie_tune.serve.pool import Lease
from ernie_tune.serve.service import Service, canonical_parts, failure_of
from ernie_tune.serve.thread import EngineFailure, Reading


@dataclass(frozen=True)
class Embedded:
    """Vectors of one request, float32 [N, D], each of length 1; for the log, no answer."""

    model: str
    vectors_ND: np.ndarray
    prompt_tokens: int
    answer_tokens: int = 0


async def embed(service: Service, request: EmbeddingRequest) -> Embedded:
    """Fetch, encode, read. Raises ApiError: 400 for what cannot be read, 500 or 503 where the model
    fails or ends.
    """
    name, adapter = service.find(request.model)
    width = service.engine.model.config.hidden_size
    if request.dimensions is not None and request.dimensions > width:
        raise ApiError(
            400,
            say(
                f"dimensions ({request.dimensions}) must be at most {width}, the model's; lower it",
                f"dimensions（{request.dimensions}）至多为 {width}（模型的维数）；请调小",
            ),
            param="dimensions",
        )
    inputs = request.inputs
    parts = [part for one in inputs if isinstance(one, list) for part in one if not isinstance(part, int)]
    lease = Lease(service.options.media_timeout_seconds) if service.check_media(parts, "input") else None
    many = isinstance(request.input, list) and not (request.input and isinstance(request.input[0], int))
    names = [f"input[{i}]" if many else "input" for i in range(len(inputs))]
    with contextlib.ExitStack() as undo:
        rows, _ = await service.admit(undo, lambda: _rows(service, inputs, names, lease), lease)
        vectors_ND = await _read(service, rows, adapter)
    tokens = sum(len(row.input_ids_L) for row in rows)
    service.metrics.prompt_tokens.add(tokens, name)
    return Embedded(name, unit_vectors(vectors_ND, request.dimensions), tokens)


def reply(request: EmbeddingRequest, found: Embedded) -> dict[str, Any]:
    """OpenAI's object. base64: of the vector's little-endian float32."""

    def shown(vector_D: np.ndarray) -> Any:
        if request.encoding_format == "base64":
            return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
        return vector_D.tolist()

    data = [{"object": "embedding", "index": i, "embedding": shown(one)} for i, one in enumerate(found.vectors_ND)]
    usage = {"prompt_tokens": found.prompt_tokens, "total_tokens": found.prompt_tokens}
    return {"object": "list", "data": data, "model": found.model, "usage": usage}


def _rows(service: Service, inputs: Sequence[Any], names: Sequence[str], lease: Lease | None) -> list[Row]:
    """Raises ValueError, RowTooLong, ApiError."""
    processor, limit = service.engine.processor, service.options.cache_tokens
    medium = service.reading_media(lease)
    service.check_length(list(_longest(inputs)))
    rows: list[Row] = []
    tokens = 0
    for one, where in zip(inputs, names, strict=True):
        if isinstance(one, list) and (not one or isinstance(one[0], int)):
            if len(one) > service.max_model_len:
                raise RowTooLong(_too_long(where, len(one), service.max_model_len))
            service.check_ids(one, where)
            rows.append(Row(np.asarray(one, np.int64)))
        else:
            content = one if isinstance(one, str) else canonical_parts(one, where, medium)
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            rows.append(processor.encode_plain(parts, max_tokens=service.max_model_len, where=where).row)
        _check_row(rows[-1], where, service)
        tokens += len(rows[-1].input_ids_L)
        if tokens > limit:
            raise ValueError(
                say(
                    f"input (more than {limit} tokens together) must have at most the server's cache_tokens "
                    f"({limit}); send fewer at a time",
                    f"input（合计超过 {limit} 个 token）不能超过服务器的 cache_tokens（{limit}）；请分次发送",
                )
            )
    return rows


def _longest(inputs: Sequence[Any]) -> Iterator[str]:
    """The text of the entry that has most of it: none may exceed the context."""

    def text(one: Any) -> str:
        if isinstance(one, str):
            return one
        return "".join(part.text for part in one if not isinstance(part, int) and part.type == "text")

    yield max(map(text, inputs), key=len)


def _too_long(where: str, tokens: int, most: int) -> str:
    return say(
        f"{where} ({tokens} tokens) must not exceed the context ({most} tokens); cut it into passages",
        f"{where}（{tokens} 个 token）不能超过上下文（{most} 个 token）；请切成段落",
    )


def _check_row(row: Row, where: str, service: Service) -> None:
    """Refuse what would spoil the rows that are read with it. Raises ValueError."""
    ids, begin = row.input_ids_L, service.engine.processor.tokenizer.token_id(BEGIN)
    if len(ids) == 0 or (len(ids) == 1 and ids[0] == begin):
        raise ValueError(say(f"{where} must not be empty; leave it out", f"{where} 不能为空；请去掉"))
    pack([row], service.engine.processor.tokens)


async def _read(service: Service, rows: Sequence[Row], adapter: str | None) -> np.ndarray:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[np.ndarray] = loop.create_future()

    def settle(news: np.ndarray | EngineFailure) -> None:
        if future.done():  # nobody waits any more
            return
        if isinstance(news, EngineFailure):
            future.set_exception(failure_of(news))
        else:
            future.set_result(news)

    def report(news: np.ndarray | EngineFailure) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            loop.call_soon_threadsafe(settle, news)

    begin = service.engine.processor.tokenizer.token_id(BEGIN)
    reading = Reading(rows, adapter, begin, report)
    try:
        service.scheduler.read(reading)
        return await future
    except EngineFailure as error:
        raise failure_of(error) from error
    finally:
        service.scheduler.stop_reading(reading)

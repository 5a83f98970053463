"""The routes of the API and its errors, all in OpenAI's shape. Needs the extra `serve`. Refuses to
know: models, sockets, signals.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ernie_tune import __version__
from ernie_tune.config.language import say
from ernie_tune.serve import replies
from ernie_tune.serve.embedding_request import EmbeddingRequest
from ernie_tune.serve.embeddings import embed
from ernie_tune.serve.embeddings import reply as embedding_reply
from ernie_tune.serve.errors import ApiError
from ernie_tune.serve.gate import Gate
from ernie_tune.serve.messages import Strict
from ernie_tune.serve.metrics import CONTENT_TYPE
from ernie_tune.serve.page import page, page_headers
from ernie_tune.serve.requests import R, read_request
from ernie_tune.serve.schema import ChatRequest, CompletionRequest, Sampling, StreamOptions
from ernie_tune.serve.service import Service, Step, Ticket

T = TypeVar("T")

# a larger body is read in a thread: the event loop has others to serve
_READ_AT_ONCE_BYTES = 50_000

_ERROR = {
    "description": "What was wrong, in OpenAI's shape.",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type", "param", "code"],
                        "properties": {
                            "message": {"type": "string"},
                            "type": {"type": "string"},
                            "param": {"type": ["string", "null"]},
                            "code": {"type": ["string", "null"]},
                        },
                    }
                },
            }
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = dict.fromkeys((400, 401, 404, 408, 413, 422, 429, 500, 503, 504), _ERROR)
_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "The answer, or its events."}
}


class Json(Response):
    """JSON that any text fits in."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return replies.dumps(content)


class _Events(StreamingResponse):
    """A stream that gives its ticket back however it ends, begun or not."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], abandon: Callable[[], None]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._abandon = abandon

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._abandon()


def build(service: Service) -> FastAPI:
    """The application of one service; its lifespan starts and ends the model's thread.
    `app.state.gate` is the gate that all requests pass.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.close()

    app = FastAPI(
        title="ernie_tune",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # they would lead to whatever host the client named
        lifespan=lifespan,
    )
    app.state.gate = Gate(app, service.options, service.metrics)
    _describe_bodies(app)
    _add_errors(app)
    _add_status(app, service)

    @app.post("/v1/chat/completions", responses={**_ERRORS, **_STREAM}, openapi_extra=_takes(ChatRequest))
    async def chat(request: Request) -> Response:
        body = await _read(service, request, ChatRequest)
        writer = {"chat": True, "logprobs": body.logprobs, "token_ids": body.return_token_ids}
        return await _answer(service, body, request, service.chat(body), writer)

    @app.post("/v1/completions", responses={**_ERRORS, **_STREAM}, openapi_extra=_takes(CompletionRequest))
    async def complete(request: Request) -> Response:
        body = await _read(service, request, CompletionRequest)
        writer = {"chat": False, "logprobs": body.logprobs is not None, "token_ids": body.return_token_ids}
        return await _answer(service, body, request, service.complete(body), writer)

    @app.post("/v1/embeddings", responses=_ERRORS, openapi_extra=_takes(EmbeddingRequest))
    async def embeddings(request: Request) -> Response:
        body = await _read(service, request, EmbeddingRequest)
        found = await _while_connected(request, embed(service, body), lambda _: None)
        request.state.ticket = found  # for the log
        # Thousands of numbers as text take a while.
        content = await service.parsing.run(lambda: replies.dumps(embedding_reply(body, found)))
        return Response(content, media_type=Json.media_type)

    return app


_COMPONENT = "#/components/schemas/{model}"


def _takes(kind: type[Strict]) -> dict[str, Any]:
    schema = {"$ref": _COMPONENT.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe_bodies(app: FastAPI) -> None:
    """Bodies are read by `requests.py`; the description names their models all the same."""

    def openapi() -> dict[str, Any]:
        if not app.openapi_schema:
            found = get_openapi(title=app.title, version=app.version, routes=app.routes)
            models = [(kind, "validation") for kind in (ChatRequest, CompletionRequest, EmbeddingRequest)]
            _, more = models_json_schema(models, ref_template=_COMPONENT)  # type: ignore[arg-type]
            found.setdefault("components", {}).setdefault("schemas", {}).update(more["$defs"])
            app.openapi_schema = found
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


async def _read(service: Service, request: Request, kind: type[R]) -> R:
    """The checked body. Raises ApiError."""
    try:
        raw = await request.body()
    except ClientDisconnect:
        raise ApiError(408, say("the client has gone", "客户端已断开"), "timeout_error") from None
    if len(raw) <= _READ_AT_ONCE_BYTES:
        return read_request(raw, kind, service.body_limits)
    return await service.parsing.run(lambda: read_request(raw, kind, service.body_limits))


async def _answer(
    service: Service, body: Sampling, request: Request, work: Awaitable[Ticket], writer: dict[str, bool]
) -> Response:
    ticket = await _while_connected(request, work, service.abandon)
    request.state.ticket = ticket  # for the log
    options = body.stream_options or StreamOptions()
    writer["usage_each"] = options.continuous_usage_stats
    reply = replies.ReplyWriter(ticket, service.engine.processor, secrets.token_hex(12), int(time.time()), **writer)
    if body.stream:
        with_usage = options.include_usage
        return _Events(_events(service, ticket, reply, with_usage), lambda: service.abandon(ticket))
    try:
        steps = await _while_connected(request, _collect(service, ticket), lambda _: None)
    finally:
        service.abandon(ticket)
    return Json(reply.whole(steps))


async def _collect(service: Service, ticket: Ticket) -> list[Step]:
    return [step async for steps in service.steps(ticket) for step in steps]


async def _events(
    service: Service, ticket: Ticket, reply: replies.ReplyWriter, with_usage: bool
) -> AsyncIterator[bytes]:
    try:
        async for steps in service.steps(ticket):
            if chunk := reply.chunks(steps):
                yield chunk
        yield reply.end(with_usage)
    except ApiError as problem:  # the status is out: the error is the last event
        yield replies.sse(replies.error(problem))


async def _while_connected(request: Request, work: Awaitable[T], undo: Callable[[T], None]) -> T:
    """The result of `work`, which is cancelled when the client goes; a result that comes too late
    is undone.

    Raises ApiError 408, which nobody will read, then.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    except asyncio.CancelledError:
        if task.done() and not task.cancelled() and task.exception() is None:
            undo(task.result())
        raise
    finally:
        finished = task.done()
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
    if not finished:
        raise ApiError(408, say("the client has gone", "客户端已断开"), "timeout_error")
    return task.result()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_status(app: FastAPI, service: Service) -> None:
    def card(name: str, adapter: str | None) -> dict[str, Any]:
        base = next((other for other, its in service.models.items() if its is None), None)
        return {
            "id": name,
            "object": "model",
            "created": service.started,
            "owned_by": "ernie_tune",
            "max_model_len": service.max_model_len,
            "parent": base if adapter is not None else None,
        }

    @app.get("/v1/models", responses=_ERRORS)
    async def models() -> Response:
        return Json({"object": "list", "data": [card(*one) for one in service.models.items()]})

    @app.get("/v1/models/{name:path}", responses=_ERRORS)
    async def model(name: str) -> Response:
        return Json(card(*service.find(name)))

    @app.get("/", response_class=HTMLResponse)
    async def root() -> Response:
        """The page to talk to the model."""
        return HTMLResponse(page(), headers=page_headers())

    @app.get("/health", responses={503: {"description": "Shutting down, or the model has failed."}})
    async def health() -> Response:
        """200 while requests are welcome."""
        state = "draining" if app.state.gate.draining else "ok" if service.scheduler.alive else "failed"
        return Json({"status": state}, 200 if state == "ok" else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return PlainTextResponse(service.text(), media_type=CONTENT_TYPE)


def _add_errors(app: FastAPI) -> None:
    def answer(problem: ApiError, headers: dict[str, str] | None = None) -> Response:
        return Json(replies.error(problem), problem.status, headers)

    @app.exception_handler(ApiError)
    async def known(_request: Request, problem: ApiError) -> Response:
        return answer(problem)

    @app.exception_handler(HTTPException)
    async def http(request: Request, found: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {found.detail}"
        return answer(ApiError(found.status_code, message[:1000]), dict(found.headers or {}))

    @app.exception_handler(Exception)
    async def unforeseen(_request: Request, _found: Exception) -> Response:
        # The connection is cut after it, and the client must know.
        problem = ApiError(500, "the server failed on this request; its log says how", "server_error")
        return answer(problem, {"Connection": "close"})

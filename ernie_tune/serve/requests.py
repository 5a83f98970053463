"""Bytes of a request's body -> a checked request, in time and memory that grow with the body and no
faster.

Text and media are bounded apart, before anything is parsed: an empty list of two bytes takes 60 as
an object. Refuses to know: what fields mean, sockets, the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import ValidationError

from ernie_tune.config.language import say
from ernie_tune.serve.embedding_request import MAX_INPUTS, EmbeddingRequest
from ernie_tune.serve.errors import ApiError
from ernie_tune.serve.messages import Strict
from ernie_tune.serve.schema import CompletionRequest

MAX_DEPTH = 100  # of lists and objects in each other
_LEAST_DATA_BYTES = 1024  # a shorter string counts as text, whatever it begins with
_DATA = re.compile(rb'"(?i:data):')
_PLAIN = re.compile(rb'[^"]*')

R = TypeVar("R", bound=Strict)


@dataclass(frozen=True)
class BodyLimits:
    """`text_bytes`: all but data: URLs. `prompt_tokens`: of a prompt of token ids. `prompts`: of
    one request.
    """

    text_bytes: int
    prompt_tokens: int
    prompts: int


def read_request(raw: bytes, kind: type[R], limits: BodyLimits) -> R:
    """Raises ApiError: 413 for too much text, 400 for what is no such request; it names the first
    mistake.
    """
    if text_bytes(raw, limits.text_bytes) > limits.text_bytes:
        raise ApiError(
            413,
            say(
                f"the body without its data: URLs must be at most {limits.text_bytes} bytes; send less text",
                f"除 data: URL 外，请求体至多 {limits.text_bytes} 字节；请减少文本",
            ),
            code="request_too_large",
        )
    value = _parse(raw)
    if kind is CompletionRequest and isinstance(value, dict):
        _check_prompt(value.get("prompt"), limits, "prompt", ("prompts", "max_num_seqs", limits.prompts))
    elif kind is EmbeddingRequest and isinstance(value, dict):
        _check_prompt(value.get("input"), limits, "input", ("inputs", "the limit of a request", MAX_INPUTS))
    try:
        return kind.model_validate(value)
    except ValidationError as found:
        raise _told(found) from None


def text_bytes(raw: bytes, limit: int) -> int:
    """Bytes outside of long data: URLs; counting ends above `limit`."""
    text = at = 0
    if len(raw) <= limit:
        return len(raw)
    while text <= limit and (start := _DATA.search(raw, at)):
        end = raw.find(b'"', start.end())
        if end < 0:
            break
        text += start.start() - at
        whole = raw[end - 1] != ord("\\")  # base64 holds no quotation marks
        if not whole or end - start.start() < _LEAST_DATA_BYTES:
            text += end - start.start()
        at = end
    return text + len(raw) - at if text <= limit else text


def _parse(raw: bytes) -> Any:
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_constant)
        _check_tree(value)
    except RecursionError:
        raise ApiError(
            400,
            say(
                f"the body must not be nested more than {MAX_DEPTH} deep; flatten it",
                f"请求体的嵌套不能超过 {MAX_DEPTH} 层；请减少嵌套",
            ),
        ) from None
    except ValueError as error:
        raise ApiError(
            400,
            say(
                f"the body must be JSON in UTF-8 ({str(error)[:200]}); correct it",
                f"请求体须为 UTF-8 的 JSON（{str(error)[:200]}）；请改正",
            ),
        ) from None
    return value


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            say(f"key {twice[:100]!r} is there twice in one object", f"键 {twice[:100]!r} 在一个对象中出现两次")
        )
    return out


def _constant(name: str) -> Any:
    raise ValueError(say(f"{name} is no number of JSON", f"{name} 不是 JSON 的数"))


def _check_tree(value: Any) -> None:
    """Refuse depth, and half surrogate pairs, which no text in UTF-8 can hold. Raises
    RecursionError, ValueError.
    """
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            elif isinstance(one, str) and not one.isascii():
                one.encode()
        if not inner:
            return
        level = inner
    raise RecursionError


def _check_prompt(prompt: Any, limits: BodyLimits, field: str, counted: tuple[str, str, int]) -> None:
    """Before thousands of its items are looked at one by one. `counted`: what a list holds that is
    no list of ids, the name of its limit, and the limit.
    """
    if not isinstance(prompt, list) or not prompt:
        return
    ids = not isinstance(prompt[0], str | list | dict)
    what, name, most = ("token ids", "max_model_len", limits.prompt_tokens) if ids else counted
    if len(prompt) > most:
        raise ApiError(
            400,
            say(
                f"{field} ({len(prompt)} {what}) must have at most {name} ({most}); send fewer",
                f"{field}（{len(prompt)} {what}）至多 {name}（{most}）；请减少",
            ),
            code="context_length_exceeded" if ids else None,
            param=field,
        )
    inner = next((one for one in prompt if isinstance(one, list) and len(one) > limits.prompt_tokens), None)
    if inner is not None:
        raise ApiError(
            400,
            say(
                f"an entry of {field} ({len(inner)} items) must have at most max_model_len ({limits.prompt_tokens}); "
                "send fewer",
                f"{field} 的一项（{len(inner)} 个元素）至多 max_model_len（{limits.prompt_tokens}）；请减少",
            ),
            code="context_length_exceeded",
            param=field,
        )


def _told(found: ValidationError) -> ApiError:
    first = found.errors(include_url=False)[0]
    kind, given = first["type"], first["input"]
    field = str((first.get("ctx") or {}).get("field", ""))
    if kind.startswith("member "):
        field = kind.removeprefix("member ")
        if isinstance(given, dict):
            kind, given = ("missing", None) if given.get(field) is None else (kind, given[field])
        else:
            kind, field = "model_type", ""
    place = place_of(first["loc"], field)
    shown = f" ({_short(given)})" if kind not in ("missing", "request") and _is_scalar(given) else ""
    message = f"{place or 'the body'}{shown} {_words(kind, first['msg'])}"
    return ApiError(400, message[:1000], param=place[:200] or None)


def place_of(loc: Sequence[int | str], field: str = "") -> str:
    """messages[0].content[1].image_url.detail. Members of unions, which are tagged <like this>, are
    no part of it.
    """
    out = ""
    for one in (*loc, *([field] if field else [])):
        if isinstance(one, int):
            out += f"[{one}]"
        elif not (one.startswith("<") and one.endswith(">")):
            out += f".{one[:100]}" if out else one[:100]
    return out


def _is_scalar(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _short(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _words(kind: str, message: str) -> str:
    own = {"missing": "must be given; add it", "model_type": "must be an object"}
    if kind in own:
        return own[kind]
    for subject in ("Input should", "List should", "String should", "Dictionary should"):
        if message.startswith(subject):
            return f"must{message.removeprefix(subject)}".replace(" after validation", "")
    return message

"""Requests made from the server's own OpenAPI description, right and wrong ones: only 2xx and 4xx,
errors in one shape, and the server lives on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live import Live, live
from schemathesis import GenerationMode
from support.tiny_runs import processor

from ernie_tune.generate.engine import Engine

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "20"))
_SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
# Nothing can be wrong about the GETs but a name that does not exist.
CASES = [
    ("/v1/chat/completions", "POST", RIGHT),
    ("/v1/chat/completions", "POST", WRONG),
    ("/v1/completions", "POST", RIGHT),
    ("/v1/completions", "POST", WRONG),
    ("/v1/embeddings", "POST", RIGHT),
    ("/v1/embeddings", "POST", WRONG),
    ("/v1/models", "GET", RIGHT),
    ("/v1/models/{name}", "GET", RIGHT),
]


@pytest.fixture(scope="module")
def target() -> Iterator[Live]:
    from conftest import _golden_model

    limits = {"max_model_len": 96, "default_max_tokens": 3, "max_num_seqs": 8}
    with live(Engine(_golden_model("tiny-a", "float32"), processor()), **limits) as one:
        yield one


def check(reply: Any, one: Live) -> int:
    status = int(reply.status_code)
    assert 200 <= status < 500, f"{status}: {reply.text}"
    if status >= 400:
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    assert one.service.scheduler.alive
    return status


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_only_4xx_for_bad_requests(path: str, method: str, mode: GenerationMode, target: Live) -> None:
    schema = schemathesis.openapi.from_dict(httpx.get(f"{target.root}/openapi.json").json())
    schema.config.update(base_url=target.root)
    seen: dict[int, int] = {}
    strategy = schema[path][method].as_strategy(generation_mode=mode)

    @_SETTINGS
    @given(case=strategy)
    def run(case: Any) -> None:
        reply = case.call(timeout=30)
        status = check(reply, target)
        seen[status] = seen.get(status, 0) + 1
        assert status in map(int, schema[path][method].definition.raw["responses"]), "the description names it"

    run()
    assert (400 in seen) == (method == "POST"), seen
    assert httpx.get(f"{target.root}/health").status_code == 200


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FIELDS = (
    "messages",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "seed",
    "stop",
    "stream",
    "stream_options",
    "logprobs",
)
MORE = (
    "top_logprobs",
    "chat_template_kwargs",
    "reasoning_max_tokens",
    "model",
    "user",
    "return_token_ids",
    "repetition_penalty",
    "frequency_penalty",
    "presence_penalty",
    "tools",
    "tool_choice",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "stop_token_ids",
    "continue_final_message",
    "metadata",
    "reasoning_effort",
    "min_p",
)


@_SETTINGS
@given(field=st.sampled_from(FIELDS + MORE), value=JSON)
def test_one_field_of_a_good_request_made_anything(field: str, value: Any, target: Live) -> None:
    body = {"messages": [{"role": "user", "content": "why"}], "max_tokens": 2, field: value}
    content = json.dumps(body).encode()  # NaN, infinities and lone surrogates as Python writes them
    headers = {"content-type": "application/json"}
    check(httpx.post(f"{target.root}/v1/chat/completions", content=content, headers=headers, timeout=30), target)


@_SETTINGS
@given(
    content=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", "multipart/form-data", ""])
)
def test_bodies_of_any_bytes(content: bytes, kind: str, target: Live) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        reply = httpx.post(f"{target.root}{path}", content=content, headers={"content-type": kind}, timeout=30)
        assert check(reply, target) >= 400


@_SETTINGS
@given(url=st.one_of(st.text(), st.from_regex(r"(http|https|file|data|FILE)://?/?[^\s]{0,40}", fullmatch=True)))
def test_urls_of_any_kind(url: str, target: Live) -> None:
    """None of them leads anywhere that a test may reach: refused, or not found."""
    for kind in ("image_url", "video_url"):
        content = [{"type": kind, kind: {"url": url}}]
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1}
        assert check(httpx.post(f"{target.root}/v1/chat/completions", json=body, timeout=30), target) == 400

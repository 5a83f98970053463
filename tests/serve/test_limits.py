"""What the server refuses and how it says so: limits, keys, bad requests, time, clients that go,
and its own end.
"""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from live import Live, image_part, live, text_part, until
from support.tiny_runs import IMAGES, processor

from ernie_tune.generate.batch import RunningBatch
from ernie_tune.generate.engine import Engine
from ernie_tune.serve.options import ServeOptions
from ernie_tune.serve.service import Service

DIGIT = image_part(IMAGES / "0003.png")
WHY = [{"role": "user", "content": "why"}]


@pytest.fixture(scope="module")
def engine() -> Engine:
    from conftest import _golden_model

    return Engine(_golden_model("tiny-a", "float32"), processor())


@pytest.fixture(scope="module")
def tight(engine: Engine) -> Iterator[Live]:
    limits = {"max_model_len": 64, "default_max_tokens": 5, "images": 2, "videos": 1, "max_body_bytes": 20_000}
    with live(engine, {"ernie": None}, max_num_seqs=4, cache_tokens=150, **limits) as one:
        yield one


def post(one: Live, body: Any, path: str = "/v1/chat/completions", **options: Any) -> httpx.Response:
    return httpx.post(one.root + path, **({"content": body} if isinstance(body, bytes) else {"json": body}), **options)


def refused(reply: httpx.Response, status: int, *words: str) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": []}, ("messages", "at least 1")),
        ({"messages": [{"role": "robot", "content": "x"}]}, ("messages[0].role ('robot')", "must be one of 'system'")),
        ({"messages": [{"role": "user"}]}, ("messages[0].content must be given",)),
        ({"messages": [*WHY, *WHY]}, ("in turn",)),
        (
            {"messages": [*WHY, {"role": "assistant", "content": "x"}]},
            ("messages must end with a user or tool message", "continue_final_message to true"),
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, ()),
        ({"messages": [{"role": "user", "content": [DIGIT] * 3}]}, ("number of images (3) must be at most 2",)),
        ({"messages": [{"role": "user", "content": "why " * 80}]}, ("max_tokens (64)",)),
        ({"max_tokens": 60}, ("must not exceed the context (64)",)),
        ({"max_tokens": 0}, ("max_tokens", "greater than or equal to 1")),
        ({"max_tokens": 3, "max_completion_tokens": 4}, ("must agree",)),
        ({"n": 5, "temperature": 1}, ("n (5) must be at most the server's max_num_seqs (4)",)),
        ({"n": 4, "max_tokens": 45}, ("cache_tokens (150)",)),
        ({"n": 2, "temperature": 0}, ("greedy samples are all the same",)),
        ({"temperature": 3}, ("temperature",)),
        ({"temperature": "hot"}, ("temperature",)),
        ({"top_p": 0}, ("top_p",)),
        ({"stop": [""]}, ("stop", "1 to 256 characters")),
        ({"stop": ["x"] * 17}, ("stop", "at most 16 items")),
        ({"top_logprobs": 3}, ("top_logprobs needs logprobs",)),
        ({"stream_options": {"include_usage": True}}, ("stream_options needs stream",)),
        ({"frequency_penalty": 2.5}, ("frequency_penalty",)),
        ({"presence_penalty": -3}, ("presence_penalty",)),
        ({"tools": [{"type": "function"}]}, ("tools",)),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, ("tools[0].function.name ('a b')",)),
        ({"tool_choice": "required"}, ("tool_choice",)),
        ({"best_off": 2}, ("best_off is no field that this server knows; did you mean 'best_of'?",)),
        ({"chat_template_kwargs": {"thinks": True}}, ("chat_template_kwargs.thinks",)),
        ({"model": "other", "x": 1}, ("x",)),
    ],
)
def test_bad_requests_are_told_what_is_wrong(change: dict[str, Any], words: tuple[str, ...], tight: Live) -> None:
    body = json.dumps({"messages": WHY, **change}).encode()
    error = refused(post(tight, body, headers={"content-type": "application/json"}), 400, *words)
    assert error["type"] == "invalid_request_error"


def test_codes_of_common_errors(tight: Live) -> None:
    client = tight.client()
    with pytest.raises(openai.NotFoundError, match="must be one of") as missing:
        client.chat.completions.create(model="other", messages=WHY)  # type: ignore[arg-type]
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="ernie", messages=WHY, max_tokens=64)  # type: ignore[arg-type]
    assert long.value.code == "context_length_exceeded"
    refused(httpx.get(tight.root + "/nowhere"), 404, "GET /nowhere")
    refused(httpx.get(tight.root + "/v1/chat/completions"), 405)
    for content in (b"", b"{", b"[1, 2]", b"\xff", b"[" * 100_000, b'{"messages": NaN}'):
        refused(post(tight, content[:19_000], headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([700], "prompt[0] token id (700) must be from 0 to 639"),
        ([-1], "token id (-1)"),
        ("", "prompt[0] must hold at least one token"),
        ([], "prompt[0] must hold at least one token"),
        (["a", ""], "prompt[1] must hold at least one token"),
        ([["x"]], "prompt"),
        ("<|IMAGE_PLACEHOLDER|>", "placeholder"),
        (["a"] * 5, "prompt (5 prompts) must have at most max_num_seqs (4)"),
    ],
)
def test_bad_prompts(prompt: Any, words: str, tight: Live) -> None:
    refused(post(tight, {"prompt": prompt}, "/v1/completions"), 400, words)


def test_the_default_limit_and_the_room_that_is_left(tight: Live) -> None:
    assert post(tight, {"messages": WHY}).json()["usage"]["completion_tokens"] <= 5
    near = post(tight, {"messages": [{"role": "user", "content": "why " * 9}]}).json()["usage"]
    assert near["prompt_tokens"] < 64, near
    full = {"prompt": [9] * 62, "temperature": 0}
    assert post(tight, full, "/v1/completions").json()["usage"]["completion_tokens"] <= 2
    refused(post(tight, {"prompt": [9] * 64}, "/v1/completions"), 400, "must not exceed the context (64)")


def test_a_text_that_can_never_fit_is_not_cut_into_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it hides: in an old thought, in parts, in a raw prompt."""
    long = "why " * 30_000
    old = [*WHY, {"role": "assistant", "content": "x", "reasoning_content": long}, *WHY]
    hidden: list[tuple[str, dict[str, Any]]] = [
        ("chat/completions", {"messages": [{"role": "user", "content": long}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [text_part(long), text_part("x")]}]}),
        ("chat/completions", {"messages": old}),
        ("completions", {"prompt": ["x", long]}),
    ]
    with live(engine, max_model_len=64) as one:
        with monkeypatch.context() as patch:
            patch.setattr(type(engine.processor.tokenizer), "encode", broken(AssertionError("was cut")))
            for path, body in hidden:
                assert (
                    refused(post(one, body, f"/v1/{path}"), 400, "prompt (at least")["code"]
                    == "context_length_exceeded"
                )
        assert long_request(one, 1).status_code == 200


def test_bodies_are_counted_with_and_without_their_length(tight: Live) -> None:
    big = json.dumps({"messages": [{"role": "user", "content": "x" * 30_000}]}).encode()
    headers = {"content-type": "application/json"}
    refused(post(tight, big, headers=headers), 413, "at most 20000 bytes")
    pieces = (big[i : i + 1000] for i in range(0, len(big), 1000))
    refused(
        httpx.post(tight.root + "/v1/chat/completions", content=pieces, headers=headers), 413, "at most 20000 bytes"
    )
    with socket.create_connection(("127.0.0.1", tight.port)) as raw:
        raw.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99999999999999\r\n\r\n"
        )
        assert b" 413 " in raw.recv(100), "before a byte of it is read"


def test_bodies_that_dawdle_and_bodies_that_are_too_much_together(engine: Engine) -> None:
    def half() -> Iterator[bytes]:
        yield b'{"messages": ['
        time.sleep(pause[0])
        yield b'{"role": "user", "content": "why"}], "max_tokens": 1}'

    url, headers = "/v1/chat/completions", {"content-type": "application/json"}
    with live(engine, body_timeout_seconds=0.2, max_pending_bytes=600) as one, ThreadPoolExecutor(1) as pool:
        pause = [0.0]
        assert httpx.post(one.root + url, content=half(), headers=headers).status_code == 200
        pause = [1.0]
        refused(httpx.post(one.root + url, content=half(), headers=headers), 408, "must not pause for 0.2 seconds")
        padded = json.dumps({"messages": WHY, "max_tokens": 1, "user": "x" * 510}).encode()
        assert post(one, padded, headers=headers).status_code == 200
    with live(engine, max_pending_bytes=600) as one, ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, one.root + url, content=half(), headers=headers)
        until(lambda: one.server.gate.bytes_inside > 0)
        reply = post(one, padded, headers=headers)
        refused(reply, 429, "bytes of requests in progress must stay below 600")
        assert reply.headers["retry-after"] == "1"
        assert first.result().status_code == 200
        assert post(one, padded, headers=headers).status_code == 200
        until(lambda: one.server.gate.bytes_inside == 0)


def test_keys(engine: Engine) -> None:
    with live(engine, api_keys=("first", "second")) as one:
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "first"},
            {"authorization": "Basic first"},
        ):
            error = refused(httpx.get(one.root + "/v1/models", headers=headers), 401)
            assert error["code"] == "invalid_api_key"
        raw = httpx.Client(headers=[(b"authorization", b"Bearer \xff")])
        refused(raw.get(one.root + "/v1/models"), 401)
        for key in ("first", "second"):
            assert one.client(key).models.list().data
        with pytest.raises(openai.AuthenticationError):
            one.client("third").models.list()
        assert httpx.get(one.root + "/health").status_code == 200
        for path in ("/metrics", "/openapi.json", "/v1/models"):
            refused(httpx.get(one.root + path), 401)
            assert httpx.get(one.root + path, headers={"authorization": "Bearer first"}).status_code == 200


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Every step of the model takes this long at least."""
    step = RunningBatch.step

    def slow(self: RunningBatch) -> Any:
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(RunningBatch, "step", slow)


def long_request(one: Live, tokens: int = 40, **more: Any) -> httpx.Response:
    return post(one, {"messages": WHY, "max_tokens": tokens, "temperature": 0, **more}, timeout=60)


def test_too_many_requests_are_sent_away_and_welcome_again(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.02)
    with live(engine, max_concurrency=3, max_num_seqs=2) as one, ThreadPoolExecutor(3) as pool:
        inside = [pool.submit(long_request, one) for _ in range(3)]
        until(lambda: one.server.gate.inside == 3)
        reply = long_request(one)
        error = refused(reply, 429, "requests in progress must stay below 3")
        assert (error["type"], int(reply.headers["retry-after"]) >= 1) == ("rate_limit_error", True)
        assert httpx.get(one.root + "/v1/models").status_code == 200, "questions about the server still work"
        assert [job.result().status_code for job in inside] == [200] * 3
        assert long_request(one, 2).status_code == 200
        # The official client comes back by itself.
        many = [pool.submit(long_request, one) for _ in range(3)]
        until(lambda: one.server.gate.inside == 3)
        patient = one.client(max_retries=20)
        assert patient.chat.completions.create(model="ernie", messages=WHY, max_tokens=1).choices  # type: ignore[arg-type]
        assert all(job.result().status_code == 200 for job in many)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_ends_and_frees_its_place(
    stream: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch, 0.05)
    with live(engine, request_timeout_seconds=1.5, max_num_seqs=1) as one:  # a busy machine answers within it
        reply = long_request(one, 200, stream=stream)
        if stream:
            last = [line for line in reply.text.splitlines() if line][-1]
            error = json.loads(last.removeprefix("data: "))["error"]
            assert reply.status_code == 200
        else:
            error = refused(reply, 504)
        assert error["code"] == "timeout"
        until(lambda: one.service.scheduler.load().running == 0, 2)
        assert long_request(one, 1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_frees_its_place(stream: bool, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.02)
    with live(engine, max_num_seqs=1) as one:
        connection = http.client.HTTPConnection("127.0.0.1", one.port)
        body = json.dumps({"messages": WHY, "max_tokens": 2000, "stream": stream, "temperature": 0})
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        until(lambda: one.service.scheduler.load().running == 1)
        waiting = http.client.HTTPConnection("127.0.0.1", one.port)
        waiting.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        until(lambda: one.service.scheduler.load().waiting == 1)
        waiting.close()
        until(lambda: one.service.scheduler.load().waiting == 0, 2)
        connection.sock.close()
        until(lambda: one.service.scheduler.load().running == 0, 2)
        until(lambda: one.server.gate.inside == 0, 2)
        assert long_request(one, 1).status_code == 200


def test_the_end_finishes_what_runs_and_refuses_what_is_new(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.02)
    with live(engine) as one, ThreadPoolExecutor(2) as pool, httpx.Client() as kept:
        kept.get(one.root + "/health")
        running = [pool.submit(long_request, one, 40, stream=stream) for stream in (False, True)]
        until(lambda: one.service.scheduler.load().running == 2)
        one.drain()
        until(lambda: one.server.gate.draining)
        error = refused(kept.post(one.root + "/v1/chat/completions", json={"messages": WHY}), 503, "shutting down")
        assert error["code"] == "shutting_down"
        assert kept.get(one.root + "/health").status_code == 503
        whole, streamed = (job.result() for job in running)
        assert whole.json()["usage"]["completion_tokens"] == 40
        assert streamed.text.endswith("data: [DONE]\n\n")
        one.thread.join(10)
        assert not one.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            httpx.get(one.root + "/health")


def test_the_end_does_not_wait_for_ever(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slowly(monkeypatch, 0.02)
    with live(engine, shutdown_timeout_seconds=0.3) as one, ThreadPoolExecutor(1) as pool:
        running = pool.submit(long_request, one, 3000)
        until(lambda: one.service.scheduler.load().running == 1)
        started = time.monotonic()
        one.drain()
        one.thread.join(15)
        assert not one.thread.is_alive()
        assert time.monotonic() - started < 10
        refused(running.result(), 503, "no longer running")


def test_a_failing_model_is_not_a_bad_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One failing step ends the requests of its batch with 500, and the next ones are fine; a dead
    thread is told by /health.
    """
    with live(engine) as one:
        with monkeypatch.context() as patch:
            patch.setattr(RunningBatch, "step", broken(RuntimeError("out of memory")))
            assert refused(long_request(one), 500, "out of memory")["type"] == "server_error"
        assert long_request(one, 1).status_code == 200
        with monkeypatch.context() as patch:
            patch.setattr(RunningBatch, "join", broken(RuntimeError("bad kernel")))
            refused(long_request(one), 500, "bad kernel")
        assert long_request(one, 1).status_code == 200
        monkeypatch.setattr(threading, "excepthook", lambda _: None)
        with monkeypatch.context() as patch:
            patch.setattr(RunningBatch, "step", broken(KeyError("never foreseen")))
            refused(long_request(one), 503, "no longer running")
        refused(long_request(one, 1), 503, "no longer running")
        assert httpx.get(one.root + "/health").status_code == 503


def test_an_error_in_the_servers_own_code_has_the_same_shape(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with live(engine) as one:
        with monkeypatch.context() as patch:
            patch.setattr(Service, "find", broken(KeyError("secret detail")))
            error = refused(long_request(one, 1), 500, "its log says how")
        assert "secret" not in str(error)
        assert long_request(one, 1).status_code == 200


def test_requests_beyond_what_can_run_wait_undecoded(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only max_num_seqs and a few more are encoded; the others wait before that, and all are
    answered.
    """
    slowly(monkeypatch, 0.02)
    most = [0]
    with live(engine, max_num_seqs=1, preparing=2) as one, ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(long_request, one, 5) for _ in range(8)]
        while not all(job.done() for job in jobs):
            load = one.service.scheduler.load()
            most[0] = max(most[0], load.waiting + load.running)
            time.sleep(0.005)
        assert [job.result().status_code for job in jobs] == [200] * 8
        assert most[0] == 3
        assert "ernie_tune_requests_waiting 0" in httpx.get(one.root + "/metrics").text


def broken(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> Any:
        raise error

    return fail


def test_one_spoilt_request_does_not_take_its_neighbours_along(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    join = RunningBatch.join

    def picky(self: RunningBatch, prompts: Any, *more: Any) -> None:
        if any(p.params.max_new_tokens == 7 for p in prompts):
            raise RuntimeError("spoilt")
        join(self, prompts, *more)

    with live(engine) as one, ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(RunningBatch, "join", picky)
        with one.service.scheduler._changed:  # all four are admitted together
            jobs = [pool.submit(long_request, one, tokens) for tokens in (6, 7, 8, 9)]
            time.sleep(0.5)
        assert [job.result().status_code for job in jobs] == [200, 500, 200, 200]


def test_options_are_checked(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"max_num_seqs \(0\) must be at least 1"):
        ServeOptions(max_num_seqs=0)
    with pytest.raises(ValueError, match=r"request_timeout_seconds \(nan\) must be at least"):
        ServeOptions(request_timeout_seconds=float("nan"))
    with pytest.raises(ValueError, match="api_key must be of printable ASCII"):
        ServeOptions(api_keys=("",))
    with pytest.raises(ValueError, match=r"max_model_len \(5000\) must not exceed max_position_embeddings \(4096\)"):
        Service(engine, {"x": None}, ServeOptions(max_model_len=5000))


def test_text_of_a_user_that_json_can_hold_but_utf8_cannot(tight: Live) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "model": "\\ud800"}'
    reply = post(tight, body, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 404)
    assert post(tight, {"messages": [{"role": "user", "content": [text_part("x")]}]}).status_code == 200

"""What attackers tried: nobody's request fails, waits or costs memory because of another's."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest
from live import Live, image_part, live, until
from support.tiny_runs import IMAGES, processor

from ernie_tune.generate.batch import RunningBatch
from ernie_tune.generate.engine import Engine
from ernie_tune.serve.connections import log_seldom
from ernie_tune.serve.embedding_request import EmbeddingRequest
from ernie_tune.serve.errors import ApiError
from ernie_tune.serve.fetch import FetchPolicy, fetch
from ernie_tune.serve.media import MediaPolicy, read_video
from ernie_tune.serve.pool import Lease
from ernie_tune.serve.requests import BodyLimits, read_request, text_bytes
from ernie_tune.serve.schema import ChatRequest, CompletionRequest

WHY = [{"role": "user", "content": "why"}]
ASK = {"messages": WHY, "max_tokens": 2, "ignore_eos": True}
JSON = {"content-type": "application/json"}
LIMITS = BodyLimits(2**20, 4096, 64)
LOCAL = MediaPolicy(fetch=FetchPolicy(allowed_hosts=frozenset({"127.0.0.1"})))


@pytest.fixture(scope="module")
def engine() -> Engine:
    from conftest import _golden_model

    return Engine(_golden_model("tiny-a", "float32"), processor())


@pytest.fixture(scope="module")
def running(engine: Engine) -> Iterator[Live]:
    with live(engine) as one:
        yield one


def post(one: Live, body: Any, path: str = "/v1/chat/completions", **more: Any) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx.post(one.root + path, content=content, timeout=60, **{"headers": JSON, **more})


def told(reply: httpx.Response, status: int = 400) -> str:
    assert reply.status_code == status, reply.text
    return str(reply.json()["error"]["message"])


# --- one request's text ---------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["stop", "user", "prompt"])
def test_half_a_surrogate_fails_its_own_request_alone(
    place: str, running: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch)
    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(post, running, {**ASK, "max_tokens": 60}) for _ in range(3)]
        until(lambda: running.service.scheduler.load().running == 3)
        body = {"prompt": [9], "max_tokens": 3, place: "\ud800"}
        assert "surrogates not allowed" in told(post(running, body, "/v1/completions"))
        assert [other.result().status_code for other in others] == [200] * 3


def slow(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    step = RunningBatch.step

    def dawdle(self: RunningBatch) -> Any:
        time.sleep(seconds)
        return step(self)

    monkeypatch.setattr(RunningBatch, "step", dawdle)


def test_arguments_nested_deep_are_a_bad_request_and_the_connection_lives(running: Live) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "[" * 3000 + "]" * 3000}}
    turns = [*WHY, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x", "tool_call_id": "a"}]
    with httpx.Client(headers=JSON) as client:
        for _ in range(2):
            reply = client.post(f"{running.root}/v1/chat/completions", json={"messages": turns})
            assert "nested" in told(reply)
        assert client.post(f"{running.root}/v1/chat/completions", json=ASK).status_code == 200


@pytest.mark.parametrize("part", ["name", "id"])
def test_names_of_calls_are_bounded(part: str, running: Live) -> None:
    call: dict[str, Any] = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    (call["function"] if part == "name" else call)[part] = "x" * 5000
    said = told(post(running, {"messages": [*WHY, {"role": "assistant", "tool_calls": [call]}]}))
    where = "function.name" if part == "name" else "id"
    assert said.startswith(f"messages[1].tool_calls[0].{where} (")


def test_a_key_that_is_there_twice_is_refused(running: Live) -> None:
    body = b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    assert "key 'content' is there twice" in told(post(running, body))


# --- sizes ----------------------------------------------------------------------------------------


def filled(opening: bytes, item: bytes, closing: bytes, size: int) -> bytes:
    count = (size - len(opening) - len(closing)) // (len(item) + 1)
    return opening + b",".join([item] * count) + closing


TURN = b'{"messages":[{"role":"user","content":"x"}],'
SHAPES: dict[str, tuple[type[Any], bytes, bytes, bytes]] = {
    "messages": (ChatRequest, b'{"messages":[', b"{}", b"]}"),
    "content": (ChatRequest, b'{"messages":[{"role":"user","content":[', b"0", b"]}]}"),
    "stop": (ChatRequest, TURN + b'"stop":[', b"0", b"]}"),
    "tools": (ChatRequest, TURN + b'"tools":[', b"[]", b"]}"),
    "calls": (ChatRequest, b'{"messages":[{"role":"assistant","tool_calls":[', b"{}", b"]}]}"),
    "prompts": (CompletionRequest, b'{"prompt":[', b"{}", b"]}"),
    "ids": (CompletionRequest, b'{"prompt":[', b"7", b"]}"),
    "lists": (CompletionRequest, b'{"prompt":[[7],', b"[]", b"]}"),
    "inputs": (EmbeddingRequest, b'{"input":[', b"{}", b"]}"),
    "parts": (EmbeddingRequest, b'{"input":[[', b'{"a":0}', b"]]}"),
    "input lists": (EmbeddingRequest, b'{"input":[[7],', b"[]", b"]}"),
    "unknown fields": (ChatRequest, TURN, b'"a":0', b"}"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_lists_cost_no_more_than_their_bytes(shape: str) -> None:
    """Some 100 bytes for one of the body, where it was 1,600; above the limit nothing is parsed."""
    kind, *parts = SHAPES[shape]
    fits, more = filled(*parts, size=2**16), filled(*parts, size=2**17)
    limits = BodyLimits(2**16, 4096, 64)
    assert peak_bytes(fits, kind, limits, 400) < 130 * len(fits)
    assert peak_bytes(more, kind, limits, 413) < len(more)


def peak_bytes(raw: bytes, kind: type[Any], limits: BodyLimits, status: int) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(ApiError) as found:
            read_request(raw, kind, limits)
        assert found.value.status == status
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_data_urls_are_counted_apart() -> None:
    picture = b'{"url":"data:image/png;base64,' + b"A" * 3_000_000 + b'"}'
    assert text_bytes(picture, 1000) < 20
    assert text_bytes(picture + b"x" * 990, 1000) > 990
    assert text_bytes(b'"DATA:,' + b"A" * 2000 + b'"', 1000) < 20
    for sly in (
        b'"data:,",' * 1000,  # many short ones
        b'"data:' + b'\\"' * 3000,  # never ends
        b'"data:' + b"x" * 3000 + b'\\" more',
        b"[[],[]]" * 1000,
    ):
        assert text_bytes(sly, 1000) > 1000


def test_many_token_ids_are_a_prompt_as_long_as_the_context(running: Live) -> None:
    said = told(post(running, {"prompt": [9] * 5000}, "/v1/completions"))
    assert "prompt (5000 token ids) must have at most max_model_len (4096)" in said
    assert post(running, {"prompt": [9] * 3000, "max_tokens": 1}, "/v1/completions").status_code == 200


# --- media ----------------------------------------------------------------------------------------


class Trickle:
    """A host that sends one byte after another of something without end. `open`: its connections
    that still live.
    """

    BODIES: ClassVar[dict[str, tuple[bytes, bytes]]] = {
        "header": (b"HTTP/1.1 200 OK\r\nX-A: ", b"a"),
        "status": (b"HTTP/1.1 ", b"2"),
        "chunk": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        "body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),
        "nothing": (b"", b""),
    }

    def __init__(self, mode: str) -> None:
        self.first, self.then = self.BODIES[mode]
        self.server = socket.create_server(("127.0.0.1", 0))
        self.open = 0
        self.ever = 0
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.getsockname()[1]}/a.png"

    def accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            self.open += 1
            self.ever += 1
            threading.Thread(target=self.drip, args=(connection,), daemon=True).start()

    def drip(self, connection: socket.socket) -> None:
        try:
            connection.recv(2000)
            connection.sendall(self.first)
            while True:
                connection.sendall(self.then)
                connection.settimeout(0.02)
                try:
                    if not connection.recv(100):
                        break
                except TimeoutError:
                    pass
        except OSError:
            pass
        self.open -= 1


@contextmanager
def trickle(mode: str) -> Iterator[Trickle]:
    host = Trickle(mode)
    try:
        yield host
    finally:
        host.server.close()


@pytest.mark.parametrize("mode", Trickle.BODIES)
def test_no_host_can_hold_a_thread_longer_than_its_time(mode: str) -> None:
    policy = FetchPolicy(allowed_hosts=frozenset({"127.0.0.1"}), timeout_seconds=0.3)
    with trickle(mode) as host:
        with pytest.raises(ValueError, match="TimeoutError"):
            fetch(host.url, policy, "image")
        until(lambda: host.open == 0)
        lease, ended = Lease(1000), []

        def work() -> None:
            with pytest.raises(ValueError, match="cannot be downloaded"):
                fetch(host.url, LOCAL.fetch, "image", lease=lease)
            ended.append(True)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        until(lambda: host.open == 1)
        lease.give_up()
        thread.join(30)
        assert ended, "given up, the work ends at once, not after 20 seconds"
        until(lambda: host.open == 0)


def test_a_name_server_cannot_hold_a_thread_either() -> None:
    def never(host: str, port: int) -> Any:
        time.sleep(30)

    with pytest.raises(ValueError, match="TimeoutError"):
        fetch("http://images.test/x", FetchPolicy(timeout_seconds=0.2), "image", never)


@pytest.mark.parametrize("mode", ["header", "nothing"])
def test_text_does_not_wait_behind_pictures(mode: str, engine: Engine) -> None:
    options = {"max_num_seqs": 1, "preparing": 2, "media": LOCAL}
    with trickle(mode) as host, live(engine, **options) as one:
        part = {"type": "image_url", "image_url": {"url": host.url}}
        held = [send(one, {"messages": [{"role": "user", "content": [part]}]}) for _ in range(8)]
        until(lambda: host.open == 2)
        until(lambda: one.server.gate.inside == 8)
        assert post(one, ASK).status_code == 200
        assert one.server.gate.inside == 8, "they still wait"
        for sock in held:  # their clients go, and the next picture is read
            sock.close()
        until(lambda: one.server.gate.inside == 0)
        until(lambda: host.open == 0)
        picture = {"messages": [{"role": "user", "content": [image_part(IMAGES / "0003.png")]}], "max_tokens": 1}
        assert post(one, picture).status_code == 200


def send(one: Live, body: Any, path: str = "/v1/chat/completions") -> socket.socket:
    """A request whose answer nobody has read."""
    sock = socket.create_connection(("127.0.0.1", one.port))
    raw = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}"
    sock.sendall(head.encode() + b"\r\n\r\n" + raw)
    return sock


def test_pictures_and_videos_have_a_time_together(engine: Engine) -> None:
    with trickle("body") as host, live(engine, media=LOCAL, media_timeout_seconds=0.3) as one:
        part = {"type": "image_url", "image_url": host.url}
        assert "cannot be downloaded" in told(post(one, {"messages": [{"role": "user", "content": [part] * 3}]}))
        assert host.ever == 1, "the second one had no time left"


def test_media_have_a_size_together(engine: Engine) -> None:
    part = image_part(IMAGES / "0003.png")
    size = len(json.dumps(part))
    with live(engine, max_body_bytes=size * 2) as one:
        assert post(one, {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}).status_code == 200
    folder = MediaPolicy(local_folder=IMAGES)
    local = {"type": "image_url", "image_url": (IMAGES / "0003.png").as_uri()}
    with live(engine, media=folder, max_body_bytes=1000) as one:
        few = (IMAGES / "0003.png").stat().st_size
        content = [local] * (1000 // few + 1)
        said = told(post(one, {"messages": [{"role": "user", "content": content[:10]}], "max_tokens": 1}))
        assert "must have at most 1000 bytes together" in said


def test_the_end_does_not_wait_for_pictures(engine: Engine) -> None:
    with trickle("header") as host, live(engine, media=LOCAL, shutdown_timeout_seconds=0.3, preparing=1) as one:
        part = {"type": "image_url", "image_url": {"url": host.url}}
        held = [send(one, {"messages": [{"role": "user", "content": [part]}]}) for _ in range(3)]
        until(lambda: one.server.gate.inside == 3)
        until(lambda: host.open == 1)
        one.drain()
        for sock in held:
            answer = b""
            while b"the server has ended before the answer" not in answer:
                more = sock.recv(5000)
                assert more, answer
                answer += more
            assert b" 503 " in answer[:20]
            sock.close()
        one.thread.join(30)
        assert not one.thread.is_alive()
        until(lambda: host.open == 0)


def test_work_that_hangs_does_not_keep_the_process() -> None:
    code = (
        "import asyncio, time; from ernie_tune.serve.pool import Pool\n"
        "async def main():\n"
        "    pool = Pool(2, 'x'); task = asyncio.ensure_future(pool.run(lambda: time.sleep(1000)))\n"
        "    assert await pool.run(lambda: 3) == 3\n"
        "    try: await pool.run(lambda: 1 / 0)\n"
        "    except ZeroDivisionError: print('told')\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "told\n"), done.stderr


def test_a_container_without_a_codec_is_a_bad_video(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        for _ in range(2):
            out.mux(stream.encode(av.VideoFrame(64, 64, "yuv420p")))
        out.mux(stream.encode())
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"stsd" in data
    (tmp_path / "b.mp4").write_bytes(data.replace(b"stsd", b"stsx"))
    for url in ((tmp_path / "a.mp4").as_uri(), (tmp_path / "b.mp4").as_uri()):
        policy = MediaPolicy(local_folder=tmp_path)
        if url.endswith("a.mp4"):
            assert read_video(url, policy) == data
            continue
        with pytest.raises(ValueError, match="must have a video stream of a known codec"):
            read_video(url, policy)
    tight = MediaPolicy(local_folder=tmp_path, max_video_pixels=2 * 64 * 64 - 1)
    with pytest.raises(ValueError, match=r"must have at most 8191 pixels in all its frames; shorten or shrink it"):
        read_video((tmp_path / "a.mp4").as_uri(), tight)


# --- places ---------------------------------------------------------------------------------------


def test_an_answer_that_nobody_reads_holds_no_place(engine: Engine) -> None:
    with live(engine, max_num_seqs=1, preparing=1) as one:
        unread = [send(one, {**ASK, "stream": True, "max_tokens": 5}) for _ in range(4)]
        until(lambda: one.service.scheduler.load().steps >= 5)
        for _ in range(3):
            assert post(one, ASK).status_code == 200
        until(lambda: one.service._places._value == 2)
        for sock in unread:
            sock.close()


def test_places_are_free_before_the_answer_is_read(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reader of the events hangs; the place is given back when the model is done."""
    from ernie_tune.serve import app as app_module

    async def hang(*_: Any) -> Any:
        await asyncio.sleep(1000)

    with live(engine, max_num_seqs=1, preparing=1) as one, ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(app_module, "_collect", hang)
            lost = pool.submit(httpx.post, f"{one.root}/v1/chat/completions", json=ASK, timeout=2)
            until(lambda: one.service.scheduler.load().steps >= 2)
            until(lambda: one.service._places._value == 2)
            assert one.server.gate.inside == 1
        with pytest.raises(httpx.ReadTimeout):
            lost.result()


def test_a_client_that_does_not_read_is_let_go(engine: Engine) -> None:
    with live(engine, write_timeout_seconds=0.3) as one:
        size = len(httpx.get(one.root + "/openapi.json").content)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", one.port))
            sock.settimeout(20)
            cut = False
            for _ in range(40_000_000 // size):
                try:
                    sock.sendall(request)
                except OSError:
                    cut = True
                    break
                time.sleep(0.0005)
            assert cut
            until(lambda: not any(c.client == sock.getsockname() for c in one.server.house._open))


# --- who may ask, and how -------------------------------------------------------------------------


def test_a_page_of_the_web_cannot_use_a_server_of_this_machine(running: Live) -> None:
    url, body = f"{running.root}/v1/chat/completions", json.dumps(ASK)
    with httpx.Client() as client:
        for kind in ({}, {"content-type": "text/plain"}, {"content-type": ""}, {"content-type": "application/x-json"}):
            reply = client.post(url, content=body, headers={"origin": "http://evil.example", **kind})
            assert "Content-Type must be application/json" in told(reply)
        for one in ("application/json; charset=utf-8", "Application/JSON", "application/problem+json"):
            assert client.post(url, content=body, headers={"content-type": one}).status_code == 200
        evil = ("evil.example", "evil.example:8180", "localhost.evil.example", "8.8.8.8", "", "127.0.0.1.evil.example")
        for host in evil:
            for path in ("/v1/models", "/health", "/", "/metrics"):
                assert "must be a name of this server" in told(client.get(running.root + path, headers={"host": host}))
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8180", "x.localhost", "localhost."):
            assert client.get(f"{running.root}/v1/models", headers={"host": host}).status_code == 200
        reply = client.post(url + "/", content=body, headers=JSON)
        assert reply.status_code == 404, "no redirect to the name in Host"


def test_hosts_that_are_given_and_addresses(engine: Engine) -> None:
    with live(engine, host_names=("api.example",), any_address=True) as one:
        for host, status in (("api.example:80", 200), ("10.1.2.3", 200), ("[fe80::1]:1", 200), ("x.api.example", 400)):
            assert httpx.get(f"{one.root}/v1/models", headers={"host": host}).status_code == status


# --- connections ----------------------------------------------------------------------------------


def closed(sock: socket.socket, seconds: float = 30) -> bool:
    sock.settimeout(seconds)
    try:
        return sock.recv(1000) == b""
    except ConnectionError:
        return True


def dripped(sock: socket.socket, drop: bytes, seconds: float = 20) -> bool:
    """Whether the other side ends it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            sock.sendall(drop)
        except OSError:
            return True
        time.sleep(0.05)
    return False


def test_silent_and_slow_connections_are_closed(engine: Engine) -> None:
    with live(engine, head_timeout_seconds=0.4, idle_timeout_seconds=0.4) as one:
        silent, slow_head, kept = (socket.create_connection(("127.0.0.1", one.port)) for _ in range(3))
        kept.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b'"ok"}'):
            answer += kept.recv(1000)
        kept.sendall(b"GET /he")  # begins a second one
        slow_head.sendall(b"GET / HTTP/1.1\r\n")
        assert dripped(slow_head, b"X: y\r\n")
        assert closed(silent)
        assert closed(kept)
        until(lambda: len(one.server.house) == 0)
        assert post(one, ASK).status_code == 200


def test_a_full_house_lets_go_of_the_most_silent(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    slow(monkeypatch)
    with live(engine, max_connections=3) as one:
        silent = [socket.create_connection(("127.0.0.1", one.port)) for _ in range(3)]
        until(lambda: len(one.server.house) == 3)
        assert post(one, ASK).status_code == 200
        assert closed(silent[0])
        with ThreadPoolExecutor(3) as pool:
            busy = [pool.submit(post, one, {**ASK, "max_tokens": 60}) for _ in range(3)]
            until(lambda: one.server.gate.inside == 3)
            assert "too many connections" in told(httpx.get(one.root + "/health"), 503)
            assert [job.result().status_code for job in busy] == [200] * 3
        assert httpx.get(one.root + "/health").status_code == 200


def test_accept_errors_are_told_once() -> None:
    said: list[str] = []
    handle, loop = log_seldom(said.append), asyncio.new_event_loop()
    for _ in range(1000):
        handle(loop, {"message": "socket.accept() out of system resource", "exception": OSError(24, "too many")})
    assert len(said) == 1
    assert "raise the limit of open files" in said[0]
    loop.close()

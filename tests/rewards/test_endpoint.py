"""A judge behind an address: what it is asked, what its reply is worth, and what becomes of a
server that is slow, busy, confused, redirected or gone.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import IMAGES

from ernie_tune.data.records import Record, Reward
from ernie_tune.rewards.endpoint import TOKEN_VARIABLE, EndpointJudge
from ernie_tune.rewards.functions import Answered
from ernie_tune.rewards.rubric import Rubric

Reply = tuple[int, Any]


class Stub:
    """A server whose replies are given; `seen` are the requests, with their headers."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]) -> None:
        self.reply, self.seen, self.url = reply, list[tuple[dict[str, Any], dict[str, str]]](), ""


def said(text: str) -> Reply:
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@contextmanager
def stub(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[Stub]:
    made = Stub(reply)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            made.seen.append((body, dict(self.headers)))
            status, content = made.reply(body, len(made.seen))
            text = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            if status in (301, 302, 307):
                self.send_header("Location", made.url + "/elsewhere")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the judge did not wait
                self.wfile.write(text)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def group(*texts: str, picture: bool = False) -> tuple[Record, list[Answered]]:
    images = (str(IMAGES / "0003.png"),) if picture else ()
    asked = ("<image>" if picture else "") + "what is 6 x 7?"
    record = Record("verifiable", ({"role": "user", "content": asked},), images, reward=Reward("42"))
    return record, [Answered(text) for text in texts]


def test_what_it_is_asked_and_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "very secret")
    with stub(
        lambda body, count: said("10" if "{answer}" not in str(body) and "it is 42" in str(body) else "2.5")
    ) as server:
        judge = EndpointJudge(f"judge:{server.url}?model=big&name=big")
        groups = [group("it is 42", "<think>hm, 41</think>no idea"), group("a blank", picture=True)]
        assert judge(groups) == [[1.0, 0.25], [0.25]]
        assert judge(groups) == [[1.0, 0.25], [0.25]]
        assert len(server.seen) == 3  # what was judged is remembered
    body, headers = next(one for one in server.seen if "it is 42" in str(one))
    assert headers["Authorization"] == "Bearer very secret"
    assert (body["model"], body["temperature"]) == ("big", 0)
    text = body["messages"][0]["content"]
    assert "user: what is 6 x 7?" in text
    assert "Reference answer:\n42" in text
    assert not any("hm, 41" in str(one) for one, _ in server.seen)  # thoughts are not judged
    shown = next(one for one, _ in server.seen if "a blank" in str(one))["messages"][0]["content"]
    assert shown[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert judge.asked.errors == judge.asked.timeouts == 0


@pytest.mark.parametrize("text", ["", "good", "3 or 4", "11", "-1", "7/10", "<think>9", "9.5.1", "NaN", "8a"])
def test_a_reply_without_one_number_in_range_is_no_verdict(text: str) -> None:
    with stub(lambda body, count: said(text)) as server:
        judge = EndpointJudge(f"judge:{server.url}")
        assert judge([group("a")]) == [[None]]
        assert (judge.asked.errors, len(server.seen)) == (1, 1)


def test_busy_servers_are_asked_again_and_others_are_not() -> None:
    with stub(lambda body, count: said("5") if count == 3 else (429 if count == 1 else 503, {})) as server:
        assert EndpointJudge(f"judge:{server.url}")([group("a")]) == [[0.5]]
    for status in (401, 404, 302, 307):
        with stub(lambda body, count, status=status: (status, {})) as server:  # type: ignore[misc]
            judge = EndpointJudge(f"judge:{server.url}")
            assert judge([group("a", "b")]) == [[None, None]]
            assert (judge.asked.errors, len(server.seen)) == (2, 2)  # the token follows no redirection


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"choices": []}', b"\xff\xfe", b"x" * (2 << 20)])
def test_confused_servers(content: bytes) -> None:
    with stub(lambda body, count: (200, content)) as server:
        judge = EndpointJudge(f"judge:{server.url}?retries=1")
        assert judge([group("a")]) == [[None]]
        assert judge.asked.errors == 1


def test_slow_servers_and_none_at_all() -> None:
    release = threading.Event()
    with stub(lambda body, count: (release.wait(20), said("5"))[1]) as server:
        judge = EndpointJudge(f"judge:{server.url}", timeout_seconds=0.3)
        assert judge([group(*"abcd")]) == [[None] * 4]
        assert (judge.asked.timeouts, judge.asked.errors) == (4, 0)
        release.set()
        url = server.url
    gone = EndpointJudge(f"judge:{url}?retries=1", timeout_seconds=5)
    started = time.monotonic()
    assert gone([group("a")]) == [[None]]
    assert gone.asked.errors == 1
    assert time.monotonic() - started < 5  # refused at once: the time is a bound, no wait


def test_an_address_that_never_answers_ends_the_run_and_one_that_did_does_not() -> None:
    unclear = "first 1 answers: the reply 'good' is not one number from 0 to 10"
    with stub(lambda body, count: said("good")) as server, pytest.raises(ValueError, match=unclear):
        EndpointJudge(f"judge:{server.url}", on_error="raise")([group("a")])
    with pytest.raises(ValueError, match=r"first 2 answers: .*refused.*; start the server"):
        EndpointJudge(f"judge:{server.url}?retries=0", on_error="raise")([group("a", "b")])
    with stub(lambda body, count: said("5") if count == 1 else (404, {})) as server:
        judge = EndpointJudge(f"judge:{server.url}", on_error="raise")
        assert judge([group("a")]) == [[0.5]]
        assert judge([group("b", "c")]) == [[None, None]]
        assert judge.asked.errors == 2
    assert EndpointJudge(f"judge:{server.url}?retries=0", on_error="raise")([]) == []


def test_a_page_instead_of_a_reply_is_shown() -> None:
    page = b"<html><body>502 Bad Gateway</body></html>"
    with stub(lambda body, count: (200, page)) as server:
        judge = EndpointJudge(f"judge:{server.url}?retries=0", on_error="raise")
        with pytest.raises(ValueError, match=r"the reply '<html><body>502 Bad Gateway.*' is no JSON; start the server"):
            judge([group("a")])


def test_among_other_judges() -> None:
    with stub(lambda body, count: said("8")) as server:
        rubric = Rubric([EndpointJudge(f"judge:{server.url}?scale=8")], (2.0,))
        assert rubric([group("a", "b")])[0][0].parts == {"judge": 1.0}
        told = rubric.reported()
    assert told["rewards/judge/errors"] == told["rewards/judge/timeouts"] == 0


def test_a_task_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "task.txt"
    file.write_text("Q {question} A {answer} out of {scale}; keep {this}", encoding="utf-8")
    with stub(lambda body, count: said("4")) as server:
        assert EndpointJudge(f"judge:{server.url}?prompt={file}&scale=5")([group("yes {question}")]) == [[0.8]]
    text = server.seen[0][0]["messages"][0]["content"]
    assert text == "Q user: what is 6 x 7? A yes {question} out of 5; keep {this}"


@pytest.mark.parametrize(("place", "match"), [
    ("judge:ftp://a/v1", "must be judge: and an http address"),
    ("judge:/v1", "must be judge: and an http address"),
    ("judge:http://me:hunter2@a/v1", "must have no secret in it"),
    ("judge:http://a/v1?api_key=hunter2", "must have no secret in it"),
    ("judge:http://a/v1?token_env=hunter2", "token_env of a judge must name an environment variable that is set, 7 characters"),
    ("judge:http://a/v1?scale=0", r"scale \(0\) of .* must be a number of at least"),
    ("judge:http://a/v1?retries=many", r"retries \(many\)"),
    ("judge:http://a/v1?prompt=nowhere.txt", r"prompt \(nowhere.txt\) of .* must be a text file"),
])  # fmt: skip
def test_addresses_that_cannot_be(place: str, match: str) -> None:
    with pytest.raises(ValueError, match=match) as raised:
        EndpointJudge(place)
    assert "hunter2" not in str(raised.value)


def test_a_task_without_the_answer(tmp_path: Path) -> None:
    (tmp_path / "task.txt").write_text("judge!", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must hold \{answer\}, else nothing is judged"):
        EndpointJudge(f"judge:http://a/v1?prompt={tmp_path / 'task.txt'}")

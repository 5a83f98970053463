"""The page at `/`: whole in itself, without a key, and nothing in it may become more than text; and
the log of requests.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from live import Live, live, until
from support.tiny_runs import processor

import ernie_tune
from ernie_tune.generate.engine import Engine

FOLDER = Path(ernie_tune.__file__).parent


@pytest.fixture(scope="module")
def running() -> Iterator[Live]:
    from conftest import _golden_model

    engine = Engine(_golden_model("tiny-a", "float32"), processor())
    with live(engine, {"ernie": None}, api_keys=("secret",), log_requests=True) as one:
        yield one


def test_the_page_needs_nothing_else(running: Live) -> None:
    reply = httpx.get(running.root + "/")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "secret" not in reply.text
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<iframe|\bsrc=", reply.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=\"", reply.text)
    policy = dict(one.strip().split(" ", 1) for one in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for name in ("script", "style"):
        (inside,) = re.findall(f"<{name}>(.*?)</{name}>", reply.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[f"{name}-src"] == f"'sha256-{digest}'", "the browser runs this and nothing else"
    assert policy["frame-ancestors"] == "'none'"


def test_what_it_says_is_in_both_languages(running: Live) -> None:
    text = httpx.get(running.root + "/").text
    english, chinese = (re.search(rf"{lang}: \{{(.*?)\}}", text, re.DOTALL) for lang in ("en", "zh"))
    assert english is not None
    assert chinese is not None
    keys = [re.findall(r"(\w+): \"", found[1]) for found in (english, chinese)]
    assert keys[0] == keys[1]
    used = set(re.findall(r"data-(?:say|hint)=\"(\w+)\"", text)) | set(re.findall(r"say\.(\w+)", text))
    assert used == set(keys[0])


def test_it_is_installed_with_the_package() -> None:
    setup = (FOLDER.parent / "setup.py").read_text(encoding="utf-8")
    assert '"serve/*.html"' in setup
    assert (FOLDER / "serve" / "page.html").is_file()


def test_one_line_a_request(running: Live, capsys: pytest.CaptureFixture[str]) -> None:
    with httpx.Client(headers={"authorization": "Bearer secret"}) as client:
        body = {"messages": [{"role": "user", "content": "why"}], "max_tokens": 3, "ignore_eos": True}
        usage = client.post(running.root + "/v1/chat/completions", json=body).json()["usage"]
        client.get(running.root + "/v1/models/%1b[31m%0aernie_tune: forged")
        client.get(running.root + "/health?key=private")
    lines: list[str] = []
    until(lambda: len(lines.extend(capsys.readouterr().err.splitlines()) or lines) >= 3)
    assert len(lines) == 3, lines
    stamp = r"ernie_tune: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d 127.0.0.1"
    tokens = f"ernie {usage['prompt_tokens']}\\+3 tokens"
    assert re.fullmatch(rf"{stamp} POST /v1/chat/completions 200 \d+\.\d\d\d s {tokens}", lines[0])
    assert re.fullmatch(
        rf"{stamp} GET /v1/models/%1[bB](\[|%5[bB])31m%0[aA]ernie_tune:%20forged 404 \d+\.\d+ s", lines[1]
    )
    assert re.fullmatch(rf"{stamp} GET /health 200 \d+\.\d+ s", lines[2]), "no query: it may hold secrets"

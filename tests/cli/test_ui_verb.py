"""`ernie-tune ui` and `ernie-tune judge`: what they open, and what they say of words that cannot be
opened. No page is served.
"""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import IMAGES, write_rows

from ernie_tune.cli.main import main

pytest.importorskip("gradio", reason="THE VERBS ui AND judge WERE NOT TRIED: pip install gradio")

PICTURE = {"messages": [{"role": "user", "content": "<image>which"}], "images": ["a.png"]}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What was opened: (studio, room, rows, model, host, port, key)."""
    from ernie_tune.ui import app

    found: list[Any] = []
    monkeypatch.setattr(app, "build", lambda studio, room, rows, model: (room, rows, model))
    monkeypatch.setattr(
        app, "serve", lambda studio, page, host, sock, key: found.append((studio, *page, host, sock.getsockname(), key))
    )
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return found


def test_rows_from_anywhere(opened: list[Any], tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    shutil.copy(IMAGES / "0003.png", tmp_path / "away" / "a.png")
    rows = write_rows(tmp_path / "away" / "rows.jsonl", [PICTURE])
    for model in ("nano", "ernie-4.5-vl-nano"):
        assert main(["judge", model, "../away/rows.jsonl", "--port", "0"]) == 0
        studio, room, named, answered, host, address, key = opened.pop()
        assert (room, named, answered, host, key) == ("judge", rows, "ernie-4.5-vl-nano", "127.0.0.1", "")
        assert address[1] > 0
        assert studio.workspace.root == tmp_path / "here"
        assert studio.workspace.may_show(str(tmp_path / "away" / "a.png"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ui", "--port", "99999"], "port (99999) must be from 0 to 65535"),
        (["ui", "--port", "-1"], "port (-1) must be from 0 to 65535"),
        (["ui", "--port", "many"], "port (many) must be a whole number"),
        (["ui", "--host", "no.such.invalid"], "host (no.such.invalid) must be an address of this machine"),
        (["ui", "--host", "192.0.2.1"], "host (192.0.2.1) must be an address of this machine"),
        (["ui", "--host", ""], "host () must be an address of this machine"),
        (["ui", "--host", "a" * 300], "must be an address of this machine"),
        (["ui", "gone"], "gone must be a folder"),
        (["judge", "rows.jsonl", "--port", "65536"], "port (65536) must be from 0 to 65535"),
        (["judge", "nano", "rows.jsonl", "--host", "1.2.3.999"], "host (1.2.3.999) must be an address of this machine"),
        (["judge"], "expected [MODEL] ROWS"),
        (["judge", "nano", "gone.jsonl"], "gone.jsonl does not exist"),
        (["judge", "gone", "rows.jsonl"], "gone does not exist"),
        (
            ["judge", "rows.jsonl", "rows.jsonl"],
            "MODEL (rows.jsonl) must be a folder with a model, an adapter or a run in it",
        ),
        (["judge", ".", "rows.jsonl"], "MODEL (.) must be a folder with a model"),
        (["judge", "nano", "."], "ROWS (.) must be a file of rows, not a folder"),
        (["judge", "rows.jsonl"], "rows.jsonl must hold questions with answers, or a model must answer them"),
        (["judge", "nano", "broken.jsonl"], "no row of broken.jsonl can be judged"),
        (["serve", "nano", "--host", "192.0.2.1"], "host (192.0.2.1) must be an address of this machine"),
    ],
)
def test_what_cannot_be_opened(words: list[str], message: str, opened: list[Any], capsys: Any) -> None:
    write_rows(Path("rows.jsonl"), [{"messages": [{"role": "user", "content": "q"}]}])
    Path("broken.jsonl").write_text('{"messages": 3}\n')
    assert main(words) in (1, 2)
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1, told
    assert not opened


def test_a_taken_port(opened: list[Any], capsys: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["ui", "--port", str(port)]) == 1
        assert f"port ({port}) of 127.0.0.1 must be free" in capsys.readouterr().err
        from ernie_tune.cli import ui

        with ui._listening("127.0.0.1", port, asked=False) as next_one:
            assert next_one.getsockname()[1] > port


def test_any_key_is_in_the_address_as_an_address_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    from urllib.parse import parse_qs, urlsplit

    from ernie_tune.ui import app

    monkeypatch.setattr(app._Server, "run", lambda self, sockets: print(self.line))
    monkeypatch.setattr(app, "application", lambda *given: given)
    monkeypatch.setattr(app, "build", lambda *given: None)
    monkeypatch.chdir(tmp_path)
    for key in ("a;b c&d#e%41+\"'", "密钥 "):
        monkeypatch.setenv("ERNIE_TUNE_UI_KEY", key)
        assert main(["ui", "--port", "0"]) == 0
        address = capsys.readouterr().out.split()[-1]
        assert parse_qs(urlsplit(address).query)["key"] == [key]
        assert urlsplit(address).port

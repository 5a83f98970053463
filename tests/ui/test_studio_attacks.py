"""The studio under attack: paths, uploads, scripts in data, other origins, names that are bent to
this machine, events that no page would send."""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gradio", reason="THE STUDIO'S PAGE WAS NOT ATTACKED: pip install gradio")

import gradio as gr
from fastapi.testclient import TestClient
from support.tiny_runs import IMAGES, write_rows

from ernie_tune.report import html
from ernie_tune.ui import app, room_compare, room_data, room_judge, room_serve, room_train, room_watch, runs
from ernie_tune.ui.studio import Studio

HOST = {"host": "127.0.0.1:7860"}
ATTACKS = ("<script>window.broken=1</script>", "<img src=x onerror=window.broken=1>", "</pre><svg onload=x>")


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Studio]:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jsonl").write_text('{"secret": 1}')
    (tmp_path / "outside" / "secret.png").write_bytes((IMAGES / "0003.png").read_bytes())
    made = Studio.at(tmp_path / "work", (), lambda key: key)
    yield made
    made.servers.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Path]]:
    root = tmp_path_factory.mktemp("page")
    (root / "rows.jsonl").write_text('{"secret": 1}')
    made = app.open_studio(root)
    with TestClient(app.application(made, app.build(made)), base_url="http://127.0.0.1:7860") as client:
        yield client, root


# --- paths, origins, hosts ---


def test_the_page_itself_answers(page: tuple[TestClient, Path]) -> None:
    client, _ = page
    answer = client.get("/")
    assert answer.status_code == 200
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert client.get("/docs").status_code == 404


def test_no_file_is_handed_out(page: tuple[TestClient, Path]) -> None:
    client, root = page
    for path in ("/etc/passwd", str(root / "rows.jsonl"), "rows.jsonl", str(root / ".ernie_tune_ui" / "jobs"),
                 "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "http://127.0.0.1:1/x", "\\\\host\\share"):  # fmt: skip
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/proxy=", "/gradio_api/stream/x/0/", "/static/"):
            answer = client.get(f"{route}{path}", follow_redirects=False)
            assert answer.status_code >= 300, (route, path)
            assert "secret" not in answer.text
            assert "root:" not in answer.text


@pytest.mark.parametrize(
    "headers",
    [{"host": "evil.example"}, {"host": "127.0.0.1.evil.example:7860"}, {"origin": "http://evil.example", **HOST},
     {"origin": "null", **HOST}, {"origin": "http://127.0.0.1:8000", **HOST}, {"origin": "https://127.0.0.1:7860@evil.example", **HOST}],
)  # fmt: skip
def test_another_page_drives_nothing(page: tuple[TestClient, Path], headers: dict[str, str]) -> None:
    client, root = page
    before = sorted(root.rglob("*"))
    for route in ("/gradio_api/queue/join", "/gradio_api/upload", "/gradio_api/call/_start", "/gradio_api/reset"):
        answer = client.post(route, json={"data": [], "fn_index": 0, "session_hash": "x"}, headers=headers)
        assert answer.status_code in (403, 421), route
    assert client.get("/config", headers=headers).status_code in (403, 421)
    assert sorted(root.rglob("*")) == before


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "http://192.0.2.1/x", "{root}/rows.jsonl", "{sent}/../../rows.jsonl", "a\x00b"]
)
def test_a_file_that_nobody_sent_is_not_taken_for_one(page: tuple[TestClient, Path], path: str) -> None:
    client, root = page
    before = sorted(root.rglob("*"))
    named = path.format(root=root, sent=root / ".ernie_tune_ui" / "sent")
    file = {"path": named, "meta": {"_type": "gradio.FileData"}}
    for route in ("call/lambda", "call/lambda_2", "run/lambda", "queue/join"):
        for data in ([file], [[{"image": file}]]):
            asked = {"data": data, "fn_index": 0, "session_hash": "x"}
            answer = client.post(f"/gradio_api/{route}", json=asked, headers={**HOST, "accept-language": "zh"})
            assert (answer.status_code, answer.text) == (403, "文件须由页面上传；请重新上传\n"), route
    assert client.post("/gradio_api/queue/join", content=b"{", headers=HOST).status_code == 403
    assert sorted(root.rglob("*")) == before


def test_a_file_that_was_sent_is_taken(page: tuple[TestClient, Path]) -> None:
    client, _ = page
    (path,) = client.post("/gradio_api/upload", files={"files": ("a.jsonl", b"{}")}, headers=HOST).json()
    asked = {"data": [{"path": path, "meta": {"_type": "gradio.FileData"}}]}
    assert client.post("/gradio_api/call/lambda", json=asked, headers=HOST).status_code == 200


# --- uploads ---


@pytest.mark.parametrize("name", ["x.svg", "x.html", "x.xhtml", "x.js", "x.jsonl", "noend"])
def test_what_somebody_sent_is_never_run_by_a_browser(page: tuple[TestClient, Path], name: str) -> None:
    client, _ = page
    script = b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>"
    sent = client.post("/gradio_api/upload", files={"files": (name, script, "text/html")}, headers=HOST)
    assert sent.status_code == 200
    answer = client.get(f"/gradio_api/file={sent.json()[0]}", headers=HOST)
    if answer.status_code == 200:
        kind = answer.headers["content-type"].split(";")[0]
        assert "attachment" in answer.headers.get("content-disposition", "") or kind == "text/plain", answer.headers
        assert answer.headers["x-content-type-options"] == "nosniff"


def sent(studio: Studio, name: str, data: bytes) -> str:
    file = studio.workspace.sent / "ab" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    return str(file)


def test_only_rows_are_kept(studio: Studio) -> None:
    for name in (
        "rewards.py",
        "run.yaml",
        "x.png",
        "dataset_info.json",
        "noend",
        ".jsonl",
        "a.jsonl.exe",
        "model.safetensors",
    ):
        _, told = room_data._keep(studio, sent(studio, name, b"{}"))
        assert "must be rows" in told, name
    for path in ("/etc/passwd", str(studio.workspace.root.parent / "outside" / "secret.jsonl"), ""):
        assert "must be sent with the page" in room_data._keep(studio, path)[1]
    assert not studio.workspace.uploads.exists()
    for name in (
        "rows.jsonl",
        "rows.jsonl",
        "<img src=x onerror=1>.jsonl",
        "x" * 200 + ".jsonl",
        "...jsonl",
        "a b\n.JSONL",
    ):
        update, told = room_data._keep(studio, sent(studio, name, b"{}"))
        assert "good" in told
        assert "<img" not in told
        kept = studio.workspace.inside(update["value"])
        assert kept.parent == studio.workspace.uploads
    assert len(list(studio.workspace.uploads.iterdir())) == 6, "none over another"


def bomb(side: int) -> bytes:
    """A PNG of side x side pixels that is small as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_that_would_fill_the_memory_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(bomb(12_000) + bytes(20_000))
    assert (tmp_path / "bomb.png").stat().st_size < 60_000
    assert "<img" not in html.picture(tmp_path / "bomb.png", None, small=True)


def test_what_never_ends_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for name in (tmp_path / "pipe.png", "/dev/zero", "a\0b", "x" * 5000, tmp_path):
        assert "class=gone" in html.picture(name, None), name
    for name in ('data:image/png" onerror="window.broken=1', "data:image/svg+xml,<svg onload=window.broken=1>"):
        assert re.fullmatch(r'<img src="[^"<>]*" loading="lazy" alt="">', html.picture(name, None))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"[" * 100_000, b'{"messages": 3}\n' * 3, b"\x00\xff" * 1000, b'{"a": 1e999999}']
)
def test_broken_rows_are_told_in_every_room(studio: Studio, data: bytes) -> None:
    (studio.workspace.root / "bad.jsonl").write_bytes(data)
    for told in (
        room_data._checked(studio, "bad.jsonl"),
        room_data._rows(studio, "bad.jsonl"),
        room_data._mended(studio, "bad.jsonl")[0],
        list(room_judge._start(studio, "bad.jsonl", "", "judged", "ann", "pick", 2, 1.0))[-1][1],
    ):
        assert isinstance(told, str)


# --- pictures and scripts in data ---


def test_pictures_of_others_are_not_shown(studio: Studio) -> None:
    root, secret = studio.workspace.root, studio.workspace.root.parent / "outside" / "secret.png"
    (root / "link.png").symlink_to(secret)
    shown = {"messages": [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "3"}]}
    write_rows(
        root / "rows.jsonl", [{**shown, "images": [str(i)]} for i in (secret, "link.png", "../outside/secret.png")]
    )
    for told in (room_data._checked(studio, "rows.jsonl"), room_data._rows(studio, "rows.jsonl")):
        assert "base64" not in told
    run = root / "run"
    run.mkdir()
    line = {"step": 0, "row": "a", "question": "q", "images": [str(secret), "link.png"], "reference": "", "answer": ""}
    (run / "samples.jsonl").write_text(json.dumps(line) + "\n")
    rollout = {"round": 1, "prompt": 0, "sample": 0, "row": "a", "images": [str(secret)], "gold": None, "text": "t",
               "reward": 1.0, "rewards": {}, "advantage": 0.0, "finish_reason": "stop"}  # fmt: skip
    (run / "rollouts.jsonl").write_text(json.dumps(rollout) + "\n")
    (run / "trainer_log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    seen = room_watch._look(studio, ["run"], "")
    assert "Sampled answers" in seen[2]
    assert "base64" not in seen[2]


@pytest.mark.parametrize("attack", ATTACKS)
def test_scripts_in_data_stay_text(studio: Studio, attack: str) -> None:
    root = studio.workspace.root
    row = {"messages": [{"role": "user", "content": attack}, {"role": "assistant", "content": attack}], "id": attack}
    write_rows(root / "rows.jsonl", [row, {"messages": [{"role": attack, "content": 3}]}])
    name = attack.replace("/", "")
    run = root / name
    run.mkdir()
    (run / "trainer_log.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0, attack: 2.0}) + "\n")
    line = {"step": 0, "row": attack, "question": attack, "images": [attack], "reference": attack, "answer": attack}
    (run / "samples.jsonl").write_text(json.dumps(line) + "\n")
    rollout = {"round": attack, "prompt": attack, "sample": 0, "row": attack, "images": [attack], "gold": attack,
               "text": attack, "reward": 1.0, "rewards": {attack: 1.0}, "advantage": 0.0, "finish_reason": attack}  # fmt: skip
    (run / "rollouts.jsonl").write_text(json.dumps(rollout) + "\n")
    told = [
        room_data._checked(studio, "rows.jsonl"),
        room_data._rows(studio, "rows.jsonl"),
        room_data._checked(studio, attack),
        *map(str, room_watch._look(studio, [name], "")),
        runs.curves([run, root]),
        *room_train._start(studio, f"stage: SFT\n{attack}: 1\n", "run.yaml", "en")[:1],
        *room_train._start(studio, "stage: SFT\nmodel_name_or_path: tiny-a\ntrain_dataset_path: rows.jsonl\n", attack, attack)[:1],
        room_train._judged(studio, f"output_dir: '{attack}'"),
        room_train._stop(studio, attack),
        room_serve._export(studio, attack, attack, attack, attack),
        room_serve._serve(studio, f"/{attack}"),
        *next(room_compare._both(studio, ["", ""], attack, None, 0.0)),
        str(list(room_judge._start(studio, "rows.jsonl", attack, "judged", attack, attack, 2, 1.0))),
    ]  # fmt: skip
    for text in told:
        assert attack not in text, text[:300]


# --- events that no page sends ---


@pytest.mark.parametrize(
    "sent",
    [None, [], "x", {"keys": None}, {"keys": "11"}, {"keys": [["1"], ["1", 0, 0], [1, 0], ["1", "0"], ["1", True], None, {}]},
     {"keys": [["1", -1], ["nonsense", 0], ["mark99999999999", 0], ["1" * 10_000, 0], ["", 0]]}],
)  # fmt: skip
def test_keys_that_no_page_sends(studio: Studio, sent: Any) -> None:
    answers = [{"content": "a"}, {"content": "b"}]
    write_rows(
        studio.workspace.root / "rows.jsonl",
        [{"row": 1, "messages": [{"role": "user", "content": "q"}], "answers": answers}],
    )
    *_, first = room_judge._start(studio, "rows.jsonl", "", "judged", "ann", "pick", 10**9, 1.0)
    session = first[0]
    assert session.n == 8
    *_, seen = room_judge._keys(session, "", "", gr.EventData(None, sent))
    assert session.desk.at == 0
    assert session.store.all() == []
    assert len(seen) == 6
    assert list(room_judge._keys(None, "", "", gr.EventData(None, sent)))


def test_a_late_answer_leaves_what_is_being_written_alone(studio: Studio) -> None:
    answers = [{"content": "a"}, {"content": "b"}]
    rows = [{"row": n, "messages": [{"role": "user", "content": "q"}], "answers": answers} for n in (1, 2)]
    write_rows(studio.workspace.root / "rows.jsonl", rows)
    *_, first = room_judge._start(studio, "rows.jsonl", "", "judged", "ann", "pick", 2, 1.0)

    def fields(key: str, at: int, better: str = "") -> list[Any]:
        return list(room_judge._keys(first[0], "", better, gr.EventData(None, {"keys": [[key, at]]})))[-1][-2:]

    assert fields("1", 0) == ["", ""], "another question"
    assert fields("2", 0) == [gr.skip(), gr.skip()], "meant for the first one"
    assert fields("ArrowRight", 1) == [gr.skip(), gr.skip()]
    assert fields("e", 1) == [gr.skip(), first[0].marked_text()]
    assert fields("e", 1, "mine") == [gr.skip(), gr.skip()]


def test_two_judges_in_two_tabs(studio: Studio) -> None:
    answers = [{"content": "a"}, {"content": "b"}]
    rows = [{"row": n, "messages": [{"role": "user", "content": "q"}], "answers": answers} for n in (1, 2)]
    write_rows(studio.workspace.root / "rows.jsonl", rows)
    tabs = [
        list(room_judge._start(studio, "rows.jsonl", "", "judged", who, "pick", 2, 1.0))[-1][0]
        for who in ("ann", "bob")
    ]
    for at in (0, 1):
        for tab in tabs:
            list(room_judge._keys(tab, "", "", gr.EventData(None, {"keys": [["1", at], ["2", at]]})))
    assert [one.judge for one in tabs[0].store.all()] == ["ann", "bob", "ann", "bob"]
    assert tabs[0].store.counts()["pairs.jsonl"] == 4

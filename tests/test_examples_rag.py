"""examples/rag: documents to passages, both searches and their join, prompts and citations, the
figures of its page, and the pipeline around a server of ours. Loud where its packages are missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

RAG = Path(__file__).parent.parent / "examples" / "rag"
NEEDED = ("bm25s", "jieba", "qdrant_client", "sklearn")
OURS = ("passages", "policy", "prompt", "search", "rag", "make_data")


@pytest.fixture(scope="module")
def modules() -> Iterator[dict[str, ModuleType]]:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"NOT TESTED: examples/rag needs {', '.join(missing)}; pip install -e '.[rag]'")
    sys.path.insert(0, str(RAG))
    try:
        yield {name: importlib.import_module(name) for name in OURS}
    finally:
        sys.path.remove(str(RAG))
        for name in OURS:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def index(modules: dict[str, ModuleType]) -> Iterator[Any]:
    passages = modules["passages"].read_documents(RAG / "documents")
    made = modules["search"].Index(passages, modules["search"].lsa(passages))
    yield made
    made.close()


def questions() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RAG / "questions.json").read_text(encoding="utf-8"))
    return found


def test_the_files_are_what_the_script_writes(modules: dict[str, ModuleType]) -> None:
    make = modules["make_data"]
    for name, text in make.documents():
        assert (RAG / "documents" / name).read_text(encoding="utf-8") == text
    assert questions() == list(make.questions())
    asked = {row["question"] for row in questions()}
    trained = [row["messages"][0]["content"] for row in make.rows(500, 7)]
    assert not [text for text in trained if text.rsplit(": ", 1)[-1] in asked or text.rsplit("：", 1)[-1] in asked]


def test_rows_of_training_can_be_answered_from_their_passages(modules: dict[str, ModuleType]) -> None:
    for row in modules["make_data"].rows(200, 3):
        prompt, answer = (message["content"] for message in row["messages"])
        if cited := re.match(r"\[(\d)\] (\d+) ", answer):
            [line] = [line for line in prompt.split("\n") if line.startswith(f"[{cited[1]}]")]
            assert re.search(rf"(?<!\d){cited[2]}(?!\d)", line), row
        else:
            assert answer in modules["policy"].NOT_FOUND.values()


def test_every_question_can_be_answered_from_its_passage(modules: dict[str, ModuleType], index: Any) -> None:
    keys = {(one.key, one.language): one for one in index.passages}
    for row in questions():
        for key in row["in"]:
            passage = keys[key, row["language"]]
            number = re.search(r"\d+", row["answer"])
            if "/" in key and number:
                assert re.search(rf"(?<!\d){number[0]}(?!\d)", passage.text), row
            elif "/" not in key:
                assert passage.picture.is_file()


def test_documents_become_passages(modules: dict[str, ModuleType], tmp_path: Path) -> None:
    read, Passage = modules["passages"].read_documents, modules["passages"].Passage
    (tmp_path / "a.png").write_bytes(b"x")
    text = "# Title\n\nFirst.\n\n## Head\n\nOne\ntwo.\n\nThree.\n\n![A picture](a.png)\n"
    (tmp_path / "doc.en.md").write_text(text)
    assert read(tmp_path) == [
        Passage("doc/0", "en", "Title", "First."),
        Passage("doc/1", "en", "Head", "One two."),
        Passage("doc/1", "en", "Head", "Three."),
        Passage("a", "en", "A picture", "", tmp_path / "a.png"),
    ]
    (tmp_path / "doc.en.md").write_text("![A picture](b.png)\n")
    with pytest.raises(ValueError, match=r"doc.en.md: picture \(b.png\) must be a file beside it"):
        read(tmp_path)
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    for name in ("../a.png", str(tmp_path / "a.png"), "link.png"):
        (folder / "doc.en.md").write_text(f"![A picture]({name})\n")
        with pytest.raises(ValueError, match="must be a file beside it"):
            read(folder)
    with pytest.raises(ValueError, match=r"doc.en.md: picture \(b.png\) must be a file beside it"):
        read(tmp_path)
    with pytest.raises(ValueError, match=r"documents \(.*nowhere\) must be a folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "doc.en.md").unlink()
    with pytest.raises(ValueError, match="must hold documents"):
        read(tmp_path)
    for name in ("notes" + ".md", "notes.fr.md", ".en.md"):
        (tmp_path / name).write_text("# T\n\ntext\n")
        with pytest.raises(ValueError, match=f"{re.escape(name)}.* must say its language"):
            read(tmp_path)
        (tmp_path / name).unlink()
    (tmp_path / "doc.en.md").write_bytes(b"\xff\xfetext")
    with pytest.raises(ValueError, match=r"doc.en.md\) must be text in UTF-8"):
        read(tmp_path)


def test_words_of_both_languages(modules: dict[str, ModuleType]) -> None:
    words = modules["search"].words
    assert words("How many days of Marriage leave?") == ["day", "marriag", "leave"]
    assert words("approval closing") == words("approves, closed"), "one word, whatever its ending"
    assert words("婚假有几天？") == ["婚假", "天"] or "婚假" in words("婚假有几天？")
    assert words("") == []


def test_both_is_reciprocal_rank_fusion(
    modules: dict[str, ModuleType], index: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "by_words", lambda _: [3, 1])
    monkeypatch.setattr(index, "by_vectors", lambda _: [1, 2, 3])
    assert index.by_both("x") == [1, 3, 2]  # 1/61 + 1/60, 1/60 + 1/62, 1/61


def test_prompts_and_citations(modules: dict[str, ModuleType], index: Any) -> None:
    prompt = modules["prompt"]
    shown = [one for one in index.passages if one.language == "zh" and (one.key in ("leave/7", "approval"))]
    text = prompt.question("婚假几天？", shown, "zh")
    assert text.startswith("根据资料回答，并注明编号。\n[1] 婚假：员工结婚有 13 天婚假。")
    assert text.endswith("问题：婚假几天？")
    parts = prompt.parts("婚假几天？", shown, "zh")
    assert [part["type"] for part in parts] == ["text", "image_url", "text"]
    assert "".join(part.get("text", "") for part in parts) == text.replace("\n问题", "\n\n问题").replace("\n\n", "\n\n")
    assert prompt.read_answer("[1] 13 天", shown) == ("13 天", [shown[0]])
    assert prompt.read_answer("13 天 [2][9]", shown) == ("13 天", [shown[1]])
    assert prompt.read_answer("no idea", shown) == ("no idea", [])


SAID = {"html": b"<html>", "object": b'{"a": 1}', "list": b"[]", "none": b'{"choices": []}', "text": b'"x"',
        "uneven": b'{"data": [{"index": 0, "embedding": [1.0]}, {"index": 1, "embedding": [1.0]}]}'}  # fmt: skip


class Odd(BaseHTTPRequestHandler):
    """A server that says what no model says, by its address."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        body = SAID[self.path.split("/")[1]]
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def odd() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Odd) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_what_goes_wrong_is_one_line(
    modules: dict[str, ModuleType], odd: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, none = tmp_path / "one" / "documents", tmp_path / "none"
    for folder in (one, none):
        folder.mkdir(parents=True)
    (one / "a.en.md").write_text("# T\n\n## Tea\n\nTea is at four.\n")
    (tmp_path / "file").write_text("")
    asked = ["ask", "When is tea?", "--documents", str(one)]
    cases: list[tuple[list[str], str]] = [
        ([*asked, "--server", "http://127.0.0.1:1/v1"], "must be reached"),
        ([*asked, "--vectors", "http://127.0.0.1:1/v1"], "must be reached"),
        ([*asked, "--server", "ftp://127.0.0.1/v1"], "must begin with http://"),
        ([*asked, "--vectors", "nonsense"], "must begin with http://"),
        ([*asked, "--index", str(tmp_path / "file")], "must be a folder that nobody else uses"),
        ([*asked[:2], "--documents", str(none)], "must hold documents"),
        ([*asked[:2], "--documents", str(tmp_path / "gone")], "must be a folder of files"),
        (["measure", "--documents", str(one)], "measure needs"),
        *(
            ([*asked, "--server", f"{odd}/{said}"], "must answer")
            for said in ("html", "object", "list", "none", "text")
        ),
        *(([*asked, "--vectors", f"{odd}/{said}"], "must answer") for said in ("html", "object", "list", "text")),
        ([*asked, "--vectors", f"{odd}/none"], "must answer with vectors"),
        ([*asked, "--vectors", f"{odd}/uneven"], "must give a vector for each of 1 inputs"),
    ]
    for words, why in cases:
        assert modules["rag"].main(words) == 1, words
        told = capsys.readouterr()
        assert told.out == ""
        assert why in told.err, (words, told.err)
        assert len(told.err.splitlines()) == 1
    for words, why in ((["ask", ""], "of some words"), (["ask", " ?! "], "of some words"), (["ask"], "of some words"),
                       ([*asked, "--k", "0"], "--k (0) must be at least 1"), ([*asked, "--k", "-3"], "--k (-3)")):  # fmt: skip
        with pytest.raises(SystemExit):
            modules["rag"].main(words)
        assert why in capsys.readouterr().err
    assert modules["rag"].main(asked) == 0
    assert "Tea is at four." in capsys.readouterr().out
    (one.parent / "questions.json").write_text('[{"in": ["leave/1"], "question": "q", "language": "en"}]')
    assert modules["rag"].main(["measure", "--documents", str(one)]) == 1
    assert "must ask for passages of these documents, which have no leave/1" in capsys.readouterr().err


def test_what_counts_as_right(modules: dict[str, ModuleType]) -> None:
    right = modules["rag"].is_right
    row = {"answer": "5 days", "in": ["leave/1"]}
    assert right("They have 5 days a year.", row)
    assert not right("5 or 6 days", row)
    assert not right("15 days", row)
    assert not right("5 months", row)
    assert right("It is October.", {"answer": "October", "in": ["closing_days"]})


def test_quoting_says_where_it_stands_or_that_nothing_does(modules: dict[str, ModuleType], index: Any) -> None:
    rag = modules["rag"]
    read = rag.quoting(index)
    for asked, language, told in (
        ("How long is marriage leave?", "en", "[1] Staff who marry have 13 days of marriage leave."),
        ("统一放假安排中，哪个月放假天数最多？", "zh", "[1] 请看图：图一"),
        ("When does the canteen open?", "en", "not in the passages"),
        ("食堂几点开门？", "zh", "资料中没有"),
    ):
        assert read(asked, index.find(asked, 3, language), language).startswith(told)
    assert read("anything", [], "en") == "not in the passages"
    shown = index.find("How long is marriage leave?", 1, "en")[0]
    assert index.covered("marriage leave", shown) == 1.0
    assert index.covered("gymnasium", shown) == index.covered("", shown) == 0.0
    assert 0 < index.covered("marriage gymnasium", shown) < 1


def test_the_figures_of_the_page(modules: dict[str, ModuleType], index: Any) -> None:
    """What `measure` prints without a model stands on the page; where two vectors are as good as
    each other, another machine may take the other.
    """
    page = [row for row in (RAG / "README.md").read_text(encoding="utf-8").splitlines() if row.startswith("|")]
    rag = modules["rag"]
    for line in rag.measure(index, questions(), {"quoting": rag.quoting(index)}, 3):
        if not line.startswith("|") or "---" in line:
            continue
        name = [cell for cell in line.split("|") if not re.search(r"\d+(\.\d)? (%|of)", cell)]
        [told] = [row for row in page if all(f"|{cell}|" in row for cell in name[1:-1])][:1]
        numbers = [[float(n) for n in re.findall(r"[\d.]+", row.split("|", 2)[2])] for row in (line, told)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0 if "BM25" in line else 4), line


def test_answers_through_a_server_with_its_own_vectors(
    modules: dict[str, ModuleType], tmp_path: Path, capsys: Any
) -> None:
    """A server of ours: pictures go along, vectors come back, the database is a folder."""
    sys.path.insert(0, str(Path(__file__).parent / "serve"))
    try:
        from conftest import _golden_model
        from live import live
        from support.tiny_runs import processor
    finally:
        sys.path.pop(0)
    from ernie_tune.generate.engine import Engine

    (tmp_path / "figures").mkdir()
    for name in ("figures/approval.png",):
        (tmp_path / name).write_bytes((RAG / "documents" / name).read_bytes())
    text = "# Leave\n\n## Marriage\n\nMarriage leave is 13 days.\n\n![Approval of leave](figures/approval.png)\n"
    (tmp_path / "leave.en.md").write_text(text)
    with live(Engine(_golden_model("tiny-a", "float32"), processor()), default_max_tokens=4) as one:
        words = ["ask", "How long is marriage leave?", "--documents", str(tmp_path), "--k", "2"]
        more = ["--server", f"{one.root}/v1", "--vectors", f"{one.root}/v1", "--index", str(tmp_path / "database")]
        assert modules["rag"].main([*words, *more]) == 0
        assert (tmp_path / "database" / "collection" / "passages").is_dir()
        assert modules["rag"].main(words) == 0
        assert "Marriage leave is 13 days." in capsys.readouterr().out
        told = one.service.metrics
        assert told.requests.values["/v1/embeddings", "200"] >= 2
        assert told.requests.values["/v1/chat/completions", "200"] == 1
        with pytest.raises(ValueError, match="must answer, but says"):
            modules["search"].served(f"{one.root}/v1", "nobody")(["x"])

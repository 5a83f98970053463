"""What the doctor finds, row by row and across rows, on files with one planted mistake each;
numbers from hand-counted data.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ernie_tune.data.doctor.checks import CHECKS, Finding, Findings
from ernie_tune.data.doctor.compare import RowLog, _members, join_texts, similarity, sketch
from ernie_tune.data.doctor.media import Pictures
from ernie_tune.data.doctor.rows import Columns
from ernie_tune.data.doctor.scan import DataFile, Report, Scan, count_tokens
from ernie_tune.data.media.images import ImageSettings
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import DataError, Record
from ernie_tune.data.sources import DatasetEntry

TINY = Processor.bundled("tiny")
WORDS = [
    "red",
    "green",
    "blue",
    "one",
    "two",
    "three",
    "four",
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "stone",
    "cloud",
    "light",
    "dark",
    "old",
    "new",
    "fast",
    "slow",
]


def write(path: Path, rows: list[dict[str, Any]]) -> DatasetEntry:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return DatasetEntry(str(path))


def scan(train: DatasetEntry | list[DatasetEntry], *evaluation: DatasetEntry, **options: Any) -> Report:
    return Scan(TINY, **options).run(train if isinstance(train, list) else [train], evaluation)


def chat(question: str, *answers: str, **fields: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}]
    for i, answer in enumerate(answers):
        turns += [{"role": "user", "content": f"and {i}?"}] * (i > 0) + [{"role": "assistant", "content": answer}]
    return {"messages": turns, **fields}


def pair(**fields: Any) -> dict[str, Any]:
    return {"prompt": "q", "chosen": "good", "rejected": "bad", **fields}


CALL = {"function": {"name": "look", "arguments": "{}"}}


def called(*calls: Any, question: str = "q", **fields: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "", "tool_calls": list(calls)},
        ],
        **fields,
    }


PLANTED = {
    "empty": (chat("q", ""), "empty_answer", "messages[1]", "''"),
    "blank": (chat("q", " \n"), "empty_answer", "messages[1]", "' \\n'"),
    "blank early answer": (chat("q", " ", "a"), "empty_answer", "messages[1]", "' '"),
    "dots": (chat("q", "。。。"), "mute_answer", "messages[1]", "'。。。'"),
    "padded": (chat("q", " yes"), "padded_answer", "messages[1]", "' yes'"),
    "padded early answer": (chat("q", "yes\n", "no"), "padded_answer", "messages[1]", "'yes\\n'"),
    "no question": (chat(" ", "a"), "empty_prompt", "messages[0]", "' '"),
    "marker": (chat("<|IMAGE_PLACEHOLDER|> what?", "a"), "placeholder", "content", "<|IMAGE_PLACEHOLDER|>"),
    "other tool's tag": (chat("what is in <image_1>?", "a"), "placeholder", "content", "<image_1>"),
    "marker in an answer": (pair(chosen="<|im_end|>good"), "placeholder", "content", "<|im_end|>"),
    "same": (pair(rejected="good"), "same_answers", "rejected", "'good'"),
    "same of three": ({"prompt": "q", "responses": ["a", "b", "a"], "order": "A>B>C"}, "same_answers", "responses[2]", "'a'"),
    "empty rejected": (pair(rejected=""), "empty_answer", "rejected", "''"),
    "scores swapped": (pair(score={"chosen": 1, "rejected": 5}), "score_order", "score", "0"),
    "scores equal": (pair(score={"chosen": 3, "rejected": 3}), "tie", "score", "0.5 = 0.5"),
    "all equal": ({"prompt": "q", "responses": ["a", "b"], "order": "A=B"}, "tie", "responses", "2 equal judgements"),
    "nameless tool": (chat("q", "a", tools=[{"description": "?"}]), "tools", "tools[0]", "an object with description"),
    "call is text": (called("look"), "tools", "tool_calls", "'look'"),
    "function is a list": (called({"function": [1]}), "tools", "tool_calls", "an object with function"),
    "arguments are no JSON": (called({"function": {"name": "f", "arguments": "{"}}), "tools", "tool_calls", "(char 1))"),
    "remote": (chat("<image>q", "a", images=["https://x.org/a.png"]), "media_remote", "images", "'https://x.org/a.png'"),
    "remote file": (chat("<image>q", "a", images=["file://host/a.png"]), "media_remote", "images", "'file://host/a.png'"),
    "no picture": (chat("<image>q", "a", images=["none.png"]), "media_missing", "images", "none.png'"),
    "no video": (chat("<video>q", "a", videos=["none.mp4"]), "media_missing", "videos", "none.mp4'"),
    "no frame": (chat("<video>q", "a", videos=[["ok.png", "none.png"]]), "media_missing", "videos", "none.png'"),
    "no picture of the answer": (pair(prompt="<image>q", images=["ok.png"], rejected="<image>", rejected_images=["none.png"]), "media_missing", "images", "none.png'"),
    "broken": (chat("<image>q", "a", images=["broken.png"]), "media_broken", "images", "broken.png'"),
    "broken data": (chat("<image>q", "a", images=["data:image/png;base64,AAAA"]), "media_broken", "images", "'data:image/png;base64,AAAA'"),
    "tags": (chat("<image>q", "a", images=["ok.png", "ok.png"]), "count", "images", "2"),
    "no turns": ({"src": [], "tgt": []}, "turnless", "messages", "no messages"),
    "roles": ({"messages": [{"role": "assistant", "content": "a"}]}, "roles", "roles", "assistant"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_one_planted_mistake(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, code, field, found = PLANTED[name]
    monkeypatch.chdir(tmp_path)  # a message cuts long paths, and how long this one is depends
    Image.new("RGB", (56, 56)).save("ok.png")
    Path("broken.png").write_bytes(b"\x89PNG no more")
    good = pair(prompt="other") if "chosen" in row else chat("other", "fine")
    entry = write(Path("a.jsonl"), [good, row])
    alone = "responses" in row or "src" in row
    if alone:
        entry = write(Path("a.jsonl"), [row])
    report = scan(entry)
    assert [finding.code for finding in report.findings.kept] == [code]
    finding = report.findings.kept[0]
    assert (finding.line, finding.field) == (1 if alone else 2, field)
    assert finding.found.endswith(found)
    assert str(finding).startswith(f"{entry.path}:{finding.line}: {finding.severity}: {field}: found ")
    assert report.exit_code == (finding.severity == "error")
    assert "修复：" in finding.chinese


def test_clean_rows_of_every_kind(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "ok.png")
    rows = [
        chat("q", "a"),
        chat("<image>what", "<b>", images=["ok.png"]),
        called(CALL, question="where", tools=[{"type": "function", "function": {"name": "look"}}]),
        {"messages": [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "", "loss": False}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
    ]  # fmt: skip
    report = scan(write(tmp_path / "a.jsonl", rows))
    assert report.findings.kept == []
    assert (report.exit_code, report.stats.rows, report.files[0].rows) == (0, 4, 4)
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "q", "response": "a"}\r\n')
    notes = scan(DatasetEntry(str(tmp_path / "b.jsonl"))).findings
    assert {code: notes.severities[code] for code in notes.counts} == {"bom": "note", "crlf": "note"}


@pytest.mark.parametrize(
    ("content", "code"), [(b"", "empty"), (b"\n\n", "empty"), (b'{"x": 1}\n', "unknown"), (b"[{}, ", "json"), (b"\xff\xfe{}", "foreign")]
)  # fmt: skip
def test_files_that_cannot_be_read(content: bytes, code: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    report = scan([DatasetEntry(str(file)), write(tmp_path / "b.jsonl", [chat("q", "a")])])
    assert [(finding.code, finding.place) for finding in report.findings.kept] == [(code, f"{file}:1")]
    assert report.stats.rows == 1
    with pytest.raises(DataError):
        DataFile(DatasetEntry(str(file)))


def test_other_containers(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "q", "response": "a"},\n {"prompt": "p"}]')
    (tmp_path / "b.csv").write_text("text,label\nfilm,good\nfilm 2\nfilm,bad\n")
    report = scan([DatasetEntry(str(tmp_path / "a.json")), DatasetEntry(str(tmp_path / "b.csv"))])
    assert sorted((finding.place[len(str(tmp_path)) + 1 :], finding.code) for finding in report.findings.kept) == [
        ("a.json:2", "mixed"),
        ("b.csv:3", "csv"),
        ("b.csv:4", "conflict"),
    ]


def test_columns_and_formats_as_told(tmp_path: Path) -> None:
    entry = write(tmp_path / "a.jsonl", [{"ask": "q", "reply": ""}, {"prompt": "q", "ask": "p", "reply": "a"}])
    entry = DatasetEntry(entry.path, "alpaca", {"instruction": "ask", "output": "reply"}, only_columns=True)
    assert scan(entry).findings.counts == {"empty_answer": 1, "unused": 1}
    entry = write(tmp_path / "b.jsonl", [{"prompt": "q", "response": "a", "label": True}])
    assert scan(DatasetEntry(entry.path, "prompt_response")).stats.signals == {"sft": 1}
    with pytest.raises(ValueError, match="format \\('x'\\)"):
        scan(DatasetEntry(entry.path, "x"))


@pytest.mark.parametrize("where", ["content", "tool_calls", "tools"])
def test_nesting_at_the_edge_of_what_can_be_parsed(where: str, tmp_path: Path) -> None:
    user, answer, nested = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, "NESTED"
    call = {"name": "f", "arguments": {"x": nested}}
    row = {
        "content": {"messages": [user, answer, {"role": "tool", "content": [nested]}, answer]},
        "tool_calls": {"messages": [user, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        "tools": {"messages": [user, answer], "tools": [{"name": "f", "x": nested}]},
    }[where]
    deep = [json.dumps(row).replace('"NESTED"', "[" * depth + "]" * depth) for depth in range(840, 1000, 4)]
    (tmp_path / "a.jsonl").write_text("\n".join(deep))
    entry = DatasetEntry(str(tmp_path / "a.jsonl"))

    def below(frames: int) -> int:
        """The same from so many frames further down, as a notebook calls it."""
        return below(frames - 1) if frames else scan(entry, max_tokens=8192).files[0].rows

    for frames in range(0, 24, 4):
        assert below(frames) == 40


# ----------------------------------------------------------------------------------------------
# rows against rows


def sentence(seed: int, length: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def test_repetitions_across_files(tmp_path: Path) -> None:
    long = sentence(1, 60)
    train = write(
        tmp_path / "a.jsonl",
        [
            chat("capital?", "Paris"),
            chat("colour?", "red"),
            chat(long, "yes"),
            chat("capital?", "Paris", id="again"),  # a duplicate, whatever its id
            chat("colour?", "blue"),  # conflicts with line 2
            chat(long.replace("cat", "dog", 1) + ".", "yes"),  # nearly line 3
            {"conversations": [{"from": "human", "value": sentence(2)}, {"from": "gpt", "value": "no"}]},
        ],
    )
    evaluation = write(
        tmp_path / "b.jsonl",
        [
            chat("capital?", "Paris"),
            chat("colour?", "green"),
            chat(long + "!", "yes"),
            chat(sentence(3), "no"),
            chat(sentence(3), "no"),
        ],
    )
    report = scan(train, evaluation)
    found = {
        (f.code, Path(f.path).name, f.line, Path(f.expected.partition("jsonl:")[0] + "jsonl").name)
        for f in report.findings.kept
    }
    assert found == {
        ("duplicate", "a.jsonl", 4, "a.jsonl"),
        ("conflict", "a.jsonl", 5, "a.jsonl"),
        ("near_duplicate", "a.jsonl", 6, "a.jsonl"),
        ("near_overlap", "b.jsonl", 3, "a.jsonl"),
        ("overlap", "b.jsonl", 1, "a.jsonl"),
        ("prompt_overlap", "b.jsonl", 2, "a.jsonl"),
        ("duplicate", "b.jsonl", 5, "b.jsonl"),
    }  # fmt: skip
    assert report.exit_code == 1
    assert report.stats.rows == 7
    assert "a.jsonl:1" in next(f.expected for f in report.findings.kept if f.code == "overlap")


def test_pictures_tell_rows_apart(tmp_path: Path) -> None:
    for name, colour in (("a", "red"), ("b", "red"), ("c", "blue")):
        Image.new("RGB", (56, 56), colour).save(tmp_path / f"{name}.png")
    rows = [chat(f"<image>{sentence(4)}", "x", images=[f"{name}.png"]) for name in "abca"]
    entry = write(tmp_path / "a.jsonl", rows)
    assert [f.line for f in scan(entry).findings.kept] == [4]  # by name
    assert [f.line for f in scan(entry, decode=None).findings.kept] == [
        2,
        4,
    ]  # by content: a and b are the same picture


def test_findings_about_two_rows_show_both(tmp_path: Path) -> None:
    """Answers that part far inside are shown from shortly before."""
    long = "The shop in the old town opens every day of the week at {} and closes late."
    rows = [("When?", long.format("eight")), ("When?", long.format("nine")), ("A?", "b"), ("A?", "b")]
    report = scan(write(tmp_path / "a.jsonl", [{"prompt": q, "response": a} for q, a in rows]))
    found = {finding.code: finding.english for finding in report.findings.kept}
    assert "found 'When?' answered '… day of the week at nine and closes late.'" in found["conflict"]
    assert "a.jsonl:1 ('… day of the week at eight and closes late.')" in found["conflict"]
    assert r"found 'A?\nb'" in found["duplicate"]
    assert "回答为" in report.findings.kept[-1].chinese + report.findings.kept[0].chinese


def test_labels_and_prompts_with_many_answers_do_not_conflict(tmp_path: Path) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": label} for label in (True, False)]
    assert scan(write(tmp_path / "a.jsonl", rows)).findings.counts == {}
    assert scan(write(tmp_path / "b.jsonl", [pair(rejected="x"), pair(rejected="y")])).findings.counts == {}


def columns(*texts: str) -> Columns:
    n = len(texts)
    return Columns(texts, ("",) * n, ("",) * n, ((),) * n, ("sft",) * n, ("",) * n)


def test_texts_are_joined_and_found_again() -> None:
    joined, ends = join_texts(Columns(("a", "中"), ("b", ""), ("", "c"), ((), ()), ("pair", "pair"), ("", "")))
    assert joined == "a\0b\0\0中\0\0c\0".encode()
    assert ends.tolist() == [5, len(joined)]
    assert join_texts(columns("x\0y", "z"))[0] == b"x y\0\0\0z\0\0\0"


def test_sketches_find_what_is_alike() -> None:
    texts = [sentence(seed, 60) for seed in range(200)]
    # some 300 shingles, at most 16 of them new
    changed = [text.replace("cat", "dog", 1) for text in texts]
    bands, known = sketch(*join_texts(columns(*texts, *changed)))
    assert known.all()
    shared = (bands[:, :200] == bands[:, 200:]).any(0)
    assert shared.mean() > 0.9
    other = (bands[:, :200] == np.roll(bands[:, :200], 1, 1)).any(0)
    assert other.mean() < 0.1
    alone, _ = sketch(*join_texts(columns(texts[7])))
    assert np.array_equal(alone[:, 0], bands[:, 7])  # neighbours do not matter
    assert not sketch(*join_texts(columns("a", "", "bc")))[1].any()


def test_similarity_counts_common_shingles() -> None:
    def row(text: str, media: tuple[str, ...] = ()) -> tuple[Any, ...]:
        return (text, "", "", media, "sft", "")

    # texts are closed by two separators: "abcdefghij" has 12 bytes and so 5 shingles of 8
    assert similarity(row("abcdefghij"), row("abcdefghij")) == 1.0
    assert similarity(row("abcdefghij"), row("abcdefghijk")) == pytest.approx(3 / 8)
    assert similarity(row("abc"), row("xyz")) == 0.0
    assert similarity(row("abc", ("p.png",)), row("abc")) == 0.0


@pytest.mark.parametrize("count", [1, 50, 5000])
def test_members_are_those_of_numpy(count: int) -> None:
    random = np.random.default_rng(count)
    values = random.integers(0, 1 << 63, 5000).astype(np.uint64) << np.uint64(1)
    ordered = np.sort(random.choice(values, count, replace=False))
    near = np.concatenate([values, ordered + np.uint64(1), ordered ^ np.uint64(1 << 63)])
    np.testing.assert_array_equal(_members(near, ordered), np.flatnonzero(np.isin(near, ordered)))


def test_row_log_finds_equal_values_beyond_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from ernie_tune.data.doctor import compare as doctor_compare

    monkeypatch.setattr(doctor_compare, "_PART_ROWS", 100)
    monkeypatch.setattr(doctor_compare, "_IN_MEMORY", 256)
    values = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint64)
    log = RowLog("x", "y")
    for part in np.split(values, 10):
        log.add(x=part, y=part * np.uint64(2))
    found = {(int(a), int(b)) for first, later in log.pairs("x") for a, b in zip(first, later, strict=True)}
    listed = values.tolist()
    assert found == {(listed.index(value), i) for i, value in enumerate(listed) if listed.index(value) != i}
    assert log.take("y", np.array([999, 0, 500])).tolist() == [2 * listed[i] for i in (999, 0, 500)]


def test_many_look_alikes_are_estimated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ernie_tune.data.doctor import scan as doctor_scan

    monkeypatch.setattr(doctor_scan, "_COMPARED", 50)
    rows = [
        chat(f"{sentence(seed % 400, 60)} {seed}", f"{seed % 7}") for seed in range(1200)
    ]  # 800 repeat an earlier one but for a number
    report = scan(write(tmp_path / "a.jsonl", rows), limit=5)
    alike, compared, confirmed = report.near
    assert alike > 700
    assert confirmed <= compared <= 50
    assert report.findings.counts["near_duplicate"] == pytest.approx(800, rel=0.2)
    assert len(report.findings.kept) == 5


# ----------------------------------------------------------------------------------------------
# lengths, pictures, memory


def test_too_long_is_exact(tmp_path: Path) -> None:
    Image.new("RGB", (300, 200)).save(tmp_path / "p.png")
    rows = [
        chat("hello there, 你好", "fine"),
        chat("q", "a", "b", "c"),
        chat("<image>what?", "this", images=["p.png"]),
        called(CALL, tools=[{"name": "look", "description": sentence(5)}]),
        chat("q", "long " * 40),
        chat("q", "a", mode="think"),
    ]
    entry = write(tmp_path / "a.jsonl", rows)
    file = DataFile(entry)
    records = [file.record(row, i) for i, row in enumerate(rows, 1)]
    wanted = [
        TINY.encode(r.messages, r.images, tools=r.tools, thinking=True if r.mode == "think" else None).num_tokens
        for r in records
    ]
    assert [count_tokens(record, TINY) for record in records] == wanted
    for limit in (min(wanted), sorted(wanted)[3], max(wanted)):
        kept = scan(entry, max_tokens=limit).findings.kept
        assert [f.line for f in kept if f.code == "too_long"] == [i for i, n in enumerate(wanted, 1) if n > limit]


def test_candidates_are_measured_whole_and_videos_are_said(tmp_path: Path) -> None:
    entry = write(tmp_path / "a.jsonl", [pair(rejected=sentence(6, 200))])
    assert scan(entry, max_tokens=64).findings.counts == {"too_long": 1}
    (tmp_path / "v.mp4").write_bytes(b"x")
    entry = write(
        tmp_path / "b.jsonl", [chat("<video>q", "a", videos=["v.mp4"]), chat("<image>q", "a", images=["no.png"])]
    )
    assert scan(entry, max_tokens=64).findings.counts == {"clip_broken": 1, "media_missing": 1}
    assert scan(entry, max_tokens=64, decode=0).findings.counts == {"unmeasured": 1, "media_missing": 1}


@pytest.mark.parametrize(("decode", "opened"), [(None, 64), (0, 0), (4, 4 + 4 + 4 + 4 + 1), (100, 64)])
def test_how_many_pictures_are_opened(decode: int | None, opened: int, tmp_path: Path) -> None:
    Image.new("RGB", (30, 40)).save(tmp_path / "p.png")
    pictures = Pictures(ImageSettings(), decode)
    for i in range(64):
        (tmp_path / f"{i}.png").write_bytes((tmp_path / "p.png").read_bytes())
        assert not list(pictures.check(Record("sft", (), images=(str(tmp_path / f"{i}.png"),))))
    # with 4: the first 4, then 6 8 10 12, then 16 20 24 28, then 32 40 48 56, then 64
    assert (pictures.seen, pictures.opened, pictures.sizes) == (64, opened, [(40, 30)] * opened)


def test_findings_are_counted_beyond_the_limit() -> None:
    findings = Findings(limit=2)
    for line in range(1, 6):
        findings.add(Finding.of("duplicate", "a", line, "row", "x", other="a:1"))
    findings.add_all((Finding.of("bom", "a", i, "file", "x") for i in range(9)), 9, "bom")
    findings.add_all(iter(()), 0, "tie")
    assert findings.counts == {"duplicate": 5, "bom": 9}
    assert [finding.code for finding in findings.kept] == ["duplicate"] * 2 + ["bom"] * 2
    assert [findings.total(severity) for severity in ("error", "warning", "note")] == [0, 5, 9]


def test_both_languages_fill() -> None:
    for code in CHECKS:
        finding = Finding.of(code, "a", 1, "f", "x", other="a:1", limit=8, kind="K", why="W", hint="H")
        assert "{" not in str(finding) + finding.chinese


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        entry = write(tmp_path / f"{rows}.jsonl", [chat(f"{i} {sentence(i)}", f"{i}") for i in range(rows)])
        tracemalloc.start()
        scan(entry)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    small = peak(2000)
    assert peak(16000) < small + 2**21

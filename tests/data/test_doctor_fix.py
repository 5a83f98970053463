"""Repaired copies, shown rows, converted files: what they hold, and what they refuse."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ernie_tune.data.doctor.convert import WRITERS, convert, convert_file
from ernie_tune.data.doctor.fix import RowChange, fix_file, fixed_path
from ernie_tune.data.doctor.scan import DataFile
from ernie_tune.data.doctor.show import COLOUR, PLAIN, show_record
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import DataError, Record
from ernie_tune.data.sources import DatasetEntry, load_dataset

TINY = Processor.bundled("tiny")
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def line(*turns: Any, **fields: Any) -> str:
    return json.dumps({"messages": list(turns), **fields}, ensure_ascii=False)


def fix(path: Path, content: bytes, name: str = "a.jsonl", **options: Any) -> tuple[list[str], list[str]]:
    """(codes with their lines, lines of the copy) of a repaired file."""
    file = path / name
    file.write_bytes(content)
    for picture in ("1.png", "2.png"):
        Image.new("RGB", (56, 56)).save(path / picture)
    changes = list(fix_file(DatasetEntry(str(file)), **options))
    assert file.read_bytes() == content
    assert not list(path.glob("*.tmp"))
    assert all("{" not in str(change).replace("{why}", "") for change in changes)
    return [f"{c.line} {c.code}" for c in changes], Path(fixed_path(str(file))).read_text(encoding="utf-8").splitlines()


def asked(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


GOOD = line(asked("what?"), ANSWER)


@pytest.mark.parametrize(
    ("row", "codes", "fixed"),
    [
        (GOOD + "\r", [], GOOD),
        (GOOD[:-1] + ",}", ["2 comma"], GOOD),
        (GOOD.replace("]", ", ]") + ",", ["2 comma"], GOOD),
        (line(asked(',}",]'), ANSWER)[:-1] + ",}", ["2 comma"], line(asked(',}",]'), ANSWER)),
        (line(asked("what?"), {**ANSWER, "content": " a\n"}), ["2 stripped"], GOOD),
        (line(asked("<image>q"), ANSWER, images=["1.png", "2.png"]), ["2 tag"], line(asked("<image><image>q"), ANSWER, images=["1.png", "2.png"])),
        ('{"system": "s", "prompt": "<image>q", "response": " a", "images": ["1.png", "2.png"]}', ["2 tag", "2 stripped"], '{"system": "s", "prompt": "<image><image>q", "response": "a", "images": ["1.png", "2.png"]}'),
        (line(asked("q"), {**ANSWER, "content": " "}), ["2 no_answer"], None),
        ("{}", ["2 empty"], None),
        ('{"messages": null, "images": []}', ["2 empty"], None),
        (line(USER, ANSWER, id="x"), ["2 repeated"], None),
        (line(USER, ANSWER, weight=2), [], line(USER, ANSWER, weight=2)),
        ("not json", ["2 kept"], "not json"),
        (line(asked("<image>q"), ANSWER), ["2 kept"], line(asked("<image>q"), ANSWER)),
        (line(asked("q"), asked("q")), ["2 kept"], line(asked("q"), asked("q"))),
        (line(asked("<image>q"), ANSWER, images=["no.png"]), ["2 kept"], line(asked("<image>q"), ANSWER, images=["no.png"])),
        (line(asked("<image>q"), {**ANSWER, "content": " a"}, images=["no.png"]), ["2 kept"], line(asked("<image>q"), {**ANSWER, "content": " a"}, images=["no.png"])),
    ],
)  # fmt: skip
def test_repairs(row: str, codes: list[str], fixed: str | None, tmp_path: Path) -> None:
    first = line(USER, ANSWER)
    content = f"\ufeff{first}\n{row}\n".encode()
    assert fix(tmp_path, content) == (codes, [first] if fixed is None else [first, fixed])
    if codes == ["2 kept"]:
        os.remove(fixed_path(str(tmp_path / "a.jsonl")))
        assert fix(tmp_path, content, drop=True)[1] == [first]


def test_repairs_in_other_containers(tmp_path: Path) -> None:
    codes, lines = fix(tmp_path, b"prompt,response\nq, a\nq,a\nbroken\n", "b.csv")
    assert codes == ["2 stripped", "3 repeated", "4 dropped"]
    assert lines == ['{"prompt": "q", "response": "a"}']
    codes, lines = fix(tmp_path, b'[{"prompt": "q", "response": "a"},\n{"prompt": "q"}]', "c.json")
    assert codes == ["2 kept"]
    assert [json.loads(text) for text in lines] == [{"prompt": "q", "response": "a"}, {"prompt": "q"}]


def test_copies_are_not_overwritten(tmp_path: Path) -> None:
    fix(tmp_path, GOOD.encode())
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        list(fix_file(DatasetEntry(str(tmp_path / "a.jsonl"))))
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "other", "response": "row"}\n{"image": "lost.png", "prompt": "q", "response": "a"}'
    )
    changes = list(fix_file(DatasetEntry(str(tmp_path / "a.jsonl")), force=True))
    assert Path(fixed_path(str(tmp_path / "a.jsonl"))).read_text(encoding="utf-8").startswith('{"prompt": "other"')
    assert "still wrong: images: found" in str(changes[0])
    assert "expected an existing file" in str(changes[0])
    with pytest.raises(ValueError, match="parquet"):
        list(fix_file(DatasetEntry("a.parquet")))
    assert str(RowChange(3, "repeated", {"n": 1})) == "dropped: repeats line 1"


def test_a_copy_given_up_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("bad\n" + GOOD + "\n")
    changes = fix_file(DatasetEntry(str(tmp_path / "a.jsonl")))
    next(changes)
    changes.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


# ----------------------------------------------------------------------------------------------
# show


def shown(tmp_path: Path, row: dict[str, Any], **options: Any) -> list[str]:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    return list(
        show_record(DataFile(DatasetEntry(str(file))).record(row, 1), options.pop("processor", TINY), **options)
    )


def test_show_marks_what_is_trained(tmp_path: Path) -> None:
    # 480x640 pixels: smart resize to multiples of 28 gives 476x644, 34x46 patches, 391 tokens
    Image.new("RGB", (640, 480)).save(tmp_path / "p.png")
    turns = [
        asked("<image>图里有什么？"),
        {"role": "assistant", "content": "猫\x1b[2J"},
        asked("sure?"),
        {"role": "assistant", "content": "yes"},
    ]
    heading, text, counts = shown(tmp_path, {"messages": turns, "images": ["p.png"]})
    assert heading.endswith("a.jsonl:1 (messages, sft)")
    assert text == (
        "<|begin_of_sentence|>User: Picture 1:<|IMAGE_START|><image 34x46 patches = 391 tokens><|IMAGE_END|>图里有什么？\n"
        "Assistant: ⟦猫\\x1b[2J<|end_of_sentence|>⟧User: sure?\nAssistant: <think>\n\n</think>\n\n⟦yes</s>⟧"
    )
    encoded = TINY.encode(turns, [str(tmp_path / "p.png")])
    assert f"--- {encoded.num_tokens} tokens, {encoded.num_trained} trained, 1 picture or video" in counts
    coloured = shown(tmp_path, {"messages": turns, "images": ["p.png"]}, style=COLOUR)[1]
    assert coloured.count("\x1b[1;32m") == 2
    assert coloured.replace("\x1b[1;32m", "⟦").count("⟦") == text.count("⟦")


def test_show_candidates_prompts_and_thoughts(tmp_path: Path) -> None:
    lines = shown(tmp_path, {"prompt": "q", "chosen": "good", "rejected": "bad"})
    assert [text.rpartition("(")[2] for text in lines[::3]] == ["pairs, chosen)", "pairs, rejected)"]
    assert ("⟦good</s>⟧" in lines[1], "⟦bad</s>⟧" in lines[4]) == (True, True)
    heading, text, _ = shown(tmp_path, {"prompt": "q", "solution": "4", "mode": "think"})
    assert heading.endswith("(verifiable, verifiable)")
    assert text.endswith("Assistant: <think>")
    assert "⟦" not in text
    thoughtful = shown(tmp_path, {"prompt": "q", "response": "<think>\nhm\n</think>\n\na"})[1]
    assert thoughtful.endswith("<think>⟦\nhm\n</think>\n\na</s>⟧")
    other = Processor.bundled("tiny", "ernie_vl")
    assert "\n<think>\n" in shown(tmp_path, {"prompt": "q", "response": "a"}, processor=other)[1]


def test_show_needs_its_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: image .* must exist, .* start beside the data file"):
        shown(tmp_path, {"prompt": "<image>q", "response": "a", "image": "no.png"})


def test_pictures_that_touch_are_told_apart(tmp_path: Path) -> None:
    Image.new("RGB", (56, 56)).save(tmp_path / "p.png")
    text = shown(tmp_path, {"prompt": "<image><image>q", "response": "a", "images": ["p.png", "p.png"]}, style=PLAIN)[1]
    assert text.count("<image 4x4 patches = 4 tokens>") == 2


# ----------------------------------------------------------------------------------------------
# convert

# "<video>" needs a video
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=8)
words = texts.filter(lambda text: text != "")


@st.composite
def dialogues(draw):
    turns = [{"role": "system", "content": draw(words)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(texts)}]
    if draw(st.integers(0, 3)) == 0:
        turns[-1]["reasoning_content"] = draw(texts)
    return turns[: len(turns) - draw(st.integers(0, 1))]


@settings(max_examples=200, deadline=None)
@given(
    turns=dialogues(),
    form=st.sampled_from(sorted(WRITERS)),
    fields=st.dictionaries(st.sampled_from(["domain", "source", "mode"]), st.just("auto")),
)
def test_what_converts_reads_back_the_same(
    turns: Any, form: str, fields: dict[str, str], tmp_path_factory: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    source = folder / "source.jsonl"
    source.write_text(json.dumps({"messages": turns, **fields}) + "\n", encoding="utf-8")
    record = load_dataset(source)[0]
    refused = None
    try:
        (row,) = convert(record, form, str(folder / "target.jsonl"))
    except ValueError as error:
        refused = str(error)
    if refused is not None:
        assert refused.startswith(f"{source}:1: ")
        assert form != "messages"
        return
    (folder / "target.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    back = load_dataset(folder / "target.jsonl")[0]
    assert (back.signal, back.messages, back.domain, back.mode) == (
        record.signal,
        record.messages,
        record.domain,
        record.mode,
    )
    assert back.meta.extra == record.meta.extra


def converted(path: Path, row: dict[str, Any], form: str, target: str = "out.jsonl") -> list[dict[str, Any]]:
    (path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (path / target).unlink(missing_ok=True)
    data = load_dataset(path / "a.jsonl")
    convert_file((data[i] for i in range(len(data))), form, str(path / target))
    return [json.loads(text) for text in (path / target).read_text(encoding="utf-8").splitlines()]


def test_formats_as_others_write_them(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, USER, ANSWER, asked("p"), {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "id": "7", "source": "web"}
    assert converted(tmp_path, row, "alpaca") == [
        {"system": "s", "instruction": "p", "output": "b", "history": [["q", "a"]], "id": "7", "source": "web"}
    ]
    assert converted(tmp_path, row, "sharegpt")[0]["conversations"][:3] == [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    assert converted(tmp_path, {"instruction": "add", "input": "1 2", "output": "3"}, "messages") == [
        {"messages": [asked("add\n1 2"), {"role": "assistant", "content": "3"}]}
    ]
    assert converted(tmp_path, {"text": "film", "label": "good"}, "alpaca") == [
        {"instruction": "film", "output": "good"}
    ]


def test_pairs_from_every_judgement(tmp_path: Path) -> None:
    # four strictly ordered answers give six pairs
    rows = converted(tmp_path, {"prompt": "q", "responses": ["a", "b", "c", "d"], "order": "B>A>C>D"}, "pairs")
    assert {(row["chosen"], row["rejected"]) for row in rows} == {
        (x, y) for x, y in ("ba", "bc", "bd", "ac", "ad", "cd")
    }
    rated = {"prompt": "q", "responses": [{"text": "a", "score": 2}, {"text": "b", "score": 5}], "domain": "d"}
    assert converted(tmp_path, rated, "pairs") == [
        {"prompt": "q", "chosen": "b", "rejected": "a", "score": {"chosen": 1.0, "rejected": 0.25}, "scale": [0, 1], "domain": "d"}
    ]  # fmt: skip
    pair = {"messages": [USER, ANSWER, asked("p")], "chosen": "x", "rejected": "y", "margin": 0.5, "confidence": 0.9}
    assert converted(tmp_path, pair, "pairs") == [pair]
    (tmp_path / "1.png").touch()
    own = {
        "prompt": "<image>q",
        "chosen": "x",
        "rejected": "<image>y",
        "images": ["1.png"],
        "rejected_images": ["1.png"],
    }
    assert converted(tmp_path, own, "pairs")[0] == {**own, "rejected_images": ["1.png", "1.png"]}


def test_paths_follow_the_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    row = {
        "prompt": "<image><image><image>q",
        "response": "a",
        "images": ["i/1.png", "/data/2.png", "data:image/png;base64,AA=="],
    }
    video = {"prompt": "<video>q", "response": "a", "videos": [["f/1.png", "f/2.png"]]}
    assert converted(tmp_path, row, "messages", "sub/out.jsonl")[0]["images"] == ["../i/1.png", *row["images"][1:]]
    assert converted(tmp_path, video, "messages", "sub/out.jsonl")[0]["videos"] == [["../f/1.png", "../f/2.png"]]
    monkeypatch.chdir(tmp_path)
    data = load_dataset("a.jsonl")
    assert convert_file((data[i] for i in range(1)), "sharegpt", "out.jsonl") == 1
    assert json.loads(Path("out.jsonl").read_text())["videos"] == video["videos"]
    back = Record("sft", (USER, ANSWER), images=(b"\x00",), meta=data[0].meta)
    tagged = Record("sft", (asked("<image>q"), ANSWER), images=(b"\x00",), meta=data[0].meta)
    assert next(convert(tagged, "messages", "x.jsonl"))["images"] == ("data:application/octet-stream;base64,AA==",)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: messages"):
        list(convert(back, "messages", "x.jsonl"))


@pytest.mark.parametrize(
    ("row", "form", "field"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "messages", "signal"),
        ({"prompt": "q", "response": "a"}, "pairs", "signal"),
        ({"prompt": "q", "responses": ["a", "b"], "order": "A=B"}, "pairs", "signal"),
        ({"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]}, "sharegpt", "messages"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f"}]}, {"role": "tool", "content": "1"}, ANSWER]}, "alpaca", "messages"),
        ({"messages": [USER], "solution": "4"}, "messages", "signal"),
        ({"prompt": "q", "completion": "a", "label": True}, "alpaca", "signal"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_say_is_refused(row: dict[str, Any], form: str, field: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: {field} \(.*must be something that {form} can express"):
        converted(tmp_path, row, form)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="format \\('x'\\) must be one of messages, sharegpt, alpaca, pairs"):
        convert_file([], "x", "out.jsonl")
    (tmp_path / "out.jsonl").touch()
    with pytest.raises(ValueError, match="exists and is not overwritten"):
        convert_file([], "messages", str(tmp_path / "out.jsonl"))
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "response": "a"}\nbad\n')
    data = load_dataset(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl:2"):
        convert_file((data[i] for i in range(2)), "messages", str(tmp_path / "new.jsonl"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl"]

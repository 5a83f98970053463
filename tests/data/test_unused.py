"""Nothing in a row is dropped in silence: what people write is read, the rest is told once, and
what training would miss is an error.
"""

from __future__ import annotations

import base64
import gc
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from ernie_tune.data.batching import Dropped, Encoder
from ernie_tune.data.chat import ChatTemplate
from ernie_tune.data.doctor.scan import Report, Scan
from ernie_tune.data.doctor.show import show_record
from ernie_tune.data.media.images import load_image
from ernie_tune.data.processor import Processor
from ernie_tune.data.readers.formats import match, read
from ernie_tune.data.readers.row import Where
from ernie_tune.data.records import DataError, Record, as_words, count_tags, plain_words
from ernie_tune.data.sources import DatasetEntry, load_dataset
from ernie_tune.data.units import UnitEncoder

TINY = Processor.bundled("tiny")
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)
BASE64 = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def load(row: dict[str, Any]) -> Record:
    form = match(row)
    assert form is not None, row
    return read(row, form, Where("x.jsonl", 1))


def refusal(row: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        load(row)
    assert caught.value.line == 1
    return caught.value


def check(folder: Path, *rows: dict[str, Any]) -> Report:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Scan(TINY).run([DatasetEntry(str(path))])


def trained(record: Record) -> list[str]:
    """The trained text of each dialogue."""
    return ["".join(t.split("⟧")[0] for t in "\n".join(show_record(record, TINY)).split("⟦")[1:])]


def asked(**more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Which?", **more}, {"role": "assistant", "content": "1"}]}


# ----------------------------------------------------------------------------------------------
# pictures and clips

NAMES = "image images image_path image_paths image_url img imgs img_path picture pictures pic photo image_file"


@pytest.mark.parametrize("name", [*NAMES.split(), "Image", "IMG", "Image Path", "imagePath", "image-url"])
def test_a_picture_is_read_under_every_usual_name(name: str, tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    row = {name: "a.png", "question": "Which?", "answer": "1"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row) + "\n")
    record = load_dataset(str(tmp_path / "x.jsonl"))[0]
    assert record.images == (str(tmp_path / "a.png"),)
    assert record.messages[0]["content"] == "<image>Which?"
    assert record.meta.unused == ()
    report = check(tmp_path, row)  # the doctor reads it the same way, and looks for the file
    assert (dict(report.findings.counts), report.pictures.opened) == ({}, 1)


@pytest.mark.parametrize("name", ["video", "video_path", "videos", "clip", "video_url", "Video"])
def test_a_clip_is_read_under_every_usual_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({name: "a.mp4", "question": "Which?", "answer": "1"}) + "\n")
    assert load_dataset(str(tmp_path / "x.jsonl"))[0].videos == (str(tmp_path / "a.mp4"),)


@pytest.mark.parametrize("more", [{"images": ["a.png"]}, {"image": "a.png"}, {"img": {"url": "a.png"}}])
def test_pictures_inside_a_turn_are_read(more: dict[str, Any]) -> None:
    assert load(asked(**more)).messages[0]["content"] == "<image>Which?"
    assert load(asked(**more)).images == ("a.png",)
    tagged = asked(**more)
    tagged["messages"][0]["content"] = "Here <image> is it."
    assert (load(tagged).messages[0]["content"], load(tagged).images) == ("Here <image> is it.", ("a.png",))
    tagged["messages"][0]["content"] = "<image><image>"
    assert refusal(tagged).problem == "count"
    pair = {**asked(**more), "rejected_response": "2"}
    assert (load(pair).signal, load(pair).images) == ("pair", ("a.png",))


def test_pictures_of_two_turns_keep_their_order() -> None:
    turns = [*asked(image="a.png")["messages"], *asked(image="b.png")["messages"]]
    record = load({"messages": turns})
    assert record.images == ("a.png", "b.png")
    assert [turn["content"] for turn in record.messages[::2]] == ["<image>Which?"] * 2


def test_a_cell_of_a_table_may_hold_a_list() -> None:
    for text in ('["a.png", "b.png"]', "['a.png', 'b.png']"):
        assert load({"question": "q", "answer": "a", "images": text}).images == ("a.png", "b.png")
    assert load({"question": "q", "answer": "a", "image": "[1] a.png"}).images == ("[1] a.png",)
    assert load({"question": "q", "answers": "['a', 'b', 'b']"}).messages[-1]["content"] == "b"
    # one answer, as it stands
    assert load({"question": "q", "answer": "['a']"}).messages[-1]["content"] == "['a']"


def test_a_picture_in_the_source_of_a_part_is_read() -> None:
    for source, image in (
        (
            {"type": "base64", "media_type": "image/png", "data": BASE64},
            f"data:application/octet-stream;base64,{BASE64}",
        ),
        ({"type": "url", "url": "a.png"}, "a.png"),
    ):
        record = load(asked(content=[{"type": "image", "source": source}, {"type": "text", "text": "q"}]))
        assert (record.images, record.meta.unused) == ((image,), ())


SPELLINGS = {
    "bare": lambda text: text,
    "in lines": lambda text: "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    "for URLs": lambda text: text.replace("+", "-").replace("/", "_"),
    "unpadded": lambda text: text.rstrip("="),
    "with a scheme": lambda text: f"base64://{text}",
    "Python's bytes": lambda text: f"b'{text}'",
    "an object": lambda text: {"base64": text},
    "JSON's bytes": lambda text: {"bytes": text, "path": None},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_base64_is_read_however_it_is_written(format: str, spelling: str, tmp_path: Path) -> None:
    if not features.check("avif") and format == "AVIF":
        pytest.skip("pillow without AVIF")
    stream = io.BytesIO()
    Image.new("RGB", (28, 28), (200, 30, 251)).save(stream, format)
    raw = stream.getvalue()
    row = {"question": "q", "answer": "a", "image": SPELLINGS[spelling](base64.b64encode(raw).decode())}
    (medium,) = load(row).images
    assert isinstance(medium, str)
    assert base64.b64decode(medium.removeprefix("data:application/octet-stream;base64,"), validate=True) == raw
    assert load_image(medium).size == (28, 28)
    assert dict(check(tmp_path, row).findings.counts) == {}


def test_a_clip_in_base64_is_read() -> None:
    clip = base64.b64encode(b"\0\0\0\x20ftypisom" + bytes(range(60))).decode()
    assert load({"question": "q", "answer": "a", "video": clip}).videos == (
        f"data:application/octet-stream;base64,{clip}",
    )


def test_base64_of_something_else_is_called_so(tmp_path: Path) -> None:
    """What is too long for a path is not looked for as a file; what may be one is."""
    for text, code in ((base64.b64encode(b"hello world" * 50).decode(), "media_broken"), ("a" * 60, "media_missing")):
        report = check(tmp_path, {"question": "q", "answer": "a", "image": text})
        assert dict(report.findings.counts) == {code: 1}
    assert load({"question": "q", "answer": "a", "signature": "QUJD" * 100}).meta.unused == ("signature",)


def test_two_columns_agree_or_are_refused() -> None:
    row = {"question": "q", "answer": "a", "images": ["a.png"], "image": "nosuch.png"}
    error = refusal(row)
    assert (error.problem, error.field) == ("twice", "image")
    assert load({**row, "image": "a.png"}).images == ("a.png",)
    assert load({**row, "image": "folder/a.png"}).images == ("a.png",)
    assert load({**row, "image": "", "images": None, "img": "b.png"}).images == ("b.png",)


UNREAD = [
    ("unread_picture", "foto", "a.png"),
    ("unread_picture", "thumbnail", ["a.JPG"]),
    ("unread_picture", "scan", "data:image/png;base64,AAAA"),
    ("unread_picture", "scan", BASE64),
    ("unread_picture", "cell", PNG),
    ("unread_picture", "cell", {"bytes": PNG, "path": None}),
    ("unread_picture", "image_link", "https://example.org/200"),
    ("unread_picture", "link", "https://example.org/a.png?size=2"),
    ("unread_picture", "metadata", {"deep": [{"shot": "x/a.webp"}]}),
    ("unread_picture", "shots", '["a.png", "b.png"]'),
    ("unread_picture", "shots", "['a.png']"),
    ("unread_picture", "shot", "a.png "),
    ("unread_picture", "pixels", np.zeros((2, 2, 3), np.uint8)),
    ("unread_clip", "recording", "a.mp4"),
    ("unread_clip", "cell", b"\0\0\0\x18ftypmp42"),
    ("unread_sound", "audio", "a.wav"),
    ("unread_mask", "loss_masks", [0, 1]),
    ("unread_mask", "mask", True),
    ("unread_mask", "train_mask", "false"),
    ("unread_thought", "chain_of_thought", "two and two"),
    ("unread_thought", "modelReasoning", "two and two"),
    ("unread_thought", "Complex_CoT", "two and two"),
    ("unread_thought", "rationales", ["two and two"]),
]


@pytest.mark.parametrize(("problem", "name", "value"), UNREAD)
def test_what_training_would_miss_is_an_error(problem: str, name: str, value: Any) -> None:
    error = refusal({"question": "q", "answer": "a", name: value})
    assert (error.problem, error.field.partition(".")[0].partition("[")[0]) == (problem, name)
    in_turn = asked()
    in_turn["messages"][1][name] = value
    assert refusal(in_turn).field.startswith(f"messages[1].{name}")
    # left out on purpose
    assert load({"question": "q", "answer": "a", f"_{name}": value}).meta.unused == (f"_{name}",)


def test_a_part_of_a_turn_is_looked_at_too() -> None:
    part = {"type": "text", "text": "q", "loss": 0}
    assert refusal(
        {"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": "a"}]}
    ).field == ("messages[0].content[0].loss")


NOTHING_MISSED = [
    {"note": "See the picture in a.png and b.png, which are shown on the left."},
    {"image_id": 17, "image_width": 640, "video_length": 3.5, "loss": 2.5},
    {"reasoning_type": "deductive", "split": "train", "text_model": "v1.2"},
    {"image": "a.png", "image_id": "a.png", "file": "train/a.png"},
    {"reasoning_content": "r", "reasoning_details": [{"text": "r"}]},
]


@pytest.mark.parametrize("more", NOTHING_MISSED)
def test_what_only_describes_is_no_error(more: dict[str, Any]) -> None:
    record = load({"question": "q", "answer": "a", **more})
    assert record.meta.unused


def test_names_that_nobody_reads_are_told_once_a_file(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{i}", "answer": f"a{i}", "source": "x", **({"Frage": "y"} if i < 3 else {})} for i in range(40)
    ]
    rows += [{"messages": [{"role": "user", "content": "q", "colour": "red"}, {"role": "assistant", "content": "x"}]}]
    report = check(tmp_path, *rows[:40])
    assert report.findings.counts == {"unused": 1}
    assert "source (40), Frage (3), which no reader takes (number of rows, of 40)" in str(report.findings.kept[0])
    assert check(tmp_path, *rows[3:40]).findings.counts == {"bookkeeping": 1}
    assert "messages[].colour (1)" in str(check(tmp_path, rows[40]).findings.kept[0])


def test_the_fast_road_counts_and_hands_over_what_is_suspicious(tmp_path: Path) -> None:
    rows = [{"question": f"q{i}", "answer": f"a{i}", "extra": "words." if i else "x/a.png"} for i in range(5)]
    report = check(tmp_path, *rows)
    assert report.findings.counts == {"unread_picture": 1, "unused": 1}
    assert report.findings.kept[0].line == 1
    assert "extra (4)" in str(report.findings.kept[1])
    rows = [{"question": "q", "answer": "a", "x": value} for value in ("1.5", 2, None, "", [], "end.")]
    assert "x (3)" in str(check(tmp_path, *rows).findings.kept[-1]) or "x (3)" in str(
        check(tmp_path, *rows).findings.kept[0]
    )


# ----------------------------------------------------------------------------------------------
# what is learnt


def turns(**more: Any) -> dict[str, Any]:
    bad = {"role": "assistant", "content": "BAD", **more}
    return {
        "messages": [
            {"role": "user", "content": "a"},
            bad,
            {"role": "user", "content": "b"},
            {"role": "assistant", "content": "GOOD"},
        ]
    }


@pytest.mark.parametrize(
    "name",
    ["loss", "weight", "train", "training", "trainable", "is_trainable", "loss_mask", "loss_scale", "loss_weight"],
)
def test_a_turn_that_is_marked_is_not_learnt(name: str) -> None:
    for value in (False, 0, 0.0, "false"):
        assert trained(load(turns(**{name: value}))) == ["GOOD</s>"], (name, value)
    for value in (True, 1, 1.0):
        assert trained(load(turns(**{name: value}))) == [" BAD<|end_of_sentence|>GOOD</s>"]


def test_marks_that_may_mean_either_are_refused() -> None:
    assert refusal(turns(mask=True)).problem == "unread_mask"
    assert refusal(turns(mask=0)).problem == "unread_mask"
    assert refusal(turns(ignore=True)).problem == "unread_mask"
    assert refusal(turns(train_detail=[{"begin_offset": 0, "end_offset": 2, "train": False}])).problem == "unread_mask"
    assert refusal(turns(train=False, weight=1)).problem == "twice"
    assert refusal(turns(exclude=True)).problem == "unread_mask"
    assert refusal(turns(requires_grad=False)).problem == "unread_mask"
    assert load({"question": "q", "answer": "a", "excluded": False}).meta.unused == (
        "excluded",
    )  # says nothing of a turn
    assert refusal(turns(loss_scale=0.5)).problem == "type"
    assert trained(load(turns(train=False, weight=0))) == ["GOOD</s>"]


def test_a_question_is_never_learnt_and_asking_for_it_is_told() -> None:
    row = asked(train=False)
    assert load(row).meta.unused == ()
    assert refusal(asked(train=True)).field == "messages[0].train"


# ----------------------------------------------------------------------------------------------
# thoughts


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": text, **more}]}


THOUGHT = "\nhm\n</think>\n\n4</s>"


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_a_thought_is_read_from_every_usual_field(name: str) -> None:
    assert trained(load(answer("4", **{name: "hm"}))) == [THOUGHT]
    assert trained(load({"question": "2+2?", "answer": "4", name: "hm"})) == [THOUGHT]
    assert trained(load(answer("<think>\nhm\n</think>\n\n4", **{name: "hm"}))) == [THOUGHT]
    assert refusal(answer("<think>\nother\n</think>\n\n4", **{name: "hm"})).problem == "twice"
    part = {"type": "thinking", "thinking": "hm", "signature": "x"}
    assert trained(load(answer([part, {"type": "text", "text": "4"}]))) == [THOUGHT]  # type: ignore[arg-type]


def test_a_thought_that_never_ends_is_an_error_and_not_trained(tmp_path: Path) -> None:
    row = answer("<think>\nTwo plus two, let me")
    report = check(tmp_path, row)
    assert (report.exit_code, dict(report.findings.counts)) == (1, {"thought_open": 1})
    dropped = Dropped()
    assert Encoder(TINY, 64)(load(row), dropped) is None
    assert list(dropped.count) == ["a thought that never ends"]
    pair = load({"prompt": "q", "chosen": "a", "rejected": "<think> b"})
    assert UnitEncoder(TINY, 64, 32)(pair, Dropped()) is None
    silent = answer("<think>\nTwo", loss=False)["messages"] + answer("4")["messages"]
    assert Encoder(TINY, 64)(load({"messages": silent}), Dropped()) is not None
    assert any("left out of training" in line for line in show_record(load(row), TINY))


def test_a_thought_without_its_opening_mark_is_one_and_told(tmp_path: Path) -> None:
    row = answer("hm\n</think>\n\n4")
    assert trained(load(row)) == [THOUGHT]
    assert check(tmp_path, row).findings.counts == {"thought_unopened": 1}
    pair = load({"prompt": "2+2?", "chosen": "hm\n</think>\n\n4", "rejected": "5"})
    assert trained(pair) == [THOUGHT + "\n\n</think>\n\n5</s>"]
    words = answer("The mark </think> ends a thought.")
    assert trained(load(words)) == ["The mark </think> ends a thought.</s>"]
    assert check(tmp_path, words).findings.counts == {"thought_late": 1}


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Sure. <think>hm</think> 4", "thought_late"),
        ("<think>a</think>b<think>c</think>d", "thought_late"),
        ("<thinking>hm</thinking>4", "thought_foreign"),
        ("<reasoning>hm</reasoning>4", "thought_foreign"),
        ("<think>a<think>b</think>4", "thought_late"),
        ("< think >hm</ think >4", "thought_foreign"),
        ("<seed:think>hm</seed:think>4", "thought_foreign"),
        ("<|begin_of_thought|>hm<|end_of_thought|>4", "thought_foreign"),
        ("[THINK]hm[/THINK]4", "thought_foreign"),
        ("◁think▷hm◁/think▷4", "thought_foreign"),
        ("<scratchpad>hm</scratchpad>4", "thought_foreign"),
        ("<|endoftext|>4", "placeholder"),
        ("<think>hm</think>", "empty_answer"),
    ],
)
def test_other_marks_are_findings(text: str, code: str, tmp_path: Path) -> None:
    assert check(tmp_path, answer(text)).findings.counts == {code: 1}


def test_earlier_thoughts_are_told(tmp_path: Path) -> None:
    row = {
        "messages": answer("<think>\nFIRST\n</think>\n\n1")["messages"]
        + answer("<think>\nhm\n</think>\n\n4")["messages"]
    }
    report = check(tmp_path, row, row | {"id": 2})
    assert "2 earlier thoughts in 2 of 2 rows" in str(report.findings.kept[0])
    assert trained(load(row)) == ["1<|end_of_sentence|>" + THOUGHT]
    said = check(tmp_path, {"question": "q", "answer": "<think>a</think>b", "mode": "nothink"})
    assert said.findings.counts == {"thought_dropped": 1}


CALL = {"type": "function", "function": {"name": "price", "arguments": {"of": "X"}}}


def test_a_thought_on_the_way_to_an_answer_is_trained_as_it_is_served() -> None:
    first = {"role": "assistant", "content": "<think>I need the tool.\n</think>", "tool_calls": [CALL]}
    row = {
        "messages": [
            {"role": "user", "content": "price of X?"},
            first,
            {"role": "tool", "content": [{"price": "$1"}]},
            {"role": "assistant", "content": "It is $1."},
        ]
    }
    call = '<tool_call>\n{"name": "price", "arguments": {"of": "X"}}\n</tool_call>'
    own = f"\nI need the tool.\n</think>\n\n{call}<|end_of_sentence|>"
    assert trained(load(row)) == [f"{own}\n\n</think>\n\nIt is $1.</s>"]
    template, messages = ChatTemplate(), load(row).messages
    asked = template.render(messages[:1], thinking=True, add_generation_prompt=True)
    whole = template.render(messages)
    assert whole.startswith(asked + own)
    again = template.render(messages[:3], thinking=True, add_generation_prompt=True)
    assert whole == again + "\n\n</think>\n\nIt is $1.</s>"
    assert template.thinks(messages[:3])
    # an earlier question's thought
    assert not template.thinks([*messages, {"role": "user", "content": "and Y?"}])
    quiet = template.render(messages, thinking=False)
    assert "I need" not in quiet


def test_one_prompt_for_all_candidates() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "chosen": "<think>\nhm\n</think>\n\na", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "<think>\nhm\n</think>\n\nb"},
        {"prompt": "q", "responses": ["a", "<think>\nhm\n</think>\n\nb", "c"], "scores": [1, 2, 3]},
    ]
    for row in rows:
        for mode, prompt in (("auto", "<think>"), ("think", "<think>"), ("nothink", "<think>\n\n</think>\n\n")):
            unit = UnitEncoder(TINY, 99, 50)(load({**row, "mode": mode}), Dropped())
            assert unit is not None
            ends = [d.row.input_ids_L[: int(np.argmax(d.trained_L))].tolist() for d in unit.dialogues]
            assert all(end == ends[0] for end in ends)
            assert TINY.tokenizer.decode(ends[0]).endswith(f"Assistant: {prompt}")
    plain = UnitEncoder(TINY, 99, 50)(load({"prompt": "q", "chosen": "a", "rejected": "b"}), Dropped())
    assert plain is not None
    start = int(np.argmax(plain.dialogues[0].trained_L))
    assert TINY.tokenizer.decode(plain.dialogues[0].row.input_ids_L[:start]).endswith("<think>\n\n</think>\n\n")


# ----------------------------------------------------------------------------------------------
# tags that are words


def test_tags_in_a_text_without_media_are_words_and_told(tmp_path: Path) -> None:
    said = "Use <video src=x></video> or a bare <video> tag."
    row = {
        "messages": [{"role": "user", "content": "Which tag embeds a film?"}, {"role": "assistant", "content": said}]
    }
    assert trained(load(row)) == [said + "</s>"]
    report = check(tmp_path, row)
    assert (report.exit_code, dict(report.findings.counts)) == (0, {"literal_tag": 1})
    parts = [{"type": "text", "text": "What is the <image> tag of SVG?"}]
    row = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "A raster."}]}
    assert "User: What is the <image> tag of SVG?" in "\n".join(show_record(load(row), TINY))
    assert check(tmp_path, row).findings.counts == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("![a cat](pics/a.png) What is it?", True),
        ("What is it? ![](data:image/png;base64,iVBORw0KGgo=)", True),
        ("See <img src='a.jpg'> and say what it is.", True),
        ("![a](https://example.org/a.webp?size=2)", True),
        ("Stop![1](notes.txt) and the tag <img>-less", False),
        ("Is a.png a picture?", False),
    ],
)
def test_a_picture_in_the_words_of_a_question_is_told(text: str, told: bool, tmp_path: Path) -> None:
    """Where Markdown or HTML names one, the model would be asked about what it does not see. Both
    roads say so; an answer may write one.
    """
    rows = [{"prompt": f"why {i}?", "response": f"so {i}"} for i in range(3)]
    rows += [{"prompt": text, "response": "a cat"}, {"prompt": "Write it.", "response": text}]
    report = check(tmp_path, *rows)
    assert {code: n for code, n in report.findings.counts.items() if code != "placeholder"} == (
        {"picture_in_words": 1} if told else {}
    )
    if told:
        assert report.findings.kept[0].line == 4
        assert "move it to images and write <image>" in report.findings.kept[0].english


def test_a_missing_picture_is_no_word(tmp_path: Path) -> None:
    with_picture = {"question": "<image>q", "answer": "a", "images": ["a.png"]}
    talks = {"question": "What does the <image> tag mean here?", "answer": "b"}
    Image.new("RGB", (28, 28)).save(tmp_path / "a.png")
    # other rows have pictures, so this one lost its own
    report = check(tmp_path, with_picture, talks)
    assert report.findings.counts == {"count": 1}
    assert r"write \<image> where the word itself is meant" in str(report.findings.kept[0])
    for question in ("<image>q", "q <image>", "look:\n<image>\nq"):
        assert refusal({"question": question, "answer": "a"}).problem == "count"
    assert refusal({"question": "the <image> tag?", "answer": "a", "images": []}).problem == "count"


def test_a_backslash_makes_a_tag_a_word() -> None:
    row = {"question": r"<image>What is the \<image> tag, and \<video>?", "answer": "a", "images": ["a.png"]}
    record = load(row)
    assert (record.images, count_tags(record.messages[0]["content"], "<image>")) == (("a.png",), 1)
    shown = ChatTemplate().render(record.messages)
    assert "<|IMAGE_END|>What is the <image> tag, and <video>?\nAssistant" in shown
    for text in ("a <image> b <video>", "no tag", "<image><image>"):
        assert plain_words(as_words(text)) == text
        assert count_tags(as_words(text), "<image>") == 0


# ----------------------------------------------------------------------------------------------
# answers


def test_several_right_answers_teach_the_most_frequent(tmp_path: Path) -> None:
    def learnt(**row: Any) -> str:
        record = load({"question": "Which?", **row})
        assert record.signal == "sft"
        return record.messages[-1]["content"]

    assert learnt(answers=["1", "one", "one"]) == "one"
    assert learnt(answers=["1", "one"]) == "1"
    assert learnt(answers=["1"]) == "1"
    assert (
        learnt(answers=[{"answer": "no", "answer_id": 1}, {"answer": "yes", "answer_id": 2}, {"answer": "yes"}])
        == "yes"
    )
    assert learnt(answers={"text": ["Paris"], "answer_start": [3]}) == "Paris"
    assert learnt(answers=["1", "one"], answer="two") == "two"
    assert check(tmp_path, {"question": "q", "answers": ["a", "b"]}).findings.counts == {"answers": 1}
    assert refusal({"question": "q", "answers": []}).field in ("prompt", "answers")


def test_numbers_and_lists_as_answers() -> None:
    for value, text in ((7, "7"), (0.5, "0.5"), (True, "true"), (["x"], "x"), ([3], "3")):
        assert load({"question": "how many?", "answer": value}).messages[-1]["content"] == text
    error = refusal({"instruction": "q", "output": ["good", "bad"]})
    assert (error.problem, error.field) == ("answers", "output")


def test_developer_is_the_system() -> None:
    row = {"messages": [{"role": "developer", "content": "s"}, *asked()["messages"]]}
    assert load(row).messages[0] == {"role": "system", "content": "s"}


def test_a_row_is_gone_with_its_record() -> None:
    """No cycles: the doctor reads without a collector, so each would keep its row, pictures and
    all, to the end of the file.
    """
    rows = [
        asked(images=["a.png"], source="x", content=[{"type": "image", "image": PNG}, {"type": "text", "text": "?"}]),
        {"question": "Which?", "answers": [{"answer": "1", "answer_id": 1}], "image": PNG},
        {"prompt": "q", "chosen": "<think>a", "rejected": [{"role": "assistant", "content": "b"}]},
        {"question": "Which?", "answer": "1", "foto": "a.png"},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": "none"},
    ]

    def read_all() -> int:
        refused = 0
        for row in rows:
            try:
                load(row)
            except DataError:
                refused += 1
        return refused

    read_all()
    gc.collect()
    gc.disable()
    try:
        assert read_all() == 4
        assert gc.collect() == 0
    finally:
        gc.enable()

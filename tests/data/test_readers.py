"""Every format: what it is recognised as, what record
it gives, how it complains.
"""

import copy
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_tune.data.readers.fields import Where
from ernie_tune.data.readers.formats import FORMATS, choose, match, read, sniff
from ernie_tune.data.records import DataError, Record, Reward, Verifier, count_tags

FORM = {form.name: form for form in FORMATS}
WHERE = Where("data/train.jsonl", 7)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


def load(row, name=None, where=WHERE) -> Record:
    form = FORM[name] if name else match(row)
    assert form is not None, row
    return read(row, form, where)


def complaint(row, name=None) -> DataError:
    with pytest.raises(DataError) as caught:
        load(row, name)
    assert (caught.value.path, caught.value.line) == ("data/train.jsonl", 7)
    return caught.value


# ----------------------------------------------------------------------------------------------
# demonstrations

Q, A = user("q"), assistant("a")
SFT = [
    ("prompt_response", {"prompt": "q", "response": "a"}, (Q, A)),  # F1
    ("prompt_response", {"query": "q", "response": "a"}, (Q, A)),
    ("prompt_response", {"question": "q", "answer": "a"}, (Q, A)),
    ("prompt_response", {"problem": "q", "completion": "a"}, (Q, A)),
    ("prompt_response", {"input": "q", "output": "a"}, (Q, A)),
    ("prompt_response", {"prompt": "q", "text": "a"}, (Q, A)),
    ("prompt_response", {"prompt": "q", "targets": "a"}, (Q, A)),
    ("prompt_response", {"prompt": [Q], "completion": [A]}, (Q, A)),  # TRL, conversational
    ("prompt_response", {"prompt": "q", "response": "a", "system": "s"}, (system("s"), Q, A)),
    ("prompt_response", {"prompt": "q", "response": "a", "system_prompt": ""}, (Q, A)),
    ("alpaca", {"instruction": "i", "input": "x", "output": "a"}, (user("i\nx"), A)),  # F3
    ("alpaca", {"instruction": "q", "input": "", "output": "a"}, (Q, A)),
    ("alpaca", {"instruction": "q", "input": None, "output": "a"}, (Q, A)),
    ("alpaca", {"instruction": "q", "output": "a", "system": "s", "history": [["h", "r"]]},
     (system("s"), user("h"), assistant("r"), Q, A)),
    # F4
    ("sharegpt", {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, (Q, A)),
    # F5
    ("sharegpt", {"id": 3, "source": "x", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, (Q, A)),
    ("sharegpt", {"conversation": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
     (system("s"), Q, A)),
    ("messages", {"messages": [system("s"), Q, A]}, (system("s"), Q, A)),
    ("messages", {"messages": [Q, assistant("a", loss=False), Q, assistant("a", reasoning_content="r")]},
     (Q, assistant("a", loss=False), Q, assistant("a", reasoning_content="r"))),
    ("messages", {"messages": [Q, {"role": "assistant", "content": "a", "weight": 0}]}, (Q, assistant("a", loss=False))),
    ("messages", {"messages": [user([{"type": "text", "text": "q"}]), A]}, (Q, A)),
    ("messages", {"messages": [Q], "response": "a"}, (Q, A)),
    # the turn wins, as in LLaMA-Factory
    ("messages", {"messages": [system("s"), Q, A], "system": "other"}, (system("s"), Q, A)),
    ("task", {"task": "summary", "input": "q", "output": "a"}, (Q, A)),  # F9
    ("erniekit", {"src": ["q", "p"], "tgt": ["a", "b"], "label": [0, 1], "system": "s"},
     (system("s"), Q, assistant("a", loss=False), user("p"), assistant("b", loss=True))),
    ("erniekit", {"src": "q", "tgt": "a"}, (Q, A)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "messages"), SFT)
def test_demonstrations(name, row, messages) -> None:
    record = load(row)
    assert (record.meta.format, record.signal, record.messages) == (name, "sft", messages)


def test_common_fields_and_extra() -> None:
    row = {
        "prompt": "q",
        "response": "a",
        "id": 5,
        "domain": "chart",
        "mode": "think",
        "weight": "0.5",
        "license": "x",
        "empty": None,
    }
    record = load(row)
    assert (record.id, record.domain, record.mode, record.weight) == ("5", "chart", "think", 0.5)
    assert record.meta.extra == {"license": "x"}
    assert str(record.meta) == "data/train.jsonl:7" == load({"prompt": "q", "response": "a"}).id
    assert load({"task": "summary", "input": "q", "output": "a"}).domain == "summary"


def test_classification_is_a_demonstration_and_verifiable() -> None:
    # SFT with the label as answer, and a verifiable exact row
    for label, answer in (("good", "good"), (3, "3")):
        record = load({"text": "t", "label": label})
        assert (record.meta.format, record.signal, record.messages) == (
            "classification",
            "sft",
            (user("t"), assistant(answer)),
        )
        assert record.reward == Reward(answer, (Verifier("exact"),))


def test_prompts() -> None:
    for row, name in (({"prompt": "q"}, "prompt"), ({"messages": [Q]}, "messages")):
        record = load(row)
        assert (record.meta.format, record.signal, record.messages) == (name, "prompt", (Q,))


def test_tools_and_calls() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    row = {
        "messages": [
            Q,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "content": [{"price": 150.75}]},
            A,
        ],
        "tools": [{"type": "function"}],
    }  # the shape of ERNIEKit's function-call examples
    expected = (Q, assistant("", tool_calls=[call]), {"role": "tool", "content": '[{"price": 150.75}]'}, A)
    assert (load(row).messages, load(row).tools) == (expected, ({"type": "function"},))
    glaive = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "o"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"type": "function"}]',
    }
    assert load(glaive).messages == (Q, assistant("", tool_calls=[call]), {"role": "tool", "content": "o"}, A)
    assert load(glaive).tools == ({"type": "function"},)
    text = {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": '{"name": "f"}'}], "tools": ""}
    assert (load(text).messages[1]["tool_calls"], load(text).tools) == ([{"name": "f"}], ())


# ----------------------------------------------------------------------------------------------
# media

LLAVA = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]


def test_vqa() -> None:
    # F6: image as a string or a list, tag in the text
    for image in ("a.jpg", ["a.jpg"]):
        record = load({"id": "1", "image": image, "conversations": LLAVA})
        assert (record.meta.format, record.images) == ("vqa", (os.path.join("data", "a.jpg"),))
        assert record.messages == (user("<image>\nq"), assistant("a"))


def test_media_without_tags_are_put_before_the_first_user_turn() -> None:
    row = {"messages": [system("s"), Q, A, user("q2"), A], "images": ["a", "b"], "videos": ["v"]}
    record = load(row)
    assert record.messages[1] == user("<video><image><image>q")
    assert record.messages[3] == user("q2")
    assert (len(record.images), len(record.videos)) == (2, 1)
    assert row["messages"][1] == Q  # the row itself stays as it was


@pytest.mark.parametrize("images", [["a"], ["a", "b", "c"], []])
def test_tags_and_media_must_match(images) -> None:
    error = complaint({"prompt": "<image> and <image>", "response": "a", "images": images})
    assert (error.field, error.found, error.expected) == ("images", str(len(images)), "2, one for each <image> tag")


def test_openai_parts() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "http://x/a.png"}},
        {"type": "text", "text": "q"},
        "!",
        {"type": "image", "image": "b.png"},
        {"type": "video", "video": ["1.png", "2.png"]},
        {"type": "image", "path": "/c.png"},
    ]
    record = load({"messages": [user(parts), A]})
    assert record.messages[0]["content"] == "<image>q!<image><video><image>"
    assert record.images == ("http://x/a.png", os.path.join("data", "b.png"), "/c.png")
    assert record.videos == ((os.path.join("data", "1.png"), os.path.join("data", "2.png")),)


def test_bare_parts_take_the_column() -> None:
    record = load(
        {"messages": [user([{"type": "image"}, {"type": "text", "text": "q"}]), A], "images": [{"path": "a.png"}]}
    )
    assert (record.messages[0]["content"], record.images) == ("<image>q", (os.path.join("data", "a.png"),))


def test_media_forms() -> None:
    images = [
        {"bytes": b"\x89PNG", "path": "x.png"},
        {"bytes": "iVBO"},
        "data:image/png;base64,AA",
        {"url": "https://x/y"},
        "file:///z",
    ]
    record = load({"prompt": "q", "response": "a", "images": images})
    assert record.images == (
        b"\x89PNG",
        "data:application/octet-stream;base64,iVBO",
        "data:image/png;base64,AA",
        "https://x/y",
        "file:///z",
    )


def test_media_dir_comes_first_and_the_files_folder_second(tmp_path) -> None:
    (tmp_path / "media").mkdir()
    for name in ("media/both.png", "both.png", "beside.png"):
        (tmp_path / name).touch()
    where = Where(str(tmp_path / "train.jsonl"), 1, str(tmp_path / "media"))
    record = load({"prompt": "q", "response": "a", "images": ["both.png", "beside.png", "nowhere.png"]}, where=where)
    assert record.images == tuple(
        str(tmp_path / name) for name in ("media/both.png", "beside.png", "media/nowhere.png")
    )


def test_named_parts_and_column_must_agree() -> None:
    part = {"type": "image", "image": "a.png"}
    assert load({"messages": [user([part]), A], "images": ["a.png"]}).images == (os.path.join("data", "a.png"),)
    assert complaint({"messages": [user([part]), A], "images": ["b.png"]}).problem == "choice"
    assert complaint({"messages": [user([part, {"type": "image"}]), A]}).problem == "count"


VL = {
    "text_info": [
        {"text": "look", "tag": "mask"}, {"text": " and", "tag": "mask"}, {"text": "one", "tag": "no_mask"},
        {"text": "more", "tag": "mask"}, {"text": "two", "tag": "no_mask", "label": 0},
    ],
    "image_info": [{"matched_text_index": 0, "image_url": "./a.jpg"}, {"matched_text_index": 1, "image_url": "/b.jpg"}],
    "video_info": [{"matched_text_index": 3, "video_url": "c.mp4"}],
}  # fmt: skip


def test_erniekit_vl() -> None:
    record = load(VL)
    assert record.messages == (
        user("<image>look<image> and"),
        assistant("one"),
        user("<video>more"),
        assistant("two", loss=False),
    )
    assert (record.images, record.videos) == (
        (os.path.join("data", "./a.jpg"), "/b.jpg"),
        (os.path.join("data", "c.mp4"),),
    )
    assert record.meta.format == "erniekit_vl"
    bare = {
        "text_list": VL["text_info"][:3],
        "image_info": [{"image_url": "a"}],
    }  # the index defaults to the first text
    assert load(bare).messages[0] == user("<image>look and")


def test_erniekit_vl_system() -> None:
    info = [("s", "mask"), ("ok", "no_mask"), ("q", "mask"), ("a", "no_mask")]
    row = {"text_info": [{"text": text, "tag": tag} for text, tag in info], "is_system": 1}
    assert load(row).messages == (system("s"), Q, A)
    assert complaint({**row, "text_info": row["text_info"][2:]}).problem == "system"


def test_erniekit_vl_tools() -> None:
    info = [
        {"text": "q", "tag": "mask"},
        {"text": "", "tag": "no_mask", "tool_calls": [{"name": "f"}]},
        {"text": {"price": 1}, "tag": "mask", "tool_response": True},
        {"text": "a", "tag": "no_mask"},
    ]
    tool = {"role": "tool", "content": '{"price": 1}'}
    assert load({"text_info": info}).messages == (Q, assistant("", tool_calls=[{"name": "f"}]), tool, A)


# ----------------------------------------------------------------------------------------------
# judged answers


def answers(record) -> list:
    return [candidate.messages[-1]["content"] for candidate in record.candidates]


PAIRS = [
    {"prompt": "q", "chosen": "good", "rejected": "bad"},  # F2
    {"question": "q", "chosen": "good", "rejected": "bad"},  # ERNIEKit, alpaca type
    {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},  # LLaMA-Factory, alpaca
    {"prompt": [Q], "chosen": [assistant("good")], "rejected": [assistant("bad")]},  # TRL
    {"chosen": [Q, assistant("good")], "rejected": [Q, assistant("bad")]},  # TRL, implicit prompt
    # prompt and repetition
    {"prompt": "q", "chosen": [Q, assistant("good")], "rejected": [Q, assistant("bad")]},
    {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "good"},
     "rejected": {"from": "gpt", "value": "bad"}},  # LLaMA-Factory, sharegpt
    {"messages": [Q, assistant("good")], "rejected_response": "bad"},  # ms-swift
    {"messages": [Q, assistant("good")], "rejected_messages": [Q, assistant("bad")]},
    {"query": "q", "response": "good", "rejected_response": "bad"},
    {"messages": [Q], "signal": {"type": "pair", "chosen": "good", "rejected": "bad"}},
    {"src": ["q"], "tgt": [], "response": [["good"], ["bad"]], "sort": [1, 0]},  # ERNIEKit
    {"src": ["q"], "tgt": [], "response": [["bad"], ["good"]], "sort": [0, 1]},
    {"src": "q", "response": ["bad", "good"], "sort": [0, 1]},
]  # fmt: skip


@pytest.mark.parametrize("row", PAIRS)
def test_pairs(row) -> None:
    record = load(row)
    assert (record.signal, record.messages, answers(record)) == ("pair", (Q,), ["good", "bad"])
    assert list(record.preferences()) == [(0, 1)]


def test_equal_answers_are_a_pair_still() -> None:
    # Worth a warning by the doctor, but no error of the format.
    assert answers(load({"chosen": [Q, A], "rejected": [Q, A]})) == ["a", "a"]


def test_scored_pair_with_reason() -> None:
    # F8
    row = {"prompt": "q", "chosen": "g", "rejected": "b", "score": {"chosen": 5, "rejected": 2}, "reject_reason": "rude",
           "margin": 0.5, "confidence": 0.9}  # fmt: skip
    record = load(row)
    assert [candidate.score for candidate in record.candidates] == [1.0, 0.25]
    assert (record.margin, record.confidence, record.meta.extra) == (0.5, 0.9, {"reject_reason": "rude"})


def test_erniekit_preference_with_history() -> None:
    row = {"system": "s", "src": ["q", "p"], "tgt": ["a"], "response": [["x", "y", "z"], ["w"]], "sort": [1, 0]}
    record = load(row)
    assert record.messages == (system("s"), Q, A, user("p"))
    assert record.candidates[0].messages == (assistant("x"), user("y"), assistant("z"))
    three = load({"src": ["q"], "tgt": [], "response": [["l"], ["h"], ["m"]], "sort": [0, 2, 1]})
    assert (three.signal, answers(three), [c.rank for c in three.candidates]) == ("ranking", ["l", "h", "m"], [3, 1, 2])


def test_pair_with_images_of_its_own() -> None:
    tagged = user("<image>q")
    other = load({"messages": [tagged, A], "images": ["/a"], "rejected_response": "b", "rejected_images": ["/b"]})
    assert (other.images, other.dialogue(0)[1], other.dialogue(1)[1]) == (("/a",), ("/a",), ("/b",))
    inside = load(
        {"prompt": "<image>q", "chosen": "<image>", "rejected": "<image><image>", "images": ["/p", "/c", "/r1", "/r2"]}
    )
    assert [inside.dialogue(i)[1] for i in (0, 1)] == [("/p", "/c"), ("/p", "/r1", "/r2")]
    added = load(
        {"prompt": "<image>q", "chosen": "<image>", "rejected": "b", "images": ["/p"], "chosen_images": ["/c"]}
    )
    assert [added.dialogue(i)[1] for i in (0, 1)] == [("/p", "/c"), ("/p",)]
    error = complaint(
        {"prompt": "<image>q", "chosen": "g", "rejected": "b", "images": ["/p"], "rejected_images": ["/1", "/2"]}
    )
    assert (error.found, error.expected) == ("2", "0, one for each <image> tag of the candidate")


RANKED = [
    {"prompt": "q", "responses": ["a", "b", "c", "d"], "order": "B>A=C>D"},
    {"prompt": "q", "responses": ["a", "b", "c", "d"], "ranking": " B ＞ A＝C > D "},
    {"prompt": "q", "responses": {"A": "a", "B": "b", "C": "c", "D": "d"}, "order": "B>A=C>D"},
    {"prompt": "q", "responses": ["a", "b", "c", "d"], "order": [[1], [0, 2], [3]]},
    {"prompt": "q", "responses": ["a", "b", "c", "d"], "ranks": [2, 1, 2, 4]},
    {"prompt": "q", "responses": [{"text": text, "rank": rank} for text, rank in zip("abcd", (2, 1, 2, 4), strict=True)]},
    {"messages": [Q], "signal": {"type": "ranking", "responses": ["a", "b", "c", "d"], "order": "B>A=C>D"}},
    {"messages": [Q], "candidates": [{"messages": [assistant(text)], "images": [], "rank": rank} for text, rank in zip("abcd", (2, 1, 2, 4), strict=True)]},
]  # fmt: skip


@pytest.mark.parametrize("row", RANKED)
def test_rankings(row) -> None:
    record = load(row)
    assert (record.signal, record.messages, answers(record)) == ("ranking", (Q,), list("abcd"))
    assert [candidate.rank for candidate in record.candidates] == [2, 1, 2, 4]
    assert set(record.preferences()) == {(1, 0), (1, 2), (1, 3), (0, 3), (2, 3)}


RATED = [
    {"prompt": "q", "responses": [{"text": "a", "score": 5}, {"text": "b", "score": 2}]},
    {"prompt": "q", "responses": ["a", "b"], "scores": [5, 2]},
    {"prompt": "q", "responses": ["a", "b"], "ratings": ["10", "3.25"], "scale": [1, 10]},
    {"messages": [Q], "signal": {"type": "rating", "responses": [{"text": "a", "score": 100}, {"text": "b", "score": 25}], "scale": [0, 100]}},
    {"messages": [Q], "candidates": [{"messages": [A], "rating": 5}, {"messages": [assistant("b")], "rating": 2}]},
]  # fmt: skip


@pytest.mark.parametrize("row", RATED)
def test_ratings_are_mapped_to_the_unit_interval(row) -> None:
    record = load(row)
    assert (record.signal, record.messages, answers(record)) == ("rating", (Q,), ["a", "b"])
    assert [candidate.score for candidate in record.candidates] == [1.0, 0.25]


def test_one_rated_answer() -> None:
    # F11; and a dialogue that ends with the rated answer
    for row in ({"prompt": "q", "response": "a", "rating": 4}, {"messages": [Q, A], "score": 4}):
        record = load(row)
        assert (record.meta.format, record.signal, record.messages, answers(record)) == (
            "scored",
            "rating",
            (Q,),
            ["a"],
        )
        assert record.candidates[0].score == 0.75


@pytest.mark.parametrize("label", [True, 1, "good", "True", "desirable"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "label": None},
        {"messages": [Q, A], "label": None},
        {"instruction": "q", "output": "a", "kto_tag": None},
        {"messages": [Q], "signal": {"type": "label", "response": "a", "label": None}},
        {"messages": [Q], "candidates": [{"messages": [A], "label": None}]},
    ],
)
def test_labels(row, label) -> None:
    row = copy.deepcopy(row)
    for holder in (row, row.get("signal", {}), *row.get("candidates", [])):
        for key in ("label", "kto_tag"):
            if key in holder:
                holder[key] = label
    record = load(row)
    assert (record.signal, record.messages, answers(record)) == ("label", (Q,), ["a"])
    assert record.candidates[0].label is True
    assert load({"prompt": "q", "completion": "a", "label": "bad"}).candidates[0].label is False


def test_verifiable() -> None:
    assert load({"question": "q", "solution": "42"}).reward == Reward("42")
    full = {
        "messages": [Q],
        "signal": {
            "type": "verifiable",
            "answer": 42,
            "verifiers": [{"name": "math", "weight": 0.7, "spec": {"tol": 1}}, "format"],
            "evidence": {"required": ["x"]},
            "scene": {"objects": []},
            "hint": "h",
        },
    }
    assert load(full).reward == Reward(
        42, (Verifier("math", 0.7, {"tol": 1}), Verifier("format")), {"required": ["x"]}, {"objects": []}, "h"
    )
    # as verl writes it
    box = {"prompt": "q", "reward": {"type": "bbox", "answer": [1, 2, 3, 4], "evidence": [{"image": 0}]}}
    assert load(box).reward == Reward([1, 2, 3, 4], (Verifier("box_iou"),), {"required": [{"image": 0}]})
    assert load({"prompt": [Q], "reward_model": {"ground_truth": "B"}}).reward == Reward("B")
    assert load({"prompt": "q", "answer": "B", "verifiers": "mcq"}).reward == Reward("B", (Verifier("mcq"),))
    assert load({"prompt": "q", "answer": "B", "reward": "choice"}).reward == Reward("B", (Verifier("mcq"),))
    demonstrated = load({"messages": [Q, A], "solution": "42"})
    assert (demonstrated.signal, demonstrated.messages, demonstrated.prompt) == ("sft", (Q, A), (Q,))
    assert demonstrated.serves == ("sft", "verifiable")
    assert demonstrated.reward == Reward("42")


def test_canonical_demonstrations() -> None:
    for row in (
        {"messages": [Q], "signal": {"type": "sft", "responses": ["a"]}},
        {"messages": [Q, A], "signal": {"type": "sft"}},
    ):
        assert (load(row).signal, load(row).messages) == ("sft", (Q, A))
    assert load({"messages": [Q], "signal": {"type": "prompt"}}).signal == "prompt"
    both = {"messages": [Q], "candidates": [{"messages": [A], "score": 5}], "reward": {"answer": "B"}}
    assert (load(both).signal, load(both).reward) == ("rating", Reward("B"))


# ----------------------------------------------------------------------------------------------
# complaints

CONV = "conversations"
BAD = [  # row, format (None: recognised), problem, field
    ({"promt": "q", "chosen": "a", "rejected": "b"}, "pairs", "missing", "prompt"),
    ({"prompt": "q", "chosen": "a"}, "pairs", "missing", "rejected"),
    ({"prompt": "q"}, "prompt_response", "missing", "response"),
    ({"text": "t"}, "classification", "missing", "label"),
    ({"prompt": "q", "response": ["a", "b"]}, None, "answers", "response"),
    ({"prompt": 3, "response": "a"}, None, "type", "prompt"),
    ({"prompt": "q", "response": []}, None, "turnless", "response"),
    ({CONV: []}, None, "turnless", CONV),
    ({"src": [], "tgt": []}, None, "turnless", "messages"),
    ({CONV: "q"}, None, "type", CONV),
    ({CONV: ["q"]}, None, "type", f"{CONV}[0]"),
    ({CONV: [{"from": "robot", "value": "q"}]}, None, "choice", f"{CONV}[0].from"),
    ({CONV: [{"role": "robot", "content": "q"}]}, None, "choice", f"{CONV}[0].role"),
    ({CONV: [{"value": "q"}]}, None, "missing", f"{CONV}[0].role"),
    ({CONV: [{"from": "human"}]}, None, "missing", f"{CONV}[0].content"),
    ({CONV: [{"from": "human", "value": 3}]}, None, "type", f"{CONV}[0].content"),
    ({CONV: [{"from": "human", "value": "q"}, {"from": "function_call", "value": "{"}]}, None, "json", f"{CONV}[1].value"),
    ({"messages": [Q, {"role": "assistant", "content": "a", "loss": "no"}]}, None, "type", "messages[1].loss"),
    ({"messages": [A, Q]}, None, "roles", "roles"),
    ({"messages": [Q, Q, A]}, None, "roles", "roles"),
    ({"messages": [Q, system("s"), A]}, None, "roles", "roles"),
    ({"messages": [system("s")]}, None, "roles", "roles"),
    ({"messages": [Q], "signal": {"type": "sft"}}, None, "last", "roles"),
    ({"messages": [Q, A], "signal": {"type": "prompt"}}, None, "last", "roles"),
    ({"messages": [Q], "rejected_response": "b"}, None, "last", "roles"),
    ({"prompt": "q", "chosen": [A, A], "rejected": "b"}, None, "roles", "roles"),
    ({"chosen": [Q, A], "rejected": [user("other"), A]}, None, "prompt", "prompt"),
    ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, A]}, None, "prompt", "prompt"),
    ({"messages": [user([{"type": "audio"}]), A]}, None, "choice", "messages[0].content[0].type"),
    ({"messages": [user([{"type": "image", "image": {"w": 3}}]), A]}, None, "missing", "messages[0].content[0].image.path"),
    ({"prompt": "q", "response": "a", "images": [3]}, None, "type", "images"),
    ({"prompt": "q", "response": "a", "images": [["a"]]}, None, "type", "images"),
    ({"prompt": "q", "response": "a", "videos": [["a", 3]]}, None, "type", "videos"),
    ({"prompt": "q", "response": "a", "mode": "deep"}, None, "choice", "mode"),
    ({"prompt": "q", "response": "a", "weight": -1}, None, "range", "weight"),
    ({"prompt": "q", "response": "a", "weight": "much"}, None, "type", "weight"),
    ({"prompt": "q", "response": "a", "weight": True}, None, "type", "weight"),
    ({"prompt": "q", "response": "a", "weight": float("nan")}, None, "type", "weight"),
    ({"prompt": "q", "response": "a", "weight": 10**400}, None, "type", "weight"),
    ({"prompt": "q", "response": "a", "weight": float("inf")}, None, "range", "weight"),
    ({"prompt": "q", "response": "a", "tools": 3}, None, "type", "tools"),
    ({"prompt": "q", "response": "a", "tools": "{"}, None, "json", "tools"),
    ({"prompt": "q", "response": "a", "tools": "[" * 100000}, None, "json", "tools"),
    ({"prompt": "q", "response": "a", "history": [["h"]]}, None, "count", "history"),
    ({"src": ["q"], "tgt": []}, None, "count", "tgt"),
    ({"src": ["q"], "tgt": ["a"], "label": [1, 1]}, None, "count", "label"),
    ({"src": ["q"], "tgt": ["a"], "label": [2]}, None, "choice", "label[0]"),
    ({"src": ["q"], "tgt": ["a"], "response": [["x"], ["y"]], "sort": [1, 0]}, None, "count", "tgt"),
    ({"src": ["q"], "tgt": [], "response": [["x"], ["y"]]}, None, "missing", "sort"),
    ({"src": ["q"], "tgt": [], "response": [["x"], ["y"]], "sort": [1]}, None, "count", "sort"),
    ({"src": ["q"], "tgt": [], "response": [["x"]], "sort": [1, 0]}, None, "count", "response"),
    ({"src": ["q"], "tgt": [], "response": [["x"], ["y"]], "sort": [1, 1]}, None, "choice", "sort"),
    ({"src": ["q"], "tgt": [], "response": [["x", "y"], ["y"]], "sort": [1, 0]}, None, "count", "response[0]"),
    ({**VL, "text_info": VL["text_info"][::-1]}, None, "choice", "matched_text_index"),
    ({"text_info": VL["text_info"][2:]}, None, "roles", "roles"),
    ({"text_info": VL["text_info"][:1]}, None, "choice", "text_info[-1].tag"),
    ({"text_info": []}, None, "choice", "text_info[-1].tag"),
    ({"text_info": [{"text": "q", "tag": "user"}]}, None, "choice", "text_info[0].tag"),
    ({"text_info": [{"tag": "mask"}]}, None, "type", "text_info[0].text"),
    ({**VL, "image_info": [{"matched_text_index": 9, "image_url": "a"}]}, None, "range", "image_info[0].matched_text_index"),
    ({**VL, "image_info": [{"image_type": "video", "image_url": "a"}]}, None, "frames", "image_info[0].image_type"),
    ({**VL, "video_info": [{"matched_text_index": 0}]}, None, "missing", "video_info[0].video_url"),
    ({"prompt": "q", "responses": ["a", "b"], "order": "B"}, None, "order", "order"),
    ({"prompt": "q", "responses": ["a", "b"], "order": "A>A"}, None, "order", "order"),
    ({"prompt": "q", "responses": ["a", "b"], "order": "A>C"}, None, "order", "order"),
    ({"prompt": "q", "responses": ["a", "b"], "order": [0, True]}, None, "order", "order"),
    ({"prompt": "q", "responses": ["a", "b"], "order": 3}, None, "type", "order"),
    ({"prompt": "q", "responses": ["a", "b"], "ranks": [1]}, None, "count", "ranks"),
    ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, None, "count", "scores"),
    ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 6]}, None, "range", "scores"),
    ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "scale": [1]}, None, "count", "scale"),
    ({"prompt": "q", "responses": ["a", "b"], "scores": [1, 2], "scale": [2, 2]}, None, "range", "scale[1]"),
    ({"prompt": "q", "responses": ["a", "b"]}, "scored", "missing", "responses"),
    ({"prompt": "q", "responses": [], "scores": []}, None, "missing", "responses"),
    ({"prompt": "q", "response": "a", "score": {"chosen": 3}}, None, "type", "score"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "confidence": 2}, None, "range", "confidence"),
    ({"prompt": "q", "completion": "a", "label": "so so"}, None, "choice", "label"),
    ({"prompt": "q", "completion": "a", "label": 2}, None, "type", "label"),
    ({"prompt": "q", "reward": 0.5}, None, "type", "reward"),
    ({"prompt": "q", "verifiers": []}, None, "missing", "verifiers"),
    ({"chosen": "a", "rejected": "b"}, None, "missing", "prompt"),
    ({"prompt": "q", "verifiers": 3}, None, "type", "verifiers"),
    ({"prompt": "q", "verifiers": [{"weight": 1}]}, None, "missing", "verifiers[0].name"),
    ({"messages": [Q], "signal": {"type": "vote"}}, None, "choice", "signal.type"),
    ({"messages": [Q], "signal": {"type": "sft", "responses": ["a", "b"]}}, None, "count", "responses"),
    ({"messages": [Q], "signal": {"type": "rating", "responses": ["a", "b"], "order": "A>B"}}, None, "missing", "responses"),
    ({"messages": [Q], "label": 1, "signal": {"type": "label", "response": "a", "label": 0}}, None, "choice", "label"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "name", "problem", "field"), BAD)
def test_complaints_name_the_field(row, name, problem, field) -> None:
    error = complaint(row, name)
    assert (error.problem, error.field) == (problem, field), str(error)


def test_misspelt_field_is_suggested() -> None:
    error = complaint({"promt": "q", "chosen": "a", "rejected": "b"}, "pairs")
    assert error.fix == "add it, or rename yours (promt -> prompt)"
    assert "promt, chosen, rejected" in error.found


# ----------------------------------------------------------------------------------------------
# recognition


def test_sniff_reports_why() -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3 + [{"prompt": "q", "response": "a"}, {"x": 1}]
    found = sniff(rows)
    assert found.name == "pairs"
    assert found.reason == "pairs: 3 of 5 sampled rows have rejected; 1 look like prompt_response"


def test_sniff_of_nothing_known() -> None:
    for rows, found, nearest in (
        ([{"x": 1, "y": 2}], "fields x, y", "prompt + response (prompt_response); messages (messages)"),
        ([], "fields none", "prompt + response (prompt_response); messages (messages)"),
        ([{"label": "t", "mood": 1}], "fields label, mood", "text + label (classification)"),
        ([{"image": "a.png"}], "fields image", "image + label (pictures)"),
        ([{"rejected": None, "src": ["q"]}], "fields rejected, src", "src + tgt (erniekit)"),
    ):
        with pytest.raises(DataError) as caught:
            sniff(rows, path="a.jsonl")
        assert caught.value.found == found
        assert nearest in caught.value.fix
        assert len(caught.value.english) < 400  # one that can be read


def test_a_row_of_another_format_is_refused() -> None:
    with pytest.raises(DataError, match="found pairs, expected prompt, as most rows"):
        read({"prompt": "q", "chosen": "a", "rejected": "b"}, FORM["prompt"], WHERE, FORMATS)
    text_only = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    # one reader, so no contradiction
    assert read(text_only, FORM["vqa"], WHERE, FORMATS).messages == (Q, A)


def test_families() -> None:
    assert choose("auto") == FORMATS
    assert {form.name for form in choose("erniekit")} == {"erniekit", "erniekit_dpo", "erniekit_vl"}
    assert choose("pairs") == (FORM["pairs"],)
    assert match({"question": "q", "chosen": "a", "rejected": "b"}, choose("alpaca")) == FORM["pairs"]
    with pytest.raises(ValueError, match=r"format \('alpacca'\) must be one of auto, canonical"):
        choose("alpacca")


# ----------------------------------------------------------------------------------------------
# fuzzing

ROWS = (
    [row for _, row, _ in SFT]
    + PAIRS
    + RANKED
    + RATED
    + [VL, {"image": "a", "conversations": LLAVA}, {"text": "t", "label": "x"}]
)
ROWS += [{"prompt": "q", "reward": {"type": "bbox", "answer": [1], "evidence": [{}]}, "tools": "[]", "videos": ["v"]}]
NAMES = sorted(
    {key for row in ROWS for key in row}
    | {"role", "content", "from", "value", "type", "text", "tag", "image", "loss", "rank"}
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from(["<image>", "<video>", "user", "assistant", "A>B", "mask", "no_mask", "sft", "pair", "", "[{}]"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(NAMES), v, max_size=3), max_leaves=6
)


def mutate(value, draw):
    """One random change somewhere inside."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        action = draw(st.sampled_from(["deeper", "deeper", "drop", "double"]))
        if action == "deeper":
            value[key] = mutate(value[key], draw)
        elif action == "drop":
            del value[key]
        elif isinstance(value, list):
            value.append(value[key])
        else:
            value[draw(st.sampled_from(NAMES))] = value[key]
        return value
    return draw(VALUES)


@settings(max_examples=int(os.environ.get("ERNIE_TUNE_FUZZ", "300")), deadline=None)
@given(st.data())
def test_mutated_rows_give_a_record_or_a_placed_error(data) -> None:
    row = {"": copy.deepcopy(data.draw(st.sampled_from(ROWS)))}
    for _ in range(data.draw(st.integers(1, 4))):
        row[""] = mutate(row[""], data.draw)
    if not isinstance(row[""], dict):
        return
    own = match(row[""])
    for form in {own or FORM["messages"], data.draw(st.sampled_from(FORMATS))}:
        outcome = outcome_of(row[""], form)
        if isinstance(outcome, Record):
            assert_consistent(outcome)
            continue
        assert str(outcome).startswith("data/train.jsonl:7: ")
        assert outcome.chinese.startswith("data/train.jsonl:7：")
        assert "\n" not in str(outcome)


def outcome_of(row, form) -> Record | DataError:
    try:
        return read(row, form, WHERE)
    except DataError as error:
        return error


def assert_consistent(record: Record) -> None:
    """What every trainer relies on."""
    ends = {"sft": ("assistant",), "text": ("text",)}.get(record.signal, ("user", "tool"))
    assert record.messages[-1]["role"] in ends
    for i in range(-1, len(record.candidates)):
        messages, images, videos = record.dialogue(i) if i >= 0 else (record.messages, record.images, record.videos)
        texts = "".join(message["content"] + message.get("reasoning_content", "") for message in messages)
        assert (count_tags(texts, "<image>"), count_tags(texts, "<video>")) == (len(images), len(videos))
        assert i < 0 or messages[-1]["role"] == "assistant"
    assert all(0 <= candidate.score <= 1 for candidate in record.candidates if candidate.score is not None)

"""Files in every shape people really have: line numbers, encodings, laziness, dataset_info.json,
sampling.
"""

import json
import os
import pickle
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_tune.data.readers.fields import Where
from ernie_tune.data.records import DataError, Record
from ernie_tune.data.sources import load_dataset, sample, split_paths


def row(i):
    return {"prompt": f"问题 {i}", "response": f"答 {i}"}


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def jsonl(rows):
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def prompts(data):
    return [data[i].messages[0]["content"] for i in range(len(data))]


def error_of(data, i) -> DataError:
    with pytest.raises(DataError) as caught:
        data[i]
    return caught.value


# ----------------------------------------------------------------------------------------------
# text files

LINES = [json.dumps(row(i), ensure_ascii=False) for i in range(3)]
TEXTS = {
    "a.jsonl": "\n".join(LINES),
    "crlf.jsonl": "\r\n".join(LINES) + "\r\n",
    "bom.jsonl": "\ufeff" + "\n".join(LINES),
    "blank.jsonl": "\n\n" + "\n \n\n".join(LINES) + "\n\n",
    "list.json": json.dumps([row(i) for i in range(3)], ensure_ascii=False, indent=2),
    # ERNIEKit ships lists under this name
    "list.jsonl": "\ufeff \n" + json.dumps([row(i) for i in range(3)]),
    "lines.json": "\n".join(LINES),
    "a.csv": "prompt,response\r\n" + "".join(f"问题 {i},答 {i}\r\n" for i in range(3)),
    "quoted.csv": "\ufeffprompt,response\n" + "".join(f'"问题 {i}","答 {i}"\n\n' for i in range(3)),
    "a.tsv": "prompt\tresponse\n" + "".join(f"问题 {i}\t答 {i}\n" for i in range(3)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_files(tmp_path, name) -> None:
    data = load_dataset(write(tmp_path / name, TEXTS[name]))
    assert prompts(data) == ["问题 0", "问题 1", "问题 2"]
    assert [record.messages[1]["content"] for record in data] == ["答 0", "答 1", "答 2"]
    assert data[-1].messages == data[2].messages
    with pytest.raises(IndexError):
        data[3]
    assert sorted(os.listdir(tmp_path)) == [name]  # nothing is written beside the user's data


def test_line_numbers(tmp_path) -> None:
    def lines(name, text):
        return [record.meta.line for record in load_dataset(write(tmp_path / name, text))]

    assert lines("a.jsonl", TEXTS["blank.jsonl"]) == [3, 6, 9]
    assert lines("b.json", TEXTS["list.json"]) == [2, 6, 10]
    assert lines("c.csv", 'prompt,response\n"two\nlines",a\n\nq,a\n') == [2, 5]


def test_csv_cells(tmp_path) -> None:
    data = load_dataset(write(tmp_path / "a.csv", 'text,label,note\n"a, ""b""\nc",good,\n'))
    assert data[0].messages[0]["content"] == 'a, "b"\nc'
    # an empty cell is absent
    assert (data[0].messages[1]["content"], data[0].meta.extra) == ("good", {})


def test_a_bad_row_is_named_and_the_others_still_read(tmp_path) -> None:
    bad = [
        "{",
        "[1]",
        '{"prompt": "\\ud800", "response": "a"}',
        '{"prompt": "q"}',
        "[" * 100000,
        '{"a": ' + "9" * 5000 + "}",
    ]
    path = write(tmp_path / "a.jsonl", "\n".join([LINES[0], *bad, LINES[1]]))
    data = load_dataset(path)
    assert prompts(data.select([0, 7])) == ["问题 0", "问题 1"]
    problems = ["json", "json", "json", "mixed", "json", "json"]
    for i, problem in enumerate(problems, 1):
        error = error_of(data, i)
        assert (error.path, error.line, error.problem) == (path, i + 1, problem)


def test_encodings(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES[0].encode() + b"\n" + LINES[1].encode("gb18030"))
    error = error_of(load_dataset(str(path)), 1)
    assert (error.line, error.problem) == (2, "utf8")
    assert error.found.startswith("byte 0x")
    with pytest.raises(
        DataError, match=r"found UTF-16LE, expected rows: .*; fix: iconv -f UTF-16 -t UTF-8 .*b.jsonl > .*b.utf8.jsonl"
    ):
        load_dataset(write(tmp_path / "b.jsonl", LINES[0], "utf-16"))


def test_lists_must_be_whole(tmp_path) -> None:
    for name, text, line in (
        ("cut.json", '[\n{"prompt": "q", "response": "a"},\n{"pro', 3),
        ("more.json", '[{"prompt": "q"}]\n[]', 1),
    ):
        with pytest.raises(DataError) as caught:
            load_dataset(write(tmp_path / name, text))
        assert (caught.value.line, caught.value.problem) == (line, "json")


def test_csv_complaints(tmp_path) -> None:
    error = error_of(load_dataset(write(tmp_path / "a.csv", "prompt,response\nq,a\nq,a,b\n")), 1)
    assert (error.line, error.found) == (3, "3 cells")
    for name, text in (("b.csv", "text,text\na,b\n"), ("c.csv", "text,label\na\rb,c\n")):
        with pytest.raises(DataError, match="a table with the cells of its header"):
            load_dataset(write(tmp_path / name, text))


def test_empty_files(tmp_path) -> None:
    for name, text in (("a.jsonl", "\n"), ("b.json", "[]"), ("c.csv", "text,label\n"), ("d.csv", "")):
        with pytest.raises(DataError, match="found no rows, expected at least one row"):
            load_dataset(write(tmp_path / name, text))


def test_a_file_that_changes_is_noticed(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", TEXTS["a.jsonl"])
    data = load_dataset(path)
    write(tmp_path / "a.jsonl", TEXTS["a.jsonl"] + " ")
    assert error_of(data, 0).problem == "changed"


def test_rows_stay_on_disk(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl({"prompt": "x" * 10_000, "response": "a"} for _ in range(200)))
    data = load_dataset(path)
    assert len(pickle.dumps(data)) < 20_000  # 2 MB of text, 24 bytes a row of index
    assert pickle.loads(pickle.dumps(data))[199].messages[1]["content"] == "a"


@settings(max_examples=int(os.environ.get("ERNIE_TUNE_FUZZ", "150")), deadline=None)
@given(st.sampled_from(sorted(TEXTS)), st.data())
def test_damaged_files_give_records_or_placed_errors(name, data) -> None:
    raw = bytearray(TEXTS[name].encode())
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        raw[start : start + data.draw(st.integers(0, 20))] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"\n", b"\r", b'"', b"[", b","])
        )
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, name)
        Path(path).write_bytes(raw)
        for outcome in outcomes(path):
            assert isinstance(outcome, Record) or str(outcome).startswith(path)
            assert "\n" not in str(outcome) or isinstance(outcome, Record)


def outcomes(path) -> list[Record | DataError]:
    def attempt(action):
        try:
            return action()
        except DataError as error:
            return error

    opened = attempt(lambda: load_dataset(path))
    return [opened] if isinstance(opened, DataError) else [attempt(lambda i=i: opened[i]) for i in range(len(opened))]


# ----------------------------------------------------------------------------------------------
# choosing files


def test_folders_patterns_and_lists(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    for name, i in (("b.jsonl", 1), ("a.jsonl", 0), ("sub/c.jsonl", 2)):
        write(tmp_path / name, jsonl([row(i)]))
    write(tmp_path / "dataset_info.json", "{}")
    write(tmp_path / "notes.txt", "?")
    root = str(tmp_path)
    assert prompts(load_dataset(root)) == ["问题 0", "问题 1"]
    assert prompts(load_dataset(root + "/**/*.jsonl")) == ["问题 0", "问题 1", "问题 2"]
    assert prompts(load_dataset([tmp_path / "b.jsonl", tmp_path / "a.jsonl"])) == ["问题 1", "问题 0"]
    assert prompts(load_dataset(f"{root}/b.jsonl, {root}/a.jsonl")) == ["问题 1", "问题 0"]
    write(tmp_path / "x,y.jsonl", jsonl([row(9)]))
    assert split_paths(f"{root}/x,y.jsonl") == [f"{root}/x,y.jsonl"]
    for missing in (f"{root}/no.jsonl", f"{root}/*.csv"):
        with pytest.raises(DataError, match="expected an existing file, folder or pattern"):
            load_dataset(missing, dataset_dir=root + "/sub")


def test_each_file_has_its_own_format(tmp_path) -> None:
    write(tmp_path / "a.jsonl", jsonl([row(0)]))
    write(tmp_path / "b.jsonl", jsonl([{"prompt": "q", "chosen": "a", "rejected": "b"}] * 2))
    data = load_dataset(str(tmp_path))
    assert [record.signal for record in data] == ["sft", "pair", "pair"]
    first, second = data.report.splitlines()
    assert first.endswith("a.jsonl: 1 row, prompt_response: 1 of 1 sampled rows have prompt + response")
    assert second.endswith("b.jsonl: 2 rows, pairs: 2 of 2 sampled rows have rejected")


def test_sampling_suffix(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(row(i) for i in range(10)))
    few = prompts(load_dataset(path + "#4"))
    assert len(set(few)) == 4
    assert few == sorted(few) == prompts(load_dataset(path + "#4"))
    assert few != prompts(load_dataset(path + "#4", seed=1))
    assert sorted(prompts(load_dataset(path + "#20"))) == sorted(prompts(load_dataset(path)) * 2)
    odd = write(tmp_path / "b#3", jsonl([row(0)] * 5))
    assert len(load_dataset(odd)) == 5  # a file of this very name


def test_sample_takes_every_row_equally_often() -> None:
    assert sample(5, None, 0).tolist() == [0, 1, 2, 3, 4]
    counts = np.bincount(sample(5, 13, 0))
    assert (counts.sum(), set(counts.tolist())) == (13, {2, 3})
    assert sample(5, 0, 0).tolist() == []


def test_slices_and_selections_are_lazy_views(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl(row(i) for i in range(10)))
    data = load_dataset(path)
    assert prompts(data[2:8:3]) == ["问题 2", "问题 5"]
    assert prompts(data.select([7, 7, 0])[1:]) == ["问题 7", "问题 0"]


# ----------------------------------------------------------------------------------------------
# settings


def test_told_format_and_families(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([{"prompt": "q", "response": "a", "score": 3}]))
    assert load_dataset(path)[0].signal == "rating"
    data = load_dataset(path, format="prompt_response")
    assert (data[0].signal, data[0].meta.extra) == ("sft", {"score": 3})
    assert data.report.endswith("prompt_response, as told")
    with pytest.raises(ValueError, match="format"):
        load_dataset(path, format="nonsense")


def test_signals(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([{"prompt": "q", "response": "a", "score": 3}]))
    error = error_of(load_dataset(path, signals=("sft", "prompt")), 0)
    assert (
        str(error)
        == f"{path}:1: signal: found rating (read as scored: scored answers), expected one of sft (an answer to learn), prompt (a question "
        "without an answer); fix: set train_dataset_type: prompt_response, which reads it so"
    )


ASKING = ("verifiable", "prompt")
U, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def test_an_answer_to_learn_may_be_one_to_check_by(tmp_path) -> None:
    """The commonest rows of checkable questions: who learns takes the answer, who asks checks by
    it, whenever that is known.
    """
    path = write(tmp_path / "a.jsonl", jsonl([{"prompt": "What is 2+2?", "answer": "4"}]))
    opened = load_dataset(path)
    assert opened[0].signal == "sft"
    for data in (load_dataset(path, signals=ASKING), opened.serving(ASKING), opened[:1].serving(ASKING)):
        record = data[0]
        assert (record.signal, record.reward.answer, record.prompt[0]["content"]) == ("verifiable", "4", "What is 2+2?")
    assert opened.serving(()) is opened
    told = error_of(load_dataset(path, signals=("pair",)), 0)
    assert "which reads it so" not in str(told)


@pytest.mark.parametrize(
    ("row", "signal", "answer", "asked"),
    [
        ({"prompt": "q", "answer": "4"}, "verifiable", "4", "q"),
        ({"prompt": "q", "completion": "a"}, "prompt", None, "q"),
        ({"prompt": "q", "target": 44, "nums": [1, 2]}, "prompt", None, "q"),
        ({"prompt": "q", "response": "a", "reasoning": "since so"}, "prompt", None, "q"),
        ({"prompt": "q", "answer": "4", "score": 3, "label": 1, "train": 1}, "verifiable", "4", "q"),
        ({"prompt": "q", "text": "t", "label": "cat"}, "prompt", None, "q"),
        ({"prompt": [U], "question": "Q", "answer": "4", "task": "maths"}, "verifiable", "4", "q"),
        ({"messages": [{"role": "user", "content": "m"}, A], "prompt": [U], "solution": "4"}, "verifiable", "4", "q"),
        ({"problem": "q", "solution": "Two and two make 4.", "answer": "4"}, "verifiable", "4", "q"),
        ({"instruction": "q", "input": "more", "output": "a"}, "prompt", None, "q\nmore"),
        ({"messages": [U]}, "prompt", None, "q"),
    ],
)
def test_who_asks_reads_rows_as_questions(row, signal, answer, asked) -> None:
    """Columns beside a question, whatever their names, are for the functions that judge."""
    record = load_dataset([row], signals=ASKING)[0]
    found = record.reward.answer if record.reward else None
    assert (record.signal, found, record.prompt[-1]["content"]) == (signal, answer, asked)
    assert record.meta.row == row
    assert record.meta.asked_as_text == (not ({"messages"} & {*row}) and isinstance(row.get("prompt", ""), str))


@pytest.mark.parametrize(
    ("row", "signal"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pair"),
        ({"prompt": "q", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}]}, "rating"),
        ({"messages": [U, A]}, "sft"),
    ],
)
def test_what_compares_or_shows_answers_is_nothing_to_ask(row, signal) -> None:
    assert f"found {signal} (" in str(error_of(load_dataset([row], signals=ASKING), 0))


def test_who_asks_and_learns_judgements_reads_both() -> None:
    rows = [{"prompt": "q", "answer": "4"}, {"prompt": "q", "answer": "a", "score": 3}]
    assert load_dataset(rows[:1], signals=(*ASKING, "rating"))[0].signal == "verifiable"
    assert load_dataset(rows[1:], signals=(*ASKING, "rating"))[0].signal == "rating"
    assert load_dataset(rows[1:], signals=(*ASKING, "label"))[0].signal == "verifiable"


def test_columns_that_some_rows_lack() -> None:
    rows = [{"prompt": "q", "answer": "4"}, {"prompt": "p", "answer": None, "level": 2}, {"prompt": [U]}]
    assert [record.signal for record in load_dataset(rows, signals=ASKING)] == ["verifiable", "prompt", "prompt"]


def test_classification_serves_verifiable_training(tmp_path) -> None:
    path = write(tmp_path / "a.csv", "text,label\nt,good\n")
    assert load_dataset(path, signals=["verifiable"])[0].reward.answer == "good"
    assert load_dataset(path, signals=["sft"])[0].signal == "sft"


def test_column_map(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([{"frage": "q", "antwort": "a", "note": 1}]))
    with pytest.raises(DataError, match=r'"prompt": "frage", "response": "antwort"'):
        load_dataset(path)
    record = load_dataset(path, columns={"prompt": "frage", "response": "antwort"})[0]
    assert ([m["content"] for m in record.messages], record.meta.extra) == (["q", "a"], {"note": 1})


def test_media_dir(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", jsonl([{"prompt": "q", "response": "a", "image": "a.png"}]))
    assert load_dataset(path)[0].images == (str(tmp_path / "a.png"),)
    assert load_dataset(path, media_dir="/media")[0].images == ("/media/a.png",)
    assert Where(path, 1).media_dir == ""


# ----------------------------------------------------------------------------------------------
# dataset_info.json


@pytest.fixture
def info(tmp_path):
    """Both dialects in one file; LLaMA-Factory's entries follow the examples of its own data
    folder.
    """
    write(tmp_path / "alpaca.json", json.dumps([{"instruction": "i", "input": "x", "output": "o"}]))
    write(tmp_path / "wiki.json", json.dumps([{"question": "q", "answer": "a", "label": 1}]))
    chat = [{"who": "me", "says": "q"}, {"who": "it", "says": "a"}]
    write(
        tmp_path / "chat.json",
        json.dumps([{"talk": chat, "img": ["a.png"], "better": chat[1], "worse": {"who": "it", "says": "b"}}]),
    )
    write(tmp_path / "ek.jsonl", jsonl([{"src": ["q"], "tgt": ["a"]}] * 4))
    tags = {"role_tag": "who", "content_tag": "says", "user_tag": "me", "assistant_tag": "it"}
    entries = {
        "identity": {"file_name": "alpaca.json"},
        "wikiqa": {"file_name": "wiki.json", "columns": {"prompt": "question", "response": "answer"}},
        "mllm": {"file_name": "chat.json", "formatting": "sharegpt", "columns": {"messages": "talk", "images": "img"}, "tags": tags},
        "dpo": {"file_name": "chat.json", "formatting": "sharegpt", "ranking": True, "tags": tags,
                "columns": {"messages": "start", "chosen": "better", "rejected": "worse"}},
        "mine": {"path": "./ek.jsonl", "prob": "0.3", "type": "erniekit"},
        "few": {"file_name": "ek.jsonl", "num_samples": 2},
        "hub": {"hf_hub_url": "x/y"}, "broken": 3, "typo": {"file_name": "ek.jsonl", "columns": []},
        "odd": {"file_name": "ek.jsonl", "columns": {"prompt": 3}},
    }  # fmt: skip
    write(tmp_path / "dataset_info.json", json.dumps(entries))
    return str(tmp_path)


def contents(name, info):
    record = load_dataset(name, dataset_dir=info)[0]
    return [message["content"] for message in record.messages]


def test_dataset_info(info) -> None:
    assert contents("identity", info) == ["i\nx", "o"]
    # unmapped columns, here a label, are not for the readers
    assert contents("wikiqa", info) == ["q", "a"]
    assert load_dataset("wikiqa", dataset_dir=info)[0].meta.extra == {"label": 1}
    assert contents("mllm", info) == ["<image>q", "a"]
    assert contents("mine", info) == ["q", "a"]
    assert load_dataset("mine", dataset_dir=info).prob == 0.3
    assert load_dataset("identity", dataset_dir=info).prob is None
    assert [len(load_dataset(name, dataset_dir=info)) for name in ("few", "mine#3", "identity,wikiqa")] == [2, 3, 2]


def test_dataset_info_preference(info) -> None:
    # this entry maps a column that the file lacks
    error = error_of(load_dataset("dpo", dataset_dir=info), 0)
    assert (error.problem, error.field) == ("missing", "prompt")


def test_dataset_info_complaints(info) -> None:
    for name, text in (
        ("hub", "hub.file_name: found hf_hub_url, expected file_name or path"),
        ("broken", "broken: found 3, expected an object"),
        ("typo", r"typo.columns: found \[\], expected an object"),
        ("odd", r"odd.prompt: found 3, expected a string"),
        (
            "absent",
            r"absent: path: found nothing of this name in .*, and none of the data sets of .* \(identity, wikiqa",
        ),
    ):
        with pytest.raises(DataError, match=text):
            load_dataset(name, dataset_dir=info)


# ----------------------------------------------------------------------------------------------
# parquet


def test_parquet_without_pyarrow(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match="expected the package pyarrow; fix: pip install pyarrow, or save as jsonl"):
        load_dataset(write(tmp_path / "a.parquet", "PAR1"))

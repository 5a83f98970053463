"""`ernie-tune predict`: every row once and in order, however often it is cut short; n samples,
log-probabilities, bad rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import IMAGES, mixed_rows, processor, write_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.cli import predict
from ernie_tune.cli.main import main
from ernie_tune.data.sources import load_dataset
from ernie_tune.generate.bulk import in_order
from ernie_tune.generate.engine import Engine, Request

ROWS = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predict") / "model"
    AutoModel.from_config("tiny-a", seed=3).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", mixed_rows(ROWS)))


@pytest.fixture(scope="module")
def whole(model: Path, rows: Path) -> list[dict[str, Any]]:
    """What one run gives that nobody stops."""
    out = rows.with_name("whole.jsonl")
    assert main(["predict", str(model), str(rows), str(out), "--max_new_tokens", "3", "--rows", "7"]) == 0
    return read(out)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_is_answered_as_if_it_were_alone(whole: list[dict[str, Any]], model: Path, rows: Path) -> None:
    assert [line["row"] for line in whole] == list(range(1, ROWS + 1))
    assert [line["line"] for line in whole] == list(range(1, ROWS + 1))
    engine = Engine(AutoModel.from_pretrained(model), processor())
    given = mixed_rows(ROWS)
    for i in (0, 1, 17, 39):
        asked = Request(given[i]["messages"][:-1], given[i].get("images", ()))
        alone = engine.answer([asked], engine.params(max_new_tokens=3))[0][0]
        answer = whole[i]["answers"][0]
        assert (answer["content"], answer["answer_tokens"]) == (alone.content.strip(), len(alone.token_ids))
        assert answer["logp"] == pytest.approx(sum(alone.logps), abs=1e-4)
        assert whole[i]["reference"] == given[i]["messages"][-1]["content"], "kept, and not shown to the model"
        assert whole[i]["messages"] == given[i]["messages"][:-1]
    assert whole[0]["images"] == [str(IMAGES / "0000.png")]


def test_cut_short_again_and_again_it_is_the_same_file(
    whole: list[dict[str, Any]], model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, command = tmp_path / "out.jsonl", ["--max_new_tokens", "3", "--rows", "5"]
    started: list[int] = []
    real = in_order

    def dying(engine: Any, asked: Any, params: Any, batch: int, first: int) -> Any:
        started.append(first)
        for count, outcome in enumerate(real(engine, asked, params, batch, first)):
            if count == 9:
                raise KeyboardInterrupt
            yield outcome

    monkeypatch.setattr("ernie_tune.generate.bulk.in_order", dying)
    part = tmp_path / "out.jsonl.part"
    while not out.exists():
        code = main(["predict", str(model), str(rows), str(out), *command])
        assert code == (0 if out.exists() else 130)
        if part.exists():
            lines = part.read_bytes().splitlines(keepends=True)
            part.write_bytes(b"".join(lines) + lines[0][: len(lines[0]) // 2])  # what a kill leaves of a line
    assert started == [0, 9, 18, 27, 36]
    assert read(out) == [{**line, "answers": again["answers"]} for line, again in zip(whole, read(out), strict=True)]
    contents = [[a["content"] for a in line["answers"]] for line in whole]
    assert [[a["content"] for a in line["answers"]] for line in read(out)] == contents
    assert not part.exists()
    monkeypatch.setattr("ernie_tune.generate.bulk.in_order", lambda *a: pytest.fail("nothing is left to do"))
    assert main(["predict", str(model), str(rows), str(out), *command]) == 0


def test_answers_of_other_settings_are_not_mixed(model: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.jsonl"
    few = write_rows(tmp_path / "few.jsonl", mixed_rows(2))
    assert main(["predict", str(model), few, str(out), "max_new_tokens=2"]) == 0
    before = out.read_bytes()
    assert main(["predict", str(model), few, str(out), "max_new_tokens=3"]) == 1
    assert "max_new_tokens: 2 -> 3" in capsys.readouterr().err
    other = tmp_path / "model"
    shutil.copytree(model, other)
    AutoModel.from_config("tiny-a", seed=4).save_pretrained(other)
    original = Path(few).read_bytes()
    Path(few).write_bytes(original.replace(b"read", b"tell"))
    assert main(["predict", str(other), few, str(out), "max_new_tokens=2"]) == 1
    told = capsys.readouterr().err
    assert "model_fingerprint" in told
    assert "rows_sha256" in told
    assert out.read_bytes() == before
    (tmp_path / "out.jsonl").rename(tmp_path / "out.jsonl.part")
    (tmp_path / "out.jsonl.part").write_bytes(before.replace(b'"row": 2', b'"row": 3'))
    Path(few).write_bytes(original)
    assert main(["predict", str(model), few, str(out), "max_new_tokens=2"]) == 1
    assert "must be the answer to row 2" in capsys.readouterr().err


def test_somebodys_file_is_not_an_answer_of_other_settings(model: Path, rows: Path, capsys: Any) -> None:
    before = rows.read_bytes()
    assert main(["predict", str(model), str(rows), str(rows)]) != 0
    said = capsys.readouterr().err
    assert "is there, and predict did not write it; name another file" in said
    assert "delete" not in said
    assert rows.read_bytes() == before


def test_a_start_that_failed_is_in_nobodys_way(model: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["predict", str(model), str(rows), str(tmp_path / "out.jsonl"), "--max_new_tokens", "2"]
    assert main([*command, "--temperature", "-1"]) != 0
    assert main(command) == 0, capsys.readouterr().err
    assert len(read(tmp_path / "out.jsonl")) == ROWS


def test_samples_with_log_probabilities(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", mixed_rows(3))
    out = tmp_path / "out.jsonl"
    assert main(["predict", str(model), rows, str(out), "n=3", "max_new_tokens=4", "logprobs=true", "seed=7"]) == 0
    for line in read(out):
        assert len(line["answers"]) == 3
        for answer in line["answers"]:
            assert len(answer["logps"]) == len(answer["tokens"]) == answer["answer_tokens"]
            assert answer["logp"] == pytest.approx(sum(answer["logps"]))
    assert len({json.dumps(a) for line in read(out) for a in line["answers"]}) > 3, "samples differ"
    settings = json.loads((tmp_path / "out.jsonl.settings.json").read_text())
    assert (settings["temperature"], settings["seed"]) == (1.0, 7)


def test_a_row_that_cannot_be_asked_costs_no_other_its_answer(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Any] = mixed_rows(5)
    rows[3]["images"] = ["gone.png"]
    monkeypatch.chdir(tmp_path)  # a message cuts long paths, and how long this one is depends
    path = Path(write_rows(Path("rows.jsonl"), rows))
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:-3]
    path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "answers" / "out.jsonl"
    assert main(["predict", str(model), str(path), str(out), "max_new_tokens=2"]) == 1, "not every row was answered"
    found = read(out)
    assert ["error" in line for line in found] == [False, True, False, True, False]
    assert "rows.jsonl:2" in found[1]["error"]
    assert "gone.png" in found[3]["error"]
    for _ in range(2):  # and again, where nothing is left to do
        told = capsys.readouterr().err.splitlines()[-3:]
        assert "2 rows of 5 could not be asked" in told[0]
        assert [line.split(": ")[0].strip() for line in told[1:]] == ["rows.jsonl:2", "rows.jsonl:4"]
        assert main(["predict", str(model), str(path), str(out), "max_new_tokens=2"]) == 1


BAD = ("{", "3", "null", "[]", '{"a": 1}', '{"messages": []}', '{"messages": 3}', '{"messages": [{"role": "x", "content": "q"}]}',
       '{"messages": [{"role": "assistant", "content": "a"}]}', '{"messages": [{"role": "user", "content": "<image>"}]}',
       '{"messages": [{"role": "user", "content": "<image>"}], "images": ["no.png"]}',
       '{"messages": [{"role": "user", "content": "<image>"}], "images": ["rows.jsonl"]}',
       '{"messages": [{"role": "user", "content": "<image>"}], "images": ["http://127.0.0.1:1/x.png"]}',
       '{"messages": [{"role": "user", "content": "<video>"}], "videos": ["no.mp4"]}',
       json.dumps({"messages": [{"role": "user", "content": "long " * 9000}]}))  # fmt: skip


def test_any_row_without_an_answer_is_named(
    model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path(write_rows(Path("rows.jsonl"), mixed_rows(3)[1:]))
    path.write_text(path.read_text() + "\n".join(BAD) + "\n")
    for named in (len(BAD), 4):
        monkeypatch.setattr(predict, "_NAMED_ROWS", named)
        assert main(["predict", str(model), "rows.jsonl", "out.jsonl", "max_new_tokens=1"]) == 1
        told = capsys.readouterr().err.splitlines()
        at = next(i for i, line in enumerate(told) if f"{len(BAD)} rows of {len(BAD) + 2} could not be asked" in line)
        for number, line in enumerate(told[at + 1 : at + 1 + named], 3):
            assert line.startswith(f"  rows.jsonl:{number}: "), line
    assert told[-1] == f"  … and {len(BAD) - 4} more, as `error` in out.jsonl"


def test_a_picture_is_named_from_beside_the_answers(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(IMAGES / "0003.png", tmp_path / "data" / "a.png")
    row = {"messages": [{"role": "user", "content": "<image>what"}], "images": ["a.png"]}
    rows = load_dataset(write_rows(tmp_path / "data" / "rows.jsonl", [row]))
    named = predict._named(rows[0].images[0], tmp_path)
    assert (tmp_path / named).samefile(tmp_path / "data" / "a.png")
    assert predict._named("https://host/a.png", tmp_path) == "https://host/a.png"
    assert predict._named(b"bytes", tmp_path) is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "rows.jsonl"], "expected MODEL ROWS OUT.jsonl, got 2 words"),
        (["m", "r", "o", "--temprature", "1"], "unknown option 'temprature'; did you mean 'temperature'?"),
        (["m", "r", "o", "--n", "many"], "n (many) must be a whole number"),
        (["m", "r", "o", "--logprobs", "perhaps"], "logprobs (perhaps) must be true or false"),
        (["m", "r", "o", "--rows", "0"], "rows (0) must be at least 1"),
        (["m", "", "o"], "ROWS ('') must be a file"),
        (["m", "r", " "], "OUT (' ') must be a file"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: Any) -> None:
    assert main(["predict", *words]) == 2
    assert message in capsys.readouterr().err


def test_no_rows_and_no_file(model: Path, rows: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    assert main(["predict", str(model), str(tmp_path / "empty.jsonl"), str(tmp_path / "out.jsonl")]) == 1
    assert "empty.jsonl" in capsys.readouterr().err
    assert main(["predict", str(model), str(rows), str(tmp_path)]) == 1
    assert "must be a file, not a folder" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl"]


def test_a_model_that_is_not_there(tmp_path: Path, capsys: Any) -> None:
    assert main(["predict", str(tmp_path / "no"), "rows.jsonl", "out.jsonl"]) == 1
    assert "does not exist" in capsys.readouterr().err

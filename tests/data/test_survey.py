"""data/survey.py and batching.Dropped: every row looked at once before training, each told once,
and giving up only when there is nothing.
"""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ernie_tune.data.batching import BatchStream, Dropped, Encoder, dealt_again, most_tokens
from ernie_tune.data.mixing import Mixture, Shard
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import DataError
from ernie_tune.data.sources import Dataset, load_dataset
from ernie_tune.data.survey import survey
from ernie_tune.data.units import UnitEncoder

TINY = Processor.bundled("tiny")
SHORT = [{"prompt": f"q{i}", "response": "a"} for i in range(3)]
LONG = [{"prompt": f"l{i}", "response": "word " * 300 + "x"} for i in range(30)]


def data(folder: Path, *rows: dict[str, Any]) -> Dataset:
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_dataset(str(folder / "x.jsonl"))


def stream(rows: Dataset, rank: int = 0, size: int = 1, seed: int = 42, limit: int = 64) -> BatchStream:
    return BatchStream(Shard(Mixture([rows], seed=seed), rank, size), Encoder(TINY, limit), rows=2, accumulation=1)


@pytest.mark.parametrize(("good", "bad"), [(1, 3), (2, 3), (2, 18), (1, 20)])
def test_training_goes_on_while_any_row_can_be_used(good: int, bad: int, tmp_path: Path) -> None:
    rows = data(tmp_path, *SHORT[:good], *LONG[:bad])
    for seed in range(3):
        made = stream(rows, seed=seed)
        assert len(list(islice(made, 60))) == 60
        assert list(made.dropped.count.values()) == [bad]  # each row once, whatever the passes


def test_a_rank_waits_for_a_row_that_other_ranks_get(tmp_path: Path) -> None:
    rows = data(tmp_path, SHORT[0], *LONG[:7])
    for rank in range(4):
        assert len(list(islice(stream(rows, rank, 4), 10))) == 10


def test_giving_up_when_a_whole_pass_held_no_usable_row(tmp_path: Path) -> None:
    rows = data(tmp_path, *LONG[:5])
    with pytest.raises(
        ValueError, match=r"no row of the training data can be used: dropped 5 row\(s\): longer than max"
    ):
        next(iter(stream(rows)))
    with pytest.raises(
        ValueError, match=r"dropped 5 row\(s\): longer than max_seq_len \(64 tokens\), first at .*x.jsonl:1"
    ):
        survey([rows], Encoder(TINY, 64))
    with pytest.raises(ValueError, match="there is none"):
        survey([], Encoder(TINY, 64))


def test_counts_go_on_after_a_resume_and_over_ranks(tmp_path: Path) -> None:
    rows = data(tmp_path, *SHORT[:2], *LONG[:4])
    made = stream(rows)
    list(islice(made, 9))
    assert list(made.dropped.count.values()) == [4]
    state = json.loads(json.dumps(made.state_dict()))
    again = stream(rows)
    again.load_state_dict(state)
    list(islice(again, 9))
    assert list(again.dropped.count.values()) == [4]
    ranks = [stream(rows, rank, 2) for rank in range(2)]
    for one in ranks:
        list(islice(one, 12))
    states = [json.loads(json.dumps(one.state_dict())) for one in ranks]
    assert list(dealt_again(states, 0, 1)["dropped"].values()) == [4]
    old = {"dropped": {"too long": 7}}  # of a run before rows were told apart
    assert Dropped.of(old).count == {"too long": 7}


def test_the_survey_says_what_training_will_do(tmp_path: Path) -> None:
    silent = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train": False}]}
    cut = {"prompt": "q", "response": "<think> and"}
    note = {"prompt": "q", "response": "a", "Frage": "x"}
    rows = data(tmp_path, *SHORT, *LONG[:2], silent, cut, note)
    encoder = Encoder(TINY, 64)
    found = survey([rows], encoder)
    dropped = Dropped()
    kept = [encoder(row, dropped) is not None for row in rows]
    assert (found.seen, found.usable) == (8, sum(kept)) == (8, 4)
    assert found.dropped.count == dropped.count
    assert found.dropped.first == dropped.first
    said = [(str(line), level) for line, level in found.lines()]
    assert said[0] == ("training data: 4 of 8 rows can be used", "WARNING")
    assert (f"dropped 2 row(s): longer than max_seq_len (64 tokens), first at {tmp_path}/x.jsonl:4", "WARNING") in said
    assert any("Frage (1), which no reader takes" in line for line, _ in said)
    part = survey([rows], encoder, limit=4)
    assert str(next(iter(part.lines()))[0]) == "training data: 3 of 4 rows can be used; 4 more were not looked at"
    fine = survey([data(tmp_path, *SHORT)], encoder)
    assert [(str(line), level) for line, level in fine.lines()] == [("training data: 3 of 3 rows can be used", "INFO")]


@pytest.mark.parametrize("limit", [20, 40, 64, 90, 200, 9000])
@pytest.mark.parametrize("truncation", ["delete", "left", "right"])
def test_usable_is_what_encoding_gives(limit: int, truncation: str, tmp_path: Path) -> None:
    Image.new("RGB", (150, 90)).save(tmp_path / "p.png")
    Image.new("RGB", (60, 60)).save(tmp_path / "c.gif", save_all=True, append_images=[Image.new("RGB", (60, 60), 5)])
    call = {"function": {"name": "f", "arguments": {"x": "中文" * 9}}}
    rows = data(
        tmp_path,
        *SHORT, LONG[0], {"prompt": "中文" * 20, "response": "好"}, {"prompt": "q", "response": "a", "weight": 0},
        {"prompt": "<image>q", "response": "a", "images": ["p.png"]}, {"prompt": "q", "response": "a", "videos": ["c.gif"]},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}], "tools": [{"name": "f"}]},
        {"prompt": "q", "response": "a", "mode": "think"},
    )  # fmt: skip
    encoder = Encoder(TINY, limit, truncation)
    for row in rows:
        a, b = Dropped(), Dropped()
        assert encoder.usable(row, a) == (encoder(row, b) is not None), row
        assert a.count == b.count
        exact = TINY.encode(row.messages, row.images, row.videos, tools=row.tools)
        assert most_tokens(row, None, TINY) >= exact.num_tokens
        assert TINY.measure(row.messages, row.images, row.videos, tools=row.tools) == (
            exact.num_tokens,
            int(exact.trained_L.argmax()),
        )
    judged: list[dict[str, Any]] = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q" * 60, "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "word " * 50},
        {"prompt": "<image>q", "chosen": "a", "rejected": "<think>b</think>c", "images": ["p.png"]},
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "a", "loss": False}], "rejected": "b"},
        {"prompt": "q", "response": "a", "label": True},
        {"prompt": "q", "responses": ["a", "b"], "scores": [3, 3]},
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, 1]},
    ]
    pairs = [data(tmp_path, row)[0] for row in judged]
    for signals in (("pair", "rating", "ranking", "label"), ("pair",)):
        units = UnitEncoder(TINY, limit, limit - 10, truncation, signals=signals)
        for row in pairs:
            a, b = Dropped(), Dropped()
            assert units.usable(row, a) == (units(row, b) is not None), row
            assert a.count == b.count


def test_a_lost_picture_stops_before_the_first_step(tmp_path: Path) -> None:
    rows = data(tmp_path, *SHORT, {"prompt": "q", "response": "a", "images": ["no.png"]})
    with pytest.raises(ValueError, match=r"x.jsonl:4: image '.*no.png' must exist"):
        survey([rows], Encoder(TINY, 64))
    with pytest.raises(DataError, match=r"x.jsonl:4: foto: found 'no.png'"):
        survey([data(tmp_path, *SHORT, {"prompt": "q", "response": "a", "foto": "no.png"})], Encoder(TINY, 64))

"""What may be judged: rows wherever they lie with their pictures, and nothing else from there; what
`predict` wrote, whatever became of its lines.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.tiny_runs import IMAGES, write_rows

from ernie_tune.config.language import in_language
from ernie_tune.ui import judging
from ernie_tune.ui.asking import ModelServers
from ernie_tune.ui.jobs import Jobs
from ernie_tune.ui.judgements import Judgement, rows_of
from ernie_tune.ui.questions import questions
from ernie_tune.ui.workspace import Workspace

ASKED = [{"role": "user", "content": "<image>which digit"}]
TWO = [{"content": "3"}, {"content": "5"}]
DATA = "data:image/png;base64," + base64.b64encode((IMAGES / "0003.png").read_bytes()).decode()


@pytest.fixture
def away(tmp_path: Path) -> Path:
    """A folder of rows and pictures that is nobody's workspace, and one with other pictures."""
    for name in ("rows/pictures", "elsewhere", "work"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("rows/pictures/a.png", "rows/private.png", "elsewhere/b.png"):
        shutil.copy(IMAGES / "0003.png", tmp_path / name)
    return tmp_path / "rows"


def session(place: Workspace, rows: str, model: str = "") -> judging.Session:
    return judging.begin(
        place, ModelServers(Jobs(place.own / "jobs"), place.root), rows, model, "out", "ann", "pick", 2
    )


@pytest.mark.parametrize("kind", ["beside", "below", "above", "whole", "link"])
@pytest.mark.parametrize("model", ["", "nano"])
def test_rows_of_the_command_line_are_judged_with_their_pictures(away: Path, kind: str, model: str) -> None:
    (away / "link.png").symlink_to(away.parent / "elsewhere" / "b.png")
    named = {"beside": "private.png", "below": "pictures/a.png", "above": "../elsewhere/b.png", "link": "link.png",
             "whole": str(away.parent / "elsewhere" / "b.png")}[kind]  # fmt: skip
    row = {"messages": ASKED, "images": [named], **({} if model else {"row": 1, "answers": TWO})}
    file = Path(write_rows(away / "rows.jsonl", [row]))
    place = Workspace(away.parent / "work", [file])
    now = session(place, str(file), model)
    assert now.question is not None
    assert now.told == []
    assert "base64" in now.question_html()
    other = Workspace(away.parent / "work")  # started without these rows
    with pytest.raises(ValueError, match=r"path \(.*rows.jsonl\) must lie in the workspace \(work\)"):
        session(other, str(file))


def test_a_browser_gets_no_other_picture_of_that_folder(away: Path) -> None:
    file = Path(write_rows(away / "rows.jsonl", [{"messages": ASKED, "images": ["pictures/a.png"]}]))
    place = Workspace(away.parent / "work", [file])
    place.uploads.mkdir(parents=True)
    others = [str(away / "private.png"), str(away.parent / "elsewhere" / "b.png"), "/etc/passwd", str(away)]
    sent = Path(write_rows(place.uploads / "x.jsonl", [{"messages": ASKED, "images": [name]} for name in others]))
    session(place, str(file), "nano")
    found, told = questions(sent, place)
    assert (found, len(told)) == ({}, 4)
    assert all("must lie in the workspace (work)" in str(why) for why in told)
    for name in (*others, str(away / "pictures")):
        assert not place.may_show(name), name
        with pytest.raises(ValueError, match="must lie in the workspace"):
            place.inside(name)
    assert place.may_show(str(away / "pictures" / "a.png"))
    with pytest.raises(ValueError, match="must lie in the workspace"):
        place.inside(str(away / "pictures" / "a.png"))  # to be shown, for nothing else
    # nor what is no file of rows' own making: a device would never end
    Path(write_rows(file, [{"messages": ASKED, "images": ["/dev/zero"]}]))
    assert questions(place.inside(str(file)), place)[0] == {}


def test_what_keeps_all_rows_from_being_judged_is_said(away: Path) -> None:
    place = Workspace(away.parent / "work")
    rows = [{"messages": ASKED, "images": [str(away / "private.png")]}] * 3
    write_rows(place.root / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"can be judged: .*rows\.jsonl:1: picture .*private\.png must lie") as error:
        session(place, "rows.jsonl", "nano")
    assert "(and 2 more)" in str(error.value)
    assert "另有 2 行" in str(in_language(error.value, "zh"))
    (place.root / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty"):
        session(place, "empty.jsonl", "nano")


def test_rows_that_only_a_model_can_answer_are_counted(away: Path) -> None:
    place = Workspace(away.parent / "work")
    judged = {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
    write_rows(place.root / "rows.jsonl", [judged, judged])
    assert len(session(place, "rows.jsonl").desk.todo) == 2
    prompt = {"messages": [{"role": "user", "content": "q"}]}
    write_rows(place.root / "rows.jsonl", [prompt])
    with pytest.raises(ValueError, match="choose a model"):
        session(place, "rows.jsonl")


def test_rows_with_videos_are_not_asked_without_them(away: Path) -> None:
    place = Workspace(away)
    clip = {"messages": [{"role": "user", "content": "<video>what"}], "videos": ["clip.mp4"]}
    plain = {"messages": [{"role": "user", "content": "q"}]}
    write_rows(away / "rows.jsonl", [clip, plain])
    now = session(place, "rows.jsonl", "nano")
    assert now.desk.todo == ("rows.jsonl:2",)
    assert "1 row with videos cannot be asked here" in str(now.told[0])
    write_rows(away / "rows.jsonl", [clip])
    with pytest.raises(ValueError, match="with videos cannot be asked here; let ernie-tune predict answer"):
        session(place, "rows.jsonl", "nano")
    write_rows(away / "out.jsonl", [{"row": 1, **clip, "answers": TWO}])
    assert "a video that is not shown here: clip.mp4" in session(place, "out.jsonl").question_html()


def test_predictions_with_pictures_of_every_kind(away: Path) -> None:
    place = Workspace(away)
    lines: list[dict[str, Any]] = [
        {"row": 1, "messages": ASKED, "images": ["pictures/a.png"], "answers": TWO},
        {"row": 2, "messages": ASKED, "images": [DATA], "answers": TWO},
        {"row": 3, "messages": ASKED, "images": [str(away / "private.png")], "answers": TWO},
        {"row": 4, "messages": ASKED, "images": [None], "answers": TWO},
        {"row": 5, "messages": ASKED, "images": ["https://host/a.png"], "answers": TWO},
        {"row": 6, "line": 6, "error": "rows.jsonl:6: no question"},
    ]
    found, told = questions(Path(write_rows(away / "out.jsonl", lines)), place)
    assert list(found) == ["out.jsonl:1", "out.jsonl:2", "out.jsonl:3"]
    assert found["out.jsonl:2"].asked.images == (DATA,)
    for one in found.values():
        assert all(image.startswith("data:") or Path(image).is_file() for image in one.asked.images)
    assert [str(why).partition("out.jsonl")[2][:2] for why in told] == [":4", ":5", ":6"]
    assert "had no name" in str(told[0])
    assert "no question" in str(told[2])
    assert list(map(str, session(place, "out.jsonl").told)) == list(map(str, told))


def test_pictures_in_cells_are_judged_too(away: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    data = (IMAGES / "0003.png").read_bytes()
    rows = [{"prompt": "<image>which", "response": "3", "images": [{"bytes": data, "path": None}]}] * 2
    pq.write_table(pa.Table.from_pylist(rows), away / "rows.parquet")
    now = session(Workspace(away), "rows.parquet", "nano")
    assert now.told == []
    assert now.question is not None
    assert now.question.asked.images == (DATA,)
    assert "base64" in now.question_html()
    assert rows_of(desk_judgement(now))["labels.jsonl"][0]["images"] == [DATA], "and learned from"


def desk_judgement(now: judging.Session) -> Judgement:
    assert now.question is not None
    return Judgement(now.question.asked, "ann", ("3",), labels=(True,))


@pytest.mark.parametrize(
    "broken",
    ["{", "\xff\xfe", "3", "null", "[]", '"text"', "{}", '{"row": 2}', '{"row": 2, "answers": 3}', '{"row": 2, "answers": [3]}',
     '{"row": 2, "answers": [{}]}', '{"row": 2, "messages": 3, "answers": []}', '{"row": 2, "messages": [3], "answers": []}',
     '{"row": 2, "messages": [{"content": "q"}], "answers": []}', '{"row": 2, "messages": [], "images": 3, "answers": []}',
     '{"row": 2, "messages": [], "answers": [{"content": null}]}', '{"messages": [], "answers": []}', "[" * 100_000,
     '{"row": 2, "messages": [{"role": "user", "content": "<image>"}], "images": ["\\u0000"], "answers": []}'],
)  # fmt: skip
def test_a_broken_line_costs_no_other_its_place(away: Path, broken: str) -> None:
    good = [{"row": n, "messages": ASKED[:1], "images": ["private.png"], "answers": TWO} for n in (1, 3)]
    lines = [json.dumps(good[0]).encode(), broken.encode("latin-1"), b"", json.dumps(good[1]).encode()]
    (away / "out.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    found, told = questions(away / "out.jsonl", Workspace(away))
    assert list(found) == ["out.jsonl:1", "out.jsonl:3"]
    assert len(told) == 1
    assert "out.jsonl:2" in str(told[0])
    assert "out.jsonl:2" in str(in_language(told[0], "zh"))


def test_rows_of_one_name_are_questions_of_their_own(away: Path) -> None:
    rows = [{"id": "same", "messages": [{"role": "user", "content": text}]} for text in ("a", "b", "c")]
    found, _ = questions(Path(write_rows(away / "rows.jsonl", rows)), Workspace(away))
    assert [one.asked.messages[0]["content"] for one in found.values()] == ["a", "b", "c"]
    assert list(found) == ["same", "same#2", "same#3"]

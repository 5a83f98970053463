"""Pictures of examples/evidence against the checkers that reward answers about them: what is stated
of a scene draws it again, what demonstrations zoom to holds the digit.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ernie_tune.data.sources import load_dataset
from ernie_tune.rewards.drawing import redraw
from ernie_tune.rewards.evidence import judge_evidence, read_claims
from ernie_tune.rewards.rubric import Rubric
from ernie_tune.rewards.trial import attacked, references
from ernie_tune.rewards.verifiers import zoom

SCRIPT = Path(__file__).parent.parent / "examples" / "evidence" / "make_data.py"


def main(words: list[str]) -> None:
    spec = importlib.util.spec_from_file_location("make_evidence", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(words)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_scenes_drawn_again_are_their_pictures(tmp_path: Path) -> None:
    """By the checker that they are rewarded by; a twin's answer draws another picture."""
    main(["scenes", "--out", str(tmp_path), "--rows", "12", "--eval", "6", "--demonstrations", "3"])
    train, held, shown = (rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "eval", "sft"))
    assert [row["messages"][1]["content"] for row in shown] == [row["signal"]["answer"] for row in train[:3]]
    for row in train + held:
        picture, twin = str(tmp_path / row["images"][0]), row["signal"]["scene"]["twin"]
        assert redraw(row["signal"]["answer"], picture) > 0.95
        assert redraw(twin["answer"], picture) < 0.95
        assert redraw(twin["answer"], str(tmp_path / twin["images"][0])) > 0.95


def test_needles_lie_in_what_demonstrations_zoom_to(tmp_path: Path) -> None:
    """The crop is that part of the picture and holds the digit; held-out digits lie elsewhere."""
    main(["needle", "--out", str(tmp_path), "--rows", "9", "--eval", "9", "--demonstrations", "9"])
    train, held, shown = (rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "eval", "sft_zoom"))
    places = []
    for row in train + held:
        left, top, right, bottom = row["signal"]["scene"]["target"]
        places.append((left // 112, top // 112))
        assert ((right - 1) // 112, (bottom - 1) // 112) == places[-1]
    assert not set(places[: len(train)]) & set(places[len(train) :])
    for row, asked_row in zip(shown, train, strict=True):
        whole, part = (Image.open(tmp_path / name) for name in row["images"])
        _, call, told, answer = row["messages"]
        box = call["tool_calls"][0]["function"]["arguments"]["box"]
        assert whole.crop(box).tobytes() == part.tobytes()
        assert zoom("", [box], asked_row["signal"]["scene"]["target"], 448 * 448) == 1
        assert (told["content"], answer["content"]) == ("<image>", asked_row["signal"]["answer"])


def test_shapes_are_proved_by_what_is_in_every_place(tmp_path: Path) -> None:
    """A demonstration's claims are full evidence of its own picture; those of the twin are
    contradicted once, by the shape that differs.
    """
    main(["shapes", "--evidence", "--out", str(tmp_path), "--rows", "12", "--eval", "6", "--demonstrations", "12"])
    train, held, shown = (rows_of(tmp_path / f"{name}.jsonl") for name in ("train", "eval", "sft"))
    for row, told in zip(train, shown, strict=True):
        signal, text = row["signal"], told["messages"][1]["content"]
        own = judge_evidence(text, signal["answer"], signal["scene"], signal["evidence"]["required"])
        assert (own.score, own.contradicted) == (1, 0)
        twin = signal["scene"]["twin"]
        other = judge_evidence(text, signal["answer"], twin, twin["required"])
        assert other.contradicted == 1 / len(signal["scene"]["objects"])
        assert signal["answer"].split()[0] == row["messages"][0]["content"].rstrip("?").split()[-1]
    layouts = [{tuple(sorted((o["colour"], o["place"]) for o in r["signal"]["scene"]["objects"])) for r in rows}
               for rows in (train, held)]  # fmt: skip
    assert not layouts[0] & layouts[1]


def test_quarters_are_cited_by_boxes_that_hold_them(tmp_path: Path) -> None:
    """Some of them no larger, most of them much; the question does not say what is there."""
    main(["quarters", "--out", str(tmp_path), "--rows", "24", "--eval", "3", "--demonstrations", "24"])
    areas = set()
    for row, told in zip(rows_of(tmp_path / "train.jsonl"), rows_of(tmp_path / "sft.jsonl"), strict=True):
        found, text = row["signal"]["scene"]["objects"][0], told["messages"][1]["content"]
        claims = read_claims(text)
        assert claims is not None
        assert claims[0].box is not None
        left, top, right, bottom = claims[0].box
        assert left <= found["box"][0] < found["box"][2] <= right
        assert top <= found["box"][1] < found["box"][3] <= bottom
        assert found["place"] in row["messages"][0]["content"]
        assert text.endswith(f"</evidence>{found['place']} {found['colour']} {found['shape']}")
        assert "verifiers" not in row["signal"]
        areas.add((right - left) * (bottom - top) / 112**2)
    assert areas == {0.25, 0.5, 1.0}


@pytest.mark.parametrize("words", ["bars", "shapes --evidence", "quarters", "digits_grid", "needle", "scenes"])
def test_right_answers_earn_what_they_can_and_attacks_nothing(tmp_path: Path, words: str) -> None:
    """As `ernie-tune reward test` tries them before a run."""
    main([*words.split(), "--out", str(tmp_path), "--rows", "4", "--eval", "2"])
    records = [*load_dataset(str(tmp_path / "train.jsonl"), signals=("verifiable", "prompt"))]
    rubric = Rubric(())
    reference = references(rubric, records)
    assert reference is not None
    assert reference.mean > 0.99
    tried = attacked(rubric, records)
    assert len(tried) > 10
    assert [(one.name, one.text) for one in tried if not one.passed] == []

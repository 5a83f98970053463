"""ui/judgements.py, ui/desk.py: rows that every trainer reads, keys, two judges."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from ernie_tune.data.sources import load_dataset
from ernie_tune.ui import desk
from ernie_tune.ui.desk import LABEL, PICK, RANK, RATE, Desk, press
from ernie_tune.ui.judgements import (
    CORRECTED,
    KINDS,
    LABELS,
    PAIRS,
    RANKINGS,
    RATINGS,
    SOURCE,
    AskedRow,
    Judgement,
    Judgements,
    agreement,
    weighted_kappa,
)

QUESTION = AskedRow("rows.jsonl:1", ({"role": "user", "content": "<image>what is it"},), ("pics/a.png",))
ANSWERS = ("a cat", "a dog", "a bird")


def judged(**said: Any) -> Judgement:
    return Judgement(QUESTION, said.pop("judge", "ann"), said.pop("answers", ANSWERS), **said)


def read(folder: Path, name: str) -> Any:
    rows = load_dataset(str(folder / name))
    return [rows[i] for i in range(len(rows))]


def test_every_kind_is_read_by_the_trainers_that_learn_it(tmp_path: Path) -> None:
    store = Judgements(tmp_path)
    store.add(judged(ranks=(2, 1, 2), ratings=(3, 5, 1), labels=(None, True, False), reasons=("", "", "made up")))
    store.add(
        Judgement(AskedRow("rows.jsonl:2", ({"role": "user", "content": "why"},)), "ann", ("no", "yes"), ranks=(2, 1),
                  corrected="because", corrected_of=1)
    )  # fmt: skip
    (ranking,) = read(tmp_path, RANKINGS)
    assert ranking.signal == "ranking"
    assert list(ranking.preferences()) == [(1, 0), (1, 2)]
    assert [c.messages[-1]["content"] for c in ranking.candidates] == list(ANSWERS)
    assert ranking.images
    (rating,) = read(tmp_path, RATINGS)
    assert [c.score for c in rating.candidates] == [0.5, 1.0, 0.0]
    labels = read(tmp_path, LABELS)
    assert [(r.candidates[0].label, r.candidates[0].messages[-1]["content"]) for r in labels] == [
        (True, "a dog"),
        (False, "a bird"),
    ]
    pair, corrected_pair = read(tmp_path, PAIRS)
    assert [[c.messages[-1]["content"] for c in r.candidates] for r in (pair, corrected_pair)] == [
        ["yes", "no"],
        ["because", "yes"],
    ]
    (fixed,) = read(tmp_path, CORRECTED)
    assert (fixed.signal, fixed.messages[-1]["content"]) == ("sft", "because")
    assert store.counts() == {PAIRS: 2, RANKINGS: 1, RATINGS: 1, LABELS: 2, CORRECTED: 1}


def test_rows_of_somebody_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / PAIRS).write_text('{"prompt": "mine", "chosen": "a", "rejected": "b"}\n')
    with pytest.raises(ValueError, match=r"must not hold a pairs.jsonl of somebody else"):
        Judgements(tmp_path)
    assert "mine" in (tmp_path / PAIRS).read_text()
    (tmp_path / PAIRS).unlink()
    for _ in range(2):
        Judgements(tmp_path).add(judged(ranks=(1, 2, 3)))
    assert Judgements(tmp_path).counts()[RANKINGS] == 1


def test_judging_again_replaces_rows_and_keeps_the_line(tmp_path: Path) -> None:
    store = Judgements(tmp_path)
    store.add(judged(ratings=(1, 1, 1)))
    store.add(judged(ratings=(5, 5, 5), judge="bob"))
    store.add(judged(ratings=(2, 2, 3)))
    assert len((tmp_path / SOURCE).read_text().splitlines()) == 3
    rows = [json.loads(line) for line in (tmp_path / RATINGS).read_text().splitlines()]
    assert {row["id"]: row["scores"] for row in rows} == {"rows.jsonl:1@ann": [2, 2, 3], "rows.jsonl:1@bob": [5, 5, 5]}
    assert store.done("ann") == {"rows.jsonl:1"}
    assert store.done("eve") == set()
    store.add(judged(labels=(True, None, None)))
    assert [json.loads(line)["id"] for line in (tmp_path / RATINGS).read_text().splitlines()] == ["rows.jsonl:1@bob"]


def test_lines_that_a_kill_cut_are_no_harm(tmp_path: Path) -> None:
    store = Judgements(tmp_path)
    store.add(judged(ratings=(1, 2, 3)))
    for name in (SOURCE, RATINGS):
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"half": ')
    assert len(store.all()) == 1
    store.add(judged(ratings=(5, 5, 5), judge="bob"))
    assert len(store.all()) == 2
    assert len(read(tmp_path, RATINGS)) == 2


def _add_many(folder: str, judge: str) -> None:
    store = Judgements(Path(folder))
    for i in range(20):
        asked = AskedRow(f"q{i}", ({"role": "user", "content": "x" * 3000},))
        store.add(Judgement(asked, judge, ("a", "b"), ranks=(1, 2)))


def test_two_judges_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_add_many, args=(str(tmp_path), judge)) for judge in ("ann", "bob")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    store = Judgements(tmp_path)
    assert len(store.standing()) == store.counts()[PAIRS] == 40
    assert store.done("ann") == store.done("bob")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"ranks": (1, 2)}, r"ranks \(2\) must be one for each answer \(3\)"),
        ({"ratings": (6, None, None)}, r"rating \(6\) must be from 1 to 5"),
    ],
)
def test_what_is_no_judgement(said: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        judged(**said)
    with pytest.raises(ValueError, match="must prefer, rate, label or correct"):
        Judgements(tmp_path).add(judged(ranks=(None, None, None)))
    (tmp_path / SOURCE).write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match=r"judgements.jsonl:1 must be a judgement of this studio"):
        Judgements(tmp_path).all()
    assert not [name for name in KINDS if (tmp_path / name).exists()]


def laid(mode: str, judge: str = "ann", answers: tuple[str, ...] = ANSWERS) -> Desk:
    return Desk(judge, mode, (QUESTION.id, "two")).laid(answers, now=0.0)


def keys(table: Desk, *pressed: str) -> tuple[Desk, bool]:
    complete = False
    for key in pressed:
        table, complete = press(table, key)
    return table, complete


def test_answers_come_back_in_the_rows_order() -> None:
    orders = {laid(PICK, judge=f"judge {i}").order for i in range(20)}
    assert len(orders) > 2, "shuffled, differently for each judge"
    assert laid(PICK).order == laid(PICK).order, "and the same way each time"
    for judge in ("ann", "bob", "eve"):
        table, complete = keys(laid(PICK, judge=judge), "2")
        assert complete
        one = desk.judgement(table, QUESTION, now=3.0)
        assert one.answers == ANSWERS
        assert one.ranks[ANSWERS.index(table.answers[1])] == 1
        assert sorted(one.ranks) == [1, 2, 2]
        assert one.seconds == 3.0


def test_keys_of_every_mode() -> None:
    table, complete = keys(laid(PICK), "0")
    assert complete
    assert desk.judgement(table, QUESTION).ranks == (1, 1, 1)
    table, complete = keys(laid(RANK), "2", "1", "2", "Enter")
    assert complete
    assert table.draft.ranks == (2, 1, 2)
    table, complete = keys(laid(RATE), "5", "ArrowRight", "1", "Enter")
    assert table.draft.ratings == (5, None, 1)
    one = desk.judgement(table, QUESTION)
    assert {a: r for a, r in zip(one.answers, one.ratings, strict=True) if r} == {
        table.answers[0]: 5,
        table.answers[2]: 1,
    }
    table, complete = keys(laid(LABEL), "g", "b", "Enter")
    one = desk.judgement(table, QUESTION, reason=" wrong colour ")
    assert table.draft.labels == (True, False, None)
    assert one.reasons[ANSWERS.index(table.answers[1])] == "wrong colour"
    assert one.reasons[ANSWERS.index(table.answers[0])] == ""


def test_keys_that_move_or_mean_nothing() -> None:
    table = laid(RATE)
    for key in ("6", "0", "g", "x", "", "ArrowUp"):
        assert press(table, key) == (table, False)
    assert press(table, "ArrowLeft")[0].marked == 2
    skipped, complete = press(table, "s")
    assert (skipped.question, skipped.answers, complete) == ("two", (), False)
    assert press(skipped, "u")[0].question == QUESTION.id
    over = skipped.moved(1)
    assert over.question is None
    assert press(over, "Enter") == (over, False)
    assert press(over, "u")[0].question == "two"


def test_a_correction_of_the_marked_answer() -> None:
    table, _ = keys(laid(RATE), "ArrowRight")
    one = desk.judgement(table, QUESTION, corrected="a lynx\n")
    assert (one.corrected, one.answers[one.corrected_of or 0]) == ("a lynx", table.answers[1])
    untouched = desk.judgement(table, QUESTION, corrected=f"  {table.answers[1]} ")
    assert (untouched.corrected, untouched.corrected_of) == ("", None)


def test_agreement_of_two_judges() -> None:
    """Cohen (1960): po = 0.7, pe = 0.5 for the 20/5/10/15 table of the textbooks: kappa 0.4."""
    table = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    assert weighted_kappa(table, 0) == pytest.approx(0.4)
    assert weighted_kappa([(1, 5), (5, 1)], 2) == pytest.approx(-1.0)
    assert weighted_kappa([(3, 3)] * 4, 2) is None
    assert weighted_kappa([], 0) is None
    ann = [judged(ranks=(1, 2, 3), ratings=(5, 3, 1))]
    swapped = Judgement(QUESTION, "bob", ("a bird", "a cat", "a dog"), ranks=(3, 1, 2), ratings=(1, 5, 3))
    assert agreement(ann, [swapped]).same == 1.0, "answers are matched by their text"
    assert agreement(ann, [swapped]).ratings_kappa == pytest.approx(1.0)
    against = agreement(ann, [judged(ranks=(3, 2, 1), judge="bob")])
    assert (against.questions, against.pairs, against.same) == (1, 3, 0.0)
    assert agreement(ann, [judged(ranks=(1, 1, 3), judge="bob")]).same == pytest.approx(2 / 3)
    assert agreement(ann, []).kappa is None

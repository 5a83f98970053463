"""The record's views and the error's two languages, against hand-written values."""

import pickle
import string

import pytest

from ernie_tune.data.records import PROBLEMS, Candidate, DataError, Record, show

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def ranked(*ranks: float) -> Record:
    return Record("ranking", (USER,), candidates=tuple(Candidate((ANSWER,), rank=rank) for rank in ranks))


def test_a_strict_order_of_four_gives_six_pairs() -> None:
    # B>A>C>D
    assert set(ranked(2, 1, 3, 4).preferences()) == {(1, 0), (1, 2), (1, 3), (0, 2), (0, 3), (2, 3)}


def test_ties_give_no_pair() -> None:
    assert set(ranked(2, 1, 2).preferences()) == {(1, 0), (1, 2)}


def test_scores_order_where_ranks_do_not() -> None:
    record = Record(
        "rating", (USER,), candidates=tuple(Candidate((ANSWER,), score=score) for score in (0.25, 1.0, 0.25))
    )
    assert list(record.preferences()) == [(1, 0), (1, 2)]


def test_labels_give_no_pair() -> None:
    assert not list(Record("label", (USER,), candidates=(Candidate((ANSWER,), label=True),)).preferences())


def test_prompt_ends_before_the_last_answer() -> None:
    assert Record("sft", (USER, ANSWER, USER, ANSWER)).prompt == (USER, ANSWER, USER)
    assert Record("prompt", (USER,)).prompt == (USER,)


def test_dialogue_of_a_candidate() -> None:
    other = Candidate((ANSWER,), images=("b.png",))
    record = Record("pair", (USER,), images=("a.png",), videos=("v.mp4",), candidates=(Candidate((ANSWER,)), other))
    assert record.dialogue(0) == ((USER, ANSWER), ("a.png",), ("v.mp4",))
    assert record.dialogue(1) == ((USER, ANSWER), ("b.png",), ("v.mp4",))


def test_error_text() -> None:
    error = DataError("d/train.jsonl", 17, "images", "2", "count", {"n": 1, "other": "<image> tag"})
    assert (
        str(error)
        == "d/train.jsonl:17: images: found 2, expected 1, one for each <image> tag; fix: make both counts equal"
    )
    assert (
        error.chinese == "d/train.jsonl:17：images：实际为 2，应为 1 个，与 <image> tag 一一对应；修复：使两者数量一致"
    )
    assert (error.path, error.line, error.field, error.problem) == ("d/train.jsonl", 17, "images", "count")
    assert isinstance(error, ValueError)


def test_error_of_a_whole_file_has_no_line() -> None:
    assert str(DataError("a.jsonl", 0, "file", "no rows", "empty", {})).startswith("a.jsonl: file: found no rows")


def test_error_is_one_line_whatever_the_data_holds() -> None:
    error = DataError("a.csv", 2, "a\nb", "fields \ufeffx\r", "missing", {"names": "prompt"})
    assert str(error).startswith("a.csv:2: a\\nb: found fields \\ufeffx\\r, expected prompt")
    assert "\n" not in error.chinese


def test_error_pickles() -> None:
    error = DataError("a.jsonl", 3, "mode", "'x'", "choice", {"options": "auto"})
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.problem, copy.line) == (str(error), "choice", 3)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_both_languages_need_the_same_parameters(problem: str) -> None:
    names = [
        {name for _, name, _, _ in string.Formatter().parse(text) if name} - {"hint", "field"}
        for text in PROBLEMS[problem]
    ]
    english, chinese = names[0] | names[1], names[2] | names[3]
    # a Chinese text that names nothing is complete, one that names more would fail to fill
    assert chinese <= english
    filled = DataError("p", 1, "f", "x", problem, dict.fromkeys(english, "VALUE"))
    assert "{" not in str(filled) + filled.chinese


def test_long_values_are_shown_short() -> None:
    assert show("x" * 500) == "'" + "x" * 79 + "... (str)"
    assert show({"a": 1, "b": 2}) == "an object with a, b"
    assert show(7) == "7"

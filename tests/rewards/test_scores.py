"""Scores of answers against closed forms and against the published scorers' own examples."""

from __future__ import annotations

import itertools
import math

import pytest

from ernie_tune.rewards.scores import (
    Confusion,
    anls,
    answer_tokens,
    box_iou,
    confusion,
    edit_distance,
    exact_match,
    fitting_metrics,
    iou,
    match_label,
    normalise_answer,
    parse_boxes,
    parse_number,
    pass_at,
    relaxed_match,
    row_scores,
    score_answers,
    squad_exact_match,
    squad_f1,
    token_f1,
)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("The Cat.", "cat"),
        ("Ｑ３", "q3"),
        ("红色。", "红色"),
        ("3 个", "3个"),
        ("U.S.", "us"),
        ("don't", "dont"),
        ("red,blue", "Red, blue"),
        ("1,234", "1234"),
        ("−5", "-5"),
        ("“是”", "是"),
        ("1，2", "1, 2"),
        ("an  old\nmap", "old map"),
        ("$5", "5"),
        ("￥5", "5"),
        ("`x`", "x"),
    ],
)
def test_same_answers(a: str, b: str) -> None:
    assert normalise_answer(a) == normalise_answer(b)
    assert exact_match(a, b) == 1


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("3.5", "35"),  # SQuAD's rule would make these equal
        ("-5", "5"),
        ("1/2", "12"),
        ("50%", "50"),
        ("A", ""),  # an option, not an article
        ("A, B", "B"),
        ("12:30", "1230"),
        ("红", "红色"),
        ("1,2", "12"),
        ("x > 3", "x < 3"),
        ("2^10", "210"),
    ],
)
def test_different_answers(a: str, b: str) -> None:
    assert exact_match(a, b) == 0


def test_articles_are_english_only() -> None:
    assert normalise_answer("the big dog") == "big dog"
    assert normalise_answer("The 北京") == "the北京"


def test_tokens() -> None:
    assert answer_tokens("Q3 卖了 1,234 件 iPhone!") == ["q3", "卖", "了", "1234", "件", "iphone"]


def test_token_f1() -> None:
    # P 2/3, R 1
    assert token_f1("the red big cat", "a red cat") == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert token_f1("红色的圆", "红色圆形") == pytest.approx(0.75)  # 红 色 圆 of four and four
    # a word counts as often as the gold has it
    assert token_f1("cat cat cat", "cat") == pytest.approx(0.5)
    assert (token_f1("", ""), token_f1("", "cat"), token_f1("dog", "cat")) == (1, 0, 0)


@pytest.mark.parametrize(
    ("a", "b", "exact", "f1"),
    [  # what SQuAD v2.0's evaluate script gives
        ("$5", "5", 1, 1),
        ("3.5", "35", 1, 1),
        ("a+b", "ab", 1, 1),
        ("x > 3", "x < 3", 1, 1),
        ("well-known", "well known", 0, 0),
        ("The Eiffel Tower.", "eiffel tower", 1, 1),
        ("a big red dog", "the red dog", 0, 0.8),
        ("cat cat cat", "cat", 0, 0.5),
        ("the", "", 1, 1),
        ("", "cat", 0, 0),
        ("红色的圆", "红色圆形", 0, 0),
        ("A-theory", "atheory", 1, 1),
    ],
)
def test_squad(a: str, b: str, exact: float, f1: float) -> None:
    assert (squad_exact_match(a, b), squad_exact_match(b, a)) == (exact, exact)
    assert (squad_f1(a, b), squad_f1(b, a)) == (pytest.approx(f1), pytest.approx(f1))


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("intention", "execution") == 5
    assert edit_distance("saturday", "sunday") == edit_distance("sunday", "saturday") == 3
    assert edit_distance("北京市", "北京") == 1
    assert edit_distance("abc", "abc") == 0


def test_anls_threshold() -> None:
    assert anls("Kitten", "sitting") == pytest.approx(4 / 7)
    assert anls("43.0", "43") == 0.5  # the scorer keeps exactly one half
    assert anls("abc", "abxy") == 0.5
    assert anls("abcd", "abxyz") == 0  # 0.4
    assert anls("an  Answer", "An answer") == 1


@pytest.mark.parametrize(
    ("a", "b", "score"),
    [  # what DocVQA's scorer gives: distances of tidied texts over lengths of raw ones
        ("ab", "  xy     ", 1 - 2 / 9),
        ("ab", "xy", 0),
        ("abc   d", "abc x", 1 - 1 / 7),
        ("", "", 1),
        ("", "   ", 1),
        ("", "a", 0),
        ("Ａ１", "a1", 0),  # full width is another character there
        ("straße", "strasse", 1 - 2 / 7),
    ],
)
def test_anls_is_the_scorers(a: str, b: str, score: float) -> None:
    assert anls(a, b) == pytest.approx(score)
    assert anls(b, a) == pytest.approx(score)


def test_numbers() -> None:
    assert parse_number("about 1,040 units") == 1040
    assert parse_number("－３．５％") == -3.5
    assert parse_number("共 12 个") == 12
    assert parse_number("1.5e3") == 1500
    for text in ("Q3", "between 0 and 10", "2019-2020", "none", "", "1.2.3"):
        assert parse_number(text) is None, text


def test_relaxed_match() -> None:
    assert relaxed_match("104", "100") == 1
    assert relaxed_match("105", "100") == 1
    assert relaxed_match("106", "100") == 0
    assert relaxed_match("-104", "-100") == 1
    assert relaxed_match("-100", "100") == 0
    assert relaxed_match("0.0", "0") == 1
    assert relaxed_match("0.01", "0") == 0
    assert relaxed_match("2011", "2010") == 0  # a year
    assert relaxed_match("between 90 and 110", "100") == 0
    assert relaxed_match("The red one", "red one") == 1
    assert relaxed_match("3", "Q3") == 0


def test_boxes() -> None:
    box = (10.0, 20.0, 90.0, 120.5)
    for text in ("[10, 20, 90, 120.5]", "(10,20),(90,120.5)", "it is at <10 20 90 120.5>.", "10,20,90,120.5"):
        assert parse_boxes(text) == [box], text
    assert parse_boxes('{"bbox": [1,2,3,4]} and [[5,6],[7,8]]') == [(1, 2, 3, 4), (5, 6, 7, 8)]
    assert parse_boxes("[1,2,3,4,5]") == []
    assert parse_boxes("1 of 2, 3 of 4") == []


def test_iou() -> None:
    a, b, c = (0, 0, 10, 10), (5, 5, 15, 15), (20, 20, 30, 30)
    assert iou(a, b) == pytest.approx(1 / 7)
    assert iou(a, a) == 1
    assert iou(a, c) == 0
    assert iou((0, 0, 0, 10), a) == 0
    assert iou((10, 10, 0, 0), a) == 0


def test_box_answers() -> None:
    a, b, c = "[0,0,10,10]", "[5,5,15,15]", "[20,20,30,30]"
    assert box_iou(b, a) == pytest.approx(1 / 7)
    assert box_iou(a + b, a + c) == pytest.approx(1 / 2)
    assert box_iou(c + a, a + c) == 1
    assert box_iou(a + a + a, a + c) == pytest.approx(1 / 3)  # repeating a right box does not pay
    assert box_iou("no box", a) == 0


def test_match_label() -> None:
    labels = ["cat", "wild cat", "dog", "A", "红色"]
    assert match_label("Cat.", labels) == "cat"
    assert match_label("It is a wild cat", labels) == "wild cat"
    assert match_label("答案是红色", labels) == "红色"
    assert match_label("option A", labels) == "A"
    assert match_label("a cat or a dog", labels) == ""
    assert match_label("category", labels) == ""


def test_confusion() -> None:
    gold = ["cat", "cat", "cat", "dog", "dog", "cow"]
    said = ["cat", "dog", "cat", "dog", "bird", "cow"]
    table = confusion(said, gold)
    assert table == Confusion(("cat", "dog", "cow"), ((2, 1, 0, 0), (0, 1, 0, 1), (0, 0, 1, 0)))
    assert table.accuracy == pytest.approx(4 / 6)
    per = table.per_class()
    assert per["cat"] == pytest.approx({"precision": 1.0, "recall": 2 / 3, "f1": 0.8, "support": 3})
    assert per["dog"] == pytest.approx({"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2})
    assert table.macro_f1 == pytest.approx((0.8 + 0.5 + 1.0) / 3)


def test_confusion_with_an_unused_class() -> None:
    table = confusion(["x"], ["X"], labels=["x", "y"])
    assert table.per_class()["y"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}


def test_confusion_refuses_foreign_references() -> None:
    with pytest.raises(ValueError, match=r"reference \('cow'\) must be one of labels \(cat, dog\)"):
        confusion(["cat"], ["cow"], ["cat", "dog"])


def test_score_answers() -> None:
    said, gold = ["cat", "a dog", "3 birds", "fish"], ["cat", ["dog", "puppy"], "4 birds", "fish"]
    assert row_scores(said, gold, "exact_match") == [1, 1, 0, 1]
    assert score_answers(said, gold, ["exact_match", "token_f1", "accuracy"]) == pytest.approx(
        {"exact_match": 0.75, "token_f1": 0.875, "accuracy": 0.75}
    )
    classes = score_answers(["yes", "no", "no"], ["yes", "yes", "no"], ["accuracy"])
    assert classes == pytest.approx({"accuracy": 2 / 3, "macro_f1": 2 / 3})


def test_score_answers_refuses() -> None:
    with pytest.raises(ValueError, match=r"metric \('bleu'\) must be one of exact_match"):
        row_scores(["a"], ["a"], "bleu")
    with pytest.raises(ValueError, match=r"predictions \(1\) must be as many as references \(2\)"):
        score_answers(["a"], ["a", "b"], ["anls"])
    with pytest.raises(ValueError, match="at least one"):
        confusion([], [])


def test_fitting_metrics() -> None:
    assert fitting_metrics(["a long answer", "another one", "third"]) == ("exact_match", "token_f1")
    assert fitting_metrics(["yes", "no"] * 4) == ("exact_match", "macro_f1")
    assert fitting_metrics([["yes", "y"], ["no", "n"]] * 4) == ("exact_match", "token_f1")
    assert fitting_metrics(["[1,2,3,4]"] * 4) == ("iou", "exact_match")
    assert fitting_metrics(["12", "7.5", "30%"]) == ("exact_match", "relaxed_accuracy")
    assert score_answers(["yes", "no", "no"], ["yes", "yes", "no"], ["macro_f1"]) == pytest.approx({"macro_f1": 2 / 3})
    with pytest.raises(ValueError, match=r"metric \(macro_f1\) must go with one gold answer a row; take accuracy"):
        score_answers(["yes"], [["yes", "y"]], ["macro_f1"])


@pytest.mark.parametrize(("sampled", "right"), [(1, 0), (1, 1), (4, 1), (6, 2), (7, 7), (9, 8)])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_answer(sampled: int, right: int) -> None:
    """All ways to take k of the answers, counted out; 1 - (1 - c/n)^k would be too low."""
    answers = [i < right for i in range(sampled)]
    for k in range(1, sampled + 1):
        choices = list(itertools.combinations(answers, k))
        assert pass_at(k, sampled, right) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-12)
    assert pass_at(1, sampled, right) == pytest.approx(right / sampled, abs=1e-12)


def test_pass_at_k_of_published_numbers_and_of_none() -> None:
    # the product form of the paper's own code, 1 - prod(1 - k / arange(n - c + 1, n + 1))
    for n, c, k in ((200, 7, 100), (100, 3, 10)):
        product = math.prod(1 - k / i for i in range(n - c + 1, n + 1))
        assert pass_at(k, n, c) == pytest.approx(1 - product, abs=1e-12)
    for k, n, c in ((0, 4, 1), (5, 4, 1), (1, 4, 5)):
        with pytest.raises(ValueError, match="sample more answers"):
            pass_at(k, n, c)

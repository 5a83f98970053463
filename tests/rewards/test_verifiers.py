"""Checkers against the cases that any implementation must satisfy
(`golden/online/verifier_cases.json`), and against what a policy would try.
"""

from __future__ import annotations

import inspect
import json
import time
from typing import Any

import pytest
from conftest import GOLDEN

from ernie_tune.rewards import mathematics, shaping, verifiers
from ernie_tune.rewards.reading import MAX_TEXT, Quantity, answer_span, boxed, chinese_number, fold, read_quantity
from ernie_tune.rewards.structures import read_object, read_table
from ernie_tune.rewards.verifiers import VERIFIERS, verifier_for

CASES = json.loads((GOLDEN / "online" / "verifier_cases.json").read_text(encoding="utf-8"))
ORACLE = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))["outputs"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['verifier']}-{c['text'][:20]!r}")
def test_cases(case: dict[str, Any]) -> None:
    check = VERIFIERS[{"think_format": "format"}.get(case["verifier"], case["verifier"])]
    assert check(case["text"], **case["spec"]) == pytest.approx(case["score"], abs=1e-9)


def test_there_are_cases() -> None:
    assert len(CASES) == 149
    assert verifiers.numeric("\\boxed{43}" + "x" * MAX_TEXT, 43) == 0


# What a policy that is paid for holes writes: all of it must earn nothing, whatever the gold is.
ATTACKS = {
    "numeric": ({"gold": 43}, "43"),
    "math": ({"gold": "43"}, "43"),
    "choice": ({"gold": "B", "options": {"A": "1", "B": "2", "C": "3"}}, "B"),
    "count": ({"gold": 43}, "43"),
    "exact": ({"golds": ["43"]}, "43"),
    "anls": ({"golds": ["43 invoices of march"]}, "43 invoices of march"),
    "chart": ({"gold": "43"}, "43"),
    "box": ({"gold": [10, 10, 20, 20]}, "[10, 10, 20, 20]"),
    "boxes": ({"golds": [[10, 10, 20, 20]]}, "[10, 10, 20, 20]"),
    "kie": ({"gold": {"total": "43"}}, '{"total": "43"}'),
    "json_schema": (
        {"schema": {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}},
        '{"a": 43}',
    ),
    "table": ({"gold": [["", "q1"], ["x", "43"]]}, "| |q1|\n|-|-|\n|x|43|"),
    "date": ({"gold": "2024-03-05"}, "2024-03-05"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(name: str) -> None:
    spec, right = ATTACKS[name]
    check = VERIFIERS[name]
    assert check(right, **spec) == 1
    assert check(f"<think>hm</think>{right}", **spec) == 1
    attacks = [
        "",
        "   ",
        "\n",
        "<think></think>",
        "<answer></answer>",
        "\\boxed{}",
        f"<think>{right}</think>",
        f"<think>{right}",
        "NaN",
        "inf",
        "1e999",
    ]
    attacks += [
        "x" * (MAX_TEXT + 1),
        "④③",
        "{" * 5000,
        "[" * 5000,
        "\\boxed{" * 5000,
        "<answer>" * 5000,
        "答案是" + "\n" * 5000,
    ]
    attacks += [
        f"{right}</think>{right}<think>",
        f"\\boxed{{{right}}} \\boxed{{9}}",
        f"<answer>{right}</answer><answer>9</answer>",
        "A B C D",
        "yes",
    ]
    for attack in attacks:
        assert check(attack, **spec) == 0, attack[:60]


@pytest.mark.parametrize("name", ["exact", "boxes", "kie", "table", "format", "language"])
def test_hostile_texts_take_no_time(name: str) -> None:
    """Linear time: a megabyte made for backtracking must not take longer than the machine's slowest
    second.
    """
    spec = ATTACKS[name][0] if name in ATTACKS else {"language": "zh"} if name == "language" else {}
    hostile = [
        "<answer>" * (1 << 17),
        "\\boxed{" * (1 << 17),
        "答案是" + "\n" * (1 << 19),
        "答案" + " " * (1 << 19) + "x",
        "```" * (1 << 18),
    ]
    hostile += [
        "(" * (1 << 20),
        "１" * (1 << 20),
        "|" * (1 << 16),
        "<td>" * (1 << 14),
        "<think>" * (1 << 17),
        "{}" * (1 << 15),
        "[1,1,1,1]" * (1 << 12),
    ]
    started = time.process_time()
    for text in hostile:
        VERIFIERS[name](text, **spec)
    assert time.process_time() - started < 20  # quadratic ones take minutes


def test_spans() -> None:
    assert answer_span("a\nb") is None
    assert answer_span("so the answer is: 7.\nand the answer is 7") == "7"
    assert answer_span("\\boxed{7} <answer>8</answer>", "tag") == "8"
    assert answer_span("<answer>\n8\n</answer>") == "8"  # over several lines
    assert answer_span("8", "boxed") is None
    assert boxed("\\boxed{\\frac{1}{2}} \\boxed{3") == (["\\frac{1}{2}"], "\\boxed{\\frac{1}{2}} ")
    assert fold("１０²①") == "10²①"
    with pytest.raises(ValueError, match=r"answer_style \('latex'\) must be one of auto, boxed, tag"):
        answer_span("7", "latex")


@pytest.mark.parametrize(("text", "number"), [
    ("十", 10), ("二十一", 21), ("一百零五", 105), ("三千万", 30_000_000), ("一亿零三", 100_000_003), ("二〇二四", 2024), ("一两", None), ("", None), ("三个", None),
])  # fmt: skip
def test_chinese_numbers(text: str, number: int | None) -> None:
    assert chinese_number(text) == number


def test_quantities() -> None:
    assert read_quantity("3.5 cm") == Quantity(3.5, "cm")
    assert read_quantity("50\\%") == Quantity(50.0, "%")
    assert read_quantity("3 4") is None
    assert read_quantity("9" * 300) is None
    assert read_quantity("-\\frac{1}{4}") == Quantity(-0.25)
    with pytest.raises(ValueError, match=r"unit \('furlong'\) must be one of mm"):
        verifiers.numeric("3", 3, unit="furlong")


def test_golds_choose_their_checker() -> None:
    wanted = {
        "B": "choice", "12": "count", "0": "count", "0042": "exact", "3.5": "numeric", "50%": "numeric", "Beijing": "exact", 7: "count", 7.5: "numeric",
    }  # fmt: skip
    for answer, name in wanted.items():
        found, spec = verifier_for(answer)
        assert found == name, answer
        assert VERIFIERS[found](str(answer), **spec) == 1
    for answer, name, text in [
        ([1, 2, 3, 4], "box", "[1,2,3,4]"), ([[1, 2, 3, 4]], "boxes", "[1,2,3,4]"), (["a", "b"], "exact", "b"), ({"k": 1}, "kie", '{"k": 1}'),
        (True, "exact", "Yes."), (False, "exact", "否"),
    ]:  # fmt: skip
        found, spec = verifier_for(answer)
        assert (found, VERIFIERS[found](text, **spec)) == (name, 1)
    for nothing in (None, "", "  ", []):
        with pytest.raises(ValueError, match="must be given where a row names no verifier"):
            verifier_for(nothing)


def test_boxes_are_matched_not_counted() -> None:
    a, c = [0, 0, 10, 10], [20, 20, 30, 30]
    say = lambda *found: " ".join(str(b) for b in found)  # noqa: E731
    assert verifiers.VERIFIERS["boxes"](say(a, c), golds=[a, c]) == 1
    assert verifiers.VERIFIERS["boxes"](say(a, a, a), golds=[a, c]) == pytest.approx(0.4)
    assert verifiers.VERIFIERS["boxes"](say(*[a] * 17), golds=[a, c]) == 0
    # the first of two could take either gold; only one way leaves a partner for the second
    both, left, right = [0, 0, 10, 10], [0, 0, 10, 7], [0, 3, 10, 10]
    assert verifiers.VERIFIERS["boxes"](say(both, left), golds=[left, right]) == 1
    assert verifiers.VERIFIERS["boxes"]("nothing there", golds=[]) == 1
    assert verifiers.VERIFIERS["box"]("[0,0,10,8]", gold=a, threshold=0.75) == 1


def test_objects_and_tables() -> None:
    assert read_object('<think>x</think>```json\n{"a": {"b": [1]}}\n```') == {"a": {"b": [1]}}
    assert read_object('<answer>{"a": 1}</answer>') == {"a": 1}
    assert read_object('{"a": ' * 9 + "1" + "}" * 9) is None
    assert read_object('{"a": 1} and {"a": 1}') is None
    rows = [["", "2020", "2021"], ["cats", "1", "2"], ["dogs", "3", "4"]]
    markdown = "| | 2020 | 2021 |\n|---|:-:|---|\n| cats | 1 | 2 |\n| dogs | 3 | 5 |"
    html = "<table><tr><td></td><td>2020</td><td>2021</td></tr><tr><td>cats</td><td>1</td><td>2</td></tr></table>"
    assert read_table(html) == rows[:2]
    assert verifiers.VERIFIERS["table"](markdown, gold=rows) == pytest.approx(0.75)
    assert verifiers.VERIFIERS["table"](html, gold=rows) == pytest.approx(2 * 2 / 6)
    assert verifiers.VERIFIERS["table"](markdown + "\n| cats | 1 | 2 |" * 4, gold=rows) == pytest.approx(2 * 3 / 16)
    with pytest.raises(ValueError, match="must do without patterns"):
        verifiers.VERIFIERS["json_schema"]("{}", schema={"type": "string", "pattern": "(a+)+"})
    with pytest.raises(ValueError, match="must be a JSON schema"):
        verifiers.VERIFIERS["json_schema"]("{}", schema={"type": "strange"})


def test_dates() -> None:
    check = VERIFIERS["date"]
    for text in (
        "2024-03-05",
        "2024/3/5",
        "2024年3月5日",
        "２０２４年３月５日。",
        "5 March 2024",
        "March 5th, 2024",
        "Mar 5 2024",
        "答案是2024-03-05",
    ):
        assert check(text, gold="2024-03-05") == 1, text
    for text in ("03/05/2024", "2024-05-03", "2024-13-05", "March 2024", "5 March 2024 or 6 March 2024"):
        assert check(text, gold="2024-03-05") == 0, text
    assert check("05/03/2024", gold="2024-03-05", dayfirst=True) == 1
    assert check("05/03/2024", gold="2024-03-05", dayfirst=False) == 0
    with pytest.raises(ValueError, match=r"gold \('5.3.'\) must be a date"):
        check("x", gold="5.3.")


def test_mathematics() -> None:
    check = VERIFIERS["math"]
    assert check("\\boxed{\\frac{1}{2}}", gold="0.5") == 1
    assert check("\\boxed{2}", gold="0.5") == 0
    if mathematics.available():
        assert check("\\boxed{(x+1)^2}", gold="x^2+2x+1") == 1
        # and the worker is another one now
        assert mathematics.equal("1", "9^{9^{9^{9}}}", seconds=0.5) == 0
        assert mathematics.equal("\\frac{1}{2}", "0.5") == 1
        assert mathematics.equal("???", "0.5") is None


def test_shaping() -> None:
    for n, wanted in ORACLE["shaping"]["overlong_L100_C20"].items():
        assert shaping.soft_overlong(int(n), 100, 20) == pytest.approx(wanted)
    for n, right, wrong in zip(
        (0, 50, 100), *(ORACLE["shaping"][f"cosine_{k}_len_0_50_100"] for k in ("right", "wrong")), strict=True
    ):
        assert shaping.cosine_length(n, 100, True) == pytest.approx(right)
        assert shaping.cosine_length(n, 100, False) == pytest.approx(wrong)
    for text, wanted in ORACLE["shaping"]["repetition_bigram"].items():
        assert shaping.repetition(text, 2) == pytest.approx(wanted)
        assert shaping.repetition([int(w) for w in text.split()], 2) == pytest.approx(wanted)
    assert shaping.repetition("好好好好", 2) == pytest.approx(-2 / 3)
    assert shaping.repetition("a b", 3) == 0
    assert shaping.language("你好，世界 `print`", "zh") == 0
    assert shaping.language("hello 你", "zh") == pytest.approx(1 / 6 - 0.8)
    assert shaping.language("12 + 3", "en") == 0
    assert shaping.length("", 90, 100, buffer=20) == pytest.approx(-0.5)
    assert shaping.length("", 50, 100, "cosine", right=True) == pytest.approx(0.75)
    for call, match in (
        (lambda: shaping.think_format("x", "deep"), r"mode \('deep'\) must be think or nothink"),
        (lambda: shaping.language("x", "fr"), r"language \('fr'\) must be zh or en"),
        (lambda: shaping.repetition("x", 0), r"n \(0\) must be at least 1"),
        (
            lambda: shaping.soft_overlong(1, 10, 11),
            r"overlong_buffer \(11\) must lie in \[0, max_completion_length \(10\)\]",
        ),
        (lambda: shaping.length("x", 1, 10, "square"), r"kind \('square'\) must be one of soft_overlong, cosine"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_every_checker_takes_the_text_first() -> None:
    for name, check in VERIFIERS.items():
        assert next(iter(inspect.signature(check).parameters)) == "text", name

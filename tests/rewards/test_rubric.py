"""Reward functions in every dialect, what they may return, rows that name their checkers, and what
an attack earns.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie_tune.data.records import Meta, Record, Reward, Verifier
from ernie_tune.data.sources import load_dataset
from ernie_tune.rewards import rubric as rubric_module
from ernie_tune.rewards.attacks import ALLOWED, attacks, reference_answer
from ernie_tune.rewards.functions import Answered, RewardFunction, reward
from ernie_tune.rewards.named import load_function
from ernie_tune.rewards.rubric import RowVerifiers, Rubric


def row(answer: Any = "7", *verifiers: Verifier, **extra: Any) -> Record:
    return Record(
        "verifiable",
        ({"role": "user", "content": "what?"},),
        reward=Reward(answer, verifiers),
        domain="digits",
        meta=Meta("x.jsonl", 3, "verifiable", extra),
    )


def said(*texts: str) -> list[Answered]:
    return [Answered(text, tuple(range(len(text)))) for text in texts]


GROUPS = [(row("7", source="a"), said("7", "<think>\nhm\n</think>\n\n8")), (row("9", source="b"), said("9"))]


def test_trl() -> None:
    seen: dict[str, Any] = {}

    def mine(prompts: list, completions: list, solution: list, source: list, **more: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, source=source, more=more)
        more["log_metric"]("mine", 3)
        return [float(c[0]["content"] == s) for c, s in zip(completions, solution, strict=True)]

    judge = RewardFunction(mine)
    assert judge(GROUPS) == [[1.0, 0.0], [1.0]]
    assert seen["completions"][1] == [{"role": "assistant", "content": "8", "reasoning_content": "hm"}]
    assert seen["source"] == ["a", "a", "b"]
    assert seen["prompts"][2] == [{"role": "user", "content": "what?"}]
    assert seen["more"]["group_id"] == [0, 0, 1]
    assert seen["more"]["completion_ids"][0] == [0]
    assert judge.asked.metrics == {"mine": [3.0]}


def test_trl_without_keywords_for_the_rest_is_given_what_it_names() -> None:
    def short(completions: list, answer: list) -> Any:
        return np.array([len(answer)] * len(completions), np.float32)

    assert RewardFunction(short)(GROUPS) == [[3.0, 3.0], [3.0]]

    def unknown(completions: list, colour: list) -> Any:
        return []

    with pytest.raises(
        ValueError, match=r"reward function unknown failed at x.jsonl:3 .*asks for 'colour', and no row has a field"
    ):
        RewardFunction(unknown)(GROUPS)


def test_texts_instead_of_messages() -> None:
    @reward(text=True)
    def texts(completions: list[str], **_: Any) -> list[float]:
        return [len(c) for c in completions]

    class Swift:
        def __call__(self, completions: list[str], solution: list, **kwargs: Any) -> list[float]:
            return [float(c == s) for c, s in zip(completions, solution, strict=True)]

    assert RewardFunction(texts)(GROUPS)[1] == [1.0]
    assert RewardFunction(Swift())(GROUPS) == [[1.0, 0.0], [1.0]]
    assert RewardFunction(Swift()).name == "Swift"


def test_verl() -> None:
    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> dict[str, Any]:
        assert data_source == "digits"
        assert extra_info["source"] in "ab"
        return {"score": float(solution_str == ground_truth), "length": len(solution_str)}

    judge = RewardFunction(compute_score)
    assert judge(GROUPS) == [[1.0, 0.0], [1.0]]
    assert len(judge.asked.metrics["length"]) == 3


@pytest.mark.parametrize("kind", ["sequential", "batch"])
def test_easyr1(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("easy_rewards")
    module.REWARD_TYPE = kind  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "easy_rewards", module)

    def one(x: dict[str, Any]) -> dict[str, float]:
        return {"overall": float(x["response"] == x["ground_truth"]), "format": 1.0}

    def many(xs: list[dict[str, Any]]) -> list[dict[str, float]]:
        return [one(x) for x in xs]

    function = one if kind == "sequential" else many
    function.__module__ = "easy_rewards"
    judge = RewardFunction(function)
    assert judge(GROUPS) == [[1.0, 0.0], [1.0]]
    assert judge.asked.metrics["format"] == [1.0] * 3


def test_async_functions_and_their_time() -> None:
    async def slow(completions: list, **_: Any) -> list[float]:
        await asyncio.sleep(0.01 if len(completions) == 1 else 60)
        return [1.0] * len(completions)

    judge = RewardFunction(slow, timeout_seconds=0.2)
    assert judge(GROUPS[1:]) == [[1.0]]
    assert judge(GROUPS) == [[None, None], [None]]
    assert judge.asked.timeouts == 3

    async def main() -> Any:  # as in a notebook, whose thread already runs a loop
        return judge(GROUPS[1:])

    assert asyncio.run(main()) == [[1.0]]


def test_async_functions_wait_together_and_fail_apart() -> None:
    """Each waits until both have begun: one after the other they would never end."""
    begun: list[int] = []
    both = asyncio.Event()

    async def wait(number: int, answers: int) -> list[float]:
        begun.append(number)
        if len(begun) == 2:
            both.set()
        await both.wait()
        return [float(number)] * answers

    async def one(completions: list, **_: Any) -> list[float]:
        return await wait(1, len(completions))

    async def two(completions: list, **_: Any) -> list[float]:
        return await wait(2, len(completions))

    async def broken(completions: list, **_: Any) -> list[float]:
        raise KeyError("gone")

    judges = [RewardFunction(f, on_error="none", timeout_seconds=5) for f in (one, two, broken)]
    rubric = Rubric(judges, check=False)
    assert rubric(GROUPS)[0][0].parts == {"one": 1.0, "two": 2.0, "broken": None}
    said = rubric.reported()
    assert (said["rewards/broken/errors"], said["rewards/one/timeouts"]) == (3.0, 0.0)
    with pytest.raises(
        ValueError, match=r"reward function broken \(test_rubric.py:\d+\) failed at x.jsonl:3 with KeyError"
    ):
        Rubric([RewardFunction(broken)], check=False)(GROUPS)


def test_how_long_checkers_of_rows_take_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr(rubric_module.time, "thread_time", lambda: next(clock) ** 2 / 1e3)  # 1, 5, 9, ... ms
    rubric = Rubric((), check=False)
    rubric([(row("7"), said("7", "8", "9"))])
    assert rubric.reported() == {"rewards/count/ms_p99": pytest.approx(9.0)}
    assert rubric.reported() == {}


def test_what_functions_are_told_and_tell() -> None:
    def mine(completions: list, id: list, trainer_state: Any, log_extra: Any, log_metric: Any, **_: Any) -> list[float]:
        log_extra("length", [len(c) for c in completions])
        log_metric("mine/step", trainer_state.global_step)
        return [1.0] * len(completions)

    rubric = Rubric([RewardFunction(mine)])
    rubric.at(7, 20)
    scored = rubric(GROUPS)
    assert [one.extra for group in scored for one in group] == [{"length": 1}] * 3
    said = rubric.reported()
    assert said["mine/step"] == 7
    assert "mine/step" not in rubric.reported()  # the check at the start, too, was nobody's answer


@pytest.mark.parametrize(("value", "match"), [
    ([1.0, 2.0], r"mine \(2\) must give one number for each of the 3 answers from x.jsonl:3 on"),
    (1.0, r"mine \(float\) must give one number for each of the 3 answers"),
    ([1.0, "good", 1.0], r"mine \('good'\) must give a finite number or None for x.jsonl:3, answer '<think>"),
    ([1.0, float("inf"), 1.0], r"mine \('inf'\) must give a finite number"),
    ([1.0, 10**400, 1.0], r"must give a finite number"),
    ({0: 1.0, 1: 1.0, 2: 1.0}, r"mine \(dict\) must give one number for each of the 3 answers"),
    ({1.0, 2.0, 3.0}, r"mine \(set\) must give one number"),
    ("111", r"mine \(str\) must give one number"),
])  # fmt: skip
def test_what_may_not_come_back(value: Any, match: str) -> None:
    def mine(**_: Any) -> Any:
        return value

    with pytest.raises(ValueError, match=match):
        RewardFunction(mine)(GROUPS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [1e300, -1e300, 1.1e15])
def test_numbers_too_large_to_be_compared(value: float) -> None:
    def mine(completions: list, **_: Any) -> Any:
        return [0.0] * (len(completions) - 1) + [value]

    match = re.escape(f"reward mine ({value:g}) must be at most 1e+15 in size for x.jsonl:3, answer '9'")
    with pytest.raises(ValueError, match=match):
        Rubric([RewardFunction(mine)], check=False)(GROUPS)
    with pytest.raises(ValueError, match=r"reward mine \(1e\+15 x 2\) must be at most"):
        Rubric([RewardFunction(lambda completions: [1e15] * 3, "mine")], [2.0], check=False)(GROUPS)
    with pytest.raises(ValueError, match=r"reward row \(1e\+300\) must be at most"):
        Rubric([RowVerifiers()])([(row("7", Verifier("exact", 1e300)), said("7"))])
    with pytest.raises(ValueError, match=r"reward_weights \(nan\) must be finite"):
        Rubric([RewardFunction(mine)], [float("nan")])


def test_numbers_for_the_log_must_be_ones_to_average() -> None:
    def mine(completions: list, log_metric: Any) -> Any:
        log_metric("size", float("inf"))
        return [0.0] * len(completions)

    with pytest.raises(ValueError, match=r"log_metric 'size' \(inf\) must be a number of at most 1e\+15"):
        RewardFunction(mine)(GROUPS)


def test_a_text_that_was_asked_is_answered_with_texts() -> None:
    """As TRL has it: functions for plain prompts are given texts, functions for dialogues messages;
    where the prompt is a text, either kind works.
    """
    asked = [
        (
            dataclasses.replace(row("7"), meta=Meta("x.jsonl", 3, asked_as_text=True)),
            said("7", "", "<think>\nh\n</think>\n\n8"),
        )
    ]
    seen: list[Any] = []

    def texts(prompts: list[str], completions: list[str]) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(len(set(c))) for c in completions]

    def messages(prompts: list[Any], completions: list[Any]) -> list[float]:
        assert {p[-1]["content"] for p in prompts} == {"what?"}
        assert {c[0]["role"] for c in completions} == {"assistant"}
        return [float(len(c[0]["content"])) for c in completions]

    assert RewardFunction(texts)(asked) == [[1.0, 0.0, 10.0]]
    assert RewardFunction(messages)(asked) == [[1.0, 0.0, 1.0]]
    prompt, answer = seen[0]
    assert (prompt + answer, prompt[0], prompt[1:3], answer[-1], [*answer]) == ("what?7", "w", "ha", "7", ["7"])
    assert seen[2][1][0].get("reasoning_content") == "h"


def test_columns_are_the_rows_own() -> None:
    """All of them, as TRL hands them over: also those that readers use, and those that only some
    rows have.
    """
    rows = [
        {"prompt": "a", "answer": "4", "task": "maths", "solution": "two and two", "group_id": "g"},
        {"prompt": "b", "answer": "5", "level": 2, "id": 7, "data_source": "gsm8k", "extra_info": {"i": 1}},
    ]
    data = load_dataset(rows, signals=("verifiable", "prompt"))
    groups = [(data[0], said("4")), (data[1], said("5", "6"))]
    seen: dict[str, Any] = {}

    def mine(completions: list, **columns: Any) -> list[float]:
        seen.update(columns)
        return [0.0] * len(completions)

    RewardFunction(mine)(groups)
    assert seen["answer"] == seen["ground_truth"] == ["4", "5", "5"]
    assert seen["solution"] == ["two and two", "5", "5"]
    assert seen["task"] == ["maths", None, None]
    assert (seen["level"], seen["group_id"], seen["id"][1:]) == ([None, 2, 2], ["g", 1, 1], [7, 7])

    def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
        seen[data_source] = extra_info
        return float(solution_str == ground_truth)

    assert RewardFunction(compute_score)(groups) == [[1.0], [1.0, 0.0]]
    assert seen["gsm8k"] == {"i": 1}


def test_columns_that_only_some_rows_have() -> None:
    """None for the others, in a round without any such row, too."""
    data = load_dataset([{"prompt": "a", "level": 2}, {"prompt": "b"}], signals=("verifiable", "prompt"))

    def mine(completions: list, level: list) -> Any:
        return level

    rubric = Rubric([RewardFunction(mine)])
    rubric.know([data[0], data[1]])
    assert [one.parts["mine"] for one in rubric([(data[1], said("x", "y"))])[0]] == [None, None]
    assert [one.parts["mine"] for one in rubric([(data[0], said("x"))])[0]] == [2.0]


def test_none_nan_and_errors() -> None:
    def gaps(**_: Any) -> Any:
        return [None, float("nan"), True]

    assert RewardFunction(gaps)(GROUPS) == [[None, None], [1.0]]

    def broken(**_: Any) -> Any:
        raise KeyError("gone")

    with pytest.raises(
        ValueError, match=r"reward function broken \(test_rubric.py:\d+\) failed at x.jsonl:3 with KeyError"
    ):
        RewardFunction(broken)(GROUPS)
    judge = RewardFunction(broken, on_error="none")
    assert judge(GROUPS) == [[None, None], [None]]
    assert judge.asked.errors == 3
    with pytest.raises(ValueError, match=r"reward_error \('skip'\) must be raise or none"):
        RewardFunction(broken, on_error="skip")
    assert judge([]) == []


class Theirs(Exception):
    """As packages of checkers have their own."""


@pytest.mark.parametrize("error", [Theirs("no formula"), SyntaxError("1 +"), StopIteration(), SystemExit(0)])
def test_whatever_a_function_raises_is_its_own(error: BaseException) -> None:
    def broken(**_: Any) -> Any:
        raise error

    name = type(error).__name__
    with pytest.raises(ValueError, match=rf"broken \(test_rubric.py:\d+\) failed at x.jsonl:3 with {name}"):
        RewardFunction(broken)(GROUPS)
    judge = RewardFunction(broken, on_error="none")
    assert judge(GROUPS) == [[None, None], [None]]
    assert judge.asked.errors == 3


def test_memory_that_is_gone_ends_the_run() -> None:
    def greedy(**_: Any) -> Any:
        raise MemoryError

    with pytest.raises(MemoryError):
        RewardFunction(greedy, on_error="none")(GROUPS)


def test_functions_from_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "def good(completions, **_):\n    return [1.0] * len(completions)\n\nclass Orm:\n    def __call__(self, completions, **_):\n        return [2.0] * len(completions)\nx = 1\n"
        "class Args:\n    def __init__(self, k):\n        pass\nclass Idle:\n    pass\n"
    )
    assert RewardFunction(load_function(f"{file}:good"))(GROUPS)[1] == [1.0]
    assert RewardFunction(load_function(f"{file}:Orm"))(GROUPS)[1] == [2.0]
    with pytest.raises(FileNotFoundError, match="must name an existing file"):
        load_function(f"{tmp_path}/none.py:good")
    for name, match in (
        ("bad", r"mine.py, which has none called 'bad' but good, Orm, Args, Idle; name one of them"),
        ("god", r"none called 'god' but good, Orm, .*; did you mean .*mine.py:good\?"),
        ("x", r"none called 'x' \(that is of type int\) but good, Orm"),
    ):
        with pytest.raises(ValueError, match=match):
            load_function(f"{file}:{name}")
    (tmp_path / "empty.py").write_text("from math import sqrt\n_hidden = len\n", encoding="utf-8")
    with pytest.raises(ValueError, match="none called 'bad' nor any other; write it"):
        load_function(f"{tmp_path}/empty.py:bad")
    with pytest.raises(ValueError, match=r"made without arguments, and Args\(\) failed with TypeError: .*'k'"):
        load_function(f"{file}:Args")
    with pytest.raises(ValueError, match=r"must name a class with __call__\(self, completions"):
        load_function(f"{file}:Idle")
    rows = tmp_path / "rows.jsonl"  # what somebody has sent must not be run as a program
    rows.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef good(**_): return []\n")
    with pytest.raises(ValueError, match="must name a file of Python"):
        load_function(f"{rows}:good")
    assert not (tmp_path / "ran").exists()
    for text, match in (
        ("x = 1\ndef f(:\n", "broken.py:2 failed with SyntaxError"),
        ("\n1 / 0\n", "broken.py:2 .*Zero"),
    ):
        (tmp_path / "broken.py").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=match):
            load_function(f"{tmp_path}/broken.py:f")


def test_a_prompt_that_nothing_judges() -> None:
    bare, checked = Record("prompt", ({"role": "user", "content": "why?"},)), GROUPS[0][0]
    RowVerifiers().check(bare)  # another function judges it
    RowVerifiers().check(checked, alone=True)
    with pytest.raises(ValueError, match="must be judged by something; give the row an answer or verifiers"):
        RowVerifiers().check(bare, alone=True)


def test_rows_name_their_checkers() -> None:
    checked = row("12.50", Verifier("exact", 0.9), Verifier("format", 0.1, {"mode": "nothink"}))
    rubric = Rubric([])
    (found,) = rubric([(checked, said("12.50", "<think>x</think>12.50", "9"))])
    assert [s.parts["row"] for s in found] == pytest.approx([1.0, 0.9, 0.1])
    assert found[1].details == {"exact": 1.0, "format": 0.0}
    (found,) = rubric([(row(3), said("三个", "4"))])
    assert [s.parts["row"] for s in found] == [1.0, 0.0]
    (found,) = Rubric([RowVerifiers(10)])(
        [(row("7", Verifier("exact"), Verifier("length", 1.0, {"buffer": 5})), [Answered("7", (1,) * 8)])]
    )
    assert found[0].parts["row"] == pytest.approx(1 - 3 / 5)


def test_gold_numbers_may_be_written_as_text() -> None:
    for name, gold, right in (("count", "7", "七"), ("numeric", "2.50", "2.5"), ("numeric", "50%", "50")):
        assert RowVerifiers()([(row(gold, Verifier(name)), said(right, "9"))]) == [[1.0, 0.0]], (name, gold)
    with pytest.raises(ValueError, match=r"x.jsonl:3: answer \('many'\) must be a number for count"):
        RowVerifiers()([(row("many", Verifier("count")), said("7"))])


def test_rows_that_cannot_be_checked() -> None:
    rows = RowVerifiers()
    with pytest.raises(ValueError, match=r"x.jsonl:3: verifier \('exakt'\) must be one of numeric"):
        rows([(row("7", Verifier("exakt")), said("7"))])
    with pytest.raises(ValueError, match=r"x.jsonl:3: spec of numeric \(toll\) must fit numeric\(text, gold"):
        rows([(row(7.5, Verifier("numeric", spec={"toll": 1})), said("7"))])
    with pytest.raises(
        ValueError, match=r"x.jsonl:3: verifiers \(length, format\) must hold one that asks whether the answer is right"
    ):
        rows.check(row("7", Verifier("length"), Verifier("format")))
    rows.check(row("7"))
    assert rows([(Record("prompt", ({"role": "user", "content": "hi"},)), said("yo"))]) == [[None]]


def test_weights_names_and_chance() -> None:
    def one(completions: list, **_: Any) -> Any:
        return [1.0] * len(completions)

    numbers = iter(range(99))

    def chance(completions: list, **_: Any) -> Any:
        return [float(next(numbers)) for _ in completions]

    with pytest.raises(ValueError, match=r"reward_weights \(2\) must be as many as reward_funcs \(1\)"):
        Rubric([RewardFunction(one)], [1.0, 2.0])
    with pytest.raises(ValueError, match=r"reward_funcs \(one, one\) must have names of their own"):
        Rubric([RewardFunction(one), RewardFunction(one)])
    with pytest.raises(ValueError, match=r"reward function chance .* must give the same twice"):
        Rubric([RewardFunction(chance)])(GROUPS)
    rubric = Rubric([RewardFunction(one), RewardFunction(chance)], [1.0, 0.5], check=False)
    assert rubric.names == ("one", "chance")
    assert rubric(GROUPS)[0][0].parts["one"] == 1.0


@pytest.mark.parametrize(
    "answer", ["7", 7, 7.5, "B", "Beijing", [10, 10, 20, 20], {"total": "12.50"}, ["red", "crimson"]]
)
def test_attacks_earn_nothing(answer: Any) -> None:
    record = row(answer)
    rows = RowVerifiers()
    assert rows([(record, said(reference_answer(answer)))]) == [[1.0]]
    tried = attacks(record)
    assert len(tried) >= 16
    for name, score in zip(tried, rows([(record, said(*tried.values()))])[0], strict=True):
        assert score is not None
        assert score <= ALLOWED.get(name, 0.0), name


def test_attacks_know_the_options() -> None:
    choice = row("B", Verifier("choice", spec={"options": {"A": "1", "B": "2"}}))
    assert attacks(choice)["all_options"] == "A, B"
    assert attacks(Record("prompt", ())) == {}

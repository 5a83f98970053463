"""Rewards on trial: right answers in every form that rows ask for, attacks, and rewards that are
too kind."""

from __future__ import annotations

from typing import Any

import pytest

from ernie_tune.data.records import Meta, Record, Reward, Verifier
from ernie_tune.rewards.attacks import attacks, gold_of, reference_text
from ernie_tune.rewards.functions import RewardFunction
from ernie_tune.rewards.rubric import Rubric
from ernie_tune.rewards.trial import attacked, references

ASK = ({"role": "user", "content": "what?"},)


def row(answer: Any, *verifiers: Verifier, mode: str = "auto") -> Record:
    return Record("verifiable", ASK, reward=Reward(answer, verifiers), mode=mode, meta=Meta("x.jsonl", 3))


ROWS = [
    row("7"),
    row("7", Verifier("count")),
    row(7.5, Verifier("numeric", spec={"tol": 0.1})),
    row("12", Verifier("numeric", spec={"gold": 12, "unit": "cm"})),
    row("B", Verifier("choice", spec={"options": {"A": "one", "B": "two"}})),
    row("x", Verifier("exact", 0.9), Verifier("format", 0.1, {"mode": "think"})),
    row("x", Verifier("exact", 0.9), Verifier("format", 0.1), mode="think"),
    row("x", Verifier("exact", spec={"style": "boxed"})),
    row("x", Verifier("exact", spec={"style": "tag"})),
    row(None, Verifier("exact", spec={"golds": ["cat", "a cat"]})),
    row([10, 10, 50, 60], Verifier("box")),
    row([10, 10, 50, 60], Verifier("box", spec={"frame": 1000, "size": [200, 100]})),
    row([[10, 10, 50, 60], [60, 60, 90, 90]], Verifier("boxes", spec={"frame": 1000, "size": [200, 100]})),
    row({"total": "12.50", "date": "2024-01-02"}),
    row([["", "a"], ["q1", 3], ["q2", 4]], Verifier("table")),
    row("2024-03-05", Verifier("date")),
    row("Baidu Inc", Verifier("anls")),
    row("Baidu Inc", Verifier("ocr_ned")),
    row(40, Verifier("chart")),
]


@pytest.mark.parametrize("record", ROWS, ids=lambda r: f"{r.reward.answer}-{[v.name for v in r.reward.verifiers]}")
def test_right_answers_earn_all_and_attacks_nothing(record: Record) -> None:
    rubric = Rubric([])
    tried = references(rubric, [record])
    assert tried is not None
    assert tried.worst == pytest.approx(1.0)
    assert tried.passed
    for line in attacked(rubric, [record]):
        assert line.passed, line


def test_a_demonstration_is_the_reference() -> None:
    said = {"role": "assistant", "content": "seven", "reasoning_content": "hm"}
    record = Record("sft", (*ASK, said), reward=Reward("seven"))
    assert reference_text(record) == "<think>\nhm\n</think>\n\nseven"
    assert reference_text(Record("prompt", ASK)) is None
    assert gold_of(ROWS[9]) == ["cat", "a cat"]
    assert references(Rubric([]), [Record("prompt", ASK)]) is None
    assert attacked(Rubric([]), [Record("prompt", ASK)]) == []


def test_a_reward_that_finds_the_gold_anywhere_does_not_pass() -> None:
    def contains(completions: list, answer: list, **_: Any) -> list[float]:
        return [float(str(a) in c[0]["content"]) for c, a in zip(completions, answer, strict=True)]

    lines = {line.name: line for line in attacked(Rubric([RewardFunction(contains)]), ROWS[:2])}
    assert not lines["gold_or_not"].passed
    assert not lines["said_a_thousand_times"].passed
    assert (lines["gold_or_not"].mean, lines["gold_or_not"].bound) == (1.0, 0.0)
    assert (lines["gold_or_not"].place, lines["gold_or_not"].text) == ("x.jsonl:3", "7 or not 7")
    assert lines["empty"].passed


def test_a_reward_in_another_frame_does_not_pass() -> None:
    """What VLM-R1's users met: boxes of 0 to 1000 compared with pixels earn nothing, always."""

    def pixels(completions: list, **_: Any) -> list[float]:
        return [float(c[0]["content"] == "[10, 10, 50, 60]") for c in completions]

    tried = references(Rubric([RewardFunction(pixels)]), [ROWS[11]])
    assert tried is not None
    assert (tried.passed, tried.mean) == (False, 0.0)


def test_what_honest_silence_earns_is_no_attack() -> None:
    def polite(completions: list, **_: Any) -> list[float]:
        return [0.1] * len(completions)

    kind = Rubric([RewardFunction(polite)])
    assert all(line.passed for line in attacked(kind, ROWS[:1]))

    def rude(completions: list, **_: Any) -> list[float]:
        return [0.1 * (c[0]["content"][:4] not in ("I do", "不知道。")) for c in completions]

    assert not any(
        line.passed for line in attacked(Rubric([RewardFunction(rude)]), ROWS[:1]) if line.name != "whole_picture"
    )


def test_near_numbers_lie_outside_the_tolerance() -> None:
    assert attacks(ROWS[2])["near"] == "7.65"
    assert attacks(ROWS[-1])["near"] == "43"
    assert "near" not in attacks(row("12.50", Verifier("anls")))
    assert attacks(ROWS[10])["box_twice"] == "[10, 10, 50, 60], [10, 10, 50, 60]"
    assert (
        attacks(row([5, 5, 9, 9], Verifier("box", spec={"size": [20, 10]})))["whole_picture"]
        == "[0.0, 0.0, 20.0, 10.0]"
    )

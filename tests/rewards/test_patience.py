"""Reward functions that take too long: what is said, what ends them, what it leaves as it was."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import threading
import time
from typing import Any

import pytest

from ernie_tune.data.records import Meta, Record, Reward
from ernie_tune.rewards import patience
from ernie_tune.rewards.functions import Answered, RewardFunction

ROWS = [
    Record("verifiable", ({"role": "user", "content": "what?"},), reward=Reward(gold), meta=Meta("x.jsonl", number))
    for number, gold in ((3, "7"), (4, "9"))
]
GROUPS = [(record, [Answered("a"), Answered("b")]) for record in ROWS]


def sleeps(completions: list, **_: Any) -> list[float]:
    time.sleep(60)
    return []


def searches(completions: list, **_: Any) -> list[float]:
    """Holds the interpreter, in one operation that doubles with each letter."""
    try:
        return [float(bool(re.match(r"(a+)+$", "a" * 60 + "b")))] * len(completions)
    except Exception:  # as careless functions do
        return []


def turns(completions: list, **_: Any) -> list[float]:
    while True:
        pass


@pytest.mark.parametrize("function", [sleeps, searches, turns])
def test_a_function_that_never_ends_is_ended(function: Any) -> None:
    began = time.monotonic()
    judge = RewardFunction(function, limit_seconds=0.1)
    name = re.escape(function.__name__)
    match = rf"reward function {name} \(test_patience.py:\d+\) must answer within 0.1 s for x.jsonl:3 and what follows"
    with pytest.raises(ValueError, match=match):
        judge(GROUPS)
    left_out = RewardFunction(function, on_error="none", limit_seconds=0.1)
    assert left_out(GROUPS) == [[None, None], [None, None]]
    assert (left_out.asked.timeouts, left_out.asked.errors) == (4, 0)
    assert time.monotonic() - began < 30


def test_of_one_answer_at_a_time_the_slow_one_alone_is_lost() -> None:
    def verl(data_source: str, solution_str: str, ground_truth: str) -> float:
        if (solution_str, ground_truth) == ("b", "7"):
            time.sleep(60)
        if (solution_str, ground_truth) == ("a", "9"):
            raise KeyError("gone")
        return 1.0

    judge = RewardFunction(verl, on_error="none", limit_seconds=0.1)
    assert judge(GROUPS) == [[1.0, None], [None, 1.0]]
    assert (judge.asked.timeouts, judge.asked.errors) == (1, 1)
    with pytest.raises(ValueError, match=r"failed at x.jsonl:4 with KeyError"):
        RewardFunction(verl, limit_seconds=0.1)(GROUPS[1:] + GROUPS[:1])

    async def waits(data_source: str, solution_str: str, ground_truth: str) -> dict[str, float]:
        await asyncio.sleep(0)
        return {"score": float(solution_str == "a")}

    assert RewardFunction(waits)(GROUPS) == [[1.0, 0.0], [1.0, 0.0]]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_slow_function_is_spoken_of_and_waited_for(capfd: pytest.CaptureFixture[str], elsewhere: bool) -> None:
    """Also in a thread, where nothing could end it."""

    def slow(completions: list, **_: Any) -> list[float]:
        time.sleep(0.25)
        return [1.0] * len(completions)

    found: list[Any] = []
    judge = RewardFunction(slow, timeout_seconds=0.05, limit_seconds=0.0)
    if elsewhere:
        thread = threading.Thread(target=lambda: found.append(judge(GROUPS)))
        thread.start()
        thread.join()
    else:
        found.append(judge(GROUPS))
    assert found == [[[1.0, 1.0], [1.0, 1.0]]]
    lines = capfd.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3  # after 0.05, 0.1 and 0.2 s
    assert "reward function slow, asked about 4 answers from x.jsonl:3 on, has not answered for 0.0" in lines[0]
    assert re.search(r"\(test_patience.py:\d+\); it is waited for without end", lines[0])


def test_timers_of_others_go_on() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 30)
        RewardFunction(lambda completions, **_: [1.0] * len(completions), name="quick")(GROUPS)
        assert 25 < signal.getitimer(signal.ITIMER_REAL)[0] <= 30
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        with pytest.raises(ValueError, match="must answer within"):
            RewardFunction(sleeps, limit_seconds=0.1)(GROUPS)
        time.sleep(0.05)
        assert rung == [signal.SIGALRM], "it was due while the function ran"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def blocks(completions: list, **_: Any) -> list[float]:
    time.sleep(3)  # no await: nothing else moves
    return []


async def asks_a_thread(completions: list, **_: Any) -> list[float]:
    await asyncio.to_thread(time.sleep, 3)
    return []


async def holds_on(completions: list, **_: Any) -> list[float]:
    for _n in range(30):
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0.1)
    return []


@pytest.mark.parametrize("function", [blocks, asks_a_thread, holds_on])
def test_async_functions_that_never_let_go(
    function: Any, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "GRACE_SECONDS", 0.2)
    began = time.monotonic()
    judge = RewardFunction(function, timeout_seconds=0.1)
    assert judge(GROUPS) == [[None, None], [None, None]]
    assert judge.asked.timeouts == 4
    assert time.monotonic() - began < 2.5, "nobody waits for what it sleeps"
    said = capfd.readouterr().err
    if function is not asks_a_thread:
        assert f"reward function {function.__name__}, asked about 4 answers from x.jsonl:3 on, never came back" in said
    if function is blocks:
        assert re.search(r"never came back \(test_patience.py:\d+\) and is left behind", said)

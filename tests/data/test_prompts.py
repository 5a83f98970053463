"""Prompts in passes and by difficulty: nothing is lost, what resumes goes on as if nothing had
stopped.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from ernie_tune.data.prompts import Difficulty, PromptStream


def test_a_pass_holds_every_prompt_once_in_another_order() -> None:
    stream = PromptStream(7, seed=3)
    numbers = [n for _ in range(7) for n in stream.draw(3)]
    assert sorted(numbers[:7]) == sorted(numbers[7:14]) == list(range(7))
    assert numbers[:7] != numbers[7:14]
    assert stream.passes == 3
    assert PromptStream(7, seed=3).draw(21) == numbers
    assert PromptStream(7, seed=4).draw(21) != numbers


@pytest.mark.parametrize("difficulty", [None, Difficulty()])
def test_resuming(difficulty: Difficulty | None) -> None:
    whole, part = (PromptStream(20, 1, difficulty) for _ in range(2))
    seen = [whole.draw(6) for _ in range(3)]
    whole.saw({n: n / 20 for n in seen[0]})
    assert [part.draw(6) for _ in range(3)] == seen
    part.saw({n: n / 20 for n in seen[0]})
    again = PromptStream(20, 1, difficulty)
    again.load_state_dict(json.loads(json.dumps(part.state_dict())))
    assert again.draw(6) == whole.draw(6)
    for other, match in (
        (PromptStream(21, 1), r"size of the prompts \(21\) must be that of the saved run \(20\)"),
        (PromptStream(20, 2), r"seed of the prompts \(2\)"),
    ):
        with pytest.raises(ValueError, match=match):
            other.load_state_dict(part.state_dict())


def test_medium_prompts_come_most_often() -> None:
    stream = PromptStream(300, 0, Difficulty())
    stream.saw({n: (0.0, 0.5, 1.0)[n % 3] for n in range(300)})
    counts = np.bincount([n % 3 for _ in range(20) for n in stream.draw(50)], minlength=3)
    assert counts.tolist() == [200, 600, 200]  # the quotas
    uneven = PromptStream(100, 0, Difficulty())
    uneven.saw(dict.fromkeys(range(100), 0.5))
    assert len(set(uneven.draw(100))) == 100  # empty buckets leave their part to the others


def test_solved_prompts_rest() -> None:
    stream = PromptStream(10, 0, Difficulty(retire_after=2))
    for _ in range(2):
        stream.saw({0: 1.0, 1: 1.0})
    stream.saw({1: 0.9})
    assert 0 not in {n for _ in range(30) for n in stream.draw(5)}
    for _ in range(3):
        stream.saw(dict.fromkeys(range(10), 1.0))
    assert len(stream.draw(25)) == 25  # nothing else is left, and more is asked than there is


def test_running_share() -> None:
    stream = PromptStream(2, 0, Difficulty(decay=0.75))
    stream.saw({0: 1.0})
    stream.saw({0: 0.0})
    assert stream.right.tolist() == [0.75, 0.5]


@pytest.mark.parametrize(("make", "match"), [
    (lambda: PromptStream(0, 0), r"size \(0\) must be at least 1"),
    (lambda: Difficulty(quotas={"easy": 1.0, "impossible": 0.0}), r"quotas .* must name easy, medium, hard and sum to 1"),
    (lambda: Difficulty(decay=1.0), r"decay \(1\) must lie in \[0, 1\)"),
])  # fmt: skip
def test_bad_settings(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()

"""A scheduler whose answers are given: what stands around a model, tested without one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from ernie_tune.generate.batch import Prompt, TokenEvent
from ernie_tune.generate.engine import Engine
from ernie_tune.generate.load import TurnLoad


class Scripted:
    """Answers every prompt with the tokens that `answer` gives for it, one a step."""

    def __init__(self, model: Any, answer: Callable[[Prompt], Sequence[int]], reason: str) -> None:
        self.model, self.answer, self.reason = model, answer, reason
        self.left: list[tuple[int, list[int]]] = []
        self.load = TurnLoad()

    def submit(self, prompt: Prompt) -> None:
        self.left.append((prompt.key, [*self.answer(prompt)]))

    def __len__(self) -> int:
        return len(self.left)

    def step(self) -> list[TokenEvent]:
        events = [TokenEvent(key, 0, ids.pop(0), -0.5, "" if ids else self.reason) for key, ids in self.left]
        self.left = [(key, ids) for key, ids in self.left if ids]
        return events

    def resume(self, partials: Sequence[Any]) -> None:
        """Nothing was ever taken out of a script."""
        assert not partials

    def cancel(self, keys: Any) -> None:
        self.left = [one for one in self.left if one[0] not in keys]


def script(
    monkeypatch: pytest.MonkeyPatch, answer: Callable[[Prompt], Sequence[int]], reason: str = "stop"
) -> list[Prompt]:
    """From here on every engine answers with `answer`; returns the list into which the prompts go
    as they are asked.
    """
    prompts: list[Prompt] = []

    def asked(prompt: Prompt) -> Sequence[int]:
        prompts.append(prompt)
        return answer(prompt)

    monkeypatch.setattr(Engine, "scheduler", lambda self, capacity=None: Scripted(self.model, asked, reason))
    return prompts

"""Credit within an answer: which tokens lose advantage, and how much."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.tiny_runs import processor

from ernie_tune.data.records import Record, Reward
from ernie_tune.rewards.functions import Answered
from ernie_tune.train.claims import credit_claims, tokens_of

PROCESSOR = processor()
SCENE = {"objects": [{"colour": "red", "shape": "circle", "box": [0, 0, 9, 9]}]}
TEXT = "I see a red circle and a green circle here"


def answered(text: str, opened: str = "") -> Answered:
    ids = tuple(PROCESSOR.tokenizer.encode(text))
    assert PROCESSOR.decode(list(ids)) == text
    return Answered(opened + text, (*ids, PROCESSOR.stop_ids[0]), "stop")


def test_tokens_of_characters() -> None:
    for opened in ("", "<think>\n"):
        answer = answered(TEXT, opened)
        for words in ("green circle", "I", "here", TEXT):
            start = answer.text.index(words)
            first, last = tokens_of(answer, start, start + len(words), PROCESSOR)
            assert words in PROCESSOR.decode(list(answer.token_ids[first:last]))
            assert words not in PROCESSOR.decode(list(answer.token_ids[first + 1 : last]))
            assert words not in PROCESSOR.decode(list(answer.token_ids[first : last - 1]))


@pytest.mark.parametrize("scene", [SCENE, {}])
def test_contradicted_tokens_lose_a_share_of_their_advantage(scene: dict[str, Any]) -> None:
    answer = answered(TEXT)
    size = len(answer.token_ids)
    trained = np.ones(size + 3, bool)
    trained[:4] = False  # the prompt, and a token that was forced
    advantage_N = np.array([2.0] * (size - 1) + [-2.0] * (size - 1))
    group: Any = SimpleNamespace(
        record=Record("verifiable", (), reward=Reward("x", (), {}, scene)),
        answers=(answer, answer),
        unit=SimpleNamespace(dialogues=[SimpleNamespace(num_tokens=size + 3, trained_L=trained)] * 2),
        columns={"advantage_N": advantage_N},
    )
    credit_claims([group], PROCESSOR, 0.1)
    start = TEXT.index("a green circle")
    first, last = tokens_of(answer, start, start + len("a green circle"), PROCESSOR)
    wrong = np.zeros(size, bool)
    wrong[first:last] = bool(scene)
    wanted = np.concatenate([np.where(wrong, 1.8, 2.0)[1:], np.where(wrong, -2.2, -2.0)[1:]])
    np.testing.assert_allclose(group.columns["advantage_N"], wanted)

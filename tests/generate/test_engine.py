"""generate/engine.py: streams that add up to answers, thoughts apart, pictures, batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.scripted import script
from support.tiny_runs import IMAGES, processor

from ernie_tune.generate.answer import AnswerReader, Delta, ThoughtBudget
from ernie_tune.generate.batch import generate
from ernie_tune.generate.engine import Answer, Engine, Request

PROCESSOR = processor()


def asked(text: str, **more: Any) -> Request:
    return Request([{"role": "user", "content": text}], **more)


PICTURE = asked("<image>read the digit", images=[str(IMAGES / "0003.png")])
REQUESTS = [asked("why"), PICTURE, asked("a longer question than the other", thinking=True)]


@pytest.fixture
def engine(golden_model: Any) -> Engine:
    return Engine(golden_model("tiny-b"), PROCESSOR)


def whole(deltas: Sequence[Delta]) -> tuple[str, str, str]:
    assert [d.finish_reason for d in deltas[:-1]] == [""] * (len(deltas) - 1), "only the last one ends it"
    return "".join(d.content for d in deltas), "".join(d.reasoning_content for d in deltas), deltas[-1].finish_reason


@pytest.mark.parametrize("request_", REQUESTS, ids=["text", "picture", "thinking"])
def test_a_stream_adds_up_to_the_answer(request_: Request, engine: Engine) -> None:
    params = engine.params(max_new_tokens=8)
    answer = engine.answer([request_], params)[0][0]
    assert whole(list(engine.stream(request_, params))) == (
        answer.content,
        answer.reasoning_content,
        answer.finish_reason,
    )
    encoded = PROCESSOR.encode(
        request_.messages, request_.images, thinking=request_.thinking, add_generation_prompt=True
    )
    by_hand = generate(engine.model, [encoded.row], PROCESSOR.tokens, params)[0][0]
    assert answer.token_ids == tuple(by_hand.token_ids)
    assert answer.logps == pytest.approx(by_hand.logps)
    assert answer.prompt_tokens == encoded.num_tokens
    if request_.thinking:
        assert not answer.content, "a thought that never ends stays a thought"
        assert answer.reasoning_content


def test_requests_in_one_batch_are_answered_as_if_alone(engine: Engine) -> None:
    params = engine.params(max_new_tokens=5)
    together = engine.answer(REQUESTS, params)
    for request_, answers in zip(REQUESTS, together, strict=True):
        alone = engine.answer([request_], params)[0]
        assert [a.token_ids for a in answers] == [a.token_ids for a in alone]


def test_samples_differ_and_repeat_with_their_seed(engine: Engine) -> None:
    params = engine.params(max_new_tokens=4, temperature=1.0, n=3, seed=5)
    first, second = (engine.answer([PICTURE], params)[0] for _ in range(2))
    assert [a.token_ids for a in first] == [a.token_ids for a in second]
    assert len({a.token_ids for a in first}) > 1
    assert whole(list(engine.stream(PICTURE, params)))[2] == "length", "a stream is one answer, whatever n"


def test_media_tokens_cannot_be_answered(engine: Engine) -> None:
    params = engine.params(temperature=0.5)
    assert set(params.banned_ids) >= {604, 605, 606}
    assert params.stop_ids == PROCESSOR.stop_ids
    assert params.temperature == 0.5


def test_a_picture_matters_and_a_bad_one_is_refused(engine: Engine) -> None:
    params = engine.params(max_new_tokens=1, temperature=1.0)
    other = asked("<image>read the digit", images=[str(IMAGES / "0008.png")])
    logps = [engine.answer([r], params)[0][0].logps[0] for r in (PICTURE, other)]
    assert not np.isclose(*logps)
    with pytest.raises(
        ValueError, match=r"number of <image> tags .* \(1\) must equal the number of images given \(0\)"
    ):
        list(engine.stream(asked("<image>x"), params))
    with pytest.raises(ValueError, match="no such file"):
        engine.answer([asked("<image>x", images=["nowhere.png"])], params)


def test_an_answer_cut_inside_a_character_is_the_same_both_ways(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = PROCESSOR.tokenizer.encode("so 鱻")  # rare: one token a byte
    script(monkeypatch, lambda _: ids[:-1], "length")
    deltas = list(engine.stream(asked("what?"), engine.params()))
    assert whole(deltas) == ("so \ufffd", "", "length")
    assert engine.answer([asked("what?")], engine.params())[0][0].content == "so \ufffd"


@pytest.mark.parametrize(
    ("text", "thinking", "thought", "content"),
    [
        ("七 is seven", None, "", "七 is seven"),
        ("<think>\nso it is\n</think>\n\n七", None, "so it is", "七"),
        ("\nso it is\n</think>\n\n七", True, "so it is", "七"),  # the prompt opened the thought
        ("never ends", True, "never ends", ""),
    ],
)
def test_thoughts_are_told_from_answers(
    text: str, thinking: bool | None, thought: str, content: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [*PROCESSOR.tokenizer.encode(text, allow_special=True), PROCESSOR.stop_ids[0]]
    script(monkeypatch, lambda _: ids)
    request_ = asked("what?", thinking=thinking)
    deltas = list(engine.stream(request_, engine.params()))
    assert whole(deltas) == (content, thought, "stop")
    answer = engine.answer([request_], engine.params())[0][0]
    assert (answer.content, answer.reasoning_content, answer.finish_reason) == (content, thought, "stop")
    assert isinstance(answer, Answer)
    assert answer.logps == (-0.5,) * len(answer.token_ids)
    assert all("\ufffd" not in d.content + d.reasoning_content for d in deltas), "no half characters"


@pytest.mark.parametrize(
    ("stops", "want"),
    [
        (("seven",), "七 is "),
        (("is s", "s se"), "七 "),
        (("seven!",), "七 is seven"),
        (("七",), ""),
        (("n", "seven"), "七 is "),
        ((), "七 is seven"),
    ],
)
def test_an_answer_ends_before_a_stop_string_both_ways(stops: tuple[str, ...], want: str) -> None:
    ids = PROCESSOR.tokenizer.encode("七 is seven")
    reader = AnswerReader(PROCESSOR, stop_strings=stops)
    deltas = [reader.push(i, "stop" if n == len(ids) - 1 else "") for n, i in enumerate(ids)]
    assert whole(deltas) == (want, "", "stop")


def test_a_stop_string_ends_generation_and_is_not_shown(engine: Engine) -> None:
    params = engine.params(max_new_tokens=12)
    full = engine.answer([REQUESTS[0]], params)[0][0]
    stop = full.content[3:5]
    cut = engine.params(max_new_tokens=12, stop_strings=(stop,))
    answer = engine.answer([REQUESTS[0]], cut)[0][0]
    assert answer.content == full.content[: full.content.index(stop)]
    assert answer.finish_reason == "stop"
    assert len(answer.token_ids) < len(full.token_ids)
    assert whole(list(engine.stream(REQUESTS[0], cut))) == (answer.content, "", "stop")


def steered(budget: ThoughtBudget, text: str) -> list[int | None]:
    """What the budget says before each token of `text`, and after the last one until it lets go."""
    so_far: list[int] = []
    said = []
    for i in [*PROCESSOR.tokenizer.encode(text, allow_special=True), None]:
        said.append(budget(so_far))
        while said[-1] is not None:
            so_far.append(said[-1])
            said.append(budget(so_far))
        if i is not None:
            so_far.append(i)
    return said


CLOSE = PROCESSOR.tokenizer.encode("\n</think>\n\n", allow_special=True)


@pytest.mark.parametrize(
    ("text", "opened", "limit", "forced"),
    [
        ("abc", True, 2, CLOSE),
        ("abc", True, 0, CLOSE),
        ("abc", True, 50, []),
        ("\n", True, 1, CLOSE[1:]),
        ("x</think>a b c d e f", True, 3, []),
        ("an answer at once", False, 2, []),
        ("\n<think>\nabc", False, 2, CLOSE),
    ],
)
def test_a_thought_ends_with_its_budget(text: str, opened: bool, limit: int, forced: list[int]) -> None:
    assert [i for i in steered(ThoughtBudget(PROCESSOR, limit, opened), text) if i is not None] == forced


def test_the_engine_keeps_the_budget_of_each_sample(engine: Engine) -> None:
    asked_ = asked("why", thinking=True, max_thought_tokens=3)
    answers = engine.answer([asked_], engine.params(max_new_tokens=12, temperature=1.0, n=2))[0]
    free = engine.answer([asked("why", thinking=True)], engine.params(max_new_tokens=12, temperature=1.0, n=2))[0]
    for answer, unlimited in zip(answers, free, strict=True):
        assert answer.token_ids[:3] == unlimited.token_ids[:3]
        assert list(answer.token_ids[3 : 3 + len(CLOSE)]) == CLOSE
        assert answer.reasoning_content
        assert answer.content
        assert not unlimited.content

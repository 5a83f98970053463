"""Answers of several turns: what a call shows, what is trained of it, that sampling and training
see one policy behind a tool's picture, and what zooming earns.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import paddle
import pytest
from PIL import Image
from support.tiny_runs import processor

from ernie_tune.data.chat import CALL, CALL_END
from ernie_tune.data.records import Meta, Record, Reward, Verifier
from ernie_tune.generate.batch import Completion, Prompt
from ernie_tune.generate.engine import Engine
from ernie_tune.generate.scheduler import Capacity, complete
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset
from ernie_tune.objectives.objective import logp_outputs
from ernie_tune.rewards.functions import Answered, Called, RewardFunction
from ernie_tune.rewards.rubric import RowVerifiers, Rubric
from ernie_tune.train.own_tools import OwnTool
from ernie_tune.train.rolled import group_state
from ernie_tune.train.rolled import told as told_of
from ernie_tune.train.rollout_settings import RolloutSettings
from ernie_tune.train.rollouts import Rollouts
from ernie_tune.train.turns import Turns, in_pixels

PROCESSOR = processor()
S = RolloutSettings(
    prompts=1, num_generations=2, max_completion_length=200, dynamic_sample=False, tools=("zoom",), max_turns=3
)


def call(box: Any, name: str = "zoom") -> str:
    return CALL + json.dumps({"name": name, "arguments": {"box": box}}) + CALL_END


def said(text: str, end: bool = False) -> Completion:
    ids = PROCESSOR.tokenizer.encode(text) + ([PROCESSOR.stop_ids[0]] if end else [])
    return Completion(ids, [-0.5] * len(ids), "stop", [True] * len(ids), [-0.5] * len(ids))


def record(folder: Path, **scene: Any) -> Record:
    picture = np.arange(112 * 168 * 3, dtype=np.uint32).reshape(112, 168, 3) % 251
    Image.fromarray(picture.astype(np.uint8)).save(folder / "a.png")
    words = ({"role": "user", "content": "<image>which digit?"},)
    return Record(
        "verifiable", words, (str(folder / "a.png"),), reward=Reward("7", (), {}, scene), meta=Meta("x.jsonl", 1)
    )


class Script:
    """A sampler that says one text after the other, whoever asks; behind its end the model goes
    on.
    """

    def __init__(self, *turns: Completion, then: Any = None) -> None:
        self.turns, self.then = list(turns), then
        self.asked: list[Sequence[Prompt]] = []

    def __call__(self, prompts: Sequence[Prompt]) -> Mapping[int, Sequence[Completion]]:
        self.asked.append(prompts)
        if not self.turns:
            return self.then(prompts) if self.then else {p.key: [said("7", True)] * p.params.n for p in prompts}
        turn = self.turns.pop(0)
        return {p.key: [dataclasses.replace(turn) for _ in range(p.params.n)] for p in prompts}


def rollouts(row: Record, sampler: Any, settings: RolloutSettings = S) -> Rollouts:
    rubric = Rubric(
        [RewardFunction(lambda completions, **_: [float(i) for i, _ in enumerate(completions)], "n")], check=False
    )
    return Rollouts(settings, [row], PROCESSOR, sampler, rubric)


# --- what a call shows ----------------------------------------------------------------------------


@pytest.mark.parametrize(("box", "frame", "wanted"), [
    ((10, 20, 60, 70), None, (10, 20, 60, 70)),
    ((10.4, 20.6, 59.5, 69.1), None, (10, 20, 60, 70)),
    ((-50, -50, 500, 500), None, (0, 0, 168, 112)),
    ((100, 50, 104, 54), None, (88, 38, 116, 66)),  # 28 pixels about its middle
    ((0, 0, 4, 4), None, (0, 0, 28, 28)),
    ((166, 110, 168, 112), None, (140, 84, 168, 112)),
    ((400, 400, 900, 900), None, (140, 84, 168, 112)),  # outside: what is nearest
    ((500, 500, 1000, 1000), 1000, (84, 56, 168, 112)),
    ((0.5, 0.5, 1, 1), 1, (84, 56, 168, 112)),
])  # fmt: skip
def test_what_is_shown_lies_in_the_picture(tmp_path: Path, box: Any, frame: Any, wanted: Any) -> None:
    row = record(tmp_path, **({"frame": frame} if frame else {}))
    assert in_pixels(row, box, (168, 112)) == wanted


@pytest.mark.parametrize(("text", "problem"), [
    ("", "a call is"), (CALL + "zoom" + CALL_END, "a call is"), (CALL + "[]" + CALL_END, "a call is"),
    (call([1, 2, 3, 4], "crop"), "the only tool is zoom"), (call([1, 2, 3]), "box must be"), (call("here"), "a call is"),
    (call([5, 0, 5, 9]), "box must be"), (call([1, 2, 1e400, 4]), "box must be"), (call(None), "a call is"),
])  # fmt: skip
def test_calls_that_cannot_be_understood_are_answered(tmp_path: Path, text: str, problem: str) -> None:
    talk: Any = types.SimpleNamespace(calls=[])
    for words in (text, "words " + call([1, 2, 30, 40])):
        Turns(PROCESSOR).answer(record(tmp_path), talk, words)
    wrong, right = talk.calls
    assert wrong.box is None
    assert wrong.problem.startswith(problem)
    assert (right.box, right.problem) == ((1.0, 2.0, 30.0, 40.0), "")


# --- tools that users bring -----------------------------------------------------------------------


def add(a: int, b: int = 1, how: Literal["plain", "words"] = "plain") -> Any:
    """Add two numbers.

    Args:
        a: the first
            of them
        b (int): the second

    Returns:
        their sum
    """
    if how == "words":
        return {"sum": f"<image> {a + b}"}
    return str(a + b)


def test_what_a_prompt_says_of_a_function() -> None:
    assert OwnTool(add).schema == {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "description": "the first of them"},
                "b": {"type": "integer", "description": "the second"},
                "how": {"enum": ["plain", "words"]},
            },
            "required": ["a"],
        },
    }

    def search(words: list[str], most: int | None = None, *rest: Any, **more: Any) -> str:
        """Search."""
        return ""

    told = OwnTool(search).schema["parameters"]
    assert told["properties"] == {"words": {"type": "array", "items": {"type": "string"}}, "most": {"type": "integer"}}
    for wrong in (lambda a: a, lambda: "x"):
        with pytest.raises(ValueError, match="must be a function with a name and a docstring"):
            OwnTool(wrong)


def test_a_call_of_a_function_never_fails() -> None:
    def sleeps() -> str:
        """Sleep."""
        time.sleep(60)
        return ""

    async def waits(text: str) -> str:
        """Wait."""
        await asyncio.sleep(0)
        return text * 9000

    assert OwnTool(add)({"a": 2, "b": 3}) == ("5", "")
    assert OwnTool(add)({"a": 2, "how": "words"}) == ('{"sum": "<image> 3"}', "")
    assert OwnTool(add)({"c": 2}) == ("", "TypeError: missing a required argument: 'a'")
    assert OwnTool(add)({"a": "x"})[1].startswith("TypeError: ")
    assert OwnTool(sleeps, limit_seconds=0.1)({}) == ("", "it took too long")
    text, problem = OwnTool(waits)({"text": "ab"})
    assert (len(text), text[-3:], problem) == (8194, "b …"[-3:], "")


def test_a_function_answers_within_an_answer(tmp_path: Path) -> None:
    """Its words are heard and not learned; a round that goes on elsewhere has the same tokens."""
    calls = [
        {"name": "add", "arguments": {"a": 2, "how": "words"}},
        {"name": "add", "arguments": '{"b": 2}'},
        {"name": "zoom", "arguments": {"box": [0, 0, 9, 9]}},
    ]
    turns = [said(CALL + json.dumps(one) + CALL_END) for one in calls]
    settings = dataclasses.replace(S, tools=(), own_tools=(OwnTool(add),), max_turns=4, max_completion_length=400)
    script = Script(*turns, said("7", True))
    made = rollouts(record(tmp_path), script, settings)
    (group,) = made.make_round()
    asked = PROCESSOR.decode(script.asked[0][0].row.input_ids_L.tolist())
    assert json.dumps({"type": "function", "function": OwnTool(add).schema}) in asked
    for answer, dialogue in zip(group.answers, group.unit.dialogues, strict=True):
        told = [(one.name, one.result, one.problem) for one in answer.calls]
        assert told == [
            ("add", '{"sum": "<image> 3"}', ""),
            ("add", "", "TypeError: missing a required argument: 'a'"),
            ("zoom", "", "the only tool is add"),
        ]
        assert len(dialogue.row.grid_thw_n3) == 1, "a tag in words shows nothing"
        text = PROCESSOR.decode(list(answer.token_ids))
        assert '{"sum": "<image> 3"}' in text
        assert "error: the only tool is add" in text
        trained = [i for i, t in zip(answer.token_ids, dialogue.trained_L[-len(answer.token_ids) :], strict=True) if t]
        assert trained == [i for turn in (*turns, said("7", True)) for i in turn.token_ids]
    assert made.metrics["tools/failure_frequency"] == pytest.approx(2 / 3)
    again = made._group(json.loads(json.dumps(group_state(group))))
    assert again.answers == group.answers
    for one, other in zip(again.unit.dialogues, group.unit.dialogues, strict=True):
        np.testing.assert_array_equal(one.row.input_ids_L, other.row.input_ids_L)
        np.testing.assert_array_equal(one.trained_L, other.trained_L)
    shown = next(told_of(0, group))["calls"]
    assert shown[0] == {"name": "add", "arguments": {"a": 2, "how": "words"}, "result": '{"sum": "<image> 3"}'}


# --- whole answers --------------------------------------------------------------------------------


def test_what_the_policy_chose_is_trained_and_nothing_else(tmp_path: Path) -> None:
    row, script = record(tmp_path), Script(said(call([0, 0, 56, 56])), said(call("?")), said("7", True))
    made = rollouts(row, script)
    (group,) = made.make_round()
    first, second = said(call([0, 0, 56, 56])).token_ids, said(call("?")).token_ids
    for answer, dialogue in zip(group.answers, group.unit.dialogues, strict=True):
        assert answer.text == "7"
        assert [one.box for one in answer.calls] == [(0, 0, 56, 56), None]
        ids = list(answer.token_ids)
        assert ids[: len(first)] == first
        text = PROCESSOR.decode(dialogue.row.input_ids_L.tolist())
        assert text.count("<tool_output>") == 2
        assert "error: a call is" in text
        at = dialogue.num_tokens - len(ids)
        trained = dialogue.trained_L[at:]
        assert [i for i, t in zip(ids, trained, strict=True) if t] == [*first, *second, *said("7", True).token_ids]
        assert not dialogue.trained_L[:at].any()
        pixels, grid = PROCESSOR.patches("image", Image.open(row.images[0]).crop((0, 0, 56, 56)))
        np.testing.assert_array_equal(dialogue.row.pixel_values_PC[-len(pixels) :], pixels)
        assert dialogue.row.grid_thw_n3[-1].tolist() == list(grid)
        assert len(dialogue.row.grid_thw_n3) == 2
    assert group.unit.shared == 0
    assert len(group.columns["advantage_N"]) == sum(len(x) for x in (first, second)) * 2 + 2 * 2
    assert made.metrics["tools/call_frequency"] == 1
    assert made.metrics["tools/failure_frequency"] == 0.5
    assert made.metrics["tools/turns_mean"] == 3


def test_turns_pictures_and_tokens_are_bounded(tmp_path: Path) -> None:
    row, turn = record(tmp_path), said(call([0, 0, 56, 56]))
    endless = Script(*[turn] * 9)
    (group,) = rollouts(row, endless, dataclasses.replace(S, max_turns=2)).make_round()
    assert len(endless.asked) == 2
    assert [len(a.calls) for a in group.answers] == [1, 1]
    few = Script(*[turn] * 9)
    (group,) = rollouts(row, few, dataclasses.replace(S, max_pictures=1)).make_round()
    assert [one.shown is None for one in group.answers[0].calls] == [False, True]
    sizes = []
    wide = said(call([0, 0, 112, 112]))
    for most in (0, 56 * 56):
        (group,) = rollouts(row, Script(wide), dataclasses.replace(S, max_tool_pixels=most)).make_round()
        sizes.append(int(group.unit.dialogues[0].row.grid_thw_n3[-1].prod()))
    assert sizes[0] == 4 * sizes[1], "half as wide and high"
    short = Script(*[turn] * 9)
    size = len(turn.token_ids)
    (group,) = rollouts(row, short, dataclasses.replace(S, max_completion_length=size)).make_round()
    assert [len(a.calls) for a in group.answers] == [0, 0]  # nothing is left to say
    none = Script(said("7", True))
    (group,) = rollouts(row, none).make_round()
    assert group.unit.shared > 0  # nobody called: the prompt is packed once
    assert [len(some) for some in none.asked[1:]] == [0, 0]  # all ranks call as often
    left = Script(turn)
    rollouts(row, left).make_round()
    assert {p.params.max_new_tokens for p in left.asked[1]} == {S.max_completion_length - size}
    assert len({p.index for p in left.asked[1]}) == 2  # each sample draws for itself


def test_sampling_and_training_see_one_policy_behind_a_tools_picture(tmp_path: Path) -> None:
    paddle.seed(5)
    model = ErnieModel(preset("tiny-a"))
    model.eval()
    engine = Engine(model, PROCESSOR)
    then = lambda prompts: dict(complete(engine.scheduler(Capacity(rows=8)), prompts))  # noqa: E731
    turn = said(call([0, 0, 56, 56]))
    limit = len(turn.token_ids) + 5
    script = Script(turn, then=then)
    made = rollouts(record(tmp_path), script, dataclasses.replace(S, max_completion_length=limit))
    groups = made.make_round()
    batch = made.batch(groups)
    tokens = PROCESSOR.tokens
    banned = tokens.placeholders() + tokens.markers()
    with paddle.no_grad():
        logp_N = logp_outputs(model, model(batch.inputs), batch, banned=banned)["logp_N"].numpy()
    ends = np.cumsum(groups[0].length_G)
    for end in ends:  # the last turn of each answer was sampled by the engine
        np.testing.assert_allclose(logp_N[end - 5 : end], batch.columns["sampled_logp_N"][end - 5 : end], atol=1e-5)
    again = rollouts(record(tmp_path), Script(turn, then=then), dataclasses.replace(S, max_completion_length=limit))
    assert [a.token_ids for a in again.make_round()[0].answers] == [a.token_ids for a in groups[0].answers]


def test_resuming_in_a_round(tmp_path: Path) -> None:
    row, settings = record(tmp_path), dataclasses.replace(S, num_iterations=2)
    turns = said(call([0, 0, 56, 56])), said("7", True)
    wanted = list(itertools.islice(rollouts(row, Script(*turns), settings).windows(), 2))[1][0]
    stopped = rollouts(row, Script(*turns), settings)
    next(stopped.windows())
    stopped.save(tmp_path / "round")
    again = rollouts(row, Script(*turns), settings)
    again.load(tmp_path / "round")
    batch = next(again.windows())[0]
    np.testing.assert_array_equal(batch.inputs.input_ids_T, wanted.inputs.input_ids_T)
    np.testing.assert_array_equal(batch.inputs.pixel_values_PC, wanted.inputs.pixel_values_PC)
    for name, values in wanted.columns.items():
        np.testing.assert_array_equal(batch.columns[name], values, err_msg=name)


def test_every_variant_of_the_template_closes_the_call_and_begins_a_turn() -> None:
    for variant in ("hf", "ernie_vl", "ernie_vl_nothink"):
        made = type(PROCESSOR)(PROCESSOR.tokenizer, variant, PROCESSOR.images)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        whole = made.encode([*turns, {"role": "tool", "content": "c"}], add_generation_prompt=True)
        result = made.encode_result("c")
        ids = result.row.input_ids_L.tolist()
        assert whole.row.input_ids_L.tolist()[-len(ids) :] == ids
        assert not result.trained_L.any()
        assert ids[0] in PROCESSOR.stop_ids


# --- what it earns --------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "shown", "wanted"), [
    ("7", (90, 40, 130, 80), 0.9), ("7", (0, 0, 168, 112), 0.8), ("7", (0, 0, 28, 28), 0.8), ("7", None, 0.8),
    ("3", (90, 40, 130, 80), 0.0), ("7", (90, 40, 109, 80), 0.8),
])  # fmt: skip
def test_zooming_earns_beside_a_right_answer_alone(tmp_path: Path, text: str, shown: Any, wanted: float) -> None:
    """0.8 for the answer, 0.1 where what was shown holds the target and is not half of it all."""
    row = record(tmp_path, target=[100, 50, 112, 62])
    checks = (Verifier("exact", 0.8), Verifier("zoom", 0.1))
    row = dataclasses.replace(row, reward=dataclasses.replace(row.reward, verifiers=checks))
    rows = RowVerifiers()
    rows.check(row)
    calls = (Called("zoom", shown, "", shown, (168, 112)),) if shown else ()
    assert rows([(row, [Answered(text, calls=calls)])])[0][0] == pytest.approx(wanted)


def test_a_tool_that_is_none() -> None:
    with pytest.raises(ValueError, match=r"tools \(crop\) must be of zoom"):
        dataclasses.replace(S, tools=("crop",))
    assert Turns(PROCESSOR).most == 4

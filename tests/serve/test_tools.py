"""Tool calls: taken out of answers however these are cut, told in OpenAI's shapes, and put back
into the prompt as the template writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import openai
import pytest
from live import Live, live

from ernie_tune.data.processor import Processor
from ernie_tune.generate.answer import CallSplitter, ToolCall
from ernie_tune.generate.engine import Engine, Prepared, Request

PROCESSOR = Processor.bundled("tiny")
# short: every token is a step of the model
WEATHER = ToolCall("w", '{"c": "北"}')
CLOCK = ToolCall("t", "{}")
TOOLS = [{"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}]
ASKED = [{"role": "user", "content": "rain?"}]


def written(calls: Sequence[ToolCall], content: str = "") -> str:
    """An answer as the template that trains models writes it."""
    message = {"role": "assistant", "content": content, "tool_calls": [vars(call) for call in calls]}
    pieces = PROCESSOR.template.pieces([*ASKED, message], thinking=False)
    return "".join(piece.text for piece in pieces if piece.trained and piece.text != "</s>")


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (written([WEATHER]), "", (WEATHER,)),
        (written([WEATHER, CLOCK], "I."), "I.", (WEATHER, CLOCK)),
        ("a < b\n<tool\n", "a < b\n<tool\n", ()),
        ("\n<tool_call>\nno json\n</tool_call> rest", "\n<tool_call>\nno json\n</tool_call> rest", ()),
        ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', ()),
        (
            '<tool_call>{"name": "x", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": "x", "arguments": [1]}</tool_call>',
            (),
        ),
        ('<tool_call>{"name": "t"}', '<tool_call>{"name": "t"}', ()),
        ('<tool_call>\n<tool_call>{"name": "t"}</tool_call>!', "<tool_call>!", (CLOCK,)),
        ("only </tool_call>", "only </tool_call>", ()),
    ],
)
def test_calls_are_taken_out(text: str, content: str, calls: tuple[ToolCall, ...], size: int) -> None:
    splitter, out, found = CallSplitter(), "", []
    for a in range(0, len(text), size):
        settled, ended = splitter.push(text[a : a + size])
        out, found = out + settled, [*found, *ended]
    assert (out + splitter.flush(), tuple(found)) == (content, calls)


class Forced(Engine):
    """Answers with `says` where tools are offered."""

    says = ""

    def prepare(self, request: Request, *args: Any, **options: Any) -> Prepared:
        prepared = super().prepare(request, *args, **options)
        ids = [*PROCESSOR.tokenizer.encode(self.says, allow_special=True), PROCESSOR.stop_ids[0]]
        steer = lambda: lambda tokens: ids[len(tokens)]  # noqa: E731
        return replace(prepared, prompt=replace(prepared.prompt, steer=steer)) if self.says else prepared


@pytest.fixture(scope="module")
def running() -> Iterator[Live]:
    from conftest import _golden_model

    with live(Forced(_golden_model("tiny-b", "float32"), PROCESSOR), {"ernie": None}) as one:
        yield one


@pytest.fixture
def engine(running: Live, monkeypatch: pytest.MonkeyPatch) -> Forced:
    found = running.service.engine
    assert isinstance(found, Forced)
    monkeypatch.setattr(found, "says", written([WEATHER, CLOCK], "I."))
    return found


def ask(running: Live, messages: list[dict[str, Any]] = ASKED, **more: Any) -> Any:
    values: dict[str, Any] = {"model": "ernie", "max_tokens": 200, "temperature": 0, "tools": TOOLS, **more}
    extra = {"return_token_ids": True, "chat_template_kwargs": {"enable_thinking": False}}
    return running.client().chat.completions.create(messages=messages, extra_body=extra, **values)  # type: ignore[arg-type]


@pytest.mark.usefixtures("engine")
def test_an_answer_with_calls(running: Live) -> None:
    choice = ask(running).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I."
    calls = choice.message.tool_calls
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("function", "w", {"c": "北"}),
        ("function", "t", {}),
    ]
    assert calls[0].id != calls[1].id
    cut = ask(running, max_tokens=5).choices[0]
    assert (cut.finish_reason, cut.message.tool_calls) == ("length", None)


@pytest.mark.usefixtures("engine")
def test_a_stream_with_calls(running: Live) -> None:
    content, calls, reasons = "", [], []
    for chunk in ask(running, stream=True):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            calls += choice.delta.tool_calls or []
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert (content, reasons) == ("I.", ["tool_calls"])
    assert [(c.index, c.function.name, c.function.arguments) for c in calls] == [
        (0, "w", WEATHER.arguments),
        (1, "t", "{}"),
    ]


@pytest.mark.parametrize("more", [{"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}])
@pytest.mark.usefixtures("engine")
def test_without_tools_marks_are_text(running: Live, more: dict[str, Any]) -> None:
    choice = ask(running, **more).choices[0]
    assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
    assert choice.message.content == written([WEATHER, CLOCK], "I.")


@pytest.mark.usefixtures("engine")
def test_the_prompt_is_the_templates(running: Live) -> None:
    """Tools, the calls that the client sends back, and their results, in the bytes that training
    writes.
    """
    ids = ["a", "b"]
    calls = [
        {"id": i, "type": "function", "function": vars(call)} for i, call in zip(ids, (WEATHER, CLOCK), strict=True)
    ]
    answer = {"role": "assistant", "content": "I.", "tool_calls": calls}
    results = [
        {"role": "tool", "content": text, "tool_call_id": i} for i, text in zip(ids, ("sunny", "noon"), strict=True)
    ]
    got = ask(running, [*ASKED, answer, *results], max_tokens=1).choices[0].message.prompt_token_ids
    turns: list[dict[str, Any]] = [
        *ASKED,
        {"role": "assistant", "content": "I.", "tool_calls": [vars(WEATHER), vars(CLOCK)]},
    ]
    turns += [{"role": "tool", "content": text} for text in ("sunny", "noon")]
    want = PROCESSOR.encode(turns, tools=TOOLS, thinking=False, add_generation_prompt=True)
    assert got == want.row.input_ids_L.tolist()
    assert "<tool_list>" in PROCESSOR.tokenizer.decode(got)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [*ASKED, {"role": "tool", "content": "x", "tool_call_id": "a"}],
            "must be the id of a call of the answer before",
        ),
        (
            "twice",
            r"messages\[3\].tool_call_id \('a'\) must be the id of a call .* no result yet; waiting for one: \['b'\]",
        ),
        ("missing", r"messages\[3\] must be the result of tool call 'b'"),
        ("no json", "tool call arguments .* must be JSON"),
    ],
)
def test_results_that_fit_no_call(running: Live, messages: Any, words: str) -> None:
    arguments = "{" if messages == "no json" else "{}"
    calls = [{"id": i, "type": "function", "function": {"name": "f", "arguments": arguments}} for i in "ab"]
    answer = {"role": "assistant", "content": None, "tool_calls": calls}
    a, b = ({"role": "tool", "content": "x", "tool_call_id": i} for i in "ab")
    sent = {
        "twice": [*ASKED, answer, a, a],
        "missing": [*ASKED, answer, a, *ASKED],
        "no json": [*ASKED, answer, a, b],
    }
    with pytest.raises(openai.BadRequestError, match=words):
        ask(running, sent[messages] if isinstance(messages, str) else messages)

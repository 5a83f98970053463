"""Answers that follow rules, with a model of random weights: whatever it would like to say, JSON
parses and fits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import numpy as np
import openai
import pytest
from live import Live, live

from ernie_tune.data.processor import Processor
from ernie_tune.generate.batch import Constraint
from ernie_tune.generate.engine import Engine
from ernie_tune.serve.guide import CallRule, Grammars, Guide

pytest.importorskip("llguidance")
ASKED = [{"role": "user", "content": "rain?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["北京", "Oslo", 'a "b"']},
        "degrees": {"type": "integer", "minimum": -9, "maximum": 40},
        "words": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
        "sure": {"type": ["boolean", "null"]},
    },
    "required": ["city", "degrees", "words", "sure"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {
        "type": "function",
        "function": {"name": "clock", "parameters": {"properties": {}, "additionalProperties": False}},
    },
]


def special(name: str = "tiny", *tokens: str) -> Processor:
    """A processor whose vocabulary has these tokens, too, as the released ones have theirs."""
    from ernie_tune.data.tokenizer import ADDED_FILE, Tokenizer

    plain = Tokenizer.bundled(name)
    files = dict(plain._files)
    added = json.loads(files.get(ADDED_FILE, b"{}"))
    files[ADDED_FILE] = json.dumps({**added, **{t: plain.vocab_size + i for i, t in enumerate(tokens)}}).encode()
    return Processor(Tokenizer(files, "a test"))


PROCESSORS = {
    "tiny": Processor.bundled("tiny"),
    "small": Processor.bundled("small"),
    "special": special("tiny", "<tool_call>", "</tool_call>"),
    "opens itself": Processor.bundled("tiny", template="ernie_vl"),
}


def said(processor: Processor, constraint: Constraint, seed: int, most: int = 400) -> tuple[str, bool]:
    """What a sampler without any taste says, and whether it ended by itself."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for _ in range(most):
        allowed_V = constraint.allowed()
        if allowed_V is None:
            allowed_V = np.ones(processor.tokenizer.vocab_size, bool)
        token = int(rng.choice(np.flatnonzero(allowed_V)))
        constraint.accept(token)
        if token in processor.stop_ids:
            return processor.decode(ids), True
        ids.append(token)
    return processor.decode(ids), False


def grammars(name: str) -> Grammars:
    processor = PROCESSORS[name]
    return Grammars(processor, processor.tokenizer.vocab_size + 30)


@pytest.mark.parametrize("name", PROCESSORS)
def test_json_fits_its_schema_in_every_vocabulary(name: str) -> None:
    follow = grammars(name).follow(Guide("json", SCHEMA), None)
    texts = set()
    for seed in range(8):
        text, ended = said(PROCESSORS[name], follow(), seed)
        assert ended
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(text)), text
        assert text == json.dumps(json.loads(text), ensure_ascii=False) or "\\u" in text, "one space after , and :"
        texts.add(text)
    assert len(texts) > 4


@pytest.mark.parametrize("name", PROCESSORS)
def test_choices_and_patterns(name: str) -> None:
    made = grammars(name)
    for seed in range(4):
        for rule, fits in (
            (Guide("choice", ['yes "so"', "否", "a/b"]), re.compile('yes "so"|否|a/b')),
            (Guide("regex", r"[0-9]{2}/[a-c]+x九"), re.compile(r"[0-9]{2}/[a-c]+x九")),
        ):
            text, ended = said(PROCESSORS[name], made.follow(rule, None)(), seed)
            assert not ended or fits.fullmatch(text), text
    assert ended


@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("name", PROCESSORS)
def test_calls_that_are_asked_for(name: str, several: bool) -> None:
    from ernie_tune.generate.answer import CallSplitter

    follow = grammars(name).follow(None, CallRule(TOOLS, True, several))
    counts = set()
    for seed in range(6):
        text, ended = said(PROCESSORS[name], follow(), seed)
        splitter = CallSplitter()
        rest, calls = splitter.push(text)
        if ended:
            assert (rest + splitter.flush(), bool(calls)) == ("", True), text
        for call in calls:
            schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}[call.name]
            assert jsonschema_rs.is_valid(schema, json.loads(call.arguments))
        counts.add(len(calls))
    assert (max(counts) > 1) == several


@pytest.mark.parametrize("name", ["tiny", "special", "opens itself"])
def test_a_thought_comes_first_and_is_free(name: str) -> None:
    processor = PROCESSORS[name]
    opened = processor.template.opens_thought(True)
    constraint = grammars(name).follow(Guide("choice", ["ja"]), None, thinks=True, opened=opened)()
    written = processor.template.style.open.removeprefix(processor.template.style.prefill) if not opened else ""
    for token in processor.tokenizer.encode(written, allow_special=True):
        allowed_V = constraint.allowed()
        assert allowed_V is not None
        assert np.flatnonzero(allowed_V).tolist() == [token]
        constraint.accept(token)
    for token in processor.tokenizer.encode("hm {\n</think>", allow_special=True):
        allowed_V = constraint.allowed()
        assert allowed_V is not None
        assert allowed_V[token]
        assert not allowed_V[list(processor.stop_ids)].any(), "no answer yet"
        constraint.accept(token)
    assert said(processor, constraint, 0) == ("\n\nja", True)


@pytest.mark.parametrize("name", ["tiny", "special"])
def test_a_call_in_a_free_answer_follows_its_tool(name: str) -> None:
    processor = PROCESSORS[name]
    constraint = grammars(name).follow(None, CallRule(TOOLS, False))()
    assert constraint.allowed() is None
    for token in processor.tokenizer.encode("<tool_call> is a mark <tool_call", allow_special=False)[:3]:
        constraint.accept(token)
    constraint = grammars(name).follow(None, CallRule(TOOLS, False))()
    for _ in range(2):
        for token in processor.tokenizer.encode("Well. <tool_call>", allow_special=True):
            assert constraint.allowed() is None
            constraint.accept(token)
        text, rng = "", np.random.default_rng(3)
        while (allowed_V := constraint.allowed()) is not None:
            token = int(rng.choice(np.flatnonzero(allowed_V)))
            constraint.accept(token)
            text += processor.decode([token])
            assert len(text) < 1000
        assert text.startswith('\n{"name": "')
        assert text.endswith("}\n</tool_call>")


def test_an_answer_or_a_call() -> None:
    follow = grammars("tiny").follow(Guide("json", SCHEMA), CallRule(TOOLS, False))
    starts = {said(PROCESSORS["tiny"], follow(), seed)[0][:1] for seed in range(10)}
    assert starts == {"{", "<"}


@pytest.mark.parametrize(
    "rule",
    [
        Guide("json", {"type": "nope"}),
        Guide("json", {"type": "object", "not": {}}),
        Guide("json", {"$ref": "http://127.0.0.1/schema"}),
        Guide("json", {"$ref": "#"}),
        Guide("json", {"type": "string", "pattern": "(a"}),
        Guide("regex", "(" * 2000 + ")" * 2000),
        Guide("regex", "[0-9"),
        Guide("json", {"enum": [[[["x"]]]], "description": "x" * 200_000}),
    ],
)
def test_rules_that_cannot_be_followed(rule: Guide) -> None:
    with pytest.raises(ValueError, match=r"rules? of (the|an) answer must"):
        grammars("tiny").follow(rule, None)


# --- over the API ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running() -> Iterator[Live]:
    from conftest import _golden_model

    with live(Engine(_golden_model("tiny-b", "float32"), PROCESSORS["tiny"]), {"ernie": None}) as one:
        yield one


SMALL = {"type": "object", "properties": {"d": {"enum": [1, "二"]}}, "required": ["d"], "additionalProperties": False}
SMALL_TOOLS = [{**TOOLS[0], "function": {"name": "weather", "parameters": SMALL}}, TOOLS[1]]


def ask(running: Live, **more: Any) -> Any:
    values: dict[str, Any] = {"model": "ernie", "max_tokens": 300, "temperature": 1, "top_p": 1, "messages": ASKED}
    return running.client().chat.completions.create(**{**values, **more})


FORMAT = {"type": "json_schema", "json_schema": {"name": "weather", "strict": True, "schema": SCHEMA}}


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_response_format(stream: bool, thinking: bool, running: Live) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": thinking}, "reasoning_max_tokens": 5}
    got = ask(running, response_format=FORMAT, n=3, seed=5, stream=stream, extra_body=extra)
    texts, reasons, thoughts = ["", "", ""], ["", "", ""], ["", "", ""]
    for part in got if stream else [got]:
        for choice in part.choices:
            message = choice.delta if stream else choice.message
            texts[choice.index] += message.content or ""
            thoughts[choice.index] += getattr(message, "reasoning_content", None) or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert reasons == ["stop"] * 3
    assert all(jsonschema_rs.is_valid(SCHEMA, json.loads(text)) for text in texts)
    assert all(map(bool, thoughts)) == thinking
    assert len(set(texts)) == 3


def test_json_objects_and_what_cuts_them(running: Live) -> None:
    got = ask(running, response_format={"type": "json_object"}, max_tokens=3, temperature=0).choices[0]
    assert got.finish_reason == "length"
    assert got.message.content.startswith("{")
    small = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
    for extra in (
        {"guided_json": small},
        {"guided_json": json.dumps(small)},
        {"structured_outputs": {"json": small}},
        {"json_schema": small},
        {"response_format": {"type": "json_object", "schema": small}},
        {"guided_regex": r'\{"a": 1\}'},
        {"structured_outputs": {"choice": ['{"a": 1}']}},
    ):
        choice = ask(running, extra_body=extra).choices[0]
        assert (choice.message.content, choice.finish_reason) == ('{"a": 1}', "stop"), extra
    raw = running.client().completions.create(
        model="ernie", prompt="x", max_tokens=50, extra_body={"guided_choice": ["左", "右"]}
    )
    assert raw.choices[0].text in ("左", "右")


def test_a_model_class_of_the_client(running: Live) -> None:
    from pydantic import BaseModel, Field

    class Weather(BaseModel):
        city: str = Field(max_length=3)
        degrees: int = Field(ge=0, le=9)

    got = running.client().beta.chat.completions.parse(
        model="ernie",
        messages=ASKED,
        response_format=Weather,
        max_tokens=200,  # type: ignore[arg-type]
    )
    parsed = got.choices[0].message.parsed
    assert isinstance(parsed, Weather)
    again = [*ASKED, got.choices[0].message.model_dump(), *ASKED]
    assert ask(running, messages=again, max_tokens=1).choices, "and the message may be sent back"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "weather"}}]},
            },
            {"weather"},
        ),
    ],
)
def test_forced_calls(choice: Any, names: set[str], stream: bool, running: Live) -> None:
    for parallel in (True, False):
        got = ask(
            running, tools=SMALL_TOOLS, tool_choice=choice, stream=stream, parallel_tool_calls=parallel, max_tokens=100
        )
        calls, reason, content = [], "", ""
        for part in got if stream else [got]:
            message = part.choices[0].delta if stream else part.choices[0].message
            calls += [c.function for c in message.tool_calls or []]
            content += message.content or ""
            reason = part.choices[0].finish_reason or reason
        assert content == "" or reason == "length"
        assert reason in ("tool_calls", "length")
        assert calls
        assert {call.name for call in calls} <= names
        assert len(calls) == 1 or (parallel and choice == "required") or len(names) == 1
        assert len(calls) == 1 or parallel
        for call in calls:
            schema = {tool["function"]["name"]: tool["function"]["parameters"] for tool in SMALL_TOOLS}[call.name]  # type: ignore[index]
            assert jsonschema_rs.is_valid(schema, json.loads(call.arguments))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice must be 'none' or 'auto' without tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice names 'f'"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice .* must be 'none', 'auto' or 'required'"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice.type .* must be one of 'function'"),
        ({"response_format": {"type": "grammar"}}, "response_format.type .* must be one of 'text', 'json_object'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema must be given"),
        (
            {"response_format": FORMAT, "extra_body": {"guided_regex": "a"}},
            "response_format and guided_regex must not both",
        ),
        ({"response_format": FORMAT, "extra_body": {"ignore_eos": True}}, "ignore_eos must not be set"),
        ({"response_format": FORMAT, "tools": TOOLS, "tool_choice": "required"}, "tool_choice asks for a call"),
        ({"extra_body": {"guided_regex": "(a"}}, "must be one that can be followed"),
        ({"extra_body": {"guided_json": {"type": "array", "items": {"$ref": "#"}, "minItems": 1}}}, "followed further"),
        ({"extra_body": {"structured_outputs": {"grammar": "x"}}}, "structured_outputs.grammar .* has no effect here"),
        ({"extra_body": {"guided_json": "{"}}, "guided_json .*must be a schema, or its JSON"),
        ({"extra_body": {"guided_json": "[" * 5000}}, "guided_json .*must be a schema, or its JSON"),
    ],
)
def test_what_cannot_be_asked_for(more: dict[str, Any], words: str, running: Live) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        ask(running, **more)


def test_without_the_package_it_is_named(running: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.BadRequestError, match=r"need llguidance; pip install llguidance"):
        ask(running, response_format=FORMAT)

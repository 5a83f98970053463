"""A table of requests as people and clients send them: what is taken, what is refused, and how a
refusal names the field. No answer is 5xx.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from live import Live, clip, image_part, live, text_part, video_part
from support.tiny_runs import IMAGES, processor

from ernie_tune.generate.engine import Engine

HELLO = {"role": "user", "content": "hello"}
T = [HELLO]
PIXEL = image_part(IMAGES / "0003.png")["image_url"]["url"]
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "x"}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
ECHO = {"role": "assistant", "content": "4", "refusal": None, "annotations": None, "audio": None}
ECHO |= {"function_call": None, "tool_calls": None}


def user(*parts: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(parts)}]}


def turns(*messages: Any) -> dict[str, Any]:
    return {"messages": [HELLO, *messages]}


def picture(**more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": PIXEL, **more}}


# What asks for nothing, and what clients send back.
TAKEN: dict[str, dict[str, Any]] = {
    "plain": {},
    **{
        f"{name}={value!r}": {name: value}
        for name, value in (
            ("response_format", {"type": "text"}),
            ("parallel_tool_calls", True),
            ("parallel_tool_calls", False),
            ("logit_bias", {}),
            ("store", False),
            ("service_tier", "auto"),
            ("service_tier", "default"),
            ("metadata", {}),
            ("metadata", {"a": "b"}),
            ("modalities", ["text"]),
            ("verbosity", "medium"),
            ("reasoning_effort", "none"),
            ("reasoning_effort", "medium"),
            ("min_p", 0),
            ("min_p", 0.0),
            ("min_tokens", 0),
            ("length_penalty", 1.0),
            ("best_of", 1),
            ("echo", False),
            ("use_beam_search", False),
            ("skip_special_tokens", True),
            ("spaces_between_special_tokens", True),
            ("include_stop_str_in_output", False),
            ("ignore_eos", False),
            ("ignore_eos", True),
            ("add_special_tokens", False),
            ("add_generation_prompt", True),
            ("continue_final_message", False),
            ("separate_reasoning", True),
            ("include_reasoning", True),
            ("priority", 0),
            ("bad_words", []),
            ("documents", []),
            ("functions", []),
            ("function_call", "none"),
            ("tools", []),
            ("tool_choice", "auto"),
            ("tool_choice", "none"),
            ("stop", []),
            ("stop", ""),
            ("stop", "x"),
            ("stop_token_ids", []),
            ("stop_token_ids", [5]),
            ("top_k", -1),
            ("top_logprobs", 0),
            ("logprobs", False),
            ("n", 1),
            ("seed", -1),
            ("user", "me"),
            ("safety_identifier", "me"),
            ("prompt_cache_key", "k"),
            ("prompt_cache_retention", "in_memory"),
            ("request_id", "r"),
            ("rid", "r"),
            ("cache_salt", "s"),
            ("stream_options", {"include_usage": False}),
            ("chat_template_kwargs", {}),
            ("chat_template_kwargs", {"thinking": False}),
            ("no_such_field", None),
        )
    },
    **{
        f"{name}=null": {name: None}
        for name in [
            "metadata",
            "functions",
            "audio",
            "reasoning_effort",
            "logprobs",
            "top_logprobs",
            "temperature",
            "top_p",
            "n",
            "stop",
            "stream",
            "tools",
            "tool_choice",
            "logit_bias",
            "response_format",
            "frequency_penalty",
            "presence_penalty",
            "max_tokens",
            "max_completion_tokens",
            "stream_options",
            "user",
            "seed",
            "prediction",
            "web_search_options",
            "moderation",
            "model",
            "parallel_tool_calls",
        ]
    },
    "echo of model_dump()": turns(ECHO, HELLO),
    "echo with lists": turns({**ECHO, "annotations": [], "tool_calls": []}, HELLO),
    "echo of a thought": turns({**ECHO, "reasoning_content": "hm"}, HELLO),
    "echo of another server's thought": turns({**ECHO, "reasoning": "hm"}, HELLO),
    "echo of a parsed answer": turns({**ECHO, "parsed": {"a": 1}}, HELLO),
    "echo with our ids": turns({**ECHO, "prompt_token_ids": [1], "completion_token_ids": [2]}, HELLO),
    "echo of a refusal": turns({"role": "assistant", "content": None, "refusal": "no"}, HELLO),
    "refusal part": turns({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, HELLO),
    "index in tool_calls": turns({**CALLED, "tool_calls": [{**CALL, "index": 0}]}, RESULT),
    "arguments that the client parsed": turns(
        {**CALLED, "tool_calls": [{**CALL, "function": {**CALL["function"], "parsed_arguments": {}}}]}, RESULT
    ),
    "no arguments": turns({**CALLED, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": ""}}]}, RESULT),
    "type of a call left out": turns({**CALLED, "tool_calls": [{k: CALL[k] for k in ("id", "function")}]}, RESULT),
    "result in parts": turns(CALLED, {**RESULT, "content": [text_part("x")]}),
    "result with a name": turns(CALLED, {**RESULT, "name": "f"}),
    "result with a picture": turns(CALLED, {**RESULT, "content": [picture(), text_part("x")]}),
    "strict tool": {"tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]},
    "tool without parameters": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "tool with cache_control": {"tools": [{**TOOL, "cache_control": {"type": "ephemeral"}}]},
    **{f"detail {d}": user(picture(detail=d), text_part("?")) for d in ("low", "high", "auto", "original", None)},
    "image_url as a string": user({"type": "image_url", "image_url": PIXEL}, text_part("?")),
    "cache_control of a part": user({**text_part("x"), "cache_control": {"type": "ephemeral"}}),
    "cache breakpoint": user({**picture(), "prompt_cache_breakpoint": {"mode": "explicit"}}),
    "cache_control of a message": {"messages": [{**HELLO, "cache_control": {"type": "ephemeral"}}]},
    "name of a message": {"messages": [{**HELLO, "name": "me"}]},
    "developer": {"messages": [{"role": "developer", "content": "be brief"}, HELLO]},
    "system in parts": {"messages": [{"role": "system", "content": [text_part("be brief")]}, HELLO]},
    "empty parts": user(text_part("")),
    "the last answer goes on": {
        **turns({"role": "assistant", "content": "4"}),
        "continue_final_message": True,
        "add_generation_prompt": False,
    },
}
# (change, field that is named, words)
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "audio": ({"audio": {"voice": "a", "format": "wav"}}, "audio", "answers are text"),
    "modalities": ({"modalities": ["text", "audio"]}, "modalities", "answers are text"),
    "prediction": ({"prediction": {"type": "content", "content": "x"}}, "prediction", "no effect here"),
    "store": ({"store": True}, "store", "no answer is kept here"),
    "web search": ({"web_search_options": {}}, "web_search_options", "as a tool"),
    "functions": ({"functions": [{"name": "f"}]}, "functions", "use tools"),
    "function_call": ({"function_call": {"name": "f"}}, "function_call", "use tool_choice"),
    "logit_bias": ({"logit_bias": {"5": 10}}, "logit_bias", "no effect here"),
    "service_tier": ({"service_tier": "flex"}, "service_tier", "served alike"),
    "verbosity": ({"verbosity": "low"}, "verbosity", "in words"),
    "reasoning_effort": ({"reasoning_effort": "high"}, "reasoning_effort", "must be 'none' or 'medium'"),
    "min_p": ({"min_p": 0.1}, "min_p", "use temperature"),
    "min_tokens": ({"min_tokens": 4}, "min_tokens", "no effect here"),
    "true is not 1": ({"best_of": True}, "best_of", "use n"),
    "chat_template": ({"chat_template": "x"}, "chat_template", "own template"),
    "enable_thinking": ({"enable_thinking": False}, "enable_thinking", "chat_template_kwargs.enable_thinking"),
    "metadata.enable_thinking": (
        {"metadata": {"enable_thinking": "0"}},
        "metadata.enable_thinking",
        "chat_template_kwargs",
    ),
    "metadata of numbers": ({"metadata": {"a": 1}}, "metadata.a", "valid string"),
    "max_new_tokens": ({"max_new_tokens": 3}, "max_new_tokens", "call it max_tokens"),
    "input": ({"input": "x"}, "input", "call it messages"),
    "obfuscation": (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "leave it out",
    ),
    "a mistake in a name": ({"temprature": 1}, "temprature", "did you mean 'temperature'"),
    "detail": (user(picture(detail="ultra")), "messages[0].content[0].image_url.detail", "must be 'auto', 'low'"),
    "no url": (user({"type": "image_url", "image_url": {}}), "messages[0].content[0].image_url.url", "must be given"),
    "no image_url": (user({"type": "image_url"}), "messages[0].content[0].image_url", "must be given"),
    "second part": (user(text_part("x"), {"type": "text"}), "messages[0].content[1].text", "must be given"),
    "no type": (user({"text": "x"}), "messages[0].content[0].type", "must be given"),
    "sound": (user({"type": "input_audio", "input_audio": {}}), "messages[0].content[0].type", "sound and files"),
    "file": (user({"type": "file", "file": {}}), "messages[0].content[0].type", "sound and files"),
    "Responses API": (
        user({"type": "input_text", "text": "x"}),
        "messages[0].content[0].type",
        "must be one of 'text'",
    ),
    "a part that is a word": (user("x"), "messages[0].content[0]", "must be an object"),
    "content is a number": (
        {"messages": [{"role": "user", "content": 3}]},
        "messages[0].content",
        "a string or a list",
    ),
    "content is missing": ({"messages": [{"role": "user"}]}, "messages[0].content", "must be given"),
    "content is null": ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "must be given"),
    "role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "must be one of 'system'"),
    "role is missing": ({"messages": [{"content": "x"}]}, "messages[0].role", "must be given"),
    "function role": (turns({"role": "function", "name": "f", "content": "x"}), "messages[1].role", "'tool'"),
    "picture of the system": (
        {"messages": [{"role": "system", "content": [picture()]}, HELLO]},
        "messages[0].content[0].type",
        "must be one of 'text', 'refusal'",
    ),
    "messages is a word": ({"messages": "x"}, "messages", "must be a valid list"),
    "messages is empty": ({"messages": []}, "messages", "at least 1 item"),
    "frames": (
        user({"type": "video_url", "video_url": {"url": "data:,", "fps": 1}}),
        "messages[0].content[0].video_url.fps",
        "cut the video",
    ),
    "fps null is fine, its picture not": (
        user({"type": "video_url", "video_url": {"url": "ftp://x", "fps": None}}),
        "",
        "must be a data:, https://",
    ),
    "last answer": (turns({"role": "assistant", "content": "4"}), "messages", "continue_final_message to true"),
    "prompt and continue": (
        {**turns(ECHO), "continue_final_message": True, "add_generation_prompt": True},
        "add_generation_prompt",
        "must be false",
    ),
    "no prompt": ({"add_generation_prompt": False}, "add_generation_prompt", "needs continue_final_message"),
    "nothing to continue": ({"continue_final_message": True}, "continue_final_message", "needs an assistant message"),
    "result without a call": (turns(RESULT), "messages[1].tool_call_id", "must be the id of a call"),
    "two calls of one id": (
        turns({**CALLED, "tool_calls": [CALL, CALL]}, RESULT),
        "messages[1].tool_calls",
        "different ids",
    ),
    "call of another kind": (
        turns({**CALLED, "tool_calls": [{**CALL, "type": "custom"}]}),
        "messages[1].tool_calls[0].type",
        "must be 'function'",
    ),
    "arguments as an object": (
        turns({**CALLED, "tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]}),
        "messages[1].tool_calls[0].function.arguments",
        "must be a valid string",
    ),
    "custom tool": (
        {"tools": [{"type": "custom", "custom": {"name": "f"}}]},
        "tools[0].custom",
        "the one kind of tool",
    ),
    "two tools of one name": ({"tools": [TOOL, TOOL]}, "tools", "different names"),
    "stop of numbers": ({"stop": [1]}, "stop[0]", "must be a valid string"),
    "stop token": ({"stop_token_ids": [640]}, "stop_token_ids", "must be from 0 to 639"),
    "temperature": ({"temperature": "hot"}, "temperature", "must be a valid number"),
    "infinite": ({"temperature": 1e999}, "", "JSON"),
    "model": ({"model": "x" * 1000}, "model", "at most 512 characters"),
}


@pytest.fixture(scope="module")
def running() -> Iterator[Live]:
    from conftest import _golden_model

    with live(Engine(_golden_model("tiny-a", "float32"), processor()), default_max_tokens=4) as one:
        yield one


@pytest.fixture(scope="module")
def client(running: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.root, headers={"content-type": "application/json"}, timeout=60) as found:
        yield found


def ask(client: httpx.Client, change: dict[str, Any], path: str = "/v1/chat/completions") -> httpx.Response:
    start: dict[str, Any] = {"messages": T} if path.endswith("chat/completions") else {"prompt": "x"}
    return client.post(path, content=json.dumps({**start, "max_tokens": 2, **change}))


@pytest.mark.parametrize("name", TAKEN)
def test_taken(name: str, client: httpx.Client) -> None:
    reply = ask(client, TAKEN[name])
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, client: httpx.Client) -> None:
    change, field, words = REFUSED[name]
    reply = ask(client, change)
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error"), reply.text
    assert (error["param"] or "") == field
    assert error["message"].startswith(field)
    assert words in error["message"]


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({}, 200, ""),
        ({"echo": False, "suffix": None, "best_of": 1, "logit_bias": {}}, 200, ""),
        ({"suffix": "", "logprobs": None, "add_special_tokens": True}, 200, ""),
        ({"logprobs": False}, 200, ""),
        ({"logprobs": 0}, 200, ""),
        ({"prompt": ["a", "b"]}, 200, ""),
        ({"prompt": [5, 6]}, 200, ""),
        ({"prompt": [[5], [6, 7]]}, 200, ""),
        ({"suffix": "x"}, 400, "suffix ('x') has no effect here"),
        ({"echo": True}, 400, "echo (true) has no effect here"),
        ({"best_of": 3}, 400, "best_of (3) has no effect here"),
        ({"messages": T}, 400, "messages (a list) has no effect here: use /v1/chat/completions"),
        ({"prompt": None}, 400, "prompt must be given"),
        ({"prompt": {}}, 400, "prompt must be a string, a list of strings, token ids"),
        ({"prompt": [5, "x"]}, 400, "prompt[1] ('x') must be a valid integer"),
        ({"prompt": ["x", 5]}, 400, "prompt[1] (5) must be a valid string"),
        ({"prompt": [[5, True]]}, 400, "prompt[0][1] (true) must be a valid integer"),
        ({"prompt": [5.5]}, 400, "prompt[0] (5.5) must be a valid integer"),
    ],
)
def test_raw_prompts(change: dict[str, Any], status: int, words: str, client: httpx.Client) -> None:
    reply = ask(client, change, "/v1/completions")
    assert reply.status_code == status, reply.text
    assert not words or reply.json()["error"]["message"].startswith(words)


def test_the_clients_own_objects_go_back(running: Live) -> None:
    """As the message object, and as its dumps, with a tool of a class, in a dialogue of three
    rounds.
    """
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: str

    official = running.client()
    tool = openai.pydantic_function_tool(Weather)
    messages: list[Any] = [HELLO]
    for dump in (
        lambda m: m,
        lambda m: m.model_dump(),
        lambda m: m.to_dict(),
        lambda m: m.model_dump(exclude_none=True),
    ):
        extra = {"return_token_ids": True}
        more: Any = {"model": "ernie", "tools": [tool], "max_tokens": 4, "temperature": 0, "extra_body": extra}
        answer = official.chat.completions.create(messages=messages, **more).choices[0].message
        messages += [dump(answer), HELLO]
    assert len(messages) == 9
    assert official.chat.completions.create(messages=messages, **more).choices


def test_results_come_in_any_order(client: httpx.Client) -> None:
    calls = [{**CALL, "id": i} for i in "abc"]
    results = {i: {"role": "tool", "tool_call_id": i, "content": f"of {i}"} for i in "abc"}
    prompts = []
    for order in ("abc", "cab"):
        body = {**turns({**CALLED, "tool_calls": calls}, *(results[i] for i in order)), "return_token_ids": True}
        prompts.append(ask(client, body).json()["choices"][0]["message"]["prompt_token_ids"])
    assert prompts[0] == prompts[1]


def test_an_answer_goes_on_where_it_stopped(running: Live, client: httpx.Client) -> None:
    """Half of a greedy answer, sent back, brings the other half: the prompt is the one of the first
    request and what was said.
    """
    fields = {"temperature": 0, "return_token_ids": True, "chat_template_kwargs": {"enable_thinking": False}}
    whole = ask(client, {**fields, "max_tokens": 12}).json()["choices"][0]["message"]
    tokenizer = running.service.engine.processor.tokenizer
    for cut in range(1, 8):
        said = tokenizer.decode(whole["completion_token_ids"][:cut])
        if tokenizer.encode(said) == whole["completion_token_ids"][:cut]:
            break
    flags = {"continue_final_message": True, "add_generation_prompt": False}
    more = {**fields, **flags, "max_tokens": 12 - cut, **turns({"role": "assistant", "content": said})}
    rest = ask(client, more).json()["choices"][0]["message"]
    assert rest["prompt_token_ids"] == whole["prompt_token_ids"] + whole["completion_token_ids"][:cut]
    assert rest["completion_token_ids"] == whole["completion_token_ids"][cut:]


def test_one_call_at_most(running: Live) -> None:
    """parallel_tool_calls false ends an answer with its first call; the stop string is none that a
    client asked for.
    """
    from support.tiny_runs import processor as made

    service = running.service
    words = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    ids = made().tokenizer.encode(words + "\n" + words, allow_special=True)
    said = []
    for parallel in (True, False):
        guided = service._guided

        def force(prepared: Any, *args: Any, guided: Any = guided) -> Any:
            from dataclasses import replace

            made_ = guided(prepared, *args)
            steer = lambda: lambda tokens: ids[len(tokens)] if len(tokens) < len(ids) else 2  # noqa: E731
            return replace(made_, prompt=replace(made_.prompt, steer=steer))

        service._guided = force  # type: ignore[method-assign]
        try:
            got = running.client().chat.completions.create(
                model="ernie",
                messages=T,
                tools=[TOOL],
                max_tokens=200,
                parallel_tool_calls=parallel,  # type: ignore[arg-type]
            )
        finally:
            service._guided = guided  # type: ignore[method-assign]
        said.append((len(got.choices[0].message.tool_calls or []), got.choices[0].finish_reason))
    assert said == [(2, "tool_calls"), (1, "tool_calls")]


def test_usage_in_every_chunk(running: Live) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    stream = running.client().chat.completions.create(
        model="ernie",
        messages=T,
        max_tokens=4,
        stream=True,
        stream_options=options,
        logprobs=True,  # type: ignore[arg-type]
    )
    counts = [chunk.usage.completion_tokens for chunk in stream if chunk.usage]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == counts[-2] == len(counts) - 1


def test_media_of_the_table_are_real(client: httpx.Client, tmp_path: Any) -> None:
    """A video as a part, and one as a string."""
    part = video_part(clip(tmp_path))
    assert ask(client, user(part, text_part("?"))).status_code == 200
    assert ask(client, user({"type": "video_url", "video_url": part["video_url"]["url"]})).status_code == 200
    assert base64.b64decode(PIXEL.partition(",")[2])[:4] == b"\x89PNG"

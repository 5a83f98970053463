"""data/chat.py: the bytes of the released templates written out by hand, targets, thoughts,
and the exported Jinja template.
"""

from __future__ import annotations

import json
from typing import Any

import jinja2
import jinja2.sandbox
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_tune.data.chat import THOUGHT_STYLES, ChatTemplate, ReasoningSplitter, check_messages, runs, split_reasoning

PICTURE = "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
VIDEO = "<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>"
WEATHER = {"name": "weather", "description": "天气 <now>", "parameters": {"type": "object"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


DIALOGUE = [
    {"role": "system", "content": "Be brief."},
    user("<image>What is this?"),
    answer("A cat.", reasoning_content="It has whiskers."),
    user("And <image> or <video>?"),
    answer("Dogs.", reasoning_content="They bark."),
]
START = (
    "<|begin_of_sentence|>Be brief.\n"
    f"User: Picture 1:{PICTURE}What is this?\nAssistant: A cat.<|end_of_sentence|>"
    f"User: And Picture 2:{PICTURE} or Video 1:{VIDEO}?\nAssistant: "
)


# How each released template handles thoughts, as (variant, thinking, what the prompt ends with, the
# answer without its end).
TABLE = [
    ("hf", None, "<think>\n\n</think>\n\n", "Dogs."),
    ("hf", False, "<think>\n\n</think>\n\n", "Dogs."),
    ("hf", True, "<think>", "\nThey bark.\n</think>\n\nDogs."),
    ("ernie_vl_nothink", None, "<think>\n\n</think>\n\n", "Dogs."),
    ("ernie_vl_nothink", False, "<think>\n\n</think>\n\n", "Dogs."),
    ("ernie_vl_nothink", True, "", "<think>\nThey bark.\n</think>\n\nDogs."),
    ("ernie_vl", None, "", "\n<think>\nThey bark.\n</think>\n\nDogs."),
    ("ernie_vl", False, "\n<think>\n\n</think>\n\n", "Dogs."),
    ("ernie_vl", True, "", "\n<think>\nThey bark.\n</think>\n\nDogs."),
]


@pytest.mark.parametrize(("variant", "thinking", "prefill", "completion"), TABLE)
def test_bytes_of_every_variant(variant: str, thinking: bool | None, prefill: str, completion: str) -> None:
    template = ChatTemplate(variant)
    assert template.render(DIALOGUE[:-1], thinking=thinking, add_generation_prompt=True) == START + prefill
    # a finished dialogue, rendered as the rollout would have been
    asked = template.thinks(DIALOGUE[:-1], thinking)
    assert template.render(DIALOGUE, thinking=asked) == START + prefill + completion + "</s>"
    assert template.opens_thought(asked) == (prefill == "<think>")


def test_plain_prompt_of_the_specification() -> None:
    dialogue = [user("What kind of dog is this?<image>")]
    expected = (
        f"<|begin_of_sentence|>User: What kind of dog is this?Picture 1:{PICTURE}\nAssistant: <think>\n\n</think>\n\n"
    )
    assert ChatTemplate().render(dialogue, add_generation_prompt=True) == expected


def test_an_answer_with_a_thought_turns_thinking_on_unless_forbidden() -> None:
    dialogue = [user("2+2?"), answer("<think>\nTwo and two.\n</think>\n\n4")]
    template = ChatTemplate("hf")
    thought = "<|begin_of_sentence|>User: 2+2?\nAssistant: <think>\nTwo and two.\n</think>\n\n4</s>"
    assert template.render(dialogue) == thought
    assert template.render([dialogue[0], answer("4", reasoning_content="Two and two.")]) == thought
    assert template.render([dialogue[0], answer([{"type": "text", "text": dialogue[1]["content"]}])]) == thought
    assert (
        template.render(dialogue, thinking=False)
        == "<|begin_of_sentence|>User: 2+2?\nAssistant: <think>\n\n</think>\n\n4</s>"
    )


def targets(template: ChatTemplate, dialogue: list[dict[str, Any]], **options: Any) -> list[str]:
    return [piece.text for piece in template.pieces(dialogue, **options) if piece.trained]


def test_targets_are_answers_with_their_ends() -> None:
    template = ChatTemplate("hf")
    assert targets(template, DIALOGUE, thinking=False) == ["A cat.", "<|end_of_sentence|>", "Dogs.", "</s>"]
    silent = [*DIALOGUE[:2], {**DIALOGUE[2], "loss": False}, *DIALOGUE[3:]]
    assert targets(template, silent, thinking=False) == ["Dogs.", "</s>"]
    assert targets(template, DIALOGUE, thinking=True) == [
        "A cat.",
        "<|end_of_sentence|>",
        "\nThey bark.\n",
        "</think>",
        "\n\nDogs.",
        "</s>",
    ]


def test_the_empty_thought_is_a_target_only_when_thinking_is_on() -> None:
    dialogue = [user("Hi"), answer("Hello")]
    template = ChatTemplate("ernie_vl")
    assert targets(template, dialogue) == ["\n", "<think>", "\n\n", "</think>", "\n\nHello", "</s>"]
    assert targets(template, dialogue, thinking=False) == ["Hello", "</s>"]
    assert template.render(dialogue) == template.render(dialogue, thinking=False)


def test_media_in_an_answer_are_shown_but_never_targets() -> None:
    dialogue = [user("Zoom in."), answer("Here <image> it is.")]
    pieces = ChatTemplate().pieces(dialogue)
    assert [(p.kind, p.text) for p in pieces if p.trained] == [
        ("text", "Here "),
        ("text", " it is."),
        ("token", "</s>"),
    ]
    assert [p.text for p in pieces if p.kind == "image"] == [PICTURE]
    assert "Here Picture 1:<|IMAGE" in ChatTemplate().render(dialogue)


def test_text_is_joined_where_tokens_may_span_it_and_parted_where_an_answer_begins() -> None:
    pieces = ChatTemplate("ernie_vl").pieces(
        [{"role": "system", "content": "S"}, user("Q"), answer("A", reasoning_content="R")]
    )
    assert [(p.kind, p.text) for p in pieces] == [
        ("token", "<|begin_of_sentence|>"),
        ("text", "S\nUser: Q\nAssistant: "),
        ("text", "\n"),
        ("token", "<think>"),
        ("text", "\nR\n"),
        ("token", "</think>"),
        ("text", "\n\nA"),
        ("token", "</s>"),
    ]
    # The last answer parts, masked or not, or its ids would differ from those of the rollout; an
    # earlier one is history and joins.
    for loss in (True, False):
        dialogue = [user("Q"), answer("A", loss=loss), user("Q"), answer("A", loss=loss)]
        texts = ["".join(p.text for p in run) for run in runs(ChatTemplate("ernie_vl_nothink").pieces(dialogue))]
        assert texts[:3] == ["<|begin_of_sentence|>", "User: Q\nAssistant: A", "<|end_of_sentence|>"]
        assert texts[-3:] == ["\n\n", "A", "</s>"]


def test_marks_missing_from_the_vocabulary_are_text_and_present_ones_tokens() -> None:
    dialogue = [user("<think> Q"), answer("A")]
    assert all(
        p.kind == "text" or p.text in ("<|begin_of_sentence|>", "</s>")
        for p in ChatTemplate("hf", vocabulary=()).pieces(dialogue)
    )
    kinds = [(p.kind, p.text) for p in ChatTemplate("hf").pieces(dialogue)]
    # a user's words never become tokens
    assert kinds[1] == ("text", "User: <think> Q\nAssistant: ")
    assert ("token", "<think>") in kinds


def test_content_parts_carry_sources_and_literal_text() -> None:
    content = [
        {"type": "text", "text": "<image>"},
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "data:b"}},
        {"type": "image", "path": "c.png"},
        {"type": "video_url", "video_url": "d.mp4"},
        {"type": "video"},
    ]
    pieces = ChatTemplate().pieces([user(content)], add_generation_prompt=True)
    assert [p.source for p in pieces if p.kind == "image"] == ["a.png", "data:b", "c.png"]
    assert [p.source for p in pieces if p.kind == "video"] == ["d.mp4", None]
    text = "".join(p.text for p in pieces)
    assert text.startswith(
        f"<|begin_of_sentence|>User: <image>Picture 1:{PICTURE}Picture 2:{PICTURE}Picture 3:{PICTURE}Video 1:{VIDEO}Video 2:{VIDEO}\nA"
    )


TOOL_DIALOGUE = [
    {"role": "system", "content": "Help."},
    user("Weather?"),
    answer(None, tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}]),
    {"role": "tool", "content": "Sunny"},
    answer("It is sunny."),
]
TOOL_LIST = '<tool_list>\n[{"type": "function", "function": {"name": "weather", "description": "天气 <now>", "parameters": {"type": "object"}}}]\n</tool_list>\n'


def test_tools() -> None:
    template = ChatTemplate("ernie_vl_nothink")
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert template.render(TOOL_DIALOGUE, tools=[WEATHER]) == (
        f"<|begin_of_sentence|>Help.\n{TOOL_LIST}\nUser: Weather?\nAssistant: {call}<|end_of_sentence|>"
        "User: <tool_output>\nSunny\n</tool_output>\n\nAssistant: <think>\n\n</think>\n\nIt is sunny.</s>"
    )
    wrapped = [{"type": "function", "function": WEATHER}]
    assert template.render(TOOL_DIALOGUE[1:], tools=wrapped).startswith(
        f"<|begin_of_sentence|>\n{TOOL_LIST}\nUser: Weather?"
    )
    asked = [user("Q"), answer("Let me look.", tool_calls=[{"name": "a", "arguments": '{"x":1}'}, {"name": "b"}])]
    two = '<tool_call>\n{"name": "a", "arguments": {"x":1}}\n</tool_call>\n<tool_call>\n{"name": "b", "arguments": {}}\n</tool_call>'
    assert "".join(targets(template, asked)) == f"Let me look.\n{two}</s>"
    outputs = [*asked, {"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
    assert template.render(outputs, add_generation_prompt=True, thinking=True).endswith(
        "<|end_of_sentence|>User: <tool_output>\n1\n</tool_output>\n<tool_output>\n2\n</tool_output>\n\nAssistant: "
    )


@pytest.mark.parametrize(
    ("messages", "prompt", "error"),
    [
        ([user("a"), {"role": "human", "content": "b"}], False, r"x:1: role \('human'\) must be one of"),
        ([answer("a")], False, r"x:1: roles \(assistant\) must be an optional system, then user"),
        ([user("a"), user("b"), answer("c")], False, r"roles \(user, user, assistant\) must be"),
        (
            [user("a"), {"role": "system", "content": ""}, answer("c")],
            False,
            r"roles \(user, system, assistant\) must be",
        ),
        ([user("a")], False, r"last role \(user\) must be assistant where add_generation_prompt is False"),
        (
            [user("a"), answer("b")],
            True,
            r"last role \(assistant\) must be user or tool where add_generation_prompt is True",
        ),
        ([], False, r"last role \(None\) must be assistant"),
        ([{"role": "system", "content": "a"}], True, r"last role \(None\) must be user or tool"),
        ([user("a"), answer("b", loss=1)], False, r"x:1: messages\[1\].loss \(1\) must be true or false"),
        ([user(3)], True, r"x:1: content \(int\) must be a string or a list of parts"),
        (
            [user([{"type": "audio"}])],
            True,
            r"x:1: content\[0\] \(\{'type': 'audio'\}\) must be an object whose type is one of",
        ),
        ([user(["a"])], True, r"content\[0\] \(a\) must be an object"),
        ([user([{"type": "text"}])], True, r"content\[0\] .* a text with its text"),
        (
            [user("a"), answer("", tool_calls=[{"function": {"arguments": {}}}])],
            False,
            r"x:1: tool call name \(None\) must be a string",
        ),
        (
            [user("a"), answer("", tool_calls=[{"name": "f", "arguments": "{x"}])],
            False,
            r"x:1: tool call arguments \('\{x'\) must be JSON",
        ),
    ],
)
def test_malformed_messages_are_refused(messages: list[dict[str, Any]], prompt: bool, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ChatTemplate().pieces(messages, add_generation_prompt=prompt, where="x:1")


def test_unknown_variant_is_refused_and_known_dialogues_pass() -> None:
    with pytest.raises(
        ValueError, match=r"template \('qwen'\) must be one of \['ernie_vl', 'ernie_vl_nothink', 'hf'\]"
    ):
        ChatTemplate("qwen")
    check_messages(TOOL_DIALOGUE)
    check_messages(DIALOGUE[:-1], add_generation_prompt=True)


@pytest.mark.parametrize(
    ("text", "opened", "reasoning", "content"),
    [
        ("<think>\nWhy\n</think>\n\nBecause", False, "Why", "Because"),
        ("\n<think>\nWhy\n</think>\n\nBecause", False, "Why", "Because"),  # as ernie_vl opens it
        ("\nWhy\n</think>\n\nBecause", True, "Why", "Because"),  # the prompt held <think>
        ("<think></think>Because", False, "", "Because"),
        ("<think>\n\n</think>\n\nBecause", False, "", "Because"),
        # only the template's own breaks go
        ("<think>\n\nA\n\nB\n\n</think>\n\n\nC\n", False, "\nA\n\nB\n", "\nC\n"),
        ("<think>\nstill thinking\n", False, "still thinking\n", ""),
        ("still thinking", True, "still thinking", ""),
        ("No thought </think> here", False, "", "No thought </think> here"),
        ("  plain", False, "", "  plain"),
        ("<thin", False, "", "<thin"),
        ("a <think>b</think>", False, "", "a <think>b</think>"),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("", False, "", ""),
    ],
)
def test_split_reasoning(text: str, opened: bool, reasoning: str, content: str) -> None:
    assert split_reasoning(text, opened) == (reasoning, content)
    splitter = ReasoningSplitter(opened)
    parts = [*(splitter.push(character) for character in text), splitter.flush()]
    assert ("".join(part[0] for part in parts), "".join(part[1] for part in parts)) == (reasoning, content)


def test_streamed_reasoning_is_not_delayed_without_need() -> None:
    splitter = ReasoningSplitter()
    assert [splitter.push(part) for part in ("<think>", "\nSo", "me\n", "more", "\n</thi", "nk>\n\nYes", "!")] == [
        ("", ""),
        ("So", ""),
        ("me", ""),
        ("\nmore", ""),
        ("", ""),
        ("", "Yes"),
        ("", "!"),
    ]


MARKUP = st.sampled_from(
    ["<think>", "</think>", "\n", "\n\n", " ", "a", "<image>", "<video>", "{{ x }}", "<|IMAGE_START|>", "图"]
)
CONTENT = st.lists(MARKUP, max_size=8).map("".join)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(CONTENT), opened=st.booleans())
def test_streamed_and_whole_splits_agree(parts: list[str], opened: bool) -> None:
    splitter = ReasoningSplitter(opened)
    pushed = [*(splitter.push(part) for part in parts), splitter.flush()]
    whole = split_reasoning("".join(parts), opened)
    assert ("".join(part[0] for part in pushed), "".join(part[1] for part in pushed)) == whole


# The settings with which transformers, vLLM and FastDeploy render chat templates, and plain Jinja.
HUB = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
)
HUB.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
ENVIRONMENTS = [HUB, jinja2.Environment()]
COMPILED = {
    variant: [env.from_string(ChatTemplate(variant).to_jinja()) for env in ENVIRONMENTS] for variant in THOUGHT_STYLES
}


def assert_same(
    variant: str, messages: list[dict[str, Any]], thinking: bool | None, tools: list[dict[str, Any]] | None = None
) -> None:
    prompt = messages[-1]["role"] != "assistant"
    expected = ChatTemplate(variant).render(
        messages, thinking=thinking, add_generation_prompt=prompt, tools=tools or ()
    )
    given_thinking = {} if thinking is None else {"enable_thinking": thinking}
    # Plain Jinja escapes what HTML would misread inside tojson; only transformers' filter writes
    # plain JSON.
    for compiled in COMPILED[variant][: 1 if tools else None]:
        assert (
            compiled.render(messages=messages, tools=tools, add_generation_prompt=prompt, **given_thinking) == expected
        )


@pytest.mark.parametrize("thinking", [None, False, True])
@pytest.mark.parametrize("variant", sorted(THOUGHT_STYLES))
def test_jinja_template_renders_the_same_bytes(variant: str, thinking: bool | None) -> None:
    parts = [
        {"type": "text", "text": "see <image> "},
        {"type": "image_url", "image_url": {"url": "x"}},
        {"type": "video"},
    ]
    for dialogue in (
        DIALOGUE,
        DIALOGUE[:-1],
        DIALOGUE[1:],
        [user(parts)],
        [user(parts), answer(parts)],
        [{"role": "system", "content": ""}, user("a")],
    ):
        assert_same(variant, dialogue, thinking)
    two_calls = [{"name": "a", "arguments": '{"x":1}'}, {"name": "b", "arguments": {}}]
    long = [
        *TOOL_DIALOGUE,
        user("x"),
        answer("y", tool_calls=two_calls),
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
    ]
    for dialogue in (TOOL_DIALOGUE, TOOL_DIALOGUE[1:], long, [*long, answer("<think>\nr\n</think>\n\nc")]):
        assert_same(variant, dialogue, thinking, [WEATHER, WEATHER])


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.tuples(CONTENT, CONTENT, st.one_of(st.none(), CONTENT)), min_size=1, max_size=3),
    variant=st.sampled_from(sorted(THOUGHT_STYLES)),
    thinking=st.sampled_from([None, False, True]),
    literal=st.booleans(),
)
def test_jinja_template_agrees_on_hostile_text(
    turns: list[tuple[str, str, str | None]], variant: str, thinking: bool | None, literal: bool
) -> None:
    messages: list[dict[str, Any]] = []
    for question, reply, reasoning in turns:
        messages += [user(question), answer([{"type": "text", "text": reply}] if literal else reply)]
        if reasoning is not None:
            messages[-1]["reasoning_content"] = reasoning
    assert_same(variant, messages, thinking)
    assert_same(variant, messages[:-1], thinking)


def test_jinja_placeholders_can_be_those_of_another_server() -> None:
    text = ChatTemplate().to_jinja(image="<|image@placeholder|>", video="<|video@placeholder|>")
    rendered = ENVIRONMENTS[0].from_string(text).render(messages=[user("<image><video>")])
    assert rendered.startswith(
        "<|begin_of_sentence|>User: Picture 1:<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
        "Video 1:<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>\nAssistant: "
    )

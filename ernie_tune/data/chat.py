"""Messages -> the prompt format of ERNIE-4.5-VL, as pieces (text, special tokens, media) that say
which of them are training targets.

One object renders training, rollout and serving, so their bytes cannot differ; `to_jinja` writes
the same format for other tools.
Refuses to know: token ids, pixels, files. Sources of media pass through untouched.

Source: the chat templates beside the released weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.data.records import TAG, plain_words
from ernie_tune.data.tokenizer import ASSETS, IMAGE, IMAGE_END, IMAGE_START, VIDEO, VIDEO_END, VIDEO_START

Message = Mapping[str, Any]

BEGIN, SEPARATOR, END = "<|begin_of_sentence|>", "<|end_of_sentence|>", "</s>"
THINK, THINK_END = "<think>", "</think>"
CALL, CALL_END = "<tool_call>", "</tool_call>"
TOOL_MARKS = ("<tool_list>", "</tool_list>", CALL, CALL_END, "<tool_output>", "</tool_output>")
PROMPT_TOKENS = (BEGIN, SEPARATOR, END)  # every vocabulary must have them
# tokens where the vocabulary has them, else text; answers show them
OPTIONAL_TOKENS = (THINK, THINK_END, *TOOL_MARKS)
ROLES = ("system", "user", "assistant", "tool")
_MARKS = {"image": ("Picture", IMAGE_START, IMAGE, IMAGE_END), "video": ("Video", VIDEO_START, VIDEO, VIDEO_END)}
_PART_KINDS = {"text": "text", "image": "image", "image_url": "image", "video": "video", "video_url": "video"}


@dataclass(frozen=True)
class ThoughtStyle:
    """How one renderer writes a thought."""

    open: str
    close: str
    prefill: str  # the part of `open` that the prompt already holds when thinking is on
    default: bool  # whether to think when neither the caller nor the answer says


THOUGHT_STYLES = {
    "hf": ThoughtStyle(f"{THINK}\n", f"\n{THINK_END}\n\n", prefill=THINK, default=False),
    "ernie_vl": ThoughtStyle(f"\n{THINK}\n", f"\n{THINK_END}\n\n", prefill="", default=True),
    "ernie_vl_nothink": ThoughtStyle(f"{THINK}\n", f"\n{THINK_END}\n\n", prefill="", default=False),
}


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt. Text is encoded together with the pieces that join it (`runs`):
    where runs part, tokens part.
    """

    kind: str  # "text", "token", "image" or "video"
    text: str  # the text or the token's string; for media, the markers with one placeholder
    trained: bool = False  # whether its tokens are targets
    source: Any = None  # the medium that the message part itself carried
    joins: bool = False  # tokens may span the end of the piece before and the start of this one


def runs(pieces: Sequence[Piece]) -> Iterator[list[Piece]]:
    """The pieces whose texts are encoded as one, in order."""
    run: list[Piece] = []
    for piece in pieces:
        if run and not piece.joins:
            yield run
            run = []
        run.append(piece)
    if run:
        yield run


class ChatTemplate:
    """The renderer of one variant: "hf" (the models' own template), or PaddleFormers' "ernie_vl"
    and "ernie_vl_nothink".
    """

    def __init__(self, variant: str = "hf", vocabulary: Collection[str] = OPTIONAL_TOKENS) -> None:
        """`vocabulary`: special tokens of the tokenizer; the `OPTIONAL_TOKENS` not in it become
        text. Raises ValueError for an unknown variant.
        """
        if variant not in THOUGHT_STYLES:
            raise ValueError(
                say(
                    f"template ({variant!r}) must be one of {sorted(THOUGHT_STYLES)}; use 'hf' for released models",
                    f"template（{variant!r}）须为 {sorted(THOUGHT_STYLES)} 之一；已发布的模型请用 'hf'",
                )
            )
        self.variant = variant
        self.style = THOUGHT_STYLES[variant]
        self._tokens = [token for token in OPTIONAL_TOKENS if token in vocabulary]

    def thinks(self, messages: Sequence[Message], thinking: bool | None = None) -> bool:
        """Whether the answer to the last question thinks: as asked, else as its turns in `messages`
        do, else the variant's default.
        """
        if thinking is not None:
            return thinking
        own = messages[last_question(messages) + 1 :]
        return self.style.default or any(m["role"] == "assistant" and bool(_read_answer(m, "")[0]) for m in own)

    def opens_thought(self, thinking: bool) -> bool:
        """Whether a generated answer starts inside a thought, so that `split_reasoning` must be
        told.
        """
        return thinking and bool(self.style.prefill)

    def pieces(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = False,
        where: str = "",
    ) -> list[Piece]:
        """Render a dialogue. Targets are the assistant turns with their closing token, unless
        `loss` is false. Of a text (one message of role "text") all is a target, its end too unless
        its `ends` is false.

        With `add_generation_prompt` the dialogue ends where an answer begins. Raises ValueError,
        opened by `where`, for malformed messages.
        """
        out = _Writer(self._tokens)
        out.token(BEGIN)
        if is_text(messages):
            return _write_text(out, messages[0], where)
        check_messages(messages, add_generation_prompt, where)
        think = self.thinks(messages, thinking)
        rest = list(messages)
        system = _segments(rest.pop(0).get("content"), where) if rest[0]["role"] == "system" else []
        if system or tools:
            out.segments(system)
            _write_tools(out, tools)
            out.own("\n")
        asked = last_question(rest)
        for i, message in enumerate(rest):
            last = i == len(rest) - 1
            if message["role"] == "assistant":
                self._write_answer(out, message, last, think, i > asked, where)
                continue
            # Results of parallel tool calls share one user turn.
            tool = message["role"] == "tool"
            opens, closes = i == 0 or rest[i - 1]["role"] != "tool", last or rest[i + 1]["role"] != "tool"
            out.own(("User: " if opens else "") + ("<tool_output>\n" if tool else ""))
            out.segments(_segments(message.get("content"), where))
            out.own(("\n</tool_output>\n" if tool else "") + ("\nAssistant: " if closes else ""))
        if add_generation_prompt:
            self._write_prefill(out, think)
        return out.pieces

    def plain(self, content: Any, where: str = "") -> list[Piece]:
        """A text, or a list of parts, outside of any dialogue: the opening token, then the content
        as it stands, its media marked as in a turn. Raises ValueError for malformed parts.
        """
        out = _Writer(self._tokens)
        out.token(BEGIN)
        out.segments(_segments(content, where))
        return out.pieces

    def render(self, messages: Sequence[Message], **options: Any) -> str:
        """The same as one string, a single placeholder for each medium. Options and errors as for
        `pieces`.
        """
        return "".join(piece.text for piece in self.pieces(messages, **options))

    def to_jinja(self, image: str = IMAGE, video: str = VIDEO) -> str:
        """A `chat_template` for tokenizer_config.json that renders the bytes of `render`, with
        these placeholders (`templates.py` says whose).
        """
        style = {"open": self.style.open, "close": self.style.close, "prefill": self.style.prefill}
        values = {**style, "image_token": image, "video_token": video}
        head = [f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items()]
        default = "true" if self.style.default else "false"
        body = (ASSETS / "chat_template.jinja").read_text(encoding="utf-8")
        return "\n".join([*head, f"{{%- set thinks_by_default = {default} -%}}", body.rstrip("\n")])

    def _write_prefill(self, out: _Writer, think: bool) -> None:
        out.own(self.style.prefill if think else self.style.open + self.style.close)

    def _write_answer(self, out: _Writer, message: Message, last: bool, think: bool, current: bool, where: str) -> None:
        """One answer. Thoughts since the last question stay (`current`: a tool is called on the way
        to its answer), earlier ones are dropped.
        """
        trained = message.get("loss", True)
        reasoning, segments = _read_answer(message, where)
        begins = last or (think and current and bool(reasoning))
        # An earlier answer is history: it is encoded with the words before it, as every server does
        # that is handed the text. The last one parts there, since it was or will be generated.
        if begins:
            self._write_prefill(out, think)
        if last:
            out.part()
        if begins and think:
            out.own(self.style.open.removeprefix(self.style.prefill), trained)
            out.segments(_segments(reasoning, where), trained)
            out.own(self.style.close, trained)
        out.segments(segments, trained)
        calls = [_call_text(call, where) for call in message.get("tool_calls") or []]
        for i, call in enumerate(calls):
            out.own("\n<tool_call>\n" if i or segments else "<tool_call>\n", trained)
            out.text(call, trained)
            out.own("\n</tool_call>", trained)
        out.token(END if last else SEPARATOR, trained)


def is_text(messages: Sequence[Message]) -> bool:
    """Whether this is no dialogue but a text, as continued pre-training reads it."""
    return len(messages) == 1 and messages[0].get("role") == "text"


def _write_text(out: _Writer, message: Message, where: str) -> list[Piece]:
    out.segments(_segments(message.get("content"), where), trained=True)
    if message.get("ends", True):
        out.token(END, trained=True)
    return out.pieces


class ReasoningSplitter:
    """Splits an answer that arrives in parts into its thought and the rest, without the line breaks
    that the templates put between.

    `opened`: the prompt already held the opening mark. A thought that never ends stays a thought.
    """

    def __init__(self, opened: bool = False) -> None:
        self._state = "thought" if opened else "start"
        self._buffer = ""
        # line breaks that may still be skipped at the start of this state
        self._breaks = 1 if opened else 0

    @property
    def thinking(self) -> bool:
        """Whether the thought is open."""
        return self._state == "thought"

    def push(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that `text` settles; what could still become a mark is held back."""
        self._buffer += text
        reasoning = self._push_thought() if self._enter_thought() else ""
        return reasoning, self._push_content() if self._state == "content" else ""

    def flush(self) -> tuple[str, str]:
        """What was held back at the end."""
        rest, self._buffer = self._buffer, ""
        return (rest, "") if self._state == "thought" else ("", rest)

    def _enter_thought(self) -> bool:
        if self._state == "start":
            text = self._buffer.lstrip()
            if text.startswith(THINK):
                self._state, self._buffer, self._breaks = "thought", text.removeprefix(THINK), 1
            elif not THINK.startswith(text):
                self._state = "content"
        return self._state == "thought"

    def _skip_breaks(self) -> None:
        while self._breaks and self._buffer:
            if self._buffer[0] == "\n":
                self._buffer, self._breaks = self._buffer[1:], self._breaks - 1
            else:
                self._breaks = 0

    def _push_thought(self) -> str:
        self._skip_breaks()
        reasoning, mark, rest = self._buffer.partition(THINK_END)
        if mark:
            self._state, self._buffer, self._breaks = "content", rest, 2
            return reasoning.removesuffix("\n")
        closing = "\n" + THINK_END
        held = max(n for n in range(len(closing)) if any(reasoning.endswith(end[:n]) for end in (closing, THINK_END)))
        self._buffer = reasoning[len(reasoning) - held :]
        return reasoning[: len(reasoning) - held]

    def _push_content(self) -> str:
        self._skip_breaks()
        content, self._buffer = self._buffer, ""
        return content


def split_reasoning(text: str, opened: bool = False) -> tuple[str, str]:
    """(reasoning, content) of a whole answer; reasoning "" where it has none. See
    `ReasoningSplitter`.
    """
    splitter = ReasoningSplitter(opened)
    pushed, rest = splitter.push(text), splitter.flush()
    return pushed[0] + rest[0], pushed[1] + rest[1]


def has_open_thought(message: Message) -> bool:
    """Whether an answer begins a thought and never ends it: it was cut off, and holds no answer."""
    content = message.get("content")
    if message["role"] != "assistant" or message.get("reasoning_content") or not isinstance(content, str):
        return False
    return content.lstrip().startswith(THINK) and THINK_END not in content


def last_question(messages: Sequence[Message]) -> int:
    """The number of the last turn by the user; -1 where there is none. The turns after it answer
    one question, with or without tools.
    """
    return max((i for i, message in enumerate(messages) if message.get("role") == "user"), default=-1)


def prefix(where: str) -> str:
    """The start of an error: the place, where one is known."""
    return f"{where}: " if where else ""


def check_messages(messages: Sequence[Message], add_generation_prompt: bool = False, where: str = "") -> None:
    """Refuse dialogues that the format cannot express: an optional system turn, then user (or tool)
    and assistant in turn. Raises ValueError.
    """
    roles = [message.get("role") for message in messages]
    unknown = [role for role in roles if role not in ROLES]
    if unknown:
        raise ValueError(
            say(
                f"{prefix(where)}role ({unknown[0]!r}) must be one of {ROLES}; rename it",
                f"{prefix(where)}role（{unknown[0]!r}）须为 {ROLES} 之一；请改名",
            )
        )
    turns = roles[1:] if roles[:1] == ["system"] else roles
    follows: dict[str | None, tuple[str, ...]] = {
        None: ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("tool", "assistant"),
        "system": (),
    }
    for before, role in zip([None, *turns], turns, strict=False):
        if role not in follows[before]:
            raise ValueError(
                say(
                    f"{prefix(where)}roles ({', '.join(map(str, roles))}) must be an optional system, then "
                    "user (or tool) and assistant in turn; merge or drop turns",
                    f"{prefix(where)}role（{', '.join(map(str, roles))}）须为可选的 system，然后 user（或 "
                    "tool）与 assistant 交替；请合并或删去多余轮次",
                )
            )
    if not turns or (turns[-1] == "assistant") == add_generation_prompt:
        wanted = "user or tool" if add_generation_prompt else "assistant"
        raise ValueError(
            say(
                f"{prefix(where)}last role ({turns[-1] if turns else None}) must be {wanted} where "
                f"add_generation_prompt is {add_generation_prompt}; "
                "set it for prompts only",
                f"{prefix(where)}add_generation_prompt 为 {add_generation_prompt} 时，"
                f"最后的角色（{(turns[-1] if turns else None)}）须为 {wanted}；它只用于提示",
            )
        )
    for i, message in enumerate(messages):
        if not isinstance(message.get("loss", True), bool):
            raise ValueError(
                say(
                    f"{prefix(where)}messages[{i}].loss ({message['loss']!r}) must be true or false; drop it "
                    "to train on the turn",
                    f"{prefix(where)}messages[{i}].loss（{message['loss']!r}）须为 true 或 false；去掉则训练该轮",
                )
            )


class _Writer:
    """Collects pieces; joins text as long as nothing parts it, because tokens may span what the
    reader sees as two strings.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self.pieces: list[Piece] = []
        self._joins = False
        self._split = re.compile("(" + "|".join(map(re.escape, tokens)) + ")") if tokens else None
        self._counts = {"image": 0, "video": 0}

    def part(self) -> None:
        """Tokens part here: a prompt ends, an answer begins."""
        self._joins = False

    def text(self, text: str, trained: bool = False) -> None:
        """Words of a person or a model: never a token."""
        if not text:
            return
        before = self.pieces[-1] if self._joins else None
        if before is not None and before.trained == trained:
            self.pieces[-1] = Piece("text", before.text + text, trained)
        else:
            self.pieces.append(Piece("text", text, trained, joins=before is not None))
        self._joins = True

    def token(self, token: str, trained: bool = False) -> None:
        self.pieces.append(Piece("token", token, trained))
        self._joins = False

    def own(self, text: str, trained: bool = False) -> None:
        """Words of the template: marks in it are tokens if the vocabulary has them."""
        for i, part in enumerate(self._split.split(text) if self._split else [text]):
            (self.token if i % 2 else self.text)(part, trained)

    def segments(self, segments: Sequence[tuple[str, str, Any]], trained: bool = False) -> None:
        for kind, text, source in segments:
            if kind == "text":
                self.text(text, trained)
                continue
            self._counts[kind] += 1
            name, *marks = _MARKS[kind]
            self.text(f"{name} {self._counts[kind]}:")
            self.pieces.append(Piece(kind, "".join(marks), source=source))
            self._joins = False


def _segments(content: Any, where: str) -> list[tuple[str, str, Any]]:
    """(kind, text, source) of a message's content. In a string, tags mark media and `\\<image>` is
    the word; in a list, parts mark media and their text is literal.
    """
    if content is None:
        return []
    if isinstance(content, str):
        parts = TAG.split(content)
        return [
            (part, "", None) if i % 2 else ("text", plain_words(part), None)
            for i, part in enumerate(parts)
            if i % 2 or part
        ]
    if not isinstance(content, list | tuple):
        raise ValueError(
            say(
                f"{prefix(where)}content ({type(content).__name__}) must be a string or a list of parts; convert it",
                f"{prefix(where)}content（{type(content).__name__}）须为字符串或由部分组成的列表；请转换",
            )
        )
    segments: list[tuple[str, str, Any]] = []
    for i, part in enumerate(content):
        kind = _PART_KINDS.get(part.get("type", "")) if isinstance(part, Mapping) else None
        if kind is None or (kind == "text" and not isinstance(part.get("text"), str)):
            raise ValueError(
                say(
                    f"{prefix(where)}content[{i}] ({str(part)[:80]}) must be an object whose type is one of "
                    f"{sorted(_PART_KINDS)}, a text with its text; fix it",
                    f"{prefix(where)}content[{i}]（{str(part)[:80]}）须为对象，type 为 {sorted(_PART_KINDS)} 之一，文本须带 text；请改正",
                )
            )
        segments.append(("text", part["text"], None) if kind == "text" else (kind, "", _source(part, kind)))
    return segments


def _source(part: Message, kind: str) -> Any:
    """The medium in a part: {"image": x}, {"url": x}, {"path": x} or OpenAI's {"image_url": {"url":
    x}}; None where it is listed elsewhere.
    """
    for key in (kind, f"{kind}_url", "url", "path"):
        value = part.get(key)
        if value is not None:
            return value.get("url") if isinstance(value, Mapping) else value
    return None


def _read_answer(message: Message, where: str) -> tuple[str, list[tuple[str, str, Any]]]:
    """(reasoning, segments of the rest). The thought is the field, or else what the marks at the
    start of the text enclose.
    """
    content, reasoning = message.get("content"), message.get("reasoning_content") or ""
    if not reasoning and isinstance(content, str):
        reasoning, content = split_reasoning(content)
    segments = _segments(content, where)
    if not reasoning and not isinstance(content, str) and segments and segments[0][0] == "text":
        reasoning, opening = split_reasoning(segments[0][1])
        segments[0] = ("text", opening, None)
    return reasoning, [segment for segment in segments if segment[:2] != ("text", "")]


def _write_tools(out: _Writer, tools: Sequence[Mapping[str, Any]]) -> None:
    if not tools:
        return
    wrapped = [tool if tool.get("type") == "function" else {"type": "function", "function": tool} for tool in tools]
    out.own("\n<tool_list>\n")
    out.text(json.dumps(wrapped, ensure_ascii=False))
    out.own("\n</tool_list>\n")


def _call_text(call: Message, where: str) -> str:
    """One tool call as JSON; arguments that are JSON text already stay as written."""
    function = call.get("function") or call
    name, arguments = function.get("name"), function.get("arguments", {})
    if not isinstance(name, str):
        raise ValueError(
            say(
                f"{prefix(where)}tool call name ({name!r}) must be a string; fix or drop the call",
                f"{prefix(where)}工具调用的名称（{name!r}）须为字符串；请改正或去掉该调用",
            )
        )
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    try:
        json.loads(arguments)
    except ValueError as error:
        raise ValueError(
            say(
                f"{prefix(where)}tool call arguments ({arguments!r}) must be JSON ({error}); fix or drop the call",
                f"{prefix(where)}工具调用的参数（{arguments!r}）须为 JSON（{error}）；请改正或去掉该调用",
            )
        ) from error
    return f'{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": {arguments}}}'

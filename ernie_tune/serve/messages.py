"""The messages of a dialogue and the tools that it offers, as OpenAI's API has them, and how
mistakes in them are named.

Refuses to know: sampling, the model, bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ernie_tune.config.convert import did_you_mean
from ernie_tune.config.language import say
from ernie_tune.serve import idle
from ernie_tune.serve.idle import Idle

MAX_PARTS, MAX_CALLS = 2048, 128
MAX_LABEL_CHARACTERS = 512
FUNCTION_NAME = r"^[A-Za-z0-9_.-]{1,64}$"

Label = Annotated[str, Field(max_length=MAX_LABEL_CHARACTERS)]  # told to nobody, changes nothing


def wrong(message: str, field: str = "") -> PydanticCustomError:
    """A mistake in `field` of the object that is looked at."""
    return PydanticCustomError("request", "{text}", {"text": message, "field": field})


def kind_of(**kinds: type) -> Discriminator:
    """The member of a union by the type of what was sent: <text> for str, and so on."""

    def name(value: Any) -> str | None:
        return next((f"<{kind}>" for kind, of in kinds.items() if isinstance(value, of)), None)

    words = {"text": say("a string", "字符串"), "parts": say("a list", "列表"), "object": say("an object", "对象")}
    found = [words[kind] for kind in kinds]
    message = say(
        f"must be {' or '.join(word.english for word in found)}", f"须为{'或'.join(word.chinese for word in found)}"
    )
    return Discriminator(name, "kind", message)


def one_of(key: str, names: Mapping[str, str], hint: str = "") -> Discriminator:
    """The member of a union by the value of a key. `names`: value -> tag."""

    def name(value: Any) -> str | None:
        if not isinstance(value, dict):
            return None
        found = value.get(key)
        return names.get(found) if isinstance(found, str) else None

    known = ", ".join(map(repr, names))
    return Discriminator(name, f"member {key}", f"must be one of {known}{hint}")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    idle: ClassVar[Mapping[str, Idle]] = {}

    @model_validator(mode="before")
    @classmethod
    def _what_is_asked(cls, value: Any) -> Any:
        """Without nulls, and without what asks for nothing; the first field that would be ignored
        is refused.
        """
        if not isinstance(value, dict):
            return value
        names = {field.alias or name for name, field in cls.model_fields.items()}
        kept: dict[str, Any] = {}
        for name, one in value.items():
            if one is None:
                continue
            if name in names:
                kept[name] = one
            elif name not in cls.idle:
                near = did_you_mean(name[:100], [*names, *cls.idle])
                raise wrong(
                    say(
                        "is no field that this server knows{near}; leave it out",
                        "不是本服务器识别的字段{near}；请去掉",
                        near=near,
                    ),
                    name,
                )
            elif not cls.idle[name].takes(one):
                raise wrong(
                    say(
                        "({found}) has no effect here: {why}",
                        "（{found}）在此无效：{why}",
                        found=_shown(one),
                        why=cls.idle[name].instead,
                    ),
                    name,
                )
        return kept


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class _Cached(Strict):
    """What may carry hints to a cache of prompts; they change nothing of an answer."""

    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class TextPart(_Cached):
    type: Literal["text"]
    text: str


class RefusalPart(Strict):
    """What an answer of OpenAI's may hold instead of a text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImageURL(Strict):
    idle = idle.IMAGE_URL

    url: str = Field(min_length=1)
    # a hint; pictures keep the model's own limits
    detail: Literal["auto", "low", "high", "original"] | None = None


class VideoURL(Strict):
    idle = idle.VIDEO_URL

    url: str = Field(min_length=1)


class ImagePart(_Cached):
    type: Literal["image_url"]
    image_url: Annotated[ImageURL, BeforeValidator(_as_url)]


class VideoPart(_Cached):
    type: Literal["video_url"]
    video_url: Annotated[VideoURL, BeforeValidator(_as_url)]


_HINT = "; a picture is image_url with its image_url.url; sound and files are not read"
TextOnly = Annotated[TextPart, Tag("<text>")] | Annotated[RefusalPart, Tag("<refusal>")]
OfText = Annotated[TextOnly, one_of("type", {"text": "<text>", "refusal": "<refusal>"})]
Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image>")] | Annotated[VideoPart, Tag("<video>")],
    one_of("type", {"text": "<text>", "image_url": "<image>", "video_url": "<video>"}, _HINT),
]
Words = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[OfText], Field(fail_fast=True, max_length=MAX_PARTS), Tag("<parts>")],
    kind_of(text=str, parts=list),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS), Tag("<parts>")],
    kind_of(text=str, parts=list),
]


class _Message(_Cached):
    content: Any
    name: Label | None = None

    def texts(self) -> Iterator[str]:
        """All text in it."""
        content = [self.content] if isinstance(self.content, str) else self.content or []
        for part in content:
            if isinstance(part, str):
                yield part
            elif part.type in ("text", "refusal"):
                yield part.text


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: Words


class UserMessage(_Message):
    role: Literal["user"]
    content: Content


class CallFunction(Strict):
    idle: ClassVar[Mapping[str, Idle]] = {"parsed_arguments": Idle("the arguments count")}

    name: str = Field(pattern=FUNCTION_NAME)
    arguments: str = "{}"

    @model_validator(mode="before")
    @classmethod
    def _drop_what_the_client_parsed(cls, value: Any) -> Any:
        return {k: v for k, v in value.items() if k != "parsed_arguments"} if isinstance(value, dict) else value

    @field_validator("arguments")
    @classmethod
    def _nothing_is_an_empty_object(cls, value: str) -> str:
        return value if value.strip() else "{}"


class Call(Strict):
    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: CallFunction
    index: int | None = None  # of a stream's calls; their order counts


class AssistantMessage(_Message):
    """An answer before, as we or others gave it; what the official client makes of one is taken
    back.
    """

    idle = idle.ASSISTANT

    role: Literal["assistant", "bot"]
    content: Words | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True, max_length=MAX_CALLS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_we_add(cls, value: Any) -> Any:
        """Ids of tokens and what the client parsed repeat the content; other servers call the
        thought `reasoning`.
        """
        if not isinstance(value, dict):
            return value
        repeated = ("prompt_token_ids", "completion_token_ids", "prompt_tokens", "completion_tokens", "parsed")
        kept = {k: v for k, v in value.items() if k not in repeated}
        if isinstance(kept.get("reasoning"), str):
            thought = kept.pop("reasoning")
            kept["reasoning_content"] = kept.get("reasoning_content") or thought
        return kept

    @model_validator(mode="after")
    def _a_refusal_is_an_answer(self) -> AssistantMessage:
        if self.refusal and not self.content:
            self.content = self.refusal
        return self

    def texts(self) -> Iterator[str]:
        yield from super().texts()
        yield self.reasoning_content or ""
        for call in self.tool_calls or ():
            yield call.function.name
            yield call.function.arguments


class ToolMessage(_Message):
    """What a call gave."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str = Field(min_length=1, max_length=128)


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    one_of(
        "role",
        {
            "system": "<system>",
            "developer": "<system>",
            "user": "<user>",
            "assistant": "<assistant>",
            "bot": "<assistant>",
            "tool": "<tool>",
        },
    ),
]


class Function(_Cached):
    name: str = Field(pattern=FUNCTION_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Cached):
    idle = idle.TOOL

    type: Literal["function"]
    function: Function

    @property
    def shown(self) -> dict[str, Any]:
        """What the prompt shows of it."""
        function = self.function
        values = {"name": function.name, "description": function.description, "parameters": function.parameters}
        return {"type": "function", "function": {k: v for k, v in values.items() if v is not None}}


def in_order_of_calls(messages: list[Any]) -> Iterator[Any]:
    """The messages, results after the calls that they belong to, in their order. Raises for results
    that fit no call, and none.
    """
    due: list[str] = []
    results: dict[str, Any] = {}
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in due or message.tool_call_id in results:
                rest = [one for one in due if one not in results]
                raise wrong(
                    say(
                        f"({message.tool_call_id!r}) must be the id of a call of the answer before that has no "
                        "result yet; "
                        f"waiting for one: {rest[:8]}",
                        f"（{message.tool_call_id!r}）须为上一个回答中尚无结果的调用的 id；等待结果的有：{rest[:8]}",
                    ),
                    f"{where}.tool_call_id",
                )
            results[message.tool_call_id] = message
            continue
        yield from _settled(due, results, where)
        calls = message.tool_calls or () if isinstance(message, AssistantMessage) else ()
        due, results = [call.id for call in calls], {}
        if len(set(due)) < len(due):
            raise wrong(say("must have different ids; number them", "各 id 须不同；请编号"), f"{where}.tool_calls")
        yield message
    yield from _settled(due, results, "" if results else None)


def _settled(due: list[str], results: Mapping[str, Any], where: str | None) -> Iterator[Any]:
    missing = [one for one in due if one not in results]
    if missing and where is not None:
        raise wrong(
            say(
                f"must be the result of tool call {missing[0]!r}; send one tool message for each call",
                f"须为工具调用 {missing[0]!r} 的结果；请为每个调用发送一条 tool 消息",
            ),
            where or "messages[-1]",
        )
    yield from (results[one] for one in due if one in results)

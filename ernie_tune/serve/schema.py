"""The requests of the API: OpenAI's fields, and those of FastDeploy, vLLM and SGLang, as far as they have an effect here.

A field that would be ignored is refused, unless its value asks for nothing (idle.py). Validation ends at the first
mistake of a list and names the field of the type that was meant. Refuses to know: the model, replies, bytes.
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
    StrictInt,
    Tag,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from ernie_tune.config.convert import did_you_mean
from ernie_tune.serve import idle
from ernie_tune.serve.idle import Idle

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_TOP_LOGPROBS, MAX_N = 16, 256, 20, 128
MAX_MESSAGES, MAX_PARTS, MAX_CALLS = 4096, 2048, 128
MAX_PROMPTS, MAX_PROMPT_TOKENS = 1024, 2**20  # the server's own limits are lower (`requests.py`)
MAX_LABEL_CHARACTERS = 512
FUNCTION_NAME = r"^[A-Za-z0-9_.-]{1,64}$"

Label = Annotated[str, Field(max_length=MAX_LABEL_CHARACTERS)]  # told to nobody, changes nothing


def wrong(message: str, field: str = "") -> PydanticCustomError:
    """A mistake in `field` of the object that is looked at."""
    return PydanticCustomError("request", "{text}", {"text": message, "field": field})


def _kind(**kinds: type) -> Discriminator:
    """The member of a union by the type of what was sent: <text> for str, and so on."""

    def name(value: Any) -> str | None:
        return next((f"<{kind}>" for kind, of in kinds.items() if isinstance(value, of)), None)

    words = {"text": "a string", "parts": "a list", "object": "an object"}
    message = f"must be {' or '.join(words[kind] for kind in kinds)}"
    return Discriminator(name, "kind", message)


def _one_of(key: str, names: Mapping[str, str], hint: str = "") -> Discriminator:
    """The member of a union by the value of a key. `names`: value -> tag."""

    def name(value: Any) -> str | None:
        if not isinstance(value, dict):
            return None
        found = value.get(key)
        return names.get(found) if isinstance(found, str) else None

    known = ", ".join(map(repr, names))
    return Discriminator(name, f"member {key}", f"must be one of {known}{hint}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    idle: ClassVar[Mapping[str, Idle]] = {}

    @model_validator(mode="before")
    @classmethod
    def _what_is_asked(cls, value: Any) -> Any:
        """Without nulls, and without what asks for nothing; the first field that would be ignored is refused."""
        if not isinstance(value, dict):
            return value
        kept: dict[str, Any] = {}
        for name, one in value.items():
            if one is None:
                continue
            if name in cls.model_fields:
                kept[name] = one
            elif name not in cls.idle:
                near = did_you_mean(name[:100], [*cls.model_fields, *cls.idle])
                raise wrong(f"is no field that this server knows{near}; leave it out", name)
            elif not cls.idle[name].takes(one):
                raise wrong(f"({_shown(one)}) has no effect here: {cls.idle[name].instead}", name)
        return kept


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


class _Cached(_Strict):
    """What may carry hints to a cache of prompts; they change nothing of an answer."""

    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


class TextPart(_Cached):
    type: Literal["text"]
    text: str


class RefusalPart(_Strict):
    """What an answer of OpenAI's may hold instead of a text."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def _as_url(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


class ImageURL(_Strict):
    idle = idle.IMAGE_URL

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high", "original"] | None = None  # a hint; pictures keep the model's own limits


class VideoURL(_Strict):
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
OfText = Annotated[TextOnly, _one_of("type", {"text": "<text>", "refusal": "<refusal>"})]
Part = Annotated[
    Annotated[TextPart, Tag("<text>")] | Annotated[ImagePart, Tag("<image>")] | Annotated[VideoPart, Tag("<video>")],
    _one_of("type", {"text": "<text>", "image_url": "<image>", "video_url": "<video>"}, _HINT),
]
Words = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[OfText], Field(fail_fast=True, max_length=MAX_PARTS), Tag("<parts>")],
    _kind(text=str, parts=list),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Part], Field(fail_fast=True, max_length=MAX_PARTS), Tag("<parts>")],
    _kind(text=str, parts=list),
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


class CallFunction(_Strict):
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


class Call(_Strict):
    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: CallFunction
    index: int | None = None  # of a stream's calls; their order counts


class AssistantMessage(_Message):
    """An answer before, as we or others gave it; what the official client makes of one is taken back."""

    idle = idle.ASSISTANT

    role: Literal["assistant", "bot"]
    content: Words | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True, max_length=MAX_CALLS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_we_add(cls, value: Any) -> Any:
        """Ids of tokens and what the client parsed repeat the content; other servers call the thought `reasoning`."""
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
    _one_of(
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
    type: Literal["function"]
    function: Function


class ChosenFunction(_Strict):
    name: str = Field(pattern=FUNCTION_NAME)


class NamedChoice(_Strict):
    type: Literal["function"]
    function: ChosenFunction


class ResponseFormat(_Strict):
    type: Literal["text"]


class StreamOptions(_Strict):
    idle = idle.STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ThinkingMode(_Strict):
    thinking_mode: Literal["open", "close"]


class TemplateKwargs(_Strict):
    enable_thinking: bool | None = None
    thinking: bool | None = None  # another server's word for it
    options: ThinkingMode | None = None

    @property
    def thinks(self) -> bool | None:
        """Whether to think, None where the request does not say."""
        named = self.enable_thinking if self.enable_thinking is not None else self.thinking
        if named is None and self.options is not None:
            return self.options.thinking_mode == "open"
        return named


class Sampling(_Strict):
    """What both endpoints take."""

    model: str | None = Field(None, max_length=MAX_LABEL_CHARACTERS)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(0.7, gt=0, le=1)  # FastDeploy's default
    top_k: int = Field(0, ge=-1, description="0 and -1 keep everything")
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    n: int = Field(1, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: (
        Annotated[
            Annotated[str, Tag("<text>")]
            | Annotated[list[str], Field(fail_fast=True, max_length=MAX_STOPS), Tag("<parts>")],
            _kind(text=str, parts=list),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[StrictInt], Field(fail_fast=True, max_length=MAX_STOPS)] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    # Labels: told to nobody, they change nothing.
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    cache_salt: Label | None = None
    request_id: Label | None = None
    rid: Label | None = None
    metadata: Annotated[dict[str, Label], Field(max_length=16)] | None = None

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) and value else value or []
        if any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise wrong(f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")
        return value

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value and "enable_thinking" in value:
            raise wrong("has no effect here: write it as chat_template_kwargs.enable_thinking", "enable_thinking")
        return value

    @model_validator(mode="after")
    def _check_stream(self) -> Sampling:
        asks = self.stream_options and (self.stream_options.include_usage or self.stream_options.continuous_usage_stats)
        if asks and not self.stream:
            raise wrong("needs stream; set stream to true or leave it out", "stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) and self.stop else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most, None where the request does not say."""
        return self.max_tokens


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    idle = idle.CHAT

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_effort: Literal["none", "medium"] | None = Field(
        None, description="none: no thought; medium: the model's own way. For a budget use reasoning_max_tokens"
    )
    reasoning_max_tokens: int | None = Field(None, ge=0)
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=MAX_CALLS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    add_generation_prompt: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None

    @model_validator(mode="after")
    def _check_fields(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise wrong("needs logprobs; set logprobs to true or leave it out", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong("and max_completion_tokens must agree; leave out max_tokens, the older name", "max_tokens")
        if self.reasoning_effort == "none" and self.chat_template_kwargs and self.chat_template_kwargs.thinks:
            raise wrong("('none') and chat_template_kwargs must agree; leave one out", "reasoning_effort")
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise wrong(f"must have different names, {twice!r} is there twice; rename one", "tools")
        return self

    @model_validator(mode="after")
    def _check_results(self) -> ChatRequest:
        """Results come in any order and are put into that of the calls: the template does not say which is whose."""
        self.messages = list(_in_order_of_calls(self.messages))
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt shows, as the template takes them."""
        wanted = [] if self.tool_choice == "none" else self.tools or []
        hidden = {"cache_control": True, "prompt_cache_breakpoint": True}
        drop: Any = {**hidden, "function": {**hidden, "strict": True}}
        return [tool.model_dump(exclude_none=True, exclude=drop) for tool in wanted]

    @property
    def thinking(self) -> bool | None:
        asked = self.chat_template_kwargs.thinks if self.chat_template_kwargs else None
        return False if asked is None and self.reasoning_effort == "none" else asked


def _in_order_of_calls(messages: list[Any]) -> Iterator[Any]:
    """The messages, results after the calls that they belong to, in their order. Raises for results that fit no call, and none."""
    due: list[str] = []
    results: dict[str, Any] = {}
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in due or message.tool_call_id in results:
                rest = [one for one in due if one not in results]
                raise wrong(
                    f"({message.tool_call_id!r}) must be the id of a call of the answer before that has no result yet; "
                    f"waiting for one: {rest[:8]}",
                    f"{where}.tool_call_id",
                )
            results[message.tool_call_id] = message
            continue
        yield from _settled(due, results, where)
        calls = message.tool_calls or () if isinstance(message, AssistantMessage) else ()
        due, results = [call.id for call in calls], {}
        if len(set(due)) < len(due):
            raise wrong("must have different ids; number them", f"{where}.tool_calls")
        yield message
    yield from _settled(due, results, "" if results else None)


def _settled(due: list[str], results: Mapping[str, Any], where: str | None) -> Iterator[Any]:
    missing = [one for one in due if one not in results]
    if missing and where is not None:
        raise wrong(
            f"must be the result of tool call {missing[0]!r}; send one tool message for each call",
            where or "messages[-1]",
        )
    yield from (results[one] for one in due if one in results)


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else 0
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"


_Ids = Annotated[list[StrictInt], Field(fail_fast=True, max_length=MAX_PROMPT_TOKENS)]


class CompletionRequest(Sampling):
    """POST /v1/completions: prompts as they are, without a template; special tokens in a text count as such."""

    idle = idle.COMPLETION

    prompt: Annotated[
        Annotated[str, Tag("<text>")]
        | Annotated[list[str], Field(fail_fast=True, max_length=MAX_PROMPTS), Tag("<texts>")]
        | Annotated[_Ids, Tag("<ids>")]
        | Annotated[list[_Ids], Field(fail_fast=True, max_length=MAX_PROMPTS), Tag("<lists>")],
        Discriminator(
            _prompt_kind, "kind", "must be a string, a list of strings, token ids, or a list of lists of them"
        ),
    ]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="before")
    @classmethod
    def _false_asks_for_no_logprobs(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("logprobs") is False:
            return {**value, "logprobs": None}
        return value

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        prompt: Any = self.prompt
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
            return [prompt]
        return list(prompt)

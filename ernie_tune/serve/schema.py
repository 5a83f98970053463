"""The requests of the API: OpenAI's fields and FastDeploy's extras (fastdeploy.md 5.4), as far as they have an effect here.

A field that would be ignored is refused, unless its value asks for nothing. Refuses to know: the model, replies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_TOP_LOGPROBS, MAX_N = 16, 256, 20, 128


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class MediaURL(_Strict):
    url: str = Field(min_length=1)


class ImageURL(MediaURL):
    detail: Literal["auto"] | None = None  # "low" and "high" would have no effect


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: ImageURL


class VideoPart(_Strict):
    type: Literal["video_url"]
    video_url: MediaURL


Part = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class _Message(_Strict):
    content: Any
    name: str | None = None

    def texts(self) -> Iterator[str]:
        """All text in it."""
        content = [self.content] if isinstance(self.content, str) else self.content or []
        for part in content:
            if isinstance(part, str):
                yield part
            elif part.type == "text":
                yield part.text


class SystemMessage(_Message):
    role: Literal["system", "developer"]
    content: str | list[TextPart]


class UserMessage(_Message):
    role: Literal["user"]
    content: str | list[Part]


class CallFunction(_Strict):
    name: str = Field(min_length=1)
    arguments: str


class Call(_Strict):
    id: str = Field(min_length=1)
    type: Literal["function"] = "function"
    function: CallFunction


class AssistantMessage(_Message):
    role: Literal["assistant", "bot"]
    content: str | list[TextPart] | None = None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[Call] | None = None

    def texts(self) -> Iterator[str]:
        yield from super().texts()
        yield self.reasoning_content or ""
        yield from (call.function.arguments for call in self.tool_calls or ())


class ToolMessage(_Message):
    """What a call gave. Results come in the order of the calls: the template does not say which is whose."""

    role: Literal["tool"]
    content: str | list[TextPart]
    tool_call_id: str = Field(min_length=1)


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(_Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None  # arguments are what the model writes


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class StreamOptions(_Strict):
    include_usage: bool = False


class ThinkingMode(_Strict):
    thinking_mode: Literal["open", "close"]


class TemplateKwargs(_Strict):
    enable_thinking: bool | None = None
    options: ThinkingMode | None = None

    @property
    def thinking(self) -> bool | None:
        """Whether to think, None where the request does not say (fastdeploy.md 5.2)."""
        if self.enable_thinking is None and self.options is not None:
            return self.options.thinking_mode == "open"
        return self.enable_thinking


class Sampling(_Strict):
    """What both endpoints take."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(0.7, gt=0, le=1)  # FastDeploy's default (architecture.md 10)
    top_k: int = Field(0, ge=-1, description="0 and -1 keep everything")
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    n: int = Field(1, ge=1, le=MAX_N)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    user: str | None = None  # a label, nothing else
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)

    @field_validator(
        "temperature",
        "top_p",
        "top_k",
        "repetition_penalty",
        "n",
        "stream",
        "frequency_penalty",
        "presence_penalty",
        mode="before",
    )
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _check_stop(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or any(not 1 <= len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
            raise ValueError(f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters")
        return value

    @model_validator(mode="after")
    def _check_stream(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream; set stream to true or drop it")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def limit(self) -> int | None:
        """Tokens of an answer at most, None where the request does not say."""
        return self.max_tokens


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    chat_template_kwargs: TemplateKwargs | None = None
    reasoning_max_tokens: int | None = Field(None, ge=0)
    tools: Annotated[list[Tool], Field(max_length=MAX_N)] | None = None
    tool_choice: Literal["none", "auto"] | None = None  # a call cannot be forced

    @model_validator(mode="after")
    def _check_fields(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs; set logprobs to true or drop it")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens must agree; drop max_tokens, the older name")
        return self

    @model_validator(mode="after")
    def _check_results(self) -> ChatRequest:
        due: list[str] = []
        for i, message in enumerate(self.messages):
            if isinstance(message, ToolMessage):
                if not due or due.pop(0) != message.tool_call_id:
                    raise ValueError(
                        f"messages[{i}].tool_call_id ({message.tool_call_id[:100]!r}) must be the id of the next call of the answer before; "
                        "send results in the order of tool_calls"
                    )
            elif due:
                raise ValueError(
                    f"messages[{i}] must be the result of tool call {due[0][:100]!r}; send one tool message for each call"
                )
            else:
                due = [call.id for call in (isinstance(message, AssistantMessage) and message.tool_calls) or ()]
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt shows, as the template takes them."""
        wanted = [] if self.tool_choice == "none" else self.tools or []
        return [tool.model_dump(exclude_none=True) for tool in wanted]

    @property
    def thinking(self) -> bool | None:
        return self.chat_template_kwargs.thinking if self.chat_template_kwargs else None


class CompletionRequest(Sampling):
    """POST /v1/completions: prompts as they are, without a template; special tokens in a text count as such."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        words = [one for one in self.prompt if not isinstance(one, int)]
        return words or [[one for one in self.prompt if isinstance(one, int)]]

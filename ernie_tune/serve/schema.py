"""The requests of the API: OpenAI's fields, and those of FastDeploy, vLLM and SGLang, as far as
they have an effect here.

A field that would be ignored is refused, unless its value asks for nothing (idle.py). Validation
ends at the first mistake of a list and names the field of the type that was meant. Refuses to know:
the model, replies, bytes.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StrictInt, Tag, field_validator, model_validator

from ernie_tune.config.language import say
from ernie_tune.serve import idle
from ernie_tune.serve.messages import (
    FUNCTION_NAME,
    MAX_CALLS,
    MAX_LABEL_CHARACTERS,
    AssistantMessage,
    Label,
    Message,
    Strict,
    Tool,
    in_order_of_calls,
    kind_of,
    one_of,
    wrong,
)

MAX_STOPS, MAX_STOP_CHARACTERS, MAX_TOP_LOGPROBS, MAX_N = 16, 256, 20, 128
MAX_MESSAGES = 4096
MAX_PROMPTS, MAX_PROMPT_TOKENS = 1024, 2**20  # the server's own limits are lower (`requests.py`)
MAX_CHOICES, MAX_PATTERN_CHARACTERS = 1024, 4096


class ChosenFunction(Strict):
    name: str = Field(pattern=FUNCTION_NAME)


class NamedChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(fail_fast=True, min_length=1, max_length=MAX_CALLS)]


class AllowedChoice(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


_Named = Annotated[
    Annotated[NamedChoice, Tag("<function>")] | Annotated[AllowedChoice, Tag("<allowed>")],
    one_of("type", {"function": "<function>", "allowed_tools": "<allowed>"}),
]
ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[_Named, Tag("<object>")],
    kind_of(text=str, object=dict),
]


class JsonSchema(Strict):
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None  # followed either way


class TextFormat(Strict):
    type: Literal["text"]


class ObjectFormat(Strict):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema")  # as others take it


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<plain>")]
    | Annotated[ObjectFormat, Tag("<json_object>")]
    | Annotated[SchemaFormat, Tag("<json_schema>")],
    one_of("type", {"text": "<plain>", "json_object": "<json_object>", "json_schema": "<json_schema>"}),
]


def _as_schema(value: Any) -> Any:
    """A schema that came as its JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise wrong(say(f"must be a schema, or its JSON ({error})", f"须为 schema 或其 JSON（{error}）")) from None


Schema = Annotated[dict[str, Any], BeforeValidator(_as_schema)]
Pattern = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN_CHARACTERS)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1)]], Field(fail_fast=True, min_length=1, max_length=MAX_CHOICES)
]


class StructuredOutputs(Strict):
    """vLLM's way to ask for a rule."""

    idle = idle.STRUCTURED

    json_: Schema | None = Field(None, alias="json")
    regex: Pattern | None = None
    choice: Choices | None = None
    json_object: bool = False


class StreamOptions(Strict):
    idle = idle.STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: bool = False


class ThinkingMode(Strict):
    thinking_mode: Literal["open", "close"]


class TemplateKwargs(Strict):
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


class Sampling(Strict):
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
            kind_of(text=str, parts=list),
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
    # Rules that the answer follows; the first is OpenAI's, then come vLLM's, FastDeploy's and
    # SGLang's names.
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Pattern | None = None
    guided_choice: Choices | None = None
    json_schema: Schema | None = None
    regex: Pattern | None = None
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
            raise wrong(
                say(
                    f"must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARACTERS} characters",
                    f"至多 {MAX_STOPS} 个长为 1 至 {MAX_STOP_CHARACTERS} 个字符的字符串",
                )
            )
        return value

    @field_validator("metadata")
    @classmethod
    def _check_metadata(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value and "enable_thinking" in value:
            raise wrong(
                say(
                    "has no effect here: write it as chat_template_kwargs.enable_thinking",
                    "在此无效：请写成 chat_template_kwargs.enable_thinking",
                ),
                "enable_thinking",
            )
        return value

    @model_validator(mode="after")
    def _check_stream(self) -> Sampling:
        asks = self.stream_options and (self.stream_options.include_usage or self.stream_options.continuous_usage_stats)
        if asks and not self.stream:
            raise wrong(
                say("needs stream; set stream to true or leave it out", "需要 stream；请将 stream 设为 true，或去掉它"),
                "stream_options",
            )
        return self

    @model_validator(mode="after")
    def _check_rules(self) -> Sampling:
        rules = self._rules()
        if len(rules) > 1:
            first, second, *_ = rules
            raise wrong(
                say(f"and {second} must not both be given; leave one out", f"与 {second} 不能同时给出；请去掉其一"),
                first,
            )
        if rules and self.ignore_eos:
            raise wrong(
                say(
                    "must not be set with a rule, which says where the answer ends; leave it out",
                    "不能与规则同用，规则决定回答在何处结束；请去掉",
                ),
                "ignore_eos",
            )
        return self

    def _rules(self) -> dict[str, tuple[str, Any]]:
        """Field -> (kind, rule) of serve/guide.py."""
        found: dict[str, tuple[str, Any]] = {}
        if isinstance(self.response_format, ObjectFormat):
            found["response_format"] = "json", {"type": "object", **(self.response_format.schema_ or {})}
        elif isinstance(self.response_format, SchemaFormat):
            found["response_format"] = "json", self.response_format.json_schema.schema_
        inner = self.structured_outputs or StructuredOutputs.model_validate({})
        asked: dict[str, tuple[str, Any]] = {
            "structured_outputs.json": ("json", inner.json_),
            "structured_outputs.regex": ("regex", inner.regex),
            "structured_outputs.choice": ("choice", inner.choice),
            "structured_outputs.json_object": ("json", {"type": "object"} if inner.json_object else None),
            "guided_json": ("json", self.guided_json),
            "guided_regex": ("regex", self.guided_regex),
            "guided_choice": ("choice", self.guided_choice),
            "json_schema": ("json", self.json_schema),
            "regex": ("regex", self.regex),
        }
        return {**found, **{field: one for field, one in asked.items() if one[1] is not None}}

    @property
    def rule(self) -> tuple[str, Any] | None:
        """(kind, rule) that the answer follows."""
        return next(iter(self._rules().values()), None)

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
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _check_fields(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise wrong(
                say(
                    "needs logprobs; set logprobs to true or leave it out",
                    "需要 logprobs；请将 logprobs 设为 true，或去掉它",
                ),
                "top_logprobs",
            )
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise wrong(
                say(
                    "and max_completion_tokens must agree; leave out max_tokens, the older name",
                    "与 max_completion_tokens 须一致；请去掉旧名 max_tokens",
                ),
                "max_tokens",
            )
        if self.reasoning_effort == "none" and self.chat_template_kwargs and self.chat_template_kwargs.thinks:
            raise wrong(
                say(
                    "('none') and chat_template_kwargs must agree; leave one out",
                    "（'none'）与 chat_template_kwargs 须一致；请去掉其一",
                ),
                "reasoning_effort",
            )
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatRequest:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise wrong(
                say(
                    f"must have different names, {twice!r} is there twice; rename one",
                    f"各名称须不同，{twice!r} 出现两次；请改名",
                ),
                "tools",
            )
        return self

    @model_validator(mode="after")
    def _check_choice(self) -> ChatRequest:
        known = {tool.function.name for tool in self.tools or ()}
        if self.needs_call and not known:
            raise wrong(
                say(
                    "must be 'none' or 'auto' without tools; send tools",
                    "没有 tools 时须为 'none' 或 'auto'；请发送 tools",
                ),
                "tool_choice",
            )
        for name in self._chosen or ():
            if name not in known:
                raise wrong(
                    say(
                        f"names {name!r}, which must be one of tools: {sorted(known)[:8]}",
                        f"指定了 {name!r}，它须为 tools 之一：{sorted(known)[:8]}",
                    ),
                    "tool_choice",
                )
        if self.needs_call and self.rule is not None:
            raise wrong(
                say(
                    "asks for a call, and the rule for another answer; leave one out",
                    "要求调用，而规则要求另一种回答；请去掉其一",
                ),
                "tool_choice",
            )
        if self.needs_call and self.ignore_eos:
            raise wrong(
                say("must not be set where a call is asked for; leave it out", "要求调用时不能设置；请去掉"),
                "ignore_eos",
            )
        return self

    @model_validator(mode="after")
    def _check_end(self) -> ChatRequest:
        last = isinstance(self.messages[-1], AssistantMessage)
        if self.continue_final_message and self.add_generation_prompt:
            raise wrong(
                say(
                    "must be false with continue_final_message; leave one out",
                    "与 continue_final_message 同用时须为 false；请去掉其一",
                ),
                "add_generation_prompt",
            )
        if self.continue_final_message and not last:
            raise wrong(
                say("needs an assistant message at the end; leave it out", "要求最后一条是 assistant 消息；请去掉"),
                "continue_final_message",
            )
        if self.continue_final_message and (self.needs_call or self.rule):
            raise wrong(
                say("must not be set with a rule or a call; leave it out", "不能与规则或调用同用；请去掉"),
                "continue_final_message",
            )
        if self.add_generation_prompt is False and not self.continue_final_message:
            raise wrong(
                say(
                    "(false) needs continue_final_message; set that to true, or leave both out",
                    "（false）需要 continue_final_message；请将后者设为 true，或两者都去掉",
                ),
                "add_generation_prompt",
            )
        if last and not self.continue_final_message:
            raise wrong(
                say(
                    "must end with a user or tool message; to have the last answer continued, set "
                    "continue_final_message to true and add_generation_prompt to false",
                    "最后一条须为 user 或 tool 消息；若要续写最后的回答，请将 continue_final_message 设为 true、add_generation_prompt 设为 false",
                ),
                "messages",
            )
        return self

    @model_validator(mode="after")
    def _check_results(self) -> ChatRequest:
        """Results come in any order and are put into that of the calls: the template does not say
        which is whose.
        """
        self.messages = list(in_order_of_calls(self.messages))
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def _chosen(self) -> list[str] | None:
        """Names of the tools that may be called; None: all."""
        choice = self.tool_choice
        if isinstance(choice, NamedChoice):
            return [choice.function.name]
        if isinstance(choice, AllowedChoice):
            return [one.function.name for one in choice.allowed_tools.tools]
        return None

    @property
    def needs_call(self) -> bool:
        """Whether the answer must be a call."""
        choice = self.tool_choice
        if isinstance(choice, AllowedChoice):
            return choice.allowed_tools.mode == "required"
        return choice == "required" or isinstance(choice, NamedChoice)

    @property
    def one_call(self) -> bool:
        """Whether the answer holds one call at most."""
        return not self.parallel_tool_calls or isinstance(self.tool_choice, NamedChoice)

    @property
    def ruled_tools(self) -> list[dict[str, Any]] | None:
        """The tools whose calls follow their schema; None: calls are what the model makes of
        them.
        """
        chosen, tools = self._chosen, self.callable_tools
        strict = any(tool.function.strict for tool in self.tools or ())
        if not tools or not (strict or self.needs_call or self.rule or chosen):
            return None
        return [tool for tool in tools if chosen is None or tool["function"]["name"] in chosen]

    @property
    def callable_tools(self) -> list[dict[str, Any]]:
        """The tools that the prompt shows, as the template takes them."""
        wanted = [] if self.tool_choice == "none" else self.tools or []
        return [tool.shown for tool in wanted]

    @property
    def thinking(self) -> bool | None:
        asked = self.chat_template_kwargs.thinks if self.chat_template_kwargs else None
        return False if asked is None and self.reasoning_effort == "none" else asked


def _prompt_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else 0
    return "<texts>" if isinstance(first, str) else "<lists>" if isinstance(first, list) else "<ids>"


_Ids = Annotated[list[StrictInt], Field(fail_fast=True, max_length=MAX_PROMPT_TOKENS)]


class CompletionRequest(Sampling):
    """POST /v1/completions: prompts as they are, without a template; special tokens in a text count
    as such.
    """

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

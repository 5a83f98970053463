"""Fields of the requests of OpenAI, vLLM, SGLang and FastDeploy that have no effect here: the
values of each that ask for nothing, and what to do instead of the others.

What asks for nothing is taken, since clients send their defaults; what would be ignored is refused,
since somebody wants it. Refuses to know: the fields that have an effect.

Source: the OpenAI API's request types (package openai 3.57), and the documented extra parameters of
vLLM, SGLang and FastDeploy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_TEXT_ONLY = "answers are text; leave it out"
_SAMPLING = "use temperature, top_p, top_k and the penalties"
_STRUCTURED = "use response_format, or structured_outputs with json, regex or choice"
_LOGPROBS = "use logprobs and top_logprobs, which tell them of answers"


@dataclass(frozen=True)
class Idle:
    """One such field. `nothing`: its values that ask for nothing, null aside. `instead`: what a
    client that wants more does.
    """

    instead: str
    nothing: tuple[Any, ...] = ()

    def takes(self, value: Any) -> bool:
        """Whether the value asks for nothing. true is not 1 here."""
        return any(one == value and isinstance(one, bool) == isinstance(value, bool) for one in self.nothing)


_OPENAI = {
    "audio": Idle(_TEXT_ONLY),
    "functions": Idle("use tools, which replaced it", ([],)),
    "function_call": Idle("use tool_choice, which replaced it", ("none", "auto")),
    "logit_bias": Idle(_SAMPLING, ({},)),
    "modalities": Idle(_TEXT_ONLY, (["text"], [])),
    "moderation": Idle("nothing is moderated here; leave it out"),
    "prediction": Idle("every token is computed; leave it out"),
    "prompt_cache_options": Idle("no prompt is kept here; leave it out", ({},)),
    "prompt_cache_retention": Idle("no prompt is kept here; leave it out", ("in_memory", "in-memory")),
    "service_tier": Idle("all requests are served alike; leave it out", ("auto", "default")),
    "store": Idle("no answer is kept here; leave it out, or set it to false", (False,)),
    "verbosity": Idle("ask for short or long answers in words", ("medium",)),
    "web_search_options": Idle("there is no web search here; offer one as a tool"),
}
_OTHERS = {
    "add_special_tokens": Idle("the template writes the special tokens; leave it out", (False,)),
    "allowed_token_ids": Idle(_STRUCTURED),
    "bad_words": Idle(_SAMPLING, ([],)),
    "bad_words_token_ids": Idle(_SAMPLING, ([],)),
    "cache_prompt": Idle("no prompt is kept here; leave it out", (True, False)),
    "chat_template": Idle("the model's own template is used; use /v1/completions for a prompt of your own"),
    "custom_logit_processor": Idle(_SAMPLING),
    "custom_params": Idle(_SAMPLING, ({},)),
    "data_parallel_rank": Idle("there is one engine; leave it out"),
    "disable_chat_template": Idle("use /v1/completions for a prompt of your own", (False,)),
    "documents": Idle("put them into a message", ([],)),
    "ebnf": Idle(_STRUCTURED),
    "enable_thinking": Idle("write it as chat_template_kwargs.enable_thinking"),
    "extra_key": Idle("no prompt is kept here; leave it out"),
    "guided_decoding_backend": Idle("there is one; leave it out"),
    "guided_grammar": Idle(_STRUCTURED),
    "guided_whitespace_pattern": Idle("leave it out"),
    "include_reasoning": Idle("thoughts come apart, as reasoning_content; skip them there", (True,)),
    "include_stop_str_in_output": Idle("answers end before a stop string; add it yourself", (False,)),
    "kv_transfer_params": Idle("there is one engine; leave it out", ({},)),
    "length_penalty": Idle("it belongs to beam search, which there is not", (1.0,)),
    "logits_processors": Idle(_SAMPLING, ([],)),
    "logits_processors_args": Idle("use reasoning_max_tokens for a thought's budget", ({},)),
    "lora_path": Idle("name the adapter as `model`; GET /v1/models lists them", ("",)),
    "max_new_tokens": Idle("call it max_tokens"),
    "max_output_tokens": Idle("call it max_completion_tokens"),
    "media_io_kwargs": Idle("the model's own settings are used; leave it out", ({},)),
    "min_p": Idle(_SAMPLING, (0.0,)),
    "min_tokens": Idle("an answer ends where the model ends it; leave it out", (0,)),
    "mm_processor_kwargs": Idle("the model's own settings are used; leave it out", ({},)),
    "no_stop_trim": Idle("answers end before a stop string; add it yourself", (False,)),
    "priority": Idle("requests are served as they come; leave it out", (0,)),
    "prompt_logprobs": Idle(_LOGPROBS),
    "return_hidden_states": Idle("leave it out", (False,)),
    "return_tokens_as_token_ids": Idle("use return_token_ids", (False,)),
    "separate_reasoning": Idle("thoughts come apart, as reasoning_content; join them there", (True,)),
    "session_params": Idle("send the whole dialogue with each request", ({},)),
    "skip_special_tokens": Idle("use return_token_ids, which gives all of them", (True,)),
    "spaces_between_special_tokens": Idle("leave it out", (True, False)),
    "stop_regex": Idle("use stop, which takes strings", ("", [])),
    "stream_reasoning": Idle("thoughts are streamed as they come; skip them there", (True,)),
    "structural_tag": Idle(_STRUCTURED),
    "temp_scaled_logprobs": Idle("log-probabilities are at the request's temperature; leave it out", (True,)),
    "thinking_token_budget": Idle("call it reasoning_max_tokens"),
    "top_p_normalized_logprobs": Idle("log-probabilities are those before top_p; leave it out", (False,)),
    "truncate_prompt_tokens": Idle("no prompt is cut here; shorten it"),
    "use_beam_search": Idle("answers are sampled; use n", (False,)),
    "vllm_xargs": Idle("leave it out", ({},)),
}
REQUEST: Mapping[str, Idle] = {**_OPENAI, **_OTHERS}
CHAT: Mapping[str, Idle] = {
    **REQUEST,
    "best_of": Idle("use n, which gives all of them", (1,)),
    "echo": Idle("use /v1/completions, or join them yourself", (False,)),
    "input": Idle("call it messages; this is not the Responses API"),
    "prompt": Idle("use /v1/completions, or write it as a message"),
    "prompt_token_ids": Idle("use /v1/completions, whose prompt may be token ids"),
}
COMPLETION: Mapping[str, Idle] = {
    **REQUEST,
    "add_special_tokens": Idle("write the special tokens into the prompt", (False, True)),
    "best_of": Idle("use n, which gives all of them", (1,)),
    "echo": Idle("join prompt and answer yourself", (False,)),
    "messages": Idle("use /v1/chat/completions"),
    "reasoning_effort": Idle("raw prompts have no thought of their own; write it into the prompt", ("medium", "none")),
    "suffix": Idle("the model goes on with a prompt and fills no gaps; leave it out", ("",)),
    "tool_choice": Idle("use /v1/chat/completions", ("none", "auto")),
    "tools": Idle("use /v1/chat/completions", ([],)),
}
# What the client finds in our answers, or in OpenAI's, and sends back with the dialogue.
ASSISTANT: Mapping[str, Idle] = {
    "annotations": Idle("write citations into the content", ([],)),
    "audio": Idle(_TEXT_ONLY),
    "function_call": Idle("use tool_calls, which replaced it"),
    "multimodal_content": Idle("write it into the content", ([],)),
}
_SEEN = "pictures are seen as large as the model takes them; make them smaller yourself"
_FRAMES = "the model's own sampling of frames is used; cut the video yourself"
IMAGE_URL: Mapping[str, Idle] = {name: Idle(_SEEN) for name in ("min_pixels", "max_pixels", "resized_height", "width")}
VIDEO_URL: Mapping[str, Idle] = {
    **{name: Idle(_FRAMES) for name in ("fps", "min_frames", "max_frames", "target_frames", "frames_sample")},
    "detail": Idle(_FRAMES, ("auto", "low", "high")),
}
TOOL: Mapping[str, Idle] = {"custom": Idle("functions are the one kind of tool; describe it as one")}
STRUCTURED: Mapping[str, Idle] = {
    "grammar": Idle("use json, regex or choice"),
    "structural_tag": Idle("use tools and tool_choice"),
    "disable_fallback": Idle("there is one way to follow rules; leave it out", (True, False)),
    "disable_any_whitespace": Idle("JSON is written with one space after , and :", (True, False)),
    "disable_additional_properties": Idle("write additionalProperties into the schema", (False,)),
    "whitespace_pattern": Idle("JSON is written with one space after , and :"),
}
STREAM_OPTIONS: Mapping[str, Idle] = {"include_obfuscation": Idle("nothing is padded here; leave it out", (False,))}

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

from ernie_tune.config.language import say

_TEXT_ONLY = say("answers are text; leave it out", "回答是文本；请去掉")
_SAMPLING = say("use temperature, top_p, top_k and the penalties", "请用 temperature、top_p、top_k 与各惩罚项")
_STRUCTURED = say(
    "use response_format, or structured_outputs with json, regex or choice",
    "请用 response_format，或带 json、regex、choice 的 structured_outputs",
)
_LOGPROBS = say(
    "use logprobs and top_logprobs, which tell them of answers", "请用 logprobs 与 top_logprobs，它们给出回答的对数概率"
)


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
    "functions": Idle(say("use tools, which replaced it", "请用取代它的 tools"), ([],)),
    "function_call": Idle(say("use tool_choice, which replaced it", "请用取代它的 tool_choice"), ("none", "auto")),
    "logit_bias": Idle(_SAMPLING, ({},)),
    "modalities": Idle(_TEXT_ONLY, (["text"], [])),
    "moderation": Idle(say("nothing is moderated here; leave it out", "此处不做内容审核；请去掉")),
    "prediction": Idle(say("every token is computed; leave it out", "每个 token 都会计算；请去掉")),
    "prompt_cache_options": Idle(say("no prompt is kept here; leave it out", "此处不保存提示；请去掉"), ({},)),
    "prompt_cache_retention": Idle(
        say("no prompt is kept here; leave it out", "此处不保存提示；请去掉"), ("in_memory", "in-memory")
    ),
    "service_tier": Idle(
        say("all requests are served alike; leave it out", "所有请求同等对待；请去掉"), ("auto", "default")
    ),
    "store": Idle(
        say("no answer is kept here; leave it out, or set it to false", "此处不保存回答；请去掉或设为 false"), (False,)
    ),
    "verbosity": Idle(say("ask for short or long answers in words", "请用文字要求回答的长短"), ("medium",)),
    "web_search_options": Idle(
        say("there is no web search here; offer one as a tool", "此处没有网络搜索；请以工具提供")
    ),
}
_OTHERS = {
    "add_special_tokens": Idle(
        say("the template writes the special tokens; leave it out", "特殊 token 由模板写入；请去掉"), (False,)
    ),
    "allowed_token_ids": Idle(_STRUCTURED),
    "bad_words": Idle(_SAMPLING, ([],)),
    "bad_words_token_ids": Idle(_SAMPLING, ([],)),
    "cache_prompt": Idle(say("no prompt is kept here; leave it out", "此处不保存提示；请去掉"), (True, False)),
    "chat_template": Idle(
        say(
            "the model's own template is used; use /v1/completions for a prompt of your own",
            "使用模型自己的模板；自定提示请用 /v1/completions",
        )
    ),
    "custom_logit_processor": Idle(_SAMPLING),
    "custom_params": Idle(_SAMPLING, ({},)),
    "data_parallel_rank": Idle(say("there is one engine; leave it out", "只有一个引擎；请去掉")),
    "disable_chat_template": Idle(
        say("use /v1/completions for a prompt of your own", "自定提示请用 /v1/completions"), (False,)
    ),
    "documents": Idle(say("put them into a message", "请写进消息"), ([],)),
    "ebnf": Idle(_STRUCTURED),
    "enable_thinking": Idle(
        say("write it as chat_template_kwargs.enable_thinking", "请写成 chat_template_kwargs.enable_thinking")
    ),
    "extra_key": Idle(say("no prompt is kept here; leave it out", "此处不保存提示；请去掉")),
    "guided_decoding_backend": Idle(say("there is one; leave it out", "只有一种；请去掉")),
    "guided_grammar": Idle(_STRUCTURED),
    "guided_whitespace_pattern": Idle(say("leave it out", "请去掉")),
    "include_reasoning": Idle(
        say(
            "thoughts come apart, as reasoning_content; skip them there",
            "思考单独给出于 reasoning_content；请在那里略过",
        ),
        (True,),
    ),
    "include_stop_str_in_output": Idle(
        say("answers end before a stop string; add it yourself", "回答在停止字符串之前结束；请自行补上"), (False,)
    ),
    "kv_transfer_params": Idle(say("there is one engine; leave it out", "只有一个引擎；请去掉"), ({},)),
    "length_penalty": Idle(say("it belongs to beam search, which there is not", "它属于束搜索，此处没有"), (1.0,)),
    "logits_processors": Idle(_SAMPLING, ([],)),
    "logits_processors_args": Idle(
        say("use reasoning_max_tokens for a thought's budget", "思考的长度请用 reasoning_max_tokens"), ({},)
    ),
    "lora_path": Idle(
        say("name the adapter as `model`; GET /v1/models lists them", "请以 `model` 指定适配器；GET /v1/models 可列出"),
        ("",),
    ),
    "max_new_tokens": Idle(say("call it max_tokens", "请写成 max_tokens")),
    "max_output_tokens": Idle(say("call it max_completion_tokens", "请写成 max_completion_tokens")),
    "media_io_kwargs": Idle(
        say("the model's own settings are used; leave it out", "使用模型自己的设置；请去掉"), ({},)
    ),
    "min_p": Idle(_SAMPLING, (0.0,)),
    "min_tokens": Idle(
        say("an answer ends where the model ends it; leave it out", "回答在模型结束处结束；请去掉"), (0,)
    ),
    "mm_processor_kwargs": Idle(
        say("the model's own settings are used; leave it out", "使用模型自己的设置；请去掉"), ({},)
    ),
    "no_stop_trim": Idle(
        say("answers end before a stop string; add it yourself", "回答在停止字符串之前结束；请自行补上"), (False,)
    ),
    "priority": Idle(say("requests are served as they come; leave it out", "请求按到达顺序处理；请去掉"), (0,)),
    "prompt_logprobs": Idle(_LOGPROBS),
    "return_hidden_states": Idle(say("leave it out", "请去掉"), (False,)),
    "return_tokens_as_token_ids": Idle(say("use return_token_ids", "请用 return_token_ids"), (False,)),
    "separate_reasoning": Idle(
        say(
            "thoughts come apart, as reasoning_content; join them there",
            "思考单独给出于 reasoning_content；请在那里合并",
        ),
        (True,),
    ),
    "session_params": Idle(say("send the whole dialogue with each request", "请在每个请求中发送整个对话"), ({},)),
    "skip_special_tokens": Idle(
        say("use return_token_ids, which gives all of them", "请用 return_token_ids，它给出全部"), (True,)
    ),
    "spaces_between_special_tokens": Idle(say("leave it out", "请去掉"), (True, False)),
    "stop_regex": Idle(say("use stop, which takes strings", "请用 stop，它接受字符串"), ("", [])),
    "stream_reasoning": Idle(
        say("thoughts are streamed as they come; skip them there", "思考随生成流出；请在那里略过"), (True,)
    ),
    "structural_tag": Idle(_STRUCTURED),
    "temp_scaled_logprobs": Idle(
        say("log-probabilities are at the request's temperature; leave it out", "对数概率按请求的温度计；请去掉"),
        (True,),
    ),
    "thinking_token_budget": Idle(say("call it reasoning_max_tokens", "请写成 reasoning_max_tokens")),
    "top_p_normalized_logprobs": Idle(
        say("log-probabilities are those before top_p; leave it out", "对数概率为 top_p 之前的；请去掉"), (False,)
    ),
    "truncate_prompt_tokens": Idle(say("no prompt is cut here; shorten it", "此处不截断提示；请缩短")),
    "use_beam_search": Idle(say("answers are sampled; use n", "回答由采样得到；请用 n"), (False,)),
    "vllm_xargs": Idle(say("leave it out", "请去掉"), ({},)),
}
REQUEST: Mapping[str, Idle] = {**_OPENAI, **_OTHERS}
CHAT: Mapping[str, Idle] = {
    **REQUEST,
    "best_of": Idle(say("use n, which gives all of them", "请用 n，它给出全部"), (1,)),
    "echo": Idle(say("use /v1/completions, or join them yourself", "请用 /v1/completions，或自行拼接"), (False,)),
    "input": Idle(say("call it messages; this is not the Responses API", "请写成 messages；这不是 Responses API")),
    "prompt": Idle(say("use /v1/completions, or write it as a message", "请用 /v1/completions，或写成消息")),
    "prompt_token_ids": Idle(
        say("use /v1/completions, whose prompt may be token ids", "请用 /v1/completions，其提示可为 token id")
    ),
}
COMPLETION: Mapping[str, Idle] = {
    **REQUEST,
    "add_special_tokens": Idle(
        say("write the special tokens into the prompt", "请把特殊 token 写进提示"), (False, True)
    ),
    "best_of": Idle(say("use n, which gives all of them", "请用 n，它给出全部"), (1,)),
    "echo": Idle(say("join prompt and answer yourself", "请自行拼接提示与回答"), (False,)),
    "messages": Idle(say("use /v1/chat/completions", "请用 /v1/chat/completions")),
    "reasoning_effort": Idle(
        say("raw prompts have no thought of their own; write it into the prompt", "原始提示没有单独的思考；请写进提示"),
        ("medium", "none"),
    ),
    "suffix": Idle(
        say("the model goes on with a prompt and fills no gaps; leave it out", "模型只续写提示，不填空；请去掉"), ("",)
    ),
    "tool_choice": Idle(say("use /v1/chat/completions", "请用 /v1/chat/completions"), ("none", "auto")),
    "tools": Idle(say("use /v1/chat/completions", "请用 /v1/chat/completions"), ([],)),
}
EMBEDDING: Mapping[str, Idle] = {
    "add_special_tokens": Idle(
        say(
            "a text is opened by its special token, ids are not; leave it out", "文本以特殊 token 开头，id 则否；请去掉"
        ),
        (True,),
    ),
    "embedding_types": Idle(say("use encoding_format", "请用 encoding_format")),
    "input_type": Idle(say("texts and questions are read alike; leave it out", "文本与问题同样处理；请去掉")),
    "instruction": Idle(say("write it into the input", "请写进 input"), ("",)),
    "messages": Idle(say("use input, whose entries may be the parts of a message", "请用 input，其各项可为消息的部分")),
    "normalize": Idle(say("vectors are of length 1; leave it out", "向量长度均为 1；请去掉"), (True,)),
    "pooling": Idle(say("vectors are means of hidden states; leave it out", "向量为隐藏状态的均值；请去掉"), ("mean",)),
    "priority": Idle(say("requests are served as they come; leave it out", "请求按到达顺序处理；请去掉"), (0,)),
    "prompt": Idle(say("call it input", "请写成 input")),
    "truncate_prompt_tokens": Idle(say("no input is cut here; cut it into passages", "此处不截断输入；请切成段落")),
}
# What the client finds in our answers, or in OpenAI's, and sends back with the dialogue.
ASSISTANT: Mapping[str, Idle] = {
    "annotations": Idle(say("write citations into the content", "请把引用写进 content"), ([],)),
    "audio": Idle(_TEXT_ONLY),
    "function_call": Idle(say("use tool_calls, which replaced it", "请用取代它的 tool_calls")),
    "multimodal_content": Idle(say("write it into the content", "请写进 content"), ([],)),
}
_SEEN = say(
    "pictures are seen as large as the model takes them; make them smaller yourself",
    "图片按模型接受的大小读取；请自行缩小",
)
_FRAMES = say(
    "the model's own sampling of frames is used; cut the video yourself", "使用模型自己的抽帧方式；请自行剪辑视频"
)
IMAGE_URL: Mapping[str, Idle] = {name: Idle(_SEEN) for name in ("min_pixels", "max_pixels", "resized_height", "width")}
VIDEO_URL: Mapping[str, Idle] = {
    **{name: Idle(_FRAMES) for name in ("fps", "min_frames", "max_frames", "target_frames", "frames_sample")},
    "detail": Idle(_FRAMES, ("auto", "low", "high")),
}
TOOL: Mapping[str, Idle] = {
    "custom": Idle(say("functions are the one kind of tool; describe it as one", "工具只有函数一种；请以函数描述"))
}
STRUCTURED: Mapping[str, Idle] = {
    "grammar": Idle(say("use json, regex or choice", "请用 json、regex 或 choice")),
    "structural_tag": Idle(say("use tools and tool_choice", "请用 tools 与 tool_choice")),
    "disable_fallback": Idle(
        say("there is one way to follow rules; leave it out", "遵循规则只有一种方式；请去掉"), (True, False)
    ),
    "disable_any_whitespace": Idle(
        say("JSON is written with one space after , and :", "JSON 在 , 与 : 之后写一个空格"), (True, False)
    ),
    "disable_additional_properties": Idle(
        say("write additionalProperties into the schema", "请在 schema 中写 additionalProperties"), (False,)
    ),
    "whitespace_pattern": Idle(say("JSON is written with one space after , and :", "JSON 在 , 与 : 之后写一个空格")),
}
STREAM_OPTIONS: Mapping[str, Idle] = {
    "include_obfuscation": Idle(say("nothing is padded here; leave it out", "此处不填充；请去掉"), (False,))
}

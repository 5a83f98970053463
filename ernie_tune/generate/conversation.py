"""`model.chat` and `model.generate`, as users of transformers expect them, on top of the engine
that serves and evaluates.

The package puts both on every model (`ernie_tune/__init__.py`), since models stand below what
answers with them. Refuses to know: HTTP, terminals, training, files of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_tune.config.language import say
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import IMAGE_TAG, VIDEO_TAG, count_tags
from ernie_tune.data.tensors import MASK, rows_of
from ernie_tune.generate.batch import generate as continuations
from ernie_tune.generate.engine import Engine, Request
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import is_fresh, preset

# transformers' names of what SamplingParams calls otherwise.
_RENAMED = {"num_return_sequences": "n", "max_tokens": "max_new_tokens"}
_DEFAULT_TEMPERATURE = 1.0  # of samples where nobody says, as transformers has it


def chat(
    model: ErnieModel,
    messages: str | Sequence[Mapping[str, Any]],
    images: Sequence[Any] | Any = (),
    videos: Sequence[Any] | Any = (),
    *,
    processor: Processor | None = None,
    stream: bool = False,
    thinking: bool | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
    **sampling: Any,
) -> Any:
    """The model's answer to a conversation: its text; a list of n texts with n above 1; with
    `stream` an iterator of pieces of the text.

    `messages`: a question, or messages with role and content (text, or a list of parts). `images`,
    `videos`: one or several media (paths, URLs of data, bytes, PIL pictures) for the tags `<image>`
    and `<video>` in the messages; without tags they stand before the last question. `processor`: by
    default that of the folder that the model came from. `sampling`: max_new_tokens (256),
    temperature (0: greedy), top_p, top_k, n, seed, stop_strings and the rest of `SamplingParams`,
    and transformers' do_sample and num_return_sequences. Thoughts are left out of the answer.

    Raises ValueError for malformed messages, media that cannot be read, and unknown names.
    """
    engine = Engine(model, processor or processor_of(model))
    given = _messages(messages)
    pictures, clips = _several(images), _several(videos)
    _add_tags(given, {IMAGE_TAG: len(pictures), VIDEO_TAG: len(clips)})
    params = engine.params(**_sampling({"max_new_tokens": 256, **sampling}))
    request = Request(given, pictures, clips, thinking, tools=tools)
    if stream:
        return (delta.content for delta in engine.stream(request, params) if delta.content)
    answers = [answer.content.strip() for answer in engine.answer([request], params)[0]]
    return answers if params.n > 1 else answers[0]


def generate(model: ErnieModel, input_ids: Any = None, **given: Any) -> Any:
    """Continuations of rows of token ids, prompts included: paddle int64 [B * n, L + new], rows
    that end earlier filled with the end's id.

    `input_ids` [B, L] and what else `processor.apply_chat_template(…, return_dict=True)` gives
    (attention_mask with 0 where a row is filled up on its left, pixel_values, image_grid_thw); as
    keywords also max_new_tokens (128), do_sample, temperature, top_p, top_k, repetition_penalty,
    num_return_sequences, seed, eos_token_id, processor. Raises ValueError for other names.
    """
    ids = given.pop("inputs", None) if input_ids is None else input_ids
    if ids is None:
        raise ValueError(
            say(
                "input_ids (None) must be given: int64 [rows, tokens], as processor.apply_chat_template makes them",
                "须给出 input_ids（现为 None）：int64 [行, token]，可由 processor.apply_chat_template 生成",
            )
        )
    tensors = {name: given.pop(name, None) for name in (MASK, "pixel_values", "image_grid_thw")}
    processor, ends = given.pop("processor", None), given.pop("eos_token_id", None)
    known = processor or processor_of(model)
    params = _sampling({"max_new_tokens": 128, **given})
    stop_ids = known.stop_ids if ends is None else _ends(ends, model.config.vocab_size)
    banned = known.tokens.placeholders() + known.tokens.markers()
    prompts_BL = _ids(ids, model.config.vocab_size)
    rows = rows_of(prompts_BL, tokens=known.tokens, **_arrays(tensors))
    found = continuations(
        model, rows, known.tokens, SamplingParams(stop_ids=stop_ids, banned_ids=banned, **params), known.decode
    )
    new = max(len(one.token_ids) for some in found for one in some)
    out = [
        [*prompts_BL[b], *one.token_ids, *[stop_ids[0]] * (new - len(one.token_ids))]
        for b, some in enumerate(found)
        for one in some
    ]
    return paddle.to_tensor(np.asarray(out, np.int64))


def _messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as dicts of their own. Raises ValueError for what is none."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    listed = list(messages) if isinstance(messages, Sequence) and not isinstance(messages, bytes) else None
    wrong = next((m for m in listed or () if not _is_message(m)), None)
    if not listed or wrong is not None:
        shown = repr(messages if wrong is None else wrong)[:80]
        raise ValueError(
            say(
                f"messages ({shown}) must be a question, or messages with role and content, one at least; pass "
                'model.chat("What is this?", images=["a.png"]) or model.chat([{"role": "user", "content": "..."}])',
                f"messages（{shown}）须为一个问题，或至少一条含 role 与 content 的消息；请传入 "
                'model.chat("这是什么？", images=["a.png"]) 或 model.chat([{"role": "user", "content": "..."}])',
            )
        )
    return [dict(m) for m in listed]


def _is_message(given: Any) -> bool:
    return isinstance(given, Mapping) and "role" in given and ("content" in given or "tool_calls" in given)


def _ids(given: Any, vocabulary: int) -> np.ndarray:
    """int64 [B, L]. Raises ValueError for what is no rows of token ids."""
    try:
        ids = np.asarray(given)
    except ValueError:  # rows of different lengths
        ids = np.zeros(0, object)
    whole = ids.dtype.kind in "iu" and ids.ndim in (1, 2) and ids.size > 0
    if not whole or ids.min() < 0 or ids.max() >= vocabulary:
        shown = f"{given!r:.60}" if not hasattr(given, "shape") else f"{ids.dtype} {list(ids.shape)}"
        raise ValueError(
            say(
                f"input_ids ({shown}) must be int64 [rows, tokens] of ids from 0 to {vocabulary - 1}, rows of one length; take them "
                "from processor.apply_chat_template(messages), or ask in words: model.chat(messages)",
                f"input_ids（{shown}）须为 int64 [行, token]，编号从 0 到 {vocabulary - 1}，各行等长；可由 "
                "processor.apply_chat_template(messages) 生成，或用文字提问：model.chat(messages)",
            )
        )
    return np.atleast_2d(ids.astype(np.int64))


def _ends(given: Any, vocabulary: int) -> tuple[int, ...]:
    """Ids that end an answer. Raises ValueError for what is none."""
    ids = np.atleast_1d(np.asarray(given))
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or not ids.size or ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            say(
                f"eos_token_id ({given!r:.60}) must be an id from 0 to {vocabulary - 1}, or several; leave it out for the model's own",
                f"eos_token_id（{given!r:.60}）须为 0 到 {vocabulary - 1} 的编号，或多个；不给出时用模型自己的",
            )
        )
    return tuple(ids.tolist())


def _arrays(given: Mapping[str, Any]) -> dict[str, np.ndarray | None]:
    """Mask, patches and grids as arrays. Raises ValueError for what is none."""
    wanted = {MASK: 2, "pixel_values": 2, "image_grid_thw": 2}
    out: dict[str, np.ndarray | None] = {}
    for name, value in given.items():
        found = None if value is None else np.asarray(value)
        if found is not None and name == MASK:
            found = np.atleast_2d(found)
        if found is not None and (found.dtype.kind not in "iufb" or found.ndim != wanted[name]):
            raise ValueError(
                say(
                    f"{name} ({value!r:.60}) must be the array that processor.apply_chat_template made; pass it as it came",
                    f"{name}（{value!r:.60}）须为 processor.apply_chat_template 生成的数组；请原样传入",
                )
            )
        out[name] = found
    return out


def processor_of(model: ErnieModel) -> Processor:
    """The processor of the folder, or of the preset, that a model came from; read once. Raises
    ValueError for a model that came from neither."""
    kept = model.__dict__.get("_processor")
    if kept is None:
        name = model.name_or_path
        if is_fresh(name) and not Path(name).is_dir():
            kept = Processor.bundled("small" if preset(name).vocab_size >= 8192 else "tiny")
        elif name:
            kept = Processor.from_pretrained(name)
        else:
            raise ValueError(
                say(
                    "processor (None) must be given for a model that came from no folder; pass processor=AutoProcessor.from_pretrained(folder)",
                    "模型不是从文件夹加载时须给出 processor；请传入 processor=AutoProcessor.from_pretrained(文件夹)",
                )
            )
        model.__dict__["_processor"] = kept
    return kept


def _several(media: Any) -> list[Any]:
    if media is None:
        return []
    return list(media) if isinstance(media, list | tuple) else [media]


def _add_tags(messages: list[dict[str, Any]], counts: Mapping[str, int]) -> None:
    """Tags for media that no message shows, before the text of the last question."""
    asked = next((m for m in reversed(messages) if m.get("role") == "user"), None)
    if asked is None or not isinstance(asked.get("content"), str):
        return  # parts say themselves where their media are
    texts = [m["content"] for m in messages if isinstance(m.get("content"), str)]
    tags = "".join(tag * count for tag, count in counts.items() if not sum(count_tags(text, tag) for text in texts))
    asked["content"] = tags + asked["content"]


def _sampling(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords of `SamplingParams` from its own names and transformers'. Raises ValueError for
    others."""
    named = {_RENAMED.get(name, name): value for name, value in given.items() if name != "do_sample"}
    samples = given.get("do_sample")
    unknown = sorted(set(named) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        raise ValueError(
            say(
                f"{unknown[0]} is no setting of sampling; take one of {', '.join(SamplingParams.__dataclass_fields__)}, do_sample",
                f"{unknown[0]} 不是采样参数；可用：{', '.join(SamplingParams.__dataclass_fields__)}、do_sample",
            )
        )
    if samples is False:
        named["temperature"] = 0.0
    elif samples or named.get("n", 1) != 1:
        named.setdefault("temperature", _DEFAULT_TEMPERATURE)
    return named

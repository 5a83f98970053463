"""Which chat template a folder gets: the one it has, with the placeholders that its readers search
for; ours where it has none.

FastDeploy, PaddleFormers, vLLM and the code beside the released weights render the template, search
the text for `<|image@placeholder|>` and `<|video@placeholder|>`, and put the tokens of a picture
there. Where they find none they drop the picture without an error. transformers 5 searches for the
placeholders of the vocabulary instead. A template that its readers understand is kept byte for
byte, whoever wrote it.

Refuses to know: tokens, messages, how a template is rendered.
Source: FastDeploy e53f518 (mm_model_config.py, process.py), PaddleFormers 1.2.0 (processor.py),
vLLM 00b9d65 (ernie45_vl.py); the templates of the released models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ernie_tune.config.language import join, say
from ernie_tune.data.tokenizer import CONFIG_FILE, IMAGE, TEMPLATE_FILE, TEMPLATE_JSON_FILE, VIDEO, read_json

# in tokenizer_config.json: the variant of a template that is ours
TEMPLATE_KEY = "ernie_tune_template"
_ENTRY = "chat_template"


class Placeholders(NamedTuple):
    """What stands for one picture and for one clip in a rendered prompt."""

    image: str
    video: str


RELEASED = Placeholders("<|image@placeholder|>", "<|video@placeholder|>")
TRANSFORMERS = Placeholders(IMAGE, VIDEO)


def with_template(
    files: Mapping[str, bytes], where: str, wanted: Placeholders, ours: str, variant: str, vision: bool
) -> tuple[dict[str, bytes], list[str]]:
    """(a folder's tokenizer files with templates that hold `wanted`, what was changed: one line
    each).

    `ours`: our template of `variant`, with `wanted`. It takes the place of templates of another
    variant than the folder's, and of those without a placeholder for a medium where the model sees
    (`vision`). `where`: the folder, for messages. Raises ValueError for a file that is not JSON.
    """
    config = read_json(files, CONFIG_FILE, where)
    other = config.get(TEMPLATE_KEY, "hf") != variant
    found = _read(files, config, where)
    if not found:
        return {**files, CONFIG_FILE: _dump({**config, _ENTRY: ours, TEMPLATE_KEY: variant})}, []
    out, changes, is_ours = dict(files), list[str](), False
    for name, held in found.items():
        texts = [_replaced(text, ours, variant) if other else _mended(text, wanted, ours, vision) for text in held]
        changes += [
            say(
                "chat template in {file} of {folder}: {how}",
                "{folder} 的 {file} 中的对话模板：{how}",
                file=name,
                folder=where,
                how=how,
            )
            for _, how in texts
            if how
        ]
        is_ours |= any(text == ours for text, _ in texts)
        if [text for text, _ in texts] != held:
            out[name] = _write(name, out, where, [text for text, _ in texts])
    if other or (is_ours and TEMPLATE_KEY not in config):
        out[CONFIG_FILE] = _dump({**read_json(out, CONFIG_FILE, where), TEMPLATE_KEY: variant})
    return out, changes


def _mended(text: str, wanted: Placeholders, ours: str, vision: bool) -> tuple[str, str]:
    """A template with the wanted placeholders, and what was done to it ("": nothing)."""
    done = []
    for found, right in zip(TRANSFORMERS if wanted == RELEASED else RELEASED, wanted, strict=True):
        if right not in text and found in text:
            text = text.replace(found, right)
            done.append(say(f"{found} became {right}", f"{found} 改为 {right}"))
    lost = [right for right in wanted if right not in text]
    if lost and vision:
        return ours, say(
            f"it has no {lost[0]}, so that pictures or clips would be lost; replaced by ours",
            f"其中没有 {lost[0]}，图片或视频会丢失；已换成我们的模板",
        )
    return text, join(" and ", done) if done else ""


def _replaced(text: str, ours: str, variant: str) -> tuple[str, str]:
    if text == ours:
        return ours, ""
    return ours, say(
        f"replaced by that of variant {variant!r}, with which the model was trained",
        f"换成训练所用的变体 {variant!r} 的模板",
    )


def _read(files: Mapping[str, bytes], config: Mapping[str, Any], where: str) -> dict[str, list[str]]:
    """Templates by file. tokenizer_config.json may hold several by name."""
    found: dict[str, Any] = {CONFIG_FILE: config.get(_ENTRY)}
    if TEMPLATE_FILE in files:
        found[TEMPLATE_FILE] = files[TEMPLATE_FILE].decode("utf-8")
    found[TEMPLATE_JSON_FILE] = read_json(files, TEMPLATE_JSON_FILE, where).get(_ENTRY)
    lists = {
        name: [entry["template"] for entry in held] if isinstance(held, list) else [held]
        for name, held in found.items()
        if held
    }
    return lists


def _write(name: str, files: Mapping[str, bytes], where: str, texts: list[str]) -> bytes:
    if name == TEMPLATE_FILE:
        return texts[0].encode()
    content = read_json(files, name, where)
    held = content[_ENTRY]
    named = (
        [{**entry, "template": text} for entry, text in zip(held, texts, strict=True)]
        if isinstance(held, list)
        else texts[0]
    )
    return _dump({**content, _ENTRY: named})


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

"""From the text of a value to the type of its setting, and back. The setting's type decides, not
the look of the text: `3e-4` is a number where a number is wanted, and `off` a word where a word is
wanted.

Refuses to know: where a text stands, other names of a setting, how settings fit together.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from ernie_tune.config.aliases import VALUES
from ernie_tune.config.arguments import Setting
from ernie_tune.config.language import Text, say
from ernie_tune.config.stages import STAGES

# What a file or a command line can hold: a text, a list of texts, or nothing (null).
Raw = str | tuple[str, ...] | None

TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_PLAIN = re.compile(r"[\w./][\w./-]*")


def did_you_mean(word: str, known: Iterable[str], typo: float = 0.8) -> str:
    """`; did you mean 'x'?` where `word` is a known word mistyped: nearly the same letters, part by
    part. Nothing for one that merely resembles it:
    max_samples is not eval_max_samples. `typo`: least likeness of the whole, from 0 to 1.
    """
    rated = [(_likeness(word.lower(), name.lower()), name) for name in known]
    best, name = max(rated, default=(0.0, ""))
    return say(f"; did you mean {name!r}?", f"；是否想写 {name!r}？") if best >= typo else ""


def _likeness(a: str, b: str) -> float:
    """Of two names, 0 unless each part of one (between underscores) has its partner in the
    other.
    """
    parts, others = re.split(r"[_-]", a), re.split(r"[_-]", b)
    whole = _ratio("".join(parts), "".join(others))
    if len(parts) != len(others):  # an underscore too many or too few, or a short word left out
        return whole if whole >= 0.88 else 0.0
    return min(whole, 1.0) if all(_ratio(x, y) >= 0.6 for x, y in zip(parts, others, strict=True)) else 0.0


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def to_raw(name: str, value: Any) -> Raw:
    """The text of a Python value, so that keyword arguments take the same road as files."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, PurePath)):
        return str(value)
    if isinstance(value, (list, tuple)):
        return tuple(str(to_raw(name, item)) for item in value)
    raise ValueError(
        say(
            f"{name} ({type(value).__name__}) must be a number, a word, a path or a list of them",
            f"{name}（{type(value).__name__}）须为数字、单词、路径或它们的列表",
        )
    )


def convert(setting: Setting, raw: str | tuple[str, ...]) -> Any:
    """The value of `setting` that `raw` spells. Raises ValueError (no place in it) for wrong type,
    word or range.
    """
    if setting.many:
        items = raw if isinstance(raw, tuple) else _split(setting, raw)
        # a word that stands for nothing ("none" in report_to) leaves the list
        return tuple(_one(setting, text) for item in items if (text := _translated(setting, item)) or not item)
    if isinstance(raw, tuple):
        raise ValueError(
            say(
                f"{setting.name} ({list(raw)}) must be one value, not a list",
                f"{setting.name}（{list(raw)}）须为单个值，不能是列表",
            )
        )
    return _one(setting, _translated(setting, raw))


def _translated(setting: Setting, text: str) -> str:
    return VALUES.get(setting.name, {}).get(text.strip().lower(), text)


def _split(setting: Setting, text: str) -> Sequence[str]:
    """The items of a text: a list as YAML writes it, or words between commas (and blanks, where the
    words are a closed set).
    """
    listed = _yaml_list(text.strip()) if text.strip().startswith("[") and text.strip().endswith("]") else None
    if listed is not None:
        return listed
    parts = re.split(r"[,\s]+" if setting.choices else ",", text)
    return [part.strip() for part in parts if part.strip()]


def _yaml_list(text: str) -> Sequence[str] | None:
    """The texts of "[a, b]", as a command line gives it; None where it is no flat list."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    if not isinstance(node, yaml.SequenceNode) or not all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return None
    return [str(item.value) for item in node.value]


def _one(setting: Setting, text: str) -> Any:
    if setting.kind is bool:
        return _bool(setting, text)
    if setting.kind is str:
        return _word(setting, text) if setting.choices else text
    return _number(setting, text)


def _bool(setting: Setting, text: str) -> bool:
    word = text.strip().lower()
    if word not in TRUE + FALSE:
        raise ValueError(
            say(f"{setting.name} ({text!r}) must be true or false", f"{setting.name}（{text!r}）须为 true 或 false")
        )
    return word in TRUE


def _word(setting: Setting, text: str) -> str:
    word = " ".join(text.lower().split())
    negation = "!" if word.startswith("!") and setting.name == "freeze_config" else ""
    known = {choice.lower(): choice for choice in setting.choices}
    if word.removeprefix(negation) not in known:
        loss = _loss_of_stage(word) if setting.name == "stage" else None
        raise ValueError(
            say(
                "{name} ({text!r}) must be one of {choices}{hint}",
                "{name}（{text!r}）须为 {choices} 之一{hint}",
                name=setting.name,
                text=text,
                choices=", ".join(setting.choices),
                hint=loss or did_you_mean(word, known, typo=0.6),
            )
        )
    return negation + known[word.removeprefix(negation)]


def _loss_of_stage(word: str) -> Text | None:
    """Where a stage is asked for by the name of a loss, such as ORPO: how to write it here."""
    stage = next((stage.name for stage in STAGES.values() if word in stage.losses), None)
    if stage is None:
        return None
    return say(
        f"; {word} is a loss: write stage: {stage} and loss_type: {word}",
        f"；{word} 是损失函数：请写 stage: {stage} 与 loss_type: {word}",
    )


def _number(setting: Setting, text: str) -> int | float:
    whole = setting.kind is int
    try:
        value = float(text)
        # int() of the text keeps whole numbers beyond 2**53 exact; "1e3" is whole too
        number: int | float = value if not whole else int(value) if set(text) & set(".eE") else int(text)
        fits = math.isfinite(value) and (not whole or number == value)
    except (ValueError, OverflowError):
        fits = False
    if not fits:
        what = say("a whole number", "整数") if whole else say("a number", "数字")
        raise ValueError(
            say(
                "{name} ({text!r}) must be {what}",
                "{name}（{text!r}）须为{what}",
                name=setting.name,
                text=text,
                what=what,
            )
        )
    low, high = setting.low, setting.high
    if (low is not None and number < low) or (high is not None and number > high):
        least = [] if low is None else [say(f"at least {low:g}", f"不小于 {low:g}")]
        most = [] if high is None else [say(f"at most {high:g}", f"不大于 {high:g}")]
        english, chinese = (
            sep.join(parts)
            for sep, parts in ((" and ", [b.english for b in least + most]), ("且", [b.chinese for b in least + most]))
        )
        raise ValueError(say(f"{setting.name} ({text}) must be {english}", f"{setting.name}（{text}）须{chinese}"))
    return number


def to_yaml(value: Any) -> str:
    """`value` as one line of YAML that `convert`, and every other YAML reader, takes back
    unchanged.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        mantissa, e, exponent = repr(value).partition("e")
        # YAML 1.1 wants the dot
        return mantissa + (".0" if e and "." not in mantissa else "") + e + exponent
    if isinstance(value, tuple):
        return f"[{', '.join(to_yaml(v) for v in value)}]"
    if isinstance(value, str) and not (_PLAIN.fullmatch(value) and yaml.safe_load(value) == value):
        return yaml.safe_dump(value, default_style='"', allow_unicode=True, width=2**31).rstrip("\n")
    return str(value)

"""`LoRAConfig` of PaddleNLP and PaddleFormers, as an object: taken as a `LoraConfig`, and given
back with what was changed.

Known by its fields; no other library is imported. Refuses to know: models, files.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.peft.config import LoraConfig

_SAME = ("r", "lora_alpha", "lora_dropout", "rslora", "lora_plus_scale")
# What would make another adapter than ours: field -> values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "trainable_bias": (None, "none", False),
    "enable_lora_list": (None,),
    "pissa": (False,),
    "loraga": (False,),
    "use_mora": (False,),
    "do_qat": (False,),
    "lora_use_mixer": (False,),
}


def is_lora_config(given: object) -> bool:
    """Whether it is the settings of LoRA of one of the two."""
    has = (*_SAME, "trainable_modules", "trainable_bias")
    return (
        dataclasses.is_dataclass(given)
        and not isinstance(given, LoraConfig | type)
        and all(hasattr(given, n) for n in has)
    )


def take_lora_config(theirs: Any) -> LoraConfig:
    """Ours with the values of theirs. Their patterns of module names (`.*q_proj.*`) are read as in
    `targets.py`. Raises ValueError for what we have not, naming the field.
    """
    for name, nothing in _REFUSED.items():
        value = getattr(theirs, name, nothing[0])
        if value not in nothing:
            raise ValueError(
                say(
                    f"{name} ({value!r}) of their LoRAConfig must be {nothing[0]!r}: there is no such adapter here; "
                    "leave it out",
                    f"其 LoRAConfig 的 {name}（{value!r}）须为 {nothing[0]!r}：本工具没有这种适配器；请去掉",
                )
            )
    given = theirs.target_modules
    targets = [] if given is None else [given] if isinstance(given, str) else list(given)
    kept = theirs.trainable_modules
    saved = [] if kept is None else [kept] if isinstance(kept, str) else list(kept)
    return LoraConfig(
        **{name: getattr(theirs, name) for name in _SAME},
        target_modules=targets,
        modules_to_save=[_module(one) for one in saved],
        freeze_config="",
        base_model_name_or_path=theirs.base_model_name_or_path or "",
    )


def give_back_lora_config(ours: LoraConfig, theirs: Any) -> Any:
    """A copy of theirs in which the fields stand that ours has changed; without a change, equal to
    theirs. Raises ValueError for a change that they have no field for.
    """
    changed, before = {}, take_lora_config(theirs)
    for field in dataclasses.fields(LoraConfig):
        value = getattr(ours, field.name)
        if value == getattr(before, field.name):
            continue
        if field.name not in (*_SAME, "target_modules", "base_model_name_or_path"):
            raise ValueError(
                say(
                    f"{field.name} ({value!r}) must be a field of their LoRAConfig to be given back; leave it as it was",
                    f"{field.name}（{value!r}）须为其 LoRAConfig 的字段才能交还；请保持不变",
                )
            )
        changed[field.name] = list(value) if isinstance(value, tuple) else value
    return dataclasses.replace(theirs, **changed)  # copy.copy would give their defaults


def _module(pattern: str) -> str:
    """`.*lm_head.*`, as they name modules that are trained in full, as the name of one."""
    return re.sub(r"^\.\*|\.\*$|\\|\^|\$", "", pattern).strip(".")

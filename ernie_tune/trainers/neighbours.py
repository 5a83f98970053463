"""What users of PaddleNLP and PaddleFormers hold in memory, taken as it is and given back as
theirs: a model, one with LoRA, `LoRAConfig`, `TrainingArguments`, a tokenizer or processor.

Objects are known by what they have; none of those libraries is imported. Data sets need nothing:
whatever gives rows as dicts is read. Refuses to know: how each is read (the rooms below do).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from ernie_tune.checkpoint.in_memory import give_back_model, is_model, take_model
from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.config.other_arguments import give_back_arguments, is_arguments, take_arguments
from ernie_tune.data.other_tokenizer import is_tokenizer, take_processor
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.other_lora import give_back_lora_config, is_lora_config, take_lora_config
from ernie_tune.peft.their_lora_model import give_back_lora_model, is_lora_model, take_lora_model


def adopt(theirs: Any, **settings: Any) -> Any:
    """Ours for an object of theirs; what is ours already comes back as it is. `settings`: of
    `TrainingArguments`, in place of theirs or beside them (stage, fine_tuning).

    Raises ValueError for an object of another kind, naming what is taken, and for what it holds
    that ours cannot.
    """
    if isinstance(theirs, ErnieModel | LoraConfig | RunConfig) and not settings:
        return theirs
    if is_arguments(theirs):
        return take_arguments(theirs, **settings)
    for known, take in (
        (is_lora_config, take_lora_config),
        (is_lora_model, take_lora_model),
        (is_model, take_model),
        (is_tokenizer, take_processor),
    ):
        if known(theirs) and not settings:
            return take(theirs)
    raise ValueError(
        say(
            f"object ({type(theirs).__name__}) must be a model, LoRAModel, LoRAConfig, TrainingArguments, tokenizer "
            "or processor of PaddleNLP or PaddleFormers; save it and name its folder",
            f"对象（{type(theirs).__name__}）须为 PaddleNLP 或 PaddleFormers 的模型、LoRAModel、LoRAConfig、"
            "TrainingArguments、tokenizer 或 processor；请保存后给出其文件夹",
        )
    )


def give_back(ours: Any, theirs: Any, **settings: Any) -> Any:
    """Theirs with the values of ours. Models are written in place and returned; of settings a copy
    is returned, equal to theirs where nothing was changed. `settings`: those that `adopt` was
    given.

    Raises ValueError where ours holds what theirs has no place for.
    """
    if is_arguments(theirs):
        return give_back_arguments(ours, theirs, **settings)
    if is_lora_config(theirs):
        return give_back_lora_config(ours, theirs)
    if is_lora_model(theirs):
        return give_back_lora_model(ours, theirs)
    if is_model(theirs):
        return give_back_model(ours, theirs)
    if is_tokenizer(theirs):
        return copy.copy(theirs)  # nothing of it was changed
    return adopt(theirs)  # says what is taken


def adopt_model(given: Any) -> ErnieModel | None:
    """A model of ours for whatever model was handed to a trainer."""
    found: ErnieModel | None = given if given is None or isinstance(given, ErnieModel) else adopt(given)
    return found


def settings_for(args: Any, stages: Sequence[str]) -> RunConfig:
    """The settings of a trainer of these stages: ours as they are, theirs adopted for the first of
    them.
    """
    if args is None:
        return RunConfig()
    if is_arguments(args):
        return take_arguments(args, stage=stages[0])
    given: RunConfig = args
    return given

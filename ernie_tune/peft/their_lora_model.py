"""PaddleNLP's and PaddleFormers' `LoRAModel` in memory: base and adapter taken as a `PeftModel`,
and their values given back.

Refuses to know: other libraries' classes, files.
"""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import paddle

from ernie_tune.checkpoint.in_memory import is_model, take_model
from ernie_tune.config.language import say
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft import build, dialects
from ernie_tune.peft.files import Stored, lora_of_tensors
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.other_lora import is_lora_config, take_lora_config

_FACTORS = (".lora_A", ".lora_B")


def is_lora_model(given: object) -> bool:
    """Whether it is a model of theirs inside their LoRA."""
    return (
        isinstance(given, paddle.nn.Layer)
        and not isinstance(given, ErnieModel)
        and is_lora_config(getattr(given, "lora_config", None))
        and is_model(getattr(given, "model", None))
    )


def take_lora_model(theirs: Any) -> PeftModel:
    """Base and adapter, both with their values. Raises ValueError as `take_model` and
    `take_lora_config`, and for layers of LoRA that ours has not.
    """
    inner = theirs.model
    base = take_model(_Without(inner))
    config = take_lora_config(theirs.lora_config)
    found = {name: value.astype("float32").numpy() for name, value in _factors(inner).items()}
    if not found:
        raise ValueError(
            say(
                "their LoRAModel must hold lora_A and lora_B; hand over its model where they were merged",
                "其 LoRAModel 中须有 lora_A 与 lora_B；若已合并，请交来其 model",
            )
        )
    tensors = dialects.from_paddle(found, base.config)
    stored: Stored = lora_of_tensors(config, tensors, base.config)
    model = PeftModel(base)
    model.take(stored, "their LoRAModel")
    return model


def give_back_lora_model(ours: PeftModel, theirs: Any) -> Any:
    """Their LoRAModel with the factors of ours; its base, which is frozen, stays as it is. Raises
    ValueError where ours holds other factors than theirs.
    """
    if not isinstance(ours, PeftModel) or ours.active is None:
        raise ValueError(
            say(
                "model must be a PeftModel with an active adapter to be given back to a LoRAModel; adopt theirs first",
                "交还给 LoRAModel 的须为启用了适配器的 PeftModel；请先 adopt 对方的模型",
            )
        )
    adapter = ours.adapters[ours.active]
    values = dialects.to_paddle(
        {name: np.asarray(value) for name, value in build.export(adapter.config, adapter.places).items()}, ours.config
    )
    places = _factors(theirs.model)
    if set(places) != set(values):
        other = sorted(set(places) ^ set(values))
        raise ValueError(
            say(
                f"their LoRAModel must have the factors of ours, but {other[0]} is in one alone; give back to the one "
                "that was handed over",
                f"其 LoRAModel 的因子须与本模型相同，但 {other[0]} 只在一方；请交还给原来的对象",
            )
        )
    for name, tensor in places.items():
        tensor.set_value(paddle.to_tensor(values[name]).astype(tensor.dtype))
    return theirs


def _factors(inner: Any) -> dict[str, Any]:
    return {name: value for name, value in inner.state_dict().items() if name.endswith(_FACTORS)}


class _Without(types.SimpleNamespace):
    """Their base model as it was before LoRA came: what `take_model` asks of one."""

    def __init__(self, inner: Any) -> None:
        super().__init__(config=inner.config, name_or_path=getattr(inner, "name_or_path", ""))
        self._inner = inner

    def state_dict(self) -> dict[str, Any]:
        return {name: value for name, value in self._inner.state_dict().items() if not name.endswith(_FACTORS)}

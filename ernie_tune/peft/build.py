"""From a method's settings to its layers on a model, and between those layers and arrays: what each
method adds, in one place.

Refuses to know: files, which adapter is active.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ernie_tune.config.language import say
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.layers import has_values
from ernie_tune.models.specs import MODALITIES
from ernie_tune.peft.bottleneck import Bottleneck
from ernie_tune.peft.config import BottleneckConfig, LoraConfig, PeftConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.dialects import shape_of
from ernie_tune.peft.lora import ExpertLora, LinearLora
from ernie_tune.peft.quantize import QuantizedEmbedding, QuantizedLinear
from ernie_tune.peft.slots import NAME
from ernie_tune.peft.targets import expert_targets, linear_targets
from ernie_tune.peft.virtual_tokens import Prefix, PromptEmbedding, note_sequence

Places = dict[str, nn.Layer]  # name of a module -> the adapter to attach to it


def places(model: ErnieModel, config: PeftConfig) -> Places:
    """Fresh adapter layers by the module they go on. Raises ValueError for targets that do not
    exist.
    """
    if isinstance(config, LoraConfig):
        return _lora(model, config)
    layers, width = range(model.config.num_hidden_layers), model.config.hidden_size
    if isinstance(config, BottleneckConfig):
        owners = [
            f"layers.{i}.{'self_attn' if part == 'attention' else 'mlp'}" for i in layers for part in config.after
        ]
        return {name: Bottleneck(width, config.width, model.compute_dtype, name, config.seed) for name in owners}
    if isinstance(config, PromptConfig):
        table = model.embed_tokens
        known = not isinstance(table, QuantizedEmbedding) or table.known
        return {"embed_tokens": PromptEmbedding(table.weight if known else table, config)}
    heads, dtype = (model.config.num_key_value_heads, model.config.head_dim), model.compute_dtype
    owners = [f"layers.{i}.self_attn.{kind}_proj" for i in layers for kind in "kv"]
    return {name: Prefix(*heads, dtype, name, config) for name in owners}


def _lora(model: ErnieModel, config: LoraConfig) -> Places:
    linears = {
        name: layer
        for name, layer in model.named_sublayers()
        if isinstance(layer, nn.Linear | QuantizedLinear) and f".{NAME}." not in name
    }
    out: Places = {name: LinearLora(linears[name], name, config) for name in linear_targets(config, list(linears))}
    for (layer, modality), experts in expert_targets(config, model.config).items():
        owner = f"layers.{layer}.mlp.{MODALITIES[modality]}_experts"
        for product in (f"{owner}.up_gate_product", f"{owner}.down_product"):
            out[product] = ExpertLora(shape_of(product, model.config), model.compute_dtype, experts, product, config)
    if not out and not config.modules_to_save:
        raise ValueError(
            say(
                f"freeze_config ({config.freeze_config}) must leave a part for the adapters; free one, or "
                "name target_modules",
                f"freeze_config（{config.freeze_config}）须给适配器留下一部分；请放开一部分，或设置 target_modules",
            )
        )
    return out


def connect(model: ErnieModel, config: PeftConfig) -> list[Any]:
    """Hooks that a method needs besides its layers, to be removed with it: prefixes must know the
    sequence that their rows belong to.
    """
    if not isinstance(config, PrefixConfig):
        return []
    return [layer.self_attn.register_forward_pre_hook(note_sequence) for layer in model.layers]


def copy_of(owner: nn.Layer, value: Tensor) -> Tensor:
    """A trainable copy of one parameter."""
    zero = nn.initializer.Constant(0.0)
    made = owner.create_parameter(value.shape, dtype=value.dtype, default_initializer=zero)
    if has_values(value):
        made.set_value(value.detach())
    return made


def assign(target: Tensor, values: np.ndarray, name: str) -> None:
    """Set one tensor. ValueError where the shapes differ."""
    if tuple(target.shape) != values.shape:
        raise ValueError(
            say(
                f"tensor {name!r} {list(values.shape)} must be {target.shape}; load the adapter on its own base model",
                f"张量 {name!r} {list(values.shape)} 须为 {target.shape}；请在适配器自己的底座上加载",
            )
        )
    target.set_value(paddle.to_tensor(values).astype(target.dtype))


def exported_config(config: PeftConfig, base: str) -> PeftConfig:
    """The settings that describe what `export` gives: a P-tuned prompt is the plain prompt that it
    makes; LoRA names its base model.
    """
    if isinstance(config, LoraConfig):
        return dataclasses.replace(config, base_model_name_or_path=config.base_model_name_or_path or base)
    return PromptConfig(config.num_virtual_tokens) if isinstance(config, PromptConfig) else config


def export(config: PeftConfig, layers: Places) -> dict[str, np.ndarray]:
    """The float32 arrays of an adapter under the names of `dialects.py`; "prompt" [k, D]; "prefix"
    [layers, 2, K, k, H].
    """
    if isinstance(config, PromptConfig):
        with paddle.no_grad():
            return {"prompt": _array(layers["embed_tokens"].tokens())}
    if isinstance(config, PrefixConfig):
        stack = np.stack([_array(layer.prefix) for layer in layers.values()])
        return {"prefix": stack.reshape(-1, 2, *stack.shape[1:])}
    return {key: _array(value) if row is None else _array(value[row].clone()) for key, value, row in entries(layers)}


def entries(layers: Places) -> Iterator[tuple[str, Tensor, int | None]]:
    """(name in `dialects.py`, parameter, its row where the name stands for one expert) of layers
    whose parameters are stored as they are.
    """
    for module, layer in layers.items():
        for leaf, value in layer.named_parameters():
            if isinstance(layer, ExpertLora):
                yield from ((f"{module}.{e}.{leaf}", value, j) for j, e in enumerate(layer.experts))
            else:
                yield f"{module}.{leaf}", value, None


def fill(config: PeftConfig, layers: Places, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `export`: set the layers' parameters; returns the tensors that belong to none of
    them. ValueError for a missing or misshapen one.
    """
    rest, wanted = dict(tensors), export(config, layers)
    missing = [name for name in wanted if name not in rest]
    if missing:
        raise ValueError(
            say(
                f"adapter must hold {missing[0]!r} ({len(missing)} missing); fetch it again",
                f"适配器中须有 {missing[0]!r}（缺少 {len(missing)} 个）；请重新获取",
            )
        )
    mine = {name: rest.pop(name) for name in wanted}
    for name, value in mine.items():
        if value.shape != wanted[name].shape:
            raise ValueError(
                say(
                    f"tensor {name!r} {list(value.shape)} must be {list(wanted[name].shape)}; load the "
                    "adapter on its own base model",
                    f"张量 {name!r} {list(value.shape)} 须为 {list(wanted[name].shape)}；请在适配器自己的底座上加载",
                )
            )
    if isinstance(config, PromptConfig):
        assign(layers["embed_tokens"].prompt, mine["prompt"], "prompt")
        return rest
    if isinstance(config, PrefixConfig):
        flat = mine["prefix"].reshape(-1, *mine["prefix"].shape[2:])
        for layer, value in zip(layers.values(), flat, strict=True):
            assign(layer.prefix, value, "prefix")
        return rest
    for module, layer in layers.items():
        for leaf, target in layer.named_parameters():
            if isinstance(layer, ExpertLora):
                assign(target, np.stack([mine[f"{module}.{e}.{leaf}"] for e in layer.experts]), module)
            else:
                assign(target, mine[f"{module}.{leaf}"], module)
    return rest


def _array(value: Tensor) -> np.ndarray:
    return value.astype("float32").numpy()

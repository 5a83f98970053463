"""Models that another Paddle library holds in memory: taken into one of ours, and values given back
into theirs.

An object is known by what it has (a config that can be told as a dict, and named parameters), so
that no other library is imported. Weights keep their values to the last bit where the two models
have one element type, and where ours has the wider one.
Refuses to know: adapters, files, distribution, other libraries' classes.

Source: PaddleFormers 1.2.0 (`Ernie4_5_VLMoeForConditionalGeneration`, `Ernie4_5ForCausalLM`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.checkpoint.auto import AutoModel, compute_dtype
from ernie_tune.checkpoint.names import NameTable, check_names, detect_flavour, layout
from ernie_tune.checkpoint.source import OnDisk, Typed, fill
from ernie_tune.checkpoint.tensors import cast
from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.config_dialects import read_config
from ernie_tune.models.ernie import ErnieModel

Array = np.ndarray[Any, Any]
_CODES = {paddle.float64: "F64", paddle.float32: "F32", paddle.bfloat16: "BF16", paddle.float16: "F16"}
_FUSED = ".self_attn.qkv_proj.weight"
_HEAD = "lm_head.weight"


def is_model(given: object) -> bool:
    """Whether it is a model that is none of ours: parameters by name, and a config to be told."""
    told = getattr(getattr(given, "config", None), "to_dict", None)
    return callable(told) and isinstance(given, paddle.nn.Layer) and not isinstance(given, ErnieModel)


def take_model(theirs: Any, dtype: str | None = None) -> AutoModel:
    """A model of ours with the values of theirs. `dtype`: as in `AutoModel.from_pretrained`. Raises
    ValueError where config and parameters are not those of an ERNIE-4.5 model, or one process holds
    a part of them.
    """
    held = _Held(theirs)
    table = held.table
    unused = check_names(table, held.shapes)
    if table.head_copy in held.entries and not held.tied():
        raise ValueError(
            say(
                f"{_HEAD} must equal the embedding, because tie_word_embeddings is true; set it to false in their config",
                f"tie_word_embeddings 为 true，{_HEAD} 须与嵌入相同；请在其 config 中设为 false",
            )
        )
    model = AutoModel(held.config, compute_dtype(dtype or _dtype_of(held)))
    model.name_or_path = str(getattr(theirs, "name_or_path", "") or "")
    fill(model, OnDisk(table, held))
    if unused:
        told = say(
            f"ernie_tune: not used of their model: {len(unused)} ({unused[0]}, ...)",
            f"ernie_tune：其模型中未用到的：{len(unused)} 个（{unused[0]} 等）",
        )
        print(told, flush=True)
    return model


def give_back_model(ours: ErnieModel, theirs: Any) -> Any:
    """Their model with the values of ours, parameter by parameter; it is returned. Raises
    ValueError where the two have other shapes, or ours holds adapters (merge them before).
    """
    held = _Held(theirs)
    if held.config.replace(dtype="float32") != ours.config.replace(dtype="float32"):
        raise ValueError(
            say(
                "their model must have the shape of ours; give back to the model that was handed over",
                "其模型的结构须与本模型相同；请交还给原来的模型",
            )
        )
    state = ours.state_dict()
    extra = sorted(set(state) - set(held.table.canonical))
    if extra:
        raise ValueError(
            say(
                f"model ({extra[0]} and {len(extra) - 1} more) must hold no adapter to be given back; "
                "give back model.merge()[0]",
                f"交还的模型不能带适配器（{extra[0]} 等 {len(extra)} 个）；请交还 model.merge()[0]",
            )
        )

    def read(name: str, expert: int | None) -> Array:
        tensor = state[name] if expert is None else state[name][expert].clone()
        return cast(tensor.numpy(), _CODES[tensor.dtype], "F32" if tensor.dtype != paddle.float64 else "F64")

    for name in held.table.disk:
        held.write(name, held.table.to_disk(name, read))
    if held.table.head_copy in held.entries:
        held.write(_HEAD, state["embed_tokens.weight"].astype("float32").numpy())
    return theirs


class _Entry:
    """What `OnDisk` asks of a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = _CODES[tensor.dtype]


class _Held:
    """Their parameters under the names of one of our layouts, as a reader of files has them.

    Text-only models of theirs fuse queries, keys and values by group of heads: [q q … k v] for each
    key/value head; our layout "paddle" has all q, then all k, then all v.
    """

    def __init__(self, theirs: Any) -> None:
        state: Mapping[str, Tensor] = theirs.state_dict()
        self.config = _config_of(theirs)
        self.grouped = any(name.endswith(_FUSED) for name in state)
        rename: Callable[[str], str] = self._as_paddle if self.grouped else lambda name: name
        self.tensors = {rename(name): tensor for name, tensor in state.items()}
        unknown = [name for name, tensor in self.tensors.items() if tensor.dtype not in _CODES]
        if unknown:
            raise ValueError(
                say(
                    f"their parameter {unknown[0]} ({self.tensors[unknown[0]].dtype}) must be a floating type; "
                    "hand over a model that is not quantised",
                    f"其参数 {unknown[0]}（{self.tensors[unknown[0]].dtype}）须为浮点；请交来未量化的模型",
                )
            )
        self.entries: dict[str, Typed] = {name: _Entry(tensor) for name, tensor in self.tensors.items()}
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        self.table: NameTable = layout(
            self.config, "paddle" if self.grouped else detect_flavour(self.shapes, self.config)
        )

    @staticmethod
    def _as_paddle(name: str) -> str:
        return f"ernie.{name.removeprefix('model.')}" if name != _HEAD else name

    def read(self, name: str) -> Array:
        array: Array = self.tensors[name].numpy()
        return array[..., self._order()] if name.endswith(_FUSED) else array

    def write(self, name: str, value: Array) -> None:
        """Set one parameter from a value of ours, float32 or float64."""
        if name.endswith(_FUSED):
            grouped = np.empty_like(value)
            grouped[..., self._order()] = value
            value = grouped
        target = self.tensors[name]
        code = "F64" if value.dtype == np.float64 else "F32"
        target.set_value(np.ascontiguousarray(cast(value, code, _CODES[target.dtype])))

    def tied(self) -> bool:
        """Whether head and embedding hold the same numbers, in either orientation."""
        embedding = self.tensors[self.table.links_to["embed_tokens.weight"][0].disk]
        head = self.tensors[_HEAD]
        both = embedding.astype("float32").numpy(), head.astype("float32").numpy()
        return bool(np.array_equal(both[0], both[1]) or np.array_equal(both[0], both[1].T))

    def _order(self) -> Array:
        """Their columns in the order of ours."""
        c = self.config
        share = c.num_attention_heads // c.num_key_value_heads
        columns = np.arange(c.num_key_value_heads * (share + 2) * c.head_dim)
        by_group = columns.reshape(c.num_key_value_heads, share + 2, c.head_dim)
        return np.concatenate([by_group[:, :share].ravel(), by_group[:, share].ravel(), by_group[:, share + 1].ravel()])


def _config_of(theirs: Any) -> ModelConfig:
    told = dict(theirs.config.to_dict())
    # They tell of every way to quantise, also where none was asked for.
    quantised = told.get("quantization_config") or {}
    if isinstance(quantised, dict) and not any(
        quantised.get(name) for name in ("weight_quantize_algo", "quant_type", "quant_method", "quantization")
    ):
        told.pop("quantization_config", None)
    told = {name: value for name, value in told.items() if value not in (None, "None")}
    parts = [name for name in told if name.endswith("model_parallel_size") and told[name] not in (None, 1, -1)]
    if parts:
        raise ValueError(
            say(
                f"their {parts[0]} ({told[parts[0]]}) must be 1: a part of a model cannot be handed over; gather it, "
                "or save it and name the folder",
                f"其 {parts[0]}（{told[parts[0]]}）须为 1：不能交来模型的一部分；请先汇集，或保存后给出文件夹",
            )
        )
    try:
        return read_config(told)
    except ValueError as error:
        raise ValueError(
            say(
                f"their config must be that of an ERNIE-4.5 model: {error}",
                f"其 config 须为 ERNIE-4.5 模型的配置：{error}",
            )
        ) from error


def _dtype_of(held: _Held) -> str | None:
    """float64 where theirs is; else what this machine computes in."""
    codes = {entry.dtype for entry in held.entries.values()}
    return "float64" if codes == {"F64"} else None

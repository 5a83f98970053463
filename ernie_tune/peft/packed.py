"""Packed folders: a model whose linear layers and experts lie on disk as int8 or int4 codes, ready
to run, without rounding again.

`config.json` is the model's, with `quantization_config = {"quant_method": "ernie_tune_packed",
"version": 1}`, which every other loader refuses.
Tensors have canonical names. A quantised matrix `<name>` is two tensors, `<name>.codes` and
`<name>.scale`, where `<name>` is the module of a linear layer (`layers.0.self_attn.q_proj`) or one
expert (`layers.1.mlp.text_experts.3.up_gate_proj`):
    int8: codes I8 [I, O] in +-127;  int4: codes U8 [I/2, O] as `quantize.pack_halves` packs them;
                                     scale [G, O], one for each of G groups of input rows, as
                                     many in every expert of a stack.
W' = codes * scale, scale in float32 or bfloat16. The table `embed_tokens` may be int8 codes [V, D]
with a scale a row, [V, 1]. All other tensors are the float parameters themselves. Which matrices
are quantised, and to how many bits, follows from the tensors.
Legend: I input width, O output width, G groups, V vocabulary, D width. Refuses to know: how codes
were chosen, inference kernels, tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ernie_tune.checkpoint.tensors import FLOAT_CODES, TensorEntry, TensorReader, all_finite, cast, widen_into
from ernie_tune.config.host_memory import free_addresses, free_memory
from ernie_tune.config.language import say
from ernie_tune.models import mkl
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.config_file import config_in
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.moe import Experts
from ernie_tune.models.specs import ParameterSpec, parameter_specs
from ernie_tune.peft import unpack
from ernie_tune.peft.formats import is_linear
from ernie_tune.peft.packed_header import BITS, TABLE, matrix_name, packed_settings, room_problem
from ernie_tune.peft.quantize import QuantizedEmbedding, QuantizedLinear, QuantizedWeight, swap_stack
from ernie_tune.peft.unpack import Codes

Array = np.ndarray[Any, Any]


def load_packed(folder: Path, dtype: str | None = None) -> ErnieModel:
    """The model of a packed folder, frozen, with `QuantizedLinear` layers and quantised expert
    stacks: an adapter can be put on it. On a CPU the codes stay in the files, which are mapped:
    loading takes seconds whatever the size, and the system drops pages when memory is short.

    Where they are mapped, what else is needed is held against the memory that is free, and their
    files against `ulimit -v`, before anything is read.

    `dtype`: of activations, "float32" or "bfloat16"; by default float32 on the CPU. Raises
    FileNotFoundError where there is no such folder, and ValueError for one that is not packed or of
    another version, and for tensors that are missing, unexpected, misshapen, of another type or not
    finite.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            say(
                f"{folder} must hold config.json; give a folder that `ernie-tune export --emit packed` wrote",
                f"{folder} 中须有 config.json；请给出由 `ernie-tune export --emit packed` 写出的文件夹",
            )
        )
    config = config_in(file, packed_settings(file))
    dtype = dtype or ("float32" if paddle.get_device() == "cpu" else "bfloat16")
    source = _Packed(TensorReader(folder), config, dtype)
    source.check()
    # A CPU multiplies with the codes where they lie, so they are not even read here.
    mapped = paddle.get_device() == "cpu" and unpack.ready(paddle.zeros([1], dtype))
    if mapped and (problem := room_problem(*source.bytes(), free_memory(), free_addresses())):
        raise ValueError(say("{folder}: {problem}", "{folder}：{problem}", folder=folder, problem=problem))
    with paddle.LazyGuard():  # matrices that are packed never get their place in memory
        model = ErnieModel(config, dtype)
    layers, parameters = dict(model.named_sublayers()), model.state_dict()
    with paddle.no_grad():
        for name in source.specs:
            bits = source.bits(name)
            if bits and name == TABLE:
                model.embed_tokens = QuantizedEmbedding(parameters[name])
                model.embed_tokens.put(*source.table())
            elif bits and mapped:
                _swap(layers, name, QuantizedWeight.mapped(source.codes(name), len(source.specs[name].shape) == 3))
            elif bits:
                _swap(layers, name, QuantizedWeight(*source.quantised(name), bits))
            else:
                source.fill(name, parameters[name])
    source.check_finite()
    for value in model.parameters():
        value.stop_gradient = True
    model.name_or_path = str(folder)
    model.eval()
    return model


def _swap(layers: Mapping[str, nn.Layer], parameter: str, weight: QuantizedWeight) -> None:
    module, _, leaf = parameter.rpartition(".")
    owner = layers[module]
    if isinstance(owner, Experts):
        swap_stack(owner, leaf.removesuffix("_proj"), weight)
    else:
        parent, _, child = module.rpartition(".")
        layers[parent]._sub_layers[child] = QuantizedLinear(weight, owner.bias)


def _fits(name: str, entry: TensorEntry, spec: ParameterSpec, what: str, bits: int) -> bool:
    """Whether a tensor has the shape and type of `what` it is of a parameter."""
    if what == "floats":
        return entry.shape == spec.shape and entry.dtype in FLOAT_CODES.values()
    rows, columns = spec.shape[-2:]
    if what == "codes":
        return entry.shape == (rows * bits // 8, columns) and BITS.get(entry.dtype) == bits and rows * bits % 8 == 0
    if entry.dtype not in ("F32", "BF16"):
        return False
    if name.startswith(matrix_name(TABLE, None)):
        return entry.shape == (rows, 1)
    return len(entry.shape) == 2 and entry.shape[1] == columns and entry.shape[0] > 0 and rows % entry.shape[0] == 0


class _Packed:
    """The tensors of a packed folder by canonical parameter."""

    def __init__(self, reader: TensorReader, config: ModelConfig, dtype: str) -> None:
        self.reader, self.specs, self.dtype = reader, parameter_specs(config), dtype
        self.not_finite: list[str] = []

    def _matrices(self, name: str) -> list[str]:
        """The matrices of a parameter: itself, or one an expert."""
        shape = self.specs[name].shape
        return [matrix_name(name, e) for e in range(shape[0])] if len(shape) == 3 else [matrix_name(name, None)]

    def bits(self, name: str) -> int:
        """8, 4, or 0 where the parameter is there as floats."""
        shape = self.specs[name].shape
        if name in self.reader.entries or not (name == TABLE or len(shape) == 3 or is_linear(name, shape)):
            return 0
        entry = self.reader.entries.get(f"{matrix_name(name, 0 if len(shape) == 3 else None)}.codes")
        bits = BITS.get(entry.dtype, 0) if entry else 0
        return 0 if name == TABLE and bits != 8 else bits

    def _wanted(self) -> Iterator[tuple[str, ParameterSpec, str, int]]:
        """(tensor, spec, what it is, bits) of everything that must be there."""
        for name, spec in self.specs.items():
            bits = self.bits(name)
            if not bits:
                yield name, spec, "floats", 0
                continue
            for matrix in self._matrices(name):
                yield f"{matrix}.codes", spec, "codes", bits
                yield f"{matrix}.scale", spec, "scale", bits

    def check(self) -> None:
        """ValueError unless all tensors of the model are there, in their shapes, and no others."""
        seen = set()
        for name, spec, what, bits in self._wanted():
            seen.add(name)
            entry = self.reader.entries.get(name)
            if entry is None:
                raise ValueError(
                    say(
                        f"{self.reader.path} must hold {name!r}; it is cut off or of another model: export it again",
                        f"{self.reader.path} 中须有 {name!r}；它不完整或属于别的模型：请重新导出",
                    )
                )
            if not _fits(name, entry, spec, what, bits):
                raise ValueError(
                    say(
                        f"{self.reader.path}: {name} ({entry.dtype} {list(entry.shape)}) must be the {what} of "
                        f"{list(spec.shape)}; export it again",
                        f"{self.reader.path}：{name}（{entry.dtype} {list(entry.shape)}）须为 {list(spec.shape)} 的 "
                        f"{what}；请重新导出",
                    )
                )
        extra = [name for name in self.reader.entries if name not in seen]
        if extra:
            raise ValueError(
                say(
                    f"{self.reader.path} must hold nothing but the model, but holds {extra[:3]}; export it again",
                    f"{self.reader.path} 中只能有模型，但有 {extra[:3]}；请重新导出",
                )
            )

        self._check_groups()

    def _check_groups(self) -> None:
        """ValueError for experts of one stack whose scales are not alike."""
        for name, spec in self.specs.items():
            if len(spec.shape) != 3 or not self.bits(name):
                continue
            entries = [(scale := f"{m}.scale", self.reader.entries[scale]) for m in self._matrices(name)]
            (_, first), *others = entries
            for scale, entry in others:
                if entry.shape != first.shape or entry.dtype != first.dtype:
                    raise ValueError(
                        say(
                            f"{entry.file}: {scale} ({entry.dtype} {list(entry.shape)}) must be as that of the first "
                            f"expert of its stack ({first.dtype} {list(first.shape)}); export the folder again",
                            f"{entry.file}：{scale}（{entry.dtype} {list(entry.shape)}）须与该组首个专家的相同"
                            f"（{first.dtype} {list(first.shape)}）；请重新导出该文件夹",
                        )
                    )

    def bytes(self) -> tuple[float, float]:
        """(in memory once the codes are mapped, of files that are mapped): floats, of which the
        largest is there twice while it is read, scales that are converted, and a table of codes.
        """
        entries = self.reader.entries
        floats = [4 * self.specs[name].size for name in self.specs if not self.bits(name)]
        scales = [4 * prod(e.shape) for name, e in entries.items() if name.endswith(".scale") and e.dtype != "F32"]
        table = self.specs[TABLE].size if self.bits(TABLE) else 0
        files = {entry.file for entry in entries.values()}
        return sum(floats) + max(floats, default=0) + sum(scales) + table, sum(file.stat().st_size for file in files)

    def check_finite(self) -> None:
        if self.not_finite:
            raise ValueError(
                say(
                    f"weights ({', '.join(self.not_finite[:10])}) must be finite, but hold NaN or infinity; "
                    "export the folder again",
                    f"权重（{', '.join(self.not_finite[:10])}）须为有限值，但含有 NaN 或无穷；请重新导出该文件夹",
                )
            )

    def _floats(self, name: str, code: str) -> Array:
        raw, own = self.reader.part(name), self.reader.entries[name].dtype
        if not all_finite(raw, own):
            self.not_finite.append(name)
        return cast(raw, own, code)

    def fill(self, name: str, parameter: Tensor) -> None:
        """Give a parameter that has no memory yet its floats."""
        code = "F32" if self.specs[name].float32 else FLOAT_CODES[self.dtype]
        if code != "F32" or self.reader.entries[name].dtype != "BF16" or paddle.get_device() != "cpu":
            parameter.set_value(self._floats(name, code))
            return
        made = paddle.empty(parameter.shape, "float32")
        if not widen_into(self.reader.part(name), mkl.view(made)):
            self.not_finite.append(name)
        made._share_buffer_to(parameter)

    def codes(self, name: str) -> list[Codes]:
        """Of every matrix: codes as views of the mapped file, scales in memory."""
        return [
            Codes(self.reader.part(f"{matrix}.codes"), self._floats(f"{matrix}.scale", "F32"), self.bits(name))
            for matrix in self._matrices(name)
        ]

    def table(self) -> tuple[Array, Array]:
        """Codes [V, D] and scales [V, 1] of the embedding."""
        stem = matrix_name(TABLE, None)
        return self.reader.part(f"{stem}.codes"), self._floats(f"{stem}.scale", "F32")

    def quantised(self, name: str) -> tuple[Tensor, Tensor]:
        matrices, stacked = self.codes(name), len(self.specs[name].shape) == 3
        arrays = ([getattr(m, which) for m in matrices] for which in ("codes", "scale"))
        both = (np.stack(x) if stacked else np.array(x[0]) for x in arrays)
        made = [paddle.to_tensor(array) for array in both]
        return made[0], made[1].astype(self.dtype)

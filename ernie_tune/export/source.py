"""The weights to export, read from disk one matrix at a time: a model folder in any layout, with
LoRA adapters merged into it on the way.

Merging is W + scaling * A B in float32, with the columns rescaled for DoRA, and modules trained in
full put in their place; the sum is rounded to bfloat16 once. Nothing is kept. Legend: I input
width, O output width, r rank. Refuses to know: what is written, models in memory, paddle layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ernie_tune.checkpoint.auto import AutoConfig, check_tied_head
from ernie_tune.checkpoint.names import check_names, detect_flavour, layout
from ernie_tune.checkpoint.tensors import NUMPY_TYPES, TensorReader, all_finite, cast, in_threads
from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import parameter_specs
from ernie_tune.peft import dialects
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.files import PADDLE_FILES, PEFT_FILES, Stored, read_adapter
from ernie_tune.peft.packed_header import is_packed

Array = np.ndarray[Any, Any]
Place = tuple[str, int | None]  # canonical parameter, expert of a stack
EXPORT_CODE = "BF16"
# of float32: with smaller ones threads wait for the interpreter, larger ones leave the cache
_BLOCK_BYTES = 1 << 21
_UNSHARED = 1 << 18  # multiplications; OpenBLAS takes several threads above it


class Weights(Protocol):
    """All parameters of one model, by canonical name. What quantises or rescales weights wraps
    another `Weights`.
    """

    @property
    def config(self) -> ModelConfig:
        """Their shapes."""

    def read(self, name: str, expert: int | None, code: str) -> Array:
        """A parameter (of a stack: one expert's matrix) in a safetensors type; BF16 as raw bits.
        May be a view: do not write to it.
        """


@dataclass(frozen=True)
class _Factors:
    """What one adapter adds to one matrix."""

    scaled_A: Array  # times alpha / r
    lora_B: Array
    magnitude: Array | None


def _multiply(a_RK: Array, b_KO: Array, out_RO: Array) -> None:
    """out = a b, in products so small that BLAS does not share them out: its threads wait for each
    other, and where another job has a core, long.
    """
    columns = max(16, _UNSHARED // a_RK.size)
    for j in range(0, b_KO.shape[1], columns):
        np.matmul(a_RK, b_KO[:, j : j + columns], out=out_RO[:, j : j + columns])


class _Merged:
    """A matrix and what adapters make of it, in order, in float32 and block by block: the whole
    matrix is never there in float32.
    """

    def __init__(self, raw_IO: Array, own: str, factors: Sequence[_Factors]) -> None:
        self._raw, self._own, self._factors = raw_IO, own, factors
        self._step = max(1, _BLOCK_BYTES // (4 * raw_IO.shape[1]))
        self._column_scales: list[Array | None] = []  # of the adapters so far
        for one in factors:
            self._column_scales.append(None if one.magnitude is None else one.magnitude / self._column_norms())

    def _blocks(self) -> Iterator[slice]:
        return (slice(a, a + self._step) for a in range(0, len(self._raw), self._step))

    def _column_norms(self) -> Array:
        """Of the sum with the adapter whose scales are due, [O]."""
        self._column_scales.append(None)
        squares = [np.einsum("io,io->o", block, block) for block in map(self._rows, self._blocks())]
        self._column_scales.pop()
        return np.sqrt(np.sum(squares, axis=0))

    def _rows(self, rows: slice) -> Array:
        total = cast(self._raw[rows], self._own, "F32")
        if self._own == "F32":  # the file's own
            total = total.copy()
        product = np.empty_like(total)
        for one, scale_O in zip(self._factors, self._column_scales, strict=False):
            _multiply(one.scaled_A[rows], one.lora_B, product)
            total += product
            if scale_O is not None:
                total *= scale_O
        return total

    def stored(self, code: str) -> Array:
        """The matrix in a safetensors type."""
        out = np.empty(self._raw.shape, NUMPY_TYPES[code])

        def make(rows: slice) -> None:
            out[rows] = cast(self._rows(rows), "F32", code)

        in_threads(make, self._blocks())
        return out


@dataclass
class _Changes:
    """What the adapters change, by place. Several adapters on one matrix act in their order."""

    factors: dict[Place, list[_Factors]] = field(default_factory=dict)
    replaced: dict[str, Array] = field(default_factory=dict)

    def add(self, adapter: Stored, folder: Path) -> None:
        config = adapter.config
        if not isinstance(config, LoraConfig):
            raise ValueError(
                say(
                    f"{folder}: a {type(config).__name__.removesuffix('Config')} adapter must stay beside its "
                    "model, only LoRA can be merged; serve it with `ernie-tune serve`",
                    f"{folder}：{type(config).__name__.removesuffix('Config')} 适配器须与模型分开存放，只有 "
                    "LoRA 可以合并；请用 `ernie-tune serve` 部署",
                )
            )
        for key, value in adapter.tensors.items():
            owner, _, factor = key.rpartition(".")
            if factor not in dialects.FACTORS:
                self.replaced[key] = value
            elif factor == "lora_A":
                expert = dialects.split_expert(key)
                place: Place = (f"{owner}.weight", None)
                if expert:
                    place = (expert[0].removesuffix(dialects.PRODUCT) + "_proj", expert[3])
                factors = _Factors(
                    np.float32(config.scaling) * value,
                    adapter.tensors[f"{owner}.lora_B"],
                    adapter.tensors.get(f"{owner}.magnitude"),
                )
                self.factors.setdefault(place, []).append(factors)


class ExportSource:
    """`Weights` of a folder, with the adapters in `adapters` merged in their order.

    Raises ValueError for tensors that are missing, unexpected, misshapen or (when read) not finite,
    for adapters that do not fit or cannot be merged, and for a tied head that differs from the
    embedding.
    """

    def __init__(self, folder: Path, adapters: Sequence[Path] = ()) -> None:
        self.folder, self.adapters = folder, tuple(adapters)
        if is_packed(folder):
            raise ValueError(
                say(
                    f"model ({folder}) must be unquantised, but is a packed folder, whose codes are not exported again; give "
                    "the folder that it was made of, and a run trained on it after that: ernie-tune export MODEL RUN --output_dir OUT",
                    f"模型（{folder}）须未经量化，但它是打包文件夹，其编码不能再次导出；请给出制作它的原文件夹，"
                    "在其后写上基于它训练的结果：ernie-tune export MODEL RUN --output_dir OUT",
                )
            )
        self.config = AutoConfig.from_pretrained(folder)
        self.reader = TensorReader(folder)
        self.table = layout(self.config, detect_flavour(self.reader.shapes, self.config))
        check_names(self.table, self.reader.shapes)
        check_tied_head(self.table, self.reader)
        self._changes = _Changes()
        for adapter in adapters:
            self._changes.add(read_adapter(adapter, self.config), adapter)
        self._check_changes()

    def _check_changes(self) -> None:
        for name, value in self._changes.replaced.items():
            spec = self.table.canonical.get(name)
            if spec is None or spec.shape != value.shape:
                raise ValueError(
                    say(
                        f"{name} {list(value.shape)} of the adapter must be "
                        f"{list(spec.shape) if spec else 'a parameter of the model'}; "
                        "merge the adapter into the base model that it was trained on",
                        f"适配器的 {name} {list(value.shape)} 须为 "
                        f"{(list(spec.shape) if spec else 'a parameter of the model')}；请把适配器合并到训练它的基础模型上",
                    )
                )

    @property
    def float_code(self) -> str:
        """A safetensors type that holds the folder's values as they are."""
        kinds = {
            self.reader.entries[links[0].disk].dtype
            for n, links in self.table.links_to.items()
            if not self.table.canonical[n].float32
        }
        return EXPORT_CODE if kinds == {EXPORT_CODE} and not self.adapters else "F32"

    def read(self, name: str, expert: int | None, code: str) -> Array:
        links = self.table.links_to[name]
        own = self.reader.entries[links[0].disk].dtype
        factors = self._changes.factors.get((name, expert), [])
        replaced = self._changes.replaced.get(name)
        if replaced is not None:
            raw, own = (replaced if expert is None else replaced[expert]), "F32"
        else:
            raw = self.table.to_canonical(name, self.reader.read, expert)
        if not all_finite(raw, own):
            raise ValueError(
                say(
                    f"{name} in {self.folder} must be finite, but holds NaN or infinity; the file is damaged: "
                    "fetch it again",
                    f"{self.folder} 中的 {name} 须为有限值，但含有 NaN 或无穷；文件已损坏：请重新获取",
                )
            )
        if not factors:
            return cast(raw, own, code)
        return _Merged(raw, own, factors).stored(code)


class Rounded:
    """`Weights` with the values they have once stored: rounded to bfloat16 but for what stays
    float32.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.config = weights, weights.config
        self._specs = parameter_specs(weights.config)

    def read(self, name: str, expert: int | None, code: str) -> Array:
        own = "F32" if self._specs[name].float32 else EXPORT_CODE
        return cast(self.weights.read(name, expert, own), own, code)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter's settings."""
    return any((folder / name).is_file() for name in (PADDLE_FILES[0], PEFT_FILES[0]))


def stored_places(config: ModelConfig) -> Iterator[tuple[str, int | None, bool]]:
    """(canonical name, expert, float32) of every matrix and vector of a model, in its order."""
    for name, spec in parameter_specs(config).items():
        for expert in range(spec.shape[0]) if len(spec.shape) == 3 else (None,):
            yield name, expert, spec.float32

"""Where a model's values come from, one parameter or a part of one at a time: the tensors of a
folder, or fresh draws; and `fill`, which puts them in.

What a process does not keep is not copied: of a mapped file only the pages of its part are read, of
a stack of experts only its experts.
Refuses to know: how parts are chosen, adapters, quantisation (it hands matrices to what asks for
them), distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import numpy as np
from paddle import Tensor

from ernie_tune.checkpoint.names import NameTable
from ernie_tune.checkpoint.tensors import FLOAT_CODES, NUMPY_TYPES, all_finite, cast
from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.ernie import ErnieModel, in_stages
from ernie_tune.models.init import initial_value
from ernie_tune.models.specs import ParameterSpec, parameter_specs

Array = np.ndarray[Any, Any]
# of slices and lists, one an axis, from the first on; axes that are left out are whole
Index = tuple[Any, ...]
# A parameter and the shape of its whole value -> which of it the parameter is to hold; None:
# nothing yet.
Where = Callable[[Tensor, tuple[int, ...]], Index | None]
# Takes float32 matrices as `read(expert)` gives them: one expert of a stack by its number in the
# whole, or the whole parameter for None.
Taker = Callable[[Callable[[int | None], Array]], None]


class Typed(Protocol):
    """What is known of a tensor before it is read."""

    @property
    def dtype(self) -> str:
        """A safetensors code."""


class Tensors(Protocol):
    """Tensors by the names of a layout: a folder's (`TensorReader`), or those that somebody
    holds."""

    @property
    def entries(self) -> Mapping[str, Typed]: ...

    def read(self, name: str) -> Array: ...


class Source(Protocol):
    """The values of all parameters of `specs`."""

    @property
    def specs(self) -> Mapping[str, ParameterSpec]: ...

    def read(self, name: str, code: str, index: Index = (), expert: int | None = None) -> Array:
        """The part `index` of a parameter, or of one expert's matrix of a stack, in an element type
        (a safetensors code; BF16 as uint16 bits).
        """

    def check(self) -> None:
        """ValueError where something that was read cannot be used."""


class Drawn:
    """Fresh values by name and seed (models/init.py): each is drawn whole, so that it is the same
    on every layout.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        self.config, self.seed, self.specs = config, seed, parameter_specs(config)
        self._last: tuple[str, Array] = ("", np.empty(0))

    def read(self, name: str, code: str, index: Index = (), expert: int | None = None) -> Array:
        if self._last[0] != name:
            self._last = ("", np.empty(0))
            self._last = (name, initial_value(self.config, name, self.seed))
        value = self._last[1]
        return cast((value if expert is None else value[expert])[index], "F32", code)

    def check(self) -> None:
        """Draws are finite."""
        self._last = ("", np.empty(0))


class OnDisk:
    """The tensors of a folder, or of another model, by their canonical names (`table`)."""

    def __init__(self, table: NameTable, reader: Tensors) -> None:
        self.table, self.reader, self.specs = table, reader, table.canonical
        self.not_finite: dict[str, None] = {}

    def read(self, name: str, code: str, index: Index = (), expert: int | None = None) -> Array:
        links = [link for link in self.table.links_to[name] if expert is None or link.expert == expert]
        if expert is None and links[0].expert is not None:
            shape = self.specs[name].shape
            kept = np.arange(shape[0])[index[0] if index else slice(None)]
            matrices = (self.read(name, code, index[1:], int(e)) for e in kept)
            first = next(matrices, None)
            if first is None:
                return np.empty((0, *shape[1:]), NUMPY_TYPES[code])
            out = np.empty((len(kept), *first.shape), first.dtype)
            out[0] = first
            for i, matrix in enumerate(matrices, 1):
                out[i] = matrix
            return out
        kinds = [self.reader.entries[link.disk].dtype for link in links]
        # Blocks of one type are cut as they lie in the file; the part alone is copied and
        # converted.
        raw = len(set(kinds)) == 1
        part = self.table.to_canonical(name, self.reader.read if raw else self._converted(code), expert)[index]
        if not all_finite(part, kinds[0] if raw else code):
            bad = [n for n, kind in zip(links, kinds, strict=True) if not all_finite(self.reader.read(n.disk), kind)]
            self.not_finite.update((link.disk, None) for link in bad)
        return cast(part, kinds[0], code) if raw else part

    def _converted(self, code: str) -> Callable[[str], Array]:
        return lambda disk: cast(self.reader.read(disk), self.reader.entries[disk].dtype, code)

    def check(self) -> None:
        bad = list(self.not_finite)
        if bad:
            shown = ", ".join(bad[:10])
            raise ValueError(
                say(
                    f"weights ({len(bad)} tensors: {shown}) must be finite, but hold NaN or infinity; the "
                    "file is damaged: fetch it again",
                    f"权重（{len(bad)} 个张量：{shown}）含有 NaN 或无穷大；文件已损坏，请重新下载",
                )
            )


def router_dtype(dtype: str) -> str:
    """Of the routers and their biases in a model of `dtype`."""
    return "float64" if dtype == "float64" else "float32"


def fill(
    model: ErnieModel,
    source: Source,
    *,
    stages: Collection[str] | None = None,
    where: Where | None = None,
    takers: Mapping[str, Taker] | None = None,
) -> None:
    """Set every parameter of `model`, or of these stages, from `source`. `takers`: what else a
    parameter has become, by its name: it is given the matrices. With `where`, what nobody has here
    is not read. Raises ValueError as `source.check`.
    """
    parameters, takers = model.state_dict(), takers or {}
    for name, spec in source.specs.items():
        if stages is not None and not in_stages(model.config, stages, name):
            continue
        code = FLOAT_CODES[router_dtype(model.compute_dtype) if spec.float32 else model.compute_dtype]
        if name in takers:
            takers[name](_matrices(source, name, code))
        elif where is None or name in parameters:
            index = where(parameters[name], spec.shape) if where else ()
            if index is not None:
                parameters[name].set_value(np.ascontiguousarray(source.read(name, code, index)))
    source.check()


def _matrices(source: Source, name: str, code: str) -> Callable[[int | None], Array]:
    return lambda expert: cast(source.read(name, code, expert=expert), code, "F32")

"""The codes that `weight_quantize_algo` makes while a model is loaded, made once for a packed
folder: the same matrices, the same groups of 64 rows, the same float32 scales, bit for bit.

A server of FastDeploy has no kernel for scales of groups; these folders are bases for training,
and for our own server. Legend: K input rows, N output columns, S groups of rows. Refuses to know:
files, FastDeploy's grid (grid.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ernie_tune.export.grid import Grid
from ernie_tune.export.scheme import scheme
from ernie_tune.export.source import Weights
from ernie_tune.models.specs import parameter_specs
from ernie_tune.peft.formats import bits_at_load, num_groups
from ernie_tune.peft.packed_header import TABLE
from ernie_tune.peft.quantize import quantize, unpack_halves

Array = np.ndarray[Any, Any]


class AtLoad:
    """The grid of every matrix of `weights` that `algorithm` (a name of `formats.ALGORITHMS`) turns
    into codes. Stands where a `choose.Chosen` does; nothing is searched for, so `rtn` is the same.
    """

    method, scale_code = "rtn", "F32"

    def __init__(self, weights: Weights, algorithm: str) -> None:
        self.weights, self.algorithm = weights, algorithm
        self._specs = parameter_specs(weights.config)
        self.scheme = scheme(algorithm)

    def bits(self, name: str) -> int:
        return bits_at_load(name, self._specs[name].shape, self.algorithm)

    def shards(self, name: str) -> int:
        """Groups of rows that have scales of their own."""
        return 1 if name == TABLE else num_groups(self._specs[name].shape[-2], self.bits(name))

    def grid(self, name: str, expert: int | None) -> Grid:
        """Of the table of tokens, whose scales are by row: of its transpose."""
        weight = np.asarray(self.weights.read(name, expert, "F32"))
        codes, scale_SN = quantize(weight.T if name == TABLE else weight, self.bits(name))
        return Grid(unpack_halves(codes) if self.bits(name) == 4 else codes, scale_SN, self.bits(name))

    def rtn(self, name: str, expert: int | None) -> Grid:
        return self.grid(name, expert)


def dense(name: str, made: Grid) -> Array:
    """What is multiplied with, or looked up, for the grid of a parameter."""
    return made.dense().T if name == TABLE else made.dense()

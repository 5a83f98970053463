"""Activation-aware scaling folded into the weights (2306.00978), by powers of two, so that before
quantisation nothing changes, to the last bit.

Two places of a layer feed int4 matrices. The norm before the experts: its weight is divided by a
vector, the rows of every matrix that reads its output (both families' and the shared experts' gate
and up, both routers) are multiplied. An expert's hidden units: column k of its up half is divided,
row k of its down matrix multiplied; the gate half goes through a function and stays. Rows with
large inputs so get finer codes.
Legend: D width, I expert width. Refuses to know: how codes are chosen.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_tune.checkpoint.tensors import cast
from ernie_tune.export.choose import Moment
from ernie_tune.export.source import EXPORT_CODE, Place, Weights
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import parameter_specs

Array = np.ndarray[Any, Any]
_LARGEST_EXPONENT = 4
_NORM = re.compile(r"(layers\.\d+)\.post_attention_layernorm\.weight")
_READER = re.compile(
    r"(layers\.\d+)\.mlp\.(gate\.weight(_1)?|shared_experts\.(gate|up)_proj\.weight|(text|vision)_experts\.up_gate_proj)"
)
_DOWN = re.compile(r"(layers\.\d+\.mlp\.(text|vision)_experts)\.down_proj")


def powers(mean_square: Array, exponent: float) -> Array:
    """2 ^ round(exponent * log2(rms / geometric mean of rms)), float32: how much more each input
    row weighs. All ones where nothing was seen.
    """
    rms = np.sqrt(mean_square)
    seen = rms > 0
    if not seen.any():
        return np.ones(len(rms), np.float32)
    log = np.zeros(len(rms))
    log[seen] = np.log2(rms[seen])
    log[seen] -= log[seen].mean()
    return np.exp2(np.rint(exponent * log).clip(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)).astype(np.float32)


def _mean_square(moment: Moment) -> Array:
    return (moment.total if moment.total.ndim == 1 else np.diagonal(moment.total)) / max(1, moment.tokens)


@dataclass(frozen=True)
class Folded:
    """`Weights` with the vectors folded in: `norms` by layer name ("layers.3"), `hidden` by place
    of a down matrix.
    """

    weights: Weights
    norms: Mapping[str, Array]
    hidden: Mapping[Place, Array]

    @classmethod
    def of(cls, weights: Weights, moments: Mapping[Place, Moment], exponent: float) -> Folded:
        """Vectors from calibration. The norm's comes from all tokens of both families together:
        they share it.
        """
        norms: dict[str, list[Array]] = {}
        hidden: dict[Place, Array] = {}
        for (name, expert), moment in moments.items():
            reader = _READER.fullmatch(name)
            if reader:
                norms.setdefault(reader[1], []).append(_mean_square(moment))
            elif _DOWN.fullmatch(name):
                hidden[name, expert] = powers(_mean_square(moment), exponent)
        return cls(weights, {name: powers(np.mean(parts, 0), exponent) for name, parts in norms.items()}, hidden)

    @property
    def config(self) -> ModelConfig:
        return self.weights.config

    def read(self, name: str, expert: int | None, code: str) -> Array:
        factor = self._factor(name, expert)
        if factor is None:
            return self.weights.read(name, expert, code)
        own = "F32" if parameter_specs(self.config)[name].float32 else EXPORT_CODE
        scaled = cast(self.weights.read(name, expert, own), own, "F32") * factor
        return cast(np.ascontiguousarray(scaled), "F32", code)

    def _factor(self, name: str, expert: int | None) -> Array | None:
        """What the parameter is multiplied with, shaped to broadcast; None: it stays."""
        norm, reader, down = _NORM.fullmatch(name), _READER.fullmatch(name), _DOWN.fullmatch(name)
        if norm:
            return 1 / self.norms[norm[1]] if norm[1] in self.norms else None
        if down:
            own = self.hidden.get((name, expert))
            return None if own is None else own[:, None]
        if not reader:
            return None
        rows = self.norms.get(reader[1])
        place = (name.replace("up_gate_proj", "down_proj"), expert)
        factor = None if rows is None else rows[:, None]
        if place[0] != name and place in self.hidden:
            columns = np.concatenate([np.ones_like(self.hidden[place]), 1 / self.hidden[place]])[None]
            factor = columns if factor is None else factor * columns
        return factor


def folded_moments(moments: Mapping[Place, Moment], folded: Folded) -> dict[Place, Moment]:
    """The moments of the same inputs after folding: each row is divided by its factor."""
    out = {}
    for (name, expert), moment in moments.items():
        reader = _READER.fullmatch(name)
        factor = folded.norms.get(reader[1]) if reader else folded.hidden.get((name, expert))
        if factor is None:
            out[name, expert] = moment
        elif moment.total.ndim == 1:
            out[name, expert] = Moment(moment.total / factor**2, moment.tokens)
        else:
            out[name, expert] = Moment(moment.total / np.outer(factor, factor), moment.tokens)
    return out

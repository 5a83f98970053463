"""Which codes each matrix gets: rounding to nearest, a search for better scales, and GPTQ, all on
FastDeploy's own grid.

rtn: what FastDeploy does by itself. clip: for each column (and rank's share of rows) the scale,
among 40 from 0.35 to 1 times rtn's, with the least error of the layer's output, sum_kj e_k M_kj
e_j, where e is the error of a column and M the mean of x x^T over calibration tokens. gptq: clip's
scales, and rounding errors of one row made good in the rows after it (2210.17323). Only int4 is
chosen so: int8 codes cannot be carried in bfloat16 weights.
Whatever the method, a column keeps rtn's codes where nothing was better, so no column gets worse in
the measure it was chosen by.
Legend: K input rows, N output columns, S shards of rows. Refuses to know: models, calibration data,
files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_tune.checkpoint.tensors import cast, widen_bfloat16
from ernie_tune.config.language import say
from ernie_tune.export import at_load
from ernie_tune.export import grid as grids
from ernie_tune.export.at_load import AtLoad
from ernie_tune.export.grid import Grid
from ernie_tune.export.scheme import Scheme, bits_of, row_parallel
from ernie_tune.export.source import Place, Rounded, Weights
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import parameter_specs

Array = np.ndarray[Any, Any]
METHODS = ("rtn", "clip", "gptq")
_RATIOS = np.linspace(1.0, 0.35, 40, dtype=np.float32)
_DAMPING = 0.01  # of the mean diagonal, added before GPTQ's factorisation
_GPTQ_BLOCK = 128
_BLOCK_BYTES = 1 << 20  # of float32: columns worked on at once stay in the processor's cache


@dataclass(frozen=True)
class Moment:
    """Second moment of a layer's inputs over `tokens` tokens: sum of x x^T [K, K], or its diagonal
    [K] where a full one would be too large.
    """

    total: Array
    tokens: int

    def weights(self) -> Array:
        """The mean, drawn towards a plain one (every input row alike) as if K more tokens had been
        seen: few tokens say little about K rows.
        """
        rows = self.total.shape[0]
        diagonal = self.total if self.total.ndim == 1 else np.diagonal(self.total)
        level = np.float32(diagonal.mean() / max(1, self.tokens)) or np.float32(1)
        prior = level * rows
        mixed = self.total + prior if self.total.ndim == 1 else self.total + prior * np.eye(rows, dtype=np.float32)
        out: Array = mixed / np.float32(self.tokens + rows)
        return out


def _loss(error_KN: Array, weights: Array | None) -> Array:
    """Error of each column, [N]."""
    if weights is None:
        return np.einsum("kn,kn->n", error_KN, error_KN)
    if weights.ndim == 1:
        return np.einsum("k,kn,kn->n", weights, error_KN, error_KN)
    return np.einsum("kn,kn->n", error_KN, weights @ error_KN)


def clip(bits_KN: Array, weights: Array | None, shards: int = 1) -> Grid:
    """The best scale for each column and shard. `weights`: None for the plain error, [K] or [K, K]
    for the output's. Never worse than rtn in it.
    """
    scale = grids.column_scales(bits_KN, 4, shards)
    rows = len(bits_KN) // shards
    step = max(16, _BLOCK_BYTES // (4 * rows))
    for s in range(shards):
        share = slice(s * rows, (s + 1) * rows)
        own = None if weights is None else weights[share] if weights.ndim == 1 else weights[share, share]
        for a in range(0, bits_KN.shape[1], step):
            columns = slice(a, a + step)
            scale[s, columns] = _best_scales(widen_bfloat16(bits_KN[share, columns]), scale[s, columns], own)
    return Grid(grids.nearest_codes(bits_KN, scale, 4), scale, 4)


def _best_scales(wide_KN: Array, start_N: Array, weights: Array | None) -> Array:
    """rtn's scales, or better ones. A smaller scale keeps a code of +-7 in every column, so that
    each is found again by FastDeploy.
    """
    best_N = np.where(start_N == 0, np.float32(1), start_N)
    tried_RN = np.concatenate([best_N[None], grids.settle(best_N * _RATIOS[:, None])])
    least_N = np.full(best_N.shape, np.inf, np.float32)
    error_KN = np.empty_like(wide_KN)
    for scale_N in tried_RN:
        np.divide(wide_KN, scale_N, out=error_KN)
        # as the codes will be: where rows are correlated, exact halves matter
        grids.round_in_place(error_KN)
        np.clip(error_KN, -7, 7, out=error_KN)
        error_KN *= scale_N
        error_KN -= wide_KN
        loss_N = _loss(error_KN, weights)
        better = loss_N < least_N
        least_N[better], best_N[better] = loss_N[better], scale_N[better]
    return np.where(start_N == 0, np.float32(0), best_N)


def gptq(bits_KN: Array, weights_KK: Array, shards: int = 1) -> Grid:
    """GPTQ with clip's scales. Columns that it does not improve, or that lose their code of +-7,
    keep clip's codes.
    """
    first = clip(bits_KN, weights_KK, shards)
    wide = widen_bfloat16(bits_KN)
    rows, share = len(wide), len(wide) // shards
    damped = weights_KK.astype(np.float64)
    damped[np.diag_indices(rows)] += _DAMPING * np.diagonal(damped).mean()
    # upper Cholesky factor of the inverse: row k says how later rows make good an error in row k
    upper_KK = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)
    codes, left = np.empty(wide.shape, np.int8), wide.copy()
    for a in range(0, rows, _GPTQ_BLOCK):
        b = min(a + _GPTQ_BLOCK, rows)
        errors = np.empty((b - a, wide.shape[1]), np.float32)
        for k in range(a, b):
            scale = first.scale_SN[k // share]
            divisor = np.where(scale == 0, np.float32(1), scale)
            codes[k] = grids.round_half_away(np.clip(left[k] / divisor, -7, 7))
            errors[k - a] = (left[k] - codes[k] * scale) / upper_KK[k, k]
            left[k + 1 : b] -= upper_KK[k, k + 1 : b, None] * errors[k - a]
        left[b:] -= upper_KK[a:b, b:].T @ errors
    made = Grid(codes, first.scale_SN, 4)
    return _better_columns(first, made, wide, weights_KK)


def _better_columns(first: Grid, second: Grid, wide: Array, weights_KK: Array) -> Grid:
    losses = [_loss(g.dense() - wide, weights_KK) for g in (first, second)]
    shards = len(first.scale_SN)
    full = (np.abs(second.codes_KN).reshape(shards, -1, wide.shape[1]).max(1) == 7) | (first.scale_SN == 0)
    use_N = (losses[1] < losses[0]) & full.all(0)
    return Grid(np.where(use_N, second.codes_KN, first.codes_KN), first.scale_SN, 4)


class Chosen:
    """The grid of every quantised matrix of `weights`, made when asked for. Scales that were
    searched for are kept, of GPTQ the codes too.

    `moments`: what calibration saw, by place; without it clip takes the plain error. Raises
    ValueError for unknown methods, gptq without full moments, and a `target_tp` that does not
    divide the rows.
    """

    def __init__(
        self,
        weights: Weights,
        scheme: Scheme,
        method: str,
        target_tp: int,
        moments: Mapping[Place, Moment] | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(
                say(
                    f"method ({method!r}) must be one of {METHODS}; choose one of them",
                    f"method（{method!r}）须为 {METHODS} 之一；请选一种",
                )
            )
        if method == "gptq" and not moments:
            raise ValueError(
                say(
                    "method (gptq) must come with calibration data; give --calib FILE, or take method clip",
                    "method（gptq）需要校准数据；请给出 --calib FILE，或改用 clip",
                )
            )
        self.weights, self.scheme, self.method, self.target_tp = weights, scheme, method, target_tp
        for name, spec in parameter_specs(weights.config).items():
            if self.bits(name):
                grids.check_shards(spec.shape[-2], self.shards(name))
        self.moments = moments or {}
        self._kept: dict[Place, Grid | Array] = {}

    def bits(self, name: str) -> int:
        return bits_of(name, self.scheme)

    def shards(self, name: str) -> int:
        """Parts of the rows that have scales of their own."""
        return self.target_tp if row_parallel(name) else 1

    def original(self, name: str, expert: int | None) -> Array:
        """The unquantised matrix, bfloat16 bits."""
        return self.weights.read(name, expert, "BF16")

    def rtn(self, name: str, expert: int | None) -> Grid:
        """What FastDeploy makes of the unquantised matrix."""
        return grids.quantize(self.original(name, expert), self.bits(name), self.shards(name))

    def grid(self, name: str, expert: int | None) -> Grid:
        """The grid of one matrix by the method."""
        if self.method == "rtn" or self.bits(name) == 8:
            return self.rtn(name, expert)
        place, bits_KN = (name, expert), self.original(name, expert)
        kept = self._kept.get(place)
        if isinstance(kept, Grid):
            return kept
        if kept is not None:
            return Grid(grids.nearest_codes(bits_KN, kept, 4), kept, 4)
        moment = self.moments.get(place)
        weights = moment.weights() if moment else None
        if self.method == "gptq" and weights is not None:
            made = gptq(bits_KN, weights, self.shards(name))
            self._kept[place] = made
        else:
            made = clip(bits_KN, weights, self.shards(name))
            self._kept[place] = made.scale_SN
        return made


class Written:
    """`Weights` as they are stored for FastDeploy to quantise itself: int4 matrices on their grid,
    the rest untouched.
    """

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self.config: ModelConfig = chosen.weights.config

    def read(self, name: str, expert: int | None, code: str) -> Array:
        if self.chosen.bits(name) != 4 or self.chosen.method == "rtn":
            return self.chosen.weights.read(name, expert, code)
        original = self.chosen.original(name, expert)
        return cast(grids.snap(self.chosen.grid(name, expert), original), "BF16", code)


class Served:
    """`Weights` as a server multiplies with them: codes times scales, in float32. `plain`: as if
    FastDeploy rounded for itself.
    """

    def __init__(self, chosen: Chosen | AtLoad, plain: bool = False) -> None:
        self.chosen, self.plain = chosen, plain
        self.unquantised = chosen.weights if isinstance(chosen, AtLoad) else Rounded(chosen.weights)
        self.config: ModelConfig = chosen.weights.config

    def read(self, name: str, expert: int | None, code: str) -> Array:
        if not self.chosen.bits(name):
            return self.unquantised.read(name, expert, code)
        made = self.chosen.rtn(name, expert) if self.plain else self.chosen.grid(name, expert)
        return cast(at_load.dense(name, made), "F32", code)

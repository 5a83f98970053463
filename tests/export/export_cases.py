"""Shared by the tests of export: small models as folders, and matrices that quantisers find
hard.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.checkpoint.tensors import narrow_bfloat16
from ernie_tune.data.processor import Processor
from ernie_tune.export.grid import LARGEST, Grid, quantize
from ernie_tune.export.scheme import bits_of, row_parallel, scheme
from ernie_tune.export.source import ExportSource
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.presets import preset


def model_folder(
    folder: Path, preset: str = "tiny-a", flavour: str = "hf", seed: int = 3, dtype: str | None = None
) -> Path:
    """A model with fresh weights and its processor."""
    AutoModel.from_config(preset, seed=seed).save_pretrained(folder, flavour=flavour, dtype=dtype)
    Processor.bundled("tiny").save_pretrained(folder)
    return folder


def matrix(rows: int, columns: int, seed: int = 0, tails: float = 0) -> np.ndarray:
    """bfloat16 bits of normal values, or of Student's t with `tails` degrees of freedom."""
    rng = np.random.default_rng(seed)
    values = rng.standard_t(tails, (rows, columns)) if tails else rng.standard_normal((rows, columns))
    return narrow_bfloat16(values.astype(np.float32))


def rtn(source: ExportSource, quantization: str, tp: int = 1) -> dict[str, Any]:
    """Arguments of `write_packed` for rounding to nearest."""
    chosen = scheme(quantization)

    def shards(name: str) -> int:
        return tp if row_parallel(name) else 1

    def grid(name: str, expert: int | None) -> Grid:
        return quantize(source.read(name, expert, "BF16"), bits_of(name, chosen), shards(name))

    return {"bits": lambda name: bits_of(name, chosen), "shards": shards, "grid": grid}


def aligned_config() -> ModelConfig:
    """tiny-a with widths that FastDeploy's kernels take (rows in 64s, columns in 16s) on two ranks
    too, and with few experts.
    """
    config = preset("tiny-a")
    moe = dataclasses.replace(config.moe, num_experts=4, intermediate_size=(128, 128), layer_indices=(1,))  # type: ignore[type-var]
    return config.replace(hidden_size=128, intermediate_size=256, num_attention_heads=8, num_hidden_layers=2, moe=moe)


def layer_inputs(rows: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Activations [T, K] as layers see them: correlated, with channels of very different size."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((rows // 4, rows)) * np.exp(rng.standard_normal(rows))
    return (rng.standard_normal((tokens, rows // 4)) @ mixing + 0.1 * rng.standard_normal((tokens, rows))).astype(
        np.float32
    )


def lost_columns(found: Grid) -> int:
    """Number of (shard, column) pairs that are not zero and have no code of the largest magnitude:
    those would be found with another scale.
    """
    shards = len(found.scale_SN)
    parts = np.abs(found.codes_KN.reshape(shards, -1, found.codes_KN.shape[1]))
    top = parts.max(1)
    return int(((top > 0) & (top != LARGEST[found.bits])).sum())

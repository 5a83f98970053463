"""Writes packed folders, the form that `peft/packed.py` describes and loads: codes and scales as
they are, for our own server and for archives.

Refuses to know: how grids are found, tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.tensors import cast
from ernie_tune.checkpoint.writer import DEFAULT_SHARD_BYTES, write_folder
from ernie_tune.config.language import say
from ernie_tune.export.grid import Grid
from ernie_tune.export.source import EXPORT_CODE, Place, Weights
from ernie_tune.models.config_dialects import write_config
from ernie_tune.models.specs import parameter_specs
from ernie_tune.peft.packed_header import MARK, METHOD, TABLE, matrix_name
from ernie_tune.peft.quantize import pack_halves

Array = np.ndarray[Any, Any]


def write_packed(
    folder: Path,
    weights: Weights,
    bits: Callable[[str], int],
    shards: Callable[[str], int],
    grid: Callable[[str, int | None], Grid],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    scale_code: str = EXPORT_CODE,
    float_code: str = EXPORT_CODE,
) -> list[Path]:
    """Write a packed folder. `bits(name)`: 8, 4 or 0; `shards(name)`: scales down the rows;
    `grid(name, expert)`: codes and scales, asked for once where scales follow their codes in the
    file, of the table of tokens those of its transpose. `scale_code`, `float_code`: safetensors
    types of the scales and of what stays float. Returns the paths.

    ValueError for an odd input width with 4 bits.
    """
    specs = parameter_specs(weights.config)
    entries: dict[str, tuple[tuple[int, ...], str]] = {}
    origin: dict[str, Place] = {}
    for name, spec in specs.items():
        if not bits(name):
            entries[name] = (spec.shape, "F32" if spec.float32 else float_code)
            origin[name] = (name, None)
            continue
        rows, columns = spec.shape[-2:]
        if bits(name) == 4 and rows % 2:
            raise ValueError(
                say(
                    f"input width ({rows}) of {name} must be even for 4 bits; use quantization wint8",
                    f"4 位量化要求 {name} 的输入宽度（{rows}）为偶数；请用 quantization wint8",
                )
            )
        for expert in range(spec.shape[0]) if len(spec.shape) == 3 else (None,):
            stem = matrix_name(name, expert)
            entries[f"{stem}.codes"] = ((rows // 2, columns), "U8") if bits(name) == 4 else ((rows, columns), "I8")
            entries[f"{stem}.scale"] = ((rows, 1) if name == TABLE else (shards(name), columns), scale_code)
            origin[f"{stem}.codes"] = origin[f"{stem}.scale"] = (name, expert)

    made: dict[Place, Grid] = {}  # the newest alone

    def produce(key: str) -> Array:
        name, expert = origin[key]
        if key in specs:
            spec = specs[name]
            if len(spec.shape) == 3:  # a stack that stays as it is
                return np.stack([weights.read(name, e, entries[key][1]) for e in range(spec.shape[0])])
            return weights.read(name, None, entries[key][1])
        newest = made.pop((name, expert), None) or grid(name, expert)
        if key.endswith(".scale"):
            return cast(newest.scale_SN.reshape(entries[key][0]), "F32", scale_code)
        made.clear()
        made[name, expert] = newest
        if name == TABLE:
            return np.ascontiguousarray(newest.codes_KN.T)
        return pack_halves(newest.codes_KN) if newest.bits == 4 else newest.codes_KN

    config = write_config(weights.config.replace(dtype="bfloat16"), "paddle")
    config["quantization_config"] = MARK
    return write_folder(
        folder,
        entries,
        produce,
        max_shard_bytes=max_shard_bytes,
        metadata={"format": "np", "layout": METHOD},
        files={"config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"},
    )

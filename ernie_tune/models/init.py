"""Fresh weights, drawn by parameter name: the same seed gives the same model on one process and on
any layout.

Scale: std = sqrt(1 / (3 * hidden_size)) for matrices, norms one, biases zero,
correction biases zero.
Refuses to know: checkpoints, distribution.
"""

from __future__ import annotations

import zlib

import numpy as np

from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import parameter_specs


def initial_value(config: ModelConfig, name: str, seed: int) -> np.ndarray:
    """The fresh float32 value of one canonical parameter; depends on nothing but its arguments."""
    shape = parameter_specs(config)[name].shape
    if len(shape) == 1 or "e_score_correction_bias" in name:
        is_norm = "norm" in name or name.endswith((".3.weight", "vision_model.ln.weight"))
        return np.full(shape, 1.0 if is_norm and name.endswith("weight") else 0.0, np.float32)
    rng = np.random.Generator(np.random.Philox(key=[seed, zlib.crc32(name.encode())]))
    return rng.standard_normal(shape, np.float32) * np.float32((0.3333 / config.hidden_size) ** 0.5)

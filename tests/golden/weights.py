"""Numbers both sides of the golden tests agree on: weights, pixels, images and probe vectors, from
a hash of their name. numpy only.

Values are sums of integers times one constant, so every machine and numpy version makes the same
bits. Refuses to know: torch, paddle, transformers.
Legend: T tokens of a case, P patches, C values per patch, n images and videos, H/W image rows and
columns.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ernie_tune.models.config import ModelConfig, TokenIds
from ernie_tune.models.inputs import Row
from ernie_tune.models.presets import preset
from ernie_tune.models.specs import parameter_specs

_DRAW = (
    # of sixty, the draw whose closest choice of an expert is the clearest: float32 rounding must
    # not change a route
    37
)
# The stored rows were made with the ids of the first shipped tokenizers (`tokenizer_old`).
GOLDEN_TOKENS = TokenIds(0, 1, 2, image=602, image_start=600, image_end=601, video=602, video_start=603, video_end=604)
PATCH_DIM = 588  # 3 x 14 x 14, in every preset
_SUM_OF_FOUR_STD = math.sqrt(4 * (65536**2 - 1) / 12)  # of four uniform 16-bit integers


def golden_config(name: str) -> ModelConfig:
    """A preset with the ids of the stored rows."""
    return preset(name).replace(tokens=GOLDEN_TOKENS)


def hashed(name: str, size: int) -> np.ndarray:
    """`size` independent uint64: splitmix64 of a counter that starts at the hash of `name`."""
    start = np.frombuffer(hashlib.sha256(f"{name}, draw {_DRAW}".encode()).digest()[:8], "<u8")
    z = start + np.arange(1, size + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def normal(name: str, shape: Sequence[int]) -> np.ndarray:
    """Nearly N(0, 1), float64: the sum of the four 16-bit fields of a hash, centred and scaled."""
    fields = hashed(name, math.prod(shape)).view(np.uint16).reshape(-1, 4)
    return ((fields.sum(1, dtype=np.int64) - 2 * 65535) / _SUM_OF_FOUR_STD).reshape(shape)


def _spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a parameter: far from the initial values, so that no term of
    the model hides.
    """
    if name.endswith("e_score_correction_bias"):
        return 0.0, 0.05  # enough to change which experts are chosen
    if len(shape) == 1:
        return (1.0, 0.2) if name.endswith(".weight") else (0.0, 0.1)
    if ".mlp.gate.weight" in name:
        # logits of about 1.5: no expert dominates, so every chosen one counts
        return 0.0, 1.5 / math.sqrt(shape[0])
    if name == "embed_tokens.weight":
        return 0.0, 0.1
    return 0.0, 0.5 / math.sqrt(shape[-2])


def golden_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    """Every parameter of `config` by its canonical name and in its canonical layout, float32."""
    weights = {}
    for name, spec in parameter_specs(config).items():
        mean, std = _spread(name, spec.shape)
        weights[name] = (mean + std * normal(name, spec.shape)).astype(np.float32)
    return weights


def golden_pixels(case: str, num_patches: int) -> np.ndarray:
    """The patches [P, C] of a case, float32: all its images and videos in order of appearance."""
    return normal(f"pixels of {case}", (num_patches, PATCH_DIM)).astype(np.float32)


def golden_image(height: int, width: int) -> np.ndarray:
    """A uint8 picture [H, W, 3]: three slopes, a product term that bends them, wrapping at 256 for
    sharp edges.
    """
    row, column, channel = np.ogrid[:height, :width, :3]
    return ((3 * row + 5 * column + 80 * channel + row * column // 7) % 256).astype(np.uint8)


def sample_indices(name: str, size: int, count: int = 32) -> np.ndarray:
    """`count` flat indices into a tensor of `size` values, spread by the hash of its name; repeats
    are possible.
    """
    return (hashed(f"samples of {name}", count) % np.uint64(size)).astype(np.int64)


def probe(name: str, size: int) -> np.ndarray:
    """A random direction [size], float64: its dot product with a flattened tensor moves with every
    entry and with their order.
    """
    return normal(f"probe of {name}", (size,))


def summary(name: str, values: np.ndarray) -> np.ndarray:
    """Four numbers that pin a tensor down, float64: L2 norm, sum, largest absolute value, product
    with its probe.
    """
    flat = np.asarray(values, np.float64).ravel()
    return np.array([np.sqrt(flat @ flat), flat.sum(), np.abs(flat).max(), flat @ probe(name, flat.size)])


def case_rows(data: Mapping[str, np.ndarray], case: str) -> list[Row]:
    """The rows of a case of `tiny_b.npz` or `tiny_c.npz`, ready for `pack`."""
    offsets, grid_n3, grid_row_n = data[f"{case}/offsets"], data[f"{case}/grid_thw"], data[f"{case}/grid_row"]
    patches_n = grid_n3.prod(1)
    pixels_PC = golden_pixels(case, int(patches_n.sum()))
    patch_row_P = np.repeat(grid_row_n, patches_n)
    rows = []
    for i, (start, end) in enumerate(itertools.pairwise(offsets)):
        ids_L, mine = data[f"{case}/input_ids"][start:end], grid_row_n == i
        rows.append(Row(ids_L, pixels_PC[patch_row_P == i], grid_n3[mine]) if mine.any() else Row(ids_L))
    return rows

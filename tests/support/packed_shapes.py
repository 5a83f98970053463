"""How the matrices of a packed folder of a shape would lie there, without the folder. Refuses to
know: files.
"""

from __future__ import annotations

from ernie_tune.export.scheme import bits_of, scheme
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import parameter_specs
from ernie_tune.peft.packed_header import PackedBits, PackedMatrix


def packed_shape(model: ModelConfig, quantization: str = "wint4", file_bytes: int = 0) -> PackedBits:
    """One bfloat16 scale a column, as an export for FastDeploy's grid has them."""
    chosen = scheme(quantization)
    bits = {name: bits_of(name, chosen) for name in parameter_specs(model)}
    return PackedBits(tuple((name, PackedMatrix(n, 1, 2)) for name, n in bits.items() if n), file_bytes)

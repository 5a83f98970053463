"""How the weights of a frozen base can be stored: one table for quantising it and for planning its
memory. Refuses to know: paddle, layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Algorithm:
    """Bits of linear layers and of experts, and whether the embedding (and with it a tied head)
    becomes int8.
    """

    linear: int
    experts: int
    embedding: bool


ALGORITHMS: dict[str, Algorithm] = {
    "weight_only_int8": Algorithm(8, 8, embedding=True),
    "weight_only_int4": Algorithm(4, 4, embedding=True),
    # as ERNIEKit and FastDeploy do
    "weight_only_mix": Algorithm(8, 4, embedding=False),
}
GROUP_ROWS = 64


# 2-D weights that are no linear layers, or stay as they are: an untied head
_NOT_LINEAR = re.compile(r"(embed_tokens|lm_head|norm|layers\.\d+\.mlp\.gate)\.")


def is_linear(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a canonical parameter is the matrix of a linear layer that may be held as codes."""
    return len(shape) == 2 and name.endswith(".weight") and not _NOT_LINEAR.match(name)


def bits_at_load(name: str, shape: tuple[int, ...], algorithm: str) -> int:
    """Bits of a canonical parameter of this shape that an algorithm makes codes of; 0: it stays."""
    chosen = ALGORITHMS[algorithm]
    if name == "embed_tokens.weight":
        return 8 if chosen.embedding else 0
    if len(shape) == 3:
        return chosen.experts
    return chosen.linear if is_linear(name, shape) else 0


def num_groups(n_in: int, bits: int) -> int:
    """Rows of the scales of a matrix with `n_in` input rows: int4 has one scale a group and column,
    int8 one a column.
    """
    return n_in // GROUP_ROWS if bits == 4 and n_in % GROUP_ROWS == 0 else 1

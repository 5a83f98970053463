"""How the weights of a frozen base can be stored: one table for quantising it and for planning its
memory. Refuses to know: paddle, layers.
"""

from __future__ import annotations

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


def num_groups(n_in: int, bits: int) -> int:
    """Rows of the scales of a matrix with `n_in` input rows: int4 has one scale a group and column,
    int8 one a column.
    """
    return n_in // GROUP_ROWS if bits == 4 and n_in % GROUP_ROWS == 0 else 1

"""Rows -> one vector each: the mean of a row's last hidden states, as retrieval uses them.

Rows are packed, so that none is padded and none sees another. Legend: N rows, D width of the model.
Refuses to know: text, HTTP, what the vectors are compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import paddle

from ernie_tune.config.language import say
from ernie_tune.models.config import TokenIds
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import Row, pack


def mean_states(model: ErnieModel, rows: Sequence[Row], tokens: TokenIds, begin_id: int) -> np.ndarray:
    """float32 [N, D]: for each row the mean of what the model's last norm gives for its tokens.

    A row's opening `begin_id` is read and not counted: it sees nothing, and is the same in all
    rows. The caller puts the model into eval mode. Raises ValueError for a row that holds nothing
    else, and where placeholders do not match the features.
    """
    packed = pack(rows, tokens)
    starts = [a + int(packed.input_ids_T[a] == begin_id) for a in packed.offsets[:-1]]
    for i, (start, end) in enumerate(zip(starts, packed.offsets[1:], strict=True)):
        if start == end:
            raise ValueError(
                say(
                    f"row {i} must hold a token beside the one that opens it; leave it out",
                    f"第 {i} 行除开头标记外须有 token；请去掉该行",
                )
            )
    with paddle.no_grad():
        hidden_TD = model(packed).astype("float32").numpy()
    ends = packed.offsets[1:]
    return np.stack([hidden_TD[a:b].mean(0, dtype=np.float64) for a, b in zip(starts, ends, strict=True)]).astype(
        np.float32
    )


def unit_vectors(vectors_ND: np.ndarray, dimensions: int | None = None) -> np.ndarray:
    """float32, each of length 1: of the first `dimensions` entries where a number is given. A
    vector of zeros stays one.
    """
    cut = vectors_ND[:, :dimensions].astype(np.float64)
    lengths = np.sqrt((cut**2).sum(1, keepdims=True))
    return (cut / np.where(lengths > 0, lengths, 1)).astype(np.float32)

"""Bottleneck adapters: h + W_up gelu(W_down h) on the output of the attention or the feed-forward,
before the residual sum (1902.00751).

Legend: T tokens, D width, w bottleneck width. Refuses to know: which layers get one, files.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle import Tensor, nn

from ernie_tune.peft.lora import draw_factor, parameter


class Bottleneck(nn.Layer):
    """`down` [D, w] and `up` [w, D], without biases; `up` is zero at the start, so the model is
    unchanged.
    """

    def __init__(self, width: int, inner: int, dtype: str, name: str, seed: int) -> None:
        super().__init__()
        self.down = parameter(self, draw_factor(name, (width, inner), seed), dtype)
        self.up = parameter(self, np.zeros((inner, width), np.float32), dtype)

    def forward(self, _module: nn.Layer, _args: tuple[Any, ...], h_TD: Tensor) -> Tensor:
        return h_TD + paddle.matmul(F.gelu(paddle.matmul(h_TD, self.down)), self.up)

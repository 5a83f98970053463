"""A model whose experts lie on ranks that hold other rows, called by each rank as often as its own
rows need.

Every forward exchanges rows with the experts of the other ranks, so all must make it together. A
rank that has nothing left to compute takes part with one token of no one's until all are done.
Refuses to know: caches, sampling, what the rows are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.models.inputs import PackedInput, Row, pack
from ernie_tune.parallel.mesh import MAX, Group


class InStep:
    """`model` with its forwards made together by `group`; all else as it is. Every rank ends with
    `finish()`.
    """

    def __init__(self, model: Any, group: Group) -> None:
        self._model, self._group = model, group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, inputs: PackedInput, **how: Any) -> Tensor:
        self._anyone(True)
        return self._model(inputs, **how)

    def finish(self) -> None:
        """Take part in what others still compute, until nobody does."""
        nothing = pack([Row(np.zeros(1, np.int64))], self._model.config.tokens)
        training = self._model.training
        self._model.eval()
        with paddle.no_grad():
            while self._anyone(False):
                self._model(nothing)
        if training:
            self._model.train()

    def _anyone(self, live: bool) -> bool:
        """Whether any rank makes a forward now."""
        flag = self._group.reduce_(paddle.to_tensor(np.array([int(live)], np.int32)), MAX)
        return bool(flag.item())

"""A process among others: what ranks that read the same rows must agree on, and forwards that ranks
make together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest

from ernie_tune.config.arguments import build
from ernie_tune.config.language import say
from ernie_tune.config.layout import Layout
from ernie_tune.machine.in_step import InStep
from ernie_tune.machine.place import Place
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset
from ernie_tune.parallel.mesh import Group, Mesh


def test_ranks_that_read_the_same_rows_must_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(build({}).parallel)
    place.check_alike([1, 2], say("answers", "回答"))  # one process agrees with itself
    ranks = (0, 1)
    place.mesh = Mesh(Layout(tensor=2), {"tensor": Group("tensor", ranks), "world": Group("world", ranks)})
    told: list[Any] = []
    monkeypatch.setattr(Group, "objects", lambda self, mine: [mine, *told])
    told[:] = [(0, 1)]
    with pytest.raises(RuntimeError, match=r"answers of rank 1 must be those of rank 0, which reads the same rows"):
        place.check_alike([1, 2], say("answers", "回答"))
    told[:] = [(1, 1)]  # it reads other rows
    place.check_alike([1, 2], say("answers", "回答"))


def test_a_rank_without_rows_takes_part_until_all_are_done() -> None:
    class Others(Group):
        """Two forwards more by somebody else, whatever this rank says."""

        def reduce_(self, x: Any, op: int) -> Any:
            said.append(int(x.item()))
            return paddle.to_tensor(np.array([int(x.item() or len(said) <= 3)], np.int32))

    said: list[int] = []
    model = ErnieModel(preset("tiny-a"))
    forwards: list[int] = []
    model.register_forward_pre_hook(lambda _layer, args: forwards.append(args[0].num_tokens))
    together = InStep(model, Others("expert", (0, 1)))
    assert together.config is model.config
    model.train()
    together.finish()
    assert model.training
    assert (said, forwards) == ([0, 0, 0, 0], [1, 1, 1])

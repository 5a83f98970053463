"""Learning from the most uncertain tokens of a round: which they are, over ranks too, and what is
left of the loss.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from ernie_tune.objectives.policy import PolicyHyper
from ernie_tune.train.policy import PolicyObjective
from ernie_tune.train.uncertain import COLUMN, mark_uncertain


def group(entropies: list[float], counts: bool = True, answers: int = 1) -> Any:
    keep_N = np.full(len(entropies), float(counts))
    length_G = np.array([len(entropies) // answers] * answers)
    return SimpleNamespace(columns={"keep_N": keep_N}, length_G=length_G, entropies=np.array(entropies))


class Told:
    """The second of two ranks, of which the first said this."""

    rank, size = 1, 2

    def __init__(self, first: list[float]) -> None:
        self.first = np.array(first)

    def gather(self, value: Any) -> list[Any]:
        return [self.first, value]


ALONE = SimpleNamespace(rank=0, size=1, gather=lambda value: [value])


def marked(groups: list[Any], quantile: float, ranks: Any = ALONE, size: int = 2) -> list[list[float]]:
    def entropies(part: Any) -> np.ndarray:
        return np.concatenate([one.entropies for one in part])

    mark_uncertain(groups, quantile, entropies, lambda part: part, size, ranks)
    return [one.columns[COLUMN].tolist() for one in groups]


def test_the_share_of_all_tokens_that_is_most_uncertain() -> None:
    groups = [group([0.1, 0.9]), group([0.5, 0.2]), group([0.8])]
    assert marked(groups, 0.4) == [[0, 1], [0, 0], [1]]
    assert marked(groups, 0.4, size=1) == [[0, 1], [0, 0], [1]]  # however it is cut
    assert marked(groups, 1.0) == [[1, 1], [1, 1], [1]]


def test_answers_that_count_for_nothing_are_not_counted() -> None:
    groups = [group([9.0, 8.0], counts=False), group([0.1, 0.2, 0.3, 0.4])]
    assert marked(groups, 0.5) == [[0, 0], [0, 0, 1, 1]]


def test_of_all_ranks_together() -> None:
    assert marked([group([0.1, 0.6]), group([0.3])], 0.5, Told([0.2, 0.9, 0.8])) == [[0, 1], [0]]
    assert marked([group([0.1, 0.6]), group([0.3])], 0.5) == [[0, 1], [1]]


def test_the_others_stay_in_the_divisor() -> None:
    logp_N = paddle.to_tensor([-1.0, -2.0, -3.0, -0.5])
    logp_N.stop_gradient = False
    columns = {
        "old_logp_N": logp_N.numpy().astype(np.float64), "sampled_logp_N": logp_N.numpy().astype(np.float64),
        "advantage_N": np.array([1.0, 1.0, -1.0, -1.0]), "keep_N": np.ones(4), COLUMN: np.array([1.0, 0.0, 0.0, 1.0]),
    }  # fmt: skip
    batch: Any = SimpleNamespace(columns=columns, candidate_N=np.array([0, 0, 1, 1]), length_C=np.array([2, 2]))
    objective = PolicyObjective(PolicyHyper("dapo"))
    assert objective.begin(objective.counts([batch])) == 1
    objective.loss({"logp_N": logp_N}, batch).total.backward()
    np.testing.assert_allclose(logp_N.grad.numpy(), [-0.25, 0, 0, 0.25], atol=1e-7)


def test_a_share_that_is_none() -> None:
    with pytest.raises(ValueError, match="top_entropy_quantile"):
        marked([group([0.1])], 0.0)

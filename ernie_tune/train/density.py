"""Weights of bad answers by their prompts, for BCO: what the policy makes of each prompt before
training, a classifier on it, a weight by the answer's key.

TRL asks an embedding model of its own; here the state of the prompt's last token, after the model's
last norm, is what the prompt looks like, pictures and all. Refuses to know: the classifier's
arithmetic and the loss (objectives), which rows there are. Legend: C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import Text, say
from ernie_tune.data.units import UnitBatch
from ernie_tune.machine.stages import frozen_outputs
from ernie_tune.objectives.density import PromptClassifier, density_ratio
from ernie_tune.objectives.objective import Outputs

# answers of each kind that the classifier learns from, at most (TRL's prompt_sample_size)
FITTED = 1024


class PromptDensity:
    """`fit` on some rows, `measure` all that will be seen, both while the policy is what training
    starts from; then `attached`.
    """

    def __init__(self, asked: Any, low: float, high: float) -> None:
        self.asked, self.low, self.high = asked, low, high
        self.weights: dict[str, float] = {}
        self.accuracy = 0.0  # of the classifier, on what it was fitted to
        self._classifier: PromptClassifier | None = None

    def fit(self, batches: Iterable[UnitBatch]) -> None:
        """Learn to tell prompts of good answers from those of bad ones. Raises ValueError where one
        kind is missing.
        """
        states: dict[bool, list[np.ndarray]] = {True: [], False: []}
        for batch in batches:
            if all(good is None for _, good in _labelled(batch)):
                continue
            state_CD = self._states(batch)
            for i, (_, good) in enumerate(_labelled(batch)):
                if good is not None and len(states[good]) < FITTED:
                    states[good].append(state_CD[i])
            if min(map(len, states.values())) == FITTED:
                break
        x_ND, good_N = np.array(states[True] + states[False]), np.repeat([True, False], [*map(len, states.values())])
        self._classifier = PromptClassifier.fit(x_ND, good_N)
        self.accuracy = float(((self._classifier.logit(x_ND) > 0) == good_N).mean())

    def measure(self, batches: Iterable[UnitBatch]) -> None:
        """Weigh the bad answers of these rows."""
        assert self._classifier is not None
        for batch in batches:
            if all(good is not False for _, good in _labelled(batch)):
                continue
            weight_C = density_ratio(self._classifier.logit(self._states(batch)), self.low, self.high)
            for (key, good), weight in zip(_labelled(batch), weight_C.tolist(), strict=True):
                if good is False:
                    self.weights[key] = weight

    def _states(self, batch: UnitBatch) -> np.ndarray:
        return frozen_outputs(self.asked, prompt_states, batch)["state_CD"].astype(np.float64)

    def attached(self, batch: UnitBatch) -> UnitBatch:
        """The batch with column density_C. Raises ValueError for a bad answer that was not
        measured: the policy it would be measured with is gone.
        """
        weights = []
        for (key, good), where in zip(_labelled(batch), [u.where for u in batch.units for _ in u.keys], strict=True):
            if good is False and key not in self.weights:
                raise ValueError(
                    say(
                        f"{where}: row must be among those that bco_density has measured before training; data "
                        "must not change in a run, start again",
                        f"{where}：该行须在训练前经 bco_density 测量；运行中数据不能改变，请重新开始",
                    )
                )
            weights.append(1.0 if good is not False else self.weights[key])
        return batch.with_columns(density_C=np.array(weights))

    def line(self) -> Text:
        """What to tell of it."""
        weight = np.array(list(self.weights.values()))
        low, high = (float((weight == bound).mean()) for bound in (self.low, self.high))
        n, mean = len(weight), f"{weight.mean():.3g}"
        return say(
            f"bco_density: prompts of good and bad answers are told apart with accuracy {self.accuracy:.2f}; weights "
            f"of {n} bad answers: mean {mean}, {low:.0%} at bco_density_min, {high:.0%} at bco_density_max",
            f"bco_density：好坏回答的提问可区分，准确率 {self.accuracy:.2f}；{n} 个坏回答的权重：平均 {mean}，"
            f"{low:.0%} 为 bco_density_min，{high:.0%} 为 bco_density_max",
        )


def _labelled(batch: UnitBatch) -> list[tuple[str, bool | None]]:
    """(key, whether it is called good; None for what is judged otherwise) of each candidate."""
    return [
        (key, bool(good) if unit.signal == "label" else None)
        for unit in batch.units
        for key, good in zip(unit.keys, unit.label_C.tolist(), strict=True)
    ]


def prompt_states(model: Any, hidden_TD: Tensor, batch: UnitBatch) -> Outputs:
    """state_CD: the state before each candidate's first target, [C, D]: that of its prompt's last
    token.
    """
    first_C = np.searchsorted(batch.candidate_N, np.arange(len(batch.length_C)))
    return {"state_CD": paddle.gather(hidden_TD, paddle.to_tensor(batch.source_N[first_C])).astype("float32")}

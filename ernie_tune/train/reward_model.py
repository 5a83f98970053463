"""A reward model: one scalar for a finished dialogue, from a bias-free head on its last token, and
cuts that make ratings of it. Head and objective.

The head reads the state after the model's last norm and is kept beside the model's or adapter's own
files. Refuses to know: loops, verbs, which rows.
Legend: T tokens, D width, C candidates, P pairs, K cuts between the levels of ratings.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from ernie_tune.checkpoint.tensors import TensorReader
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.config.language import say
from ernie_tune.data.units import UnitBatch
from ernie_tune.machine.stages import frozen_outputs
from ernie_tune.models.ernie import Elsewhere, ErnieModel
from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.objective import Outputs
from ernie_tune.objectives.preference import Pairs
from ernie_tune.objectives.reward import (
    even_cuts,
    expected_rating,
    levels_of,
    ordered_cuts,
    reward_metrics,
    reward_ordinal_loss,
    reward_pair_loss,
    reward_regression_loss,
)
from ernie_tune.objectives.unpaired import Labels
from ernie_tune.train.preference import Margins, pairs_of

# a folder of its own: the other files keep the form that other tools know
HEAD_FOLDER = "reward_head"
_PREFIX = "reward_head."


class RewardHead(nn.Layer):
    """[D] -> scalar without bias, N(0, 1/(D+1)) at the start; float32. With `levels`: what the cuts
    between so many levels of ratings are made of, too.
    """

    def __init__(self, width: int, seed: int = 0, levels: int = 0, dtype: str = "float32") -> None:
        super().__init__()
        fresh = np.random.default_rng(seed).standard_normal((width, 1)).astype(np.float32) / np.sqrt(width + 1)
        self.weight = self.create_parameter(
            [width, 1], dtype=dtype, default_initializer=nn.initializer.Assign(fresh.astype(np.float32))
        )
        self.thresholds: Tensor | None = None
        if levels:
            free_K = even_cuts(levels).astype(np.float32)
            self.thresholds = self.create_parameter(
                [levels - 1], dtype=dtype, default_initializer=nn.initializer.Assign(free_K)
            )

    def cuts(self) -> Tensor | None:
        """Where one level ends and the next begins, [K], rising; None for a head without."""
        return None if self.thresholds is None else ordered_cuts(self.thresholds)

    def forward(self, x_CD: Tensor) -> Tensor:
        return paddle.matmul(x_CD.astype(self.weight.dtype), self.weight).squeeze(-1)


def head_dtype(model: ErnieModel) -> str:
    """What a head on this model computes in: float32 beside bfloat16, too."""
    return "float64" if model.compute_dtype == "float64" else "float32"


def attach_head(model: ErnieModel, seed: int = 0, levels: int = 0) -> RewardHead | Elsewhere:
    """Give the model a fresh trained head, or return what it has: on a pipeline stage without the
    last layer, what stands in for one.
    """
    if "reward_head" not in dict(model.named_children()):
        model.add_sublayer("reward_head", RewardHead(model.config.hidden_size, seed, levels, head_dtype(model)))
    head: RewardHead | Elsewhere = model.reward_head
    return head


def head_values(model: ErnieModel) -> dict[str, np.ndarray] | None:
    """The head's weight [D, 1] and what its cuts are made of [K], where it has any; None on a
    pipeline stage that has no head.
    """
    head = attach_head(model)
    if isinstance(head, Elsewhere):
        return None
    return {_PREFIX + name: value.numpy() for name, value in head.named_parameters()}


def save_head(values: Mapping[str, np.ndarray], folder: str | os.PathLike[str]) -> None:
    """Write what `head_values` gave into `folder`/reward_head, whole or not at all."""
    entries = {name: (value.shape, "F32") for name, value in values.items()}
    write_folder(Path(folder) / HEAD_FOLDER, entries, values.__getitem__, metadata={"format": "np"})


def read_head(folder: str | os.PathLike[str]) -> RewardHead:
    """The saved head by itself. Raises ValueError where there is none."""
    place = Path(folder) / HEAD_FOLDER
    if not place.is_dir():
        raise ValueError(
            say(
                f"{folder} must hold {HEAD_FOLDER}/; train a reward model with `ernie-tune reward`, or "
                "name its output_dir",
                f"{folder} 中须有 {HEAD_FOLDER}/；请用 `ernie-tune reward` 训练奖励模型，或给出其 output_dir",
            )
        )
    reader = TensorReader(place)
    found = {name.removeprefix(_PREFIX): np.array(reader.read(name)) for name in reader.shapes}
    head = RewardHead(len(found["weight"]), levels=len(found["thresholds"]) + 1 if "thresholds" in found else 0)
    for name, parameter in head.named_parameters():
        parameter.set_value(paddle.to_tensor(found[name]))
    return head


def load_head(model: ErnieModel, folder: str | os.PathLike[str]) -> None:
    """Put the saved head on the model, or on the stage of it that has one. Raises ValueError where
    there is none, one of another width, or one with other levels of ratings than the model's has.
    """
    place, saved = Path(folder) / HEAD_FOLDER, read_head(folder)
    levels = _levels(saved)
    head = attach_head(model, levels=levels)
    if isinstance(head, Elsewhere):
        return
    if saved.weight.shape != head.weight.shape:
        raise ValueError(
            say(
                f"{place}: head {list(saved.weight.shape)} must be {list(head.weight.shape)} for this "
                "model; load it on its own model",
                f"{place}：打分头 {list(saved.weight.shape)} 须为该模型的 {list(head.weight.shape)}"
                "；请在它自己的模型上加载",
            )
        )
    if levels != _levels(head):
        raise ValueError(
            say(
                f"{place}: head with {levels} levels of ratings must have {_levels(head)}, as rating_loss and "
                "rating_levels say; set them to those it was trained with",
                f"{place}：打分头有 {levels} 个评分等级，按 rating_loss 与 rating_levels 应为 {_levels(head)}"
                "；请设为训练时的值",
            )
        )
    values = dict(saved.named_parameters())
    for name, parameter in head.named_parameters():
        parameter.set_value(values[name].astype(parameter.dtype))


def _levels(head: RewardHead) -> int:
    return 0 if head.thresholds is None else int(head.thresholds.size) + 1


class RewardObjective:
    """-log sigma(s_w - s_l - m) + c (s_w + s_l)^2 over all comparisons of a batch; those of one row
    share its weight (edge_weight "unit").

    rating_loss "regression": rated answers are not compared; their rewards are to be their scores
    on [0, 1], (s - q)^2, a row one unit, a mean of its own.
    "ordinal": nor are they then; their rewards are to lie between the head's cuts around their
    level, one of as many as the head has.
    """

    def __init__(
        self,
        center: float = 0.01,
        margins: Margins | None = None,
        edge_weight: str = "unit",
        rating_loss: str = "pairs",
        levels: int = 5,
    ) -> None:
        self.center, self.margins, self.edge_weight = center, margins or Margins(), edge_weight
        self.rating_loss, self.levels = rating_loss, levels
        self._counts: dict[str, float] = {}

    def _learned(self, batch: UnitBatch) -> tuple[Pairs, Pairs, Labels]:
        """(every comparison, those with a weight, rated answers)."""
        pairs = pairs_of(batch, self.margins, self.edge_weight)
        if self.rating_loss == "pairs":
            return pairs, pairs, Labels.of([], [])
        labels = ratings_of(batch)
        keep = ~np.isin(pairs.better_P, labels.index_M)
        compared = Pairs(*(v[keep] for v in (pairs.better_P, pairs.worse_P, pairs.weight_P, pairs.margin_P, pairs.p_P)))
        return pairs, compared, labels

    def counts(self, window: Sequence[UnitBatch]) -> dict[str, float]:
        parts = [self._learned(batch)[1:] for batch in window]
        if self.rating_loss == "ordinal":  # here a row still has a name
            for unit in (u for batch in window for u in batch.units if u.signal == "rating"):
                levels_of(unit.score_C, self.levels, unit.where)
        return {
            "pair": float(sum(pairs.weight_P.sum() for pairs, _ in parts)),
            "rating": float(sum(labels.weight_M.sum() for _, labels in parts)),
        }

    def begin(self, counts: Mapping[str, float]) -> float:
        if not any(counts.values()):
            raise ValueError(
                say(
                    "rows of a window must compare at least two answers; add pairs, rankings or ratings of "
                    "several answers, or set rating_loss: regression",
                    "一个窗口内的数据至少要比较两个回答；请补充成对、排序或多回答评分的数据，或设 "
                    "rating_loss: regression",
                )
            )
        self._counts = dict(counts)
        return 1.0  # each term has its own divisor

    def outputs(self, model: Any, hidden_TD: Tensor, batch: UnitBatch) -> Outputs:
        return rewards(model, hidden_TD, batch)

    def loss(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        reward_C = outputs["reward_C"]
        pairs, compared, labels = self._learned(batch)
        terms = {"pair": reward_pair_loss(reward_C, compared, self.center)}
        if self.rating_loss == "regression":
            terms["rating"] = reward_regression_loss(reward_C, labels)
        if self.rating_loss == "ordinal":
            terms["rating"] = reward_ordinal_loss(reward_C, outputs["cut_K"], labels)
        out = combine(terms, dict.fromkeys(terms, 1.0), self._counts)
        named = out.metrics if len(terms) > 1 else {}
        found = {**named, **reward_metrics(reward_C, pairs)}
        if len(labels):
            error_M = (
                self.predicted({name: x.detach().numpy() for name, x in outputs.items()})[labels.index_M]
                - labels.good_M
            )
            found["rating_mae"] = (float(np.abs(error_M).sum()), float(len(labels)))
        return LossOut(out.total, out.count, found)

    def predicted(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The rating on [0, 1] that each answer's reward stands for, [C]: itself, or the mean of
        its level.
        """
        reward_C = outputs["reward_C"]
        return expected_rating(reward_C, outputs["cut_K"]) if self.rating_loss == "ordinal" else reward_C

    def end(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        """Nothing runs along."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


def ratings_of(batch: UnitBatch) -> Labels:
    """The answers of rating rows with their scores on [0, 1]; those of a row share its weight."""
    units = zip(batch.units, batch.first_candidate_U.tolist(), strict=True)
    rated = [
        (first + c, u.score_C[c], u.weight / u.num_candidates)
        for u, first in units
        if u.signal == "rating"
        for c in range(u.num_candidates)
    ]
    index = np.array([i for i, _, _ in rated], np.int64)
    return Labels(index, np.array([q for _, q, _ in rated]), np.array([w for _, _, w in rated]))


def rewards(model: Any, hidden_TD: Tensor, batch: UnitBatch, head: RewardHead | None = None) -> Outputs:
    """reward_C, one for each candidate, and cut_K, where the head has any: only the last stage of a
    pipeline has it, and the loss knows no model. `head`: one that is not on the model.
    """
    head = head or model.reward_head
    reward_C: Tensor = head(paddle.gather(hidden_TD, paddle.to_tensor(batch.end_C)))
    cut_K = head.cuts()
    return {"reward_C": reward_C} if cut_K is None else {"reward_C": reward_C, "cut_K": cut_K}


def rewards_of(
    model: Any, batches: Iterable[UnitBatch], head: RewardHead | None = None
) -> Iterable[dict[str, np.ndarray]]:
    """What `rewards` gives of each batch, without gradients and dropout."""
    return (frozen_outputs(model, functools.partial(rewards, head=head), batch) for batch in batches)

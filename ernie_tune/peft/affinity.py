"""Which experts a task uses: a table from a few calibration batches, and the smallest set that
carries a given share (2407.01906, ESFT).

Legend: T tokens of one modality, E experts, k choices per token. Refuses to know: adapters, data
formats.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import paddle
import paddle.nn.functional as F

from ernie_tune.config.language import say
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import PackedInput
from ernie_tune.models.moe import RouterRecord, RouterTap
from ernie_tune.models.specs import MODALITIES
from ernie_tune.peft.config import Expert

MEASURES = ("gate", "token")
# (layer, modality) -> share of each expert [E], float64, sum 1
Affinity = dict[tuple[int, str], np.ndarray]


def affinity(model: ErnieModel, batches: Iterable[PackedInput], measure: str = "gate") -> Affinity:
    """Mean over all tokens of the weight an expert gets ("gate"), or its share of the (token,
    choice) pairs ("token").

    Modalities without tokens are absent. Raises ValueError for another measure, no batches, or a
    model without experts.
    """
    if measure not in MEASURES:
        raise ValueError(
            say(
                f"measure ({measure!r}) must be one of {MEASURES}; 'gate' weighs choices, 'token' counts them",
                f"measure（{measure!r}）须为 {MEASURES} 之一；'gate' 按权重计，'token' 按次数计",
            )
        )
    if model.config.moe is None:
        raise ValueError(
            say(
                "affinity must be measured on a model with experts, but moe is None; drop it for dense models",
                "亲和度须在有专家的模型上测量，而 moe 为 None；稠密模型请不用它",
            )
        )
    totals: Affinity = {}
    training = model.training
    model.eval()
    with paddle.no_grad():
        for inputs in batches:
            tap = RouterTap(keep=True)
            model(inputs, tap=tap)
            for record in tap.records:
                key = (record.layer, MODALITIES[record.modality])
                totals[key] = totals.get(key, 0.0) + _shares(record, measure)
    if training:
        model.train()
    if not totals:
        raise ValueError(
            say(
                "batches (0) must be at least 1; pass some packed rows of the task",
                "batches（0）至少为 1；请传入一些该任务打包好的行",
            )
        )
    return {key: total / total.sum() for key, total in sorted(totals.items())}


def _shares(record: RouterRecord, measure: str) -> np.ndarray:
    """Sum over tokens of each expert's share, [E]."""
    chosen_Tk = record.chosen_Tk.numpy()
    experts = record.logits_TE.shape[1]
    if measure == "token":
        weight_Tk = np.full(chosen_Tk.shape, 1 / chosen_Tk.shape[1])
    else:
        probs_TE = F.softmax(record.logits_TE, axis=-1).numpy().astype(np.float64)
        picked_Tk = np.take_along_axis(probs_TE, chosen_Tk, 1)
        weight_Tk = picked_Tk / picked_Tk.sum(1, keepdims=True)
    return np.bincount(chosen_Tk.reshape(-1), weight_Tk.reshape(-1), experts)


def select_experts(table: Affinity, share: float) -> tuple[Expert, ...]:
    """For every layer and modality the fewest experts whose affinities add up to `share` (ESFT: 0.1
    to 0.2), as `LoraConfig.expert_targets`.
    """
    if not 0 < share <= 1:
        raise ValueError(
            say(
                f"share ({share}) must be in (0, 1]; 0.1 to 0.2 is usual",
                f"share（{share}）须在 (0, 1] 内；通常为 0.1 到 0.2",
            )
        )
    chosen: list[Expert] = []
    for (layer, modality), share_E in table.items():
        order = np.argsort(-share_E, kind="stable")
        # A sum that misses `share` by rounding alone counts as reached.
        count = int(np.searchsorted(np.cumsum(share_E[order]), share - 1e-9)) + 1
        chosen += [(layer, modality, int(expert)) for expert in sorted(order[:count])]
    return tuple(chosen)

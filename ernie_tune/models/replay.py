"""Router replay: which experts the tokens of sampled answers went to when they were sampled, and
the same choice again when they are learned from (arXiv 2510.11370).

Refuses to know: how routers choose (models/moe.py), who samples and when, losses. Legend: T tokens
of a pack, M tokens of all dialogues (shared ones once for each), L mixture-of-experts layers in
their order, k choices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import paddle

from ernie_tune.models.config import ModelConfig
from ernie_tune.models.inputs import PackedInput
from ernie_tune.models.moe import RouterTap

COLUMN = "experts_MLk"
UNKNOWN = -1


def moe_layers(config: ModelConfig) -> list[int]:
    """The layers that have routers."""
    return [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]


def chosen_experts(tap: RouterTap, inputs: PackedInput, config: ModelConfig) -> np.ndarray:
    """What a forward with `ids_only` noted, [T, L, k]: each token has one modality, so one choice a
    layer.
    """
    assert config.moe is not None
    rank = {layer: i for i, layer in enumerate(moe_layers(config))}
    out_TLk = np.full((inputs.num_tokens, len(rank), config.moe.top_k), UNKNOWN, np.int16)
    for layer, modality, ids_Tk in tap.chosen:
        out_TLk[np.flatnonzero(inputs.vision_T == bool(modality)), rank[layer]] = ids_Tk
    return out_TLk


def recorded(forward: Any, batch: Any, config: ModelConfig) -> np.ndarray:
    """The experts of all tokens of a batch by the policy as it is now, [M, L, k]; no graph."""
    tap, training = RouterTap(ids_only=True), forward.training
    forward.eval()
    with paddle.no_grad():
        forward(batch.inputs, tap=tap)
    if training:
        forward.train()
    return chosen_experts(tap, batch.inputs, config)[batch.place_M]


def forced_experts(batch: Any, config: ModelConfig) -> Mapping[int, np.ndarray] | None:
    """What routers of a forward over the batch are to choose, by layer; None: what they like."""
    known_MLk = getattr(batch, "columns", {}).get(COLUMN)
    if known_MLk is None:
        return None
    out_TLk = np.full((batch.inputs.num_tokens, *known_MLk.shape[1:]), UNKNOWN, known_MLk.dtype)
    out_TLk[batch.place_M] = known_MLk
    return {layer: out_TLk[:, i] for i, layer in enumerate(moe_layers(config))}


def of_completions(completions: Sequence[Any], lengths: Sequence[int]) -> np.ndarray | None:
    """The experts of dialogues of these lengths as the sampling engine noted them, [M, L, k]; the
    last token of each was never read. None where it noted none.
    """
    parts = []
    for completion, length in zip(completions, lengths, strict=True):
        if not completion.experts:
            return None
        known = np.concatenate(completion.experts)
        rest = np.full((length - len(known), *known.shape[1:]), UNKNOWN, known.dtype)
        parts.append(np.concatenate([known, rest]))
    return np.concatenate(parts)

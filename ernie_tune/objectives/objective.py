"""What a loop asks of a method's loss: a micro-batch in, a LossOut out, cut in two for pipelines.

`outputs` turns final hidden states into what the loss is made of, on the last stage, where the head
is; `loss` is arithmetic on them. Refuses to know: which methods there are, models' classes, where
batches come from, optimizers. Legend: T tokens, D width, N target tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.objectives.logprobs import supported_logp, token_logp, token_logp_and_entropy
from ernie_tune.objectives.loss import LossOut

# Tensors by name, each with its axes at the end of it: logp_N, entropy_N, value_N, reward_C, cut_K,
# state_CD. All of a micro-batch's are made on the stage that has the head, and travel together to
# whoever asks for them without a gradient.
Outputs = Mapping[str, Tensor]


class Objective(Protocol):
    """What the loop asks of a method."""

    def counts(self, window: Sequence[Any]) -> dict[str, float]:
        """What this rank's micro-batches of one window add to the divisors, by name. The loop sums
        them over all data ranks."""

    def begin(self, counts: Mapping[str, float]) -> float:
        """Called once per window with the global counts, before its micro-batches; returns what
        every `loss` is divided by."""

    def outputs(self, model: Any, hidden_TD: Tensor, batch: Any) -> Outputs:
        """What the loss is made of, by name, from the final hidden states. `model` offers
        `head_weight()`."""

    def loss(self, outputs: Outputs, batch: Any) -> LossOut:
        """The micro-batch's share of the window's loss. Pure but for what `begin` noted."""

    def end(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        """Called once per window with its summed metrics, after the optimizer step."""

    def state_dict(self) -> dict[str, Any]:
        """What runs along from window to window (JSON)."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""


class Targets(Protocol):
    """A batch that says which token of the pack predicts which id."""

    @property
    def source_N(self) -> np.ndarray: ...

    @property
    def target_N(self) -> np.ndarray: ...


SUPPORT = "support_NK"  # the column of ids that targets were sampled from, where not from all


def target_logp(
    model: Any, hidden_TD: Tensor, batch: Targets, temperature: float = 1.0, banned: Sequence[int] = ()
) -> Tensor:
    """Log-probability of each target, [N] float32; the head runs on target positions only.
    `temperature` and `banned`: see `token_logp`; a batch that says what its targets were sampled
    from is read over that.
    """
    return _read(model, hidden_TD, batch, temperature, banned, entropy=False)[0]


def _read(
    model: Any, hidden_TD: Tensor, batch: Targets, temperature: float, banned: Sequence[int], entropy: bool
) -> tuple[Tensor, Tensor | None]:
    weight, transposed = model.head_weight()
    hidden_ND = paddle.gather(hidden_TD, paddle.to_tensor(batch.source_N))
    support_NK = getattr(batch, "columns", {}).get(SUPPORT)
    if support_NK is not None:
        how: dict[str, Any] = {"transposed": transposed, "temperature": temperature}
        return supported_logp(hidden_ND, weight, batch.target_N, support_NK, **how)
    target_N = paddle.to_tensor(batch.target_N)
    how = {"transposed": transposed, "temperature": temperature, "banned": banned}
    if entropy:
        return token_logp_and_entropy(hidden_ND, weight, target_N, **how)
    return token_logp(hidden_ND, weight, target_N, **how), None


def logp_outputs(
    model: Any, hidden_TD: Tensor, batch: Targets, temperature: float = 1.0, banned: Sequence[int] = ()
) -> Outputs:
    """`target_logp` as an objective's outputs: logp_N."""
    return {"logp_N": target_logp(model, hidden_TD, batch, temperature, banned)}


def logp_and_entropy(
    model: Any, hidden_TD: Tensor, batch: Targets, temperature: float = 1.0, banned: Sequence[int] = ()
) -> Outputs:
    """The same, and the entropy of each target's whole distribution in nats: entropy_N."""
    logp_N, entropy_N = _read(model, hidden_TD, batch, temperature, banned, entropy=True)
    assert entropy_N is not None
    return {"logp_N": logp_N, "entropy_N": entropy_N}

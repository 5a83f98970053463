"""The critic of learning from sampled answers: what it says of every answer token, its loss, and
the steps in which policy and critic learn side by side.

The value of a token is that of the state before it: read where the token is predicted, not where it
lies. The critic is another adapter and a scalar head on the policy's own model, which then costs no
second copy, or a model of its own. Refuses to know: settings, files, where rewards come from.
Legend: T tokens of the pack, D width, N trained tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.data.units import UnitBatch
from ernie_tune.machine.placed import Placed
from ernie_tune.machine.stages import frozen_outputs
from ernie_tune.models.ernie import Elsewhere, ErnieModel
from ernie_tune.models.replay import COLUMN as EXPERTS
from ernie_tune.objectives.loss import LossOut, combine
from ernie_tune.objectives.objective import Outputs
from ernie_tune.objectives.policy import KlControl
from ernie_tune.objectives.value import value_loss
from ernie_tune.peft.model import PeftModel
from ernie_tune.train.loop import Loop, StepRecord
from ernie_tune.train.reward_model import RewardHead, head_dtype
from ernie_tune.train.rollouts import Rolled

ADAPTER = "critic"  # name of its adapter, where it shares the policy's model
HEAD = "value_head"


def attach_value_head(model: ErnieModel) -> RewardHead | Elsewhere:
    """Give the model a head that says 0 everywhere, or return what it has: before anything is known
    the advantage of an answer is then its return. On a pipeline stage without the last layer, what
    stands in for one."""
    if HEAD not in dict(model.named_children()):
        head = RewardHead(model.config.hidden_size, dtype=head_dtype(model))
        head.weight.set_value(paddle.zeros_like(head.weight))
        model.add_sublayer(HEAD, head)
    found: RewardHead | Elsewhere = vars(model)["_sub_layers"][HEAD]
    return found


def values(model: Any, hidden_TD: Tensor, batch: UnitBatch) -> Outputs:
    """value_N of the states in which the batch's targets are predicted."""
    return {"value_N": model.value_head(paddle.gather(hidden_TD, paddle.to_tensor(batch.source_N)))}


class ValueScale:
    """The unit that a critic thinks in: mean and deviation of all returns so far, so that what it
    learns are differences, however large rewards are and wherever they lie (value normalisation,
    arXiv 2103.01955; 1602.07714 without its correction of the head). State: what was seen, and the
    unit in which the newest values were noted.
    """

    def __init__(self) -> None:
        self.seen = np.zeros(3)  # count, sum, sum of squares
        self.noted = (0.0, 1.0)

    @property
    def unit(self) -> tuple[float, float]:
        """(mean, deviation); (0, 1) before anything was seen, or where all returns were alike."""
        count, total, squares = self.seen
        if count < 2:
            return 0.0, 1.0
        mean = total / count
        deviation = math.sqrt(max(squares / count - mean * mean, 0.0))
        return float(mean), deviation if deviation > 1e-6 else 1.0

    def take(self, return_N: np.ndarray, gather: Callable[[Any], list[Any]]) -> None:
        """A round's returns, whose values were noted in the unit of before. All ranks call it."""
        self.noted = self.unit
        sums = np.array([len(return_N), return_N.sum(), (return_N**2).sum()], np.float64)
        self.seen = self.seen + np.sum(gather(sums), axis=0)

    def real(self, thought_N: np.ndarray) -> np.ndarray:
        """Values from what the head says now."""
        mean, deviation = self.unit
        return mean + deviation * thought_N

    def thought(self, value_N: np.ndarray, return_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(what the head said when the values were noted, what it is to say)."""
        (before, width), (mean, deviation) = self.noted, self.unit
        return (value_N - before) / width, (return_N - mean) / deviation

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen.tolist(), "noted": list(self.noted)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.noted = np.array(state["seen"]), (state["noted"][0], state["noted"][1])


class ValueObjective:
    """`coef` times the clipped squared error of values (`value_loss`), a mean over the tokens of
    all answers that count in the window, over all ranks; in the unit of `scale`, where one is
    given.
    """

    def __init__(self, coef: float = 0.1, cliprange: float | None = 0.2, scale: ValueScale | None = None) -> None:
        self.coef, self.cliprange, self.scale = coef, cliprange, scale
        self._counts: dict[str, float] = {}

    def counts(self, window: Sequence[UnitBatch]) -> dict[str, float]:
        return {"vf": float(sum(batch.columns["keep_N"].sum() for batch in window))}

    def begin(self, counts: Mapping[str, float]) -> float:
        self._counts = dict(counts)
        return 1.0  # the term has its own divisor

    def outputs(self, model: Any, hidden_TD: Tensor, batch: UnitBatch) -> Outputs:
        return values(model, hidden_TD, batch)

    def loss(self, outputs: Outputs, batch: UnitBatch) -> LossOut:
        c = batch.columns
        old_N, return_N = c["value_N"], c["return_N"]
        if self.scale is not None:
            old_N, return_N = self.scale.thought(old_N, return_N)
        out = value_loss(outputs["value_N"], old_N, return_N, c["keep_N"], self.cliprange)
        return combine({"vf": out}, {"vf": self.coef}, self._counts, "critic/{}_loss")

    def end(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        """Nothing runs along."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


class Critic:
    """A critic at work. `placed`: its model on the mesh, with an engine for what of it is trained.
    `policy_adapter`: the adapter that acts for the policy on the same model; None for a critic with
    a model of its own. `scale`: the unit that its head thinks in; None: that of the rewards.
    """

    def __init__(self, placed: Placed, policy_adapter: str | None = None, scale: ValueScale | None = None) -> None:
        self.placed, self.policy_adapter, self.scale = placed, policy_adapter, scale

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """A `with` in which the critic is what acts and what is trained; the policy after it."""
        if self.policy_adapter is None:
            yield
            return
        with critic_of(self.placed.model, self.policy_adapter):
            yield

    def trained(self) -> dict[str, Tensor]:
        """What its optimizer moves, by name; on a mesh this rank's parts."""
        with self.learning():
            return self.placed.trained()

    def values(self, batch: UnitBatch) -> np.ndarray:
        """What it says of the batch's tokens, [N], without gradients and dropout."""
        model = self.placed.model
        shared = isinstance(model, PeftModel) and self.policy_adapter is not None
        with model.acting(ADAPTER) if shared else contextlib.nullcontext():
            found_N = frozen_outputs(self.placed.forward, values, batch)["value_N"].astype(np.float64)
        return found_N if self.scale is None else self.scale.real(found_N)


@contextlib.contextmanager
def critic_of(model: ErnieModel, policy_adapter: str) -> Iterator[None]:
    """A `with` in which the critic's adapter and head are trained instead of the policy's."""
    assert isinstance(model, PeftModel)
    _train(model, ADAPTER, head=True)
    try:
        yield
    finally:
        _train(model, policy_adapter, head=False)


def _train(model: PeftModel, adapter: str, head: bool) -> None:
    model.set_adapter(adapter)
    for parameter in attach_value_head(model).parameters():
        parameter.stop_gradient = not head


class ActorCritic(Loop):
    """The policy's loop with the critic's beside it: a window goes through both, each with its own
    optimizer and rate. In the first `warmup` steps the critic learns alone: the policy stays, steps
    and schedules go on. The loss told is the sum of both."""

    def __init__(self, actor: Loop, critic: Critic, make_loop: Callable[[Placed], Loop], warmup: int = 0) -> None:
        super().__init__(actor.model, actor.objective, actor.optimizer, actor.schedule, actor.settings, actor.engine)
        self.critic, self.warmup = critic, warmup
        with critic.learning():
            self.beside = make_loop(critic.placed)

    def _step(self, window: Sequence[Any], start: float) -> StepRecord:
        self.beside.step = self.step
        with self.critic.learning():
            learned = next(self.beside.steps([_valued(window)]))
        acted = self._stay(learned, start) if self.step < self.warmup else super()._step(window, start)
        told = {"critic/grad_norm": learned.grad_norm, "critic/learning_rate": learned.learning_rate}
        metrics = {**acted.metrics, **learned.metrics, **told}
        if "clip_ratio/region_mean" in metrics:
            metrics["actor/pg_clipfrac"] = metrics["clip_ratio/region_mean"]
        return dataclasses.replace(acted, loss=acted.loss + learned.loss, metrics=metrics)

    def _stay(self, learned: StepRecord, start: float) -> StepRecord:
        """A step in which the policy does not move."""
        self.step += 1
        seconds = time.perf_counter() - start
        self.tokens, self.rows = self.tokens + learned.num_tokens, self.rows + learned.num_rows
        self.seconds += seconds
        # The critic's gradient: one of 0 would say that nothing is learned.
        norm = learned.grad_norm
        return StepRecord(self.step, 0.0, 0.0, norm, learned.num_tokens, learned.num_rows, seconds)


def _valued(window: Sequence[UnitBatch]) -> list[UnitBatch]:
    """What a critic learns from: no rows that ride along, of which no return is known, and with
    routers that choose for themselves, as they did when its values were noted.
    """
    known = [batch for batch in window if "return_N" in batch.columns]
    return [
        dataclasses.replace(b, columns={name: x for name, x in b.columns.items() if name != EXPERTS}) for b in known
    ]


# --- what there is to say of a round --------------------------------------------------------------

Gather = Callable[[Any], list[Any]]


class RoundOfCritic:
    """What a round of judged answers says of the critic and of the penalty, the penalty's next
    coefficient, and the critic's unit. State: coefficient and unit."""

    def __init__(self, control: KlControl, gather: Gather, scale: ValueScale | None = None) -> None:
        self.control, self.gather, self.scale = control, gather, scale

    def look(self, groups: Sequence[Rolled]) -> dict[str, float]:
        """Means, least and greatest over the answers that count of all ranks: critic/* (values,
        returns and advantages of tokens, rewards of answers with the penalty, score without),
        critic/vf_explained_var, objective/kl (nats an answer) and objective/kl_coef, which was part
        of the rewards; then the coefficient and the unit move. All ranks call it."""
        coef = self.control.coef
        columns = _columns(groups, coef)
        if self.scale is not None:
            self.scale.take(columns["returns"], self.gather)
        out: dict[str, float] = {"objective/kl_coef": coef}
        for name in ("values", "returns", "advantages", "rewards", "score"):
            known = columns[name]
            said = self.gather((float(known.sum()), len(known), _low(known), -_low(-known)))
            count = sum(n for _, n, _, _ in said)
            if count:
                out[f"critic/{name}/mean"] = math.fsum(total for total, _, _, _ in said) / count
                out[f"critic/{name}/min"] = min(low for _, _, low, _ in said)
                out[f"critic/{name}/max"] = max(high for _, _, _, high in said)
        explained = self._explained(columns["values"], columns["returns"])
        if math.isfinite(explained):
            out["critic/vf_explained_var"] = explained
        kl = self.gather((float(columns["kl"].sum()), len(columns["kl"])))
        answers = sum(n for _, n in kl)
        if answers:
            out["objective/kl"] = math.fsum(total for total, _ in kl) / answers
            self.control.step(out["objective/kl"], answers)
        return out

    def _explained(self, value_N: np.ndarray, return_N: np.ndarray) -> float:
        """1 - var(R - V) / var(R) over all ranks: 1 for a perfect critic, 0 for one that knows the
        mean alone, below for a harmful one; nan where returns do not spread.
        """
        rest, whole = (self._squares(x) for x in (return_N - value_N, return_N))
        return 1 - rest / whole if whole > 0 else math.nan

    def _squares(self, x_N: np.ndarray) -> float:
        """Squared deviations from the mean over all ranks, added up."""
        said = self.gather((float(x_N.sum()), len(x_N)))
        mean = math.fsum(total for total, _ in said) / max(sum(n for _, n in said), 1)
        return math.fsum(self.gather(float(((x_N - mean) ** 2).sum())))

    def state_dict(self) -> dict[str, Any]:
        scale = {} if self.scale is None else {"scale": self.scale.state_dict()}
        return {"kl_coef": self.control.coef, **scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.control.coef = state["kl_coef"]
        if self.scale is not None and "scale" in state:  # runs of before had none where nobody asked for it
            self.scale.load_state_dict(state["scale"])


def _low(x: np.ndarray) -> float:
    return float(x.min()) if len(x) else math.inf


def _columns(groups: Sequence[Rolled], coef: float) -> dict[str, np.ndarray]:
    """Of the answers that count: values, returns and advantages by token; kl, score and reward by
    answer."""
    found: dict[str, list[np.ndarray]] = {
        name: [np.zeros(0)] for name in ("values", "returns", "advantages", "kl", "score", "rewards")
    }
    for group in groups:
        keep_N, keep_G = group.columns["keep_N"] > 0, group.counts_G > 0
        for name, column in (("values", "value_N"), ("returns", "return_N"), ("advantages", "advantage_N")):
            found[name].append(group.columns[column][keep_N])
        answer_N = np.repeat(np.arange(len(group.length_G)), group.length_G)
        ratio_N = group.columns["old_logp_N"] - group.columns.get("ref_logp_N", group.columns["old_logp_N"])
        kl_G = np.bincount(answer_N, ratio_N, minlength=len(group.length_G))
        found["kl"].append(kl_G[keep_G])
        found["score"].append(group.reward_G[keep_G])
        found["rewards"].append((group.reward_G - coef * kl_G)[keep_G])
    return {name: np.concatenate(parts) for name, parts in found.items()}

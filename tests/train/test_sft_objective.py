"""train/sft.py: what the loop is told of supervised fine-tuning, and the factors on tasks."""

from __future__ import annotations

import json
import math

import numpy as np
import paddle
import pytest

from ernie_tune.data.batching import MicroBatch, Sample, collate
from ernie_tune.machine.alone import forward_loss
from ernie_tune.models.config import TokenIds
from ernie_tune.models.inputs import Row
from ernie_tune.train.sft import SFTObjective, TaskBalance, dwa

VOCAB, WIDTH = 7, 3


class Unigram(paddle.nn.Layer):
    """A model whose hidden state is the token's embedding: every loss can be worked out by hand."""

    def __init__(self) -> None:
        super().__init__()
        generator = np.random.default_rng(0)
        self.embedding = self.create_parameter([VOCAB, WIDTH], dtype="float64")
        self.embedding.set_value(generator.normal(size=(VOCAB, WIDTH)))
        self.head = self.create_parameter([WIDTH, VOCAB], dtype="float64")
        self.head.set_value(generator.normal(size=(WIDTH, VOCAB)))

    def forward(self, inputs, tap=None, recompute=None, read=None):  # type: ignore[no-untyped-def]
        return paddle.gather(self.embedding, paddle.to_tensor(inputs.input_ids_T))

    def head_weight(self) -> tuple[paddle.Tensor, bool]:
        return self.head, False

    def nll(self, before: int, target: int) -> float:
        scores = self.embedding.numpy()[before] @ self.head.numpy()
        return float(np.log(np.exp(scores).sum()) - scores[target])


def batch(*rows: tuple[str, list[int]], weight: float = 1.0) -> MicroBatch:
    """Rows of (task, ids); all tokens but the first two are targets."""
    samples = []
    for domain, ids in rows:
        trained = np.arange(len(ids)) >= 2
        samples.append(Sample(Row(np.array(ids)), trained, np.full(len(ids), weight, np.float32), domain))
    return collate(samples, TokenIds())


def loss(objective: SFTObjective, model: Unigram, window: list[MicroBatch]) -> float:
    divisor = objective.begin(objective.counts(window))
    outs = [forward_loss(objective, model, b) for b in window]
    assert sum(out.count for out in outs) == pytest.approx(divisor), "begin announces what the calls give"
    return sum(float(out.total) for out in outs) / divisor


ROWS = [("a", [1, 2, 3, 4]), ("b", [5, 6, 1]), ("a", [2, 2, 6, 5, 4, 3])]


def test_losses_of_rows_by_hand() -> None:
    model = Unigram()
    nll = [[model.nll(ids[i - 1], ids[i]) for i in range(2, len(ids))] for _, ids in ROWS]
    sums, lengths = [sum(x) for x in nll], [len(ids) for _, ids in ROWS]
    by_hand = {
        "token": sum(sums) / 7,
        "seq": sum(s / len(x) for s, x in zip(sums, nll, strict=True)) / 3,
        "token_balanced": sum(s / n for s, n in zip(sums, lengths, strict=True)) / 3,
    }
    for norm, expected in by_hand.items():
        for window in ([batch(*ROWS)], [batch(r) for r in ROWS], [batch(*ROWS[:2]), batch(ROWS[2])]):
            assert loss(SFTObjective(norm), model, window) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="loss_norm"):
        SFTObjective("rows")


def test_each_task_has_its_own_loss() -> None:
    model = Unigram()
    nll = [[model.nll(ids[i - 1], ids[i]) for i in range(2, len(ids))] for _, ids in ROWS]
    metrics = {}
    for norm in ("token", "seq"):
        out = forward_loss(SFTObjective(norm), model, batch(*ROWS, ("", [1, 1, 1])))
        metrics[norm] = {name: total / count for name, (total, count) in out.metrics.items()}
    assert sorted(metrics["token"]) == ["nll", "task/a", "task/b"], "rows without a task have no line of their own"
    assert metrics["token"]["task/a"] == pytest.approx((sum(nll[0]) + sum(nll[2])) / 6)
    assert metrics["seq"]["task/a"] == pytest.approx((np.mean(nll[0]) + np.mean(nll[2])) / 2)
    assert metrics["token"]["task/b"] == metrics["seq"]["task/b"] == pytest.approx(nll[1][0])


# --- factors on tasks -----------------------------------------------------------------------------


def test_dynamic_weight_averaging() -> None:
    past = [{"a": 2.0, "b": 1.0}, {"a": 1.8, "b": 1.1}]  # ratios 0.9 and 1.1
    factors = dwa(past, {"a": 1, "b": 1}, 2.0)
    assert [factors["a"], factors["b"]] == pytest.approx([0.9500416250, 1.0499583749], abs=1e-10)
    assert dwa(past, {"b": 1}, 2.0) == {"b": factors["b"]}, "a task alone in a window keeps its factor"
    assert dwa(past[:1], {"a": 1, "b": 1}, 2.0) == {"a": 1.0, "b": 1.0}
    # new tasks, tasks not seen lately, and losses of zero have the ratio 1
    odd = dwa([{"a": 2.0, "z": 0.0}, {"a": 1.8, "z": 0.5}], {"a": 1, "new": 1}, 2.0)
    e = [math.exp(r / 2) for r in (0.9, 1.0, 1.0)]
    assert odd == pytest.approx({"a": 3 * e[0] / sum(e), "new": 3 * e[1] / sum(e)})


def test_factors_follow_the_periods_of_the_run() -> None:
    balance = TaskBalance("dwa", period_steps=2)
    assert balance.factors({"a": 1.0, "b": 3.0}) == {"a": 1.0, "b": 1.0}
    # means of two steps: (2, 1), (1.8, 1.1)
    for a, b in ((3.0, 1.0), (1.0, 1.0), (2.0, 1.4), (1.6, 0.8)):
        balance.update({"a": (10 * a, 10), "b": (b, 1)})
    assert balance.factors({"a": 1.0, "b": 1.0}) == pytest.approx({"a": 0.9500416250, "b": 1.0499583749})
    balance.update({"a": (99.0, 1)})
    assert balance.factors({"a": 1.0})["a"] == pytest.approx(0.9500416250), "a period counts when it is over"


def test_uncertainty_weighting() -> None:
    # L = [0.5, 2], s = [0, ln 2]: sum of exp(-s) L / 2 + s / 2
    balance = TaskBalance("uncertainty", uncertainty_lr=0.1)
    balance.log_variance = {"a": 0.0, "b": math.log(2)}
    # a task's share of the tokens does not matter
    for counts in ({"a": 1.0, "b": 1.0}, {"a": 30.0, "b": 10.0}):
        factors, total = balance.factors(counts), sum(counts.values())
        weighted = factors["a"] * counts["a"] * 0.5 + factors["b"] * counts["b"] * 2.0
        assert weighted / total + math.log(2) / 2 == pytest.approx(1.0965735903, abs=1e-10)
    balance.update({"a": (5.0, 10.0), "b": (8.0, 4.0)})
    # d/ds (exp(-s) L / 2 + s / 2) = 1/2 - exp(-s) L / 2: 0.25 for a, 0 for b, which is at its best
    assert balance.log_variance == pytest.approx({"a": -0.1 * 0.25, "b": math.log(2)})
    balance.update({"a": (0.0, 0.0)})
    assert balance.log_variance["a"] == pytest.approx(-0.1 * 0.25), "a window without the task teaches nothing"


@pytest.mark.parametrize("norm", ["token", "seq", "token_balanced"])
def test_uncertainty_factors_reach_loss_and_gradient(norm: str) -> None:
    model, window = Unigram(), [batch(*ROWS[:2]), batch(ROWS[2])]
    balance = TaskBalance("uncertainty", uncertainty_lr=0.1)
    balance.log_variance = {"a": 0.3, "b": -0.2}
    alone = {t: loss(SFTObjective(norm), model, [batch(*(r for r in ROWS if r[0] == t))]) for t in "ab"}
    objective = SFTObjective(norm, balance)
    expected = 0.5 * math.exp(-0.3) * alone["a"] + 0.5 * math.exp(0.2) * alone["b"]
    assert loss(objective, model, window) == pytest.approx(expected, rel=1e-6)
    divisor = objective.begin(objective.counts(window))
    outs = [forward_loss(objective, model, b) for b in window]
    for out in outs:
        (out.total / divisor).backward()
    got = model.head.grad.numpy().copy()
    model.clear_gradients(False)
    for task, s in balance.log_variance.items():
        single, rows = SFTObjective(norm), [batch(*(r for r in ROWS if r[0] == task))]
        out = forward_loss(single, model, rows[0])
        (0.5 * math.exp(-s) * out.total / single.begin(single.counts(rows))).backward()
    # weights of tokens are float32
    np.testing.assert_allclose(got, model.head.grad.numpy(), atol=1e-7)
    metrics = {
        k: tuple(map(sum, zip(*(o.metrics[k] for o in outs if k in o.metrics), strict=True))) for k in outs[0].metrics
    }
    objective.end(metrics)  # type: ignore[arg-type]
    for task, before in (("a", 0.3), ("b", -0.2)):
        slope = 0.5 - 0.5 * math.exp(-before) * alone[task]
        assert balance.log_variance[task] == pytest.approx(before - 0.1 * slope, rel=1e-6)


@pytest.mark.parametrize("kind", ["static", "dwa", "uncertainty"])
def test_states_survive_a_file(kind: str) -> None:
    losses = [{"a": (1.0 + i, 2.0), "b": (3.0 / (1 + i), 1.0)} for i in range(6)]
    whole, first = (SFTObjective("token", TaskBalance(kind, period_steps=2)) for _ in range(2))
    for i, values in enumerate(losses):
        whole.balance.update(values)
        if i < 3:
            first.balance.update(values)
    kept = first.state_dict()
    text = json.dumps(kept)
    first.balance.update(losses[3])
    assert json.dumps(kept) == text, "a state is a picture, not a view"
    second = SFTObjective("token", TaskBalance(kind, period_steps=2))
    second.load_state_dict(json.loads(text))
    for values in losses[3:]:
        second.balance.update(values)
    assert second.balance.factors({"a": 1.0, "b": 2.0}) == whole.balance.factors({"a": 1.0, "b": 2.0})
    assert second.state_dict() == whole.state_dict()


def test_an_unknown_balance_is_refused() -> None:
    with pytest.raises(ValueError, match=r"balance \('gradnorm'\) must be static, dwa or uncertainty"):
        TaskBalance("gradnorm")

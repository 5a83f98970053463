"""train/loop.py: one gradient however a window is cut, against numpy; seeds, clipping, steps that
must not be made.

Legend: N target tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_runs import mixed_rows, processor, records

from ernie_tune.data.batching import Dropped, Encoder, MicroBatch, Sample, collate
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import Schedule, build_adamw
from ernie_tune.train.sft import SFTObjective

NORMS = ("token", "seq", "token_balanced")


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Eight rows of 24 to 82 tokens, three of them with a picture, with unequal weights."""
    encoder = Encoder(processor(), 1000)
    made = [encoder(r, Dropped()) for r in records(tmp_path_factory.mktemp("rows"), mixed_rows(8))]
    found = [s for s in made if s is not None]
    assert len(found) == 8
    for i, s in enumerate(found):
        s.weight_L[:] = 1 + i % 2
    return found


def windows(samples: list[Sample]) -> dict[str, list[MicroBatch]]:
    """The same eight rows: one pack, one row a micro-batch, and uneven packs, one of them without
    any picture.
    """
    cuts = {
        "8x1": [samples],
        "1x8": [[s] for s in samples],
        "packed": [
            [samples[1], samples[2], samples[4]],
            [samples[0], samples[3], samples[5], samples[7]],
            [samples[6]],
        ],
    }
    return {name: [collate(part, processor().tokens) for part in cut] for name, cut in cuts.items()}


def loop_of(model: Any, norm: str = "token", steps: int = 10, **changes: Any) -> Loop:
    optimizer = build_adamw(
        list(model.named_parameters()), lambda _: 1.0, weight_decay=0.0, beta1=0.9, beta2=0.95, epsilon=1e-8
    )
    return Loop(model, SFTObjective(norm), optimizer, Schedule(1e-3, steps), LoopSettings(**changes))


def window_gradient(model: Any, window: list[MicroBatch], norm: str) -> tuple[float, dict[str, np.ndarray]]:
    loop = loop_of(model, norm)
    value, _ = loop.accumulate(window)
    found = {
        name: p.grad.numpy().copy() if p.grad is not None else np.zeros(p.shape)
        for name, p in model.named_parameters()
        if not p.stop_gradient
    }
    loop.clear_gradients()
    return value, found


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float64", 1e-12)])
def test_one_gradient_however_the_window_is_cut(
    norm: str, dtype: str, tolerance: float, samples: list[Sample], golden_model: Any
) -> None:
    model = golden_model("tiny-b", dtype)
    results = {name: window_gradient(model, window, norm) for name, window in windows(samples).items()}
    value, gradient = results["8x1"]
    norm_of_all = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values()))
    assert norm_of_all > 0.1
    silent = [name for name, g in gradient.items() if not np.abs(g).max() > 0]
    # What the last layer does to image tokens reaches no target; every other parameter has a part
    # in the loss.
    assert sorted(silent) == [
        "layers.3.mlp.gate.weight_1",
        *(f"layers.3.mlp.vision_experts.{p}_proj" for p in ("down", "up_gate")),
    ]
    for name in ("1x8", "packed"):
        other, grads = results[name]
        # sums of float32 weights
        assert other == pytest.approx(value, rel=tolerance if dtype == "float32" else 1e-7)
        for parameter, g in gradient.items():
            worst = np.abs(grads[parameter] - g).max() / norm_of_all
            assert worst < tolerance, (name, parameter)


def test_the_loss_is_that_of_plain_numpy(samples: list[Sample], golden_model: Any) -> None:
    model = golden_model("tiny-b", "float64")
    batch = collate(samples, processor().tokens)
    scores = model.logits(model(batch.inputs)).numpy()
    logp_TV = scores - scores.max(-1, keepdims=True)
    logp_TV -= np.log(np.exp(logp_TV).sum(-1, keepdims=True))
    weighted, weights, per_row, balanced = 0.0, 0.0, [], []
    start = 0
    for s in samples:
        ids = s.row.input_ids_L
        at = np.array([t for t in range(1, len(ids)) if s.trained_L[t]])
        nll = -logp_TV[start + at - 1, ids[at]]
        weight = s.weight_L[at]
        weighted, weights = weighted + float((weight * nll).sum()), weights + float(weight.sum())
        per_row.append(float(nll.mean()))
        balanced.append(float((weight * nll).sum()) / len(ids))
        start += len(ids)
    by_hand = {"token": weighted / weights, "seq": np.mean(per_row), "token_balanced": np.mean(balanced)}
    for norm, expected in by_hand.items():
        value, _ = loop_of(model, norm).accumulate(windows(samples)["packed"])
        assert value == pytest.approx(expected, rel=1e-6), norm
        model.clear_gradients(set_to_zero=False)


# --- steps ----------------------------------------------------------------------------------------


class Slope(paddle.nn.Layer):
    """A model of one parameter vector whose loss is its product with the batch: the gradient is the
    batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = self.create_parameter([2], default_initializer=paddle.nn.initializer.Constant(1.0))
        self.noise = paddle.nn.Dropout(0.5)

    def forward(self, inputs: Any, tap: Any = None, recompute: Any = None, read: Any = None) -> paddle.Tensor:
        return (self.noise(self.w) * paddle.to_tensor(inputs.x, dtype="float32")).sum()


class Given:
    """The objective of Slope: one row and token a batch, and a record of the calls."""

    def __init__(self) -> None:
        self.ended: list[Any] = []

    def counts(self, window: Any) -> dict[str, float]:
        return {"batches": float(len(window))}

    def begin(self, counts: Any) -> float:
        return counts["batches"]

    def outputs(self, model: Any, hidden: paddle.Tensor, batch: Any) -> dict[str, paddle.Tensor]:
        return {"total": hidden}

    def loss(self, outputs: Any, batch: Any) -> Any:
        from ernie_tune.objectives.loss import LossOut

        total = outputs["total"]
        return LossOut(total, 1.0, {"seen": (float(total), 1.0)})

    def end(self, metrics: Any) -> None:
        self.ended.append(dict(metrics))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Batch:
    def __init__(self, *x: float) -> None:
        self.x, self.num_rows, self.read_R = list(x), 1, None
        self.inputs = type("Inputs", (), {"num_tokens": 5, "x": list(x)})()


def slope_loop(steps: int = 10, rate: float = 0.1, dropout: bool = False, **changes: Any) -> Loop:
    model = Slope()
    model.noise.p = 0.5 if dropout else 0.0
    optimizer = paddle.optimizer.SGD(1.0, parameters=model.parameters())
    return Loop(model, Given(), optimizer, Schedule(rate, steps, 0, "constant"), LoopSettings(**changes))


def test_a_step_divides_clips_and_records() -> None:
    loop = slope_loop(max_grad_norm=2.5)
    record = next(loop.steps([[Batch(6.0, 0.0), Batch(0.0, 8.0)]]))
    # gradient (3, 4) of norm 5, halved; at a rate of 0.1
    assert loop.model.w.tolist() == pytest.approx([1 - 0.15, 1 - 0.2])
    assert record.loss == pytest.approx(7.0)
    assert record.grad_norm == pytest.approx(5.0), "the norm before clipping"
    assert record.metrics == {"seen": pytest.approx(7.0)}
    assert (record.step, record.learning_rate, record.num_tokens, record.num_rows) == (1, 0.1, 10, 2)
    assert loop.model.w.grad is None
    assert loop.objective.ended == [{"seen": (14.0, 2.0)}]


def test_steps_end_with_the_schedule_or_the_windows() -> None:
    loop = slope_loop(steps=3)
    assert [r.step for r in loop.steps([[Batch(1, 1)]] * 2)] == [1, 2]
    assert [r.step for r in loop.steps([[Batch(1, 1)]] * 5)] == [3]
    assert list(loop.steps([[Batch(1, 1)]])) == []
    state = json.loads(json.dumps(loop.state_dict()))
    assert state == {"step": 3, "tokens": 15, "rows": 3, "seconds": loop.seconds}
    again = slope_loop()
    again.load_state_dict(state)
    assert (again.step, again.tokens, again.rows, again.seconds) == (3, 15, 3, loop.seconds)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_changes_nothing(bad: float) -> None:
    loop = slope_loop()
    list(loop.steps([[Batch(1, 1)]]))
    before = loop.model.w.numpy().copy()
    record = next(loop.steps([[Batch(1, 1), Batch(bad, 1)]]))
    assert not math.isfinite(record.loss)
    assert not math.isfinite(record.grad_norm)
    assert loop.model.w.numpy().tobytes() == before.tobytes()
    assert len(loop.objective.ended) == 1
    assert loop.model.w.grad is None


def test_dropout_depends_on_seed_and_step_alone() -> None:
    def course(seed: int, start: int = 0) -> list[float]:
        loop = slope_loop(dropout=True, rate=0.0, seed=seed)
        loop.step = start
        paddle.seed(start + 12345)  # whatever was drawn before
        return [r.loss for r in loop.steps([[Batch(1, 10)]] * 10)]

    assert course(7) == course(7)
    assert course(7, start=4) == course(7)[4:]
    assert course(7) != course(8)
    assert len(set(course(7))) > 1


def test_a_window_is_dropped_out_anew_in_each_micro_batch(samples: list[Sample], golden_model: Any) -> None:
    base = golden_model("tiny-b")
    before = {name: p.stop_gradient for name, p in base.named_parameters()}
    model = PeftModel(base, LoraConfig(r=4, lora_dropout=0.5))
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.set_value(paddle.full_like(p, 0.5))
    model.train()
    batch = collate(samples[:1], processor().tokens)
    paddle.seed(0)
    losses = {round(loop_of(model).accumulate([batch])[0], 6) for _ in range(3)}
    assert len(losses) == 3
    model.eval()
    assert len({round(loop_of(model).accumulate([batch])[0], 6) for _ in range(2)}) == 1
    model.delete_adapter("default")
    for name, p in base.named_parameters():
        p.stop_gradient = before[name]

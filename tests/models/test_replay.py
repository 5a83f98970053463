"""Router replay: forced experts are taken and weighed by the current scores, as the oracle has it,
with the gradient; what a forward notes and replays is itself, and other choices are counted.
"""

from __future__ import annotations

import json

import numpy as np
import paddle
import pytest
from conftest import GOLDEN
from support.tiny_runs import IMAGES, processor

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.data.processor import Encoded
from ernie_tune.data.units import Unit, UnitBatch, collate_units
from ernie_tune.generate.batch import Prompt, RunningBatch, eval_mode
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.machine.alone import forward_loss
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.moe import RouterTap, route
from ernie_tune.models.replay import COLUMN, UNKNOWN, chosen_experts, forced_experts, of_completions, recorded
from ernie_tune.objectives.loss import LossOut
from ernie_tune.objectives.objective import logp_outputs

ORACLE = json.loads((GOLDEN / "online" / "oracle.json").read_text(encoding="utf-8"))
IN, OUT = ORACLE["inputs"], ORACLE["outputs"]["rollout"]
PROCESSOR = processor()


def routed(forced: list[int] | None) -> tuple[list[int], np.ndarray, np.ndarray]:
    """(experts, weights, d weight / d score of each) of the oracle's router, in the order of the
    experts asked for.
    """
    grads = []
    for i in range(2):
        x = paddle.eye(4, dtype="float64")[:1] * 0 + 1.0
        weight = paddle.to_tensor(np.tile(np.array(IN["router_logits"]) / 4, (4, 1)), stop_gradient=False)
        r = route(x, weight, paddle.zeros([4], "float64"), 2, forced_Tk=None if forced is None else np.array([forced]))
        r.weight_Tk[0, i].backward()
        grads.append(weight.grad.numpy()[0])
    return r.chosen_Tk.numpy()[0].tolist(), r.weight_Tk.numpy()[0], np.array(grads)


def test_the_oracle() -> None:
    chosen, weight, grad = routed(IN["router_forced"])
    assert chosen == IN["router_forced"]
    np.testing.assert_allclose(weight, OUT["replay_weights"], atol=1e-9)
    np.testing.assert_allclose(grad, OUT["replay_d_weights_d_logits"], atol=1e-9)
    assert routed(None)[0] == OUT["free_choice"]
    assert routed([UNKNOWN, UNKNOWN])[0] == OUT["free_choice"]


@pytest.fixture(scope="module")
def model() -> ErnieModel:
    """All of its forwards see every token, as those that are told where to route do: then they are
    the same to the last bit.
    """
    made = AutoModel.from_config("tiny-a")
    made.leaves_out = False
    return made


def prompt() -> Encoded:
    user = {"role": "user", "content": "<image>read the digit"}
    return PROCESSOR.encode([user], [str(IMAGES / "0000.png")], add_generation_prompt=True)


def batch(answers: list[list[int]]) -> UnitBatch:
    dialogues = []
    for ids in answers:
        dialogue = prompt().extended(ids)
        dialogue.trained_L[:] = False
        dialogue.trained_L[-len(ids) :] = True
        dialogues.append(dialogue)
    nothing = np.full(len(answers), np.nan)
    return collate_units([Unit(tuple(dialogues), prompt().num_tokens, "sampled", *([nothing] * 3))], PROCESSOR)


class Likelihood:
    def outputs(self, model: ErnieModel, hidden_TD: paddle.Tensor, batch: UnitBatch) -> dict[str, paddle.Tensor]:
        return dict(logp_outputs(model, hidden_TD, batch))

    def loss(self, outputs: dict[str, paddle.Tensor], batch: UnitBatch) -> LossOut:
        return LossOut(outputs["logp_N"].sum(), float(len(batch.target_N)))


def loss(model: ErnieModel, batch: UnitBatch) -> tuple[float, LossOut]:
    model.clear_gradients()
    tap = RouterTap(force=forced_experts(batch, model.config))
    out = forward_loss(Likelihood(), model, batch, tap if tap.force is not None else None)  # type: ignore[arg-type]
    out.total.backward()
    return float(out.total), out


def test_what_was_noted_is_replayed(model: ErnieModel) -> None:
    free = batch([[7, 9, 11], [5], [8, 4]])
    noted = recorded(model, free, model.config)
    assert noted.shape == (
        3 * prompt().num_tokens + 6,
        sum(map(model.config.is_moe_layer, range(model.config.num_hidden_layers))),
        model.config.moe.top_k,
    )  # type: ignore[union-attr]
    value, out = loss(model, free)
    grads = {name: p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    again, told = loss(model, free.with_columns(**{COLUMN: noted}))
    assert again == value
    for name, p in model.named_parameters():
        if p.grad is not None:
            np.testing.assert_array_equal(p.grad.numpy(), grads[name], err_msg=name)
    assert "mismatch/routing_flips" not in out.metrics
    flips, count = told.metrics["mismatch/routing_flips"]
    assert (flips, count) == (0.0, free.inputs.num_tokens * noted.shape[1])


def test_other_choices_are_taken_and_counted(model: ErnieModel) -> None:
    """Every expert moved by one: nobody would choose so, and the loss is another; -1 leaves the
    choice free.
    """
    free = batch([[7, 9, 11], [5]])
    noted = recorded(model, free, model.config)
    experts = model.config.moe.num_experts  # type: ignore[union-attr]
    value, _ = loss(model, free)
    moved, told = loss(model, free.with_columns(**{COLUMN: ((noted + 1) % experts).astype(np.int16)}))
    assert moved != value
    flips, count = told.metrics["mismatch/routing_flips"]
    assert 0 < flips <= count
    unknown, told = loss(model, free.with_columns(**{COLUMN: np.full_like(noted, UNKNOWN)}))
    assert unknown == value
    assert told.metrics["mismatch/routing_flips"] == (0.0, 0.0)


@pytest.mark.parametrize("rows", [1, 3])
def test_sampling_notes_what_a_forward_over_the_whole_would(model: ErnieModel, rows: int) -> None:
    """Prefill and steps, few rows (which step on a path of their own) and several, text and picture
    tokens.
    """
    params = SamplingParams(max_new_tokens=3, temperature=1.0, n=rows, seed=3)
    running = RunningBatch(model, PROCESSOR.tokens)
    with eval_mode(model):
        running.join([Prompt(prompt().row, params, experts=True), Prompt(prompt().row, params, 1)])
        live = list(running._fresh[0][0])
        while len(running):
            running.step()
    done = [row.done for row in live if row.prompt.key == 0]
    assert all(not row.done.experts for row in live if row.prompt.key == 1)
    whole = batch([one.token_ids for one in done])
    size = prompt().num_tokens + 3
    found = of_completions(done, [size] * rows)
    assert found is not None
    noted = recorded(model, whole, model.config).reshape([rows, size, *found.shape[1:]])
    found = found.reshape(noted.shape)
    assert (found[:, -1] == UNKNOWN).all(), "the last token was never read"
    np.testing.assert_array_equal(np.sort(found[:, :-1], -1), np.sort(noted[:, :-1], -1))
    assert of_completions([type(done[0])(), *done], [1, *[size] * rows]) is None


def test_a_note_covers_each_token_once(model: ErnieModel) -> None:
    one = batch([[7]])
    tap = RouterTap(ids_only=True)
    with paddle.no_grad(), eval_mode(model):
        model(one.inputs, tap=tap)
    assert not tap.records
    assert (chosen_experts(tap, one.inputs, model.config) >= 0).all()

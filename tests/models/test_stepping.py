"""Decoding with several operators at once in NumPy, or whole steps, against the same model with one
Paddle operator after the other.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import paddle
import pytest
from weights import case_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.generate.batch import Prompt, RunningBatch
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models import mkl
from ernie_tune.models.decoding import StepForward
from ernie_tune.models.inputs import Row
from ernie_tune.models.layers import gated_halves, rms_norm, rotate_pairs, swiglu, turn_factors
from ernie_tune.peft.config import LoraConfig, PromptConfig
from ernie_tune.peft.model import PeftModel, get_peft_model

pytestmark = pytest.mark.skipif(not mkl.usable("float32"), reason="needs Paddle's math library for x86")


def decoded(model: Any, rows: Any) -> tuple[list[list[int]], np.ndarray]:
    """Tokens and log-probabilities of 12 greedy steps."""
    batch = RunningBatch(model, model.config.tokens)
    params = SamplingParams(max_new_tokens=12)
    batch.join([Prompt(row, params, key) for key, row in enumerate(rows)])
    steps = []
    while len(batch):
        steps.append([(event.token_id, event.logp) for event in batch.step()])
    return [[token for token, _ in step] for step in steps], np.array([[logp for _, logp in step] for step in steps])


@pytest.mark.parametrize(("name", "dtype", "tight"), [
    ("tiny-b", "float32", 1e-5), ("tiny-c", "float32", 1e-5), ("tiny-b", "float64", 1e-5), ("tiny-a", "float32", 1e-5),
])  # fmt: skip
def test_a_model_decodes_the_same(
    name: str, dtype: str, tight: float, golden_model: Any, golden: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = golden_model(name, dtype), golden("tiny_c" if name == "tiny-c" else "tiny_b")
    rows = [case_rows(data, case)[0] for case in (("text",) if name == "tiny-a" else ("text", "image", "mixed"))]
    tokens, logps = decoded(model, rows)
    calls: list[int] = []
    monkeypatch.setattr(mkl, "is_stepping", lambda: bool(calls.append(1)))
    slow_tokens, slow_logps = decoded(model, rows)
    assert len(calls) > 100
    assert tokens == slow_tokens
    np.testing.assert_allclose(logps, slow_logps, atol=tight)


@pytest.mark.parametrize(("dtype", "tight"), [("float32", 3e-7), ("float64", 3e-16)])
def test_each_layer_by_itself(dtype: str, tight: float) -> None:
    rng = np.random.default_rng(0)
    x, weight, wide = (paddle.to_tensor(rng.standard_normal(s), dtype) for s in ((5, 16), (16,), (5, 24)))
    heads = paddle.to_tensor(rng.standard_normal((5, 2, 8)), dtype)
    turn = turn_factors(rng.standard_normal((5, 4)), 2, dtype)
    far = paddle.to_tensor([[-2000.0, 0.0, 30.0]], dtype)
    cases: list[Any] = [
        lambda: rms_norm(x, weight, 1e-5),
        lambda: rotate_pairs(heads, turn),
        lambda: swiglu(x, x * 2),
        lambda: swiglu(far, paddle.ones_like(far)),
        lambda: gated_halves(wide) if mkl.is_stepping() else swiglu(wide[:, :12], wide[:, 12:]),
    ]
    with paddle.no_grad():
        for case in cases:
            plain = case()
            assert not mkl.is_stepping()
            with mkl.stepping():
                found = case()
            assert found.dtype == plain.dtype
            assert found.shape == plain.shape
            np.testing.assert_allclose(
                found.numpy(), plain.numpy(), rtol=0, atol=tight * max(1, abs(plain.numpy()).max())
            )


class Whole:
    """Whether whole steps are taken, and how many were."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.on, make, call = 0, True, StepForward.of, StepForward.__call__

        def counted(*args: Any, **tap: Any) -> Any:
            self.steps += 1
            return call(*args, **tap)

        monkeypatch.setattr(StepForward, "of", lambda model: make(model) if self.on else None)
        monkeypatch.setattr(StepForward, "__call__", counted)


def sampled(model: Any, prompts: int = 2, n: int = 3, experts: bool = False) -> tuple[list[Any], np.ndarray]:
    """What events say of rows of which some end early, and others join later."""
    rng = np.random.default_rng(0)
    batch = RunningBatch(model, model.config.tokens)
    params = SamplingParams(max_new_tokens=8, temperature=1.0, n=n, stop_ids=tuple(range(0, 500, 7)))
    later = [Prompt(Row(rng.integers(10, 400, 5 + k)), params, k, k, experts=experts) for k in range(prompts)]
    found, logps = [], []
    while later or len(batch):
        if later:
            batch.join([later.pop()])
        noted = batch.step()
        found += [(e.prompt, e.sample, e.token_id, None if e.experts is None else e.experts.tolist()) for e in noted]
        logps += [e.logp for e in noted]
    return found, np.array(logps)


@pytest.mark.parametrize(("dtype", "tight"), [("float32", 4e-6), ("float64", 1e-14)])
@pytest.mark.parametrize("name", ["tiny-a", "tiny-b", "tiny-c"])
def test_a_whole_step_is_the_layers_one_by_one(
    name: str, dtype: str, tight: float, golden_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = golden_model(name, dtype), Whole(monkeypatch)
    for more in ({}, {"n": 1, "experts": True}):
        whole.on, steps = True, whole.steps
        found, logps = sampled(model, **more)
        assert whole.steps > steps + 2
        whole.on, steps = False, whole.steps
        one_by_one, their_logps = sampled(model, **more)
        assert whole.steps == steps
        assert found == one_by_one  # tokens, and the experts that each went to
        np.testing.assert_allclose(logps, their_logps, rtol=0, atol=tight)


def test_weights_are_read_where_they_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModel.from_config("tiny-a")
    model.eval()
    step = StepForward.of(model)
    assert step is not None
    step._look()
    weight = model.layers[0].self_attn.q_proj.weight
    before = step.layers[0].qkv[0]
    with paddle.no_grad():
        weight.get_tensor()._clear()
        weight.set_value(np.ones(weight.shape, np.float32))
        spare = [paddle.ones(weight.shape) for _ in range(3)]
    step._look()
    assert len(spare) == 3
    assert step.layers[0].qkv[0] == weight.data_ptr()
    assert before is not None


def test_only_plain_models_step_whole() -> None:
    model = AutoModel.from_config("tiny-a")
    assert StepForward.of(model) is not None
    hook = model.layers[1].mlp.register_forward_post_hook(lambda layer, args, out: out * 2)
    assert StepForward.of(model) is None
    hook.remove()
    assert StepForward.of(model) is not None
    assert StepForward.of(AutoModel.from_config("tiny-a", dtype="bfloat16")) is None
    for config in (
        LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
        LoraConfig(r=2, target_modules=["text_experts"]),
        LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
        PromptConfig(num_virtual_tokens=2),
    ):
        adapted = get_peft_model(AutoModel.from_config("tiny-a"), config)
        assert StepForward.of(adapted) is None
        assert StepForward.of(adapted.base) is None


def adapted(dtype: str = "float32", targets: tuple[str, ...] = ()) -> PeftModel:
    """A model with two adapters of unlike ranks that do something."""
    paddle.seed(3)
    made = get_peft_model(AutoModel.from_config("tiny-a", dtype=dtype), LoraConfig(r=4, target_modules=targets))
    made.add_adapter(LoraConfig(r=3, lora_alpha=12, target_modules=["v_proj", "down_proj"]), "other")
    rng = np.random.default_rng(1)
    for name, value in made.named_parameters():
        if name.endswith(".lora_B"):
            value.set_value(paddle.to_tensor(rng.normal(0, 0.3, value.shape), value.dtype))
    made.set_adapter("default")
    return made


@pytest.mark.parametrize(("dtype", "tight"), [("float32", 2e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("targets", [(), ("k_proj", "gate_proj")], ids=["default", "some"])
def test_adapters_are_part_of_a_whole_step(
    targets: tuple[str, ...], dtype: str, tight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each adapter, and none; what they say differs, so that one that was left out is noticed."""
    model, whole = adapted(dtype, targets), Whole(monkeypatch)
    seen = []
    for name in ("default", "other", None):
        with model.acting(name):
            whole.on, steps = True, whole.steps
            found, logps = sampled(model)
            assert whole.steps > steps + 2
            whole.on = False
            one_by_one, their_logps = sampled(model)
        assert found == one_by_one
        np.testing.assert_allclose(logps, their_logps, rtol=0, atol=tight)
        seen.append(logps)
    assert all(len(a) != len(b) or abs(a - b).max() > 1e-3 for a, b in itertools.combinations(seen, 2))


def test_another_adapter_may_act_from_one_step_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = adapted(), Whole(monkeypatch)

    def switching() -> list[float]:
        model.set_adapter("default")
        batch = RunningBatch(model, model.config.tokens)
        batch.join([Prompt(Row(np.arange(10, 15)), SamplingParams(max_new_tokens=9))])
        logps = []
        for name in (None, "other", "default", "other", None) * 2:
            logps += [event.logp for event in batch.step()] if len(batch) else []
            model._activate(name)
        return logps

    found = switching()
    assert whole.steps == 8
    whole.on = False
    np.testing.assert_allclose(found, switching(), rtol=0, atol=2e-5)

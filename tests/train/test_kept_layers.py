"""Layers that fit are run once on a quantised base: the same gradients to the last bit, fewer
passes, and routers that count each token once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
import pytest
from support.tiny_runs import processor, text_row, write_rows

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.arguments import build
from ernie_tune.config.host_memory import Free
from ernie_tune.config.language import Text
from ernie_tune.models.ernie import DecoderLayer
from ernie_tune.models.inputs import Row, pack
from ernie_tune.models.moe import MoELayer, RouterTap
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.peft.quantize import quantize_base
from ernie_tune.plan.job import job_of
from ernie_tune.train import kept_layers
from ernie_tune.train.kept_layers import KeptLayers
from ernie_tune.trainers import assemble
from ernie_tune.trainers.sft import SFTTrainer

FREE = Free(10**10, Text("here", "here"))


@pytest.fixture(scope="module")
def model() -> Any:
    base = AutoModel.from_config("tiny-a", seed=1)
    quantize_base(base, "weight_only_mix")
    made = get_peft_model(base, LoraConfig(r=4, target_modules=["attention"]))
    for name, value in made.named_parameters():
        if name.endswith("lora_B"):
            value.set_value(np.random.default_rng(2).standard_normal(value.shape).astype("float32") * 0.1)
    return made


def passed(model: Any, recompute: Any, tap: RouterTap | None = None) -> tuple[list[np.ndarray], list[int]]:
    """Gradients of one pack, and the layers that ran, in order."""
    ran: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda own, _: ran.append(own.self_attn.layer))
        for layer in model.sublayers()
        if isinstance(layer, DecoderLayer)
    ]
    inputs = pack([Row(np.arange(10, 40)), Row(np.arange(50, 71))], model.config.tokens)
    model.train()
    model(inputs, recompute=recompute, tap=tap).square().mean().backward()
    for hook in hooks:
        hook.remove()
    trained = [p for p in model.parameters() if not p.stop_gradient]
    found = [p.grad.numpy() for p in trained]
    for p in trained:
        p.clear_gradient(False)
    return found, ran


@pytest.mark.parametrize("kept", [0, 1, 100])
def test_gradients_and_passes(model: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any, kept: int) -> None:
    layers = model.config.num_hidden_layers
    kept = min(kept, layers)
    monkeypatch.setattr(kept_layers, "kept_layers", lambda job, tokens, visual, free: (kept, 1.0))
    job = job_of(build({"model_name_or_path": "tiny-a", "fine_tuning": "LoRA"}), model.config, on_cpu=True)
    plain, twice = passed(model, assemble.recompute())
    assert twice == [*range(layers), *reversed(range(layers))]
    got, ran = passed(model, KeptLayers(assemble.recompute(), job, lambda: FREE))
    assert ran == [*range(layers), *reversed(range(layers - kept))]
    for a, b in zip(got, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    assert f"of {layers} layers {kept} are not run again for 51 tokens" in capsys.readouterr().err


def test_routers_count_in_the_only_pass(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_layers, "kept_layers", lambda job, tokens, visual, free: (1, 1.0))
    job = job_of(build({"model_name_or_path": "tiny-a"}), model.config, on_cpu=True)
    routers = [layer for layer in model.sublayers() if isinstance(layer, MoELayer)]
    usage = []
    for recompute in (assemble.recompute(), KeptLayers(assemble.recompute(), job, lambda: FREE)):
        passed(model, recompute, RouterTap(count_usage=True))
        usage.append([layer.moe_statics.expert_usage.numpy().copy() for layer in routers])
        for layer in routers:
            layer.moe_statics.expert_usage.set_value(paddle.zeros_like(layer.moe_statics.expert_usage))
    assert all(counted.sum() > 0 for counted in usage[0])
    for a, b in zip(*usage, strict=True):
        np.testing.assert_array_equal(a, b)


def test_what_is_free_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(kept_layers, "kept_layers", lambda job, tokens, visual, free: (int(free) // tokens, 0.0))
    job = job_of(build({"model_name_or_path": "tiny-a"}), AutoModel.from_config("tiny-a").config, on_cpu=True)
    keeper = KeptLayers(lambda *_: None, job, lambda: asked.append(1))  # type: ignore[arg-type, func-returns-value, return-value]
    assert [keeper.run_again(tokens) for tokens in (5, 7, 5)] == [job.model.num_hidden_layers] * 3
    assert len(asked) == 1


def test_a_run_keeps_layers_on_a_quantised_base_alone(tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """And with auto_find_batch_size the losses are those of the micro-batches that were written."""
    rows = write_rows(tmp_path / "rows.jsonl", [text_row(i) for i in range(8)])
    common = {
        "model_name_or_path": "tiny-a",
        "fine_tuning": "LoRA",
        "train_dataset_path": (rows,),
        "max_seq_len": 256,
        "gradient_accumulation_steps": 4,
        "max_steps": 2,
        "recompute": True,
        "plot_loss": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    losses = []
    monkeypatch.setattr(assemble, "free_memory", lambda: FREE)
    for name, more in (("plain", {}), ("coded", {"weight_quantize_algo": "weight_only_mix"})):
        for auto in (False, True):
            config = build(
                {**common, **more, "auto_find_batch_size": auto, "output_dir": str(tmp_path / f"{name}{auto}")}
            )
            trainer = SFTTrainer(args=config, processor=processor())
            trainer.train()
            said = capsys.readouterr().err
            assert ("of 3 layers 3 are not run again" in said) == (name == "coded"), said
            assert ("auto_find_batch_size: 1 micro-batch(es) of 4 row(s) a step" in said) == auto
            losses.append([r["loss"] for r in trainer.log.history if "loss" in r])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[3], rtol=1e-5)

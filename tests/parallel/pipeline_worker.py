"""Run by the launcher on every rank: cases of a pipeline against one process, in one launch. Each
rank trains the whole model itself, too.

usage: pipeline_worker.py OUT_FOLDER '{"pipe": 2, "chunks": 1, "cases": {"name": {...}}}'; writes
OUT_FOLDER/RANK.json with what each case found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle

import ernie_tune  # noqa: F401
from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.layout import Layout
from ernie_tune.data.batching import MicroBatch
from ernie_tune.generate.batch import generate
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.machine import stages as train_pipeline
from ernie_tune.machine.fleet import DistributedEngine
from ernie_tune.machine.stages import StagedModel, cut_of, stages_of
from ernie_tune.machine.tower import SharedTower
from ernie_tune.models.config import ModelConfig, MoEConfig
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import Row, pack
from ernie_tune.models.presets import preset
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.parallel import parallelize
from ernie_tune.parallel import pipeline as fleet_pipeline
from ernie_tune.parallel.mesh import Group, Mesh, init_mesh
from ernie_tune.peft.config import LoraConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.freeze import FreezeSpec
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.quantize import quantize_base
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import Schedule, adamw_maker
from ernie_tune.train.sft import SFTObjective
from ernie_tune.trainers.assemble import recompute

MAX_NORM = 0.05  # far below the norms of these models, so that clipping acts at every step


# --- what is trained ------------------------------------------------------------------------------


def config_of(case: dict[str, Any]) -> ModelConfig:
    layers = case.get("layers", 4)
    return preset("tiny-a").replace(
        num_hidden_layers=layers,
        tie_word_embeddings=case.get("tied", True),
        moe=MoEConfig(4, (24, 16), 2, 1, tuple(range(1, layers))),
    )


def build(case: dict[str, Any], config: ModelConfig, stages: frozenset[str] | None = None) -> ErnieModel:
    model = AutoModel.from_config(config, seed=3, stages=stages)
    method = case.get("method", "full")
    if "quantised" in case:
        quantize_base(model, case["quantised"])
    if method == "dora":
        return PeftModel(model, LoraConfig(r=2, target_modules=["attention"], use_dora=True, modules_to_save=["norm"]))
    if method == "lora":
        return PeftModel(
            model, LoraConfig(r=2, lora_alpha=8, target_modules=["attention", "mlp"], expert_targets="both")
        )
    if method == "prefix":
        return PeftModel(model, PrefixConfig(3))
    if method == "prompt":
        return PeftModel(model, PromptConfig(3))
    FreezeSpec(**case.get("freeze", {})).apply(model)
    return model


def row(rng: np.random.Generator, tokens: int, image: tuple[int, int, int] | None) -> Row:
    ids = rng.integers(5, 600, tokens)
    if image is None:
        return Row(ids)
    t, h, w = image
    features = (1 if t == 1 else t // 2) * h * w // 4
    ids[2], ids[3 : 3 + features], ids[3 + features] = 605, 604, 606
    return Row(ids, rng.standard_normal((t * h * w, 588)).astype(np.float32), np.array([image]))


def window(case: dict[str, Any], config: ModelConfig, step: int, count: int) -> list[MicroBatch]:
    """Micro-batches of unequal length and unequal numbers of targets; images in some of them only,
    or in none.
    """
    rng, out = np.random.default_rng(step), []
    for i in range(count):
        image = {0: (1, 4, 6), 2: (2, 4, 4)}.get(i) if case.get("images", True) else None
        rows = [row(rng, int(rng.integers(20, 40)), image), row(rng, int(rng.integers(5, 12)), None)]
        p = pack(rows, config.tokens)
        source = np.array([j for j in range(p.num_tokens - 1) if j + 1 not in p.offsets and not p.placeholder_T[j + 1]])
        source = source[: len(source) // (1 + i % 3)]
        row_N = np.searchsorted(p.offsets, source, side="right") - 1
        weight_N = np.ones(len(source), np.float32)
        lengths = np.array(p.segment_lengths)
        out.append(MicroBatch(p, source, p.input_ids_T[source + 1], weight_N, row_N, lengths, ("even", "odd")))
    return out


def loop_of(model: ErnieModel, case: dict[str, Any], engine: DistributedEngine | None = None) -> Loop:
    named = [(n, p) for n, p in model.named_parameters() if not p.stop_gradient]
    make = adamw_maker(named, lambda _: 1.0, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-3)
    optimizer = engine.optimizer(make) if engine else make([p for _, p in named])
    settings = LoopSettings(
        max_grad_norm=MAX_NORM,
        router=RouterLossWeights(0.01, 0.01, 0.001) if case.get("router") else None,
        bias_update=0.01 if case.get("router") else 0.0,
        recompute=recompute() if case.get("recompute") else None,
    )
    return Loop(model, SFTObjective(), optimizer, Schedule(1e-2, 100, shape="constant"), settings, engine)


# --- remedies taken away --------------------------------------------------------------------------


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def counted_everywhere(model: ErnieModel) -> None:
    """Traps d and w: what several stages hold is counted by each of them."""
    for parameter in model.parameters():
        parameter.is_firstly_shared = True


class _FillersCount(train_pipeline.WindowProgram):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.filler = dataclasses.replace(self.passages[-1])


def _averaging(strategy: Any) -> Any:
    strategy.hybrid_configs = {"pp_configs": {"delay_scale_loss": False}}
    return strategy


MUTANTS: dict[str, Callable[[], Any]] = {
    "tied gradients stay apart": lambda: replaced(
        fleet_pipeline._Container, "allreduce_shared_weight_gradients", lambda self: None
    ),
    "mean over micro-batches": lambda: replaced(
        fleet_pipeline,
        "_engine_strategy",
        lambda strategy, accumulation, right=fleet_pipeline._engine_strategy: _averaging(right(strategy, accumulation)),
    ),
    "tower is not run again": lambda: replaced(SharedTower, "backward", lambda self: None),
    "tower gradients stay apart": lambda: replaced(Group, "sum_", lambda self, x: x),
    "router losses on every filler": lambda: replaced(train_pipeline, "WindowProgram", _FillersCount),
    "boundaries keep their length": lambda: replaced(
        fleet_pipeline._Container, "filled", lambda self, hidden: hidden.clone()
    ),
    "frozen below": lambda: replaced(parallelize, "_open", lambda model, first: None),
    "tower and head counted everywhere": contextlib.nullcontext,
    "one stage has another window": contextlib.nullcontext,
}


# --- one case -------------------------------------------------------------------------------------


def gradients(loop: Loop, one: list[MicroBatch]) -> dict[str, np.ndarray | None]:
    """The window's gradient by parameter name, as the optimizer would see it."""
    loop.model.train()
    loop.accumulate(one)
    loop.engine.synchronise(loop.parameters)
    found = {
        n: None if p.grad is None else p.grad.numpy() for n, p in loop.model.named_parameters() if not p.stop_gradient
    }
    loop.clear_gradients()
    return found


def furthest(mine: dict[str, np.ndarray | None], want: dict[str, np.ndarray | None]) -> float:
    """Largest distance of this rank's arrays from those of one process; infinite where only one of
    them has an array.
    """
    worst = 0.0
    for name, value in mine.items():
        other = want[name]
        if (value is None) != (other is None):
            return float("inf")
        if value is not None and other is not None:
            worst = max(worst, float(np.abs(value.astype(np.float64) - other).max()))
    return worst


def values(model: ErnieModel) -> dict[str, np.ndarray | None]:
    return {name: p.numpy() for name, p in model.named_parameters()}


def run(case: dict[str, Any], mesh: Mesh) -> dict[str, float]:
    config = config_of(case)
    accumulation = case.get("accumulation", 4)
    whole = build(case, config)
    mine = stages_of(cut_of(config, mesh.layout, case.get("bounds", ())), mesh.rank_in("pipe"))
    model = build(case, config, mine if case.get("only_own_weights", True) else None)
    start = values(whole)
    engine = DistributedEngine.lay(
        model, mesh, accumulation=accumulation, bounds=case.get("bounds", ()), self_check="mutant" not in case
    )
    if case.get("mutant") == "tower and head counted everywhere":
        counted_everywhere(model)
    loops = loop_of(whole, case), loop_of(model, case, engine)
    count = case.get("micro_batches", accumulation)
    out = {"trained": float(len(loops[1].parameters))}
    one = window(case, config, 0, count)
    want = gradients(loops[0], one)
    cut_short = case.get("mutant") == "one stage has another window" and engine.staged.pipeline.is_last
    out["gradient"] = furthest(gradients(loops[1], one[: count - cut_short]), want)
    out["largest gradient"] = max(float(np.abs(g).max()) for g in want.values() if g is not None)
    windows = [window(case, config, 1 + step, count) for step in range(case.get("steps", 5))]
    records = [list(loop.steps(windows)) for loop in loops]
    for field in ("loss", "grad_norm"):
        out[field] = max(abs(getattr(a, field) - getattr(b, field)) for a, b in zip(*records, strict=True))
    out["clipped"] = float(all(r.grad_norm > MAX_NORM for r in records[0]))
    names = set(records[0][0].metrics)
    out["metrics"] = max(
        abs(a.metrics[n] - b.metrics.get(n, np.inf)) for a, b in zip(*records, strict=True) for n in names
    )
    out["parameters"] = furthest(values(model), values(whole))
    out["moved"] = furthest(values(whole), start)
    if case.get("inference"):
        out.update(inference(whole, engine.callable, one[0], config))
    return out


def inference(whole: ErnieModel, staged: StagedModel, batch: MicroBatch, config: ModelConfig) -> dict[str, float]:
    """Scores, log-probabilities and greedy continuations of packs with and without an image."""
    whole.eval()
    staged.eval()
    objective = SFTObjective()
    with paddle.no_grad():
        hidden = whole(batch.inputs)
        scores = whole.logits(hidden) - staged.logits(staged(batch.inputs))
        logp = objective.outputs(whole, hidden, batch)["logp_N"] - staged.outputs(objective.outputs, batch)["logp_N"]
        rng = np.random.default_rng(9)
        prompts = [row(rng, 16 + 3 * i, (1, 4, 4) if i else None) for i in range(3)]
        params = SamplingParams(max_new_tokens=5, temperature=0.0)
        answers = [
            [[c.token_ids for c in one] for one in generate(m, prompts, config.tokens, params)] for m in (whole, staged)
        ]
    return {
        "scores": float(scores.abs().max()),
        "logp": float(logp.abs().max()),
        "answers": float(answers[0] != answers[1]),
    }


def main() -> None:
    folder, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
    mesh = init_mesh(Layout(pipe=plan["pipe"], virtual_pipe=plan.get("chunks", 1)))
    found = {}
    for name, case in plan["cases"].items():
        with MUTANTS[case["mutant"]]() if "mutant" in case else contextlib.nullcontext():
            found[name] = run(case, mesh)
        (folder / f"{mesh.rank}.json").write_text(json.dumps(found))
    print("done", flush=True)


if __name__ == "__main__":
    main()

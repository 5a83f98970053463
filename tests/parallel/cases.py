"""Shared by the tests of layouts: one small job, run on one process and under a layout, and what
must be equal. Run by `worker.py` in every process.

A job is a model, what is trained, and a few windows of packed rows of odd lengths with pictures in
some of the micro-batches only. Its result is the losses, the norms, the gradients of the last
window and the parameters after the last step, with clipping active so that a wrong norm shows.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.data.batching import MicroBatch, Sample, collate
from ernie_tune.generate.batch import generate
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.machine.alone import LocalEngine
from ernie_tune.machine.fleet import DistributedEngine, Laid, spread
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import Row
from ernie_tune.models.presets import preset
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.parallel.mesh import Mesh
from ernie_tune.parallel.placement import placement_of
from ernie_tune.peft.config import BottleneckConfig, LoraConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.freeze import FreezeSpec, opened
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.quantize import quantize_base
from ernie_tune.train.loop import Loop, LoopSettings
from ernie_tune.train.optim import LrRatios, Schedule, adamw_maker
from ernie_tune.train.sft import SFTObjective

MAX_NORM = 0.5
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Job:
    """`model`: "a" (28B-like: tied, shared experts), "c" (424B-like: untied, none), "d" ("a" with
    six layers). `train`: what is trained. `images`:
    micro-batches with pictures. `micro_batches`: of all ranks in a window.
    """

    model: str = "a"
    train: str = "full"
    images: tuple[int, ...] = (0, 3)
    recompute: bool = False
    bias_update: float = 0.0
    balance: float | tuple[float, ...] = 0.0  # alone, or with the orthogonal and the z loss
    optimizer: str = "adamw"
    micro_batches: int = 4
    steps: int = 5
    dtype: str = "float32"
    lazy: bool = False  # under a layout: no process ever holds the whole model

    @property
    def key(self) -> str:
        return "-".join(str(value).replace("/", "") for value in dataclasses.astuple(self)).replace(" ", "")


def config_of(name: str) -> ModelConfig:
    """The tiny presets, their last layers cut off."""
    base, layers = {"a": ("tiny-a", 3), "c": ("tiny-c", 4), "d": ("tiny-a", 6)}[name]
    c = preset(base)
    if c.moe is None:
        raise AssertionError("the tiny presets have experts")
    moe = dataclasses.replace(c.moe, layer_indices=tuple(range(c.moe.layer_indices[0], layers)))
    return dataclasses.replace(c, num_hidden_layers=layers, moe=moe)


def build_model(job: Job) -> Any:
    """The model with values drawn by name, and what the job trains."""
    model = AutoModel.from_config(config_of(job.model), seed=3, dtype=job.dtype)
    if job.lazy:
        return model
    with paddle.no_grad():
        for name, value in model.named_parameters():
            if "e_score" in name:
                value.set_value(paddle.to_tensor(draw(name, value.shape, 0.01), dtype=value.dtype))
                value.stop_gradient = True
    kind, _, option = job.train.partition(":")
    if kind == "full":
        return model
    if kind == "frozen":  # a part alone
        FreezeSpec(trainable=option.split("+")).apply(model)
        return model
    if option:
        quantize_base(model, option)
    configs: dict[str, Any] = {
        "lora": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", freeze_config=("freeze_vision",)),
        "dora": LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True, freeze_config=("freeze_vision",)),
        "expert_lora": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], expert_targets="both"),
        "some_experts": LoraConfig(
            r=4, lora_alpha=8, target_modules=["o_proj"], expert_targets=[(1, "text", 0), (1, "text", 1), (2, "vision", 5)]
        ),
        "saved": LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "bottleneck": BottleneckConfig(8),
        "prompt": PromptConfig(3, 8),
        "prefix": PrefixConfig(3),
    }  # fmt: skip
    tuned = PeftModel(model, configs[kind])
    for name, value in tuned.named_parameters():
        # B factors, which are zero at the start
        if not value.stop_gradient and not np.abs(value.numpy()).max() > 0:
            value.set_value(paddle.to_tensor(draw(name, value.shape, 0.05), dtype=value.dtype))
    return tuned


def draw(name: str, shape: Any, scale: float) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(key=[11, zlib.crc32(name.encode())]))
    return rng.standard_normal(list(shape), np.float32) * np.float32(scale)


def windows_of(job: Job, steps: int = 0) -> list[list[MicroBatch]]:
    """The same for every layout: `steps` windows of packs, each of two rows."""
    config = config_of(job.model)
    tokens, patch_dim = config.tokens, 0 if config.vision is None else config.vision.patch_dim
    rng = np.random.default_rng(5)

    def row(length: int, picture: bool) -> Sample:
        ids = rng.integers(3, 590, length)
        pixels = grid = None
        if picture:
            seen = [tokens.image_start, *[tokens.image] * 4, tokens.image_end]
            ids = np.concatenate([ids[:2], seen, ids[2:]])
            pixels, grid = rng.standard_normal((16, patch_dim)).astype(np.float32), np.array([[1, 4, 4]])
        trained = rng.random(len(ids)) < 0.6
        trained[-1] = True
        return Sample(
            Row(ids.astype(np.int64), pixels, grid), trained, rng.uniform(0.5, 2, len(ids)).astype(np.float32)
        )

    return [
        [
            collate([row(int(rng.integers(5, 14)), i in job.images), row(int(rng.integers(4, 9)), False)], tokens)
            for i in range(job.micro_batches)
        ]
        for _ in range(steps or job.steps)
    ]


class _Seen(LocalEngine):
    """Keeps the gradients that the norm was taken of, at every call the last ones."""

    def norm(self, parameters: Any) -> float:
        self.gradients = gradients_of(self.model)
        return super().norm(parameters)


class _SeenOnMesh(DistributedEngine):
    def norm(self, parameters: Any) -> float:
        self.gradients = gradients_of(self.model)
        return super().norm(parameters)


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    return {
        name: p.grad.numpy().copy()
        for name, p in model.named_parameters()
        if not p.stop_gradient and p.grad is not None
    }


def run(job: Job, mesh: Mesh | None = None, self_check: bool = True) -> dict[str, Any]:
    """The job on this process alone, or on a mesh."""
    how: dict[str, Any] = {"self_check": self_check}
    engine: Any
    if mesh is None:
        model, engine = build_model(job), _Seen()
    elif job.lazy:
        laid: list[Laid] = []

        def lay(empty: ErnieModel) -> Any:
            assert not any(p._is_initialized() for p in empty.parameters())
            laid.append(spread(empty, mesh))
            return Laid.part

        model = AutoModel.from_config(config_of(job.model), seed=3, lay=lay)
        engine = _SeenOnMesh.over(model, mesh, laid[0], accumulation=job.micro_batches // mesh.batch[1], **how)
    else:
        model = build_model(job)
        engine = _SeenOnMesh.lay(model, mesh, accumulation=job.micro_batches // mesh.batch[1], **how)
    engine.model = model
    named = [(n, p) for n, p in model.named_parameters() if not p.stop_gradient]
    ratios = LrRatios()
    if job.optimizer == "sgd":
        make: Callable[[list[Any]], Any] = lambda ps: paddle.optimizer.SGD(1.0, parameters=ps)  # noqa: E731
    else:
        make = adamw_maker(named, ratios.of, weight_decay=0.1, beta1=0.9, beta2=0.95, epsilon=1e-5)
    optimizer = make([p for _, p in named]) if mesh is None else engine.optimizer(make)
    settings = LoopSettings(
        max_grad_norm=MAX_NORM,
        router=RouterLossWeights(*np.atleast_1d(job.balance).tolist()) if job.balance else None,
        bias_update=job.bias_update,
        recompute=_recompute(job.train != "full" and not job.train.startswith("frozen")) if job.recompute else None,
    )
    loop = Loop(
        model,
        SFTObjective(),
        optimizer,
        Schedule(0.05 if job.optimizer == "sgd" else 2e-3, job.steps, 1),
        settings,
        engine,
    )
    rank, size = (0, 1) if mesh is None else mesh.batch
    records = list(loop.steps([window[rank::size] for window in windows_of(job)]))
    with engine.whole(), paddle.no_grad():
        asked = model if mesh is None else engine.callable
        asked.eval()
        batch = windows_of(job, 1)[0][0]
        scores = asked.logits(asked(batch.inputs)).numpy()
        # without the adapter its copy of the head goes, and the first head comes back
        if job.train == "saved":
            with model.disable_adapter():
                scores = np.stack([scores, asked.logits(asked(batch.inputs)).numpy()])
        prompts = [
            Row(np.arange(7, 12)),
            Row(np.arange(20, 23)),
        ]  # two tokens a step under two tensor ranks, one after the first ends
        params = SamplingParams(max_new_tokens=3, temperature=0.0)
        answers = [
            c.token_ids
            for one in generate(asked, prompts[: 1 + (job.model == "a")], model.config.tokens, params)
            for c in one
        ]
    with engine.whole():
        parameters = {name: p.numpy() for name, p in model.named_parameters()}
    return {
        "losses": [r.loss for r in records],
        "norms": [r.grad_norm for r in records],
        "tokens": [r.num_tokens for r in records],
        "nll": [r.metrics["nll"] for r in records],
        "gradients": engine.gradients,
        "parameters": parameters,
        "scores": scores,
        "answers": answers,
        "released": sum(not p._is_initialized() for p in model.parameters()),
        "placements": {name: placement_of(p) for name, p in model.named_parameters()},
        "owner_of": {name: engine.owner_of.get(p.name) for name, p in named} if mesh is not None else {},
    }


def _recompute(plain: bool = False) -> Any:
    from paddle.distributed.fleet.utils import recompute

    return recompute if plain else opened(recompute)


def compare(want: dict[str, Any], got: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """The largest differences, each with the name of what differs most; parameters and gradients of
    this rank against its slice of the whole.
    """
    worst: dict[str, Any] = {}
    for kind in ("losses", "norms", "nll", "tokens"):
        a, b = (np.array(x[kind], np.float64) for x in (want, got))
        worst[kind] = (float((np.abs(a - b) / np.maximum(1.0, np.abs(a))).max()), f"{a[-1]:.9g} {b[-1]:.9g}")
    if mesh.layout.sharding_stage == 3:  # between uses some parameters of the blocks are elsewhere
        worst["released"] = (0.0 if got["released"] > 10 else float("inf"), f"{got['released']} parameters")
    worst["scores"] = (float(np.abs(want["scores"] - got["scores"]).max()), "evaluation")
    worst["answers"] = (float(want["answers"] != got["answers"]), str(got["answers"]))
    for kind in ("gradients", "parameters"):
        worst[kind] = (0.0, "")
        for name, value in got[kind].items():
            owner = got["owner_of"].get(name)
            if kind == "gradients" and owner is not None:
                axis = "expert_data" if got["placements"][name].expert and mesh.layout.fleet_experts else "sharding"
                if mesh.rank_in(axis) != owner:
                    continue
            if name not in want[kind]:
                worst[kind] = (float("inf"), f"{name} has a gradient here alone")
                continue
            difference = np.abs(sliced(want[kind][name], got["placements"][name]) - value)
            worst[kind] = max(worst[kind], (float(difference.max(initial=0.0)), name))
        partly = mesh.size("pipe") > 1 or (kind == "gradients" and mesh.layout.sharding_stage > 1)
        missing = [n for n in want[kind] if n not in got[kind] and not partly and "adapters" not in n]
        if missing:
            worst[kind] = (float("inf"), f"{missing[0]} is missing")
    return worst


def sliced(whole: np.ndarray, placement: Any) -> np.ndarray:
    if placement.axis is None:
        return whole
    return whole.take(placement.indices(whole.shape[placement.axis]), placement.axis)

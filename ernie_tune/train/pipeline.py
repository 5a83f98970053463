"""A window through a pipeline of the model's stages: the vision tower shared out before it, the objective on its last stage.

Knows the model's stage list and the objective; `parallel/pipeline.py` knows Fleet. Refuses to know: optimizers, norms, other axes.
Legend: T tokens, D width, P patches, W tower width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.models.config import ModelConfig
from ernie_tune.models.ernie import ErnieModel, Recompute, SequenceContext, stages
from ernie_tune.models.moe import RouterTap
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.parallel.balance import SharedWork
from ernie_tune.parallel.mesh import Group, Mesh
from ernie_tune.parallel.pipeline import Cut, Pipeline
from ernie_tune.train.objective import Objective

# Patches that go through the tower at once.
TOWER_PATCHES = 16384
Metrics = dict[str, tuple[float, float]]


# --- the model as items ----------------------------------------------------------------------------------------------


def pipeline_items(config: ModelConfig) -> list[str]:
    """Names of the pipeline's items: the model's stages, and the head also where it is tied (57 for 54 layers, 31 for 28)."""
    names = [name for name, _ in stages(config)]
    return names if names[-1] == "lm_head" else [*names, "lm_head"]


def item_costs(config: ModelConfig) -> list[float]:
    """Products of one text token in each item, in units of parameters met; what a balanced cut is balanced by (parallel.md 5.3)."""
    c, moe = config, config.moe
    head_width = c.head_dim
    attention = c.hidden_size * head_width * 2 * (c.num_attention_heads + c.num_key_value_heads)
    dense = 3 * c.hidden_size * c.intermediate_size
    sparse = 0
    if moe is not None:
        sparse = c.hidden_size * (
            3 * (moe.top_k * moe.intermediate_size[0] + moe.shared_intermediate_size) + moe.num_experts
        )
    layers = [float(attention + (sparse if c.is_moe_layer(i) else dense)) for i in range(c.num_hidden_layers)]
    return [0.0, *layers, 0.0, float(c.vocab_size * c.hidden_size)]


def stages_of(cut: Cut, config: ModelConfig, stage: int) -> frozenset[str]:
    """What the model keeps on one stage (`ErnieModel.keep`): its items, the tower everywhere, the resampler first, a tied embedding also last."""
    names = set(cut.items_of(stage)) | {"vision_model"}
    if stage == 0:
        names.add("resampler_model")
    if config.tie_word_embeddings and "lm_head" in names:
        names.add("embed_tokens")
    return frozenset(names)


def build_pipeline(model: ErnieModel, cut: Cut, accumulation: int, mesh: Mesh) -> Pipeline:
    """Fleet's pipeline around the stages of `model`, which has kept those of this rank. Marks what several stages hold (traps d and w)."""
    tied = ("embed_tokens", "lm_head", model.embed_tokens) if model.config.tie_word_embeddings else None
    pipeline = Pipeline(cut, accumulation, mesh, tied)
    for parameter in tower_parameters(model):
        parameter.is_firstly_shared = pipeline.stage == 0
    return pipeline


def tower_parameters(model: ErnieModel) -> list[Tensor]:
    """The trained parameters of the vision tower, which every stage holds."""
    if model.config.vision is None:
        return []
    return [p for p in model.vision_model.parameters() if not p.stop_gradient]


# --- the vision tower ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """One frame of an image or video: attention in the tower never leaves it."""

    pixels_PC: np.ndarray
    grid: tuple[int, int, int]


class SharedTower:
    """The tower over all frames of a window, dealt out over the pipeline's ranks (parallel.md 1.6).

    `features` runs it without a graph; for a trained tower, `backward` runs it again after the pipeline, with one, on the gradients that the first
    stage has collected, and sums the parameters' gradients over the pipeline.
    """

    def __init__(self, model: ErnieModel, window: Sequence[Any], group: Group, recompute: Recompute | None) -> None:
        self.model, self.group, self.recompute = model, group, recompute
        self.patches = [0 if b.inputs.pixel_values_PC is None else len(b.inputs.pixel_values_PC) for b in window]
        frames = [frame for batch in window for frame in _frames(batch)]
        self.work = SharedWork([len(f.pixels_PC) for f in frames], group) if frames else None
        self.mine = [frames[i] for i in self.work.mine] if self.work else []
        self.trained = tower_parameters(model)
        self.leaves: list[Tensor | None] = []

    def features(self) -> list[Tensor | None]:
        """Tower outputs [P, W] of each micro-batch on the first stage; None for those without images, and on other stages."""
        self.leaves = [None] * len(self.patches)
        if self.work is None:
            return self.leaves
        with paddle.no_grad():
            parts = [self._run(chunk) for chunk in self._chunks()]
            rows_PW = paddle.concat(parts) if parts else self._no_rows()
            gathered = self.work.to_first(rows_PW)
        if gathered is not None:
            at = 0
            for i, count in enumerate(self.patches):
                if count:
                    leaf = gathered[at : at + count].detach()
                    leaf.stop_gradient = not self.trained
                    self.leaves[i] = leaf
                at += count
        return self.leaves

    def backward(self) -> None:
        """The second pass. Nothing where the tower is frozen or the window has no images."""
        if self.work is None or not self.trained:
            return
        held = [leaf for leaf in self.leaves if leaf is not None]
        rows = [leaf.grad if leaf.grad is not None else paddle.zeros_like(leaf) for leaf in held]
        grad_PW = self.work.from_first(paddle.concat(rows) if rows else None, self._no_rows())
        at = 0
        for chunk in self._chunks():
            size = sum(len(f.pixels_PC) for f in chunk)
            paddle.autograd.backward([self._run(chunk)], [grad_PW[at : at + size]])
            at += size
        with paddle.no_grad():
            for parameter in self.trained:
                if parameter.grad is None:
                    parameter.grad = paddle.zeros_like(parameter)
                self.group.sum_(parameter.grad)

    def _chunks(self) -> list[list[_Frame]]:
        chunks: list[list[_Frame]] = []
        size = TOWER_PATCHES + 1
        for frame in self.mine:
            size += len(frame.pixels_PC)
            if size > TOWER_PATCHES:
                chunks.append([])
                size = len(frame.pixels_PC)
            chunks[-1].append(frame)
        return chunks

    def _run(self, frames: Sequence[_Frame]) -> Tensor:
        pixels = paddle.to_tensor(np.concatenate([f.pixels_PC for f in frames]), dtype=self.model.compute_dtype)
        return self.model.vision_model(pixels, np.array([f.grid for f in frames]), self.recompute)

    def _no_rows(self) -> Tensor:
        vision = self.model.config.vision
        if vision is None:
            raise ValueError("a text-only model was given images; load an ERNIE-4.5-VL model or drop the images")
        return paddle.zeros([0, vision.hidden_size], self.model.compute_dtype)


def _frames(batch: Any) -> list[_Frame]:
    inputs = batch.inputs
    if inputs.pixel_values_PC is None:
        return []
    out, at = [], 0
    for t, h, w in np.asarray(inputs.grid_thw_n3).tolist():
        for _ in range(t):
            out.append(_Frame(inputs.pixel_values_PC[at : at + h * w], (1, h, w)))
            at += h * w
    return out


# --- the program -----------------------------------------------------------------------------------------------------


@dataclass
class WindowProgram:
    """What this rank's stages do on the micro-batches of one window. Micro-batches past its end are fillers and count nothing."""

    model: ErnieModel
    objective: Objective
    window: Sequence[Any]
    features: Sequence[Tensor | None]
    divisor: float = 1.0
    router: RouterLossWeights | None = None
    router_scale: float = 1.0
    count_usage: bool = False
    recompute: Recompute | None = None
    loss: float = 0.0
    metrics: Metrics = field(default_factory=dict)
    contexts: dict[int, SequenceContext] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.packs = [self.model.prepared(batch.inputs) for batch in self.window]

    def _place(self, micro: int) -> int:
        return min(micro, len(self.window) - 1)

    def rows(self, micro: int) -> int:
        return self.packs[self._place(micro)][0].num_tokens

    def run(self, item: str, micro: int, hidden: Tensor | None) -> Tensor:
        if item == "embed_tokens":
            return self._embed(micro)
        if hidden is None:
            raise AssertionError("only the first item starts from nothing")
        if item == "norm":
            return self.model.norm(hidden)
        if item == "lm_head":  # a place in the list; the objective applies the matrix where it needs it
            return hidden
        layer, ctx = self.model.layers[int(item.removeprefix("layers."))], self._context(micro)
        return self.recompute(layer, hidden, ctx) if self.recompute else layer(hidden, ctx)

    def _embed(self, micro: int) -> Tensor:
        inputs, rows_PW = self.packs[self._place(micro)][0], self.features[self._place(micro)]
        features = None if rows_PW is None else self.model.resampler_model(rows_PW, inputs.grid_thw_n3)
        x_TD = self.model.embed(inputs, features)
        if x_TD.stop_gradient and paddle.is_grad_enabled():
            # Trap p: below a boundary something must need a gradient, or the stages wait for each other for ever.
            x_TD = x_TD.detach()
            x_TD.stop_gradient = False
        return x_TD

    def _context(self, micro: int) -> SequenceContext:
        if micro not in self.contexts:
            tap = None
            if (self.router or self.count_usage) and micro < len(self.window):
                tap = RouterTap(self.router, scale=self.router_scale, count_usage=self.count_usage)
            self.contexts[micro] = self.model.context(self.packs[self._place(micro)][0], tap, None, self.recompute)
        return self.contexts[micro]

    def finish(self, micro: int, hidden: Tensor) -> Tensor:
        if micro >= len(self.window):
            return hidden.astype("float32").sum() * 0.0
        batch, real_T = self.window[micro], self.packs[micro][1]
        if real_T is not None:
            hidden = paddle.gather(hidden, paddle.to_tensor(real_T))
        out = self.objective.loss(self.objective.outputs(self.model, hidden, batch), batch)
        for name, (total, count) in out.metrics.items():
            before = self.metrics.get(name, (0.0, 0.0))
            self.metrics[name] = (before[0] + total, before[1] + count)
        share = out.total / self.divisor
        self.loss += float(share)
        return share.astype("float32")


def from_last_stage(pipeline: Pipeline, loss: float, metrics: Metrics) -> tuple[float, Metrics]:
    """The last stage's loss and metrics, on all ranks of the pipeline, bit for bit."""
    found: tuple[float, Metrics] = pipeline.group.objects((loss, metrics))[-1]
    return found

"""The vision tower outside the pipeline: all frames of a window dealt out over the pipeline's
ranks, their outputs brought to the first stage, and for a trained tower a second pass on the
gradients that came back.

Every rank of a pipeline reads the same rows, so no pixels travel. Refuses to know: the decoder,
schedules, objectives.
Legend: P patches, C values of a patch, W tower width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.config.language import say
from ernie_tune.models.ernie import ErnieModel, Recompute
from ernie_tune.models.inputs import PackedInput
from ernie_tune.parallel.balance import SharedWork
from ernie_tune.parallel.mesh import Group

# Patches that go through the tower at once.
TOWER_PATCHES = 16384


def tower_parameters(model: ErnieModel) -> list[Tensor]:
    """The trained parameters of the vision tower, which every stage holds."""
    if model.config.vision is None:
        return []
    return [p for p in model.vision_model.parameters() if not p.stop_gradient]


@dataclass(frozen=True)
class _Frame:
    """One frame of an image or video: attention in the tower never leaves it."""

    pixels_PC: np.ndarray
    grid: tuple[int, int, int]


class SharedTower:
    """The tower over all frames of some packs.

    `features` runs it without a graph; for a trained tower, `backward` runs it again after the
    pipeline, with one, on the gradients that the first stage has collected, and sums the
    parameters' gradients over the pipeline.
    """

    def __init__(
        self, model: ErnieModel, packs: Sequence[PackedInput], group: Group, recompute: Recompute | None = None
    ) -> None:
        self.model, self.group, self.recompute = model, group, recompute
        self.patches = [0 if pack.pixel_values_PC is None else len(pack.pixel_values_PC) for pack in packs]
        frames = [frame for pack in packs for frame in _frames(pack)]
        if frames and model.config.vision is None:
            raise ValueError(
                say(
                    "a text-only model was given images; load an ERNIE-4.5-VL model or drop the images",
                    "纯文本模型收到了图片；请加载 ERNIE-4.5-VL 模型，或去掉图片",
                )
            )
        self.work = SharedWork([len(f.pixels_PC) for f in frames], group) if frames else None
        self.mine = [frames[i] for i in self.work.mine] if self.work else []
        self.trained = tower_parameters(model)
        self.leaves: list[Tensor | None] = []

    def features(self) -> list[Tensor | None]:
        """Tower outputs [P, W] of each micro-batch on the first stage; None for those without
        images, and on other stages.
        """
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
        leaves, self.leaves = self.leaves, self.leaves if self.trained else []
        return leaves

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
        return paddle.zeros([0, vision.hidden_size if vision else 0], self.model.compute_dtype)


def _frames(pack: PackedInput) -> list[_Frame]:
    if pack.pixel_values_PC is None:
        return []
    out, at = [], 0
    for t, h, w in np.asarray(pack.grid_thw_n3).tolist():
        for _ in range(t):
            out.append(_Frame(pack.pixel_values_PC[at : at + h * w], (1, h, w)))
            at += h * w
    return out

"""AdamW groups, learning-rate schedules, and what of an optimizer is saved.

Refuses to know: models' classes, batches, distribution (under Fleet the optimizer is wrapped from
outside).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import paddle
from paddle import Tensor

from ernie_tune.config.language import say

SCHEDULES = ("cosine", "linear", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step, 0-based: linear warm-up to `peak`, then the named shape. It would
    reach `floor` at step `total_steps`, the first that is no longer made, as in other trainers.
    "constant" has no warm-up, as in transformers, "constant_with_warmup" has. The first step of a
    warm-up has peak / warmup_steps, where transformers gives it 0 and so makes it without effect: a
    warm-up here is one step ahead of theirs, and equal from its end on.
    """

    peak: float
    total_steps: int
    warmup_steps: int = 0
    shape: str = "cosine"
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SCHEDULES:
            raise ValueError(
                say(
                    f"lr_scheduler_type ({self.shape!r}) must be one of {SCHEDULES}; use 'cosine'",
                    f"lr_scheduler_type（{self.shape!r}）须为 {SCHEDULES} 之一；可用 'cosine'",
                )
            )
        if self.warmup_steps > self.total_steps:
            raise ValueError(
                say(
                    f"warmup_steps ({self.warmup_steps}) must not exceed the steps of the run ("
                    f"{self.total_steps}); lower it",
                    f"warmup_steps（{self.warmup_steps}）不能超过总步数（{self.total_steps}）；请调小",
                )
            )
        if self.shape.startswith("constant") and self.floor > 0:
            raise ValueError(
                say(
                    f"min_lr ({self.floor}) must be 0 with lr_scheduler_type {self.shape}, which never falls; "
                    "remove it",
                    f"lr_scheduler_type {self.shape} 从不下降，min_lr（{self.floor}）须为 0；请去掉",
                )
            )

    def at(self, step: int) -> float:
        """Rate of optimizer step `step`; the first warm-up step is peak / warmup_steps, not 0."""
        if self.shape == "constant":
            return self.peak
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.shape == "constant_with_warmup":
            return self.peak
        done = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        share = 0.5 * (1 + math.cos(math.pi * done)) if self.shape == "cosine" else 1 - done
        return self.floor + (self.peak - self.floor) * share


@dataclass(frozen=True)
class LrRatios:
    """Learning rates relative to the schedule's (ERNIEKit's VL recipe)."""

    router: float = 0.01
    vision: float = 0.9

    def of(self, name: str) -> float:
        """Ratio of one canonical parameter name."""
        if ".mlp.gate.weight" in name:
            return self.router
        return self.vision if "vision_model." in name else 1.0


def no_decay(name: str, parameter: Tensor) -> bool:
    """Norms, biases and other vectors are not decayed."""
    return parameter.ndim < 2 or "norm" in name.rsplit(".", 2)[-2:][0]


def build_adamw(
    named: Sequence[tuple[str, Tensor]],
    ratio: Callable[[str], float],
    *,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> paddle.optimizer.AdamW:
    """AdamW over the trainable parameters, one group per (ratio, decay). Raises ValueError when
    nothing is trainable.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in named:
        if not parameter.stop_gradient:
            groups.setdefault((ratio(name), 0.0 if no_decay(name, parameter) else weight_decay), []).append(parameter)
    if not groups:
        raise ValueError(
            say(
                "trainable parameters (0) must be at least 1; the freeze settings leave nothing to train",
                "没有可训练的参数；冻结设置把全部参数都冻住了",
            )
        )
    return paddle.optimizer.AdamW(
        learning_rate=1.0,
        beta1=beta1,
        beta2=beta2,
        epsilon=epsilon,
        parameters=[{"params": ps, "learning_rate": r, "weight_decay": wd} for (r, wd), ps in groups.items()],
        weight_decay=0.0,
        multi_precision=True,
    )


def adamw_maker(
    named: Sequence[tuple[str, Tensor]],
    ratio: Callable[[str], float],
    *,
    weight_decay: float,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> Callable[[list[Tensor]], paddle.optimizer.Optimizer]:
    """`build_adamw` for engines that take a plain list of parameters, and some of them at a time:
    the same steps, with ratios noted on the parameters.
    """
    undecayed = {p.name for name, p in named if no_decay(name, p)}
    for name, parameter in named:
        parameter.optimize_attr = {"learning_rate": ratio(name)}

    def make(parameters: list[Tensor]) -> paddle.optimizer.Optimizer:
        return paddle.optimizer.AdamW(
            learning_rate=1.0,
            beta1=beta1,
            beta2=beta2,
            epsilon=epsilon,
            parameters=parameters,
            weight_decay=weight_decay,
            apply_decay_param_fun=lambda name: name not in undecayed,
            multi_precision=True,
        )

    return make

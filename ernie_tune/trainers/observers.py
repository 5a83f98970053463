"""Callbacks: what users hand to a run to watch it.

They see and cannot change: what changes a gradient, or when a run ends, is a call in the step or a
setting. Callbacks have the methods and arguments of transformers' `TrainerCallback` (any of
on_train_begin, on_step_end, on_log, on_evaluate, on_save, on_train_end), or are plain callables
that get every logged record. Refuses to know: the loop, what is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ernie_tune.config.language import say

EVENTS = ("on_train_begin", "on_step_end", "on_log", "on_evaluate", "on_save", "on_train_end")


@dataclass(frozen=True)
class RunState:
    """Where a run is, under the names of transformers' `TrainerState`."""

    global_step: int
    max_steps: int
    epoch: float
    log_history: Sequence[Mapping[str, Any]] = ()
    best_metric: float | None = None
    is_world_process_zero: bool = True


class Watching:
    """transformers' `TrainerControl`, to be read only: setting a flag raises ValueError."""

    should_training_stop = should_epoch_stop = should_save = should_evaluate = should_log = False

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError(
            say(
                f"control.{name} must not be set: callbacks observe; use settings (early_stopping_patience, save_steps, eval_steps, …)",
                f"不能设置 control.{name}：回调只能观察；请使用设置（early_stopping_patience、save_steps、eval_steps 等）",
            )
        )


@dataclass
class Observers:
    """The callbacks of a trainer, called in the order in which they were given. What they raise
    ends the run."""

    callbacks: list[Any] = field(default_factory=list)
    args: Any = None

    def add(self, callback: Any) -> None:
        """One more. Raises ValueError for what is neither callable nor has one of EVENTS."""
        callback = callback() if isinstance(callback, type) else callback
        if not callable(callback) and not any(hasattr(callback, name) for name in EVENTS):
            raise ValueError(
                say(
                    f"callback ({callback!r}) must be callable or have one of {', '.join(EVENTS)}; pass such an object",
                    f"回调（{callback!r}）须可调用，或具有 {', '.join(EVENTS)} 之一；请传入这样的对象",
                )
            )
        self.callbacks.append(callback)

    def tell(self, event: str, state: RunState, **facts: Any) -> None:
        """Call `event` of those that have it; plain callables hear on_log, as (step, record)."""
        for callback in self.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(self.args, state, Watching(), **facts)
            elif event == "on_log" and not any(hasattr(callback, name) for name in EVENTS):
                callback(state.global_step, facts["logs"])

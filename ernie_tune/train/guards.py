"""Watchers of a run: forgetting, no more progress, divergence, and signs that nothing is learned.
They look at numbers and answer with a verdict.

Every watcher has state_dict and load_state_dict (JSON), so a resumed run judges as an uninterrupted
one. Refuses to know: models, data, files; the caller prints the message and stops, or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from ernie_tune.config.language import Text, say


@dataclass(frozen=True)
class Verdict:
    """Something to tell the user, and whether to end the run because of it."""

    message: str
    stop: bool = False


@dataclass(frozen=True)
class GuardScore:
    """One look at a guard set. `low`, `high`: the interval of the change. `alarm`: the score fell
    by more than the tolerance, and not by chance.
    """

    name: str
    baseline: float
    score: float
    low: float
    high: float
    alarm: bool

    @property
    def message(self) -> Text:
        change = f"{self.score - self.baseline:+.4f}"
        return say(
            f"guard set {self.name}: {self.baseline:.4f} before training, {self.score:.4f} now (change {change}, "
            f"95 % interval {self.low:+.4f} to {self.high:+.4f})",
            f"守护数据集 {self.name}：训练前 {self.baseline:.4f}，现在 {self.score:.4f}（变化 {change}，"
            f"95 % 区间 {self.low:+.4f} 至 {self.high:+.4f}）",
        )


class ForgettingGuard:
    """Compares rows that training should leave alone with what the model scored on them before:
    baseline[set] holds one score a row.

    Alarm: the mean fell by more than `tolerance` and the 95 % interval of the change, from
    `bootstrap` resamples of the rows (before and after together), lies below zero. Raises
    ValueError for sets without rows, unknown sets, and row counts that differ from the baseline's.
    """

    def __init__(
        self,
        baseline: Mapping[str, Sequence[float]],
        tolerance: float = 0.02,
        bootstrap: int = 2000,
        *,
        stop: bool = False,
        seed: int = 0,
    ) -> None:
        for name, scores in baseline.items():
            if not scores:
                raise ValueError(
                    say(
                        f"guard set {name} (0 rows) must have at least one row; add rows or drop the set",
                        f"守护数据集 {name}（0 行）至少要有一行；请补充，或去掉它",
                    )
                )
        self.baseline = {name: list(map(float, scores)) for name, scores in baseline.items()}
        self.tolerance, self.bootstrap, self.stop, self.seed = tolerance, bootstrap, stop, seed

    def look(self, name: str, scores: Sequence[float]) -> tuple[GuardScore, Verdict | None]:
        """Judge the present scores of one set, in the rows' order."""
        if name not in self.baseline:
            raise ValueError(
                say(
                    f"guard set {name} must be one of {', '.join(self.baseline)}; score it before training",
                    f"守护数据集 {name} 须为 {', '.join(self.baseline)} 之一；请在训练前打分",
                )
            )
        before_R = np.array(self.baseline[name])
        if len(scores) != len(before_R):
            raise ValueError(
                say(
                    f"guard set {name} ({len(scores)} rows) must have the baseline's {len(before_R)} rows; "
                    "score all of them",
                    f"守护数据集 {name}（{len(scores)} 行）须与基线的 {len(before_R)} 行一致；请全部打分",
                )
            )
        change_R = np.asarray(scores, np.float64) - before_R
        # A fresh generator each time: the verdict depends on the scores alone, not on how often one
        # has looked.
        generator, rows = np.random.default_rng(self.seed), len(change_R)
        means_B = [change_R[generator.integers(0, rows, rows)].mean() for _ in range(self.bootstrap)]
        low, high = np.percentile(means_B, [2.5, 97.5])
        alarm = bool(change_R.mean() < -self.tolerance and high < 0)
        seen = GuardScore(name, float(before_R.mean()), float(np.mean(scores)), float(low), float(high), alarm)
        told = say(
            "the model is forgetting: {seen}; mix in general data, lower the learning rate, or train fewer parameters",
            "模型正在遗忘：{seen}；请混入通用数据、调小学习率，或减少可训练参数",
            seen=seen.message,
        )
        return seen, Verdict(told, self.stop) if alarm else None

    def state_dict(self) -> dict[str, Any]:
        return {"baseline": self.baseline}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.baseline = {name: list(scores) for name, scores in state["baseline"].items()}


class EarlyStopping:
    """Stops after `patience` evaluations in a row that did not better the best by more than
    `min_delta`; 0 never stops, but still knows the best.

    `metric` with or without "eval_". `greater_is_better` None: no for losses, yes for others. A
    value that is no number is no progress.
    """

    def __init__(
        self, patience: int, metric: str = "loss", greater_is_better: bool | None = None, min_delta: float = 0.0
    ) -> None:
        self.patience, self.min_delta = patience, min_delta
        self.metric = metric if metric.startswith("eval_") else f"eval_{metric}"
        self.greater = not metric.endswith("loss") if greater_is_better is None else greater_is_better
        self.best: float | None = None
        self.best_step, self.waited = 0, 0

    @property
    def exhausted(self) -> bool:
        """Whether it has said stop: a run that resumes in this state has nothing left to do."""
        return 0 < self.patience <= self.waited

    def check(self, metrics: Mapping[str, float]) -> None:
        """Raises ValueError if the metric is not among those measured."""
        if self.metric not in metrics:
            known = ", ".join(sorted(name for name in metrics if name.startswith("eval_")))
            raise ValueError(
                say(
                    f"metric_for_best_model ({self.metric}) must be one of {known}; correct the name",
                    f"metric_for_best_model（{self.metric}）须为 {known} 之一；请改正名称",
                )
            )

    def look(self, step: int, metrics: Mapping[str, float]) -> tuple[bool, Verdict | None]:
        """(whether this is the best so far, the verdict). Raises ValueError if the metric was not
        measured.
        """
        self.check(metrics)
        value = float(metrics[self.metric])
        gain = math.inf if self.best is None else (value - self.best) * (1 if self.greater else -1)
        if gain > self.min_delta and not math.isnan(value):
            self.best, self.best_step, self.waited = value, step, 0
            return True, None
        self.waited += 1
        if not self.exhausted:
            return False, None
        best = "never a number" if self.best is None else f"best {self.best:.6g} at step {self.best_step}"
        return False, Verdict(
            say(
                f"early stop at step {step}: {self.metric} has not improved in {self.waited} evaluations ({best})",
                f"第 {step} 步提前停止：{self.metric} 在 {self.waited} 次评测中没有改善（{best}）",
            ),
            True,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]


class DivergenceGuard:
    """Stops at a loss or gradient that is no number; warns once when the loss stays above `factor`
    times its running median for `patience` steps.

    The median is over the last `window` losses that were not above, so that a diverging run does
    not raise its own bar; it counts from `patience` losses on and only while positive (preference
    and policy losses may be negative).
    """

    def __init__(self, factor: float = 4.0, patience: int = 10, window: int = 100) -> None:
        self.factor, self.patience, self.window = factor, patience, window
        self.recent: list[float] = []
        self.above = 0

    def look(self, step: int, loss: float, grad_norm: float = 0.0) -> Verdict | None:
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if not math.isfinite(value):
                return Verdict(
                    say(
                        f"{name} is {value} at step {step}; stopped before it spoils the weights: lower learning_rate, "
                        "or set bf16 instead of fp16; resume from the last checkpoint",
                        f"第 {step} 步 {name} 为 {value}；已在破坏权重之前停止：请调小 learning_rate，或用 bf16 代替 "
                        "fp16；然后从最近的检查点继续",
                    ),
                    True,
                )
        usual = median(self.recent) if len(self.recent) >= self.patience else 0.0
        if usual > 0 and loss > self.factor * usual:
            self.above += 1
            if self.above == self.patience:
                return Verdict(
                    say(
                        f"the run is diverging at step {step}: loss {loss:.4g} is above {self.factor:g} times its "
                        f"median ({usual:.4g}) for {self.above} steps; lower learning_rate or add warmup_steps",
                        f"训练在第 {step} 步发散：损失 {loss:.4g} 连续 {self.above} 步高于中位数（{usual:.4g}）的 "
                        f"{self.factor:g} 倍；请调小 learning_rate，或增加 warmup_steps",
                    )
                )
            return None
        self.above = 0
        self.recent = [*self.recent, loss][-self.window :]
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"recent": self.recent, "above": self.above}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.recent, self.above = list(state["recent"]), state["above"]


@dataclass(frozen=True)
class _Sign:
    """`metric` has looked wrong for `steps` records in a row. `wrong` sees its present and former
    value (nan at first).
    """

    metric: str
    steps: int
    wrong: Callable[[float, float], bool]
    message: str
    message_zh: str


_SIGNS = (
    _Sign("grad_norm", 3, lambda now, _: now == 0, "the gradient is zero: nothing is trained; look at the table of trainable parameters, and at the rewards where answers are sampled", "梯度为零，没有任何内容得到训练；请查看可训练参数表；采样学习时请查看奖励"),
    _Sign("loss", 20, lambda now, before: now == before, "the loss is constant: check the labels, the learning rate and what is frozen", "损失不变；请检查标签、学习率与被冻结的部分"),
    _Sign("learning_rate", 20, lambda now, _: now == 0, "the learning rate is zero: check learning_rate, warmup_steps and max_steps", "学习率为零；请检查 learning_rate、warmup_steps 与 max_steps"),
    _Sign("frac_reward_zero_std", 10, lambda now, _: now == 1, "every answer of a prompt gets the same reward: there is nothing to learn from; test the reward on reference answers, or raise temperature", "同一提问的所有回答奖励相同，没有可学的差别；请用参考回答检验奖励，或调大 temperature"),
    _Sign("reward_std", 10, lambda now, _: now == 0, "the reward is constant: there is nothing to learn from; test it on reference answers", "奖励不变，没有可学的差别；请用参考回答检验奖励"),
    _Sign("rewards/accuracies", 50, lambda now, _: now == 0, "the rejected answer is always preferred: chosen and rejected may be swapped", "总是偏好 rejected；chosen 与 rejected 可能写反了"),
    _Sign("moe/text/dead", 20, lambda now, _: now > 0, "some text experts get no token: raise router_aux_loss_coef", "部分文本专家没有分到 token；请调大 router_aux_loss_coef"),
    _Sign("moe/visual/dead", 20, lambda now, _: now > 0, "some vision experts get no token: raise router_aux_loss_coef", "部分视觉专家没有分到 token；请调大 router_aux_loss_coef"),
)  # fmt: skip


class LearningWatch:
    """Signs in the logged numbers that a run learns nothing. Each warning is given once in a
    run.
    """

    def __init__(self) -> None:
        self.streak: dict[str, int] = {}
        self.former: dict[str, float] = {}
        self.told: list[str] = []

    def look(self, step: int, values: Mapping[str, float]) -> list[Verdict]:
        """The warnings that this record completes."""
        out = []
        for sign in _SIGNS:
            if sign.metric not in values:
                continue
            now, before = float(values[sign.metric]), self.former.get(sign.metric, math.nan)
            self.former[sign.metric] = now
            self.streak[sign.metric] = self.streak.get(sign.metric, 0) + 1 if sign.wrong(now, before) else 0
            if self.streak[sign.metric] >= sign.steps and sign.metric not in self.told:
                self.told.append(sign.metric)
                out.append(
                    Verdict(
                        say(
                            f"step {step}: {sign.message} ({sign.metric}: {now:g} for {sign.steps} records)",
                            f"第 {step} 步：{sign.message_zh}（{sign.metric}：连续 {sign.steps} 条记录为 {now:g}）",
                        )
                    )
                )
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"streak": self.streak, "former": self.former, "told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.streak, self.former, self.told = dict(state["streak"]), dict(state["former"]), list(state["told"])

"""Watchers of learning from sampled answers: rewards that teach nothing, answers that are cut off,
entropy that collapses, rewards that rise while held-out answers get worse.

They read the logged means under TRL's names and answer with verdicts; each speaks once in a run.
Refuses to know: models, data, losses, files. State is JSON, so a resumed run judges as an
uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ernie_tune.config.language import Text, say
from ernie_tune.train.guards import Verdict

ROUNDS = 3  # that must look alike before anything is said
WINDOW = 20  # steps of what is called now, and of what is called the beginning
_SAME = 1e-8
CRITIC_STEPS, CRITIC_WINDOW = 50, 10
_CUT_OFF, _ALIKE, _COLLAPSED = 0.3, 0.8, 0.1
_AS_GOOD = 0.9
LOOKS_EVERY, LOOKS_ROWS = 50, 16  # steps between two looks without pictures, and rows of a look


class HeldOut:
    """Evaluations of held-out rows under one score. State: their means, that of before training
    first; the scores of the best of them by row; how many in a row were clearly below it.
    """

    def __init__(self) -> None:
        self.means: list[float] = []
        self.best: dict[int, float] = {}
        self.falls = 0

    def take(self, scores: Mapping[int, float]) -> None:
        """An evaluation, scores of rows by their numbers. Clearly below the best: on the rows that
        both know by more than two standard errors of the mean difference.
        """
        if not scores:
            return
        self.means.append(float(np.mean(list(scores.values()))))
        both = sorted(set(scores) & set(self.best))
        loss = np.array([self.best[row] - scores[row] for row in both])
        if not both or loss.mean() < 0:
            self.best, self.falls = dict(scores), 0
        elif len(loss) > 1 and loss.mean() > 2 * loss.std(ddof=1) / np.sqrt(len(loss)):
            self.falls += 1
        else:
            self.falls = 0

    def state_dict(self) -> dict[str, Any]:
        return {"held": list(self.means), "best": sorted(self.best.items()), "falls": self.falls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.means = list(state["held"])
        self.best, self.falls = dict(state.get("best", ())), int(state.get("falls", 0))  # older runs have neither


class RolloutWatch:
    """`look` after each step, `measured` after each evaluation. State: the means seen, what was
    said.
    """

    def __init__(self, by_reward: bool = True) -> None:
        """`by_reward` False: something else teaches, and rewards may be missing or alike."""
        self.by_reward = by_reward
        self.seen: dict[str, list[float]] = {}
        self.held, self.right = HeldOut(), HeldOut()  # what held-out answers earn, and how right they are
        self.told: set[str] = set()

    def look(self, step: int, values: Mapping[str, float]) -> list[Verdict]:
        """What a step's numbers give reason to say."""
        for name in (
            "reward",
            "reward_std",
            "frac_reward_zero_std",
            "frac_groups_all_right",
            "completions/clipped_ratio",
            "entropy",
        ):
            if name in values and np.isfinite(values[name]):
                self.seen.setdefault(name, []).append(float(values[name]))
        found = {
            "unjudged": self._unjudged(values) if self.by_reward else None,
            "constant": self._constant() if self.by_reward else None,
            "alike": self._alike() if self.by_reward else None,
            "cut_off": self._cut_off(),
            "entropy": self._entropy(),
            "failing": self._failing(values),
        }
        return self._say(step, found)

    def measured(self, rewards: Mapping[int, float], right: Mapping[int, float] | None = None) -> None:
        """Take in an evaluation: what the answers to held-out rows earn, by the rows' numbers, and
        how right the rows' own checkers call them, whatever is rewarded.
        """
        self.held.take(rewards)
        self.right.take(right or {})

    def fallen(self, step: int) -> list[Verdict]:
        """What the evaluations so far give reason to say."""
        return self._say(step, {"hacking": self._hacking()})

    def sight(self, step: int, seen: float, blind: float, ceiling: float) -> list[Verdict]:
        """What the shares of right answers with pictures and with grey ones give reason to say.
        `ceiling`: what a policy that sees nothing can reach on this data; where that is as much,
        nothing can be told.
        """
        blindly = seen > 0 and blind >= _AS_GOOD * seen and ceiling < _AS_GOOD * seen
        words = say(
            f"answers do not depend on the picture: {blind:.0%} are right without it, {seen:.0%} with it, and guessing "
            f"gives {ceiling:.0%}; do held-out rows repeat training rows, do the pictures reach the model, do "
            "questions give the answer away? evidence_twins: true rewards looking",
            f"回答不依赖图片：无图时 {blind:.0%} 正确，有图时 {seen:.0%}，盲猜为 {ceiling:.0%}；"
            "评测数据是否与训练重复？图片是否传入模型？问题是否泄露答案？evidence_twins: true 可奖励看图",
        )
        return self._say(step, {"blind": words if blindly else None})

    def _hacking(self) -> Text | None:
        """Held-out answers twice in a row clearly below the best, while the reward of sampled ones
        rose.
        """
        rewards = self.seen.get("reward", [])
        half = len(rewards) // 2
        if half < 2 or np.mean(rewards[half:]) <= np.mean(rewards[:half]):
            return None
        if self.held.falls < 2:
            return self._beside_the_point() if self.right.falls >= 2 else None
        best, now = max(self.held.means), self.held.means[-1]
        return say(
            f"the reward of sampled answers rises while held-out answers fell from {best:.3f} to {now:.3f}: "
            "what is rewarded is no longer what is meant; lower learning_rate, set beta, or take the best checkpoint "
            "(load_best_model_at_end)",
            f"采样回答的奖励在上升，而评测回答由 {best:.3f} 降到 {now:.3f}：奖励已偏离目标；"
            "请调低 learning_rate、设置 beta，或取最佳检查点（load_best_model_at_end）",
        )

    def _beside_the_point(self) -> Text:
        best, now = max(self.right.means), self.right.means[-1]
        return say(
            f"the reward rises while fewer held-out answers are right by their own checkers, {best:.3f} before and "
            f"{now:.3f} now: the reward can be earned without what is meant; look at rollouts.jsonl and at "
            "reward_funcs (ernie-tune reward test), add row to them, or set beta",
            f"奖励在上升，而按各行自己的检查器，评测回答的正确率由 {best:.3f} 降到 {now:.3f}：不做到目标也能得到奖励；"
            "请查看 rollouts.jsonl 与 reward_funcs（ernie-tune reward test），在其中加入 row，或设置 beta",
        )

    def _say(self, step: int, found: Mapping[str, Text | None]) -> list[Verdict]:
        out = []
        for name, words in found.items():
            if words is not None and name not in self.told:
                self.told.add(name)
                out.append(Verdict(say("step {step}: {words}", "第 {step} 步：{words}", step=step, words=words)))
        return out

    def _last(self, name: str, count: int = ROUNDS) -> list[float]:
        values = self.seen.get(name, [])
        return values[-count:] if len(values) >= count else []

    def _unjudged(self, values: Mapping[str, float]) -> Text | None:
        if "completions/mean_length" not in values or "reward" in values:
            return None
        return say(
            "no answer of this round got a reward, every function said None; look at rollouts.jsonl, and at what the rows name",
            "本轮没有回答得到奖励，所有函数均返回 None；请查看 rollouts.jsonl 及各行指定的检查器",
        )

    def _failing(self, values: Mapping[str, float]) -> Text | None:
        """Of a function or judge that fails again and again, and is missed where others judge."""
        lost: dict[str, float] = {}
        for name, count in values.items():
            whose, _, what = name.removeprefix("rewards/").rpartition("/")
            if name.startswith("rewards/") and what in ("errors", "timeouts"):
                lost[whose] = lost.get(whose, 0.0) + count
        worst = max(lost, key=lambda name: lost[name], default="")
        self.seen.setdefault("failures", []).append(lost.get(worst, 0.0))
        if min(self._last("failures") or [0.0]) <= 0:
            return None
        return say(
            f"{worst} gave no number for {lost[worst]:.0f} answers of this round, and for some of each of the last "
            f"{ROUNDS}: errors or too little time (rewards/{worst}/errors, /timeouts); mend it, or raise "
            "reward_timeout_seconds",
            f"{worst} 本轮有 {lost[worst]:.0f} 个回答未给出分数，且最近 {ROUNDS} 轮均有：出错或超时"
            f"（rewards/{worst}/errors、/timeouts）；请修正，或调大 reward_timeout_seconds",
        )

    def _constant(self) -> Text | None:
        spreads, rewards = self._last("reward_std"), self._last("reward")
        if not spreads or not rewards or max(spreads) > _SAME:
            return None
        return say(
            f"all answers of {ROUNDS} rounds earned the same ({rewards[-1]:g}), nothing is learned; look at rollouts.jsonl: what do the answers look like, and what does the checker want?",
            f"{ROUNDS} 轮的所有回答奖励相同（{rewards[-1]:g}），学不到东西；请查看 rollouts.jsonl：回答是什么样，检查器要求什么？",
        )

    def _alike(self) -> Text | None:
        alike = self._last("frac_reward_zero_std", WINDOW)
        if not alike or np.mean(alike) <= _ALIKE or "constant" in self.told:
            return None
        right = float(np.mean(self._last("frac_groups_all_right", WINDOW) or [0.0]))
        easy = right > 0.5 * float(np.mean(alike))
        share = f"{np.mean(alike):.0%}"
        if easy:
            return say(
                f"{share} of the prompts are always answered right, the rest must carry the step; give harder data, or set difficulty_sampler: true",
                f"{share} 的提示总是答对，只剩其余提示可学；请给更难的数据，或设置 difficulty_sampler: true",
            )
        return say(
            f"{share} of the prompts are never answered right, the rest must carry the step; give easier data or more demonstrations first, or set difficulty_sampler: true",
            f"{share} 的提示总是答错，只剩其余提示可学；请先给更容易的数据或更多示范，或设置 difficulty_sampler: true",
        )

    def _cut_off(self) -> Text | None:
        cut = self._last("completions/clipped_ratio")
        if not cut or min(cut) <= _CUT_OFF:
            return None
        return say(
            f"{np.mean(cut):.0%} of the answers are cut off; raise max_completion_length, or set mask_truncated_completions: true",
            f"{np.mean(cut):.0%} 的回答被截断；请调大 max_completion_length，或设置 mask_truncated_completions: true",
        )

    def _entropy(self) -> Text | None:
        values = self.seen.get("entropy", [])
        if len(values) < 2 * WINDOW:
            return None
        first, now = float(np.mean(values[:WINDOW])), float(np.mean(values[-WINDOW:]))
        if now >= _COLLAPSED * first:
            return None
        return say(
            f"entropy collapsed from {first:.3f} to {now:.3f} nats a token, answers hardly differ; raise entropy_coef or temperature, or lower learning_rate",
            f"熵由每 token {first:.3f} 降到 {now:.3f} nat，回答几乎不再变化；请调大 entropy_coef 或 temperature，或调低 learning_rate",
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": {k: list(v) for k, v in self.seen.items()},
            **self.held.state_dict(),
            "right": self.right.state_dict(),
            "told": sorted(self.told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen = {k: list(v) for k, v in state["seen"].items()}
        self.told = set(state["told"])
        self.held.load_state_dict(state)
        self.right.load_state_dict(state.get("right", {"held": ()}))


class CriticWatch:
    """Says once when the critic still explains less than the mean alone, so long after it began
    that it should know better: the mean explained variance of the last ten steps is below 0. State:
    what was seen of them, what was said.
    """

    def __init__(self, warmup_steps: int = 0, patience_steps: int = CRITIC_STEPS) -> None:
        self.first = warmup_steps + patience_steps
        self.seen: list[float] = []
        self.told = False

    def look(self, step: int, values: Mapping[str, float]) -> list[Verdict]:
        """What a step's numbers give reason to say."""
        # Where nearly all answers earn the same there is nothing to explain, and any error is much.
        spread = values.get("reward_std", np.inf) >= 0.1 * abs(values.get("reward", 0.0))
        if spread and np.isfinite(value := values.get("critic/vf_explained_var", np.nan)):
            self.seen = [*self.seen, float(value)][-CRITIC_WINDOW:]
        if self.told or step <= self.first or len(self.seen) < CRITIC_WINDOW or np.mean(self.seen) >= 0:
            return []
        self.told = True
        mean = float(np.mean(self.seen))
        return [
            Verdict(
                say(
                    f"step {step}: the critic's explained variance is {mean:.2f}, it harms more than no critic; raise "
                    "value_learning_rate or critic_warmup, or start it from the reward model (value_model)",
                    f"第 {step} 步：价值网络的解释方差为 {mean:.2f}，还不如没有价值网络；请调大 value_learning_rate 或 "
                    "critic_warmup，或从奖励模型开始（value_model）",
                )
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        return {"seen": list(self.seen), "told": self.told}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.seen, self.told = list(state["seen"]), bool(state["told"])

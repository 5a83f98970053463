"""Watchers of learning from sampled answers: rewards that teach nothing, or teach form alone,
answers that are cut off or grow, entropy that collapses or explodes, a policy far from its
reference, rewards that rise while held-out answers get worse or another judge disagrees.

They read the logged means under TRL's names and answer with verdicts; each speaks once in a run.
Refuses to know: models, data, losses, files. State is JSON, so a resumed run judges as an
uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_tune.config.language import Text, say
from ernie_tune.rewards.verifiers import SHAPING
from ernie_tune.train.guards import Verdict

ROUNDS = 3  # that must look alike before anything is said
WINDOW = 20  # steps of what is called now, and of what is called the beginning
_SAME = 1e-8
CRITIC_STEPS, CRITIC_WINDOW = 50, 10
_CUT_OFF, _ALIKE, _COLLAPSED, _EXPLODED = 0.3, 0.8, 0.1, 2.0
_BACK, _LATELY, _GROWN_TOKENS = 50, 10, 8  # steps that lengths are compared over, steps of a mean, least growth
_PAYS, _WITH_IT = 0.6, 1.5  # correlation of length and reward, growth beside it
_FORM_ROSE, _RIGHT_STAYED, _NEARLY_ALL = 0.1, 0.01, 0.95
_AGREED, _APART = 0.7, 0.3
_SLOW_MS = 50.0
_ENDS = ("unjudged", "constant", "hacking", "kl", "second")  # after which nothing more is worth learning
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


@dataclass(frozen=True)
class WatchLimits:
    """What a run is told of its alarms. `stops`: those after which nothing more is worth learning
    end it. `kl_nats`: of an answer, from the reference. `entropy_nats`: of a token, at least.
    """

    stops: bool = False
    kl_nats: float = 10.0
    entropy_nats: float = 0.0


class RolloutWatch:
    """`look` after each step, `measured` after each evaluation. State: the means seen, what was
    said.
    """

    def __init__(self, by_reward: bool = True, limits: WatchLimits | None = None) -> None:
        """`by_reward` False: something else teaches, and rewards may be missing or alike."""
        self.by_reward, self.limits = by_reward, limits or WatchLimits()
        self.show: Callable[[], Text | str] = lambda: ""  # some answers of the newest round
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
            "completions/mean_length",
            "length/reward_corr",
            "entropy",
            *(name for name in values if name.startswith("rewards/") and name.endswith("/mean")),
            *(name for name in values if name.startswith("monitor/") and name.endswith("/spearman")),
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
            "slow": self._slow(values),
            "longer": self._longer(),
            "kl": self._far(values),
            "form": self._form() if self.by_reward else None,
            "second": self._second() if self.by_reward else None,
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
                line = say("step {step}: {words}", "第 {step} 步：{words}", step=step, words=words)
                out.append(Verdict(line, self.limits.stops and name in _ENDS))
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

    def _slow(self, values: Mapping[str, float]) -> Text | None:
        """Of a checker of rows whose slowest calls take long, round after round."""
        slow = {
            n: ms for n, ms in values.items() if n.startswith("rewards/") and n.endswith("/ms_p99") and ms > _SLOW_MS
        }
        worst = max(slow, key=lambda name: slow[name], default="")
        self.seen.setdefault("slow", []).append(slow.get(worst, 0.0))
        if not worst or min(self._last("slow") or [0.0]) <= 0:
            return None
        return say(
            f"the checker {worst.split('/')[1]} takes {slow[worst]:.0f} ms for one answer in a hundred, more than {_SLOW_MS:g}, for {ROUNDS} rounds; ask for shorter answers (max_completion_length), or give the rows another checker",
            f"检查器 {worst.split('/')[1]} 对百分之一的回答耗时 {slow[worst]:.0f} 毫秒，已连续 {ROUNDS} 轮超过 {_SLOW_MS:g}；请缩短回答（max_completion_length），或换用其他检查器",
        )

    def _constant(self) -> Text | None:
        spreads, rewards = self._last("reward_std"), self._last("reward")
        if not spreads or not rewards or max(spreads) > _SAME:
            return None
        shown = "" if "constant" in self.told else self.show()
        return say(
            f"all answers of {ROUNDS} rounds earned the same ({rewards[-1]:g}), nothing is learned; look at rollouts.jsonl: what do the answers look like, and what does the checker want?{shown}",
            f"{ROUNDS} 轮的所有回答奖励相同（{rewards[-1]:g}），学不到东西；请查看 rollouts.jsonl：回答是什么样，检查器要求什么？{shown}",
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
        values, least = self.seen.get("entropy", []), self.limits.entropy_nats
        last = self._last("entropy")
        if least and last and max(last) < least:
            return say(
                f"entropy is {last[-1]:.3f} nats a token, below entropy_floor ({least:g}) for {ROUNDS} steps; raise entropy_coef or temperature, or lower learning_rate",
                f"熵为每 token {last[-1]:.3f} nat，已连续 {ROUNDS} 步低于 entropy_floor（{least:g}）；请调大 entropy_coef 或 temperature，或调低 learning_rate",
            )
        if len(values) < 2 * WINDOW:
            return None
        first, now = float(np.mean(values[:WINDOW])), float(np.mean(values[-WINDOW:]))
        if now > _EXPLODED * first and self._reward_fell():
            return say(
                f"entropy rose from {first:.3f} to {now:.3f} nats a token while rewards fell, answers become noise; lower learning_rate or entropy_coef, or set beta",
                f"熵由每 token {first:.3f} 升到 {now:.3f} nat，而奖励下降，回答趋于噪声；请调低 learning_rate 或 entropy_coef，或设置 beta",
            )
        if now >= _COLLAPSED * first:
            return None
        return say(
            f"entropy collapsed from {first:.3f} to {now:.3f} nats a token, answers hardly differ; raise entropy_coef or temperature, or lower learning_rate",
            f"熵由每 token {first:.3f} 降到 {now:.3f} nat，回答几乎不再变化；请调大 entropy_coef 或 temperature，或调低 learning_rate",
        )

    def _reward_fell(self) -> bool:
        """Whether the newest window earns less than the first, by more than two standard errors."""
        rewards = self.seen.get("reward", [])
        if len(rewards) < 2 * WINDOW:
            return False
        first, now = np.array(rewards[:WINDOW]), np.array(rewards[-WINDOW:])
        error = float(np.sqrt((first.var(ddof=1) + now.var(ddof=1)) / WINDOW))
        return float(first.mean() - now.mean()) > max(2 * error, _SAME)

    def _longer(self) -> Text | None:
        """Answers that doubled in 50 steps, or that grow because length pays."""
        lengths, pays = self.seen.get("completions/mean_length", []), self._last("length/reward_corr", WINDOW)
        if len(lengths) < WINDOW + _LATELY:
            return None
        now = float(np.mean(lengths[-_LATELY:]))
        back = lengths[-_BACK - _LATELY : -_BACK] or lengths[:_LATELY]
        was, first = float(np.mean(back)), float(np.mean(lengths[:_LATELY]))
        remedy = say(
            "if that is not meant set overlong_buffer, or loss_type: dr_grpo",
            "若非本意，请设置 overlong_buffer，或 loss_type: dr_grpo",
        )
        if now >= 2 * was and now - was >= _GROWN_TOKENS:
            return say(
                f"answers grew from {was:.0f} to {now:.0f} tokens in {_BACK} steps; {remedy}",
                f"回答在 {_BACK} 步内由 {was:.0f} 增长到 {now:.0f} 个 token；{remedy}",
            )
        if pays and np.mean(pays) > _PAYS and now >= _WITH_IT * first and now - first >= _GROWN_TOKENS:
            return say(
                f"longer answers earn more (length/reward_corr {np.mean(pays):.2f}) and grew from {first:.0f} to {now:.0f} tokens; {remedy}",
                f"越长的回答奖励越高（length/reward_corr {np.mean(pays):.2f}），已由 {first:.0f} 增长到 {now:.0f} 个 token；{remedy}",
            )
        return None

    def _far(self, values: Mapping[str, float]) -> Text | None:
        """Of a policy that left its reference: nats an answer, some rounds in a row."""
        length = values.get("completions/mean_length", 0.0)
        nats = values["kl"] * length if "kl" in values else values.get("objective/kl", np.nan)
        self.seen.setdefault("kl", []).append(float(nats) if np.isfinite(nats) else 0.0)
        last = self._last("kl")
        if not last or not self.limits.kl_nats or min(last) <= self.limits.kl_nats:
            return None
        return say(
            f"the policy is {last[-1]:.1f} nats an answer away from its reference, more than kl_budget ({self.limits.kl_nats:g}) for {ROUNDS} rounds; raise beta or kl_coef, lower learning_rate, or raise kl_budget",
            f"策略与参考相距每个回答 {last[-1]:.1f} nat，已连续 {ROUNDS} 轮超过 kl_budget（{self.limits.kl_nats:g}）；请调大 beta 或 kl_coef、调低 learning_rate，或调大 kl_budget",
        )

    def _form(self) -> Text | None:
        """Of a reward for how answers look that rose while none for being right did."""
        change = {}
        for name, values in self.seen.items():
            if name.startswith("rewards/") and len(values) >= 2 * WINDOW:
                change[name] = float(np.mean(values[-WINDOW:]) - np.mean(values[:WINDOW]))
        form = {name: rose for name, rose in change.items() if name.split("/")[1] in SHAPING}
        rest = [name for name in change if name not in form]
        still = all(abs(change[n]) < _RIGHT_STAYED and self.seen[n][-1] < _NEARLY_ALL for n in rest)
        most = max(form, key=lambda name: form[name], default="")
        if not most or not rest or not still or form[most] < _FORM_ROSE:
            return None
        shown, others = most.split("/")[1], ", ".join(name.split("/")[1] for name in rest)
        return say(
            f"what is learned is form: {shown} rose by {form[most]:.2f} while {others} stayed where it was; lower its weight, or give easier data",
            f"学到的只是形式：{shown} 上升 {form[most]:.2f}，而 {others} 没有变化；请调低其权重，或给更容易的数据",
        )

    def _second(self) -> Text | None:
        """Of a judge that nothing is learned from, who agreed with the reward and does no more."""
        for name, values in self.seen.items():
            if not name.startswith("monitor/") or len(values) < 2 * WINDOW:
                continue
            sums = np.cumsum([0.0, *values])
            means = (sums[WINDOW:] - sums[:-WINDOW]) / WINDOW
            if means.max() > _AGREED and means[-1] < _APART:
                return say(
                    f"{name.split('/')[1]}, which nothing is learned from, agreed with the reward ({means.max():.2f} by Spearman) and no longer does ({means[-1]:.2f}): the reward is earned in another way than meant; look at rollouts.jsonl",
                    f"未参与学习的 {name.split('/')[1]} 原与奖励一致（Spearman {means.max():.2f}），现已不一致（{means[-1]:.2f}）：奖励的获得方式已偏离本意；请查看 rollouts.jsonl",
                )
        return None

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

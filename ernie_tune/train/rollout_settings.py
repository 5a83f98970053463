"""What a round of sampled answers is made of.

Refuses to know: where settings are written, who reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_tune.config.language import say
from ernie_tune.objectives import advantages as adv
from ernie_tune.train.turns import TOOLS

MOST_KEPT = 64  # ids that are noted of one draw
ESTIMATORS = ("grpo", "rloo", "max_rl", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "gae")


@dataclass(frozen=True)
class RolloutSettings:
    """What a round is made of. `prompts`: of one round, over all ranks. `groups_per_batch`: of a
    micro-batch. `kl_coef`: of the per-token penalty in the reward (k1 against the reference), 0:
    none. `overlong_buffer` tokens before the limit, and what the whole penalty is worth.
    """

    prompts: int = 8
    num_generations: int = 8
    max_completion_length: int = 512
    max_prompt_length: int = 2048
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    keep_sampling_mask: bool = False  # learn over what these left to draw from
    seed: int = 42
    num_iterations: int = 1
    num_mini_batches: int = 1
    groups_per_batch: int = 1
    dynamic_sample: bool = True
    max_resample_times: int = 3
    advantage_estimator: str = "grpo"
    scale_rewards: str = "group"
    reward_aggregation: str = "sum_then_normalize"
    kl_coef: float = 0.0
    mask_truncated_completions: bool = False
    overlong_buffer: int = 0
    overlong_penalty: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    missing_eos_penalty: float | None = None
    unjudged: bool = False  # answers without a reward count too: a teacher has something to say of them
    stop_strings: tuple[str, ...] = ()
    over_sample: float = 1.0  # prompts that are answered over those that a round lacks
    reward_clip: tuple[float, ...] = ()  # (low, high) of the weighted reward
    tools: tuple[str, ...] = ()  # that answers may call
    max_turns: int = 4
    max_pictures: int = 8
    note_experts: bool = False  # which experts each token goes to while it is sampled
    prefix_sharing: bool = True  # a prompt's answers have its tokens computed once

    def __post_init__(self) -> None:
        for name, known in (
            ("advantage_estimator", ESTIMATORS),
            ("scale_rewards", adv.SCALES),
            ("reward_aggregation", ("sum_then_normalize", "normalize_then_sum")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    say(
                        f"{name} ({getattr(self, name)!r}) must be one of {', '.join(known)}; correct the name",
                        f"{name}（{getattr(self, name)!r}）须为 {', '.join(known)} 之一；请改正名称",
                    )
                )
        grouped = self.advantage_estimator in ("grpo", "rloo", "max_rl", "reinforce_plus_plus_baseline")
        if self.num_generations < 2 and grouped:
            raise ValueError(
                say(
                    f"num_generations ({self.num_generations}) must be at least 2 for advantage_estimator "
                    f"{self.advantage_estimator}, which compares the answers to one prompt; raise it",
                    f"advantage_estimator {self.advantage_estimator} "
                    f"要比较同一提问的多个回答，num_generations（{self.num_generations}）须至少为 2；请调大",
                )
            )
        if self.reward_clip and (len(self.reward_clip) != 2 or self.reward_clip[0] >= self.reward_clip[1]):
            raise ValueError(
                say(
                    f"reward_clip ({', '.join(map(str, self.reward_clip))}) must be two numbers, low and then high; "
                    "give both, or leave it out",
                    f"reward_clip（{', '.join(map(str, self.reward_clip))}）须为两个数，先低后高；请给出两者，或去掉",
                )
            )
        if self.reward_clip and self.reward_aggregation == "normalize_then_sum":
            raise ValueError(
                say(
                    f"reward_clip ({', '.join(map(str, self.reward_clip))}) bounds a sum, reward_aggregation "
                    "(normalize_then_sum) must then be sum_then_normalize; set it, or leave reward_clip out",
                    f"reward_clip（{', '.join(map(str, self.reward_clip))}）限制的是总和，reward_aggregation"
                    "（normalize_then_sum）须为 sum_then_normalize；请修改，或去掉 reward_clip",
                )
            )
        if unknown := [name for name in self.tools if name not in TOOLS]:
            raise ValueError(
                say(
                    f"tools ({', '.join(unknown)}) must be of {', '.join(TOOLS)}; correct the name",
                    f"tools（{', '.join(unknown)}）须为 {', '.join(TOOLS)}；请改正名称",
                )
            )
        if self.over_sample < 1:
            raise ValueError(
                say(
                    f"over_sample ({self.over_sample:g}) must be at least 1; 1 answers as many prompts as are needed",
                    f"over_sample（{self.over_sample:g}）至少为 1；1 表示只答所需的提示数",
                )
            )
        if self.temperature <= 0:
            raise ValueError(
                say(
                    f"temperature ({self.temperature:g}) must be above 0 to sample; 1 is usual",
                    f"采样时 temperature（{self.temperature:g}）须大于 0；通常为 1",
                )
            )
        cut = self.top_p != 1 or self.top_k or self.min_p
        if cut and not self.keep_sampling_mask:
            raise ValueError(
                say(
                    f"top_p ({self.top_p:g}), top_k ({self.top_k}) and min_p ({self.min_p:g}) must be 1, 0 and 0 when "
                    "learning without keep_sampling_mask: training would have to know which tokens were left out; "
                    "leave them out, or set it",
                    f"学习时若不启用 keep_sampling_mask，top_p（{self.top_p:g}）、top_k（{self.top_k}）与 min_p"
                    f"（{self.min_p:g}）须为 1、0 和 0，否则训练须知道哪些 token 被排除；请去掉，或启用它",
                )
            )
        if self.keep_sampling_mask and not 1 <= self.top_k <= MOST_KEPT:
            raise ValueError(
                say(
                    f"top_k ({self.top_k}) must be from 1 to {MOST_KEPT} with keep_sampling_mask, which notes the ids of "
                    "every draw; set it",
                    f"启用 keep_sampling_mask（记录每次可选的 id）时 top_k（{self.top_k}）须为 1 至 {MOST_KEPT}；请设置",
                )
            )

"""What a round of sampled answers is made of.

Refuses to know: where settings are written, who reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ernie_tune.config.checks_sampling import clip_problem, cut_problem
from ernie_tune.config.language import say
from ernie_tune.data.chat import CALL_END
from ernie_tune.data.processor import Processor
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.objectives import advantages as adv
from ernie_tune.train.own_tools import OwnTool
from ernie_tune.train.turns import TOOLS

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
    tools: tuple[str, ...] = ()  # that answers may call, by name
    own_tools: tuple[OwnTool, ...] = ()  # beside them
    max_turns: int = 4
    max_pictures: int = 8
    max_tool_pixels: int = 0  # of each; 0: any
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
        for problem in (
            clip_problem(self.reward_clip, self.reward_aggregation),
            cut_problem(self.top_p, self.top_k, self.min_p, self.keep_sampling_mask),
        ):
            if problem is not None:
                raise ValueError(problem)
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

    def sampling(
        self, processor: Processor, seed: int, n: int | None = None, greedy: bool = False, most_tokens: int = 0
    ) -> SamplingParams:
        """How `n` answers to a prompt (num_generations) are sampled, or a `greedy` one. What they
        are drawn from is noted of those that are learned from: not greedily, nor of `most_tokens`.
        """
        tokens = processor.tokens
        return SamplingParams(
            max_new_tokens=most_tokens or self.max_completion_length,
            temperature=0.0 if greedy else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            note_kept=self.keep_sampling_mask and not greedy and not most_tokens,
            n=1 if greedy else n or self.num_generations,
            seed=seed,
            stop_ids=processor.stop_ids,
            stop_strings=(*self.stop_strings, *((CALL_END,) if self.tools or self.own_tools else ())),
            banned_ids=tokens.placeholders() + tokens.markers(),
        )

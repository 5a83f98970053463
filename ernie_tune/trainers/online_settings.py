"""Settings of a run that samples answers -> what a round, its losses and its evidence are made of.

Refuses to know: how they are used, files, models.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.checks_sampling import group_problem, round_problem
from ernie_tune.config.language import say
from ernie_tune.config.layout import Layout
from ernie_tune.objectives.perception import Perception
from ernie_tune.objectives.policy import PolicyHyper
from ernie_tune.rewards.named import load_function
from ernie_tune.train.evidence import EvidenceSettings
from ernie_tune.train.own_tools import OwnTool
from ernie_tune.train.rollouts import RolloutSettings


def rollout_settings(
    config: RunConfig, data_ranks: int, tools: Mapping[str, Callable[..., Any]] | None = None
) -> RolloutSettings:
    """The settings of a round. `per_device_train_batch_size` counts answers, as TRL's does; raises
    ValueError where a step does not hold whole groups. `tools`: functions by the places at which
    the settings name them.
    """
    r, p, t, c = config.rollout, config.policy, config.train, config.critic
    ppo, taught = config.model.stage == "PPO", bool(config.teacher.teacher_model)
    answers = t.per_device_train_batch_size * t.gradient_accumulation_steps
    mini_batches = mini_batches_of(config, answers * data_ranks)
    if (uneven := group_problem(answers, r.num_generations)) is not None:
        raise ValueError(uneven)
    estimator = p.advantage_estimator if p.advantage_estimator != "auto" else "gae" if ppo else "grpo"
    kl_coef = p.kl_coef if p.kl_coef is not None else 0.05 if ppo else 0.0
    return RolloutSettings(
        prompts=answers // r.num_generations * mini_batches * data_ranks,
        num_generations=r.num_generations,
        max_completion_length=r.max_completion_length,
        max_prompt_length=config.preference.max_prompt_len,
        temperature=r.temperature,
        top_p=r.top_p,
        top_k=r.top_k,
        seed=t.seed,
        num_iterations=r.num_iterations,
        num_mini_batches=mini_batches,
        groups_per_batch=max(1, t.per_device_train_batch_size // r.num_generations),
        dynamic_sample=r.dynamic_sample and estimator != "gae" and r.num_generations > 1 and not taught,
        unjudged=taught,
        max_resample_times=r.max_resample_times,
        advantage_estimator=estimator,
        scale_rewards=p.scale_rewards,
        reward_aggregation=r.reward_aggregation,
        kl_coef=kl_coef,
        mask_truncated_completions=p.mask_truncated_completions,
        overlong_buffer=p.overlong_buffer,
        overlong_penalty=p.overlong_penalty,
        gamma=c.gamma,
        lam=c.lam,
        whiten_rewards=c.whiten_rewards,
        missing_eos_penalty=c.missing_eos_penalty,
        prefix_sharing=config.preference.prefix_sharing,
        min_p=config.sampling.min_p,
        keep_sampling_mask=config.sampling.keep_sampling_mask,
        tools=tuple(name for name in config.sampling.tools if ":" not in name),
        own_tools=own_tools(config, tools or {}),
        max_turns=config.sampling.max_turns,
        max_pictures=config.sampling.max_pictures,
        max_tool_pixels=config.sampling.max_tool_pixels,
        stop_strings=config.sampling.stop_strings,
        over_sample=config.sampling.over_sample,
        reward_clip=config.sampling.reward_clip,
    )


def with_tools(config: RunConfig, tools: Sequence[Any]) -> tuple[RunConfig, dict[str, Callable[..., Any]]]:
    """The settings with these tools beside their own, functions by the place that they come from;
    and the functions by it."""
    given = {f"{inspect.getfile(f)}:{OwnTool(f).name}" if callable(f) else str(f): f for f in tools}
    names = (*config.sampling.tools, *given)
    sampling = dataclasses.replace(config.sampling, tools=names)
    return RunConfig(**{**vars(config), "sampling": sampling}), {n: f for n, f in given.items() if callable(f)}


def own_tools(config: RunConfig, given: Mapping[str, Callable[..., Any]]) -> tuple[OwnTool, ...]:
    """The tools that are functions, by the places that settings name. Raises ValueError,
    FileNotFoundError for what is none, and ValueError for two of one name."""
    limits = config.rollout.reward_timeout_seconds, config.watch.reward_limit_seconds
    places = [name for name in config.sampling.tools if ":" in name]
    found = [OwnTool(given[one] if one in given else load_function(one, "tools"), *limits) for one in places]
    names = [*config.sampling.tools, *(tool.name for tool in found)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            say(
                f"tools ({twice[0]}) must have names of their own; rename one",
                f"tools（{twice[0]}）名称不得重复；请改名",
            )
        )
    return tuple(found)


def evidence_settings(config: RunConfig) -> EvidenceSettings:
    """What the settings say of looking at pictures. Raises ValueError where rewards are compared
    one by one, of which evidence is no part.
    """
    e = config.evidence
    settings = EvidenceSettings(
        e.evidence_twins,
        e.evidence_twin_share,
        e.evidence_dependence,
        e.evidence_boxes,
        e.perception_mask_ratio,
        e.evidence_scale,
        config.train.seed,
        max(1, config.train.per_device_train_batch_size // config.rollout.num_generations),
    )
    if settings.wanted and config.rollout.reward_aggregation != "sum_then_normalize":
        raise ValueError(
            say(
                f"reward_aggregation ({config.rollout.reward_aggregation}) must be sum_then_normalize with rewards for "
                "evidence, which weigh the sum; set it, or leave evidence_twins, _dependence and _boxes out",
                f"使用证据奖励时 reward_aggregation（{config.rollout.reward_aggregation}）须为 sum_then_normalize，"
                "因为证据作用于总和；请修改，或去掉 evidence_twins、_dependence 与 _boxes",
            )
        )
    return settings


def perception_of(config: RunConfig) -> Perception | None:
    """The term for looking at the picture; None without one."""
    e = config.evidence
    if not e.perception_coef and not any(e.perception_entropy):
        return None
    return Perception(e.perception_coef, e.perception_cap, *e.perception_entropy)


def mini_batches_of(config: RunConfig, answers: int) -> int:
    """Optimizer steps a pass over one round: num_mini_batches, or what TRL's steps_per_generation
    and generation_batch_size say. `answers`: of one step, over all devices. Raises ValueError for
    sizes that do not come out even, and for several that differ.
    """
    r, m, t = config.rollout, config.mismatch, config.train
    asked = {"num_mini_batches": r.num_mini_batches} if r.num_mini_batches != 1 else {}
    for name, size, unit in (
        ("steps_per_generation", m.steps_per_generation, t.gradient_accumulation_steps),
        ("generation_batch_size", m.generation_batch_size, answers),
    ):
        if (uneven := round_problem(name, size, unit)) is not None:
            raise ValueError(uneven)
        if size is not None:
            asked[name] = size // unit
    if len(set(asked.values())) > 1:
        raise ValueError(
            say(
                f"{' and '.join(asked)} must mean as many optimizer steps a round, not {list(asked.values())}; "
                "leave one out",
                f"{' 与 '.join(asked)} 须表示相同的每轮优化步数，而不是 {list(asked.values())}；请去掉其一",
            )
        )
    return next(iter(asked.values()), 1)


def _loss_name(config: RunConfig, name: str) -> str:
    """`loss_type` with TRL's importance_sampling_level. Raises ValueError for losses whose ratio is
    of another kind.
    """
    level = config.mismatch.importance_sampling_level
    sequences = ("gspo", "gspo_token", "luspo", "vespo", "gmpo")
    if level == "auto" or (level == "sequence") == (name in sequences):
        return name
    if level == "sequence" and name in ("grpo", "dapo"):
        return "gspo"
    raise ValueError(
        say(
            f"importance_sampling_level ({level}) must go with a loss of that kind, not loss_type {name}; leave it out",
            f"importance_sampling_level（{level}）与 loss_type {name} 不符；请去掉",
        )
    )


def policy_hyper(config: RunConfig, loss_type: str = "") -> PolicyHyper:
    """What the settings say of the policy's loss, or of this one. "auto" is dapo, or ppo with a
    critic. Raises ValueError as `PolicyHyper`, and for several losses.
    """
    p = config.policy
    names = (loss_type,) if loss_type else config.preference.loss_type
    if len(names) != 1:
        raise ValueError(
            say(
                f"loss_type ({', '.join(names)}) must be one loss where answers are sampled; choose one",
                f"采样回答时 loss_type（{', '.join(names)}）只能是一个；请选其一",
            )
        )
    name = names[0] if names[0] != "auto" else "ppo" if config.model.stage == "PPO" else "dapo"
    name = _loss_name(config, name)
    narrow = name in ("gspo", "gspo_token")
    usual = (3e-4, 4e-4) if narrow else (0.2, 0.2) if name == "ppo" else (0.4, 0.4) if name == "gmpo" else (0.2, 0.28)
    return PolicyHyper(
        loss_type=name,
        loss_agg=None if p.loss_agg == "auto" else p.loss_agg,
        epsilon=usual[0] if p.epsilon is None else p.epsilon,
        epsilon_high=usual[1] if p.epsilon_high is None else p.epsilon_high,
        delta=p.delta,
        dual_clip=p.dual_clip,
        cispo_cap=p.cispo_cap,
        sapo_temperature_pos=p.sapo_temperature_pos,
        sapo_temperature_neg=p.sapo_temperature_neg,
        off_policy_mask_threshold=p.off_policy_mask_threshold,
        kl_type=p.kl_type,
        max_completion_length=config.rollout.max_completion_length,
    )


def check_timeout(seconds: float, layout: Layout) -> None:
    """Raises ValueError where ranks sample the same answers together, which no clock of their own
    may cut off.
    """
    together = layout.tensor * layout.pipe > 1 or bool(layout.fleet_experts)
    if seconds and together:
        raise ValueError(
            say(
                f"rollout_timeout_seconds ({seconds:g}) must be 0 where ranks sample the same answers together (tensor, "
                "pipeline or expert parallelism); set it, or spread over data and sharding alone",
                f"多个进程共同采样相同回答（张量、流水线或专家并行）时 rollout_timeout_seconds（{seconds:g}）须为 0；请修改，"
                "或只用数据与分片并行",
            )
        )

"""`PPOTrainer`: learn from answers that the policy samples itself, compared with what a critic
expected of them (PPO, arXiv 1707.06347; RLHF, 2203.02155).

A round: answers are sampled and judged by reward models, checkers or both; values and log-probs of
that moment are noted once; then `num_iterations` x `num_mini_batches` windows, in each of which the
critic and the policy make a step. Refuses to know: formulas (objectives), how the critic is asked
and trained (train/critic.py), how a round is made (train/rollouts.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import paddle

from ernie_tune.checkpoint.state import Checkpoint, load_optimizer, write_optimizer
from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.data.processor import Processor
from ernie_tune.data.units import UnitBatch
from ernie_tune.machine.place import Place
from ernie_tune.machine.placed import Placed
from ernie_tune.models.ernie import Elsewhere, ErnieModel
from ernie_tune.objectives.policy import KlControl
from ernie_tune.peft.config import PeftConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.report.log import RunLog
from ernie_tune.rewards.rubric import Rubric
from ernie_tune.train.critic import (
    ADAPTER,
    ActorCritic,
    Critic,
    RoundOfCritic,
    ValueObjective,
    ValueScale,
    attach_value_head,
    critic_of,
)
from ernie_tune.train.guards import Verdict
from ernie_tune.train.loop import Loop, StepRecord
from ernie_tune.train.reward_model import read_head
from ernie_tune.train.rollout_guards import CriticWatch
from ernie_tune.train.rollouts import Rolled
from ernie_tune.trainers import assemble
from ernie_tune.trainers.judges import ModelJudge, kept_active
from ernie_tune.trainers.keeper import JsonPart
from ernie_tune.trainers.method import Method, RowSets, Stateful
from ernie_tune.trainers.online import RLVRTrainer, SampledAnswers, Tools

CRITIC_FOLDER = "critic"
CONTROL_FILE = "kl_control.json"
WATCH_FILE = "critic_watch.json"


class CriticPart:
    """The critic's trained values and its optimizer's state, under any layout."""

    def __init__(self, critic: Critic, loop: Loop) -> None:
        self.critic, self.loop = critic, loop

    def save(self, folder: Path) -> None:
        placed, named = self.critic.placed, self.critic.trained()
        with placed.whole():
            own = folder / CRITIC_FOLDER
            write_optimizer(own, self.loop.optimizer, named, cut=placed.shards(named), ranks=placed.place)

    def load(self, folder: Path) -> None:
        placed, named = self.critic.placed, self.critic.trained()
        with placed.whole():
            found = Checkpoint(folder / CRITIC_FOLDER, 0)
            load_optimizer(found, self.loop.optimizer, named, cut=placed.shards(named), ranks=placed.place)


class AgainstCritic(SampledAnswers):
    """Sampled answers, compared with what a critic expected."""

    stages = ("PPO",)

    def __init__(
        self,
        config: RunConfig,
        place: Place,
        processor: Processor,
        rubric: Rubric,
        tools: Tools | None = None,
        value_model: str = "",
    ) -> None:
        if config.parallel.sharding.startswith("stage3"):
            raise ValueError(
                say(
                    f"sharding ({config.parallel.sharding}) must be stage2 or stage1 at stage PPO, where two "
                    "optimizers share the parameters; set it",
                    f"PPO 阶段由两个优化器共用参数，sharding（{config.parallel.sharding}）须为 stage2 或 stage1；请修改",
                )
            )
        super().__init__(config, place, processor, rubric, tools)
        self.value_model = value_model or config.critic.value_model
        self.watch_critic = CriticWatch(config.critic.critic_warmup)
        self.critic: Critic | None = None
        self.scale: ValueScale | None = None  # chosen with what the critic starts from
        self.steps: ActorCritic | None = None
        self._start = ""  # the reward model that the critic starts from; "": the policy

    # --- the critic -------------------------------------------------------------------------------

    def before_put(self, model: ErnieModel) -> None:
        super().before_put(model)
        self._start = self._fitting(model)
        # The head has no bias: raw, it would have to bend every state towards one direction to say
        # the mean, and would tell states apart no longer.
        wanted = self.config.critic.normalize_values
        self.scale = ValueScale() if (not self._start if wanted is None else wanted) else None
        if not isinstance(model, PeftModel):
            return
        with kept_active(model):
            if self._start:
                model.load_adapter(self._start, ADAPTER)
            else:
                model.add_like(model.active or "", ADAPTER)
        for parameter in attach_value_head(model).parameters():
            parameter.stop_gradient = True

    def _fitting(self, model: ErnieModel) -> str:
        """The folder of the reward model that the critic starts from, "" for the policy. Raises
        ValueError for a folder that was asked for and does not fit."""
        asked = self.value_model
        if asked == "policy":
            return ""
        if asked != "auto":
            judge = ModelJudge(asked)
            if not self._fits(judge, model):
                how = say(
                    "another adapter of the policy's base"
                    if isinstance(model, PeftModel)
                    else "a whole model of the policy's shape",
                    "策略底座上的另一个适配器" if isinstance(model, PeftModel) else "与策略形状相同的完整模型",
                )
                raise ValueError(
                    say(
                        f"value_model ({asked}) must be {how}; set policy, or auto",
                        f"value_model（{asked}）须为{how}；请设为 policy 或 auto",
                    )
                )
            return str(judge.folder)
        found = [judge for judge in self._models() if self._fits(judge, model)]
        return str(found[0].folder) if found else ""

    def _fits(self, judge: ModelJudge, model: ErnieModel) -> bool:
        if isinstance(model, PeftModel):
            return judge.shares(model, self.config)
        return not judge.is_adapter and assemble.known_shape(str(judge.folder)) == model.config

    def critic_for(self, policy: Placed) -> Critic:
        """The critic, made when it is first asked for."""
        if self.critic is None:
            model = policy.model
            own = not isinstance(model, PeftModel)
            self.critic = Critic(self._own(policy), scale=self.scale) if own else self._shared(policy, model)
            if self._start:
                self._take_head(self.critic.placed.model)
        return self.critic

    def _shared(self, policy: Placed, model: PeftModel) -> Critic:
        active = model.active or ""
        if not self._start:
            model.mix_adapter(active, ADAPTER, 1.0)
        with critic_of(model, active):
            return Critic(policy.beside(), active, self.scale)

    def _own(self, policy: Placed) -> Placed:
        """A second model with the values of the reward model, or of the policy as it is now."""
        model = policy.model
        if self._start:
            named = dataclasses.replace(self.config.model, model_name_or_path=self._start)
            copy, source = assemble.unread_model(RunConfig(**{**vars(self.config), "model": named}))
        else:
            with paddle.LazyGuard():
                copy, source = ErnieModel(model.config, model.compute_dtype), None
        attach_value_head(copy)
        trained = {name for name, p in model.named_parameters() if not p.stop_gradient}
        for name, parameter in copy.named_parameters():
            parameter.stop_gradient = name not in trained and not name.startswith("value_head.")
        return self.place.put(copy, source, like=None if self._start else model)

    def _take_head(self, model: ErnieModel) -> None:
        head = attach_value_head(model)
        if not isinstance(head, Elsewhere):
            head.weight.set_value(read_head(self._start).weight.astype(head.weight.dtype))

    def beside(self, actor: Loop, policy: Placed, total_steps: int) -> ActorCritic:
        """The policy's loop with the critic's."""
        c = self.config
        rate = c.critic.value_learning_rate
        rate = 10 * c.optim.learning_rate if rate is None else rate
        objective = ValueObjective(c.critic.vf_coef, c.critic.cliprange_value or None, self.scale)

        def make(placed: Placed) -> Loop:
            return assemble.loop_of(c, placed, objective, total_steps, rate)

        self.steps = ActorCritic(actor, self.critic_for(policy), make, c.critic.critic_warmup)
        return self.steps

    # --- the run ----------------------------------------------------------------------------------

    def prepare(self, policy: Placed, rows: RowSets, dry_run: bool) -> None:
        self.critic_for(policy)
        super().prepare(policy, rows, dry_run)
        c = self.config.critic
        self.rollouts.kl = KlControl(self.settings.kl_coef, c.kl_target, c.kl_horizon)
        self.told = RoundOfCritic(self.rollouts.kl, self.place.gather_batch, self.scale)

    def started(self, log: RunLog, rows: RowSets, resumed: bool) -> None:
        super().started(log, rows, resumed)
        if self.critic is None:
            raise AssertionError("prepare comes first")
        count = sum(int(p.size) for p in self.critic.trained().values())
        where = self._start or say("the policy", "策略")
        how = (
            say("a model of its own", "独立模型")
            if self.critic.policy_adapter is None
            else say("an adapter on the policy's model", "策略模型上的适配器")
        )
        log.info(
            say(
                f"critic: {how}, {count:,} values trained here, started from {where}",
                f"价值网络：{how}，本进程训练 {count:,} 个参数，起点为 {where}",
            )
        )

    def attached(self) -> list[Callable[[UnitBatch], UnitBatch]]:
        return [*super().attached(), self._with_values]

    def _with_values(self, batch: UnitBatch) -> UnitBatch:
        assert self.critic is not None
        return batch.with_columns(value_N=self.critic.values(batch))

    def _tell(self, number: int, groups: Sequence[Rolled]) -> None:
        super()._tell(number, groups)
        self.rollouts.metrics.update(self.told.look(groups))

    def after_step(self, record: StepRecord) -> list[Verdict]:
        return super().after_step(record) + self.watch_critic.look(record.step, record.metrics)

    def parts(self) -> Mapping[str, Stateful]:
        assert self.critic is not None
        assert self.steps is not None
        return {
            **super().parts(),
            "critic": CriticPart(self.critic, self.steps.beside),
            "kl control": JsonPart(self.place, CONTROL_FILE, self.told),
            "critic watch": JsonPart(self.place, WATCH_FILE, self.watch_critic),
        }


class PPOTrainer(RLVRTrainer):
    """Sample answers, judge them, and learn from what was better than a critic expected.

    `reward_model`: a folder of `ernie-tune reward`, a `RewardModel` or a `RewardTrainer`, beside or
    instead of `reward_funcs`; its weight is the last of `reward_weights`. `value_model`: what the
    critic starts from. Arguments and errors as `RLVRTrainer`'s.
    """

    method_class = AgainstCritic
    method: AgainstCritic

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processor: Any = None,
        *,
        reward_funcs: Any = None,
        reward_weights: Sequence[float] | None = None,
        reward_model: Any = None,
        value_model: str | Path = "",
        tools: Sequence[Any] = (),
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        **watched: Any,
    ) -> None:
        self.value_model, self.reward_model = str(value_model), reward_model
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processor,
            reward_funcs=reward_funcs,
            reward_weights=reward_weights,
            tools=tools,
            processing_class=processing_class,
            peft_config=peft_config,
            **watched,
        )

    def make_method(self) -> Method:
        return AgainstCritic(self.args, self.place, self.processor, self.rubric, self.tools, self.value_model)

    def build_loop(self, length: tuple[int, float] | None = None) -> Loop:
        length = length or self.total_steps()
        return self.method.beside(super().build_loop(length), self.put(), length[0])

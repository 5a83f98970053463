"""`RLVRTrainer`: learn from answers that the policy samples itself, judged by checkers, functions
or models.

A rollout is another iterator of windows: everything else is the run that other methods have.
Refuses to know: formulas (objectives), how answers are sampled (generate) and judged (rewards), how
a round is made (train/rollouts.py).
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.survey import Survey, survey
from ernie_tune.data.units import UnitBatch
from ernie_tune.data.usable_prompts import UsablePrompts
from ernie_tune.evaluate.measure import Measure
from ernie_tune.evaluate.rewards import OnlineMeasure
from ernie_tune.generate.batch import Completion, Prompt
from ernie_tune.generate.engine import Engine
from ernie_tune.generate.load import TurnLoad
from ernie_tune.generate.scheduler import Capacity, complete
from ernie_tune.machine.place import Place
from ernie_tune.machine.placed import Placed
from ernie_tune.machine.stages import frozen_outputs
from ernie_tune.objectives.objective import Objective, Outputs, logp_and_entropy, logp_outputs
from ernie_tune.objectives.policy import EntropyControl, PolicyHyper
from ernie_tune.peft.config import PeftConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.report.log import RunLog, keep_lines
from ernie_tune.rewards.functions import Answered
from ernie_tune.rewards.rubric import RowVerifiers, Rubric
from ernie_tune.train.agreement import Agreement, MismatchGate
from ernie_tune.train.claims import credit_claims
from ernie_tune.train.evidence import Evidence, blind_ceiling, without_picture
from ernie_tune.train.guards import Verdict
from ernie_tune.train.loop import StepRecord
from ernie_tune.train.perception import Beside
from ernie_tune.train.policy import PolicyObjective
from ernie_tune.train.reference import Reference, choose_mode, make_room, take_copy
from ernie_tune.train.rolled import Rolled, told
from ernie_tune.train.rollout_guards import LOOKS_EVERY, LOOKS_ROWS, RolloutWatch, WatchLimits
from ernie_tune.train.rollouts import Rollouts
from ernie_tune.train.second_judges import SecondJudges
from ernie_tune.train.uncertain import mark_uncertain
from ernie_tune.trainers import assemble
from ernie_tune.trainers.by_hand import COMPLETIONS_FILE, ByHand
from ernie_tune.trainers.judged import check_shared_prompts
from ernie_tune.trainers.judges import ModelJudge, monitors_of, open_judges, rubric_of
from ernie_tune.trainers.keeper import JsonPart
from ernie_tune.trainers.method import Method, Rows, RowSets, Stateful
from ernie_tune.trainers.neighbours import settings_for
from ernie_tune.trainers.online_settings import (
    check_timeout,
    evidence_settings,
    perception_of,
    policy_hyper,
    rollout_settings,
    with_tools,
)
from ernie_tune.trainers.replaying import note_experts, replay_mode
from ernie_tune.trainers.rollout_stream import DataRanks, RolloutsPart, RolloutStream
from ernie_tune.trainers.teaching import is_demonstration, teaching_of

WATCH_FILE = "watch_state.json"
AGREEMENT_FILE = "agreement_state.json"
Tools = Mapping[str, Callable[..., Any]]  # functions by the place at which the settings name them
_ROWS = 64  # answers computed at once
_SHOWN, _SHOWN_CHARACTERS = 3, 80  # answers beside an alarm


class SampledAnswers(Method):
    """Answers are sampled from the policy, judged, and compared within their group (or, with a
    critic, with what was expected).
    """

    stages = ("RLVR",)
    signals: tuple[str, ...] = ("verifiable", "prompt")
    saves_on_error = True

    def __init__(
        self, config: RunConfig, place: Place, processor: Processor, rubric: Rubric, tools: Tools | None = None
    ) -> None:
        self.settings = rollout_settings(config, place.batch[1], tools)
        self.rubric = rubric
        super().__init__(config, place, processor)
        self.teaching = teaching_of(config, place, processor, self.banned)
        if self.teaching is not None:
            self.signals = (*self.signals, *self.teaching.signals)
        self.reference: Reference | None = None
        w = config.watch
        limits = WatchLimits(w.guard_action == "stop", w.kl_budget, w.entropy_floor)
        self.watch = RolloutWatch(self.teaching is None, limits)
        self.watch.show = self._shown
        self.monitors = monitors_of(config)
        self._load, self._load_of = TurnLoad(), -1  # of the newest round's sampling, and which that is
        self.replay = "off"  # of routers, once the model is known
        self._mode = ""  # of the reference, once it is chosen
        self._fresh = False  # whether room was made for a copy of the adapter
        self._rollouts: Rollouts | None = None
        self._prompts: RolloutStream  # the run's, once its rows are known

    @property
    def rollouts(self) -> Rollouts:
        """The rounds of the run."""
        if self._rollouts is None:
            raise AssertionError("prepare() makes the rollouts")
        return self._rollouts

    # --- before the run ---------------------------------------------------------------------------

    def more_rows(self, sets: Sequence[Rows]) -> Sequence[Rows]:
        """The rows as they are. Raises ValueError, naming the row, where nothing could check an
        answer to it, and for settings that need answers in rows.
        """
        affinity = self.config.lora.lora_expert_affinity
        if affinity > 0:
            raise ValueError(
                say(
                    f"lora_expert_affinity ({affinity:g}) must be 0 at stage {self.config.model.stage}, whose rows hold no answers to measure experts by; train SFT with it first",
                    f"阶段 {self.config.model.stage} 的数据没有可用于度量专家的回答，lora_expert_affinity（{affinity:g}）须为 0；请先用 SFT 训练",
                )
            )
        alone = len(self.rubric.judges) == 1 and self.teaching is None
        for judge in self.rubric.judges:
            if isinstance(judge, RowVerifiers):
                for rows in sets:
                    for i in range(len(rows)):
                        judge.check(rows[i], alone)
        return sets

    def stream(self, rows: RowSets) -> Any:
        s = self.settings
        records = [some[i] for some in rows.train for i in range(len(some))]
        for rubric in self._rubrics():
            rubric.know([*records, *(rows.held[i] for i in range(len(rows.held)))])
        if self.teaching is not None and self.teaching.signals:
            records = [record for record in records if not is_demonstration(record)]
            self.teaching.take(
                rows.train, s.groups_per_batch, -(-s.prompts // (s.num_mini_batches * s.groups_per_batch))
            )
        windows, by_difficulty = s.num_iterations * s.num_mini_batches, self.config.rollout.difficulty_sampler
        self._prompts = RolloutStream(records, self.config.train.seed, windows, s.prompts, by_difficulty)
        return self._prompts

    def steps_per_pass(self, rows: RowSets) -> float:
        s = self.settings
        return sum(map(len, rows.train)) / s.prompts * s.num_iterations * s.num_mini_batches

    @property
    def needs_reference(self) -> bool:
        return self.config.preference.beta > 0 or self.settings.kl_coef > 0

    def support(self) -> Callable[..., Outputs]:
        """How a reference's log-probabilities are read: over what could be sampled."""
        return functools.partial(logp_outputs, temperature=self.settings.temperature, banned=self.banned)

    @property
    def compares_with_start(self) -> bool:  # type: ignore[override]
        return self.needs_reference

    def attach(self, model: Any) -> None:
        """Raises ValueError for a model with virtual tokens, which begin every dialogue, where
        prompts are to be computed once.
        """
        check_shared_prompts(model, self.settings.prefix_sharing)
        check_timeout(self.config.sampling.rollout_timeout_seconds, self.place.mesh.layout)
        updates = self.settings.num_iterations * self.settings.num_mini_batches
        self.replay = replay_mode(self.config, updates, model)
        self.settings = dataclasses.replace(self.settings, note_experts=self.replay == "R3")

    def before_put(self, model: Any) -> None:
        """Choose the reference while the whole adapter can be seen, and make room for its copy.
        Raises ValueError for settings that do not go together.
        """
        r, beta = self.config.reference.ref_mode, self.config.preference.beta
        if self.needs_reference and r in ("none", "precomputed"):
            raise ValueError(
                say(
                    f"ref_mode ({r}) must give a reference for answers that nobody knows before, with beta ({beta:g}) and kl_coef ({self.settings.kl_coef:g}); take auto, or set both to 0",
                    f"beta（{beta:g}）与 kl_coef（{self.settings.kl_coef:g}）需要能给新回答打分的参考，ref_mode（{r}）不行；请用 auto，或将两者设为 0",
                )
            )
        resumed = self.config.save.resume_only_model
        self._mode = choose_mode(r, model, resumed) if self.needs_reference else "none"
        self._fresh = self._mode == "adapter_ref" and make_room(model)
        for judge in self._models():
            judge.attach(model, self.config)

    def _models(self) -> list[ModelJudge]:
        judges = [judge for rubric in self._rubrics() for judge in rubric.judges]
        return [judge for judge in judges if isinstance(judge, ModelJudge)]

    def _rubrics(self) -> list[Rubric]:
        """What rewards, and what only looks on."""
        return [self.rubric, *([] if self.monitors is None else [self.monitors])]

    def objective(self, total_steps: int, steps_per_pass: float) -> Objective:
        policy = self.policy_objective(policy_hyper(self.config), self.config.preference.beta)
        return policy if self.teaching is None else self.teaching.objective(policy)

    def policy_objective(self, hyper: PolicyHyper, beta: float) -> PolicyObjective:
        """The policy's loss with a penalty of this weight for leaving the reference."""
        p = self.config.policy
        return PolicyObjective(
            hyper,
            self.banned,
            self.settings.temperature,
            beta,
            EntropyControl(p.entropy_coef, p.use_adaptive_entropy, p.entropy_target),
            p.rollout_is,
            (self.config.mismatch.rollout_is_min, self.config.mismatch.rollout_is_max),
            log_entropy=True,
            perception=perception_of(self.config),
        )

    @property
    def banned(self) -> tuple[int, ...]:
        """Ids that sampling leaves out, and therefore training too."""
        tokens = self.processor.tokens
        return tokens.placeholders() + tokens.markers()

    def prepare(self, policy: Placed, rows: RowSets, dry_run: bool) -> None:
        self.policy, self.output_dir = policy, Path(self.config.save.output_dir)
        if self._fresh:
            take_copy(policy.model)
            self._fresh = False
        for rubric in self._rubrics():
            open_judges(rubric, self.place, policy)
        if self.teaching is not None:
            self.teaching.open(policy)
        if self._mode != "none":
            support = self.support()
            with policy.whole():
                self.reference = Reference(
                    policy.model,
                    self._mode,
                    {},
                    policy.forward,
                    lambda model: self.place.put(model, trained=False).forward,
                    support,
                )
        wanted = evidence_settings(self.config)
        evidence = Evidence(wanted, self._prompts.records, self.processor, self._logp) if wanted.wanted else None
        self.agreement = self._agreement()
        self._rollouts = Rollouts(
            self.settings,
            self._prompts.records,
            self.processor,
            self.sample,
            self.rubric,
            self.attached(),
            self._prompts.prompts,
            DataRanks(self.place),
            self._tell,
            self.finishing(),
            self.agreement,
            evidence,
            self._beside(),
            (lambda groups: {}) if self.monitors is None else SecondJudges(self.monitors, DataRanks(self.place)),
        )

    def _beside(self) -> Beside | None:
        """What the perception term compares answers with."""
        e, seed = self.config.evidence, self.config.train.seed
        if perception_of(self.config) is None:
            return None
        return Beside(self.processor, e.perception_mask_ratio, seed, e.perception_every)

    def _agreement(self) -> Agreement:
        """Whether the forward that trains says of sampled tokens what the engine says."""
        m = self.config.mismatch
        gate = MismatchGate.of(str(self.policy.model.compute_dtype), m.mismatch_gate)
        return Agreement(self._logp, DataRanks(self.place), gate, m.mismatch_every, m.old_logps == "recompute")

    def finishing(self) -> Sequence[Callable[[Sequence[Rolled]], None]]:
        """What is added to a round's groups once they have advantages."""
        size = self.settings.groups_per_batch
        more: list[Callable[[Sequence[Rolled]], None]] = []
        quantile = self.config.sampling.top_entropy_quantile
        if quantile < 1:
            more.append(
                lambda groups: mark_uncertain(
                    groups, quantile, self._entropy, self.rollouts.batch, size, DataRanks(self.place)
                )
            )
        e = self.config.evidence
        if e.process_rewards == "claims":
            more.append(lambda groups: credit_claims(groups, self.processor, e.process_weight, e.evidence_scope))
        if self.replay != "off":
            more.append(functools.partial(note_experts, size=size, policy=self.policy, processor=self.processor))
        if self.teaching is not None:
            more.append(functools.partial(self.teaching.judge, size=size))
        return more

    # --- the run ----------------------------------------------------------------------------------

    def surveyed(self, stream: Any) -> Survey:
        return survey([stream.records], UsablePrompts(self.processor, self.settings.max_prompt_length))

    def heaviest(self, stream: Any, always: bool = True) -> None:
        """Nobody knows the longest answer beforehand."""

    def windows(self, stream: Any) -> Iterator[Sequence[Any]]:
        windows = self.rollouts.windows()
        return windows if self.teaching is None else self.teaching.windows(windows)

    def metrics(self) -> Mapping[str, float]:
        """Of the newest round, and where its time went on this process, in seconds."""
        seconds, tokens = self.rollouts.seconds, self.rollouts.tokens
        out = {f"timing/{part}": value for part, value in seconds.items()}
        if seconds.get("rollout"):
            out["rollout/tokens_per_second"] = tokens / seconds["rollout"]
        return {**self.rollouts.metrics, **self._load.metrics(), **out}

    def sample(self, prompts: Sequence[Prompt]) -> Mapping[int, Sequence[Completion]]:
        """Answers to the prompts by the weights as they are now."""
        size = Capacity(rows=max(_ROWS, self.settings.num_generations))
        limit = self.config.sampling.rollout_timeout_seconds
        end = time.monotonic() + limit if limit else math.inf
        with self.policy.answering() as forward:
            scheduler = Engine(forward, self.processor).scheduler(size)
            by_length = sorted(prompts, key=lambda p: len(p.row.input_ids_L))
            found = dict(complete(scheduler, by_length, over=lambda: time.monotonic() > end))
        if self._load_of != self.rollouts.round:
            self._load, self._load_of = TurnLoad(), self.rollouts.round
        self._load.add(scheduler.load)
        self.place.check_alike([one.token_ids for key in sorted(found) for one in found[key]], say("answers", "回答"))
        return found

    def attached(self) -> list[Callable[[UnitBatch], UnitBatch]]:
        """What is said of the answers' tokens before they are learned from, one column each."""
        return [] if self.reference is None else [self._with_reference]

    def _logp(self, batch: UnitBatch) -> np.ndarray:
        """What the policy of the moment says of a batch's answers, [N], over what can be
        sampled."""
        support = functools.partial(logp_outputs, temperature=self.settings.temperature, banned=self.banned)
        with self.policy.whole():
            return frozen_outputs(self.policy.forward, support, batch)["logp_N"]

    def _entropy(self, batch: UnitBatch) -> np.ndarray:
        """How uncertain the policy of the moment is of a batch's answers, [N] nats, over what can
        be sampled."""
        support = functools.partial(logp_and_entropy, temperature=self.settings.temperature, banned=self.banned)
        with self.policy.whole():
            return frozen_outputs(self.policy.forward, support, batch)["entropy_N"]

    def _with_reference(self, batch: UnitBatch) -> UnitBatch:
        assert self.reference is not None
        with self.policy.whole():
            return batch.with_columns(ref_logp_N=self.reference.compute(batch))

    def _tell(self, number: int, groups: Sequence[Rolled]) -> None:
        """Every answer of a round with its rewards, for the eye and for later: one JSON object a
        line, written by one process.
        """
        if not self.config.rollout.log_completions:
            return
        everybody = self.place.gather_batch([row for group in groups for row in told(number, group)])
        if self.place.is_writer:
            rows = [row for part in everybody for row in part]
            places = itertools.accumulate(row["sample"] == 0 for row in rows)
            lines = [json.dumps({**r, "place": n - 1}, ensure_ascii=False) for r, n in zip(rows, places, strict=True)]
            self.output_dir.mkdir(parents=True, exist_ok=True)  # a notebook may make a round before any run
            with (self.output_dir / COMPLETIONS_FILE).open("a", encoding="utf-8") as file:
                file.write("".join(f"{line}\n" for line in lines))

    def measure(self, policy: Placed, rows: RowSets, output_dir: Path) -> Measure:
        encoder = assemble.encoder_of(self.config, self.processor)
        given = (assemble.measure_settings(self.config), policy.forward, self.processor, encoder, rows.held, output_dir)
        draws = self.config.eval.num_generations_eval
        own = RowVerifiers(self.config.rollout.max_completion_length, self.config.evidence.evidence_scope)
        return OnlineMeasure(
            *given,
            rubric=self.rubric,
            own=own,
            watch=self.watch,
            ask=self._likeliest,
            draw=self._several,
            draws=draws,
            monitors=self.monitors,
        )

    def _likeliest(self, records: Sequence[Record]) -> list[Answered]:
        """One greedy answer to each prompt, made as those that are learned from and no shorter;
        what is told of the newest round does not count it.
        """
        return [answers[0] for answers in self._untold(records, range(len(records)), 1, greedy=True)]

    def _several(self, records: Sequence[Record], numbers: Sequence[int], n: int) -> list[Sequence[Answered]]:
        """`n` answers to each prompt, sampled as those that are learned from."""
        return self._untold(records, numbers, n, greedy=False)

    def _untold(
        self, records: Sequence[Record], numbers: Sequence[int], n: int, greedy: bool
    ) -> list[Sequence[Answered]]:
        rounds, most = self.rollouts, max(self.config.eval.eval_max_new_tokens, self.settings.max_completion_length)
        told, load = (dict(rounds.seconds), rounds.tokens), (copy.deepcopy(self._load), self._load_of)
        drawn = rounds.sample(records, numbers, self.settings.seed, n, greedy, most_tokens=most)
        (rounds.seconds, rounds.tokens), (self._load, self._load_of) = told, load
        return [one.answers for one in drawn]

    def started(self, log: RunLog, rows: RowSets, resumed: bool) -> None:
        """Say what answers would earn without looking; a resumed run forgets rounds to come."""
        if resumed and self.place.is_writer and (made := self.rollouts.round):
            keep_lines(self.output_dir / COMPLETIONS_FILE, lambda row: row.get("round", 0) < made)
        right, reward = blind_ceiling(self.rollouts.records, self.config.evidence.evidence_twin_share)
        if right:
            twins = reward > 0 and self.config.evidence.evidence_twins
            log.info(
                say(
                    f"evidence/blind_ceiling: without the pictures at best {right:.1%} of the answers are right"
                    + (f", and earn {reward:.3f} with twins" if twins else ""),
                    f"evidence/blind_ceiling：不看图片最多 {right:.1%} 的回答正确"
                    + (f"，使用孪生图片时奖励最多 {reward:.3f}" if twins else ""),
                )
            )

    def after_step(self, record: StepRecord) -> list[Verdict]:
        for rubric in self._rubrics():
            rubric.at(record.step, self.config.train.max_steps)
        found = self.watch.look(record.step, record.metrics)
        return found + (self._look_without(record.step) if record.step % LOOKS_EVERY == 0 else [])

    def after_evaluation(self, step: int) -> list[Verdict]:
        return self.watch.fallen(step)

    def _shown(self) -> str:
        """Some answers of the newest round with what each judge and checker gave them."""
        lines = []
        for group in self.rollouts.newest[:_SHOWN]:
            row = next(told(0, group))
            given = ", ".join(
                f"{name} {value if value is None else f'{value:g}'}" for name, value in row["rewards"].items()
            )
            lines.append(f"\n    {row['row']}: {row['text'][:_SHOWN_CHARACTERS]!r} ({given})")
        return "".join(lines)

    def _look_without(self, step: int) -> list[Verdict]:
        """Answer some rows with their pictures and with grey ones."""
        records = [r for r in self.rollouts.records if r.images and r.reward and r.reward.answer is not None]
        some = [records[i * len(records) // LOOKS_ROWS] for i in range(LOOKS_ROWS)] if records else []
        if not some:
            return []
        right = []
        for shown in (some, [without_picture(record) for record in some]):
            drawn = self.rollouts.sample(shown, range(len(shown)), 0, greedy=True)
            right.append(float(np.mean([group.right_G for group in self.rollouts.judge(drawn)])))
        return self.watch.sight(step, right[0], right[1], blind_ceiling(records)[0])

    def parts(self) -> Mapping[str, Stateful]:
        watch = JsonPart(self.place, WATCH_FILE, self.watch)
        taught = {} if self.teaching is None else self.teaching.parts()
        agreement = JsonPart(self.place, AGREEMENT_FILE, self.agreement)
        return {
            "rollouts": RolloutsPart(self.place, self.rollouts),
            "rollout watch": watch,
            "agreement": agreement,
            **taught,
        }


def given_model(model: Any, peft_config: PeftConfig | None) -> Any:
    """A model as TRL's trainers take it: at hand, or by the name of a folder or repository; with a
    fresh adapter where one is described. Raises ValueError for an adapter without a model.
    """
    if isinstance(model, str | Path):
        model = AutoModel.from_pretrained(model)
    if peft_config is None:
        return model
    if model is None:
        raise ValueError(
            say(
                "model (None) must be given with peft_config, which is put on it; pass one, or set fine_tuning "
                "and the lora_ settings in args",
                "使用 peft_config 时须给出 model（现为 None）；请传入模型，或在 args 中设置 fine_tuning 与 lora_ 各项",
            )
        )
    return get_peft_model(model, peft_config)


class RLVRTrainer(ByHand):
    """Sample answers, judge them, and learn from what was better than expected.

    `reward_funcs`: functions (TRL's, verl's, EasyR1's or ms-swift's signature), names of checkers,
    "file.py:function", or a list of these, with `reward_weights`; by default what each row names,
    or what its gold answer asks for. `tools`: functions that answers may call, told of by their
    docstrings in every prompt, and names as the setting has them. `processing_class`: TRL's name of
    `processor`; as there, `model` may be the name of a folder or repository, and `peft_config` puts
    an adapter on it. Arguments and errors as `Trainer`'s. Also ValueError for rows that nothing can
    check, batch sizes that do not hold whole groups, and settings under which training would not
    see what was sampled.
    """

    method_class = SampledAnswers
    reward_model: Any = None  # beside the functions, where a kind of trainer takes one
    tools: Tools | None = None  # functions that answers may call

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
        tools: Sequence[Any] = (),
        processing_class: Any = None,
        peft_config: PeftConfig | None = None,
        **watched: Any,
    ) -> None:
        config = args = settings_for(args, self.method_class.stages)
        if tools:
            config, self.tools = with_tools(config, tools)
            args = config
        self.rubric = rubric_of(config, reward_funcs, reward_weights, self.reward_model)
        model = given_model(model, peft_config)
        super().__init__(model, args, train_dataset, eval_dataset, processor or processing_class, **watched)

    def make_method(self) -> Method:
        return self.method_class(self.args, self.place, self.processor, self.rubric, self.tools)


GRPOTrainer = RLVRTrainer  # TRL's name

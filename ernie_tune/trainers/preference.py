"""Learning from judged answers: units for rows, a reference policy, measuring by comparisons; the
DPO family and KTO, and their trainers.

Refuses to know: formulas (objectives), how the reference is computed or kept (train/reference.py),
the run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.state import read_values, write_values
from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.data.batching import Dropped
from ernie_tune.data.mixing import permute
from ernie_tune.data.records import Record
from ernie_tune.data.units import JUDGED, Answer, UnitBatch, UnitEncoder
from ernie_tune.evaluate.answers import Question, question
from ernie_tune.evaluate.judged import judged_evaluation
from ernie_tune.evaluate.measure import Measure
from ernie_tune.machine.placed import Placed
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.objectives.pairwise import expand, needs_reference
from ernie_tune.objectives.preference import PreferenceHyper
from ernie_tune.objectives.unpaired import RewardShift, kto_balance
from ernie_tune.objectives.upo import UpoSettings
from ernie_tune.report.log import RunLog
from ernie_tune.train.density import PromptDensity
from ernie_tune.train.guards import Verdict
from ernie_tune.train.loop import StepRecord
from ernie_tune.train.preference import JudgedObjective, Margins, PairObjective, UpoObjective
from ernie_tune.train.preference_guards import PreferenceWatch
from ernie_tune.train.reference import (
    CACHE_FILE,
    SAME,
    Reference,
    choose_mode,
    identity_of,
    make_room,
    start_difference,
    take_copy,
)
from ernie_tune.trainers.assemble import Subset
from ernie_tune.trainers.base import Trainer
from ernie_tune.trainers.judged import (
    SpoiltPictures,
    ancestry,
    check_shared_prompts,
    compared_with,
    every_row,
    unit_encoder,
    with_mismatched,
)
from ernie_tune.trainers.keeper import JsonPart
from ernie_tune.trainers.method import Method, Rows, RowSets, Stateful

REFERENCE_FOLDER = "reference"  # of a checkpoint: where a reference that moves stands
WATCH_FILE = "preference_guards_state.json"
LABELLED_STEPS = 20  # after so many the share of good answers is known well enough to speak of it


class PreferenceMethod(Method):
    """Learning from judged answers. The prompt with its images is computed once for all answers to
    it, where they show the same media.
    """

    signals: tuple[str, ...] = JUDGED
    compares_with_start = True
    encoder: UnitEncoder
    policy: Placed  # once there is a reference

    def make_encoder(self) -> UnitEncoder:
        self.pictures = SpoiltPictures(self.config)
        self.reference: Reference | None = None
        self.mode = ""  # of the reference, once it is chosen
        self.density: PromptDensity | None = None  # of prompts with good and with bad answers
        self.watch = PreferenceWatch()
        self._new_room = False  # for an adapter that is the reference
        return unit_encoder(self.config, self.processor, self.learned())

    def present_objective(self) -> JudgedObjective:
        found = super().present_objective()
        assert isinstance(found, JudgedObjective)
        return found

    def learned(self) -> tuple[str, ...]:
        """The kinds of judgement that the method learns from."""
        return self.signals

    def learns_pairs(self) -> bool:
        return "pair" in self.learned()

    def more_rows(self, sets: Sequence[Rows]) -> Sequence[Rows]:
        return self.pictures.beside(sets, self.learns_pairs())

    def attach(self, model: ErnieModel) -> None:
        check_shared_prompts(model, self.encoder.share)

    # --- the reference ----------------------------------------------------------------------------

    def before_put(self, model: ErnieModel) -> None:
        """Choose the reference: a rank alone would not see whether an adapter is fresh. Raises
        ValueError as `reference_mode`.
        """
        self.mode = self.reference_mode(model)
        self._new_room = self.mode == "adapter_ref" and make_room(model)

    def reference_mode(self, model: ErnieModel) -> str:
        """Which reference the run compares with. On a mesh this is decided before the model is laid
        over it: a rank alone would not see whether an adapter is fresh. Raises ValueError for
        settings that do not go together.
        """
        r, objective = self.config.reference, self.present_objective()
        if not objective.needs_reference or r.ref_mode == "none":
            if objective.needs_reference:
                raise ValueError(
                    say(
                        f"ref_mode (none) must not go with loss_type {','.join(self.config.preference.loss_type)}"
                        ", which compares with a reference; set auto, or take simpo, orpo or cpo",
                        f"loss_type {','.join(self.config.preference.loss_type)} 要与参考模型比较，不能用 "
                        "ref_mode（none）；请设为 auto，或用 simpo、orpo、cpo",
                    )
                )
            return "none"
        moving = r.ref_model_update_steps > 0
        # with resume_only_model the adapter will be that of a checkpoint
        mode = choose_mode(r.ref_mode, model, moving or self.config.save.resume_only_model)
        if moving and mode not in ("model", "adapter_ref"):
            raise ValueError(
                say(
                    f"ref_model_update_steps ({r.ref_model_update_steps}) must not go with ref_mode {mode}; unset one",
                    f"ref_model_update_steps（{r.ref_model_update_steps}）不能与 ref_mode {mode} 同用；请取消其一",
                )
            )
        if mode == "precomputed" and objective.uses_kl:
            raise ValueError(
                say(
                    "ref_mode (precomputed) must not go with kto, whose mismatched answers are not known "
                    "before; set auto, or bco or apo_zero_unpaired",
                    "ref_mode（precomputed）不能与 kto 同用，其错配回答事先未知；请设为 auto，或用 "
                    "bco、apo_zero_unpaired",
                )
            )
        return mode

    def prepare(self, policy: Placed, rows: RowSets, dry_run: bool) -> None:
        """Take the reference while the policy is what it was given as, before a checkpoint is put
        into it.
        """
        self.policy, model = policy, policy.model
        self.watch = PreferenceWatch(anchored=self.present_objective().anchored)
        with policy.whole():
            identity = {}
            if self.mode == "precomputed":
                identity = identity_of(model, self.processor, policy.shards(model.state_dict()), self.place)
            if self._new_room:  # the policy that training starts from
                take_copy(model)
                self._new_room = False
            self.reference = Reference(
                model, self.mode, identity, policy.forward, lambda copy: self.place.put(copy, trained=False).forward
            )
        if self.mode == "precomputed" and not dry_run:
            self._precompute(self.reference, rows)
        if self.config.signals.bco_density and not dry_run:
            self.density = self._measured_density(rows)

    def _precompute(self, reference: Reference, rows: RowSets) -> None:
        """Every row's log-probabilities under the policy as it is now, from the file where it has
        them.
        """
        file = Path(self.config.reference.ref_logps_path or Path(self.config.save.output_dir) / CACHE_FILE)
        if file.is_file():
            reference.cache.load(file)
        known = len(reference.cache.values)
        for batch in self._every_row(*rows.train, rows.held):
            reference.attached(batch)
        if len(reference.cache.values) > known and self.place.is_writer:
            reference.cache.save(file)
        reference.sealed = True

    def _every_row(self, *sets: Rows) -> Iterator[UnitBatch]:
        return every_row(self.encoder, self.config.train.per_device_train_batch_size, *sets)

    def _measured_density(self, rows: RowSets) -> PromptDensity:
        s, sets = self.config.signals, rows.train
        density = PromptDensity(self.policy.forward, s.bco_density_min, s.bco_density_max)
        # in an order that mixes the kinds, so that a part of many rows has both
        order = ([permute(i, len(part), self.config.train.seed, 78) for i in range(len(part))] for part in sets)
        density.fit(self._every_row(*(Subset(part, index) for part, index in zip(sets, order, strict=True))))
        density.measure(self._every_row(*sets, rows.held))
        return density

    def prepared(self) -> Reference:
        """The reference, once it is taken."""
        if self.reference is None:
            raise AssertionError("prepare comes first")
        return self.reference

    # --- windows ----------------------------------------------------------------------------------

    def window(self, given: Sequence[UnitBatch]) -> Sequence[UnitBatch]:
        return self.compared(given, self.place.batch[0], self.place.gather_batch)

    def compared(
        self,
        window: Sequence[UnitBatch],
        rank: int = 0,
        said: Callable[[list[Answer]], list[list[Answer]]] = lambda mine: [mine],
    ) -> Sequence[UnitBatch]:
        """The window with what its rows are compared with. All processes call it; `rank` and `said`
        tell apart those that hold different rows of it.
        """
        reference = self.prepared()
        ready = compared_with(reference, self.place, window)
        if self.density is not None:
            ready = [self.density.attached(batch) for batch in ready]
        if not self.present_objective().uses_kl:
            return ready
        return with_mismatched(ready, self.encoder.collate, self.policy.forward, reference, rank, said)

    def started(self, log: RunLog, rows: RowSets, resumed: bool) -> None:
        reference = self.prepared()
        known, words = ancestry(self.config)
        log.info(say("policy: {w}; reference: {r}", "策略：{w}；参考：{r}", w=words, r=reference.mode))
        self.pictures.tell(log)
        if self.density is not None:
            log.info(self.density.line())
        if known is False and not resumed:
            log.info(
                say(
                    "{words}: preferences are learned best after SFT; train it on demonstrations first",
                    "{words}：偏好学习宜在 SFT 之后进行；请先用示范数据训练",
                    words=words,
                ),
                "WARNING",
            )
        if resumed or reference.mode == "none":
            return
        unit = next(u for u in (self.encoder(row, Dropped()) for row in rows.train[0]) if u is not None)
        gap = start_difference(self.policy.forward, self.compared([self.encoder.collate([unit])])[0])
        if gap > SAME:
            log.info(
                say(
                    f"the reference ({reference.mode}) is not the policy at the start: log-probabilities "
                    f"differ by {gap:.3g}; where training continues an adapter, set ref_mode: adapter_ref",
                    f"参考（{reference.mode}）与初始策略不一致：对数概率相差 {gap:.3g}"
                    "；若是在已有适配器上继续训练，请设 ref_mode: adapter_ref",
                ),
                "WARNING",
            )

    def after_step(self, record: StepRecord) -> list[Verdict]:
        r = self.config.reference
        if r.ref_model_update_steps > 0 and record.step % r.ref_model_update_steps == 0:
            with self.policy.whole():
                self.prepared().update(r.ref_model_mixup_alpha)
        return self.watch.look(record.step, record.metrics)

    def parts(self) -> Mapping[str, Stateful]:
        watch = JsonPart(self.place, WATCH_FILE, self.watch)
        moves = self.config.reference.ref_model_update_steps > 0
        return {"preference guards": watch, "reference": ReferencePart(self.policy, self.prepared(), moves)}

    def measure(self, policy: Placed, rows: RowSets, output_dir: Path) -> Measure:
        plain = super().measure(policy, rows, output_dir)
        parts = (plain.settings, plain.model, plain.processor, plain.encoder, plain.rows, plain.output_dir)
        return PreferenceMeasure(*parts, method=self)


class ReferencePart:
    """What a reference needs to go on: its values where it moves, and what it has computed."""

    def __init__(self, policy: Placed, reference: Reference, moves: bool) -> None:
        self.policy, self.reference, self.moves = policy, reference, moves

    def save(self, folder: Path) -> None:
        reference, place = self.reference, self.policy.place
        if reference.mode in ("none", "precomputed"):
            return
        if self.moves:
            moving = reference.moving()
            write_values(folder / REFERENCE_FOLDER, moving, cut=self.policy.shards(moving), ranks=place)
        if place.is_writer:
            # what was computed stays as it was: in another micro-batch the last bit could differ
            reference.cache.save(folder / CACHE_FILE)

    def load(self, folder: Path) -> None:
        if (folder / CACHE_FILE).is_file():
            self.reference.cache.load(folder / CACHE_FILE)
        if self.moves:
            moving = self.reference.moving()
            read_values(folder / REFERENCE_FOLDER, moving, cut=self.policy.shards(moving))


class PreferenceMeasure(Measure):
    """Comparisons instead of a likelihood; questions are answered and compared with each row's best
    answer.
    """

    def __init__(self, *args: Any, method: PreferenceMethod) -> None:
        super().__init__(*args)
        self.method = method
        self._asked: list[Question] | None = None

    def _loss(self, rows: Sequence[Record], done: Callable[[int], object] = lambda count: None) -> dict[str, float]:
        m = self.method
        every = (rows[i] for i in range(len(rows)))
        size = max(1, self.settings.eval.per_device_eval_batch_size)
        return judged_evaluation(self.model, every, m.encoder, size, m.present_objective(), m.compared, done)

    def _questions(self, limit: int) -> list[Question]:
        if self._asked is None:
            shown = (demonstration(self.rows[i]) for i in range(len(self.rows)))
            self._asked = [question(record) for record in shown if record is not None]
        count = min(limit, len(self._asked))
        return [self._asked[i * len(self._asked) // count] for i in range(count)]


def demonstration(record: Record) -> Record | None:
    """The row's best answer as an answer to imitate; None where none is known to be good."""
    if not record.best:
        return None
    messages, images, videos = record.dialogue(record.best[0])
    return dataclasses.replace(record, signal="sft", messages=messages, images=images, videos=videos, candidates=())


# --- the DPO family -------------------------------------------------------------------------------


class DPO(PreferenceMethod):
    """Comparisons: pairs, and rankings and ratings as all their pairs."""

    stages = ("DPO",)
    signals = ("pair", "ranking", "rating")

    def objective(self, total_steps: int, steps_per_pass: float) -> PairObjective:
        return pair_objective(self.config)


class DPOTrainer(Trainer):
    """Learn from comparisons. `loss_type` names one loss or several, as TRL does: sigmoid (the
    default), or another of `config.stages.PAIR_LOSSES` (`ernie-tune help loss_type` lists them).
    Arguments and errors as `Trainer`'s.
    """

    method_class = DPO


def hyper_of(config: RunConfig) -> PreferenceHyper:
    """What the settings say of the losses that compare two answers."""
    p = config.preference
    likelihood = p.sft_loss_ratio or 1.0
    return PreferenceHyper(
        beta=p.beta,
        label_smoothing=p.label_smoothing,
        simpo_gamma=p.simpo_gamma,
        orpo_lambda=p.beta,  # as TRL has it
        rpo_alpha=likelihood,
        cpo_alpha=likelihood,
        dpop_lambda=p.dpop_lambda,
        ld_alpha=None if p.ld_alpha == 1 else p.ld_alpha,
        f_divergence_type=p.f_divergence_type,
        f_alpha_divergence_coef=p.f_alpha_divergence_coef,
        use_weighting=p.use_weighting,
        nll_norm=p.sft_loss_norm,
    )


def pair_objective(config: RunConfig) -> PairObjective:
    """The losses that the settings name. Raises ValueError for names and combinations that do not
    exist.
    """
    p = config.preference
    names = ("sigmoid",) if p.loss_type == ("auto",) else p.loss_type
    if "kto_pair" in names:
        raise ValueError(
            say(
                "loss_type (kto_pair) must be another: it compares with means of the whole batch; take "
                "stage KTO on labels, or bco_pair",
                "loss_type（kto_pair）不可用：它要与整个批次的均值比较；请在标签数据上用 KTO 阶段，或用 bco_pair",
            )
        )
    hyper = hyper_of(config)
    terms = {name: p.pref_loss_ratio * weight for name, weight in expand(names, p.loss_weights or None, hyper).items()}
    if p.sft_loss_ratio and not {"rpo", "cpo"} & set(names):
        terms["sft"] = terms.get("sft", 0.0) + p.sft_loss_ratio
    referenced = needs_reference(terms)
    if config.reference.reference_free and referenced:
        raise ValueError(
            say(
                "reference_free (true) must go with losses without a reference, not loss_type "
                f"{','.join(names)}; take simpo, orpo or cpo",
                f"reference_free（true）须与不用参考模型的损失同用，不能是 loss_type {','.join(names)}"
                "；请用 simpo、orpo 或 cpo",
            )
        )
    return PairObjective(
        terms, hyper, Margins(p.offset_alpha, p.offset_type), referenced, RewardShift(p.reward_shift_decay)
    )


class KTO(PreferenceMethod):
    """Single answers called good or bad."""

    stages = ("KTO",)
    signals = ("label",)

    def after_step(self, record: StepRecord) -> list[Verdict]:
        verdicts = super().after_step(record)
        objective = self.present_objective()
        if (
            isinstance(objective, UpoObjective)
            and objective.uses_kl
            and objective.labelled_steps == min(LABELLED_STEPS, self._total_steps)
        ):
            s = self.config.signals
            words = kto_balance(objective.good, objective.bad, s.desirable_weight, s.undesirable_weight)
            verdicts += [Verdict(f"step {record.step}: {words}")] if words else []
        return verdicts

    def objective(self, total_steps: int, steps_per_pass: float) -> UpoObjective:
        p, s = self.config.preference, self.config.signals
        self._total_steps = total_steps
        kind = "kto" if p.loss_type == ("auto",) else ",".join(p.loss_type)
        return UpoObjective(
            UpoSettings(
                weights={"bin": 1.0},
                hyper=PreferenceHyper(beta=p.beta),
                bin=kind,
                desirable_weight=s.desirable_weight,
                undesirable_weight=s.undesirable_weight,
            ),
            RewardShift(p.reward_shift_decay),
        )


class KTOTrainer(Trainer):
    """Learn from single answers called good or bad: `loss_type` kto (the default), bco or
    apo_zero_unpaired. Arguments and errors as `Trainer`'s.
    """

    method_class = KTO

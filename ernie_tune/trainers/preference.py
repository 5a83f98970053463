"""What trainers on judged answers share: units for rows, a reference policy, measuring by comparisons. `DPOTrainer` and `KTOTrainer` are little more.

Refuses to know: formulas (objectives), how the reference is computed or kept (train/reference.py).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.loader import ARGS_FILE, load_config
from ernie_tune.data.batching import Dropped
from ernie_tune.data.corruption import CorruptedPairs
from ernie_tune.data.mixing import permute
from ernie_tune.data.records import Record
from ernie_tune.data.units import JUDGED, Answer, UnitBatch, UnitEncoder, first_answer, following, mismatched
from ernie_tune.models.presets import PRESETS
from ernie_tune.objectives.pairwise import expand, needs_reference
from ernie_tune.objectives.preference import PreferenceHyper
from ernie_tune.objectives.unpaired import RewardShift, kto_balance
from ernie_tune.objectives.upo import UpoSettings
from ernie_tune.peft.config import PrefixConfig, PromptConfig
from ernie_tune.peft.model import PeftModel
from ernie_tune.report.log import RunLog
from ernie_tune.train.density import PromptDensity
from ernie_tune.train.evaluate import Question, question
from ernie_tune.train.evaluate_judged import judged_evaluation
from ernie_tune.train.guards import Verdict
from ernie_tune.train.loop import StepRecord
from ernie_tune.train.preference import Margins, PairObjective, UpoObjective
from ernie_tune.train.preference_guards import PreferenceWatch
from ernie_tune.train.reference import (
    CACHE_FILE,
    SAME,
    Reference,
    choose_mode,
    frozen_logp,
    identity_of,
    make_room,
    start_difference,
    take_copy,
)
from ernie_tune.train.state import Checkpoint, find_checkpoint, read_values, write_values
from ernie_tune.trainers.assemble import Subset
from ernie_tune.trainers.base import Trainer
from ernie_tune.trainers.measure import Measure

REFERENCE_FOLDER = "reference"  # of a checkpoint: where a reference that moves stands
WATCH_FILE = "preference_guards_state.json"
LABELLED_STEPS = 20  # after so many the share of good answers is known well enough to speak of it


class PreferenceTrainer(Trainer):
    """A run on judged answers. The prompt with its images is computed once for all answers to it, where they show the same media."""

    signals: tuple[str, ...] = JUDGED
    _made = 0  # pairs of true and spoilt pictures

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.reference: Reference | None = None
        self._mode = ""  # of the reference, once it is chosen
        self.density: PromptDensity | None = None  # of prompts with good and with bad answers
        self.watch = PreferenceWatch()
        self.encoder: UnitEncoder
        if isinstance(self.model, PeftModel) and self.model.active is not None:
            config = self.model.adapters[self.model.active].config
            if isinstance(config, PromptConfig | PrefixConfig) and self.encoder.share:
                raise ValueError(
                    f"prefix_sharing (true) must be false with {type(config).__name__.removesuffix('Config')}: virtual tokens begin every dialogue; set it"
                )

    def _encoder(self) -> UnitEncoder:
        d, p = self.args.data, self.args.preference
        return UnitEncoder(
            self.processor, d.max_seq_len, p.max_prompt_len, d.truncation_strategy, p.prefix_sharing, self.learned()
        )

    def _with_more(self, sets: list[Sequence[Record]]) -> list[Sequence[Record]]:
        """Each set with the pairs that its pictures make. Raises ValueError where there are none, or where nothing would learn from them."""
        c, d, t = self.args.picture, self.args.data, self.args.train
        if c.image_corruption == "none":
            return sets
        if not self._learns_pairs():
            raise ValueError(
                f"image_corruption ({c.image_corruption}) makes pairs and must go with a weight of the term that learns from them; raise pair in term_weights"
            )
        seed = t.seed if t.data_seed is None else t.data_seed
        made = [
            CorruptedPairs(rows, c.image_corruption, c.image_corruption_noise, c.image_corruption_ratio, seed, k)
            for k, rows in enumerate(sets)
        ]
        self._made = sum(len(rows.chosen) for rows in made)
        if not self._made:
            raise ValueError(
                f"image_corruption ({c.image_corruption}) must find rows with a picture and an answer known to be right, none of {self.train_rows} "
                f"in {','.join(d.train_dataset_path) or 'train_dataset'} was taken; give such rows, raise image_corruption_ratio, or set none"
            )
        return list(made)

    def _learns_pairs(self) -> bool:
        return "pair" in self.learned()

    def learned(self) -> tuple[str, ...]:
        """The kinds of judgement that the method learns from."""
        return self.signals

    def _objective(self) -> Any:
        """The objective of the run, or one like it where no run has begun."""
        return self.loop.objective if self.loop is not None else self.objective(1, 1.0)

    # --- the reference -----------------------------------------------------------------------------------------------

    def _put(self, training: bool = False) -> None:
        self._mode = self._mode or self._reference_mode()
        fresh = self._mode == "adapter_ref" and make_room(self.model)
        super()._put(training)
        if fresh:
            take_copy(self.model)

    def _reference_mode(self) -> str:
        """Which reference the run compares with. On a mesh this is decided before the model is laid over it: a rank alone would not see whether an adapter is
        fresh. Raises ValueError for settings that do not go together."""
        r, objective = self.args.reference, self._objective()
        if not objective.needs_reference or r.ref_mode == "none":
            if objective.needs_reference:
                raise ValueError(
                    f"ref_mode (none) must not go with loss_type {','.join(self.args.preference.loss_type)}, which compares with a reference; set auto, or take simpo, orpo or cpo"
                )
            return "none"
        moving = r.ref_model_update_steps > 0
        # with resume_only_model the adapter will be that of a checkpoint
        mode = choose_mode(r.ref_mode, self.model, moving or self.args.save.resume_only_model)
        if moving and mode not in ("model", "adapter_ref"):
            raise ValueError(
                f"ref_model_update_steps ({r.ref_model_update_steps}) must not go with ref_mode {mode}; unset one"
            )
        if mode == "precomputed" and objective.uses_kl:
            raise ValueError(
                "ref_mode (precomputed) must not go with kto, whose mismatched answers are not known before; set auto, or bco or apo_zero_unpaired"
            )
        return mode

    def _starting_point(self) -> Checkpoint | None:
        found, s = super()._starting_point(), self.args.save
        if (
            found and s.resume_only_model
        ):  # a run goes on that had started from another's weights: its reference is those
            named = find_checkpoint(self.output_dir, s.resume_from_checkpoint)
            assert named is not None
            self._take_weights(named)
        return found

    def _take_weights(self, checkpoint: Checkpoint) -> None:
        super()._take_weights(checkpoint)
        if self._mode == "adapter_ref" and self.reference is None:  # the policy that training starts from
            take_copy(self.model)

    def _before_training(self, dry_run: bool) -> None:
        """Take the reference while the policy is what it was given as, before a checkpoint is put into it."""
        self.watch = PreferenceWatch(anchored=self._objective().anchored)
        mode = self._mode = self._mode or self._reference_mode()
        with self.placed.whole():
            identity = {}
            if mode == "precomputed":
                cut = self.placed.shards(self.model.state_dict())
                identity = identity_of(self.model, self.processor, cut, self.place)
            self.reference = Reference(
                self.model,
                mode,
                identity,
                self.placed.forward,
                lambda model: self.place.put(model, trained=False).forward,
            )
        if mode == "precomputed" and not dry_run:
            self._precompute(self.reference)
        if self.args.signals.bco_density and not dry_run:
            self.density = self._measured_density()

    def _precompute(self, reference: Reference) -> None:
        """Every row's log-probabilities under the policy as it is now, from the file where it has them."""
        file = Path(self.args.reference.ref_logps_path or self.output_dir / CACHE_FILE)
        if file.is_file():
            reference.cache.load(file)
        known = len(reference.cache.values)
        for batch in self._every_row(*self.stream.shard.mixture.sources, self.eval_rows):
            reference.attached(batch)
        if len(reference.cache.values) > known and self.place.is_writer:
            reference.cache.save(file)
        reference.sealed = True

    def _every_row(self, *sets: Sequence[Record]) -> Iterator[UnitBatch]:
        """Each row once, the same on every process."""
        dropped, size = Dropped(), self.args.train.per_device_train_batch_size
        every = (self.encoder(rows[i], dropped) for rows in sets for i in range(len(rows)))
        return map(self.encoder.collate, _chunks((unit for unit in every if unit is not None), size))

    def _measured_density(self) -> PromptDensity:
        s, sources = self.args.signals, self.stream.shard.mixture.sources
        density = PromptDensity(self.placed.forward, s.bco_density_min, s.bco_density_max)
        # in an order that mixes the kinds, so that a part of many rows has both
        order = ([permute(i, len(rows), self.args.train.seed, 78) for i in range(len(rows))] for rows in sources)
        density.fit(self._every_row(*(Subset(rows, index) for rows, index in zip(sources, order, strict=True))))
        density.measure(self._every_row(*sources, self.eval_rows))
        return density

    def _ready(self, window: Sequence[UnitBatch]) -> Sequence[UnitBatch]:
        return self._compared(window, self.place.batch[0], self.place.gather_batch)

    def _compared(
        self,
        window: Sequence[UnitBatch],
        rank: int = 0,
        said: Callable[[list[Answer]], list[list[Answer]]] = lambda mine: [mine],
    ) -> Sequence[UnitBatch]:
        """The window with what its rows are compared with. All processes call it; `rank` and `said` tell apart those that hold different rows of it."""
        reference = self._reference()
        # where experts are apart, a forward is everybody's: what one rank lacks, all compute
        lacks = zip(*self.place.gather([reference.lacks(batch) for batch in window]), strict=True)
        ready = [reference.attached(batch, any(some)) for batch, some in zip(window, lacks, strict=True)]
        if self.density is not None:
            ready = [self.density.attached(batch) for batch in ready]
        if not self._objective().uses_kl:
            return ready
        # KTO's baseline: mismatched answers of the whole window, so that it does not depend on how the window is cut
        units = [unit for batch in window for unit in batch.units]
        answers = following(said([first_answer(unit) for unit in units]), rank)
        others = iter(mismatched(units, answers) if answers else ())
        total = 0.0
        for batch in window if answers else ():
            mixed = self.encoder.collate(list(itertools.islice(others, batch.num_rows)))
            total += float((frozen_logp(self.placed.forward, mixed) - reference.compute(mixed)).sum())
        ready[0] = dataclasses.replace(ready[0], kl_sum=total, kl_count=float(len(answers)))
        return ready

    def _reference(self) -> Reference:
        if self.reference is None:
            self._before_training(dry_run=True)
        assert self.reference is not None
        return self.reference

    def _after_start(self, log: RunLog, resumed: bool) -> None:
        reference = self._reference()
        known, words = ancestry(self.args)
        log.info(f"policy: {words}; reference: {reference.mode}")
        self._tell_made(log)
        if self.density is not None:
            log.info(self.density.line())
        if known is False and not resumed:
            log.info(f"{words}: preferences are learned best after SFT; train it on demonstrations first", "WARNING")
        if resumed or reference.mode == "none":
            return
        unit = next(
            u for u in (self.encoder(r, Dropped()) for r in self.stream.shard.mixture.sources[0]) if u is not None
        )
        gap = start_difference(self.placed.forward, self._compared([self.encoder.collate([unit])])[0])
        if gap > SAME:
            log.info(
                f"the reference ({reference.mode}) is not the policy at the start: log-probabilities differ by {gap:.3g}; where training continues an adapter, "
                "set ref_mode: adapter_ref",
                "WARNING",
            )

    def _tell_made(self, log: RunLog) -> None:
        if self._made:
            kind = self.args.picture.image_corruption
            log.info(
                f"image_corruption {kind}: {self._made} pairs of a true and a spoilt picture beside {self.train_rows} rows"
            )

    def _after_step(self, record: StepRecord) -> list[Verdict]:
        r = self.args.reference
        if r.ref_model_update_steps > 0 and record.step % r.ref_model_update_steps == 0:
            with self.placed.whole():
                self._reference().update(r.ref_model_mixup_alpha)
        return self.watch.look(record.step, record.metrics)

    # --- states ------------------------------------------------------------------------------------------------------

    def _more_states(self) -> dict[str, Any]:
        return {WATCH_FILE: self.watch.state_dict()}

    def _save_checkpoint_files(self, folder: Path) -> None:
        super()._save_checkpoint_files(folder)
        reference = self._reference()
        if reference.mode in ("none", "precomputed"):
            return
        if self.args.reference.ref_model_update_steps > 0:
            moving = reference.moving()
            write_values(folder / REFERENCE_FOLDER, moving, cut=self.placed.shards(moving), ranks=self.place)
        if self.place.is_writer:
            # what was computed stays as it was: in another micro-batch the last bit could differ
            reference.cache.save(folder / CACHE_FILE)

    def _resume(self, checkpoint: Checkpoint) -> None:
        super()._resume(checkpoint)
        self.watch.load_state_dict(checkpoint.read_json(WATCH_FILE))
        reference = self._reference()
        if (checkpoint.path / CACHE_FILE).is_file():
            reference.cache.load(checkpoint.path / CACHE_FILE)
        if self.args.reference.ref_model_update_steps > 0:
            moving = reference.moving()
            read_values(checkpoint.path / REFERENCE_FOLDER, moving, cut=self.placed.shards(moving))

    # --- measuring ---------------------------------------------------------------------------------------------------

    def _measure(self) -> Measure:
        plain = super()._measure()
        return PreferenceMeasure(
            plain.config, plain.model, plain.processor, plain.encoder, plain.rows, plain.output_dir, trainer=self
        )


class PreferenceMeasure(Measure):
    """Comparisons instead of a likelihood; questions are answered and compared with each row's best answer."""

    def __init__(self, *args: Any, trainer: PreferenceTrainer) -> None:
        super().__init__(*args)
        self.trainer = trainer
        self._asked: list[Question] | None = None

    def _loss(self, rows: Sequence[Record], done: Callable[[int], object] = lambda count: None) -> dict[str, float]:
        t = self.trainer
        every = (rows[i] for i in range(len(rows)))
        size = max(1, self.config.eval.per_device_eval_batch_size)
        return judged_evaluation(self.model, every, t.encoder, size, t._objective(), t._compared, done)

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


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def ancestry(config: RunConfig) -> tuple[bool | None, str]:
    """(whether the policy has been through SFT, None where nothing says so; what is known of it). Read from the arguments that our runs leave beside
    their weights, and from the names of presets and base models."""
    m = config.model
    for folder in (config.lora.lora_path, m.model_name_or_path):
        file = Path(folder) / ARGS_FILE
        if folder and file.is_file():
            stage = load_config(file).config.model.stage
            return stage != "PT", f"{folder}, made by {stage}"
    name = m.model_name_or_path.rsplit("/", 1)[-1].lower()
    if name in PRESETS and not Path(m.model_name_or_path).is_dir():
        return False, f"{m.model_name_or_path}, fresh weights"
    if "-base" in name:
        return False, f"{m.model_name_or_path}, a base model"
    return (
        None,
        f"{m.model_name_or_path or 'a model given as an object'}, of which no arguments tell how it was trained",
    )


# --- the DPO family --------------------------------------------------------------------------------------------------


class DPOTrainer(PreferenceTrainer):
    """Learn from comparisons: pairs, and rankings and ratings as all their pairs (methods.md 4.2). `loss_type` names one loss or several, as TRL does:
    sigmoid (the default), cdpo, robust, hinge, ipo, sigmoid_norm, odpo, simpo, orpo, cpo, dpop, rpo, bco_pair, mpo, nca_pair, exo_pair, sppo_hard, apo_zero,
    apo_down. Arguments and errors as `Trainer`'s."""

    stages = ("DPO",)
    signals = ("pair", "ranking", "rating")

    def objective(self, total_steps: int, steps_per_pass: float) -> PairObjective:
        return pair_objective(self.args)


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
    """The losses that the settings name. Raises ValueError for names and combinations that do not exist."""
    p = config.preference
    names = ("sigmoid",) if p.loss_type == ("auto",) else p.loss_type
    if "kto_pair" in names:
        raise ValueError(
            "loss_type (kto_pair) must be another: it compares with means of the whole batch; take stage KTO on labels, or bco_pair"
        )
    hyper = hyper_of(config)
    terms = {name: p.pref_loss_ratio * weight for name, weight in expand(names, p.loss_weights or None, hyper).items()}
    if p.sft_loss_ratio and not {"rpo", "cpo"} & set(names):
        terms["sft"] = terms.get("sft", 0.0) + p.sft_loss_ratio
    referenced = needs_reference(terms)
    if config.reference.reference_free and referenced:
        raise ValueError(
            f"reference_free (true) must go with losses without a reference, not loss_type {','.join(names)}; take simpo, orpo or cpo"
        )
    return PairObjective(
        terms, hyper, Margins(p.offset_alpha, p.offset_type), referenced, RewardShift(p.reward_shift_decay)
    )


class KTOTrainer(PreferenceTrainer):
    """Learn from single answers called good or bad (methods.md 4.3): `loss_type` kto (the default), bco or apo_zero_unpaired."""

    stages = ("KTO",)
    signals = ("label",)

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._good = self._bad = 0.0  # weight of the answers trained on so far

    def _ready(self, window: Sequence[UnitBatch]) -> Sequence[UnitBatch]:
        for unit in (unit for batch in window for unit in batch.units):
            share = float(np.mean(unit.label_C))
            self._good, self._bad = self._good + unit.weight * share, self._bad + unit.weight * (1 - share)
        return super()._ready(window)

    def _after_step(self, record: StepRecord) -> list[Verdict]:
        verdicts = super()._after_step(record)
        if record.step == min(LABELLED_STEPS, self.loop_total) and self._objective().uses_kl:
            s = self.args.signals
            seen = dict(self.place.gather((self.place.batch[0], (self._good, self._bad)))).values()
            good, bad = (sum(side) for side in zip(*seen, strict=True))
            words = kto_balance(good, bad, s.desirable_weight, s.undesirable_weight)
            verdicts += [Verdict(f"step {record.step}: {words}")] if words else []
        return verdicts

    def objective(self, total_steps: int, steps_per_pass: float) -> UpoObjective:
        p, s = self.args.preference, self.args.signals
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

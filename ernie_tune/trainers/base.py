"""What all trainers are: a run from data to model card. Assembles model, data, objective and loop; every decision of the loop is a visible `if`.

A method's trainer names its signals and makes its objective. Refuses to know: which method it is, how anything is computed (models, objectives), stored (checkpoint) or drawn (train/report, train/plot).
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.ledger import Ledger
from ernie_tune.config.arguments import RunConfig
from ernie_tune.data.batching import Dropped, RecordEncoder, dealt_again, steps_per_epoch
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.sources import load_dataset
from ernie_tune.machine.place import Place
from ernie_tune.machine.placed import Placed
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.objectives.objective import Objective
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.report import trainable_table
from ernie_tune.report.interval import Interval
from ernie_tune.report.log import RunFacts, RunLog, header_lines, stamp
from ernie_tune.report.plot import write_loss_png, write_loss_svg
from ernie_tune.report.progress import Progress, resident_gib
from ernie_tune.report.writers import open_writers
from ernie_tune.train.background import Pending, save_in_background
from ernie_tune.train.guards import Verdict
from ernie_tune.train.loop import Loop, LoopSettings, StepRecord
from ernie_tune.train.optim import LrRatios, Schedule, adamw_maker, build_adamw
from ernie_tune.train.state import (
    OPTIMIZER,
    Checkpoint,
    find_checkpoint,
    load_optimizer,
    load_values,
    remove_unfinished,
    rotate,
    save_checkpoint,
    set_aside_later,
)
from ernie_tune.trainers import assemble
from ernie_tune.trainers.interrupts import Interrupted, deferred_interrupt
from ernie_tune.trainers.measure import Measure, write_reports
from ernie_tune.trainers.run_folder import RunFolder, ledger_of
from ernie_tune.trainers.run_guards import RunGuards

STATES = {name: f"{name}_state.json" for name in ("loop", "objective", "data", "guards")}


class Trainer:
    """A run of one method on `model`.

    `args`: a `TrainingArguments` or `RunConfig`. `train_dataset`, `eval_dataset`: what `load_dataset` gives, a path, or a sequence of records; by default
    the files named in `args`. `processor`: by default that of the model's folder. A plain model gets the adapters or the freezing that `args` say;
    a `PeftModel` is trained as it is. Raises ValueError for settings and data that cannot be used, before the first step.
    """

    stages: tuple[str, ...] = ()  # of the settings that the method serves
    signals: tuple[str, ...] = ()  # of the rows that it learns from

    def __init__(
        self,
        model: ErnieModel | None = None,
        args: RunConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processor: Processor | None = None,
    ) -> None:
        self.args = RunConfig() if args is None else args
        if self.args.model.stage not in self.stages:
            raise ValueError(
                f"stage ({self.args.model.stage}) must be one of {self.stages} with {type(self).__name__}; set it, or take another trainer"
            )
        assemble.refuse(self.args)
        assemble.check_layout(self.args, model)
        self.place = Place(self.args.parallel, self.args.train.gradient_accumulation_steps)
        plain, self._source = assemble.model_for(self.args, self.place) if model is None else (model, None)
        name = plain.name_or_path or self.args.model.model_name_or_path
        if not name and processor is None:
            raise ValueError(
                "processor (None) must be given for a model that was not loaded from a folder; pass Processor.bundled() or the folder's"
            )
        self.processor = processor or assemble.load_processor(self.args, name)
        self.encoder = self._encoder()
        self._open_data(train_dataset, eval_dataset)
        self.model = plain
        if not isinstance(plain, PeftModel):
            samples = self._calibration()
            self.model = assemble.apply_method(
                self.args, plain, samples, self._source, assemble.measured(self.args, self.place, samples, self._source)
            )
        self._placed: Placed | None = None
        if not self.place.several:  # nothing is to be cut first
            self._placed = self.place.put(self.model, self._source)
        # What ernie_tune_args.yaml and the model card say: the settings, corrected where a model came as an object.
        self.described = self.args if model is None else assemble.as_trained(self.args, self.model, name)
        self.base_model = self.described.model.model_name_or_path or "fresh weights"
        self.output_dir = Path(self.args.save.output_dir)
        self.folder = RunFolder(self.args, self.place, self._what_defines_it, lambda: self.total_steps()[0])
        self.loop: Loop | None = None

    # --- assembling --------------------------------------------------------------------------------------------------

    def _encoder(self) -> RecordEncoder:
        """What makes samples and micro-batches of the rows."""
        return assemble.encoder_of(self.args, self.processor)

    def _open_data(self, train: Any, evaluation: Any) -> None:
        c = self.args
        sets = assemble.train_sets(c, self.signals) if train is None else [self._rows(train)]
        held: Sequence[Record] = assemble.eval_set(c, self.signals) if evaluation is None else self._rows(evaluation)
        self._given = {"train_dataset_path": list(sets), "eval_dataset_path": [held]}
        if not sets:
            raise ValueError(
                "train_dataset (None) must be given, or train_dataset_path set in args; name the training rows"
            )
        if not len(held) and c.data.val_size > 0:
            sets, held = assemble.hold_out(sets, c.data.val_size, c.train.seed)
        if not len(held) and c.eval.eval_strategy != "no":
            raise ValueError(
                f"eval_dataset (0 rows) must have rows with eval_strategy ({c.eval.eval_strategy}); give eval_dataset or val_size"
            )
        self.train_rows = sum(len(rows) for rows in sets)
        self.eval_rows = held
        sets = self._with_more(sets)
        self._stream_again = lambda: assemble.stream_of(c, sets, self.encoder, *self.place.batch)
        self.stream = self._stream_again()

    def _what_defines_it(self) -> Ledger:
        t = self.args.train
        batch = t.per_device_train_batch_size * t.gradient_accumulation_steps * self.place.batch[1]
        return ledger_of(self.described, self.described.model.model_name_or_path, self._given, batch)

    def _calibration(self) -> list[Any]:
        if self.args.lora.lora_expert_affinity <= 0 or self.args.model.fine_tuning != "LoRA":
            return []
        mixture, dropped = self.stream.shard.mixture, Dropped()
        rows = (self.encoder(mixture[i], dropped) for i in range(min(assemble.CALIBRATION_ROWS, len(mixture))))
        return [sample for sample in rows if sample is not None]

    def _with_more(self, sets: list[Sequence[Record]]) -> list[Sequence[Record]]:
        """The training rows, each set with those that a method makes of them."""
        return sets

    def total_steps(self) -> tuple[int, float]:
        """(optimizer steps of the run, steps of one pass over the data)."""
        t = self.args.train
        per_epoch = steps_per_epoch(self._stream_again)
        by_epochs = max(1, math.ceil(round(t.num_train_epochs * per_epoch, 6)))
        self._epochs = t.max_steps / max(per_epoch, 1e-9) if t.max_steps > 0 else t.num_train_epochs
        return t.max_steps if t.max_steps > 0 else by_epochs, per_epoch

    _epochs = 0.0  # passes over the data that the run will make

    def _build_loop(self) -> Loop:
        c = self.args
        o, t = c.optim, c.train
        total, per_epoch = self.total_steps()
        schedule = Schedule(o.learning_rate, total, assemble.warmup_steps(o, total), o.lr_scheduler_type, o.min_lr)
        ratios, model = LrRatios(o.moe_gate_lr_ratio, o.vit_lr_ratio), self.model

        def rate(name: str) -> float:
            return ratios.of(name) * (model.learning_rate_scale(name) if isinstance(model, PeftModel) else 1.0)

        named = list(model.named_parameters())
        betas = {"beta1": o.adam_beta1, "beta2": o.adam_beta2, "epsilon": o.adam_epsilon}
        if self.place.several:
            optimizer = self.placed.optimizer(adamw_maker(named, rate, weight_decay=o.weight_decay, **betas))
        else:
            optimizer = build_adamw(named, rate, weight_decay=o.weight_decay, **betas)
        weights = RouterLossWeights(t.router_aux_loss_coef, t.moe_orthogonal_loss_lambda, t.router_z_loss_coef)
        settings = LoopSettings(
            max_grad_norm=o.max_grad_norm,
            router=weights if weights != RouterLossWeights() else None,
            recompute=assemble.recompute() if c.compute.recompute else None,
            seed=t.seed,
        )
        return Loop(model, self.objective(total, per_epoch), optimizer, schedule, settings, self.placed.engine)

    def objective(self, total_steps: int, steps_per_pass: float) -> Objective:
        """The method's loss, new for a run of so many steps."""
        raise TypeError(f"{type(self).__name__} must define objective(); use the trainer of a method")

    def _rows(self, data: Any) -> Sequence[Record]:
        return load_dataset(data, signals=self.signals) if isinstance(data, str | Path) else data

    # --- the run -----------------------------------------------------------------------------------------------------

    def train(self, dry_run: bool = False) -> dict[str, float]:
        """Run to the end, or go on where an earlier run in `output_dir` stopped; returns the final metrics. `dry_run`: stop after the heaviest batch.

        Ctrl-C finishes the step, saves, and raises KeyboardInterrupt. A loss that is no number raises FloatingPointError; the weights and checkpoints
        are then those before it. A disk that is full raises OSError. Of several processes all end together.
        """
        with self.place.watched(), self.folder.held(dry_run):
            return self._train(dry_run)

    def _train(self, dry_run: bool) -> dict[str, float]:
        found = self.folder.look(dry_run)
        for level, line in found.lines if self.place.is_writer else ():
            print(stamp(line, level), flush=True)
        if found.finished:
            return self.folder.metrics()
        self._put(training=True)
        checkpoint = self._starting_point()
        self.loop = loop = self._build_loop()
        total = loop.schedule.total_steps
        guards, self._interval = RunGuards(self.args), Interval()
        self._guards = guards
        self._before_training(dry_run)
        if dry_run:
            self._dry_run(total)
            return {}
        if self.place.is_writer:
            remove_unfinished(self.output_dir)
        if checkpoint:
            self._resume(checkpoint)
        with Progress(
            total,
            title=self.args.model.stage,
            start_step=loop.step,
            every=0,
            mode="" if self.place.is_writer and not self.args.log.disable_tqdm else "plain",
        ) as progress:
            history = checkpoint.read_json("trainer_state.json")["log_history"] if checkpoint else ()
            c = self.args.log
            names = c.report_to if self.place.is_writer else ()
            writers = open_writers(names, Path(c.logging_dir or self.output_dir / "runs"), self.described.flat())
            log = self.log = RunLog(
                self.output_dir,
                self.place.is_writer,
                resume_step=loop.step if checkpoint else None,
                history=history,
                echo=progress.write,
                writers=writers,
            )
            self._announce(log.info, total)
            if checkpoint:
                self._announce_resume(log, checkpoint, total)
            self._provoke_memory(log.info)
            measure = self.measure = self._measure()
            self._after_start(log, resumed=checkpoint is not None)
            self.place.mark("measuring before training")
            measure.before(log, resumed=checkpoint is not None)
            guards.start(measure, log, resumed=checkpoint is not None)
            with deferred_interrupt() as interrupted:
                for record in loop.steps(map(self._ready, self.stream)) if not guards.early.exhausted else ():
                    self.place.mark(f"step {record.step}")
                    self.folder.stepped(self.described)
                    self._observe(record, log, progress)
                    if self._stop_now(record, log, guards, interrupted):
                        break
        metrics = self._finish(log) if not self.folder.untouched else self.folder.metrics()
        log.close()
        return metrics

    def _before_training(self, dry_run: bool) -> None:
        """What a method does with the model as it was given, before anything changes it; without a trace on the disk in a dry run."""

    def _after_start(self, log: RunLog, resumed: bool) -> None:
        """What a method has to say once the log is open."""

    def _after_step(self, record: StepRecord) -> list[Verdict]:
        """What a method does after each step, before it is measured and saved."""
        return []

    def _ready(self, window: Sequence[Any]) -> Sequence[Any]:
        """The window with what the method needs beside the rows, such as a reference's answers."""
        return window

    def _starting_point(self) -> Checkpoint | None:
        """The checkpoint to go on from, if any. With resume_only_model the weights of the one that the settings name are taken at once, and None returned."""
        found, s = self.folder.checkpoint, self.args.save
        if found is None and s.resume_only_model:
            start = find_checkpoint(self.output_dir, s.resume_from_checkpoint)
            assert start is not None
            self._take_weights(start)
            print(f"ernie_tune: weights of {start.path}; optimizer, data and step count start anew", file=sys.stderr)
        return found

    def _dry_run(self, total: int) -> None:
        """Everything up to the first step, without a trace on the disk."""

        def say(line: str) -> None:
            if self.place.is_writer:
                print(stamp(line), flush=True)

        self._announce(say, total)
        self._provoke_memory(say)
        say("dry run: settings, data and memory are fine; nothing was trained or written")

    def _observe(self, record: StepRecord, log: RunLog, progress: Progress) -> None:
        metrics = {name: value for name, value in record.metrics.items() if name != "nll"}
        self._interval.add(record.loss, metrics, record.num_tokens, record.seconds)
        progress.update(record.step, loss=record.loss, tokens_per_second=record.num_tokens / record.seconds)
        if record.step % self.args.log.logging_steps == 0 or record.step == self.loop_total:
            means = self._interval.take()
            values = {
                "loss": means.pop("loss"),
                "learning_rate": record.learning_rate,
                "grad_norm": record.grad_norm,
                **means,
                "max_memory_gib": round(resident_gib(peak=True), 3),
                "remaining_time": round(progress.remaining_seconds, 1),
            }
            log.log(record.step, values, self.stream.epoch, silent=progress.is_bar)

    @property
    def loop_total(self) -> int:
        """Steps of the whole run."""
        return self._loop().schedule.total_steps

    def _loop(self) -> Loop:
        if self.loop is None:
            raise AssertionError("train() builds the loop")
        return self.loop

    def _stop_now(self, record: StepRecord, log: RunLog, guards: RunGuards, interrupted: list[int]) -> bool:
        """Evaluate and save when it is time; whether the run ends here. Order: measure, judge, save, so that a checkpoint knows its verdicts."""
        e, s, step, last = self.args.eval, self.args.save, record.step, record.step == self.loop_total
        asked_to_end = self.placed.engine.stopped(bool(interrupted))
        epoch_ends = int(self.stream.epoch) > int(self._epoch_seen)
        self._epoch_seen = self.stream.epoch
        verdicts = guards.after_step(record) + self._after_step(record)
        if guards.broken:
            raise FloatingPointError(
                f"{verdicts[0].message}; the last good checkpoint is kept, run the same command with another setting to go on from it"
            )
        is_best = False
        if (last and e.eval_strategy != "no") or _due(e.eval_strategy, e.eval_steps, step, epoch_ends):
            metrics = self.measure.during(log, step, self.stream.epoch)
            is_best, more = guards.after_evaluation(step, metrics, self.measure, log)
            verdicts += more
        for verdict in verdicts:
            log.info(verdict.message, "WARNING")
        stop = last or any(v.stop for v in verdicts) or asked_to_end
        wanted = s.save_strategy != "no" and (stop or is_best)
        if wanted or asked_to_end or _due(s.save_strategy, s.save_steps, step, epoch_ends):
            if is_best:
                guards.best_checkpoint = f"checkpoint-{step}"
            self._save(step, log)
            self._rotate()
        if asked_to_end:
            self._settle(log)
            how = "the same command" if s.resume_from_checkpoint == "auto" else "resume_from_checkpoint: auto"
            raise Interrupted(f"interrupted at step {step}; checkpoint-{step} is saved, {how} goes on from it")
        return stop

    _epoch_seen: float = 0.0

    # --- states ------------------------------------------------------------------------------------------------------

    def _take_weights(self, checkpoint: Checkpoint) -> None:
        """The weights of a checkpoint, without what resuming needs; those of adapters bit for bit where the checkpoint has them so."""
        with self.placed.whole():
            if (checkpoint.path / OPTIMIZER).is_dir() and (isinstance(self.model, PeftModel) or self.place.several):
                named = self.placed.trained()
                load_values(checkpoint, named, cut=self.placed.shards(named), ranks=self.place)
            else:
                self.placed.take(checkpoint.path)

    def _state_fields(self) -> dict[str, Any]:
        """What trainer_state.json says beside the history."""
        c, guards, loop = self.args, self._guards, self._loop()
        return {
            "max_steps": self.loop_total,
            "num_train_epochs": c.train.num_train_epochs,
            "logging_steps": c.log.logging_steps,
            "eval_steps": c.eval.eval_steps or None,
            "save_steps": c.save.save_steps,
            "train_batch_size": c.train.per_device_train_batch_size,
            "consumed_samples": loop.rows,
            "num_input_tokens_seen": loop.tokens,
            "best_metric": guards.early.best,
            "best_global_step": guards.early.best_step or None,
            "best_model_checkpoint": guards.best_checkpoint or None,
        }

    def _more_states(self) -> dict[str, Any]:
        """What a method keeps for its resuming, by file name."""
        return {}

    def _save(self, step: int, log: RunLog) -> None:
        loop = self._loop()
        states = {
            "trainer_state.json": log.state(step, self.stream.epoch, **self._state_fields()),
            STATES["loop"]: {**loop.state_dict(), "interval": self._interval.state_dict()},
            STATES["objective"]: loop.objective.state_dict(),
            **{f"{rank}_{STATES['data']}" if rank else STATES["data"]: state for rank, state in self._data_states()},
            STATES["guards"]: self._guards.state_dict(),
            "scheduler.json": dataclasses.asdict(loop.schedule),
            **self._more_states(),
        }
        optimizer = None if self.args.save.save_only_model else loop.optimizer
        self._settle(log)
        self.place.mark(f"saving checkpoint-{step}")
        with self.placed.whole():
            named = self.placed.trained()
            content = (self.output_dir, step, self._save_checkpoint_files, optimizer, named, states)
            texts, cut = self.folder.texts(self.described), self.placed.shards(named)
            if self.args.save.async_save and optimizer is not None:
                self._pending = save_in_background(*content, texts, cut=cut, ranks=self.place)
                return
            save_checkpoint(*content, texts, cut=cut, ranks=self.place)
        log.info(f"saved checkpoint-{step}")

    _pending: Pending | None = None

    def _settle(self, log: RunLog) -> None:
        """Wait for the checkpoint that is being written. Raises OSError where it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.place.mark("waiting for a checkpoint")
            log.info(f"saved checkpoint-{pending.wait().step}")
            self._rotate()

    def _rotate(self) -> None:
        if self.place.is_writer:
            rotate(self.output_dir, self.args.save.save_total_limit, self.output_dir / self._guards.best_checkpoint)

    def _save_weights(self, folder: Path) -> None:
        """Model or adapter, and what else of the result is weights. All processes call it, one writes."""
        self.placed.save(folder)

    def _data_states(self) -> list[tuple[int, dict[str, Any]]]:
        """(rank among those that read different rows, where its stream stands)."""
        return sorted(dict(self.place.gather((self.place.batch[0], self.stream.state_dict()))).items())

    def _save_checkpoint_files(self, folder: Path) -> None:
        """What opens like a model, and what only resuming needs beside the optimizer's state."""
        self._save_weights(folder)
        if self.place.is_writer:
            self.processor.save_pretrained(folder)

    def _resume(self, checkpoint: Checkpoint) -> None:
        loop = self._loop()
        with self.placed.whole():
            named = self.placed.trained()
            load_optimizer(checkpoint, loop.optimizer, named, cut=self.placed.shards(named), ranks=self.place)
        done = checkpoint.read_json(STATES["loop"])
        loop.load_state_dict(done)
        if "interval" in done:
            self._interval.load_state_dict(done["interval"])
        loop.objective.load_state_dict(checkpoint.read_json(STATES["objective"]))
        self._guards.load_state_dict(checkpoint.read_json(STATES["guards"]))
        if not self.args.save.ignore_data_skip:
            self.stream.load_state_dict(self._data_state(checkpoint))
        self._epoch_seen = self.stream.epoch

    def _data_state(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Where this rank's stream stood; of a run with another number of data ranks, this rank's share of what all of them had still to read."""
        rank, size = self.place.batch
        more = range(1, len(list(checkpoint.path.glob(f"*_{STATES['data']}"))) + 1)
        files = [STATES["data"], *(f"{other}_{STATES['data']}" for other in more)]
        if len(files) == size:
            return checkpoint.read_json(files[rank])
        return dealt_again([checkpoint.read_json(file) for file in files], rank, size)

    # --- start and end -----------------------------------------------------------------------------------------------

    @property
    def placed(self) -> Placed:
        """The model on the mesh."""
        if self._placed is None:
            raise AssertionError("_put comes first")
        return self._placed

    def _put(self, training: bool = False) -> None:
        """Put the model on the mesh, once it has all its layers; what is trained is counted before."""
        if not self._table:
            self._table = trainable_table(self.model).splitlines()
            self._trainable = sum(int(p.size) for p in self.model.parameters() if not p.stop_gradient)
        if self._placed is None:
            self._placed = self.place.put(self.model, self._source, optimizer_next=training)

    _table: tuple[str, ...] | list[str] = ()
    _trainable = 0

    def _announce(self, say: Callable[[str], None], total: int) -> None:
        """What is trained, and the header that users grep for."""
        t = self.args.train
        batch = t.per_device_train_batch_size * t.gradient_accumulation_steps * self.place.batch[1]
        facts = RunFacts(
            self.train_rows,
            round(self._epochs, 2),
            t.per_device_train_batch_size,
            batch,
            t.gradient_accumulation_steps,
            total,
            total * batch,
            self._trainable,
        )
        lines = [f"layout: {self.placed.describe()}"] if self.place.several else []
        for line in [*lines, *self._table, *header_lines(facts)]:
            say(line)

    def _announce_resume(self, log: RunLog, checkpoint: Checkpoint, total: int) -> None:
        log.info(
            f"resuming from {checkpoint.path}: step {checkpoint.step} of {total}, {self.stream.epoch:.2f} passes over the data done"
        )
        for path in set_aside_later(self.output_dir, checkpoint.step) if self.place.is_writer else ():
            log.info(f"a later checkpoint of this folder is kept as {path.name}, the run leaves its course", "WARNING")
        if self._guards.early.exhausted:
            log.info("the run had stopped early: nothing is left to train; raise early_stopping_patience to go on")

    def _provoke_memory(self, say: Callable[[str], None]) -> None:
        """Forward and backward of the heaviest batch before the first step: if memory is short, it is short now."""
        loop = self._loop()
        samples = assemble.longest(self.stream)
        if not samples:
            return
        batch = self.encoder.collate(samples)
        window = self._ready([batch])
        self.model.train()
        loop.accumulate(window)
        loop.clear_gradients()
        say(
            f"heaviest batch first: {batch.num_rows} rows, {batch.inputs.num_tokens} tokens, {resident_gib(peak=True):.2f} GiB at most"
        )

    def _finish(self, log: RunLog) -> dict[str, float]:
        self._settle(log)
        for line in self.stream.dropped.lines():
            log.info(line, "WARNING")
        if self.args.eval.load_best_model_at_end and self._guards.best_checkpoint:
            best = find_checkpoint(self.output_dir, str(self.output_dir / self._guards.best_checkpoint))
            if best is not None:
                self._take_weights(best)
                log.info(f"finishing with {best.path}, the best by {self._guards.early.metric}")
        self.place.mark("saving and measuring the result")
        with self.folder.result():
            self.save_model(self.output_dir)
        metrics = self.measure.after(log, self._summary(log), self.stream.epoch)
        if not self.place.is_writer:
            return metrics
        log.write_state(self._loop().step, self.stream.epoch, **self._state_fields())
        write_loss_svg(log.history, self.output_dir / "training_loss.svg")
        if self.args.log.plot_loss:
            write_loss_png(log.history, self.output_dir / "training_loss.png")
        write_reports(self, log)
        step, total = self._loop().step, self.loop_total
        self.folder.finish(self.described, step, total, over=step >= total or self._guards.early.exhausted)
        return metrics

    def _summary(self, log: RunLog) -> dict[str, float]:
        """What train_results.json says. Times are those of the training steps, of all processes that made them, without measuring and saving."""
        loop = self._loop()
        speed = 1 / loop.seconds if loop.seconds else 0.0
        return {
            "train_loss": self._interval.run_loss,
            "global_step": loop.step,
            "train_runtime": loop.seconds,
            "train_samples_per_second": loop.rows * speed,
            "train_steps_per_second": loop.step * speed,
        }

    def save_model(self, folder: str | Path) -> None:
        """Model or adapter, processor files and arguments: what chat, eval and export need."""
        self._put()
        self._save_weights(Path(folder))
        if self.place.is_writer:
            self.processor.save_pretrained(folder)

    def evaluate(self, answers: str | Path | None = None) -> dict[str, float]:
        """Loss on the evaluation rows and scores of generated answers, without training. `answers`: the file that takes them, one JSON object a line."""
        if not len(self.eval_rows):
            raise ValueError("eval_dataset (0 rows) must have rows to evaluate; set eval_dataset_path or val_size")
        with self.place.watched():
            self._put()
            measure = self._measure()
            metrics, asked, given = measure.all_rows()
            if answers is not None and self.place.is_writer:
                measure.write_answers(Path(answers), asked, given)
            return metrics

    def _measure(self) -> Measure:
        """What measures the model on held-out rows and guard sets."""
        measure = Measure(
            self.args,
            self.placed.forward,
            self.processor,
            assemble.encoder_of(self.args, self.processor),
            self.eval_rows,
            self.output_dir,
        )
        measure.is_main = self.place.is_writer
        return measure


def _due(strategy: str, every: int, step: int, epoch_ends: bool) -> bool:
    return (strategy == "steps" and every > 0 and step % every == 0) or (strategy == "epoch" and epoch_ends)

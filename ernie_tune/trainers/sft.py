"""`SFTTrainer`: supervised fine-tuning from data to model card. Assembles model, data, objective and loop; every decision of the loop is a visible `if`.

Refuses to know: how anything is computed (models, objectives), stored (checkpoint) or drawn (train/report, train/plot).
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.loader import ARGS_FILE, dump_config
from ernie_tune.data.batching import Dropped, collate, steps_per_epoch
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.sources import load_dataset
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.report import trainable_table
from ernie_tune.train.guards import DivergenceGuard, EarlyStopping, LearningWatch
from ernie_tune.train.log import RunFacts, RunLog
from ernie_tune.train.loop import Loop, LoopSettings, StepRecord
from ernie_tune.train.objective import SFTObjective, TaskBalance
from ernie_tune.train.optim import LrRatios, Schedule, build_adamw
from ernie_tune.train.plot import write_loss_png, write_loss_svg
from ernie_tune.train.progress import Progress, resident_gib
from ernie_tune.train.state import Checkpoint, find_checkpoint, load_optimizer, rotate, save_checkpoint
from ernie_tune.trainers import assemble
from ernie_tune.trainers.measure import Measure, write_reports

SIGNALS = ("sft",)
STATES = {"objective": "objective_state.json", "data": "data_state.json", "guards": "guards_state.json"}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the step in progress was finished and saved."""


class SFTTrainer:
    """Fine-tune `model` on dialogues.

    `args`: a `TrainingArguments` or `RunConfig`. `train_dataset`, `eval_dataset`: what `load_dataset` gives, a path, or a sequence of records; by default
    the files named in `args`. `processor`: by default that of the model's folder. A plain model gets the adapters or the freezing that `args` say;
    a `PeftModel` is trained as it is. Raises ValueError for settings and data that cannot be used, before the first step.
    """

    def __init__(
        self,
        model: ErnieModel | None = None,
        args: RunConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processor: Processor | None = None,
    ) -> None:
        self.args = RunConfig() if args is None else args
        assemble.refuse_unbuilt(self.args)
        plain = assemble.load_model(self.args) if model is None else model
        source = plain.base if isinstance(plain, PeftModel) else plain
        name = self.args.model.model_name_or_path or source.name_or_path
        if not name and processor is None:
            raise ValueError(
                "processor (None) must be given for a model that was not loaded from a folder; pass Processor.bundled() or the folder's"
            )
        self.base_model = name or "fresh weights"
        self.processor = processor or assemble.load_processor(self.args, name)
        self.encoder = assemble.encoder_of(self.args, self.processor)
        self._open_data(train_dataset, eval_dataset)
        self.model = (
            plain if isinstance(plain, PeftModel) else assemble.apply_method(self.args, plain, self._calibration())
        )
        self.output_dir = Path(self.args.save.output_dir)
        self.loop: Loop | None = None

    # --- assembling --------------------------------------------------------------------------------------------------

    def _open_data(self, train: Any, evaluation: Any) -> None:
        c = self.args
        sets = assemble.train_sets(c, SIGNALS) if train is None else [_rows(train)]
        held: Sequence[Record] = assemble.eval_set(c, SIGNALS) if evaluation is None else _rows(evaluation)
        if not sets:
            raise ValueError(
                "train_dataset (None) must be given, or train_dataset_path set in args; name the training rows"
            )
        if not len(held) and c.data.val_size > 0:
            sets, held = assemble.hold_out(sets, c.data.val_size, c.train.seed)
        self.train_rows = sum(len(rows) for rows in sets)
        self.eval_rows = held
        self.stream = assemble.stream_of(c, sets, self.encoder)
        self._stream_again = lambda: assemble.stream_of(c, sets, self.encoder)

    def _calibration(self) -> list[Any]:
        if self.args.lora.lora_expert_affinity <= 0 or self.args.model.fine_tuning != "LoRA":
            return []
        mixture, dropped = self.stream.shard.mixture, Dropped()
        rows = (self.encoder(mixture[i], dropped) for i in range(min(assemble.CALIBRATION_ROWS, len(mixture))))
        return [sample for sample in rows if sample is not None]

    def total_steps(self) -> tuple[int, float]:
        """(optimizer steps of the run, steps of one pass over the data)."""
        t = self.args.train
        per_epoch = steps_per_epoch(self._stream_again)
        return (t.max_steps if t.max_steps > 0 else max(1, -int(-t.num_train_epochs * per_epoch // 1))), per_epoch

    def _build_loop(self) -> Loop:
        c = self.args
        o, t = c.optim, c.train
        total, per_epoch = self.total_steps()
        warmup = o.warmup_steps or round(o.warmup_ratio * total)
        schedule = Schedule(o.learning_rate, total, warmup, o.lr_scheduler_type, o.min_lr)
        ratios, model = LrRatios(o.moe_gate_lr_ratio, o.vit_lr_ratio), self.model

        def rate(name: str) -> float:
            return ratios.of(name) * (model.learning_rate_scale(name) if isinstance(model, PeftModel) else 1.0)

        optimizer = build_adamw(
            list(model.named_parameters()),
            rate,
            weight_decay=o.weight_decay,
            beta1=o.adam_beta1,
            beta2=o.adam_beta2,
            epsilon=o.adam_epsilon,
        )
        weights = RouterLossWeights(t.router_aux_loss_coef, t.moe_orthogonal_loss_lambda, t.router_z_loss_coef)
        settings = LoopSettings(
            max_grad_norm=o.max_grad_norm,
            router=weights if weights != RouterLossWeights() else None,
            recompute=_recompute() if c.compute.recompute else None,
            seed=t.seed,
        )
        balance = TaskBalance(t.balance, period_steps=max(1, round(per_epoch)))
        return Loop(model, SFTObjective(t.loss_norm, balance), optimizer, schedule, settings)

    # --- the run -----------------------------------------------------------------------------------------------------

    def train(self, dry_run: bool = False) -> dict[str, float]:
        """Run to the end, or go on where an earlier run in `output_dir` stopped; returns the final metrics. `dry_run`: stop after the heaviest batch.

        Ctrl-C finishes the step, saves, and raises KeyboardInterrupt.
        """
        checkpoint = find_checkpoint(self.output_dir, self.args.save.resume_from_checkpoint)
        if self.args.save.resume_from_checkpoint == "no" and find_checkpoint(self.output_dir, "auto") is not None:
            raise ValueError(
                f"output_dir ({self.output_dir}) holds checkpoints and must be empty with resume_from_checkpoint: no; choose another folder"
            )
        self.loop = loop = self._build_loop()
        total = loop.schedule.total_steps
        guards = self._guards = _Guards(self.args)
        start = self._resume(checkpoint) if checkpoint else 0
        with Progress(
            total,
            title=self.args.model.stage,
            start_step=start,
            every=0,
            mode="plain" if self.args.log.disable_tqdm else "",
        ) as progress:
            history = checkpoint.read_json("trainer_state.json")["log_history"] if checkpoint else ()
            log = self.log = RunLog(
                self.output_dir, resume_step=start if checkpoint else None, history=history, echo=progress.write
            )
            self._announce(log, total, checkpoint)
            self._provoke_memory(log)
            if dry_run:
                return {}
            self._write_arguments()
            measure = self.measure = Measure(
                self.args, self.model, self.processor, self.encoder, self.eval_rows, self.output_dir
            )
            measure.before(log, resumed=checkpoint is not None)
            guards.start(measure, self.output_dir)
            with _deferred_interrupt() as interrupted:
                for record in loop.steps(self.stream):
                    self._observe(record, log, progress)
                    if self._stop_now(record, log, guards, interrupted):
                        break
        return self._finish(log)

    def _observe(self, record: StepRecord, log: RunLog, progress: Progress) -> None:
        values = {"loss": record.loss, "learning_rate": record.learning_rate, "grad_norm": record.grad_norm}
        speed = record.num_tokens / record.seconds
        progress.update(record.step, loss=record.loss, tokens_per_second=speed)
        if record.step % self.args.log.logging_steps == 0 or record.step == self.loop_total:
            log.log(
                record.step,
                {
                    **values,
                    **{name: value for name, value in record.metrics.items() if name != "nll"},
                    "tokens_per_second": round(speed, 1),
                    "interval_runtime": round(record.seconds, 4),
                    "max_memory_gib": round(resident_gib(peak=True), 3),
                    "remaining_time": round(progress.remaining_seconds, 1),
                },
                self.stream.epoch,
            )

    @property
    def loop_total(self) -> int:
        """Steps of the whole run."""
        return self._loop().schedule.total_steps

    def _loop(self) -> Loop:
        if self.loop is None:
            raise AssertionError("train() builds the loop")
        return self.loop

    def _stop_now(self, record: StepRecord, log: RunLog, guards: _Guards, interrupted: list[int]) -> bool:
        """Evaluate and save when it is time; whether the run ends here. Order: measure, judge, save, so that a checkpoint knows its verdicts."""
        c, last = self.args, record.step == self.loop_total
        epoch_ends = int(self.stream.epoch) > int(self._epoch_seen)
        self._epoch_seen = self.stream.epoch
        verdicts = guards.after_step(record)
        is_best = False
        if (
            c.eval.eval_strategy != "no"
            and len(self.eval_rows)
            and (last or _due(c.eval.eval_strategy, c.eval.eval_steps, record.step, epoch_ends))
        ):
            metrics = self.measure.during(log, record.step, self.stream.epoch)
            is_best, more = guards.after_evaluation(record.step, metrics, self.measure)
            verdicts += more
        for verdict in verdicts:
            log.info(verdict.message, "WARNING")
        stop = last or any(v.stop for v in verdicts) or bool(interrupted)
        broken = guards.broken
        if not broken and (stop or is_best or _due(c.save.save_strategy, c.save.save_steps, record.step, epoch_ends)):
            self._save(record.step, log)
            if is_best:
                guards.best_checkpoint = f"checkpoint-{record.step}"
            rotate(
                self.output_dir,
                c.save.save_total_limit,
                keep=self.output_dir / guards.best_checkpoint if guards.best_checkpoint else None,
            )
        if interrupted:
            raise Interrupted(
                f"interrupted at step {record.step}; checkpoint-{record.step} is saved, the same command goes on from it"
            )
        if broken:
            raise FloatingPointError(
                f"{verdicts[-1].message}; the last good checkpoint is kept, lower learning_rate and run the same command"
            )
        return stop

    _epoch_seen: float = 0.0

    # --- states ------------------------------------------------------------------------------------------------------

    def _trained(self) -> dict[str, Any]:
        return {name: p for name, p in self.model.named_parameters() if not p.stop_gradient}

    def _save(self, step: int, log: RunLog) -> None:
        loop, best = self._loop(), self._guards.early
        state = log.state(
            step,
            self.stream.epoch,
            max_steps=self.loop_total,
            best_metric=best.best,
            best_model_checkpoint=self._guards.best_checkpoint or None,
        )
        states = {
            "trainer_state.json": state,
            STATES["objective"]: loop.objective.state_dict(),
            STATES["data"]: self.stream.state_dict(),
            STATES["guards"]: self._guards.state_dict(),
            "scheduler.json": dataclasses.asdict(loop.schedule),
        }
        optimizer = None if self.args.save.save_only_model else loop.optimizer
        save_checkpoint(
            self.output_dir,
            step,
            self.model.save_pretrained,
            optimizer,
            self._trained(),
            states,
            {ARGS_FILE: dump_config(self.args)},
        )
        log.info(f"saved checkpoint-{step}")

    def _resume(self, checkpoint: Checkpoint) -> int:
        s, loop = self.args.save, self._loop()
        load_optimizer(checkpoint, loop.optimizer, self._trained())
        if s.resume_only_model:
            print(
                f"ernie_tune: weights of {checkpoint.path}; optimizer, data and step count start anew", file=sys.stderr
            )
            self.loop = self._build_loop()
            return 0
        loop.objective.load_state_dict(checkpoint.read_json(STATES["objective"]))
        self._guards.load_state_dict(checkpoint.read_json(STATES["guards"]))
        if not s.ignore_data_skip:
            self.stream.load_state_dict(checkpoint.read_json(STATES["data"]))
        self._epoch_seen = self.stream.epoch
        loop.step = checkpoint.step
        return checkpoint.step

    def _write_arguments(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        (self.output_dir / ARGS_FILE).write_text(dump_config(self.args), encoding="utf-8")

    # --- start and end -----------------------------------------------------------------------------------------------

    def _announce(self, log: RunLog, total: int, checkpoint: Checkpoint | None) -> None:
        t = self.args.train
        trainable = sum(int(p.size) for p in self._trained().values())
        for line in trainable_table(self.model).splitlines():
            log.info(line)
        batch = t.per_device_train_batch_size * t.gradient_accumulation_steps
        log.header(
            RunFacts(
                self.train_rows,
                t.num_train_epochs,
                t.per_device_train_batch_size,
                batch,
                t.gradient_accumulation_steps,
                total,
                total * batch,
                trainable,
            )
        )
        if checkpoint:
            log.info(
                f"resuming from {checkpoint.path}: step {checkpoint.step} of {total}, {self.stream.epoch:.2f} passes over the data done"
            )

    def _provoke_memory(self, log: RunLog) -> None:
        """Forward and backward of the heaviest batch before the first step: if memory is short, it is short now."""
        loop = self._loop()
        samples = assemble.longest(self.stream)
        if not samples:
            return
        batch = collate(samples, self.processor.tokens)
        before = loop.objective.state_dict()
        loop.accumulate([batch])
        loop.clear_gradients()
        loop.objective.load_state_dict(before)
        log.info(
            f"heaviest batch first: {batch.num_rows} rows, {batch.inputs.num_tokens} tokens, {resident_gib(peak=True):.2f} GiB at most"
        )

    def _finish(self, log: RunLog) -> dict[str, float]:
        for line in self.stream.dropped.lines():
            log.info(line, "WARNING")
        if self.args.eval.load_best_model_at_end and self._guards.best_checkpoint:
            best = find_checkpoint(self.output_dir, str(self.output_dir / self._guards.best_checkpoint))
            if best is not None:
                load_optimizer(best, self._loop().optimizer, self._trained())
                log.info(f"finishing with {best.path}, the best by {self._guards.early.metric}")
        self.save_model(self.output_dir)
        metrics = self.measure.after(log, self._loop().step, self.stream.epoch)
        log.write_state(
            self._loop().step,
            self.stream.epoch,
            max_steps=self.loop_total,
            best_metric=self._guards.early.best,
            best_model_checkpoint=self._guards.best_checkpoint or None,
        )
        write_loss_svg(log.history, self.output_dir / "training_loss.svg")
        if self.args.log.plot_loss:
            write_loss_png(log.history, self.output_dir / "training_loss.png")
        write_reports(self, log)
        return metrics

    def save_model(self, folder: str | Path) -> None:
        """Model or adapter, processor files and arguments: what chat, eval and export need."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def evaluate(self) -> dict[str, float]:
        """Loss on the evaluation rows and scores of generated answers, without training."""
        if not len(self.eval_rows):
            raise ValueError("eval_dataset (0 rows) must have rows to evaluate; set eval_dataset_path or val_size")
        return Measure(self.args, self.model, self.processor, self.encoder, self.eval_rows, self.output_dir).all_rows()[
            0
        ]


PaddleTrainer = SFTTrainer  # the founding article's name


class _Guards:
    """Everything that may warn or stop, with one state."""

    def __init__(self, config: RunConfig) -> None:
        e = config.eval
        self.config = config
        self.early = EarlyStopping(e.early_stopping_patience, e.metric_for_best_model, e.greater_is_better)
        self.divergence, self.watch = DivergenceGuard(), LearningWatch()
        self.best_checkpoint = ""
        self.broken = False

    def start(self, measure: Measure, output_dir: Path) -> None:
        """Score the guard sets before training, once in the life of a run."""
        self.forgetting = measure.forgetting_guard(output_dir)

    def after_step(self, record: StepRecord) -> list[Any]:
        verdict = self.divergence.look(record.step, record.loss, record.grad_norm)
        self.broken = verdict is not None and verdict.stop
        more = self.watch.look(record.step, {"loss": record.loss, "grad_norm": record.grad_norm})
        return ([verdict] if verdict else []) + more

    def after_evaluation(self, step: int, metrics: Mapping[str, float], measure: Measure) -> tuple[bool, list[Any]]:
        best, verdict = self.early.look(step, metrics)
        return best, ([verdict] if verdict else []) + measure.look_at_guards(self.forgetting)

    def state_dict(self) -> dict[str, Any]:
        return {
            "early": self.early.state_dict(),
            "divergence": self.divergence.state_dict(),
            "watch": self.watch.state_dict(),
            "best_checkpoint": self.best_checkpoint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.early.load_state_dict(state["early"])
        self.divergence.load_state_dict(state["divergence"])
        self.watch.load_state_dict(state["watch"])
        self.best_checkpoint = state["best_checkpoint"]


def _due(strategy: str, every: int, step: int, epoch_ends: bool) -> bool:
    return (strategy == "steps" and every > 0 and step % every == 0) or (strategy == "epoch" and epoch_ends)


def _rows(data: Any) -> Sequence[Record]:
    return load_dataset(data, signals=SIGNALS) if isinstance(data, str | Path) else data


def _recompute() -> Any:
    from paddle.distributed.fleet.utils import recompute

    return recompute


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM are noted and handled between steps; a second one acts at once. Outside the main thread nothing changes."""
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)
        print("ernie_tune: finishing this step, then saving; once more to stop at once", file=sys.stderr)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield seen
        return
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

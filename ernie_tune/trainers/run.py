"""One run from its first step to the model card: the loop, and every decision of it as a visible
`if`.

What is trained and how is the method's; what must survive a restart lies with the keeper. Refuses
to know: which method it is, how a run is put together (base.py), how anything is computed (models,
objectives), stored (checkpoint) or drawn (report).
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.background import Pending, save_in_background
from ernie_tune.checkpoint.run_folder import RunFolder
from ernie_tune.checkpoint.state import (
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
from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.checks import unmeasured
from ernie_tune.config.language import counted, say
from ernie_tune.config.loader import dump_config
from ernie_tune.data.batching import BatchStream
from ernie_tune.data.processor import Processor
from ernie_tune.machine.placed import Placed
from ernie_tune.peft.model import PeftModel
from ernie_tune.report.interval import Interval
from ernie_tune.report.log import RunFacts, RunLog, header_lines, stamp
from ernie_tune.report.plot import write_loss_png, write_loss_svg
from ernie_tune.report.progress import Progress, resident_gib
from ernie_tune.report.writers import open_writers
from ernie_tune.train.guards import Verdict
from ernie_tune.train.loop import Loop, StepRecord
from ernie_tune.trainers import neighbours_state
from ernie_tune.trainers.interrupts import Interrupted, deferred_interrupt
from ernie_tune.trainers.keeper import JsonPart, Keeper, StreamPart
from ernie_tune.trainers.method import Method, RowSets, Window
from ernie_tune.trainers.observers import Observers, RunState
from ernie_tune.trainers.reports import write_reports
from ernie_tune.trainers.run_guards import RunGuards

SCHEDULE_FILE = "scheduler.json"


@dataclasses.dataclass
class Assembled:
    """All that a run is made of, once the model is on the mesh. `described`: the settings as the
    run really is; `base_model`: what the card calls its start; `table`, `trainable`: what is
    trained, counted while the model was whole; `passes`: over the data, of the whole run."""

    config: RunConfig
    described: RunConfig
    method: Method
    policy: Placed
    processor: Processor
    rows: RowSets
    stream: BatchStream
    folder: RunFolder
    base_model: str
    table: Sequence[str]
    trainable: int
    train_rows: int
    passes: float

    @property
    def output_dir(self) -> Path:
        return self.folder.path

    def save_weights(self, folder: Path) -> None:
        """Model or adapter, and what else of the result is weights. All processes call it, one
        writes."""
        self.policy.save(folder)
        Keeper(self.policy.place, self.method.weights(self.policy)).save(folder)

    def take_weights(self, checkpoint: Checkpoint) -> None:
        """The weights of a checkpoint, without what resuming needs; those of adapters bit for bit
        where the checkpoint has them so."""
        policy = self.policy
        with policy.whole():
            exact = isinstance(policy.model, PeftModel) or policy.place.several
            if (checkpoint.path / OPTIMIZER).is_dir() and exact:
                named = policy.moved()
                load_values(checkpoint, named, cut=policy.shards(named), ranks=policy.place)
            else:
                policy.take(checkpoint.path)
        Keeper(policy.place, self.method.weights(policy)).load(checkpoint)


class _Steps:
    """The loop's state and that of what is said of its steps, in one file."""

    def __init__(self, loop: Loop, interval: Interval) -> None:
        self.loop, self.interval = loop, interval

    def state_dict(self) -> dict[str, Any]:
        return {**self.loop.state_dict(), "interval": self.interval.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loop.load_state_dict(state)
        if "interval" in state:  # not in the first release's
            self.interval.load_state_dict(state["interval"])


class Run:
    """`Run(parts, loop).train(checkpoint)` -> the final metrics; `rehearse` goes as far as the
    first step and leaves no trace."""

    log: RunLog

    def __init__(self, parts: Assembled, loop: Loop, observers: Observers | None = None) -> None:
        self.parts, self.loop, self.config = parts, loop, parts.config
        self.method, self.policy, self.stream = parts.method, parts.policy, parts.stream
        self.place, self.folder, self.output_dir = parts.policy.place, parts.folder, parts.output_dir
        self.total_steps = loop.schedule.total_steps
        self.arguments = dump_config(parts.described)
        self.guards, self.interval = RunGuards(parts.config), Interval()
        self.measure = self.method.measure(self.policy, parts.rows, self.output_dir)
        self.measure.is_main = self.place.is_writer
        self.observers = observers or Observers()
        self._epoch_seen = 0.0
        self._pending: Pending | None = None

    def rehearse(self) -> None:
        """Everything up to the first step, without a trace on the disk."""

        def say(line: str, level: str = "INFO") -> None:
            if self.place.is_writer:
                print(stamp(line, level), flush=True)

        self._announce(say)
        self._provoke_memory(say)
        say("dry run: settings, data and memory are fine; nothing was trained or written")

    def train(self, checkpoint: Checkpoint | None) -> dict[str, float]:
        """Go on from `checkpoint`, or begin. Raises as `Trainer.train`."""
        if self.place.is_writer:
            remove_unfinished(self.output_dir)
        if checkpoint:
            self._resume(checkpoint)
        c, resumed = self.config, checkpoint is not None
        mode = "" if self.place.is_writer and not c.log.disable_tqdm else "plain"
        with Progress(self.total_steps, title=c.model.stage, start_step=self.loop.step, every=0, mode=mode) as progress:
            log = self.log = self._open_log(checkpoint, progress)
            log.heard = lambda step, record: self._tell("on_log", logs=record)
            self._announce(log.info)
            if checkpoint:
                self._announce_resume(checkpoint)
            self._provoke_memory(log.info, always=False)
            self.method.started(log, self.parts.rows, resumed)
            self.place.mark("measuring before training")
            self.measure.before(log, resumed)
            self.guards.start(self.measure, log, resumed)
            self._tell("on_train_begin")
            if not self.guards.early.exhausted:
                self._steps(progress)
        metrics = self.folder.metrics() if self.folder.untouched else self._finish()
        self._tell("on_train_end", metrics=metrics)
        log.close()
        return metrics

    def _steps(self, progress: Progress) -> None:
        with deferred_interrupt() as interrupted:
            for step in self.loop.steps(self._windows()):
                record = dataclasses.replace(step, metrics={**step.metrics, **self.method.metrics()})
                self.place.mark(f"step {record.step}")
                self.folder.stepped(self.arguments)
                self.observe(record, progress)
                self._tell("on_step_end")
                if self._stop_now(record, interrupted):
                    break

    def _windows(self) -> Iterator[Window]:
        """The method's windows, each made while the weights are those of the last step."""
        windows = iter(self.method.windows(self.stream))
        while True:
            with self._or_saved():
                window = next(windows, None)
            if window is None:
                return
            yield window

    @contextlib.contextmanager
    def _or_saved(self) -> Iterator[None]:
        """A `with` around what may fail by what a user wrote (a reward function) while the weights
        are those of the last step: this is saved before the error goes on.
        """
        done = False
        try:
            yield
            done = True
        finally:
            error = sys.exc_info()[1]
            if not done and isinstance(error, Exception):
                self._keep_last_step(error)

    def _keep_last_step(self, error: Exception) -> None:
        step = self.loop.step
        saved = (self.output_dir / f"checkpoint-{step}").exists()
        if not self.method.saves_on_error or self.place.several or self.config.save.save_strategy == "no":
            return
        if step and not saved:
            self.log.info(str(error), "WARNING")
            self._save(step)
            self._rotate()
        self._settle()

    def _tell(self, event: str, **facts: Any) -> None:
        """Let observers hear of it."""
        if not self.observers.callbacks:
            return
        state = RunState(
            self.loop.step,
            self.total_steps,
            self.stream.epoch,
            tuple(self.log.history),
            self.guards.early.best,
            self.place.is_writer,
        )
        self.observers.tell(event, state, model=self.policy.model, **facts)

    def _open_log(self, checkpoint: Checkpoint | None, progress: Progress) -> RunLog:
        c, folder = self.config.log, self.output_dir
        own = checkpoint if checkpoint and not neighbours_state.is_neighbours(checkpoint.path) else None
        names = c.report_to if self.place.is_writer else ()
        return RunLog(
            folder,
            self.place.is_writer,
            resume_step=self.loop.step if checkpoint else None,
            history=own.read_json("trainer_state.json")["log_history"] if own else (),
            echo=progress.write,
            writers=open_writers(names, Path(c.logging_dir or folder / "runs"), self.parts.described.flat()),
        )

    # --- a step -----------------------------------------------------------------------------------

    def observe(self, record: StepRecord, progress: Progress) -> None:
        """Show the step, and log it where a line is due."""
        metrics = {name: value for name, value in record.metrics.items() if name != "nll"}
        self.interval.add(record.loss, metrics, record.num_tokens, record.seconds)
        progress.update(record.step, loss=record.loss, tokens_per_second=record.num_tokens / record.seconds)
        if record.step % self.config.log.logging_steps and record.step != self.total_steps:
            return
        means = self.interval.take()
        values = {
            "loss": means.pop("loss"),
            "learning_rate": record.learning_rate,
            "grad_norm": record.grad_norm,
            **means,
            "max_memory_gib": round(resident_gib(peak=True), 3),
            "remaining_time": round(progress.remaining_seconds, 1),
        }
        self.log.log(record.step, values, self.stream.epoch, silent=progress.is_bar)

    def _stop_now(self, record: StepRecord, interrupted: list[int]) -> bool:
        """Evaluate and save when it is time; whether the run ends here. Order: measure, judge,
        save, so that a checkpoint knows its verdicts."""
        e, s, step, last = self.config.eval, self.config.save, record.step, record.step == self.total_steps
        guards, log = self.guards, self.log
        asked_to_end = self.policy.engine.stopped(bool(interrupted))
        epoch_ends = int(self.stream.epoch) > int(self._epoch_seen)
        self._epoch_seen = self.stream.epoch
        verdicts: list[Verdict] = guards.after_step(record) + self.method.after_step(record)
        if guards.broken:
            raise FloatingPointError(
                say(
                    f"{verdicts[0].message}; the last good checkpoint is kept, run the same command with "
                    "another setting to go on from it",
                    f"{verdicts[0].message}；最后一个正常的检查点已保留，修改设置后运行同一命令即可继续",
                )
            )
        is_best = False
        if (last and e.eval_strategy != "no") or _due(e.eval_strategy, e.eval_steps, step, epoch_ends):
            with self._or_saved():
                metrics = self.measure.during(log, step, self.stream.epoch)
            self._tell("on_evaluate", metrics=metrics)
            is_best, more = guards.after_evaluation(step, metrics, self.measure, log)
            verdicts += more + self.method.after_evaluation(step)
        for verdict in verdicts:
            log.info(verdict.message, "WARNING")
        stop = last or any(v.stop for v in verdicts) or asked_to_end
        wanted = s.save_strategy != "no" and (stop or is_best)
        if wanted or asked_to_end or _due(s.save_strategy, s.save_steps, step, epoch_ends):
            if is_best:
                guards.best_checkpoint = f"checkpoint-{step}"
            self._save(step)
            self._rotate()
            self._tell("on_save")
        if asked_to_end:
            self._settle()
            auto = s.resume_from_checkpoint == "auto"
            how = say("the same command", "再执行同一命令") if auto else "resume_from_checkpoint: auto"
            raise Interrupted(
                say(
                    "interrupted at step {step}; checkpoint-{step} is saved, {how} goes on from it",
                    "在第 {step} 步中断；已保存 checkpoint-{step}，{how} 可从此继续",
                    step=step,
                    how=how,
                )
            )
        return stop

    # --- states -----------------------------------------------------------------------------------

    def _keeper(self, stream: bool = True) -> Keeper:
        """All that a checkpoint holds beside weights and optimizer; the rows' place only where it
        is wanted."""
        place = self.place
        return Keeper(
            place,
            {
                "loop": JsonPart(place, "loop_state.json", _Steps(self.loop, self.interval)),
                "objective": JsonPart(place, "objective_state.json", self.loop.objective),
                "guards": JsonPart(place, "guards_state.json", self.guards),
                **({"data": StreamPart(place, self.stream)} if stream else {}),
                **self.method.parts(),
            },
        )

    def _save(self, step: int) -> None:
        policy, s = self.policy, self.config.save
        states = {
            "trainer_state.json": self.log.state(step, self.stream.epoch, **self._state_fields()),
            SCHEDULE_FILE: dataclasses.asdict(self.loop.schedule),
        }
        optimizer = None if s.save_only_model else self.loop.optimizer
        self._settle()
        self.place.mark(f"saving checkpoint-{step}")
        with policy.whole():
            named = policy.moved()
            content = (self.output_dir, step, self._save_files, optimizer, named, states)
            texts, cut = self.folder.texts(self.arguments), policy.shards(named)
            if s.async_save and optimizer is not None:
                self._pending = save_in_background(*content, texts, cut=cut, ranks=self.place)
                return
            save_checkpoint(*content, texts, cut=cut, ranks=self.place)
        self.log.info(say(f"saved checkpoint-{step}", f"已保存 checkpoint-{step}"))

    def _save_files(self, folder: Path) -> None:
        """What opens like a model, and what only resuming needs beside the optimizer's state."""
        self.parts.save_weights(folder)
        if self.place.is_writer:
            self.parts.processor.save_pretrained(folder)
        self._keeper().save(folder)

    def _resume(self, checkpoint: Checkpoint) -> None:
        policy = self.policy
        if neighbours_state.is_neighbours(checkpoint.path):
            t = self.config.train
            rows = t.per_device_train_batch_size * t.gradient_accumulation_steps
            neighbours_state.resume(checkpoint, policy, self.loop, rows)
            return
        with policy.whole():
            named = policy.moved()
            load_optimizer(checkpoint, self.loop.optimizer, named, cut=policy.shards(named), ranks=self.place)
        self._keeper(stream=not self.config.save.ignore_data_skip).load(checkpoint)
        self._epoch_seen = self.stream.epoch

    def _state_fields(self) -> dict[str, Any]:
        """What trainer_state.json says beside the history."""
        c, guards = self.config, self.guards
        return {
            "max_steps": self.total_steps,
            "num_train_epochs": c.train.num_train_epochs,
            "logging_steps": c.log.logging_steps,
            "eval_steps": c.eval.eval_steps or None,
            "save_steps": c.save.save_steps,
            "train_batch_size": c.train.per_device_train_batch_size,
            "consumed_samples": self.loop.rows,
            "num_input_tokens_seen": self.loop.tokens,
            "best_metric": guards.early.best,
            "best_global_step": guards.early.best_step or None,
            "best_model_checkpoint": guards.best_checkpoint or None,
        }

    def _settle(self) -> None:
        """Wait for the checkpoint that is being written. Raises OSError where it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.place.mark("waiting for a checkpoint")
            self.log.info(say(f"saved checkpoint-{pending.wait().step}", f"已保存 checkpoint-{pending.wait().step}"))
            self._rotate()

    def _rotate(self) -> None:
        if self.place.is_writer:
            rotate(self.output_dir, self.config.save.save_total_limit, self.output_dir / self.guards.best_checkpoint)

    # --- start and end ----------------------------------------------------------------------------

    def _announce(self, say: Callable[..., None]) -> None:
        """What is trained, the header that users grep for, and which rows can be used. Raises
        ValueError for a row that would stop the run later."""
        t, p = self.config.train, self.parts
        batch = t.per_device_train_batch_size * t.gradient_accumulation_steps * self.place.batch[1]
        facts = RunFacts(
            p.train_rows,
            round(p.passes, 2),
            t.per_device_train_batch_size,
            batch,
            t.gradient_accumulation_steps,
            self.total_steps,
            self.total_steps * batch,
            p.trainable,
        )
        lines = [f"layout: {self.policy.describe()}"] if self.place.several else []
        for line in [*lines, *p.table, *header_lines(facts)]:
            say(line)
        if self.place.is_writer:
            for told, level in self.method.surveyed(self.stream).lines():
                say(told, level)
            for _, told in () if len(p.rows.held) else unmeasured(self.config):
                say(told, "WARNING")

    def _announce_resume(self, checkpoint: Checkpoint) -> None:
        log, done = self.log, self.stream.epoch
        log.info(
            say(
                f"resuming from {checkpoint.path}: step {checkpoint.step} of {self.total_steps}, "
                f"{done:.2f} passes over the data done",
                f"从 {checkpoint.path} 继续：第 {checkpoint.step} / {self.total_steps} 步，已完成 {done:.2f} 遍数据",
            )
        )
        if neighbours_state.is_neighbours(checkpoint.path):
            log.info(neighbours_state.told(checkpoint), "WARNING")
        for path in set_aside_later(self.output_dir, checkpoint.step) if self.place.is_writer else ():
            log.info(
                say(
                    f"a later checkpoint of this folder is kept as {path.name}, the run leaves its course",
                    f"此文件夹中更晚的检查点保留为 {path.name}，本次运行另起一路",
                ),
                "WARNING",
            )
        if self.guards.early.exhausted:
            log.info(
                say(
                    "the run had stopped early: nothing is left to train; raise early_stopping_patience to go on",
                    "此运行已提前停止，没有可训练的内容；要继续请调大 early_stopping_patience",
                )
            )

    def _provoke_memory(self, tell: Callable[[str], None], always: bool = True) -> None:
        """Forward and backward of the heaviest batch before the first step: if memory is short, it
        is short now. Where all batches are as heavy the first step shows it, unless `always`.
        """
        heaviest = self.method.heaviest(self.stream, always)
        if heaviest is None:
            return
        batch, window = heaviest[0], self.method.window(heaviest)
        self.policy.model.train()
        self.loop.accumulate(window)
        self.loop.clear_gradients()
        rows, tokens, peak_gib = batch.num_rows, batch.inputs.num_tokens, resident_gib(peak=True)
        tell(
            say(
                f"heaviest batch first: {counted(rows, 'row')}, {tokens} tokens, {peak_gib:.2f} GiB at most",
                f"先试最重的一批：{rows} 行，{tokens} 个 token，最多 {peak_gib:.2f} GiB",
            )
        )

    def _finish(self) -> dict[str, float]:
        self._settle()
        log, guards, folder = self.log, self.guards, self.output_dir
        for line in self.stream.dropped.lines():
            log.info(line, "WARNING")
        if self.config.eval.load_best_model_at_end and guards.best_checkpoint:
            best = find_checkpoint(folder, str(folder / guards.best_checkpoint))
            if best is not None:
                self.parts.take_weights(best)
                log.info(
                    say(
                        f"finishing with {best.path}, the best by {guards.early.metric}",
                        f"以 {best.path} 结束，其 {guards.early.metric} 最优",
                    )
                )
        self.place.mark("saving and measuring the result")
        with self.folder.result():
            self.parts.save_weights(folder)
            if self.place.is_writer:
                self.parts.processor.save_pretrained(folder)
        metrics = self.measure.after(log, self._summary(), self.stream.epoch)
        if not self.place.is_writer:
            return metrics
        log.write_state(self.loop.step, self.stream.epoch, **self._state_fields())
        write_loss_svg(log.history, folder / "training_loss.svg")
        if self.config.log.plot_loss:
            write_loss_png(log.history, folder / "training_loss.png")
        write_reports(self.parts, self.measure, log, self.folder.ledger.changed)
        over = self.loop.step >= self.total_steps or guards.early.exhausted
        self.folder.finish(self.arguments, self.loop.step, self.total_steps, over=over)
        return metrics

    def _summary(self) -> dict[str, float]:
        """What train_results.json says. Times are those of the training steps, of all processes
        that made them, without measuring and saving."""
        loop = self.loop
        speed = 1 / loop.seconds if loop.seconds else 0.0
        return {
            "train_loss": self.interval.run_loss,
            "global_step": loop.step,
            "train_runtime": loop.seconds,
            "train_samples_per_second": loop.rows * speed,
            "train_steps_per_second": loop.step * speed,
        }


def _due(strategy: str, every: int, step: int, epoch_ends: bool) -> bool:
    return (strategy == "steps" and every > 0 and step % every == 0) or (strategy == "epoch" and epoch_ends)

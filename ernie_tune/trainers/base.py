"""What users call: a trainer puts a run together from settings, a model and rows, and hands it to
`Run`. `method_class` says what it trains by.

A new trainer is a `Method` (method.py says how) and a few lines here. Refuses to know: what a
method does, the loop and its decisions (run.py), how anything is computed, stored or drawn.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.ledger import Ledger
from ernie_tune.checkpoint.push import push
from ernie_tune.checkpoint.run_folder import RunFolder
from ernie_tune.checkpoint.state import Checkpoint, find_checkpoint
from ernie_tune.config.language import say
from ernie_tune.data.batching import Dropped, RecordEncoder
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.sources import Dataset, in_memory, load_dataset
from ernie_tune.evaluate.measure import Measure
from ernie_tune.evaluate.own_metrics import Metrics
from ernie_tune.machine.place import Place
from ernie_tune.machine.placed import Placed
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.report import trainable_table
from ernie_tune.report.log import RunLog, stamp
from ernie_tune.train.loop import Loop
from ernie_tune.trainers import assemble, neighbours
from ernie_tune.trainers.ledger import ledger_of
from ernie_tune.trainers.method import Method, Rows, RowSets
from ernie_tune.trainers.observers import Observers
from ernie_tune.trainers.run import Assembled, Run


class Trainer:
    """A run of one method on `model`.

    Objects of PaddleNLP and PaddleFormers are taken in the place of each argument (neighbours.py).
    `args`: a `TrainingArguments` or `RunConfig`. `train_dataset`, `eval_dataset`: what
    `load_dataset` gives, a path, or a sequence of records; by default the files named in `args`.
    `processor`: by default that of the model's folder. A plain model gets the adapters or the
    freezing that `args` say; a `PeftModel` is trained as it is. `compute_metrics`: further scores
    of the generated answers; `callbacks`: who hears of the run (observers.py). Raises ValueError
    for settings and data that cannot be used, before the first step.
    """

    method_class: type[Method] = Method

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processor: Any = None,
        *,
        compute_metrics: Metrics | None = None,
        callbacks: Sequence[Any] = (),
    ) -> None:
        given = neighbours.adopt_model(model)
        self.args = assemble.dealt(neighbours.settings_for(args, self.method_class.stages), given)
        if processor is not None and not isinstance(processor, Processor):
            processor = neighbours.adopt(processor)
        self.compute_metrics, self.observers = compute_metrics, Observers(args=self.args)
        for callback in callbacks:
            self.add_callback(callback)
        stages = self.method_class.stages
        if self.args.model.stage not in stages:
            raise ValueError(
                say(
                    f"stage ({self.args.model.stage}) must be one of {stages} with {type(self).__name__}; set "
                    "it, or take another trainer",
                    f"使用 {type(self).__name__} 时 stage（{self.args.model.stage}）须为 {stages} "
                    "之一；请修改，或换用其他训练器",
                )
            )
        assemble.refuse(self.args)
        assemble.check_layout(self.args, given)
        self.place = Place(self.args.parallel, self.args.train.gradient_accumulation_steps)
        plain, self._source = assemble.model_for(self.args, self.place) if given is None else (given, None)
        self._named = given is None
        name = plain.name_or_path or self.args.model.model_name_or_path
        if not name and processor is None:
            raise ValueError(
                say(
                    "processor (None) must be given for a model that was not loaded from a folder; pass "
                    "Processor.bundled() or the folder's",
                    "模型不是从文件夹加载时须给出 processor（现为 None）；请传入 Processor.bundled() "
                    "或该文件夹的 processor",
                )
            )
        self.processor = processor or assemble.load_processor(self.args, name)
        self.method = self.make_method()
        self._open_data(train_dataset, eval_dataset)
        self.model = plain
        if not isinstance(plain, PeftModel):
            samples = self._calibration()
            self.model = assemble.apply_method(
                self.args, plain, samples, self._source, assemble.measured(self.args, self.place, samples, self._source)
            )
        if isinstance(self.model, PeftModel) and self.args.lora.adapter_format != "auto":
            self.model.dialect = self.args.lora.adapter_format
        self._placed: Placed | None = None
        if not self.place.several:  # nothing is to be cut first
            self._placed = self.place.put(self.model, self._source)
        self.method.attach(self.model)
        # What ernie_tune_args.yaml and the model card say: the settings, corrected where a model
        # came as an object.
        self.described = self.args if given is None else assemble.as_trained(self.args, self.model, name)
        self.output_dir = Path(self.args.save.output_dir)
        self.folder = RunFolder(
            self.args.save,
            (self.args.model.model_name_or_path, self.args.lora.lora_path),
            self.place,
            self._what_defines_it,
            lambda: self.total_steps()[0],
        )
        self._table: list[str] = []  # of what is trained, counted while the model is whole
        self._trainable = 0
        self._whole_seen = self._prepared = False
        self.run: Run | None = None

    # --- what users and notebooks look at ---------------------------------------------------------

    @property
    def encoder(self) -> RecordEncoder:
        """What makes samples and micro-batches of the rows."""
        return self.method.encoder

    @property
    def eval_rows(self) -> Rows:
        return self.rows.held

    @property
    def placed(self) -> Placed:
        """The model on the mesh."""
        if self._placed is None:
            raise AssertionError("put comes first")
        return self._placed

    @property
    def loop(self) -> Loop:
        """The loop of the run that is going on, or of the last."""
        if self.run is None:
            raise AssertionError("train() builds the loop")
        return self.run.loop

    @property
    def log(self) -> RunLog:
        if self.run is None:
            raise AssertionError("train() opens the log")
        return self.run.log

    # --- assembling -------------------------------------------------------------------------------

    def make_method(self) -> Method:
        """The method of the run; a trainer that takes more than rows and settings hands it on
        here.
        """
        return self.method_class(self.args, self.place, self.processor)

    def _open_data(self, train: Any, evaluation: Any) -> None:
        c, signals = self.args, self.method.signals
        sets = assemble.train_sets(c, signals) if train is None else [self._rows(train, c.data.train_dataset_type)]
        held: Sequence[Record] = (
            assemble.eval_set(c, signals) if evaluation is None else self._rows(evaluation, c.data.eval_dataset_type)
        )
        self._given = {"train_dataset_path": list(sets), "eval_dataset_path": [held]}
        if not sets:
            raise ValueError(
                say(
                    "train_dataset (None) must be given, or train_dataset_path set in args; name the training rows",
                    "须给出 train_dataset（现为 None），或在 args 中设置 train_dataset_path；请指明训练数据",
                )
            )
        if not len(held) and c.data.val_size > 0:
            sets, held = assemble.hold_out(sets, c.data.val_size, c.train.seed)
        if not len(held) and c.eval.eval_strategy != "no":
            raise ValueError(
                say(
                    f"eval_dataset (0 rows) must have rows with eval_strategy ({c.eval.eval_strategy}); give "
                    "eval_dataset or val_size",
                    f"eval_strategy（{c.eval.eval_strategy}）需要评测数据，eval_dataset 为 0 行；请给出 "
                    "eval_dataset 或 val_size",
                )
            )
        self.train_rows = sum(len(rows) for rows in sets)
        self.rows = RowSets(self.method.more_rows(sets), self.method.held_rows(held))
        self.stream = self.method.stream(self.rows)

    def _rows(self, data: Any, kinds: tuple[str, ...]) -> Sequence[Record]:
        """Names of files, and rows as dicts, through the readers, in the format that the settings
        name if it is one; a `load_dataset` as this method reads it; records as they are.
        """
        if isinstance(data, Dataset):
            return data.serving(self.method.signals)
        given = in_memory(data)
        if given is None and not isinstance(data, str | Path) and not (len(data) and isinstance(data[0], str | Path)):
            return data
        kind = kinds[0] if len(kinds) == 1 else "auto"
        return load_dataset(data if given is None else given, kind, signals=self.method.signals)

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

    def total_steps(self) -> tuple[int, float]:
        """(optimizer steps of the run, steps of one pass over the data)."""
        t = self.args.train
        per_epoch = self.method.steps_per_pass(self.rows)
        by_epochs = max(1, math.ceil(round(t.num_train_epochs * per_epoch, 6)))
        return t.max_steps if t.max_steps > 0 else by_epochs, per_epoch

    def put(self, optimizer_next: bool = False) -> Placed:
        """Put the model on the mesh, once it has all its layers; what is trained is counted before.
        `optimizer_next`: as `Place.put` has it."""
        if not self._whole_seen:
            self._table = trainable_table(self.model).splitlines()
            self._trainable = sum(int(p.size) for p in self.model.parameters() if not p.stop_gradient)
            self.method.before_put(self.model)
            self._whole_seen = True
        if self._placed is None:
            self._placed = self.place.put(self.model, self._source, optimizer_next=optimizer_next)
        return self._placed

    def prepare(self, dry_run: bool = True) -> None:
        """Let the method see the policy as it was given; `dry_run`: without a trace on the disk."""
        self.method.prepare(self.put(), self.rows, dry_run)
        self._prepared = True

    def build_loop(self, length: tuple[int, float] | None = None) -> Loop:
        """A loop for a new run, with the method's objective and an optimizer that has made no step.
        `length`: what `total_steps` gave, where it is known."""
        total, per_epoch = length or self.total_steps()
        self.method.objective_now = self.method.objective(total, per_epoch)
        return assemble.loop_of(self.args, self.put(optimizer_next=True), self.method.objective_now, total)

    def _assembled(self, passes: float = 0.0) -> Assembled:
        base = self.described.model.model_name_or_path or "fresh weights"
        return Assembled(
            self.args,
            self.described,
            self.method,
            self.put(),
            self.processor,
            self.rows,
            self.stream,
            self.folder,
            base,
            self._table,
            self._trainable,
            self.train_rows,
            passes,
        )

    # --- the run ----------------------------------------------------------------------------------

    def train(self, dry_run: bool = False) -> dict[str, float]:
        """Run to the end, or go on where an earlier run in `output_dir` stopped; returns the final
        metrics. `dry_run`: stop after the heaviest batch.

        Ctrl-C finishes the step, saves, and raises KeyboardInterrupt. A loss that is no number
        raises FloatingPointError; the weights and checkpoints are then those before it. A disk that
        is full raises OSError. Of several processes all end together.
        """
        with self.place.watched(), self.folder.held(dry_run):
            return self._train(dry_run)

    def _train(self, dry_run: bool) -> dict[str, float]:
        found = self.folder.look(dry_run)
        for level, line in found.lines if self.place.is_writer else ():
            print(stamp(line, level), flush=True)
        if found.finished:
            self._push(dry_run)
            return self.folder.metrics()
        if found.checkpoint is None:
            self._tell_fresh()
        self.put(optimizer_next=True)
        t = self.args.train
        length = self.total_steps()
        passes = t.max_steps / max(length[1], 1e-9) if t.max_steps > 0 else t.num_train_epochs
        parts = self._assembled(passes)
        checkpoint = self._starting_point(parts)
        loop = self.build_loop(length)
        self.prepare(dry_run)
        self.run = run = Run(parts, loop, self.observers)
        run.measure.compute_metrics = self.compute_metrics
        if dry_run:
            run.rehearse()
            return {}
        metrics = run.train(checkpoint)
        self._push(dry_run)
        return metrics

    def _push(self, dry_run: bool) -> None:
        """Hand the result to the hub that the settings name. Raises ValueError as
        `checkpoint.push.push`; the result stays where it is."""
        s = self.args.save
        if s.push_to_hub and self.place.is_writer and not dry_run:
            push(self.output_dir, s.push_to_hub, s.push_hub)

    def _starting_point(self, parts: Assembled) -> Checkpoint | None:
        """The checkpoint to go on from, if any. With resume_only_model the weights of the one that
        the settings name are taken at once, and None returned; a run that goes on, and compares
        with what it started from, takes them too."""
        found, s = self.folder.checkpoint, self.args.save
        if s.resume_only_model and (found is None or self.method.compares_with_start):
            start = find_checkpoint(self.output_dir, s.resume_from_checkpoint)
            assert start is not None
            parts.take_weights(start)
            if found is None:
                print(
                    say(
                        f"ernie_tune: weights of {start.path}; optimizer, data and step count start anew",
                        f"ernie_tune：使用 {start.path} 的权重；优化器、数据和步数重新开始",
                    ),
                    file=sys.stderr,
                )
        return found

    def save_model(self, folder: str | Path) -> None:
        """Model or adapter, processor files and arguments: what chat, eval and export need."""
        self._assembled().save_weights(Path(folder))
        if self.place.is_writer:
            self.processor.save_pretrained(folder)

    def evaluate(self, answers: str | Path | None = None) -> dict[str, float]:
        """Loss on the evaluation rows and scores of generated answers, without training. `answers`:
        the file that takes them, one JSON object a line."""
        if not len(self.eval_rows):
            raise ValueError(
                say(
                    "eval_dataset (0 rows) must have rows to evaluate; set eval_dataset_path or val_size",
                    "没有评测数据（eval_dataset 为 0 行）；请设置 eval_dataset_path 或 val_size",
                )
            )
        self._tell_fresh()
        with self.place.watched():
            if not self._prepared:
                self.prepare()
            measure = self.measure()
            metrics, asked, given = measure.all_rows()
            if answers is not None and self.place.is_writer:
                measure.write_answers(Path(answers), asked, given)
            return metrics

    def _tell_fresh(self) -> None:
        """Say where weights are those of no training, once it is known that they are used."""
        if self._named and self.place.is_writer:
            assemble.tell_fresh(self.args)

    def measure(self) -> Measure:
        """What measures the model on held-out rows and guard sets."""
        measure = self.method.measure(self.put(), self.rows, self.output_dir)
        measure.is_main, measure.compute_metrics = self.place.is_writer, self.compute_metrics
        return measure

    def add_callback(self, callback: Any) -> None:
        """One more who hears of the run: a class, an object or a callable (observers.py)."""
        self.observers.add(callback)

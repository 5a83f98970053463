"""What a run asks of a method, with the answers of one that learns from rows as they are; and what
can be kept.

A new trainer is one file:

    class Cloze(Method):          # what differs from a plain run, and nothing else
        stages, signals = ("CLOZE",), ("sft",)

        def objective(self, total_steps, steps_per_pass):
            return ClozeObjective(self.config.train.loss_norm)

    class ClozeTrainer(Trainer):  # what users call
        method_class = Cloze

and its line in the table of verbs. Whatever makes windows (rollouts, a queue) is an iterator behind
`windows`; whatever must survive a restart is one of `parts`; what belongs to the finished model is
one of `weights`. `windows` changes no counter that anyone reads: a window may be made and never
trained on. Counting is the objective's, in `end`, once a step.

Refuses to know: the loop, when is measured or saved, the layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ernie_tune.config.arguments import RunConfig
from ernie_tune.data.batching import BatchStream, RecordEncoder, steps_per_epoch
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.survey import Survey, survey
from ernie_tune.evaluate.measure import Measure
from ernie_tune.machine.place import Place
from ernie_tune.machine.placed import Placed
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.objectives.objective import Objective
from ernie_tune.report.log import RunLog
from ernie_tune.train.guards import Verdict
from ernie_tune.train.loop import StepRecord
from ernie_tune.trainers import assemble

Rows = Sequence[Record]
Window = Sequence[Any]  # the micro-batches of one optimizer step, on this rank


class Stateful(Protocol):
    """Something that a run keeps: a reference, a critic, a head, a sampler, guards, an objective, a
    stream. All ranks call both, in one order."""

    def save(self, folder: Path) -> None:
        """Write what is needed to go on, under names of its own. Raises OSError."""

    def load(self, folder: Path) -> None:
        """Put back what `save` wrote, under any layout. Raises ValueError for what cannot be used,
        by name."""


@dataclass(frozen=True)
class RowSets:
    """The rows of a run: to train on, set by set, and to measure on."""

    train: Sequence[Rows]
    held: Rows


class Method:
    """One method of one run. What it keeps from call to call is its own affair; `objective_now` is
    the run's objective, once there is one."""

    stages: tuple[str, ...] = ()  # of the settings that the method serves
    signals: tuple[str, ...] = ()  # of the rows that it learns from
    # whether a window that cannot be made leaves everything as it was after the last step, so that
    # the run saves it before it ends
    saves_on_error = False
    # whether a run that goes on must see again what its policy was at the start
    compares_with_start = False

    def __init__(self, config: RunConfig, place: Place, processor: Processor) -> None:
        """Raises ValueError for settings that the method cannot be run with."""
        self.config, self.place, self.processor = config, place, processor
        self.objective_now: Objective | None = None
        self.encoder = self.make_encoder()

    # --- before the run ---------------------------------------------------------------------------

    def make_encoder(self) -> RecordEncoder:
        """What makes samples and micro-batches of the rows."""
        return assemble.encoder_of(self.config, self.processor)

    def more_rows(self, sets: Sequence[Rows]) -> Sequence[Rows]:
        """The training rows, each set with those that the method makes of them. Raises ValueError
        where it can make none of what is asked for."""
        return sets

    def held_rows(self, held: Rows) -> Rows:
        """The rows to measure on, as the method measures on them."""
        return held

    def stream(self, rows: RowSets) -> BatchStream:
        """An endless stream of this rank's windows, at its beginning."""
        return assemble.stream_of(self.config, rows.train, self.encoder, *self.place.batch)

    def steps_per_pass(self, rows: RowSets) -> float:
        """Optimizer steps in which every row is read once. Raises ValueError where no row can be
        used."""
        return steps_per_epoch(lambda: self.stream(rows))

    def attach(self, model: ErnieModel) -> None:
        """Give the model what the method trains beside it. Raises ValueError for a model that the
        method cannot train."""

    def before_put(self, model: ErnieModel) -> None:
        """Called while the model is still whole on each rank, before it goes on the mesh: the last
        look at all of it."""

    def objective(self, total_steps: int, steps_per_pass: float) -> Objective:
        """The method's loss, new for a run of so many steps."""
        raise NotImplementedError

    def prepare(self, policy: Placed, rows: RowSets, dry_run: bool) -> None:
        """Called once, while the policy is what it was given as: take a reference, measure with it.
        `dry_run`: leave no trace on the disk."""

    # --- the run ----------------------------------------------------------------------------------

    def started(self, log: RunLog, rows: RowSets, resumed: bool) -> None:
        """What the method has to say once the log is open."""

    def window(self, given: Window) -> Window:
        """A window with what the objective needs beside the rows, such as a reference's answers.
        All ranks call it."""
        return given

    def surveyed(self, stream: BatchStream) -> Survey:
        """Which rows can be used, and why others cannot. Raises ValueError for a row that would
        stop the run later, and where none can be used.
        """
        return survey(stream.shard.mixture.sources, stream.encoder)

    def heaviest(self, stream: BatchStream, always: bool = True) -> Window | None:
        """The window that needs most memory, for a forward and backward before the first step; None
        where that cannot be known, or unless `always` where all need as much."""
        samples, stands_out = assemble.longest(stream)
        return [self.encoder.collate(samples)] if samples and (always or stands_out) else None

    def windows(self, stream: BatchStream) -> Iterator[Window]:
        """The windows of the run."""
        return map(self.window, stream)

    def metrics(self) -> Mapping[str, float]:
        """What there is to say of the last window beside what its loss knew, such as rewards."""
        return {}

    def after_evaluation(self, step: int) -> list[Verdict]:
        """What held-out rows give reason to say, once they were measured."""
        return []

    def after_step(self, record: StepRecord) -> list[Verdict]:
        """What the method does after each step, before it is measured and saved."""
        return []

    def measure(self, policy: Placed, rows: RowSets, output_dir: Path) -> Measure:
        """What measures the policy on held-out rows and guard sets."""
        encoder = assemble.encoder_of(self.config, self.processor)
        return Measure(
            assemble.measure_settings(self.config), policy.forward, self.processor, encoder, rows.held, output_dir
        )

    # --- what is kept -----------------------------------------------------------------------------

    def parts(self) -> Mapping[str, Stateful]:
        """What the method needs to go on from a checkpoint, by name, beside model, optimizer,
        objective and stream."""
        return {}

    def weights(self, policy: Placed) -> Mapping[str, Stateful]:
        """What of the result lies beside the model's own files, by name."""
        return {}

    # --- for those that learn with it -------------------------------------------------------------

    def present_objective(self) -> Objective:
        """The objective of the run, or one like it where no run has begun."""
        return self.objective(1, 1.0) if self.objective_now is None else self.objective_now

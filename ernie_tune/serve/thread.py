"""The scheduler's thread: one thread runs the model, requests come from any other and get their
tokens as they appear.

Refuses to know: HTTP, event loops, text, who is let in when.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.generate.batch import TokenEvent
from ernie_tune.generate.engine import Engine, Prepared
from ernie_tune.generate.scheduler import BASE, STEP_ERRORS, Capacity
from ernie_tune.models.inputs import Row
from ernie_tune.serve.guide import RuleFailed


class EngineFailure(RuntimeError):
    """The model failed on a batch; not the request's fault."""


class UnfitRequest(EngineFailure):
    """What was asked for cannot be done, as only its answer has shown: the request's fault."""


class EngineEnded(EngineFailure):
    """The scheduler's thread has ended, as it was told to or by an error that nobody foresaw."""


@dataclass(eq=False)
class Submission:
    """One prepared request on its way. `report` gets its events, or the error that ended it, in the
    scheduler's thread.
    """

    prepared: Prepared
    adapter: str | None
    report: Callable[[list[TokenEvent] | EngineFailure], None]
    rows_left: int = field(init=False)  # 0 once it has ended

    def __post_init__(self) -> None:
        self.rows_left = self.prepared.prompt.params.n

    @property
    def key(self) -> int:
        return self.prepared.prompt.key


@dataclass(eq=False)
class Reading:
    """Rows whose mean states somebody wants. `report` gets float32 [N, D], or the error that ended
    it, in the scheduler's thread.
    """

    rows: Sequence[Row]
    adapter: str | None
    begin_id: int  # see `pooling.mean_states`
    report: Callable[[np.ndarray | EngineFailure], None]
    read: list[np.ndarray] = field(default_factory=list)
    done: int = 0


@dataclass
class Load:
    """What the scheduler is doing, for the metrics."""

    waiting: int = 0
    running: int = 0
    steps: int = 0
    rows_stepped: int = 0
    step_seconds: float = 0.0


class SchedulerThread:
    """Runs jobs until `close`. `submit`, `cancel` and `load` may be called from any thread."""

    def __init__(self, engine: Engine, capacity: Capacity) -> None:
        self.engine = engine
        self._scheduler = engine.scheduler(capacity)
        self._changed = threading.Condition()
        self._entering: list[Submission] = []
        self._jobs: dict[int, Submission] = {}  # those that the scheduler has
        self._cancelled: set[int] = set()
        self._readings: list[Reading] = []  # the first is being read
        self._prefill_tokens = capacity.prefill_tokens
        self._closing = False
        self._load = Load()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self.engine.model.eval()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def check(self, job: Submission) -> None:
        """Refuse what could never be let in. Raises ValueError."""
        self._scheduler.check(job.prepared.prompt)

    def submit(self, job: Submission) -> None:
        """Queue a job that passed `check`. Raises EngineEnded once the thread has ended."""
        with self._changed:
            if self._closing or not self.alive:
                raise EngineEnded(say("the model is no longer running", "模型已不在运行"))
            self._entering.append(job)
            self._changed.notify()

    def cancel(self, job: Submission) -> None:
        """Take a job out, wherever it is; it reports nothing more. Fine for jobs that are done."""
        with self._changed:
            if job in self._entering:
                self._entering.remove(job)
            elif self._jobs.pop(job.key, None):
                self._cancelled.add(job.key)
            self._changed.notify()

    def read(self, reading: Reading) -> None:
        """Queue rows to be read, in turns with the steps of the answers. Raises EngineEnded once
        the thread has ended.
        """
        with self._changed:
            if self._closing or not self.alive:
                raise EngineEnded(say("the model is no longer running", "模型已不在运行"))
            self._readings.append(reading)
            self._changed.notify()

    def stop_reading(self, reading: Reading) -> None:
        """Take it out; it reports nothing more. Fine for one that is done."""
        with self._changed:
            if reading in self._readings:
                self._readings.remove(reading)

    def load(self) -> Load:
        with self._changed:
            waiting = self._load.waiting + len(self._entering) + len(self._readings)
            return replace(self._load, waiting=waiting)

    def close(self, timeout_seconds: float = 30.0) -> None:
        """End the thread after its current step; jobs that are left fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.alive:
            self._thread.join(timeout_seconds)

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            # also when an error nobody foresaw ends the thread: whoever waits must learn of it
            with self._changed:
                self._closing = True
                left = [one.report for one in (*self._jobs.values(), *self._entering)]
                readings = [one.report for one in self._readings]
                self._jobs, self._entering, self._readings = {}, [], []
            for report in (*left, *readings):
                report(EngineEnded("the model is no longer running"))

    def _turn(self) -> bool:
        scheduler = self._scheduler
        with self._changed:
            while not (self._entering or self._jobs or self._cancelled or self._readings or self._closing):
                self._changed.wait()
            if self._closing:
                return False
            cancelled, self._cancelled = self._cancelled, set()
            scheduler.cancel(cancelled)
            for job in self._entering:
                self._jobs[job.key] = job
                scheduler.submit(job.prepared.prompt, BASE if job.adapter is None else job.adapter)
            self._entering = []
            reading = self._readings[0] if self._readings else None
        if reading is not None:
            self._read(reading)
        started = time.monotonic()
        events = scheduler.step()
        with self._changed:  # before anybody learns that his answer is done
            load = self._load
            load.waiting, load.running = scheduler.waiting, scheduler.running
            if events:
                load.steps += 1
                load.rows_stepped += len(events)
                load.step_seconds += time.monotonic() - started
        self._deliver(events)
        return True

    def _read(self, reading: Reading) -> None:
        """The next of its rows, as many as are prefilled between two steps; at least one."""
        start, tokens = reading.done, 0
        while reading.done < len(reading.rows):
            tokens += len(reading.rows[reading.done].input_ids_L)
            if reading.done > start and tokens > self._prefill_tokens:
                break
            reading.done += 1
        news: np.ndarray | EngineFailure | None = None
        adapter = BASE if reading.adapter is None else reading.adapter
        try:
            rows = reading.rows[start : reading.done]
            reading.read.append(self._scheduler.mean_states(rows, adapter, reading.begin_id))
            if reading.done == len(reading.rows):
                news = np.concatenate(reading.read)
        except STEP_ERRORS as error:
            traceback.print_exception(error, file=sys.stderr)
            news = EngineFailure(f"the model failed on this request ({error})")
        if news is None:
            return
        with self._changed:
            wanted = reading in self._readings
            if wanted:
                self._readings.remove(reading)
        if wanted:
            reading.report(news)

    def _deliver(self, events: Sequence[TokenEvent]) -> None:
        by_job: dict[int, list[TokenEvent]] = {}
        for event in events:
            by_job.setdefault(event.prompt, []).append(event)
        told: set[int] = set()  # one error can end many jobs
        for key, some in by_job.items():
            with self._changed:
                job = self._jobs.get(key)
            if job is None:  # cancelled meanwhile
                continue
            error = next((event.error for event in some if event.error is not None), None)
            job.rows_left = 0 if error else job.rows_left - sum(bool(event.finish_reason) for event in some)
            if not job.rows_left:
                with self._changed:
                    self._jobs.pop(key, None)
            if error is None:
                job.report(some)
                continue
            self._scheduler.cancel([key])  # its other samples
            if isinstance(error, RuleFailed):
                job.report(UnfitRequest(str(error)))
                continue
            job.report(EngineFailure(f"the model failed on this request ({error})"))
            if id(error) not in told:
                told.add(id(error))
                traceback.print_exception(error, file=sys.stderr)

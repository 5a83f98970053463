"""Iteration-level batching: one thread runs the model, requests join the running batch between two tokens and leave when they are done.

Each adapter has its own batch, and each turn of the loop gives every batch one step, so no adapter waits for another to finish. Requests are
let in as they came; none overtakes. Refuses to know: HTTP, event loops, text.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ernie_tune.models.generation import RunningBatch, TokenEvent
from ernie_tune.peft.model import PeftModel
from ernie_tune.serve.engine import Engine, Prepared

# What a model can raise for one batch without the process being lost: a device out of memory, a shape that slipped through.
_STEP_ERRORS = (ValueError, RuntimeError, MemoryError, IndexError, OSError)


class EngineFailure(RuntimeError):
    """The model failed on a batch; not the request's fault."""


class EngineEnded(EngineFailure):
    """The scheduler's thread has ended, as it was told to or through an error that nobody foresaw."""


@dataclass(eq=False)
class Job:
    """One prepared request on its way. `report` gets its events, or the error that ended it, in the scheduler's thread."""

    prepared: Prepared
    adapter: str | None
    report: Callable[[list[TokenEvent] | EngineFailure], None]
    rows_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.rows_left = self.prepared.prompt.params.n

    @property
    def key(self) -> int:
        return self.prepared.prompt.key

    @property
    def columns(self) -> int:
        """Tokens that one row may come to."""
        return self.prepared.num_tokens + self.prepared.prompt.params.max_new_tokens


@dataclass(frozen=True)
class Capacity:
    """What may run at once. `cache_tokens`: rows times the longest row, summed over adapters. `prefill_tokens`: prompts let in between two steps
    (at least one is)."""

    rows: int = 64
    cache_tokens: int = 262_144
    prefill_tokens: int = 8192


@dataclass
class Load:
    """What the scheduler is doing, for the metrics."""

    waiting: int = 0
    running: int = 0
    steps: int = 0
    rows_stepped: int = 0
    step_seconds: float = 0.0


class Scheduler:
    """Runs jobs until `close`. `submit`, `cancel` and `load` may be called from any thread."""

    def __init__(self, engine: Engine, capacity: Capacity) -> None:
        self.engine, self.capacity = engine, capacity
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._cancelled: set[int] = set()
        self._closing = False
        self._batches: dict[str | None, RunningBatch] = {}
        self._running: dict[str | None, dict[int, Job]] = {}
        self._load = Load()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)

    def start(self) -> None:
        self.engine.model.eval()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def check(self, job: Job) -> None:
        """Refuse what could never be let in. Raises ValueError."""
        n, need = job.prepared.prompt.params.n, job.prepared.prompt.params.n * job.columns
        if n > self.capacity.rows:
            raise ValueError(f"n ({n}) must be at most the server's max_num_seqs ({self.capacity.rows}); ask for fewer")
        if need > self.capacity.cache_tokens:
            raise ValueError(
                f"n * (prompt tokens + max_tokens) ({need}) must be at most the server's cache_tokens ({self.capacity.cache_tokens}); lower max_tokens or n"
            )
        self.engine.batch().check(job.prepared.prompt)

    def submit(self, job: Job) -> None:
        """Queue a job that passed `check`. Raises EngineEnded once the scheduler has ended."""
        with self._changed:
            if self._closing or not self.alive:
                raise EngineEnded("the model is no longer running")
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Take a job out, wherever it is; it reports nothing more. Fine for jobs that are done."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
            else:
                self._cancelled.add(job.key)
            self._changed.notify()

    def load(self) -> Load:
        with self._changed:
            running = sum(job.rows_left for jobs in self._running.values() for job in jobs.values())
            return Load(len(self._waiting), running, self._load.steps, self._load.rows_stepped, self._load.step_seconds)

    def close(self, timeout_seconds: float = 30.0) -> None:
        """End the thread after its current step; jobs that are left fail."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self.alive:
            self._thread.join(timeout_seconds)

    # --- the scheduler's thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # also when an error nobody foresaw ends the thread: whoever waits must learn of it
            with self._changed:
                self._closing = True
                left = [*self._waiting, *(job for jobs in self._running.values() for job in jobs.values())]
                self._waiting.clear()
                self._running.clear()
            self._fail(left, EngineEnded("the model is no longer running"))

    def _turn(self) -> bool:
        with self._changed:
            while not (self._waiting or self._running or self._closing):
                self._cancelled.clear()
                self._changed.wait()
            if self._closing:
                return False
            cancelled, self._cancelled = self._cancelled, set()
        self._drop(cancelled)
        with self._changed:
            entering = self._admit()
        for adapter in [*self._running]:
            with self._acting(adapter):
                self._join(adapter, [job for job in entering if job.adapter == adapter])
                self._step(adapter)
        return True

    def _drop(self, keys: set[int]) -> None:
        for adapter, jobs in [*self._running.items()]:
            mine = keys & jobs.keys()
            if mine:
                self._batches[adapter].drop(mine)
                self._forget(adapter, mine)

    def _forget(self, adapter: str | None, keys: set[int]) -> None:
        with self._changed:
            jobs = self._running[adapter]
            for key in keys:
                jobs.pop(key, None)
            if not jobs:
                del self._running[adapter], self._batches[adapter]

    def _admit(self) -> list[Job]:
        """Jobs from the head of the queue, as many as fit; they count as running from here on."""
        entering: list[Job] = []
        prefill = 0
        while self._waiting:
            job = self._waiting[0]
            prefill += job.prepared.num_tokens
            if (entering and prefill > self.capacity.prefill_tokens) or not self._fits(job):
                break
            self._running.setdefault(job.adapter, {})[job.key] = job
            entering.append(self._waiting.popleft())
        return entering

    def _fits(self, job: Job) -> bool:
        rows = columns = total_rows = total_tokens = 0
        for adapter in {job.adapter, *self._running}:
            jobs = [*self._running.get(adapter, {}).values(), *([job] if adapter == job.adapter else [])]
            rows, columns = sum(j.rows_left for j in jobs), max(j.columns for j in jobs)
            total_rows, total_tokens = total_rows + rows, total_tokens + rows * columns
        return total_rows <= self.capacity.rows and total_tokens <= self.capacity.cache_tokens

    @contextlib.contextmanager
    def _acting(self, adapter: str | None) -> Iterator[None]:
        """Let one adapter act, or none."""
        model = self.engine.model
        if not isinstance(model, PeftModel):
            yield
            return
        if adapter is None and model.active is not None:
            with model.disable_adapter():
                yield
            return
        if adapter is not None and model.active != adapter:
            model.set_adapter(adapter)
        yield

    def _join(self, adapter: str | None, entering: Sequence[Job]) -> None:
        if not entering:
            return
        batch = self._batches.setdefault(adapter, self.engine.batch())
        try:
            batch.join([job.prepared.prompt for job in entering])
        except _STEP_ERRORS as error:
            if len(entering) > 1:  # one of them spoils it: find out which
                for job in entering:
                    self._join(adapter, [job])
                return
            self._report_error(error)
            self._forget(adapter, {entering[0].key})
            self._fail(entering, EngineFailure(f"the model failed on this request ({error})"))

    def _step(self, adapter: str | None) -> None:
        if adapter not in self._running:
            return
        batch, started = self._batches[adapter], time.monotonic()
        rows = len(batch)
        try:
            events = batch.step()
        except _STEP_ERRORS as error:
            self._report_error(error)
            jobs = [*self._running[adapter].values()]
            self._forget(adapter, {job.key for job in jobs})
            self._fail(jobs, EngineFailure(f"the model failed on this batch ({error})"))
            return
        self._deliver(adapter, events)
        with self._changed:
            self._load.steps += 1
            self._load.rows_stepped += rows
            self._load.step_seconds += time.monotonic() - started

    def _deliver(self, adapter: str | None, events: Sequence[TokenEvent]) -> None:
        mine: dict[int, list[TokenEvent]] = {}
        for event in events:
            mine.setdefault(event.prompt, []).append(event)
        jobs, done = self._running[adapter], set()
        for key, some in mine.items():
            job = jobs[key]
            job.rows_left -= sum(bool(event.finish_reason) for event in some)
            if not job.rows_left:
                done.add(key)
            job.report(some)
        if done:
            self._forget(adapter, done)

    def _fail(self, jobs: Sequence[Job], failure: EngineFailure) -> None:
        for job in jobs:
            job.report(failure)

    def _report_error(self, error: Exception) -> None:
        traceback.print_exception(error, file=sys.stderr)

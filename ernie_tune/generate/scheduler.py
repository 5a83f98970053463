"""Iteration-level batching: prompts join the running batch between two tokens and leave when they
are done.

Each adapter has its own batch, and each step gives every batch one token, so no adapter waits for
another to finish. Prompts are let in as they came; none overtakes. What happens follows from what
was submitted and cancelled alone: no thread, no clock, the same decisions on every rank. Refuses to
know: HTTP, threads, text.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ernie_tune.config.language import say
from ernie_tune.generate.batch import Completion, Decode, Partial, Prompt, RunningBatch, TokenEvent, eval_mode, failed
from ernie_tune.generate.load import TurnLoad
from ernie_tune.generate.pooling import mean_states
from ernie_tune.models.cache import cache_of
from ernie_tune.models.config import TokenIds
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import Row
from ernie_tune.peft.model import PeftModel

# What a model can raise for one batch without the process being lost: a device out of memory, a
# shape that slipped through.
STEP_ERRORS = (ValueError, RuntimeError, MemoryError, IndexError, OSError)

# The name under which a PeftModel answers without any of its adapters.
BASE = ""


@dataclass(frozen=True)
class Capacity:
    """What may run at once. `cache_tokens`: what the caches of all adapters may come to hold (None:
    no limit): on the CPU each prompt once and the answers of its samples at their longest,
    elsewhere rows times the longest row. `prefill_tokens`: prompts let in between two steps (at
    least one is).
    """

    rows: int = 64
    cache_tokens: int | None = None
    prefill_tokens: int = 8192


@dataclass(eq=False)
class _Asked:
    prompt: Prompt
    adapter: str | None
    left: set[int]  # samples that have not ended
    partials: Sequence[Partial] = ()  # those that go on, each by itself

    @property
    def num_tokens(self) -> int:
        """Tokens to prefill."""
        length = len(self.prompt.row.input_ids_L)
        return sum(length + len(one.done.token_ids) for one in self.partials) or length

    @property
    def sizes(self) -> list[tuple[int, int, int]]:
        """What it takes in a cache, as `Cache.tokens` counts."""
        length, answer = len(self.prompt.row.input_ids_L), self.prompt.params.max_new_tokens
        return [(length, 1, answer) for _ in self.left] if self.partials else [(length, len(self.left), answer)]


class Scheduler:
    """Runs prompts in turns: `step` until nothing is left. The caller puts the model into eval mode
    (`eval_mode`).
    """

    def __init__(
        self,
        model: ErnieModel,
        tokens: TokenIds,
        capacity: Capacity | None = None,
        decode: Decode | None = None,
        position_rule: str = "paddle",
    ) -> None:
        """`decode`: token ids to text, needed for stop strings."""
        self.model, self.capacity = model, capacity or Capacity()
        self._batch_settings = tokens, decode, position_rule
        self._asked: dict[int, _Asked] = {}  # by key, until they are done
        self._waiting: deque[_Asked] = deque()
        self._batches: dict[str | None, RunningBatch] = {}
        self._running: dict[str | None, dict[int, _Asked]] = {}
        self.load = TurnLoad()

    @property
    def waiting(self) -> int:
        """Prompts that have not been let in."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Samples that are being continued."""
        return sum(len(one.left) for some in self._running.values() for one in some.values())

    def __len__(self) -> int:
        """Prompts that are not done."""
        return len(self._asked)

    def check(self, prompt: Prompt) -> None:
        """Refuse what could never be let in. Raises ValueError."""
        self._check(_Asked(prompt, None, set(range(prompt.params.n))))

    def _check(self, one: _Asked) -> None:
        n, need, limit = len(one.left), self._tokens([one]), self.capacity.cache_tokens
        if n > self.capacity.rows:
            raise ValueError(
                say(
                    f"n ({n}) must be at most the server's max_num_seqs ({self.capacity.rows}); ask for fewer",
                    f"n（{n}）不能超过服务器的 max_num_seqs（{self.capacity.rows}）；请减少",
                )
            )
        if limit is not None and need > limit:
            raise ValueError(
                say(
                    f"tokens of the prompt and of n answers of max_tokens ({need}) must be at most the server's cache_tokens ({limit}); lower max_tokens or n",
                    f"提示与 n 个长为 max_tokens 的回答的 token 总数（{need}）不能超过服务器的 cache_tokens（{limit}）；请减小 max_tokens 或 n",
                )
            )
        self._batch().check(one.prompt)

    def submit(self, prompt: Prompt, adapter: str | None = None) -> None:
        """Queue a prompt; `adapter`: with which one of a PeftModel, `BASE` with none, None as the
        model stands. Raises ValueError as `check`, and for a key that is in use.
        """
        self.check(prompt)
        self._queue(_Asked(prompt, adapter, set(range(prompt.params.n))))

    def resume(self, partials: Sequence[Partial], adapter: str | None = None) -> None:
        """Queue samples that were taken out; their events go on where they stopped. Raises
        ValueError as `submit`: samples of one prompt go on together, when no other of its samples
        runs.
        """
        by_key: dict[int, list[Partial]] = {}
        for one in partials:
            by_key.setdefault(one.prompt.key, []).append(one)
        for some in by_key.values():
            asked = _Asked(some[0].prompt, adapter, {one.sample for one in some}, some)
            self._check(asked)
            self._queue(asked)

    def abort(self, keys: Collection[int]) -> list[Partial]:
        """`cancel`, and what each sample that had not ended has come to. Fine for keys of prompts
        that are done.
        """
        out: list[Partial] = []
        for one in self._waiting:
            if one.prompt.key in keys:
                out += one.partials or [Partial(one.prompt, s, Completion()) for s in sorted(one.left)]
        for batch in self._batches.values():
            out += batch.partials(keys)
        self.cancel(keys)
        return out

    def _queue(self, one: _Asked) -> None:
        key = one.prompt.key
        if key in self._asked:
            raise ValueError(
                say(
                    f"key ({key}) must be new, a prompt with it is not done; number prompts apart",
                    f"键（{key}）须是新的，使用它的提示尚未完成；请给各提示不同的编号",
                )
            )
        self._asked[key] = one
        self._waiting.append(one)

    def cancel(self, keys: Collection[int]) -> None:
        """Take prompts out, wherever they are; no more events come of them. Fine for keys of
        prompts that are done.
        """
        waiting = {one.prompt.key for one in self._waiting} & set(keys)
        self._waiting = deque(one for one in self._waiting if one.prompt.key not in waiting)
        for key in waiting:
            del self._asked[key]
        for adapter, some in [*self._running.items()]:
            if mine := some.keys() & set(keys):
                self._batches[adapter].drop(mine)
                self._forget(adapter, mine)

    def step(self) -> list[TokenEvent]:
        """Let in what fits, then one token for every row. A prompt or a batch on which the model
        fails ends with events that carry the error.
        """
        events: list[TokenEvent] = []
        began, entering = time.perf_counter(), self._admit()
        rows = self.running
        for adapter in [*self._running]:
            with self._acting(adapter):
                events += self._join(adapter, [one for one in entering if one.adapter == adapter])
                events += self._step(adapter)
        self.load.turn(rows, self.waiting, self.capacity.rows, time.perf_counter() - began)
        return events

    def mean_states(self, rows: Sequence[Row], adapter: str | None, begin_id: int) -> np.ndarray:
        """`pooling.mean_states` of rows with one of the adapters, named as in `submit`, between two
        steps. What the model raises goes through; what runs is not touched.
        """
        with self._acting(adapter):
            return mean_states(self.model, rows, self._batch_settings[0], begin_id)

    def _batch(self) -> RunningBatch:
        return RunningBatch(self.model, *self._batch_settings)

    def _forget(self, adapter: str | None, keys: Collection[int]) -> None:
        some = self._running[adapter]
        for key in keys:
            del some[key], self._asked[key]
        if not some:
            del self._running[adapter]
            self._batches.pop(adapter, None)

    def _admit(self) -> list[_Asked]:
        """Prompts from the head of the queue, as many as fit; they count as running from now on."""
        entering: list[_Asked] = []
        prefill = 0
        while self._waiting:
            one = self._waiting[0]
            prefill += one.num_tokens
            if (entering and prefill > self.capacity.prefill_tokens) or not self._fits(one):
                break
            self._running.setdefault(one.adapter, {})[one.prompt.key] = one
            self.load.computed += one.num_tokens
            self.load.asked += one.num_tokens if one.partials else one.num_tokens * len(one.left)
            entering.append(self._waiting.popleft())
        return entering

    def _fits(self, one: _Asked) -> bool:
        total_rows = total_tokens = 0
        for adapter in {one.adapter, *self._running}:
            some = [*self._running.get(adapter, {}).values(), *([one] if adapter == one.adapter else [])]
            total_rows += sum(len(each.left) for each in some)
            total_tokens += self._tokens(some)
        limit = self.capacity.cache_tokens
        return total_rows <= self.capacity.rows and (limit is None or total_tokens <= limit)

    def _tokens(self, some: Sequence[_Asked]) -> int:
        """Tokens that these may come to hold in one cache."""
        return cache_of(self.model.compute_dtype).tokens(size for each in some for size in each.sizes)

    @contextlib.contextmanager
    def _acting(self, adapter: str | None) -> Iterator[None]:
        """Let one adapter act, or none."""
        model = self.model
        if adapter is None or not isinstance(model, PeftModel):
            yield
        elif adapter != BASE:
            if model.active != adapter:
                model.set_adapter(adapter)
            yield
        else:
            with model.disable_adapter() if model.active is not None else contextlib.nullcontext():
                yield

    def _join(self, adapter: str | None, entering: Sequence[_Asked]) -> list[TokenEvent]:
        if not entering:
            return []
        batch = self._batches.setdefault(adapter, self._batch())
        try:
            partials = [partial for one in entering for partial in one.partials]
            batch.join([one.prompt for one in entering if not one.partials], partials)
        except STEP_ERRORS as error:
            if len(entering) > 1:  # one of them spoils it: find out which
                return [event for one in entering for event in self._join(adapter, [one])]
            self._forget(adapter, {entering[0].prompt.key})
            return _failures(entering, error)
        return []

    def _step(self, adapter: str | None) -> list[TokenEvent]:
        if adapter not in self._running:
            return []
        try:
            events = self._batches[adapter].step()
        except STEP_ERRORS as error:
            some = [*self._running[adapter].values()]
            self._forget(adapter, {one.prompt.key for one in some})
            return _failures(some, error)
        running, done = self._running[adapter], set()
        for event in events:
            one = running[event.prompt]
            if event.finish_reason:
                one.left.discard(event.sample)
            if not one.left:
                done.add(event.prompt)
        self._forget(adapter, done)
        return events


def _failures(some: Sequence[_Asked], error: Exception) -> list[TokenEvent]:
    return [failed(one.prompt, sample, error) for one in some for sample in sorted(one.left)]


def complete(
    scheduler: Scheduler,
    prompts: Iterable[Prompt],
    partials: Sequence[Partial] = (),
    over: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[int, list[Completion]]]:
    """(key, completions) of prompts, as they finish, `params.n` of each; of `partials` those of the
    samples that go on, whole, in the order of the samples. Whatever else the scheduler holds goes
    on with them, unreported. Once it is `over`, what is left is given as it is: answers that did
    not end are cut off ("length"), some perhaps before their first token.

    Raises ValueError as `Scheduler.submit`, and what the model raised. However it ends, none of the
    prompts is left in the scheduler.
    """
    found: dict[int, dict[int, Completion]] = {}
    try:
        for prompt in prompts:
            scheduler.submit(prompt)
            found[prompt.key] = {sample: Completion() for sample in range(prompt.params.n)}
        scheduler.resume(partials)
        for one in sorted(partials, key=lambda one: one.sample):
            found.setdefault(one.prompt.key, {})[one.sample] = copy.deepcopy(one.done)
        with eval_mode(scheduler.model):
            while found and not over():
                yield from _finished(scheduler.step(), found, scheduler.load)
        for key, samples in [*found.items()]:
            for done in samples.values():
                scheduler.load.cut += not done.finish_reason
                done.finish_reason = done.finish_reason or "length"
            scheduler.cancel({key})
            yield key, [*found.pop(key).values()]
    finally:
        scheduler.cancel(found.keys())


def _finished(
    events: Iterable[TokenEvent], found: dict[int, dict[int, Completion]], load: TurnLoad
) -> Iterator[tuple[int, list[Completion]]]:
    for event in events:
        if event.prompt not in found:
            continue
        if event.error is not None:
            raise event.error
        samples = found[event.prompt]
        samples[event.sample].add(event)
        load.longest = max(load.longest, len(samples[event.sample].token_ids))
        if all(one.finish_reason for one in samples.values()):
            yield event.prompt, [*found.pop(event.prompt).values()]

"""Many questions as a stream: answered together, given back in their order, with bounded memory.

Of a file of any length only a few batches are held: rows are read, and their pictures cut, as the
scheduler has room for them. A question that cannot be asked is given back as its error, in its
place; it costs no other its answer. Refuses to know: files, where an earlier run stopped, HTTP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ernie_tune.generate.batch import Completion, eval_mode
from ernie_tune.generate.engine import Answer, Engine, Prepared, Request
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.generate.scheduler import Capacity, Scheduler

Asked = Request | ValueError | OSError
Outcome = list[Answer] | Exception
_AHEAD = 4  # batches of questions that may be under way while the first of them is not done


def in_order(
    engine: Engine, asked: Iterable[Asked], params: SamplingParams, rows: int = 64, first: int = 0
) -> Iterator[Outcome]:
    """For each of `asked`, in order, its `params.n` answers or why there are none (an error among
    `asked` comes back as it is). `rows`: samples computed at once, at least n. `first`: the number
    of the first question; question i draws from the seed (seed, i, sample), so that a run that goes
    on in the middle answers as one that was never stopped.
    """
    yield from _Stream(engine, iter(asked), params, max(rows, params.n), first)


class _Stream:
    def __init__(self, engine: Engine, asked: Iterator[Asked], params: SamplingParams, rows: int, first: int) -> None:
        self.engine, self.asked, self.params = engine, asked, params
        self.prompts = max(1, rows // params.n)  # that fit at once
        self.scheduler: Scheduler = engine.scheduler(Capacity(rows=rows))
        self.next = self.taken = first  # the number to give back next, and that to read next
        self.over = False
        self.prepared: dict[int, Prepared] = {}
        self.found: dict[int, list[Completion]] = {}
        self.outcomes: dict[int, Outcome] = {}

    def __iter__(self) -> Iterator[Outcome]:
        try:
            while True:
                self._fill()
                while self.next in self.outcomes:
                    yield self.outcomes.pop(self.next)
                    self.next += 1
                    self._fill()
                if not len(self.scheduler):
                    return
                with eval_mode(self.engine.model):
                    self._step()
        finally:
            self.scheduler.cancel(self.prepared.keys())

    def _fill(self) -> None:
        """Read on while the scheduler has nothing waiting and not too much is under way."""
        while not self.over and self.scheduler.waiting < self.prompts:
            if self.taken - self.next >= _AHEAD * self.prompts:
                return
            one = next(self.asked, None)
            if one is None:
                self.over = True
                return
            number, self.taken = self.taken, self.taken + 1
            if isinstance(one, Exception):
                self.outcomes[number] = one
                continue
            try:
                prepared = self.engine.prepare(one, self.params, number, number)
                self.scheduler.submit(prepared.prompt)
            except (ValueError, OSError) as error:
                self.outcomes[number] = error
                continue
            self.prepared[number] = prepared
            self.found[number] = [Completion() for _ in range(self.params.n)]

    def _step(self) -> None:
        for event in self.scheduler.step():
            key = event.prompt
            if key not in self.found:
                continue
            if event.error is not None:
                self.outcomes[key] = event.error
                self.scheduler.cancel({key})
                del self.found[key], self.prepared[key]
                continue
            samples = self.found[key]
            samples[event.sample].add(event)
            if all(one.finish_reason for one in samples):
                prepared = self.prepared.pop(key)
                self.outcomes[key] = [self.engine.read(one, prepared) for one in self.found.pop(key)]

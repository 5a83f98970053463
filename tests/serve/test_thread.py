"""serve/thread.py by itself: what runs at once, whose answer is whose, what a cancellation, a
failure and the end do.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from live import until
from support.tiny_runs import processor

from ernie_tune.generate.batch import RunningBatch, generate
from ernie_tune.generate.engine import Engine, Request
from ernie_tune.generate.scheduler import Capacity
from ernie_tune.serve.thread import EngineEnded, EngineFailure, SchedulerThread, Submission


@pytest.fixture
def engine(golden_model: Any) -> Engine:
    return Engine(golden_model("tiny-a"), processor())


class Seen:
    """Watches a scheduler's batches: their sizes and columns at every step, and what joined
    together.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        self.joined: list[list[int]] = []
        step, join = RunningBatch.step, RunningBatch.join

        def stepping(batch: RunningBatch) -> Any:
            self.rows.append(len(batch))
            return step(batch)

        def joining(batch: RunningBatch, prompts: Any, *more: Any) -> None:
            self.joined.append([p.key for p in prompts])
            join(batch, prompts, *more)

        monkeypatch.setattr(RunningBatch, "step", stepping)
        monkeypatch.setattr(RunningBatch, "join", joining)


class Reports:
    """What came back, by key."""

    def __init__(self) -> None:
        self.events: dict[int, list[Any]] = {}
        self.order: list[int] = []
        self.done = threading.Event()
        self.left = 0

    def job(
        self, engine: Engine, key: int, words: int, tokens: int, adapter: str | None = None, **params: Any
    ) -> Submission:
        asked = Request([{"role": "user", "content": "why " * words}])
        prepared = engine.prepare(asked, engine.params(max_new_tokens=tokens, **params), key)
        self.left += 1

        def report(news: Any) -> None:
            if isinstance(news, Exception):
                self.events[key] = [news]
            else:
                self.events.setdefault(key, []).extend(news)
            if isinstance(news, Exception) or not job.rows_left:
                self.order.append(key)
                self.left -= 1
                if not self.left:
                    self.done.set()

        job = Submission(prepared, adapter, report)
        return job


def columns(job: Submission) -> int:
    """Tokens that one row may come to."""
    return job.prepared.num_tokens + job.prepared.prompt.params.max_new_tokens


@contextmanager
def running(engine: Engine, capacity: Capacity, jobs: list[Submission]) -> Iterator[SchedulerThread]:
    """A scheduler whose queue holds `jobs` before its first turn."""
    scheduler = SchedulerThread(engine, capacity)
    with scheduler._changed:
        scheduler.start()
        for job in jobs:
            scheduler.check(job)
            scheduler.submit(job)
    try:
        yield scheduler
    finally:
        scheduler.close()
        assert not scheduler.alive


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_answers_do_not_depend_on_what_runs_beside_them(
    rows: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, reports = Seen(monkeypatch), Reports()
    jobs = [reports.job(engine, i, 1 + 5 * (i % 4), 3 + 4 * (i % 3)) for i in range(8)]
    with running(engine, Capacity(rows=rows), jobs):
        assert reports.done.wait(60)
    assert max(seen.rows) == min(rows, 8)
    for job in jobs:
        prompt = job.prepared.prompt
        alone = generate(engine.model, [prompt.row], engine.processor.tokens, prompt.params)[0][0]
        assert [e.token_id for e in reports.events[job.key]] == alone.token_ids
        np.testing.assert_allclose([e.logp for e in reports.events[job.key]], alone.logps, atol=1e-5)
    if rows == 1:
        assert reports.order == [job.key for job in jobs], "first come, first served"


def test_the_cache_never_holds_more_than_its_budget(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long request waits until the short ones are gone, and what comes after it waits too."""
    seen, reports = Seen(monkeypatch), Reports()
    jobs = [reports.job(engine, i, 1, 6) for i in range(4)]
    jobs.append(reports.job(engine, 9, 90, 6))
    jobs.append(reports.job(engine, 10, 1, 6))
    budget = columns(jobs[4]) + columns(jobs[5]) - 1
    assert 4 * columns(jobs[0]) <= columns(jobs[4])
    with running(engine, Capacity(cache_tokens=budget), jobs):
        assert reports.done.wait(60)
    assert seen.joined == [[0, 1, 2, 3], [9], [10]]
    assert reports.order == [0, 1, 2, 3, 9, 10]


def test_samples_count_as_rows_and_prompts_are_let_in_by_portions(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, reports = Seen(monkeypatch), Reports()
    jobs = [reports.job(engine, i, 4, 5, temperature=1.0, n=2) for i in range(3)]
    size = jobs[0].prepared.num_tokens
    with running(engine, Capacity(rows=5, prefill_tokens=size), jobs):
        assert reports.done.wait(60)
    assert seen.joined == [[0], [1], [2]], "each prompt alone is as much as one turn takes"
    assert max(seen.rows) == 4, "a third pair does not fit into five rows"
    assert all({e.sample for e in reports.events[i]} == {0, 1} for i in range(3))


def test_cancelled_jobs_report_nothing_more(engine: Engine) -> None:
    reports = Reports()
    stays, goes, waits = (reports.job(engine, i, 1, tokens) for i, tokens in enumerate((20, 3000, 5)))
    with running(engine, Capacity(rows=2), [goes, stays, waits]) as scheduler:
        scheduler.cancel(waits)
        until(lambda: reports.events.get(goes.key))
        scheduler.cancel(goes)
        until(lambda: not scheduler.load().running)
        assert len(reports.events[stays.key]) == 20 or reports.events[stays.key][-1].finish_reason == "stop"
        assert len(reports.events[goes.key]) < 3000
        assert waits.key not in reports.events
        scheduler.cancel(stays)  # done long ago: nothing happens
        again = reports.job(engine, 7, 1, 2)
        scheduler.submit(again)
        until(lambda: reports.events.get(7) and not scheduler.load().running)
        assert scheduler.load().waiting == 0


def test_the_end_tells_everybody(engine: Engine) -> None:
    reports = Reports()
    jobs = [reports.job(engine, i, 1, 3000) for i in range(2)]
    with running(engine, Capacity(rows=1), jobs) as scheduler:
        until(lambda: reports.events.get(0))
    assert [type(reports.events[i][-1]) for i in range(2)] == [EngineEnded, EngineEnded]
    with pytest.raises(EngineEnded, match="no longer running"):
        scheduler.submit(jobs[0])


def test_what_can_never_run_is_refused(engine: Engine) -> None:
    scheduler, reports = SchedulerThread(engine, Capacity(rows=2, cache_tokens=100)), Reports()
    with pytest.raises(ValueError, match=r"n \(3\) must be at most the server's max_num_seqs \(2\)"):
        scheduler.check(reports.job(engine, 0, 1, 2, temperature=1.0, n=3))
    with pytest.raises(ValueError, match=r"must be at most the server's cache_tokens \(100\)"):
        scheduler.check(reports.job(engine, 0, 1, 200))
    with pytest.raises(ValueError, match="must not exceed max_position_embeddings"):
        SchedulerThread(engine, Capacity()).check(reports.job(engine, 0, 1, 4096))


def test_a_row_that_fails_fails_its_request_alone(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    reports = Reports()
    fine, bad = reports.job(engine, 1, 1, 6), reports.job(engine, 2, 1, 6, temperature=1.0, n=2)
    calls: list[int] = []

    def steer() -> Any:
        calls.append(1)
        return (lambda _: {}["x"]) if len(calls) == 2 else lambda _: None  # the second sample only

    bad.prepared = replace(bad.prepared, prompt=replace(bad.prepared.prompt, steer=steer))
    with running(engine, Capacity(rows=4), [fine, bad]) as thread:
        assert reports.done.wait(60)
        until(lambda: not thread.load().running)
    assert [type(news) for news in reports.events[2]] == [EngineFailure]
    assert "KeyError" in capfd.readouterr().err
    alone = generate(engine.model, [fine.prepared.prompt.row], engine.processor.tokens, fine.prepared.prompt.params)
    assert [e.token_id for e in reports.events[1]] == alone[0][0].token_ids

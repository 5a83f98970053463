"""generate/scheduler.py: who is let in when, answers that do not depend on it, and failures that
stay with whom they belong to.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from weights import case_rows

from ernie_tune.generate import scheduler as scheduler_module
from ernie_tune.generate.batch import Completion, Prompt, RunningBatch, TokenEvent, generate
from ernie_tune.generate.load import TurnLoad
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.generate.scheduler import Capacity, Scheduler, complete
from ernie_tune.models.cache import KVCache
from ernie_tune.models.inputs import Row
from ernie_tune.models.segments import Segment, SegmentCache

WORDS = Row(np.array([1, 5, 6, 9]))


@pytest.fixture
def model(golden_model: Any) -> Any:
    return golden_model("tiny-b")


def scheduler_of(model: Any, decode: Callable[[list[int]], str] | None = None, **capacity: Any) -> Scheduler:
    return Scheduler(model, model.config.tokens, Capacity(**capacity), decode)


def run(scheduler: Scheduler) -> dict[tuple[int, int], list[TokenEvent]]:
    out: dict[tuple[int, int], list[TokenEvent]] = {}
    while len(scheduler):
        for event in scheduler.step():
            out.setdefault((event.prompt, event.sample), []).append(event)
    return out


@pytest.mark.parametrize(("rows", "prefill"), [(3, 8192), (4, 1), (64, 60), (64, 8192)])
def test_completions_do_not_depend_on_what_runs_beside_them(rows: int, prefill: int, model: Any, golden: Any) -> None:
    data = golden("tiny_b")
    params = [
        SamplingParams(max_new_tokens=9),
        SamplingParams(max_new_tokens=4, temperature=1.0, n=3, seed=3),
        SamplingParams(max_new_tokens=6, temperature=0.8, top_p=0.9, seed=4),
        SamplingParams(max_new_tokens=2),
    ]
    cases = [case_rows(data, case)[0] for case in ("text", "image", "video", "mixed")]
    prompts = [Prompt(row, p, key=7 * i, index=i) for i, (row, p) in enumerate(zip(cases, params, strict=True))]
    model.train()
    found = dict(complete(scheduler_of(model, rows=rows, prefill_tokens=prefill), prompts[::-1]))
    assert model.training, "the mode is put back"
    for prompt in prompts:
        batch, alone = RunningBatch(model, model.config.tokens), [Completion() for _ in range(prompt.params.n)]
        model.eval()
        batch.join([prompt])
        while len(batch):
            for event in batch.step():
                alone[event.sample].add(event)
        assert [c.token_ids for c in found[prompt.key]] == [c.token_ids for c in alone]
        assert [c.finish_reason for c in found[prompt.key]] == ["length"] * prompt.params.n
        for got, want in zip(found[prompt.key], alone, strict=True):
            np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)
            assert got.sampled == [True] * len(got.token_ids)


def test_a_prompt_counts_once_however_many_samples_it_has(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 tokens and 3 answers of 5 are 19 where segments are shared, 27 in padded rows; two such
    prompts wait for each other below twice that.
    """
    prompts = [Prompt(WORDS, SamplingParams(max_new_tokens=5, temperature=1.0, n=3), key) for key in range(2)]
    for cache, size in ((SegmentCache, 19), (KVCache, 27)):
        monkeypatch.setattr(scheduler_module, "cache_of", lambda _, cache=cache: cache)
        with pytest.raises(ValueError, match=rf"\({size}\) must be at most the server's cache_tokens"):
            scheduler_of(model, cache_tokens=size - 1).submit(prompts[0])
        for limit, together in ((2 * size, 6), (2 * size - 1, 3)):
            scheduler = scheduler_of(model, cache_tokens=limit)
            for prompt in prompts:
                scheduler.submit(prompt)
            assert len(scheduler.step()) == together


def test_what_turns_computed_and_left_idle(model: Any) -> None:
    """Two prompts of four tokens, three answers of two and one of five, in room for eight; then a
    prompt that is ended from outside.
    """
    model.eval()
    scheduler = scheduler_of(model, rows=8)
    prompts = [
        Prompt(WORDS, SamplingParams(max_new_tokens=2, n=3, temperature=1.0), key=0, index=0),
        Prompt(WORDS, SamplingParams(max_new_tokens=5), key=1, index=1),
    ]
    list(complete(scheduler, prompts))
    found = scheduler.load.metrics()
    assert found["rollout/turns"] == 5
    assert found["rollout/slots_busy"] == pytest.approx((4 + 4 + 1 + 1 + 1) / (5 * 8))
    assert found["rollout/bubble"] == pytest.approx(1 - 11 / (5 * 4))
    assert found["rollout/prefill_tokens"] == 8
    assert found["rollout/prefix_hit_rate"] == pytest.approx(0.5)
    assert (found["rollout/longest"], found["rollout/aborted"], found["rollout/waiting"]) == (5, 0, 0)
    assert 0 < found["rollout/turn_ms_p50"] <= found["rollout/turn_ms_p99"]
    turns = iter([False, False, True])
    list(
        complete(
            scheduler,
            [Prompt(WORDS, SamplingParams(max_new_tokens=9, n=2, temperature=1.0), key=2, index=2)],
            over=lambda: next(turns),
        )
    )
    both = TurnLoad()
    both.add(scheduler.load)
    assert both.metrics()["rollout/aborted"] == 2
    assert TurnLoad().metrics() == {}


def test_prompts_come_out_as_they_finish_and_nothing_is_left(model: Any) -> None:
    scheduler = scheduler_of(model, rows=2)
    lengths = {1: 9, 2: 3, 3: 2}
    prompts = [Prompt(WORDS, SamplingParams(max_new_tokens=n), key) for key, n in lengths.items()]
    assert [key for key, _ in complete(scheduler, prompts)] == [2, 3, 1]
    assert (len(scheduler), scheduler.waiting, scheduler.running) == (0, 0, 0)
    for key, _ in complete(scheduler, prompts):
        assert key == 2
        break  # whoever stops listening leaves nothing behind
    assert (len(scheduler), scheduler.waiting, scheduler.running) == (0, 0, 0)
    assert scheduler.step() == []


def test_what_cannot_be_submitted(model: Any) -> None:
    scheduler = scheduler_of(model, rows=2, cache_tokens=20)
    scheduler.submit(Prompt(WORDS, SamplingParams(max_new_tokens=4), key=3))
    with pytest.raises(ValueError, match=r"key \(3\) must be new"):
        scheduler.submit(Prompt(WORDS, SamplingParams(max_new_tokens=4), key=3))
    with pytest.raises(ValueError, match=r"n \(3\) must be at most"):
        scheduler.submit(Prompt(WORDS, SamplingParams(max_new_tokens=1, temperature=1.0, n=3), key=4))
    with pytest.raises(ValueError, match=r"\(21\) must be at most the server's cache_tokens \(20\)"):
        scheduler.submit(Prompt(WORDS, SamplingParams(max_new_tokens=17), key=4))
    assert len(scheduler) == 1
    scheduler.cancel([3, 99])
    assert len(scheduler) == 0
    scheduler.submit(Prompt(WORDS, SamplingParams(max_new_tokens=4), key=3))
    assert len(run(scheduler)[3, 0]) == 4


@pytest.mark.parametrize("at", [0, 1, 4])
def test_an_aborted_sample_goes_on_as_if_nothing_had_happened(at: int, model: Any, golden: Any) -> None:
    """Greedy, sampled and penalised samples, forced tokens and constraints among them, with a
    picture; some had ended before.
    """
    row = case_rows(golden("tiny_b"), "image")[0]
    made: list[Evens] = []

    def steer() -> Callable[[Sequence[int]], int | None]:
        forced = iter([71, 72, 73])  # has a state of its own, as a thought's budget has
        return lambda so_far: next(forced, None) if len(so_far) >= 3 else None

    def constrain() -> Evens:
        return Evens(made, model.config.vocab_size)

    prompts = [
        Prompt(row, SamplingParams(max_new_tokens=9, temperature=1.0, n=3, seed=5), key=1, index=(4, 2)),
        Prompt(WORDS, SamplingParams(max_new_tokens=9), 2, steer=steer),
        Prompt(
            WORDS, SamplingParams(max_new_tokens=9, temperature=1.0, repetition_penalty=1.5), 3, constrain=constrain
        ),
        Prompt(WORDS, SamplingParams(max_new_tokens=2), 4),
    ]
    whole = dict(complete(scheduler_of(model), prompts))
    scheduler = scheduler_of(model)
    for prompt in prompts:
        scheduler.submit(prompt)
    for _ in range(at):
        scheduler.step()
    left = scheduler.abort([1, 2, 3, 4, 99])
    assert len(scheduler) == 0
    assert [(one.prompt.key, one.sample) for one in left] == [(1, 0), (1, 1), (1, 2), (2, 0), (3, 0), (4, 0)][
        : 6 - (at > 2)
    ]
    assert all(len(one.done.token_ids) == at for one in left)
    scheduler.resume(left)
    assert [one.done for one in scheduler.abort([1, 2, 3, 4])] == [one.done for one in left], "aborted while it waits"
    found = dict(complete(scheduler, [], left))
    for key, completions in found.items():
        for got, want in zip(completions, whole[key], strict=True):
            assert (got.token_ids, got.finish_reason, got.sampled) == (want.token_ids, want.finish_reason, want.sampled)
            np.testing.assert_allclose(got.logps, want.logps, atol=1e-5)
    assert len(found) == 4 - (at > 2)
    assert all(len(one.done.token_ids) == at for one in left), "what was handed back is the caller's"


def test_a_hundred_random_aborts_leave_nothing_behind(model: Any) -> None:
    """Prompts come, are taken out and go on at random: every answer is what it is undisturbed, the
    cache holds what lives and no more, and at the end no segment is left.
    """
    params = SamplingParams(max_new_tokens=12, temperature=1.0, n=2, seed=3)
    prompts = [Prompt(Row(np.array([1, 5, 6 + i, 9][: 2 + i % 3])), params, i, i) for i in range(6)]
    whole = dict(complete(scheduler_of(model), prompts))
    gc.collect()
    before = {id(one) for one in gc.get_objects() if isinstance(one, Segment)}
    rng, scheduler = np.random.default_rng(0), scheduler_of(model)
    waiting: list[Any] = []
    aborted = 0
    while aborted < 100:
        if len(scheduler) == 0 and not waiting:
            done = {p.key: {s: Completion() for s in range(2)} for p in prompts}
            for prompt in prompts:
                scheduler.submit(prompt)
        for event in scheduler.step():
            done[event.prompt][event.sample].add(event)
        keys = set(rng.choice(6, 2, replace=False).tolist())
        taken = scheduler.abort(keys)
        aborted += bool(taken)
        live = scheduler._batches.get(None)
        if live is not None and isinstance(live._cache, SegmentCache):
            most = sum(len(row.prompt.row.input_ids_L) + 12 for row in live._live)
            assert live._cache.num_tokens <= most
            assert len(live._cache) == len(live._live)
        waiting += taken
        if waiting and rng.random() < 0.5:
            for one in waiting:  # what it had come to is the caller's; its events go on behind
                assert one.done.token_ids == done[one.prompt.key][one.sample].token_ids
            scheduler.resume(waiting)
            waiting = []
        if len(scheduler) == 0 and not waiting:
            for key, some in whole.items():
                for sample, want in enumerate(some):
                    assert done[key][sample].token_ids == want.token_ids
    scheduler.abort(range(6))
    assert len(scheduler) == scheduler.running == scheduler.waiting == 0
    del scheduler, live, waiting, taken
    gc.collect()
    assert not {id(one) for one in gc.get_objects() if isinstance(one, Segment)} - before


def test_seeds_of_several_parts(model: Any) -> None:
    """(seed, round, prompt, sample) and nothing else: the same whatever the key and the neighbours
    are.
    """

    def of(key: int, index: Any, **more: Any) -> list[list[int]]:
        prompt = Prompt(WORDS, SamplingParams(max_new_tokens=6, temperature=1.5, n=2, **more), key, index)
        return [c.token_ids for c in dict(complete(scheduler_of(model), [prompt]))[key]]

    assert of(1, (3, 4)) == of(9, (3, 4))
    others = [of(1, (3, 5)), of(1, (4, 4)), of(1, (4, 3)), of(1, 3), of(1, (3, 4), seed=1)]
    assert len({str(x) for x in [of(1, (3, 4)), *others]}) == 6
    assert of(1, 3) == of(1, (3,))


class Evens:
    """Even tokens only; remembers what it was told."""

    def __init__(self, made: list[Evens], vocabulary: int, until: int = 99) -> None:
        made.append(self)
        self.told: list[int] = []
        self.mask, self.until = np.arange(vocabulary) % 2 == 0, until

    def allowed(self) -> np.ndarray | None:
        return self.mask if len(self.told) < self.until else np.zeros_like(self.mask)

    def accept(self, token_id: int) -> None:
        self.told.append(token_id)


@pytest.mark.parametrize("params", [
    SamplingParams(max_new_tokens=6), SamplingParams(max_new_tokens=6, temperature=2.0, n=3),
    SamplingParams(max_new_tokens=6, temperature=2.0, top_p=0.7, n=2), SamplingParams(max_new_tokens=6, temperature=1.5, top_k=9),
], ids=["greedy", "plain", "top_p", "top_k"])  # fmt: skip
def test_a_constraint_limits_each_sample_and_hears_of_every_token(params: SamplingParams, model: Any) -> None:
    made: list[Evens] = []
    vocabulary = model.config.vocab_size

    def steer() -> Callable[[Sequence[int]], int | None]:
        return lambda so_far: 77 if len(so_far) == 2 else None

    scheduler = scheduler_of(model)
    scheduler.submit(Prompt(WORDS, params, steer=steer, constrain=lambda: Evens(made, vocabulary)))
    scheduler.submit(Prompt(WORDS, params, key=1))
    events = run(scheduler)
    assert len(made) == params.n
    for sample in range(params.n):
        ids = [e.token_id for e in events[0, sample]]
        assert made[sample].told == ids
        assert ids[2] == 77
        assert [e.sampled for e in events[0, sample]] == [True, True, False, True, True, True]
        assert all(i % 2 == 0 for at, i in enumerate(ids) if at != 2)
    assert any(e.token_id % 2 for e in events[1, 0]), "the neighbour is free"


def out_of_memory(_: Any) -> Any:
    raise MemoryError


def broken(_: Any) -> Any:
    raise KeyError("of this row")


@pytest.mark.parametrize("what", ["steer", "constrain", "nothing allowed", "decode", "factory"])
def test_a_row_that_fails_takes_nobody_along(what: str, model: Any) -> None:
    made: list[Evens] = []
    greedy = SamplingParams(max_new_tokens=5)
    more: dict[str, Any] = {
        "steer": {"steer": lambda: lambda so_far: broken(so_far) if len(so_far) == 2 else None},
        "constrain": {"constrain": lambda: type("C", (), {"allowed": broken, "accept": broken})()},
        "nothing allowed": {"constrain": lambda: Evens(made, model.config.vocab_size, until=2)},
        "decode": {"params": SamplingParams(max_new_tokens=5, stop_strings=("x",))},
        "factory": {"steer": lambda: broken(0)},
    }[what]
    scheduler = scheduler_of(model, decode=broken)
    scheduler.submit(Prompt(WORDS, greedy, key=1))
    scheduler.submit(Prompt(WORDS, **{"params": greedy, "key": 2, **more}))
    scheduler.submit(Prompt(Row(np.array([3, 4])), greedy, key=3))
    events = run(scheduler)
    last = events[2, 0][-1]
    assert (last.finish_reason, last.token_id, last.sampled) == ("error", -1, False)
    assert isinstance(last.error, ValueError if what == "nothing allowed" else KeyError)
    assert len(events[2, 0]) == {"steer": 3, "nothing allowed": 3}.get(what, 1)
    for key, row in ((1, WORDS), (3, Row(np.array([3, 4])))):
        want = generate(model, [row], model.config.tokens, greedy)[0][0]
        assert [e.token_id for e in events[key, 0]] == want.token_ids
    with pytest.raises(type(last.error)):
        list(complete(scheduler, [Prompt(WORDS, **{"params": greedy, "key": 2, **more})]))
    assert len(scheduler) == 0


def test_a_batch_that_fails_ends_its_prompts_with_the_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = scheduler_of(model)
    for key, n in ((1, 2), (2, 1)):
        params = SamplingParams(max_new_tokens=4, temperature=1.0, n=n)
        scheduler.submit(Prompt(WORDS, params, key))
    assert len(scheduler.step()) == 3
    with monkeypatch.context() as patch:
        patch.setattr(RunningBatch, "_advance", out_of_memory)
        events = scheduler.step()
    assert [(e.prompt, e.sample, e.finish_reason) for e in events] == [
        (1, 0, "error"),
        (1, 1, "error"),
        (2, 0, "error"),
    ]
    assert all(isinstance(e.error, MemoryError) for e in events)
    assert len(scheduler) == 0
    scheduler.submit(Prompt(WORDS, SamplingParams(max_new_tokens=4), key=1))
    assert len(run(scheduler)[1, 0]) == 4


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", ""])
def test_stop_strings_that_no_text_can_hold(text: str) -> None:
    with pytest.raises(ValueError, match=r"stop_strings \('.*'\) must be text, not empty, without half a surrogate"):
        SamplingParams(stop_strings=("fine", text))
    assert SamplingParams(stop_strings=("鱻", "ab")).stop_bytes == 3

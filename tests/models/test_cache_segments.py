"""models/segments.py against the padded cache, by bytes, by what is left as rows come and go."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import paddle
import pytest
from weights import case_rows

from ernie_tune.generate import batch as batch_module
from ernie_tune.generate.batch import Prompt, RunningBatch, generate
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models import mkl
from ernie_tune.models.cache import KVCache, cache_of
from ernie_tune.models.inputs import Row
from ernie_tune.models.segments import FIRST_TOKENS, SegmentCache

pytestmark = pytest.mark.skipif(not mkl.usable("float32"), reason="needs Paddle's math library for x86")


class Pair:
    """The padded cache and the segments, given the same keys and values. Shapes: K=2, H=8, G=3, two
    layers.
    """

    def __init__(self, dtype: str) -> None:
        self.rng, self.dtype = np.random.default_rng(0), dtype
        self.caches: list[Any] = []

    def draw(self, *shape: int) -> paddle.Tensor:
        return paddle.to_tensor(self.rng.standard_normal(shape), self.dtype)

    def filled(self, *lengths: int) -> list[Any]:
        caches: list[Any] = [KVCache(2), SegmentCache(2)]
        offsets = tuple(np.cumsum([0, *lengths]).tolist())
        for layer in range(2):
            k, v = self.draw(offsets[-1], 2, 8), self.draw(offsets[-1], 2, 8)
            for cache in caches:
                cache.fill(layer, k, v, offsets)
        for cache in caches:
            cache.prefilling = False
        return caches

    def step(self) -> None:
        rows = len(self.caches[1])
        for layer in range(2):
            q, k, v = self.draw(rows, 6, 8), self.draw(rows, 2, 8), self.draw(rows, 2, 8)
            padded, segments = (cache.attend(layer, q, k, v).numpy() for cache in self.caches)
            tight = 2e-6 if self.dtype == "float32" else 2e-14
            np.testing.assert_allclose(segments, padded, atol=tight * 3, rtol=tight)
        for cache in self.caches:
            cache.advance()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_attention_is_that_of_the_padded_cache(dtype: str) -> None:
    """Rows of a prompt in common, rows that join and leave, segments that grow twice, one row
    alone.
    """
    pair = Pair(dtype)
    pair.caches = pair.filled(5, 1, 40)
    for cache in pair.caches:
        cache.select([0, 0, 0, 1, 2, 2])
    for at in range(2 * FIRST_TOKENS + 3):
        if at == 2:
            for cache, more in zip(pair.caches, pair.filled(9, 150), strict=True):
                cache.join(more)
        if at in (3, 20):
            for cache in pair.caches:
                cache.select([0, 2, 3, 5, 7] if at == 3 else [1, 3, 4])
        pair.step()
    for cache in pair.caches:
        cache.select([1])
    pair.step()


def test_samples_of_one_prompt_hold_it_once() -> None:
    """8 samples of 1,000 tokens, 16 tokens each: at most 15 % of what copies take."""
    pair = Pair("float32")
    pair.caches = pair.filled(1000)
    for cache in pair.caches:
        cache.select([0] * 8)
    for _ in range(16):
        pair.step()
    padded, segments = pair.caches
    copies = sum(x.numel().item() * 4 for x in (*padded.keys, *padded.values))
    assert segments.num_bytes <= 0.15 * copies
    assert segments.num_tokens == 1000 + 8 * 16


def test_nothing_moves_when_rows_join_and_leave() -> None:
    pair = Pair("float32")
    cache = pair.filled(7, 300, 4)[1]
    memory = [(row.prompt.memory, row.own.memory) for row in cache._rows]
    other = pair.filled(20, 2)[1]
    more = [(row.prompt.memory, row.own.memory) for row in other._rows]
    cache.join(other)
    cache.select([1, 2, 4])
    want = [memory[1], memory[2], more[1]]
    for row, (prompt, own) in zip(cache._rows, want, strict=True):
        assert row.prompt.memory is prompt
        assert row.own.memory is own


def test_answers_are_those_of_the_padded_cache(golden_model: Any, golden: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    rows = [case_rows(data, case)[0] for case in ("image", "text", "video")]
    assert cache_of("float32") is SegmentCache
    for params in (SamplingParams(max_new_tokens=20), SamplingParams(max_new_tokens=20, temperature=1.0, n=4, seed=2)):
        shared = generate(model, rows, model.config.tokens, params)
        with monkeypatch.context() as patch:
            patch.setattr(batch_module, "cache_of", lambda _: KVCache)
            copied = generate(model, rows, model.config.tokens, params)
        for some, others in zip(shared, copied, strict=True):
            assert [c.token_ids for c in some] == [c.token_ids for c in others]
            for one, other in zip(some, others, strict=True):
                np.testing.assert_allclose(one.logps, other.logps, atol=1e-5)


def test_a_hundred_aborts_leave_nothing_behind(golden_model: Any) -> None:
    """Prompts with samples come and are dropped at random; what is held is what lives, and in the
    end nothing is.
    """
    model, rng = golden_model("tiny-b"), np.random.default_rng(1)
    batch, alive, key, seen = RunningBatch(model, model.config.tokens), {}, 0, []
    aborts = 0
    while aborts < 100:
        if len(alive) < 4:
            length, n = int(rng.integers(1, 30)), int(rng.integers(1, 5))
            params = SamplingParams(max_new_tokens=40, temperature=1.0, n=n)
            batch.join([Prompt(Row(rng.integers(3, 500, length)), params, key)])
            alive[key] = [length, n, 0]
            key += 1
        for event in batch.step():
            alive[event.prompt][2] += event.sample == 0
            assert not event.finish_reason
        if rng.random() < 0.8:
            gone = int(rng.choice([*alive]))
            batch.drop([gone])
            del alive[gone]
            aborts += 1
        cache: Any = batch._cache
        if cache is not None:
            # The newest token of each sample is written when it is read, with the next step.
            assert cache.num_tokens == sum(length + n * (steps - 1) for length, n, steps in alive.values())
            seen += [weakref.ref(segment.memory) for segment in cache._segments()]
        del cache
        if any(steps >= 38 for _, _, steps in alive.values()):
            batch.drop([*alive])
            alive.clear()
    batch.drop([*alive])
    assert len(batch) == 0
    assert batch._cache is None
    assert len(seen) > 100
    assert not any(ref() is not None for ref in seen)

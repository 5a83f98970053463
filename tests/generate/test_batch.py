"""Cached decoding against transformers' tokens, against uncached decoding, and row against batch;
sampling against closed forms.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import paddle
import pytest
from weights import case_rows

from ernie_tune.generate.batch import Prompt, RunningBatch, TokenEvent, generate, stream
from ernie_tune.generate.sampling import SamplingParams, heaviest, penalise
from ernie_tune.models.cache import GROW_TOKENS, KVCache
from ernie_tune.models.inputs import Row, next_position, pack

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = ("text", "image", "two_images", "video", "mixed")


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def uncached(model, row: Row, steps: int) -> list[int]:
    ids = row.input_ids_L.tolist()
    for _ in range(steps):
        with paddle.no_grad():
            hidden = model(pack([Row(np.array(ids), row.pixel_values_PC, row.grid_thw_n3)], model.config.tokens))
            ids.append(int(model.logits(hidden[-1:]).argmax()))
    return ids[-steps:]


@pytest.mark.parametrize("case", ["text", "image", "video"])
def test_tokens_of_transformers(golden_model, golden, case: str) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    done = generate(model, case_rows(data, case), model.config.tokens, SamplingParams(max_new_tokens=16))[0][0]
    assert done.token_ids == data[f"{case}/generated_tokens"].tolist()
    assert done.finish_reason == "length"


@pytest.mark.parametrize("name", ["tiny-b", "tiny-c"])
def test_cached_equals_uncached_and_batch_equals_rows(golden_model, golden, name: str) -> None:
    model, data = golden_model(name), golden(name.replace("-", "_"))
    rows = [row for case in CASES for row in case_rows(data, case)]
    together = [c[0] for c in generate(model, rows, model.config.tokens, SamplingParams(max_new_tokens=8))]
    for row, done in zip(rows, together, strict=True):
        alone = generate(model, [row], model.config.tokens, SamplingParams(max_new_tokens=8))[0][0]
        assert done.token_ids == alone.token_ids == uncached(model, row, 8)
        np.testing.assert_allclose(done.logps, alone.logps, atol=1e-5)


SETTINGS = {
    "greedy": {"max_new_tokens": 24},
    "t1": {"max_new_tokens": 12, "temperature": 1.0, "seed": 5, "n": 3},
    "topp": {"max_new_tokens": 12, "temperature": 0.8, "top_p": 0.9, "seed": 6, "n": 2},
    "topk": {"max_new_tokens": 12, "temperature": 1.3, "top_k": 40, "seed": 7, "n": 2},
    "pen": {
        **{"max_new_tokens": 12, "temperature": 0.9, "seed": 8},
        **{"repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    },
    "banned": {"max_new_tokens": 12, "banned_ids": tuple(range(400)), "temperature": 1.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_of_the_last_release(name: str, golden_model) -> None:
    """Written down once (tests/golden/generated_tokens.json): who changes a seeded draw must mean
    to.
    """
    model, data = golden_model("tiny-b"), np.load(GOLDEN / "tiny_b.npz")
    rows = [case_rows(data, case)[0] for case in CASES]
    found = generate(model, rows, model.config.tokens, SamplingParams(**SETTINGS[name]))
    want = json.loads((GOLDEN / "generated_tokens.json").read_text(encoding="utf-8"))[f"tiny-b/{name}"]
    assert [[c.token_ids for c in some] for some in found] == want


@pytest.mark.parametrize("case", ["text", "mixed"])
def test_log_probs_are_those_of_a_training_forward(case: str, golden_model, golden) -> None:
    """Over the same support: what is banned has no share on either side."""
    model, data = golden_model("tiny-b"), golden("tiny_b")
    row, banned = case_rows(data, case)[0], tuple(range(100, 160))
    params = SamplingParams(max_new_tokens=20, temperature=0.7, seed=3, banned_ids=banned)
    done = generate(model, [row], model.config.tokens, params)[0][0]
    full = Row(np.concatenate([row.input_ids_L, done.token_ids]), row.pixel_values_PC, row.grid_thw_n3)
    with paddle.no_grad():
        scores = model.logits(model(pack([full], model.config.tokens))).numpy().astype(np.float64)[-21:-1] / 0.7
    scores[:, list(banned)] = -np.inf
    want = log_softmax(scores)[np.arange(20), done.token_ids]
    np.testing.assert_allclose(done.sampled_logps, want, atol=1e-5)
    assert done.sampled_logps == done.logps


@pytest.mark.parametrize("rule", ["paddle", "hf"])
@pytest.mark.parametrize("text_behind", [0, 3])
def test_text_goes_on_at_its_place_behind_a_long_clip(rule: str, text_behind: int, golden_model) -> None:
    """A clip with more frame pairs (8) than rows and columns (1): under "hf" text goes on below the
    largest time coordinate.
    """
    model = golden_model("tiny-b")
    tokens, grid = model.config.tokens, np.array([[16, 2, 2]])
    ids = [1, 5, *[tokens.video] * 8, *range(20, 20 + text_behind)]
    pixels = np.random.default_rng(0).standard_normal((64, 588)).astype(np.float32)
    prompt = Row(np.array(ids), pixels, grid)
    done = generate(model, [prompt], tokens, SamplingParams(max_new_tokens=5), position_rule=rule)[0][0]
    full = Row(np.array([*ids, *done.token_ids]), pixels, grid)
    with paddle.no_grad():
        scores = model.logits(model(pack([full], tokens, rule))).numpy().astype(np.float64)[-6:-1]
    np.testing.assert_allclose(done.logps, log_softmax(scores)[np.arange(5), done.token_ids], atol=1e-4)
    assert next_position(prompt, tokens, rule) == (2 + 8 if rule == "paddle" else 2 + 1) + text_behind


def test_long_generation_grows_the_cache(golden_model, golden) -> None:
    """More tokens than one allocation step, with rows that leave at different times."""
    model, data = golden_model("tiny-b"), golden("tiny_b")
    rows = [row for case in ("text", "image") for row in case_rows(data, case)]
    long = generate(model, rows, model.config.tokens, SamplingParams(max_new_tokens=140))
    stop = long[0][0].token_ids[5]
    cut = generate(model, rows, model.config.tokens, SamplingParams(max_new_tokens=140, stop_ids=(stop,)))
    for full, short in zip(long, cut, strict=True):
        ids = full[0].token_ids
        end = ids.index(stop) + 1 if stop in ids else len(ids)
        assert short[0].token_ids == ids[:end]
        assert short[0].finish_reason == ("stop" if stop in ids else "length")
    assert long[1][0].token_ids[:130] == uncached(model, rows[1], 130)


def test_samples_share_the_prefill_and_reproduce(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    rows = [case_rows(data, c)[0] for c in ("image", "text")]
    params = SamplingParams(max_new_tokens=6, temperature=1.5, n=3, seed=11)
    calls: list[int] = []
    hook = model.vision_model.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape[0]))
    first = generate(model, rows, model.config.tokens, params)
    hook.remove()
    assert calls == [24]  # the image's patches went through the tower once for three samples
    again = generate(model, rows, model.config.tokens, params)
    assert [[s.token_ids for s in p] for p in first] == [[s.token_ids for s in p] for p in again]
    assert len({tuple(s.token_ids) for s in first[0]}) == 3
    alone = generate(model, rows[:1], model.config.tokens, params)
    assert [s.token_ids for s in alone[0]] == [s.token_ids for s in first[0]]
    other = generate(model, rows, model.config.tokens, SamplingParams(max_new_tokens=6, temperature=1.5, n=3, seed=12))
    assert other[0][0].token_ids != first[0][0].token_ids


def test_streaming_and_stop_strings(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    rows = case_rows(data, "text")
    full = generate(model, rows, model.config.tokens, SamplingParams(max_new_tokens=8))[0][0].token_ids
    decode = lambda ids: "".join(f"[{i}]" for i in ids)  # noqa: E731
    params = SamplingParams(max_new_tokens=8, stop_strings=(f"{full[2]}][{full[3]}",))
    events = list(stream(model, rows, model.config.tokens, params, decode))
    first = next(i for i in range(8) if f"{full[2]}][{full[3]}" in decode(full[: i + 1]))
    assert [e.token_id for e in events] == full[: first + 1]
    assert [e.finish_reason for e in events] == [""] * first + ["stop"]
    assert model.training is False


def test_generation_leaves_training_mode_as_it_was(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    model.train()
    for _ in stream(model, case_rows(data, "text"), model.config.tokens, SamplingParams(max_new_tokens=2)):
        break
    generate(model, case_rows(data, "text"), model.config.tokens, SamplingParams(max_new_tokens=2))
    assert model.training


def test_repetition_penalty_steers_away(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    rows = case_rows(data, "text")
    done = generate(model, rows, model.config.tokens, SamplingParams(max_new_tokens=12, repetition_penalty=1e6))[0][
        0
    ].token_ids
    assert len(set(done)) == 12
    assert not set(done) & set(rows[0].input_ids_L.tolist())
    np.testing.assert_allclose(penalise(np.array([2.0, -2.0, 3.0]), np.array([0, 1]), 4.0), [0.5, -8.0, 3.0])


def test_bad_requests(golden_model) -> None:
    model = golden_model("tiny-b")
    tokens = model.config.tokens
    with pytest.raises(
        ValueError,
        match=r"prompt tokens \(4000\) \+ max_new_tokens \(128\) must not exceed max_position_embeddings \(4096\)",
    ):
        generate(model, [Row(np.arange(4000) % 500)], tokens, SamplingParams())
    with pytest.raises(ValueError, match="need `decode`"):
        generate(model, [Row(np.array([1]))], tokens, SamplingParams(stop_strings=("a",)))


def run_batch(batch: RunningBatch, joins: dict[int, list[Prompt]], drops: dict[int, list[int]] | None = None):  # type: ignore[no-untyped-def]
    """Step to the end; before step i let `joins[i]` in and take `drops[i]` out. Returns events by
    (prompt, sample).
    """
    out: dict[tuple[int, int], list[TokenEvent]] = {}
    at = 0
    while len(batch) or at <= max(joins):
        batch.join(joins[at]) if at in joins else None
        batch.drop((drops or {}).get(at, []))
        for event in batch.step():
            out.setdefault((event.prompt, event.sample), []).append(event)
        at += 1
    return out


def test_rows_that_join_and_leave_get_what_they_get_alone(golden_model, golden) -> None:
    """Long rows joining short ones, short ones joining long ones, a batch that runs empty, own
    lengths, temperatures and penalties.
    """
    model, data = golden_model("tiny-b"), golden("tiny_b")
    rows = {case: case_rows(data, case)[0] for case in CASES}
    long = Row(np.resize(rows["text"].input_ids_L, 200))
    params = [
        SamplingParams(max_new_tokens=12),
        SamplingParams(max_new_tokens=5, temperature=0.8, seed=4),
        SamplingParams(max_new_tokens=9, temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=1),
        SamplingParams(max_new_tokens=150),
        SamplingParams(max_new_tokens=3, temperature=1.0, top_k=5, n=3, seed=2),
        SamplingParams(max_new_tokens=1),
    ]
    chosen = [rows["text"], rows["image"], rows["video"], rows["two_images"], rows["mixed"], long]
    prompts = [Prompt(row, p, key=i) for i, (row, p) in enumerate(zip(chosen, params, strict=True))]
    joins = {0: [prompts[0], prompts[1]], 2: [prompts[2]], 4: [prompts[3], prompts[4]], 9: [prompts[5]]}
    events = run_batch(RunningBatch(model, model.config.tokens), joins)
    late = run_batch(RunningBatch(model, model.config.tokens), {0: [prompts[5]], 1: [prompts[0]], 30: [prompts[1]]})
    for prompt in prompts:
        alone = generate(model, [prompt.row], model.config.tokens, prompt.params)[0]
        for sample, done in enumerate(alone):
            for got in (events, late) if prompt.key in (0, 1, 5) else (events,):
                mine = got[prompt.key, sample]
                assert [e.token_id for e in mine] == done.token_ids
                np.testing.assert_allclose([e.logp for e in mine], done.logps, atol=1e-5)
                assert [e.finish_reason for e in mine] == [""] * (len(mine) - 1) + [done.finish_reason]


def test_dropped_rows_leave_the_others_alone(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    greedy = SamplingParams(max_new_tokens=6)
    prompts = [Prompt(case_rows(data, case)[0], greedy, key=i) for i, case in enumerate(("text", "image", "video"))]
    batch = RunningBatch(model, model.config.tokens)
    events = run_batch(batch, {0: prompts, 3: [Prompt(prompts[0].row, greedy, key=7)]}, {0: [0], 3: [2], 5: [9]})
    assert {key: len(got) for key, got in events.items()} == {(1, 0): 6, (2, 0): 3, (7, 0): 6}
    for key, row in ((1, prompts[1].row), (7, prompts[0].row)):
        assert [e.token_id for e in events[key, 0]] == generate(model, [row], model.config.tokens, greedy)[0][
            0
        ].token_ids
    assert len(batch) == 0
    assert batch.step() == []
    batch.join(prompts[:1])
    batch.drop([0])
    assert len(batch) == 0


def test_a_prompt_that_cannot_join_leaves_the_batch_as_it_was(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    row = case_rows(data, "text")[0]
    batch = RunningBatch(model, model.config.tokens)
    batch.join([Prompt(row, SamplingParams(max_new_tokens=2))])
    with pytest.raises(ValueError, match="must not exceed max_position_embeddings"):
        batch.join([Prompt(row, SamplingParams(max_new_tokens=5000), key=1)])
    with pytest.raises(ValueError, match="need `decode`"):
        batch.join([Prompt(row, SamplingParams(stop_strings=("x",)), key=1)])
    assert len(batch) == 1


def test_forced_tokens_and_the_likeliest(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    row = case_rows(data, "image")[0]
    params = SamplingParams(max_new_tokens=4, top_logprobs=3, banned_ids=(600, 601))

    def steer(so_far) -> int | None:  # type: ignore[no-untyped-def]
        return 77 if len(so_far) == 1 else None

    batch = RunningBatch(model, model.config.tokens)
    events = run_batch(batch, {0: [Prompt(row, params, steer=lambda: steer)]})[0, 0]
    ids = [e.token_id for e in events]
    assert ids[1] == 77
    full = Row(np.concatenate([row.input_ids_L, ids]), row.pixel_values_PC, row.grid_thw_n3)
    with paddle.no_grad():
        scores = model.logits(model(pack([full], model.config.tokens))).numpy().astype(np.float64)[-5:-1]
    scores[:, [600, 601]] = -np.inf
    for event, logp_V in zip(events, log_softmax(scores), strict=True):
        assert event.logp == pytest.approx(logp_V[event.token_id], abs=1e-4)
        order = np.argsort(-logp_V)[:3]
        assert [i for i, _ in event.top] == order.tolist()
        np.testing.assert_allclose([p for _, p in event.top], logp_V[order], atol=1e-4)
        assert event.token_id == (77 if event is events[1] else order[0])
    assert heaviest(np.array([0.0, 1.0]), 5) == [1]


def filled(lengths: list[int], seed: int, layers: int = 2) -> tuple[KVCache, list[list[np.ndarray]]]:
    """A cache of random rows [K=2, H=4], and per layer and row the keys [L, K, H] that went in."""
    rng = np.random.default_rng(seed)
    cache, offsets = KVCache(layers), tuple(np.cumsum([0, *lengths]).tolist())
    kept = []
    for layer in range(layers):
        k = rng.standard_normal((offsets[-1], 2, 4)).astype(np.float32)
        cache.fill(layer, paddle.to_tensor(k), paddle.to_tensor(-k), offsets)
        kept.append([k[a:b] for a, b in pairwise(offsets)])
    cache.prefilling = False
    return cache, kept


def content(cache: KVCache) -> list[list[np.ndarray]]:
    """The live columns of each layer and row, after checking that values run parallel and nothing
    else is live.
    """
    out = []
    for keys, values in zip(cache.keys, cache.values, strict=True):
        k, v, live = keys.numpy(), values.numpy(), cache._bias == 0
        assert k.shape[2] == cache._bias.shape[1] > cache.used
        assert not (cache._bias[:, cache.used :] == 0).any()
        out.append([row[:, on].transpose(1, 0, 2) for row, on in zip(k, live, strict=True)])
        for row, value, on in zip(k, v, live, strict=True):
            np.testing.assert_array_equal(row[:, on], -value[:, on])
            assert on[cache.used - on.sum() : cache.used].all(), "rows end at the common column"
    return out


@pytest.mark.parametrize(("mine", "theirs"), [([3, 5], [2]), ([2], [300, 7]), ([130], [127, 128]), ([1], [1])])
def test_caches_join_row_behind_row(mine: list[int], theirs: list[int]) -> None:
    (cache, kept), (other, more) = filled(mine, 0), filled(theirs, 1)
    cache.join(other)
    assert cache.used == cache.longest() == max(*mine, *theirs)
    for layer, rows in enumerate(content(cache)):
        for got, want in zip(rows, [*kept[layer], *more[layer]], strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_cache_gives_back_what_its_longest_row_took() -> None:
    cache, kept = filled([3 * GROW_TOKENS, 10, 12], 0)
    cache.select([2, 1, 2])
    assert cache.used == 12
    assert cache.keys[0].shape[2] == GROW_TOKENS
    assert all(
        (got == want).all()
        for rows, wants in zip(content(cache), kept, strict=True)
        for got, want in zip(rows, [wants[2], wants[1], wants[2]], strict=True)
    )
    cache, _ = filled([GROW_TOKENS + 9, 10], 0)
    cache.select([1])
    assert cache.used == GROW_TOKENS + 9, "copying everything to win less than a step is not worth it"


def test_penalties_follow_each_answer(golden_model, golden) -> None:
    """A strong penalty for presence forbids every token the second time, in each row for itself;
    without it this model repeats itself.
    """
    model = golden_model("tiny-b")
    tokens, rows = model.config.tokens, [Row(np.array([1, 5, 6])), Row(np.array([1, 7]))]
    plain = generate(model, rows, tokens, SamplingParams(max_new_tokens=12))
    new = generate(model, rows, tokens, SamplingParams(max_new_tokens=12, presence_penalty=2.0, frequency_penalty=2.0))
    repeats = [sum(len(one.token_ids) - len(set(one.token_ids)) for (one,) in found) for found in (plain, new)]
    assert repeats[1] < repeats[0]

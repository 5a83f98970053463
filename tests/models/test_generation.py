"""Cached decoding against transformers' tokens, against uncached decoding, and row against batch; sampling against closed forms."""

from __future__ import annotations

import numpy as np
import paddle
import pytest
from weights import case_rows

from ernie_tune.models.generation import generate, stream
from ernie_tune.models.inputs import Row, pack
from ernie_tune.models.sampling import SamplingParams, choose, log_softmax, penalise, truncate

CASES = ("text", "image", "two_images", "video", "mixed")


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


def test_log_probs_are_those_of_a_training_forward(golden_model, golden) -> None:
    model, data = golden_model("tiny-b"), golden("tiny_b")
    row, params = case_rows(data, "mixed")[0], SamplingParams(max_new_tokens=6, temperature=0.7, top_k=50, seed=3)
    done = generate(model, [row], model.config.tokens, params)[0][0]
    full = Row(np.concatenate([row.input_ids_L, done.token_ids]), row.pixel_values_PC, row.grid_thw_n3)
    with paddle.no_grad():
        scores = model.logits(model(pack([full], model.config.tokens))).numpy().astype(np.float64)[-7:-1] / 0.7
    want = log_softmax(scores)[np.arange(6), done.token_ids]
    np.testing.assert_allclose(done.logps, want, atol=1e-4)


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
    np.testing.assert_allclose(penalise(np.array([[2.0, -2.0, 3.0]]), [np.array([0, 1])], 4.0), [[0.5, -8.0, 3.0]])


def test_truncation() -> None:
    logp = np.log([0.1, 0.4, 0.3, 0.2])
    ids, probs = truncate(logp, top_k=3, top_p=1.0)
    assert ids.tolist() == [1, 2, 3]
    np.testing.assert_allclose(probs, [4 / 9, 3 / 9, 2 / 9])
    ids, probs = truncate(logp, top_k=0, top_p=0.65)
    assert ids.tolist() == [1, 2]  # 0.4 does not reach 0.65, 0.7 does
    np.testing.assert_allclose(probs, [4 / 7, 3 / 7])
    assert truncate(logp, top_k=0, top_p=1e-9)[0].tolist() == [1]


def test_sampling_frequencies() -> None:
    """20,000 draws at temperature 2 from p = (.5,.3,.2): frequencies within four standard errors of the tempered distribution."""
    scores = np.log(np.tile([0.5, 0.3, 0.2], (20_000, 1)))
    rngs = [np.random.Generator(np.random.Philox(key=i)) for i in range(20_000)]
    picked, logps = choose(scores, SamplingParams(temperature=2.0), rngs, [np.zeros(0, np.int64)] * 20_000)
    want = np.sqrt([0.5, 0.3, 0.2]) / np.sqrt([0.5, 0.3, 0.2]).sum()
    got = np.bincount(picked, minlength=3) / 20_000
    assert (np.abs(got - want) < 4 * np.sqrt(want * (1 - want) / 20_000)).all()
    np.testing.assert_allclose(logps, np.log(want)[picked], atol=1e-12)


@pytest.mark.parametrize(("change", "match"), [
    ({"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
    ({"temperature": -1.0}, r"temperature \(-1.0\)"),
    ({"top_p": 0.0}, r"top_p \(0.0\)"),
    ({"top_k": -1}, r"top_k \(-1\)"),
    ({"repetition_penalty": 0.0}, r"repetition_penalty"),
    ({"n": 0}, r"n \(0\)"),
    ({"n": 2}, r"n \(2\) must be 1 with temperature \(0\)"),
])  # fmt: skip
def test_bad_sampling_parameters(change: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        SamplingParams(**change)


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

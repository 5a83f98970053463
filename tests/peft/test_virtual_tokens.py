"""Prompts and prefixes against real tokens: a prompt of token embeddings is those tokens, a prefix
of cached keys and values is that context.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import paddle
import pytest
from peft_cases import adapted, fresh, gradients, logits, packed, rows, slope
from weights import normal

from ernie_tune.generate.batch import generate
from ernie_tune.generate.sampling import SamplingParams
from ernie_tune.models.cache import KVCache
from ernie_tune.models.inputs import Row, pack
from ernie_tune.peft.config import PrefixConfig, PromptConfig
from ernie_tune.peft.model import get_peft_model
from ernie_tune.peft.virtual_tokens import with_virtual_tokens

IDS = (17, 203, 44, 9, 310)
PARAMS = SamplingParams(max_new_tokens=6)


def lengthened(row: Row) -> Row:
    return Row(np.concatenate([IDS, row.input_ids_L]), row.pixel_values_PC, row.grid_thw_n3)


def test_a_prompt_is_the_tokens_whose_embeddings_it_has(golden) -> None:
    """Packed rows with images and video: positions shift, segments stay apart, and the output has
    the caller's rows only.
    """
    model, cases = get_peft_model(fresh(), PromptConfig(len(IDS), init_ids=IDS)), rows(golden, "packed", "mixed")
    tokens = model.config.tokens
    inputs, longer = pack(cases, tokens), pack([lengthened(row) for row in cases], tokens)
    got, want = logits(model, inputs), logits(fresh(), longer)
    keep = np.concatenate(
        [np.arange(a + len(IDS), b) for a, b in zip(longer.offsets, longer.offsets[1:], strict=False)]
    )
    assert got.shape[0] == inputs.num_tokens
    np.testing.assert_allclose(got, want[keep], atol=5e-6)
    assert np.abs(got - logits(fresh(), inputs)).max() > 0.1


def test_a_prompt_in_generation(golden) -> None:
    model, prompts = get_peft_model(fresh(), PromptConfig(len(IDS), init_ids=IDS)), rows(golden, "image", "text")
    tokens = model.config.tokens
    ours = generate(model, prompts, tokens, PARAMS)
    theirs = generate(fresh(), [lengthened(row) for row in prompts], tokens, PARAMS)
    without = generate(fresh(), prompts, tokens, PARAMS)
    for mine, real, none in zip(ours, theirs, without, strict=True):
        assert mine[0].token_ids == real[0].token_ids
        np.testing.assert_allclose(mine[0].logps, real[0].logps, atol=1e-5)
        assert np.abs(np.subtract(mine[0].logps, none[0].logps)).max() > 1e-2


@pytest.mark.parametrize("config", [PromptConfig(4), PromptConfig(4, encoder_width=6), PrefixConfig(4)])
def test_gradients_and_disabling(golden, config) -> None:  # type: ignore[no-untyped-def]
    """Finite differences of every trained tensor; switched off, the model is the base bit for bit;
    with recompute the gradients are the same.
    """
    from paddle.distributed.fleet.utils import recompute

    inputs, model = packed(golden, "packed"), adapted(config, dtype="float64", scale=0.3)
    found = gradients(model, inputs)
    named = dict(model.named_parameters())
    assert set(found) == {name for name, p in named.items() if not p.stop_gradient}
    for name, grad in list(found.items())[:4]:
        direction = normal(f"direction of {name}", grad.shape)
        assert (grad * direction).sum() == pytest.approx(slope(model, inputs, named[name], direction, 1e-6), rel=1e-5)
    again = gradients(model, inputs, recompute=recompute)
    for name, grad in found.items():
        np.testing.assert_allclose(again[name], grad, rtol=1e-12, atol=1e-12)
    with model.disable_adapter():
        np.testing.assert_array_equal(logits(model, inputs), logits(fresh(dtype="float64"), inputs))


def test_a_prefix_of_cached_keys_and_values_is_that_context(golden) -> None:
    """Keys and values of real tokens (rotated, as cached) as prefix, the rest of the row at its own
    later positions: the logits of the whole row.
    """
    base, row = fresh(), rows(golden, "text")[0]
    tokens, k = base.config.tokens, len(IDS)
    cache = KVCache(base.config.num_hidden_layers)
    with paddle.no_grad():
        base(pack([Row(np.array(IDS))], tokens), cache=cache)
    model = get_peft_model(fresh(), PrefixConfig(k))
    for i, layer in enumerate(model.layers):
        for proj, store in ((layer.self_attn.k_proj, cache.keys), (layer.self_attn.v_proj, cache.values)):
            proj.adapters.default.prefix.set_value(store[i][0, :, :k])
    inputs = pack([row], tokens)
    shifted = dataclasses.replace(inputs, position_ids_T3=inputs.position_ids_T3 + k)
    want = logits(base, pack([lengthened(row)], tokens))[k:]
    np.testing.assert_allclose(logits(model, shifted), want, atol=1e-5)
    assert np.abs(logits(base, inputs) - want).max() > 0.1


def test_a_prefix_in_generation(golden) -> None:
    """Cached decoding gives the tokens of repeated whole forwards, in a batch and alone."""
    model, prompts = adapted(PrefixConfig(3), scale=0.5), rows(golden, "image", "text")
    tokens = model.config.tokens
    done = [c[0] for c in generate(model, prompts, tokens, PARAMS)]
    for row, c in zip(prompts, done, strict=True):
        ids = row.input_ids_L
        for token in c.token_ids:
            scores = logits(model, pack([Row(ids, row.pixel_values_PC, row.grid_thw_n3)], tokens))[-1]
            assert int(scores.argmax()) == token
            ids = np.append(ids, token)
    without = generate(fresh(), prompts, tokens, PARAMS)
    assert np.abs(np.subtract(done[0].logps, without[0][0].logps)).max() > 1e-2


def test_lengthened_pack() -> None:
    inputs = pack([Row(np.array([5, 6, 7])), Row(np.array([8]))], fresh().config.tokens)
    prompt, real = with_virtual_tokens(inputs, 2, shift=2)
    assert prompt.input_ids_T.tolist() == [0, 0, 5, 6, 7, 0, 0, 8]
    assert prompt.position_ids_T3[:, 0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert prompt.offsets == (0, 5, 8)
    assert real.tolist() == [2, 3, 4, 7]
    prefix, _ = with_virtual_tokens(inputs, 2, shift=0)
    assert prefix.position_ids_T3[:, 2].tolist() == [0, 0, 0, 1, 2, 0, 0, 0]
    assert not prefix.vision_T.any()


def test_switching_between_methods(golden) -> None:
    """A prompt and a prefix on one model, one at a time."""
    inputs, model = packed(golden), adapted(PromptConfig(3))
    first = logits(model, inputs)
    model.add_adapter(PrefixConfig(2), "prefix")
    second = logits(model, inputs)
    assert np.abs(first - second).max() > 1e-3
    model.set_adapter("default")
    np.testing.assert_array_equal(logits(model, inputs), first)
    model.delete_adapter("prefix")
    np.testing.assert_array_equal(logits(model, inputs), first)

"""The last layer computes no more than is read of it: values and every gradient are those of the
whole forward, whatever is on the model, and what must see every token still does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle
import pytest
from paddle.distributed.fleet.utils import recompute

from ernie_tune.machine.stages import Passage, pipeline_items
from ernie_tune.models import attention, ernie
from ernie_tune.models.cache import KVCache, cache_of
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import PackedInput, Row, pack, pack_families, tails
from ernie_tune.models.moe import MoELayer, RouterTap
from ernie_tune.models.presets import preset
from ernie_tune.models.router_losses import RouterLossWeights
from ernie_tune.peft.config import LoraConfig, PrefixConfig, PromptConfig
from ernie_tune.peft.model import get_peft_model

TOKENS = preset("tiny-a").tokens
Golden = Callable[..., ErnieModel]
Forward = Callable[[ErnieModel, PackedInput, "np.ndarray | None"], paddle.Tensor]


def row(text: int, seed: int, image: bool = False) -> Row:
    """So many text tokens, with `image` behind a picture of four features."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(10, 500, text)
    if not image:
        return Row(ids)
    head = [TOKENS.image_start, *[TOKENS.image] * 4, TOKENS.image_end]
    return Row(np.concatenate([head, ids]), rng.standard_normal((16, 588)).astype(np.float32), np.array([[1, 4, 4]]))


def answered(prompt: Row, answers: tuple[int, ...], seed: int) -> tuple[list[Row], int]:
    rows = [
        dataclasses.replace(prompt, input_ids_L=np.append(prompt.input_ids_L, row(n, 100 * seed + i).input_ids_L))
        for i, n in enumerate(answers)
    ]
    return rows, len(prompt.input_ids_L)


def shared_case(image: bool = True) -> tuple[PackedInput, np.ndarray]:
    """Prompts with answers of several lengths; read is what predicts the answers' tokens."""
    families = [answered(row(9, 1, image), (3, 3, 1), 1), answered(row(150, 2), (4, 3), 2)]
    inputs, places = pack_families(families, TOKENS)
    read = [at[shared - 1 : -1] for (_, shared), found in zip(families, places, strict=True) for at in found]
    return inputs, np.concatenate(read)


def whole_case(image: bool = True) -> tuple[PackedInput, np.ndarray]:
    """Rows on their own: one read here and there, one not at all, one at its last token."""
    inputs = pack([row(12, 3, image), row(7, 4), row(5, 5), row(12, 6)], TOKENS)
    first = inputs.offsets
    return inputs, np.array([first[0] + 9, first[0] + 11, first[2] - 1, first[3] + 4, first[3] + 6])


CASES = [shared_case, whole_case]


def plain(model: ErnieModel, inputs: PackedInput, read: np.ndarray | None) -> paddle.Tensor:
    return model(inputs, read=read)


def compare(
    model: ErnieModel, inputs: PackedInput, read: np.ndarray, forward: Forward = plain, want: Forward = plain,
    atol: float = 1e-10,
) -> None:  # fmt: skip
    """A random functional of what is read, of the forward that leaves out and of the whole one."""
    direction = paddle.to_tensor(np.random.default_rng(7).standard_normal((len(read), model.config.hidden_size)))
    results = []
    for how, tokens in ((want, None), (forward, read)):
        model.clear_gradients(set_to_zero=False)
        states = paddle.gather(how(model, inputs, tokens), paddle.to_tensor(read))
        (states * direction.astype(states.dtype)).sum().backward()
        grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
        results.append((states.detach().numpy(), grads))
    (states, grads), (got, some) = results
    np.testing.assert_allclose(got, states, atol=atol, rtol=0)
    # a gradient of 0 and none are two things to AdamW's decay: of the experts of pictures, too
    assert some.keys() == grads.keys()
    for name, grad in grads.items():
        np.testing.assert_allclose(some[name], grad, atol=atol * max(1.0, np.abs(grad).max()), err_msg=name)


@pytest.fixture
def rows_of_last() -> Iterator[list[int]]:
    """How many rows the last layer's experts were given."""
    seen: list[int] = []
    real = MoELayer.forward

    def spy(self: MoELayer, x_TD: paddle.Tensor, *rest: Any) -> paddle.Tensor:
        if self.layer == 2:
            seen.append(x_TD.shape[0])
        return real(self, x_TD, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoELayer, "forward", spy)
        yield seen


def test_tails() -> None:
    counts, rows_R = tails((0, 4, 4, 9, 12), np.array([7, 2, 8]))
    assert counts == (2, 0, 2, 0)
    assert rows_R.tolist() == [2, 3, 7, 8]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["tiny-a", "tiny-b"])
def test_values_and_gradients(name: str, case: Any, golden_model: Golden) -> None:
    compare(golden_model(name, "float64"), *case())


@pytest.mark.parametrize("case", CASES)
def test_in_float32_without_pictures(case: Any, golden_model: Golden) -> None:
    compare(golden_model("tiny-a", "float32"), *case(image=False), atol=1e-5)


def test_in_paddles_operators(golden_model: Golden) -> None:
    """Where the math library is not."""
    with ernie.mkl.left_alone():
        compare(golden_model("tiny-a", "float64"), *shared_case())
        compare(golden_model("tiny-a", "float64"), *whole_case())


def test_how_much_is_left_out(golden_model: Golden, rows_of_last: list[int]) -> None:
    inputs, read = shared_case(image=False)
    golden_model("tiny-a", "float32")(inputs, read=read)
    # an answer's last token rides along, an answer of one token reads the prompt alone
    assert rows_of_last == [2 + 3 + 3 + 4 + 3]
    golden_model("tiny-a", "float32")(inputs)
    assert rows_of_last[1:] == [inputs.num_tokens]


def with_recompute(model: ErnieModel, inputs: PackedInput, read: np.ndarray | None) -> paddle.Tensor:
    return model(inputs, read=read, recompute=recompute)


def by_items(model: ErnieModel, inputs: PackedInput, read: np.ndarray | None) -> paddle.Tensor:
    """As a pipeline's stages do it, boundary by boundary."""
    passage, hidden = Passage(model, inputs, read=read), None
    for item in pipeline_items(model.config):
        hidden = passage.run(item, hidden)
        assert hidden.shape == [inputs.num_tokens, model.config.hidden_size], "what a boundary carries"
    assert hidden is not None
    return hidden


@pytest.mark.parametrize("how", [with_recompute, by_items])
def test_recompute_and_a_pipelines_items(how: Forward, golden_model: Golden, rows_of_last: list[int]) -> None:
    inputs, read = shared_case(image=False)
    model = golden_model("tiny-a", "float64")
    compare(model, inputs, read, how)
    assert min(rows_of_last) < inputs.num_tokens


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, expert_targets="both"),
        PrefixConfig(num_virtual_tokens=3),
        PromptConfig(num_virtual_tokens=3),
    ],
    ids=["lora", "prefix", "prompt"],
)
def test_adapters(config: Any, golden_model: Golden, rows_of_last: list[int]) -> None:
    base = ErnieModel(preset("tiny-a"), "float64")
    base.set_state_dict(golden_model("tiny-a", "float64").state_dict())
    model = get_peft_model(base, config)
    for name, value in model.named_parameters():
        if name.endswith("lora_B"):
            value.set_value(paddle.to_tensor(np.random.default_rng(1).standard_normal(value.shape) * 0.1))
    model.eval()
    inputs, read = whole_case()
    compare(model, inputs, read)
    assert rows_of_last[1] < rows_of_last[0]


def test_what_judges_or_counts_routers_sees_every_token(golden_model: Golden, rows_of_last: list[int]) -> None:
    inputs, read = shared_case()
    model = golden_model("tiny-a", "float64")

    def judged(model: ErnieModel, inputs: PackedInput, read: np.ndarray | None) -> paddle.Tensor:
        return model(inputs, read=read, tap=RouterTap(RouterLossWeights(0.3, 0.2, 0.1), keep=True))

    compare(model, inputs, read, judged, judged)
    assert set(rows_of_last) == {inputs.num_tokens}


def test_what_lies_on_several_ranks_is_whole(golden_model: Golden, rows_of_last: list[int]) -> None:
    inputs, read = shared_case()
    model = golden_model("tiny-a", "float32")
    model.leaves_out = False
    try:
        model(inputs, read=read)
    finally:
        del model.leaves_out
    assert rows_of_last == [inputs.num_tokens]


@pytest.mark.parametrize("make", [KVCache, cache_of("float64")])
def test_a_prefill(make: Any, golden_model: Golden) -> None:
    """The cache has keys and values of all tokens, in the last layer too: the next token sees
    them.
    """
    model = golden_model("tiny-a", "float64")
    inputs = pack([row(9, 1, image=True), row(30, 2)], TOKENS)
    last = np.array(inputs.offsets[1:]) - 1
    after = pack([Row(np.array([7])), Row(np.array([8]))], TOKENS)
    after = dataclasses.replace(after, position_ids_T3=inputs.position_ids_T3[last] + 1)
    found = []
    with paddle.no_grad():
        for read in (None, last):
            cache = make(model.config.num_hidden_layers)
            first = model(inputs, cache=cache, read=read).numpy()[last]
            cache.prefilling = False
            found.append((first, model(after, cache=cache).numpy()))
    for want, got in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)


def without_what_came_before(*args: Any) -> Iterator[attention.SegmentRun]:
    """Queries see the tail of their segment alone."""
    for run in attention_runs(*args):
        yield dataclasses.replace(run, starts=tuple(a + run.before for a in run.starts), before=0)


def undecided(self: ernie.SequenceContext, last: bool) -> ernie.SequenceContext:
    """The experts of pictures, none of which is read, get no gradient instead of 0."""
    if not last or self.last is None:
        return self
    return dataclasses.replace(self.last, lacking=False, text_index=None, vision_index=None)


attention_runs = attention.runs
MUTANTS: list[tuple[Any, str, Any]] = [
    (attention, "runs", without_what_came_before),
    (ernie, "tails", lambda offsets, read: tails(offsets, read + (read < offsets[-1] - 1))),
    (ernie.SequenceContext, "spread", lambda self, x: paddle.concat([x, x, x])[: self.plan.offsets[-1]]),
    (ernie.SequenceContext, "of_layer", undecided),
]


@pytest.mark.parametrize(("place", "name", "mutant"), MUTANTS, ids=[name for _, name, _ in MUTANTS])
def test_mutants_fail(place: Any, name: str, mutant: Any, golden_model: Golden, monkeypatch: Any) -> None:
    monkeypatch.setattr(place, name, mutant)
    with pytest.raises(AssertionError):
        compare(golden_model("tiny-a", "float64"), *whole_case())

"""What the quantised layers of a model see: second moments of their inputs to choose codes by, and
samples of inputs to measure errors on.

Each family of experts sees the tokens of its own modality, as the model routes them: text experts
text, vision experts placeholders and markers.
Legend: T tokens, K input width, M rows sorted by expert. Refuses to know: how codes are chosen,
data files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import paddle
from paddle import nn

from ernie_tune.export.choose import Moment
from ernie_tune.export.source import Place
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.inputs import PackedInput

Array = np.ndarray[Any, Any]
FULL_MOMENT_ROWS = (
    # above it the diagonal: full moments of a released model's experts would take more memory than
    # the model
    1024
)
SAMPLE_ROWS = 256
See = Callable[[Place, Array], None]


@contextmanager
def _watched(model: ErnieModel, names: Iterable[str], see: See) -> Iterator[None]:
    """Call `see(place, inputs [T, K])` for every product of the parameters `names`, for the length
    of a `with`.
    """
    layers, hooks = dict(model.named_sublayers()), []

    def linear(name: str) -> Callable[[nn.Layer, tuple[Any, ...]], None]:
        return lambda _, args: see((name, None), args[0].astype("float32").numpy())

    def stack(name: str) -> Callable[[nn.Layer, tuple[Any, ...]], None]:
        def hook(_: nn.Layer, args: tuple[Any, ...]) -> None:
            x_MK, start = args[0].astype("float32").numpy(), 0
            for expert, count in enumerate(args[2]):
                if count:
                    see((name, expert), x_MK[start : start + count])
                start += count

        return hook

    for name in names:
        if name.endswith(".weight"):
            hooks.append(layers[name.removesuffix(".weight")].register_forward_pre_hook(linear(name)))
        else:
            hooks.append(layers[name.removesuffix("_proj") + "_product"].register_forward_pre_hook(stack(name)))
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def _run(model: ErnieModel, inputs: Sequence[PackedInput]) -> None:
    model.eval()
    with paddle.no_grad():
        for one in inputs:
            model(one)


def moments(
    model: ErnieModel, inputs: Sequence[PackedInput], names: Sequence[str], full: bool = False
) -> dict[Place, Moment]:
    """Second moments of the inputs of the parameters `names`; `full`: of wide layers too. Experts
    that no token reached are left out.
    """
    totals: dict[Place, Array] = {}
    tokens: dict[Place, int] = {}

    def see(place: Place, x_TK: Array) -> None:
        wide = x_TK.shape[1] > FULL_MOMENT_ROWS and not full
        part = np.einsum("tk,tk->k", x_TK, x_TK) if wide else x_TK.T @ x_TK
        totals[place] = totals[place] + part if place in totals else part
        tokens[place] = tokens.get(place, 0) + len(x_TK)

    with _watched(model, names, see):
        _run(model, inputs)
    return {place: Moment(total, tokens[place]) for place, total in totals.items()}


def samples(model: ErnieModel, inputs: Sequence[PackedInput], names: Sequence[str]) -> dict[Place, Array]:
    """Up to `SAMPLE_ROWS` inputs [T, K] of each matrix, the first that it sees."""
    kept: dict[Place, list[Array]] = {}
    count: dict[Place, int] = {}

    def see(place: Place, x_TK: Array) -> None:
        room = SAMPLE_ROWS - count.get(place, 0)
        if room > 0:
            kept.setdefault(place, []).append(x_TK[:room].copy())
            count[place] = count.get(place, 0) + min(room, len(x_TK))

    with _watched(model, names, see):
        _run(model, inputs)
    return {place: np.concatenate(parts) for place, parts in kept.items()}

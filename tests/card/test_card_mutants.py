"""Every fast path of the library, broken, turns its own line of `doctor --card cpu` red: its line
is held against a formula that shares no code with it. A path that nobody has named here fails, too.
"""

from __future__ import annotations

import ast
import functools
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from ernie_tune.models import attention, decoding, grouped, layers, mkl, moe, segments, tiles
from ernie_tune.peft import lora, quantize, unpack
from ernie_tune.train.card_check import decoding_line, operator_line
from ernie_tune.train.card_operators import OPERATORS

PACKAGE = Path(grouped.__file__).parents[1]
DECODING, CODED = "decoding", "decoding on codes"

# Hand-written backwards: the class -> its line. Those of ranks have `doctor --dist` for theirs.
PYLAYERS = {
    "models.layers._RmsNorm": "RMSNorm",
    "models.layers._Swiglu": "SwiGLU",
    "models.layers._SwigluHalves": "SwiGLU, halves",
    "models.layers._RotateHalves": "rotary embedding, pictures",
    "models.vision._QuickGelu": "quick GELU",
    "models.attention._SegmentAttention": "attention, causal",
    "models.grouped._GroupedMatmul": "experts",
    "models.moe._AddLoss": "router's loss",
    "models.moe._Dispatch": "experts, dealt and summed",
    "models.moe._Combine": "experts, dealt and summed",
    "models.moe._Halves": "experts, dealt and summed",
    "objectives.logprobs._TokenLogp": "log-probabilities",
    "objectives.distill._TokenJsd": "distillation",
    "peft.quantize._Product": "int4 layer",
    "peft.quantize._StackProduct": "int4 experts",
    "peft.lora._Project": "LoRA",
    "peft.lora._AddProduct": "LoRA",
    "peft.lora._ScaleColumns": "DoRA",
    "peft.lora._AddExpertProducts": "LoRA on experts",
    "peft.virtual_tokens._SetRows": "virtual tokens",
}


def grown(x: Any) -> Any:
    """1 % larger: what each of these lines must not let pass."""
    if isinstance(x, tuple | list):
        return type(x)(map(grown, x))
    return x * 1.01 if isinstance(x, paddle.Tensor | np.ndarray) and x.dtype not in (paddle.int64, np.int64) else x


def after(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda real: functools.wraps(real)(lambda *args, **more: change(real(*args, **more)))


larger = after(grown)


def in_place(real: Any) -> Any:
    """As `larger`, of what writes over its input."""
    return lambda x, *rest: real(x, *rest).scale_(1.01)


# What is broken: (where, what, how) -> the line that must be red.
MUTANTS: dict[tuple[Any, str, Callable[[Any], Any]], str] = {
    # the math library's functions
    (mkl, "tanh_array_", lambda real: lambda x: real(np.multiply(x, 1.01, out=x))): "SwiGLU",
    (mkl, "near_zero", lambda real: lambda x: True): "log-probabilities, large scores",
    (mkl, "below_zero_", lambda real: lambda x: x): "log-probabilities, large scores",
    (mkl, "exp_", lambda real: lambda x, far: real(x.scale_(1.01), far)): "log-probabilities",
    (mkl, "exp_array_", lambda real: lambda x: real(np.multiply(x, 1.01, out=x))): "attention, causal",
    (mkl, "multiply", lambda real: lambda x, y, out, *how, **more: real(x, y * 1.01, out, *how, **more)): "attention, causal",
    (mkl, "log_", in_place): "log-probabilities",
    (mkl, "rows_by_matrices", larger): "experts",
    (mkl, "rows_by_rows", larger): "experts",
    (mkl, "rows_by_table", after(lambda x: x * 1.5)): DECODING,
    # products with codes
    (unpack, "rows_by_codes", larger): "int8 layer",
    (unpack, "rows_by_codes_transposed", larger): "int4 layer, groups",
    (unpack, "whole", larger): "int8 matrix, groups",
    (unpack, "stack_product", larger): "int8 experts",
    (unpack, "stack_product_transposed", larger): "int4 experts, groups",
    (unpack.Codes, "scaled_after", lambda real: property(lambda self: True)): "int8 experts, groups",
    (unpack, "_OFFSET", lambda real: 7): "int4 experts",
    (unpack, "_pieces", lambda real: lambda *a: real(*a)[:1]): "int4 experts, groups",
    (quantize, "_spans", lambda real: lambda counts: list(real(counts))[:-1]): "int8 experts",
    (quantize.QuantizedEmbedding, "forward", larger): "int8 table",
    # sums and products in place of Paddle's reductions and broadcasts
    (layers, "_normalise_rows", lambda real: lambda x, weight, *rest: real(x, weight * 1.01, *rest)): "RMSNorm",
    (layers, "_norm_gradients", larger): "RMSNorm",
    (attention, "row_sum", larger): "attention, causal",
    (tiles.Tiles, "_shift", lambda real: lambda *a: None): "attention, large scores",
    (tiles.Tiles, "_below", lambda real: lambda *a: None): "attention, large scores",
    (tiles, "_triangle", after(np.ones_like)): "attention, causal",
    (tiles, "_beside", larger): "attention, whole pictures",
    (attention.AttentionPlan, "key_gradients", larger): "attention, shared prefix",
    (attention.AttentionPlan, "tokens_first", larger): "attention, whole pictures",
    (moe, "_sum_slots", larger): "experts, dealt and summed",
    (moe, "_split_rows", lambda real: lambda x: real(x)[::-1]): "experts, dealt and summed",
    (moe, "row_sum", larger): "experts, dealt and summed",
    (lora, "tall_product", larger): "LoRA",
    (lora, "column_sum", larger): "DoRA",
    # a step of decoding in arrays, and its memory
    (decoding, "normalised", larger): DECODING,
    (decoding, "turned", larger): DECODING,
    (decoding, "gated", larger): DECODING,
    (decoding, "choose_few", lambda real: lambda x, w, *rest: real(x, -w, *rest)): DECODING,
    (segments._Step, "attend", lambda real: lambda self, i, q, out: real(self, i, 2 * q, out)): DECODING,
    (segments.SegmentCache, "attend", larger): CODED,
    (layers, "normalised", larger): CODED,
    (layers, "turned", larger): CODED,
    (layers, "gated", larger): CODED,
    (moe, "choose_few", lambda real: lambda x, w, *rest: real(x, -w, *rest)): CODED,
}  # fmt: skip


def line(name: str) -> Any:
    if name in (DECODING, CODED):
        return decoding_line("cpu", "float32", name == CODED, "tiny-a", rows=2)
    return operator_line(name, OPERATORS[name], "cpu", "float32")


@pytest.mark.parametrize("name", [DECODING, CODED])
def test_sound_lines_of_decoding(name: str) -> None:
    assert line(name).passed, line(name)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: f"{m[0].__name__.rsplit('.', 1)[-1]}.{m[1]}")
def test_a_broken_path_is_red(monkeypatch: pytest.MonkeyPatch, mutant: tuple[Any, str, Any]) -> None:
    where, what, how = mutant
    monkeypatch.setattr(where, what, how(vars(where)[what]))
    found = line(MUTANTS[mutant])
    assert found.passed is False, found


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", PYLAYERS)
def test_broken_backwards_are_red(monkeypatch: pytest.MonkeyPatch, name: str, direction: str) -> None:
    module, _, leaf = name.rpartition(".")
    layer = getattr(importlib.import_module(f"ernie_tune.{module}"), leaf)
    real = getattr(layer, direction)

    def broken(ctx, *args):  # type: ignore[no-untyped-def]
        return grown(real(ctx, *args))

    monkeypatch.setattr(layer, direction, staticmethod(broken))
    found = line(PYLAYERS[name])
    assert found.passed is False, found


def test_no_path_is_forgotten() -> None:
    """Every hand-written backward has a line, and so has every function of the math library's
    file.
    """
    found = set()
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)) if "PyLayer" in text else ():
            if isinstance(node, ast.ClassDef) and any("PyLayer" in ast.unparse(base) for base in node.bases):
                found.add(".".join([*file.relative_to(PACKAGE).with_suffix("").parts, node.name]))
    assert {name for name in found if not name.startswith("parallel.")} == set(PYLAYERS)
    computing = {
        node.name
        for node in ast.parse(Path(mkl.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    # these say what there is, or where it lies
    told = {
        "ready",
        "usable",
        "max_threads",
        "single_thread",
        "numel",
        "near_limit",
        "exp_limit",
        "view",
        "made",
        "stepping",
        "is_stepping",
        "left_alone",
    }
    assert computing - told == {what for where, what, _ in MUTANTS if where is mkl}


def test_the_reference_is_not_what_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library left alone, none of its functions is called, nor products with codes."""
    x = paddle.ones([4, 4])
    assert mkl.ready(x)
    with mkl.left_alone():
        assert not mkl.ready(x)
        assert not mkl.usable("float32")
        assert not unpack.ready(x)
    assert mkl.ready(x)

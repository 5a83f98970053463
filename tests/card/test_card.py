"""`doctor --card` with the CPU in the card's place: right lines are right, and a broken path turns
its line red; and what fast paths do where they do not hold. With a card, its lines too.
"""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from ernie_tune.cli import doctor
from ernie_tune.cli.verbs import UsageError
from ernie_tune.models import proven as trials
from ernie_tune.models.attention import flash_holds
from ernie_tune.models.presets import preset
from ernie_tune.train import card_check
from ernie_tune.train.card_check import CheckLine, _steps, check_card, operator_line
from ernie_tune.train.card_operators import OPERATORS, Operator

CARD = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_on_a_cpu(name: str) -> None:
    line = operator_line(name, OPERATORS[name], "cpu", "float32")
    assert line.passed, line


def test_an_operator_that_fails_is_a_line() -> None:
    def fails(x):  # type: ignore[no-untyped-def]
        raise RuntimeError("\n\nno such kernel here\n")

    line = operator_line("x", Operator(fails, lambda x: x, (np.ones(2),)), "cpu", "float32")
    assert line.passed is False
    assert line.found == "RuntimeError: no such kernel here"


def test_a_step_agrees_with_float64() -> None:
    config = preset("tiny-a")
    assert config.vision is not None
    config = config.replace(vocab_size=8192, tokens=preset("small").tokens)
    want, _ = _steps("cpu", "float64", config, lora=True)
    got, _ = _steps("cpu", "float32", config, lora=True)
    assert len(got) == card_check.STEPS
    assert max(abs(a / b - 1) for a, b in zip(got, want, strict=True)) < 1e-5


def test_the_page(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(card_check, "OPERATORS", {"product": OPERATORS["product"]})
    monkeypatch.setattr(card_check, "_best", lambda function: 1.0)  # no clock
    monkeypatch.setattr(card_check, "_models", lambda *_: [CheckLine("step", "off by 1", False)])
    monkeypatch.setattr(card_check, "decoding_line", lambda *_: CheckLine("decoding", "9 tokens/s", True))
    assert doctor.run(["--card", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "BAD  step: off by 1" in lines
    assert any(line.startswith("ok   operator product, float32: off by ") for line in lines)
    assert lines.count("ok   decoding: 9 tokens/s") == 2
    assert lines[-1] == "cpu: 1 lines are wrong"
    monkeypatch.setattr(card_check, "_models", lambda *_: [])
    assert doctor.run(["--card", "cpu"]) == 0
    assert paddle.get_device() == "cpu"
    if not CARD:
        with pytest.raises(UsageError, match=r"device \(gpu:0\) must be a card that this Paddle sees"):
            doctor.run(["--card", "gpu:0"])


def test_fast_paths_prove_themselves(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(trials, "_verdicts", {})
    one, other = paddle.ones([3]), paddle.ones([3]) * 1.5
    tried = []

    def fast(value):  # type: ignore[no-untyped-def]
        tried.append(1)
        return [value]

    assert trials.proven("a", 1, paddle.float32, lambda: fast(one), lambda: [one])
    assert trials.proven("a", 1, paddle.float32, lambda: fast(one), lambda: [one])
    assert len(tried) == 1
    assert not trials.proven("b", 1, paddle.float32, lambda: [other], lambda: [one])
    assert not trials.proven("c", 1, paddle.float32, lambda: [paddle.ones([2])], lambda: [one])
    assert not trials.proven("d", 1, paddle.bfloat16, lambda: [one * float("nan")], lambda: [one])
    told = capsys.readouterr().err
    assert told.count("the plain path is used") == 3
    assert "b does not hold on cpu (result 0 differs by 5.0e-01, 1e-04 allowed)" in told.replace(
        " is allowed", " allowed"
    )
    assert trials.verdicts() == {"a, float32": True, "b, float32": False, "c, float32": False, "d, bfloat16": False}


def test_a_kernel_that_is_not_there_is_left_alone(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    """On a CPU the flash kernel of a card fails, which is what an unfit card looks like."""
    monkeypatch.setattr(trials, "_verdicts", {})
    assert CARD or not flash_holds(4, 2, 64, True, paddle.bfloat16)
    assert CARD or "flash attention does not hold on cpu" in capsys.readouterr().err


@pytest.mark.skipif(not CARD, reason="no card here")
def test_a_card() -> None:
    wrong = [line for line in check_card("gpu:0") if line.passed is False]
    assert not wrong

"""`doctor --card` with the CPU in the card's place: right lines are right, and a broken path turns
its line red; and what fast paths do where they do not hold. With a card, its lines too.
"""

from __future__ import annotations

import paddle
import pytest

from ernie_tune.cli import doctor
from ernie_tune.cli.verbs import UsageError
from ernie_tune.models import proven as trials
from ernie_tune.models.attention import flash_holds, segment_attention
from ernie_tune.models.presets import preset
from ernie_tune.train import card_check
from ernie_tune.train.card_check import OPERATORS, CheckLine, _operator, _steps, check_card

CARD = paddle.is_compiled_with_cuda() and paddle.device.cuda.device_count() > 0


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_on_a_cpu(name: str) -> None:
    line = _operator(name, OPERATORS[name], "cpu", "float32")
    assert line.passed, line


def broken_attention(q, k, v, plan):  # type: ignore[no-untyped-def]
    return segment_attention(q, k, v, plan) * 1.001


def without_gradient(x, w, counts):  # type: ignore[no-untyped-def]
    return card_check.paddle.concat([x, x], 1)[:, :24] * 0.0


@pytest.mark.parametrize(
    ("what", "mutant", "red"),
    [
        ("segment_attention", broken_attention, "attention, causal"),
        ("grouped_matmul", without_gradient, "experts"),
        ("swiglu", lambda a, b: a * b, "SwiGLU"),
        ("rms_norm", lambda x, w, eps: x * w, "RMSNorm"),
    ],
)
def test_a_broken_path_is_red(monkeypatch, what: str, mutant, red: str) -> None:  # type: ignore[no-untyped-def]
    # the reference is computed by the sound path, the device by the broken one
    sound, devices = getattr(card_check, what), []
    real = card_check._results

    def results(operator, device, dtype):  # type: ignore[no-untyped-def]
        devices.append(dtype)
        monkeypatch.setattr(card_check, what, mutant if dtype == "float32" else sound)
        return real(operator, device, dtype)

    monkeypatch.setattr(card_check, "_results", results)
    line = _operator(red, OPERATORS[red], "cpu", "float32")
    assert devices == ["float64", "float32"]
    assert line.passed is False


def test_an_operator_that_fails_is_a_line(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    def fails(make):  # type: ignore[no-untyped-def]
        if make([0.0]).dtype == paddle.float32:
            raise RuntimeError("\n\nno such kernel here\n")
        return [make([1.0])]

    line = _operator("x", fails, "cpu", "float32")
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
    monkeypatch.setattr(card_check, "_models", lambda *_: [CheckLine("step", "off by 1", False)])
    monkeypatch.setattr(card_check, "_decoding", lambda *_: CheckLine("decoding", "9 tokens/s", True))
    assert doctor.run(["--card", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "BAD  step: off by 1" in lines
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

"""The CPU is checked once, and a wrong product stops the program."""

from __future__ import annotations

from pathlib import Path

import paddle
import pytest

from ernie_tune.models import startup


def test_line_is_given_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_checked", [])
    line = startup.prepare_device()
    assert "GFLOP/s" in line
    assert startup.prepare_device() == ""


def test_product_is_right_to_float32() -> None:
    error, gflops = startup.check_product(64)
    assert error < 1e-6
    assert gflops > 0


def test_wrong_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(startup, "_checked", [])
    real = paddle.matmul
    monkeypatch.setattr(paddle, "matmul", lambda a, b: real(a, b) + 1.0)
    with pytest.raises(RuntimeError, match="unset MKL_DEBUG_CPU_TYPE"):
        startup.prepare_device()


def test_huge_pages_are_asked_for_where_linux_has_them() -> None:
    assert startup.prefer_huge_pages(2**22) == Path("/sys/kernel/mm/transparent_hugepage").exists()

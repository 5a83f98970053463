"""Bars and lines as they reach a terminal, a pipe and a notebook."""

from __future__ import annotations

import io
import math
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from ernie_tune.report.log import RunLog
from ernie_tune.report.progress import Progress, bar_html, choose_mode, clock, in_notebook, resident_gib


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Handle:
    def __init__(self, pages: list[str]) -> None:
        self.pages = pages

    def update(self, page: str) -> None:
        self.pages.append(page)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for IPython in a Jupyter kernel; the list holds every page that was displayed."""
    pages: list[str] = []
    shell = type("ZMQInteractiveShell", (), {})()
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")

    def show(page: str, display_id: bool) -> Handle:
        assert display_id
        pages.append(page)
        return Handle(pages)

    vars(ipython).update(get_ipython=lambda: shell, display=display)
    vars(display).update(HTML=str, display=show)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return pages


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.6, 125, 3723, math.nan, math.inf)] == [
        "00:00",
        "01:00",
        "02:05",
        "1:02:03",
        "?",
        "?",
    ]


def test_mode() -> None:
    assert choose_mode(Terminal(), {}) == "terminal"
    assert choose_mode(io.StringIO(), {}) == "plain"
    assert choose_mode(Terminal(), {"PADDLE_TRAINER_ID": "0"}) == "plain"
    assert choose_mode(Terminal(), {}, disable_tqdm=True) == "plain"


def test_ipython_is_not_imported_to_find_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()
    assert "IPython" not in sys.modules
    with pytest.raises(ValueError, match=r"mode \('bar'\) must be one of terminal, plain, notebook"):
        Progress(3, mode="bar")


def test_a_terminal_ipython_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = type("TerminalInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    assert not in_notebook()


def test_plain_lines() -> None:
    out = io.StringIO()
    with Progress(5, title="train", every=2, mode="plain", stream=out) as p:
        for step in range(1, 6):
            p.update(step, loss=1 / step, tokens_per_second=12345.6, memory_gib=5.12, remaining=65, accuracy=0.5)
    lines = out.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["train 2/5 (40%)", "train 4/5 (80%)", "train 5/5 (100%)"]
    assert lines[0] == (
        "train 2/5 (40%), loss: 0.5, tokens/s: 12,346, memory: 5.1 GiB, accuracy: 0.5, elapsed: 00:00, left: 01:05"
    )


def test_lines_of_a_run_log_are_not_doubled(tmp_path: Path) -> None:
    out = io.StringIO()
    with Progress(2, every=0, mode="plain", stream=out) as p:
        log = RunLog(tmp_path, echo=p.write)
        for step in (1, 2):
            log.log(step, {"loss": 1.0}, step / 2)
            p.update(step, loss=1.0)
    assert len(out.getvalue().splitlines()) == 2
    assert "global_step: 2" in out.getvalue()


def test_terminal_bar() -> None:
    out = Terminal()
    with Progress(4, title="train", start_step=1, mode="terminal", stream=out) as p:
        p.update(2, loss=0.25, tokens_per_second=900, memory_gib=3.0, remaining=75)
        p.write("a line of the log")
    shown = out.getvalue()
    assert "a line of the log\n" in shown
    last = shown.split("\r")[-1]
    assert "train  50% |" in last
    assert "| 2/4, [00:00<01:15] loss 0.25, 900 tokens/s, 3.0 GiB" in last


def test_notebook_bar(kernel: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(3, title="<train>") as p:
        p.write("note")
        for step in (1, 2):
            p.update(step, loss=2.0 / step, remaining=10)
    assert capsys.readouterr().out == "note\n"
    assert "&lt;train&gt; · 0 / 3 · 0 %" in kernel[0]
    assert "&lt;train&gt; · 2 / 3 · 67 %" in kernel[-1]
    assert "<svg" in kernel[-1]
    assert "width:66.7%" in kernel[-1]
    # the first, the first update, the last; the one between came too soon to be drawn
    assert len(kernel) == 3


def test_bar_html_escapes() -> None:
    page = bar_html(1, 0, "", {"<b>": "<i>"})
    assert "&lt;b&gt;" in page
    assert "&lt;i&gt;" in page
    assert "width:100.0%" in page


def test_remaining_counts_own_steps_only(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    p = Progress(110, start_step=50, is_main=False)
    assert math.isnan(p.remaining_seconds)
    now[0] = 120.0
    p.update(60)
    assert p.remaining_seconds == 100.0  # 20 s for 10 steps, 50 to go


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(2, is_main=False, mode="plain") as p:
        p.update(1, loss=1.0)
        p.write("x")
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_resident_memory(tmp_path: Path) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t 3145728 kB\nVmRSS:\t 1572864 kB\n")
    assert (resident_gib(status=status), resident_gib(peak=True, status=status)) == (1.5, 3.0)
    status.write_text("Name:\tkernel thread\n")
    assert math.isnan(resident_gib(status=status))
    assert 0.005 < resident_gib(status=tmp_path / "absent") < 1000


def test_memory_where_the_system_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(resident_gib(status=tmp_path / "absent"))


def test_inner_bar_goes_when_it_ends() -> None:
    stream = Terminal()
    with Progress(8, title="before", stream=stream, inner=True) as bar:
        assert bar.is_bar
        bar.advance(4)
        bar.advance(2)
        assert bar.step == 6
    text = stream.getvalue()
    assert "before" in text
    assert "<" in text  # elapsed<left
    assert "GiB" not in text
    assert text.rstrip("\r").endswith(" ")  # wiped


def test_inner_lines_in_a_pipe_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(100, title="eval", stream=stream, inner=True) as bar:
        assert not bar.is_bar
        for _ in range(50):
            now[0] += 0.5
            bar.advance(2)
    assert stream.getvalue().splitlines() == [
        "eval 40/100 (40%), elapsed: 00:10, left: 00:15",
        "eval 80/100 (80%), elapsed: 00:20, left: 00:05",
    ]

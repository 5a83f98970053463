"""How far a run is, shown where it runs: a tqdm bar in a terminal, an HTML bar with a small loss
curve in a notebook, plain lines in a pipe or a worker.

The HTML bar is replaced in place through IPython's display handle, which needs no ipywidgets.
Refuses to know: log files, what the numbers mean, GPUs (the caller passes their memory), paddle.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from ernie_tune.config.language import say
from ernie_tune.report.plot import mini_svg

MODES = ("terminal", "plain", "notebook")
_REDRAW_SECONDS, _INNER_SECONDS = 0.25, 10.0
_GIB = 2.0**30


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel. IPython is asked only if something has already
    loaded it.
    """
    if "IPython" not in sys.modules:
        return False
    return type(sys.modules["IPython"].get_ipython()).__name__ == "ZMQInteractiveShell"


def choose_mode(stream: TextIO, environ: Mapping[str, str], disable_tqdm: bool = False) -> str:
    """ "notebook" in a kernel, "terminal" where `stream` is one, else "plain": pipes, launched
    workers, and `disable_tqdm`.
    """
    if disable_tqdm or "PADDLE_TRAINER_ID" in environ:
        return "plain"
    if in_notebook():
        return "notebook"
    return "terminal" if stream.isatty() else "plain"


def resident_gib(peak: bool = False, status: Path = Path("/proc/self/status")) -> float:
    """Main memory this process holds, or held at most, in GiB; where the system does not tell the
    present value, the peak; nan where neither.
    """
    key = "VmHWM:" if peak else "VmRSS:"
    if status.exists():
        lines = status.read_text(encoding="utf-8").splitlines()
        found = [int(line.split()[1]) for line in lines if line.startswith(key)]
        return found[0] * 1024 / _GIB if found else math.nan
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def clock(seconds: float) -> str:
    """1:02:03, or 02:03 below an hour; ? for nan and inf."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class Progress:
    """`with Progress(300, title="train") as p: p.update(step, loss=0.4, tokens_per_second=900.0,
    memory_gib=5.1)`.

    `start_step`: steps done before (a resumed run's speed counts only its own). `every`: steps
    between plain lines; 0 none, for runs whose `RunLog` prints a line each (pass `echo=p.write`).
    `mode`: one of MODES; empty: `choose_mode`. The bar goes to stderr, lines to stdout; `stream`
    takes both. Ranks other than the main one show nothing. Raises ValueError for another mode.

    `inner`: a bar for something that a run does beside its steps, such as evaluating:
    `advance(rows)` counts on; it goes when it ends, and plain lines come at most every ten seconds.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "",
        start_step: int = 0,
        every: int = 1,
        mode: str = "",
        is_main: bool = True,
        stream: TextIO | None = None,
        inner: bool = False,
    ) -> None:
        if mode and mode not in MODES:
            raise ValueError(
                say(
                    f"mode ({mode!r}) must be one of {', '.join(MODES)}; leave it empty to choose by itself",
                    f"mode（{mode!r}）须为 {', '.join(MODES)} 之一；留空则自动选择",
                )
            )
        bar, lines = stream or sys.stderr, stream or sys.stdout
        mode = mode or choose_mode(bar, os.environ)
        self.total_steps, self.start_step, self.step = total_steps, start_step, start_step
        self._start = time.monotonic()
        self._view: _Terminal | _Notebook | _Plain | None = None
        self._memory = math.nan if inner else None
        if not is_main:
            return
        if mode == "terminal":
            self._view = _Terminal(total_steps, start_step, title, bar, lines, inner)
        elif mode == "notebook":
            self._view = _Notebook(total_steps, start_step, title)
        else:
            self._view = _Plain(total_steps, title, every, lines, _INNER_SECONDS if inner else 0.0)

    @property
    def is_bar(self) -> bool:
        """Whether a bar shows each step, so that lines need not."""
        return isinstance(self._view, _Terminal | _Notebook)

    @property
    def elapsed_seconds(self) -> float:
        return time.monotonic() - self._start

    @property
    def remaining_seconds(self) -> float:
        """At the mean speed since the start; nan before the first step."""
        done = self.step - self.start_step
        return self.elapsed_seconds / done * (self.total_steps - self.step) if done > 0 else math.nan

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        memory_gib: float | None = None,
        remaining: float | None = None,
        **more: Any,
    ) -> None:
        """Show that `step` steps are done. `remaining`: seconds; None: `remaining_seconds`. Other
        names are shown as they are.
        """
        self.step = step
        if self._view is None:
            return
        values = {"loss": f"{loss:.4g}"} if loss is not None else {}
        if tokens_per_second is not None:
            values["tokens/s"] = f"{tokens_per_second:,.0f}"
        memory = memory_gib if memory_gib is not None else resident_gib() if self._memory is None else self._memory
        values |= {} if math.isnan(memory) else {"memory": f"{memory:.1f} GiB"}
        values |= {name: f"{value:.4g}" if isinstance(value, float) else str(value) for name, value in more.items()}
        left = self.remaining_seconds if remaining is None else remaining
        times = {"elapsed": clock(self.elapsed_seconds), "left": clock(left)}
        self._view.show(step, loss, values | times)

    def advance(self, count: int = 1) -> None:
        """Show that `count` more are done."""
        self.update(self.step + count)

    def write(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        if self._view is not None:
            self._view.write(line)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._view is not None:
            self._view.close()


class _Terminal:
    _FORMAT = "{desc}{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt}{postfix}"

    def __init__(self, total: int, start: int, title: str, bar: TextIO, lines: TextIO, inner: bool) -> None:
        desc = f"{title} " if title else ""
        self._lines = lines
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=desc,
            bar_format=self._FORMAT,
            dynamic_ncols=True,
            file=bar,
            leave=not inner,
        )

    def show(self, step: int, loss: float | None, values: Mapping[str, str]) -> None:
        times = f"{values['elapsed']}<{values['left']}"
        rest = ", ".join(
            f"{value} {name}" if name == "tokens/s" else value if name == "memory" else f"{name} {value}"
            for name, value in values.items()
            if name not in ("elapsed", "left")
        )
        self._bar.set_postfix_str(f"[{times}] {rest}", refresh=False)
        self._bar.update(step - self._bar.n)

    def write(self, line: str) -> None:
        self._bar.write(line, file=self._lines)

    def close(self) -> None:
        self._bar.refresh()
        self._bar.close()


class _Plain:
    def __init__(self, total: int, title: str, every: int, stream: TextIO, seconds: float) -> None:
        self._total, self._title, self._every, self._stream = total, title, every, stream
        self._seconds, self._said = seconds, time.monotonic()

    def show(self, step: int, loss: float | None, values: Mapping[str, str]) -> None:
        if self._seconds and time.monotonic() - self._said < self._seconds:
            return
        self._said = time.monotonic()
        if self._every and (self._seconds or step % self._every == 0 or step == self._total):
            share = 100 * step / max(self._total, 1)
            parts = [
                f"{self._title} {step}/{self._total} ({share:.0f}%)".strip(),
                *(f"{k}: {v}" for k, v in values.items()),
            ]
            self.write(", ".join(parts))

    def write(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class _Notebook:
    def __init__(self, total: int, start: int, title: str) -> None:
        self._display = importlib.import_module("IPython.display")
        self._total, self._title = total, title
        self._losses: list[tuple[float, float]] = []
        self._state: tuple[int, Mapping[str, str]] = (start, {})
        self._drawn = -math.inf
        self._handle = self._display.display(self._page(), display_id=True)

    def show(self, step: int, loss: float | None, values: Mapping[str, str]) -> None:
        self._losses += [] if loss is None else [(float(step), loss)]
        self._state = (step, values)
        if time.monotonic() - self._drawn >= _REDRAW_SECONDS:
            self._drawn = time.monotonic()
            self._handle.update(self._page())

    def write(self, line: str) -> None:
        print(line, flush=True)

    def close(self) -> None:
        self._handle.update(self._page())

    def _page(self) -> Any:
        step, values = self._state
        return self._display.HTML(bar_html(step, self._total, self._title, values, mini_svg(self._losses)))


def bar_html(step: int, total: int, title: str, values: Mapping[str, str], svg: str = "") -> str:
    """The notebook's bar: title, share done, values, and a curve."""
    share = 100 * step / max(total, 1)
    head = " · ".join(part for part in (title, f"{step} / {total}", f"{share:.0f} %") if part)
    cells = "".join(
        f'<span style="margin-right:18px"><span style="color:#64748b">{escape(name)}</span> <b>{escape(value)}</b></span>'
        for name, value in values.items()
    )
    return (
        '<div style="font:13px system-ui,sans-serif;max-width:640px;color:#0f172a;background:#fff;padding:8px">'
        f"<div>{escape(head)}</div>"
        '<div style="height:8px;border-radius:4px;background:#e2e8f0;margin:6px 0;overflow:hidden">'
        f'<div style="width:{min(share, 100):.1f}%;height:100%;background:#2563eb"></div></div><div>{cells}</div>{svg}</div>'
    )

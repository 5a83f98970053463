"""Curves: ticks, smoothing, the SVG as a document, the terminal, the picture."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from xml.etree import ElementTree

import pytest

from ernie_tune.report.plot import (
    curves_svg,
    mini_svg,
    nice_ticks,
    panels,
    points_of,
    short_names,
    smooth,
    terminal_plot,
    thin,
    tick_label,
    write_loss_png,
    write_loss_svg,
)

SVG = "{http://www.w3.org/2000/svg}"


def history(count: int = 60, slope: float = 0.05) -> list[dict[str, float]]:
    out: list[dict[str, float]] = []
    for step in range(1, count + 1):
        out.append(
            {"step": step, "epoch": step / 10, "loss": 4 - slope * step, "learning_rate": 1e-4, "interval_runtime": 1}
        )
        if step % 20 == 0:
            out.append(
                {"step": step, "eval_loss": 4.2 - slope * step, "eval_exact_match": step / 100, "eval_anls": 0.5}
            )
    return out


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_nice_ticks() -> None:
    assert nice_ticks(0, 4.8) == [0, 1, 2, 3, 4]
    assert nice_ticks(0.13, 0.87, 4) == [0.2, 0.4, 0.6, 0.8]
    assert nice_ticks(-2, 3) == [-2, -1, 0, 1, 2, 3]
    assert nice_ticks(0, 3e-4) == pytest.approx([0, 1e-4, 2e-4, 3e-4])
    assert nice_ticks(1, 400, 8) == [50, 100, 150, 200, 250, 300, 350, 400]
    assert nice_ticks(7, 7) == [7]


def test_tick_label() -> None:
    values = [0, 0.25, 3e-05, 0.0003, 12_500, 1000, 2e7, -0.5]
    assert [tick_label(v) for v in values] == ["0", "0.25", "3e-5", "0.0003", "12.5k", "1000", "2e7", "-0.5"]


def test_smoothing_keeps_straight_lines() -> None:
    line = [(float(x), 3 - 0.5 * x) for x in range(100)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    assert smooth(line[:24]) == line[:24]


def test_smoothing_removes_noise_without_lag() -> None:
    saw = [(float(x), x + (1.0 if x % 2 else -1.0)) for x in range(200)]
    assert max(abs(y - x) for x, y in smooth(saw)[10:-10]) < 0.02


def test_thin_keeps_peaks_and_ends() -> None:
    points = [(float(x), 0.0) for x in range(10_000)]
    points[4321], points[777] = (4321.0, 9.0), (777.0, -9.0)
    kept = thin(points, 100)
    assert len(kept) <= 100
    assert {points[0], points[777], points[4321], points[-1]} <= set(kept)
    assert kept == sorted(kept)


def test_points_leave_out_what_is_no_number() -> None:
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": "nan"}, {"step": 4, "loss": 1}]
    assert points_of(records, "loss") == [(1, 2), (4, 1)]


def test_panels_of_one_run() -> None:
    shown = panels({"": history()})
    assert [(p.title, [c.name for c in p.curves]) for p in shown] == [
        ("loss", ["train", "eval"]),
        ("learning_rate", [""]),
        ("eval", ["exact_match", "anls"]),
    ]
    train, held_out = shown[0].curves
    assert len(train.raw) == 60
    assert held_out.points == [(20, pytest.approx(3.2)), (40, pytest.approx(2.2)), (60, pytest.approx(1.2))]


def test_families_share_a_panel() -> None:
    records = [{"step": s, "rewards/chosen": s, "rewards/rejected": -s, "kl": 0.1} for s in (1, 2)]
    assert [(p.title, [c.name for c in p.curves]) for p in panels({"": records})] == [
        ("rewards", ["chosen", "rejected"]),
        ("kl", [""]),
    ]


def test_panels_of_several_runs() -> None:
    shown = panels({"a": history(), "b": history(slope=0.02), "empty": []})
    assert [p.title for p in shown] == ["loss", "learning_rate", "eval_exact_match", "eval_anls"]
    assert [c.name for c in shown[0].curves] == ["a", "a eval", "b", "b eval"]
    assert [c.name for c in shown[2].curves] == ["a", "b"]
    assert len({c.colour for c in shown[2].curves}) == 2
    assert shown[2].curves[1].colour == shown[0].curves[2].colour


def test_svg_is_a_document_with_everything_inside(tmp_path: Path) -> None:
    write_loss_svg(history(), tmp_path / "runs" / "training_loss.svg", title="a < b & c")
    svg = (tmp_path / "runs" / "training_loss.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    found = texts(svg)
    assert {"a < b & c", "loss", "learning_rate", "eval", "step", "train 1", "eval 1.2", "exact_match 0.6"} <= set(
        found
    )
    for node in root.iter(f"{SVG}path"):
        pairs = [p.lstrip("ML").split(",") for p in node.attrib["d"].split() if "," in p]
        assert all(0 <= float(x) <= width and 0 <= float(y) <= height for x, y in pairs)
    assert "nan" not in svg
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_loss_falls_downwards() -> None:
    root = ElementTree.fromstring(curves_svg({"": history()}))
    line = next(n for n in root.iter(f"{SVG}path") if n.attrib.get("class") == "line")
    (x0, y0), *_, (x1, y1) = ([float(v) for v in p.lstrip("ML").split(",")] for p in line.attrib["d"].split())
    assert x1 > x0
    assert y1 > y0  # SVG counts from the top


def test_svg_of_little() -> None:
    assert "nothing was logged yet" in texts(curves_svg({"": []}))
    one = curves_svg({"": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}]})
    assert one.count("<circle") == 1
    flat = curves_svg({"": [{"step": s, "loss": 0.0} for s in range(3)]})
    assert "nan" not in flat


def test_crowded_legends_name_every_line() -> None:
    records = [{"step": s, **{f"group/some_long_name_{k}": k + s for k in range(8)}} for s in (1, 2)]
    found = texts(curves_svg({"": [{"step": 1, "loss": 1.0}, *records]}))
    assert {f"some_long_name_{k}" for k in range(8)} <= {text.split()[0] for text in found}


def test_svg_follows_the_systems_colours() -> None:
    assert "prefers-color-scheme:dark" in curves_svg({"": history()})


def test_short_names() -> None:
    assert short_names(["out/a", "out/b/"]) == {"out/a": "a", "out/b/": "b"}
    assert short_names(["x/a/run", "x/b/run"]) == {"x/a/run": "a/run", "x/b/run": "b/run"}
    assert short_names(["out"]) == {"out": "out"}


def test_mini_svg() -> None:
    assert mini_svg([(1, 2.0)]) == mini_svg([(1, math.nan), (2, 1.0)]) == ""
    assert len(list(ElementTree.fromstring(mini_svg([(1, 2.0), (2, 1.0)])).iter(f"{SVG}path"))) == 2


def test_terminal_plot() -> None:
    runs = {"a": history(), "b": history(slope=0.02)}
    lines = terminal_plot(runs, width=20, height=4).splitlines()
    assert lines[0].split() == ["loss", "⠒⠒", "a", "bb", "b"]
    assert lines[1].startswith("     4.16 │⠒")
    assert lines[6].split() == ["1", "step", "60"]
    assert len(lines) == 7, "one chart"
    assert all(len(line) == 31 for line in lines[1:5])
    # A falling line: the leftmost dot is on a higher row than the rightmost; the flatter run ends
    # above the other.
    first, last = ([r for r, line in enumerate(lines[1:5]) if line[column] != " "] for column in (11, 30))
    assert max(first) < max(last)
    assert lines[1 + last[0]][30] == "b"
    coloured = terminal_plot(runs, width=20, height=4, colour=True)
    assert "\x1b[94m" in coloured
    assert "\x1b[93m" in coloured
    assert terminal_plot({"a": history()}, "kl").startswith("no kl was logged; there is eval_anls, eval_exact_match")


def test_axis_says_zero_for_nothing() -> None:
    records = [{"step": s, "loss": 0.8 - 0.1 * s} for s in range(1, 9)]
    assert "e-1" not in terminal_plot({"": records}, height=14)


def test_no_png_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not write_loss_png(history(), tmp_path / "training_loss.png")
    assert list(tmp_path.iterdir()) == []


def test_png_draws_every_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """matplotlib itself is no dependency of the tests: a stand-in records what it is asked to
    draw.
    """
    calls: list[str] = []

    class Axes:
        lines = (1,)

        def __init__(self) -> None:
            self.spines = _Spines()

        def plot(self, x: tuple[float, ...], y: tuple[float, ...], **style: object) -> None:
            calls.append(f"{style.get('label', 'raw')} {len(x)} {y[-1]:.1f}")

        def set(self, **labels: str) -> None: ...

        def grid(self, **style: float) -> None: ...

        def legend(self, **style: bool) -> None: ...

    class _Spines:
        def __getitem__(self, names: list[str]) -> SimpleNamespace:
            return SimpleNamespace(set_visible=lambda on: None)

    class Figure:
        def __init__(self, **options: object) -> None: ...

        def add_subplot(self) -> Axes:
            return Axes()

        def savefig(self, path: Path, format: str) -> None:
            path.write_bytes(format.encode())

    figure = ModuleType("matplotlib.figure")
    vars(figure)["Figure"] = Figure
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", figure)
    assert write_loss_png(history(), tmp_path / "training_loss.png")
    assert calls == ["raw 60 1.0", "train 60 1.0", "eval 3 1.2"]
    assert [p.name for p in tmp_path.iterdir()] == ["training_loss.png"]

"""A check, as text for a terminal in the chosen language, and as JSON for machines, which holds
both.

Refuses to know: how things were found, pages (`report/check_page.py`).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ernie_tune.config.language import Text, counted, say
from ernie_tune.data.doctor.checks import one_line
from ernie_tune.data.doctor.scan import Report
from ernie_tune.data.doctor.stats import Histogram, Stats

_ASSETS = Path(__file__).parent.parent / "assets"
_BAR_CHARACTERS = 40
SHOWN_BARS = 24


class Chart(NamedTuple):
    """Counts under a title."""

    title: Text
    bars: list[tuple[str, int]]


def charts(stats: Stats) -> list[Chart]:
    """The distributions of a data set; empty ones are left out."""
    images = Histogram()
    images.add(stats.image_tokens(stats.processor.images))
    found = [
        Chart(say("text tokens a row (estimate)", "每行文本 token 数（估计）"), stats.text.bars(stats.tokens_per_byte)),
        Chart(say("characters an answer", "回答字数"), stats.answers.bars()),
        Chart(
            say("pictures and videos a row", "每行图片与视频数"),
            [(str(n), rows) for n, rows in sorted(stats.media.items())],
        ),
        Chart(say("tokens a picture (opened ones)", "每张图片 token 数（已打开的）"), images.bars()),
        Chart(
            say("rows a domain", "各领域行数"), [(one_line(name), rows) for name, rows in stats.domains.most_common()]
        ),
    ]
    return [chart for chart in found if chart.bars and [label for label, _ in chart.bars] != ["0"]]


def _named(folder: str) -> str:
    """A tokenizer's folder; of one that comes with the package its name, for where a package lies
    is nobody's concern.
    """
    return Path(folder).name if Path(folder).is_relative_to(_ASSETS) else folder


def facts_lines(stats: Stats) -> Iterator[Text]:
    """What is to be said in words."""
    kinds = ", ".join(f"{name} {count:,}" for name, count in stats.signals.most_common())
    yield (
        say(f"rows: {stats.rows:,} ({kinds})", f"行数：{stats.rows:,}（{kinds}）")
        if kinds
        else say(f"rows: {stats.rows:,}", f"行数：{stats.rows:,}")
    )
    tokens, mean = stats.text.total * stats.tokens_per_byte, stats.text.mean * stats.tokens_per_byte
    where = _named(str(stats.processor.tokenizer.where))
    yield say(
        f"text: about {tokens:,.0f} tokens, {mean:,.1f} a row, by the tokenizer of {where}",
        f"文本：约 {tokens:,.0f} 个 token，每行 {mean:,.1f} 个（分词器：{where}）",
    )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in stats.languages().items())
    yield say(f"letters: {shares}", f"文字：{shares}")
    for limit, per_image, shrunk in stats.budgets():
        yield say(
            f"image_max_pixels {limit:,}: {per_image:,.0f} tokens a picture, {shrunk:.0%} of the pictures shrunk",
            f"image_max_pixels {limit:,}：每张图片 {per_image:,.0f} 个 token，{shrunk:.0%} 的图片被缩小",
        )
    advice = stats.advice()
    if advice is not None:
        yield say(
            f"advice: image_max_pixels: {advice} keeps nearly all pictures at their size",
            f"建议：image_max_pixels: {advice}，几乎不缩小图片",
        )


def summary(report: Report) -> Iterator[Text]:
    """What was checked and what was left out."""
    for file in report.files:
        held_out = (" (evaluation)", "（评测）") if file.evaluation else ("", "")
        yield say(
            f"{file.path}{held_out[0]}: {counted(file.rows, 'row')}, {file.reason}",
            f"{file.path}{held_out[1]}：{file.rows:,} 行，格式 {file.form.name}",
        )
    seen, opened = report.pictures.seen, report.pictures.opened
    if opened < seen:
        yield say(
            f"pictures: {opened:,} of {seen:,} opened; --decode all opens all",
            f"图片：打开了 {seen:,} 张中的 {opened:,} 张；--decode all 打开全部",
        )
    alike, compared, same = report.near
    if compared < alike:
        yield say(
            f"near duplicates are an estimate: {alike:,} rows look alike, {compared:,} were compared, {same:,} are alike",
            f"近似重复为估计值：{alike:,} 行疑似，比较了 {compared:,} 行，其中 {same:,} 行属实",
        )
    errors, warnings = report.findings.total("error"), report.findings.total("warning")
    rows = sum(file.rows for file in report.files)
    yield say(
        f"{counted(rows, 'row')} in {report.seconds:.1f} s: {counted(errors, 'error')}, {counted(warnings, 'warning')}",
        f"{rows:,} 行，用时 {report.seconds:.1f} 秒：{errors:,} 个错误，{warnings:,} 个警告",
    )


def more(report: Report) -> Iterator[tuple[str, int, int]]:
    """(code, found, shown) of what was found more often than is shown."""
    shown = [finding.code for finding in report.findings.kept]
    for code, count in report.findings.counts.items():
        if count > shown.count(code):
            yield code, count, shown.count(code)


def as_text(report: Report) -> Iterator[str]:
    """The lines of `data check`."""
    for finding in report.findings.kept:
        yield str(finding)
    for code, count, shown in more(report):
        yield str(
            say(
                f"{code}: {count:,} found, {shown:,} shown; --limit 0 shows all",
                f"{code}：共 {count:,} 处，显示 {shown:,} 处；--limit 0 显示全部",
            )
        )
    yield from map(str, summary(report))


def stats_text(stats: Stats) -> Iterator[str]:
    """The lines of `data stats`."""
    yield from map(str, facts_lines(stats))
    for chart in charts(stats):
        yield f"{chart.title}:"
        bars, highest = chart.bars[:SHOWN_BARS], max(count for _, count in chart.bars)
        width = max(len(label) for label, _ in bars)
        for label, count in bars:
            yield f"  {label:>{width}}  {'█' * round(_BAR_CHARACTERS * count / highest) or '▏'} {count:,}"
        if len(chart.bars) > len(bars):
            left = len(chart.bars) - len(bars)
            yield str(say(f"  … {left} more", f"  … 其余 {left} 项"))


def as_json(report: Report) -> str:
    """One object: exit_code, counts, problems, files, stats."""
    found = report.findings
    value: dict[str, Any] = {
        "exit_code": report.exit_code,
        **{f"{severity}s": found.total(severity) for severity in ("error", "warning", "note")},
        "counts": dict(found.counts),
        "problems": [dataclasses.asdict(finding) for finding in found.kept],
        "files": [
            {"path": f.path, "rows": f.rows, "format": f.form.name, "evaluation": f.evaluation} for f in report.files
        ],
        "pictures": {"seen": report.pictures.seen, "opened": report.pictures.opened},
        "near_duplicates": dict(zip(("alike", "compared", "confirmed"), report.near, strict=True)),
        "stats": report.stats.as_dict(),
        "seconds": round(report.seconds, 3),
    }
    return json.dumps(value, indent=1)  # in ASCII, so that no terminal or pipe can break it

"""The page of `data check`: what was found, rows with their pictures, and how the data are spread.
One file, of `html.py`'s kit.

Refuses to know: how things were found, terminals, paddle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from ernie_tune.config.language import Text, say
from ernie_tune.data.doctor.checks import Finding
from ernie_tune.data.doctor.report import SHOWN_BARS, charts, facts_lines, summary
from ernie_tune.data.doctor.scan import DataFile, Report
from ernie_tune.data.records import DataError, Message, Record
from ernie_tune.report import html
from ernie_tune.report.pages import without_tags

# rows shown of all training files together, and of those held out
SAMPLED_ROWS, HELD_OUT_ROWS = 12, 4
_FLAGGED_ROWS = 3  # findings of one kind that are shown with their row
_ROLES = {
    "system": say("System", "系统"),
    "user": say("User", "用户"),
    "assistant": say("Answer", "回答"),
    "tool": say("Tool", "工具"),
}
_EMPTY = say("(empty)", "（空）")
_SEVERITY = {"error": say("error", "错误"), "warning": say("warning", "警告"), "note": say("note", "提示")}


@dataclass
class _Rows:
    """Rows that the page shows: some drawn evenly from each file, and those that something was
    found in.
    """

    sampled: list[tuple[DataFile, Record]]
    flagged: dict[tuple[str, int], Record | DataError | Mapping[str, Any]]
    may_show: Callable[[str], bool] = lambda path: True


def check_page(report: Report) -> str:
    """The whole page. Reads the files once more, as far as the last row that is shown."""
    name = ", ".join(dict.fromkeys(os.path.basename(file.path) for file in report.files))
    return html.page(say("Data check", "数据检查"), name, check_body(report))


def check_body(report: Report, may_show: Callable[[str], bool] = lambda path: True) -> list[str]:
    """What the page shows, as pieces of HTML. Pictures whose file `may_show` refuses appear by name
    alone.
    """
    rows = _collect(report)
    rows.may_show = may_show
    return [_facts(report), _findings(report, rows), _sample(rows), _spread(report)]


def _facts(report: Report) -> str:
    total = {s: report.findings.total(s) for s in ("error", "warning", "note")}
    rows = sum(file.rows for file in report.files)
    kinds = [
        (f"{rows:,}", say("rows", "行数"), ""),
        (f"{total['error']:,}", say("errors", "错误"), "no" if total["error"] else "ok"),
        (f"{total['warning']:,}", say("warnings", "警告"), "part" if total["warning"] else ""),
    ]
    cells = "".join(f'<p><strong class="{kind}">{n}</strong>{html.both(name)}</p>' for n, name, kind in kinds)
    return f"<div class=hero>{cells}</div>{_list([*summary(report)][:-1])}"


def _list(texts: list[Text]) -> str:
    return "<ul>" + "".join(f"<li>{html.both(text)}</li>" for text in texts) + "</ul>" if texts else ""


def _findings(report: Report, rows: _Rows) -> str:
    """Each kind with its number, some of its rows, and the rest in words."""
    parts = [f"<h2>{html.both(say('Findings', '问题'))}</h2>"]
    if not report.findings.counts:
        return parts[0] + f"<p class=ok>{html.both(say('Nothing was found.', '没有发现问题。'))}</p>"
    by_code: dict[str, list[Finding]] = {}
    for finding in report.findings.kept:
        by_code.setdefault(finding.code, []).append(finding)
    order = ("error", "warning", "note")
    ranked = sorted(
        report.findings.counts.items(), key=lambda c: (order.index(report.findings.severities[c[0]]), -c[1])
    )
    for code, count in ranked:
        severity, found = report.findings.severities[code], by_code.get(code, [])
        kind = {"error": "no", "warning": "part", "note": ""}[severity]
        parts.append(
            f'<h3 class="{kind}">{html.both(_SEVERITY[severity])}: <code>{escape(code)}</code> · {count:,}</h3>'
        )
        shown, rest = _cards(found, rows, severity)
        parts += [*shown, *([_said_list(rest)] if rest else [])]
        if len(found) < count:
            left = count - len(found)
            parts.append(f"<p class=sub>{html.both(say(f'… {left:,} more', f'… 其余 {left:,} 处'))}</p>")
    return "".join(parts)


def _said_list(found: list[Finding]) -> str:
    return _list([finding.text for finding in found])


def _cards(found: list[Finding], rows: _Rows, severity: str) -> tuple[list[str], list[Finding]]:
    """(cards of findings whose row is at hand, findings that are left)."""
    cards: list[str] = []
    rest: list[Finding] = []
    for finding in found:
        row = rows.flagged.get((finding.path, finding.line))
        if isinstance(row, Record) and len(cards) < _FLAGGED_ROWS:
            said = f'<p class="said">{html.both(finding.text)}</p>'
            cards.append(_card(row, severity, said, rows.may_show))
        else:
            rest.append(finding)
    return cards, rest


def _sample(rows: _Rows) -> str:
    """Rows as they are read: what the model will be shown and taught."""
    cards = []
    for file, record in rows.sampled:
        held = say(" · evaluation", " · 评测") if file.evaluation else say("", "")
        more = f'<p class="src">{html.both(held)}</p>' if file.evaluation else ""
        cards.append(_card(record, "", more, rows.may_show))
    title = html.both(say("Rows, drawn evenly", "样本（均匀抽取）"))
    return f"<h2>{title}</h2>{''.join(cards)}" if cards else ""


def _card(record: Record, kind: str, more: str, may_show: Callable[[str], bool]) -> str:
    images, clips = _shown(record.images), _clips(record.videos)
    hidden = [str(medium) for medium in (*images, *clips) if not _allowed(medium, may_show)]
    pictures = html.media(
        [i for i in images if _allowed(i, may_show)], [c for c in clips if _allowed(c, may_show)], None, small=True
    ) + "".join(map(html.gone, hidden))
    turns = [_turn(message) for message in record.messages]
    for i, candidate in enumerate(record.candidates):
        name = _judged(record, i)
        text = "\n".join(str(m.get("content", "")) for m in candidate.messages)
        turns.append(f"<dt>{html.both(name)}</dt><dd>{html.lines(without_tags(text), _EMPTY)}</dd>")
    if record.reward is not None and record.reward.answer is not None:
        answer = html.lines(str(record.reward.answer), _EMPTY)
        turns.append(f"<dt>{html.both(say('Right answer', '正确答案'))}</dt><dd>{answer}</dd>")
    return (
        f'<article class="{kind}"><div class=pics>{pictures}</div><div class=text>{more}'
        f"<dl class=turns>{''.join(turns)}</dl><p class=src>{escape(str(record.meta))}</p></div></article>\n"
    )


def _turn(message: Message) -> str:
    role = message["role"]
    text = without_tags(str(message.get("content", "")))
    thought = message.get("reasoning_content")
    shown = (f"<i>{escape(str(thought))}</i>\n" if thought else "") + html.lines(text, _EMPTY)
    return f"<dt>{html.both(_ROLES.get(role, say(role, role)))}</dt><dd>{shown}</dd>"


def _judged(record: Record, index: int) -> Text:
    """What is known of a candidate, in a word."""
    candidate = record.candidates[index]
    if record.signal == "pair":
        return say("Better", "更优") if index == 0 else say("Worse", "较差")
    if candidate.label is not None:
        return say("Good", "好") if candidate.label else say("Bad", "差")
    known = candidate.rank if candidate.rank is not None else candidate.score
    number = "" if known is None else f" ({known:g})"
    return say(f"Answer {index + 1}{number}", f"回答 {index + 1}{number}")


def _allowed(medium: Any, may_show: Callable[[str], bool]) -> bool:
    if isinstance(medium, tuple):
        return all(_allowed(one, may_show) for one in medium)
    is_file = isinstance(medium, str) and not medium.startswith(("data:", "http://", "https://"))
    return not is_file or may_show(medium)


def _shown(images: tuple[Any, ...]) -> list[html.Picture]:
    return [image for image in images if isinstance(image, str | bytes)]


def _clips(videos: tuple[Any, ...]) -> list[html.Clip]:
    return [video for video in videos if isinstance(video, str | bytes | tuple)]


def _spread(report: Report) -> str:
    parts = [
        f"<h2>{html.both(say('Statistics', '统计'))}</h2>",
        _list([*facts_lines(report.stats)]),
        "<div class=charts>",
    ]
    for chart in charts(report.stats):
        more = len(chart.bars) - SHOWN_BARS
        rest = f"<p class=src>{html.both(say(f'… {more} more', f'… 其余 {more} 项'))}</p>" if more > 0 else ""
        parts.append(
            f"<div class=chart><h3>{html.both(chart.title)}</h3>{html.bars(chart.bars[:SHOWN_BARS])}{rest}</div>"
        )
    return "".join([*parts, "</div>"])


def _collect(report: Report) -> _Rows:
    """The rows to show, file by file, none read twice."""
    found = _Rows([], {})
    totals = {held: sum(f.rows for f in report.files if f.evaluation is held) for held in (False, True)}
    for file in report.files:
        share = (HELD_OUT_ROWS if file.evaluation else SAMPLED_ROWS) / max(totals[file.evaluation], 1)
        count = min(file.rows, round(share * file.rows) or 1)
        wanted = {i * file.rows // count for i in range(count)} if count else set()
        lines = {f.line for f in report.findings.kept if f.path == file.path and f.line}
        for number, line, row in _numbered(file):
            if number not in wanted and line not in lines:
                if not wanted and not lines:
                    break
                continue
            try:
                record = file.record(row, line)
            except DataError:
                record = None
            if record is not None and number in wanted:
                found.sampled.append((file, record))
            if record is not None and line in lines:
                found.flagged[file.path, line] = record
            wanted.discard(number)
            lines.discard(line)
    return found


def _numbered(file: DataFile) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """(number, line, row) of the rows that could be parsed, numbers from 0."""
    number = -1
    for batch in file.source.batches():
        for line, row in zip(batch.lines_n.tolist(), batch.rows, strict=True):
            if row is not None and not isinstance(row, DataError):
                number += 1
                yield number, line, row

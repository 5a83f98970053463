"""A page of sampled answers: pictures, what was answered, what it earned and how much better than
expected that was, from the log of a run that samples (rollouts.jsonl).

The page is of `html.py`'s kit. Refuses to know: models, rewards, how a run is made, paddle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.writer import write_atomically
from ernie_tune.config.language import say
from ernie_tune.report import html
from ernie_tune.report.pages import without_tags

ROUNDS, PROMPTS = 6, 8  # rounds that are shown, spread over the run, and prompts of each
_LONGEST = 600  # characters of an answer
_WORDS = {
    "title": say("Sampled answers", "采样的回答"),
    "round": say("Round", "轮次"),
    "gold": say("Gold answer", "标准答案"),
    "answer": say("Answer", "回答"),
    "answers": say("Answers", "回答数"),
    "mean": say("Mean reward", "平均奖励"),
    "parts": say("Made up of", "组成"),
    "reward": say("Reward", "奖励"),
    "advantage": say("Advantage", "优势"),
    "empty": say("(empty)", "（空）"),
    "cut": say("cut off", "被截断"),
}


def read_rollouts(path: Path) -> dict[int, dict[int, list[dict[str, Any]]]]:
    """round -> group -> its answers, of a log that may end in the middle of a line. A group is told
    by its place in the round (a prompt that is drawn twice has two), in older logs by its prompt. A
    round that a resumed run made again counts as it was made last. Raises OSError.
    """
    rounds: dict[int, dict[int, list[dict[str, Any]]]] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:  # the run was cut while it wrote
                continue
            group = rounds.setdefault(row["round"], {}).setdefault(row.get("place", row["prompt"]), [])
            if row["sample"] == 0:
                group.clear()
            group.append(row)
    return rounds


def write_rollouts(path: Path, page: Path, title: str = "") -> int:
    """Write some rounds of the log at `path` to `page`, large pictures to `<stem>_files/` beside
    it; returns how many. Raises OSError.
    """
    rounds = read_rollouts(path)
    numbers = sorted(rounds)
    count = min(ROUNDS, len(numbers))
    shown = [numbers[round(i * (len(numbers) - 1) / max(1, count - 1))] for i in range(count)]
    files = page.with_name(f"{page.stem}_files")
    body = [_trend(rounds)]
    for number in shown:
        groups = rounds[number]
        picked = sorted(groups)[:: max(1, len(groups) // PROMPTS)][:PROMPTS]
        body.append(f"<h2>{html.both(_WORDS['round'])} {number}</h2>")
        body += [group_html(groups[prompt], files) for prompt in picked]
    write_atomically(page, html.page(_WORDS["title"], title, body))
    return len(shown)


def _trend(rounds: Mapping[int, Mapping[int, Sequence[Mapping[str, Any]]]]) -> str:
    """The mean reward of each shown round, of answers that were judged."""
    facts = []
    for number in sorted(rounds)[:: max(1, len(rounds) // 10)]:
        known = [row["reward"] for group in rounds[number].values() for row in group if row["reward"] is not None]
        mean = f"{sum(known) / len(known):.3f}" if known else "-"
        facts.append([str(number), mean, str(sum(map(len, rounds[number].values())))])
    return html.table([html.both(_WORDS[name]) for name in ("round", "mean", "answers")], facts)


def group_html(rows: Sequence[Mapping[str, Any]], files: Path | None) -> str:
    """One prompt: its pictures and question, and its answers, best first. `files`: where large
    pictures go; None: they are drawn smaller.
    """
    first = rows[0]
    names = [name for name in first.get("images", ()) if name]
    asked = without_tags(next((str(row["question"]) for row in rows if row.get("question")), ""))
    question = f'<p class="q">{escape(asked[:_LONGEST])}</p>' if asked.strip() else ""
    gold = "" if first.get("gold") is None else f" · {html.both(_WORDS['gold'])}: <b>{escape(str(first['gold']))}</b>"
    order = sorted(rows, key=lambda row: -(row["reward"] if row["reward"] is not None else float("-inf")))
    cells = []
    for row in order:
        text = html.lines(row["text"][:_LONGEST], _WORDS["empty"]).replace("\n", "<br>")
        cut = f" <i>{html.both(_WORDS['cut'])}</i>" if row["finish_reason"] == "length" else ""
        parts = "<br>".join(f"{escape(name)} {_shown(value)}" for name, value in row["rewards"].items())
        text = "".join(map(_call, row.get("calls", ()))) + text
        cells.append([text + cut, _shown(row["reward"]), f"{row['advantage']:+.3f}", parts])
    table = html.table([html.both(_WORDS[name]) for name in ("answer", "reward", "advantage", "parts")], cells)
    source = f'<p class="src">{escape(str(first["row"]))}{gold}</p>'
    pictures = html.media(names, (), files)
    return f'<article><div class="pics">{pictures}</div><div class="text">{question}{table}{source}</div></article>'


def _call(call: Mapping[str, Any]) -> str:
    """A call of a tool before the answer: what it was given, and gave or showed."""
    given = json.dumps(call.get("arguments", call.get("box")), ensure_ascii=False)
    gave = str(call.get("problem") or call.get("result") or call.get("shown") or "")
    return f"<code>{escape(str(call['name']))} {escape(given[:_LONGEST])}</code> → {escape(gave[:_LONGEST])}<br>"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"

"""The page of sampled answers: what the log says, escaped, best first, of a run that was cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ernie_tune.report.rollout_page import read_rollouts, write_rollouts


def row(number: int, prompt: int, sample: int, text: str, reward: float | None) -> dict[str, Any]:
    return {
        "round": number,
        "prompt": prompt,
        "row": f"x.jsonl:{prompt + 1}",
        "images": [],
        "gold": "7",
        "sample": sample,
        "text": text,
        "finish_reason": "length" if sample else "stop",
        "reward": reward,
        "rewards": {"exact": reward},
        "advantage": 0.5,
    }


def test_a_log_that_was_cut_and_gone_on_with(tmp_path: Path) -> None:
    log, page = tmp_path / "rollouts.jsonl", tmp_path / "rollouts.html"
    rows = [
        row(0, 3, 0, "<b>6</b>", 0.0),
        {
            **row(0, 3, 1, "7", 1.0),
            "calls": [
                {"name": "zoom", "box": [1, 2], "shown": [1, 2]},
                {"name": "<f>", "arguments": {"a": 1}, "result": "two"},
            ],
        },
        row(1, 4, 0, "stale", None),
        {**row(1, 4, 0, "new\nlines", None), "question": "<image>What <i>is</i> it?"},
        row(1, 4, 1, "newer", None),
    ]
    log.write_text("".join(json.dumps(one) + "\n" for one in rows) + '{"round": 2, "pro', encoding="utf-8")
    found = read_rollouts(log)
    assert {n: {p: [r["text"] for r in g] for p, g in some.items()} for n, some in found.items()} == {
        0: {3: ["<b>6</b>", "7"]},
        1: {4: ["new\nlines", "newer"]},
    }
    twice = [{**row(0, 3, s, "7", 1.0), "place": place} for place in (0, 1) for s in (0, 1)]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(one) + "\n" for one in twice), encoding="utf-8")
    assert {place: len(group) for place, group in read_rollouts(tmp_path / "twice.jsonl")[0].items()} == {0: 2, 1: 2}
    assert write_rollouts(log, page, "run") == 2
    text = page.read_text(encoding="utf-8")
    assert "<b>6</b>" not in text
    assert "<code>zoom [1, 2]</code> → [1, 2]<br><code>&lt;f&gt; {&quot;a&quot;: 1}</code> → two<br>7" in text
    assert text.index("two<br>7") < text.index("&lt;b&gt;6")
    assert "stale" not in text
    assert '<p class="q">What &lt;i&gt;is&lt;/i&gt; it?</p>' in text, "asked once, shown above its answers"
    assert "new<br>lines" in text
    assert "x.jsonl:4" in text
    assert text.count("<article>") == text.count('<div class="text">') == 2

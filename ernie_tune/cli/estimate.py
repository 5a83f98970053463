"""`ernie-tune estimate`: memory a card and time a step, before anything is downloaded.

Refuses to know: how they are counted (plan/), paddle.
"""

from __future__ import annotations

import json

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.language import say
from ernie_tune.config.loader import Entry, split_overrides
from ernie_tune.plan.estimate import estimate
from ernie_tune.plan.table import markdown

_OWN = {
    "cards": "cards",
    "gpus": "cards",
    "card": "card",
    "gpu": "card",
    "visual_tokens": "visual_tokens",
    "row_tokens": "row_tokens",
}


def run(args: list[str]) -> int:
    """ernie-tune estimate MODEL|FILE.yaml [key=value | --key value ...] [--json]

    What a run needs on each card, item by item, and how long a step takes; which layout is best,
    and what would have to change where it does not fit. MODEL: a hub name, a preset or a folder;
    its layout is searched for. FILE: as it says.
    Every setting of a YAML file, and: cards=8  card=h800-80g|a100-40g|80g|cpu-16g
                                                visual_tokens=4096 (of a micro-batch)
    row_tokens=600 (longest row, where below max_seq_len). --json: numbers.
    `ernie-tune estimate --table`: the table of launch/README.md.
    """
    if args == ["--table"]:
        print(markdown())
        return 0
    words, entries = split_overrides([a for a in args if a != "--json"])
    if len(words) != 1:
        raise UsageError(
            say(
                f"expected one model or YAML file, got {len(words)}: {' '.join(words) or 'nothing'}",
                f"需要一个模型或 YAML 文件，得到 {len(words)} 个：{' '.join(words) or 'nothing'}",
            )
        )
    own = {_OWN[e.name]: e for e in entries if e.name in _OWN}
    result = estimate(
        words[0],
        cards=_count(own.get("cards")),
        card=str(own["card"].raw) if "card" in own else None,
        visual_tokens=_count(own.get("visual_tokens"), low=0),
        row_tokens=_count(own.get("row_tokens")),
        overrides=tuple(e for e in entries if e.name not in _OWN),
    )
    print(json.dumps(result.as_dict(), indent=2, ensure_ascii=False) if "--json" in args else result)
    return 0


def _count(entry: Entry | None, low: int = 1) -> int | None:
    if entry is None:
        return None
    text = str(entry.raw)
    if not text.isdecimal() or int(text) < low:
        raise UsageError(
            say(
                f"{entry.name} ({text}) must be a whole number of at least {low}; correct it",
                f"{entry.name}（{text}）须为不小于 {low} 的整数；请改正",
            )
        )
    return int(text)

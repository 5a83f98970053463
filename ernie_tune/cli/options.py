"""Options of verbs that ask a model: names, types and defaults, read from the words of a command
line.

Refuses to know: models, files, what the options do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.convert import FALSE, TRUE, did_you_mean
from ernie_tune.config.language import say
from ernie_tune.config.loader import Entry

SAMPLING: Mapping[str, Callable[[Any], Any]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "max_new_tokens": int,
    "seed": int,
}


def switch(raw: Any) -> bool:
    """`true` or `false` in any usual spelling. Raises ValueError for another word."""
    word = str(raw).lower()
    if word not in (*TRUE, *FALSE):
        raise ValueError(word)
    return word in TRUE


def options(entries: Iterable[Entry], known: Mapping[str, Callable[[Any], Any]], verb: str) -> dict[str, Any]:
    """The values of `entries` by name. Raises UsageError for a name that the verb does not take,
    and for a value of another kind."""
    found: dict[str, Any] = {}
    for entry in entries:
        name = entry.name.replace("-", "_")
        if name not in known:
            hint = did_you_mean(name, known)
            raise UsageError(
                say(
                    f"unknown option {entry.name!r}{hint}; {verb} takes {', '.join(known)}",
                    f"未知的选项 {entry.name!r}{hint}；{verb} 的选项：{', '.join(known)}",
                )
            )
        try:
            found[name] = known[name](entry.raw)
        except (TypeError, ValueError):
            kind = known[name]
            wanted = {
                switch: say("true or false", "true 或 false"),
                int: say("a whole number", "整数"),
                float: say("a number", "数字"),
            }.get(kind, say("such a value", "合适的值"))
            raise UsageError(
                say(
                    "{name} ({raw}) must be {wanted}",
                    "{name}（{raw}）须为{wanted}",
                    name=name,
                    raw=entry.raw,
                    wanted=wanted,
                )
            ) from None
    return found

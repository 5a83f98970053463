"""What is known of a setting beside its value: meaning in two languages, range, who reads it, and
whether it shapes the weights.

One function, `arg`, writes this beside the default of a dataclass field; `Setting` is the same as
everybody reads it.
Refuses to know: which settings there are, files, other spellings.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import UnionType
from typing import Any

# A word that a setting takes -> what it means, in English and Chinese; or the words alone where
# they speak for themselves.
Choices = Mapping[str, tuple[str, str]] | tuple[str, ...]


@dataclass(frozen=True)
class About:
    """What `arg` is told of a setting.

    `low`, `high`: inclusive range. `stages`, `methods`: where it is read; empty: everywhere.
    `losses`: only these losses read it. `needs`: another setting, and its values with which this
    one is read. `shapes`: whether it can change the loss or the trained weights by more than
    rounding.
    `unread`: why it has no effect in this version (harmless: a note). `unbuilt`: what to write
    instead of a value that this version cannot honour (it would change the result: refused).
    """

    help: str
    help_zh: str
    choices: tuple[str, ...] = ()
    explained: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    stages: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    losses: tuple[str, ...] = ()
    needs: tuple[str, tuple[str, ...]] | None = None
    shapes: bool = True
    unread: str = ""
    unbuilt: str = ""


def arg(default: Any, help: str, help_zh: str, choices: Choices = (), **more: Any) -> Any:
    """A dataclass field with all that is known of it; `more`: the other fields of `About`."""
    explained = dict(choices) if isinstance(choices, Mapping) else {}
    about = About(help, help_zh, tuple(choices), explained, **more)
    return dataclasses.field(default=default, metadata={"about": about})


@dataclass(frozen=True)
class Setting:
    """One setting: its name, section, default and what `About` says. `kind` is the type of a value,
    or of each value if `many`.
    """

    name: str
    section: str
    kind: type
    many: bool
    default: Any
    about: About

    @property
    def help(self) -> str:
        return self.about.help

    @property
    def choices(self) -> tuple[str, ...]:
        return self.about.choices

    @property
    def low(self) -> float | None:
        return self.about.low

    @property
    def high(self) -> float | None:
        return self.about.high

    def read_at(self, stage: str, method: str) -> bool:
        """Whether a run of this stage and method reads it."""
        return stage in (self.about.stages or (stage,)) and method in (self.about.methods or (method,))


def settings_of(section: str, cls: type) -> list[Setting]:
    """The settings of one section, a dataclass made with `arg`, in order."""
    hints = typing.get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        hint, many = hints[f.name], typing.get_origin(hints[f.name]) is tuple
        kind = typing.get_args(hint)[0] if many or isinstance(hint, UnionType) else hint
        found.append(Setting(f.name, section, kind, many, f.default, f.metadata["about"]))
    return found

"""Tools that users bring as functions of Python: what a prompt says of one, and what a call gives.

As in TRL, the function's name, docstring (Google's form) and annotations are all that a model is
told of it, as JSON schema. A call never fails: what goes wrong is told to the model in words.
Refuses to know: turns, tokens, rewards, how a model writes a call.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ernie_tune.config.language import say
from ernie_tune.rewards.patience import USERS, TookTooLong, gathered, waiting_for

MOST_CHARACTERS = 8192  # of a result
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns|Raises|Yields|Examples?):\s*$")
_ARGUMENT = re.compile(r"^\s*\**(\w+)\s*(?:\([^)]*\))?:\s*(.*)$")


@dataclass(frozen=True)
class OwnTool:
    """A function as a tool. `limit_seconds` of a call; `say_seconds`, after which it is spoken of.
    Raises ValueError for a function without a name or a docstring.
    """

    function: Callable[..., Any]
    say_seconds: float = 60.0
    limit_seconds: float = 600.0

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or not (inspect.getdoc(self.function) or "").strip():
            raise ValueError(
                say(
                    f"tool ({self.name}) must be a function with a name and a docstring, which is what the model is told of it; write one",
                    f"工具（{self.name}）须为有名称与文档字符串的函数，模型只从中了解它；请补上",
                )
            )

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", type(self.function).__name__))

    @property
    def schema(self) -> dict[str, Any]:
        """name, description and parameters, as the list of tools in a prompt has them."""
        about, told = _told(inspect.getdoc(self.function) or "")
        hints = _hints(self.function)
        given = {
            name: p
            for name, p in inspect.signature(self.function).parameters.items()
            if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
        properties = {
            name: {**_kind(hints.get(name)), **({"description": told[name]} if name in told else {})} for name in given
        }
        required = [name for name, p in given.items() if p.default is p.empty]
        parameters = {"type": "object", "properties": properties, "required": required}
        return {"name": self.name, "description": about, "parameters": parameters}

    def __call__(self, arguments: Mapping[str, Any]) -> tuple[str, str]:
        """(what it gives, as text, of MOST_CHARACTERS at most; what is wrong with the call)."""
        code = getattr(self.function, "__code__", None)
        what = say(f"tool {self.name}", f"工具 {self.name}")
        try:
            inspect.signature(self.function).bind(**arguments)
            with waiting_for(what, code.co_filename if code else "", self.say_seconds, self.limit_seconds):
                found = self.function(**arguments)
            if inspect.isawaitable(found):
                (found,), _ = gathered([found], self.limit_seconds or 1e9, TookTooLong)
                if found is TookTooLong:
                    return "", "it took too long"
            text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
        except TookTooLong:
            return "", "it took too long"
        except MemoryError:
            raise
        except USERS as error:
            return "", f"{type(error).__name__}: {error}"[:MOST_CHARACTERS]
        return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …", ""


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names that only a type checker knows
        return {}


def _kind(hint: Any) -> dict[str, Any]:
    """A type as JSON schema; {} where it cannot be said."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        kinds = [_kind(one) for one in inner if one is not type(None)]
        return kinds[0] if len(kinds) == 1 else {}
    if (origin or hint) in (list, tuple) and inner:
        return {"type": "array", "items": _kind(inner[0])}
    name = _TYPES.get(origin or hint)
    return {"type": name} if name else {}


def _told(doc: str) -> tuple[str, dict[str, str]]:
    """What comes before the sections of a docstring, and what it says of each argument."""
    about: list[str] = []
    told: dict[str, str] = {}
    section, latest = "", ""
    for line in doc.splitlines():
        if found := _SECTION.match(line):
            section = found[1]
        elif not section:
            about.append(line.strip())
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            indent = len(line) - len(line.lstrip())
            argument = _ARGUMENT.match(line) if indent <= 4 or not latest else None
            if argument:
                latest = argument[1]
                told[latest] = argument[2].strip()
            elif latest:
                told[latest] = f"{told[latest]} {line.strip()}".strip()
    return " ".join(" ".join(about).split()), told

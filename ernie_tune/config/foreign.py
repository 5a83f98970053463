"""JSON that somebody else wrote, of model folders and hubs: an object, or an error that names the
file. Refuses to know: what is in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ernie_tune.config.language import Text, say

_AGAIN = say("fetch the file again", "请重新获取该文件")


def json_object(content: bytes | str, file: str | os.PathLike[str], remedy: Text = _AGAIN) -> dict[str, Any]:
    """The object in the text of `file`. Raises ValueError for what is no JSON, nested too deep for
    Python, no UTF-8, or no object.
    """
    name = os.fspath(file)
    try:
        found = json.loads(content)
    except RecursionError as error:
        raise ValueError(
            say(
                "{name} must be JSON, but is nested too deep to be read; {remedy}",
                "{name} 的 JSON 嵌套过深，无法读取；{remedy}",
                name=name,
                remedy=remedy,
            )
        ) from error
    except ValueError as error:
        raise ValueError(
            say(
                "{name} must be JSON ({error}); {remedy}",
                "{name} 须为 JSON（{error}）；{remedy}",
                name=name,
                error=error,
                remedy=remedy,
            )
        ) from error
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise ValueError(
            say(
                "{name} ({kind}) must hold a JSON object; {remedy}",
                "{name}（{kind}）须为 JSON 对象；{remedy}",
                name=name,
                kind=kind,
                remedy=remedy,
            )
        )
    return found


@contextmanager
def reading(place: str | os.PathLike[str]) -> Iterator[None]:
    """What a value of a kind that its reader did not expect raises inside is a ValueError that
    names the place.
    """
    try:
        yield
    except (AttributeError, TypeError, LookupError, ArithmeticError, RecursionError, ValueError) as error:
        if isinstance(error, ValueError) and error.args and isinstance(error.args[0], Text):
            raise  # a message of ours
        raise ValueError(
            say(
                "{place} must hold what released models have there ({kind}: {error}); {remedy}",
                "{place} 的内容须与已发布的模型一致（{kind}：{error}）；{remedy}",
                place=os.fspath(place),
                kind=type(error).__name__,
                error=error,
                remedy=_AGAIN,
            )
        ) from error


def read_json_object(file: Path, remedy: Text = _AGAIN) -> dict[str, Any]:
    """`json_object` of a file. Raises OSError where it cannot be read."""
    return json_object(file.read_bytes(), file, remedy)

"""Reward functions that settings name: `path/to/file.py:name`, and classes whose instances are
called.

Refuses to know: what a function is asked and what becomes of its answer (functions.py).
"""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ernie_tune.config.checks_sampling import function_problem
from ernie_tune.config.language import say
from ernie_tune.rewards.patience import USERS


def load_function(place: str, setting: str = "reward_funcs") -> Callable[..., Any]:
    """The function that `path/to/file.py:name` names. Raises ValueError, FileNotFoundError."""
    path, _, name = place.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            say(
                f"{setting} ({place}) must name an existing file, as my_file.py:my_function; correct the path",
                f"{setting}（{place}）须指向已有文件，如 my_file.py:my_function；请改正路径",
            )
        )
    spec = importlib.util.spec_from_file_location(f"reward_functions_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ValueError(
            say(
                f"{setting} ({place}) must name a file of Python, as my_file.py:my_function; rename it, or name another",
                f"{setting}（{place}）须指向 Python 文件，如 my_file.py:my_function；请改名或另选",
            )
        )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that its classes find their module, and pickle
    try:
        spec.loader.exec_module(module)
    except USERS as error:
        line = error.lineno if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)[-1].lineno
        raise ValueError(
            say(
                f"{setting} ({place}) must name a file that runs; {file.name}:{line} failed with "
                f"{type(error).__name__}: {error}; mend it",
                f"{setting}（{place}）须指向可以运行的文件；{file.name}:{line} 出错 {type(error).__name__}：{error}；请修正",
            )
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [key for key, one in vars(module).items() if callable(one) and _is_own(one, module.__name__)]
        raise ValueError(function_problem(place, own, "" if found is None else type(found).__name__, setting))
    return made_of(found, place) if isinstance(found, type) else found


def made_of(kind: type, place: str) -> Callable[..., Any]:
    """An instance that can be called. Raises ValueError for a class without."""
    try:
        found = kind()
    except USERS as error:
        raise ValueError(
            say(
                f"reward_funcs ({place}) must name a class that is made without arguments, and {kind.__name__}() failed "
                f"with {type(error).__name__}: {error}; give its arguments defaults, or name a function",
                f"reward_funcs（{place}）所指的类须能无参数创建，而 {kind.__name__}() 出错 {type(error).__name__}：{error}；"
                "请为参数设默认值，或改用函数",
            )
        ) from error
    if not callable(found):
        raise ValueError(
            say(
                f"reward_funcs ({place}) must name a class with __call__(self, completions, **kwargs); write it",
                f"reward_funcs（{place}）所指的类须有 __call__(self, completions, **kwargs)；请写出该方法",
            )
        )
    return found


def _is_own(value: Any, module: str) -> bool:
    """Whether something that can be called was written in this module, and for others."""
    return getattr(value, "__module__", module) == module and not getattr(value, "__name__", "").startswith("_")

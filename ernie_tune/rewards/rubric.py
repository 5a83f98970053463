"""What answers to a prompt are worth: the checkers that a row names, and functions of the user,
asked and checked in one place.

A reward function is anybody's: TRL's signature (keywords, one number an answer), verl's
(`data_source, solution_str, ground_truth`, one answer at a time), EasyR1's (one object or a list of
them), ms-swift's (a class whose instances take `completions` as text). What comes back is checked:
as many numbers as answers, finite or None ("not applicable").
Refuses to know: how answers were made, what becomes of the rewards, paddle.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ernie_tune.config.language import say
from ernie_tune.data.records import Record
from ernie_tune.rewards.reading import without_thought
from ernie_tune.rewards.verifiers import SHAPING, VERIFIERS, verifier_for

ROW = "row"  # the column of what rows themselves name
_SHOWN_CHARACTERS = 80
# What a user's function may raise; what is left (MemoryError, an interrupt) ends the run.
_USERS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Answered:
    """One sampled answer: all of its text, thought included, the ids of its tokens and, where
    known, their log-probabilities, and why it ended ("stop", "length", "abort").
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"
    logps: tuple[float, ...] = ()

    @property
    def finished(self) -> bool:
        return self.finish_reason == "stop"


Group = tuple[Record, Sequence[Answered]]  # one prompt and its answers
Scores = list[list["float | None"]]  # one list a group, one number an answer


class Judge(Protocol):
    """Anything that scores groups of answers: a reward model, a remote judge, a user's function
    behind `Function`.
    """

    name: str

    def __call__(self, groups: Sequence[Group]) -> Scores: ...


@dataclass(frozen=True)
class Scored:
    """`parts`: what each function of the rubric gave, in its order, None where it does not apply.
    `details`: what each checker of the row gave.
    """

    parts: Mapping[str, float | None]
    details: Mapping[str, float | None] = field(default_factory=dict)


def reward(text: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `text` hands `completions` to a TRL-like function as strings instead of lists of
    messages.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.reads_text = text  # type: ignore[attr-defined]
        return function

    return mark


class RowVerifiers:
    """The checkers that each row names, weighted; where it names none, the one that its gold answer
    asks for (`verifier_for`).

    What a checker wants and the row does not give is filled in: the gold answer, the answer's
    length in tokens and its bound, the row's mode.
    """

    name = ROW

    def __init__(self, max_completion_tokens: int = 512) -> None:
        self.limit = max_completion_tokens
        self.details: list[list[dict[str, float | None]]] = []  # of the last call

    def __call__(self, groups: Sequence[Group]) -> Scores:
        self.details = [[self._checked(record, answer) for answer in answers] for record, answers in groups]
        weights = [{name: weight for name, weight, _ in self._checks(record)} for record, _ in groups]
        return [[_weighted(found, weight) for found in row] for row, weight in zip(self.details, weights, strict=True)]

    def check(self, record: Record) -> None:
        """Raises ValueError, naming the row, where it names an unknown checker, or nothing but how
        an answer should look.
        """
        names = [name for name, _, _ in self._checks(record)]
        if names and all(name in SHAPING for name in names):
            raise ValueError(
                say(
                    f"{record.meta}: verifiers ({', '.join(names)}) must hold one that asks whether the answer is right; length and form alone would be learned instead",
                    f"{record.meta}: verifiers（{', '.join(names)}）须含检查答案对错的一项；否则只会学到长度与格式",
                )
            )

    def _checks(self, record: Record) -> list[tuple[str, float, dict[str, Any]]]:
        """(name, weight, spec) of each checker of a row. Raises ValueError for an unknown name and
        for a row with nothing to check by.
        """
        found = record.reward
        if found is None:
            return []
        if not found.verifiers:
            name, spec = verifier_for(found.answer)
            return [(name, 1.0, spec)]
        for verifier in found.verifiers:
            if verifier.name not in VERIFIERS:
                raise ValueError(
                    say(
                        f"{record.meta}: verifier ({verifier.name!r}) must be one of {', '.join(VERIFIERS)}; correct the name",
                        f"{record.meta}: verifier（{verifier.name!r}）须为 {', '.join(VERIFIERS)} 之一；请改正名称",
                    )
                )
        return [(v.name, v.weight, dict(v.spec)) for v in found.verifiers]

    def _checked(self, record: Record, answer: Answered) -> dict[str, float | None]:
        gold = record.reward.answer if record.reward else None
        known = {
            "gold": gold,
            "golds": gold,
            "tokens": len(answer.token_ids),
            "limit": self.limit,
            "mode": record.mode if record.mode != "auto" else "nothink",
        }
        out: dict[str, float | None] = {}
        for name, _, spec in self._checks(record):
            check = VERIFIERS[name]
            wanted = inspect.signature(check).parameters
            filled = {key: value for key, value in known.items() if key in wanted and key not in spec}
            try:
                out[name] = check(answer.text, **filled, **spec)
            except TypeError as error:
                raise ValueError(
                    say(
                        f"{record.meta}: spec of {name} ({', '.join(spec)}) must fit {name}({', '.join(wanted)}): {error}; correct it",
                        f"{record.meta}: {name} 的 spec（{', '.join(spec)}）须符合 {name}({', '.join(wanted)})：{error}；请改正",
                    )
                ) from None
        return out


def _weighted(found: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    known = {name: value for name, value in found.items() if value is not None}
    return sum(weights[name] * value for name, value in known.items()) if known else None


# --- functions of the user ------------------------------------------------------------------------


@dataclass
class Asked:
    """What functions reported beside their numbers: timeouts, errors and own metrics, since it was
    last emptied.
    """

    timeouts: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


class Function:
    """A user's reward function as a judge, whichever dialect it speaks."""

    def __init__(
        self, function: Callable[..., Any], name: str = "", on_error: str = "raise", timeout_seconds: float = 60.0
    ) -> None:
        if on_error not in ("raise", "none"):
            raise ValueError(
                say(
                    f"reward_error ({on_error!r}) must be raise or none; use 'raise'",
                    f"reward_error（{on_error!r}）须为 raise 或 none；请用 'raise'",
                )
            )
        self.function, self.on_error, self.timeout_seconds = function, on_error, timeout_seconds
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.asked = Asked()
        self.dialect = _dialect(function)

    def __call__(self, groups: Sequence[Group]) -> Scores:
        flat = [(record, answer, number) for number, (record, answers) in enumerate(groups) for answer in answers]
        if not flat:
            return [[] for _ in groups]
        started = time.perf_counter()
        try:
            values = _DIALECTS[self.dialect](self, flat)
        except _USERS as error:
            if self.on_error == "raise":
                raise ValueError(
                    say(
                        f"reward function {self.name} failed at {flat[0][0].meta} with {type(error).__name__}: {error}; mend it, or set reward_error: none",
                        f"奖励函数 {self.name} 在 {flat[0][0].meta} 处出错 {type(error).__name__}：{error}；请修正，或设置 reward_error: none",
                    )
                ) from error
            self.asked.errors[self.name] = self.asked.errors.get(self.name, 0) + len(flat)
            values = [None] * len(flat)
        self.asked.seconds[self.name] = self.asked.seconds.get(self.name, 0.0) + time.perf_counter() - started
        numbers = iter(self._checked(values, flat))
        return [[next(numbers) for _ in answers] for _, answers in groups]

    def _checked(self, values: Any, flat: Sequence[tuple[Record, Answered, int]]) -> list[float | None]:
        """One finite number or None an answer. Raises ValueError naming the function, the row and
        the answer.
        """
        if not hasattr(values, "__len__") or len(values) != len(flat):
            given = len(values) if hasattr(values, "__len__") else type(values).__name__
            raise ValueError(
                say(
                    f"reward function {self.name} ({given}) must give one number for each of the {len(flat)} answers from {flat[0][0].meta} on; return a list as long as completions",
                    f"奖励函数 {self.name}（{given}）须为自 {flat[0][0].meta} 起的 {len(flat)} 个回答各给一个数；请返回与 completions 等长的列表",
                )
            )
        out: list[float | None] = []
        for value, (record, answer, _) in zip(values, flat, strict=True):
            number = _number(value)
            if number is not None and math.isinf(number):
                number = None
                value = f"{value!r}"
            elif value is None or (number is not None and math.isnan(number)):
                out.append(None)
                continue
            if number is None:
                shown = answer.text[:_SHOWN_CHARACTERS]
                raise ValueError(
                    say(
                        f"reward function {self.name} ({value!r}) must give a finite number or None for {record.meta}, answer {shown!r}; correct its return value",
                        f"奖励函数 {self.name}（{value!r}）对 {record.meta} 的回答 {shown!r} 须给出有限数或 None；请改正返回值",
                    )
                )
            out.append(number)
        return out


def _number(value: Any) -> float | None:
    """A number in any library's clothes; None for anything else."""
    if isinstance(value, str | bytes) or value is None:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _dialect(function: Callable[..., Any]) -> str:
    call: Any = function if inspect.isroutine(function) or isinstance(function, type) else type(function).__call__
    parameters = inspect.signature(call).parameters
    if {"data_source", "solution_str", "ground_truth"} <= set(parameters):
        return "verl"
    module = sys.modules.get(getattr(function, "__module__", "") or type(function).__module__)
    kind = getattr(module, "REWARD_TYPE", None)
    if kind in ("sequential", "batch"):
        return f"easyr1_{kind}"
    return "trl"


def _columns(flat: Sequence[tuple[Record, Answered, int]]) -> dict[str, list[Any]]:
    """Every field of the rows, one entry an answer, and what people call the same things."""
    columns: dict[str, list[Any]] = {
        name: [record.meta.extra.get(name) for record, _, _ in flat]
        for name in {key for record, _, _ in flat for key in record.meta.extra}
    }
    gold = [record.reward.answer if record.reward else None for record, _, _ in flat]
    return {
        **columns,
        **dict.fromkeys(("answer", "solution", "ground_truth"), gold),
        "images": [list(record.images) for record, _, _ in flat],
        "scene": [dict(record.reward.scene) if record.reward else {} for record, _, _ in flat],
        "evidence": [dict(record.reward.evidence) if record.reward else {} for record, _, _ in flat],
        "domain": [record.domain for record, _, _ in flat],
        "data_source": [record.domain for record, _, _ in flat],
        "completion_text": [answer.text for _, answer, _ in flat],
        "finish_reason": [answer.finish_reason for _, answer, _ in flat],
        "logps": [list(answer.logps) for _, answer, _ in flat],
        "group_id": [number for _, _, number in flat],
    }


def _message(answer: Answered) -> dict[str, str]:
    """An answer as TRL has it: the thought apart from what follows it."""
    after = without_thought(answer.text)
    if after is None or after == answer.text:
        return {"role": "assistant", "content": answer.text}
    thought = answer.text[: len(answer.text) - len(after)].replace("<think>", "").replace("</think>", "")
    return {"role": "assistant", "content": after.strip("\n"), "reasoning_content": thought.strip("\n")}


def _ask_trl(self: Function, flat: Sequence[tuple[Record, Answered, int]]) -> Any:
    function: Any = self.function
    instance = not (inspect.isroutine(function) or isinstance(function, type))
    as_text = getattr(function, "reads_text", instance)  # a class with __call__ is ms-swift's form
    given: dict[str, Any] = {
        "prompts": [[dict(m) for m in record.prompt] for record, _, _ in flat],
        "completions": [answer.text if as_text else [_message(answer)] for _, answer, _ in flat],
        "completion_ids": [list(answer.token_ids) for _, answer, _ in flat],
        "trainer_state": None,
        "environments": None,
        "log_extra": lambda *_: None,
        "log_metric": lambda name, value: self.asked.metrics.setdefault(name, []).append(float(value)),
        **_columns(flat),
    }
    parameters = inspect.signature(function.__call__ if instance else function).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        missing = [
            name
            for name, p in parameters.items()
            if name not in given
            and p.default is inspect.Parameter.empty
            and p.kind is not inspect.Parameter.VAR_POSITIONAL
        ]
        if missing:
            raise TypeError(f"it asks for {missing[0]!r}, and no row has a field of that name")
        given = {name: value for name, value in given.items() if name in parameters}
    found = function(**given)
    if inspect.isawaitable(found):
        with ThreadPoolExecutor(1) as pool:  # a notebook's own thread already runs a loop
            return pool.submit(asyncio.run, _awaited(self, found, len(flat))).result()
    return found


async def _awaited(self: Function, found: Any, answers: int) -> Any:
    try:
        return await asyncio.wait_for(found, self.timeout_seconds)
    except asyncio.TimeoutError:
        self.asked.timeouts[self.name] = self.asked.timeouts.get(self.name, 0) + answers
        return [None] * answers


def _ask_verl(self: Function, flat: Sequence[tuple[Record, Answered, int]]) -> list[Any]:
    wanted = inspect.signature(self.function).parameters
    extra = "extra_info" in wanted or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in wanted.values())
    out = []
    for record, answer, _ in flat:
        gold = record.reward.answer if record.reward else None
        more = {"extra_info": dict(record.meta.extra)} if extra else {}
        found = self.function(data_source=record.domain, solution_str=answer.text, ground_truth=gold, **more)
        out.append(_overall(self, found, "score"))
    return out


def _ask_easyr1(self: Function, flat: Sequence[tuple[Record, Answered, int]]) -> list[Any]:
    inputs = [
        {
            "response": answer.text,
            "response_length": len(answer.token_ids),
            "ground_truth": record.reward.answer if record.reward else None,
        }
        for record, answer, _ in flat
    ]
    found = self.function(inputs) if self.dialect == "easyr1_batch" else [self.function(one) for one in inputs]
    return [_overall(self, one, "overall") for one in found]


def _overall(self: Function, found: Any, key: str) -> Any:
    """The reward among several numbers; the others are logged."""
    if not isinstance(found, Mapping):
        return found
    for name, value in found.items():
        number = _number(value)
        if name != key and number is not None:
            self.asked.metrics.setdefault(name, []).append(number)
    return found.get(key)


_DIALECTS: Mapping[str, Callable[[Function, Sequence[tuple[Record, Answered, int]]], Any]] = {
    "trl": _ask_trl,
    "verl": _ask_verl,
    "easyr1_sequential": _ask_easyr1,
    "easyr1_batch": _ask_easyr1,
}


def load_function(place: str) -> Callable[..., Any]:
    """The function that `path/to/file.py:name` names. Raises ValueError, FileNotFoundError."""
    path, _, name = place.rpartition(":")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(
            say(
                f"reward_funcs ({place}) must name an existing file, as rewards.py:my_reward; correct the path",
                f"reward_funcs（{place}）须指向已有文件，如 rewards.py:my_reward；请改正路径",
            )
        )
    spec = importlib.util.spec_from_file_location(f"reward_functions_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that its classes find their module, and pickle
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not callable(found):
        raise ValueError(
            say(
                f"reward_funcs ({place}) must name a function of {file.name}, which has none called {name!r}; correct the name",
                f"reward_funcs（{place}）须指明 {file.name} 中的函数，其中没有 {name!r}；请改正名称",
            )
        )
    return found() if isinstance(found, type) else found


class Rubric:
    """All judges of a run with their weights: a batch of groups in, what each answer is worth out.

    `check` True asks every function twice about the first group and refuses one that does not
    answer the same.
    """

    def __init__(
        self,
        judges: Sequence[Judge],
        weights: Sequence[float] = (),
        max_completion_tokens: int = 512,
        check: bool = True,
    ) -> None:
        self.judges: tuple[Judge, ...] = tuple(judges) or (RowVerifiers(max_completion_tokens),)
        self.weights = tuple(weights) or (1.0,) * len(self.judges)
        self.unchecked = check
        if len(self.weights) != len(self.judges):
            raise ValueError(
                say(
                    f"reward_weights ({len(self.weights)}) must be as many as reward_funcs ({len(self.judges)}); give one a function",
                    f"reward_weights（{len(self.weights)} 个）须与 reward_funcs（{len(self.judges)} 个）一样多；请逐个给出",
                )
            )
        names = [judge.name for judge in self.judges]
        if len(set(names)) < len(names):
            raise ValueError(
                say(
                    f"reward_funcs ({', '.join(names)}) must have names of their own; rename one",
                    f"reward_funcs（{', '.join(names)}）名称不得重复；请改名",
                )
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(judge.name for judge in self.judges)

    def __call__(self, groups: Sequence[Group]) -> list[list[Scored]]:
        """One `Scored` an answer, in the order given."""
        if self.unchecked and groups:
            self._same_twice(groups[:1])
            self.unchecked = False
        found = [judge(groups) for judge in self.judges]
        out = []
        for g, (_, answers) in enumerate(groups):
            row = []
            for i in range(len(answers)):
                parts = {judge.name: scores[g][i] for judge, scores in zip(self.judges, found, strict=True)}
                details = next((judge.details[g][i] for judge in self.judges if isinstance(judge, RowVerifiers)), {})
                row.append(Scored(parts, details))
            out.append(row)
        return out

    def _same_twice(self, groups: Sequence[Group]) -> None:
        for judge in self.judges:
            first, second = judge(groups), judge(groups)
            if first != second:
                raise ValueError(
                    say(
                        f"reward function {judge.name} ({first[0]} and then {second[0]} for {groups[0][0].meta}) must give the same twice; take chance out of it, or set reward_check: false",
                        f"奖励函数 {judge.name}（对 {groups[0][0].meta} 先后给出 {first[0]} 与 {second[0]}）须两次一致；请去除随机性，或设置 reward_check: false",
                    )
                )

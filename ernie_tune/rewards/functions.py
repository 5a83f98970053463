"""Reward functions of users: anybody's signature, asked and checked in one way.

TRL's (keywords, one number an answer), verl's (`data_source, solution_str, ground_truth`, one
answer at a time), EasyR1's (one object or a list of them), ms-swift's (a class whose instances take
`completions` as text). What comes back is checked: as many numbers as answers, finite or None ("not
applicable"). Refuses to know: rows' own checkers, how answers were made, what becomes of the
rewards, paddle.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_tune.config.language import Text, say
from ernie_tune.data.records import Record
from ernie_tune.rewards.patience import USERS, TookTooLong, gathered, place_in, speak, waiting_for
from ernie_tune.rewards.reading import without_thought
from ernie_tune.rewards.scores import Box

SHOWN_CHARACTERS = 80
# A larger number than this cannot be compared with others: float64 has no digits left below one,
# and squares of what is learned from it leave float32.
LARGEST = 1e15


@dataclass(frozen=True)
class Called:
    """A call of a tool within an answer: the box that was asked for, None where it could not be
    understood (`problem`), and what was shown of the picture, both in its pixels; of a user's own
    tool what it was given and gave.
    """

    name: str
    box: Box | None = None
    problem: str = ""
    shown: Box | None = None
    size: tuple[int, int] = (0, 0)  # of the picture
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of a user's own tool
    result: str = ""  # that it gave


@dataclass(frozen=True)
class Answered:
    """One sampled answer: all of its text, thought included, the ids of its tokens and, where
    known, their log-probabilities, and why it ended ("stop", "length", "abort"). `calls` of tools,
    in order; `text` is then that of the last turn.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str = "stop"
    logps: tuple[float, ...] = ()
    calls: tuple[Called, ...] = ()

    @property
    def finished(self) -> bool:
        return self.finish_reason == "stop"


Group = tuple[Record, Sequence[Answered]]  # one prompt and its answers
Flat = Sequence[tuple[Record, Answered, int]]  # answers with their rows and the number of their group
Scores = list[list["float | None"]]  # one list a group, one number an answer


def reward(text: bool = False) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: `text` hands `completions` to a TRL-like function as strings instead of lists of
    messages.
    """

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        function.reads_text = text  # type: ignore[attr-defined]
        return function

    return mark


@dataclass(frozen=True)
class TrainerState:
    """What a function may know of the run, under TRL's names: optimizer steps made, and of how
    many.
    """

    global_step: int = 0
    max_steps: int = 0


@dataclass
class Asked:
    """What a function reported beside its numbers, since it was last emptied."""

    timeouts: int = 0  # answers
    errors: int = 0  # answers
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)  # of the last call, one an answer
    seconds: float = 0.0


class RewardFunction:
    """A user's reward function as a judge, whichever dialect it speaks."""

    def __init__(
        self,
        function: Callable[..., Any],
        name: str = "",
        on_error: str = "raise",
        timeout_seconds: float = 60.0,
        limit_seconds: float = 600.0,
    ) -> None:
        """`timeout_seconds`: of an async function, None for its answers after that; another one is
        spoken of then. `limit_seconds`: the most that a call may take, 0: any time.
        """
        if on_error not in ("raise", "none"):
            raise ValueError(
                say(
                    f"reward_error ({on_error!r}) must be raise or none; use 'raise'",
                    f"reward_error（{on_error!r}）须为 raise 或 none；请用 'raise'",
                )
            )
        self.function, self.on_error = function, on_error
        self.timeout_seconds, self.limit_seconds = timeout_seconds, limit_seconds
        self.name = name or getattr(function, "__name__", type(function).__name__)
        self.asked = Asked()
        self.columns: frozenset[str] = frozenset()  # of all rows of the run; some may lack one
        self.state = TrainerState()
        self.dialect = _dialect(function)

    def __call__(self, groups: Sequence[Group]) -> Scores:
        return ask_all([self], groups)[0]

    def begin(self, flat: Flat) -> Any:
        """What the function gives, an awaitable of an async one, or the error of the user's that it
        raised.
        """
        try:
            return _DIALECTS[self.dialect](self, flat)
        except MemoryError:
            raise
        except (*USERS, TookTooLong) as error:
            return error

    def call(self, flat: Flat, function: Callable[..., Any], *args: Any, **given: Any) -> Any:
        """The function about these answers, for as long as it may take. Raises TookTooLong, and
        what the function raises.
        """
        with waiting_for(self.task(flat), self.file, self.timeout_seconds, self.limit_seconds):
            return function(*args, **given)

    def single(self, flat: Flat, *args: Any, **given: Any) -> Any:
        """`call` of a function that is asked about one answer at a time: where errors are left out,
        None for this answer alone.
        """
        try:
            return self.call(flat, self.function, *args, **given)
        except MemoryError:
            raise
        except (*USERS, TookTooLong) as error:
            if self.on_error == "raise":
                error.asked_about = flat  # type: ignore[union-attr]
                raise
            self._missed(error, 1)
            return None

    def _missed(self, error: BaseException, answers: int) -> None:
        late = isinstance(error, TookTooLong)
        self.asked.timeouts += answers * late
        self.asked.errors += answers * (not late)

    @property
    def file(self) -> str:
        """Where the function was written; "" where it has no code of Python."""
        function = self.function
        code = getattr(function if inspect.isroutine(function) else type(function).__call__, "__code__", None)
        return code.co_filename if code else ""

    def task(self, flat: Flat) -> Text:
        """What it is asked, for people."""
        return say(
            f"reward function {self.name}, asked about {len(flat)} answers from {flat[0][0].meta} on,",
            f"奖励函数 {self.name}（自 {flat[0][0].meta} 起的 {len(flat)} 个回答）",
        )

    async def end(self, found: Any, answers: int) -> Any:
        """What an awaitable gives in time; None for every answer after that."""
        try:
            return await asyncio.wait_for(found, self.timeout_seconds)
        except asyncio.TimeoutError:
            self.asked.timeouts += answers
            return [None] * answers
        except MemoryError:
            raise
        except USERS as error:
            return error

    def numbers(self, values: Any, flat: Flat) -> list[float | None]:
        """One finite number or None an answer. Raises ValueError for anything else, and for an
        error of the function's unless `on_error` is none.
        """
        if not isinstance(values, (*USERS, TookTooLong)):
            return self._checked(values, flat)
        row = getattr(values, "asked_about", flat)[0][0].meta
        if self.on_error == "raise" and isinstance(values, TookTooLong):
            raise ValueError(
                say(
                    f"reward function {self.name}{values.place} must answer within {values.seconds:g} s for {row} and "
                    "what follows it; give its requests a time limit of their own, raise reward_limit_seconds, or set "
                    "reward_error: none, which leaves such answers out",
                    f"奖励函数 {self.name}{values.place} 须在 {values.seconds:g} 秒内对 {row} 及其后的回答给出结果；"
                    "请为其请求设置时限，或调大 reward_limit_seconds，或设置 reward_error: none（忽略这些回答）",
                )
            )
        if self.on_error == "raise":
            line = _line(values, self.file)
            raise ValueError(
                say(
                    f"reward function {self.name}{line} failed at {row} with {type(values).__name__}: {values}; mend it, or set reward_error: none",
                    f"奖励函数 {self.name}{line} 在 {row} 处出错 {type(values).__name__}：{values}；请修正，或设置 reward_error: none",
                )
            ) from values
        self._missed(values, len(flat))
        return [None] * len(flat)

    def _checked(self, values: Any, flat: Flat) -> list[float | None]:
        """One finite number or None an answer. Raises ValueError naming the function, the row and
        the answer.
        """
        listed = hasattr(values, "__len__") and not isinstance(values, Mapping | Set | str | bytes)
        if not listed or len(values) != len(flat):
            given = len(values) if listed else type(values).__name__
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
                shown = answer.text[:SHOWN_CHARACTERS]
                raise ValueError(
                    say(
                        f"reward function {self.name} ({value!r}) must give a finite number or None for {record.meta}, answer {shown!r}; correct its return value",
                        f"奖励函数 {self.name}（{value!r}）对 {record.meta} 的回答 {shown!r} 须给出有限数或 None；请改正返回值",
                    )
                )
            out.append(number)
        return out


def _line(error: BaseException, file: str) -> str:
    """Where in the function's own file an error arose, as " (rewards.py:12)"; "" where that cannot
    be said.
    """
    frames = [f for f in traceback.extract_tb(error.__traceback__) if file and f.filename == file]
    return f" ({Path(file).name}:{frames[-1].lineno})" if frames else ""


def _number(value: Any) -> float | None:
    """A number in any library's clothes; None for anything else."""
    if isinstance(value, str | bytes) or value is None:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
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


def columns_of(records: Iterable[Record]) -> frozenset[str]:
    """The names of all columns that some of these rows have."""
    return frozenset(str(key) for record in records for key in (*record.meta.row, *record.meta.extra))


_READ = ("image", "images", "videos", "scene", "evidence")  # columns that are handed on as they were read


def _columns(flat: Flat) -> dict[str, list[Any]]:
    """Every field of the rows, one entry an answer, and what people call the same things; where a
    row has a column of that name, it is the row's, but for pictures and what is known of them.
    """
    gold = [record.reward.answer if record.reward else None for record, _, _ in flat]
    given: dict[str, list[Any]] = {
        **dict.fromkeys(("answer", "solution", "ground_truth"), gold),
        "image": [record.images[0] if record.images else None for record, _, _ in flat],
        "images": [list(record.images) for record, _, _ in flat],
        "videos": [list(record.videos) for record, _, _ in flat],
        "scene": [dict(record.reward.scene) if record.reward else {} for record, _, _ in flat],
        "evidence": [dict(record.reward.evidence) if record.reward else {} for record, _, _ in flat],
        "id": [record.id for record, _, _ in flat],
        "mode": [record.mode for record, _, _ in flat],
        "hint": [record.reward.hint if record.reward else "" for record, _, _ in flat],
        "domain": [record.domain for record, _, _ in flat],
        "data_source": [record.domain for record, _, _ in flat],
        "completion_text": [answer.text for _, answer, _ in flat],
        "finish_reason": [answer.finish_reason for _, answer, _ in flat],
        "logps": [list(answer.logps) for _, answer, _ in flat],
        "group_id": [number for _, _, number in flat],
    }
    rows = [record.meta.row or record.meta.extra for record, _, _ in flat]
    for name in {str(key) for row in rows for key in row} - {*_READ}:
        others = given.get(name, [None] * len(flat))
        given[name] = [
            other if (own := row.get(name)) is None else own for row, other in zip(rows, others, strict=True)
        ]
    return given


class Said(str):
    """The question or the answer of a row that asks with one text: a text, as TRL hands it over. A
    function written for dialogues, where it would be a list, finds its message all the same:
    `said[0]["content"]`, `said[-1]["role"]`.
    """

    message: Mapping[str, str]

    def __new__(cls, text: str, message: Mapping[str, str]) -> Said:
        self = super().__new__(cls, text)
        self.message = message
        return self

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            return self.message[index]
        found = super().__getitem__(slice(0, 1) if index == 0 else slice(-1, None) if index == -1 else index)
        return Said(found, self.message) if index in (0, -1) else found

    def get(self, name: str, default: Any = None) -> Any:
        return self.message.get(name, default)


def _message(answer: Answered) -> dict[str, str]:
    """An answer as TRL has it: the thought apart from what follows it."""
    after = without_thought(answer.text)
    if after is None or after == answer.text:
        return {"role": "assistant", "content": answer.text}
    thought = answer.text[: len(answer.text) - len(after)].replace("<think>", "").replace("</think>", "")
    return {"role": "assistant", "content": after.strip("\n"), "reasoning_content": thought.strip("\n")}


def _said(record: Record, answer: Answered) -> Said | list[dict[str, str]]:
    """An answer to a row in the form that its question has."""
    message = _message(answer)
    return Said(answer.text, message) if record.meta.asked_as_text else [message]


def _asked(record: Record) -> Said | list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{**message} for message in record.prompt]
    if not record.meta.asked_as_text or len(messages) > 1:
        return messages
    return Said(messages[0]["content"], messages[0])


def _ask_trl(self: RewardFunction, flat: Flat) -> Any:
    function: Any = self.function
    instance = not (inspect.isroutine(function) or isinstance(function, type))
    as_text = getattr(function, "reads_text", instance)  # a class with __call__ is ms-swift's form
    given: dict[str, Any] = {
        **{name: [None] * len(flat) for name in self.columns},
        **_columns(flat),
        "prompts": [_asked(record) for record, _, _ in flat],
        "completions": [answer.text if as_text else _said(record, answer) for record, answer, _ in flat],
        "completion_ids": [list(answer.token_ids) for _, answer, _ in flat],
        "trainer_state": self.state,
        "environments": None,
        "log_extra": lambda name, values: self.asked.extra.update({name: list(values)}),
        "log_metric": lambda name, value: _noted(self, name, value),
    }
    parameters = inspect.signature(function.__call__ if instance else function).parameters
    rest = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        name
        for name, p in parameters.items()
        if name not in given and p.default is inspect.Parameter.empty and p.kind not in rest
    ]
    if missing:
        fields = ", ".join(sorted({"answer", *self.columns, *columns_of([record for record, _, _ in flat])}))
        raise TypeError(
            say(
                f"it asks for {missing[0]!r}, and no row has a field of that name; rows have {fields}, "
                "what was sampled is called completions",
                f"它需要 {missing[0]!r}，而数据没有该字段；数据有 {fields}，采样的回答名为 completions",
            )
        )
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        given = {name: value for name, value in given.items() if name in parameters}
    return self.call(flat, function, **given)


def _noted(self: RewardFunction, name: str, value: Any) -> None:
    """Keep a number that a function wants to see in the log. Raises ValueError for none that could
    be averaged.
    """
    number = float(value)
    if not abs(number) <= LARGEST:
        raise ValueError(
            say(
                f"log_metric {name!r} ({number:g}) must be a number of at most {LARGEST:g} in size; leave it out",
                f"log_metric {name!r}（{number:g}）须为绝对值不超过 {LARGEST:g} 的数；请去掉",
            )
        )
    self.asked.metrics.setdefault(name, []).append(number)


def ask_all(functions: Sequence[RewardFunction], groups: Sequence[Group]) -> list[Scores]:
    """What each function gives all answers. Those that are async wait together, in one event loop.
    Raises ValueError as `Function.numbers`.
    """
    flat = [(record, answer, number) for number, (record, answers) in enumerate(groups) for answer in answers]
    if not flat:
        return [[[] for _ in groups] for _ in functions]
    found = []
    for function in functions:
        function.asked.extra.clear()
        started = time.perf_counter()
        found.append(function.begin(flat))
        function.asked.seconds += time.perf_counter() - started
    waiting = [i for i, values in enumerate(found) if inspect.isawaitable(values)]
    if waiting:
        started = time.perf_counter()
        for i, values in zip(
            waiting, _awaited([functions[i] for i in waiting], [found[i] for i in waiting], flat), strict=True
        ):
            found[i] = values
        functions[waiting[0]].asked.seconds += time.perf_counter() - started
    out = []
    for function, values in zip(functions, found, strict=True):
        numbers = iter(function.numbers(values, flat))
        out.append([[next(numbers) for _ in answers] for _, answers in groups])
    return out


def _awaited(functions: Sequence[RewardFunction], given: Sequence[Any], flat: Flat) -> list[Any]:
    """What async functions give in time. One that blocks the loop (a call that does not await)
    takes its time from all of them; the line says where it stands.
    """
    jobs = [function.end(one, len(flat)) for function, one in zip(functions, given, strict=True)]
    found, frame = gathered(jobs, max(function.timeout_seconds for function in functions), gathered)
    for i, function in enumerate(functions):
        if found[i] is gathered:
            function.asked.timeouts += len(flat)
            found[i] = [None] * len(flat)
            place = place_in(frame, function.file)
            speak(
                say(
                    f"{function.task(flat)} never came back{place} and is left behind, its answers count for nothing: "
                    "an async function must await what takes long, and end when it is cancelled",
                    f"{function.task(flat)}没有返回{place}，已放弃等待，其回答不计：异步函数须以 await 等待耗时操作，被取消时须结束",
                )
            )
    return found


def _ask_verl(self: RewardFunction, flat: Flat) -> Any:
    wanted = inspect.signature(self.function).parameters
    extra = "extra_info" in wanted or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in wanted.values())
    out = []
    for one in flat:
        record, answer, _ = one
        gold = record.reward.answer if record.reward else None
        columns = dict(record.meta.extra)
        more = {"extra_info": columns.get("extra_info", columns)} if extra else {}
        source = columns.get("data_source", record.domain)  # verl's name of what a row is drawn from
        found = self.single([one], data_source=source, solution_str=answer.text, ground_truth=gold, **more)
        out.append(found)
    return _together(self, out, "score")


def _ask_easyr1(self: RewardFunction, flat: Flat) -> Any:
    inputs = [
        {
            "response": answer.text,
            "response_length": len(answer.token_ids),
            "ground_truth": record.reward.answer if record.reward else None,
        }
        for record, answer, _ in flat
    ]
    if self.dialect == "easyr1_batch":
        found = self.call(flat, self.function, inputs)
    else:
        found = [self.single([one], given) for one, given in zip(flat, inputs, strict=True)]
    return _together(self, found, "overall")


def _together(self: RewardFunction, found: Sequence[Any], key: str) -> Any:
    """The rewards among what a function gave answer by answer; of an async one, once it has."""
    if not any(map(inspect.isawaitable, found)):
        return [_overall(self, one, key) for one in found]

    async def given(one: Any) -> Any:
        return await one if inspect.isawaitable(one) else one

    async def waited() -> list[Any]:
        return [_overall(self, one, key) for one in await asyncio.gather(*map(given, found))]

    return waited()


def _overall(self: RewardFunction, found: Any, key: str) -> Any:
    """The reward among several numbers; the others are logged."""
    if not isinstance(found, Mapping):
        return found
    for name, value in found.items():
        number = _number(value)
        if name != key and number is not None and abs(number) <= LARGEST:
            self.asked.metrics.setdefault(name, []).append(number)
    return found.get(key)


_DIALECTS: Mapping[str, Callable[[RewardFunction, Flat], Any]] = {
    "trl": _ask_trl,
    "verl": _ask_verl,
    "easyr1_sequential": _ask_easyr1,
    "easyr1_batch": _ask_easyr1,
}

"""What answers to a prompt are worth: the checkers that a row names, functions of the user and
models, asked and checked in one place.

Refuses to know: how answers were made, what becomes of the rewards, paddle.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ernie_tune.config.language import say
from ernie_tune.data.records import Record
from ernie_tune.rewards.functions import Answered, Asked, Group, RewardFunction, Scores, TrainerState, ask_all
from ernie_tune.rewards.reading import read_quantity
from ernie_tune.rewards.verifiers import SHAPING, VERIFIERS, verifier_for

ROW = "row"  # the column of what rows themselves name


class Judge(Protocol):
    """Anything that scores groups of answers: a reward model, a remote judge, a user's function
    behind `RewardFunction`.
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
    extra: Mapping[str, Any] = field(default_factory=dict)


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
            if name in ("count", "numeric") and isinstance(filled.get("gold"), str):
                filled["gold"] = _gold_number(record, name)
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


def _gold_number(record: Record, name: str) -> float:
    """A gold answer that is written as text, as the number that the checker compares with. Raises
    ValueError where it is none.
    """
    gold = record.reward.answer if record.reward else None
    number = read_quantity(str(gold))
    if number is None:
        raise ValueError(
            say(
                f"{record.meta}: answer ({gold!r}) must be a number for {name}; correct it, or name another checker",
                f"{record.meta}: 用 {name} 检查时 answer（{gold!r}）须为数；请改正，或改用其他检查器",
            )
        )
    return number.value


def _weighted(found: Mapping[str, float | None], weights: Mapping[str, float]) -> float | None:
    known = {name: value for name, value in found.items() if value is not None}
    return sum(weights[name] * value for name, value in known.items()) if known else None


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
        found = self._asked(groups)
        extra = [judge.asked.extra for judge in self.judges if isinstance(judge, RewardFunction) and judge.asked.extra]
        at, out = 0, []
        for g, (_, answers) in enumerate(groups):
            row = []
            for i in range(len(answers)):
                parts = {judge.name: scores[g][i] for judge, scores in zip(self.judges, found, strict=True)}
                details = next((judge.details[g][i] for judge in self.judges if isinstance(judge, RowVerifiers)), {})
                more = {name: values[at] for one in extra for name, values in one.items() if at < len(values)}
                row.append(Scored(parts, details, more))
                at += 1
            out.append(row)
        return out

    def _asked(self, groups: Sequence[Group]) -> list[Scores]:
        functions = [judge for judge in self.judges if isinstance(judge, RewardFunction)]
        theirs = iter(ask_all(functions, groups))
        return [next(theirs) if isinstance(judge, RewardFunction) else judge(groups) for judge in self.judges]

    def reported(self) -> dict[str, float]:
        """What functions said beside their numbers since they were last asked for it:
        rewards/<name>/timeouts, errors (answers) and seconds, and the means of their own metrics.
        """
        out: dict[str, float] = {}
        for judge in self.judges:
            if isinstance(judge, RewardFunction):
                asked, judge.asked = judge.asked, Asked()
                for name in ("timeouts", "errors", "seconds"):
                    out[f"rewards/{judge.name}/{name}"] = float(getattr(asked, name))
                out |= {name: math.fsum(values) / len(values) for name, values in asked.metrics.items()}
        return out

    def at(self, step: int, steps: int) -> None:
        """Tell functions how far the run is."""
        for judge in self.judges:
            if isinstance(judge, RewardFunction):
                judge.state = TrainerState(step, steps)

    def _same_twice(self, groups: Sequence[Group]) -> None:
        for judge in self.judges:
            first, second = judge(groups), judge(groups)
            if isinstance(judge, RewardFunction):
                judge.asked = Asked()  # asked for nobody's answers
            if first != second:
                raise ValueError(
                    say(
                        f"reward function {judge.name} ({first[0]} and then {second[0]} for {groups[0][0].meta}) must give the same twice; take chance out of it, or set reward_check: false",
                        f"奖励函数 {judge.name}（对 {groups[0][0].meta} 先后给出 {first[0]} 与 {second[0]}）须两次一致；请去除随机性，或设置 reward_check: false",
                    )
                )

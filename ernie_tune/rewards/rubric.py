"""What answers to a prompt are worth: the checkers that a row names, functions of the user and
models, asked and checked in one place.

Refuses to know: how answers were made, what becomes of the rewards, paddle.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ernie_tune.config.language import say
from ernie_tune.data.records import Record
from ernie_tune.rewards.endpoint import EndpointJudge
from ernie_tune.rewards.evidence import judge_evidence, read_claims, without_evidence
from ernie_tune.rewards.functions import (
    LARGEST,
    SHOWN_CHARACTERS,
    Answered,
    Asked,
    Group,
    RewardFunction,
    Scores,
    TrainerState,
    ask_all,
    columns_of,
)
from ernie_tune.rewards.reading import read_quantity
from ernie_tune.rewards.spoken import claims_beside
from ernie_tune.rewards.verifiers import GROUNDS, SHAPING, VERIFIERS, verifier_for

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
    right: float | None = None  # how right the answer is, on [0, 1], apart from its form and its grounds
    earned: float = 0.0  # what of the reward it got for that
    extra: Mapping[str, Any] = field(default_factory=dict)


class RowVerifiers:
    """The checkers that each row names, weighted; where it names none, the one that its gold answer
    asks for (`verifier_for`).

    What a checker wants and the row does not give is filled in: the gold answer, the answer's
    length in tokens and its bound, the row's mode.
    """

    name = ROW

    def __init__(self, max_completion_tokens: int = 512, evidence_scope: str = "both") -> None:
        """`evidence_scope`: where free text is read for claims that the scene contradicts."""
        self.limit, self.scope = max_completion_tokens, evidence_scope
        self.details: list[list[dict[str, float | None]]] = []  # of the last call
        self.worth: list[list[Worth]] = []
        self.took: dict[str, list[float]] = {}  # milliseconds of this thread, by checker, since told

    def __call__(self, groups: Sequence[Group]) -> Scores:
        self.details = [[self._checked(record, answer) for answer in answers] for record, answers in groups]
        checks = [self._checks(record) for record, _ in groups]
        self.worth = [[_worth(given, some) for given in row] for row, some in zip(self.details, checks, strict=True)]
        return [[one.total for one in row] for row in self.worth]

    def check(self, record: Record, alone: bool = False) -> None:
        """Raises ValueError, naming the row, where it names an unknown checker, or nothing but how
        an answer should look; and, where nobody else judges (`alone`), for a prompt that names
        nothing.
        """
        if alone and record.signal == "prompt":
            raise ValueError(
                say(
                    f"{record.meta}: an answer to this prompt must be judged by something; give the row an answer or "
                    "verifiers, or set reward_funcs or reward_model",
                    f"{record.meta}: 对该提示的回答须有依据评判；请在该行给出 answer 或 verifiers，"
                    "或设置 reward_funcs 或 reward_model",
                )
            )
        names = [name for name, _, _ in self._checks(record)]
        if names and all(name in (*SHAPING, *GROUNDS) for name in names):
            raise ValueError(
                say(
                    f"{record.meta}: verifiers ({', '.join(names)}) must hold one that asks whether the answer is right; length and form alone would be learned instead",
                    f"{record.meta}: verifiers（{', '.join(names)}）须含检查答案对错的一项；否则只会学到长度与格式",
                )
            )

        weights = {name: weight for name, weight, _ in self._checks(record) if name not in (*SHAPING, *GROUNDS)}
        for name, weight, spec in self._checks(record):
            leak, lost = spec.get("leak", 0.0), spec.get("contradiction", weight)
            if name in GROUNDS and not sum(weights.values()) - lost > weight * leak:
                raise ValueError(
                    say(
                        f"{record.meta}: weights of the answer ({sum(weights.values()):g}) less contradiction ({lost:g}) must be above {name} x leak ({weight * leak:g}), or wrong answers would earn more than right ones; raise the answer's",
                        f"{record.meta}: 答案权重（{sum(weights.values()):g}）减 contradiction（{lost:g}）须大于 {name} × leak（{weight * leak:g}），否则错误答案会高于正确答案；请提高答案权重",
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
            "where": str(record.meta),
            **({"picture": record.images[0]} if record.images else {}),
            **_evidence_of(record),
            **_zoomed(record, answer),
        }
        text, grounds = answer.text, {"leak", "contradiction"}
        out: dict[str, float | None] = {}
        checks = self._checks(record)
        # the answer is what stands beside the evidence, also where nothing asks for that
        if any(name in GROUNDS for name, _, _ in checks) or read_claims(answer.text) is not None:
            text = without_evidence(answer.text)
        for name, _, whole in checks:
            check = VERIFIERS[name]
            spec = {k: v for k, v in whole.items() if name not in GROUNDS or k not in grounds}
            wanted = inspect.signature(check).parameters
            filled = {key: value for key, value in known.items() if key in wanted and key not in spec}
            if name in ("count", "numeric") and isinstance(filled.get("gold"), str):
                filled["gold"] = _gold_number(record, name)
            began = time.thread_time()
            try:
                out[name] = check(answer.text if name in GROUNDS else text, **filled, **spec)
                self.took.setdefault(name, []).append(1e3 * (time.thread_time() - began))
                if name == "evidence":
                    out |= _told(answer.text, {**filled, **spec}, self.scope)
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


def _evidence_of(record: Record) -> dict[str, Any]:
    """What the checker of evidence is given of a row."""
    if record.reward is None:
        return {}
    asked = record.reward.evidence
    return {
        "scene": record.reward.scene,
        "required": asked.get("required", 1),
        "answer_from": asked.get("answer_from", ""),
    }


def _zoomed(record: Record, answer: Answered) -> dict[str, Any]:
    """What the checker of zooming is given: what tools showed, and the scene's target."""
    target = record.reward.scene.get("target") if record.reward else None
    if target is None:
        return {}
    shown = [call.shown for call in answer.calls if call.shown is not None]
    return {"target": target, "crops": shown, "area": max((c.size[0] * c.size[1] for c in answer.calls), default=0)}


def _told(text: str, given: Mapping[str, Any], scope: str) -> dict[str, float | None]:
    """E's parts, for the log and for what contradictions cost."""
    beside = [one.claim for one in claims_beside(text, scope)]
    judged = judge_evidence(text, None, given["scene"], given.get("required", 1), beside=beside)
    names = ("contradicted", "unverifiable", "precision", "recall")
    return {f"evidence/{name}": float(getattr(judged, name)) for name in names}


@dataclass(frozen=True)
class Worth:
    """What a row's checkers make of one answer: all it earns, how right it is on [0, 1], and what
    it earned for being right. None where no checker applies.
    """

    total: float | None
    right: float | None
    earned: float


def _worth(found: Mapping[str, float | None], checks: Sequence[tuple[str, float, Mapping[str, Any]]]) -> Worth:
    """The weighted sum of what the checkers say. Evidence E counts as weight (leak + (1 - leak)
    right) E and costs `contradiction` times the share of claims that the picture contradicts;
    beside it, an answer whose form is wrong earns nothing. So a right answer is never worth less
    than a wrong one with better evidence, and evidence for a wrong answer nothing (leak 0).
    """
    known = {name: value for name, _, _ in checks if (value := found.get(name)) is not None}
    if not known:
        return Worth(None, None, 0.0)
    answer = {name: weight for name, weight, _ in checks if name in known and name not in (*SHAPING, *GROUNDS)}
    earned = sum(weight * known[name] for name, weight in answer.items())
    right = min(1.0, max(0.0, earned / sum(answer.values()))) if sum(answer.values()) > 0 else None
    total = earned + sum(weight * known[name] for name, weight, _ in checks if name in known and name in SHAPING)
    for name, weight, spec in checks:
        if name in GROUNDS and name in known:
            leak = spec.get("leak", 0.0)
            total += weight * (leak + (1 - leak) * (right or 0.0)) * known[name]
            total -= spec.get("contradiction", weight) * (found.get(f"{name}/contradicted") or 0.0)
            total = min(total, 0.0) if known.get("format") == 0 else total
    return Worth(total, right, max(earned, 0.0))


def _too_large(name: str, weight: float, value: float, record: Record, answer: Answered) -> ValueError:
    shown, times = answer.text[:SHOWN_CHARACTERS], f" x {weight:g}" if weight != 1 else ""
    return ValueError(
        say(
            f"reward {name} ({value:g}{times}) must be at most {LARGEST:g} in size for {record.meta}, answer {shown!r}, "
            "so that it can be compared with others; give smaller numbers, or None where there is nothing to judge",
            f"奖励 {name}（{value:g}{times}）对 {record.meta} 的回答 {shown!r} 绝对值须不超过 {LARGEST:g}，才能与其他奖励比较；"
            "请给出较小的数，无从评判时给出 None",
        )
    )


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
        evidence_scope: str = "both",
    ) -> None:
        self.judges: tuple[Judge, ...] = tuple(judges) or (RowVerifiers(max_completion_tokens, evidence_scope),)
        self.weights = tuple(weights) or (1.0,) * len(self.judges)
        self.unchecked = check
        if len(self.weights) != len(self.judges):
            raise ValueError(
                say(
                    f"reward_weights ({len(self.weights)}) must be as many as reward_funcs ({len(self.judges)}); give one a function",
                    f"reward_weights（{len(self.weights)} 个）须与 reward_funcs（{len(self.judges)} 个）一样多；请逐个给出",
                )
            )
        if not all(map(math.isfinite, self.weights)):
            shown = ", ".join(f"{weight:g}" for weight in self.weights)
            raise ValueError(
                say(
                    f"reward_weights ({shown}) must be finite numbers; correct them",
                    f"reward_weights（{shown}）须为有限数；请改正",
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

    def know(self, records: Iterable[Record]) -> None:
        """Tell functions which columns the rows of a run have, so that one that only some of them
        have is None for the others."""
        columns = columns_of(records)
        for judge in self.judges:
            if isinstance(judge, RewardFunction):
                judge.columns |= columns

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
                details, right, earned = self._of_row(g, i, parts)
                more = {name: values[at] for one in extra for name, values in one.items() if at < len(values)}
                row.append(Scored(parts, details, right, earned, more))
                at += 1
            out.append(row)
        return out

    def _asked(self, groups: Sequence[Group]) -> list[Scores]:
        functions = [judge for judge in self.judges if isinstance(judge, RewardFunction)]
        theirs = iter(ask_all(functions, groups))
        found = [next(theirs) if isinstance(judge, RewardFunction) else judge(groups) for judge in self.judges]
        for judge, weight, scores in zip(self.judges, self.weights, found, strict=True):
            for (record, answers), row in zip(groups, scores, strict=True):
                for answer, value in zip(answers, row, strict=True):
                    if value is not None and max(abs(value), abs(weight * value)) > LARGEST:
                        raise _too_large(judge.name, weight, value, record, answer)
        return found

    def _of_row(
        self, g: int, i: int, parts: Mapping[str, float | None]
    ) -> tuple[Mapping[str, float | None], float | None, float]:
        """(what the row's own checkers gave, how right the answer is, what it earned for that);
        where a row names none, all that it earns is for being right.
        """
        for judge, weight in zip(self.judges, self.weights, strict=True):
            if isinstance(judge, RowVerifiers) and judge.worth[g][i].total is not None:
                worth = judge.worth[g][i]
                return judge.details[g][i], worth.right, weight * worth.earned
        known = [
            w * v for w, v in zip(self.weights, parts.values(), strict=True) if v is not None and not math.isnan(v)
        ]
        total = math.fsum(known)
        return {}, min(1.0, max(0.0, total)) if known else None, max(0.0, total)

    def reported(self) -> dict[str, float]:
        """What functions said beside their numbers since they were last asked for it:
        rewards/<name>/timeouts and errors (answers), and the means of their own metrics; of rows'
        checkers rewards/<name>/ms_p99, which 99 of 100 calls stay below.
        """
        out: dict[str, float] = {}
        for judge in self.judges:
            if isinstance(judge, RewardFunction | EndpointJudge):
                asked, judge.asked = judge.asked, Asked()
                for name in ("timeouts", "errors"):
                    out[f"rewards/{judge.name}/{name}"] = float(getattr(asked, name))
                out |= {name: math.fsum(values) / len(values) for name, values in asked.metrics.items()}
            if isinstance(judge, RowVerifiers):
                took, judge.took = judge.took, {}
                out |= {f"rewards/{name}/ms_p99": sorted(ms)[len(ms) * 99 // 100] for name, ms in took.items()}
        return out

    def at(self, step: int, steps: int) -> None:
        """Tell functions how far the run is."""
        for judge in self.judges:
            if isinstance(judge, RewardFunction):
                judge.state = TrainerState(step, steps)

    def _same_twice(self, groups: Sequence[Group]) -> None:
        for judge in self.judges:
            if isinstance(judge, EndpointJudge):  # remembers what it said
                continue
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

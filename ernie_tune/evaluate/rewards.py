"""Held-out prompts answered by the policy and judged by the rubric that it learns from.

Refuses to know: how a run is made, how rewards are computed, what a verdict does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ernie_tune.data.chat import split_reasoning
from ernie_tune.data.records import Record
from ernie_tune.evaluate.answers import Question, question
from ernie_tune.evaluate.measure import Measure
from ernie_tune.report.log import RunLog
from ernie_tune.rewards.attacks import reference_answer
from ernie_tune.rewards.evidence import without_evidence
from ernie_tune.rewards.functions import Answered
from ernie_tune.rewards.reading import answer_span
from ernie_tune.rewards.rubric import ROW, RowVerifiers, Rubric, Scored
from ernie_tune.rewards.scores import pass_at
from ernie_tune.train.evidence import control_of, twin_of, without_picture
from ernie_tune.train.rollout_guards import RolloutWatch

Ask = Callable[[Sequence[Record]], list[Answered]]
# records, what numbers them, how many answers to each
Draw = Callable[[Sequence[Record], Sequence[int], int], list[Sequence[Answered]]]


class OnlineMeasure(Measure):
    """Held-out prompts are answered greedily and judged as in training; there is no loss on answers
    that nobody wrote.
    """

    def __init__(
        self,
        *args: Any,
        rubric: Rubric,
        own: RowVerifiers,
        watch: RolloutWatch,
        ask: Ask,
        draw: Draw,
        draws: int = 1,
        monitors: Rubric | None = None,
    ) -> None:
        """`own`: what rows themselves name, whatever is rewarded; `monitors`: judges that nothing
        is learned from. `ask`: the policy's likeliest answers to prompts, as judges are given those
        of a round; `draw`: answers that are sampled, `draws` to each prompt, where it is more than
        one.
        """
        super().__init__(*args)
        self.own, self.monitors = own, monitors
        self.rubric, self.watch, self.ask, self.draw, self.draws = rubric, watch, ask, draw, draws
        self._whole: list[Answered] = []  # the newest answers, with tokens, thoughts and calls
        self._drawn: list[int] = []  # the rows that were asked last
        self._totals: dict[int, float] = {}  # what their answers earned
        self._rights: dict[int, float] = {}  # how right their own checkers call them

    def before(self, log: RunLog, resumed: bool) -> None:
        """As any method's; the watch hears of it, unless it heard before the run was stopped."""
        super().before(log, resumed)
        if not resumed:
            self.watch.measured(self._totals, self._rights)

    def during(self, *args: Any, **more: Any) -> dict[str, float]:
        """As any method's; the watch hears of it."""
        metrics = super().during(*args, **more)
        self.watch.measured(self._totals, self._rights)
        return metrics

    def _loss(self, rows: Sequence[Record], done: Callable[[int], object] = lambda count: None) -> dict[str, float]:
        done(len(rows))
        return {}

    def _measured(self, title: str, limit: int) -> tuple[dict[str, float], list[Question], list[str]]:
        """Without answers there would be nothing to measure."""
        return super()._measured(title, limit or max(1, self.settings.eval.report_max_samples))

    def _questions(self, limit: int) -> list[Question]:
        count = min(limit, len(self.rows))
        self._drawn = [i * len(self.rows) // count for i in range(count)]
        return [_asked(self.rows[i]) for i in self._drawn]

    def _given(self, asked: Sequence[Question], done: Callable[[int], object]) -> list[str]:
        self._whole, size = [], max(8, self.settings.eval.per_device_eval_batch_size)
        for k in range(0, len(asked), size):
            part = [q.record for q in asked[k : k + size]]
            self._whole += self.ask(part)
            done(len(part))
        return [_content(answer) for answer in self._whole]

    def _judged(self, asked: Sequence[Question], given: Sequence[str]) -> tuple[list[str], list[str]]:
        """As checkers read it: the answer that a text concludes with, boxed, tagged or after "the
        answer is", else all of it beside its evidence.
        """
        texts, golds = super()._judged(asked, given)
        return [answer_span(text) or text for text in texts], golds

    def _answers(self, asked: Sequence[Question], done: Callable[[int], object]) -> tuple[dict[str, float], list[str]]:
        scores, given = super()._answers(asked, done)
        if not asked:
            return scores, given
        whole = self._whole
        judged = self.rubric([(q.record, [answer]) for q, answer in zip(asked, whole, strict=True)])
        scores |= _means(self.rubric, judged, "reward")
        if self.monitors is not None:
            groups = [(q.record, [answer]) for q, answer in zip(asked, whole, strict=True)]
            scores |= _means(self.monitors, self.monitors(groups), "monitor")
        totals = [self._total(one[0]) for one in judged]
        self._totals = dict(zip(self._drawn, totals, strict=True))
        self._rights = self._by_own_checkers([q.record for q in asked], judged)
        scores = {"reward": float(np.mean(totals)), **scores}
        for name in sorted({name for one in judged for name in one[0].details}):
            known = [value for one in judged if (value := one[0].details.get(name)) is not None]
            scores |= {name: float(np.mean(known))} if known else {}
        right = [(one[0].right or 0.0) >= 1 for one in judged]
        if any(answer.calls for answer in whole):
            scores["tools/call_frequency"] = float(np.mean([bool(answer.calls) for answer in whole]))
            if any(right):
                called = [bool(answer.calls) for answer, good in zip(whole, right, strict=True) if good]
                scores["tools/calls_of_right_answers"] = float(np.mean(called))
        records = [q.record for q in asked]
        return scores | self._sampled(records) | self._looked(records, given, right), given

    def _by_own_checkers(self, records: Sequence[Record], judged: Sequence[Sequence[Scored]]) -> dict[int, float]:
        """How right the rows' own checkers call the newest answers, by the rows' numbers, also
        where something else is rewarded; nothing of rows that these cannot check.
        """
        rows = list(zip(self._drawn, records, self._whole, strict=True))
        if ROW in self.rubric.names:
            found = [one[0].right for one in judged]
        else:
            found = [_right(self.own, record, answer) for _, record, answer in rows]
        return {row: right for (row, _, _), right in zip(rows, found, strict=True) if right is not None}

    def _sampled(self, records: Sequence[Record]) -> dict[str, float]:
        """Of `draws` answers sampled to each prompt: their mean reward (reward/mean@n), and the
        chance that one of k of them is right (pass@k; k: powers of two, and all). The same numbers
        of chance at each evaluation, so that two differ by the policy alone.
        """
        if self.draws < 2:
            return {}
        size, n = max(1, max(8, self.settings.eval.per_device_eval_batch_size) // self.draws), self.draws
        found: list[Sequence[Answered]] = []
        for k in range(0, len(records), size):
            found += self.draw(records[k : k + size], self._drawn[k : k + size], n)
        judged = self.rubric(list(zip(records, found, strict=True)))
        right = [sum((one.right or 0.0) >= 1 for one in group) for group in judged]
        ks = sorted({*(2**i for i in range(n.bit_length()) if 2**i <= n), n})
        out = {f"pass@{k}": float(np.mean([pass_at(k, n, count) for count in right])) for k in ks}
        return out | {f"reward/mean@{n}": float(np.mean([self._total(one) for group in judged for one in group]))}

    def _total(self, one: Scored) -> float:
        """What an answer earned; 0 for what nobody judged."""
        return sum(w * (one.parts[n] or 0.0) for n, w in zip(self.rubric.names, self.rubric.weights, strict=True))

    def _looked(self, records: Sequence[Record], given: Sequence[str], right: Sequence[bool]) -> dict[str, float]:
        """Whether the answers come from the pictures, of rows that have twins. twin_consistency:
        the share of them whose answers to both pictures are right; blind_consistency: the same of
        answers to grey pictures; invariance: the share of answers that an edit elsewhere leaves as
        they are, whatever they cite for it.
        """
        found = [(record, twin) for record in records if (twin := twin_of(record)) is not None]
        if not found or len(found) < len(records):
            return {}
        twins = [twin for _, twin in found]
        seen = self._right(twins, self._said(twins))
        grey = self._said([without_picture(record) for record in records])
        blind = zip(self._right(records, grey), self._right(twins, grey), strict=True)
        out = {
            "evidence/twin_consistency": float(np.mean([a and b for a, b in zip(right, seen, strict=True)])),
            "evidence/blind_consistency": float(np.mean([a and b for a, b in blind])),
        }
        controls = [(control, said) for r, said in zip(records, given, strict=True) if (control := control_of(r))]
        if controls:
            again = self._said([control for control, _ in controls])
            same = [_concluded(_content(a)) == _concluded(b) for a, (_, b) in zip(again, controls, strict=True)]
            out["evidence/invariance"] = float(np.mean(same))
        return out

    def _said(self, records: Sequence[Record]) -> list[Answered]:
        self._given([_asked(record) for record in records], lambda count: None)
        return self._whole

    def _right(self, records: Sequence[Record], said: Sequence[Answered]) -> list[bool]:
        judged = self.rubric([(record, [answer]) for record, answer in zip(records, said, strict=True)])
        return [(one[0].right or 0.0) >= 1 for one in judged]


def _means(rubric: Rubric, judged: Sequence[Sequence[Scored]], title: str) -> dict[str, float]:
    """The mean of what each judge gave, where any gave something."""
    out: dict[str, float] = {}
    for name in rubric.names:
        known = [value for one in judged if (value := one[0].parts[name]) is not None]
        out |= {f"{title}/{name}": float(np.mean(known))} if known else {}
    return out


def _content(answer: Answered) -> str:
    """The answer without its thought."""
    return split_reasoning(answer.text)[1].strip()


def _concluded(content: str) -> str:
    """What an answer says in the end, without the claims that it rests on."""
    return without_evidence(content).strip()


def _right(own: RowVerifiers, record: Record, answer: Answered) -> float | None:
    """How right a row's own checkers call an answer; None where it names none that can be asked."""
    try:
        own([(record, [answer])])
    except ValueError:  # a row that is meant for other rewards alone
        return None
    return own.worth[0][0].right


def _asked(record: Record) -> Question:
    """A held-out prompt with its gold answer, or a dialogue cut before its last answer."""
    if record.messages[-1]["role"] == "assistant":
        return question(record)
    gold = record.reward.answer if record.reward else None
    answer = "" if gold is None else reference_answer(gold)
    whole = dataclasses.replace(record, messages=(*record.messages, {"role": "assistant", "content": answer}))
    return dataclasses.replace(question(whole), record=whole)

"""A judge's session: rows, a model that answers them, the desk, and the folder that gets what is
said. What the page shows of it is made here too, as HTML of both languages.

Refuses to know: gradio, which keys mean what (`desk`), formats of rows (`judgements`).
"""

from __future__ import annotations

import html as escaping
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ernie_tune.config.language import Text, say
from ernie_tune.report import html
from ernie_tune.ui import asking, desk, studio
from ernie_tune.ui.asking import ModelServers
from ernie_tune.ui.judgements import PAIRS, Judgements, JudgesAgreement, agreement
from ernie_tune.ui.questions import ToJudge, questions
from ernie_tune.ui.workspace import Workspace

_STARS = "★"


@dataclass
class Session:
    """`model`: "" judges the answers that the rows bring along. `n`: answers to each question."""

    store: Judgements
    questions: dict[str, ToJudge]
    desk: desk.Desk
    servers: ModelServers
    model: str = ""
    n: int = 2
    temperature: float = 1.0
    max_tokens: int = 256
    told: list[str] = field(default_factory=list)

    @property
    def question(self) -> ToJudge | None:
        return self.questions[self.desk.question] if self.desk.question is not None else None

    def lay(self) -> None:
        """Get the answers to the present question, if they do not lie here yet. Raises ValueError
        where the model cannot give them.
        """
        question = self.question
        if question is None or self.desk.answers:
            return
        said: Sequence[str] = question.answers
        if self.model:
            server = self.servers.of(Path(self.model))
            self.servers.wait(server)
            sampling = {"n": self.n, "temperature": self.temperature, "max_tokens": self.max_tokens, "seed": 0}
            said = asking.answers(server, asking.asked_body(question.asked.messages, question.asked.images, **sampling))
        self.desk = self.desk.laid(list(dict.fromkeys(text.strip() for text in said)))

    def press(self, key: str, reason: str = "", corrected: str = "") -> bool:
        """What a key does; whether something was written. Raises ValueError for a judgement that
        says nothing.
        """
        question = self.question
        after, complete = desk.press(self.desk, key)
        if complete and question is not None:
            models = [self.model] * len(after.order) if self.model else ()
            self.store.add(desk.judgement(after, question.asked, reason=reason, corrected=corrected, models=models))
            after = after.moved(1, say("written", "已写入"))
        self.desk = after
        return complete and question is not None

    # --- what is shown ----------------------------------------------------------------------------

    def question_html(self) -> str:
        question = self.question
        if question is None:
            return studio.line(say("all questions are judged; thank you", "全部评判完成，谢谢"), "good")
        return studio.dialogue(question.asked.messages, question.asked.images)

    def answers_html(self) -> str:
        cards = []
        for k, said in enumerate(self.desk.answers):
            marked = " marked" if k == self.desk.marked else ""
            cards.append(
                f'<article class="answer{marked}" data-answer="{k}"><header><b>{k + 1}</b>{self._said(k)}</header>'
                f"{studio.text(said) if said.strip() else html.both(say('(empty)', '（空）'))}</article>"
            )
        return f'<div class="answers">{"".join(cards)}</div>'

    def _said(self, k: int) -> str:
        draft, parts = self.desk.draft, []
        if draft.ranks and draft.ranks[k] is not None:
            parts.append(html.both(say(f"place {draft.ranks[k]}", f"第 {draft.ranks[k]} 名")))
        if draft.ratings and draft.ratings[k] is not None:
            parts.append(_STARS * int(draft.ratings[k] or 0))
        if draft.labels and draft.labels[k] is not None:
            parts.append(html.both(say("good", "好") if draft.labels[k] else say("bad", "不好")))
        return f"<span>{' '.join(parts)}</span>"

    def progress_html(self) -> str:
        done, total = self.desk.at, len(self.desk.todo)
        share = 100 * done / max(total, 1)
        counts = ", ".join(
            f"{name.removesuffix('.jsonl')} {count}" for name, count in self.store.counts().items() if count
        )
        help_ = html.both(desk.HELP[self.desk.mode]) + " &nbsp; " + html.both(desk.KEYS)
        told = html.both(self.desk.told) if isinstance(self.desk.told, Text) else escaping.escape(str(self.desk.told))
        return (
            f'<div class="meter" role="progressbar" aria-valuenow="{done}" aria-valuemin="0" aria-valuemax="{total}" '
            f'aria-label="{done} / {total}"><i style="width:{share:.1f}%"></i></div>'
            f'<p class="note">{done} / {total} · {escaping.escape(counts)} <b role="status">{told}</b></p>'
            f'<p class="note keys">{help_}</p>'
        )

    def marked_text(self) -> str:
        """The answer that a correction starts from."""
        return self.desk.answers[self.desk.marked] if self.desk.answers else ""


def begin(
    workspace: Workspace, servers: ModelServers, rows: str, model: str, folder: str, judge: str, mode: str, n: int,
    temperature: float = 1.0, max_tokens: int = 256,
) -> Session:  # fmt: skip
    """Open rows for a judge; what they have judged before is left out. Raises ValueError for paths
    outside the workspace, a mode that is none, rows without a question, and rows without answers
    where no model is given.
    """
    if mode not in desk.MODES:
        raise ValueError(
            say(
                f"mode ({mode}) must be one of {', '.join(desk.MODES)}",
                f"方式（{mode}）须为 {'、'.join(desk.MODES)} 之一",
            )
        )
    if not judge.strip() or len(judge) > 80:
        raise ValueError(
            say("judge must be named, in at most 80 characters; write a name", "请填写评判者姓名（不超过 80 字）")
        )
    found, told = questions(workspace.inside(rows), workspace)
    store = Judgements(workspace.inside(folder))
    asked_model = str(workspace.inside(model)) if model else ""
    done = store.done(judge.strip())
    todo = [name for name, q in found.items() if name not in done and (asked_model or q.answers)]
    if not todo and not done:
        raise ValueError(
            say(
                f"{rows} must hold questions with answers, or a model must answer them; choose a model",
                f"{rows} 中须有带回答的问题，或选择一个模型来回答",
            )
        )
    table = desk.Desk(judge.strip(), mode, tuple(todo))
    return Session(store, found, table, servers, asked_model, max(1, int(n)), temperature, max_tokens, told)


def agreement_html(store: Judgements, first: str, second: str) -> str:
    """How far two judges agree, in words and numbers."""
    standing = store.standing()
    a, b = ([one for one in standing if one.judge == name] for name in (first, second))
    found: JudgesAgreement = agreement(a, b)
    if not found.questions:
        return studio.line(say("no question was judged by both", "没有两人都评判过的题目"))
    shown = [
        (say("questions judged by both", "两人都评判的题目"), str(found.questions)),
        (say("pairs of answers", "回答对"), str(found.pairs)),
        (say("judged alike", "评判一致"), _share(found.same)),
        (say("Cohen's kappa", "Cohen 一致性系数 κ"), _number(found.kappa)),
        (say("ratings", "评分数"), str(found.ratings)),
        (say("weighted kappa of ratings", "评分的加权 κ"), _number(found.ratings_kappa)),
    ]
    return html.facts([(name, escaping.escape(value)) for name, value in shown])


def judges(store: Judgements) -> list[str]:
    return sorted({one.judge for one in store.standing()})


def learn_from(store: Judgements) -> str:
    """The settings that learn from what was judged: the start of a YAML."""
    counts = store.counts()
    kind, stage = max(
        (
            (PAIRS, "DPO"),
            ("rankings.jsonl", "DPO"),
            ("ratings.jsonl", "DPO"),
            ("labels.jsonl", "KTO"),
            ("corrected.jsonl", "SFT"),
        ),
        key=lambda one: counts[one[0]],
    )
    return f"stage: {stage}\ntrain_dataset_path: {store.folder / kind}\n"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"

"""A judge's session: rows, a model that answers them, the desk, and the folder that gets what is
said. What the page shows of it is made here too, as HTML of both languages.

Refuses to know: gradio, which keys mean what (`desk`), formats of rows (`judgements`).
"""

from __future__ import annotations

import html as escaping
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

from ernie_tune.config.language import Text, counted, say
from ernie_tune.config.loader import ARGS_FILE
from ernie_tune.report import html
from ernie_tune.ui import asking, desk, forms, studio
from ernie_tune.ui.asking import ModelServers
from ernie_tune.ui.judgements import (
    CORRECTED,
    LABELS,
    PAIRS,
    RANKINGS,
    RATINGS,
    Judgements,
    JudgesAgreement,
    agreement,
)
from ernie_tune.ui.questions import ToJudge, questions
from ernie_tune.ui.workspace import Workspace

_STARS = "★"
_MOST_ANSWERS = 8
LORA_FILE = "lora_config.json"
# file -> the stage that learns it, and a learning rate that does no harm to small models
_LEARNT = {
    PAIRS: ("DPO", "1.0e-4"),
    RANKINGS: ("DPO", "1.0e-4"),
    RATINGS: ("DPO", "1.0e-4"),
    LABELS: ("KTO", "1.0e-4"),
    CORRECTED: ("SFT", "1.0e-3"),
}
_TRIES = 3  # times that a model is asked until its answers differ


@dataclass
class Session:
    """What one judge does in one tab. `model`: "" judges the answers that the rows bring along.
    `n`: answers to each question; `before`: questions that were judged earlier; `turn`: grows with
    whatever was pressed, so that the page knows that it has been heard.
    """

    store: Judgements
    questions: dict[str, ToJudge]
    desk: desk.Desk
    servers: ModelServers
    model: str = ""
    n: int = 2
    temperature: float = 1.0
    max_tokens: int = 256
    told: list[ValueError] = field(default_factory=list)
    before: int = 0
    turn: int = 0
    _said: dict[str, Future[list[str]]] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def question(self) -> ToJudge | None:
        return self.questions[self.desk.question] if self.desk.question is not None else None

    @property
    def waits(self) -> bool:
        """Whether the model has yet to answer the present question."""
        name = self.desk.question
        known = self._said.get(name) if name is not None else None
        return bool(self.model) and name is not None and not self.desk.answers and not (known and known.done())

    def lay(self) -> None:
        """Get the answers to the present question, if they do not lie here yet, and begin to get
        those to the next one. Raises ValueError where the model cannot give them.
        """
        question = self.question
        if question is None or self.desk.answers:
            return
        said = self._answers(question).result() if self.model else list(question.answers)
        with self._lock:
            if self.question is question:
                self.desk = self.desk.laid(list(dict.fromkeys(text.strip() for text in said)))
        if self.model and self.desk.at + 1 < len(self.desk.todo):
            self._answers(self.questions[self.desk.todo[self.desk.at + 1]])

    def _answers(self, question: ToJudge) -> Future[list[str]]:
        """What the model says, now or later: asked once, and again where it failed."""
        with self._lock:
            known = self._said.get(question.asked.id)
            if known is None or (known.done() and known.exception()):
                known = self._said[question.asked.id] = Future()
                threading.Thread(target=self._ask, args=(question, known), daemon=True).start()
            return known

    def _ask(self, question: ToJudge, into: Future[list[str]]) -> None:
        try:
            found: dict[str, None] = {}
            with self.servers.asked(self.model) as server:
                for seed in range(_TRIES if self.temperature > 0 else 1):
                    sampling = {"n": self.n, "temperature": self.temperature, "max_tokens": self.max_tokens}
                    body = asking.asked_body(question.asked.messages, question.asked.images, seed=seed, **sampling)
                    found.update(dict.fromkeys(text.strip() for text in asking.answers(server, body)))
                    if len(found) >= self.n:
                        break
            into.set_result(list(found)[: self.n])
        except (ValueError, OSError) as error:
            into.set_exception(error)
        finally:
            if not into.done():  # whatever it was, who waits for the answers is told
                into.set_exception(ValueError(say("the model could not be asked", "未能向模型提问")))

    def press(self, key: str, reason: str = "", corrected: str = "", at: int | None = None) -> bool:
        """What a key does; whether something was written. `at`: the place of the question that was
        seen when it was pressed; a key that was meant for another one does nothing. Raises
        ValueError for a judgement that says nothing.
        """
        with self._lock:
            self.turn += 1
            question = self.question
            if at is not None and at != self.desk.at:
                return False
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
        clips = [str(clip)[:200] for clip in question.asked.videos]
        unseen = [say(f"a video that is not shown here: {name}", f"此处不显示的视频：{name}") for name in clips]
        return studio.dialogue(question.asked.messages, question.asked.images) + studio.lines(unseen)

    def answers_html(self) -> str:
        """The answers, and the keys that judge them, as buttons too."""
        cards = []
        for k, said in enumerate(self.desk.answers):
            marked = " marked" if k == self.desk.marked else ""
            cards.append(
                f'<article class="answer{marked}" data-key="mark{k}"><header><b>{k + 1}</b>{self._of(k)}</header>'
                f"{studio.text(said) if said.strip() else html.both(say('(empty)', '（空）'))}</article>"
            )
        shown = [] if self.question is None else desk.keys(self.desk.mode, len(self.desk.answers))
        buttons = "".join(
            f'<button type="button" data-key="{key}"{" class=primary" if key == "Enter" else ""}>'
            f"<kbd>{key}</kbd> {html.both(what) if isinstance(what, Text) else what}</button>"
            for key, what in shown
        )
        return (
            f'<div class="desk" data-turn="{self.turn}" data-at="{self.desk.at}"><div class="answers">'
            f'{"".join(cards)}</div><div class="keys">{buttons}</div></div>'
        )

    def _of(self, k: int) -> str:
        draft, parts = self.desk.draft, []
        if draft.ranks and draft.ranks[k] is not None:
            parts.append(html.both(say(f"place {draft.ranks[k]}", f"第 {draft.ranks[k]} 名")))
        if draft.ratings and draft.ratings[k] is not None:
            parts.append(_STARS * int(draft.ratings[k] or 0))
        if draft.labels and draft.labels[k] is not None:
            parts.append(html.both(say("good", "好") if draft.labels[k] else say("bad", "不好")))
        return f"<span>{' '.join(parts)}</span>"

    def progress_html(self) -> str:
        done, total = self.before + self.desk.at, self.before + len(self.desk.todo)
        share = 100 * done / max(total, 1)
        counts = ", ".join(f"{name} {count}" for name, count in self.store.counts().items() if count)
        help_ = html.both(desk.HELP[self.desk.mode]) if self.question else ""
        told = html.both(self.desk.told) if isinstance(self.desk.told, Text) else escaping.escape(str(self.desk.told))
        return (
            f'<div class="meter" role="progressbar" aria-valuenow="{done}" aria-valuemin="0" aria-valuemax="{total}" '
            f'aria-label="{done} / {total}"><i style="width:{share:.1f}%"></i></div>'
            f'<p class="note">{done} / {total}{" · " if counts else ""}{escaping.escape(counts)} <b role="status">{told}</b></p>'
            f'<p class="note">{help_}</p>'
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
    found, told = to_judge(workspace, rows, bool(model))
    store = Judgements(workspace.inside(folder))
    asked_model = workspace.model(model) if model else ""
    done = store.done(judge.strip()) & found.keys()
    todo = [name for name in found if name not in done]
    table = desk.Desk(judge.strip(), mode, tuple(todo))
    return Session(
        store,
        found,
        table,
        servers,
        asked_model,
        min(max(1, int(n)), _MOST_ANSWERS),
        temperature,
        max_tokens,
        told,
        len(done),
    )


def to_judge(workspace: Workspace, rows: str, answered: bool) -> tuple[dict[str, ToJudge], list[ValueError]]:
    """The questions of a file that can be judged, and what is wrong with its other rows.
    `answered`: whether a model answers; otherwise rows must bring answers along. Raises ValueError
    where no row can be judged, and why.
    """
    found, told = questions(workspace.inside(rows), workspace)
    if not found:
        more = len(told) - 1
        raise ValueError(
            say(
                "no row of {rows} can be judged: {why}{more}",
                "{rows} 中没有可评判的行：{why}{more}",
                rows=rows,
                why=told[0] if told else say("it holds none", "文件为空"),
                more=say(f" (and {more} more)", f"（另有 {more} 行）") if more > 0 else "",
            )
        )
    fit = {name: q for name, q in found.items() if (not q.asked.videos if answered else q.answers)}
    clips = sum(bool(q.asked.videos) for q in found.values()) if answered else 0
    if clips:
        what = counted(clips, "row")
        told = [
            *told,
            ValueError(
                say(
                    f"{rows}: {what} with videos cannot be asked here; let ernie-tune predict answer, then judge its file",
                    f"{rows}：{clips} 行含视频，此处无法提问；请先用 ernie-tune predict 回答，再评判其输出文件",
                )
            ),
        ]
    if not fit and clips:
        raise told[-1]
    if not fit:
        raise ValueError(
            say(
                f"{rows} must hold questions with answers, or a model must answer them; choose a model",
                f"{rows} 中须有带回答的问题，或选择一个模型来回答",
            )
        )
    return fit, told if answered else told + _without_answers(rows, len(found) - len(fit))


def _without_answers(rows: str, count: int) -> list[ValueError]:
    if not count:
        return []
    what = counted(count, "row")
    return [
        ValueError(
            say(
                f"{rows}: {what} without several answers must be answered by a model to be judged; choose one",
                f"{rows}：{count} 行没有多个回答，须由模型回答才能评判；请选择模型",
            )
        )
    ]


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


def learn_from(store: Judgements, workspace: Workspace, model: str = "") -> str:
    """The settings that learn from what was judged: a whole YAML. `model`: who gave the answers, a
    folder of the workspace or a name; "" leaves the setting to the user. Raises ValueError where
    there are no rows yet.
    """
    counts = store.counts()
    kind = max(_LEARNT, key=lambda name: counts[name])
    if not counts[kind]:
        raise ValueError(
            say(
                f"{workspace.name(store.folder)} must hold judgements that training can learn from; judge some answers first",
                f"{workspace.name(store.folder)} 中须有可供训练的评判；请先评判",
            )
        )
    stage, rate = _LEARNT[kind]
    start = [f"model_name_or_path: {model or 'nano'}", "fine_tuning: LoRA"]
    file = workspace.root / model / ARGS_FILE
    if model and file.is_file():  # a run: an adapter is trained on, on the model that it belongs to
        known = forms.written(file.read_text(encoding="utf-8"))
        start[1] = f"fine_tuning: {known.get('fine_tuning', 'LoRA')}"
        if (file.parent / LORA_FILE).is_file():
            start[0] = f"model_name_or_path: {known.get('model_name_or_path', model)}"
            start.append(f"lora_path: {model}")
    out = f"output/{stage.lower()}-{store.folder.name}"
    rows = [f"train_dataset_path: {workspace.name(store.folder / kind)}", f"output_dir: {out}"]
    return "\n".join([f"stage: {stage}", *start, *rows, "max_steps: 40", f"learning_rate: {rate}", ""])


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"

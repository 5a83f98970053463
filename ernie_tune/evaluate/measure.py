"""What a run measures of its model: before, during and after training, on held-out rows and on
guard sets; and the pages written at the end.

Refuses to know: the loop, optimizers, when it is called.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ernie_tune.checkpoint.writer import write_atomically
from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import Text, say
from ernie_tune.config.sections_run import EvalArguments
from ernie_tune.data.batching import Dropped, Encoder
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.sources import load_dataset
from ernie_tune.evaluate.answers import Question, answers, evaluation_loss, question
from ernie_tune.evaluate.own_metrics import Metrics, own_metrics
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.specs import parameter_specs
from ernie_tune.report.log import RunLog, keep_lines, number
from ernie_tune.report.pages import ReportRow, write_before_after
from ernie_tune.report.progress import Progress
from ernie_tune.rewards.evidence import answer_part
from ernie_tune.rewards.scores import MACRO_F1, confusion, fitting_metrics, has_classes, row_scores, score_answers
from ernie_tune.train.guards import ForgettingGuard, Verdict

GUARD_FILE = "guard_baseline.json"
# answers and scores before training, so that a resumed run can still compare
BEFORE_FILE = "before.json"
# answers to a few of those rows, one line each, added to at every evaluation
SAMPLES_FILE, _SAMPLES = "samples.jsonl", 8


@dataclass(frozen=True)
class MeasureSettings:
    """How often, how many rows and by which scores; and what pages say of the run. `plain`: lines
    instead of bars. `method`: stage and way of fine-tuning; `model`: "" where it was given as an
    object.
    """

    eval: EvalArguments
    plain: bool = False
    method: str = ""
    model: str = ""
    trained_on: tuple[str, ...] = ()
    measured_on: tuple[str, ...] = ()


class Measure:
    """Held-out rows and what the model makes of them. Rows are drawn evenly from the set where it
    is larger than the limit.
    """

    def __init__(
        self,
        settings: MeasureSettings,
        model: ErnieModel,
        processor: Processor,
        encoder: Encoder,
        rows: Sequence[Record],
        output_dir: Path,
    ) -> None:
        self.settings, self.model, self.processor, self.encoder, self.rows, self.output_dir = (
            settings,
            model,
            processor,
            encoder,
            rows,
            output_dir,
        )
        self.is_main = True  # of several processes, one shows how far it is
        self.compute_metrics: Metrics | None = None
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def _questions(self, limit: int) -> list[Question]:
        count = min(limit, len(self.rows))
        drawn = (self.rows[i * len(self.rows) // count] for i in range(count))
        return [question(record) for record in drawn if record.signal != "text"]  # a text asks nothing

    def _loss(self, rows: Sequence[Record], done: Callable[[int], object] = lambda count: None) -> dict[str, float]:
        every = (rows[i] for i in range(len(rows)))
        size = max(1, self.settings.eval.per_device_eval_batch_size)
        return evaluation_loss(self.model, every, self.encoder, size, done)

    def _measured(self, title: str, limit: int) -> tuple[dict[str, float], list[Question], list[str]]:
        """Loss on every held-out row, scores of the answers to at most `limit` of them (names begin
        with eval_), what was asked and answered; a bar under `title` shows how far it is.
        """
        asked = self._questions(limit) if limit else []
        mode = "plain" if self.settings.plain else ""
        total = len(self.rows) + len(asked)
        with Progress(total, title=title, mode=mode, is_main=self.is_main, inner=True) as progress:
            loss = {k: v for k, v in self._loss(self.rows, progress.advance).items() if k != "rows"}
            progress.update(len(self.rows))
            scores, given = self._answers(asked, progress.advance)
        return {f"eval_{k}": v for k, v in {**loss, **scores}.items()}, asked, given

    def _answers(self, asked: Sequence[Question], done: Callable[[int], object]) -> tuple[dict[str, float], list[str]]:
        if not asked:
            return {}, []
        given = self._given(asked, done)
        references = [q.reference for q in asked]
        scores = score_answers(*self._judged(asked, given), self.metric_names(asked))
        if self.compute_metrics is not None:
            scores.update(own_metrics(self.compute_metrics, given, references))
        return scores, given

    def _given(self, asked: Sequence[Question], done: Callable[[int], object]) -> list[str]:
        """What the model answers, thoughts cut off."""
        e = self.settings.eval
        rows = max(8, e.per_device_eval_batch_size)
        return answers(self.model, self.processor, asked, max_new_tokens=e.eval_max_new_tokens, rows=rows, done=done)

    def _judged(self, asked: Sequence[Question], given: Sequence[str]) -> tuple[list[str], list[str]]:
        """What scores compare of the answers and of the references: not the evidence beside
        either.
        """
        return [answer_part(text) for text in given], [answer_part(q.reference) for q in asked]

    def metric_names(self, asked: Sequence[Question]) -> tuple[str, ...]:
        """The scores that the settings name, or those that fit the references."""
        return self.settings.eval.eval_metrics or fitting_metrics(self._judged(asked, [])[1])

    def all_rows(self) -> tuple[dict[str, float], list[Question], list[str]]:
        """Loss on every held-out row, scores of the answers to at most report_max_samples of them:
        names begin with eval_.
        """
        return self._measured(say("eval", "评测"), self.settings.eval.report_max_samples)

    def before(self, log: RunLog, resumed: bool) -> None:
        """Measure before the first step; a resumed run reads what the first one wrote, and cannot
        compare where that is gone.
        """
        file = self.output_dir / BEFORE_FILE
        if not len(self.rows):
            return
        if resumed:
            reached = max((record["step"] for record in log.history), default=0)
            if log.is_main:
                keep_lines(self.output_dir / SAMPLES_FILE, lambda line: line.get("step", 0) <= reached)
            why = say("{f} is not there", "没有找到 {f}", f=file)
            try:
                self.first = read_json_object(file) if file.is_file() else {}
            except ValueError as error:  # cut off, or another's
                self.first, why = {}, say("{error}", "{error}", error=error)
            if not self.first:
                log.info(
                    say(
                        "{why}: no comparison with the model before training", "{why}：无法与训练前的模型比较", why=why
                    ),
                    "WARNING",
                )
            return
        metrics, asked, given = self._measured(say("before", "训练前"), self.settings.eval.report_max_samples)
        self.first = {"metrics": metrics, "answers": given, "references": [q.reference for q in asked]}
        if log.is_main:
            write_atomically(file, json.dumps(self.first, ensure_ascii=False, indent=1) + "\n")
            self._note_samples(0, asked, given)
        shown = ", ".join(f"{k}: {number(k, v)}" for k, v in metrics.items())
        log.info(say("before training: {m}", "训练前：{m}", m=shown))

    def during(self, log: RunLog, step: int, epoch: float) -> dict[str, float]:
        """Loss on every row, scores of the answers to eval_max_samples rows; logged and
        returned.
        """
        metrics, asked, given = self._measured(say("eval", "评测"), self.settings.eval.eval_max_samples)
        log.log(step, metrics, epoch)
        if log.is_main:
            self._note_samples(step, asked, given)
        return metrics

    def _note_samples(self, step: int, asked: Sequence[Question], given: Sequence[str]) -> None:
        """Add the answers to a few rows, so that they can be watched as they change. Best effort: a
        full disk does not end a run.
        """
        every = max(1, len(asked) // _SAMPLES)
        lines = [
            {
                "step": step,
                "row": str(q.record.meta),
                "question": q.record.messages[-2]["content"] if len(q.record.messages) > 1 else "",
                "images": [i for i in q.images if isinstance(i, str) and not i.startswith("data:")],
                "reference": q.reference,
                "answer": answer,
            }
            for q, answer in list(zip(asked, given, strict=True))[::every][:_SAMPLES]
        ]
        with contextlib.suppress(OSError), (self.output_dir / SAMPLES_FILE).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)

    def after(self, log: RunLog, train: Mapping[str, float], epoch: float) -> dict[str, float]:
        """The last measurement: results files and the before/after page. `train`: what there is to
        say of the training itself.
        """
        log.results("train", train, epoch)
        if not len(self.rows):
            return dict(train)
        metrics, asked, given = self._measured(say("after", "训练后"), self.settings.eval.report_max_samples)
        self.last = {"metrics": metrics, "answers": given}
        log.results("eval", metrics, epoch, self.first.get("metrics"))
        if asked and log.is_main:
            self._page(asked, given)
        return {**train, **metrics}

    def _page(self, asked: Sequence[Question], given: Sequence[str]) -> None:
        references = [q.reference for q in asked]
        first, known = self.first.get("answers", []), self.first.get("references") == references
        if not known:  # not measured, or on other rows
            first = [""] * len(given)
        name = self._row_metric(asked)
        now, golds = self._judged(asked, given)
        then = self._judged(asked, first)[0]
        after = row_scores(now, golds, name)
        before = row_scores(then, golds, name) if known else [None] * len(given)
        rows = [
            ReportRow(
                q.record.messages[-2]["content"] if len(q.record.messages) > 1 else "",
                q.reference,
                old,
                new,
                before_score,
                after_score,
                tuple(i for i in q.images if isinstance(i, str | bytes)),
                str(q.record.meta),
                tuple(v for v in q.videos if isinstance(v, str | bytes | tuple)),
            )
            for q, old, new, before_score, after_score in zip(asked, first, given, before, after, strict=True)
        ]
        tables = {}
        if has_classes(golds):
            tables = {"before": confusion(then, golds)} if known else {}
            tables["after"] = confusion(now, golds)
        write_before_after(
            self.output_dir / "before_after.html",
            rows,
            self.first.get("metrics", {}),
            self.last["metrics"],
            confusions=tables,
            title=f"{self.settings.method} · {self._model_name()}",
            facts=self._facts(len(asked)),
            links={"training_loss.svg": say("loss curve", "损失曲线"), "README.md": say("model card", "模型卡")},
        )

    def _model_name(self) -> str:
        return self.settings.model or type(self.model).__name__

    def _facts(self, shown: int) -> list[tuple[Text, str]]:
        """What the page says of the run."""
        # on whatever layout
        size = sum(math.prod(spec.shape) for spec in parameter_specs(self.model.config).values())
        files = [(say("trained on", "训练数据"), ", ".join(self.settings.trained_on))]
        files += [(say("measured on", "评测数据"), ", ".join(self.settings.measured_on))]
        return [
            (say("model", "模型"), f"{self._model_name()} ({size / 1e6:,.1f} M)"),
            *((name, value) for name, value in files if value),
            (say("rows shown", "展示行数"), f"{shown:,} / {len(self.rows):,}"),
            (say("written", "生成时间"), f"{datetime.now():%Y-%m-%d %H:%M}"),
            (say("folder", "输出目录"), str(self.output_dir)),
        ]

    def _row_metric(self, asked: Sequence[Question]) -> str:
        """The score by which a single answer is right or wrong."""
        return next((name for name in self.metric_names(asked) if name != MACRO_F1), "exact_match")

    def write_answers(self, path: Path, asked: Sequence[Question], given: Sequence[str]) -> None:
        """One line a question, so that answers can be looked at: where the row stands, reference,
        answer, score.
        """
        name = self._row_metric(asked)
        scores = row_scores(*self._judged(asked, given), name) if asked else []
        rows = (
            {"row": str(q.record.meta), "reference": q.reference, "answer": answer, name: score}
            for q, answer, score in zip(asked, given, scores, strict=True)
        )
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    # --- guard sets -------------------------------------------------------------------------------

    def forgetting_guard(self, log: RunLog, resumed: bool) -> ForgettingGuard | None:
        """Scores of the guard sets before training; a resumed run reads what the first one wrote.
        None without guard sets.

        Rows that cannot be measured are left out, and a line says so. Raises ValueError for a set
        of which none is left, or that has no baseline.
        """
        e = self.settings.eval
        dropped = Dropped()
        sets = {path: load_dataset(path) for path in e.guard_dataset_path}
        self.guard_sets = {
            path: [row for row in (rows[i] for i in range(len(rows))) if self.encoder(row, dropped) is not None]
            for path, rows in sets.items()
        }
        for line in dropped.lines():
            log.info(say("guard sets: {line}", "守护数据集：{line}", line=line), "WARNING")
        if not self.guard_sets:
            return None
        file = self.output_dir / GUARD_FILE
        if resumed and file.is_file():
            baseline = read_json_object(
                file, say("restore it, or start in another output_dir", "请恢复该文件或换一个 output_dir")
            )
        elif resumed:
            raise ValueError(
                say(
                    f"guard_dataset_path ({', '.join(sets)}) must have been given from the start, {file} is "
                    "not there; remove it, or start in another output_dir",
                    f"guard_dataset_path（{', '.join(sets)}）须从一开始就给出，没有找到 {file}"
                    "；请去掉，或换一个 output_dir 重新开始",
                )
            )
        else:
            baseline = {path: self._row_accuracy(rows) for path, rows in self.guard_sets.items()}
            if log.is_main:
                write_atomically(file, json.dumps(baseline) + "\n")
        return ForgettingGuard(baseline, e.guard_tolerance, stop=e.guard_stop)

    def _row_accuracy(self, rows: Sequence[Record]) -> list[float]:
        return [evaluation_loss(self.model, [rows[i]], self.encoder, 1)["token_acc"] for i in range(len(rows))]

    def look_at_guards(self, log: RunLog, guard: ForgettingGuard | None) -> list[Verdict]:
        """Verdicts on the guard sets as the model is now; a line says how each stands."""
        verdicts = []
        for path, rows in self.guard_sets.items() if guard else ():
            seen, verdict = guard.look(path, self._row_accuracy(rows))  # type: ignore[union-attr]
            log.info(seen.message)
            verdicts += [verdict] if verdict else []
        return verdicts

"""What a run writes down while it goes: trainer_log.jsonl, metrics.csv, trainer_state.json,
*_results.json, and the lines of the console.

A record is one flat JSON object with `step` and `epoch`; the list of all records is HF's
`log_history`. The jsonl is the source: it is appended to and flushed record by record, so a killed
run loses at most the line it was writing; the csv and the state are made from it.
Numbers that JSON cannot hold (nan, inf) are written as null. Refuses to know: what the numbers
mean, bars, plots, paddle.
Files and lines as PaddleNLP and transformers write them.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ernie_tune.checkpoint.ledger import STATE_FILE
from ernie_tune.checkpoint.writer import write_atomically
from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import columns, padded, say, shown
from ernie_tune.report.direction import gain
from ernie_tune.report.writers import LogWriter

LOG_FILE, CSV_FILE = "trainer_log.jsonl", "metrics.csv"
History = list[dict[str, Any]]
_COUNTS = ("rows", "step", "steps", "tokens", "samples")
_FOR_FILES = ("interval_runtime", "max_memory_gib", "remaining_time")  # a bar or a watch shows them


def plain(value: Any) -> Any:
    """A value as strict JSON: numpy scalars become Python numbers, nan and inf None, paths text.
    Raises ValueError for anything else, e.g. a tensor.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is not None and not isinstance(value, bool | int | str | Path):
        raise ValueError(
            say(
                f"logged value ({value!r}) must be a number, text, list or mapping, not "
                f"{type(value).__name__}; convert it",
                f"要记录的值（{value!r}）须为数字、文本、列表或映射，而不是 {type(value).__name__}；请转换",
            )
        )
    return str(value) if isinstance(value, Path) else value


def stamp(message: str, level: str = "INFO", now: datetime | None = None) -> str:
    """`[2026-11-22 11:18:25,636] [    INFO] - message`."""
    now = now or datetime.now()
    return f"[{now:%Y-%m-%d %H:%M:%S},{now.microsecond // 1000:03d}] [{level:>8}] - {message}"


def number(name: str, value: Any) -> str:
    """Rates with four digits, counts whole, the rest with four decimals; small numbers keep their
    digits.
    """
    value = value.item() if isinstance(value, np.generic) else value
    if not isinstance(value, float) or not math.isfinite(value):
        return str(value)
    if name.endswith(_COUNTS) and value.is_integer():
        return str(int(value))
    if name.endswith("learning_rate") or 0 < abs(value) < 1e-3:
        return str(float(f"{value:.3e}"))
    return str(round(value, 4) + 0.0)


def console_line(step: int, values: Mapping[str, Any], epoch: float) -> str:
    """`loss: …, learning_rate: …, global_step: …, …, progress_or_epoch: …`, the line that users
    grep for.
    """
    head = [name for name in ("loss", "learning_rate") if name in values]
    ordered = {name: values[name] for name in head} | {"global_step": step} | dict(values)
    ordered["progress_or_epoch"] = float(epoch)
    return ", ".join(f"{name}: {number(name, value)}" for name, value in ordered.items())


@dataclass(frozen=True)
class RunFacts:
    """The numbers of the header block. Parameters are counted in all, not per device."""

    num_examples: int
    num_epochs: float
    per_device_batch_size: int
    total_batch_size: int
    accumulation_steps: int
    total_steps: int
    num_samples: int
    trainable_parameters: int


def header_lines(facts: RunFacts) -> list[str]:
    """`***** Running training *****` and its eight lines."""
    rows = {
        "Num examples": f"{facts.num_examples:,}",
        "Num Epochs": f"{facts.num_epochs:g}",
        "Instantaneous batch size per device": f"{facts.per_device_batch_size:,}",
        "Total train batch size (w. parallel, distributed & accumulation)": f"{facts.total_batch_size:,}",
        "Gradient Accumulation steps": f"{facts.accumulation_steps:,}",
        "Total optimization steps": f"{facts.total_steps:,}",
        "Total num train samples": f"{facts.num_samples:,}",
        "Number of trainable parameters": f"{facts.trainable_parameters:,}",
    }
    return ["***** Running training *****", *(f"  {name} = {value}" for name, value in rows.items())]


def metrics_table(split: str, values: Mapping[str, Any]) -> list[str]:
    """`***** train metrics *****` and one aligned line a value, names in alphabetical order."""
    shown = {name: number(name, values[name]) for name in sorted(values)}
    left, right = max(map(len, shown), default=0), max(map(len, shown.values()), default=0)
    return [f"***** {split} metrics *****", *(f"  {name:<{left}} = {value:>{right}}" for name, value in shown.items())]


# scores of answers that are exact_match where each answer is one word
_LIKE_EXACT_MATCH = frozenset(
    ("token_f1", "macro_f1", "squad_exact_match", "squad_f1", "anls", "relaxed_accuracy", "accuracy")
)


def comparison_table(split: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`***** eval metrics *****` and a line a number: before training, after it, and the change, in
    the order of measuring. A score of answers that agrees with exact_match before and after is left
    out: all of them do where answers are one word.
    """
    rows: list[tuple[str, ...]] = []
    exact = [values.get("eval_exact_match") for values in (before, after)]
    for name, value in after.items():
        old = before.get(name)
        change = value - old if _is_number(old) and _is_number(value) else None
        mark = {1: "+", -1: "-", 0: " "}[gain(name, old, value)] if change is not None else " "
        moved = "" if change is None else f"{change:+.4f}" if round(change, 4) else "0.0000"
        cells = (name, "" if old is None else number(name, old), number(name, value), moved, mark)
        if name.removeprefix("eval_") not in _LIKE_EXACT_MATCH or change is None or [old, value] != exact:
            rows.append(cells)
    heads = ("", str(say("before", "训练前")), str(say("after", "训练后")), str(say("change", "变化")))
    widths = [max(columns(r[i]) for r in [*rows, heads]) for i in range(4)]

    def line(cells: Sequence[str]) -> str:
        right = [" " * (widths[i] - columns(cells[i])) + cells[i] for i in (1, 2, 3)]
        return "  " + "  ".join([padded(cells[0], widths[0]), *right])

    verdicts = {"+": say("better", "变好"), "-": say("worse", "变差"), " ": ""}
    return [
        f"***** {split} metrics *****",
        line(heads),
        *(f"{line(row)}  {verdicts[row[4]]}".rstrip() for row in rows),
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def read_log(path: Path) -> tuple[History, int]:
    """The records of a trainer_log.jsonl and the number of bytes they fill: a last line that a kill
    cut short is left out of both.

    Raises ValueError for a broken line elsewhere.
    """
    data = path.read_bytes()
    history: History = []
    whole = data.rfind(b"\n") + 1  # what follows the last newline is torn
    for number, line in enumerate(data[:whole].splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                say(
                    f"{path}:{number}: {line[:80]!r} must be one JSON record; delete the line ({error})",
                    f"{path}:{number}：{line[:80]!r} 须为一条 JSON 记录；请删去该行（{error}）",
                )
            ) from error
        history.append(record)
    return history, whole


def keep_lines(path: Path, wanted: Callable[[Mapping[str, Any]], bool]) -> None:
    """Take what a resumed run will write again out of a file of one JSON object a line, and a last
    line that a kill cut short; a file that is not there stays away. Raises OSError.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if wanted(json.loads(line)):
                kept.append(line + "\n")
        except ValueError:  # torn
            continue
    write_atomically(path, "".join(kept))


class RunLog:
    """The records of one run and the files made of them. Ranks other than the main one keep the
    records and write nothing.

    `resume_step` None starts anew: an older log in the folder is kept under another name. Otherwise
    the records up to that step stay and later ones, which the resumed run will make again, go.
    `history` is the checkpoint's log_history, used where the folder has no log.
    """

    def __init__(
        self,
        output_dir: Path,
        is_main: bool = True,
        *,
        resume_step: int | None = None,
        history: Sequence[Mapping[str, Any]] = (),
        echo: Callable[[str], None] = print,
        writers: Sequence[LogWriter] = (),
    ) -> None:
        self.output_dir, self.is_main, self._echo, self._writers = output_dir, is_main, echo, writers
        path = output_dir / LOG_FILE
        # Told of each record once it is written.
        self.heard: Callable[[int, Mapping[str, Any]], None] | None = None
        self.history: History = [dict(record) for record in history]
        self._columns: list[str] = []
        self._behind: set[str] = set()  # files that lack records
        if is_main:
            output_dir.mkdir(parents=True, exist_ok=True)
        if path.exists() and resume_step is None and is_main:
            self._set_aside(path)
        elif path.exists() and resume_step is not None:
            self.history = read_log(path)[0]
        self.history = [] if resume_step is None else [r for r in self.history if r["step"] <= resume_step]
        if is_main:
            self._rewrite_log()
            self._rewrite_csv()

    def log(self, step: int, values: Mapping[str, Any], epoch: float, silent: bool = False) -> dict[str, Any]:
        """Add a record, write it to both files and print its line, but for what only files need;
        returns the record. Names in `values` are HF's: loss, learning_rate, eval_loss… `silent`:
        print nothing, since a bar shows it.
        """
        record = {"epoch": round(float(epoch), 6), "step": int(step), **plain(values)}
        self.history.append(record)
        if self.is_main:
            self._add(LOG_FILE, lambda: self._append(record), self._rewrite_log)
            self._add(CSV_FILE, lambda: self._add_row(record), self._rewrite_csv)
            for writer in self._writers:
                writer.write(step, record)
            if not silent:
                self.info(console_line(step, {k: v for k, v in values.items() if k not in _FOR_FILES}, epoch))
        if self.heard is not None:
            self.heard(step, record)
        return record

    def _add(self, name: str, add: Callable[[], None], rewrite: Callable[[], None]) -> None:
        """Write a record to a file. A file that cannot be written is told of once and does not end
        the training; when it can be, it gets all that it has missed.
        """
        try:
            (rewrite if name in self._behind else add)()
        except OSError as error:
            if name not in self._behind:
                path, why = self.output_dir / name, error.strerror or str(error)
                self.info(
                    say(
                        f"{path} cannot be written ({why}); training goes on, its records are kept for when there "
                        "is room",
                        f"{path} 无法写入（{why}）；训练继续，记录保留在内存中，待可写时补上",
                    ),
                    "WARNING",
                )
            self._behind.add(name)
            return
        self._behind.discard(name)

    def _append(self, record: Mapping[str, Any]) -> None:
        with (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as stream:
            stream.write(_json_line(record))

    def _rewrite_log(self) -> None:
        write_atomically(self.output_dir / LOG_FILE, "".join(map(_json_line, self.history)))

    def info(self, message: str, level: str = "INFO") -> None:
        """Print one stamped line."""
        if self.is_main:
            self._echo(stamp(shown(message), level))

    def close(self) -> None:
        """End the further loggers; the run's own files are complete after every record."""
        for writer in self._writers:
            writer.close()

    def header(self, facts: RunFacts) -> None:
        for line in header_lines(facts):
            self.info(line)

    def results(
        self, split: str, values: Mapping[str, Any], epoch: float, before: Mapping[str, Any] | None = None
    ) -> None:
        """Write `<split>_results.json`, add the values to `all_results.json` and print their table,
        beside what they were `before`. `epoch` appears under HF's and Paddle's name.
        """
        measured = values
        values = {"epoch": float(epoch), "progress_or_epoch": float(epoch), **values}
        if not self.is_main:
            return
        everything = self.output_dir / "all_results.json"
        try:
            known = read_json_object(everything) if everything.exists() else {}
        except ValueError:  # damaged; it is made anew
            known = {}
        write_atomically(self.output_dir / f"{split}_results.json", _json_text(values))
        write_atomically(everything, _json_text({**known, **values}))
        for line in comparison_table(split, before, measured) if before else metrics_table(split, values):
            self.info(line)

    def state(self, step: int, epoch: float, **fields: Any) -> dict[str, Any]:
        """The content of trainer_state.json: HF's field names, those given in `fields` (max_steps,
        best_metric…) and the full log_history.

        Raises ValueError for a name that HF's file does not have.
        """
        unknown = sorted(set(fields) - set(_STATE_FIELDS))
        if unknown:
            raise ValueError(
                say(
                    f"field ({unknown[0]}) must be one of trainer_state.json's ({', '.join(_STATE_FIELDS)})",
                    f"字段（{unknown[0]}）须为 trainer_state.json 的字段之一（{', '.join(_STATE_FIELDS)}）",
                )
            )
        mine = {"epoch": float(epoch), "global_step": step, "log_history": self.history}
        return plain({**_STATE_FIELDS, **fields, **mine})

    def write_state(self, step: int, epoch: float, **fields: Any) -> None:
        """Write `state` to the output folder."""
        if self.is_main:
            write_atomically(self.output_dir / STATE_FILE, _json_text(self.state(step, epoch, **fields)))

    def _set_aside(self, path: Path) -> None:
        taken = (path.with_name(f"trainer_log.{n}.jsonl") for n in range(1, 10_000))
        kept = next(name for name in taken if not name.exists())
        os.replace(path, kept)
        self.info(
            say(
                f"a new run starts in {self.output_dir}; the log of the earlier one is kept as {kept.name}",
                f"{self.output_dir} 中开始新的运行；此前的日志保留为 {kept.name}",
            )
        )

    def _add_row(self, record: Mapping[str, Any]) -> None:
        if set(_cells(record)) - set(self._columns):
            self._rewrite_csv()
        else:
            with (self.output_dir / CSV_FILE).open("a", encoding="utf-8", newline="") as stream:
                self._writer(stream).writerow(_cells(record))

    def _writer(self, stream: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(stream, self._columns, lineterminator="\n")

    def _rewrite_csv(self) -> None:
        self._columns = list(dict.fromkeys(["step", "epoch", *(name for r in self.history for name in _cells(r))]))
        text = io.StringIO(newline="")
        writer = self._writer(text)
        writer.writeheader()
        writer.writerows(map(_cells, self.history))
        write_atomically(self.output_dir / CSV_FILE, text.getvalue())


_STATE_FIELDS: dict[str, Any] = {
    "best_global_step": None,
    "best_metric": None,
    "best_model_checkpoint": None,
    "consumed_samples": 0,
    "eval_steps": None,
    "is_hyper_param_search": False,
    "is_local_process_zero": True,
    "is_world_process_zero": True,
    "logging_steps": 1,
    "max_steps": 0,
    "num_input_tokens_seen": 0,
    "num_train_epochs": 0,
    "save_steps": 0,
    "stateful_callbacks": {},
    "total_flos": 0,
    "train_batch_size": None,
    "trial_name": None,
    "trial_params": None,
}


def _cells(record: Mapping[str, Any]) -> dict[str, Any]:
    """What fits a table: values that are not lists or objects (those are in the jsonl)."""
    return {name: value for name, value in record.items() if not isinstance(value, list | dict)}


def _json_line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def _json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(plain(value), ensure_ascii=False, indent=2, allow_nan=False) + "\n"

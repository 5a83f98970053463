"""`ernie-tune predict`: a model's answers to every row of a file, in a file, in the order of the
rows.

While it runs, OUT.part grows by whole lines; the finished file appears under its own name. Killed
and started again it goes on behind the last whole line, and OUT.settings.json says of which model,
rows and options a file is, so that two never mix. Refuses to know: how answers are made or scored.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ernie_tune.cli.options import SAMPLING, options, switch
from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.cpu import while_paddle_loads
from ernie_tune.config.language import counted, say
from ernie_tune.config.loader import split_overrides
from ernie_tune.models.presets import shipped_folder

if TYPE_CHECKING:
    from ernie_tune.data.records import Record
    from ernie_tune.generate.engine import Answer, Engine

DEFAULTS: Mapping[str, Any] = {
    "n": 1,
    "temperature": None,  # 0 for one answer, 1 for several
    "top_p": 1.0,
    "top_k": 0,
    "max_new_tokens": 256,
    "seed": 0,
    "rows": 64,
    "logprobs": False,
    "format": "auto",
}
_KNOWN: Mapping[str, Callable[[Any], Any]] = {**SAMPLING, "n": int, "rows": int, "logprobs": switch, "format": str}
_NAMED_ROWS = 10  # that have no answer
_NOT_IN_ANSWERS = ("rows",)  # options that change no answer


def run(args: list[str]) -> int:
    """ernie-tune predict MODEL ROWS OUT.jsonl [--option value ...]

    Answers every row of ROWS (any format that training reads; an answer in it is kept as
    `reference`, the model does not see it) with the model in MODEL, a model folder or a run's
    output_dir. OUT.jsonl gets one line a row, in order: row, line, id, messages, images, reference,
    answers (content, reasoning_content, finish_reason, logp: the sum over the answer's tokens).
    A row that cannot be asked gets an `error`, is named at the end, and makes the exit code 1; 0:
    every row has its answers. Killed, the same command goes on where it stopped.

    --n 1               answers to each row; several are sampled at temperature 1 unless given
    --temperature 0     0 is greedy; also --top_p 1, --top_k 0, --seed 0
    --max_new_tokens 256
    --rows 64           answers computed at once
    --logprobs true     tokens and logps of each answer too
    --format auto       how ROWS are read
    """
    words, entries = split_overrides(args)
    if len(words) != 3:
        raise UsageError(
            say(
                f"expected MODEL ROWS OUT.jsonl, got {counted(len(words), 'word')}: {' '.join(words) or 'nothing'}",
                f"需要 MODEL ROWS OUT.jsonl（模型、数据、输出），得到 {len(words)} 个词：{' '.join(words) or '无'}",
            )
        )
    wanted = {**DEFAULTS, **options(entries, _KNOWN, "predict")}
    if wanted["temperature"] is None:
        wanted["temperature"] = 0.0 if wanted["n"] == 1 else 1.0
    for name, word in (("ROWS", words[1]), ("OUT", words[2])):
        if not word.strip():
            raise UsageError(say(f"{name} ({word!r}) must be a file; name it", f"{name}（{word!r}）须为文件；请写出"))
    if wanted["rows"] < 1:
        raise UsageError(say(f"rows ({wanted['rows']}) must be at least 1", f"rows（{wanted['rows']}）须至少为 1"))
    return predict(shipped_folder(words[0]) or Path(words[0]), words[1], Path(words[2]), wanted)


def predict(model: Path, rows: str, out: Path, wanted: Mapping[str, Any]) -> int:
    """Write OUT. Raises ValueError for what is not there, and where OUT holds answers of something
    else."""
    from ernie_tune.checkpoint.ledger import fingerprint
    from ernie_tune.checkpoint.lock import locked
    from ernie_tune.data.sources import load_dataset

    folder = model.parent if model.is_file() else model
    if not folder.is_dir():
        raise ValueError(
            say(
                f"{model} does not exist; give the folder of a model or of a finished run",
                f"{model} 不存在；请给出模型文件夹，或已完成运行的输出目录",
            )
        )
    records = load_dataset(rows, wanted["format"])
    if not len(records):
        raise ValueError(
            say(
                f"{rows} must hold rows to answer; add some, or correct the path",
                f"{rows} 中须有待回答的行；请补充，或改正路径",
            )
        )
    if out.is_dir():
        raise ValueError(
            say(
                f"OUT ({out}) must be a file, not a folder; name one in it",
                f"输出（{out}）须为文件，而不是文件夹；请写出其中的文件名",
            )
        )
    settings = {
        "model": str(model),
        "model_fingerprint": fingerprint(folder),
        "rows": rows,
        "rows_sha256": [fingerprint(Path(path)) for path, _ in records.files],
        "count": len(records),
        **{name: value for name, value in wanted.items() if name not in _NOT_IN_ANSWERS},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.parent, "predict", file=out.with_name(f".{out.name}.lock")):
        if _settled(out, settings):
            print(say(f"{out} is finished ({counted(len(records), 'row')})", f"{out} 已完成（{len(records)} 行）"))
        else:
            with while_paddle_loads():
                from ernie_tune.generate.opened import open_engine
                from ernie_tune.trainers.assemble import base_of_run

            _write(lambda: open_engine(model, base_of_run), records, out, wanted)
            print(say(f"wrote {out} ({counted(len(records), 'row')})", f"已写入 {out}（{len(records)} 行）"))
    return _tell_failed(out, records)


def _tell_failed(out: Path, records: Sequence[Record]) -> int:
    """Name the rows of a finished file that have no answer; the exit code that says whether there
    are any.
    """
    failed = [line for line in _lines(out) if "error" in line]
    if not failed:
        return 0
    told = [_placed(records, line) for line in failed[:_NAMED_ROWS]]
    more = len(failed) - len(told)
    rest = (
        [str(say(f"… and {more} more, as `error` in {out}", f"……另有 {more} 行，见 {out} 中的 error"))] if more else []
    )
    head = say(
        f"{counted(len(failed), 'row')} of {len(records)} could not be asked; mend or drop what they name, then ask "
        f"again into another file, or delete {out}:",
        f"{len(records)} 行中有 {len(failed)} 行无法提问；请改正或删去所指之处，再输出到另一文件，或删去 {out} 后重试：",
    )
    print("\n".join([str(head), *(f"  {line}" for line in (*told, *rest))]), file=sys.stderr)
    return 1


def _placed(records: Sequence[Record], line: Mapping[str, Any]) -> str:
    """What is wrong with a row, behind its file and line."""
    error = str(line["error"])
    try:
        place = str(records[line["row"] - 1].meta)
    except ValueError:  # one that cannot be read says where it stands
        return error
    return error if error.startswith(place) else f"{place}: {error}"


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open("rb") as stream:
        yield from map(json.loads, stream)


def part_of(out: Path) -> Path:
    """Where answers go until all are there."""
    return out.with_name(out.name + ".part")


def _settled(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether OUT is there and made by these settings; if not, they are written down first."""
    note = out.with_name(out.name + ".settings.json")
    if out.exists() and not note.is_file():
        raise ValueError(
            say(
                f"OUT ({out}) is there, and predict did not write it; name another file",
                f"输出文件（{out}）已存在，且不是 predict 写的；请换一个文件名",
            )
        )
    part = part_of(out)
    if out.exists() or (part.is_file() and part.stat().st_size):  # a start that failed left an empty one
        saved = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        other = [name for name in settings if saved.get(name, None) != settings[name]]
        if other:
            told = ", ".join(f"{name}: {saved.get(name)} -> {settings[name]}" for name in other)
            raise ValueError(
                say(
                    f"{out} holds answers made with other settings ({told}); name another file, or delete it and {part.name}",
                    f"{out} 中是以其他设置生成的回答（{told}）；请换一个文件名，或删去它和 {part.name}",
                )
            )
        return out.exists()
    write_atomically(note, json.dumps(dict(settings), ensure_ascii=False, indent=1) + "\n")
    return False


def _write(open_model: Callable[[], Engine], records: Sequence[Record], out: Path, wanted: Mapping[str, Any]) -> None:
    """Append what is missing to the part file and give it its name."""
    from ernie_tune.generate.bulk import in_order
    from ernie_tune.report.progress import Progress

    part, sampled = part_of(out), {name: wanted[name] for name in ("n", *SAMPLING)}
    with part.open("a+b") as file:
        done = _whole_lines(file, part)
        with Progress(len(records), title="predict", start_step=done, inner=True) as progress:
            if done < len(records):
                if done:
                    progress.write(str(say(f"going on at row {done + 1}", f"从第 {done + 1} 行继续")))
                engine = open_model()
                params = engine.params(**sampled)
                outcomes = in_order(engine, _requests(records, done), params, wanted["rows"], done)
                for i, outcome in enumerate(outcomes, done):
                    line = _line(i, records, outcome, engine, out.parent, wanted["logprobs"])
                    file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                    file.flush()
                    progress.advance()
    os.replace(part, out)


def _whole_lines(file: BinaryIO, part: Path) -> int:
    """How many rows were done; what a kill cut short is taken off the file. Raises ValueError for a
    line that is not the row whose turn it is."""
    file.seek(0)
    size = done = 0
    for raw in file:
        if not raw.endswith(b"\n"):
            break
        try:
            line = json.loads(raw)
            right = isinstance(line, dict) and line.get("row") == done + 1
        except ValueError:
            right = False
        if not right:
            raise ValueError(
                say(
                    f"{part}:{done + 1} must be the answer to row {done + 1}, as predict wrote it; delete the file to start anew",
                    f"{part}:{done + 1} 须为 predict 写入的第 {done + 1} 行的回答；要重新开始请删去该文件",
                )
            )
        done, size = done + 1, size + len(raw)
    file.truncate(size)
    file.seek(0, os.SEEK_END)
    return done


def _requests(records: Sequence[Record], first: int) -> Iterator[Any]:
    """What is asked in each row from `first` on, or why it cannot be."""
    from ernie_tune.data.batching import THINKING
    from ernie_tune.data.records import IMAGE_TAG, VIDEO_TAG, count_tags
    from ernie_tune.generate.engine import Request

    for i in range(first, len(records)):
        try:
            record = records[i]
        except ValueError as error:
            yield error
            continue
        text = "".join(m["content"] for m in record.prompt)
        images, videos = record.images[: count_tags(text, IMAGE_TAG)], record.videos[: count_tags(text, VIDEO_TAG)]
        thinking, where = THINKING.get(record.mode), str(record.meta)
        yield Request(record.prompt, images, videos, thinking, tools=record.tools, where=where)


def _line(
    i: int, records: Sequence[Record], outcome: list[Answer] | Exception, engine: Engine, beside: Path, logprobs: bool
) -> dict[str, Any]:
    try:
        record = records[i]
    except ValueError as error:
        return {"row": i + 1, "error": str(error)}
    known = {
        "row": i + 1,
        "line": record.meta.line,
        **({"id": record.id} if record.id else {}),
        "messages": list(record.prompt),
        **{
            kind: [_named(medium, beside) for medium in media]
            for kind, media in (("images", record.images), ("videos", record.videos))
            if media
        },
        "reference": _reference(record),
    }
    if isinstance(outcome, Exception):
        return {**known, "error": str(outcome) or type(outcome).__name__}
    return {**known, "answers": [_answer(answer, engine, logprobs) for answer in outcome]}


def _reference(record: Record) -> str | None:
    """The answer that the row has itself: of its dialogue, of what checks it, or the best of judged
    ones."""
    said = record.messages[len(record.prompt) :] or [m for i in record.best[:1] for m in record.candidates[i].messages]
    if said:
        return str(said[-1]["content"])
    answer = record.reward.answer if record.reward else None
    return None if answer is None else str(answer)


def _named(medium: Any, beside: Path) -> Any:
    """A path as it is from the folder of the file that names it; URLs as they are; null for bytes
    without a name."""
    if isinstance(medium, tuple | list):
        return [_named(one, beside) for one in medium]
    if not isinstance(medium, str):
        return None
    return os.path.relpath(medium, beside) if os.path.exists(medium) and not os.path.isabs(medium) else medium


def _answer(answer: Answer, engine: Engine, logprobs: bool) -> dict[str, Any]:
    thought = {"reasoning_content": answer.reasoning_content} if answer.reasoning_content else {}
    decode = engine.processor.tokenizer.decode
    each = {"tokens": [decode([i]) for i in answer.token_ids], "logps": list(answer.logps)} if logprobs else {}
    return {
        "content": answer.content.strip(),
        **thought,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "answer_tokens": len(answer.token_ids),
        "logp": sum(answer.logps),
        **each,
    }

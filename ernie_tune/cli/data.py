"""`ernie-tune data check|show|stats|convert`: look at data before training on them.

Refuses to know: what is wrong with data (`ernie_tune.data.doctor`), paddle, the network.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

from ernie_tune.cli.verbs import UsageError
from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.convert import did_you_mean
from ernie_tune.config.language import counted, join, say, shown
from ernie_tune.config.loader import Loaded, load_config
from ernie_tune.config.stages import STAGES, signals_of
from ernie_tune.data.doctor.convert import WRITERS, convert_file
from ernie_tune.data.doctor.fix import COUNTED, fix_file, fixed_path
from ernie_tune.data.doctor.report import as_json, as_text, stats_text
from ernie_tune.data.doctor.scan import DECODED, DataFile, Report, Scan
from ernie_tune.data.doctor.show import COLOUR, PLAIN, show_record
from ernie_tune.data.processor import Processor
from ernie_tune.data.readers.formats import choose
from ernie_tune.data.records import DataError
from ernie_tune.data.sources import DatasetEntry, _files, find, load_dataset, split_paths
from ernie_tune.data.tokenizer import JSON_FILE, MODEL_FILE
from ernie_tune.models.presets import PRESETS, shipped_folder
from ernie_tune.plan.judgement import absent, foreign

# Options of each subcommand and what their value is; "": none.
_FLAG, _PAGE, _FOLDERS = "", "[PATH.html]", dict.fromkeys(("media-dir", "dataset-dir", "tokenizer"), "FOLDER")
_COMMON = {"format": "NAME", "template": "NAME", **_FOLDERS}
_OPTIONS = {
    "check": {**_COMMON, "eval": "FILE", "stage": "NAME", "max-seq-len": "N", "decode": "N|all", "limit": "N", "fix": _FLAG, "drop": _FLAG, "force": _FLAG, "json": _FLAG, "html": _PAGE},
    "stats": {**_COMMON, "decode": "N|all"},
    "show": {**_COMMON, "row": "N"},
    "convert": {**_COMMON, "to": "|".join(WRITERS), "out": "FILE"},
}  # fmt: skip
_HTML = ".check.html"
_YAML = (".yaml", ".yml")
_ROWS = ("train_dataset_path", "eval_dataset_path")


def run(args: list[str]) -> int:
    """ernie-tune data check FILE… [--eval FILE] [--fix [--drop] [--force]] [--json]
                          [--html [PATH.html]]
                          [--max-seq-len N] [--decode N|all] [--limit N]
    ernie-tune data show FILE [--row N]
    ernie-tune data stats FILE… [--decode N|all]
    ernie-tune data convert FILE… --to messages|sharegpt|alpaca|pairs [--out NEW.jsonl]
    A FILE is jsonl, json, csv, tsv, parquet or txt, a folder, a pattern, a name in
    dataset_info.json, or for check and stats a run.yaml, whose evaluation files, formats and
    max_seq_len are then used too. Everywhere: --format NAME, --media-dir FOLDER,
    --dataset-dir FOLDER, --tokenizer FOLDER (default: the bundled small one),
    --template hf|ernie_vl|ernie_vl_nothink.

    check    says what is wrong, where, and how to repair it; exit code 1 if there are errors.
             --fix writes FILE.fixed.jsonl, --drop leaves out of it what cannot be repaired, --force
             replaces one that is there; --html writes a page of rows with pictures, findings and
             statistics (FILE.check.html, or PATH.html); --json prints one object; --decode opens
             the first N pictures and ever fewer of the rest (default 200); --limit shows N problems
             of a kind (default 20, 0: all); --stage NAME also says which rows that stage cannot
             use.
             A column or key whose name begins with _ is left out on purpose; \\<image> in a text is
             the word, not a picture.
    show     prints a row as the model sees it, the trained text marked. --row is a line number, as
             in messages.
    stats    prints lengths, languages, pictures, and what they say about image_max_pixels.
    convert  writes FILE.FORMAT.jsonl, or refuses a row that the format cannot express.
    """
    if not args or args[0] not in _OPTIONS:
        known = ", ".join(_OPTIONS)
        word = args[0] if args else ""
        raise UsageError(
            say(
                "data needs one of {known}, got {word!r}{hint}",
                "data 之后须为 {known} 之一，得到 {word!r}{hint}",
                known=known,
                word=word,
                hint=did_you_mean(word, _OPTIONS),
            )
        )
    words, options = _parse(args[0], args[1:])
    if not words:
        raise UsageError(say(f"data {args[0]} needs a file", f"data {args[0]} 需要数据文件"))
    return _VERBS[args[0]](words, options)


def _parse(verb: str, args: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Words and options (`--name value`, `--name=value`, `--flag`). Raises UsageError."""
    words, options, rest = [], {}, list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, value = word.removeprefix("--").replace("_", "-").partition("=")
        if name not in _OPTIONS[verb]:
            raise UsageError(
                say(
                    "data {verb} has no option --{name}{hint}",
                    "data {verb} 没有选项 --{name}{hint}",
                    verb=verb,
                    name=name,
                    hint=did_you_mean(name, _OPTIONS[verb]),
                )
            )
        wanted = _OPTIONS[verb][name]
        if wanted == _PAGE and not equals:
            equals, value = "=", rest.pop(0) if rest and rest[0].endswith(".html") else ""
        if bool(equals) and not wanted:
            raise UsageError(say(f"--{name} takes no value, got {value!r}", f"--{name} 不带值，得到 {value!r}"))
        if wanted and not equals:
            if not rest:
                raise UsageError(
                    say(f"--{name} needs a value: --{name} {wanted}", f"--{name} 缺少值：--{name} {wanted}")
                )
            value = rest.pop(0)
        options[name] = value
    return words, options


def _number(options: Mapping[str, str], name: str, default: int | None, low: int = 0) -> int | None:
    """A whole number from `low`, the default where the option is absent. Raises UsageError."""
    if name not in options:
        return default
    if not options[name].isdecimal() or int(options[name]) < low:
        other = say(", or all", "，或 all") if name == "decode" else ""
        raise UsageError(
            say(
                "--{name} ({given}) must be a whole number from {low}{other}",
                "--{name}（{given}）须为不小于 {low} 的整数{other}",
                name=name,
                given=options[name],
                low=low,
                other=other,
            )
        )
    return int(options[name])


@dataclass(frozen=True)
class _Inputs:
    """What to check, from file names or a run's YAML file."""

    train: list[DatasetEntry]
    evaluation: list[DatasetEntry]
    processor: Processor
    max_tokens: int | None = None
    signals: tuple[str, ...] = ()  # what the stage learns from; empty: any


def _inputs(words: list[str], options: Mapping[str, str]) -> _Inputs:
    """Files, formats and tokenizer. Raises ValueError, OSError."""
    folder, form = options.get("dataset-dir", "."), options.get("format", "auto")
    if words[0].lower().endswith(_YAML):
        return _run_inputs(words, options)
    processor = _processor(options.get("tokenizer", ""), options.get("template"))
    evaluation = _entries([options["eval"]], form, folder) if "eval" in options else []
    limit = _number(options, "max-seq-len", None, 2)
    return _Inputs(_entries(words, form, folder), evaluation, processor, limit, _signals(options.get("stage", "")))


def _run_inputs(words: list[str], options: Mapping[str, str]) -> _Inputs:
    """The files that a run would read. Mistakes are told with the line of the setting."""
    if len(words) > 1:
        raise UsageError(
            say(f"a YAML file stands alone, got {' '.join(words)}", f"YAML 文件须单独给出，得到 {' '.join(words)}")
        )
    loaded = load_config(words[0])
    for note in loaded.notes:
        print(shown(note), file=sys.stderr)
    data, model = loaded.config.data, loaded.config.model.model_name_or_path
    if not data.train_dataset_path:
        raise ValueError(
            say(
                f"{words[0]}:1: train_dataset_path must name the rows; add it",
                f"{words[0]}:1：缺少 train_dataset_path（训练数据）；请补上",
            )
        )
    _check_named(loaded, words[0], options)
    folder = options.get("dataset-dir", data.dataset_dir or ".")
    with _blaming(loaded, "train_dataset_path"):
        train = _typed_entries(data.train_dataset_path, data.train_dataset_type, folder)
    with _blaming(loaded, "eval_dataset_path"):
        evaluation = _typed_entries(data.eval_dataset_path, data.eval_dataset_type, folder)
    with _blaming(loaded, "template" if data.template != "auto" else "model_name_or_path"):
        template = options.get("template", None if data.template == "auto" else data.template)
        processor = _processor(options.get("tokenizer", model), template, loaded.config.media.image_max_pixels)
    limit = _number(options, "max-seq-len", data.max_seq_len, 2)
    learned = signals_of(loaded.config.model.stage, loaded.config.preference.loss_type)
    signals = _signals(options["stage"]) if "stage" in options else learned
    return _Inputs(train, evaluation, processor, limit, signals)


def _check_named(loaded: Loaded, file: str, options: Mapping[str, str]) -> None:
    """Raise ValueError, one line a mistake, for what training would refuse before it reads a row:
    rows that are not there, and models of other families.
    """
    wrong = list(foreign(loaded.config))
    if "dataset-dir" not in options:
        lacks = absent(loaded.config, Path(file).parent)
        wrong += [(lack.setting, lack.message) for lack in lacks if lack.setting in _ROWS]
    if wrong:
        raise ValueError("\n".join(f"{_place(loaded, setting)}: {message}" for setting, message in wrong))


def _place(loaded: Loaded, setting: str) -> str:
    return loaded.sources[setting].where if setting in loaded.sources else "command line"


def _signals(stage: str) -> tuple[str, ...]:
    """What a stage learns from. Raises UsageError for an unknown one."""
    if stage and stage not in STAGES:
        raise UsageError(
            say(
                f"--stage ({stage}) must be one of {', '.join(STAGES)}",
                f"--stage（{stage}）须为 {', '.join(STAGES)} 之一",
            )
        )
    return STAGES[stage].signals if stage else ()


@contextmanager
def _blaming(loaded: Loaded, setting: str) -> Iterator[None]:
    """Open what goes wrong with the place of a setting."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{_place(loaded, setting)}: {setting}: {error}") from error


def _typed_entries(paths: Sequence[str], forms: Sequence[str], folder: str) -> list[DatasetEntry]:
    """The entries of files with one format for all, or one for each."""
    each = forms if len(forms) == len(paths) else [forms[0]] * len(paths)
    for form in forms:
        choose(form)
    return [entry for path, form in zip(paths, each, strict=True) for entry in _entries([path], form, folder)]


def _entries(names: Sequence[str], form: str, folder: str) -> list[DatasetEntry]:
    """One entry a file. Raises DataError for names that mean nothing."""
    found = [entry for name in names for part in split_paths(name) for entry in find(part, folder)]
    return [
        replace(entry, path=file, format=entry.format if form == "auto" else form)
        for entry in found
        for file in _files(entry.path)
    ]


def _processor(name: str, template: str | None, max_pixels: int | None = None) -> Processor:
    """That of a model folder; else a bundled one, which is said where a model was asked for."""
    if shipped_folder(name) or (name and any((Path(name) / file).is_file() for file in (MODEL_FILE, JSON_FILE))):
        return Processor.from_pretrained(name, template, max_pixels=max_pixels)
    limits = {} if max_pixels is None else {"max_pixels": max_pixels}
    bundled = "tiny" if name.startswith("tiny") else "small"
    if name and name not in PRESETS:
        print(
            say(
                f"note: {name} has no tokenizer here, lengths are those of the bundled one",
                f"提示：此处没有 {name} 的分词器，长度按内置分词器计算",
            ),
            file=sys.stderr,
        )
    return Processor.bundled(bundled, template or "hf", **limits)


def _scan(inputs: _Inputs, options: Mapping[str, str], limit: int) -> Report:
    decode = None if options.get("decode") == "all" else _number(options, "decode", DECODED)
    scan = Scan(
        inputs.processor,
        media_dir=options.get("media-dir", ""),
        decode=decode,
        max_tokens=inputs.max_tokens,
        limit=limit,
        signals=inputs.signals,
    )
    return scan.run(inputs.train, inputs.evaluation)


def _check(words: list[str], options: Mapping[str, str]) -> int:
    inputs, limit = _inputs(words, options), _number(options, "limit", 20) or sys.maxsize
    for name in ("drop", "force"):
        if name in options and "fix" not in options:
            raise UsageError(say(f"--{name} needs --fix", f"--{name} 须与 --fix 同用"))
    report = _scan(inputs, options, limit)
    if "json" in options:
        print(as_json(report))
    else:
        print("\n".join(as_text(report)))
    written = sys.stderr if "json" in options else sys.stdout
    if "html" in options:
        from ernie_tune.report.check_page import check_page

        beside = Path(words[0] if os.path.isfile(words[0]) else inputs.train[0].path).with_suffix(_HTML)
        target = Path(options["html"]) if options["html"] else beside
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, check_page(report))
        except OSError as error:
            raise ValueError(
                say(
                    f"{target} cannot be written ({error.strerror}); name another file: --html PATH.html",
                    f"无法写入 {target}（{error.strerror}）；请另给路径：--html PATH.html",
                )
            ) from error
        print(say(f"wrote {target}", f"已写入 {target}"), file=written)
    for entry in inputs.train if "fix" in options else []:
        _fix(entry, options, limit, written)
    return report.exit_code


def _fix(entry: DatasetEntry, options: Mapping[str, str], limit: int, written: TextIO) -> None:
    """Write the repaired copy of a file and say what was changed."""
    counts: Counter[str] = Counter()
    for change in fix_file(entry, options.get("media-dir", ""), "drop" in options, "force" in options):
        counts[change.code] += 1
        if counts[change.code] <= limit:
            print(f"{entry.path}:{change.line}: {change}", file=written)
    said = join(", ", [say(f"{COUNTED[code][0]}: {n:,}", f"{COUNTED[code][1]}：{n:,}") for code, n in counts.items()])
    target, nothing = fixed_path(entry.path), say("no row needed a change", "没有需要改动的行")
    print(say("wrote {t}: {said}", "已写入 {t}：{said}", t=target, said=said or nothing), file=written)


def _stats(words: list[str], options: Mapping[str, str]) -> int:
    report = _scan(_inputs(words, options), options, 0)
    print("\n".join(stats_text(report.stats)))
    errors = report.findings.total("error")
    if errors:
        check = f"`ernie-tune data check {words[0]}`"
        print(say(f"{counted(errors, 'error')}, see {check}", f"{errors:,} 个错误，请运行 {check}"))
    return 0


def _show(words: list[str], options: Mapping[str, str]) -> int:
    if len(words) > 1:
        raise UsageError(
            say(f"data show takes one file, got {' '.join(words)}", f"data show 只接受一个文件，得到 {' '.join(words)}")
        )
    name, _, after = words[0].rpartition(":")
    # as in messages: train.jsonl:17
    if name and after.isdecimal() and not os.path.exists(words[0]):
        words, options = [name], {"row": after, **options}
    inputs, wanted = _inputs(words, options), _number(options, "row", None, 1)
    file = DataFile(inputs.train[0], options.get("media-dir", ""), signals=inputs.signals)
    last = 0
    for batch in file.source.batches():
        for line, row in zip(batch.lines_n.tolist(), batch.rows, strict=True):
            last = line
            if row is not None and wanted in (None, line):
                if isinstance(row, DataError):
                    raise row
                colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
                lines = show_record(file.record(row, line), inputs.processor, COLOUR if colour else PLAIN)
                print("\n".join(lines))
                return 0
    raise ValueError(
        say(
            f"{file.path} has no row in line {wanted}; its last row is in line {last}",
            f"{file.path} 第 {wanted} 行没有样本；最后一个样本在第 {last} 行",
        )
    )


def _convert(words: list[str], options: Mapping[str, str]) -> int:
    if "to" not in options:
        raise UsageError(
            say(f"data convert needs --to {'|'.join(WRITERS)}", f"data convert 缺少 --to {'|'.join(WRITERS)}")
        )
    form, folder = options["to"], options.get("dataset-dir", ".")
    source = load_dataset(
        words, options.get("format", "auto"), media_dir=options.get("media-dir", ""), dataset_dir=folder
    )
    if "out" not in options and (len(words) > 1 or not os.path.isfile(words[0])):
        raise UsageError(
            say(
                f"data convert needs --out for more than one file, got {' '.join(words)}",
                f"data convert 转换多个文件时须给出 --out，得到 {' '.join(words)}",
            )
        )
    target = options.get("out") or f"{os.path.splitext(words[0])[0]}.{form}.jsonl"
    rows = convert_file((source[i] for i in range(len(source))), form, target)
    print(say(f"wrote {target}: {counted(rows, 'row')}", f"已写入 {target}：{rows:,} 行"))
    return 0


_VERBS: dict[str, Callable[[list[str], Mapping[str, str]], int]] = {
    "check": _check,
    "stats": _stats,
    "show": _show,
    "convert": _convert,
}

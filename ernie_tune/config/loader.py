"""From a flat YAML file and command-line words to one `RunConfig`, with the place of every value
kept for messages; and back to YAML.

Refuses to know: which verb asks, what a setting is for, paddle.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ernie_tune.config import checks, peers
from ernie_tune.config.aliases import ENVIRONMENT, EXPANDED, RENAMED, SPELLINGS
from ernie_tune.config.arguments import SETTINGS, VARYING, RunConfig, build, default_for
from ernie_tune.config.convert import FALSE, TRUE, Raw, convert, did_you_mean, to_yaml
from ernie_tune.config.language import say
from ernie_tune.config.sections_model import TEMPLATES

# name of the resolved configuration in output_dir
ARGS_FILE = "ernie_tune_args.yaml"
COMMAND_LINE = "command line"
_SUGGESTIONS = 20  # unknown keys that are compared with all known ones


@dataclass(frozen=True)
class Entry:
    """One setting as somebody wrote it."""

    name: str
    raw: Raw
    where: str  # "run.yaml:12", "command line", …


@dataclass(frozen=True)
class Loaded:
    """A configuration, where each given setting was written, and the lines that the user must
    see.
    """

    config: RunConfig
    sources: Mapping[str, Entry]  # by canonical name; settings that nobody wrote are absent
    notes: tuple[str, ...]


def load_config(
    path: str | Path,
    overrides: Sequence[Entry] = (),
    *,
    for_training: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """Read a YAML file, then `overrides` (from `split_overrides`) over it. `for_training`: model
    and rows must be named too.

    Raises ValueError, each line of it beginning with file:line or "command line"; OSError if the
    file cannot be read.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(say(f"{path}:{line}: the file must be UTF-8", f"{path}:{line}：文件须为 UTF-8")) from None
    return load_text(
        text, str(path), overrides, for_training=for_training, environ=os.environ if environ is None else environ
    )


def load_text(
    text: str,
    name: str,
    overrides: Sequence[Entry] = (),
    *,
    for_training: bool = False,
    environ: Mapping[str, str] | None = None,
) -> Loaded:
    """`load_config` of a text; `name` stands for the file in messages."""
    environ = environ or {}
    environment = [
        Entry(ours, environ[key], f"environment {key}") for key, ours in ENVIRONMENT.items() if key in environ
    ]
    return resolve([environment, read_yaml(text, name), overrides], f"{name}:1", for_training=for_training)


def read_yaml(text: str, name: str) -> list[Entry]:
    """Keys and values of a flat YAML mapping with their lines. Values stay text: only the setting
    knows its type.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(
            say(
                f"{name}:{(mark.line + 1 if mark else 1)}: not YAML: {error.problem or error.context}",
                f"{name}:{(mark.line + 1 if mark else 1)}：不是合法的 YAML：{error.problem or error.context}",
            )
        ) from None
    except yaml.reader.ReaderError as error:
        raise ValueError(
            say(
                f"{name}:{text[: error.position].count(chr(10)) + 1}: character {error.character!r} is not allowed",
                f"{name}:{text[: error.position].count(chr(10)) + 1}：不允许字符 {error.character!r}",
            )
        ) from None
    except (ValueError, OverflowError, RecursionError) as error:
        # what PyYAML lets through: \U escapes and version numbers too large, nesting too deep
        raise ValueError(say(f"{name}:1: not YAML: {error}", f"{name}:1：不是合法的 YAML：{error}")) from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(
            say(
                f"{name}:{root.start_mark.line + 1}: the file must be a list of 'key: value' lines",
                f"{name}:{root.start_mark.line + 1}：文件须由 'key: value' 形式的行组成",
            )
        )
    entries: dict[str, Entry] = {}
    for key, value in root.value:
        word = _text(key, name)
        entry = Entry(word, _raw(value, name, RENAMED.get(word, word)), f"{name}:{key.start_mark.line + 1}")
        if entry.name in entries:
            raise ValueError(
                say(
                    f"{entry.where}: {entry.name} is given twice, first at {entries[entry.name].where}; keep one",
                    f"{entry.where}：{entry.name} 出现两次，首次在 {entries[entry.name].where}；请保留其一",
                )
            )
        entries[entry.name] = entry
    return list(entries.values())


def _raw(node: yaml.Node, name: str, setting: str) -> Raw:
    # of a name that may be another tool's
    if isinstance(node, yaml.MappingNode) and setting not in SETTINGS:
        return "{…}" if node.value else "{}"
    if isinstance(node, yaml.SequenceNode):
        return tuple(_text(item, name) for item in node.value)
    text = _text(node, name)
    return None if node.tag == "tag:yaml.org,2002:null" else text


def _text(node: yaml.Node, name: str) -> str:
    where = f"{name}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.ScalarNode):
        raise ValueError(
            say(
                f"{where}: a value must be a number, a word or a list of them; settings are not nested",
                f"{where}：值须为数字、单词或它们的列表；设置不能嵌套",
            )
        )
    if any("\ud800" <= character <= "\udfff" for character in node.value):
        raise ValueError(say(f"{where}: half a surrogate pair is not a character", f"{where}：半个代理对不是字符"))
    return str(node.value)


def split_overrides(args: Sequence[str]) -> tuple[list[str], list[Entry]]:
    """Words of a command line that are not settings, and the settings: `key=value`, `--key=value`,
    `--key value`, `--flag`.
    """
    words: list[str] = []
    entries: list[Entry] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not word.startswith("--") and not (equals and name.isidentifier()):
            words.append(word)
            continue
        name = name.removeprefix("--").replace("-", "_")
        if not equals:
            takes = (
                bool(rest) and not rest[0].startswith("--") and (not _is_flag(name) or rest[0].lower() in TRUE + FALSE)
            )
            value = rest.pop(0) if takes else "true"
        entries.append(Entry(name, None if value == "null" else value, COMMAND_LINE))
    return words, entries


def _is_flag(name: str) -> bool:
    setting = SETTINGS.get(RENAMED.get(name, name))
    return "true" in EXPANDED.get(name, {}) or (setting is not None and setting.kind is bool)


def resolve(layers: Sequence[Sequence[Entry]], where: str, *, for_training: bool = False) -> Loaded:
    """Merge layers of settings, later ones over earlier ones whatever their spelling. `where`
    stands for settings that nobody wrote.

    Raises ValueError with one line for every mistake: unknown name, wrong value, two spellings that
    disagree, settings that do not fit.
    """
    values: dict[str, Any] = {}
    sources: dict[str, Entry] = {}
    notes: list[str] = []
    errors: list[str] = []
    for layer in layers:
        for name, entries in _by_setting(layer, notes, errors).items():
            try:
                values[name] = _value(name, entries, values)
                sources[name] = entries[0][0]
            except ValueError as error:
                errors.append(str(error))
    # null means the default, also over an earlier layer
    values = {name: value for name, value in values.items() if value is not None}
    if not errors:
        notes += _fill_in(values, sources)
        config = build(values)
        for name, message, unbuilt in checks.problems(config) + (checks.missing(config) if for_training else []):
            # who only counts or looks is told what this version cannot train, and goes on
            told = notes if unbuilt and not for_training else errors
            told.append(f"{sources[name].where if name in values else where}: {message}")
    if errors:
        raise ValueError("\n".join(errors))
    sources = {name: entry for name, entry in sources.items() if name in values}
    return Loaded(config, sources, (*notes, *_remarks(config, sources)))


def _by_setting(layer: Sequence[Entry], notes: list[str], errors: list[str]) -> dict[str, list[tuple[Entry, Raw]]]:
    """The entries of one layer under our names. What is ignored goes to `notes`, what is unknown or
    refused to `errors`.
    """
    found: dict[str, list[tuple[Entry, Raw]]] = {}
    unused: dict[str, list[Entry]] = {}
    for entry in layer:
        why = _unused(entry)
        if why is not None:
            unused.setdefault(why, []).append(entry)
            continue
        try:
            for name, raw in _ours(entry, len(errors) < _SUGGESTIONS):
                found.setdefault(name, []).append((entry, raw))
        except ValueError as error:
            errors.append(f"{entry.where}: {error}")
    notes += [_together(entries, why) for why, entries in unused.items() if any(e.raw is not None for e in entries)]
    return found


def _unused(entry: Entry) -> str | None:
    """Why a name of another tool has no effect here; None for one that must mean something."""
    name, text = entry.name, entry.raw if isinstance(entry.raw, str) else f"[{', '.join(entry.raw or ())}]"
    if name in SETTINGS or name in RENAMED or name in EXPANDED:
        return None
    if name in peers.REFUSED:
        return (
            say("asks for nothing at this value", "该值不要求任何操作") if peers.asks_for_nothing(name, text) else None
        )
    why = peers.reason(name)
    zero = re.search(r"z(?:ero)?_?([123])", text.lower()) if name in ("deepspeed", "fsdp") else None
    if why is None or zero is None:
        return why
    return say(
        "{why}; {text} is sharding: stage{n}",
        "{why}；{text} 即 sharding: stage{n}",
        why=why,
        text=text,
        n=zero.group(1),
    )


def _together(entries: Sequence[Entry], why: str) -> str:
    """One line for all names of a file that have the same reason."""
    written = [entry for entry in entries if entry.raw is not None]
    head, _, first = written[0].where.rpartition(":")
    lines = [e.where.rpartition(":")[2] for e in written]
    where = f"{head}:{', '.join(lines)}" if head and first.isdecimal() else written[0].where
    names = ", ".join(entry.name for entry in written)
    verb = "is" if len(written) == 1 else "are"
    return f"{where}: " + say(f"{names} {verb} not used here: {{why}}", f"{names} 在此不使用：{{why}}", why=why)


def _ours(entry: Entry, suggest: bool = True) -> list[tuple[str, Raw]]:
    """What `entry` means in our names. Raises ValueError if nothing, with the likeliest name if
    `suggest`: that takes a tenth of a second.
    """
    name = RENAMED.get(entry.name, entry.name)
    if name in SETTINGS:
        return [(name, entry.raw)]
    if name in peers.REFUSED:
        remedy = peers.REFUSED[name][0]
        raise ValueError(
            say("{name} is not a setting here; {remedy}", "此处没有 {name}；{remedy}", name=name, remedy=remedy)
        )
    if name not in EXPANDED:
        hint = did_you_mean(name, (*SETTINGS, *SPELLINGS)) if suggest else ""
        raise ValueError(say(f"unknown key {name!r}{hint}", f"未知的键 {name!r}{hint}"))
    if entry.raw is None:
        return []
    word = str(entry.raw).strip().lower()
    for words, canonical in ((TRUE, "true"), (FALSE, "false")):
        word = canonical if word in words and canonical in EXPANDED[name] else word
    if word not in EXPANDED[name]:
        raise ValueError(
            say(
                f"{name} ({entry.raw!r}) must be one of {', '.join(EXPANDED[name])}",
                f"{name}（{entry.raw!r}）须为 {', '.join(EXPANDED[name])} 之一",
            )
        )
    return list(EXPANDED[name][word].items())


def _value(name: str, entries: list[tuple[Entry, Raw]], earlier: Mapping[str, Any]) -> Any:
    """The one value that all entries of a layer agree on; None for null."""
    values: list[Any] = []
    for entry, raw in entries:
        try:
            values.append(None if raw is None else convert(SETTINGS[name], raw))
        except ValueError as error:
            raise ValueError(f"{entry.where}: {error}") from None
    if name == "freeze_config":
        return _frozen_parts(entries, values, earlier)
    (first, _), value = entries[0], values[0]
    for (other, _), different in zip(entries[1:], values[1:], strict=True):
        if different != value:
            raise ValueError(
                say(
                    f"{other.where}: {other.name} ({_shown(different)}) contradicts {first.name} ("
                    f"{_shown(value)}) at {first.where}: both set {name}; keep one",
                    f"{other.where}：{other.name}（{_shown(different)}）与 {first.where} 处的 {first.name}（"
                    f"{_shown(value)}）矛盾：两者都设置 {name}；请保留其一",
                )
            )
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else to_yaml(value)


def _frozen_parts(
    entries: list[tuple[Entry, Raw]], values: list[Any], earlier: Mapping[str, Any]
) -> tuple[str, ...] | None:
    """Spellings of freeze_config add up: each names a part (`word`) or frees it (`!word`). Only
    freeze_config itself forgets earlier layers.
    """
    if values == [None]:
        return None
    said: dict[str, Entry] = {}
    for (entry, _), words in zip(entries, values, strict=True):
        for word in words or ():
            said[word] = entry
            opposite = said.get(word.removeprefix("!") if word.startswith("!") else "!" + word)
            if opposite:
                raise ValueError(
                    say(
                        f"{entry.where}: {entry.name} contradicts {opposite.name} at {opposite.where}: both set "
                        f"{word.removeprefix('!')}; keep one",
                        f"{entry.where}：{entry.name} 与 {opposite.where} 处的 {opposite.name} 矛盾：两者都设置 "
                        f"{word.removeprefix('!')}；请保留其一",
                    )
                )
    restart = any(entry.name == "freeze_config" for entry, _ in entries)
    before = () if restart else earlier.get("freeze_config") or ()
    return tuple(w for w in SETTINGS["freeze_config"].choices if (w in said or w in before) and "!" + w not in said)


def _fill_in(values: dict[str, Any], sources: dict[str, Entry]) -> list[str]:
    """Defaults that depend on other settings become values, so that the resolved configuration says
    them. Returns what to tell of that.
    """
    stage, method = values.get("stage", "SFT"), values.get("fine_tuning", "LoRA")
    losses = values.get("loss_type", ())
    notes = []

    def fill(name: str, value: Any, why: str) -> None:
        if name not in values:
            values[name], sources[name] = value, Entry(name, None, why)

    for name in VARYING:
        usual = default_for(name, stage, method, losses)
        if usual != SETTINGS[name].default or name == "learning_rate":
            fill(name, usual, f"default for {stage}, {method}")
    if len(values.get("train_dataset_prob", ())) > 1:
        fill("mix_strategy", "random", "default with train_dataset_prob")
    model = values.get("model_name_or_path", "")
    if model.endswith("/"):  # of a folder or a hub's name the same
        values["model_name_or_path"] = model.rstrip("/") or "/"
    template = values.get("template", "auto")
    if template not in TEMPLATES and "ernie" not in template.lower():
        values["template"] = "auto"
        notes.append(
            f"{sources['template'].where}: "
            + say(
                f"template ({template}) belongs to another model and is not used: this model's own is",
                f"template（{template}）属于其他模型，不使用；采用本模型自带模板",
            )
        )
    if values.get("sequence_parallel") and values.get("tensor_model_parallel_size", 1) == 1:
        values["sequence_parallel"] = False  # there is nothing to split over
        notes.append(
            say(
                f"{sources['sequence_parallel'].where}: sequence_parallel has no effect with "
                "tensor_model_parallel_size 1",
                f"{sources['sequence_parallel'].where}：tensor_model_parallel_size 为 1 时 sequence_parallel 无效",
            )
        )
    longest = values.get("max_seq_len", SETTINGS["max_seq_len"].default)
    reads = SETTINGS["max_prompt_len"].read_at(stage, method)
    if reads and "max_prompt_len" not in values and longest <= SETTINGS["max_prompt_len"].default:
        fill("max_prompt_len", longest - 1, "default below max_seq_len")
        notes.append(
            say(
                f"max_prompt_len was not given and is {longest - 1}, below max_seq_len ({longest})",
                f"未给出 max_prompt_len，取 {longest - 1}，小于 max_seq_len（{longest}）",
            )
        )
    return notes


def _remarks(config: RunConfig, sources: Mapping[str, Entry]) -> list[str]:
    """Lines about settings that have no effect, and about those that nobody wrote in the file or
    the command.
    """
    flat, written = config.flat(), {name: entry for name, entry in sources.items() if entry.raw is not None}
    lines = [f"{sources[name].where}: {line}" for name, line in checks.remarks(config, written)]
    for name, entry in written.items():
        if entry.where.startswith("environment") and config.reads(name):
            lines.append(f"{entry.where} sets {name}: {to_yaml(flat[name])}")
    return lines


def dump_config(config: RunConfig) -> str:
    """The text of `ernie_tune_args.yaml`: every setting that has an effect. `load_text` of it gives
    `config` again, and `train` on it the run.
    """
    flat = config.flat()
    lines = ["# resolved by ernie-tune; `ernie-tune train` on this file repeats the run"]
    for section in dataclasses.fields(RunConfig):
        if config.applies(section.name):
            lines.append(f"### {section.name}")
            lines += [
                f"{name}: {to_yaml(flat[name])}"
                for name, setting in SETTINGS.items()
                if setting.section == section.name
            ]
    return "\n".join(lines) + "\n"

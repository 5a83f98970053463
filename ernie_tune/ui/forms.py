"""The settings of a run as fields to fill in and as YAML, each made from the other, both from the
settings' own metadata.

A field changes its line in the YAML and leaves the rest, comments too, as it is. Refuses to know:
pages, which settings there are (config/ does), how a run is started.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ernie_tune.config.aliases import RENAMED
from ernie_tune.config.arguments import SETTINGS, VARYING, Setting, default_for
from ernie_tune.config.convert import to_yaml
from ernie_tune.config.field import Setting as _Setting
from ernie_tune.config.language import Text, say, shown, spoken
from ernie_tune.config.loader import Loaded, load_text
from ernie_tune.plan.estimate import estimate
from ernie_tune.plan.judgement import judged

NAME = "run.yaml"  # what messages call a YAML that has no file yet
# What a first run is asked for; everything else waits in its section.
FIRST = (
    "stage", "fine_tuning", "model_name_or_path", "train_dataset_path", "eval_dataset_path", "val_size", "output_dir",
    "max_seq_len", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size",
    "gradient_accumulation_steps", "lora_rank", "loss_type", "beta", "eval_strategy", "eval_steps", "save_steps", "seed",
)  # fmt: skip
START = """stage: SFT
fine_tuning: LoRA
model_name_or_path: nano
train_dataset_path: train.jsonl
output_dir: output/first
max_steps: 40
learning_rate: 2.0e-3
"""


@dataclass(frozen=True)
class FormField:
    """One setting as a page draws it. `kind`: "choice", "switch" or "text"; `value`: as it stands
    in the YAML or by default, as text."""

    name: str
    section: str
    kind: str
    label: Text
    choices: tuple[str, ...]
    value: str


def fields(values: Mapping[str, str] | None = None, stage: str = "SFT", method: str = "LoRA") -> list[FormField]:
    """Every setting in its order; `values`: those that were written."""
    given = values or {}
    return [_field(s, given.get(s.name), stage, method) for s in SETTINGS.values()]


def _field(setting: _Setting, written: str | None, stage: str, method: str) -> FormField:
    name, about = setting.name, setting.about
    kind = "switch" if setting.kind is bool and not setting.many else "choice" if _closed(setting) else "text"
    default = to_yaml(default_for(name, stage, method) if name in VARYING else setting.default)
    value = default if written is None else written
    if setting.many:  # [a.jsonl, b.jsonl]: people write a list without its brackets
        plain = re.fullmatch(r"\[([^\[\]{}\"']*)\]", value)
        value = plain[1] if plain else value
    label = say(about.help, about.help_zh)
    return FormField(name, setting.section, kind, label, tuple(about.choices), value.strip("\"'"))


def _closed(setting: Setting) -> bool:
    return bool(setting.about.choices) and not setting.many


def read(text: str) -> tuple[Loaded | None, list[Text]]:
    """The settings of a YAML, and what there is to say of it: mistakes (then there are no
    settings), or notes."""
    try:
        loaded = load_text(text, NAME, for_training=True)
    except (ValueError, OSError):
        loaded = None
    return loaded, spoken(lambda: _told(text))


def lacking(text: str) -> list[Text]:
    """What keeps the run of a YAML that is valid from starting: what it names and is not there."""
    return spoken(lambda: _lacking(text))


def _lacking(text: str) -> list[str]:
    try:
        judged(load_text(text, NAME, for_training=True), f"{NAME}:1", training=True)
    except (ValueError, OSError) as error:
        return shown(error).splitlines()
    return []


def _told(text: str) -> list[str]:
    try:
        loaded = load_text(text, NAME, for_training=True)
        return [shown(n) for n in (*loaded.notes, *judged(loaded, f"{NAME}:1", training=False))]
    except (ValueError, OSError) as error:
        return shown(error).splitlines()


def written(text: str) -> dict[str, str]:
    """What a YAML says of settings, by our names, as text; {} where it cannot be read."""
    try:
        loaded = load_text(text, NAME)
    except (ValueError, OSError):
        return {}
    flat = loaded.config.flat()
    return {name: to_yaml(flat[name]) for name, entry in loaded.sources.items() if entry.where.startswith(f"{NAME}:")}


def with_value(text: str, name: str, value: Any) -> str:
    """The YAML with a setting under a new value: its line, under whatever name it stands there, is
    changed; a new one comes last. None or "" takes it out.
    """
    raw = "" if value is None else str(value).lower() if isinstance(value, bool) else str(value).strip()
    line = f"{name}: {_quoted(raw)}" if raw else None
    out, done = [], False
    skipping = False
    for old in text.split("\n"):
        key = re.match(r"([A-Za-z_][\w-]*)\s*:", old)
        if skipping and not key and (old.startswith((" ", "-", "\t")) or not old.strip()):
            continue  # what belonged to the value that is gone
        skipping = False
        if key is not None and RENAMED.get(key[1].replace("-", "_"), key[1].replace("-", "_")) == name:
            skipping = True
            if line is not None and not done:
                comment = re.search(r"\s+#.*$", old)
                out.append(line + (comment[0] if comment else ""))
            done = True
            continue
        out.append(old)
    if line is not None and not done:
        while out and not out[-1].strip():
            out.pop()
        out += [line, ""]
    return "\n".join(out)


def _quoted(raw: str) -> str:
    """A value as YAML: as it stands where that reads as one plain value or list, else in quotes."""
    if re.fullmatch(r"\[.*\]|\{.*\}|\".*\"|'.*'", raw):
        return raw
    if re.search(r"[:#&*!|>%@`\"'{}\[\],\n]|^[-?]\s", raw) and not re.fullmatch(r"[\w./~+-]+(#\d+)?", raw):
        return "'" + raw.replace("'", "''") + "'"
    return raw


def estimated(text: str) -> Text:
    """Memory and time of the run that a YAML describes, as text; or why there are none."""
    return spoken(lambda: ["\n".join(_estimated(text))])[0]


def _estimated(text: str) -> list[str]:
    loaded, told = read(text)
    if loaded is None:
        return [str(line) for line in told]
    try:
        return [str(estimate(loaded.config))]
    except (ValueError, OSError) as error:
        return [shown(error)]

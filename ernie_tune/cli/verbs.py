"""The table of verbs (ecosystem.md 4.4) and what verbs share. A new verb is one line here and one function.

Refuses to know what a verb does: its module is imported when the verb runs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ernie_tune.config.language import say

if TYPE_CHECKING:
    from ernie_tune.config.loader import Entry


class UsageError(ValueError):
    """The command line itself is wrong: exit code 2. Wrong settings and data are plain ValueErrors: exit code 1."""


@dataclass(frozen=True)
class Verb:
    """A word of the command line. `target`: "module:function", a function of the remaining words that returns the exit code; its docstring is the
    verb's help."""

    name: str
    target: str
    help: str
    aliases: tuple[str, ...] = ()

    def load(self) -> Callable[[list[str]], int]:
        module, _, function = self.target.partition(":")
        found: Callable[[list[str]], int] = vars(importlib.import_module(module))[function]
        return found


VERBS = (
    Verb("train", "ernie_tune.cli.train:run", "fine-tune a model as a YAML file says", ("sft",)),
    Verb("dpo", "ernie_tune.cli.train:dpo", "learn from pairs of answers"),
    Verb("kto", "ernie_tune.cli.train:kto", "learn from answers called good or bad"),
    Verb("upo", "ernie_tune.cli.train:upo", "learn from pairs, rankings, ratings and labels together"),
    Verb("reward", "ernie_tune.cli.train:reward", "train a reward model", ("rm",)),
    Verb("score", "ernie_tune.cli.score:run", "score answers with a reward model"),
    Verb("eval", "ernie_tune.cli.train:evaluate", "loss and scores of a model on held-out rows"),
    Verb("chat", "ernie_tune.cli.chat:run", "talk to a model in the terminal, with /image"),
    Verb(
        "serve",
        "ernie_tune.cli.serve:run",
        "answer OpenAI's API with a model and its adapters",
        ("server", "api", "deploy"),
    ),
    Verb(
        "export",
        "ernie_tune.cli.export:run",
        "merge, convert or quantise a model into a checked folder that serves",
        ("merge", "quantize", "split"),
    ),
    Verb("plot", "ernie_tune.cli.plot:run", "draw the curves of one or several runs"),
    Verb("demo", "ernie_tune.cli.train:demo", "the first minutes: a small model learns to read digits"),
    Verb("init", "ernie_tune.cli.init:run", "write a commented YAML file and sample rows", ("cp",)),
    Verb("estimate", "ernie_tune.cli.estimate:run", "memory a card and time a step of a run, without paddle"),
    Verb("validate", "ernie_tune.cli.validate:run", "check a YAML file without loading paddle"),
    Verb("data", "ernie_tune.cli.data:run", "check, show, count or convert training data"),
    Verb("doctor", "ernie_tune.cli.doctor:run", "describe this machine, to paste into an issue", ("env",)),
    Verb("version", "ernie_tune.cli.main:version", "print the version"),
    Verb("help", "ernie_tune.cli.main:help_", "explain a verb or a setting"),
)


def find_verb(word: str) -> Verb:
    """The verb that `word` names. Raises UsageError with the nearest name."""
    by_word = {name: verb for verb in VERBS for name in (verb.name, *verb.aliases)}
    if word not in by_word:
        from ernie_tune.config.convert import did_you_mean

        raise UsageError(
            say(
                f"unknown verb {word!r}{did_you_mean(word, by_word)}; `ernie-tune help` lists the verbs",
                f"未知的命令 {word!r}{did_you_mean(word, by_word)}；`ernie-tune help` 列出所有命令",
            )
        )
    return by_word[word]


def file_and_settings(args: Sequence[str]) -> tuple[str, list[Entry]]:
    """The one file that `args` must name, and the settings beside it; of the folder of a run, its settings file. Raises UsageError for none or several
    files, and for a folder of something else."""
    from ernie_tune.config.loader import ARGS_FILE, split_overrides

    words, entries = split_overrides(args)
    if len(words) != 1:
        raise UsageError(
            say(
                f"expected one YAML file, got {len(words)}: {' '.join(words) or 'nothing'}",
                f"需要一个 YAML 文件，得到 {len(words)} 个：{' '.join(words) or '无'}",
            )
        )
    if not os.path.isdir(words[0]):
        return words[0], entries
    file = os.path.join(words[0], ARGS_FILE)
    if not os.path.isfile(file):
        raise UsageError(
            say(
                f"{words[0]} is a folder without {ARGS_FILE}; give a YAML file, or the output_dir of a run",
                f"目录 {words[0]} 中没有 {ARGS_FILE}；请给出 YAML 文件，或某次运行的 output_dir",
            )
        )
    return file, entries

"""`ernie-tune VERB …`: finds the verb, runs it, turns errors into one clean message.

Exit codes: 0 done; 1 wrong settings, data or files; 2 wrong command line; 130 interrupted; 141
nobody reads the output. `--debug` shows the traceback and what is known of the processor,
`--lang en|zh|both` says in which language to speak.
Refuses to know what verbs do.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import sys
import warnings
from collections.abc import Sequence

from ernie_tune import __version__
from ernie_tune.cli.help_chinese import HELP
from ernie_tune.cli.verbs import VERBS, UsageError, Verb, find_verb
from ernie_tune.config.language import choose_language, say, shown

_HELP = ("-h", "--help")


# What the system says in English alone.
_REASONS = {
    errno.ENOENT: "没有该文件或文件夹",
    errno.EACCES: "没有权限",
    errno.EPERM: "不允许的操作",
    errno.EISDIR: "这是文件夹，须为文件",
    errno.ENOTDIR: "路径中有一部分不是文件夹",
    errno.EEXIST: "已经存在",
    errno.ENOSPC: "磁盘空间不足",
    errno.EROFS: "文件系统只读",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name; default `sys.argv`) and return its exit
    code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if debug:
        os.environ["ERNIE_TUNE_DEBUG"] = "1"  # started workers and what paddle needs know it too
    warnings.filterwarnings(
        "ignore", message="No ccache found"
    )  # Paddle tells everybody what concerns builders of operators
    if isinstance(sys.stdout, io.TextIOWrapper):
        # a terminal without Chinese must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return _run(_without_language([word for word in words if word != "--debug"]))
    except KeyboardInterrupt:
        print(say("interrupted", "已中断"), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `ernie-tune … | head`: the reader has gone, and so must what Python would flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError) as error:
        if debug:
            raise
        print(_message(error), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


def _run(args: list[str]) -> int:
    if not args or args[0] in _HELP:
        return help_([])
    if args[0] in ("-V", "--version"):
        return version([])
    verb = find_verb(args[0])
    if any(word in _HELP for word in args[1:]):
        return help_([verb.name])
    return verb.load()(args[1:])


def _without_language(words: list[str]) -> list[str]:
    """The words without `--lang LANGUAGE`, which is obeyed. Raises UsageError for a language that
    is not spoken.
    """
    rest = []
    left = iter(words)
    for word in left:
        name, equals, wanted = word.partition("=")
        if name != "--lang":
            rest.append(word)
            continue
        try:
            choose_language(wanted if equals else next(left, ""))
        except ValueError as error:
            raise UsageError(*error.args) from None
    return rest


def _message(error: ValueError | OSError) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        reason = error.strerror or type(error).__name__
        return str(say(f"{error.filename}: {reason}", f"{error.filename}：{_REASONS.get(error.errno or 0, reason)}"))
    return shown(error)


def version(args: list[str]) -> int:
    """ernie-tune version

    Prints the version of this library.
    """
    print(f"ernie-tune {__version__}")
    return 0


def help_(args: list[str]) -> int:
    """ernie-tune help [VERB | SETTING | STAGE | --all [--html[=PATH.html]]]

    Explains a verb, a stage, or a setting with its values, defaults and other spellings. --all:
    every setting; --html: as a page, ernie_tune_settings.html. Alone: lists the verbs.
    """
    from ernie_tune.cli import settings_help

    if not args:
        print(_overview())
        return 0
    if args[0] in ("--all", "--html") or args[0].startswith("--html="):
        return settings_help.run(["--all", *(word for word in args if word != "--all")])
    known = {name: verb for verb in VERBS for name in (verb.name, *verb.aliases)}
    print(_about_verb(known[args[0]]) if args[0] in known else settings_help.about(args[0]))
    return 0


def _overview() -> str:
    names = {verb.name: ", ".join((verb.name, *verb.aliases)) for verb in VERBS}
    width = max(map(len, names.values()))
    lines = [f"  {names[verb.name]:<{width}}  {verb.help}" for verb in VERBS]
    return "\n".join(
        [
            str(say("ernie-tune: fine-tune ERNIE-4.5-VL with PaddlePaddle", "ernie-tune：用飞桨微调 ERNIE-4.5-VL")),
            "",
            str(
                say(
                    "usage: ernie-tune VERB [FILE] [key=value | --key value …] [--debug] [--lang en|zh|both]",
                    "用法：ernie-tune 命令 [文件] [key=value | --key value …] [--debug] [--lang en|zh|both]",
                )
            ),
            "",
            *lines,
            "",
            str(
                say(
                    "`ernie-tune VERB --help` explains a verb, `ernie-tune help learning_rate` a setting, "
                    "`ernie-tune help --all` all of them.",
                    "`ernie-tune 命令 --help` 解释命令，`ernie-tune help learning_rate` 解释设置，`ernie-tune help --all` 列出全部设置。",
                )
            ),
        ]
    )


def _about_verb(verb: Verb) -> str:
    english = inspect.cleandoc(verb.load().__doc__ or verb.help)
    return str(say(english, HELP.get(verb.name, english)))

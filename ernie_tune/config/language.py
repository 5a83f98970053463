"""In which language people are spoken to: English or Chinese, one on each line, chosen once for the
whole run.

    raise ValueError(say(f"rank ({r}) must be above 0; raise it", f"rank（{r}）须大于 0；请调大"))
    log.info(say(f"saved {name}", f"已保存 {name}"))

`say` takes the whole message in both languages: a reader sees one of them only, so each must be
complete. A part that is itself a message is given by name,
`say("not read: {why}", "无法读取：{why}", why=error)`, and appears in the language of the rest.
What comes back is a `str` that shows itself in the language that is wanted when it is shown; pages
that offer both (HTML with a switch) read `.english` and `.chinese`. Names of settings, files, verbs
and code stay as they are.

ERNIE_TUNE_LANG says `en`, `zh` or `both` (English, then Chinese); `ernie-tune --lang zh …` sets it,
for started workers too. Without it the system decides: LC_ALL, LC_MESSAGES or LANG beginning with
zh mean Chinese, everything else English.
What is written for machines (JSON, logs, YAML keys, metric names) does not depend on it.

Refuses to know: what is said, where it is shown.
"""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar

LANGUAGES = ("en", "zh", "both")
VARIABLE = "ERNIE_TUNE_LANG"
_CHINESE = re.compile("[\u4e00-\u9fff]")
_present: ContextVar[str] = ContextVar("_present", default="")


def language(environ: Mapping[str, str] = os.environ) -> str:
    """`en`, `zh` or `both`, as the environment says; English where it says something else."""
    if environ is os.environ and _present.get():
        return _present.get()
    wanted = environ.get(VARIABLE, "")
    if wanted in LANGUAGES:
        return wanted
    system = next((environ[n] for n in ("LC_ALL", "LC_MESSAGES", "LANG") if environ.get(n)), "")
    return "zh" if system.lower().startswith("zh") else "en"


def choose_language(wanted: str) -> None:
    """Speak `wanted` from now on, in processes started from here too. Raises ValueError for another
    word than LANGUAGES.
    """
    if wanted not in LANGUAGES:
        raise ValueError(say("lang ({w}) must be en, zh or both", "lang（{w}）须为 en、zh 或 both", w=wanted))
    os.environ[VARIABLE] = wanted


@contextlib.contextmanager
def _speaking(wanted: str) -> Iterator[None]:
    token = _present.set(wanted)
    try:
        yield
    finally:
        _present.reset(token)


def spoken(make: Callable[[], Sequence[object]]) -> list[Text]:
    """The lines that `make` gives, made once in each language: of what is put together from
    messages before anybody knows who reads it. Where the languages need different numbers of lines
    they are one message.
    """
    with _speaking("en"):
        english = [str(line) for line in make()]
    with _speaking("zh"):
        chinese = [str(line) for line in make()]
    if len(english) != len(chinese):
        return [Text("\n".join(english), "\n".join(chinese))]
    return [Text(*pair) for pair in zip(english, chinese, strict=True)]


class Text(str):
    """A message in both languages. Printed, formatted and `str()`ed it is in the present language;
    as a plain string, in that of its making.
    """

    __slots__ = ("chinese", "english")
    english: str
    chinese: str

    def __new__(cls, english: str, chinese: str) -> Text:
        self = super().__new__(cls, _chosen(english, chinese))
        self.english, self.chinese = english, chinese
        return self

    def __str__(self) -> str:
        return _chosen(self.english, self.chinese)

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    # copies and pickles are made of both
    def __reduce__(self) -> tuple[type[Text], tuple[str, str]]:
        return Text, (self.english, self.chinese)


def say(english: str, chinese: str, /, **parts: object) -> Text:
    """One message in both languages. `parts` fill `{name}` in both; one that is a `Text`, or an
    error made of one, in the language around it.
    """
    if not parts:
        return Text(english, chinese)
    return Text(
        english.format_map({name: in_language(part, "en") for name, part in parts.items()}),
        chinese.format_map({name: in_language(part, "zh") for name, part in parts.items()}),
    )


def in_language(message: object, wanted: str) -> object:
    """A message, or an error made of one, in `en` or `zh`; anything else as it is."""
    inner = message.args[0] if isinstance(message, Exception) and len(message.args) == 1 else message
    if isinstance(inner, Text):
        return inner.english if wanted == "en" else inner.chinese
    own = getattr(message, "english" if wanted == "en" else "chinese", None) if isinstance(message, Exception) else None
    return own if isinstance(own, str) else message


def counted(number: float, one: str, many: str = "") -> str:
    """`1 row`, `2 rows`: the English for so many of a thing."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def columns(text: str) -> int:
    """How wide a terminal shows a text: Chinese characters take two columns."""
    return sum(1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def padded(text: object, width: int) -> str:
    """A text in the present language, filled up with blanks to `width` columns."""
    said = str(text)
    return said + " " * (width - columns(said))


def join(separator: str, parts: list[Text]) -> Text:
    """Several messages as one."""
    return Text(separator.join(p.english for p in parts), separator.join(p.chinese for p in parts))


def shown(message: object) -> str:
    """A message as a person sees it. One that still carries both languages in one text
    (`english / 中文`) is cut to the wanted one.
    """
    text, wanted = str(message), language()
    if wanted == "both" or isinstance(message, Text) or not _CHINESE.search(text):
        return text
    return "\n".join(_half(line, wanted) for line in text.split("\n"))


def halves(text: str) -> Text:
    """What another process said in both languages, taken apart; what it said in one is whole in
    both.
    """
    english, chinese = ("\n".join(_half(line, wanted) for line in text.split("\n")) for wanted in ("en", "zh"))
    return Text(english, chinese)


def _half(line: str, wanted: str) -> str:
    first = _CHINESE.search(line)
    cut = line.rfind(" / ", 0, first.start()) if first else -1
    return line if cut < 0 else line[:cut] if wanted == "en" else line[cut + 3 :]


def _chosen(english: str, chinese: str) -> str:
    wanted = language()
    return english if wanted == "en" else chinese if wanted == "zh" else both(english, chinese)


def both(english: str, chinese: str) -> str:
    """English, then Chinese: on one line where both are short lines, else beneath each other."""
    return f"{english} / {chinese}" if "\n" not in english + chinese else f"{english}\n{chinese}"

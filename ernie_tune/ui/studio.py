"""What the rooms of a studio share: its folder, jobs and models, its words in both languages, and
pieces of HTML that are safe to make of data.

Labels are turned by the browser's language; HTML carries both languages, of which the page's style
shows one. Refuses to know: rooms, what gradio does with them.
"""

from __future__ import annotations

import html as escaping
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ernie_tune.config.language import Text, in_language, say
from ernie_tune.report import html
from ernie_tune.report.pages import without_tags
from ernie_tune.ui.asking import ModelServers
from ernie_tune.ui.jobs import DONE, FAILED, RUNNING, STOPPED, Jobs
from ernie_tune.ui.workspace import Workspace


@dataclass
class Studio:
    """One studio. `words`: every label that was asked for, by the key under which the browser looks
    it up. `label`: makes of a key what gradio understands. `parts`: what one room shows to another,
    by name: "tabs" and, of the room Train, "yaml" and "filled".
    """

    workspace: Workspace
    jobs: Jobs
    servers: ModelServers
    label: Callable[[str], Any]
    words: dict[str, Text] = field(default_factory=dict)
    parts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def at(cls, root: Path, also: Sequence[Path], label: Callable[[str], Any]) -> Studio:
        workspace = Workspace(root, also)
        jobs = Jobs(workspace.own / "jobs")
        return cls(workspace, jobs, ModelServers(jobs, workspace.root), label)

    def __call__(self, english: str, chinese: str) -> Any:
        """A label of the page."""
        self.words[english] = say(english, chinese)
        return self.label(english)

    def translations(self) -> dict[str, dict[str, str]]:
        """Language -> key -> words, for the browser's languages that mean Chinese too."""
        chinese = {key: text.chinese for key, text in self.words.items()}
        english = {key: text.english for key, text in self.words.items()}
        return {"en": english, **dict.fromkeys(("zh", "zh-CN", "zh-TW", "zh-HK"), chinese)}


# A script of an event: the last of its inputs is given away for the language that the page speaks.
IN_TONGUE = "(...given) => [...given.slice(0, -1), document.documentElement.dataset.tongue]"
STATES = {
    RUNNING: say("running", "运行中"),
    DONE: say("done", "已完成"),
    FAILED: say("failed", "失败"),
    STOPPED: say("stopped", "已停止"),
}
Offers = list[tuple[Any, Callable[[], list[Any]]]]  # lists of names, and what they offer when a room is entered


def line(message: object, kind: str = "note") -> str:
    """A line about what happened: a message in both languages, or an error made of one."""
    english, chinese = (from_here(str(in_language(message, lang))) for lang in ("en", "zh"))
    return f'<p class="{kind}" role="status">{html.both(Text(english, chinese))}</p>'


def from_here(said: str) -> str:
    """Paths in a text as people know them: from the folder in which the studio works."""
    here = str(Path.cwd())
    return said if here == "/" else said.replace(f"{here}/", "").replace(here, Path(here).name)


def lines(messages: Sequence[object], kind: str = "note") -> str:
    return "".join(line(m, kind) for m in messages)


def few(messages: Sequence[object], most: int = 10) -> str:
    """What is wrong with rows: the first of them, and how many more there are."""
    more = len(messages) - most
    rest = line(say(f"and {more} more like these", f"另有 {more} 条类似信息"), "bad") if more > 0 else ""
    return lines(messages[:most], "bad") + rest


def log(messages: Sequence[Text]) -> str:
    """What a command says, line by line, in both languages."""
    english, chinese = (from_here("\n".join(getattr(m, lang) for m in messages)) for lang in ("english", "chinese"))
    return f'<pre class="log">{html.both(Text(english, chinese))}</pre>' if messages else ""


def tongue(asked: object) -> str:
    """The language that a page speaks, as it says; English for anything else."""
    return "zh" if asked == "zh" else "en"


def text(value: object) -> str:
    """Text from data: escaped, with its line breaks."""
    return f'<div class="text">{escaping.escape(str(value))}</div>'


def pictures(images: Sequence[Any]) -> str:
    """Pictures of a question, small enough for a page."""
    named = (from_here(one) if isinstance(one, str) and not one.startswith("data:") else one for one in images)
    return f'<div class="pictures">{"".join(html.picture(image, None) for image in named)}</div>' if images else ""


def page(body: Sequence[str]) -> str:
    """Pieces of a page of the report's kit, in its own style."""
    return f'<div class="ernie-tune inside">{"".join(body)}</div>'


def dialogue(messages: Sequence[Any], images: Sequence[Any]) -> str:
    """A question as people see it: pictures first, then the turns."""
    shown = [
        f'<div class="turn {escaping.escape(str(m.get("role", "")))}">{text(without_tags(str(m.get("content") or "")))}</div>'
        for m in messages
    ]
    return pictures(images) + "".join(shown)

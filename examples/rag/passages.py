"""Markdown documents -> passages: a section's text, or a picture with its caption.

Refuses to know: how passages are found, questions, models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PICTURE = re.compile(r"^!\[([^\]]*)\]\(([^)]+)\)$")


@dataclass(frozen=True)
class Passage:
    """`key`: which section of which document, or which picture. `head` and `text`: what is shown
    and searched; of a picture, its caption. `picture`: its file.
    """

    key: str
    language: str
    head: str
    text: str
    picture: Path | None = None

    @property
    def words(self) -> str:
        """All text that there is of it."""
        return f"{self.head} {self.text}".strip()


def read_documents(folder: Path) -> list[Passage]:
    """The passages of all `*.LANGUAGE.md` in a folder, in order of their names. Raises ValueError
    for a folder without any, and for a picture that is not there.
    """
    found: list[Passage] = []
    for path in sorted(folder.glob("*.md")):
        language = path.name.split(".")[-2]
        found += split(path.read_text(encoding="utf-8"), path.name.removesuffix(f".{language}.md"), language, folder)
    if not found:
        raise ValueError(f"folder ({folder}) must hold documents named like leave.zh.md; add some")
    return found


def split(markdown: str, name: str, language: str, folder: Path) -> Iterator[Passage]:
    """The passages of one document. A section's key is its document's name and its number, a
    picture's the name of its file.
    """
    title, head, section = "", "", 0
    for block in (part.strip() for part in re.split(r"\n\s*\n", markdown)):
        if block.startswith("# "):
            title = block[2:]
        elif block.startswith("## "):
            head, section = block[3:], section + 1
        elif picture := _PICTURE.match(block):
            file = folder / picture[2]
            if not file.is_file():
                raise ValueError(f"{name}.{language}.md: picture ({picture[2]}) must be a file beside it; add it")
            yield Passage(file.stem, language, picture[1], "", file)
        elif block:
            text = ("" if language == "zh" else " ").join(line.strip() for line in block.split("\n"))
            yield Passage(f"{name}/{section}", language, head or title, text)

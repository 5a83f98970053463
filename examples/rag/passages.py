"""Markdown documents -> passages: a section's text, or a picture with its caption.

Refuses to know: how passages are found, questions, models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LANGUAGES = ("zh", "en")
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
    for a folder without any, for a document of no language or other letters, and for a picture that
    is not there, or lies outside the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"documents ({folder}) must be a folder of files named like leave.zh.md; correct the path")
    found: list[Passage] = []
    for path in sorted(folder.glob("*.md")):
        name, _, language = path.name.removesuffix(".md").rpartition(".")
        if not name or language not in LANGUAGES:
            raise ValueError(
                f"document ({path}) must say its language, as leave.zh.md and leave.en.md do; rename it to "
                f"{path.stem}.en.md or {path.stem}.zh.md"
            )
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"document ({path}) must be text in UTF-8 ({error.reason}); save it so") from error
        found += split(text, name, language, folder)
    if not found:
        raise ValueError(f"folder ({folder}) must hold documents with text, named like leave.zh.md; add some")
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
            # It is sent to the server that answers: nothing but what lies with the documents.
            if not file.is_file() or not file.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{name}.{language}.md: picture ({picture[2]}) must be a file beside it; add it")
            yield Passage(file.stem, language, picture[1], "", file)
        elif block:
            text = ("" if language == "zh" else " ").join(line.strip() for line in block.split("\n"))
            yield Passage(f"{name}/{section}", language, head or title, text)

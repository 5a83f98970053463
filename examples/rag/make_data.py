"""Writes the documents, their pictures and the questions about them (into this folder), and rows
that teach a reader: other companies' rules, with the passages that answer and others.

Usage: python examples/rag/make_data.py [--rows 20000] [--seed 7] [--out output/rag_data]
       python examples/rag/make_data.py --documents     the files of this folder again
No value of ours is in the rows but by chance, and no wording of our questions.
"""

from __future__ import annotations

import argparse
import json
import random
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from passages import Passage
from PIL import Image, ImageDraw
from policy import (
    COMPANY,
    DOCUMENTS,
    FIGURE_ANSWERS,
    FIGURES,
    LANGUAGES,
    NOT_FOUND,
    RULES,
    SECTIONS,
    UNANSWERED,
)
from prompt import question

HERE = Path(__file__).parent
VALUES = (*range(1, 32), *range(35, 200, 5))
_DAYS_OFF = (3, 8, 0, 1, 5, 1, 0, 0, 1, 9, 0, 0)  # of each month, in the first picture
_OPENING = {
    "zh": "适用于{company}全体员工。与法律不一致之处以法律为准。",
    "en": "For all staff of {company}. Where the law says otherwise, the law holds.",
}


def documents() -> Iterator[tuple[str, str]]:
    """(file name, Markdown) of every document in both languages."""
    for name, titles in DOCUMENTS.items():
        for i, language in enumerate(LANGUAGES):
            parts = [f"# {titles[language]}", _OPENING[language].format(company=COMPANY[language])]
            for section, heads in SECTIONS.items():
                rules = [r for r in RULES.values() if r.section == section and r.document == name]
                if rules:
                    space = " " if language == "en" else ""
                    said = space.join(rule.said[language][0].format(v=rule.value) for rule in rules)
                    parts += [f"## {heads[i]}", said]
            if name == "leave":
                parts += [f"![{figure[language][0]}](figures/{key}.png)" for key, figure in FIGURES.items()]
            if language == "en":  # an editor's width; Chinese has no blanks to break at
                parts = [part if part.startswith(("#", "!")) else textwrap.fill(part, 96) for part in parts]
            yield f"{name}.{language}.md", "\n\n".join(parts) + "\n"


def questions() -> Iterator[dict[str, Any]]:
    """What is asked, the right answer, and which passages (or pictures) say it; none where no
    document does.
    """
    places = {}  # of each section, its key as passages.py numbers it
    for name in DOCUMENTS:
        own = [
            section for section in SECTIONS if any(r.section == section and r.document == name for r in RULES.values())
        ]
        places |= {section: f"{name}/{i}" for i, section in enumerate(own, 1)}
    for language in LANGUAGES:
        for key, rule in RULES.items():
            for asked in rule.asked[language][3:]:
                answer, place = rule.answer(rule.value, language), places[rule.section]
                yield {"question": asked, "language": language, "answer": answer, "rule": key, "in": [place]}
        for key, figure in FIGURES.items():
            answer = FIGURE_ANSWERS[key][language]
            for asked in figure[language][1:]:
                yield {"question": asked, "language": language, "answer": answer, "rule": key, "in": [key]}
        for asked in UNANSWERED[language]:
            yield {"question": asked, "language": language, "answer": NOT_FOUND[language], "rule": "", "in": []}


def rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Rows of training: three passages of an invented company and a question that one of them
    answers; one row in eight has none that does.
    """
    rng = random.Random(seed)
    by_section: dict[str, list[str]] = {}
    for key, rule in RULES.items():
        by_section.setdefault(rule.section, []).append(key)
    for _ in range(count):
        language = rng.choice(LANGUAGES)
        key = rng.choice(list(RULES))
        values = {other: rng.choice(VALUES) for other in RULES}
        near = [s for s in SECTIONS if s != RULES[key].section and _near(s, RULES[key].section)]
        others = rng.sample([s for s in SECTIONS if s != RULES[key].section], 3)
        if near and rng.random() < 0.5:
            others[0] = rng.choice([s for s in near if s not in others[1:]] or [others[0]])
        found = rng.random() >= 1 / 8
        shown = [RULES[key].section, *others[:2]] if found else others
        rng.shuffle(shown)
        passages = []
        for section in shown:
            tongue = language if rng.random() < 0.85 else rng.choice(LANGUAGES)
            if section == RULES[key].section:
                tongue = language
            space = " " if tongue == "en" else ""
            which = int(rng.random() < 0.35)
            said = space.join(RULES[k].said[tongue][which].format(v=values[k]) for k in by_section[section])
            passages.append(Passage(section, tongue, SECTIONS[section][LANGUAGES.index(tongue)], said))
        answer = NOT_FOUND[language]
        if found:
            place = shown.index(RULES[key].section) + 1
            answer = f"[{place}] {RULES[key].answer(values[key], language)}"
        asked = rng.choice(RULES[key].asked[language][:3])
        yield {
            "messages": [
                {"role": "user", "content": question(asked, passages, language)},
                {"role": "assistant", "content": answer},
            ]
        }


def _near(section: str, other: str) -> bool:
    """Whether the two are easily taken for each other: they share a word of their English head."""
    words = [set(SECTIONS[s][1].lower().split()) - {"leave", "to", "on", "over"} for s in (section, other)]
    return bool(words[0] & words[1]) or (section.split("_")[0] == other.split("_")[0])


def draw_days() -> Image.Image:
    """Bars of the days off by month."""
    picture = Image.new("RGB", (364, 224), "white")
    pen = ImageDraw.Draw(picture)
    for month, days in enumerate(_DAYS_OFF):
        left = 14 + month * 28
        pen.rectangle((left, 190 - days * 18, left + 20, 190), fill="#2f6fb0")
        pen.text((left + 4, 198), str(month + 1), fill="black")
    return picture


def draw_approval() -> Image.Image:
    """Three boxes, one after the other."""
    picture = Image.new("RGB", (364, 112), "white")
    pen = ImageDraw.Draw(picture)
    for i, who in enumerate(("staff", "manager", "human resources")):
        left = 10 + i * 120
        pen.rectangle((left, 36, left + 100, 76), outline="black", width=2)
        pen.text((left + 6, 50), who, fill="black")
        if i:
            pen.line((left - 20, 56, left - 2, 56), fill="black", width=2)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", action="store_true")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("output/rag_data"))
    o = parser.parse_args()
    if o.documents:
        (HERE / "documents" / "figures").mkdir(parents=True, exist_ok=True)
        for name, text in documents():
            (HERE / "documents" / name).write_text(text, encoding="utf-8")
        for key, picture in (("closing_days", draw_days()), ("approval", draw_approval())):
            picture.save(HERE / "documents" / "figures" / f"{key}.png")
        lines = [json.dumps(one, ensure_ascii=False) for one in questions()]
        (HERE / "questions.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
        print(f"{len(lines)} questions")
        return
    o.out.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(o.rows, o.seed))
    (o.out / "train.jsonl").write_text(text, encoding="utf-8")
    print(f"{o.out}: {o.rows} rows of training")


if __name__ == "__main__":
    main()

"""Answers from documents, with citations: looks up, asks a served model, and measures both.

Usage: python examples/rag/rag.py ask "婚假有几天？" [--server http://127.0.0.1:8180/v1]
       python examples/rag/rag.py measure [--server …] [--vectors lsa | URL/v1] [--captions]
       with --documents FOLDER (of NAME.LANGUAGE.md) also about your own
Without --server the best sentence is quoted, with its passage. Knows HTTP alone of the model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from passages import Passage, read_documents
from policy import NOT_FOUND
from prompt import parts, question, read_answer
from search import Index, lsa, post, served, words

HERE = Path(__file__).parent
# question, passages, language -> answer
Reader = Callable[[str, Sequence[Passage], str], str]
LEAST = 0.2  # answers 95 % of the questions that training rows ask, worded otherwise than ours
LOOK = {"zh": "请看图：", "en": "See the picture: "}
_SENTENCE = re.compile(r"[^。.!?！？]+[。.!?！？]?")


def quoting(index: Index, least: float = LEAST) -> Reader:
    """Without a model: the sentence of the first passage that shares most words with the question,
    or which picture to look at; nothing where the passage speaks of less than `least` of what is
    asked.
    """

    def read(asked: str, passages: Sequence[Passage], language: str) -> str:
        if not passages or index.covered(asked, passages[0]) < least:
            return NOT_FOUND[language]
        if not passages[0].text:
            return f"[1] {LOOK[language]}{passages[0].head}"
        wanted = set(words(asked))
        sentences = [s.strip() for s in _SENTENCE.findall(passages[0].text)]
        return f"[1] {max(sentences, key=lambda s: len(wanted & set(words(s))))}"

    return read


def asking(url: str, captions: bool, model: str | None = None, max_tokens: int = 64) -> Reader:
    """A reader that asks a server, pictures of the passages and all (`captions`: their captions
    alone, for a model that does not see). It raises ValueError for a server that gives no answer.
    """

    def read(asked: str, passages: Sequence[Passage], language: str) -> str:
        content = question(asked, passages, language) if captions else parts(asked, passages, language)
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        body |= {"temperature": 0, "max_tokens": max_tokens, **({"model": model} if model else {})}
        found = post(f"{url}/chat/completions", body)
        try:
            return found["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"{url} must answer the question, but says: {str(found)[:200]}") from error

    return read


def language_of(text: str) -> str:
    return "zh" if re.search("[\u4e00-\u9fff]", text) else "en"


def recalls(
    index: Index, rows: Sequence[dict[str, Any]], at: Sequence[int] = (1, 3, 5)
) -> Iterator[tuple[str, str, list[float]]]:
    """(way, language, share of the answerable questions with a right passage among the first k);
    for questions about text, then for those about pictures.
    """
    ways = {"words (BM25)": index.by_words, "vectors": index.by_vectors, "both": index.by_both}
    for kind in ("", ", pictures"):
        for name, way in ways.items():
            for language in ("zh", "en"):
                asked = [row for row in rows if row["in"] and about_picture(row) == bool(kind)]
                some = [row for row in asked if row["language"] == language]
                ranks = []
                for row in some:
                    keys = [index.passages[i].key for i in way(row["question"])]
                    ranks.append(next((r for r, key in enumerate(keys) if key in row["in"]), len(keys)))
                yield name + kind, language, [sum(rank < k for rank in ranks) / len(some) for k in at]


def about_picture(row: dict[str, Any]) -> bool:
    """Whether only a picture says it."""
    return bool(row["in"]) and "/" not in row["in"][0]


def is_right(answer: str, row: dict[str, Any]) -> bool:
    """Whether it says what the row says: the same number and no other, with its unit; or the
    words.
    """
    numbers = re.findall(r"\d+", row["answer"])
    if not numbers or not row["in"]:
        return row["answer"].lower() in answer.lower()
    unit = row["answer"].split(" ", 1)[1]
    return re.findall(r"\d+", answer) == numbers and unit in answer


def score(
    rows: Sequence[dict[str, Any]], find: Callable[[dict[str, Any]], Sequence[Passage]], read: Reader
) -> dict[str, list[bool]]:
    """What came of each question: right answers to what documents say (text, pictures), citations
    that support (of the answers that cite), and silence where no document says anything.
    """
    out: dict[str, list[bool]] = {"text": [], "pictures": [], "supported": [], "silent": []}
    for row in rows:
        passages = find(row)
        answer, cited = read_answer(read(row["question"], passages, row["language"]), passages)
        if not row["in"]:
            out["silent"].append(NOT_FOUND[row["language"]] in answer)
            continue
        out["pictures" if about_picture(row) else "text"].append(is_right(answer, row))
        if cited:
            out["supported"].append(all(one.key in row["in"] for one in cited))
    return out


def measure(index: Index, rows: Sequence[dict[str, Any]], readers: dict[str, Reader], k: int) -> list[str]:
    """The lines of two tables in Markdown."""
    lines = ["| found by | language | recall@1 | recall@3 | recall@5 |", "|---|---|---|---|---|"]
    for name, language, shares in recalls(index, rows):
        lines.append(f"| {name} | {language} | " + " | ".join(f"{100 * s:.1f} %" for s in shares) + " |")
    lines += [
        "",
        "| answered by | right | right, pictures | citations that support | silent where nothing is said |",
        "|---|---|---|---|---|",
    ]
    found: dict[str, Sequence[Passage]] = {
        row["question"]: index.find(row["question"], k, row["language"]) for row in rows
    }
    for name, read in readers.items():
        ways: dict[str, Callable[[dict[str, Any]], Sequence[Passage]]] = {
            f"{name}, {k} passages": lambda row: found[row["question"]],
            f"{name}, no passages": lambda row: [],
        }
        for title, way in ways.items():
            cells = [f"{sum(some)} of {len(some)}" for some in score(rows, way, read).values()]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("ask", "measure"))
    parser.add_argument("question", nargs="?")
    parser.add_argument("--documents", type=Path, default=HERE / "documents")
    parser.add_argument("--server", default="")
    parser.add_argument("--vectors", default="lsa")
    parser.add_argument("--model")
    parser.add_argument("--k", type=int, default=3)
    parser.add_argument("--captions", action="store_true", help="send captions in place of pictures")
    parser.add_argument("--index", type=Path, help="a folder for the database; default: in memory")
    o = parser.parse_args(argv)
    if o.verb == "ask" and not words(o.question or ""):
        parser.error("ask needs a question of some words")
    if o.k < 1:
        parser.error(f"--k ({o.k}) must be at least 1: passages to answer from")
    try:
        return _run(o)
    except (ValueError, OSError) as error:
        print(f"rag.py: {error}", file=sys.stderr)
        return 1


def _run(o: argparse.Namespace) -> int:
    passages = read_documents(o.documents)
    vectors = lsa(passages) if o.vectors == "lsa" else served(o.vectors, o.model)
    index = Index(passages, vectors, o.index, pictures=o.vectors != "lsa" and not o.captions)
    quote = quoting(index)
    reader = asking(o.server, o.captions, o.model) if o.server else quote
    try:
        if o.verb == "measure":
            rows = _questions(o.documents.resolve().parent / "questions.json", index)
            readers = {"quoting": quote, **({"the served model": reader} if o.server else {})}
            print("\n".join(measure(index, rows, readers, o.k)))
            return 0
        language = language_of(o.question)
        shown = index.find(o.question, o.k, language)
        answer, cited = read_answer(reader(o.question, shown, language), shown)
        print(answer)
        for one in cited:
            print(f"  [{one.key}] {one.words}")
    finally:
        index.close()
    return 0


def _questions(file: Path, index: Index) -> list[dict[str, Any]]:
    """What is asked of documents, from beside their folder. Raises ValueError where it is not
    there, or asks for other documents.
    """
    if not file.is_file():
        raise ValueError(f"measure needs {file}, as examples/rag/questions.json is; write it, or use ask")
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    known = {one.key for one in index.passages}
    strange = next((key for row in rows for key in row["in"] if key not in known), None)
    if strange is not None:
        raise ValueError(f"{file} must ask for passages of these documents, which have no {strange}; correct it")
    return rows


if __name__ == "__main__":
    sys.exit(main())

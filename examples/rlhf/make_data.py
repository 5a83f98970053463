"""Rewrites this folder's rows from examples/digits: questions without answers to learn from, and
held-out ones whose answers are only measured with. Knows files only.

Usage: python examples/rlhf/make_data.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DIGITS = HERE.parent / "digits"


def question(row: dict[str, Any]) -> dict[str, Any]:
    """What is asked about a picture, without the answer."""
    return {"messages": row["messages"][:1], "images": [f"../digits/{name}" for name in row["images"]]}


def make(out: Path) -> None:
    """Writes prompts.jsonl and eval.jsonl."""
    for source, name, gold in (("train", "prompts", False), ("eval", "eval", True)):
        rows = [json.loads(line) for line in (DIGITS / f"{source}.jsonl").read_text(encoding="utf-8").splitlines()]
        made = [
            {**question(row), "signal": {"type": "verifiable", "answer": row["messages"][1]["content"]}}
            if gold
            else question(row)
            for row in rows
        ]
        partial = out / f"{name}.tmp"
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, out / f"{name}.jsonl")


if __name__ == "__main__":
    make(HERE)

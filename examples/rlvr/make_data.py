"""Turns the digits of examples/digits into questions with a gold answer and no demonstration. Knows
JSON, nothing of models or training.

Usage: python examples/rlvr/make_data.py
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

HERE = Path(__file__).parent


def questions(rows: Path, out: Path) -> list[str]:
    """Lines of `out`: the prompts of a file of dialogues, and beside each what its answer was."""
    lines = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked, answered = row["messages"]
        pictures = [os.path.relpath(rows.parent / name, out.parent) for name in row["images"]]
        signal = {"type": "verifiable", "answer": answered["content"]}
        lines.append(json.dumps({"messages": [asked], "images": pictures, "signal": signal}, ensure_ascii=False))
    return lines


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("output/rlvr_data"), help="folder of the rows")
    out = parser.parse_args(argv).out
    out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "eval"):
        unfinished, path = out / f"{name}.jsonl.tmp", out / f"{name}.jsonl"
        lines = questions(HERE.parent / "digits" / f"{name}.jsonl", path)
        unfinished.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        os.replace(unfinished, path)
        print(f"{path}: {len(lines)} rows")


if __name__ == "__main__":
    main()

"""Draws 60 held-out pictures, ten of each of six skills, half of them asked in Chinese: on these CI
measures the shipped model, and examples/chain sees what is being forgotten.

Usage: python make_test.py ../chain/guard
The same files each time, where pillow and the fonts are of the same versions.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import make_data

SKILLS = ("color", "shape", "place", "digit", "count", "yesno")


def main() -> None:
    rng, folder = random.Random("shipped 1"), Path(sys.argv[1]) / "media"
    folder.mkdir(parents=True, exist_ok=True)
    lines = ""
    for i in range(60):
        skill = SKILLS[i % 6]
        made = make_data.held_out(rng, i % 12 >= 6, skill)
        row = make_data.row_of(made, f"{i:02d}", folder) | {"task": skill}
        lines += json.dumps(row, ensure_ascii=False) + "\n"
    (folder.parent / "rows.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()

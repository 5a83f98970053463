"""Packs the 60 held-out pictures on which CI measures the shipped model: ten of each of six skills,
half of them asked in Chinese.

Usage: python make_test.py ../../tests/generate/nano_pictures.zip
The same zip each time, where pillow and the fonts are of the same versions.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import zipfile
from pathlib import Path

import make_data

SKILLS = ("color", "shape", "place", "digit", "count", "yesno")
_DATE = (2026, 1, 1, 0, 0, 0)


def main() -> None:
    rng = random.Random("shipped 1")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "media"
        folder.mkdir()
        lines = ""
        for i in range(60):
            skill = SKILLS[i % 6]
            made = make_data.held_out(rng, i % 12 >= 6, skill)
            row = make_data.row_of(made, f"{i:02d}", folder) | {"task": skill}
            lines += json.dumps(row, ensure_ascii=False) + "\n"
        with zipfile.ZipFile(sys.argv[1], "w", zipfile.ZIP_STORED) as packed:
            packed.writestr(zipfile.ZipInfo("rows.jsonl", _DATE), lines)
            for file in sorted(folder.iterdir()):
                packed.writestr(zipfile.ZipInfo(f"media/{file.name}", _DATE), file.read_bytes())


if __name__ == "__main__":
    main()

"""Writes a finished stage as the model that comes with the package: bfloat16 weights, tokenizer,
templates, pixel settings. Its card, README.md, is written by hand and stays.

Usage: python make_package.py output/base/stage4 ../../ernie_tune/data/assets/ernie-4.5-vl-nano
"""

from __future__ import annotations

import sys
from pathlib import Path

from ernie_tune import AutoModel, AutoProcessor


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    AutoModel.from_pretrained(source).save_pretrained(target, dtype="bfloat16")
    AutoProcessor.from_pretrained(source).save_pretrained(target)
    for file in sorted(target.iterdir()):
        print(f"{file.stat().st_size:>10,} {file.name}")


if __name__ == "__main__":
    main()

"""Makes what the first stage starts from: a tokenizer of its own and fresh weights, in one folder.
Knows ernie_tune's public API.

Usage: python make_fresh.py --out output/base/fresh --text output/base/data/words.jsonl
../../README.md …
Text files are read as they are, .jsonl files as rows of messages.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ernie_tune import AutoModel, preset
from ernie_tune.data.processor import Processor
from ernie_tune.data.vocabulary import tokenizer_files, train_pieces, with_special_tokens

PIECES = 2438  # and ten special tokens: 2,448 = 16 * 153; `widen.py` adds 464 later
_CJK = re.compile("[\u4e00-\u9fff]")


def lines(paths: list[Path]) -> Iterator[str]:
    """Questions and answers of rows; lines of other files."""
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            if path.suffix == ".jsonl":
                yield from (
                    m["content"].replace("<image>", "").replace("<video>", "") for m in json.loads(line)["messages"]
                )
            elif line.strip():
                yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    text = [
        part.replace("<think>", "").replace("</think>", "")
        for line in lines(o.text)
        for part in line.split("\n")
        if part
    ]
    seen = Counter(c for part in text for c in _CJK.findall(part))
    print(f"{len(text):,} lines, {len(seen):,} Chinese characters")
    pieces = train_pieces(
        text, PIECES, character_coverage=0.9995, required_chars="".join(c for c, n in seen.items() if n >= 3)
    )
    files = tokenizer_files(with_special_tokens(pieces))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        processor = Processor.from_pretrained(folder, max_pixels=200_704).with_videos(max_pixels=12_544, max_frames=16)
        tokenizer = processor.tokenizer
        config = preset(o.preset).replace(vocab_size=tokenizer.vocab_size, tokens=tokenizer.token_ids())
        model = AutoModel.from_config(config, seed=o.seed)
        model.save_pretrained(o.out, dtype="float32")
        processor.save_pretrained(o.out)
    print(f"{o.out}: {sum(int(np.prod(p.shape)) for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()

"""Makes what the reader starts from: a tokenizer of the rows' own words and fresh weights, in one
folder. Knows ernie_tune's public API.

Usage: python examples/rag/make_reader.py [--rows output/rag_data/train.jsonl] [--out
output/rag_data/fresh]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np

from ernie_tune import AutoModel, preset
from ernie_tune.data.processor import Processor
from ernie_tune.data.vocabulary import tokenizer_files, train_pieces, with_special_tokens

PIECES = 1200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("output/rag_data/train.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("output/rag_data/fresh"))
    parser.add_argument("--seed", type=int, default=1)
    o = parser.parse_args()
    rows = [json.loads(line) for line in o.rows.read_text(encoding="utf-8").splitlines()[:6000]]
    text = [line for row in rows for message in row["messages"] for line in message["content"].split("\n")]
    files = tokenizer_files(with_special_tokens(train_pieces(text, PIECES, character_coverage=1.0)))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        processor = Processor.from_pretrained(folder, max_pixels=50_176)
        # tiny-b made smaller, and without experts: text alone does not need two kinds of them
        config = preset("tiny-b").replace(
            vocab_size=-(-processor.tokenizer.vocab_size // 16) * 16,
            tokens=processor.tokenizer.token_ids(),
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=3,
            num_attention_heads=3,
            num_key_value_heads=3,
            moe=None,
        )
        model = AutoModel.from_config(config, seed=o.seed)
        model.save_pretrained(o.out, dtype="float32")
        processor.save_pretrained(o.out)
    print(f"{o.out}: {sum(int(np.prod(p.shape)) for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()

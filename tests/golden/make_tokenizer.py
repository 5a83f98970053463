"""Train the tokenizers shipped in `ernie_tune/data/assets` from the text in
`tests/golden/tokenizer_text`, reproducibly.

    python tests/golden/make_tokenizer.py ernie_tune/data/assets

Every word of that text was written for this project. sentencepiece 0.2.3 gives the shipped bytes;
other versions break ties otherwise.
Refuses to know: the network, random numbers, the models the tokenizers serve.
`ernie_tune/data/vocabulary.py` makes them of that text.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from ernie_tune.data.vocabulary import tokenizer_files, train_pieces, with_special_tokens

TEXT = Path(__file__).parent / "tokenizer_text"
# stands between Chinese words in training, so that no piece spans two words; never part of a piece
JOINT = "\u241f"
# of every prompt, without a space before them
FRAME_WORDS = ("User:", "Assistant:", "Picture", "Video")
FRAME_WEIGHT = 40
WORD_WEIGHT = 4  # a listed word counts as often as a word that appears in four sentences

# before the special tokens, which `vocabulary.py` puts behind them
PIECES = {"small": 8000, "tiny": 600}


def required_characters(name: str) -> str:
    """Characters that get a piece of their own: printable ASCII; for "small" also CJK punctuation
    and the 3755 hanzi of GB 2312 level 1.
    """
    ascii_chars = "".join(chr(c) for c in range(0x21, 0x7F))
    if name == "tiny":
        return ascii_chars
    level_one = bytes(
        b for row in range(0xB0, 0xD8) for col in range(0xA1, 0xFF) if (row, col) < (0xD7, 0xFA) for b in (row, col)
    )
    return ascii_chars + "，。、；：？！“”‘’（）《》【】…—·￥°±×÷≤≥≠√π²³％～" + level_one.decode("gb2312")


def corpus(name: str) -> Iterator[str]:
    """Training lines: the sentences, the listed words repeated (with a capital once), every
    required character. "tiny" learns English only.
    """
    for line in (TEXT / "sentences.txt").read_text(encoding="utf-8").splitlines():
        if name == "small" or line.isascii():
            yield line
    characters = required_characters(name)
    yield from (JOINT.join(characters[first : first + 64]) for first in range(0, len(characters), 64))
    for word in FRAME_WORDS:
        yield from (word,) * FRAME_WEIGHT
    english = (TEXT / "words_en.txt").read_text(encoding="utf-8").split()
    for first in range(0, len(english), 16):
        words = english[first : first + 16]
        yield from (" " + " ".join(words),) * WORD_WEIGHT
        yield " ".join(word.capitalize() for word in words)
    if name == "small":
        chinese = (TEXT / "words_zh.txt").read_text(encoding="utf-8").split()
        for first in range(0, len(chinese), 16):
            yield from (JOINT.join(chinese[first : first + 16]),) * WORD_WEIGHT


def train(name: str) -> bytes:
    """The sentencepiece model with its special tokens, as bytes."""
    return with_special_tokens(train_pieces(corpus(name), PIECES[name], pretokenization_delimiter=JOINT))


def main(assets: Path) -> None:
    for name in PIECES:
        folder = assets / name
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in tokenizer_files(train(name)).items():
            (folder / file).write_bytes(content)
            print(f"{folder / file}: {len(content)} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

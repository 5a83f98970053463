"""Train the tokenizers shipped in `ernie_tune/data/assets` from the text in `tests/golden/tokenizer_text`, reproducibly.

    python tests/golden/make_tokenizer.py ernie_tune/data/assets

Every word of that text was written for this project. sentencepiece 0.2.3 gives the shipped bytes; other versions break ties otherwise.
Refuses to know: the network, random numbers, the models the tokenizers serve.
Architecture.md 8.1 fixes the kind: sentencepiece BPE, byte fallback, single digits, no dummy prefix, no normalisation.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece

TEXT = Path(__file__).parent / "tokenizer_text"
JOINT = "\u241f"  # stands between Chinese words in training, so that no piece spans two words; never part of a piece
FRAME_WORDS = ("User:", "Assistant:", "Picture", "Video")  # of every prompt, without a space before them
FRAME_WEIGHT = 40
WORD_WEIGHT = 4  # a listed word counts as often as a word that appears in four sentences

# Special tokens by id; the ids are those of the presets "small" and "tiny-*". Architecture.md 8.1 names them.
MEDIA = ("<|IMAGE_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>")
OTHERS = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<think>", "</think>", "<|VIDEO_PLACEHOLDER|>")
SPECIALS = {
    "small": dict(zip((*MEDIA, *OTHERS), range(8000, 8010), strict=True)),
    "tiny": dict(zip((*MEDIA, *OTHERS), (602, 600, 601, 603, 604, 606, 607, 608, 609, 605), strict=True)),
}
PIECES = {"small": 8000, "tiny": 600}
ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
}


def required_characters(name: str) -> str:
    """Characters that get a piece of their own: printable ASCII; for "small" also CJK punctuation and the 3755 hanzi of GB 2312 level 1."""
    ascii_chars = "".join(chr(c) for c in range(0x21, 0x7F))
    if name == "tiny":
        return ascii_chars
    level_one = bytes(
        b for row in range(0xB0, 0xD8) for col in range(0xA1, 0xFF) if (row, col) < (0xD7, 0xFA) for b in (row, col)
    )
    return ascii_chars + "，。、；：？！“”‘’（）《》【】…—·￥°±×÷≤≥≠√π²³％～" + level_one.decode("gb2312")


def corpus(name: str) -> Iterator[str]:
    """Training lines: the sentences, the listed words repeated (with a capital once), every required character. "tiny" learns English only."""
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
    """The sentencepiece model, as bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(name),
        model_writer=model,
        model_type="bpe",
        vocab_size=PIECES[name],
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        pretokenization_delimiter=JOINT,
        character_coverage=1.0,
        max_sentencepiece_length=12,
        unk_surface="\ufffd",
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def side_files(name: str) -> dict[str, str]:
    """The JSON files beside the model: which strings are special, and which token plays which role."""
    special = SPECIALS[name]
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, **special}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 4096,
        **ROLES,
        "additional_special_tokens": list(special),
        "added_tokens_decoder": {
            str(i): {"content": token, **entry} for token, i in sorted(ids.items(), key=lambda item: item[1])
        },
    }
    files = {
        "added_tokens.json": special,
        "special_tokens_map.json": {**ROLES, "additional_special_tokens": list(special)},
        "tokenizer_config.json": config,
    }
    return {file: json.dumps(content, indent=2, ensure_ascii=False) + "\n" for file, content in files.items()}


def main(assets: Path) -> None:
    for name in PIECES:
        folder = assets / name
        folder.mkdir(parents=True, exist_ok=True)
        model = train(name)
        (folder / "tokenizer.model").write_bytes(model)
        for file, text in side_files(name).items():
            (folder / file).write_text(text, encoding="utf-8")
        pieces = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
        print(f"{folder}: {pieces} pieces, {len(model)} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

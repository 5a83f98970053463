"""Makes tokenizers that every server of ERNIE-4.5-VL can serve: sentencepiece pieces, then text
tokens, then the tokens of pictures.

FastDeploy reads a vocabulary by two rules that a folder does not show. It gives no probability to
ids from `len(tokenizer.model)` on, so a token that only a JSON file names is never generated; and
it sends every id from the image placeholder's on to the vision experts. So all special tokens lie
inside the model file, those of text below the placeholder, the markers of pictures and clips above
it.

    files = tokenizer_files(with_special_tokens(train_pieces(lines, 8000)))
    for name, content in files.items():
        (folder / name).write_bytes(content)

Refuses to know: chat formats, images, where text comes from, models (they need `vocab_size` rows).
Source: FastDeploy e53f518 (`--ori_vocab_size`, `prepare_vl_moe_meta`); the ids of the releases.
"""

from __future__ import annotations

import io
import json
import re
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import sentencepiece

from ernie_tune.config.language import say
from ernie_tune.data.tokenizer import (
    ADDED_FILE,
    CONFIG_FILE,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    MODEL_FILE,
    ROLES_FILE,
    USER_DEFINED,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    model_pieces,
)

TEXT_TOKENS = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<think>", "</think>")
MEDIA_TOKENS = (IMAGE, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END, VIDEO)
ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
}
_MARK = re.compile("<.+>")  # runs of spaces and the like may be user-defined pieces too
_PIECE, _TEXT, _SCORE, _KIND = 1, 1, 2, 3  # fields of sentencepiece's ModelProto and of its pieces


def train_pieces(lines: Iterable[str], pieces: int, **options: Any) -> bytes:
    """A sentencepiece model (BPE) of `pieces` pieces, ids 0 `<unk>`, 1 `<s>`, 2 `</s>`, then bytes,
    then text.

    It gives every string back unchanged: bytes for unknown characters, single digits, no dummy
    prefix, no normalisation. `options`: sentencepiece's own, over these. One thread, no sampling:
    the same bytes each time. Raises RuntimeError (sentencepiece) where the text has too few
    different pieces.
    """
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "vocab_size": pieces,
        "byte_fallback": True,
        "split_digits": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "allow_whitespace_only_pieces": True,
        "character_coverage": 1.0,
        "max_sentencepiece_length": 12,
        "unk_surface": "\ufffd",
        "pad_id": -1,
        "num_threads": 1,
        "minloglevel": 2,
    }
    trainer = sentencepiece.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(lines), model_writer=model, **{**settings, **options})
    return model.getvalue()


def with_special_tokens(model: bytes, text: Sequence[str] = TEXT_TOKENS, media: Sequence[str] = MEDIA_TOKENS) -> bytes:
    """A sentencepiece model with special tokens behind its pieces: those of `text`, then those of
    `media`.

    `media` starts with the image placeholder, from whose id on FastDeploy routes to the vision
    experts. The pieces keep their ids. More text tokens (tool marks, say) go into `text`. Raises
    ValueError for a token that the model already has, and for `media` that do not start with the
    image placeholder.
    """
    tokens = [*text, *media]
    held = {piece for piece, _ in model_pieces(model)}
    twice = [token for i, token in enumerate(tokens) if token in held or token in tokens[:i]]
    if twice:
        raise ValueError(
            say(
                f"special tokens ({twice}) must be new to the model and differ; start from plain pieces",
                f"特殊 token（{twice}）须为模型中没有的，且互不相同；请从普通词片开始",
            )
        )
    if not media or media[0] != IMAGE:
        raise ValueError(
            say(
                f"media ({list(media)[:1]}) must start with {IMAGE}: FastDeploy takes every id from its on for vision; "
                "put it first",
                f"媒体 token（{list(media)[:1]}）须以 {IMAGE} 开头：FastDeploy 把从它起的所有编号都当作视觉；请把它放在最前",
            )
        )
    # Repeated fields of a serialised message may lie anywhere, so pieces are added by appending
    # them.
    return model + b"".join(_field(_PIECE, _piece(token)) for token in tokens)


def tokenizer_files(model: bytes, max_tokens: int = 4096) -> dict[str, bytes]:
    """All files of a tokenizer's folder by name, for a model with special tokens: `Tokenizer(files,
    "")` reads them.

    `max_tokens`: the longest prompt that other tools are told of.
    """
    pieces = list(model_pieces(model))
    special = {piece: i for i, (piece, kind) in enumerate(pieces) if kind == USER_DEFINED and _MARK.fullmatch(piece)}
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    ids = {piece: i for i, (piece, _) in enumerate(pieces[:3])} | special
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": True,
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_tokens,
        **ROLES,
        "additional_special_tokens": list(special),
        "added_tokens_decoder": {str(i): {"content": token, **entry} for token, i in ids.items()},
    }
    side = {
        ADDED_FILE: special,
        ROLES_FILE: {**ROLES, "additional_special_tokens": list(special)},
        CONFIG_FILE: config,
    }
    written = {
        name: (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode() for name, content in side.items()
    }
    return {MODEL_FILE: model, **written}


def _piece(token: str) -> bytes:
    kind = bytes([_KIND << 3, USER_DEFINED])
    return _field(_TEXT, token.encode()) + bytes([_SCORE << 3 | 5]) + struct.pack("<f", 0.0) + kind


def _field(number: int, content: bytes) -> bytes:
    """A field of bytes: its tag, its length as a varint, its content."""
    length, size = len(content), b""
    while length >= 0x80:
        size += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content

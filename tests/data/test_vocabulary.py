"""data/vocabulary.py: tokenizers whose special tokens FastDeploy can generate and routes rightly;
and that older ones still load.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import sentencepiece

from ernie_tune.data.processor import Processor
from ernie_tune.data.tokenizer import Tokenizer
from ernie_tune.data.vocabulary import MEDIA_TOKENS, TEXT_TOKENS, tokenizer_files, train_pieces, with_special_tokens

OLD = Path(__file__).parents[1] / "golden" / "tokenizer_old"
LINES = ["a red circle and a blue square", "User: how many? 12"] * 10


def made(**options: object) -> bytes:
    return train_pieces(LINES, 300, hard_vocab_limit=False, **options)


@pytest.mark.parametrize("text", [TEXT_TOKENS, (*TEXT_TOKENS, "<tool_call>", "</tool_call>")])
def test_special_tokens_lie_in_the_model_text_below_the_placeholder_markers_above(
    tmp_path: Path, text: tuple[str, ...]
) -> None:
    plain = made()
    for name, content in tokenizer_files(with_special_tokens(plain, text), max_tokens=64).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = Tokenizer.from_folder(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    bare = sentencepiece.SentencePieceProcessor(model_proto=plain)
    count = bare.get_piece_size()
    assert tokenizer.vocab_size == model.get_piece_size() == count + len(text) + len(MEDIA_TOKENS)
    assert [model.id_to_piece(i) for i in range(count)] == [bare.id_to_piece(i) for i in range(count)]
    image = tokenizer.token_id("<|IMAGE_PLACEHOLDER|>")
    assert max(tokenizer.token_id(t) for t in text) == image - 1
    assert sorted(tokenizer.token_id(t) for t in MEDIA_TOKENS) == [*range(image, image + 6)]
    assert all(i < image for token, i in tokenizer.special.items() if token not in MEDIA_TOKENS)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 64
    # sentencepiece alone, as FastDeploy loads it, finds them in a text; in a user's words ours
    # never does
    prompt = "<think>a red circle</think><|IMAGE_START|>"
    wanted = [tokenizer.token_id(token) for token in ("<think>", "</think>", "<|IMAGE_START|>")]
    assert [i for i in model.encode(prompt) if i >= count] == wanted
    assert not set(tokenizer.encode(prompt)) & set(wanted)
    assert tokenizer.decode(tokenizer.encode(prompt)) == prompt


def test_training_repeats_itself_and_takes_options() -> None:
    assert made() == made()
    assert sentencepiece.SentencePieceProcessor(model_proto=made(split_digits=False)).encode("12") != (
        sentencepiece.SentencePieceProcessor(model_proto=made()).encode("12")
    )


def test_refuses_tokens_twice_and_another_first_marker() -> None:
    with pytest.raises(ValueError, match=r"special tokens \(\['<s>', '<a>'\]\) must be new"):
        with_special_tokens(made(), ("<s>", "<a>", "<a>"))
    with pytest.raises(ValueError, match=r"media \(\['<\|IMAGE_START\|>'\]\) must start with <\|IMAGE_PLACEHOLDER\|>"):
        with_special_tokens(made(), media=MEDIA_TOKENS[1:])


def test_tokenizers_of_earlier_versions_load_and_make_the_same_text(tmp_path: Path) -> None:
    """Their special tokens lie in the JSON files alone, in another order."""
    old, new = Processor(Tokenizer.from_folder(OLD)), Processor.bundled("tiny")
    assert (old.tokens.image, old.tokens.image_start, old.tokens.video_end) == (602, 600, 604)
    assert old.stop_ids == (2, 607)
    dialogue = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4", "reasoning_content": "x"}]
    rows = [p.encode(dialogue).row.input_ids_L.tolist() for p in (old, new)]
    assert [[p.tokenizer.decode([i]) for i in ids] for p, ids in zip((old, new), rows, strict=True)] == [
        [new.tokenizer.decode([i]) for i in rows[1]]
    ] * 2
    old.save_pretrained(tmp_path)
    assert dataclasses.asdict(Processor.from_pretrained(tmp_path).tokens) == dataclasses.asdict(old.tokens)

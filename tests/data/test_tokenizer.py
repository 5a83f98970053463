"""data/tokenizer.py: lossless text, no forged special tokens, streaming, folder formats; and the
shipped vocabularies.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ernie_tune.data.tokenizer import ASSETS, AutoTokenizer, Tokenizer
from ernie_tune.data.vocabulary import tokenizer_files
from ernie_tune.models.presets import preset

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = Tokenizer.bundled("small")
TINY = Tokenizer.bundled("tiny")

# Text of every kind the vocabularies treat apart: pieces, bytes, the space mark, digits, and
# strings that look like tokens.
FRAGMENTS = st.sampled_from(
    [
        "User: ",
        "图片",
        "7",
        " ",
        "  ",
        "\n",
        "\t",
        "\0",
        "\u2581",
        "🙂",
        "é",
        "\ufffd",
        "<0x0A>",
        "<s>",
        "</s>",
        "<",
        "<|IMAGE_START|>",
        "<think>",
    ]
)
TEXT = st.one_of(st.text(), st.lists(FRAGMENTS).map("".join))


def trained(**changes: object) -> bytes:
    """A sentencepiece model of a few pieces, lossless unless `changes` say otherwise."""
    options = {
        "model_type": "bpe",
        "vocab_size": 300,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "hard_vocab_limit": False,
        "minloglevel": 2,
    }
    model = io.BytesIO()
    lines = iter(["a red circle and a blue square"] * 10)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**options, **changes})
    return model.getvalue()


@pytest.mark.parametrize("tokenizer", [SMALL, TINY], ids=["small", "tiny"])
@settings(max_examples=150, deadline=None)
@given(text=TEXT)
@example(text="")
@example(text="a\u2581\u2581 b\u2581")
@example(text="\r\n \u2028\u3000\u200d\x7f")
@example(text="👨‍👩‍👧 e\u0301 \U0010ffff")
def test_every_string_comes_back_and_none_forges_a_token(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())
    stream = tokenizer.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.flush() == text


def test_special_strings_are_tokens_only_in_trusted_text() -> None:
    text = "a<|IMAGE_START|>b</s></s"
    ids = SMALL.encode(text, allow_special=True)
    assert [i for i in ids if i in SMALL.special.values()] == [8005, 2]
    assert SMALL.decode(ids) == text
    assert SMALL.decode(ids, skip_special=True) == "ab</s"
    assert SMALL.decode(ids, skip_special=True, keep=("</s>",)) == "ab</s></s"
    nested = "<|IMAGE_<|IMAGE_START|>START|><<s>s>"
    assert not set(SMALL.encode(nested)) & set(SMALL.special.values())


def test_streaming_holds_a_character_until_it_is_whole() -> None:
    ids = SMALL.encode("🙂")
    assert len(ids) == 4  # four bytes, no piece
    stream = SMALL.stream()
    assert [stream.push(i) for i in ids] == ["", "", "", "🙂"]
    assert stream.flush() == ""


def test_broken_bytes_and_missing_ids_read_as_replacement_characters() -> None:
    first, second, *_ = SMALL.encode("🙂")
    eos = SMALL.eos_id
    assert SMALL.decode([first, second, eos]) == "\ufffd</s>"
    stream = SMALL.stream()
    assert [stream.push(first), stream.push(second), stream.push(eos), stream.push(first), stream.flush()] == [
        "",
        "",
        "\ufffd</s>",
        "",
        "\ufffd",
    ]
    assert SMALL.decode([8191, 10**6]) == "\ufffd\ufffd"  # rows of the model that no token uses


def test_errors_of_encode_decode_and_lookup() -> None:
    with pytest.raises(ValueError, match=r"character 2 is a lone surrogate"):
        SMALL.encode("ab\ud83d")
    with pytest.raises(ValueError, match=r"token id \(-100\) must not be negative"):
        SMALL.decode([-100])
    with pytest.raises(ValueError, match=r"token \('<nope>'\) must be in the vocabulary of .*small"):
        SMALL.token_id("<nope>")
    with pytest.raises(ValueError, match=r"bundled tokenizer \('big'\)"):
        Tokenizer.bundled("big")


def test_bundled_ids_are_those_of_the_presets() -> None:
    assert SMALL.token_ids() == preset("small").tokens
    assert TINY.token_ids() == preset("tiny-a").tokens == preset("tiny-c").tokens
    assert SMALL.vocab_size <= preset("small").vocab_size
    assert TINY.vocab_size <= preset("tiny-a").vocab_size
    assert (SMALL.eos_id, SMALL.token_id("<s>"), SMALL.token_id("<unk>")) == (2, 1, 0)
    assert SMALL.token_id("<|end_of_sentence|>") == 8001
    # Ids without a gap: libraries that number added tokens themselves then agree.
    assert sorted(SMALL.special.values()) == [0, 1, 2, *range(8000, 8010)]


def test_small_vocabulary_knows_common_hanzi_digits_and_words() -> None:
    hanzi = "".join(
        chr(c)
        for c in range(0x4E00, 0x9FA6)
        if 0xB0A1 <= int.from_bytes(chr(c).encode("gb2312", "ignore") or b"\0", "big") <= 0xD7F9
    )
    assert len(hanzi) == 3755  # GB 2312 level 1
    assert all(len(SMALL.encode(character)) == 1 for character in hanzi)
    assert len(SMALL.encode("2025")) == 4  # digits stay single
    assert len(SMALL.encode("请描述这张图片")) <= 4
    assert len(SMALL.encode("User: What is the number in the picture?")) <= 11
    assert (ASSETS / "small" / "tokenizer.model").stat().st_size < 300_000


def test_shipped_tokenizers_are_what_the_script_trains() -> None:
    spec = importlib.util.spec_from_file_location("make_tokenizer", GOLDEN / "make_tokenizer.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for name in ("small", "tiny"):
        new = sentencepiece.SentencePieceProcessor(model_proto=script.train(name))
        old = sentencepiece.SentencePieceProcessor(model_file=str(ASSETS / name / "tokenizer.model"))
        pieces = [{model.id_to_piece(i) for i in range(model.get_piece_size())} for model in (new, old)]
        # versions of sentencepiece break ties differently
        assert len(pieces[0] - pieces[1]) <= 0.01 * len(pieces[1])
        assert old.get_piece_size() == {"small": 8010, "tiny": 610}[name]
        for file, content in tokenizer_files((ASSETS / name / "tokenizer.model").read_bytes()).items():
            assert (ASSETS / name / file).read_bytes() == content


def test_special_tokens_come_from_the_model_and_from_every_side_file(tmp_path: Path) -> None:
    model = trained(user_defined_symbols="<mask:1>,  ,<|old|>", control_symbols="<ctrl>")
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "added_tokens.json").write_text('{"<|IMAGE_PLACEHOLDER|>": 1000}')
    decoder = {"1001": {"content": "<|VIDEO_PLACEHOLDER|>"}, "1002": {"content": "<|stop|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "pad_token": "<s>"}))
    roles = {"eos_token": {"content": "<|stop|>"}, "additional_special_tokens": ["red"]}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(roles))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    piece = sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id
    assert {
        token: piece(token) for token in ("<mask:1>", "<|old|>", "<ctrl>", "<unk>", "<s>", "</s>")
    }.items() <= tokenizer.special.items()
    assert (tokenizer.special["<|IMAGE_PLACEHOLDER|>"], tokenizer.special["<|stop|>"]) == (1000, 1002)
    assert "  " not in tokenizer.special  # a run of spaces is text, whatever its kind
    assert tokenizer.eos_id == 1002
    ids = tokenizer.token_ids()
    assert (ids.pad, ids.bos, ids.image, ids.video, ids.video_start) == (1, 1, 1000, 1000, None)
    assert tokenizer.vocab_size == 1003
    for text in ("<mask:1>", "a<|old|>b", "  "):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert piece("<mask:1>") not in tokenizer.encode("<mask:1>")
    assert tokenizer.encode("<mask:1>", allow_special=True) == [piece("<mask:1>")]


def test_video_has_its_own_placeholder_only_where_config_json_says_so(tmp_path: Path) -> None:
    SMALL.save(tmp_path)
    (tmp_path / "config.json").write_text('{"im_patch_id": 8004}')
    assert Tokenizer.from_folder(tmp_path).token_ids().video == 8004
    (tmp_path / "config.json").write_text('{"image_token_id": 8004, "video_token_id": 8009}')
    assert Tokenizer.from_folder(tmp_path).token_ids().video == 8009


def test_save_copies_the_files_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    SMALL.save(folder)
    shipped = {file.name: file.read_bytes() for file in (ASSETS / "small").iterdir()}
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == shipped
    SMALL.save(folder, chat_template="{{ messages }}")
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config == {**SMALL.config, "chat_template": "{{ messages }}"}
    assert {file.name for file in folder.iterdir()} == set(shipped)
    assert Tokenizer.from_folder(folder).special == SMALL.special


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold tokenizer.model or tokenizer.json"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=r"tokenizer.model \(42 bytes\) must be a sentencepiece model"):
        Tokenizer.from_folder(tmp_path)
    SMALL.save(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<a>": ')
    with pytest.raises(ValueError, match=r"added_tokens.json must be JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "added_tokens.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"added_tokens.json \(list\) must hold a JSON object"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"add_dummy_prefix": True}, {"byte_fallback": False, "vocab_size": 40}, {"normalization_rule_name": "nmt_nfkc"}],
)
def test_vocabularies_that_lose_text_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must give text back unchanged"):
        Tokenizer({"tokenizer.model": trained(**change)}, "folder")


VOCABULARY = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)} | {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "▁": 300,
    "a": 301,
    "▁a": 302,
}
SPEC = {
    "model": {"type": "BPE", "byte_fallback": True, "vocab": VOCABULARY, "merges": [["▁", "a"]]},
    "added_tokens": [{"id": i, "content": token, "special": True} for i, token in enumerate(["<unk>", "<s>", "</s>"])],
}


class FakeBackend:
    """Stands in for `tokenizers.Tokenizer`: longest piece first, bytes for the rest. It would see
    special strings, as the real one does.
    """

    @staticmethod
    def from_str(text: str) -> FakeBackend:
        assert json.loads(text) == SPEC
        return FakeBackend()

    def encode(self, text: str, add_special_tokens: bool) -> types.SimpleNamespace:
        assert not add_special_tokens
        ids: list[int] = []
        while text:
            text = text.replace(" ", "▁")
            piece = next(
                (
                    piece
                    for piece in sorted(VOCABULARY, key=len, reverse=True)
                    if text.startswith(piece) and "0x" not in piece
                ),
                None,
            )
            ids += [3 + byte for byte in text[0].encode()] if piece is None else [VOCABULARY[piece]]
            text = text[len(piece or text[0]) :]
        return types.SimpleNamespace(ids=ids)


def test_tokenizer_json_goes_through_the_optional_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(SPEC), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", types.SimpleNamespace(Tokenizer=FakeBackend))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode(" aé") == [302, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode(tokenizer.encode("a </s> é")) == "a </s> é"
    assert 2 not in tokenizer.encode("</s>")
    assert tokenizer.encode("</s>", allow_special=True) == [2]
    tokenizer.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_tokenizer_json_without_the_package_or_of_another_kind_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(SPEC), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizer.json needs the package tokenizers; pip install tokenizers"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    with pytest.raises(ValueError, match=r"\(type 'WordPiece', byte_fallback None\) must be BPE with byte_fallback"):
        Tokenizer.from_folder(tmp_path)

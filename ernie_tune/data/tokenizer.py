"""Text <-> token ids: `tokenizer.model` (sentencepiece) or `tokenizer.json` (byte-fallback BPE,
optional package `tokenizers`).

Special tokens are looked up in the folder's files, never assumed. Their strings inside ordinary
text stay ordinary text, so no user can forge a marker. Every string comes back unchanged:
decode(encode(x)) == x.

Refuses to know: chat formats, images, models, the network (a hub name must be downloaded first),
paddle.
Source: the tokenizer code beside the released weights.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import sentencepiece

from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.foreign import json_object, reading
from ernie_tune.config.language import say
from ernie_tune.models.config import TokenIds
from ernie_tune.models.presets import shipped_folder

ASSETS = Path(__file__).parent / "assets"
BUNDLED = ("small", "tiny")  # vocabularies of the presets "small" and "tiny-*"

MODEL_FILE, JSON_FILE, CONFIG_FILE = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
ADDED_FILE, ROLES_FILE = "added_tokens.json", "special_tokens_map.json"
# Where a chat template may lie besides tokenizer_config.json: as text, and as an object's
# "chat_template".
TEMPLATE_FILE, TEMPLATE_JSON_FILE = "chat_template.jinja", "chat_template.json"
FILES = (MODEL_FILE, JSON_FILE, CONFIG_FILE, ADDED_FILE, ROLES_FILE, TEMPLATE_FILE, TEMPLATE_JSON_FILE)

# Names of the released vocabularies; a folder's special_tokens_map.json may give a role to another
# token.
IMAGE, VIDEO = "<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>"
IMAGE_START, IMAGE_END = "<|IMAGE_START|>", "<|IMAGE_END|>"
VIDEO_START, VIDEO_END = "<|VIDEO_START|>", "<|VIDEO_END|>"
_MOST_SPECIAL = 20_000  # the releases have some 1,100
_ROLE_DEFAULTS = {
    "pad_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
}

SPACE = "\u2581"  # how a piece writes a space
UNKNOWN = "\ufffd"  # what an id without a token reads as
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_PROBE = "a  ☃\n1 "  # shows a dummy prefix, normalisation, and missing byte fallback
_KIND_UNKNOWN, _KIND_CONTROL, USER_DEFINED, _KIND_BYTE = (
    2,
    3,
    4,
    6,
)  # SentencePiece.Type in sentencepiece's model format


class _Vocabulary(NamedTuple):
    """What both file formats come down to."""

    encode: Callable[[str], list[int]]  # text without special tokens
    pieces: dict[int, str]
    special: dict[str, int]
    byte_of: dict[int, int]  # ids of byte pieces


class Tokenizer:
    """Text <-> ids of one vocabulary. Make one with `from_folder` or `bundled`; it keeps the
    folder's files so that `save` copies them.
    """

    def __init__(self, files: Mapping[str, bytes], where: str, separate_video: bool = False) -> None:
        """`files`: contents by name, `where`: their folder, for messages. `separate_video`: videos
        have a placeholder of their own.

        Raises ValueError for broken files or a vocabulary that does not give text back, ImportError
        where `tokenizers` is needed.
        """
        self.where = where
        self._files = dict(files)
        self._separate_video = separate_video
        self.config: dict[str, Any] = read_json(files, CONFIG_FILE, where)
        self._vocabulary = (
            _read_model(files[MODEL_FILE], where) if MODEL_FILE in files else _read_hf(files[JSON_FILE], where)
        )
        self._roles = {**_ROLE_DEFAULTS, **_roles(self.config), **_roles(read_json(files, ROLES_FILE, where))}
        self.special: dict[str, int] = self._read_special()
        self._text_of = {**self._vocabulary.pieces, **{i: token for token, i in self.special.items()}}
        self._id_of = {piece: i for i, piece in self._vocabulary.pieces.items()} | self.special
        self._special_ids = frozenset(self.special.values())
        tokens = "|".join(re.escape(token) for token in sorted(self.special, key=len, reverse=True)) or "(?!)"
        self._split_special = re.compile(f"({tokens})")
        self._find_special = re.compile(f"(?={tokens})")  # overlapping ones too
        back = self.decode(self.encode(_PROBE))
        if back != _PROBE:
            raise ValueError(
                say(
                    f"tokenizer in {where} must give text back unchanged, but {_PROBE!r} came back as {back!r}"
                    "; train it with byte_fallback, without dummy prefix and with normalization_rule_name "
                    "'identity'",
                    f"{where} 的分词器须能原样还原文本，但 {_PROBE!r} 变成了 {back!r}；训练时请用 "
                    "byte_fallback、不加前缀空格、normalization_rule_name 为 'identity'",
                )
            )

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a model folder. Raises ValueError if it holds neither tokenizer.model nor
        tokenizer.json, else like the constructor.
        """
        path = shipped_folder(path) or path
        folder = folder_with_tokenizer(Path(path))
        files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
        if not folder.exists():
            raise ValueError(
                say(
                    f"{folder} does not exist; give the folder of a model or of a finished run",
                    f"{folder} 不存在；请给出模型文件夹，或已完成运行的输出目录",
                )
            )
        if MODEL_FILE not in files and JSON_FILE not in files:
            raise ValueError(
                say(
                    f"tokenizer folder ({folder}) must hold {MODEL_FILE} or {JSON_FILE}; give the folder of a "
                    "downloaded model",
                    f"分词器文件夹（{folder}）中须有 {MODEL_FILE} 或 {JSON_FILE}；请给出已下载模型的文件夹",
                )
            )
        # Only the native transformers conversion has a second placeholder, and only its config.json
        # says so.
        config = Path(path) / "config.json"
        native = {"config.json": config.read_bytes()} if config.is_file() else {}
        separate = "video_token_id" in read_json(native, "config.json", str(folder))
        with reading(folder):
            return cls(files, str(folder), separate_video=separate)

    from_pretrained = from_folder

    @classmethod
    def bundled(cls, name: str = "small") -> Tokenizer:
        """The tokenizer shipped for the preset "small" (8000 zh/en pieces) or the "tiny-*" presets
        (600), made by `vocabulary.py`. Raises ValueError for other names.
        """
        if name not in BUNDLED:
            raise ValueError(
                say(
                    f"bundled tokenizer ({name!r}) must be one of {BUNDLED}; use from_folder for a model's own",
                    f"内置分词器（{name!r}）须为 {BUNDLED} 之一；模型自带的请用 from_folder",
                )
            )
        return cls.from_folder(ASSETS / name)

    @property
    def vocab_size(self) -> int:
        """Highest id + 1: the rows a model needs."""
        return max(self._text_of) + 1

    @property
    def eos_id(self) -> int:
        """Ends the last answer."""
        return self.token_id(self._roles["eos_token"])

    def token_id(self, token: str) -> int:
        """Id of one token, special or not. Raises ValueError if the vocabulary lacks it."""
        if token not in self._id_of:
            raise ValueError(
                say(
                    f"token ({token!r}) must be in the vocabulary of {self.where}; use the tokenizer of an "
                    "ERNIE-4.5-VL model",
                    f"{self.where} 的词表中须有 {token!r}；请用 ERNIE-4.5-VL 模型的分词器",
                )
            )
        return self._id_of[token]

    def token_ids(self) -> TokenIds:
        """The ids that the model treats specially; None for tokens that the vocabulary lacks."""
        image = self.special.get(IMAGE)
        return TokenIds(
            pad=self.special.get(self._roles["pad_token"]),
            bos=self.special.get(self._roles["bos_token"]),
            eos=self.special.get(self._roles["eos_token"]),
            image=image,
            image_start=self.special.get(IMAGE_START),
            image_end=self.special.get(IMAGE_END),
            video=self.special.get(VIDEO, image) if self._separate_video else image,
            video_start=self.special.get(VIDEO_START),
            video_end=self.special.get(VIDEO_END),
        )

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`. Strings of special tokens become their ids only with `allow_special`, for
        text that no user wrote.

        Raises ValueError for a lone surrogate, which no byte sequence can express.
        """
        bad = _SURROGATE.search(text)
        if bad:
            raise ValueError(
                say(
                    f"text must be valid Unicode, but character {bad.start()} is a lone surrogate ("
                    f"{bad.group()!r}); repair the source file",
                    f"文本须为合法的 Unicode，但第 {bad.start()} 个字符是孤立的代理项（{bad.group()!r}）；请修复源文件",
                )
            )
        if not allow_special:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for part in self._split_special.split(text):
            ids += [self.special[part]] if part in self.special else self._encode_ordinary(part)
        return ids

    def _encode_ordinary(self, text: str) -> list[int]:
        # A cut behind the first character of every special string: neither format can then see one
        # whole.
        cuts = [0, *(found.start() + 1 for found in self._find_special.finditer(text)), len(text)]
        ids: list[int] = []
        for first, last in pairwise(cuts):
            for i, part in enumerate(text[first:last].split(SPACE)):
                if i:  # a literal U+2581 would come back as a space: spell it in bytes
                    ids += [self._id_of[f"<0x{byte:02X}>"] for byte in SPACE.encode()]
                if part:
                    ids += self._vocabulary.encode(part)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = False, keep: Collection[str] = ()) -> str:
        """Text of `ids`. `skip_special` leaves out special tokens except those in `keep`; an id
        without a token reads as U+FFFD.

        Raises ValueError for a negative id.
        """
        return b"".join(self.token_bytes(i, skip_special, keep) for i in ids).decode("utf-8", "replace")

    def token_bytes(self, i: int, skip_special: bool = False, keep: Collection[str] = ()) -> bytes:
        """What id `i` adds to the text, in UTF-8; possibly a part of a character. Raises ValueError
        if negative.
        """
        if i < 0:
            raise ValueError(
                say(
                    f"token id ({i}) must not be negative; drop padding and ignored labels before decoding",
                    f"token id（{i}）不能为负；解码前请去掉填充与被忽略的标签",
                )
            )
        if i in self._vocabulary.byte_of:
            return bytes([self._vocabulary.byte_of[i]])
        text = self._text_of.get(i, UNKNOWN)
        if i in self._special_ids:
            return b"" if skip_special and text not in keep else text.encode()
        return text.replace(SPACE, " ").encode()

    def stream(self, skip_special: bool = False, keep: Collection[str] = ()) -> StreamDecoder:
        """A decoder for ids that arrive one by one."""
        return StreamDecoder(self, skip_special, keep)

    @property
    def files(self) -> Mapping[str, bytes]:
        """Contents of the folder's files by name, as `save` writes them."""
        return self._files

    def save(self, folder: str | os.PathLike[str], files: Mapping[str, bytes] | None = None, **config: Any) -> None:
        """Copy the tokenizer's files (`files` in their place) to `folder`, each under a temporary
        name first. `config` entries go to tokenizer_config.json.
        """
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        files = dict(self._files if files is None else files)
        if config:
            files[CONFIG_FILE] = (json.dumps({**self.config, **config}, indent=2, ensure_ascii=False) + "\n").encode()
        for name, content in files.items():
            write_atomically(target / name, content)

    def _read_special(self) -> dict[str, int]:
        added = read_json(self._files, ADDED_FILE, self.where)
        decoder = {entry["content"]: int(i) for i, entry in self.config.get("added_tokens_decoder", {}).items()}
        special = {**self._vocabulary.special, **decoder, **added}
        if len(special) > _MOST_SPECIAL:
            raise ValueError(
                say(
                    f"special tokens of {self.where} ({len(special):,}) must be at most {_MOST_SPECIAL:,}; use "
                    "the tokenizer of an ERNIE-4.5-VL model",
                    f"{self.where} 的特殊 token（{len(special):,} 个）不能超过 {_MOST_SPECIAL:,} 个；请用 ERNIE-4.5-VL 模型的分词器",
                )
            )
        # A role or "additional" token may be an ordinary piece of the model file: special by
        # declaration.
        extra = read_json(self._files, ROLES_FILE, self.where).get("additional_special_tokens", [])
        declared = [*self._roles.values(), *(_content(token) for token in extra)]
        pieces = {piece: i for i, piece in self._vocabulary.pieces.items()}
        return {**{token: pieces[token] for token in declared if token in pieces}, **special}


AutoTokenizer = Tokenizer  # the name users of other libraries look for


class StreamDecoder:
    """Ids one by one -> text, never half a character. What was pushed, joined, equals
    `Tokenizer.decode` of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = False, keep: Collection[str] = ()) -> None:
        self._tokenizer, self._skip, self._keep = tokenizer, skip_special, keep
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, i: int) -> str:
        """The text that id `i` completes; "" while a character is unfinished. Raises ValueError for
        a negative id.
        """
        return self._utf8.decode(self._tokenizer.token_bytes(i, self._skip, self._keep))

    def flush(self) -> str:
        """What is left at the end: "" or U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)


def folder_with_tokenizer(folder: Path) -> Path:
    """The folder itself; of a run's checkpoint that has no tokenizer, as the first release wrote
    them, that of the run.
    """

    def has(place: Path) -> bool:
        return any((place / name).is_file() for name in (MODEL_FILE, JSON_FILE))

    place = folder.absolute()
    of_run = place.name.startswith("checkpoint-") and not has(place) and has(place.parent)
    return folder.parent if of_run else folder


def read_json(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    """The object in the JSON file `name` of the folder `where`, {} if `files` lacks it. Raises
    ValueError naming the file.
    """
    return json_object(
        files.get(name, b"{}"), os.path.join(where, name), say("download the file again", "请重新下载该文件")
    )


def _content(token: Any) -> str:
    """Token files write a token as a string or as an object with its content."""
    return token["content"] if isinstance(token, dict) else str(token)


def _roles(config: Mapping[str, Any]) -> dict[str, str]:
    return {role: _content(config[role]) for role in _ROLE_DEFAULTS if config.get(role) is not None}


def _read_model(model: bytes, where: str) -> _Vocabulary:
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        processor.encode("a")  # an empty file makes one that is no model
    except RuntimeError as error:
        raise ValueError(
            say(
                f"{os.path.join(where, MODEL_FILE)} ({len(model)} bytes) must be a sentencepiece model ("
                f"{error}); download it again, a Git LFS pointer is not the file",
                f"{os.path.join(where, MODEL_FILE)}（{len(model)} 字节）须为 sentencepiece 模型（{error}"
                "）；请重新下载，Git LFS 指针不是文件本身",
            )
        ) from error
    pieces = list(model_pieces(model))
    # Vocabularies also use the user-defined kind for runs of spaces and the like, which are
    # ordinary text.
    special = {
        piece: i
        for i, (piece, kind) in enumerate(pieces)
        if kind in (_KIND_UNKNOWN, _KIND_CONTROL)
        or (kind == USER_DEFINED and piece.startswith("<") and piece.endswith(">"))
    }
    return _Vocabulary(
        encode=processor.encode,
        pieces={i: piece for i, (piece, _) in enumerate(pieces)},
        special=special,
        byte_of={i: int(piece[3:5], 16) for i, (piece, kind) in enumerate(pieces) if kind == _KIND_BYTE},
    )


def model_pieces(model: bytes) -> Iterator[tuple[str, int]]:
    """(piece, kind) of each id. sentencepiece's Python interface does not tell user-defined pieces
    from ordinary ones.
    """
    for number, piece in _fields(model):
        if number == 1:
            fields = dict(_fields(piece))
            text, kind = fields[1], fields.get(3, 1)
            yield text.decode(), kind


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of one protobuf message: an int for varints, else the raw bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
            continue
        length = {1: 8, 5: 4}.get(tag & 7) or varint()
        yield tag >> 3, message[at : at + length]
        at += length


def _read_hf(spec: bytes, where: str) -> _Vocabulary:
    """tokenizer.json through the optional package. Only the kind that ERNIE uses: BPE with byte
    fallback.
    """
    content = read_json({JSON_FILE: spec}, JSON_FILE, where)
    model = content.get("model") or {}
    if model.get("type") != "BPE" or not model.get("byte_fallback"):
        raise ValueError(
            say(
                f"{os.path.join(where, JSON_FILE)} (type {model.get('type')!r}, byte_fallback "
                f"{model.get('byte_fallback')!r}) must be BPE with byte_fallback; "
                f"put the model's {MODEL_FILE} beside it",
                f"{os.path.join(where, JSON_FILE)}（类型 {model.get('type')!r}，byte_fallback "
                f"{model.get('byte_fallback')!r}）须为带 byte_fallback 的 BPE；请把模型的 {MODEL_FILE} 放在旁边",
            )
        )
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            say(
                f"{os.path.join(where, JSON_FILE)} needs the package tokenizers; pip install tokenizers, "
                f"or put {MODEL_FILE} beside it",
                f"{os.path.join(where, JSON_FILE)} 需要软件包 tokenizers；请 pip install "
                f"tokenizers，或在旁边放置 {MODEL_FILE}",
            )
        ) from error
    backend = tokenizers.Tokenizer.from_str(spec.decode())
    added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    pieces = {i: piece for piece, i in model["vocab"].items()}
    return _Vocabulary(
        encode=lambda text: backend.encode(text, add_special_tokens=False).ids,
        pieces=pieces,
        special=added,
        byte_of={i: int(found[1], 16) for i, piece in pieces.items() if (found := _BYTE_PIECE.fullmatch(piece))},
    )

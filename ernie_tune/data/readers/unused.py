"""What readers left in a row: its names, to be told once for the file, and an error where it looks
like something that training would miss.

A picture, a clip, a sound, a mask of the loss or a thought that no reader took would be lost
without a word: the model would learn an answer about a picture that it never saw, or the very turn
that was marked as bad. A name that begins with `_` is left out on purpose.

Refuses to know: formats, which names readers take (`Fields` says what they took), how names are
told.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ernie_tune.data.readers.fields import THOUGHTS
from ernie_tune.data.readers.media import KIND_NAMES, as_data_url, base_name, suffix_kind
from ernie_tune.data.readers.row import Fields, read_list
from ernie_tune.data.records import Media, Record, show

# Names of what describes a row and teaches nothing.
BOOKKEEPING = frozenset(
    (
        "source", "meta", "metadata", "dataset", "data_source", "split", "idx", "index", "uid", "uuid", "license", "lang",
        "language", "category", "detail", "cache_control", "created", "created_at", "timestamp", "author", "version",
    )
)  # fmt: skip
_INDEX = re.compile(r"\[\d+\]")
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_MEDIA_WORDS = (
    frozenset(
        (
            "image",
            "images",
            "img",
            "imgs",
            "picture",
            "pictures",
            "pic",
            "pics",
            "photo",
            "photos",
            "screenshot",
            "screenshots",
        )
    ),
    frozenset(("video", "videos", "clip", "clips", "movie", "movies")),
)
_MASK_WORDS = frozenset(
    (
        "mask", "masks", "masked", "masking", "unmasked", "loss", "losses", "train", "trained", "training", "trainable",
        "untrained", "supervise", "supervised", "ignore", "ignored", "learn", "learned", "learnable", "skip", "skipped",
    )
)  # fmt: skip
# of a turn, not of a row
_LEFT_OUT_WORDS = frozenset(("exclude", "excluded", "freeze", "frozen", "grad", "backprop"))
_THOUGHT = re.compile(
    r"(^|_)(reasoning|thinking|thoughts?|think|rationales?|cot|chain_of_thoughts?|deliberation|scratchpad)"
    r"(_(content|text|trace|traces|process|steps|details|chain|summary))?$"
)
_SOUND_SUFFIXES = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus")
_FLAGS = ("true", "false", "0", "1", "yes", "no")
_MAGIC = ((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*"), (b"\x1aE\xdf\xa3", b"FLV"))
_SOUNDS, _MASK, _THOUGHTS = "sound", "mask", "thought"
_DEPTH, _WIDTH = 4, 16  # of values that are looked into


def check_unused(f: Fields, record: Record) -> tuple[str, ...]:
    """Names of all that no reader took, indices left out: ("source", "messages[].name"). Raises
    DataError for what training would miss.
    """
    found: dict[str, None] = {}
    for part in f.all_parts():
        for key, value in part.extra().items():
            if isinstance(value, str | bytes | list | dict) and not value:
                continue
            found.setdefault(_INDEX.sub("[]", part.prefix + str(key)))
            if not str(key).startswith("_"):
                _refuse(part, str(key), value, record)
    return tuple(found)


def _refuse(part: Fields, key: str, value: object, record: Record) -> None:
    """The error for a value that training would miss. What only repeats something that was read is
    none; of a row that is asked and not learnt no thought or mask is missed.
    """
    asked = record.signal in ("prompt", "verifiable")
    if not asked and part.prefix and not _words(key).isdisjoint(_LEFT_OUT_WORDS) and _is_flags(value):
        raise part.error("unread_mask", key, show(value), name=key)
    for kind, at, what in _missed(key, value):
        repeats = _is_shown(what, record) if kind in KIND_NAMES else kind == _THOUGHTS and part.took(*THOUGHTS)
        if not repeats and not (asked and kind in (_THOUGHTS, _MASK)):
            code = {"image": "unread_picture", "video": "unread_clip"}.get(kind, f"unread_{kind}")
            raise part.error(code, at, show(what), name=at.partition("[")[0].rpartition(".")[2])


def is_suspicious(key: str) -> bool:
    """Whether a name alone asks for a closer look at its values."""
    words = _words(key)
    return any(not words.isdisjoint(known) for known in (*_MEDIA_WORDS, _MASK_WORDS)) or bool(
        _THOUGHT.search(_snake(key))
    )


def _missed(key: str, value: object, depth: int = 0, at: str = "") -> Iterator[tuple[str, str, object]]:
    """(kind of what would be missed, where, the value) of a field and of what is inside it."""
    at = at or key
    value = value if (items := read_list(value)) is None else items
    kind = _kind(key, value)
    if kind:
        yield kind, at, value
    elif depth < _DEPTH and isinstance(value, Mapping):
        for name, inner in list(value.items())[:_WIDTH]:
            if not str(name).startswith("_"):
                yield from _missed(str(name), inner, depth + 1, f"{at}.{name}")
    elif depth < _DEPTH and isinstance(value, list | tuple):
        for i, inner in enumerate(value[:_WIDTH]):
            yield from _missed(key, inner, depth + 1, f"{at}[{i}]")


def _kind(key: str, value: object) -> str:
    """What a value looks like: a kind of medium, "sound", "mask", "thought", or ""."""
    if value is None or (isinstance(value, str | bytes) and not value):
        return ""
    medium = _medium(key, value)
    if medium:
        return medium
    words = _words(key)
    if not words.isdisjoint(_MASK_WORDS) and _is_flags(value):
        return _MASK
    if _THOUGHT.search(_snake(key)) and _is_text(value):
        return _THOUGHTS
    return ""


def _medium(key: str, value: object) -> str:
    if isinstance(value, bytes):
        named = next((KIND_NAMES[i] for i, words in enumerate(_MEDIA_WORDS) if not words.isdisjoint(_words(key))), "")
        return next(
            (KIND_NAMES[i] for i, starts in enumerate(_MAGIC) if value.startswith(starts)), _container(value) or named
        )
    if isinstance(value, str):
        return _text_medium(key, value)
    if hasattr(value, "__array_interface__"):
        return KIND_NAMES[0]
    return ""


def _container(value: bytes) -> str:
    if value[:4] == b"RIFF":
        return {b"WEBP": "image", b"AVI ": "video", b"WAVE": _SOUNDS}.get(value[8:12], "")
    return "video" if value[4:8] == b"ftyp" else ""


def _text_medium(key: str, text: str) -> str:
    if text[:5].lower() == "data:":
        kind = text[5:11].lower()
        return {"image/": "image", "video/": "video", "audio/": _SOUNDS}.get(kind, "")
    if as_data_url(text, sure=True):
        return "image"
    if len(text) > 1024 or "\n" in text:
        return ""
    if "://" in text[:10]:
        words = _words(key)
        named = next((KIND_NAMES[i] for i, known in enumerate(_MEDIA_WORDS) if not words.isdisjoint(known)), "")
        ends = suffix_kind(text)
        return named if ends is None else KIND_NAMES[ends]
    if " " in text and "/" not in text and "\\" not in text and text.count(" ") > 5:
        return ""  # a sentence that ends with a file's name
    ends = suffix_kind(text)
    return _SOUNDS if text.lower().endswith(_SOUND_SUFFIXES) else "" if ends is None else KIND_NAMES[ends]


def _is_flags(value: object) -> bool:
    """Whether a value may say what to learn: true or false, 0 or 1, a list of these, or objects
    with such a field.
    """
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return True
    if isinstance(value, str):
        return value.strip().lower() in _FLAGS
    if isinstance(value, list | tuple):
        return len(value) > 0 and all(map(_is_flags, value[:_WIDTH]))
    return isinstance(value, Mapping) and any(_kind(str(name), inner) == _MASK for name, inner in value.items())


def _is_text(value: object) -> bool:
    """Whether a value holds words: a text, or a list or object with one."""
    if isinstance(value, str):
        return any(map(str.isalpha, value)) and value.strip().lower() not in _FLAGS
    if isinstance(value, Mapping):
        return any(map(_is_text, value.values()))
    return isinstance(value, list | tuple) and any(map(_is_text, value))


def _is_shown(value: object, record: Record) -> bool:
    """Whether a name only repeats that of a medium which the row shows."""
    media: list[Media] = [*record.images, *record.videos]
    media += [medium for candidate in record.candidates for medium in (*candidate.images, *candidate.videos)]
    return isinstance(value, str) and bool(base_name(value)) and base_name(value) in map(base_name, media)


def _snake(key: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[\s\-.]+", "_", key.strip().replace("CoT", "Cot")).lower()


def _words(key: str) -> set[str]:
    return {word.lower() for word in _WORD.findall(key)}

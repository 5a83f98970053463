"""Pictures and clips of a row: the columns and keys they stand in, their tags in the text, and
where relative paths start.

Refuses to know: formats of rows, whether a file exists as a picture, pixels.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any, cast

from ernie_tune.config.language import say
from ernie_tune.data.readers.row import Draft, Fields, Turn, Where, read_list
from ernie_tune.data.records import IMAGE_TAG, VIDEO_TAG, Media, as_words, count_tags, show

# The names that people give to a column, or to a key of a turn, with pictures or clips; the first
# is ours.
IMAGE_NAMES = (
    "images", "image", "image_path", "image_paths", "image_url", "image_urls", "image_file", "image_files",
    "image_bytes", "image_base64", "img", "imgs", "img_path", "img_paths", "img_url", "img_urls", "picture",
    "pictures", "picture_path", "pic", "pics", "photo", "photos",
)  # fmt: skip
VIDEO_NAMES = (
    "videos", "video", "video_path", "video_paths", "video_url", "video_urls", "video_file", "video_files",
    "clip", "clips", "clip_path", "movie",
)  # fmt: skip
# Names that say only that there is a file: what its name ends with tells of what kind.
_ENCODED = ("bytes", "data", "base64", "b64", "b64_json")  # keys of an object whose value is encoded
FILE_NAMES = ("file_name", "filename", "file", "file_path", "filepath", "path")
MEDIA_NAMES = (IMAGE_NAMES, VIDEO_NAMES)
TAGS = (IMAGE_TAG, VIDEO_TAG)
KIND_NAMES = ("image", "video")

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".jp2",
    ".ppm",
)
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".flv", ".m4v", ".mpg", ".mpeg", ".wmv", ".3gp")
SUFFIXES = (IMAGE_SUFFIXES, VIDEO_SUFFIXES)
_PLAIN = str.maketrans("-_", "+/")  # base64 as URLs have it
# What may stand around base64 that is no data: URL: OpenCompass's and ours, Python's repr of bytes.
_WRAPPED = re.compile(r"(?:base64://|base64,|b(?P<quote>['\"]))(.*?)(?(quote)(?P=quote))\s*", re.DOTALL)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\-\s]{40,}={0,2}\s*")
# The first bytes of a PNG, JPEG, GIF, WebP and AVI, TIFF, BMP, JPEG 2000, Matroska, FLV; MP4 and
# AVIF say so after four bytes.
_MAGIC = (
    *(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF", b"II*\0", b"MM\0*", b"BM"),
    *(b"\0\0\0\x0cjP  ", b"\x1aE\xdf\xa3", b"FLV"),
)
_NO_PATH_CHARACTERS = 256  # without a dot: longer than a file's name may be


def as_data_url(text: str, sure: bool = False) -> str | None:
    """A text that is an encoded picture or clip without the head of a data: URL, as one; None for
    any other text. Unless one must be `sure`, base64 that is too long for a path counts too, so
    that whoever opens it says what is wrong.
    """
    if len(text) < 40:
        return None
    wrapped = _WRAPPED.fullmatch(text) if text[:1] == "b" else None
    text = wrapped[2] if wrapped else text
    if "." in text[:80] or not _BASE64.fullmatch(text):
        return None
    plain = "".join(text.split()).rstrip("=").translate(_PLAIN)
    if len(plain) % 4 == 1:
        return None
    head = base64.b64decode(plain[:16])
    known = head.startswith(_MAGIC) or head[4:8] == b"ftyp"
    if not known and (sure or not (wrapped or len(text) >= _NO_PATH_CHARACTERS)):
        return None
    return f"data:application/octet-stream;base64,{plain}{'=' * (-len(plain) % 4)}"


def suffix_kind(text: str) -> int | None:
    """0 for the name of a picture, 1 for that of a clip, by its end; None for any other text."""
    text = text.rstrip()
    name = text.split("?")[0].split("#")[0].lower() if "://" in text else text.lower()
    return next((kind for kind, ends in enumerate(SUFFIXES) if name.endswith(ends)), None)


def kinds_shown(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The kinds of media ("image", "video") that any of these rows has in a column."""
    columns = {name for row in rows for name, value in row.items() if value is not None and value != "" and value != []}
    return tuple(kind for kind, names in zip(KIND_NAMES, MEDIA_NAMES, strict=True) if not columns.isdisjoint(names))


def read_columns(f: Fields, kind: int, names: Sequence[str] = ()) -> tuple[Media, ...]:
    """The media of a kind in whatever column the row keeps them. Raises DataError where two columns
    name different ones.
    """
    taken = [(name, read_media(f, kind, name)) for name in names or MEDIA_NAMES[kind] if f.has(name)]
    found = [(name, media) for name, media in taken if media]
    for name, media in found[1:]:
        if not _same(found[0][1], media):
            raise f.error("twice", name, show(list(media)), names=f"{found[0][0]} and {name}")
    if found or names:
        return found[0][1] if found else ()
    for name in FILE_NAMES:
        value = f.row.get(name)
        if isinstance(value, str) and suffix_kind(value) == kind:
            return read_media(f, kind, name)
    return ()


def _same(one: tuple[Media, ...], other: tuple[Media, ...]) -> bool:
    """Whether two columns name the same media: equal ones, or files of one name in folders told
    otherwise.
    """
    return one == other or (len(one) == len(other) and [*map(base_name, one)] == [*map(base_name, other)] != [])


def base_name(medium: Any) -> Any:
    """The last part of a path, whatever its slashes; anything else as it is."""
    return PureWindowsPath(medium).name if isinstance(medium, str) and len(medium) < 4096 else medium


def read_media(f: Fields, kind: int, *names: str) -> tuple[Media, ...]:
    """A column of media: absent, one, or a list, which in a table is text. Inside a list of videos,
    a list is the frames of one video.
    """
    value = f.take(*names)
    value = value if (items := read_list(value)) is None else items
    if value is None or (isinstance(value, str) and value == ""):
        return ()
    name = next(name for name in names if f.has(name))
    return tuple(read_medium(f, kind, name, item) for item in (value if isinstance(value, list) else [value]))


def read_medium(f: Fields, kind: int, field: str, value: Any) -> Media:
    """One picture or clip: a path, URL, bytes, bare base64, an object that holds one of these, a
    decoded picture; or the frames of a clip.
    """
    if isinstance(value, dict):
        row = f.nested(field, value)
        value = row.take(*_ENCODED, "url", "path", "image", "video")
        row.use(
            "bytes", "url", "path", "type", "media_type", "detail"
        )  # the last two: Anthropic's {"type": "base64", "media_type", "data"}
        if value is None:
            raise row.missing("path", "url", "bytes")
        if isinstance(value, str) and row.has(*_ENCODED) and value[:5] != "data:":
            # JSON has no bytes, so they come as base64
            return as_data_url(value) or f"data:application/octet-stream;base64,{value}"
    if kind == 1 and isinstance(value, list):
        return tuple(cast(str, read_medium(f, 0, field, frame)) for frame in value)
    if isinstance(value, str) and (url := as_data_url(value)):
        return url
    # pictures of Pillow and arrays of numpy too
    if isinstance(value, bytes) or hasattr(value, "__array_interface__"):
        return cast("Media", value)
    return cast(str, f.typed(field, value, str))


def turn_media(f: Fields, turn: Turn) -> Turn:
    """The turn with the media that its own keys name: one for each tag in its text, or all before
    it where it has no tags.
    """
    media = list(turn.media)
    for kind, tag in enumerate(TAGS):
        own = [medium for name in MEDIA_NAMES[kind] if f.has(name) for medium in read_columns(f, kind, (name,))]
        named = media[kind]
        if not own or (named and None not in named and _same(tuple(own), named)):  # type: ignore[arg-type]
            continue
        content = turn.message["content"]
        if not (tags := count_tags(content, tag)):
            turn.message["content"] = tag * len(own) + content
        elif any(medium is not None for medium in named):
            raise f.error("twice", MEDIA_NAMES[kind][0], show(own), names="the parts of content and a key of the turn")
        else:
            f.same_length(MEDIA_NAMES[kind][0], own, tags, f"{tag} tag in this turn")
        media[kind] = tuple(own)
    return Turn(turn.message, (media[0], media[1]))


def settle_media(
    f: Fields, kind: int, turns: Sequence[Turn], drafts: Sequence[Draft]
) -> tuple[tuple[Media, ...], list[tuple[Media, ...]]]:
    """One medium for each tag, in reading order: first the messages', then each candidate's.

    Media without any tag get tags before the first user turn, the convention of LLaVA and
    LLaMA-Factory; tags without any medium are words. A candidate's own list holds either all media
    of its dialogue or only those of the answer. Returns the messages' media, and each candidate's
    (empty where they are the messages').
    """
    name, tag = MEDIA_NAMES[kind][0], TAGS[kind]
    column = _merge_parts(f, kind, read_columns(f, kind), turns)
    every = [turn for part in (turns, *(draft.turns for draft in drafts)) for turn in part]
    elsewhere = any(draft.media[kind] or any(turn.media[kind] for turn in draft.turns) for draft in drafts)
    if not column and not elsewhere and not _is_announced(f, kind, every):
        _take_as_words(f, tag, every)
    prompt_tags, answer_tags = _count(tag, turns), [_count(tag, draft.turns) for draft in drafts]
    if column and prompt_tags + sum(answer_tags) == 0:
        prompt_tags = len(column)
        first = next(turn.message for turn in turns if turn.message["role"] == "user")
        first["content"] = tag * prompt_tags + first["content"]
    owned = [_merge_parts(f, kind, draft.media[kind], draft.turns) for draft in drafts]
    needed = prompt_tags + sum(tags for tags, own in zip(answer_tags, owned, strict=True) if not own)
    f.same_length(name, column, needed, f"{tag} tag", _hint(tag) if needed > len(column) else "")
    base, rest = column[:prompt_tags], column[prompt_tags:]
    settled = []
    for tags, own in zip(answer_tags, owned, strict=True):
        if own and len(own) != tags + prompt_tags:
            f.same_length(name, own, tags, f"{tag} tag of the candidate")
            own = base + own
        elif tags and not own:
            own, rest = base + rest[:tags], rest[tags:]
        settled.append(tuple(_resolve(f.where, medium) for medium in own))
    return tuple(_resolve(f.where, medium) for medium in base), settled


def _hint(tag: str) -> str:
    return say(f", or write \\{tag} where the word itself is meant", f"；若指文字本身，请写作 \\{tag}")


def _is_announced(f: Fields, kind: int, turns: Sequence[Turn]) -> bool:
    """Whether media of this kind are missing, so that tags are no words: a column that is empty
    here, a part without source, other rows of the file that have some, or a tag where all tools put
    it, at the start or end of a question or on a line of its own.
    """
    tag = TAGS[kind]
    return (
        KIND_NAMES[kind] in f.where.media
        or any(f.row.get(name) is not None for name in MEDIA_NAMES[kind])
        or any(turn.media[kind] or (turn.message["role"] == "user" and _stands_alone(tag, turn)) for turn in turns)
    )


def _stands_alone(tag: str, turn: Turn) -> bool:
    text = turn.message["content"].strip()
    if not count_tags(text, tag):
        return False
    return (
        text.startswith(tag)
        or (text.endswith(tag) and not text.endswith("\\" + tag))
        or tag in map(str.strip, text.split("\n"))
    )


def _take_as_words(f: Fields, tag: str, turns: Sequence[Turn]) -> None:
    """Tags in a row without such media are words of its text: say so, and keep them."""
    for i, turn in enumerate(turns):
        message = turn.message
        if count_tags(message["content"], tag):
            f.note("literal_tag", f"messages[{i}]", tag)
            message["content"] = as_words(message["content"], tag)
        if count_tags(message.get("reasoning_content", ""), tag):
            message["reasoning_content"] = as_words(message["reasoning_content"], tag)


def _count(tag: str, turns: Sequence[Turn]) -> int:
    return sum(count_tags(turn.message["content"] + turn.message.get("reasoning_content", ""), tag) for turn in turns)


def _merge_parts(f: Fields, kind: int, column: tuple[Media, ...], turns: Sequence[Turn]) -> tuple[Media, ...]:
    """The column, or the media that turns and their parts named; both only where they agree."""
    parts = [medium for turn in turns for medium in turn.media[kind]]
    named = tuple(medium for medium in parts if medium is not None)
    if not named:
        return column
    name = MEDIA_NAMES[kind][0]
    f.same_length(name, named, len(parts), f"{KIND_NAMES[kind]} part (name all of them, or none)")
    if column and column != named:
        options = f"no column, or {show(list(named))} as in the messages"
        raise f.error("choice", name, show(list(column)), options=options)
    return named


def _resolve(where: Where, medium: Media) -> Media:
    if isinstance(medium, tuple):
        return tuple(cast(str, _resolve(where, frame)) for frame in medium)
    if not isinstance(medium, str) or "://" in medium or medium.startswith("data:") or os.path.isabs(medium):
        return medium
    beside = os.path.join(os.path.dirname(where.path), medium)
    inside = os.path.join(where.media_dir, medium)
    return inside if where.media_dir and (os.path.exists(inside) or not os.path.exists(beside)) else beside

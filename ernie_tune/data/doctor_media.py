"""Pictures and videos of records: do they exist, can they be decoded, how many tokens do they take, and what makes two of them the same.

Existence is checked for all. Opening costs milliseconds, so without `decode=None` (all) only the first `decode` pictures are opened, and of the
rest every second, fourth, eighth, … one, the step doubling after each further `decode`. Videos are looked up, never opened.

Refuses to know: texts, what is printed. Memory: names of at most 100,000 files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from urllib.request import url2pathname

from PIL import Image

from ernie_tune.data.doctor import Finding
from ernie_tune.data.images import ImageSettings, decode_errors, describe, load_image, open_source
from ernie_tune.data.records import Media, Record, show
from ernie_tune.models.inputs import feature_count

_MARKER_TOKENS = 2  # around the placeholders of one picture
_REMEMBERED_FILES = 100_000


class Pictures:
    """Checks the media of one run. `sizes` holds (height, width) of the opened pictures, `seen` and `opened` count them."""

    def __init__(self, settings: ImageSettings, decode: int | None, max_sizes: int = 100_000) -> None:
        self.settings, self.decode, self._max_sizes = settings, decode, max_sizes
        self.seen = self.opened = 0
        self.sizes: list[tuple[int, int]] = []
        self._step = 1
        self._known: dict[str, str] = {}  # path -> "" or what is wrong
        self._content: dict[str, str] = {}  # path -> digest, where all pictures are opened

    def check(self, record: Record) -> Iterator[Finding]:
        """What is wrong with the media of one record."""
        path, line = record.meta.path, record.meta.line
        images = dict.fromkeys([*record.images, *(image for one in record.candidates for image in one.images)])
        videos = dict.fromkeys([*record.videos, *(video for one in record.candidates for video in one.videos)])
        frames = [frame for video in videos for frame in (video if isinstance(video, tuple) else (video,))]
        for field, source in [*(("images", image) for image in images), *(("videos", frame) for frame in frames)]:
            code = self._look_up(source)
            if code:
                yield Finding.of(code, path, line, field, show(source))
            elif field == "images" and self._is_due():
                why = self._open(source)
                if why:
                    yield Finding.of("media_broken", path, line, field, show(source), why=why)

    def tokens(self, source: Media) -> int:
        """Placeholders and markers of a picture, from its header alone. Raises ValueError where it cannot be opened."""
        label = describe("image", source, "")
        with open_source(source, label) as stream, decode_errors(label), Image.open(stream) as image:
            size = image.height, image.width
        return image_tokens(size, self.settings)

    def identity(self, media: tuple[Media, ...]) -> tuple[Media, ...]:
        """Media as rows are compared by: their names, or where all are opened their contents."""
        return tuple(self._content.get(m, m) if isinstance(m, str) else m for m in media)

    def _look_up(self, source: Media) -> str:
        """The code of what is wrong with the place of a medium, or ""."""
        if not isinstance(source, str) or source.startswith("data:"):
            return ""
        if source not in self._known:
            if len(self._known) >= _REMEMBERED_FILES:
                self._known.clear()
                self._content.clear()
            local = url2pathname(source.removeprefix("file://")) if source.startswith("file:///") else source
            missing = "\0" in local or not os.path.isfile(local)
            self._known[source] = "media_remote" if "://" in local else "media_missing" if missing else ""
        return self._known[source]

    def _is_due(self) -> bool:
        self.seen += 1
        if self.decode is None:
            return True
        if self.decode and self.opened >= self.decode * self._step.bit_length():
            self._step *= 2
        return self.decode > 0 and self.seen % self._step == 0

    def _open(self, source: Media) -> str:
        """Decode a picture and note its size; returns what is wrong with it."""
        if isinstance(source, str) and source in self._content:
            return ""
        self.opened += 1
        label = describe("image", source, "")
        try:
            image = load_image(source)  # type: ignore[arg-type]
            self.settings.target_size(image.height, image.width)
            if self.decode is None and isinstance(source, str):
                with open_source(source, label) as stream:
                    self._content[source] = hashlib.blake2b(stream.read(), digest_size=16).hexdigest()
        except ValueError as error:
            return str(error).removeprefix(f"{label} ")
        if len(self.sizes) < self._max_sizes:
            self.sizes.append((image.height, image.width))
        return ""


def image_tokens(size: tuple[int, int], settings: ImageSettings) -> int:
    """Tokens of a picture of this (height, width), markers included. Raises ValueError for shapes without patches."""
    height, width = settings.target_size(*size)
    return feature_count((1, height // settings.patch_size, width // settings.patch_size)) + _MARKER_TOKENS

"""Pictures and videos of records: do they exist, can they be decoded, how many tokens do they take,
and what makes two of them the same.

Existence is checked for all. Opening costs milliseconds, so without `decode=None` (all) only the
first `decode` pictures and clips are opened, and of the rest every second, fourth, eighth, … one,
the step doubling after each further `decode`. Clips are measured, not decoded.

Refuses to know: texts, what is printed. Memory: names of at most 100,000 files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from urllib.request import url2pathname

import numpy as np
from PIL import Image

from ernie_tune.config.language import Text, say
from ernie_tune.data.doctor.checks import Finding
from ernie_tune.data.media.images import ImageSettings, decode_errors, describe, open_image, open_source, to_rgb
from ernie_tune.data.media.video import VideoSettings, video_grid
from ernie_tune.data.records import Media, Record, show
from ernie_tune.models.inputs import feature_count

_MARKER_TOKENS = 2  # around the placeholders of one picture
_REMEMBERED_FILES = 100_000
_ORIENTATION = 0x0112  # of EXIF: 1 is upright
_FLAT = 8  # of 255: less than this between dark and bright is nothing to see
_DIM = 1 << 14  # a 16-bit picture below a quarter of its range is nearly black to the model


class Pictures:
    """Checks the media of one run. `sizes` holds (height, width) of the opened pictures, `seen` and
    `opened` count them.
    """

    def __init__(
        self, settings: ImageSettings, decode: int | None, max_sizes: int = 100_000, videos: VideoSettings | None = None
    ) -> None:
        self.videos = videos or VideoSettings(image=settings)
        # what is strange about pictures -> how many, the first
        self.odd: dict[str, tuple[int, Finding]] = {}
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
        for image in images:
            yield from self._check("images", image, path, line)
        for video in videos:
            frames = video if isinstance(video, tuple) else (video,)
            lost = [finding for frame in frames if (finding := self._missing("videos", frame, path, line))]
            yield from lost
            if not lost and self._is_due(counted=False):
                yield from self._open_clip(video, path, line)

    def findings(self) -> Iterator[Finding]:
        """What is to be said once of all pictures that were opened."""
        for count, first in self.odd.values():
            opened = say(f"{count:,} of {self.opened:,} opened", f"打开的 {self.opened:,} 张中有 {count:,} 张")
            found = say("{what} ({opened})", "{what}（{opened}）", what=first.found, opened=opened)
            yield dataclasses.replace(first, found=found)

    def _missing(self, field: str, source: Media, path: str, line: int) -> Finding | None:
        code = self._look_up(source)
        return Finding.of(code, path, line, field, show(source)) if code else None

    def _check(self, field: str, source: Media, path: str, line: int) -> Iterator[Finding]:
        missing = self._missing(field, source, path, line)
        if missing:
            yield missing
        elif self._is_due():
            why, odd = self._open(source)
            if why:
                yield Finding.of("media_broken", path, line, field, show(source), why=why)
            for code, found in odd:
                count, first = self.odd.get(code, (0, Finding.of(code, path, line, field, _told(source, found))))
                self.odd[code] = count + 1, first

    def _open_clip(self, source: Media, path: str, line: int) -> Iterator[Finding]:
        """Measure a clip: its container, its frames, its size."""
        label = describe("video", source, "")
        try:
            video_grid(source, self.videos)
        except ImportError:
            yield Finding.of("clip_package", path, line, "videos", show(source))
        except ValueError as error:
            yield Finding.of(
                "clip_broken", path, line, "videos", show(source), why=str(error).removeprefix(f"{label} ")
            )

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

    def _is_due(self, counted: bool = True) -> bool:
        self.seen += counted
        if self.decode is None:
            return True
        if self.decode and self.opened >= self.decode * self._step.bit_length():
            self._step *= 2
        return self.decode > 0 and self.seen % self._step == 0

    def _open(self, source: Media) -> tuple[str, list[tuple[str, Text]]]:
        """Decode a picture and note its size; returns what is wrong with it, and what is
        strange.
        """
        if isinstance(source, str) and source in self._content:
            return "", []
        self.opened += 1
        label = describe("image", source, "")
        odd: list[tuple[str, Text]] = []
        try:
            with open_source(source, label) as stream:
                picture = open_image(stream, label)
                image = to_rgb(picture, label)
                odd = list(_oddities(picture, image))
                self.settings.target_size(image.height, image.width)
                if self.decode is None and isinstance(source, str):
                    stream.seek(0)
                    self._content[source] = hashlib.blake2b(stream.read(), digest_size=16).hexdigest()
        except ValueError as error:
            return str(error).removeprefix(f"{label} "), []
        if len(self.sizes) < self._max_sizes:
            self.sizes.append((image.height, image.width))
        return "", odd


def _told(source: Media, found: Text) -> Text:
    return say("{source}: {found}", "{source}：{found}", source=show(source), found=found)


def _oddities(picture: Image.Image, seen: Image.Image) -> Iterator[tuple[str, Text]]:
    """(code, what) of a decoded picture that people see otherwise than the model, which sees
    `seen`.
    """
    with decode_errors("image"):
        turn = picture.getexif().get(_ORIENTATION, 1)
        frames = getattr(picture, "n_frames", 1)
    if turn in range(2, 9):
        yield "turned", say(f"EXIF orientation {turn}", f"EXIF 方向为 {turn}")
    if frames > 1:
        yield "frames", say(f"{frames:,} pictures in one file", f"一个文件中有 {frames:,} 张图片")
    see_through = "A" in picture.getbands() or "transparency" in picture.info
    if see_through and int(np.ptp(np.asarray(seen), axis=(0, 1)).max()) < _FLAT:
        yield "blank", say("one colour where transparent pixels are white", "透明像素变为白色后只剩一种颜色")
    if picture.mode.startswith("I;16"):
        brightest = int(np.asarray(picture).max())
        if brightest < _DIM:
            yield "dim", say(f"brightest of 65,535 is {brightest:,}", f"65,535 级中最亮为 {brightest:,}")


def image_tokens(size: tuple[int, int], settings: ImageSettings) -> int:
    """Tokens of a picture of this (height, width), markers included. Raises ValueError for shapes
    without patches.
    """
    height, width = settings.target_size(*size)
    return feature_count((1, height // settings.patch_size, width // settings.patch_size)) + _MARKER_TOKENS

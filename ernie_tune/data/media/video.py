"""Videos -> frames -> patches: which frames, their timestamps drawn into the picture, one size for
all. numpy and pillow; PyAV for mp4 and the like.

Refuses to know: tokens, chat templates, sound, paddle, the network. Display rotation stored in a
file is not applied, like EXIF in `images.py`.

Readers yield (seconds, RGB frame) for the chosen frames only, so memory holds those and one frame
in flight, never the whole video.
Legend: P patches, C values per patch (588), T frames.
Source of the rules: the processing code beside the released weights; a missing font is an error
here.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageSequence, UnidentifiedImageError

from ernie_tune.config.language import say
from ernie_tune.data.media.images import (
    Grid,
    ImageSettings,
    ImageSource,
    decode_errors,
    describe,
    image_size,
    load_image,
    open_source,
    patchify,
    resize,
    to_rgb,
)

FRAME_RULES = ("paddle", "hf")
SAMPLINGS = ("middle", "leading")
LIST_FPS = 2.0  # a list of pictures counts as a video of 2 frames a second
DEFAULT_FRAME_MS = 100  # browsers show an animation frame of unstated duration this long
FONT_SCALE = 0.1  # of the shorter side; the stroke is the same share of the font
_ANIMATIONS = ("GIF", "PNG", "WEBP")
# An animation is decoded from its first frame on, and a few kilobytes can hold millions of frames
# of millions of pixels.
MAX_ANIMATION_FRAMES = 20_000
MAX_ANIMATION_PIXELS = 1 << 31  # of all frames together: 1,000 of 1920 x 1080
# What a container begins with (and where) -> the one FFmpeg reader that may open it. Playlists and
# session descriptions, which would make it open other files and addresses, are none of them.
_CONTAINERS = (
    (4, b"ftyp", "mov"), (4, b"moov", "mov"), (4, b"mdat", "mov"), (4, b"wide", "mov"), (4, b"free", "mov"),
    (0, b"\x1aE\xdf\xa3", "matroska"), (8, b"AVI ", "avi"), (0, b"FLV\x01", "flv"), (0, b"\0\0\x01\xba", "mpeg"),
    (0, b"0&\xb2u\x8ef\xcf\x11", "asf"), (188, b"G", "mpegts"),
)  # fmt: skip

VideoSource = str | os.PathLike[str] | bytes | Sequence[ImageSource]
Pick = Callable[[int, float], list[int]]  # (total frames, seconds) -> frame indices, ascending
TimedFrames = Iterator[tuple[float, Image.Image]]


@dataclass(frozen=True)
class VideoSettings:
    """How a video becomes frames and patches. `min_pixels` and `max_pixels` are per frame and
    replace those of `image`.
    """

    # frames taken per second; None where target_frames or all frames are wanted
    fps: float | None = 2.0
    min_frames: int = 16
    max_frames: int = 180
    sampling: str = "middle"  # of each interval, rule "paddle"; "hf" always takes the first
    rule: str = "paddle"
    min_pixels: int = 234_416  # 299 * 28 * 28
    max_pixels: int = 937_664  # 1196 * 28 * 28
    draw_timestamps: bool = True
    # None: the font inside pillow; pixel parity needs the reference's own file
    font_path: str | None = None
    image: ImageSettings = field(default_factory=ImageSettings)

    def __post_init__(self) -> None:
        if self.fps is not None and not self.fps > 0:
            raise ValueError(
                say(
                    f"fps ({self.fps}) must be above 0; use 2, or None together with target_frames",
                    f"fps（{self.fps}）须大于 0；请用 2，或用 None 并给出 target_frames",
                )
            )
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(
                say(
                    f"min_frames ({self.min_frames}) must be at least 1 and at most max_frames ("
                    f"{self.max_frames}); swap or correct them",
                    f"min_frames（{self.min_frames}）须至少为 1 且不超过 max_frames（{self.max_frames}）；请对调或改正",
                )
            )
        if self.sampling not in SAMPLINGS:
            raise ValueError(
                say(
                    f"sampling ({self.sampling!r}) must be one of {SAMPLINGS}; use 'middle'",
                    f"采样方式（{self.sampling!r}）须为 {SAMPLINGS} 之一；可用 'middle'",
                )
            )
        if self.rule not in FRAME_RULES:
            raise ValueError(
                say(
                    f"rule ({self.rule!r}) must be one of {FRAME_RULES}; use 'paddle'",
                    f"规则（{self.rule!r}）须为 {FRAME_RULES} 之一；可用 'paddle'",
                )
            )
        _ = self.frame  # refuses impossible pixel limits

    @property
    def frame(self) -> ImageSettings:
        """The settings of one frame: `image` under this video's pixel limits."""
        return dataclasses.replace(self.image, min_pixels=self.min_pixels, max_pixels=self.max_pixels)


def sample_indices(
    total_frames: int, duration_seconds: float, settings: VideoSettings, target_frames: int | None = None
) -> list[int]:
    """Which frames to take, ascending, each at most once.

    "paddle": int(duration * fps) frames, or `target_frames`, from equal intervals. "hf"
    (transformers 5.23): evenly spaced first frames; with neither fps nor `target_frames`, all of
    them up to max_frames. Raises ValueError for contradicting or impossible requests.
    """
    if total_frames < 1:
        raise ValueError(
            say(
                f"total_frames ({total_frames}) must be at least 1; drop the empty video",
                f"total_frames（{total_frames}）至少为 1；请去掉空的视频",
            )
        )
    if not (math.isfinite(duration_seconds) and duration_seconds > 0):
        raise ValueError(
            say(
                f"duration_seconds ({duration_seconds}) must be above 0; re-encode the video so that its "
                "length is stored",
                f"视频时长（{duration_seconds} 秒）须大于 0；请重新编码，使时长写入文件",
            )
        )
    if target_frames is not None and settings.fps is not None:
        raise ValueError(
            say(
                f"target_frames ({target_frames}) must not be combined with fps ({settings.fps}); set "
                "fps=None or drop target_frames",
                f"target_frames（{target_frames}）不能与 fps（{settings.fps}）同用；请设 fps=None，或去掉 "
                "target_frames",
            )
        )
    if settings.rule == "hf":
        return _sample_hf(total_frames, duration_seconds, settings, target_frames)
    if target_frames is not None:
        wanted = target_frames
        if wanted < 1:
            raise ValueError(
                say(
                    f"target_frames ({target_frames}) must be at least 1; drop it to sample by fps",
                    f"target_frames（{target_frames}）须至少为 1；去掉则按 fps 采样",
                )
            )
    elif settings.fps is not None:
        wanted = min(max(int(duration_seconds * settings.fps), settings.min_frames), settings.max_frames)
    else:
        raise ValueError(
            say(
                "fps (None) must be set where target_frames (None) is not given; use fps=2",
                "未给出 target_frames（None）时须设置 fps（现为 None）；请用 fps=2",
            )
        )
    bounds = np.linspace(0, total_frames, min(wanted, total_frames) + 1).astype(np.int64)
    first, last = bounds[:-1], bounds[1:] - 1
    return (first if settings.sampling == "leading" else (first + last) // 2).tolist()


def _sample_hf(total: int, duration_seconds: float, settings: VideoSettings, target_frames: int | None) -> list[int]:
    low, high = settings.min_frames, settings.max_frames
    if target_frames is None:
        # Not rounded: 66.7 frames give 67 steps of exactly one sampling period.
        wanted = float(total) if settings.fps is None else duration_seconds * settings.fps
        count = min(max(wanted, low), high, total)
    elif not low <= target_frames <= min(high, total):
        raise ValueError(
            say(
                f"target_frames ({target_frames}) must be from min_frames ({low}) to max_frames ({high}) and at "
                f"most the video's {total} frames "
                "under rule 'hf'; change it or use rule 'paddle'",
                f"规则 'hf' 下 target_frames（{target_frames}）须在 min_frames（{low}）与 max_frames（{high}）之间，且不超过视频的 "
                f"{total} 帧；请修改，或用规则 'paddle'",
            )
        )
    else:
        count = target_frames
    # float32, as the reference's arange: a step of 14.999999999 still reaches frame 15, not 14.
    positions = (np.arange(math.ceil(count)) * (total / count)).astype(np.float32)
    return np.minimum(positions.astype(np.int64), total - 1).tolist()


def timestamp_text(seconds: float) -> str:
    """ "time: HH:MM:SS.ss", hours unlimited. The seconds round on their own:
    59.996 reads 00:00:60.00.

    Raises ValueError for a negative or infinite time.
    """
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(
            say(
                f"seconds ({seconds}) must be at least 0; re-encode the video so that its times are stored",
                f"秒数（{seconds}）不能为负；请重新编码视频，使其存有时间",
            )
        )
    hours, rest = divmod(seconds, 3600)
    minutes, rest = divmod(rest, 60)
    return f"time: {int(hours):02d}:{int(minutes):02d}:{rest:05.2f}"


@lru_cache(maxsize=32)
def _font(path: str | None, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size) if path is None else ImageFont.truetype(path, size)
    except (OSError, ImportError) as error:  # ImportError: a pillow built without FreeType
        raise ValueError(
            say(
                f"font_path ({path!r}) cannot be opened ({error}); give a .ttf file, or set draw_timestamps to false",
                f"无法打开 font_path（{path!r}）：{error}；请给出 .ttf 文件，或设 draw_timestamps 为 false",
            )
        ) from error


def font_bytes(path: str | None) -> bytes:
    """The font file with which times are drawn: `path`, or the one inside pillow. Raises ValueError
    where it cannot be opened.
    """
    font = _font(path, 10)
    if isinstance(font, ImageFont.FreeTypeFont) and path is None:
        return bytes(font.font_bytes)
    try:
        with open(str(path), "rb") as stream:
            return stream.read()
    except OSError as error:
        raise ValueError(
            say(
                f"font_path ({path!r}) cannot be opened ({error}); give a .ttf file",
                f"font_path（{path!r}）无法打开（{error}）；请给出 .ttf 文件",
            )
        ) from error


def draw_timestamp(frame: Image.Image, seconds: float, font_path: str | None = None) -> None:
    """Write the time into the top left corner of an RGB frame, in place: black, white outline.

    Raises ValueError if the font cannot be opened or the frame is under 10 pixels.
    """
    font_size = int(min(frame.size) * FONT_SCALE)
    _check_drawable(frame.height, frame.width, "video")
    ImageDraw.Draw(frame).text(
        (0, 0),
        timestamp_text(seconds),
        font=_font(font_path, font_size),
        fill=(0, 0, 0),
        stroke_width=int(font_size * FONT_SCALE),
        stroke_fill=(255, 255, 255),
    )


def _check_drawable(height: int, width: int, label: str) -> None:
    """Raises ValueError for frames that have no room for their time."""
    if int(min(height, width) * FONT_SCALE) < 1:
        raise ValueError(
            say(
                f"{label} ({height}x{width} pixels) must be at least 10x10, since the time is written on each frame; "
                "enlarge it, or give its frames as images",
                f"{label}（{height}x{width} 像素）须至少 10x10，因为每帧都要写上时间；请放大，或改为图片",
            )
        )


def load_video(
    source: VideoSource, settings: VideoSettings, where: str = "", target_frames: int | None = None
) -> list[Image.Image]:
    """The chosen frames, timestamps drawn, then resized to the first frame's `smart_resize`: an
    even number of RGB images of one size.

    `source`: a path, `file:///` or `data:` URL or bytes of a GIF, APNG, animated WebP, or of
    anything PyAV decodes; or a list of pictures (whatever `load_image` takes), counted as 2 a
    second. A still picture is a video of one frame. An odd count repeats the last frame as drawn.
    `where` ("train.jsonl:17") opens every error about a file.
    Raises ValueError for missing, damaged, empty or too short files; ImportError, naming the extra,
    if PyAV is needed and missing.
    """
    pick = partial(sample_indices, settings=settings, target_frames=target_frames)
    frames: list[Image.Image] = []
    size: tuple[int, int] | None = None
    for seconds, frame in _read(source, pick, where):
        if settings.draw_timestamps:
            _check_drawable(frame.height, frame.width, describe("video", source, where))
            draw_timestamp(frame, seconds, settings.font_path)
        size = size or settings.frame.target_size(frame.height, frame.width)
        # Now, not in patchify_video: 180 frames of 4K are 4.5 GB, of max_pixels 0.5 GB.
        frames.append(resize(frame, size))
    if len(frames) % 2:
        frames.append(frames[-1].copy())
    return frames


def video_grid(source: VideoSource, settings: VideoSettings, where: str = "", target_frames: int | None = None) -> Grid:
    """(frames, patch rows, patch columns) that a video takes, without decoding it (but WebP and
    PNG, whose durations lie between their frames).

    Raises ValueError and ImportError like `load_video`.
    """
    if isinstance(source, list | tuple):
        total, duration = len(source), len(source) / LIST_FPS
        size = image_size(source[0], where) if source else (0, 0)
    else:
        label = describe("video", source, where)
        with open_source(source, label) as stream:
            animation = _open_animation(stream, label)
            if animation is not None:
                milliseconds = _durations(animation, stream, label)
                total, duration, size = len(milliseconds), sum(milliseconds) / 1000, animation.size[::-1]
            else:
                with _container(stream, label) as container:
                    total, duration, size = _measure(container, label)
    count = len(sample_indices(total, duration, settings, target_frames))
    if settings.draw_timestamps:
        _check_drawable(*size, describe("video", source, where))
    height, width = settings.frame.target_size(*size)
    return count + count % 2, height // settings.frame.patch_size, width // settings.frame.patch_size


def _read(source: VideoSource, pick: Pick, where: str) -> TimedFrames:
    if isinstance(source, list | tuple):
        yield from _read_list(source, pick, where)
        return
    label = describe("video", source, where)
    with open_source(source, label) as stream:
        animation = _open_animation(stream, label)
        if animation is not None:
            yield from _read_animation(animation, stream, pick, label)
        else:
            yield from _read_container(stream, pick, label)


def _read_list(sources: Sequence[ImageSource], pick: Pick, where: str) -> TimedFrames:
    prefix = f"{where}: " if where else ""
    if not sources:
        raise ValueError(
            say(
                f"{prefix}video (a list of 0 frames) must have at least one frame; add frames or drop the video",
                f"{prefix}视频（0 帧的列表）至少须有一帧；请补充帧，或去掉该视频",
            )
        )
    for index in pick(len(sources), len(sources) / LIST_FPS):
        yield index / LIST_FPS, load_image(sources[index], f"{prefix}frame {index}")


def _open_animation(stream: BinaryIO, label: str) -> Image.Image | None:
    """An animation, or a still picture in one of their formats; None for anything else, which may
    be a container.
    """
    with decode_errors(label):
        try:
            return Image.open(stream, formats=_ANIMATIONS)
        except UnidentifiedImageError:
            stream.seek(0)
            return None


def check_animation(source: bytes, label: str, max_pixels: int) -> None:
    """Raises ValueError for more than `max_pixels` in all frames of an animation together, without
    decoding any.
    """
    with open_source(source, label) as stream:
        animation = _open_animation(stream, label)
        if animation is not None:
            _stored_delays(animation, stream, label, max_pixels)


def _stored_delays(
    animation: Image.Image, stream: BinaryIO, label: str, max_pixels: int = MAX_ANIMATION_PIXELS
) -> list[float]:
    """Milliseconds of each frame of a GIF; of the other kinds, which tell them when they are
    decoded, none.

    Raises ValueError for more frames or pixels than an animation may have, before any is decoded,
    and for frames that are larger than the picture, which pillow would let grow.
    """
    delays: list[float] = []
    count = int(getattr(animation, "n_frames", 1)) if animation.format != "GIF" else 1
    if animation.format == "GIF":
        width, height = animation.size
        with decode_errors(label):
            for delay, right, bottom in islice(_gif_frames(stream), MAX_ANIMATION_FRAMES + 1):
                delays.append(delay)
                width, height = max(width, right), max(height, bottom)
        count = max(1, len(delays))
        if (width, height) != animation.size:
            raise ValueError(
                say(
                    f"{label} ({animation.width}x{animation.height}) must have no frames that reach beyond it ({width}x"
                    f"{height}); save it as mp4",
                    f"{label}（{animation.width}x{animation.height}）的帧不能超出它的范围（{width}x{height}）；请存为 mp4",
                )
            )
    pixels = count * animation.width * animation.height
    if count > MAX_ANIMATION_FRAMES or pixels > max_pixels:
        frames = f"more than {MAX_ANIMATION_FRAMES}" if count > MAX_ANIMATION_FRAMES else f"{count}"
        raise ValueError(
            say(
                f"{label} ({frames} frames of {animation.width}x{animation.height}) must have at most "
                f"{MAX_ANIMATION_FRAMES} frames and "
                f"{max_pixels} pixels in all; save it as mp4, or shorten or shrink it",
                f"{label}（{animation.width}x{animation.height} 的 {frames} 帧）至多 {MAX_ANIMATION_FRAMES} 帧、总计 "
                f"{max_pixels} 像素；请存为 mp4，或剪短、缩小",
            )
        )
    return delays


def _durations(animation: Image.Image, stream: BinaryIO, label: str) -> list[float]:
    """Milliseconds of each frame. Raises ValueError like `_stored_delays`."""
    delays = _stored_delays(animation, stream, label)
    if delays:
        return delays
    with decode_errors(label):
        for frame in ImageSequence.Iterator(animation):
            frame.load()  # WebP knows a frame's duration only once it is decoded
            delays.append(frame.info.get("duration") or DEFAULT_FRAME_MS)
    return delays


def _gif_frames(stream: BinaryIO) -> Iterator[tuple[float, int, int]]:
    """(milliseconds, right edge, lower edge) of each frame of a GIF from its blocks alone. Raises
    EOFError for a file that is cut off.
    """
    place = stream.tell()
    stream.seek(10)
    _skip_colours(stream, stream.read(3)[:1])
    delay = 0
    while (kind := stream.read(1)) in (b"!", b","):
        if kind == b"!":
            label, size = stream.read(1), stream.read(1)
            block = stream.read(size[0] if size else 0)
            if label == b"\xf9" and len(block) >= 3:
                delay = 10 * int.from_bytes(block[1:3], "little")
            if not size or size != b"\0":
                _skip_blocks(stream)
            continue
        place_of_frame = stream.read(9)
        left, top, width, height = (int.from_bytes(place_of_frame[i : i + 2], "little") for i in (0, 2, 4, 6))
        _skip_colours(stream, place_of_frame[8:])
        stream.read(1)
        _skip_blocks(stream)
        yield delay or DEFAULT_FRAME_MS, left + width, top + height
        delay = 0
    stream.seek(place)


def _skip_colours(stream: BinaryIO, flags: bytes) -> None:
    if flags and flags[0] & 0x80:
        stream.seek(3 << (flags[0] & 7) + 1, os.SEEK_CUR)


def _skip_blocks(stream: BinaryIO) -> None:
    while (size := stream.read(1)) != b"\0":
        if not size:
            raise EOFError(say("the file ends inside a frame", "文件在一帧之中结束"))
        stream.seek(size[0], os.SEEK_CUR)


def _read_animation(animation: Image.Image, stream: BinaryIO, pick: Pick, label: str) -> TimedFrames:
    milliseconds = _durations(animation, stream, label)
    total, duration = len(milliseconds), sum(milliseconds) / 1000
    for index in pick(total, duration):
        with decode_errors(label):
            animation.seek(index)
        yield index * duration / total, to_rgb(animation, label)


@contextmanager
def _container(stream: BinaryIO, label: str) -> Iterator[Any]:
    """An open container, by the one reader that its first bytes name. Raises ValueError for other
    files and damaged ones.
    """
    stream.seek(0)
    head = stream.read(192)
    stream.seek(0)
    reader = next((name for at, mark, name in _CONTAINERS if head[at : at + len(mark)] == mark), "")
    if not reader or (reader == "mpegts" and head[:1] != b"G"):
        raise ValueError(
            say(
                f"{label} cannot be decoded (it is no MP4, MOV, MKV, WebM, AVI, FLV, MPEG, WMV, GIF, WebP or "
                "APNG); replace the file, or re-encode "
                "it to mp4",
                f"{label} 无法解码（不是 MP4、MOV、MKV、WebM、AVI、FLV、MPEG、WMV、GIF、WebP 或 APNG）；请更换文件，或重新编码为 mp4",
            )
        )
    try:
        import av
    except ImportError as error:
        raise ImportError(
            say(
                f"{label} needs PyAV to be decoded; pip install av",
                f"解码 {label} 需要 PyAV；pip install av",
            )
        ) from error
    # Titles, which nothing here reads, are often GBK: PyAV before 19 would fail on them, and since
    # then has no such argument.
    old = {"metadata_errors": "ignore"} if int(av.__version__.split(".")[0]) < 19 else {}
    try:
        with av.open(stream, format=reader, options={"protocol_whitelist": "none"}, **old) as container:
            if not container.streams.video:
                raise ValueError(
                    say(
                        f"{label} must have a video stream; it holds only sound or data",
                        f"{label} 须有视频流；其中只有声音或数据",
                    )
                )
            yield container
    except av.error.FFmpegError as error:
        raise ValueError(
            say(
                f"{label} cannot be decoded ({error}); replace the file, or re-encode it to mp4",
                f"{label} 无法解码（{error}）；请替换该文件，或重新编码为 mp4",
            )
        ) from error


def _measure(container: Any, label: str) -> tuple[int, float, tuple[int, int]]:
    """(frames, seconds, (height, width)) of a container. Counting packets needs no decoding, and
    unlike the header's count it knows what an edit list discards.
    """
    video = container.streams.video[0]
    total = sum(1 for packet in container.demux(video) if packet.size and not packet.is_discard)
    rate = video.average_rate or video.guessed_rate
    if not total or not rate:
        raise ValueError(
            say(
                f"{label} ({total} frames at {rate} a second) must have frames and a frame rate; re-encode it to mp4",
                f"{label}（{total} 帧，每秒 {rate} 帧）须有画面和帧率；请重新编码为 mp4",
            )
        )
    size = (getattr(video, "height", 0), getattr(video, "width", 0))
    if 0 in size:
        raise ValueError(
            say(
                f"{label} must have a video stream of a known codec and size; re-encode it to mp4",
                f"{label} 须有编码与大小可识别的视频流；请重新编码为 mp4",
            )
        )
    return total, float(total / rate), size


def _read_container(stream: BinaryIO, pick: Pick, label: str) -> TimedFrames:
    with _container(stream, label) as container:
        total, duration, _ = _measure(container, label)
    wanted, decoded = pick(total, duration)[::-1], 0
    with _container(stream, label) as container:
        for decoded, frame in enumerate(container.decode(video=0), start=1):
            if decoded - 1 == wanted[-1]:
                yield wanted.pop() * duration / total, frame.to_image()
                if not wanted:
                    return
    raise ValueError(
        say(
            f"{label} must decode to {total} frames, got {decoded}; the file is cut or damaged, re-encode it to mp4",
            f"{label} 应解码出 {total} 帧，得到 {decoded} 帧；文件不完整或已损坏，请重新编码为 mp4",
        )
    )


def patchify_video(frames: Sequence[Image.Image], settings: VideoSettings) -> tuple[np.ndarray, Grid]:
    """RGB frames, an even number -> (pixel_values_PC float32, (T, patch rows, patch columns)); all
    get the first frame's size.

    Raises ValueError for an odd or empty list, or like `smart_resize`.
    """
    if not frames or len(frames) % 2:
        raise ValueError(
            say(
                f"number of frames ({len(frames)}) must be even and at least 2; load_video repeats the last one",
                f"帧数（{len(frames)}）须为偶数且至少为 2；load_video 会重复最后一帧",
            )
        )
    size = settings.frame.target_size(frames[0].height, frames[0].width)
    return patchify(np.stack([np.asarray(resize(frame, size)) for frame in frames]), settings.frame)

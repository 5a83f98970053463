"""URLs of pictures and videos in a request -> bytes that the processor may decode, under a policy.

Local files need an allowed folder, remote ones a public address (`fetch.py`). Formats are a closed
list: a playlist posing as a video would make the decoder open other files and addresses, a
PostScript file would start a program. Refuses to know: messages, tokens, the API.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from PIL import Image

from ernie_tune.config.language import say
from ernie_tune.data.media.images import decode_errors, describe, open_source
from ernie_tune.data.media.video import check_animation
from ernie_tune.serve.fetch import FetchPolicy, fetch
from ernie_tune.serve.pool import Lease

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
_ANIMATIONS = ("GIF", "PNG", "WEBP")


@dataclass(frozen=True)
class MediaPolicy:
    """`local_folder`: file:/// URLs inside it are allowed. `max_pixels`: of one picture or frame,
    before resizing.

    `max_video_pixels` and `max_animation_pixels` are of all frames, which are counted, not decoded.
    Animations are decoded whole and slowly: 2^29 pixels are some 10 seconds.
    """

    local_folder: Path | None = None
    fetch: FetchPolicy = field(default_factory=FetchPolicy)
    max_pixels: int = 64_000_000
    # of a container: some five minutes of 1920 x 1080 at 30 a second
    max_video_pixels: int = 1 << 34
    max_animation_pixels: int = 1 << 29  # of a GIF, APNG or WebP: 2,000 frames of 500 x 500


def read_image(url: str, policy: MediaPolicy, where: str = "", lease: Lease | None = None) -> bytes:
    """The bytes of a picture whose format and size are fine. Raises ValueError."""
    label = describe("image", url, where)
    data = read(url, policy, label, lease)
    with decode_errors(label):
        # the head alone; no pixel is decoded
        size = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS).size
    _check_size(size, policy, label)
    return data


def read_video(url: str, policy: MediaPolicy, where: str = "", lease: Lease | None = None) -> bytes:
    """The bytes of a video whose format and frame size are fine. Raises ValueError; ImportError
    where PyAV is needed and missing.
    """
    label = describe("video", url, where)
    data = read(url, policy, label, lease)
    if data[:4] in (b"GIF8", b"\x89PNG") or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        with decode_errors(label):
            size = Image.open(io.BytesIO(data), formats=_ANIMATIONS).size
        check_animation(data, label, policy.max_animation_pixels)
    elif data[4:8] == b"ftyp" or data[:4] == b"\x1aE\xdf\xa3" or (data[:4] == b"RIFF" and data[8:12] == b"AVI "):
        size = _container_size(data, policy, label, lease)
    else:
        raise ValueError(
            say(
                f"{label} must be MP4, MOV, WebM, MKV, AVI, GIF, WebP or APNG; convert it to MP4",
                f"{label} 须为 MP4、MOV、WebM、MKV、AVI、GIF、WebP 或 APNG；请转换为 MP4",
            )
        )
    _check_size(size, policy, label)
    return data


def _container_size(data: bytes, policy: MediaPolicy, label: str, lease: Lease | None) -> tuple[int, int]:
    """Of a frame. Raises ValueError where all frames together are too large, which takes no
    decoding to see.
    """
    try:
        import av
    except ImportError as error:
        raise ImportError(
            say(f"{label} needs PyAV to be decoded; pip install av", f"解码 {label} 需要 PyAV；请执行 pip install av")
        ) from error
    try:
        with av.open(io.BytesIO(data)) as container:
            # Of a codec that FFmpeg does not know, PyAV has neither a context nor a size.
            streams = [one for one in container.streams.video if getattr(one, "codec_context", None) is not None]
            if not streams or streams[0] != container.streams.video[0]:
                raise ValueError(
                    say(
                        f"{label} must have a video stream of a known codec; re-encode it to mp4",
                        f"{label} 须有编码可识别的视频流；请重新编码为 mp4",
                    )
                )
            width, height = streams[0].width, streams[0].height
            left = policy.max_video_pixels
            for packet in container.demux(streams[0]):
                left -= width * height if packet.size else 0
                if left < 0:
                    raise ValueError(
                        say(
                            f"{label} ({width}x{height}) must have at most {policy.max_video_pixels} pixels in all its "
                            "frames; shorten or shrink it",
                            f"{label}（{width}x{height}）的所有帧合计至多 {policy.max_video_pixels} 个像素；请剪短或缩小",
                        )
                    )
                if lease is not None:
                    lease.left()
            return width, height
    except av.error.FFmpegError as error:
        raise ValueError(
            say(
                f"{label} cannot be decoded ({error}); replace the file, or re-encode it to mp4",
                f"{label} 无法解码（{error}）；请更换文件，或重新编码为 mp4",
            )
        ) from error


def read(url: str, policy: MediaPolicy, label: str, lease: Lease | None = None) -> bytes:
    """The bytes behind a data:, file:/// or http(s) URL; a `lease` bounds a download. Raises
    ValueError.
    """
    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        # The scheme is case-insensitive; `open_source` knows it in lower case.
        data = open_source("data" + url[4:], label).read()
    elif scheme == "file":
        data = _read_local(url, policy, label)
    elif scheme in ("http", "https"):
        return fetch(url, policy.fetch, label, lease=lease)
    else:
        raise ValueError(
            say(
                f"{label} must be a data:, https:// or http:// URL; encode a file as data:image/png;base64,...",
                f"{label} 须为 data:、https:// 或 http:// 的 URL；文件请编码为 data:image/png;base64,...",
            )
        )
    _check_bytes(len(data), policy, label)
    return data


def _read_local(url: str, policy: MediaPolicy, label: str) -> bytes:
    parts = urlsplit(url)
    refused = say(
        f"{label} must be inside the folder that the server allows (allow_local_media); send the data as a data: URL",
        f"{label} 须位于服务器允许的文件夹内（allow_local_media）；请以 data: URL 发送数据",
    )
    if policy.local_folder is None or parts.netloc or parts.query or parts.fragment or "%00" in parts.path:
        raise ValueError(refused)
    try:
        path = Path(url2pathname(parts.path)).resolve()
        # One answer for everything outside, so that nobody can ask what exists.
        if not path.is_relative_to(policy.local_folder.resolve()) or not path.is_file():
            raise ValueError(refused)
        _check_bytes(path.stat().st_size, policy, label)
        return path.read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        raise ValueError(refused) from error


def _check_bytes(count: int, policy: MediaPolicy, label: str) -> None:
    if count > policy.fetch.max_bytes:
        raise ValueError(
            say(
                f"{label} ({count} bytes) must be at most {policy.fetch.max_bytes} bytes; send a smaller file",
                f"{label}（{count} 字节）至多 {policy.fetch.max_bytes} 字节；请发送更小的文件",
            )
        )


def _check_size(size: tuple[int, int], policy: MediaPolicy, label: str) -> None:
    if not 0 < size[0] * size[1] <= policy.max_pixels:
        raise ValueError(
            say(
                f"{label} ({size[0]}x{size[1]}) must have at least 1 and at most {policy.max_pixels} pixels; shrink it",
                f"{label}（{size[0]}x{size[1]}）须有 1 至 {policy.max_pixels} 个像素；请缩小",
            )
        )

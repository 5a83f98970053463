"""Pictures -> the vision tower's patches: decode to RGB, smart resize, normalise, cut into patches.
numpy and pillow only.

Refuses to know: tokens, chat templates, where a data set lives, paddle, the network (an http URL is
an error, never a download).
EXIF orientation is not applied: the models' own processors only `convert`, and turning a photo here
would shift its boxes. (Where transformers is given a path it does turn the picture; `data check`
names such photos.) Of an animated file the first frame counts; `video.py` reads the rest.

Legend: F frames, H and W pixels, C colours (3) or values per patch (588), P patches.
Source of the rules: the image-processing code beside the released weights.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO
from urllib.request import url2pathname

import numpy as np
from PIL import Image, UnidentifiedImageError

from ernie_tune.config.language import say

# they differ only for very narrow or very small images
RESIZE_RULES = ("paddle", "hf")
# The formats that a picture may have, whatever its name says: pillow knows more, among them
# PostScript, which starts another program.
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
MAX_RATIO = 200  # longest side over shortest
_SHOWN_CHARACTERS = 80  # of a path or data URL in an error
# What pillow raises for damaged files, found by feeding it damaged files of every common format.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, RuntimeError, struct.error)

ImageSource = str | os.PathLike[str] | bytes | Image.Image | np.ndarray
Grid = tuple[int, int, int]  # frames, patch rows, patch columns


@dataclass(frozen=True)
class ImageSettings:
    """How a picture becomes patches. Limits are in pixels after resizing; the defaults are those of
    `preprocessor_config.json`.
    """

    min_pixels: int = 3136  # 56 * 56
    max_pixels: int = 4_816_896  # 6144 tokens * 28 * 28
    patch_size: int = 14
    merge_size: int = 2
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    rule: str = "paddle"

    def __post_init__(self) -> None:
        if not 1 <= self.min_pixels <= self.max_pixels:
            raise ValueError(
                say(
                    f"min_pixels ({self.min_pixels}) must be at least 1 and at most max_pixels ("
                    f"{self.max_pixels}); swap or correct them",
                    f"min_pixels（{self.min_pixels}）须至少为 1 且不超过 max_pixels（{self.max_pixels}）；请对调或改正",
                )
            )
        if self.patch_size < 1 or self.merge_size < 1:
            raise ValueError(
                say(
                    f"patch_size ({self.patch_size}) and merge_size ({self.merge_size}) must be at least 1; copy "
                    "them from the model's config",
                    f"patch_size（{self.patch_size}）与 merge_size（{self.merge_size}）至少为 1；请照抄模型的 config",
                )
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                say(
                    f"mean {self.mean} and std {self.std} must have 3 values each, std above 0; copy them from "
                    "preprocessor_config.json",
                    f"mean {self.mean} 与 std {self.std} 须各有 3 个值，std 大于 0；请照抄 preprocessor_config.json",
                )
            )
        _check_rule(self.rule)

    @property
    def factor(self) -> int:
        """Both sides of a resized picture are multiples of this many pixels."""
        return self.patch_size * self.merge_size

    def target_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels after resizing. Raises ValueError like `smart_resize`."""
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        return smart_resize(height, width, **limits, factor=self.factor, rule=self.rule)


def _check_rule(rule: str) -> None:
    if rule not in RESIZE_RULES:
        raise ValueError(
            say(
                f"rule ({rule!r}) must be one of {RESIZE_RULES}; use 'paddle'",
                f"规则（{rule!r}）须为 {RESIZE_RULES} 之一；可用 'paddle'",
            )
        )


def smart_resize(
    height: int, width: int, *, min_pixels: int, max_pixels: int, factor: int = 28, rule: str = "paddle"
) -> tuple[int, int]:
    """(height, width): multiples of `factor` near the given shape, area within [min_pixels,
    max_pixels].

    "paddle" flattens ratios above 200 to 200 and raises ValueError where no such shape exists; "hf"
    (transformers 5.23) raises above 200 and may leave the limits. Halves round to even.
    """
    _check_rule(rule)
    if height < 1 or width < 1:
        raise ValueError(
            say(
                f"image size ({height}x{width}) must be at least 1x1 pixels; drop this image",
                f"图片（{height}x{width}）至少要有 1x1 像素；请去掉该图片",
            )
        )
    paddle = rule == "paddle"
    if max(height, width) / min(height, width) > MAX_RATIO:
        if not paddle:
            raise ValueError(
                say(
                    f"image size ({height}x{width}) must have a side ratio of at most {MAX_RATIO} under rule "
                    "'hf'; crop it or use rule 'paddle'",
                    f"规则 'hf' 下图片（{height}x{width}）的长宽比不能超过 {MAX_RATIO}；请裁剪，或用规则 'paddle'",
                )
            )
        height, width = _clamp_ratio(height, width, factor)
    # "hf" keeps a side that rounds to 0; the area is then below the minimum and grows again, to
    # another shape than "paddle"'s.
    floor = factor if paddle else 0
    new_height, new_width = (max(floor, round(side / factor) * factor) for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        least = 0 if paddle else factor
        new_height, new_width = (max(least, math.floor(side / shrink / factor) * factor) for side in (height, width))
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    if paddle and not min_pixels <= new_height * new_width <= max_pixels:
        raise ValueError(
            say(
                f"image size ({height}x{width}) must fit multiples of {factor} within min_pixels ("
                f"{min_pixels}) and max_pixels ({max_pixels}), got {new_height}x{new_width}; widen the "
                "limits or crop the image",
                f"图片（{height}x{width}）须能在 min_pixels（{min_pixels}）与 max_pixels（{max_pixels}"
                f"）之间缩放为 {factor} 的倍数，得到 {new_height}x{new_width}；请放宽限制或裁剪图片",
            )
        )
    return new_height, new_width


def _clamp_ratio(height: int, width: int, factor: int) -> tuple[int, int]:
    short = max(factor, round(min(height, width) / factor) * factor)
    long = short * MAX_RATIO // factor * factor
    return (long, short) if height > width else (short, long)


def load_image(source: ImageSource, where: str = "") -> Image.Image:
    """Decode a path, `file:///` or `data:` URL, bytes, pillow image or uint8 array [H,W], [H,W,3|4]
    into a new RGB image.

    Transparent pixels become white, 16-bit grey keeps its upper byte. `where`
    ("train.jsonl:17") opens every error.
    Raises ValueError when the source is missing, remote, damaged, empty, a decompression bomb, or
    has no 8- or 16-bit values.
    """
    label = describe("image", source, where)
    if isinstance(source, np.ndarray):
        return to_rgb(_from_array(source, label), label)
    if isinstance(source, Image.Image):
        return to_rgb(source, label)
    with open_source(source, label) as stream:
        return to_rgb(open_image(stream, label), label)


def open_image(stream: BinaryIO, label: str, formats: Sequence[str] = IMAGE_FORMATS) -> Image.Image:
    """The picture in a stream, its head read and no pixel decoded. Raises ValueError naming `label`
    unless it has one of the formats.
    """
    with decode_errors(label):
        try:
            return Image.open(stream, formats=_built_in(tuple(formats)))
        except UnidentifiedImageError as error:
            raise ValueError(
                say(f"it is none of {', '.join(formats)}", f"它不是 {', '.join(formats)} 中的任何一种")
            ) from error


@lru_cache(maxsize=8)
def _built_in(formats: tuple[str, ...]) -> tuple[str, ...]:
    """Those formats that this pillow was built with: it does not look them up one by one."""
    Image.init()
    return tuple(name for name in formats if name in Image.OPEN)


def image_size(source: ImageSource, where: str = "") -> tuple[int, int]:
    """(height, width) of a picture from its head alone. Raises ValueError like `load_image`."""
    label = describe("image", source, where)
    if isinstance(source, np.ndarray):
        return _from_array(source, label).size[::-1]
    if isinstance(source, Image.Image):
        return source.size[::-1]
    with open_source(source, label) as stream:
        return open_image(stream, label).size[::-1]


def describe(kind: str, source: object, where: str) -> str:
    """ "train.jsonl:17: image 'a.jpg'", for the start of an error."""
    if isinstance(source, str | os.PathLike):
        text = str(source)
        name = repr(text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "...")
    elif isinstance(source, bytes):
        name = f"of {len(source)} bytes"
    else:
        name = f"of type {type(source).__name__}"
    return f"{where}: {kind} {name}" if where else f"{kind} {name}"


def open_source(source: object, label: str) -> BinaryIO:
    """A readable, seekable stream of a path, `file:///` or `data:` URL, or bytes. Raises ValueError
    naming `label`.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            say(
                f"{label} must be a path, URL, bytes or decoded image; convert it first",
                f"{label} 须为路径、URL、字节或已解码的图片；请先转换",
            )
        )
    path = os.fspath(source)
    if path.startswith("data:"):
        return io.BytesIO(_decode_data_url(path, label))
    if path.startswith("file://"):
        if not path.startswith("file:///"):
            raise ValueError(
                say(
                    f"{label} must be file:/// and an absolute path, three slashes; or give the plain path",
                    f"{label} 须为 file:///（三个斜杠）加绝对路径；或直接写路径",
                )
            )
        path = url2pathname(path.removeprefix("file://"))
    elif "://" in path:
        raise ValueError(
            say(
                f"{label} must be a local file; download it first and put the path into the data",
                f"{label} 须为本地文件；请先下载，再在数据中填写路径",
            )
        )
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise ValueError(
            say(
                f"{label} must exist, no such file; correct the path: relative ones start beside the data file "
                "that names them, or in its media folder, others at the current folder",
                f"{label} 不存在；请改正路径（数据文件中的相对路径从该文件所在文件夹或其媒体文件夹算起，其他从当前文件夹算起）",
            )
        ) from error
    except (OSError, ValueError) as error:
        # a folder, no permission, a name too long, a zero byte in the name
        raise ValueError(
            say(
                f"{label} must be a readable file ({error}); correct the path or its permissions",
                f"{label} 须为可读文件（{error}）；请改正路径或权限",
            )
        ) from error


def _decode_data_url(url: str, label: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError(
            say(
                f"{label} must look like data:image/png;base64,...; encode it with base64",
                f"{label} 须形如 data:image/png;base64,...；请用 base64 编码",
            )
        )
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ValueError(
            say(
                f"{label} must hold valid base64 ({error}); encode the file again, without line breaks",
                f"{label} 须为合法的 base64（{error}）；请重新编码，不要换行",
            )
        ) from error


@contextmanager
def decode_errors(label: str) -> Iterator[None]:
    """Turn what pillow raises for damaged or dangerous files into ValueErrors naming `label`. Only
    pillow calls belong inside.
    """
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(
            say(
                f"{label} must be smaller ({error}); shrink the picture before training",
                f"{label} 过大（{error}）；请在训练前缩小图片",
            )
        ) from error
    except _DECODE_ERRORS as error:
        # pillow names the Python object that it read from, which means nothing to a reader
        why = say("its head is damaged", "文件头已损坏") if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            say(
                "{label} cannot be decoded ({why}); replace the file, or save it again as PNG or JPEG",
                "{label} 无法解码（{why}）；请替换该文件，或另存为 PNG 或 JPEG",
                label=label,
                why=why,
            )
        ) from error


def _from_array(array: np.ndarray, label: str) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(
            say(
                f"{label} ({array.dtype}, shape {list(array.shape)}) must be uint8 and [H,W], [H,W,3] or [H,W,4]; "
                "convert it first",
                f"{label}（{array.dtype}，形状 {list(array.shape)}）须为 uint8，形状 [H,W]、[H,W,3] 或 [H,W,4]；请先转换",
            )
        )
    if array.size == 0:
        raise ValueError(
            say(
                f"{label} (shape {list(array.shape)}) must have at least one pixel; drop it",
                f"{label}（形状 {list(array.shape)}）至少须有一个像素；请去掉它",
            )
        )
    return Image.fromarray(array)


def to_rgb(image: Image.Image, label: str) -> Image.Image:
    """A new 8-bit RGB image: white behind transparency, upper byte of 16-bit grey. Raises
    ValueError naming `label`.
    """
    if 0 in image.size:
        raise ValueError(
            say(
                f"{label} (size {image.width}x{image.height}) must have at least one pixel; drop it",
                f"{label}（{image.width}x{image.height}）至少要有一个像素；请去掉",
            )
        )
    if image.mode in ("I", "F"):  # pillow would clip these to 0..255 without a word
        raise ValueError(
            say(
                f"{label} (32-bit values, pillow mode {image.mode!r}) must have 8 or 16 bits a channel; "
                "rescale it to 8 bits first",
                f"{label}（32 位，pillow 模式 {image.mode!r}）每通道须为 8 或 16 位；请先转为 8 位",
            )
        )
    with decode_errors(label):
        if image.mode.startswith("I;16"):
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        image.load()
        if not image.has_transparency_data:
            return image.convert("RGB")
        rgba = image.convert("RGBA")
        canvas = Image.new("RGB", rgba.size, "white")
        canvas.paste(rgba, mask=rgba)
        return canvas


def patchify(frames_FHWC: np.ndarray, settings: ImageSettings) -> tuple[np.ndarray, Grid]:
    """Frames of values 0..255, already resized -> (pixel_values_PC float32, (F, patch rows, patch
    columns)).

    Patches: frames in order, inside a frame 2x2 blocks in row order, inside a block row order.
    Values of a patch: (channel, row, column). Raises ValueError for another shape.
    """
    p, m = settings.patch_size, settings.merge_size
    if frames_FHWC.ndim != 4 or frames_FHWC.shape[3] != 3 or 0 in frames_FHWC.shape:
        raise ValueError(
            say(
                f"frames (shape {list(frames_FHWC.shape)}) must be [F,H,W,3] with no empty axis; convert to RGB "
                "with load_image first",
                f"frames（形状 {list(frames_FHWC.shape)}）须为 [F,H,W,3]，各维不为空；请先用 load_image 转为 RGB",
            )
        )
    f, h, w, c = frames_FHWC.shape
    if h % settings.factor or w % settings.factor:
        raise ValueError(
            say(
                f"frame size ({h}x{w}) must be a multiple of {settings.factor} on both sides; resize to "
                "settings.target_size first",
                f"帧的大小（{h}x{w}）两边都须为 {settings.factor} 的整数倍；请先缩放到 settings.target_size",
            )
        )
    rows, columns = h // p, w // p
    split = frames_FHWC.reshape(f, rows // m, m, p, columns // m, m, p, c)
    # Reordering comes before the conversion: uint8 moves a quarter of the bytes.
    ordered = np.ascontiguousarray(split.transpose(0, 1, 4, 2, 5, 7, 3, 6))
    values = ordered.reshape(f * rows * columns, c, p * p).astype(np.float32)
    values /= np.float32(255)
    values -= np.asarray(settings.mean, np.float32)[:, None]
    values /= np.asarray(settings.std, np.float32)[:, None]
    return values.reshape(f * rows * columns, c * p * p), (f, rows, columns)


def resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Bicubic, to `size` = (height, width). Raises ValueError unless RGB."""
    if image.mode != "RGB":
        raise ValueError(
            say(
                f"image mode ({image.mode!r}) must be 'RGB'; pass the image through load_image first",
                f"图片模式（{image.mode!r}）须为 'RGB'；请先经 load_image 读取",
            )
        )
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def patchify_image(image: Image.Image, settings: ImageSettings) -> tuple[np.ndarray, Grid]:
    """One RGB image -> (pixel_values_PC float32, (1, patch rows, patch columns)). Raises ValueError
    like `smart_resize`.
    """
    resized = resize(image, settings.target_size(image.height, image.width))
    return patchify(np.asarray(resized)[None], settings)

"""What transformers 5 reads beside the weights of layout hf: names of the special tokens, limits by
its own keys, settings of clips with a font.

Its processor asks the tokenizer for `image_token` and five more by name, its image and video
processors take limits from `size` alone, and its video processor opens a font file to draw times
with, which must lie in the folder.
Refuses to know: weights, templates, what the other layouts' readers want.
Source: transformers 5.23, `ernie4_5_vl_moe` (processing, image and video processing).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ernie_tune.config.atomic import write_atomically
from ernie_tune.data.media.video import font_bytes
from ernie_tune.data.processor import PREPROCESSOR_FILE, Processor
from ernie_tune.data.tokenizer import (
    CONFIG_FILE,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    TEMPLATE_FILE,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
)

VIDEO_FILE, FONT_FILE = "video_preprocessor_config.json", "timestamps.ttf"
_TOKENS = {
    "image_token": IMAGE,
    "image_start_token": IMAGE_START,
    "image_end_token": IMAGE_END,
    "video_token": VIDEO,
    "video_start_token": VIDEO_START,
    "video_end_token": VIDEO_END,
}


def write_files(target: Path, folders: Sequence[Path], processor: Processor) -> None:
    """Complete the tokenizer's and processor's files in `target`. A font that one of `folders`
    brings is kept.

    A vocabulary without a placeholder for clips gives them that of pictures: transformers then
    takes them for pictures, which the export says.
    """
    special = processor.tokenizer.special
    held = _read(target / CONFIG_FILE)
    if isinstance(held.get("chat_template"), str) and not (target / TEMPLATE_FILE).is_file():
        # its processor reads no other
        write_atomically(target / TEMPLATE_FILE, held["chat_template"].encode())
    names = {name: token if token in special else IMAGE for name, token in _TOKENS.items()}
    _write(target / CONFIG_FILE, {**held, "extra_special_tokens": {**_named(held), **names}})
    images, videos = processor.images, processor.videos
    settings = _read(target / PREPROCESSOR_FILE)
    _write(target / PREPROCESSOR_FILE, {**settings, "size": _size(images.min_pixels, images.max_pixels)})
    clips = {
        **_read(target / VIDEO_FILE),
        "processor_class": settings["processor_class"],
        "video_processor_type": "Ernie4_5_VLMoeVideoProcessor",
        "size": _size(videos.min_pixels, videos.max_pixels),
        "image_mean": list(images.mean),
        "image_std": list(images.std),
        "patch_size": images.patch_size,
        "merge_size": images.merge_size,
        "temporal_patch_size": 2,
        "min_frames": videos.min_frames,
        "max_frames": videos.max_frames,
        "draw_on_frames": videos.draw_timestamps,
    }
    if videos.fps is not None:
        clips["fps"] = videos.fps
    name = Path(str(clips.get("font") or FONT_FILE)).name
    brought = next((folder / name for folder in folders if (folder / name).is_file()), None)
    clips["font"] = name if brought else FONT_FILE
    write_atomically(target / clips["font"], brought.read_bytes() if brought else font_bytes(videos.font_path))
    _write(target / VIDEO_FILE, clips)


def _size(least: int, most: int) -> dict[str, int]:
    return {"shortest_edge": least, "longest_edge": most}


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens that the folder names already; older files hold a list, which names none."""
    held = config.get("extra_special_tokens")
    return dict(held) if isinstance(held, Mapping) else {}


def _read(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def _write(file: Path, content: Mapping[str, Any]) -> None:
    write_atomically(file, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())

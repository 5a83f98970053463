"""Messages and media -> one row of model input with its targets: chat template + tokenizer +
patches in one object.

Training, rollout and serving all call `Processor.encode`: the ids of (prompt, then sampled answer)
and of the finished dialogue agree. Earlier answers are encoded with the text around them, as
FastDeploy and PaddleFormers encode the history that they are handed.
Refuses to know: data set formats, batching, packing, models, paddle.

Legend: L tokens of a row, P patches, C values per patch (588), n images and videos.
Source: the processing code and settings beside the released weights.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.config.atomic import write_atomically
from ernie_tune.config.foreign import reading
from ernie_tune.config.language import say
from ernie_tune.data.chat import (
    END,
    OPTIONAL_TOKENS,
    PROMPT_TOKENS,
    SEPARATOR,
    ChatTemplate,
    Message,
    Piece,
    prefix,
    runs,
)
from ernie_tune.data.media.images import Grid, ImageSettings, image_size, load_image, patchify_image
from ernie_tune.data.media.video import VideoSettings, load_video, patchify_video, video_grid
from ernie_tune.data.templates import RELEASED, TEMPLATE_KEY, TRANSFORMERS, Placeholders, with_template
from ernie_tune.data.tensors import Inputs, template_inputs, text_inputs
from ernie_tune.data.tokenizer import StreamDecoder, Tokenizer, folder_with_tokenizer, read_json
from ernie_tune.models.inputs import Row, feature_count
from ernie_tune.models.presets import shipped_folder

PREPROCESSOR_FILE = "preprocessor_config.json"
# Both sides of a frame are multiples of 28: between limits that are equal only some squares fit.
_ROOM = 0.6
# Our settings -> keys of preprocessor_config.json. Released files hold the first four; a font is
# local to a machine and never written.
_IMAGE_KEYS = {
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "mean": "image_mean",
    "std": "image_std",
    "patch_size": "patch_size",
    "merge_size": "merge_size",
    "rule": "resize_rule",
}
_VIDEO_KEYS = {
    "fps": "fps",
    "min_frames": "min_frames",
    "max_frames": "max_frames",
    "min_pixels": "video_min_pixels",
    "max_pixels": "video_max_pixels",
    "sampling": "frames_sample",
    "rule": "frames_rule",
    "draw_timestamps": "draw_timestamps",
}
# The classes of the readers that search for either placeholders: PaddleFormers' (without them its
# AutoProcessor gives a tokenizer), and transformers'.
_CLASSES = {
    RELEASED: {"processor_class": "Ernie4_5_VLProcessor", "image_processor_type": "Ernie4_5_VLImageProcessor"},
    TRANSFORMERS: {
        "processor_class": "Ernie4_5_VLMoeProcessor",
        "image_processor_type": "Ernie4_5_VLMoeImageProcessor",
    },
}
_PREPROCESSOR = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}


class RowTooLong(ValueError):
    """A row above max_tokens. It is never cut, a cut could part an image: drop the row and count
    it, or raise the limit.
    """


@dataclass(frozen=True)
class Encoded:
    """One row and its targets: `trained_L[i]` says whether token i is to be predicted."""

    row: Row
    trained_L: np.ndarray  # bool
    num_images: int = 0
    num_videos: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.row.input_ids_L)

    @property
    def num_trained(self) -> int:
        return int(self.trained_L.sum())

    def extended(self, answer_ids: Sequence[int], trained: bool = True) -> Encoded:
        """The same row with sampled ids behind it, as targets or not.

        They stay as they were sampled, and are not what the text of the answer gives as history:
        there the space before an answer and its first word may be one token, here they are two.
        """
        ids_L = np.concatenate([self.row.input_ids_L, np.asarray(answer_ids, np.int64)])
        trained_L = np.concatenate([self.trained_L, np.full(len(answer_ids), trained)])
        return dataclasses.replace(self, row=dataclasses.replace(self.row, input_ids_L=ids_L), trained_L=trained_L)


class Processor:
    """One model's way of turning a dialogue into input, and ids back into text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: str = "hf",
        images: ImageSettings | None = None,
        videos: VideoSettings | None = None,
        preprocessor: Mapping[str, Any] | None = None,
    ) -> None:
        """`template`: a variant of `ChatTemplate`. `preprocessor`: a preprocessor_config.json whose
        other keys `save_pretrained` keeps.

        Raises ValueError for an unknown variant or a vocabulary without the tokens of every prompt.
        """
        self.tokenizer = tokenizer
        self.template = ChatTemplate(template, tokenizer.special)
        self.images = images or ImageSettings()
        self.videos = videos or VideoSettings(image=self.images)
        self.tokens = tokenizer.token_ids()
        ids = {token: tokenizer.token_id(token) for token in PROMPT_TOKENS}
        self.stop_ids = (ids[END], ids[SEPARATOR])  # either may end an answer
        self._preprocessor = dict(_PREPROCESSOR if preprocessor is None else preprocessor)
        # whether the folder's model has pictures, as far as the folder says
        self.sees = preprocessor is not None
        self._media_ids = {
            "image": (self.tokens.image_start, self.tokens.image, self.tokens.image_end),
            "video": (self.tokens.video_start, self.tokens.video, self.tokens.video_end),
        }

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        template: str | None = None,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> Processor:
        """Read a model folder, or the model that comes with the package ("nano"): tokenizer, pixel
        and frame settings, and the template variant if ernie_tune wrote the folder (else "hf").

        `min_pixels` and `max_pixels` of images replace the folder's. Raises ValueError like
        `Tokenizer.from_folder` and the settings.
        """
        path = shipped_folder(path) or path
        tokenizer = Tokenizer.from_folder(path)
        saved, images, videos = media_settings(path, min_pixels, max_pixels)
        made = cls(tokenizer, template or tokenizer.config.get(TEMPLATE_KEY, "hf"), images, videos, saved or None)
        config = Path(path) / "config.json"
        made.sees = (Path(path) / PREPROCESSOR_FILE).is_file()
        if config.is_file():
            made.sees = "vision_config" in read_json({config.name: config.read_bytes()}, config.name, str(path))
        return made

    @classmethod
    def bundled(
        cls,
        name: str = "small",
        template: str = "hf",
        *,
        min_pixels: int = ImageSettings.min_pixels,
        max_pixels: int = ImageSettings.max_pixels,
    ) -> Processor:
        """The processor for a model built from a preset, with the shipped tokenizer `name` ("small"
        or "tiny").
        """
        return cls(Tokenizer.bundled(name), template, ImageSettings(min_pixels, max_pixels))

    def with_videos(
        self, *, fps: float | None = None, max_frames: int | None = None, max_pixels: int | None = None
    ) -> Processor:
        """The same processor with other limits for videos; None keeps a value. Lower limits give
        way to a smaller upper one, that of pixels so far that frames of every shape fit.
        """
        v = self.videos
        frames = v.max_frames if max_frames is None else max_frames
        pixels = v.max_pixels if max_pixels is None else max_pixels
        videos = dataclasses.replace(
            v,
            fps=v.fps if fps is None else fps,
            max_frames=frames,
            min_frames=min(v.min_frames, frames),
            max_pixels=pixels,
            min_pixels=v.min_pixels if v.min_pixels <= pixels else int(_ROOM * pixels),
        )
        made = Processor(self.tokenizer, self.template.variant, self.images, videos, self._preprocessor)
        made.sees = self.sees
        return made

    def save_pretrained(self, folder: str | os.PathLike[str], placeholders: Placeholders = RELEASED) -> list[str]:
        """Write all that another tool needs to make the same rows: tokenizer files with the chat
        template, and pixel settings.

        `placeholders`: those that the folder's readers search for. Returns what had to be changed
        in the templates that the tokenizer came with, one line each (`templates.py`).
        """
        ours = self.template.to_jinja(*placeholders)
        files, changes = with_template(
            self.tokenizer.files, self.tokenizer.where, placeholders, ours, self.template.variant, self.sees
        )
        self.tokenizer.save(folder, files)
        images, videos = dataclasses.asdict(self.images), dataclasses.asdict(self.videos)
        settings = {
            **_named(self._preprocessor, placeholders),
            **{key: images[name] for name, key in _IMAGE_KEYS.items()},
            **{key: videos[name] for name, key in _VIDEO_KEYS.items()},
        }
        write_atomically(Path(folder) / PREPROCESSOR_FILE, json.dumps(settings, indent=2) + "\n")
        return changes

    def encode(
        self,
        messages: Sequence[Message],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = False,
        max_tokens: int | None = None,
        where: str = "",
        made: dict[tuple[str, int], tuple[np.ndarray, Grid]] | None = None,
    ) -> Encoded:
        """One dialogue as a row. `images` and `videos` fill, in order, the tags and parts that
        carry no source of their own.

        A medium is whatever `load_image` or `load_video` takes. `where` ("train.jsonl:17") opens
        errors. `made`: patches by kind and id of the source, read and added to, so that dialogues
        about one picture cut it once. Raises ValueError when tags and media differ in number, for
        malformed messages and unreadable media, and its subclass RowTooLong above `max_tokens`.
        """
        pieces = self.template.pieces(
            messages, tools=tools, thinking=thinking, add_generation_prompt=add_generation_prompt, where=where
        )
        given = {"image": [] if images is None else list(images), "video": [] if videos is None else list(videos)}
        for kind, sources in given.items():
            _check_counts(kind, pieces, sources, where)
        return self._encode(pieces, given, max_tokens, where, made)

    def encode_result(self, content: str, images: Sequence[Any] = (), *, thinking: bool | None = None) -> Encoded:
        """What follows an assistant's turn that called a tool: the end of that turn, the tool's
        result, and the beginning of the next turn. Nothing of it is a target. Raises as `encode`.
        """
        turns: list[Message] = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
        turns.append({"role": "tool", "content": content})
        pieces = self.template.pieces(turns, thinking=thinking, add_generation_prompt=True)
        end = max(i for i, piece in enumerate(pieces) if piece.kind == "token" and piece.text == SEPARATOR)
        _check_counts("image", pieces, images, "")
        encoded = self._encode(pieces[end:], {"image": list(images), "video": []}, None, "")
        encoded.trained_L[:] = False
        return encoded

    def encode_plain(self, content: Any, *, max_tokens: int | None = None, where: str = "") -> Encoded:
        """A text, or a list of parts that carry their media, without a dialogue around it: what is
        embedded. Nothing of it is a target. Raises as `encode`.
        """
        pieces = self.template.plain(content, where)
        for kind in ("image", "video"):
            _check_counts(kind, pieces, (), where)
        return self._encode(pieces, {"image": [], "video": []}, max_tokens, where)

    def _encode(
        self,
        pieces: Sequence[Piece],
        given: dict[str, list[Any]],
        max_tokens: int | None,
        where: str,
        made: dict[tuple[str, int], tuple[np.ndarray, Grid]] | None = None,
    ) -> Encoded:
        if max_tokens is not None and any(piece.kind == "image" for piece in pieces):
            # by the heads of its pictures: one of 49 million pixels is 200 MB when decoded
            tokens = self._count(pieces, {kind: [*sources] for kind, sources in given.items()}, where)[0]
            _check_length(tokens, max_tokens, where)
        ids: list[int] = []
        trained: list[bool] = []
        patches: list[np.ndarray] = []
        grids: list[Grid] = []
        for run in runs(pieces):
            piece = run[0]
            if piece.kind not in given:
                new, marks = self._text(run)
                ids += new
                trained += marks
                continue
            source = piece.source if piece.source is not None else given[piece.kind].pop(0)
            key = (piece.kind, id(source))
            found = made.get(key) if made is not None else None
            with _turn(piece.kind, source, where) if max_tokens is not None else nullcontext():
                pixels_PC, grid = found or self.patches(piece.kind, source, where)
            if made is not None:
                made[key] = (pixels_PC, grid)
            patches.append(pixels_PC)
            grids.append(grid)
            new = self._placeholders(piece.kind, grid)
            ids += new
            trained += [False] * len(new)
        _check_length(len(ids), max_tokens, where)
        row = Row(
            np.asarray(ids, np.int64),
            np.concatenate(patches) if patches else None,
            np.asarray(grids, np.int64) if grids else None,
        )
        assert int(np.isin(row.input_ids_L, self.tokens.placeholders()).sum()) == sum(map(feature_count, grids))
        kinds = [piece.kind for piece in pieces]
        return Encoded(row, np.asarray(trained, bool), kinds.count("image"), kinds.count("video"))

    def _text(self, run: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """Ids of one run of text, and whether each is a target: as the piece says in which the
        token ends.
        """
        ids = self.tokenizer.encode("".join(piece.text for piece in run), allow_special=run[0].kind == "token")
        if len(run) == 1:
            return ids, [run[0].trained] * len(ids)
        ends = np.cumsum([len(self.tokenizer.token_bytes(i)) for i in ids])
        bounds = np.cumsum([len(piece.text.encode()) for piece in run])
        return ids, [run[k].trained for k in np.searchsorted(bounds, ends)]

    def measure(
        self,
        messages: Sequence[Message],
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        add_generation_prompt: bool = False,
        where: str = "",
    ) -> tuple[int, int]:
        """(tokens, tokens before the first target) of the row that `encode` would make: pictures
        and clips are measured by their heads, not decoded.

        Raises ValueError and ImportError like `encode`.
        """
        pieces = self.template.pieces(
            messages, tools=tools, thinking=thinking, add_generation_prompt=add_generation_prompt, where=where
        )
        given = {"image": list(images), "video": list(videos)}
        for kind, sources in given.items():
            _check_counts(kind, pieces, sources, where)
        return self._count(pieces, given, where)

    def _count(self, pieces: Sequence[Piece], given: dict[str, list[Any]], where: str) -> tuple[int, int]:
        """What `measure` returns. Empties the lists of media."""
        tokens, prompt = 0, -1
        for run in runs(pieces):
            piece = run[0]
            if piece.kind in given:
                source = piece.source if piece.source is not None else given[piece.kind].pop(0)
                tokens += len(self._placeholders(piece.kind, self.grid(piece.kind, source, where)))
                continue
            ids, trained = self._text(run)
            if prompt < 0 and any(trained):
                prompt = tokens + trained.index(True)
            tokens += len(ids)
        return tokens, tokens if prompt < 0 else prompt

    def grid(self, kind: str, source: Any, where: str = "") -> Grid:
        """(frames, patch rows, patch columns) of a picture or clip, by its head."""
        if kind == "video":
            return video_grid(source, self.videos, where)
        height, width = self.images.target_size(*image_size(source, where))
        return 1, height // self.images.patch_size, width // self.images.patch_size

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of an answer: without special tokens, but with the marks of thoughts and tools, for
        `split_reasoning`. `skip_special_tokens` False: with all of them."""
        whole = (int(i) for i in ids)  # rows of tensors hand out tensors
        return self.tokenizer.decode(whole, skip_special=skip_special_tokens, keep=OPTIONAL_TOKENS)

    def stream(self) -> StreamDecoder:
        """`decode` for ids that arrive one by one."""
        return self.tokenizer.stream(skip_special=True, keep=OPTIONAL_TOKENS)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = False,
        enable_thinking: bool | None = None,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
    ) -> Any:
        """transformers' call: messages, or a list of conversations, as text; with `tokenize` as
        ids; with `return_dict` as the inputs of `model.generate` (`tensors.inputs_of`), filled up
        on the left.

        `images`, `videos`: media of the tags and of parts without a source, a list for each
        conversation where there are several. `return_tensors`: "np" or "pd". Raises as `encode`.
        """
        return template_inputs(
            self,
            conversation,
            images,
            videos,
            tokenize=tokenize,
            return_dict=return_dict,
            return_tensors=return_tensors,
            tools=tools or (),
            thinking=enable_thinking,
            add_generation_prompt=add_generation_prompt,
        )

    def __call__(
        self,
        text: str | Sequence[str],
        images: Any = None,
        videos: Any = None,
        *,
        return_tensors: str | None = None,
        padding: bool = True,
    ) -> Inputs:
        """transformers' call: texts as `apply_chat_template` renders them, with one placeholder a
        medium, and their media -> the inputs of `model.generate`, always filled up to one length.
        """
        return text_inputs(self, text, images, videos, return_tensors)

    def batch_decode(self, rows: Iterable[Iterable[int]], skip_special_tokens: bool = True) -> list[str]:
        """`decode` of each row."""
        return [self.decode(row, skip_special_tokens) for row in rows]

    def patches(self, kind: str, source: Any, where: str = "") -> tuple[np.ndarray, Grid]:
        """The patches [P, C] of a picture ("image") or clip ("video") and their grid."""
        if kind == "image":
            return patchify_image(load_image(source, where), self.images)
        return patchify_video(load_video(source, self.videos, where), self.videos)

    def _placeholders(self, kind: str, grid: Grid) -> list[int]:
        start, placeholder, end = self._media_ids[kind]
        if start is None or placeholder is None or end is None:
            raise ValueError(
                say(
                    f"vocabulary of {self.tokenizer.where} must have the {kind} markers and placeholder; use "
                    "the tokenizer of a vision-language model",
                    f"{self.tokenizer.where} 的词表中须有 {kind} 的标记和占位符；请用视觉语言模型的分词器",
                )
            )
        return [start, *[placeholder] * feature_count(grid), end]


_LARGE_PIXELS = 1 << 24
_large_pictures = threading.Lock()


def _turn(kind: str, source: Any, where: str) -> AbstractContextManager[Any]:
    """One large picture at a time: while it is decoded it takes four to eight bytes a pixel, and a
    server, which alone sets `max_tokens`, prepares several requests at once.
    """
    height, width = image_size(source, where) if kind == "image" else (0, 0)
    return _large_pictures if height * width > _LARGE_PIXELS else nullcontext()


def _check_length(tokens: int, max_tokens: int | None, where: str) -> None:
    if max_tokens is not None and tokens > max_tokens:
        raise RowTooLong(
            say(
                f"{prefix(where)}row ({tokens} tokens) must have at most max_tokens ({max_tokens}); "
                "raise it, lower max_pixels, or drop the row",
                f"{prefix(where)}该行（{tokens} 个 token）不能超过 max_tokens（{max_tokens}"
                "）；请调大、减小 max_pixels，或去掉该行",
            )
        )


AutoProcessor = Processor  # the name users of other libraries look for


def media_settings(
    path: str | os.PathLike[str], min_pixels: int | None = None, max_pixels: int | None = None
) -> tuple[dict[str, Any], ImageSettings, VideoSettings]:
    """(a folder's preprocessor_config.json, its settings of pictures, of clips): {} and defaults
    where it has none.

    `min_pixels` and `max_pixels` of images replace the folder's. Raises ValueError for settings
    that do not exist.
    """
    file = folder_with_tokenizer(Path(path)) / PREPROCESSOR_FILE
    saved = read_json({PREPROCESSOR_FILE: file.read_bytes()} if file.is_file() else {}, PREPROCESSOR_FILE, str(path))
    limits = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    values = {**_known(saved, _IMAGE_KEYS), **{name: limit for name, limit in limits.items() if limit is not None}}
    with reading(file):
        images = ImageSettings(**values)
        return saved, images, VideoSettings(**_known(saved, _VIDEO_KEYS), image=images)


def _named(preprocessor: Mapping[str, Any], placeholders: Placeholders) -> dict[str, Any]:
    """preprocessor_config.json with the classes by which its readers' Auto classes find theirs.
    Names of a third party are kept.
    """
    wanted = _CLASSES[placeholders]
    others = [classes[key] for classes in _CLASSES.values() for key in classes]
    kept = {key: value for key, value in preprocessor.items() if not (key in wanted and value in others)}
    return {**wanted, **kept}


def _known(saved: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The settings among `saved`, under our names; JSON lists as tuples."""
    values = {name: saved[key] for name, key in keys.items() if key in saved}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _check_counts(kind: str, pieces: Sequence[Piece], sources: Sequence[Any], where: str) -> None:
    open_slots = sum(piece.kind == kind and piece.source is None for piece in pieces)
    if open_slots != len(sources):
        raise ValueError(
            say(
                f"{prefix(where)}number of <{kind}> tags and {kind} parts without a source ({open_slots}) "
                f"must equal the number of {kind}s given ({len(sources)}); add or remove tags or {kind}s",
                f"{prefix(where)}<{kind}> 标记与没有来源的 {kind} 部分（{open_slots} 个）须与给出的 {kind}"
                f"（{len(sources)} 个）相等；请增减标记或 {kind}",
            )
        )

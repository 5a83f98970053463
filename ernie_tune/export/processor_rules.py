"""What FastDeploy's processors make of a request to a folder, written down a second time from its
own side.

The command line gives limits and frames (the folder's are not read); the chat template is rendered,
the text is searched for `<|image@placeholder|>` and `<|video@placeholder|>` and cut there, every
stretch between is tokenised, every medium becomes its run of placeholders, and three positions
count on. Ids from the image placeholder's on are sent to the vision experts, ids from
`len(tokenizer.model)` on get no probability. What has no placeholder in the text is dropped without
a word.

It shares nothing with `data/`, so that a mistake there is found here. PaddleFormers 1.2.0 works
alike but for its defaults, and splits at a placeholder between its markers.
Legend: L tokens of a prompt, P patches, C values per patch. Refuses to know: our model and
processor, how folders are written, weights, file formats of clips, GPUs. Source, read at the
commits of `CHECKED`: mm_model_config.py, ernie_encoding.py, process.py, adaptive_processor.py,
chat_utils.py, ernie4_5_tokenizer.py, args_utils.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2.sandbox
import numpy as np
import sentencepiece
from PIL import Image

from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import say

Array = np.ndarray[Any, Any]
CHECKED = {
    "FastDeploy": "develop e53f518 (2026-04-15): files, weight names, quantisation table, argument defaults, chat template, placeholders, "
    "tokens, positions, pixels, expert mask, vocabulary bound",
    "FastDeploy (read only)": "frames of clips: ernie_encoding.py at 131952a",
    "PaddleFormers": "1.2.0: placeholders between their markers, marker names in config.json, processor classes",
    "vLLM (read only)": "ernie45_vl.py at 00b9d65, ernie45_vl_moe.py at 01dbb08: placeholders, marker names",
    "transformers": "5.23: placeholders, names of weights",
}
IMAGE, VIDEO = "<|image@placeholder|>", "<|video@placeholder|>"
FILL = "<|IMAGE_PLACEHOLDER|>"  # the token of both, many times
MARKERS = ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|VIDEO_START|>", "<|VIDEO_END|>")
ENDS = ("</s>", "<|end_of_sentence|>")  # either may end an answer
_SPOKEN = (*ENDS, "<|begin_of_sentence|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
_PIXEL = 28 * 28
# What is served where --mm-processor-kwargs says nothing, and the key of preprocessor_config.json
# that says the same to us.
DEFAULTS: Mapping[str, tuple[int | str, str]] = {
    "image_min_pixels": (4 * _PIXEL, "min_pixels"),
    "image_max_pixels": (6177 * _PIXEL, "max_pixels"),
    "video_min_pixels": (299 * _PIXEL, "video_min_pixels"),
    "video_max_pixels": (1196 * _PIXEL, "video_max_pixels"),
    "video_min_frames": (16, "min_frames"),
    "video_max_frames": (180, "max_frames"),
    "video_fps": (2, "fps"),
    "video_frames_sample": ("leading", "frames_sample"),
    "video_target_frames": (-1, ""),
}
LIMITS = {"image": 1, "video": 1}  # --limit-mm-per-prompt


# --- the command line -----------------------------------------------------------------------------


def read_script(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """(flag -> value, exported variables) of a folder's serve.sh. Raises OSError where there is
    none.
    """
    lines = (folder / "serve.sh").read_text(encoding="utf-8").replace("\\\n", " ").split("\n")
    exported = dict(line.removeprefix("export ").split("=", 1) for line in lines if line.startswith("export "))
    words = next((shlex.split(line) for line in lines if line.startswith("exec ")), [])
    flags = {a: b for a, b in pairwise(words) if a.startswith("--")}
    return flags, exported


def served_settings(flags: Mapping[str, str]) -> dict[str, int | str]:
    """Limits and frames that requests get: a value of another type than the default's makes
    FastDeploy ignore them all.
    """
    told = json.loads(flags.get("--mm-processor-kwargs", "{}"))
    default = {name: value for name, (value, _) in DEFAULTS.items()}
    if any(name in default and type(value) is not type(default[name]) for name, value in told.items()):
        return default
    return {**default, **{name: value for name, value in told.items() if name in default}}


def command_problems(folder: Path, flags: Mapping[str, str], exported: Mapping[str, str]) -> list[str]:
    """What the folder's command forgets. Quantisation is judged by
    `fastdeploy_rules.quantisation`.
    """
    problems = []
    if flags.get("--load-choices") != "default_v1":
        problems.append(
            "serve.sh must pass --load-choices default_v1: FastDeploy's older loader puts text experts into "
            "image experts"
        )
    if (folder / ".cache").is_dir():
        for name, value in {"FD_ENABLE_MODEL_LOAD_CACHE": "1", "FD_USE_MACHETE": "0"}.items():
            if exported.get(name) != value:
                problems.append(f"serve.sh must export {name}={value}: the load cache would not be read otherwise")
    if not (folder / "preprocessor_config.json").is_file() or "--mm-processor-kwargs" not in flags:
        seen = "vision_config" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return [*problems, "serve.sh must pass --mm-processor-kwargs with the folder's limits"] if seen else problems
    if "--reasoning-parser" not in flags:
        problems.append("serve.sh must pass --reasoning-parser: thoughts would stand in the answers")
    own = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings = served_settings(flags)
    for name, (_, key) in DEFAULTS.items():
        wanted = own.get(key)
        if key == "fps" and (wanted is None or wanted != int(wanted)):
            continue  # FastDeploy takes whole frames a second: the nearest is passed, and said
        if wanted is not None and settings[name] != wanted:
            problems.append(
                f"{name} ({settings[name]}, as FastDeploy would serve) must be {wanted}, as {key} of "
                "preprocessor_config.json says: "
                "pass it in --mm-processor-kwargs"
            )
    return problems


# --- the vocabulary -------------------------------------------------------------------------------


class Vocabulary:
    """A folder's tokens as FastDeploy's tokenizer has them: pieces of the model file, and added
    tokens that are cut out first.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ValueError where tokenizer.model is missing or spoilt, or JSON cannot be read."""
        names = ("tokenizer.model", "spm.model", "ernie_token_100k.model")
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            raise ValueError(
                say(
                    f"{folder} must hold {names[0]}: FastDeploy has no tokenizer otherwise; copy the release's",
                    f"{folder} 中须有 {names[0]}：否则 FastDeploy 没有分词器；请复制发布版中的文件",
                )
            )
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.Load(str(file))
        except (RuntimeError, OSError) as error:
            raise ValueError(
                say(
                    f"{file} must be a sentencepiece model ({error}); copy the release's, a Git LFS pointer is "
                    "not the file",
                    f"{file} 须为 sentencepiece 模型（{error}）；请复制发布版中的文件，Git LFS 指针不是文件本身",
                )
            ) from error
        # --ori_vocab_size: ids from here on are never generated
        self.bound: int = self.model.get_piece_size()
        config = _json(folder / "tokenizer_config.json")
        roles = _json(folder / "special_tokens_map.json")
        named = [*_strings(config.values()), *_strings(roles.values())]
        decoder = {entry["content"]: int(i) for i, entry in config.get("added_tokens_decoder", {}).items()}
        self.added: dict[str, int] = {**decoder, **_json(folder / "added_tokens.json")}
        for token in [
            *named,
            *config.get("additional_special_tokens", []),
            *roles.get("additional_special_tokens", []),
        ]:
            text = token["content"] if isinstance(token, dict) else token
            if text not in self.added and self._piece(text) is not None:
                self.added[text] = self.model.piece_to_id(text)
        found = sorted(self.added, key=len, reverse=True)
        self._cut = re.compile("(" + "|".join(map(re.escape, found)) + ")") if found else None

    def _piece(self, token: str) -> int | None:
        i = int(self.model.piece_to_id(token))
        return i if i != self.model.unk_id() or token == self.model.id_to_piece(i) else None

    def id_of(self, token: str) -> int | None:
        """The id of a token, None where there is none."""
        return self.added.get(token, self._piece(token))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for i, part in enumerate(self._cut.split(text) if self._cut else [text]):
            ids += [self.added[part]] if i % 2 else self.model.encode(part) if part else []
        return ids

    def findings(self) -> list[str]:
        """What FastDeploy would never generate, and what it would send to the wrong experts. Empty:
        nothing.
        """
        found: list[str] = []
        spoken = {token: i for token in _SPOKEN if (i := self.id_of(token)) is not None}
        lost = [f"{token} ({i})" for token, i in spoken.items() if i >= self.bound]
        if lost:
            tokens = ", ".join(lost)
            found.append(
                say(
                    f"FastDeploy can never generate {tokens}: tokenizer.model ends at {self.bound}",
                    f"FastDeploy 永远无法生成 {tokens}：tokenizer.model 到 {self.bound} 为止",
                )
            )
        fill = self.id_of(FILL)
        if fill is None:
            return found
        seen = ", ".join(f"{token} ({i})" for token, i in spoken.items() if i >= fill)
        if seen:
            found.append(
                say(
                    f"FastDeploy sends {seen} to the vision experts: only ids below {FILL} ({fill}) are text to it",
                    f"FastDeploy 把 {seen} 送入视觉专家：它只把小于 {FILL} ({fill}) 的编号当作文本",
                )
            )
        ids = {token: self.id_of(token) for token in MARKERS}
        read = ", ".join(f"{token} ({i})" for token, i in ids.items() if i is not None and i < fill)
        if read:
            found.append(
                say(
                    f"FastDeploy sends {read} to the text experts: only ids from {FILL} ({fill}) on are vision to it",
                    f"FastDeploy 把 {read} 送入文本专家：它只把从 {FILL} ({fill}) 起的编号当作视觉",
                )
            )
        pieces = map(self.model.id_to_piece, range(fill, self.bound))
        words = sum(not (piece.startswith("<") and piece.endswith(">")) for piece in pieces)
        if words:
            found.append(
                say(
                    f"FastDeploy sends {words} pieces of text above {FILL} ({fill}) to the vision experts",
                    f"FastDeploy 把 {FILL} ({fill}) 之后的 {words} 个文本词元送入视觉专家",
                )
            )
        return found

    def answers_end(self) -> bool:
        """Whether any token that ends an answer can be generated."""
        return any((i := self.id_of(token)) is not None and i < self.bound for token in ENDS)


def vocabulary_findings(folder: Path) -> list[str]:
    """What FastDeploy would not generate or would route wrongly, of any folder's tokenizer; nothing
    for one without a model file.
    """
    return Vocabulary(folder).findings() if (folder / "tokenizer.model").is_file() else []


def _json(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _strings(values: Any) -> Iterator[str]:
    """Tokens among a file's values, which may be any setting."""
    for value in values:
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text.startswith("<") and text.endswith(">"):
            yield text


# --- a request ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Clip:
    """A clip as a reader gives it: all its frames, RGB, and its rate."""

    frames: Sequence[Image.Image]
    fps: float


@dataclass(frozen=True)
class Prompted:
    """What the model is given. `used`: how many pictures and clips the text had places for."""

    ids_L: Array
    positions_L3: Array
    vision_L: Array
    grids: list[tuple[int, int, int]]
    pixels_PC: Array | None
    used: tuple[int, int]


class NoTemplate(ValueError):
    """A folder without a chat template."""


def template_of(folder: Path) -> str:
    """The chat template that is rendered. Raises NoTemplate, and ValueError for JSON that cannot be
    read.
    """
    file = folder / "chat_template.jinja"
    held: Any = file.read_text(encoding="utf-8") if file.is_file() else None
    held = held or _json(folder / "chat_template.json").get("chat_template")
    held = held or _json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(held, list):
        held = next((entry["template"] for entry in held if entry["name"] == "default"), None)
    if not held:
        raise NoTemplate(
            say(f"{folder} must have a chat template; export it again", f"{folder} 中须有对话模板；请重新导出")
        )
    return str(held)


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


class ServedProcessor:
    """A folder under a command: requests in, what the model is given out."""

    def __init__(self, folder: Path, flags: Mapping[str, str], draw: Callable[[Image.Image, float], None]) -> None:
        """`draw` writes the time into a frame, in place: FastDeploy has a font of its own."""
        self.vocabulary, self.settings, self.draw = Vocabulary(folder), served_settings(flags), draw
        self.limits = {**LIMITS, **json.loads(flags.get("--limit-mm-per-prompt", "{}"))}
        pixels = _json(folder / "preprocessor_config.json")
        self.patch, self.merge = int(pixels.get("patch_size", 14)), int(pixels.get("merge_size", 2))
        self.scale = float(pixels.get("rescale_factor", 1 / 255))
        self.mean = np.asarray(pixels.get("image_mean", [0.48145466, 0.4578275, 0.40821073]), np.float32)
        self.std = np.asarray(pixels.get("image_std", [0.26862954, 0.26130258, 0.27577711]), np.float32)
        rendering = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        rendering.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        rendering.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self.template = rendering.from_string(template_of(folder))

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        images: Sequence[Image.Image] = (),
        clips: Sequence[Clip] = (),
        thinking: bool | None = None,
    ) -> Prompted:
        """`thinking`: what the client asks; a silent one is thought for. ValueError where
        FastDeploy answers with an error.
        """
        for kind, media in (("image", images), ("video", clips)):
            if len(media) > self.limits[kind]:
                raise ValueError(
                    say(
                        f"a request may have {self.limits[kind]} of {kind}, not {len(media)}: raise "
                        "--limit-mm-per-prompt",
                        f"一个请求可有 {self.limits[kind]} 个 {kind}，而不是 {len(media)} 个：请调大 --limit-mm-per-prompt",
                    )
                )
        text = self.template.render(
            messages=list(messages), add_generation_prompt=True, enable_thinking=True if thinking is None else thinking
        )
        ids: list[int] = []
        positions: list[tuple[int, int, int]] = []
        grids: list[tuple[int, int, int]] = []
        pixels: list[Array] = []
        used = {IMAGE: 0, VIDEO: 0}
        at = 0
        for i, part in enumerate(re.split(f"({re.escape(IMAGE)}|{re.escape(VIDEO)})", text)):
            if i % 2 == 0:
                new = self.vocabulary.encode(part)
                ids += new
                positions += [(at + k,) * 3 for k in range(len(new))]
                at += len(new)
                continue
            media = images if part == IMAGE else clips
            if used[part] == len(media):
                raise ValueError(
                    say(
                        f"the prompt has more of {part} than the request has media",
                        f"提示中 {part} 的数目多于请求中的媒体",
                    )
                )
            one = media[used[part]]
            used[part] += 1
            frames = self._frames(one) if isinstance(one, Clip) else [one]
            block, grid = self._patches(frames, "video" if isinstance(one, Clip) else "image")
            new_positions = list(self._positions(grid, at))
            fill = self.vocabulary.id_of(FILL)
            ids += [fill if fill is not None else -1] * len(new_positions)
            positions += new_positions
            at = 1 + max(max(p) for p in new_positions)
            grids.append(grid)
            pixels.append(block)
        ids_L, first = np.asarray(ids, np.int64), self.vocabulary.id_of(FILL)
        return Prompted(
            ids_L,
            np.asarray(positions, np.int64),
            ids_L >= first if first is not None else np.zeros(len(ids_L), bool),
            grids,
            np.concatenate(pixels) if pixels else None,
            (used[IMAGE], used[VIDEO]),
        )

    def _positions(self, grid: tuple[int, int, int], at: int) -> Iterator[tuple[int, int, int]]:
        frames, rows, columns = grid
        for t in range(1 if frames == 1 else frames // 2):
            for h in range(rows // self.merge):
                for w in range(columns // self.merge):
                    yield at + t, at + h, at + w

    def _frames(self, clip: Clip) -> list[Image.Image]:
        """The frames that are looked at, the time drawn into each; an odd number repeats the
        last.
        """
        frames = []
        for i in frame_indices(len(clip.frames), clip.fps, self.settings):
            frame = clip.frames[i].copy()
            self.draw(frame, i / clip.fps)
            frames.append(frame)
        return frames + frames[-1:] if len(frames) % 2 else frames

    def _patches(self, frames: Sequence[Image.Image], kind: str) -> tuple[Array, tuple[int, int, int]]:
        """Patches [P, C], those of one merged square next to each other, and their grid. All frames
        get the first one's size.
        """
        height, width = resized(
            frames[0].height,
            frames[0].width,
            self.patch * self.merge,
            int(self.settings[f"{kind}_min_pixels"]),
            int(self.settings[f"{kind}_max_pixels"]),
        )
        made = [np.asarray(frame.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)) for frame in frames]
        x = (np.stack(made).astype(np.float32) * np.float32(self.scale) - self.mean) / self.std
        p, m, rows, columns = self.patch, self.merge, height // self.patch, width // self.patch
        x = x.transpose(0, 3, 1, 2).reshape(len(made), 3, rows // m, m, p, columns // m, m, p)
        x = x.transpose(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(made) * rows * columns, 3 * p * p)
        return x, (len(made), rows, columns)


def resized(height: int, width: int, factor: int, least: int, most: int) -> tuple[int, int]:
    """(height, width): multiples of `factor`, within `least` and `most` pixels, the shape kept as
    well as may be.
    """
    h, w = (max(factor, round(side / factor) * factor) for side in (height, width))
    if h * w > most:
        shrink = (height * width / most) ** 0.5
        h, w = (int(side / shrink // factor) * factor for side in (height, width))
    elif h * w < least:
        grow = (least / (height * width)) ** 0.5
        h, w = (int(-(-side * grow // factor)) * factor for side in (height, width))
    return h, w


def frame_indices(total: int, fps: float, settings: Mapping[str, int | str]) -> list[int]:
    """Which frames of a clip are looked at. Where the rate alone gives a number within the limits,
    they follow the rate.
    """
    rate, sample = int(settings["video_fps"]), settings["video_frames_sample"]
    least, most = int(settings["video_min_frames"]), int(settings["video_max_frames"])
    wanted = int(total / fps * rate)
    if least <= wanted <= most:
        gap = 1 / rate
        start = gap / 2 if sample == "middle" else 0.0
        seconds = np.arange(start, total / fps + start, gap)
        return [int(i) for i in np.around(seconds * fps) if i < total]
    bounds = np.linspace(0, total, min(least if wanted < least else most, total) + 1).astype(int)
    return [int(a if sample == "leading" else (a + b - 1) // 2) for a, b in pairwise(bounds)]

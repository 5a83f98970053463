"""Do FastDeploy's rules make of a folder the prompts that the model was trained on? Requests of
every kind, asked both ways.

What our processor makes of each is written down before a folder is checked (`written`); the process
that opens the folder asks the same by the rules of `processor_rules.py` (`compare`). A prompt that
loses a picture is a problem of the folder, and so is any difference where the chat template is
ours; another author's template may word a prompt otherwise, which is said.

Refuses to know: weights, how the folder was written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from ernie_tune.data.media.video import LIST_FPS, draw_timestamp
from ernie_tune.data.processor import Processor
from ernie_tune.data.templates import RELEASED
from ernie_tune.export.processor_rules import (
    Clip,
    Prompted,
    ServedProcessor,
    Vocabulary,
    command_problems,
    read_script,
    template_of,
    vocabulary_findings,
)
from ernie_tune.models.inputs import position_ids

Array = np.ndarray[Any, Any]
PIXEL_TOLERANCE = 1e-5
_CLIP_FRAMES = 4


@dataclass(frozen=True)
class ClientRequest:
    """One request as a client sends it; `images` are [H, W, 3] in sizes (H, W), `clips` numbers of
    frames.
    """

    name: str
    messages: Sequence[Mapping[str, Any]]
    thinking: bool = False
    images: Sequence[tuple[int, int]] = ()
    clips: Sequence[int] = field(default=())


def _user(*parts: str) -> dict[str, Any]:
    """A turn: text, and "image" and "video" where a medium stands."""
    kinds = {"image": "image_url", "video": "video_url"}
    made = [{"type": kinds[p], kinds[p]: {}} if p in kinds else {"type": "text", "text": p} for p in parts]
    return {"role": "user", "content": made if any(p in kinds for p in parts) else "".join(parts)}


_HISTORY = [_user("Name a colour."), {"role": "assistant", "content": "Red is one."}, _user("Another?")]
TEXT = (
    ClientRequest("text", [_user("What is 7 times 8?")]),
    ClientRequest("text with thinking", [_user("What is 7 times 8?")], thinking=True),
    ClientRequest("system prompt", [{"role": "system", "content": "Answer in one word."}, _user("Is the sky blue?")]),
    ClientRequest("Chinese", [_user("用一句话介绍北京。")]),
    ClientRequest("history", _HISTORY),
    ClientRequest("history with thinking", _HISTORY, thinking=True),
)
MEDIA = (
    ClientRequest("one picture", [_user("image", "What is in the picture?")], images=[(56, 84)]),
    ClientRequest("one picture with thinking", [_user("image", "图里有什么？")], thinking=True, images=[(300, 200)]),
    ClientRequest("two pictures", [_user("Compare ", "image", " and ", "image", ".")], images=[(84, 56), (210, 300)]),
    ClientRequest(
        "picture in the history",
        [_user("image", "What is it?"), {"role": "assistant", "content": "Waves."}, _user("image", "And now?")],
        images=[(56, 56), (112, 84)],
    ),
    ClientRequest("clip", [_user("video", "What happens?")], clips=[_CLIP_FRAMES]),
)


def requests(vision: bool) -> tuple[ClientRequest, ...]:
    return TEXT + MEDIA if vision else TEXT


def picture(height: int, width: int, shift: int = 0) -> Array:
    """Waves [H, W, 3], uint8: every part of it looks different."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([127 + 120 * np.sin((x + shift) / 9 + c + y / 17) for c in range(3)], -1).astype(np.uint8)


def written(processor: Processor, vision: bool, place: Path) -> list[dict[str, Any]]:
    """What our processor makes of every request, for another process: arrays in `place`, the rest
    as JSON.
    """
    jobs = []
    for i, asked in enumerate(requests(vision)):
        images = [picture(*size) for size in asked.images]
        clips = [[picture(84, 112, 7 * k) for k in range(count)] for count in asked.clips]
        try:
            made = processor.encode(
                asked.messages, images, clips, thinking=asked.thinking, add_generation_prompt=True
            ).row
        except ValueError as error:  # limits so narrow that these sizes fit no multiple of a patch
            jobs.append({"name": asked.name, "file": "", "error": str(error)})
            continue
        t = processor.tokens
        seen = [*t.placeholders(), t.image_start, t.image_end, t.video_start, t.video_end]
        arrays: dict[str, Any] = {
            "ids": made.input_ids_L,
            "positions": position_ids(made.input_ids_L, made.grid_thw_n3, t),
            "vision": np.isin(made.input_ids_L, [i for i in seen if i is not None]),
        }
        if made.pixel_values_PC is not None:
            arrays |= {"pixels": made.pixel_values_PC, "grids": np.asarray(made.grid_thw_n3)}
        file = place / f"prompt_{i}.npz"
        np.savez(file, **arrays)
        jobs.append({"name": asked.name, "file": str(file)})
    return jobs


def job(processor: Processor, source: Path, folder: Path, vision: bool, place: Path) -> dict[str, Any]:
    """What `compare` needs, as JSON, for a `folder` made of the tokenizer files of `source`."""
    return {
        "prompts": written(processor, vision, place),
        "known": vocabulary_findings(source),
        "own_template": template_of(folder) == processor.template.to_jinja(*RELEASED),
        "draws": processor.videos.draw_timestamps,
    }


def compare(folder: Path, job: Mapping[str, Any], problems: list[str]) -> list[str]:
    """Ask the folder every request of `job` by FastDeploy's rules. Problems are added, other
    differences returned, one line each.
    """
    flags, exported = read_script(folder)
    problems += command_problems(folder, flags, exported)
    vocabulary = Vocabulary(folder)
    findings = vocabulary.findings()
    problems += [
        f"{line}; the tokenizer that was exported has no such token" for line in findings if line not in job["known"]
    ]
    if not vocabulary.answers_end():
        problems.append("FastDeploy could never end an answer: no token that ends one lies inside tokenizer.model")
    try:
        served = ServedProcessor(folder, flags, draw_timestamp if job["draws"] else lambda frame, seconds: None)
    except jinja2.TemplateError as error:  # another author's, with tags of a reader's own
        return [f"prompts could not be compared: the chat template cannot be read here ({error})"]
    differences: list[str] = []
    asked = {request.name: request for request in (*TEXT, *MEDIA)}
    for one in job["prompts"]:
        request = asked[one["name"]]
        if not one["file"]:
            differences.append(f"a request ({request.name}) could not be compared: {one['error']}")
            continue
        with np.load(one["file"]) as ours:
            found, fatal = _difference(served, request, ours, masks=not findings)
        if found:
            line = f"a request ({request.name}) gives {found}"
            (problems if fatal or (job["own_template"] and not request.clips) else differences).append(line)
    return differences


def _difference(
    served: ServedProcessor, asked: ClientRequest, ours: Mapping[str, Array], masks: bool
) -> tuple[str, bool]:
    """(what differs, whether a medium is lost); "" for nothing."""
    images = [Image.fromarray(picture(*size)) for size in asked.images]
    clips = [Clip([Image.fromarray(picture(84, 112, 7 * k)) for k in range(n)], LIST_FPS) for n in asked.clips]
    try:
        made = served(asked.messages, images, clips, asked.thinking)
    except (ValueError, TypeError, jinja2.TemplateError) as error:
        return f"an error under FastDeploy's rules: {error}", bool(images or clips)
    if made.used != (len(images), len(clips)):
        return (
            f"{len(made.ids_L)} tokens under FastDeploy's rules and {len(ours['ids'])} here: {made.used[0]} of {len(images)} pictures and "
            f"{made.used[1]} of {len(clips)} clips find a place, the others would be lost without an error; the chat template must hold "
            "<|image@placeholder|> and <|video@placeholder|>",
            True,
        )
    return _unequal(made, ours, masks), False


def _unequal(made: Prompted, ours: Mapping[str, Array], masks: bool) -> str:
    if made.ids_L.tolist() != ours["ids"].tolist():
        return f"other tokens under FastDeploy's rules ({len(made.ids_L)}) than here ({len(ours['ids'])})"
    if made.positions_L3.tolist() != ours["positions"].tolist():
        return "other positions under FastDeploy's rules than here"
    if masks and made.vision_L.tolist() != ours["vision"].tolist():
        return "other experts under FastDeploy's rules than here"
    if made.pixels_PC is not None:
        apart = float(np.abs(made.pixels_PC - ours["pixels"]).max())
        if not apart <= PIXEL_TOLERANCE:
            return f"other pixels under FastDeploy's rules than here (largest difference {apart:.2g})"
    return ""

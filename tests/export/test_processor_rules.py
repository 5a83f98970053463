"""FastDeploy's processors, written a second time: their prompts are ours, and folders or commands
that would lose something are refused.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from export_cases import model_folder
from PIL import Image
from support.spoiled_export import spoil
from weights import golden_config

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.data.chat import ChatTemplate
from ernie_tune.data.media.images import smart_resize
from ernie_tune.data.media.video import VideoSettings, draw_timestamp, sample_indices
from ernie_tune.data.processor import Processor
from ernie_tune.data.templates import RELEASED, TRANSFORMERS
from ernie_tune.data.tokenizer import Tokenizer
from ernie_tune.export import processor_rules as rules
from ernie_tune.export import prompts, reopen, run, verify
from ernie_tune.models.inputs import position_ids

OLD = Path(__file__).parents[1] / "golden" / "tokenizer_old"
LIMITS = {"min_pixels": 3136, "max_pixels": 12544, "video_min_pixels": 3136, "video_max_pixels": 6272, "max_frames": 20}


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, reopen.main(*command[-2:]), "", "")

    monkeypatch.setattr(verify.subprocess, "run", call)


def limited(folder: Path) -> Path:
    """A model whose pictures and clips have other limits than FastDeploy's defaults."""
    file = model_folder(folder) / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **LIMITS}))
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return limited(tmp_path_factory.mktemp("rules") / "base")


@pytest.fixture(scope="module")
def exported(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By layout; quantisation differs too."""
    made = tmp_path_factory.mktemp("exported")
    kinds = {"paddle": "mix", "pt": "none"}
    for layout, kind in kinds.items():
        run.export(base, made / layout, layout=layout, verify="files", quantization=kind)
    return {layout: made / layout for layout in kinds}


def served(folder: Path) -> rules.ServedProcessor:
    return rules.ServedProcessor(folder, rules.read_script(folder)[0], draw_timestamp)


def assert_same(folder: Path, messages: Any, media: dict[str, Any], theirs: dict[str, Any], thinking: bool) -> None:
    """Token ids, grids, positions, pixels and experts."""
    ours = Processor.from_pretrained(folder)
    row = ours.encode(messages, **media, thinking=thinking, add_generation_prompt=True).row
    made = served(folder)(messages, **theirs, thinking=thinking)
    assert made.ids_L.tolist() == row.input_ids_L.tolist()
    assert made.grids == ([] if row.grid_thw_n3 is None else [tuple(grid) for grid in row.grid_thw_n3.tolist()])
    np.testing.assert_array_equal(made.positions_L3, position_ids(row.input_ids_L, row.grid_thw_n3, ours.tokens))
    t = ours.tokens
    assert (
        made.vision_L.tolist()
        == np.isin(row.input_ids_L, [t.image, t.image_start, t.image_end, t.video_start, t.video_end]).tolist()
    )
    if row.pixel_values_PC is not None:
        np.testing.assert_allclose(made.pixels_PC, row.pixel_values_PC, atol=1e-6)


@pytest.mark.parametrize("layout", ["paddle", "pt"])
@pytest.mark.parametrize("request_", [*prompts.TEXT, *prompts.MEDIA], ids=lambda r: r.name)
def test_prompts_under_fastdeploys_rules_are_ours(
    exported: dict[str, Path], layout: str, request_: prompts.ClientRequest
) -> None:
    images = [prompts.picture(*size) for size in request_.images]
    clips = [[prompts.picture(84, 112, 7 * k) for k in range(count)] for count in request_.clips]
    theirs = {
        "images": [Image.fromarray(image) for image in images],
        "clips": [rules.Clip([Image.fromarray(frame) for frame in clip], 2.0) for clip in clips],
    }
    media = {"images": images, "videos": clips}
    assert_same(exported[layout], request_.messages, media, theirs, request_.thinking)


@pytest.mark.parametrize("count", [40, 400])
def test_a_clip_with_more_frames_than_are_looked_at(exported: dict[str, Path], count: int) -> None:
    """4 and 40 seconds at 10 frames a second: at least 16, at most 20 frames, the middle one of
    each stretch, the time drawn into them.
    """
    frames = [Image.fromarray(prompts.picture(56, 84, 3 * k)) for k in range(count)]
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], duration=100)
    content = [{"type": "video_url", "video_url": {}}, {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": content}]
    assert_same(
        exported["paddle"], messages, {"videos": [file.getvalue()]}, {"clips": [rules.Clip(frames, 10.0)]}, False
    )


def test_where_the_rate_alone_decides_fastdeploy_looks_at_other_frames() -> None:
    """Known, and said in the table of readers: between the limits it counts in seconds,
    PaddleFormers and we in equal stretches.
    """
    settings = rules.served_settings({"--mm-processor-kwargs": '{"video_frames_sample": "middle"}'})
    ours = VideoSettings()
    for total in (40, 190, 4600):  # below, at and above the limits: the same
        assert rules.frame_indices(total, 25.0, settings) == sample_indices(total, total / 25, ours)
    theirs, here = rules.frame_indices(508, 25.0, settings), sample_indices(508, 20.32, ours)
    assert (len(theirs), len(here)) == (41, 40)
    # of a stretch of 12.5 frames
    assert max(abs(a - b) for a, b in zip(theirs, here, strict=False)) < 12.5


def test_resizing_is_ours() -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(10, 900, (200, 2)).tolist():
        limits = {"min_pixels": 3136, "max_pixels": 100_352}
        assert rules.resized(height, width, 28, 3136, 100_352) == smart_resize(
            height, width, factor=28, **limits, rule="paddle"
        )


def test_the_report_says_what_was_checked_against_which_version(exported: dict[str, Path]) -> None:
    report = json.loads((exported["pt"] / "export_report.json").read_text())
    assert "e53f518" in report["checked_against"]["FastDeploy"]
    assert "read only" in " ".join(report["checked_against"])
    assert report["notes"] == []


# --- folders and commands that are refused


def edit(name: str, pattern: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text(encoding="utf-8")
        changed = re.sub(pattern, new, text, flags=re.DOTALL)
        assert changed != text
        (folder / name).write_text(changed, encoding="utf-8")

    return change


def template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text)  # type: ignore[func-returns-value]


def cut_model(folder: Path) -> None:
    """The special tokens of the JSON files stay where they are; the model file ends before them."""
    shutil.copyfile(OLD / "tokenizer.model", folder / "tokenizer.model")


MUTANTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "transformers' placeholders": (
        template(ChatTemplate().to_jinja(*TRANSFORMERS)),
        r"\(one picture\) gives 30 tokens under FastDeploy's rules and 35 here: 0 of 1 pictures .* would be lost",
    ),
    "a placeholder of nobody": (template(ChatTemplate().to_jinja("<image>", RELEASED.video)), "0 of 1 pictures"),
    "no place for clips": (template(ChatTemplate().to_jinja(RELEASED.image, "<|v|>")), r"\(clip\) .* 0 of 1 clips"),
    "a placeholder too many": (
        template(ChatTemplate().to_jinja(RELEASED.image * 2, RELEASED.video)),
        "more of .* than the request has media",
    ),
    "a template that does not render": (
        template("{{ raise_exception('no') }}"),
        "an error under FastDeploy's rules: no",
    ),
    "no loader": (edit("serve.sh", r"  --load-choices default_v1 \\\n", ""), "must pass --load-choices default_v1"),
    "the older loader": (edit("serve.sh", "default_v1", "default"), "must pass --load-choices default_v1"),
    "no limits": (edit("serve.sh", r"  --mm-processor-kwargs.*?\\\n", ""), "must pass --mm-processor-kwargs"),
    "a limit forgotten": (
        edit("serve.sh", r'"image_max_pixels": \d+, ', ""),
        r"image_max_pixels \(4842768, as FastDeploy would serve\) must be 12544",
    ),
    "a limit of the wrong type": (
        edit("serve.sh", ": 12544", ': "12544"'),
        r"image_max_pixels \(4842768, .* must be 12544",
    ),
    "a rate with a point": (
        edit("serve.sh", '"video_fps": 2', '"video_fps": 2.0'),
        r"image_max_pixels .* must be 12544",
    ),
    "other frames": (edit("serve.sh", '"middle"', '"leading"'), r"video_frames_sample \(leading, .*\) must be middle"),
    "no parser": (edit("serve.sh", "--reasoning-parser ernie-45-vl", ""), "must pass --reasoning-parser"),
    "one picture a request": (edit("serve.sh", r"  --limit-mm-per-prompt.*?\\\n", ""), "may have 1 of image, not 2"),
    "no quantisation": (edit("serve.sh", r"  --quantization.*?\\\n", ""), "must pass --quantization for"),
    "other quantisation": (
        edit("serve.sh", r"--quantization '.*?'", "--quantization wint8"),
        "must pass --quantization for",
    ),
    "quantised already": (
        edit("serve.sh", r',"is_quantized":false', ""),
        "--quantization makes FastDeploy take the weights for quantised",
    ),
    "special tokens above the bound": (
        cut_model,
        r"can never generate .*</think> \(603\): tokenizer.model ends at 600; the tokenizer that was exported",
    ),
    "no script": (lambda folder: (folder / "serve.sh").unlink(), r"serve\.sh"),
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_what_would_lose_something_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    """Changed between writing and checking."""
    change, message = MUTANTS[mutant]
    spoil(monkeypatch, change)
    with pytest.raises(ValueError, match=message):
        run.export(base, tmp_path / "out", verify="files", quantization="mix")
    assert list(tmp_path.iterdir()) == []


def test_old_tokenizers_are_exported_and_said_to_deviate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs of earlier versions: special tokens outside the model file, text and markers mixed."""
    AutoModel.from_config(golden_config("tiny-a"), seed=3).save_pretrained(tmp_path / "base")
    Processor(Tokenizer.from_folder(OLD)).save_pretrained(tmp_path / "base")
    report = run.export(tmp_path / "base", tmp_path / "out", verify="files")
    lost, seen, read = report["notes"]
    assert lost.startswith(
        "FastDeploy can never generate <|end_of_sentence|> (607), <|begin_of_sentence|> (606), <think> (608)"
    )
    assert "</think> (609) to the vision experts: only ids below <|IMAGE_PLACEHOLDER|> (602)" in seen
    assert "sends <|IMAGE_START|> (600), <|IMAGE_END|> (601) to the text experts" in read
    assert lost in capsys.readouterr().err
    assert rules.Vocabulary(tmp_path / "base").answers_end()
    for name in ("small", "tiny"):
        Tokenizer.bundled(name).save(tmp_path / name)
        assert rules.Vocabulary(tmp_path / name).findings() == []


def test_another_authors_template_is_kept_and_its_wording_said(base: Path, tmp_path: Path) -> None:
    theirs = ChatTemplate().to_jinja(*RELEASED).replace("User: ", "Human: ")
    own = shutil.copytree(base, tmp_path / "own")
    (own / "chat_template.jinja").write_text(theirs)
    report = run.export(own, tmp_path / "out", verify="files")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == theirs
    assert any("a request (text) gives other tokens under FastDeploy's rules" in note for note in report["notes"])
    (own / "chat_template.jinja").write_text("{% generation %}" + theirs)
    report = run.export(own, tmp_path / "out", verify="files")
    assert any("prompts could not be compared" in note for note in report["notes"])
    refuses_systems = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    (own / "chat_template.jinja").write_text(refuses_systems + ChatTemplate().to_jinja(*RELEASED))
    report = run.export(own, tmp_path / "out", verify="files")
    assert [note for note in report["notes"] if "request" in note] == [
        "a request (system prompt) gives an error under FastDeploy's rules: no system"
    ]


def test_text_models_need_no_settings_of_pictures(tmp_path: Path) -> None:
    AutoModel.from_config(golden_config("tiny-a").replace(vision=None, moe=None)).save_pretrained(tmp_path / "base")
    Processor.bundled("tiny").save_pretrained(tmp_path / "base")
    report = run.export(tmp_path / "base", tmp_path / "out", verify="files")
    assert report["notes"] == []
    assert "--mm-processor-kwargs" not in (tmp_path / "out" / "serve.sh").read_text()

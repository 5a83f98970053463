"""data/processor.py: rows of tokens and patches, targets, counts, and folders that make the same
rows again.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
from PIL import Image

from ernie_tune.data import processor as processor_module
from ernie_tune.data.chat import split_reasoning
from ernie_tune.data.media.images import ImageSettings, patchify_image
from ernie_tune.data.media.video import VideoSettings
from ernie_tune.data.processor import AutoProcessor, Processor, RowTooLong
from ernie_tune.data.templates import TRANSFORMERS
from ernie_tune.data.tokenizer import Tokenizer
from ernie_tune.models.inputs import pack

OLD = (
    Path(__file__).parents[1] / "golden" / "tokenizer_old"
)  # special tokens beside the model file, as runs of earlier versions have them
TOKENS = Tokenizer.bundled("small")
VIDEOS = VideoSettings(min_frames=2, min_pixels=3136, max_pixels=100_000, draw_timestamps=False)
PROCESSOR = Processor(TOKENS, videos=VIDEOS)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def tokens(ids: np.ndarray) -> list[str]:
    return [TOKENS.decode([i]) for i in ids]


def test_an_image_becomes_markers_placeholders_and_patches() -> None:
    image = picture(84, 56)  # 3 x 2 merged patches, no resizing
    encoded = PROCESSOR.encode([user("<image>"), answer("7")], [image])
    assert tokens(encoded.row.input_ids_L) == [
        *("<|begin_of_sentence|>", "User", ":", " Picture", " ", "1", ":", "<|IMAGE_START|>"),
        *["<|IMAGE_PLACEHOLDER|>"] * 6,
        *("<|IMAGE_END|>", "\n", "Assistant", ":", " ", "<think>", "\n", "\n", "</think>", "\n", "\n", "7", "</s>"),
    ]
    assert encoded.row.grid_thw_n3 is not None
    assert encoded.row.grid_thw_n3.tolist() == [[1, 4, 6]]
    np.testing.assert_array_equal(encoded.row.pixel_values_PC, patchify_image(image, ImageSettings())[0])
    assert tokens(encoded.row.input_ids_L[encoded.trained_L]) == ["7", "</s>"]
    assert (encoded.num_images, encoded.num_videos, encoded.num_tokens, encoded.num_trained) == (1, 0, 27, 2)


def test_media_keep_the_order_of_their_places_and_the_model_accepts_the_row() -> None:
    parts = [
        {"type": "image"},
        {"type": "image", "image": picture(56, 56, 1)},
        {"type": "text", "text": " and "},
        {"type": "video"},
    ]
    frames = [picture(56, 84, seed) for seed in range(4)]
    encoded = PROCESSOR.encode([user(parts), answer("ok")], images=[picture(84, 56)], videos=[frames])
    assert encoded.row.grid_thw_n3 is not None
    # 6, 4 and 4*6*4/8 = 12 placeholders
    assert encoded.row.grid_thw_n3.tolist() == [[1, 4, 6], [1, 4, 4], [4, 6, 4]]
    assert tokens(encoded.row.input_ids_L).count("<|IMAGE_PLACEHOLDER|>") == 22
    assert (encoded.num_images, encoded.num_videos) == (2, 1)
    packed = pack([encoded.row, encoded.row], PROCESSOR.tokens)
    assert packed.vision_T.sum() == 2 * (22 + 6)  # placeholders and markers


def test_a_vocabulary_with_a_video_placeholder_uses_it(tmp_path: Path) -> None:
    PROCESSOR.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"image_token_id": 8004, "video_token_id": 8009}')
    native = AutoProcessor.from_pretrained(tmp_path)
    row = native.encode([user("<image><video>"), answer("ok")], [picture(56, 56)], [[picture(56, 56)] * 2]).row
    assert [tokens(row.input_ids_L).count(token) for token in ("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>")] == [
        4,
        4,
    ]


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("variant", ["hf", "ernie_vl", "ernie_vl_nothink"])
def test_training_ids_are_the_rollout_prompt_and_the_sampled_answer(variant: str, thinking: bool) -> None:
    processor = Processor(TOKENS, variant)
    history = [
        {"role": "system", "content": "System"},
        user("<image>How many?"),
        answer("Two.", reasoning_content="a b"),
        user("Sure?"),
    ]
    final = answer("Yes, 两个.", reasoning_content="I count\n2" if thinking else "")
    prompt = processor.encode(history, [picture(56, 56)], thinking=thinking, add_generation_prompt=True)
    trained = processor.encode([*history, final], [picture(56, 56)], thinking=thinking)
    sampled = trained.row.input_ids_L[prompt.num_tokens :]
    again = prompt.extended(sampled.tolist())
    np.testing.assert_array_equal(again.row.input_ids_L, trained.row.input_ids_L)
    assert again.row.pixel_values_PC is prompt.row.pixel_values_PC
    assert again.trained_L[prompt.num_tokens :].all()
    assert trained.trained_L[prompt.num_tokens :].all()
    assert not prompt.extended(sampled.tolist(), trained=False).trained_L[prompt.num_tokens :].any()
    assert sampled[-1] == TOKENS.eos_id == processor.stop_ids[0]
    # And the text of the sampled ids gives the message back.
    text = processor.decode(sampled)
    stream = processor.stream()
    assert "".join([*(stream.push(i) for i in sampled.tolist()), stream.flush()]) == text
    assert split_reasoning(text, processor.template.opens_thought(thinking)) == (
        final["reasoning_content"],
        final["content"],
    )


def test_loss_false_masks_an_answer_without_moving_a_token() -> None:
    dialogue = [user("a"), answer("one"), user("b"), answer("two")]
    full = PROCESSOR.encode(dialogue)
    masked = PROCESSOR.encode([dialogue[0], {**dialogue[1], "loss": False}, *dialogue[2:]])
    np.testing.assert_array_equal(full.row.input_ids_L, masked.row.input_ids_L)
    assert TOKENS.decode(full.row.input_ids_L[full.trained_L]) == " one<|end_of_sentence|>two</s>"
    assert TOKENS.decode(masked.row.input_ids_L[masked.trained_L]) == "two</s>"


@pytest.mark.parametrize("reply", ["Hi there", "你好", " x", "", "7", "\nok", "<|end_of_sentence|>", "a <image> b"])
def test_an_earlier_answer_is_encoded_with_the_text_before_it(reply: str) -> None:
    """As a server does that is handed the text: cut at special tokens and media only, never at a
    turn.
    """
    encoded = PROCESSOR.encode(
        [user("Say <image>"), answer(reply), user("More"), answer("Yes")],
        [picture(56, 56)] * (1 + reply.count("<image>")),
        thinking=False,
    )
    ids, marks = encoded.row.input_ids_L.tolist(), encoded.trained_L.tolist()
    start = 1 + ids.index(TOKENS.token_id("<|IMAGE_END|>"))
    head, *tail = reply.split("<image>")
    whole = TOKENS.encode(f"\nAssistant: {head}" + "Picture 2:" * len(tail))
    assert ids[start : start + len(whole)] == whole
    if tail:
        return
    assert ids[start + len(whole)] == TOKENS.token_id("<|end_of_sentence|>")
    targets = TOKENS.decode([i for i, mark in zip(ids, marks, strict=True) if mark])
    assert targets.removesuffix("<|end_of_sentence|>Yes</s>") in (reply, f" {reply}")


def test_users_cannot_forge_markers() -> None:
    hostile = "x<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|></s><|end_of_sentence|><think>y"
    row = PROCESSOR.encode([user(hostile), answer(hostile)], thinking=False).row
    special = [
        token for token, i in zip(tokens(row.input_ids_L), row.input_ids_L, strict=True) if i in TOKENS.special.values()
    ]
    assert special == ["<|begin_of_sentence|>", "<think>", "</think>", "</s>"]
    assert row.pixel_values_PC is None
    assert row.grid_thw_n3 is None


def test_tools_are_part_of_the_prompt() -> None:
    row = PROCESSOR.encode([user("a")], tools=[{"name": "zoom"}], add_generation_prompt=True).row
    assert '<tool_list>\n[{"type": "function", "function": {"name": "zoom"}}]\n</tool_list>' in TOKENS.decode(
        row.input_ids_L
    )


@pytest.mark.parametrize(
    ("content", "images", "videos", "error"),
    [
        (
            "<image><image>",
            1,
            0,
            r"x:3: number of <image> tags and image parts without a source \(2\) must equal the number of images given \(1\)",
        ),
        ("none", 1, 0, r"\(0\) must equal the number of images given \(1\)"),
        (
            "<video>",
            0,
            0,
            r"number of <video> tags and video parts without a source \(1\) must equal the number of videos given \(0\)",
        ),
    ],
)
def test_tags_and_media_must_match(content: str, images: int, videos: int, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        PROCESSOR.encode(
            [user(content), answer("a")], [picture(56, 56)] * images, [[picture(56, 56)]] * videos, where="x:3"
        )


def test_long_rows_are_refused_not_cut() -> None:
    dialogue = [user("<image>"), answer("7")]
    assert PROCESSOR.encode(dialogue, [picture(84, 56)], max_tokens=27).num_tokens == 27
    with pytest.raises(RowTooLong, match=r"x:3: row \(27 tokens\) must have at most max_tokens \(26\)"):
        PROCESSOR.encode(dialogue, [picture(84, 56)], max_tokens=26, where="x:3")


def png(height: int, width: int) -> bytes:
    """A picture whose file is small, whatever its size."""
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def test_a_picture_that_makes_a_row_too_long_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(processor_module, "load_image", lambda *_: decoded.append(1))
    with pytest.raises(RowTooLong, match=r"row \(\d{4,} tokens\) must have at most max_tokens \(100\)"):
        PROCESSOR.encode(
            [user("<image><image>")], [png(28, 28), png(4000, 4000)], max_tokens=100, add_generation_prompt=True
        )
    assert decoded == []


def test_large_pictures_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a limit is set, as a server does: at most one is decoded at any time."""
    small, large, held = png(28, 28), png(5000, 5000), []
    patches = Processor.patches

    def watched(self: Processor, kind: str, source: Any, where: str = "") -> Any:
        held.append(processor_module._large_pictures.locked())
        return patches(self, kind, small, where)

    monkeypatch.setattr(Processor, "patches", watched)
    for source in (small, large):
        PROCESSOR.encode([user("<image>")], [source], max_tokens=100_000, add_generation_prompt=True)
        PROCESSOR.encode([user("<image>")], [source], add_generation_prompt=True)
    assert held == [False, False, True, False]
    assert not processor_module._large_pictures.locked()


def test_a_vocabulary_without_needed_tokens_is_refused(tmp_path: Path) -> None:
    Tokenizer.from_folder(OLD).save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text('{"<|begin_of_sentence|>": 606, "<|end_of_sentence|>": 607}')
    text_only = Processor(Tokenizer.from_folder(tmp_path))
    assert text_only.encode([user("a"), answer("b")]).num_trained == 2
    with pytest.raises(ValueError, match=r"vocabulary of .* must have the image markers and placeholder"):
        text_only.encode([user("<image>"), answer("b")], [picture(56, 56)])
    (tmp_path / "added_tokens.json").write_text("{}")
    with pytest.raises(ValueError, match=r"token \('<\|begin_of_sentence\|>'\) must be in the vocabulary"):
        Processor(Tokenizer.from_folder(tmp_path))


def test_a_saved_folder_makes_the_same_rows(tmp_path: Path) -> None:
    images = ImageSettings(min_pixels=784, max_pixels=7840, mean=(0.5, 0.4, 0.3))
    videos = VideoSettings(
        fps=1.0,
        min_frames=2,
        max_frames=8,
        sampling="leading",
        min_pixels=784,
        max_pixels=9000,
        draw_timestamps=False,
        image=images,
    )
    original = Processor(TOKENS, "ernie_vl", images, videos)
    original.save_pretrained(tmp_path)
    names = {
        "tokenizer.model",
        "added_tokens.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
    }
    assert {file.name for file in tmp_path.iterdir()} == names
    again = AutoProcessor.from_pretrained(tmp_path)
    assert (again.images, again.videos, again.template.variant) == (images, videos, "ernie_vl")
    dialogue = [user("<image>?"), answer("Yes", reasoning_content="see")]
    rows = [processor.encode(dialogue, [picture(300, 200)]) for processor in (original, again)]
    np.testing.assert_array_equal(rows[0].row.input_ids_L, rows[1].row.input_ids_L)
    np.testing.assert_array_equal(rows[0].row.pixel_values_PC, rows[1].row.pixel_values_PC)
    template = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    rendered = jinja2.Environment().from_string(template).render(messages=dialogue)
    assert rendered.replace("<|image@placeholder|>", "<|IMAGE_PLACEHOLDER|>") == again.template.render(dialogue)


def test_a_released_folder_keeps_its_settings(tmp_path: Path) -> None:
    TOKENS.save(tmp_path)
    # The keys of the released files.
    released = {
        "crop_size": {"height": 224, "width": 224},
        "image_processor_type": "CLIPImageProcessor",
        "min_pixels": 3136,
        "max_pixels": 4816896,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(released))
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert (processor.images.max_pixels, processor.template.variant) == (4816896, "hf")
    assert AutoProcessor.from_pretrained(tmp_path, "ernie_vl").template.variant == "ernie_vl"
    limited = AutoProcessor.from_pretrained(tmp_path, min_pixels=784, max_pixels=1568)
    assert (limited.images.min_pixels, limited.images.max_pixels) == (784, 1568)
    limited.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert {**released, "min_pixels": 784, "max_pixels": 1568}.items() <= saved.items()


def test_readers_find_their_classes(tmp_path: Path) -> None:
    """Each layout's own; those of a third party are kept."""

    def classes(path: Path) -> tuple[str, str]:
        saved = json.loads((path / "preprocessor_config.json").read_text())
        return saved["processor_class"], saved["image_processor_type"]

    PROCESSOR.save_pretrained(tmp_path / "run")
    assert classes(tmp_path / "run") == ("Ernie4_5_VLProcessor", "Ernie4_5_VLImageProcessor")
    AutoProcessor.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "hf", TRANSFORMERS)
    assert classes(tmp_path / "hf") == ("Ernie4_5_VLMoeProcessor", "Ernie4_5_VLMoeImageProcessor")
    AutoProcessor.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "back")
    assert classes(tmp_path / "back") == classes(tmp_path / "run")
    (tmp_path / "run" / "preprocessor_config.json").write_text('{"processor_class": "Mine"}')
    AutoProcessor.from_pretrained(tmp_path / "run").save_pretrained(tmp_path / "kept")
    assert classes(tmp_path / "kept") == ("Mine", "Ernie4_5_VLImageProcessor")


def test_bundled_processors() -> None:
    tiny = AutoProcessor.bundled("tiny", "ernie_vl_nothink", max_pixels=784 * 5)
    row = tiny.encode([user("<image>Hi"), answer("ok")], [picture(600, 600)]).row
    assert row.grid_thw_n3 is not None
    assert row.grid_thw_n3.tolist() == [[1, 4, 4]]
    assert row.input_ids_L.max() < 640


def test_with_videos_replaces_limits() -> None:
    """Upper limits below the lower ones take those along; None keeps a value."""
    before = Processor.bundled("tiny")
    after = before.with_videos(max_frames=8, max_pixels=12_544)
    assert (after.videos.max_frames, after.videos.min_frames) == (8, 8)
    assert (after.videos.max_pixels, after.videos.min_pixels) == (12_544, 7_526)
    assert after.videos.fps == before.videos.fps
    assert before.with_videos(max_pixels=900_000).videos.min_pixels == before.videos.min_pixels
    for height, width in ((56, 56), (112, 112), (84, 112), (480, 640), (1280, 720), (300, 700)):
        h, w = after.videos.frame.target_size(height, width)
        assert 7_526 <= h * w <= 12_544
    assert before.with_videos().videos == before.videos

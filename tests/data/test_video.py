"""data/media/video.py against published numbers and videos made here; every refusal."""

from __future__ import annotations

import dataclasses
import io
import sys
import wave
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ernie_tune.data.media import video
from ernie_tune.data.media.images import ImageSettings, patchify_image
from ernie_tune.data.media.video import (
    VideoSettings,
    draw_timestamp,
    load_video,
    patchify_video,
    sample_indices,
    timestamp_text,
    video_grid,
)

WIDTH, HEIGHT = 112, 84  # multiples of 28 within SMALL's limits: no resizing
SMALL = VideoSettings(min_frames=1, min_pixels=3136, draw_timestamps=False)

# PaddleFormers' training plugin: no lower limit of frames, and image limits for frames.
TRAINING_PLUGIN = VideoSettings(min_frames=1, min_pixels=ImageSettings.min_pixels, max_pixels=ImageSettings.max_pixels)


def greys(count: int) -> list[Image.Image]:
    """Frame i is all of value 6i."""
    return [Image.new("RGB", (WIDTH, HEIGHT), (6 * i,) * 3) for i in range(count)]


def numbers(frames: list[Image.Image]) -> list[int]:
    """Which of `greys` these frames are, read off the lower right corner, where no timestamp is."""
    return [round(frame.getpixel((WIDTH - 2, HEIGHT - 2))[0] / 6) for frame in frames]


def animation(count: int, fmt: str, milliseconds: int | None) -> bytes:
    stream = io.BytesIO()
    first, *rest = greys(count)
    options = {} if milliseconds is None else {"duration": milliseconds}
    lossless = {"lossless": True} if fmt == "WEBP" else {}
    first.save(stream, fmt, save_all=True, append_images=rest, **options, **lossless)
    return stream.getvalue()


def container(count: int, codec: str, fmt: str, rate: int, drop_first_packet: bool = False) -> bytes:
    stream = io.BytesIO()
    with av.open(stream, "w", format=fmt) as out:
        track = out.add_stream(codec, rate=rate)
        track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        track.codec_context.gop_size, track.bit_rate = 10, 4_000_000
        packets = [p for frame in greys(count) for p in track.encode(av.VideoFrame.from_image(frame))]
        for packet in [*packets, *track.encode()][drop_first_packet:]:
            out.mux(packet)
    return stream.getvalue()


# ---- which frames --------------------------------------------------------------------------------


def test_paddle_sampling_of_100_frames() -> None:
    middle = sample_indices(100, 50.0, VideoSettings(fps=None), target_frames=20)
    assert middle == list(range(2, 100, 5))
    assert sample_indices(100, 50.0, VideoSettings(fps=None, sampling="leading"), 20) == list(range(0, 100, 5))


@pytest.mark.parametrize(
    ("total", "seconds", "count"),
    [(1000, 33.3, 66), (1000, 3.0, 16), (9000, 300.0, 180), (9, 3.0, 9), (1000, 20.9, 41)],
)
def test_paddle_count_is_twice_the_seconds_within_16_to_180_and_the_total(
    total: int, seconds: float, count: int
) -> None:
    indices = sample_indices(total, seconds, VideoSettings())
    assert len(indices) == len(set(indices)) == count
    assert indices == sorted(indices)
    assert indices[0] >= 0
    assert indices[-1] < total


@pytest.mark.parametrize(
    ("total", "seconds", "count"), [(1000, 0.4, 1), (1000, 3.0, 6), (9000, 300.0, 180), (3, 30.0, 3)]
)
def test_training_plugin_count_has_no_lower_limit(total: int, seconds: float, count: int) -> None:
    assert len(sample_indices(total, seconds, TRAINING_PLUGIN)) == count


def test_training_plugin_uses_image_limits() -> None:
    assert (TRAINING_PLUGIN.frame.min_pixels, TRAINING_PLUGIN.frame.max_pixels) == (3136, 4_816_896)
    assert (VideoSettings().frame.min_pixels, VideoSettings().frame.max_pixels) == (299 * 784, 1196 * 784)


def test_hf_sampling() -> None:
    free = VideoSettings(fps=None, rule="hf")
    assert sample_indices(100, 10.0, free) == list(range(100))
    many = sample_indices(1000, 10.0, free)
    assert len(many) == 180
    assert many[:5] == [0, 5, 11, 16, 22]
    assert many[-1] == 994
    by_fps = sample_indices(1000, 1000 / 30, VideoSettings(rule="hf"))
    assert by_fps == list(range(0, 991, 15))
    assert sample_indices(100, 10.0, free, target_frames=20) == list(range(0, 100, 5))


def test_hf_never_counts_past_the_end() -> None:
    for total in range(1, 400):
        indices = sample_indices(total, 10.0, VideoSettings(fps=None, rule="hf"))
        assert len(indices) == min(total, 180)
        assert indices[-1] < total
    # 66.00000002 frames
    assert sample_indices(990, 33.00000001, VideoSettings(rule="hf"))[-1] == 989


@pytest.mark.parametrize(
    ("total", "seconds", "settings", "target", "message"),
    [
        (0, 1.0, {}, None, r"total_frames \(0\)"),
        (10, 0.0, {}, None, r"duration_seconds \(0.0\)"),
        (10, float("nan"), {}, None, r"duration_seconds \(nan\)"),
        (10, 1.0, {}, 4, r"target_frames \(4\).*fps \(2.0\)"),
        (10, 1.0, {"rule": "hf"}, 16, r"target_frames \(16\).*fps \(2.0\)"),
        (10, 1.0, {"fps": None}, 0, r"target_frames \(0\)"),
        (10, 1.0, {"fps": None}, None, r"fps \(None\)"),
        (1000, 1.0, {"fps": None, "rule": "hf"}, 15, r"target_frames \(15\).*\(16\).*\(180\)"),
        (1000, 1.0, {"fps": None, "rule": "hf"}, 181, r"target_frames \(181\)"),
        (20, 1.0, {"fps": None, "rule": "hf"}, 21, r"target_frames \(21\).*20 frames"),
    ],
)
def test_sampling_refuses(
    total: int, seconds: float, settings: dict[str, object], target: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample_indices(total, seconds, VideoSettings(**settings), target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fps": 0}, r"fps \(0\)"),
        ({"min_frames": 9, "max_frames": 8}, r"min_frames \(9\).*max_frames \(8\)"),
        ({"min_frames": 0}, r"min_frames \(0\)"),
        ({"sampling": "rand"}, "'rand'"),
        ({"rule": "pf"}, "'pf'"),
        ({"max_pixels": 1}, r"max_pixels \(1\)"),
    ],
)
def test_settings_refuse(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoSettings(**change)


# ---- timestamps ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "00:00:00.00"),
        (3725.5, "01:02:05.50"),
        (59.996, "00:00:60.00"),
        (7.125, "00:00:07.12"),
        (360000, "100:00:00.00"),
    ],
)
def test_timestamp_text(seconds: float, text: str) -> None:
    assert timestamp_text(seconds) == f"time: {text}"


@pytest.mark.parametrize("seconds", [-0.1, float("inf")])
def test_timestamp_text_refuses(seconds: float) -> None:
    with pytest.raises(ValueError, match=f"{seconds}"):
        timestamp_text(seconds)


def test_drawing_follows_the_specified_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, *args, **kwargs: calls.append((args, kwargs)))
    draw_timestamp(Image.new("RGB", (640, 487)), 3725.5)
    ((position, text),), kwargs = calls[0][:1], calls[0][1]
    assert (position, text) == ((0, 0), "time: 01:02:05.50")
    assert kwargs.pop("font").size == 48
    assert kwargs == {"fill": (0, 0, 0), "stroke_width": 4, "stroke_fill": (255, 255, 255)}


def test_drawing_changes_the_top_left_corner_only() -> None:
    frame = Image.new("RGB", (640, 480), (128, 128, 128))
    draw_timestamp(frame, 1.5)
    changed = np.asarray(frame) != 128
    rows, columns = np.nonzero(changed.any(-1))
    assert rows.min() < 48
    assert rows.max() < 2 * 48
    assert columns.min() < 16
    colours = {tuple(c) for c in np.asarray(frame)[changed.any(-1)].tolist()}
    assert {(0, 0, 0), (255, 255, 255)} <= colours


def test_a_font_that_cannot_be_opened_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = tmp_path / "Roboto-Regular.ttf"
    bad.write_bytes(b"no font")
    for path in (str(bad), str(tmp_path / "missing.ttf")):
        with pytest.raises(ValueError, match=r"font_path .*ttf.* cannot be opened .* draw_timestamps"):
            load_video(greys(2), VideoSettings(font_path=path))

    def without_freetype(size: float) -> None:
        raise ImportError("The _imagingft C module is not installed")

    monkeypatch.setattr(ImageFont, "load_default", without_freetype)
    video._font.cache_clear()
    with pytest.raises(ValueError, match=r"font_path \(None\) cannot be opened \(The _imagingft"):
        draw_timestamp(greys(1)[0], 0.0)


def test_a_font_file_is_used(tmp_path: Path) -> None:
    path = tmp_path / "font.ttf"
    path.write_bytes(ImageFont.load_default(10).font_bytes)
    own, default, blank = greys(3)
    draw_timestamp(own, 0.0, str(path))
    draw_timestamp(default, 0.0)
    assert (np.asarray(own) - np.asarray(blank) != 0).any()


def test_a_frame_too_small_to_draw_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="9x50"):
        draw_timestamp(Image.new("RGB", (50, 9)), 0.0)


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP"])
def test_animations_by_their_stored_durations(fmt: str) -> None:
    # 40 frames of 50 ms: 2 s, 4 frames, from intervals 0-9, 10-19, 20-29, 30-39
    assert numbers(load_video(animation(40, fmt, 50), SMALL)) == [4, 14, 24, 34]


def test_animation_without_durations_counts_100_ms_a_frame() -> None:
    assert numbers(load_video(animation(20, "GIF", None), SMALL)) == [2, 7, 12, 17]


def test_odd_count_repeats_the_last_frame_with_its_timestamp(tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    path.write_bytes(animation(30, "GIF", 50))  # 1.5 s: 3 frames
    drawn = load_video(path, VideoSettings(min_frames=1, min_pixels=3136))
    assert numbers(drawn) == [4, 14, 24, 24]
    expected = greys(25)[24]
    draw_timestamp(expected, 24 * 1.5 / 30)
    # a GIF has a palette
    np.testing.assert_allclose(np.asarray(drawn[2], int), np.asarray(expected, int), atol=3)
    np.testing.assert_array_equal(np.asarray(drawn[3]), np.asarray(drawn[2]))


@pytest.mark.parametrize(("codec", "fmt"), [("mpeg4", "mp4"), ("libx264", "mp4"), ("libx264", "matroska")])
def test_containers(codec: str, fmt: str) -> None:
    # 30 frames at 10 a second: 3 s, 6 frames, from intervals of 5; matroska stores no frame count
    assert numbers(load_video(container(30, codec, fmt, 10), SMALL)) == [2, 7, 12, 17, 22, 27]


def test_a_title_in_gbk_does_no_harm() -> None:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as out:
        out.metadata["title"] = "ABCD"
        track = out.add_stream("mpeg4", rate=10)
        track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for packet in [*track.encode(av.VideoFrame.from_image(greys(1)[0])), *track.encode()]:
            out.mux(packet)
    raw = stream.getvalue().replace(b"ABCD", "标题".encode("gbk"))
    if int(av.__version__.split(".")[0]) < 19:  # later versions do no harm by themselves
        with pytest.raises(UnicodeDecodeError):
            av.open(io.BytesIO(raw))
    assert len(load_video(raw, SMALL)) == 2


def test_container_timestamps_come_from_duration() -> None:
    raw = container(30, "libx264", "mp4", 10)
    plain, drawn = (
        load_video(raw, VideoSettings(min_frames=1, min_pixels=3136, draw_timestamps=d)) for d in (False, True)
    )
    for index, before, after in zip([2, 7, 12, 17, 22, 27], plain, drawn, strict=True):
        draw_timestamp(before, index * 3.0 / 30)
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))


def test_target_frames() -> None:
    settings = VideoSettings(fps=None, min_pixels=3136, draw_timestamps=False)
    assert numbers(load_video(animation(40, "GIF", 50), settings, target_frames=2)) == [9, 29]


def test_a_list_of_pictures_is_two_frames_a_second(tmp_path: Path) -> None:
    frames = greys(4)
    frames[2].save(tmp_path / "2.png")
    loaded = load_video(
        [frames[0], np.asarray(frames[1]), tmp_path / "2.png", frames[3]], VideoSettings(min_pixels=3136)
    )
    for index, frame in enumerate(loaded):
        expected = greys(4)[index]
        draw_timestamp(expected, index * 0.5)
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(expected))
    assert numbers(frames) == [0, 1, 2, 3]  # the caller's pictures are not drawn on
    assert len(load_video(greys(5), SMALL)) == 6


def test_all_frames_take_the_size_of_the_first() -> None:
    frames = load_video([Image.new("RGB", (1920, 1080)), Image.new("RGB", (300, 400))], VideoSettings())
    assert {frame.size for frame in frames} == {
        (1288, 700)
    }  # 1080x1920 under 937,664: 1/1.487 of each side, down to 28s


WHERE = "train.jsonl:17"


def sound_only() -> bytes:
    stream = io.BytesIO()
    with wave.open(stream, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(bytes(16000))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.mp4", "video 'missing.mp4' must exist"),
        ("https://example.com/a.mp4", "download it first"),
        (b"", "video of 0 bytes cannot be decoded"),
        (b"no video at all", "cannot be decoded"),
        (container(20, "mpeg4", "mp4", 10)[:1000], "cannot be decoded"),
        (container(20, "libx264", "mp4", 10, drop_first_packet=True), "must decode to 19 frames, got 10"),
        (animation(20, "GIF", 50)[:-500], "cannot be decoded"),
        (sound_only(), "it is no MP4, MOV,"),
        (container(20, "mpeg4", "mp4", 10).replace(b"vide", b"soun"), "must have a video stream"),
        ([], "video .a list of 0 frames."),
        ([Image.new("RGB", (50, 50)), "missing.png"], "frame 1: image 'missing.png' must exist"),
        (7, "of type int must be a path"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_refused_videos_name_the_row(source: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{WHERE}: .*{message}"):
        load_video(source, SMALL, WHERE)


def test_a_container_without_a_frame_rate_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rateless:
        streams = SimpleNamespace(video=[SimpleNamespace(average_rate=None, guessed_rate=Fraction(0))])

        def __enter__(self) -> Rateless:
            return self

        def __exit__(self, *_: object) -> None: ...

        def demux(self, _: object) -> list[SimpleNamespace]:
            return [SimpleNamespace(size=1, is_discard=False)] * 3

    monkeypatch.setattr(av, "open", lambda *_, **__: Rateless())
    with pytest.raises(ValueError, match=r"\(3 frames at 0 a second\)"):
        load_video(b"\0\0\0\x18ftypmp42", SMALL)


@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXTINF:1.0,\nhttp://127.0.0.1:9/seg.ts\n",
        "v=0\nm=video 18991 RTP/AVP 96\n",
        "ffconcat version 1.0\nfile 'a.mp4'\n",
    ],
)
def test_what_names_other_files_is_never_opened(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("FFmpeg saw it"))
    for name in ("a.m3u8", "a.mp4", "a.sdp"):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match="it is no MP4"):
            load_video(tmp_path / name, SMALL)
        with pytest.raises(ValueError, match="it is no MP4"):
            video_grid(tmp_path / name, SMALL)


@pytest.mark.parametrize(
    ("codec", "fmt"),
    [("mpeg4", "mp4"), ("mpeg4", "matroska"), ("mpeg4", "avi"), ("flv1", "flv"), ("mpeg2video", "mpegts")],
)
def test_each_container_has_its_own_reader(codec: str, fmt: str) -> None:
    assert len(load_video(container(20, codec, fmt, 25), SMALL)) == 2


def gif_of(frames: int, side: int, *more: tuple[int, int]) -> bytes:
    """A GIF of one-pixel frames on a large canvas: 20 bytes each; then `more`, by their offset and
    side.
    """
    head = b"GIF89a" + side.to_bytes(2, "little") * 2 + b"\x80\0\0" + bytes(3) + b"\xff" * 3
    written = [(0, 1)] * frames + list(more)
    blocks = [
        b"!\xf9\x04\0\x05\0\0\0," + at.to_bytes(2, "little") * 2 + size.to_bytes(2, "little") * 2 + b"\0\x02\x02D\x01\0"
        for at, size in written
    ]
    return head + b"".join(blocks) + b";"


@pytest.mark.parametrize(("frames", "side"), [(2000, 7000), (100, 7000), (30_000, 1)])
def test_an_animation_bomb_is_refused_before_a_frame_is_decoded(
    frames: int, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("a frame was decoded"))
    for use in (load_video, video_grid):
        with pytest.raises(ValueError, match="must have at most 20000 frames and 2147483648 pixels"):
            use(gif_of(frames, side), SMALL)
    assert video_grid(gif_of(40, 100), SMALL)[0] == 4  # 40 frames of 50 ms: 2 s


@pytest.mark.parametrize("frame", [(0, 5000), (5000, 1), (60, 1)])
def test_frames_larger_than_their_animation_are_refused(
    frame: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would let the picture grow after its size has been looked at."""
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("a frame was decoded"))
    for use in (load_video, video_grid):
        with pytest.raises(ValueError, match=r"\(60x60\) must have no frames that reach beyond it \(\d+x\d+\); save"):
            use(gif_of(2, 60, frame), SMALL)
    assert video_grid(gif_of(2, 60, (59, 1), (0, 60)), SMALL)[0] == 2  # four of 50 ms


def test_the_grid_of_a_video_is_known_without_decoding_it(tmp_path: Path) -> None:
    sources = [
        animation(20, "GIF", 100), animation(21, "PNG", 40), animation(20, "WEBP", 100), animation(7, "GIF", None),
        container(20, "mpeg4", "mp4", 10), greys(5), greys(1), gif_of(1, 60),
    ]  # fmt: skip
    for source in sources:
        for settings in (SMALL, VideoSettings(), dataclasses.replace(SMALL, fps=7.0)):
            frames = load_video(source, dataclasses.replace(settings, draw_timestamps=False))
            assert video_grid(source, settings) == patchify_video(frames, settings)[1]


def test_without_pyav_the_extra_is_named_and_gifs_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(load_video(animation(4, "GIF", 500), SMALL)) == 4
    with pytest.raises(ImportError, match=r"^video of \d+ bytes .*pip install av"):
        load_video(b"\0\0\0\x18ftypmp42", SMALL)


# ---- patches -------------------------------------------------------------------------------------


def test_patches_of_a_video_are_those_of_its_frames_in_time_order() -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)) for _ in range(4)]
    patches_PC, grid = patchify_video(frames, SMALL)
    assert grid == (4, 6, 8)
    assert patches_PC.dtype == np.float32
    one_by_one = [patchify_image(frame, SMALL.frame)[0] for frame in frames]
    np.testing.assert_array_equal(patches_PC, np.concatenate(one_by_one))


def test_patches_use_the_settings_of_the_image() -> None:
    settings = VideoSettings(min_pixels=3136, image=ImageSettings(mean=(0.0, 0.0, 0.0), std=(0.5, 0.5, 0.5)))
    patches_PC, _ = patchify_video([Image.new("RGB", (56, 56), "white")] * 2, settings)
    np.testing.assert_array_equal(patches_PC, np.full((32, 588), 2.0, np.float32))


def test_patchify_refuses_odd_and_empty() -> None:
    for frames in ([], greys(3)):
        with pytest.raises(ValueError, match=rf"number of frames \({len(frames)}\)"):
            patchify_video(frames, SMALL)

"""data/media/images.py against published tables and closed forms; every
refusal.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ernie_tune.data.media.images import (
    ImageSettings,
    image_size,
    load_image,
    patchify,
    patchify_image,
    resize,
    smart_resize,
)

# the limits under which the table was measured
LIMITS = {"min_pixels": 3136, "max_pixels": 6177 * 28 * 28}


def encoded(image: Image.Image, fmt: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, fmt, **options)
    return stream.getvalue()


def noise(height: int = 40, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


# ---- smart resize --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "hf", "paddle", "tokens"),
    [
        ((28, 28), (56, 56), (56, 56), 4),
        ((56, 56), (56, 56), (56, 56), 4),
        ((1, 1), (56, 56), (56, 56), 4),
        ((203, 317), (196, 308), (196, 308), 77),
        ((480, 640), (476, 644), (476, 644), 391),
        ((1080, 1920), (1092, 1932), (1092, 1932), 2691),
        ((4000, 6000), (1792, 2688), (1792, 2688), 6144),
        ((3000, 20), (2996, 28), (2996, 28), 107),
        ((10, 100), (28, 196), (28, 112), 4),
    ],
)
def test_smart_resize_table(size: tuple[int, int], hf: tuple[int, int], paddle: tuple[int, int], tokens: int) -> None:
    assert smart_resize(*size, **LIMITS, rule="hf") == hf
    assert smart_resize(*size, **LIMITS, rule="paddle") == paddle
    assert paddle[0] * paddle[1] // 784 == tokens


def test_ratio_above_200_is_clamped_by_paddle_and_refused_by_hf() -> None:
    assert smart_resize(20, 5000, **LIMITS) == (28, 5600)
    assert smart_resize(5000, 20, **LIMITS) == (5600, 28)
    with pytest.raises(ValueError, match=r"20x5000.*at most 200.*rule 'paddle'"):
        smart_resize(20, 5000, **LIMITS, rule="hf")


def test_halves_round_to_even() -> None:
    assert smart_resize(70, 42, min_pixels=1, max_pixels=10**6) == (56, 56)
    assert smart_resize(98, 126, min_pixels=1, max_pixels=10**6) == (112, 112)  # 3.5 -> 4, 4.5 -> 4


@pytest.mark.parametrize("limits", [(1, 800), (1000, 1500)])
def test_paddle_refuses_what_does_not_fit_between_the_limits(limits: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="widen the limits or crop"):
        smart_resize(28, 56, min_pixels=limits[0], max_pixels=limits[1])


def test_hf_keeps_one_block_where_paddle_has_nothing_left() -> None:
    assert smart_resize(28, 56, min_pixels=1, max_pixels=800, rule="hf") == (28, 28)


def test_smart_resize_refuses_nothing_to_resize_and_unknown_rules() -> None:
    with pytest.raises(ValueError, match="0x5"):
        smart_resize(0, 5, **LIMITS)
    with pytest.raises(ValueError, match="'torch'"):
        smart_resize(5, 5, **LIMITS, rule="torch")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_pixels": 5000, "max_pixels": 4000}, r"min_pixels \(5000\).*max_pixels \(4000\)"),
        ({"min_pixels": 0}, r"min_pixels \(0\)"),
        ({"patch_size": 0}, r"patch_size \(0\)"),
        ({"merge_size": 0}, r"merge_size \(0\)"),
        ({"std": (1.0, 1.0, 0.0)}, "std above 0"),
        ({"mean": (1.0,)}, "3 values each"),
        ({"rule": "pil"}, "'pil'"),
    ],
)
def test_settings_refuse(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageSettings(**change)


def test_default_settings_are_the_shipped_ones() -> None:
    settings = ImageSettings()
    assert (settings.min_pixels, settings.max_pixels, settings.factor) == (56 * 56, 6144 * 28 * 28, 28)
    assert settings.target_size(4000, 6000) == (1792, 2688)


# ---- patches -------------------------------------------------------------------------------------


def test_patch_order_of_a_4x6_grid_in_each_frame() -> None:
    want = np.array(
        [0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 14, 15, 20, 21, 30, 31, 22, 23, 32, 33, 24, 25, 34, 35]
    )  # 10 row + column
    frame = np.kron(np.arange(4)[:, None] * 10 + np.arange(6), np.ones((14, 14))).astype(np.uint8)
    frames = np.stack([frame, frame + 100])[..., None].repeat(3, -1)
    patches_PC, grid = patchify(frames, ImageSettings(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    assert grid == (2, 4, 6)
    np.testing.assert_allclose(patches_PC * 255, np.concatenate([want, want + 100])[:, None].repeat(588, 1), atol=1e-4)


def test_values_inside_a_patch_are_channel_row_column() -> None:
    channel, row, column = np.meshgrid(np.arange(3), np.arange(28), np.arange(28), indexing="ij")
    frame = (channel * 196 + (row % 14) * 14 + column % 14).transpose(1, 2, 0).astype(np.float32)
    patches_PC, _ = patchify(frame[None], ImageSettings(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    np.testing.assert_array_equal(np.rint(patches_PC * 255), np.tile(np.arange(588), (4, 1)))


def test_normalisation_of_black_and_white() -> None:
    settings = ImageSettings()
    black, grid = patchify_image(Image.new("RGB", (56, 56), "black"), settings)
    white, _ = patchify_image(Image.new("RGB", (56, 56), "white"), settings)
    assert black.dtype == np.float32
    assert black.shape == (16, 588)
    assert grid == (1, 4, 4)
    # -mean/std and (1-mean)/std of CLIP's published constants
    np.testing.assert_allclose(black.reshape(16, 3, 196)[7, :, 3], [-1.7922625, -1.7520971, -1.4802198], atol=1e-6)
    np.testing.assert_allclose(white.reshape(16, 3, 196)[7, :, 3], [1.9303361, 2.0748837, 2.1458969], atol=1e-6)


def test_resize_is_bicubic_and_takes_height_first() -> None:
    step = Image.fromarray(np.repeat([[64] * 14 + [192] * 14], 28, 0).astype(np.uint8)).convert("RGB")
    big = np.asarray(resize(step, (56, 112)))
    assert big.shape == (56, 112, 3)
    assert big.min() < 64  # bicubic overshoots at an edge, bilinear cannot
    assert big.max() > 192


def test_patchify_refuses_wrong_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[28, 28, 3\]"):
        patchify(np.zeros((28, 28, 3), np.uint8), ImageSettings())
    with pytest.raises(ValueError, match="28x30"):
        patchify(np.zeros((1, 28, 30, 3), np.uint8), ImageSettings())
    with pytest.raises(ValueError, match="'L'"):
        patchify_image(Image.new("L", (56, 56)), ImageSettings())


# ---- decoding ------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = noise()
    raw = encoded(image)
    path = tmp_path / "a picture#1 中.png"
    path.write_bytes(raw)
    data_url = "data:image/png;base64," + base64.b64encode(raw).decode()
    for source in (path, str(path), path.as_uri(), raw, image, np.asarray(image), data_url):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        assert loaded is not source
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))


def test_grey_and_alpha_arrays() -> None:
    grey = np.array([[0, 7], [200, 255]], np.uint8)
    np.testing.assert_array_equal(np.asarray(load_image(grey)), grey[..., None].repeat(3, -1))
    rgba = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 100, 255, 51]]], np.uint8)
    # 51/255 = 1/5 of the colour over 4/5 of white
    np.testing.assert_array_equal(np.asarray(load_image(rgba))[0], [[10, 20, 30], [255, 255, 255], [204, 224, 255]])


def test_transparent_palette_becomes_white() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1])
    loaded = load_image(encoded(palette, "PNG", transparency=1))
    assert [loaded.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_16_bit_grey_keeps_the_upper_byte(fmt: str) -> None:
    values = np.array([[0, 255, 256, 513, 40000, 65535]], np.uint16)
    loaded = load_image(encoded(Image.fromarray(values), fmt))
    assert np.asarray(loaded)[0, :, 0].tolist() == [0, 0, 1, 2, 156, 255]


def test_exif_orientation_is_not_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees for display
    assert load_image(encoded(noise(40, 30), "JPEG", exif=exif)).size == (30, 40)


WHERE = "train.jsonl:17"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing/a.jpg", r"image 'missing/a.jpg' must exist"),
        (".", "must be a readable file"),
        ("a\0b", "must be a readable file"),
        ("https://example.com/a.jpg", r"'https://example.com/a.jpg' must be a local file; download it first"),
        ("file://a.jpg", "three slashes"),
        ("data:image/png,abc", "data:image/png;base64"),
        ("data:image/png;base64,@@@", "valid base64"),
        ("data:image/png;base64," + "A" * 400, r"'data:image/png;base64,A{58}\.\.\.' cannot be decoded"),
        (b"", "of 0 bytes cannot be decoded"),
        (b"no picture at all", "cannot be decoded"),
        (encoded(noise(), "PNG")[:-2000], "cannot be decoded"),
        (encoded(noise(), "JPEG")[:-200], "cannot be decoded"),
        (Image.new("RGB", (0, 5)), "size 0x5"),
        (np.zeros((0, 5, 3), np.uint8), r"\[0, 5, 3\]"),
        (np.zeros((5, 5, 2), np.uint8), r"\[5, 5, 2\]"),
        (np.zeros((5, 5, 3), np.float32), "float32"),
        (Image.new("F", (5, 5)), "mode 'F'"),
        (Image.new("I", (5, 5)), "mode 'I'"),
        (3, "of type int must be a path"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_refused_sources_name_the_row_and_the_remedy(source: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{WHERE}: image .*{message.removeprefix('image ')}"):
        load_image(source, WHERE)


def test_a_damaged_image_opened_by_the_caller_is_refused_too() -> None:
    with pytest.raises(ValueError, match=r"^image of type JpegImageFile cannot be decoded"):
        load_image(Image.open(io.BytesIO(encoded(noise(), "JPEG")[:-200])))


def test_decompression_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    # pillow refuses twice as many; the picture has 1200
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(ValueError, match=r"of \d+ bytes must be smaller .*exceeds limit of 1000 pixels.*; shrink"):
        load_image(encoded(noise()))


def test_only_pictures_are_opened_whatever_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x.eps", "x.png"):
        (tmp_path / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
        with pytest.raises(ValueError, match="it is none of PNG, JPEG, WEBP, GIF, BMP, TIFF, AVIF"):
            load_image(tmp_path / name)
        with pytest.raises(ValueError, match="it is none of PNG"):
            image_size(tmp_path / name)
    for fmt in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"):
        Image.new("RGB", (30, 20)).save(tmp_path / "a", fmt)
        assert image_size(tmp_path / "a") == load_image(tmp_path / "a").size[::-1] == (20, 30)
    Image.new("RGB", (30, 20)).save(tmp_path / "a", "PSD" if "PSD" in Image.SAVE else "TGA")
    with pytest.raises(ValueError, match="it is none of PNG"):
        load_image(tmp_path / "a")

"""data/doctor/media.py: pictures that people see otherwise than the model, clips that training
cannot use.
"""

from __future__ import annotations

import base64
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from ernie_tune.data.doctor import rows
from ernie_tune.data.doctor.notes import FileNotes
from ernie_tune.data.doctor.scan import Report, Scan
from ernie_tune.data.media.images import load_image
from ernie_tune.data.media.video import load_video
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import Record
from ernie_tune.data.sources import DatasetEntry

TINY = Processor.bundled("tiny")
_ORIENTATION = 0x0112


def check(folder: Path, **row: Any) -> Report:
    path = folder / "x.jsonl"
    path.write_text(json.dumps({"question": "what?", "answer": "x", **row}) + "\n")
    return Scan(TINY).run([DatasetEntry(str(path))])


@pytest.mark.parametrize(("turn", "told"), [(1, False), (3, True), (6, True), (9, False)])
def test_a_turned_photo_is_told(turn: int, told: bool, tmp_path: Path) -> None:
    path, exif = tmp_path / "phone.jpg", Image.Exif()
    exif[_ORIENTATION] = turn
    Image.new("RGB", (96, 48), (9, 9, 9)).save(path, exif=exif)
    report = check(tmp_path, image="phone.jpg")
    assert dict(report.findings.counts) == ({"turned": 1} if told else {})
    assert report.exit_code == 0
    assert load_image(str(path)).size == (96, 48)  # as it is stored, whatever a viewer shows
    assert (ImageOps.exif_transpose(Image.open(path)).size == (48, 96)) == (turn == 6)
    if told:
        found = report.findings.kept[0].english
        assert "phone" in found or "..." in found  # a long path is cut
        assert f": EXIF orientation {turn} (1 of 1 opened)" in found


@pytest.mark.parametrize(("bits", "told"), [(12, True), (16, False)])
def test_a_scan_that_uses_part_of_its_range_is_told(bits: int, told: bool, tmp_path: Path) -> None:
    grey = np.tile(np.arange(0, 1 << bits, 1 << (bits - 6), dtype=np.uint16), (48, 1))
    Image.fromarray(grey).save(tmp_path / "scan.png")
    report = check(tmp_path, image="scan.png")
    assert dict(report.findings.counts) == ({"dim": 1} if told else {})
    brightest = int(np.asarray(load_image(str(tmp_path / "scan.png"))).max())
    assert brightest == int(grey.max()) >> 8  # 15 of 255 for 12 bits: nearly black
    if told:
        assert "brightest of 65,535 is 4,032" in report.findings.kept[0].english


def test_a_file_of_several_pictures_is_told(tmp_path: Path) -> None:
    pages = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(3)]
    for name in ("scan.tiff", "loop.gif"):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        report = check(tmp_path, image=name)
        assert dict(report.findings.counts) == {"frames": 1}
        assert "3 pictures in one file" in report.findings.kept[0].english


@pytest.mark.parametrize(("ink", "told"), [(255, True), (0, False)])
def test_a_drawing_that_is_white_on_nothing_is_told(ink: int, told: bool, tmp_path: Path) -> None:
    """Transparent pixels are white to the model: white ink on them is lost, black ink is not."""
    pixels = np.full((32, 32, 4), (ink, ink, ink, 0), np.uint8)
    pixels[8:24, 8:24, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "drawing.png")
    report = check(tmp_path, image="drawing.png")
    assert dict(report.findings.counts) == ({"blank": 1} if told else {})
    assert (np.asarray(load_image(str(tmp_path / "drawing.png"))).min() == 255) == told


def test_frames_without_room_for_their_time_are_an_error(tmp_path: Path) -> None:
    for side, found in ((9, {"clip_broken": 1}), (10, {})):
        Image.new("RGB", (30, side)).save(tmp_path / "a.png")
        assert dict(check(tmp_path, videos=[["a.png", "a.png"]]).findings.counts) == found
    Image.new("RGB", (30, 9)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"x.jsonl:1: video .* \(9x30 pixels\) must be at least 10x10, since the time"):
        load_video([str(tmp_path / "a.png")], TINY.videos, where="x.jsonl:1")


def test_broken_pictures_do_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each hangs in its own traceback, a cycle; the collector of the scan is off."""
    alive: list[int] = []
    told = FileNotes.add

    def add(self: FileNotes, record: Record) -> None:
        errors = [one for one in gc.get_objects() if type(one).__name__ == "UnidentifiedImageError"]
        alive.append(len(errors))
        told(self, record)

    monkeypatch.setattr(FileNotes, "add", add)
    monkeypatch.setattr(rows, "BLOCK_BYTES", 400)
    picture = "data:image/png;base64," + base64.b64encode(bytes(range(100))).decode()
    lines = [{"question": f"{i}?", "answer": "x", "image": picture} for i in range(12)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = Scan(TINY).run([DatasetEntry(str(tmp_path / "x.jsonl"))])
    assert report.findings.counts["media_broken"] == 12
    assert len(alive) == 12
    assert max(alive) <= 3

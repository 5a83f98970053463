"""A file is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie_tune.config.atomic import write_atomically


def test_text_and_bytes_arrive_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "图\r\n")
    assert path.read_bytes() == "图\r\n".encode()
    write_atomically(path, b"\x00\n")
    assert path.read_bytes() == b"\x00\n"
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]


def test_what_was_there_stays_until_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_atomically(path, "old")

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:1])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"

"""Texts alone, as continued pre-training reads them: rows of a text, files and folders of .txt,
long ones in pieces that together are the text.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

from ernie_tune.data.batching import Dropped, Encoder
from ernie_tune.data.doctor.scan import Scan
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import DataError, Record, as_words
from ernie_tune.data.sources import DatasetEntry, load_dataset
from ernie_tune.data.texts import TextPieces, cut_note

WORDS = ("whale", "sea", "the", "deep", "鲸鱼", "大海", "\\", "<image>", "x" * 90, "😀", "  ", "<think>")


def rows(folder: Path, *given: object, name: str = "rows.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in given), encoding="utf-8")
    return file


def prose(seed: int, words: int) -> str:
    drawn = random.Random(seed)
    return "".join(drawn.choice(WORDS) + drawn.choice((" ", " ", ". ", "\n", "")) for _ in range(words))


@pytest.mark.parametrize(
    "row",
    [
        {"text": "all of it"},
        {"text": ["all of it"]},
        {"content": "all of it", "path": "src/main.py", "url": "https://example.org"},
        {"document": "all of it", "file_name": None},
        {"messages": [{"role": "text", "content": "all of it"}], "signal": {"type": "text"}},
    ],
)
def test_all_of_a_text_is_a_target(row: dict[str, object], tmp_path: Path) -> None:
    processor = Processor.bundled()
    record = load_dataset(rows(tmp_path, row))[0]
    sample = Encoder(processor, 64)(record, Dropped())
    assert sample is not None
    assert record.signal == "text"
    begin, end = (processor.tokenizer.encode(mark, allow_special=True) for mark in ("<|begin_of_sentence|>", "</s>"))
    assert sample.row.input_ids_L.tolist() == begin + processor.tokenizer.encode("all of it") + end
    assert sample.trained_L.tolist() == [False] + [True] * (len(sample.trained_L) - 1)


def test_rows_of_one_file_may_name_their_source_or_not(tmp_path: Path) -> None:
    file = rows(tmp_path, {"text": "a b", "path": "a.py"}, {"text": "c d"}, {"text": "e", "path": "photo.bak"})
    assert [record.messages[0]["content"] for record in load_dataset(file)] == ["a b", "c d", "e"]
    picture = load_dataset(rows(tmp_path, {"text": "a cat", "file_name": "cat.png"}))[0]
    assert (picture.signal, len(picture.images)) == ("sft", 1)


def test_tags_in_a_text_are_words(tmp_path: Path) -> None:
    text = "The <image> and <video> tags, \\<image> too."
    processor = Processor.bundled()
    encoded = processor.encode(load_dataset(rows(tmp_path, {"text": text}))[0].messages)
    assert processor.decode(encoded.row.input_ids_L) == text.replace("\\<", "<")
    assert encoded.num_images == encoded.num_videos == 0


def test_folder_of_texts_is_a_text_each(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes("\ufeffsecond\ntext".encode())
    (tmp_path / "sub" / "c.TXT").write_text("third", encoding="utf-8")
    (tmp_path / "README.md").write_text("no text of these", encoding="utf-8")
    data = load_dataset(tmp_path)
    assert [record.messages[0]["content"] for record in data] == ["second\ntext", "third"]
    assert [Path(name).name for name, _ in data.files] == ["b.txt", "c.TXT"]
    assert len(load_dataset(str(tmp_path / "*.txt"))) == 1
    rows(tmp_path, {"prompt": "a", "response": "b"})  # beside rows, notes are none
    assert [record.signal for record in load_dataset(tmp_path)] == ["sft"]


def test_texts_of_another_encoding_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("鲸鱼在大海里".encode("gb18030"))
    with pytest.raises(DataError, match="iconv -f GB18030"):
        load_dataset(tmp_path / "a.txt")


def test_fine_tuning_on_texts_is_refused_with_the_stage_that_takes_them(tmp_path: Path) -> None:
    data = load_dataset(rows(tmp_path, {"text": "x"}), signals=("sft",))
    with pytest.raises(DataError, match=r"set stage: PT to learn all of the text"):
        data[0]


def as_text(content: str, name: str = "r") -> Record:
    return Record("text", ({"role": "text", "content": content},), id=name)


@pytest.mark.parametrize("limit", [16, 17, 64])
def test_pieces_of_a_long_text_are_the_text(limit: int) -> None:
    processor = Processor.bundled()
    contents = [as_words(prose(seed, 200)) for seed in range(6)] + ["short", "", "y" * 3000]
    pieces = TextPieces([as_text(content, f"r{i}") for i, content in enumerate(contents)], processor, limit)
    found: dict[int, list[Record]] = {}
    for i in range(len(pieces)):
        found.setdefault(int(pieces._piece_n4[i, 0]), []).append(pieces[i])
    assert ["".join(p.messages[0]["content"] for p in found[i]) for i in range(len(contents))] == contents
    for parts in found.values():
        encoded = [processor.encode(part.messages) for part in parts]
        assert max(one.num_tokens for one in encoded) <= limit
        ends = [one.row.input_ids_L[-1] == processor.tokenizer.special["</s>"] for one in encoded]
        assert ends == [False] * (len(parts) - 1) + [True]
        # room is used: but for the last, pieces are not small
        assert all(one.num_tokens > limit // 4 for one in encoded[:-1])
    assert len({piece.id for piece in pieces[:]}) == len(pieces)
    assert len(cut_note([pieces])) == 1
    assert cut_note([TextPieces([as_text("short")], processor, limit)]) == []


def test_empty_texts_are_dropped_and_told(tmp_path: Path) -> None:
    dropped = Dropped()
    encoder = Encoder(Processor.bundled(), 32)
    assert encoder(as_text(" \n"), dropped) is None
    assert not encoder.usable(as_text(""), dropped)
    assert encoder.usable(as_text("a"), dropped)
    assert list(dropped.count) == ["an empty text"]
    report = Scan(Processor.bundled()).run([DatasetEntry(str(rows(tmp_path, {"text": "a"}, {"text": ""})))])
    assert report.findings.counts == {"empty_text": 1}


def test_doctor_reads_plain_texts_alike_on_both_roads(tmp_path: Path) -> None:
    given = [{"text": prose(i, 30), "source": "web"} for i in range(40)] + [{"text": "twice"}, {"text": "twice"}]
    file = str(rows(tmp_path, *given))
    quick, slow = Scan(Processor.bundled()), Scan(Processor.bundled())
    first = quick.run([DatasetEntry(file)])
    second = slow.run([DatasetEntry(file, columns={"text": "text", "source": "source"})])
    assert first.findings.counts == {**second.findings.counts}
    assert first.findings.counts["duplicate"] == 1
    assert np.isclose(first.stats.text.mean, second.stats.text.mean)

"""data/file_rows.py: what a file is its first bytes say; rows from folders and from memory;
pictures with labels; conversion that keeps pictures.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ernie_tune.cli import main
from ernie_tune.data import parquet_rows
from ernie_tune.data.doctor import rows as doctor_rows
from ernie_tune.data.doctor.convert import convert_file
from ernie_tune.data.doctor.scan import Scan
from ernie_tune.data.file_kinds import file_kind, why_no_json
from ernie_tune.data.media.images import load_image
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import DataError
from ernie_tune.data.sources import DatasetEntry, load_dataset

TINY = Processor.bundled("tiny")
ROW = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
LINE = json.dumps(ROW).encode() + b"\n"


def zipped(name: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr(name, "x")
    return out.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "found", "remedy"),
    [
        ("rows.jsonl.gz", gzip.compress(LINE), "gzip", "gunzip -k "),
        ("rows.jsonl", gzip.compress(LINE), "gzip", "gunzip -k "),
        ("rows.jsonl.bz2", bz2.compress(LINE), "bzip2", "bunzip2 -k "),
        ("rows.jsonl.zst", b"\x28\xb5\x2f\xfd" + bytes(9), "zstandard", "zstd -d "),
        ("rows.zip", zipped("rows.jsonl"), "zip", "unzip "),
        ("rows.jsonl", zipped("[Content_Types].xml"), "Excel (.xlsx)", "save it as CSV UTF-8 in Excel"),
        ("rows.csv", b"\xd0\xcf\x11\xe0" + bytes(20), "Excel (.xls)", "save it as CSV UTF-8 in Excel"),
        ("rows.jsonl", LINE.decode().encode("utf-16"), "UTF-16LE", "iconv -f UTF-16 -t UTF-8 "),
        ("rows.csv", "text,label\nä,b\n".encode("utf-16"), "UTF-16LE", "iconv -f UTF-16 -t UTF-8 "),
        (
            "rows.jsonl",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "a Git LFS pointer",
            "git lfs pull",
        ),
        ("rows.jsonl", LINE.decode().encode("utf-32"), "UTF-32LE", "iconv -f UTF-32 -t UTF-8 "),
        *(
            (
                f"rows.{end}",
                text.encode(name),
                name.upper().replace("-", "", 2).replace("UTF", "UTF-"),
                f"iconv -f {shown} ",
            )
            for name, shown in (
                ("utf-16-le", "UTF-16LE"),
                ("utf-16-be", "UTF-16BE"),
                ("utf-32-le", "UTF-32LE"),
                ("utf-32-be", "UTF-32BE"),
            )
            for end, text in (("jsonl", '{"prompt": "问", "response": "答"}\n' * 2), ("csv", "问题,回答\n问,答\n"))
        ),
        ("rows.jsonl", bytes(100), "zero bytes only", "write or download it again"),
        ("rows.jsonl", b"\x12\0\0\0\0\0abcd", "binary data", "write its rows as jsonl"),
        ("rows.jsonl", b"\x89HDF\r\n\x1a\n", "HDF5", "write its rows as jsonl"),
        ("rows.jsonl", b"\x80\x03cxx", "pickle", "write its rows as jsonl"),
        ("rows.jsonl", b"\x89PNG\r\n\x1a\n", "a picture", "name it in the images of a row"),
        ("rows.jsonl", b"- prompt: a\n  response: b\n", "YAML", "write its rows as jsonl"),
        ("rows.xml", b"<?xml version='1.0'?><rows/>", "XML", "write its rows as jsonl"),
        ("NOTES.md", b"# Notes\n\nhello\n", "text without rows ('# Notes')", "write each row as an object"),
        ("rows.jsonl", b"<!DOCTYPE html><html></html>", "a web page", "download the raw file"),
    ],
)
def test_files_of_another_kind_are_named_with_their_remedy(
    name: str, content: bytes, found: str, remedy: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_dataset(str(path))
    assert (caught.value.found, caught.value.problem) == (found, "foreign")
    assert caught.value.fix.startswith(remedy)
    report = Scan(TINY).run([DatasetEntry(str(path))])
    assert report.findings.counts == {"foreign": 1}


def test_objects_over_several_lines_are_rows(tmp_path: Path) -> None:
    other = {"question": "c", "answer": "d"}
    for name, text, count in (
        ("one.json", json.dumps(ROW, indent=1), 1),
        ("one.jsonl", "\ufeff" + json.dumps(ROW, indent=4) + "\n", 1),
        ("several.json", "\n".join(json.dumps(ROW, indent=2) for _ in range(3)), 3),
        ("wrapped.json", json.dumps({"data": [ROW, ROW]}, indent=1), 2),
        ("named.json", json.dumps({"version": "1.0", "rows": [ROW] * 4, "count": 4}, indent=1), 4),
        ("plain.jsonl", json.dumps(other) + "\n" + json.dumps(other), 2),
    ):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        data = load_dataset(str(path))
        assert len(data) == count, name
        assert data[count - 1].messages[-1]["content"] in "bd"
        report = Scan(TINY).run([DatasetEntry(str(path))])
        assert (report.stats.rows, report.exit_code) == (count, 0), name
    assert load_dataset(str(tmp_path / "several.json"))[1].meta.line == 13
    path.write_text('{"a":\n[1,}\n')
    with pytest.raises(DataError, match=r"plain.jsonl:1: row: found"):
        load_dataset(str(path))


def test_a_cell_may_hold_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "big.csv"
    path.write_text(f'question,answer,note\nq,a,"{"A" * 140_000}"\n')
    assert len(load_dataset(str(path))[0].meta.extra["note"]) == 140_000
    out = io.BytesIO()
    Image.new("RGB", (9, 7), (200, 0, 0)).save(out, "PNG")
    import base64

    path.write_text(f"question,answer,image\nq,a,{base64.b64encode(out.getvalue()).decode()}\n")
    picture = load_dataset(str(path))[0].images[0]
    assert load_image(picture).size == (9, 7)  # type: ignore[arg-type]
    assert Scan(TINY).run([DatasetEntry(str(path))]).findings.counts == {}


def test_folders(tmp_path: Path) -> None:
    repository = tmp_path / "repo"
    (repository / "data").mkdir(parents=True)
    (repository / "README.md").write_text("x")
    (repository / "data" / "train.jsonl").write_bytes(LINE)
    (repository / "data" / "test.jsonl").write_bytes(LINE * 5)
    # the tests beside the training rows are not trained
    assert len(load_dataset(str(repository))) == 1
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "rows.jsonl.gz").write_bytes(gzip.compress(LINE))
    with pytest.raises(DataError, match=r"found gzip.*gunzip -k"):
        load_dataset(str(packed))
    for split, label in (("train", "cat"), ("val", "cat")):
        (tmp_path / "splits" / split / label).mkdir(parents=True)
        Image.new("RGB", (30, 30)).save(tmp_path / "splits" / split / label / "0.png")
    with pytest.raises(DataError, match=r"expected one split; fix: name one: .*splits/train, .*splits/val"):
        load_dataset(str(tmp_path / "splits"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="found a folder without rows"):
        load_dataset(str(tmp_path / "empty"))


def test_a_folder_with_one_sub_folder_a_class(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(2):
            Image.new("RGB", (30, 30)).save(tmp_path / label / f"{i}.png")
    data = load_dataset(str(tmp_path))
    assert [record.messages[-1]["content"] for record in data] == ["cat", "cat", "dog", "dog"]
    assert data[2].images == (str(tmp_path / "dog" / "0.png"),)
    assert data.files == []  # no file that a ledger could hash
    report = Scan(TINY).run([DatasetEntry(str(tmp_path))])
    assert (report.exit_code, report.pictures.opened) == (0, 4)


@pytest.mark.parametrize(
    ("columns", "question", "answer"),
    [
        (("image", "label"), "<image>What is this?", "cat"),
        (("Image", "Label"), "<image>What is this?", "cat"),
        (("image", "caption"), "<image>Describe the picture.", "cat"),
        (("image", "text"), "<image>Describe the picture.", "cat"),
        (("file_name", "text"), "<image>Describe the picture.", "cat"),
        (("image_path", "class"), "<image>What is this?", "cat"),
    ],
)
def test_a_picture_with_a_label_or_a_caption(
    columns: tuple[str, str], question: str, answer: str, tmp_path: Path
) -> None:
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    (tmp_path / "x.csv").write_text(f"{columns[0]},{columns[1]}\na.png,{answer}\n")
    record = load_dataset(str(tmp_path / "x.csv"))[0]
    assert [m["content"] for m in record.messages] == [question, answer]
    assert record.images == (str(tmp_path / "a.png"),)
    assert Scan(TINY).run([DatasetEntry(str(tmp_path / "x.csv"))]).findings.counts == {"no_question": 1}


@pytest.mark.parametrize(
    ("columns", "near", "entry"),
    [
        ("foto,art", "image + label (pictures)", {"image": "foto", "label": "art"}),
        ("标签,图片", "image + label (pictures)", {"image": "图片", "label": "标签"}),
        ("bild,frage,antwort", "image + label (pictures)", {"image": "bild", "prompt": "frage", "response": "antwort"}),
    ],
)
def test_a_cell_that_names_a_picture_tells_what_its_column_is(
    columns: str, near: str, entry: dict[str, str], tmp_path: Path
) -> None:
    """The entry of dataset_info.json that the refusal proposes reads the file as it is."""
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    names = columns.split(",")
    shows = names.index(entry["image"])
    cells = ["a.png" if i == shows else f"text {i}" for i in range(len(names))]
    (tmp_path / "x.csv").write_text(f"{columns}\n{','.join(cells)}\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_dataset(str(tmp_path / "x.csv"))
    assert near in caught.value.english
    proposed = json.loads(caught.value.english.split("dataset_info.json: ")[1].partition("; the first")[0])
    assert proposed["mine"]["columns"] == entry
    (tmp_path / "dataset_info.json").write_text(json.dumps(proposed), encoding="utf-8")
    record = load_dataset("mine", dataset_dir=str(tmp_path))[0]
    assert record.images == (str(tmp_path / "a.png"),)
    assert record.messages[-1]["content"] == cells[max(i for i in range(len(names)) if i != shows)]


@pytest.mark.parametrize(
    "given", [3, None, [3], b"x", {"a": 1}, {"prompt": ["q"]}, iter([1]), [None], [["q"]], object()]
)
def test_what_are_no_rows_is_told_what_to_pass(given: Any) -> None:
    with pytest.raises(ValueError, match=r"train_dataset \(.*\) must be rows: .* pass \[\{\"messages\""):
        load_dataset(given)


def test_fields_of_no_format_in_memory_are_told_what_to_pass() -> None:
    with pytest.raises(DataError, match=r"found fields a, .* pass rows such as \[\{\"messages\"") as error:
        load_dataset([{"a": 1}])
    assert "dataset_info.json" not in str(error.value)


def test_rows_in_memory(tmp_path: Path) -> None:
    picture = Image.new("RGB", (30, 30))
    rows: list[dict[str, Any]] = [ROW, {"messages": ROW["messages"], "images": [picture]}]
    for given in (rows, (row for row in rows), tuple(rows)):
        data = load_dataset(given)  # type: ignore[arg-type]
        assert [record.messages[-1]["content"] for record in data] == ["b", "b"]
        assert data[1].images == (picture,)
        assert TINY.encode(data[1].messages, data[1].images).num_images == 1
    assert load_dataset(rows).files == []
    with pytest.raises(DataError, match="train_dataset:2: foto"):
        _ = load_dataset([ROW, {**ROW, "foto": "a.png"}])[1]


def test_parquet_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"q{i}", "answer": "a", "blob": bytes(50_000)} for i in range(40)]
    # a name that lies
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "big.jsonl", row_group_size=7)
    data = load_dataset(str(tmp_path / "big.jsonl"), format="prompt_response")
    order = [39, 0, 13, 14, 6, 7]
    assert [data[i].messages[0]["content"] for i in order] == [f"q{i}" for i in order]
    assert data._parts[0].rows._held.table.num_rows <= 7  # type: ignore[attr-defined]
    report = Scan(TINY).run([DatasetEntry(str(tmp_path / "big.jsonl"))])
    assert report.stats.rows == 40
    monkeypatch.setattr(doctor_rows, "_BATCH_BYTES", 200_000)
    batches = list(doctor_rows.open_rows(str(tmp_path / "big.jsonl")).batches())
    assert [len(batch.rows) for batch in batches] == [4] * 10, "pictures in cells make small batches"
    assert [line for batch in batches for line in batch.lines_n] == list(range(1, 41))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(DataError, match="write or download it again"):
        load_dataset(str(tmp_path / "cut.parquet"))


@pytest.mark.parametrize("dictionary", [True, False])
def test_one_large_row_group_is_read_in_batches(
    dictionary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order from the file, out of order from a temporary copy; never the group as a whole. A
    picture that stands in many rows makes a group larger than its file says.
    """
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(parquet_rows, "_GROUP_BYTES", 100_000)
    monkeypatch.setattr(parquet_rows, "_BATCH_BYTES", 50_000)
    blobs = [bytes([i if not dictionary else 0]) * 10_000 for i in range(100)]
    rows = [{"question": f"q{i}", "answer": "a", "blob": blob} for i, blob in enumerate(blobs)]
    path = tmp_path / "one.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, use_dictionary=dictionary, compression="none")
    found = parquet_rows.ParquetRows(str(path))
    assert found._file.num_row_groups == 1
    for order in (range(100), [99, 0, 57, 56, 3, 4, 5, 0], range(100)):
        for i in order:
            assert found[i] == rows[i]
            assert found._held.table.num_rows < 100
    with pytest.raises(IndexError):
        _ = load_dataset(str(path), format="prompt_response")[100]
    monkeypatch.setattr(parquet_rows.tempfile, "TemporaryFile", lambda: Path("/dev/full").open("wb"))  # noqa: SIM115
    with pytest.raises(DataError, match=r"a row group of .* expected room for it in .*set TMPDIR to another folder"):
        _ = parquet_rows.ParquetRows(str(path))[57]


TABLE = [{"prompt": f"问 {i}", "response": f"答, {i}"} for i in range(3)]
NAMES = ["prompt", "response"]
SPREAD = {name: {str(i): row[name] for i, row in enumerate(TABLE)} for name in NAMES}
CELLS = [[row[name] for name in NAMES] for row in TABLE]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "value",
    [
        {name: [row[name] for row in TABLE] for name in NAMES},
        SPREAD,
        {str(i): row for i, row in enumerate(TABLE)},
        {"columns": NAMES, "index": [0, 1, 2], "data": CELLS},
        {"schema": {"fields": [], "primaryKey": ["index"]}, "data": TABLE},
    ],
)
def test_json_by_columns_is_read(value: Any, indent: int | None, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False))
    assert [list(r.messages) for r in load_dataset(str(path))] == [
        [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["response"]}] for r in TABLE
    ]
    assert Scan(TINY).run([DatasetEntry(str(path))]).stats.rows == 3


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": "b"},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "rejected": []},
        {"question": "q", "answer": "1", "facts": [{"a": 1}]},
    ],
)
def test_one_row_that_has_a_list_is_no_table(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps(row))
    assert file_kind(str(path)) == "lines"
    path.write_text(json.dumps({"version": 2, "anything": [row, row]}))
    assert file_kind(str(path)) == "objects"


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    ("row", "form", "answers"),
    [
        ({"messages": TURNS, "documents": [{"text": "a long text"}]}, "messages", ["a"]),
        ({"conversations": TURNS, "notes": [{"question": "r", "answer": "b"}]}, "sharegpt", ["a"]),
        ({"messages": TURNS, "rejected_messages": [*TURNS[:1], {**TURNS[1], "content": "b"}]}, "pairs", ["a", "b"]),
        ({"chosen": TURNS, "rejected": [*TURNS[:1], {**TURNS[1], "content": "b"}]}, "pairs", ["a", "b"]),
        ({"text": "a", "entities": [{"text": "b"}]}, "text", ["a"]),
    ],
)
def test_one_row_is_read_as_one_of_many_is(
    row: dict[str, Any], form: str, answers: list[str], indent: int | None, tmp_path: Path
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    one.write_text(json.dumps(row, indent=indent))
    two.write_text(json.dumps([row, row]))
    alone, many = load_dataset(str(one)), load_dataset(str(two))
    assert len(alone) == 1
    assert alone[0].meta.format == form
    assert (alone[0].messages, alone[0].candidates) == (many[0].messages, many[0].candidates)
    said = [turns[-1]["content"] for turns in ([c.messages for c in alone[0].candidates] or [alone[0].messages])]
    assert said == answers


def test_one_row_of_lists_is_no_table(tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    path.write_text(json.dumps({"src": ["q", "r"], "tgt": ["a", "b"]}, indent=1))
    assert len(load_dataset(str(path))[0].messages) == 4


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "prompt;response\n问 0;答, 0\n问 1;答, 1\n问 2;答, 2\n"),
        ("b.csv", '"prompt";"response"\r\n"问 0";"答, 0"\r\n"问 1";"答, 1"\r\n"问 2";"答, 2"\r\n'),
        ("c.csv", "sep=;\nprompt;response\n问 0;答, 0\n问 1;答, 1\n问 2;答, 2\n"),
        ("d.csv", "prompt\tresponse\n问 0\t答, 0\n问 1\t答, 1\n问 2\t答, 2\n"),
        ("e.txt", "prompt\tresponse\n问 0\t答, 0\n问 1\t答, 1\n问 2\t答, 2\n"),
        ("f.csv", "prompt|response\n问 0|答, 0\n问 1|答, 1\n问 2|答, 2\n"),
        ("g.tsv", 'prompt,response\n问 0,"答, 0"\n问 1,"答, 1"\n问 2,"答, 2"\n'),
        ("h.csv", 'prompt,response\r问 0,"答, 0"\r问 1,"答, 1"\r问 2,"答, 2"\r'),
        ("i.jsonl", "\r".join(json.dumps(row) for row in TABLE)),
        ("j.jsonl", ",\n".join(json.dumps(row) for row in TABLE) + ",\n"),
        ("k.jsonl", "".join(json.dumps(row) for row in TABLE)),
        ("l.json", "".join(f"\x1e{json.dumps(row)}\n" for row in TABLE)),
    ],
)
def test_rows_are_found_whatever_parts_them(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode())
    found = [[m["content"] for m in record.messages] for record in load_dataset(str(path))]
    assert found == CELLS
    report = Scan(TINY).run([DatasetEntry(str(path))])
    assert (report.stats.rows, report.exit_code) == (3, 0)


def test_a_comma_in_a_cell_makes_no_other_table(tmp_path: Path) -> None:
    """Rows of one comma each, of which the header has none, stay what the name of the file says."""
    path = tmp_path / "a.csv"
    path.write_text("prompt,response\na;b,c;d\ne;f,g;h\n")
    assert [m["content"] for m in load_dataset(str(path))[0].messages] == ["a;b", "c;d"]


def test_a_list_of_messages_is_a_row(tmp_path: Path) -> None:
    for name, text in (
        ("a.jsonl", (json.dumps(ROW["messages"]) + "\n") * 2),
        ("b.json", json.dumps([ROW["messages"]] * 2)),
    ):
        (tmp_path / name).write_text(text)
        assert [m["content"] for m in load_dataset(str(tmp_path / name))[1].messages] == ["a", "b"]
        assert Scan(TINY).run([DatasetEntry(str(tmp_path / name))]).stats.rows == 2


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"prompt": "q", "response": "a", "response": "b"}', "response"),
        ('{"prompt" : "q","response" : "a","prompt" : "b"}', "prompt"),
        (
            '{"messages": [{"role": "user", "content": "a", "content": "c"}, {"role": "assistant", "content": "b"}]}',
            "content",
        ),
        ('{"prompt": "q \\": 1", "response": "a", "meta": {"x": {"y": 1, "y": 2}}}', "y"),
    ],
)
def test_two_values_of_one_name_are_an_error(text: str, field: str, tmp_path: Path) -> None:
    """The last would win in silence, in training and in the fast road of the doctor."""
    plain = '{"prompt": "q \\": \\\\", "response": "a"}' if "messages" not in text else json.dumps(ROW)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([plain, plain, text, plain]))
    with pytest.raises(DataError) as caught:
        _ = load_dataset(str(path))[2]
    assert (caught.value.field, caught.value.line, caught.value.problem) == (field, 3, "twice_named")
    report = Scan(TINY).run([DatasetEntry(str(path))])
    assert report.findings.counts.pop("twice_named") == 1
    assert report.stats.rows == 3
    path.write_text('{"prompt": "q", "response": "a", "response": "a"}\n')
    assert load_dataset(str(path))[0].messages[1]["content"] == "a"  # nothing is lost


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{'prompt': 'a', 'response': 'b'}", "json.dumps"),
        ('{"prompt": "a", "response": "b"}]', "Extra data"),
        ('["prompt", "response"]', "with their names"),
        ("[" * 100_000, "nest it less"),
        ('{"prompt": "\\ud800", "response": "b"}', "both halves of the surrogate pair"),
    ],
)
def test_a_row_that_is_no_object_says_what_to_do(text: str, why: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + text + "\n")
    with pytest.raises(DataError, match=why):
        _ = load_dataset(str(path))[1]


@pytest.mark.parametrize(
    "whole", ['{"prompt": "a", "response": "b", "score": 1.5}', '{"prompt": ["a", {"b": "\\u00e9"}]}']
)
def test_why_a_row_is_no_json_is_said_in_either_language(whole: str, tmp_path: Path) -> None:
    """Wherever a row is cut, whatever sign is wrong, in a file of lines, a list, a cell."""
    path = tmp_path / "rows.jsonl"
    for text in {
        whole[:k] + sign + whole[k + cut :]
        for k in range(1, len(whole))
        for sign in ("", ",", '"', "\x01")
        for cut in (0, 1)
    }:
        try:
            json.loads(text)
        except ValueError as error:
            why = why_no_json(text, error)
            assert "JSON" in why.chinese or re.search("[\u4e00-\u9fff]", why.chinese)
            assert not re.search("[\u4e00-\u9fff]", why.english)
            assert not why.chinese.startswith("无法解析"), why
    for kind, text in (("list", '[{"prompt": "a"}, {"prompt" "b"}]'), ("cell", '{"messages": "[{\\"role\\": x}]"}')):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError) as caught:
            load_dataset(str(path))[0]
        assert re.search("缺少(冒号|值)", caught.value.fix_zh), kind


def test_a_guess_what_other_text_was_written_in(tmp_path: Path) -> None:
    for text, name, shown in (("你好", "gb18030", "GB18030"), ("café", "latin-1", "WINDOWS-1252")):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(LINE + json.dumps({"prompt": text, "response": "b"}, ensure_ascii=False).encode(name) + b"\n")
        with pytest.raises(DataError, match=f"iconv -f {shown} "):
            _ = load_dataset(str(path))[1]


def test_saved_to_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_list([{"question": f"q{i}", "answer": "a"} for i in range(5)])
    made.save_to_disk(str(tmp_path / "saved"))
    assert [r.messages[0]["content"] for r in load_dataset(str(tmp_path / "saved"))] == [f"q{i}" for i in range(5)]
    assert [r.messages[0]["content"] for r in load_dataset(made)][4] == "q4"
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(str(tmp_path / "both"))
    with pytest.raises(DataError, match=r"expected one split; fix: name one: .*both/"):
        load_dataset(str(tmp_path / "both"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "state.json").write_text('{\n "_data_files": []\n}\n')
    (tmp_path / "broken" / "data-00000-of-00001.arrow").write_bytes(b"ARROW1")
    with pytest.raises(DataError, match="write or download it again"):
        load_dataset(str(tmp_path / "broken"))


@pytest.mark.parametrize("form", ["messages", "sharegpt", "alpaca"])
def test_conversion_keeps_pictures(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (30, 30)).save("in/a.png")
    Path("in/x.jsonl").write_text(json.dumps({"image": "a.png", "question": "q", "answer": "b"}) + "\n")
    for target in (f"in/{form}.jsonl", f"{form}.jsonl", str(tmp_path / f"abs.{form}.jsonl")):
        assert convert_file(load_dataset("in/x.jsonl"), form, target) == 1
        record = load_dataset(target)[0]
        assert load_image(record.images[0]).size == (30, 30)  # type: ignore[arg-type]


def test_check_knows_what_a_stage_learns_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": ROW["messages"][:1]}) + "\n")
    assert main.main(["data", "check", str(path)]) == 1
    assert "expected an answer to learn" in capsys.readouterr().out
    assert main.main(["data", "check", str(path), "--stage", "DPO"]) == 1
    assert "pair (a better and a worse answer)" in capsys.readouterr().out
    path.write_bytes(LINE)
    assert main.main(["data", "check", str(path), "--stage", "SFT"]) == 0
    run = tmp_path / "run.yaml"
    run.write_text(f"stage: DPO\nmodel_name_or_path: tiny-a\ntrain_dataset_path: {path}\n")
    assert main.main(["data", "check", str(run)]) == 1
    assert main.main(["data", "check", str(path), "--stage", "nonsense"]) != 0
    assert "nonsense" in capsys.readouterr().err


def test_a_file_of_which_no_row_can_be_read_has_no_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gbk.jsonl").write_bytes(json.dumps(ROW, ensure_ascii=False).replace("a", "你").encode("gbk"))
    assert main.main(["data", "check", str(tmp_path / "gbk.jsonl")]) == 1
    assert "of no known format, since no row could be read" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["dialog", "contents", "data"])
def test_turns_are_no_rows_whatever_they_are_called(name: str, tmp_path: Path) -> None:
    """A file of one row whose dialogue has a strange name is not a list of rows in an object."""
    row = {name: [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    path = tmp_path / "x.jsonl"
    for text in (json.dumps(row), json.dumps(row, indent=1), json.dumps(row) + "\n" + json.dumps(row)):
        path.write_text(text + "\n")
        with pytest.raises(DataError, match=rf'"columns": {{"messages": "{name}"}}') as caught:
            load_dataset(str(path))
        assert caught.value.problem == "unknown"
    path.write_text(json.dumps({name: [{"prompt": "q", "response": "a"}]}) + "\n")
    assert load_dataset(str(path))[0].messages[1]["content"] == "a", "rows are rows"
    info = {"mine": {"file_name": "x.jsonl", "columns": {"messages": name}}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    path.write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    assert [m["content"] for m in load_dataset("mine", dataset_dir=str(tmp_path))[1].messages] == ["q", "a"]


def test_no_number_is_no_answer(tmp_path: Path) -> None:
    """Of rows in memory it is pandas' empty cell; in a file json.dumps wrote it for one."""
    nan = float("nan")
    rows = [
        {"prompt": "q", "response": "a", "image": nan, "system": nan, "source": nan},
        {"prompt": "q", "response": nan},
    ]
    data = load_dataset(rows)
    assert [m["content"] for m in data[0].messages] == ["q", "a"]
    assert (data[0].images, data[0].meta.unused) == ((), ())
    with pytest.raises(DataError, match="train_dataset:2: "):
        _ = data[1]
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(rows[1]) + "\n" + json.dumps({"question": "q", "answers": [nan]}) + "\n")
    with pytest.raises(DataError, match=r"x\.jsonl:1: response: found nan, expected a string"):
        _ = load_dataset(str(path), format="prompt_response")[0]
    with pytest.raises(DataError, match=r"x\.jsonl:2: answers\[0\]: found nan, expected a string"):
        _ = load_dataset(str(path), format="prompt_response")[1]

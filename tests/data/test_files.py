"""data/file_rows.py: what a file is its first bytes say; rows from folders and from memory;
pictures with labels; conversion that keeps pictures.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ernie_tune.cli import main
from ernie_tune.data.doctor.convert import convert_file
from ernie_tune.data.doctor.scan import Scan
from ernie_tune.data.media.images import load_image
from ernie_tune.data.processor import Processor
from ernie_tune.data.records import DataError
from ernie_tune.data.sources import Entry, load_dataset

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
    report = Scan(TINY).run([Entry(str(path))])
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
        report = Scan(TINY).run([Entry(str(path))])
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
    assert Scan(TINY).run([Entry(str(path))]).findings.counts == {}


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
    report = Scan(TINY).run([Entry(str(tmp_path))])
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
    assert Scan(TINY).run([Entry(str(tmp_path / "x.csv"))]).findings.counts == {"no_question": 1}


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


def test_parquet_by_row_groups(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"question": f"q{i}", "answer": "a", "blob": bytes(50_000)} for i in range(40)]
    # a name that lies
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "big.jsonl", row_group_size=7)
    data = load_dataset(str(tmp_path / "big.jsonl"), format="prompt_response")
    order = [39, 0, 13, 14, 6, 7]
    assert [data[i].messages[0]["content"] for i in order] == [f"q{i}" for i in order]
    source = data._parts[0].rows
    assert source._group[1].num_rows <= 7  # type: ignore[attr-defined]
    report = Scan(TINY).run([Entry(str(tmp_path / "big.jsonl"))])
    assert report.stats.rows == 40
    (tmp_path / "cut.parquet").write_bytes(b"PAR1" + bytes(20))
    with pytest.raises(DataError, match="write or download it again"):
        load_dataset(str(tmp_path / "cut.parquet"))


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

"""What kind of file holds rows, by its first bytes: text of lines, lists or tables, parquet, arrow;
or what else it is, and what turns it into rows.

Refuses to know: what a row means, how rows are found again, whole files (64 KiB of each are looked
at).
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import unicodedata
from collections.abc import Iterator, Mapping

from ernie_tune.config.language import Text, say
from ernie_tune.data.records import DataError, show

BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 16
_SEPARATOR = b"\x1e"  # before each text of a JSON text sequence (RFC 7464)
_WEB = ("a web page", "download the raw file", "下载原始文件")
_TABLE = ("save it as CSV UTF-8 in Excel", "在 Excel 中另存为 CSV UTF-8")
_WRITE = ("write its rows as jsonl", "将其内容写成 jsonl 数据行")
# What a file begins with, where it is no rows: (its start, what it is, what turns it into rows in
# both languages).
_FOREIGN = (
    (b"\x1f\x8b", "gzip", "gunzip -k {path}", ""),
    (b"BZh", "bzip2", "bunzip2 -k {path}", ""),
    (b"\x28\xb5\x2f\xfd", "zstandard", "zstd -d {path}", ""),
    (b"\xfd7zXZ\0", "xz", "unxz -k {path}", ""),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 -d {path}", ""),
    (b"7z\xbc\xaf\x27\x1c", "7-zip", "7z x {path}", ""),
    (b"Rar!", "RAR", "unrar x {path}", ""),
    (b"\xd0\xcf\x11\xe0", "Excel (.xls)", *_TABLE),
    (b"{\\rtf", "RTF", *_WRITE),
    (b"version https://git-lfs", "a Git LFS pointer", "git lfs pull", ""),
    (b"SQLite format 3", "SQLite", "export the table as CSV", "将数据表导出为 CSV"),
    (b"%PDF", "PDF", *_WRITE),
    (b"\x93NUMPY", "NumPy", *_WRITE),
    (b"\x89HDF", "HDF5", *_WRITE),
    (b"FEA1", "Feather", *_WRITE),
    (b"Obj\x01", "Avro", *_WRITE),
    (b"ORC", "ORC", *_WRITE),
    *((b"\x80" + bytes([version]), "pickle", *_WRITE) for version in (2, 3, 4, 5)),
    (b"\x89PNG", "a picture", "name it in the images of a row", "在数据行的 images 中引用它"),
    (b"\xff\xd8\xff", "a picture", "name it in the images of a row", "在数据行的 images 中引用它"),
    (b"GIF8", "a picture", "name it in the images of a row", "在数据行的 images 中引用它"),
    (b"<?xml", "XML", *_WRITE),
    (b"<!DOCTYPE", *_WEB),
    (b"<!doctype", *_WEB),
    (b"<html", *_WEB),
    (b"---", "YAML", *_WRITE),
    (b"- ", "YAML", *_WRITE),
)
_MARKS = (
    (b"\xff\xfe\0\0", "UTF-32LE"),
    (b"\0\0\xfe\xff", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16LE"),
    (b"\xfe\xff", "UTF-16BE"),
)
# Lists and objects of these names belong to one row.
_ONE_ROW = frozenset(
    (
        "messages",
        "conversations",
        "conversation",
        "text_info",
        "text_list",
        "responses",
        "tools",
        "src",
        "tgt",
        "images",
        "videos",
        "history",
    )
)
# Lists of objects under these names are a row's own, too, in an object that is no table.
_ROW_LISTS = frozenset(
    (
        "rejected_messages",
        "image_info",
        "video_info",
        "chosen_response",
        "rejected_response",
        "candidates",
        "verifiers",
        "evidence",
        "scene",
    )
)
# Texts, or turns, that a row has, and what holds rows has not.
_TEXTS = frozenset(
    (
        "prompt",
        "query",
        "question",
        "problem",
        "instruction",
        "input",
        "response",
        "completion",
        "output",
        "answer",
        "chosen",
        "rejected",
        "system",
        "text",
    )
)
_DELIMITERS = (",", "\t", ";", "|")


def file_kind(path: str) -> str:
    """ "lines", "list", "objects", "table", "text", "parquet", "arrow" or "classes", by the first
    bytes of a file. Raises DataError for what holds no rows.

    lines: one JSON object (or list of messages) a line; list: one JSON list; objects: JSON objects
    one after the other, wherever lines end, or one object with a list of rows or with columns in
    it; text: a .txt file that is one text; classes: a folder with one sub-folder a class.
    """
    if os.path.isdir(path):
        return "classes"
    with open(path, "rb") as file:
        raw = file.read(_HEAD_BYTES)
        kind = os.path.splitext(path)[1].lower()
        _refuse_foreign(path, raw)
        if raw[:4] == b"PAR1" or kind == ".parquet":
            return "parquet"
        if raw[:6] == b"ARROW1" or raw[:4] == b"\xff\xff\xff\xff" or kind == ".arrow":
            return "arrow"
        if kind in (".csv", ".tsv"):
            return "table"
        head = raw.removeprefix(BOM).lstrip()
        if head[:1] == _SEPARATOR:
            return "objects"
        if head[:1] not in (b"[", b"{"):
            return _kind_of_text(path, raw)
        file.seek(len(raw) - len(raw.removeprefix(BOM)))
        first = _first_line(file)
        if head[:1] == b"[":
            return "lines" if _is_whole(first) and file.readline().lstrip()[:1] == b"[" else "list"
        return "objects" if _goes_on(first) or (not file.read(1) and _is_table(first)) else "lines"


def _first_line(file: io.BufferedReader) -> bytes:
    line = b""
    while not line.strip() and (more := file.readline()):
        line = more
    return line


def _kind_of_text(path: str, raw: bytes) -> str:
    """The kind of a file that does not begin like JSON: lines if any of them does, a table if it
    looks like one. Raises DataError.
    """
    lines = raw.removeprefix(BOM).splitlines()
    if not raw.strip() or any(line.lstrip()[:1] in (b"{", b"[") for line in lines):
        return "lines"
    if delimiter(path, raw) == "\t":
        return "table"
    if path.lower().endswith(".txt"):
        return "text"
    first = show(_readable(lines))
    named = say(f"text without rows ({first})", f"没有数据行的文本（{first}）")
    remedy = say(
        'write each row as an object on a line of its own: {"prompt": "...", "response": "..."}, or name the file '
        ".txt to learn all of it (stage PT)",
        '将每行写成一个对象：{"prompt": "...", "response": "..."}；若要学习全文（stage PT），请将文件命名为 .txt',
    )
    raise DataError(path, 1, "file", named, "foreign", {"remedy": remedy})


def _readable(lines: list[bytes]) -> str:
    return next((line for line in lines if line.strip()), b"")[:40].decode("utf-8", "replace")


def _refuse_foreign(path: str, raw: bytes) -> None:
    for start, name, remedy, chinese in _FOREIGN:
        if raw.startswith(start):
            text = say(remedy.format(path=path), chinese or remedy.format(path=path))
            raise DataError(path, 0, "file", name, "foreign", {"remedy": text})
    if raw[:4] == b"PK\x03\x04":
        sheet = path.lower().endswith((".xlsx", ".xlsm")) or b"[Content_Types].xml" in raw[:200] or b"xl/" in raw
        name = "Excel (.xlsx)" if sheet else "zip"
        fix = f"unzip {path}" if name == "zip" else say(*_TABLE)
        raise DataError(path, 0, "file", name, "foreign", {"remedy": fix})
    if raw[257:262] == b"ustar":
        raise DataError(path, 0, "file", "tar", "foreign", {"remedy": f"tar xf {path}"})
    if raw and not raw.strip(b"\0"):
        fix = say("write or download it again", "重新生成或下载")
        raise DataError(path, 0, "file", say("zero bytes only", "全是零字节"), "foreign", {"remedy": fix})
    if wide := _wide(raw):
        name, end = os.path.splitext(path)
        marked = raw.startswith(tuple(start for start, _ in _MARKS))  # which iconv reads, and drops, by the plain name
        remedy = f"iconv -f {wide[:-2] if marked else wide} -t UTF-8 {path} > {name}.utf8{end}"
        raise DataError(path, 1, "text", wide, "foreign", {"remedy": remedy})
    if b"\0" in raw and raw[:4] != b"PAR1" and raw.lstrip()[:1] not in b'[{"' and not _is_arrow(path, raw):
        raise DataError(path, 0, "file", say("binary data", "二进制数据"), "foreign", {"remedy": say(*_WRITE)})


def _is_arrow(path: str, raw: bytes) -> bool:
    return raw[:6] == b"ARROW1" or raw[:4] == b"\xff\xff\xff\xff" or path.lower().endswith((".arrow", ".parquet"))


def _wide(raw: bytes) -> str:
    """The encoding of text whose characters take two or four bytes each, by its mark or by what it
    says when read so; "" for other text.
    """
    if b"\0" not in raw and raw[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return ""
    marked = next((name for start, name in _MARKS if raw.startswith(start)), "")
    head = raw[: 1 << 12]
    return marked or next((name for _, name in _MARKS if _is_said(head, name)), "")


def _is_said(raw: bytes, name: str) -> bool:
    """Whether bytes are text in this encoding: signs of lines or JSON, and nothing but what is
    written.
    """
    text = raw.decode(name.lower(), "replace").rstrip("\ufffd")  # the last character may be cut
    unwritten = any(unicodedata.category(sign) in ("Cc", "Cn", "Co", "Cs") and sign not in "\t\r\n" for sign in text)
    return not unwritten and "\ufffd" not in text and any(sign in text for sign in '\n",\t{')


def _is_whole(line: bytes) -> bool:
    """Whether a line is one JSON value."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _is_table(line: bytes) -> bool:
    """Whether a file of one line holds several rows all the same: by columns, or as the only list
    of objects in an object.
    """
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and (columns_of(value) is not None or len(lists_of(value)) == 1)


def lists_of(value: Mapping[str, object]) -> list[str]:
    """The names in an object that hold a list of objects, each of which may be a row; turns of a
    dialogue, whatever their list is called, are none. None where the object is a row itself, since
    it has lists, texts or turns that only rows have.
    """
    if (_ONE_ROW | _ROW_LISTS) & {*value} or any(isinstance(value.get(name), str) for name in _TEXTS):
        return []
    held = [name for name, inner in value.items() if isinstance(inner, list) and inner and isinstance(inner[0], dict)]
    return [name for name in held if name not in _TEXTS and not are_turns(value[name])]


def are_turns(value: object) -> bool:
    """Whether a value is a list of objects that each say who speaks."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(one, dict) and not {"role", "from", "speaker"}.isdisjoint(one) for one in value)


def _goes_on(line: bytes) -> bool:
    """Whether the first line of a file begins an object that later lines end, or ends one and
    begins another.
    """
    text = line.decode("utf-8", "replace").strip()
    try:
        end = json.JSONDecoder().raw_decode(text)[1]
    except json.JSONDecodeError as error:
        return error.pos >= len(text)  # it ends where more was expected
    except RecursionError:
        return False
    rest = text[end:].lstrip(", \r\t")
    return text[end:].strip() == "," or rest[:1] == "{"


def delimiter(path: str, raw: bytes = b"") -> str:
    """What parts the cells of a table: a comma or, in .tsv files, a tab, unless its first rows
    agree in another one; `sep=;` in the first line says it.
    """
    if not raw:
        with open(path, "rb") as file:
            raw = file.read(_HEAD_BYTES)
    text = raw.removeprefix(BOM).decode("latin-1")
    if text[:4].lower() == "sep=" and text[4:5]:
        return text[4]
    if not text.endswith(("\n", "\r")) and len(raw) == _HEAD_BYTES:
        text = text[: text.rfind("\n") + 1] or text
    usual = "\t" if path.lower().endswith(".tsv") else ","
    widths = {sign: _widths(text, sign) for sign in (usual, *_DELIMITERS)}
    if widths[usual][:1] > [1]:
        return usual
    agreed = [sign for sign, found in widths.items() if found[:1] > [1] and len(set(found)) == 1]
    return agreed[0] if agreed else usual


def _widths(text: str, sign: str) -> list[int]:
    """How many cells each of the first rows has."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=sign)
    found: list[int] = []
    try:
        for row in rows:
            found += [len(row)] if row else []
            if len(found) == 20:
                break
    except csv.Error:
        return []
    return found


def columns_of(value: object) -> list[dict[str, object]] | None:
    """The rows of one JSON object that holds a table by columns, as pandas writes it (orient
    columns, index, split, list); None for any other.

    A list for each column, all of one length; an object for each column, keyed by row; an object
    for each row; {"columns", "index", "data"}.
    """
    if not isinstance(value, dict) or len(value) < 2 or _ONE_ROW & {*value}:
        return None
    if {"columns", "data"} <= set(value) <= {"columns", "data", "index"}:
        names, rows = value["columns"], value["data"]
        if (
            isinstance(names, list)
            and isinstance(rows, list)
            and all(isinstance(r, list) and len(r) == len(names) for r in rows)
        ):
            return [dict(zip(map(str, names), row, strict=True)) for row in rows]
        return None
    inner = list(value.values())
    if any(map(are_turns, inner)):  # one row, whose answers are conversations
        return None
    if all(isinstance(one, dict) and one for one in inner):
        return list(inner if all(key.isdecimal() for key in value) else _transposed(value))
    if all(isinstance(one, list) for one in inner) and len({len(one) for one in inner}) == 1 and inner[0]:
        return list(_transposed({name: dict(enumerate(cells)) for name, cells in value.items()}))
    return None


def _transposed(table: dict[str, dict[object, object]]) -> Iterator[dict[str, object]]:
    keys = dict.fromkeys(key for cells in table.values() for key in cells)
    for key in keys:
        yield {name: cells[key] for name, cells in table.items() if cells.get(key) is not None}


def charset(raw: bytes) -> str:
    """A guess what text that is no UTF-8 was written in: GB18030 (Chinese), else WINDOWS-1252
    (western).
    """
    try:
        wide = [sign for sign in raw.decode("gb18030") if ord(sign) > 0x7F]
    except UnicodeDecodeError:
        return "WINDOWS-1252"
    usual = sum(
        "\u4e00" <= sign <= "\u9fff" or "\u3000" <= sign <= "\u303f" or "\uff00" <= sign <= "\uffef" for sign in wide
    )
    return "GB18030" if 2 * usual >= len(wide) else "WINDOWS-1252"


# What Python's parser says, by how it begins.
_PARSER_ZH = {
    "Expecting value": "缺少值",
    "Expecting ',' delimiter": "缺少逗号",
    "Expecting ':' delimiter": "缺少冒号",
    "Expecting property name": "名称须以双引号括起",
    "Illegal trailing comma": "末尾的逗号多余",
    "Invalid control character": "字符串中有未转义的控制字符（如换行，应写作 \\n）",
    "Unterminated string": "字符串缺少结束的引号",
    "Invalid \\escape": "反斜杠后的转义无效",
    "Invalid \\uXXXX escape": "\\u 之后须有四位十六进制数",
    "Extra data": "JSON 结束之后还有内容",
}


def why_no_json(text: str, error: Exception) -> Text:
    """What to do about a text that is no JSON, where it is clear; else what the parser says."""
    head = text.lstrip()
    if head[:2] in ("{'", "['"):
        return say("write it with json.dumps: JSON has double quotes", "用 json.dumps 写出：JSON 使用双引号")
    rest = text[error.pos :].strip() if isinstance(error, json.JSONDecodeError) and "Extra data" in error.msg else ""
    if rest == ",":
        return say("drop the comma at the end of the line", "删去行末的逗号")
    if rest[:1] == "{":
        return say("put each object on a line of its own", "每个对象单独占一行")
    if isinstance(error, RecursionError):
        return say("nest it less", "请减少嵌套")
    if isinstance(error, UnicodeEncodeError):
        return say(
            f"write both halves of the surrogate pair at character {error.start + 1}, or leave it out: {error.reason}",
            f"第 {error.start + 1} 个字符只有半个代理对：请写出两半，或删去",
        )
    chinese = next((words for start, words in _PARSER_ZH.items() if str(error).startswith(start)), "无法解析")
    place = (
        f"（第 {error.lineno} 行第 {error.colno} 列）" if isinstance(error, json.JSONDecodeError) else f"（{error}）"
    )
    return say(str(error), chinese + place)

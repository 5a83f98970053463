"""Ten thousand ways to spoil a file: never a traceback, always file:line; and the fast road never
disagrees with the readers.

ERNIE_TUNE_FUZZ=10000 runs the full number of examples.
"""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie_tune.cli import main
from ernie_tune.data.doctor.checks import check_record
from ernie_tune.data.doctor.rows import Quick, facts_of, parse_block
from ernie_tune.data.file_rows import FileRows
from ernie_tune.data.processor import Processor
from ernie_tune.data.readers.fields import Where
from ernie_tune.data.readers.formats import FORMATS, read
from ernie_tune.data.records import DataError

EXAMPLES = int(os.environ.get("ERNIE_TUNE_FUZZ", "300"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
)
TOKENIZERS = {name: Processor.bundled(name) for name in ("small", "tiny")}
USER, ANSWER = {"role": "user", "content": "你好, who are you?"}, {"role": "assistant", "content": "A helper."}
CALL = {"type": "function", "function": {"name": "look", "arguments": "{}"}}
ROWS = [
    {"messages": [USER, ANSWER]},
    {"id": 7, "messages": [{"role": "system", "content": "Be kind."}, USER, ANSWER, USER, ANSWER]},
    {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}, ANSWER], "tools": [{"name": "look"}]},
    {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "source": "x"},
    {"image": "p.png", "conversations": [{"from": "human", "value": "<image>hi"}, {"from": "gpt", "value": "ho"}]},
    {"prompt": "q", "response": "r"},
    {"instruction": "add", "input": "1 2", "output": "3", "history": [["a", "b"]], "system": "s"},
    {"prompt": "q", "chosen": "good", "rejected": "bad", "score": {"chosen": 5, "rejected": 1}},
    {"prompt": "q", "responses": ["a", "b", "c"], "order": "B>A=C"},
    {"prompt": "q", "responses": [{"text": "a", "score": 2}, {"text": "b", "score": 4}]},
    {"prompt": "q", "completion": "a", "label": True},
    {"messages": [USER], "solution": "4", "verifiers": [{"name": "exact"}]},
    {"src": ["q"], "tgt": ["a"], "label": [1]},
    {"src": ["q"], "tgt": [], "response": [["a"], ["b"]], "sort": [1, 0]},
    {"text_info": [{"text": "q", "tag": "mask"}, {"text": "a", "tag": "no_mask"}], "image_info": [{"matched_text_index": 0, "image_url": "p.png"}]},
    {"messages": [USER], "signal": {"type": "pair", "chosen": "a", "rejected": "b"}},
    {"text": "film", "label": "good"},
    {"task": "sum", "input": "1", "output": "2"},
]  # fmt: skip
WORDS = sorted(
    {key for row in ROWS for key in row} | {"role", "content", "from", "value", "loss", "mode", "weight", "videos"}
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 10),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", " ", "<image>", "<video>", "<|im_start|>", " x", "。", "\ud800", "\0", "user", "assistant", "gpt", "A>B", "http://x/y.png", "a" * 300]),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=3),
    max_leaves=6,
)


def mutate(value, draw, odds=8):
    """A JSON value with some parts replaced, dropped, doubled or renamed."""
    fate = draw(st.integers(0, odds))
    if fate == 0:
        return draw(values)
    if isinstance(value, list):
        items = [mutate(item, draw, odds + 4) for item in value]
        if fate == 1 and items:
            items.pop(draw(st.integers(0, len(items) - 1)))
        return items * 2 if fate == 2 else items
    if isinstance(value, dict):
        out = {}
        for key, item in value.items():
            kept = draw(st.integers(0, odds + 6))
            if kept:
                out[draw(st.sampled_from(WORDS)) if kept == 1 else key] = mutate(item, draw, odds + 4)
        if fate == 1:
            out[draw(st.sampled_from(WORDS))] = draw(values)
        return out
    return value


@st.composite
def rows(draw):
    return mutate(draw(st.sampled_from(ROWS)), draw)


@st.composite
def spoiled_lines(draw):
    """Bytes of a JSON row, perhaps cut, doubled, or with foreign bytes in it."""
    row = draw(rows() | st.sampled_from(ROWS))
    line = json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.integers(0, 2))):
        at, to = sorted((draw(st.integers(0, len(line))), draw(st.integers(0, len(line)))))
        middle = draw(
            st.sampled_from(
                [
                    b"",
                    b"\xff",
                    b"\n",
                    b"\r",
                    b"\xef\xbb\xbf",
                    b",",
                    b"[" * 2000,
                    b"NaN",
                    b'"',
                    b"\\ud83d",
                    line[at:to] * 2,
                ]
            )
        )
        line = line[:at] + middle + line[to:]
    return line


FINDING = re.compile(r"(?P<place>.+?:\d+)(: (error|warning|note): |：(错误|警告|提示)：)")


@pytest.fixture(autouse=True)
def _load_tokenizers_once(monkeypatch):
    monkeypatch.setattr(Processor, "bundled", lambda name="small", *_, **__: TOKENIZERS[name])


def check(capsys, *args):
    """Run `data check`, and hold it to its promises."""
    code = main.main(["data", "check", *map(str, args)])
    out, err = capsys.readouterr()
    assert code in (0, 1)
    assert "Traceback" not in out + err
    return code, out, err


@FUZZ
@given(
    lines=st.lists(spoiled_lines(), min_size=1, max_size=4),
    joint=st.sampled_from([b"\n", b"\r\n", b"\n\n"]),
    options=st.lists(st.sampled_from(["--max-seq-len=16", "--decode=all", "--json"]), unique=True),
)
def test_spoiled_rows(lines, joint, options, capsys) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_bytes(joint.join(lines))
        code, out, err = check(capsys, file, *options)
        assert err == ""
        if "--json" in options:
            found = json.loads(out)
            assert code == (found["errors"] > 0)
            assert all(p["path"] == str(file) and p["found"] and p["fix_zh"] for p in found["problems"])
            return
        lines_out = [line for line in out.splitlines() if FINDING.match(line)]
        assert {FINDING.match(line)["place"].rpartition(":")[0] for line in lines_out} <= {str(file)}
        assert len([line for line in lines_out if ": error: " in line]) >= code
        *said, summary = out.splitlines()
        assert all(
            FINDING.match(line) or line.startswith((str(file), "near", "pictures")) or " found, " in line
            for line in said
        )
        assert " error" in summary


YAML = "model: tiny-a\ntrain_dataset_path: {data}\neval_dataset_path: {data}\ntrain_dataset_type: auto\nmax_seq_len: 64\nimage_max_pixels: 50176\ntemplate: hf\n"


@FUZZ
@given(data=st.data())
def test_spoiled_yaml(data, capsys) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows_file, file = Path(folder) / "rows.jsonl", Path(folder) / "run.yaml"
        rows_file.write_text(json.dumps(ROWS[0]) + "\n", encoding="utf-8")
        text = YAML.format(data=rows_file.as_posix()).encode()
        for _ in range(data.draw(st.integers(0, 3))):
            at, to = sorted((data.draw(st.integers(0, len(text))), data.draw(st.integers(0, len(text)))))
            to = min(to, at + 12)
            text = (
                text[:at]
                + data.draw(
                    st.sampled_from(
                        [
                            b"",
                            b"\xff",
                            b"\n",
                            b": ",
                            b"[",
                            b"{}",
                            b"&a ",
                            b"*a",
                            b"\t",
                            b"null",
                            b"-1",
                            b"# ",
                            b"9" * 30,
                            b"\\x00",
                            b",x",
                        ]
                    )
                )
                + text[to:]
            )
        file.write_bytes(text)
        code, out, err = check(capsys, file)
        if not out:
            assert code == 1
            assert re.match(rf"{re.escape(folder)}/(run\.yaml|rows\.jsonl):\d+: ", err), err


@FUZZ
@given(data=st.data())
def test_the_fast_road_agrees_with_the_readers(data) -> None:
    form = data.draw(st.sampled_from(FORMATS))
    quick, where = Quick(form, FORMATS), Where("rows.jsonl", 1)
    batch = [row for row in data.draw(st.lists(rows() | st.sampled_from(ROWS), max_size=6)) if isinstance(row, dict)]
    for row in json.loads(json.dumps(ROWS)) + json.loads(json.dumps(batch)):
        said = quick.facts([row])[0]
        try:
            record = read(row, form, where, FORMATS)
        except DataError:
            assert said is None
            continue
        if said is None:
            quick.learn(row, facts_of(record))
            continue
        assert said == facts_of(record)
        assert not list(check_record(record))
        assert not record.images + record.videos + record.tools
        assert (record.mode, record.weight) == ("auto", 1.0)


@FUZZ
@given(lines=st.lists(spoiled_lines(), max_size=5))
def test_a_block_at_once_is_each_line_on_its_own(lines) -> None:
    text = b"\n".join(lines)
    found = {i: row for i, row in enumerate(parse_block(text + b"\n", "x.jsonl", 1), 1) if row is not None}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.jsonl"
        file.write_bytes(b'{"a": 1}\n' + text)  # a first line that makes it a file of lines
        index = FileRows(str(file))
        assert [index.line(i) - 1 for i in range(1, len(index))] == list(found)
        for i in range(1, len(index)):
            one = found[index.line(i) - 1]
            try:
                row = index[i]
            except DataError as error:
                row = (error.line - 1, error.field, error.problem)
            if isinstance(one, DataError):
                one = (one.line, one.field, one.problem)
            assert repr(row) == repr(one)  # NaN is not equal to itself


def test_the_fast_road_is_taken() -> None:
    for row, name in (
        (ROWS[0], "messages"),
        (ROWS[1], "messages"),
        (ROWS[3], "sharegpt"),
        (ROWS[5], "prompt_response"),
    ):
        form = next(form for form in FORMATS if form.name == name)
        quick = Quick(form, FORMATS)
        quick.learn(row, facts_of(read(row, form, Where(), FORMATS))) if quick.facts([row]) == [None] else None
        assert quick.facts([row])[0] is not None, name
    row = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    form = next(form for form in FORMATS if form.name == "pairs")
    assert Quick(form, FORMATS).facts([row]) == [("q", "good", "bad", (), "pair", "")]


ODD_TEXTS = ("", "  ", " padded", "padded\n", "(well)", "!!!", "a <image> b", "[THINK]x", "[x] y", "◁think▷", 7, None)


@pytest.mark.parametrize("name", ["messages", "prompt_response", "pairs"])
def test_many_rows_at_once_are_each_row_on_its_own(name: str) -> None:
    """One odd text among plain rows, in each place: the others keep their facts, and it has what it
    has alone.
    """
    made = {
        "messages": lambda a, b: {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]},
        "prompt_response": lambda a, b: {"prompt": a, "response": b},
        "pairs": lambda a, b: {"prompt": a, "chosen": b, "rejected": "worse"},
    }[name]
    form = next(form for form in FORMATS if form.name == name)
    quick = Quick(form, FORMATS)
    plain = [made(f"问 {i}", f"“{i}” is right") for i in range(5)]
    quick.learn(plain[0], facts_of(read(plain[0], form, Where(), FORMATS)))
    assert None not in quick.facts(plain)
    assert quick._facts_at_once(plain) == quick.facts(plain)
    odd = [made(text, "yes") for text in ODD_TEXTS] + [made("why", text) for text in ODD_TEXTS]
    odd += [{**plain[0], "source": "x"}, plain[0] | {"images": ["a.png"]}, made("why", "worse"), None]
    if name == "messages":
        odd += [{"messages": plain[0]["messages"] * 2}, {"messages": plain[0]["messages"][::-1]}, {"messages": "ab"}]
        odd += [{"messages": [{**plain[0]["messages"][0], "name": "x"}, plain[0]["messages"][1]]}, {"messages": {}}]
    seen = set()
    for row in odd:
        for rows_ in ([*plain, row], [row, *plain], [row] * 3):
            assert quick.facts(rows_) == [quick.facts([one])[0] for one in rows_], row
        seen.add(quick._facts_at_once([*plain, row]) is None)
    assert seen == {True, False}


@pytest.mark.parametrize("size", [1, 1 << 17])
def test_blocks_keep_lines_and_offsets(tmp_path, monkeypatch, size) -> None:
    from ernie_tune.data.doctor import rows as doctor_rows

    monkeypatch.setattr(doctor_rows, "BLOCK_BYTES", size)
    lines = [json.dumps({"prompt": f"问{i}", "response": "x" * i}, ensure_ascii=False) for i in range(50)]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines[:20], "", *lines[20:]]).encode())
    source = doctor_rows.JsonLines(str(file))
    seen = [
        place
        for batch in source.batches()
        for place in zip(batch.lines_n.tolist(), batch.offsets_n.tolist(), batch.rows, strict=True)
        if place[2]
    ]
    assert [line for line, _, _ in seen] == [*range(1, 21), *range(22, 52)]
    assert all(source.reread(offset, line) == row for line, offset, row in seen)
    assert (source.has_bom, source.has_crlf) == (True, True)

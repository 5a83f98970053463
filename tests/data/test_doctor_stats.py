"""Numbers of a data set against counts by hand, and the reports that show them."""

from __future__ import annotations

import html.parser
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ernie_tune.data.doctor.report import as_json, as_text, charts, stats_text
from ernie_tune.data.doctor.scan import Report, Scan
from ernie_tune.data.doctor.stats import Histogram
from ernie_tune.data.processor import Processor
from ernie_tune.data.sources import DatasetEntry
from ernie_tune.report.check_page import check_page

TINY = Processor.bundled("tiny")


def scan(path: Path, rows: list[dict[str, Any]], **options: Any) -> Report:
    file = path / "a.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return Scan(TINY, **options).run([DatasetEntry(str(file))])


def counts(report: Report) -> dict[str, int]:
    return {
        code: count
        for code, count in report.findings.counts.items()
        if code in ("length_bias", "imbalance", "constant")
    }


def test_histogram() -> None:
    lengths = Histogram()
    lengths.add(np.array([1, 2, 3, 4, 7, 8, 100]))
    lengths.add(np.zeros(0, np.int64))
    assert lengths.bars() == [
        ("1-2", 1),
        ("2-4", 2),
        ("4-8", 2),
        ("8-16", 1),
        ("16-32", 0),
        ("32-64", 0),
        ("64-128", 1),
    ]
    assert lengths.bars(0.5)[-1] == ("32-64", 1)
    assert (lengths.mean, lengths.highest) == (125 / 7, 100)
    assert 4 <= lengths.quantile(0.5) <= 4 * 2**0.5
    assert lengths.quantile(1.0) == 100
    assert Histogram().bars() == []


def test_letters_and_lengths(tmp_path: Path) -> None:
    rows = [{"prompt": "你好吗", "response": "abcdef，Привет いぬ é"}, {"prompt": "q" * 4, "response": "12"}]
    stats = scan(tmp_path, rows).stats
    assert dict(stats.letters) == {"zh": 3, "en": 10, "other": 6 + 2 + 1}
    assert stats.languages() == {"zh": 3 / 22, "en": 10 / 22, "other": 9 / 22}
    assert stats.text.total == sum(len((row["prompt"] + row["response"]).encode()) for row in rows)
    text = "\n".join([rows[0]["prompt"], rows[0]["response"], "", rows[1]["prompt"], rows[1]["response"], "", ""])
    assert stats.tokens_per_byte == len(TINY.tokenizer.encode(text)) / len(text.encode())
    assert (stats.answers.total, stats.answers.highest) == (18 + 2, 18)
    assert (dict(stats.signals), dict(stats.media)) == ({"sft": 2}, {0: 2})


def test_every_eighth_batch_counts_eightfold_in_large_files(tmp_path: Path) -> None:
    rows = [{"prompt": "是" * 1000, "response": f"{'a' * 1000}{i}"} for i in range(2000)]
    stats = scan(tmp_path, rows).stats
    assert stats.letters["zh"] / stats.letters["en"] == pytest.approx(1, rel=1e-3)
    assert stats.letters["zh"] == pytest.approx(2_000_000, rel=0.25)


@pytest.mark.parametrize(
    ("chosen", "rejected", "warned"), [(14, 10, True), (13, 10, False), (10, 14, False)]
)  # warns above 1.3
def test_length_bias(chosen: int, rejected: int, warned: bool, tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "c" * chosen, "rejected": "r" * rejected} for i in range(10)]
    assert counts(scan(tmp_path, rows)) == ({"length_bias": 1} if warned else {})
    assert counts(scan(tmp_path, rows[:9])) == {}  # too few to say


@pytest.mark.parametrize(
    ("answers", "found"),
    [
        ("a" * 18 + "bc", {"constant": 1}),
        ("a" * 17 + "bcd", {}),
        ("a" * 56 + "b" * 5, {"constant": 1}),
        ("a" * 40 + "c" * 18 + "b" * 3, {"imbalance": 1}),
        ("a" * 30 + "c" * 28 + "b" * 3, {}),
    ],
)
def test_classes(answers: str, found: dict[str, int], tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": answer} for i, answer in enumerate(answers)]
    assert counts(scan(tmp_path, rows)) == found


def test_labels(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i >= 4} for i in range(60)]
    assert counts(scan(tmp_path, rows)) == {"constant": 1}
    assert counts(scan(tmp_path, [{**row, "label": i >= 10} for i, row in enumerate(rows)])) == {}
    for labels, said in ((True, "4 good answers and no other"), (False, "4 bad answers and no other")):
        report = scan(tmp_path, [{**row, "label": labels} for row in rows[:4]])
        assert dict(report.findings.counts) == {"one_kind": 1}
        assert said in report.findings.kept[0].english
    stats = scan(tmp_path, rows).stats
    assert stats.signals == {"label:good": 56, "label:bad": 4}


def test_a_constant_answer_among_many_others(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": f"a{i}" if i % 11 == 0 else "I cannot say"} for i in range(15000)]
    assert counts(scan(tmp_path, rows)) == {"constant": 1}
    assert counts(scan(tmp_path, [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(3000)])) == {}


@pytest.fixture
def pictures(tmp_path: Path) -> Report:
    for name, size in (("small", (56, 56)), ("large", (1120, 1120))):
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    rows = [
        {"prompt": f"<image>what is {i}?", "response": f"a{i}", "image": "small.png", "domain": "x<y"} for i in range(9)
    ]
    rows += [{"prompt": "<image><image>b", "response": "", "images": ["large.png", "small.png"], "domain": "z"}]
    return scan(tmp_path, rows)


def test_pixel_budget(pictures: Report) -> None:
    # 56x56: 2x2 tokens and 2 markers; 1120x1120: 40x40 and 2; 224*224 pixels: 8x8 and 2; 10 small
    # ones
    assert sorted(pictures.stats.image_tokens(TINY.images).tolist()) == [6] * 10 + [1602]
    budgets = pictures.stats.budgets()
    assert budgets[0] == (224 * 224, pytest.approx((60 + 66) / 11), pytest.approx(1 / 11))
    assert budgets[-1] == (1344 * 1344, pytest.approx((60 + 1602) / 11), 0.0)
    assert pictures.stats.advice() == 1344 * 1344
    assert dict(pictures.stats.media) == {1: 9, 2: 1}


def test_pictures_that_fit_no_small_budget(tmp_path: Path) -> None:
    Image.new("RGB", (5600, 28)).save(tmp_path / "strip.png")
    stats = scan(tmp_path, [{"prompt": "<image>q", "response": "a", "image": "strip.png"}]).stats
    assert [tokens for _, tokens, _ in stats.budgets()] == [224 * 224 // 784, 202]


def test_rows_without_answers_are_no_class(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "evidence": ["x"]} for i in range(30)]
    assert counts(scan(tmp_path, rows)) == {}


def test_too_many_domains_are_summed(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": f"a{i}", "domain": f"d{i}" if i % 2 else "main"} for i in range(3000)]
    domains = scan(tmp_path, rows).stats.domains
    assert domains.most_common(1) == [("main", 1500)]
    assert domains.total() == 3000
    assert len(domains) <= 1001 + 500


def test_reports_agree(pictures: Report) -> None:
    lines = list(as_text(pictures))
    assert lines[0].endswith("fix: write it, or drop the row (--fix drops it)")
    assert lines[-1].startswith("10 rows in ")
    found = json.loads(as_json(pictures))
    assert (found["exit_code"], found["errors"], found["counts"]) == (1, 1, {"empty_answer": 1})
    assert found["problems"][0]["line"] == 10
    assert found["stats"]["media_per_row"] == {"1": 9, "2": 1}
    assert found["stats"]["image_max_pixels_advised"] == 1344 * 1344
    assert [chart.bars for chart in charts(pictures.stats)][-1] == [("x<y", 9), ("z", 1)]
    said = "\n".join(stats_text(pictures.stats))
    assert "rows a domain:\n  x<y  " in said
    assert "image_max_pixels: 1806336" in said


class Page(html.parser.HTMLParser):
    """Collects open tags and text, and fails on a tag that is closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)
        sources = [value for name, value in attrs if name in ("src", "href")]
        assert all(value.startswith("data:image/") for value in sources), "the page needs no network"
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.seen.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_page(pictures: Report) -> None:
    page = Page()
    page.feed(check_page(pictures))
    assert page.open == []
    assert [page.text.count(chart.title.chinese) for chart in charts(pictures.stats)] == [1] * 5
    assert page.seen.count("img") == 11 + 2, "each of the ten rows, and again that in which something was found"
    assert "x<y" in page.text
    assert "非空的回答" in page.text


def test_what_is_not_shown_is_said(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": ""} for i in range(5)]
    report = scan(tmp_path, rows, limit=2)
    assert "empty_answer: 5 found, 2 shown; --limit 0 shows all" in list(as_text(report))
    shown = check_page(report)
    assert "<code>empty_answer</code> · 5" in shown
    assert "… 3 more" in shown
    rows = [{"prompt": f"q{i}", "response": f"a{i}", "domain": f"d{i}"} for i in range(30)]
    assert "  … 6 more" in list(stats_text(scan(tmp_path, rows).stats))

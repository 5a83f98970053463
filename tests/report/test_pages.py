"""The before/after page and the model card as documents: everything there, nothing unescaped, no
network.
"""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ernie_tune.cli.verbs import find_verb
from ernie_tune.config.loader import split_overrides
from ernie_tune.report.pages import (
    ModelCard,
    ReportRow,
    describe_file,
    environment,
    model_card,
    usage,
    write_before_after,
    write_model_card,
)
from ernie_tune.rewards.scores import confusion

EVIL = "<script>alert('x')</script> & \"q\""


class Page(HTMLParser):
    """What a browser would see: tags, image sources, visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.articles: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.sources += [values["src"] or ""] if tag == "img" else []
        self.articles += [values["class"] or ""] if tag == "article" else []

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "red.png"
    path.parent.mkdir()
    Image.new("RGB", (4, 4), "red").save(path)
    return path


def row(before: float | None, after: float | None, **fields: object) -> ReportRow:
    return ReportRow("q", "r", "b", "a", before, after, **fields)  # type: ignore[arg-type]


def test_changes() -> None:
    pairs = [(0, 1), (1, 0), (1, 1), (0, 0), (0.3, 0.6), (0.5, 0.5), (None, 1), (0, None)]
    assert [row(b, a).change for b, a in pairs] == ["fixed", "broken", "right", "wrong", "fixed", *["other"] * 3]


def test_page(tmp_path: Path, picture: Path) -> None:
    rows = [
        ReportRow(f"几个圆? {EVIL}", "3", "7", "3", 0, 1, (picture, picture.read_bytes()), "eval.jsonl:4"),
        ReportRow("colour?", EVIL, "", EVIL, 1, 0, (str(picture),)),
    ]
    write_before_after(
        tmp_path / "out" / "before_after.html",
        rows,
        {"eval_loss": 4.0, "anls": 0.25},
        {"eval_loss": 0.5, "anls": 0.75},
        title=EVIL,
    )
    text = (tmp_path / "out" / "before_after.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("script") == 1  # ours
    assert page.text.count(EVIL) == 5  # the title twice
    assert page.articles == ["broken", "fixed"]  # what got worse comes first
    data = base64.b64encode(picture.read_bytes()).decode()
    assert page.sources == [f"data:image/png;base64,{data}"] * 3
    assert "-3.5000" in page.text
    assert "+0.5000" in page.text
    assert page.text.count("✓") == page.text.count("✗") == 2
    assert "(empty)" in page.text
    assert "训练前后对比" in page.text
    assert "eval.jsonl:4" in page.text
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", text)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["before_after.html"]


def test_a_falling_loss_is_good_news(tmp_path: Path) -> None:
    write_before_after(
        tmp_path / "p.html",
        [],
        {"eval_loss": 1.0, "token_f1": 1.0, "new": 0.0, "eval_loss/sft": 1.00002},
        {"eval_loss": 0.5, "token_f1": 0.5, "eval_loss/sft": 1.0},
    )
    text = (tmp_path / "p.html").read_text()
    assert "<b class='ok'>-0.5000" in text
    assert "<b class='no'>-0.5000" in text
    assert "<td>0.0000</td><td>–</td>" in text
    assert "<b class=''>0.0000</b>" in text, "neither +0.0000 nor -0.0000"


def test_large_pictures_are_copied_beside(tmp_path: Path) -> None:
    data = b"\xff\xd8\xff" + bytes(300_000)
    write_before_after(tmp_path / "page.html", [row(0, 1, images=(data,))], {}, {})
    name = f"page_files/{hashlib.sha256(data).hexdigest()[:16]}.jpeg"
    assert Page((tmp_path / "page.html").read_text()).sources == [name]
    assert (tmp_path / name).read_bytes() == data


def test_what_cannot_be_shown_is_named(tmp_path: Path) -> None:
    images = ("gone/a.png", "https://example.com/b.png", b"not a picture", "data:image/png;base64,AAAA")
    write_before_after(tmp_path / "page.html", [row(None, None, images=images)], {}, {})
    page = Page((tmp_path / "page.html").read_text())
    assert page.sources == ["data:image/png;base64,AAAA"]
    assert "gone/a.png" in page.text
    assert "https://example.com/b.png" in page.text
    assert page.text.count("cannot be shown") == 3


def test_confusion_table(tmp_path: Path) -> None:
    tables = {"before": confusion(["x", "<y>"], ["x", "<y>"]), "after": confusion(["x", "q"], ["x", "<y>"])}
    write_before_after(tmp_path / "page.html", [], {}, {}, confusions=tables)
    page = Page((tmp_path / "page.html").read_text())
    assert page.tags.count("details") == 2
    assert "Before训练前: 100.0%" in page.text
    assert "After训练后: 50.0%" in page.text
    assert page.text.count("<y>") == 6
    assert "rgba(22,163,74,0.60)" in (tmp_path / "page.html").read_text()


def card(**fields: object) -> ModelCard:
    options: dict[str, object] = {
        "name": "digits",
        "base_model": 'baidu/ERNIE-4.5-VL-28B-A3B-PT"\nlicense: mit',
        "method": "SFT, LoRA rank 8",
        "data": [],
        "arguments": {"learning_rate": 3e-4, "train_dataset_path": ("a|b.jsonl", "c.jsonl")},
    }
    return ModelCard(**{**options, **fields})  # type: ignore[arg-type]


def test_model_card(tmp_path: Path) -> None:
    rows = tmp_path / "train.jsonl"
    rows.write_bytes(b"abc")
    write_model_card(
        tmp_path / "README.md",
        card(
            data=[describe_file(rows, 120)],
            before={"anls": 0.1, "loss": 4.0},
            after={"anls": 0.9},
            commands=usage("out", True),
        ),
    )
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---\n")[1])
    assert front == {
        "base_model": 'baidu/ERNIE-4.5-VL-28B-A3B-PT" license: mit',
        "library_name": "ernie_tune",
        "license": "apache-2.0",
        "pipeline_tag": "image-text-to-text",
    }
    # The digest of "abc" in FIPS 180-2.
    assert f"| {rows} | 120 | ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad |" in text
    assert "| anls | 0.1000 | 0.9000 |" in text
    assert "| loss | 4.0000 | – |" in text
    assert r"| train_dataset_path | a\|b.jsonl, c.jsonl |" in text
    assert "| numpy | " in text
    for word in ("ernie-tune chat out", "--lora_path out", "## Licence"):
        assert word in text


def test_model_card_of_little() -> None:
    text = model_card(card(name="a <b> `c`", environment={}))
    assert "# a &lt;b> 'c'" in text
    assert re.findall(r"^## .*", text, re.MULTILINE) == ["## Arguments", "## Licence"]


def test_usage_names_commands_that_exist() -> None:
    for adapter, setting in ((True, "lora_path"), (False, "model_name_or_path")):
        commands = [shlex.split(command) for command in usage("out", adapter).values()]
        assert all(program == "ernie-tune" for program, *_ in commands)
        assert [find_verb(verb).name for _, verb, *_ in commands] == ["chat", "eval", "train"]
        assert [split_overrides(words)[0] for _, _, *words in commands] == [
            ["out"],
            *[["out/ernie_tune_args.yaml"]] * 2,
        ]
        assert [e.name for _, _, *words in commands for e in split_overrides(words)[1]] == [setting, "output_dir"]


def test_environment_imports_nothing() -> None:
    found = environment()
    assert {"python", "system", "numpy"} <= set(found)
    assert "paddlepaddle-gpu" not in found


def test_the_name_of_a_folder_cannot_become_markdown_or_a_command(tmp_path: Path) -> None:
    import shlex
    import subprocess

    from ernie_tune.report.pages import usage

    name = "![x](http://evil) # *a* [b](c) $(touch HIT) `id`; 'q'\n```\n# owned"
    card = ModelCard(name, "base", "SFT", [], {}, commands=usage(name, adapter=False), environment={})
    text = model_card(card)
    assert text.count("```") == 6, "three blocks, each opened and closed"
    assert "\n# owned" not in text
    assert "# \\!\\[x\\](http://evil) \\# \\*a\\*" in text
    for how in usage(name, adapter=False).values():
        words = subprocess.run(
            ["bash", "-c", f'ernie-tune() {{ printf "%s\\0" "$@"; }}; {how}'],
            cwd=tmp_path,
            capture_output=True,
            check=True,
        )
        assert name in words.stdout.decode().replace("-again", "").replace("/ernie_tune_args.yaml", "").split("\0")
    assert list(tmp_path.iterdir()) == []
    assert usage("output/a", adapter=True)["Talk to it"] == "ernie-tune chat output/a"
    assert shlex.split(usage("my run", adapter=True)["Talk to it"]) == ["ernie-tune", "chat", "my run"]

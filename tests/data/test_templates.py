"""Chat templates of folders: kept where their readers understand them, mended where not, ours where
there is none.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ernie_tune.data.chat import ChatTemplate
from ernie_tune.data.processor import Processor
from ernie_tune.data.templates import RELEASED, TRANSFORMERS
from ernie_tune.data.tokenizer import Tokenizer

TURNS = "{{ messages }}<|IMAGE_START|>%s<|IMAGE_END|><|VIDEO_START|>%s<|VIDEO_END|>"
RIGHT, HUGGING_FACE = TURNS % RELEASED, TURNS % TRANSFORMERS
PLAIN = "{{ messages[0].content }}"


def folder(path: Path, config: object = None, jinja: str = "", legacy: str = "", vision: bool = True) -> Path:
    """A tokenizer with templates in the places asked for, and a preprocessor where the model
    sees.
    """
    Tokenizer.bundled("tiny").save(path, **({"chat_template": config} if config else {}))
    if jinja:
        (path / "chat_template.jinja").write_text(jinja)
    if legacy:
        (path / "chat_template.json").write_text(json.dumps({"chat_template": legacy}))
    if vision:
        (path / "preprocessor_config.json").write_text("{}")
    return path


def template(path: Path) -> object:
    return json.loads((path / "tokenizer_config.json").read_text())["chat_template"]


def test_what_a_run_writes_is_what_fastdeploy_searches_for(tmp_path: Path) -> None:
    """A run starts from a shipped tokenizer, which has no template."""
    assert Processor.bundled("tiny").save_pretrained(tmp_path) == []
    ours = template(tmp_path)
    assert ours == ChatTemplate().to_jinja("<|image@placeholder|>", "<|video@placeholder|>")
    assert "PLACEHOLDER" not in str(ours)
    Processor.from_pretrained(tmp_path).save_pretrained(tmp_path / "hf", TRANSFORMERS)
    assert template(tmp_path / "hf") == ChatTemplate().to_jinja("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>")


@pytest.mark.parametrize("vision", [True, False])
def test_a_right_template_is_kept_byte_for_byte(tmp_path: Path, vision: bool) -> None:
    """In every place; and a text model's template without placeholders."""
    held = RIGHT if vision else PLAIN
    path = folder(tmp_path / "base", held, jinja=held + "\r\n", legacy=held, vision=vision)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    before.pop("preprocessor_config.json", None)
    assert Processor.from_pretrained(path).save_pretrained(tmp_path / "out") == []
    assert {name: (tmp_path / "out" / name).read_bytes() for name in before} == before


def test_the_other_readers_placeholders_are_mended(tmp_path: Path) -> None:
    """Old folders of ours, and transformers'; each place for itself, each said."""
    path = folder(tmp_path / "base", [{"name": "default", "template": HUGGING_FACE}], jinja=RIGHT, legacy=HUGGING_FACE)
    changes = Processor.from_pretrained(path).save_pretrained(tmp_path / "out")
    assert template(tmp_path / "out") == [{"name": "default", "template": RIGHT}]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == RIGHT
    assert json.loads((tmp_path / "out" / "chat_template.json").read_text()) == {"chat_template": RIGHT}
    assert [change.split(" of ")[0] for change in changes] == [
        "chat template in tokenizer_config.json",
        "chat template in chat_template.json",
    ]
    assert "<|IMAGE_PLACEHOLDER|> became <|image@placeholder|> and <|VIDEO_PLACEHOLDER|> became" in changes[0]
    changes = Processor.from_pretrained(path).save_pretrained(tmp_path / "hf", TRANSFORMERS)
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == HUGGING_FACE
    assert len(changes) == 1


@pytest.mark.parametrize("held", [PLAIN, TURNS % ("<|img|>", RELEASED.video), TURNS % (RELEASED.image, "<|v|>")])
def test_a_template_that_loses_a_medium_gives_way_to_ours(tmp_path: Path, held: str) -> None:
    path = folder(tmp_path / "base", held)
    changes = Processor.from_pretrained(path).save_pretrained(tmp_path / "out")
    assert template(tmp_path / "out") == ChatTemplate().to_jinja(*RELEASED)
    assert "would be lost; replaced by ours" in changes[0]
    again = Processor.from_pretrained(tmp_path / "out")
    assert again.save_pretrained(tmp_path / "out") == []


def test_another_variant_takes_its_own_template_along(tmp_path: Path) -> None:
    """What the model was trained with is what it must be asked with."""
    path = folder(tmp_path / "base", RIGHT)
    changes = Processor.from_pretrained(path, "ernie_vl").save_pretrained(tmp_path / "out")
    assert template(tmp_path / "out") == ChatTemplate("ernie_vl").to_jinja(*RELEASED)
    assert "variant 'ernie_vl'" in changes[0]
    again = Processor.from_pretrained(tmp_path / "out")
    assert again.template.variant == "ernie_vl"
    assert again.save_pretrained(tmp_path / "again") == []
    assert template(tmp_path / "again") == template(tmp_path / "out")
    Processor.from_pretrained(tmp_path / "out", "hf").save_pretrained(tmp_path / "back")
    assert Processor.from_pretrained(tmp_path / "back").template.variant == "hf"


def test_a_text_model_keeps_its_template_though_a_run_wrote_pixel_settings(tmp_path: Path) -> None:
    path = folder(tmp_path / "base", PLAIN, vision=False)
    for target in ("run", "again"):
        (path / "config.json").write_text('{"model_type": "ernie4_5"}')
        assert Processor.from_pretrained(path).save_pretrained(tmp_path / target) == []
        assert template(tmp_path / target) == PLAIN
        path = tmp_path / target

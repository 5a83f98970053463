"""The model that comes with the package: found by its name alone, what it sees on 60 pictures it
never saw, and that it looks.

Bounds lie below what was measured when the weights were made (examples/base), so that rounding of
another machine passes and weights that no longer fit the code do not. The pictures are drawn in
layouts, fonts and pairs of colour and shape that training never had.
"""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ernie_tune.checkpoint.auto import AutoConfig, AutoModel
from ernie_tune.checkpoint.hub import resolve
from ernie_tune.data.processor import Processor
from ernie_tune.data.tokenizer import Tokenizer
from ernie_tune.generate.engine import Engine, Request
from ernie_tune.models.presets import is_fresh, preset, shipped_folder, shipped_name

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
GUARD = EXAMPLES / "chain" / "guard"
SCORE = EXAMPLES / "base" / "score.py"
NANO = "ernie-4.5-vl-nano"
# Means over ten pictures each.
SEEN = {"color": 0.8, "shape": 0.8, "place": 0.8, "digit": 0.6, "count": 0.4, "yesno": 0.8}
BLIND = {"color": 0.4, "shape": 0.3, "place": 0.5, "digit": 0.4, "count": 0.4, "yesno": 0.7}


def read_pictures() -> list[tuple[str, str, str, Image.Image]]:
    """(skill, question, answer, picture) of every row."""
    found = []
    for line in (GUARD / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question, answer = (message["content"] for message in row["messages"])
        with Image.open(GUARD / row["images"][0]) as image:
            image.load()
        found.append((row["task"], question, answer, image))
    return found


@pytest.fixture(scope="module")
def score() -> Callable[[str, str, str], float]:
    spec = importlib.util.spec_from_file_location("base_score", SCORE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.score  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(AutoModel.from_pretrained("nano"), Processor.from_pretrained("nano"))


def means(engine: Engine, score: Callable[[str, str, str], float], grey: bool) -> dict[str, float]:
    rows = read_pictures()
    requests = []
    for _, question, _, image in rows:
        shown = Image.new("L", image.size, 128) if grey else image
        requests.append(Request([{"role": "user", "content": question}], images=[shown]))
    answers = engine.answer(requests, engine.params(max_new_tokens=48, temperature=0.0))
    found: dict[str, list[float]] = defaultdict(list)
    for (skill, _, reference, _), samples in zip(rows, answers, strict=True):
        found[skill].append(score(skill, reference, samples[0].content.strip()))
    return {skill: float(np.mean(values)) for skill, values in found.items()}


def test_it_sees(engine: Engine, score: Callable[[str, str, str], float]) -> None:
    seen, blind = means(engine, score, grey=False), means(engine, score, grey=True)
    for skill, least in SEEN.items():
        assert seen[skill] >= least, (skill, seen)
    for skill, most in BLIND.items():
        assert blind[skill] <= most, (skill, blind)
    assert sum(seen.values()) > 2 * sum(blind.values())


def test_it_is_found_by_name_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    folder = resolve("nano")
    assert folder == resolve(NANO) == resolve("NANO") == shipped_folder("nano")
    assert AutoConfig.from_pretrained("nano").replace(dtype="float32") == preset("nano")
    assert Tokenizer.from_pretrained("nano").vocab_size == preset("nano").vocab_size
    assert Tokenizer.from_pretrained("nano").token_ids() == preset("nano").tokens
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 10_000_000
    assert not is_fresh("nano")
    assert not is_fresh(NANO)
    assert is_fresh("tiny-a")
    assert shipped_name("baidu/nano") is None
    (tmp_path / "nano").mkdir()
    assert resolve("nano") == Path("nano"), "a folder of the user's own comes first"
    assert shipped_folder("nano") is None


def test_its_tokens_are_those_that_servers_can_say(engine: Engine) -> None:
    """Special tokens lie inside tokenizer.model, those of text below the image placeholder's."""
    tokens: Any = engine.processor.tokenizer
    image = tokens.token_id("<|IMAGE_PLACEHOLDER|>")
    for said in ("</s>", "<think>", "</think>", "<|end_of_sentence|>"):
        assert tokens.token_id(said) < image
    assert tokens.decode(tokens.encode("☃ 12\n")) == "☃ 12\n"

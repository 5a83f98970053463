"""What settings say is whole in either language: the place, the names, the values and the remedy
stand in both.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ernie_tune.config import checks
from ernie_tune.config.loader import load_text

FOLDER = Path(checks.__file__).parent
CHINESE = re.compile("[\u4e00-\u9fff]")
HALF = re.compile(r'" / [\u4e00-\u9fff]|[a-z)] / [^"]*[\u4e00-\u9fff]')

# text of a file, line that is wrong, what both languages must name
TEXTS = [
    ("seed: 1\nlerning_rate: 3", 2, ("lerning_rate", "learning_rate")),
    ("lr: fast", 1, ("learning_rate", "fast")),
    ("lora_rank: 0", 1, ("lora_rank", "0", "1")),
    ("lr: 1e-4\nlearning_rate: 2e-4", 2, ("learning_rate", "0.0002", "lr", "0.0001", "run.yaml:1")),
    ("max_steps: 0", 1, ("max_steps", "-1", "num_train_epochs")),
    ("stage: KTO\nsimpo_gamma: 1", 2, ("simpo_gamma", "1.0", "KTO", "DPO, UPO")),
    ("text_dataset_path: a", 1, ("text_dataset_path", "train_dataset_path")),
    ("stage: KTO\nbatch_size: 1", 2, ("per_device_train_batch_size", "apo_zero_unpaired")),
    ("fp16: true", 1, ("fp16",)),
]


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("text", "line", "names"), TEXTS)
def test_mistakes_are_whole_in_both_languages(
    text: str, line: int, names: tuple[str, ...], language: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ERNIE_TUNE_LANG", language)
    with pytest.raises(ValueError, match=rf"^run\.yaml:{line}") as caught:
        load_text(text + "\nmodel: tiny-a\ndataset: a", "run.yaml", for_training=True)
    message = str(caught.value)
    assert all(name in message for name in names)
    assert bool(CHINESE.search(message)) == (language == "zh")


@pytest.mark.parametrize("language", ["en", "zh"])
def test_notes_are_whole_in_both_languages(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ERNIE_TUNE_LANG", language)
    notes = load_text("fuse_linear: true\neval_steps: 5\nbeta: 0.2\nfine_tuning: LoRA", "run.yaml").notes
    for note, line, names in zip(
        notes, (1, 3, 2), (("fuse_linear",), ("beta", "SFT"), ("eval_steps", "eval_strategy: steps")), strict=True
    ):
        assert note.startswith(f"run.yaml:{line}")
        assert all(name in note for name in names)
        assert bool(CHINESE.search(note)) == (language == "zh")


def test_no_message_is_half_translated() -> None:
    for file in ("checks.py", "checks_methods.py", "loader.py", "convert.py"):
        lines = (FOLDER / file).read_text(encoding="utf-8").splitlines()
        assert not [line for line in lines if HALF.search(line)], file

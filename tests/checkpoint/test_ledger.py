"""checkpoint/ledger.py: what counts as another run, and what files are the same."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import pytest

from ernie_tune.checkpoint.ledger import WHOLE_BYTES, Content, Ledger, fingerprint, refusal, sample_of, sha256_of
from ernie_tune.config import resuming
from ernie_tune.config.arguments import SETTINGS, RunConfig
from ernie_tune.config.loader import dump_config, load_text


def test_every_name_of_the_table_is_a_setting_and_what_is_not_named_shapes() -> None:
    named = (*resuming.START, *resuming.CONTENT, *resuming._COURSE)
    assert set(named) <= set(SETTINGS)
    assert not resuming.START & (resuming._COURSE | resuming.CONTENT)
    for name in (
        "save_steps",
        "logging_steps",
        "recompute",
        "eval_steps",
        "tensor_model_parallel_size",
        "prefix_sharing",
    ):
        assert resuming.on_resuming(name) == resuming.FREE, name
    for name in (
        "seed",
        "beta",
        "loss_type",
        "max_seq_len",
        "lora_rank",
        "stage",
        "ref_mode",
        "num_generations",
        "packing",
    ):
        assert resuming.on_resuming(name) == resuming.FIXED, name


def test_a_difference_in_each_setting_is_seen() -> None:
    """Of every setting that is read, whatever its kind: none can be changed unseen."""
    config = load_text(
        "model_name_or_path: a\ntrain_dataset_path: b\nstage: UPO\nfine_tuning: LoRA\n", "run.yaml"
    ).config
    saved = Ledger.of(config.effective(), {})
    seen = 0
    for name, setting in SETTINGS.items():
        if name in ("stage", "fine_tuning"):  # which decide what applies
            continue
        section = getattr(config, setting.section)
        value = vars(section)[name]
        other = (not value) if isinstance(value, bool) else (*value, "x") if isinstance(value, tuple) else f"{value}x"
        changed = dataclasses.replace(config, **{setting.section: dataclasses.replace(section, **{name: other})})
        found = [d.name for d in Ledger.of(changed.effective(), {}).compare(saved)]
        if name in resuming.START or not config.reads(name):
            assert name not in found
        else:
            assert found == [name], name
            seen += 1
    assert seen > 100


def test_a_setting_that_the_saved_run_does_not_know_had_its_default() -> None:
    config = RunConfig()
    saved = Ledger.of(config.effective(), {})
    settings = {name: value for name, value in saved.settings.items() if name != "loss_norm"}
    assert Ledger.of(config.effective(), {}).compare(dataclasses.replace(saved, settings=settings)) == []
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, loss_norm="seq"))
    assert [
        str(d) for d in Ledger.of(other.effective(), {}).compare(dataclasses.replace(saved, settings=settings))
    ] == ["loss_norm: token -> seq"]


def test_contents() -> None:
    one = {"train_dataset_path": [Content("a", "11", 4)]}
    ledger = Ledger.of(RunConfig().effective(), one)
    cases: dict[str, list[Content]] = {
        "": [Content("a", "11", 4)],
        "free": [Content("b", "11", 4)],
        "fixed": [Content("a", "22", 4)],
        "fixed rows": [Content("a", "11", 5)],
        "fixed more": [Content("a", "11", 4), Content("c", "33", 1)],
        "fixed none": [],
        "free unknown": [Content("a")],
        "fixed other name": [Content("b")],
    }
    for kind, content in cases.items():
        found = Ledger.of(RunConfig().effective(), {"train_dataset_path": content}).compare(ledger)
        if kind == "free unknown":
            assert found == []
        else:
            assert [d.kind for d in found] == ([kind.split()[0]] if kind else []), kind
    model = Ledger.of(RunConfig().effective(), {"model_name_or_path": [Content("m", "1")]})
    assert [
        d.kind for d in Ledger.of(RunConfig().effective(), {"model_name_or_path": [Content("m", "2")]}).compare(model)
    ] == ["fixed"]
    watched = Ledger.of(RunConfig().effective(), {"eval_dataset_path": [Content("m", "1")]})
    differences = Ledger.of(RunConfig().effective(), {"eval_dataset_path": [Content("m", "2")]}).compare(watched)
    assert [d.kind for d in differences] == ["course"]
    assert refusal(differences, Path("o"), finished=False) is None
    assert "eval_dataset_path: m (sha256 1) -> m (sha256 2)" in str(refusal(differences, Path("o"), finished=True))


def test_a_ledger_is_read_as_it_was_written_and_damage_is_named(tmp_path: Path) -> None:
    ledger = Ledger.of(RunConfig().effective(), {"train_dataset_path": [Content("数据", "11", 4)]}, 8)
    ledger = dataclasses.replace(ledger, changed=((3, "learning_rate: 1 -> 2"),), finished=(4, 5))
    file = tmp_path / "ledger.json"
    assert Ledger.read(file) is None
    file.write_text(ledger.text(), encoding="utf-8")
    assert Ledger.read(file) == ledger
    for text in ("", "{", "[]", "null", '{"format": 2}', '{"format": 1, "settings": 3}', "[" * 100_000):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"ledger\.json must be the ledger that a run wrote"):
            Ledger.read(file)


def test_the_settings_file_of_the_last_release(tmp_path: Path) -> None:
    config = load_text(
        "model_name_or_path: a\ntrain_dataset_path: b,c\nlearning_rate: 1e-4\nval_size: 3\n", "run.yaml"
    ).config
    file = tmp_path / "args.yaml"
    assert Ledger.of_settings_file(file) is None
    file.write_text(dump_config(config) + "a_setting_that_is_no_more: 3\n", encoding="utf-8")
    made = Ledger.of_settings_file(file)
    assert made is not None
    assert Ledger.of(config.effective(), {"model_name_or_path": [Content("a", "11")]}, 4).compare(made) == []


def test_files_and_folders_by_what_they_hold(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"abc")
    assert sha256_of(file) == sample_of(file) == fingerprint(file) == hashlib.sha256(b"abc").hexdigest()
    before = fingerprint(tmp_path)
    (tmp_path / "trainer_log.jsonl").write_text("what else is there does not matter")
    assert fingerprint(tmp_path) == before != ""
    (tmp_path / "model.safetensors").write_bytes(b"w")
    assert fingerprint(tmp_path) != before
    assert fingerprint(tmp_path / "nothing") == ""


def test_a_large_file_is_sampled_over_its_whole_length(tmp_path: Path) -> None:
    file, size = tmp_path / "large", WHOLE_BYTES + 12_345
    with file.open("wb") as stream:
        stream.truncate(size)
    before = sample_of(file)
    for place in (0, size // 63 * 31 + 5_000, size - 1):
        with file.open("r+b") as stream:
            stream.seek(place)
            stream.write(b"\1")
        after = sample_of(file)
        assert after != before, place
        before = after
    with file.open("r+b") as stream:
        stream.truncate(size - 1)
    assert sample_of(file) != before

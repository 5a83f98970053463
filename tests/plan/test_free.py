"""plan/free.py: runs that cannot fit are refused before anything is loaded, those that may not are
told.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from planning import ATTENTION, B28, settings
from support.packed_shapes import packed_shape

from ernie_tune.cli import train
from ernie_tune.config.host_memory import Free
from ernie_tune.data.processor import Processor
from ernie_tune.generate import opened
from ernie_tune.models.config_dialects import write_config
from ernie_tune.models.presets import preset
from ernie_tune.plan import free as plan
from ernie_tune.plan.free import check_weights, shortage
from ernie_tune.trainers import assemble

GB = 10**9


def test_what_is_told() -> None:
    lora, model = settings(B28, **ATTENTION), preset(B28)
    told, certain = shortage(lora, model, Free(24 * GB, "this machine"))
    assert certain
    assert str(told).startswith("memory (24.0 GB free, by this machine) must hold at least ")
    assert "weight_quantize_algo: weight_only_mix" in str(told)
    told, certain = shortage(lora, model, Free(130 * GB, "this machine"))
    assert told is not None
    assert not certain
    assert "rows as long as allowed need" in str(told)
    assert shortage(lora, model, Free(400 * GB, "this machine")) == (None, False)
    small = settings("tiny-a", fine_tuning="Full", max_seq_len=512)
    assert shortage(small, preset("tiny-a"), Free(2 * GB, "this machine")) == (None, False)


def test_weights_that_answer_must_fit() -> None:
    check_weights(preset(B28), "weight_only_mix", Free(20 * GB, "this machine"))
    check_weights(preset(B28), "none", None)
    for algorithm, size in (("none", 117), ("weight_only_mix", 18)):
        with pytest.raises(
            ValueError, match=rf"memory \(8.0 GB free, by this machine\) must hold {size}\.\d GB of weights"
        ):
            check_weights(preset(B28), algorithm, Free(8 * GB, "this machine"))


def test_a_model_that_does_not_fit_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(preset(B28), "paddle")
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    Processor.bundled("tiny").save_pretrained(tmp_path)
    for module in (opened, assemble, train):
        monkeypatch.setattr(module, "free_memory", lambda: Free(8 * GB, "this machine"))
    with pytest.raises(ValueError, match=r"must hold 117\.\d GB of weights; export them once"):
        opened.open_engine(tmp_path, lambda _: None)  # type: ignore[arg-type, return-value]
    run = settings(str(tmp_path), **ATTENTION)
    with pytest.raises(ValueError, match="--emit packed"):
        assemble.load_base(run)
    monkeypatch.setattr(train, "_config", lambda words: run)
    with pytest.raises(ValueError, match="--emit packed"):
        train.evaluate(["run.yaml"])


def test_codes_of_a_file_are_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plan.job_of
    quantised = settings(B28, **ATTENTION, weight_quantize_algo="weight_only_mix")
    assert shortage(quantised, preset(B28), Free(9 * GB, "this machine"))[1]
    packed = settings(B28, **ATTENTION)
    monkeypatch.setattr(
        plan, "job_of", lambda *a, **k: real(*a, **k).replace(packed=packed_shape(preset(B28), file_bytes=17 * GB))
    )
    told, certain = shortage(packed, preset(B28), Free(9 * GB, "this machine"))
    assert told is not None
    assert not certain
    # but `ulimit -v` counts its files
    assert shortage(packed, preset(B28), Free(9 * GB, "this machine"), Free(30 * GB, "ulimit -v")) == (told, False)
    told, certain = shortage(packed, preset(B28), Free(12 * GB, "ulimit -v"), Free(12 * GB, "ulimit -v"))
    assert certain
    assert "GB of address space (17.0" in str(told)
    assert "12.0 GB are allowed, by ulimit -v" in str(told)


def test_train_refuses_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # type: ignore[no-untyped-def]
    config = settings("small", fine_tuning="Full", output_dir=str(tmp_path / "out"))
    ran = []
    monkeypatch.setattr(train, "_config", lambda words: config)
    monkeypatch.setattr(
        train, "trainer_of", lambda c: lambda args: SimpleNamespace(train=lambda dry_run: ran.append(1))
    )
    monkeypatch.setattr(train, "free_memory", lambda: Free(GB // 10, "this machine"))
    with pytest.raises(ValueError, match=r"memory \(0.1 GB free, by this machine\) must hold at least 0"):
        train._train(["run.yaml"])
    assert not ran
    monkeypatch.setattr(train, "free_memory", lambda: Free(GB, "this machine"))
    assert train._train(["run.yaml"]) == 0
    assert "the system may end the run" in capsys.readouterr().err
    monkeypatch.setattr(train, "free_memory", lambda: None)
    assert train._train(["run.yaml"]) == 0
    assert ran == [1, 1]

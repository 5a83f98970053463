"""`ernie-tune init`: what it writes trains as it is, for every stage and method that exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from ernie_tune.cli.main import main
from ernie_tune.config.loader import load_config
from ernie_tune.config.sections_model import METHODS
from ernie_tune.config.stages import STAGES

METHODS_OF_PPO = ("LoRA", "Full", "Prompt")  # the other adapters take the same way as LoRA
EVERY = [(stage, method) for stage in STAGES for method in METHODS if stage != "PPO" or method in METHODS_OF_PPO]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HOME", "HF_HUB_CACHE", "MODELSCOPE_CACHE", "AISTUDIO_CACHE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "caches"))
    return tmp_path


@pytest.mark.parametrize(("stage", "method"), EVERY)
def test_every_stage_and_method_trains_as_written(
    here: Path, stage: str, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "run", f"stage={stage}", f"fine_tuning={method}"]) == 0
    told = capsys.readouterr().out
    assert "ernie-tune train run/run.yaml" in told
    assert ("ernie-tune score run/output" in told) == (stage == "RM")
    config = load_config("run/run.yaml", for_training=True, environ={}).config
    assert (config.model.stage, config.model.fine_tuning) == (stage, method)
    assert (config.data.val_size, config.eval.eval_strategy) == (0.1, "epoch")
    assert main(["validate", "run/run.yaml"]) == 0
    # two steps instead of all, and less to look at
    fewer = ["max_steps=2", "report_max_samples=0", "eval_max_samples=0", "plot_loss=false", "disable_tqdm=true"]
    code = main(["train", "run/run.yaml", *fewer])
    assert code == 0, capsys.readouterr().err
    assert (Path("run/output") / "all_results.json").is_file()


def test_without_the_released_model_the_shipped_one_stands_in(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "run"]) == 0
    assert (
        "the released 28B is not on this machine; nano, a small one that comes with the package"
        in capsys.readouterr().out
    )
    flat = load_config("run/run.yaml", environ={}).config.flat()
    assert (flat["model_name_or_path"], flat["fine_tuning"], flat["learning_rate"]) == ("nano", "LoRA", 2e-3)
    assert main(["init", "full", "fine_tuning=Full"]) == 0
    assert load_config("full/run.yaml", environ={}).config.flat()["learning_rate"] == 5e-4
    assert main(["init", "fresh", "model=tiny-a", "stage=DPO"]) == 0
    flat = load_config("fresh/run.yaml", environ={}).config.flat()
    assert (flat["fine_tuning"], flat["learning_rate"]) == ("Full", 2e-4), "an adapter has nothing to adapt there"
    capsys.readouterr()
    cache = here / "caches" / "models" / "PaddlePaddle" / "ERNIE-4___5-VL-28B-A3B-Paddle"
    cache.mkdir(parents=True)
    (cache / "config.json").write_text("{}")
    assert main(["init", "other"]) == 0
    assert "stands in" not in capsys.readouterr().out
    flat = load_config("other/run.yaml", environ={}).config.flat()
    assert (flat["fine_tuning"], flat["lora_rank"], flat["bf16"]) == ("LoRA", 32, True)
    assert flat["model_name_or_path"] == "baidu/ERNIE-4.5-VL-28B-A3B-Paddle"


def test_own_rows_and_held_out_rows_are_kept(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "run", "dataset=mine.jsonl", "eval_dataset=held.jsonl", "model=tiny-a"]) == 0
    assert "train_dataset_path (mine.jsonl) is not there" in capsys.readouterr().out
    assert load_config("run/run.yaml", environ={}).config.data.val_size == 0
    assert not Path("run/data").exists()

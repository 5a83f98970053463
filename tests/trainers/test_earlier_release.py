"""A checkpoint that the first release has written: this one goes on from it, bit for bit; what is
missing in it is named.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.trajectories import row

from ernie_tune import KTOTrainer, TrainingArguments
from ernie_tune.checkpoint.optimizer_state import optimizer_arrays
from ernie_tune.checkpoint.sharded import Region, ShardedReader
from ernie_tune.checkpoint.state import Checkpoint
from ernie_tune.trainers.run import Run

# golden/release_0_1/checkpoint-2: KTO with an adapter and a reference that moves, saved by 0.1 as
# it was first given out (commit af29433), at step 2 of 6; its losses until then
STORED = Path(__file__).parents[1] / "golden" / "release_0_1"
LOSSES = [0.5, 0.5001647472381592]


def folder_of_the_release(here: Path) -> TrainingArguments:
    """Its run folder, and the settings that made it."""
    out = here / "whole"
    shutil.copytree(STORED, out)
    args = out / "checkpoint-2" / "ernie_tune_args.yaml"
    args.write_text(args.read_text(encoding="utf-8").replace("HERE", str(here)), encoding="utf-8")
    rows = [json.dumps(row("label", i)) + "\n" for i in range(8)]
    (here / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
    settings: dict[str, Any] = {
        "stage": "KTO",
        "model_name_or_path": "tiny-a",
        "fine_tuning": "LoRA",
        "lora_rank": 1,
        "lora_target_modules": ["q_proj"],
        "train_dataset_path": str(here / "rows.jsonl"),
        "output_dir": str(out),
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "max_seq_len": 200,
        "max_prompt_len": 150,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-5,
        "plot_loss": False,
        "disable_tqdm": True,
        "ref_model_update_steps": 2,
        "warmup_ratio": 0.0,
    }
    return TrainingArguments(**settings)


def test_a_run_of_the_first_release_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every value that it left; the tokenizer of the preset is another since, so its later
    losses are not asked for.
    """
    trainer = KTOTrainer(args=folder_of_the_release(tmp_path))
    seen: dict[str, Any] = {}
    resume = Run._resume

    def look(run: Run, checkpoint: Checkpoint) -> None:
        resume(run, checkpoint)
        method: Any = run.method
        moments = optimizer_arrays(run.loop.optimizer, run.policy.trained())
        seen.update(
            {f"{n}/value": p.numpy() for n, p in run.policy.trained().items()}
            | {n: m.numpy() for n, m in moments.items()}
        )
        seen["reference"] = {n: p.numpy() for n, p in method.prepared().moving().items()}
        seen["about"] = run.loop.step, run.stream.epoch, len(method.prepared().cache.values)

    monkeypatch.setattr(Run, "_resume", look)
    trainer.train()
    assert seen.pop("about") == (2, 0.5, 0)
    for folder, held in (("reference", seen.pop("reference")), ("optimizer", seen)):
        reader = ShardedReader(STORED / "checkpoint-2" / folder)
        assert reader.shapes.keys() == held.keys()
        for name, value in held.items():
            whole = reader.read(name, Region.block(reader.shapes[name]))
            assert np.array_equal(value.reshape(-1), whole.reshape(-1)), name
    log = (tmp_path / "whole" / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines()
    found = {r["step"]: r["loss"] for r in map(json.loads, log) if "loss" in r}
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert [found[1], found[2]] == LOSSES


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    args = folder_of_the_release(tmp_path)
    (tmp_path / "whole" / "checkpoint-2" / "preference_guards_state.json").unlink()
    with pytest.raises(ValueError, match=r"preference_guards_state\.json"):
        KTOTrainer(args=args).train()

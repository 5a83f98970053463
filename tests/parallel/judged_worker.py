"""Whole runs of the trainers on judged answers, on this process or as a rank: `judged_worker.py FOLDER LAYOUT`, started by the launcher, runs every case
of the layout one after the other, each in FOLDER/CASE. Fleet is laid out once for all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from judged_rows import label, mixture, pairs
from tiny_runs import write_rows

from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.trainers import place
from ernie_tune.trainers.preference import DPOTrainer, KTOTrainer
from ernie_tune.trainers.reward import RewardTrainer
from ernie_tune.trainers.upo import UPOTrainer

TRAINERS = {"DPO": DPOTrainer, "KTO": KTOTrainer, "UPO": UPOTrainer, "RM": RewardTrainer}
ROWS = {"DPO": pairs(12), "KTO": [label(i) for i in range(12)], "UPO": mixture(12), "RM": pairs(12)}
STEPS = 3
# Settings of a layout. One process has a window's micro-batches in turn where several ranks share them.
LAYOUTS: dict[str, dict[str, Any]] = {
    "PP2": {"pipeline_model_parallel_size": 2},
    "TP2": {"tensor_model_parallel_size": 2},
    "EP2 sharding 2": {
        "expert_model_parallel_size": 2,
        "sharding": "stage1",
        "sharding_parallel_size": 2,
        "gradient_accumulation_steps": 1,
    },
    "one process": {},
}
_LORA = {
    "fine_tuning": "LoRA",
    "lora_target_modules": ("all-linear",),
    "lora_experts": "both",
    "learning_rate": 1e-2,
}
_MOVING = {"ref_model_update_steps": 2, "ref_model_mixup_alpha": 0.5}
# layout -> case -> stage and settings
CASES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "PP2": {
        "second_model_moves": ("DPO", _MOVING),
        "precomputed": ("DPO", {"ref_mode": "precomputed"}),
        "quantised_adapter_off": ("DPO", {**_LORA, "weight_quantize_algo": "weight_only_int8"}),
        "adapter_moves": ("UPO", {**_LORA, **_MOVING}),
        "kto": ("KTO", {}),
        "rewards": ("RM", {}),
    },
    "TP2": {
        "second_model_moves": ("DPO", _MOVING),
        "precomputed": ("DPO", {"ref_mode": "precomputed"}),
        "adapter_moves": ("DPO", {**_LORA, **_MOVING}),
    },
    "EP2 sharding 2": {
        "second_model_moves": ("KTO", _MOVING),
        "adapter_off": ("UPO", _LORA),
        "rewards": ("RM", {**_LORA, "learning_rate": 2e-3}),
    },
}


def train(folder: Path, stage: str, changes: dict[str, Any], layout: str = "one process") -> Any:
    """A run of three steps. One whose reference moves is made in two parts: the third step by a run that goes on from a checkpoint of the second."""
    moves = "ref_model_update_steps" in changes
    values = {
        "stage": stage,
        "model_name_or_path": "tiny-a",
        "fine_tuning": "Full",
        "train_dataset_path": (str(folder.parent / f"{stage}.jsonl"),),
        "eval_dataset_path": (str(folder.parent / f"{stage}.jsonl#4"),),
        "output_dir": str(folder),
        "max_seq_len": 200,
        "max_prompt_len": 150,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps" if moves else "no",
        "save_steps": 2,
        "report_max_samples": 1,
        "per_device_eval_batch_size": 4,
        "eval_max_new_tokens": 2,
        "plot_loss": False,
        "disable_tqdm": True,
        **({"allow_base": True} if stage == "UPO" else {}),
        **changes,
        **LAYOUTS[layout],
    }
    for steps in (2, STEPS) if moves else (STEPS,):
        trainer = TRAINERS[stage](args=TrainingArguments(**{**values, "max_steps": steps}))
        trainer.train()
    return trainer


def write_all(folder: Path, stages: Iterable[str] = ROWS) -> None:
    for stage in stages:
        write_rows(folder / f"{stage}.jsonl", ROWS[stage])


def main() -> None:
    from ernie_tune.parallel.mesh import init_mesh

    folder, layout = Path(sys.argv[1]), sys.argv[2]
    meshes: list[Any] = []

    def once(degrees: Any, *, accumulation: int) -> Any:
        """Fleet is laid out once in a process."""
        meshes[:] = meshes or [init_mesh(degrees, accumulation=accumulation)]
        assert meshes[0].degrees == degrees
        return meshes[0]

    place.init_mesh = once
    place._watch = lambda world: None  # its address is the launcher's, for one run
    for case, (stage, changes) in CASES[layout].items():
        print("case", case, flush=True)
        train(folder / case, stage, changes, layout)


if __name__ == "__main__":
    main()

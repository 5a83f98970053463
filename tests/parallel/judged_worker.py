"""Whole runs of the trainers on judged answers, on this process or as a rank:
`judged_worker.py FOLDER LAYOUT`, started by the launcher, runs every case of the layout one after
the other, each in FOLDER/CASE. Fleet is laid out once for all of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from support.judged_rows import label, mixture, pairs, rating
from support.tiny_runs import write_rows

from ernie_tune.config.training_arguments import TrainingArguments
from ernie_tune.machine import place
from ernie_tune.trainers.preference import DPOTrainer, KTOTrainer
from ernie_tune.trainers.reward import RewardTrainer
from ernie_tune.trainers.upo import UPOTrainer

TRAINERS = {"DPO": DPOTrainer, "KTO": KTOTrainer, "UPO": UPOTrainer, "RM": RewardTrainer}
# mostly good answers: then those of other rows become more probable too, and KTO's baseline is
# above 0
GOOD = [label(i) for i in (0, 2, 4, 1, 6, 8, 10, 12, 14, 3, 16, 18)]
ROWS = {"DPO": pairs(12), "KTO": GOOD, "UPO": mixture(12), "RM": [*pairs(7), *map(rating, range(5))]}
STEPS = 3
# Settings of a layout. One process has a window's micro-batches in turn where several ranks share
# them.
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
# case -> stage and settings
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "second_model_moves": ("DPO", _MOVING),
    "precomputed": ("DPO", {"ref_mode": "precomputed"}),
    "adapter_moves": ("UPO", {**_LORA, **_MOVING, "weight_quantize_algo": "weight_only_int8"}),
    "adapter_off": ("KTO", _LORA),
    "rewards": ("RM", {}),
    "levels": ("RM", {"rating_loss": "ordinal"}),
    "bco_density": ("KTO", {"loss_type": "bco", "bco_density": True}),
    "spoilt_pictures": ("DPO", {"ref_mode": "precomputed", "image_corruption": "noise", "image_corruption_ratio": 0.6}),
}
TRIED = {
    "PP2": tuple(CASES),
    "TP2": ("second_model_moves", "precomputed", "adapter_moves", "levels"),
    "EP2 sharding 2": ("second_model_moves", "adapter_off", "rewards", "levels", "bco_density", "spoilt_pictures"),
}


def train(folder: Path, case: str, layout: str = "one process") -> Path:
    """A run of three steps. One whose reference moves is made in two parts: the third step by a run
    that goes on from a checkpoint of the second.
    """
    stage, changes = CASES[case]
    moves = "ref_model_update_steps" in changes
    rows = write_rows(folder / f"{stage}_{os.environ.get('PADDLE_TRAINER_ID', '0')}.jsonl", ROWS[stage])
    values = {
        "stage": stage,
        "model_name_or_path": "tiny-a",
        "fine_tuning": "Full",
        "train_dataset_path": (rows,),
        "eval_dataset_path": (f"{rows}#4",),
        "output_dir": str(folder / case),
        "max_seq_len": 200,
        "max_prompt_len": 150,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-5,
        # AdamW makes of the rounding of a gradient near zero a step of up to rate x rounding /
        # epsilon: with the rate of adapters, in float32, more than any bound on parameters. Reward
        # models (float32 only) are trained at a tenth of it.
        "float64": stage != "RM",
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
        TRAINERS[stage](args=TrainingArguments(**{**values, "max_steps": steps})).train()
    return folder / case


def main() -> None:
    from ernie_tune.parallel.mesh import init_mesh

    folder, layout = Path(sys.argv[1]), sys.argv[2]
    meshes: list[Any] = []

    def once(degrees: Any, *, accumulation: int) -> Any:
        """Fleet is laid out once in a process."""
        meshes[:] = meshes or [init_mesh(degrees, accumulation=accumulation)]
        assert meshes[0].layout == degrees
        return meshes[0]

    place.init_mesh = once
    place._watch = lambda world: None  # its address is the launcher's, for one run
    for case in TRIED[layout]:
        print("case", case, flush=True)
        train(folder, case, layout)


if __name__ == "__main__":
    main()

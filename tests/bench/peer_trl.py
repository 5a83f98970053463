"""The peer's side of bench_preference.py: TRL's DPOTrainer on transformers' model, loaded from the
folder that our side wrote. An environment of its own:
pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0. Prints one JSON line: seconds of each
step and the first loss.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import pairwise
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Ernie4_5_VLMoeForConditionalGeneration, PreTrainedTokenizerFast, TrainerCallback
from trl import DPOConfig, DPOTrainer


class TextOnly(Ernie4_5_VLMoeForConditionalGeneration):
    """The model wants the kind of every token; here all are text."""

    def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
        zeros = torch.zeros_like(input_ids)
        return super().forward(
            input_ids=input_ids, **{"mm_token_type_ids": zeros, "moe_mm_token_type_ids": zeros, **more}
        )


class Clock(TrainerCallback):
    """Seconds of each optimizer step, reading its batch included."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **more: Any) -> None:
        self.ends.append(time.perf_counter())


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "rows"):
        parser.add_argument(f"--{name}", required=True)
    for name, value in {"batch": 4, "steps": 6, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    model = TextOnly.from_pretrained(a.model, dtype=torch.float32)
    words = {f"t{i}": i for i in range(model.config.text_config.vocab_size)}
    plain = Tokenizer(models.WordLevel(words, unk_token="t0"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, eos_token="t2", pad_token="t0", unk_token="t0")
    with open(a.rows, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    clock = Clock()
    config = DPOConfig(
        output_dir="/tmp/peer_trl",
        per_device_train_batch_size=a.batch,
        max_steps=a.steps,
        learning_rate=1e-5,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=TextOnly.from_pretrained(a.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.train()
    steps = [b - a for a, b in pairwise(clock.ends)]
    first = next(float(r["loss"]) for r in trainer.state.log_history if "loss" in r)
    print(json.dumps({"steps": steps, "first_loss": first}))


if __name__ == "__main__":
    main()

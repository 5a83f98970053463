"""The peer's side of bench_model.py: transformers + torch on the same shape ("small"), same sizes.
Runs in an environment of its own:
pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2. Prints one JSON line: seconds of each
measured thing, best of the repeats.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable

import torch
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

TEXT = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "moe_intermediate_size": [256, 128],
    "moe_k": 2,
    "moe_num_experts": 16,
    "moe_num_shared_experts": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [6, 6, 4]},
}
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 4,
    "intermediate_size": 512,
    "patch_size": 14,
    "spatial_merge_size": 2,
}
IDS = {"image_token_id": 8004, "image_start_token_id": 8005, "image_end_token_id": 8006, "video_start_token_id": 8007}


def best(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    args = argparse.ArgumentParser()
    for name, value in {
        "rows": 4,
        "tokens": 256,
        "repeats": 5,
        "threads": 2,
        "batch": 8,
        "prompt": 128,
        "new": 64,
    }.items():
        args.add_argument(f"--{name}", type=int, default=value)
    a = args.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    config = Ernie4_5_VLMoeConfig(
        text_config=TEXT, vision_config=VISION, video_end_token_id=8008, video_token_id=8009, **IDS
    )
    model = Ernie4_5_VLMoeForConditionalGeneration(config)
    ids = torch.randint(10, 7900, (a.rows, a.tokens))
    inputs = {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.zeros_like(ids),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def forward_backward() -> None:
        model(**inputs).loss.backward()
        model.zero_grad(set_to_none=True)

    def full_step() -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    forward_backward()
    out = {"forward_backward": best(forward_backward, a.repeats)}
    full_step()
    out["full_step"] = best(full_step, a.repeats)
    model.eval()
    prompt = torch.randint(10, 7900, (a.batch, a.prompt))
    zeros = torch.zeros_like(prompt)
    request = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "mm_token_type_ids": zeros,
        "moe_mm_token_type_ids": zeros,
    }

    def generate(new: int) -> None:
        model.generate(
            **request, max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )

    generate(2)
    out["prefill"] = best(lambda: generate(1), a.repeats)
    out["decode"] = (best(lambda: generate(a.new), 2) - out["prefill"]) / (a.new - 1)
    out.update(lora_step(model.train(), inputs, a.repeats))
    out["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps(out))


def lora_step(model: torch.nn.Module, inputs: dict[str, torch.Tensor], repeats: int) -> dict[str, float]:
    """One step of LoRA r=16 on the attention projections; left out where peft is missing."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        return {}
    wrapped = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    )
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        wrapped(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    return {"lora_step": best(step, repeats)}


if __name__ == "__main__":
    main()

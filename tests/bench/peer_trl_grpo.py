"""The peer's side of bench_grpo.py: TRL's GRPOTrainer on the CPU with transformers'
ERNIE-4.5-VL-MoE ("small", as in peer_transformers.py). Rewards are the share of even ids.

Environment of its own: pip install torch==2.13.0 torchvision transformers==5.23.0 trl==1.16.0
peft==0.21.2 datasets. Prints one JSON line. --pixels N: every prompt has a generated picture of
N x N. (TRL's training forward sends pictures through the text experts; the work is about the same.)
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import tempfile
import time

import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Ernie4_5_VLMoeImageProcessor,
    Ernie4_5_VLMoeProcessor,
    Ernie4_5_VLMoeVideoProcessor,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

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
IDS = {
    "image_token_id": 8000,
    "image_start_token_id": 8001,
    "image_end_token_id": 8002,
    "video_start_token_id": 8003,
    "video_end_token_id": 8004,
    "video_token_id": 8005,
}
SPECIAL = {
    8000: "<|IMAGE_PLACEHOLDER|>",
    8001: "<|IMAGE_START|>",
    8002: "<|IMAGE_END|>",
    8003: "<|VIDEO_START|>",
    8004: "<|VIDEO_END|>",
    8005: "<|VIDEO_PLACEHOLDER|>",
    8189: "<unk>",
    8190: "<pad>",
    8191: "</s>",
}
TEMPLATE = (
    "{% for m in messages %}{{ 'w0 ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' }}{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' w1' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {SPECIAL.get(i, f"w{i}"): i for i in range(TEXT["vocab_size"])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    names = {
        "image_token": 8000,
        "image_start_token": 8001,
        "image_end_token": 8002,
        "video_start_token": 8003,
        "video_end_token": 8004,
        "video_token": 8005,
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
        extra_special_tokens={k: SPECIAL[v] for k, v in names.items()},
    )


def processor(tok: PreTrainedTokenizerFast, pixels: int) -> Ernie4_5_VLMoeProcessor:
    size = {"shortest_edge": pixels * pixels, "longest_edge": pixels * pixels}
    image = Ernie4_5_VLMoeImageProcessor(size=size)
    return Ernie4_5_VLMoeProcessor(image, tok, Ernie4_5_VLMoeVideoProcessor(), chat_template=TEMPLATE)


def even(completion_ids: list[list[int]], **_: object) -> list[float]:
    """The share of even ids."""
    return [float(np.mean([t % 2 == 0 for t in ids])) for ids in completion_ids]


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.times: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *_, **__) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *_, **__) -> None:
        self.times.append(time.perf_counter() - self.start)


def rows(a: argparse.Namespace) -> dict[str, list]:
    rng = np.random.default_rng(0)
    if not a.pixels:
        words = [" ".join(f"w{i}" for i in rng.integers(10, 7900, a.prompt - 2)) for _ in range(64)]
        return {"prompt": [[{"role": "user", "content": w}] for w in words]}
    text = " ".join(f"w{i}" for i in range(10, 10 + a.prompt - 4))
    pictures = [Image.new("RGB", (a.pixels, a.pixels), "red" if i % 2 else "blue") for i in range(64)]
    return {"prompt": [[{"role": "user", "content": text}] for _ in pictures], "image": pictures}


def main() -> None:
    parser = argparse.ArgumentParser()
    sizes = {"prompts": 2, "group": 8, "prompt": 64, "new": 32, "steps": 3, "threads": 2, "pixels": 0}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    logging.disable(logging.WARNING)
    model = Ernie4_5_VLMoeForConditionalGeneration(Ernie4_5_VLMoeConfig(text_config=TEXT, vision_config=VISION, **IDS))
    tok, batch = tokenizer(), a.prompts * a.group
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        num_generations=a.group,
        max_completion_length=a.new,
        max_steps=a.steps,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        beta=0.0,
        loss_type="dapo",
        disable_tqdm=True,
        seed=0,
        router_aux_loss_coef=0.0,
        generation_kwargs={"min_new_tokens": a.new},
    )
    clock, made = Clock(), []
    lengths: list[int] = []
    inner = model.generate

    def timed(*given: object, **how: object) -> object:
        began = time.perf_counter()
        got = inner(*given, **how)
        made.append(time.perf_counter() - began)
        lengths.append(how["input_ids"].shape[1])
        return got

    model.generate = timed
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=even,
        args=args,
        train_dataset=Dataset.from_dict(rows(a)),
        processing_class=processor(tok, a.pixels) if a.pixels else tok,
        callbacks=[clock],
    )
    trainer.train()
    out = {
        "step_seconds": min(clock.times),  # best of the steps: the machine is shared
        "rollout_seconds": min(made),
        "prompt_tokens": max(lengths),
        "steps": [round(x, 3) for x in clock.times],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(out))


if __name__ == "__main__":
    main()

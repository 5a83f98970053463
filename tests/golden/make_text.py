"""Write `text_dense/` and `text_moe/`: two text-only siblings as transformers saves them, with
their logits. `python tests/golden/make_text.py`

Needs torch and transformers at the versions of README.md. Random weights; every bias and norm away
from its initial value.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM, Ernie4_5Config, Ernie4_5ForCausalLM

SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}
EXPERTS = {
    "moe_intermediate_size": 40,
    "moe_k": 2,
    "moe_num_experts": 8,
    "moe_num_shared_experts": 1,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": 1,
}


@torch.no_grad()
def write(name: str, model: torch.nn.Module) -> None:
    """Draw the weights, save them as transformers does, and the logits of 21 tokens beside them."""
    for key, value in [*model.named_parameters(), *model.named_buffers()]:
        if "e_score_correction_bias" in key:
            value.copy_(0.05 * torch.randn_like(value))
        elif value.ndim == 1 and "norm" in key:
            value.copy_(1 + 0.2 * torch.randn_like(value))
        elif value.ndim > 1:
            value.copy_(torch.randn_like(value) * 0.5 / value.shape[-1] ** 0.5)
    folder = Path(__file__).parent / name
    model.eval().save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    ids = torch.randint(3, SHAPE["vocab_size"], (1, 21))
    np.savez_compressed(folder / "case.npz", input_ids=ids[0].numpy(), logits=model(ids).logits[0].numpy())


def main() -> None:
    torch.manual_seed(0)
    write("text_dense", Ernie4_5ForCausalLM(Ernie4_5Config(**SHAPE, head_dim=32)))
    write("text_moe", Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**SHAPE, **EXPERTS)))


if __name__ == "__main__":
    main()

"""Our PEFT dialect against the PEFT library itself, both ways. Two environments take part: one has
paddle, the other torch, transformers and peft.

python tests/golden/check_peft_interop.py write FOLDER    paddle: adapters of every kind on tiny-b,
                                                          saved with dialect="peft", and our logits
python tests/golden/check_peft_interop.py check FOLDER    torch: load them on the transformers model
                                                          and compare the logits
python tests/golden/check_peft_interop.py make            torch: train an adapter for two steps
                                                          there and store it in peft_adapter/ for
                                                          our tests
Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from weights import case_rows, golden_config, golden_weights, normal

HERE = Path(__file__).parent
MADE = HERE / "peft_adapter"
PRESET, CASE, SHOWN_TOKENS, SHOWN_WORDS = "tiny-b", "mixed", slice(None, None, 4), slice(None, None, 2)
OPEN = {"freeze_config": ""}
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"r": 4, "target_modules": ["attention"]},
    "every_linear": {"r": 3, "target_modules": ["all-linear"], "rslora": True, "lora_alpha": 5, **OPEN},
    "dora": {"r": 4, "target_modules": ["query_key_value", "vision"], "use_dora": True, **OPEN},
    "some_experts": {"r": 2, "expert_targets": [(1, "text", 3), (1, "vision", 0), (3, "vision", 7), (3, "text", 15)]},
    "all_experts_and_more": {"r": 2, "target_modules": ["experts", "shared_experts", "o_proj"], "lora_alpha": 3},
    "modules_to_save": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["resampler_model.mlp", "norm"]},
}


def row() -> Any:
    return case_rows(dict(np.load(HERE / f"{PRESET.replace('-', '_')}.npz")), CASE)[0]


def write(folder: Path) -> None:
    """With paddle."""
    import paddle

    from ernie_tune.models.ernie import ErnieModel
    from ernie_tune.models.inputs import pack
    from ernie_tune.peft.config import LoraConfig
    from ernie_tune.peft.model import PeftModel

    config = golden_config(PRESET)
    base = ErnieModel(config)
    weights = golden_weights(config)
    for name, value in base.state_dict().items():
        value.set_value(paddle.to_tensor(weights[name]))
    model = PeftModel(base)
    model.eval()
    for name, settings in ADAPTERS.items():
        model.add_adapter(LoraConfig(**settings), name)
        for key, value in model.named_parameters():
            if not value.stop_gradient:
                value.set_value(value + paddle.to_tensor(0.05 * normal(key, value.shape)).astype(value.dtype))
        model.save_pretrained(folder / name, dialect="peft")
        with paddle.no_grad():
            logits_TV = model.logits(model(pack([row()], config.tokens))).numpy()
        np.save(folder / name / "logits.npy", logits_TV)


def hf_logits(model: Any) -> np.ndarray:
    import torch
    from hf_model import all_float64, hf_inputs

    with torch.no_grad(), all_float64():
        return model(**hf_inputs(row(), golden_config(PRESET), torch.float64)).logits[0].numpy()


def check(folder: Path) -> None:
    """With torch."""
    import torch
    from hf_model import build
    from peft import PeftModel

    plain = hf_logits(build(golden_config(PRESET), torch.float64))
    for name in ADAPTERS:
        model = PeftModel.from_pretrained(build(golden_config(PRESET), torch.float64), str(folder / name)).eval()
        ours, theirs = np.load(folder / name / "logits.npy"), hf_logits(model)
        error, effect = np.abs(ours - theirs).max(), np.abs(theirs - plain).max()
        print(f"{name}: largest difference {error:.1e}, effect of the adapter {effect:.2f}")
        assert error < 1e-4 < effect / 100, name


def make() -> None:
    """With torch: q, k, v and o of tiny-b, rank 4, two steps on the tokens of one row; float64
    logits of some tokens.
    """
    import torch
    from hf_model import all_float64, build, hf_inputs
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = golden_config(PRESET)
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], use_rslora=True)
    model = get_peft_model(build(config, torch.float64), settings)
    inputs = hf_inputs(row(), config, torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        with all_float64():
            loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float().double()  # what the file holds
    logits = hf_logits(model.eval())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    shutil.rmtree(MADE, ignore_errors=True)
    model.save_pretrained(str(MADE))
    (MADE / "README.md").unlink(missing_ok=True)
    file = MADE / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()), indent=2, sort_keys=True) + "\n")
    np.savez_compressed(MADE / "logits.npz", logits=logits[SHOWN_TOKENS, SHOWN_WORDS].astype(np.float32))
    print(sorted((path.name, path.stat().st_size) for path in MADE.iterdir()))


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    {"write": write, "check": check, "make": make}[verb](*map(Path, rest))

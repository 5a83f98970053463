"""Folders of `ernie-tune export --layout hf` in transformers itself. Two environments take part:
one has paddle, the other torch and transformers.

python tests/golden/check_hf_export.py write FOLDER    paddle: export golden models, plain and with
                                                       a merged adapter, and our logits of the
                                                       folders
python tests/golden/check_hf_export.py check FOLDER    torch: load the folders with from_pretrained,
                                                       compare keys, dtypes and logits
Seen with transformers 5.23.0 and torch 2.13.0: no missing and no unexpected key, routers in
float32, largest difference of a logit 4.3e-06 (tiny-b), 1.5e-06 (tiny-c, untied head), 4.8e-06
(tiny-b with a merged adapter), of logits up to 6.9.
Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from weights import case_rows, golden_config, golden_weights, normal

HERE = Path(__file__).parent
CASE = "mixed"
FOLDERS = ("tiny-b", "tiny-c", "tiny-b-merged")


def row(name: str) -> Any:
    return case_rows(dict(np.load(HERE / f"{name.replace('-', '_')}.npz")), CASE)[0]


def write(folder: Path) -> None:
    """With paddle."""
    import paddle

    from ernie_tune.checkpoint.auto import AutoModel
    from ernie_tune.data.processor import Processor
    from ernie_tune.export.run import export
    from ernie_tune.models.inputs import pack
    from ernie_tune.peft.config import LoraConfig
    from ernie_tune.peft.model import get_peft_model

    for name in ("tiny-b", "tiny-c"):
        model = AutoModel.from_config(golden_config(name))
        for key, value in golden_weights(model.config).items():
            model.state_dict()[key].set_value(paddle.to_tensor(value))
        model.save_pretrained(folder / "base" / name)
        Processor.from_pretrained(HERE / "tokenizer_old").save_pretrained(folder / "base" / name)
    settings = LoraConfig(r=4, target_modules=["all-linear", "experts"], freeze_config="")
    adapted = get_peft_model(AutoModel.from_pretrained(folder / "base" / "tiny-b"), settings)
    for key, value in adapted.named_parameters():
        if not value.stop_gradient:
            value.set_value(value + paddle.to_tensor(0.05 * normal(key, value.shape)).astype(value.dtype))
    adapted.save_pretrained(folder / "adapter")
    for name in FOLDERS:
        plain = name.removesuffix("-merged")
        given = [folder / "base" / plain] + ([folder / "adapter"] if name != plain else [])
        export(given, folder / name, layout="hf", max_shard_bytes=400_000)
        model = AutoModel.from_pretrained(folder / name)
        model.eval()
        with paddle.no_grad():
            np.save(folder / f"{name}.npy", model.logits(model(pack([row(plain)], model.config.tokens))).numpy())


def check(folder: Path) -> None:
    """With torch. The presets give videos the id of images; transformers needs one of their own to
    tell them apart (`hf_model.HF_VIDEO_ID`).
    """
    import torch
    from hf_model import HF_VIDEO_ID, hf_inputs
    from transformers import AutoConfig, Ernie4_5_VLMoeForConditionalGeneration

    for name in FOLDERS:
        plain = name.removesuffix("-merged")
        assert AutoConfig.from_pretrained(folder / name).model_type == "ernie4_5_vl_moe"
        model, info = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
            folder / name, attn_implementation="eager", experts_implementation="eager", output_loading_info=True
        )
        routers = {str(p.dtype) for key, p in model.named_parameters() if "moe.gate." in key}
        stored = {str(p.dtype) for key, p in model.named_parameters() if "moe.gate." not in key}
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
        assert (routers, stored) == ({"torch.float32"}, {"torch.bfloat16"}), (routers, stored)
        for parameter in model.parameters():
            parameter.data = parameter.data.float()
        model.config.video_token_id = HF_VIDEO_ID
        with torch.no_grad():
            theirs_TV = model.eval()(**hf_inputs(row(plain), golden_config(plain), torch.float32)).logits[0].numpy()
        ours_TV = np.load(folder / f"{name}.npy")
        error = np.abs(ours_TV - theirs_TV).max()
        print(
            f"{name}: largest difference {error:.1e} of logits up to {np.abs(ours_TV).max():.1f}, no key missing or unexpected"
        )
        assert error < 1e-4


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    {"write": write, "check": check}[verb](*map(Path, rest))

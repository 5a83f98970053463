"""Does PaddleNLP's own loader open our adapters? Two steps, in two environments:

    python tests/golden/check_paddlenlp_interop.py write FOLDER      # here
    # pip install paddlepaddle==3.3.1 paddlenlp==3.0.0b4 "aistudio-sdk==0.2.6" "datasets<4.5"
    # "pyarrow<23"
    python tests/golden/check_paddlenlp_interop.py read FOLDER

The second builds a shell of layers with PaddleNLP's names, opens the folder with
`LoRAModel.from_pretrained` and compares every tensor.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import paddle
from paddle import nn

VALUES = "values.npz"
LAYERS, HIDDEN, KEYS = 4, 160, 32  # preset tiny-b


def write(folder: Path) -> None:
    """An adapter of rank 4 on the attention of tiny-b, B not zero, and its values under their
    names.
    """
    from ernie_tune import AutoModel, LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(AutoModel.from_config("tiny-b"), LoraConfig(r=4, lora_alpha=8, target_modules=names))
    lora = {name: p for name, p in model.named_parameters() if "lora_" in name}
    for name, p in lora.items():
        if name.endswith("lora_B"):
            p.set_value(paddle.randn(p.shape))
    model.save_pretrained(folder, dialect="paddlenlp")
    np.savez(folder / VALUES, **{name.replace(".adapters.default", ""): p.numpy() for name, p in lora.items()})


def read(folder: Path) -> None:
    """Open it with PaddleNLP."""
    from paddlenlp.peft import LoRAConfig, LoRAModel
    from paddlenlp.transformers import PretrainedConfig, PretrainedModel

    class ShellConfig(PretrainedConfig):
        model_type = "shell"

    class Shell(PretrainedModel):
        config_class, base_model_prefix = ShellConfig, "model"

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.model = nn.Layer()
            self.model.layers = nn.LayerList([nn.Layer() for _ in range(LAYERS)])
            for layer in self.model.layers:
                layer.self_attn = nn.Layer()
                for name, width in (("q_proj", HIDDEN), ("k_proj", KEYS), ("v_proj", KEYS), ("o_proj", HIDDEN)):
                    setattr(layer.self_attn, name, nn.Linear(HIDDEN, width, bias_attr=False))

    config = LoRAConfig.from_pretrained(str(folder))
    state = LoRAModel.from_pretrained(Shell(ShellConfig()), str(folder)).state_dict()
    values = np.load(folder / VALUES)
    for name, value in values.items():
        found = [tensor for key, tensor in state.items() if key.endswith(f"model.{name}")]
        assert len(found) == 1, f"{name}: {len(found)} tensors"
        assert np.array_equal(found[0].numpy(), value), name
    print(f"r {config.r}, scaling {config.scaling}: {len(values.files)} tensors equal")


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))

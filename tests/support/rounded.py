"""The float model that has the rounded weights of a packed folder, as a folder beside it: what a
run on codes must equal. Refuses to know: how codes are stored.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import paddle

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.models.specs import parameter_specs
from ernie_tune.peft.packed import load_packed
from ernie_tune.peft.quantize import QuantizedLinear, QuantizedProduct


def write_rounded(plain: Path, packed: Path, out: Path) -> None:
    """`out` gets the weights in float32, and the processor's files of `plain`."""
    codes, rounded = load_packed(packed), AutoModel.from_pretrained(plain)
    layers, state, values = dict(codes.named_sublayers()), rounded.state_dict(), codes.state_dict()
    for name, spec in parameter_specs(codes.config).items():
        module, _, leaf = name.rpartition(".")
        owner = layers[module]
        if isinstance(owner, QuantizedLinear):
            state[name].set_value(owner.weight)
        elif isinstance(product := getattr(owner, leaf.replace("proj", "product"), None), QuantizedProduct):
            state[name].set_value(paddle.stack([product.quant.dense(e) for e in range(spec.shape[0])]))
        else:
            state[name].set_value(values[name])
    rounded.save_pretrained(out)
    for file in plain.iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copy(file, out / file.name)

"""What PaddleFormers and transformers themselves make of our exports. Three environments take part:

    python tests/golden/check_readers.py write FOLDER           # here: exports, and what we make of every request
    python tests/golden/check_readers.py paddleformers FOLDER   # pip install paddlepaddle==3.3.1 paddleformers==1.2.0 "pyarrow<26" pillow==13.0.0
    python tests/golden/check_readers.py transformers FOLDER    # pip install torch torchvision transformers==5.23.0 pillow==13.0.0

Requests: text, thinking, a system prompt, Chinese, a history, one and two pictures, a picture in the history (`export/prompts.py`).
PaddleFormers reads layout pt: its processor by AutoProcessor, its positions, its model. It has no CPU kernels for three things, for
which plain code stands in here, over its own gates and expert modules: dispatch to experts, attention of the tower, offloading.
Pillow's version matters: bicubic of 11.3 and 13.0 differ in some values by a level.
Legend: L tokens, P patches, C values per patch, V vocabulary.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

LAYOUTS = ("pt", "hf")
PIXELS = 12544  # the folder's upper limit, far below every reader's default


def write(folder: Path) -> None:
    """With ernie_tune: a model with fresh weights in both layouts, and per request the messages, pictures, ids, positions, pixels and logits."""
    import paddle
    from PIL import Image

    from ernie_tune import AutoModel, AutoProcessor
    from ernie_tune.export import prompts
    from ernie_tune.export.run import export
    from ernie_tune.models.inputs import pack

    folder.mkdir(parents=True, exist_ok=True)
    AutoModel.from_config("tiny-b", seed=1).save_pretrained(folder / "base")
    AutoProcessor.bundled("tiny", max_pixels=PIXELS).save_pretrained(folder / "base")
    for layout in LAYOUTS:
        export(folder / "base", folder / layout, layout=layout)
    processor, model = AutoProcessor.from_pretrained(folder / "pt"), AutoModel.from_pretrained(folder / "pt")
    model.eval()
    asked = []
    for i, request in enumerate((*prompts.TEXT, *prompts.MEDIA)):
        if request.clips:
            continue
        images = [prompts.picture(*size) for size in request.images]
        for j, image in enumerate(images):
            Image.fromarray(image).save(folder / f"{i}_{j}.png")
        row = processor.encode(request.messages, images, thinking=request.thinking, add_generation_prompt=True).row
        inputs = pack([row], processor.tokens)
        with paddle.no_grad():
            logits_LV = model.logits(model(inputs)).numpy()
        arrays: dict[str, Any] = {"ids": row.input_ids_L, "positions": inputs.position_ids_T3, "logits": logits_LV}
        if row.pixel_values_PC is not None:
            arrays |= {"pixels": row.pixel_values_PC, "grid": row.grid_thw_n3}
        np.savez(folder / f"{i}.npz", **arrays)
        asked.append(
            {
                "name": request.name,
                "file": i,
                "messages": request.messages,
                "thinking": request.thinking,
                "images": len(images),
            }
        )
    (folder / "requests.json").write_text(json.dumps(asked, ensure_ascii=False), encoding="utf-8")


def requests(folder: Path) -> Iterator[tuple[dict[str, Any], list[Any], dict[str, np.ndarray]]]:
    """(request, its pictures, what we make of it)."""
    from PIL import Image

    for one in json.loads((folder / "requests.json").read_text(encoding="utf-8")):
        images = [Image.open(folder / f"{one['file']}_{j}.png").convert("RGB") for j in range(one["images"])]
        yield one, images, dict(np.load(folder / f"{one['file']}.npz"))


def apart(a: Any, b: Any) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def transformers(folder: Path) -> None:
    """Layout hf: AutoProcessor's ids and pixels, and the model's logits."""
    import torch
    from transformers import AutoProcessor, Ernie4_5_VLMoeForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder / "hf", backend="pil")
    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        folder / "hf", attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    for one, images, ours in requests(folder):
        text = processor.apply_chat_template(
            one["messages"], add_generation_prompt=True, enable_thinking=one["thinking"]
        )
        made = processor(text=[text], images=images or None, return_tensors="pt")
        same = made["input_ids"][0].tolist() == ours["ids"].tolist()
        pixels = apart(made["pixel_values"], ours["pixels"]) if images else 0.0
        with torch.no_grad():
            logits = model.eval()(**made).logits[0].numpy()
        error = apart(logits, ours["logits"]) if same else float("nan")
        print(
            f"transformers: {one['name']}: ids {'equal' if same else 'DIFFER'}, pixels {pixels:.1e} apart, logits {error:.1e} apart"
        )


def paddleformers(folder: Path) -> None:
    """Layout pt: AutoProcessor's ids, positions and pixels, then the model."""
    from paddleformers.transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(str(folder / "pt"))
    print("AutoProcessor gives", type(processor).__name__)
    processor.image_max_pixels = PIXELS  # it takes limits from its caller alone
    made = {}
    for one, images, ours in requests(folder):
        text = processor.tokenizer.apply_chat_template(
            one["messages"], tokenize=False, add_generation_prompt=True, enable_thinking=one["thinking"]
        )
        out = processor(text=[text], images=images)
        same = out["input_ids"][0].tolist() == ours["ids"].tolist()
        positions = np.asarray(out["position_ids"])[0].tolist() == ours["positions"].tolist()
        pixels = apart(normalised(out["images"]), ours["pixels"]) if images else 0.0
        print(
            f"PaddleFormers: {one['name']}: ids {'equal' if same else 'DIFFER'}, positions {'equal' if positions else 'DIFFER'}, pixels {pixels:.1e} apart"
        )
        made[one["name"]] = out


def normalised(levels_PC: Any) -> np.ndarray:
    """Grey levels of patches -> what the tower gets, as PaddleFormers does on the device."""
    x = np.asarray(levels_PC, np.float32).reshape(len(levels_PC), 3, -1)
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None]
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None]
    return ((x * np.float32(1 / 255) - mean) / std).reshape(len(x), -1)


if __name__ == "__main__":
    {"write": write, "paddleformers": paddleformers, "transformers": transformers}[sys.argv[1]](Path(sys.argv[2]))

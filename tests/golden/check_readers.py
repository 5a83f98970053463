"""What PaddleFormers and transformers themselves make of our exports. Three environments take part:

    # here: exports, and what we make of every request
    python tests/golden/check_readers.py write FOLDER
    # pip install paddlepaddle==3.3.1 paddleformers==1.2.0 "pyarrow<26" pillow==13.0.0
    python tests/golden/check_readers.py paddleformers FOLDER
    # pip install torch torchvision transformers==5.23.0 pillow==13.0.0
    python tests/golden/check_readers.py transformers FOLDER

Requests: text, thinking, a system prompt, Chinese, a history, one and two pictures, a picture in
the history (`export/prompts.py`). PaddleFormers reads layout pt: its processor by AutoProcessor,
its positions, its model. It has no CPU kernels for three things, for which plain code stands in
here, over its own gates and expert modules: dispatch to experts, attention of the tower,
offloading. Pillow's version matters: bicubic of 11.3 and 13.0 differ in some values by a level.
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
    """With ernie_tune: a model with fresh weights in both layouts, and per request the messages,
    pictures, ids, positions, pixels and logits.
    """
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
    """Layout pt: AutoProcessor's ids, positions (and `get_rope_index`'s) and pixels, and what
    PaddleFormers' model makes of them.
    """
    import paddle
    from paddleformers.transformers import AutoProcessor

    processor, model = AutoProcessor.from_pretrained(str(folder / "pt")), paddleformers_model(folder / "pt")
    print("AutoProcessor gives", type(processor).__name__)
    processor.image_max_pixels = PIXELS  # it takes limits from its caller alone
    for one, images, ours in requests(folder):
        text = processor.tokenizer.apply_chat_template(
            one["messages"], tokenize=False, add_generation_prompt=True, enable_thinking=one["thinking"]
        )
        made = processor(text=[text], images=images)
        ids_L, types_L = made["input_ids"][0], made["token_type_ids"][0]
        same = ids_L.tolist() == ours["ids"].tolist()
        positions = np.asarray(made["position_ids"])[0].tolist() == ours["positions"].tolist()
        media: dict[str, Any] = {}
        pixels = 0.0
        if images:
            values_PC = normalised(made["images"])
            pixels = apart(values_PC, ours["pixels"])
            grids = np.asarray(made["grid_thw"]).reshape(-1, 3)
            kinds = paddle.zeros([len(grids)], "int64")
            rope, _ = model.get_rope_index(paddle.to_tensor(ids_L[None]), image_grid_thw=paddle.to_tensor(grids))
            positions = positions and rope.numpy()[:, 0].T.tolist() == ours["positions"].tolist()
            media = {
                "images": paddle.to_tensor(values_PC),
                "grid_thw": paddle.to_tensor(grids),
                "image_type_ids": kinds,
            }
        types_L = np.append(types_L, 0)  # the model shifts them by one
        with paddle.no_grad():
            out = model(
                input_ids=paddle.to_tensor(ids_L[None]),
                position_ids=paddle.to_tensor(np.asarray(made["position_ids"])),
                token_type_ids=paddle.to_tensor(types_L[None]),
                return_dict=True,
                use_cache=False,
                **media,
            )
        logits_LV = out.logits.numpy().reshape(len(ids_L), -1)
        error = apart(logits_LV, ours["logits"]) if same else float("nan")
        print(
            f"PaddleFormers: {one['name']}: ids {'equal' if same else 'DIFFER'}, positions {'equal' if positions else 'DIFFER'}, "
            f"pixels {pixels:.1e} apart, logits {error:.1e} apart"
        )


def paddleformers_model(folder: Path) -> Any:
    """Its model with our weights, in float32, with plain code where it has no kernels for a CPU."""
    import types

    import paddle
    from paddle.nn import functional as F
    from paddleformers.transformers import AutoConfig
    from paddleformers.transformers.ernie4_5_moe_vl.model import modeling_moe, modeling_moe_vl
    from paddleformers.transformers.ernie4_5_moe_vl.model.dfnrope import modeling as tower
    from paddleformers.transformers.ernie4_5_moe_vl.model.moe.moe_all_gather_layer import MOEAllGatherLayerV2

    config = AutoConfig.from_pretrained(str(folder))
    config.tensor_model_parallel_size = 1
    model = modeling_moe_vl.Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        str(folder), config=config, convert_from_hf=True, dtype="float32", load_checkpoint_format="flex_checkpoint"
    )

    def attend(
        self: Any, hidden_PC: Any, startend_row_indices: Any, rotary_pos_emb: Any = None, attn_sep: bool = False
    ) -> Any:
        count = hidden_PC.shape[0]
        q, k, v = self.qkv(hidden_PC).reshape([count, 3, self.num_heads, -1]).transpose([1, 0, 2, 3]).unbind(0)
        q, k = (tower.apply_rotary_pos_emb_vision(x.unsqueeze(0), rotary_pos_emb).squeeze(0) for x in (q, k))
        q, k, v = (x.transpose([1, 0, 2]) for x in (q, k, v))
        end_P = startend_row_indices[0, 0, :, 0]  # patches of one frame end together
        scores = paddle.matmul(q, k, transpose_y=True) / q.shape[-1] ** 0.5
        scores = paddle.where(
            (end_P.unsqueeze(0) == end_P.unsqueeze(1)).unsqueeze(0), scores, paddle.full_like(scores, -1e30)
        )
        return self.proj(paddle.matmul(F.softmax(scores, -1), v).transpose([1, 0, 2]).reshape([count, -1]))

    def route(self: Any, hidden: Any, token_type_ids: Any = None, use_dense_expert: bool = False) -> Any:
        x = hidden.reshape([-1, hidden.shape[-1]])
        kinds_L, count = token_type_ids[:, :-1].reshape([-1]).numpy(), len(self.experts) // 2
        out = np.zeros(x.shape, np.float32)
        for kind, gate in enumerate((self.gate.weight, self.gate.weight_1)):
            rows = np.flatnonzero(kinds_L == kind)
            if not len(rows):
                continue
            mine = x[paddle.to_tensor(rows)]
            p = F.softmax(paddle.matmul(mine, gate), -1).numpy()
            biased = p + self.moe_statics.e_score_correction_bias.numpy()[kind]
            best = np.argsort(-biased, -1, kind="stable")[:, : self.k]
            weights = np.take_along_axis(p, best, -1)
            weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-12)
            for e in range(count):
                r, c = np.nonzero(best == e)
                if len(r):
                    out[rows[r]] += (
                        weights[r, c][:, None] * self.experts[kind * count + e](mine[paddle.to_tensor(r)]).numpy()
                    )
        y = paddle.to_tensor(out)
        y = y if self.shared_experts is None else y + self.shared_experts(x)
        return y.reshape(hidden.shape), None, paddle.zeros([]), None

    # without its assertion of bfloat16
    def look(self: Any, images: Any, _ids: Any, _mask: Any, grid_thw: Any) -> Any:
        frames = paddle.repeat_interleave(grid_thw[:, 1:], grid_thw[:, 0], 0)
        return self.vision_model.extract_feature(images, F.pad(frames, [0, 0, 1, 0], value=1))

    tower.VisionFlashAttention2.forward = attend
    MOEAllGatherLayerV2.forward = route
    modeling_moe.get_async_loader = lambda: None
    modeling_moe.async_offload = lambda x, loader: (True, None)
    model.vision_forward = types.MethodType(look, model)
    for layer in model.sublayers():
        for owner in (layer, getattr(layer, "config", None)):
            if hasattr(owner, "fuse_rms_norm"):
                owner.fuse_rms_norm = False
    model.eval()
    return model


def normalised(levels_PC: Any) -> np.ndarray:
    """Grey levels of patches -> what the tower gets, as PaddleFormers does on the device."""
    x = np.asarray(levels_PC, np.float32).reshape(len(levels_PC), 3, -1)
    mean = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)[:, None]
    std = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)[:, None]
    return ((x * np.float32(1 / 255) - mean) / std).reshape(len(x), -1)


if __name__ == "__main__":
    {"write": write, "paddleformers": paddleformers, "transformers": transformers}[sys.argv[1]](Path(sys.argv[2]))

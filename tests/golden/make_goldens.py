"""Write the golden values of the tests: `python tests/golden/make_goldens.py [tiny-b] [tiny-c]
[units]`, all three without arguments.

Needs torch and transformers at the versions of README.md, and this package on the path; the tests
that read the files need neither.
Legend: T tokens of a case, L tokens of a row, H hidden, V vocabulary, E experts, N visual features,
P patches.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from hf_model import all_float64, build, hf_config, hf_inputs, hf_name, modeling, swap_layout
from PIL import Image
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
    smart_resize,
)
from weights import case_rows, golden_config, golden_image, golden_pixels, hashed, normal, sample_indices, summary

from ernie_tune.models.config import ModelConfig, TokenIds
from ernie_tune.models.inputs import Row, feature_count
from ernie_tune.models.presets import preset
from ernie_tune.models.specs import parameter_specs

Arrays = dict[str, np.ndarray]
Model = modeling.Ernie4_5_VLMoeForConditionalGeneration

# A case is rows, a row is items: a number of text tokens, or the grid (frames, patch rows, patch
# columns) of an image or a video.
# No video has more frame pairs than rows or columns: there transformers counts positions
# differently (see `t_dominant`).
IMAGE, TALL, SMALL, VIDEO, WIDE_VIDEO = (1, 4, 6), (1, 6, 4), (1, 4, 4), (4, 4, 4), (4, 4, 6)
CASES: dict[str, list[list[int | tuple[int, int, int]]]] = {
    "text": [[12]],
    "image": [[4, IMAGE, 5]],
    "two_images": [[2, IMAGE, 3, SMALL, 4]],
    "video": [[3, VIDEO, 5]],
    "mixed": [[3, IMAGE, 2, VIDEO, 1, TALL, 3]],
    "packed": [[7], [2, TALL, 4], [3, WIDE_VIDEO, 2, SMALL, 3]],
}
PROMPTS = ("text", "image", "video")
NEW_TOKENS = 16
IGNORED = -100


def row_ids(name: str, items: list[int | tuple[int, int, int]], tokens: TokenIds) -> np.ndarray:
    """Token ids [L]: random text below the special ids, markers around placeholders."""
    text = iter((hashed(f"ids of {name}", 64) % np.uint64(tokens.image_start - 10) + np.uint64(10)).tolist())
    ids: list[int] = []
    for item in items:
        if isinstance(item, int):
            ids += [next(text) for _ in range(item)]
        elif item[0] == 1:
            ids += [tokens.image_start, *[tokens.image] * feature_count(item), tokens.image_end]
        else:
            ids += [tokens.video_start, *[tokens.video] * feature_count(item), tokens.video_end]
    return np.array(ids, np.int64)


def case_inputs(case: str, tokens: TokenIds) -> Arrays:
    """The rows of a case end to end; `labels` are aligned with the ids, `targets` are one step
    ahead within their row.
    """
    rows = [row_ids(f"{case} {i}", items, tokens) for i, items in enumerate(CASES[case])]
    labels = [np.where(np.isin(row, tokens.placeholders()), IGNORED, row) for row in rows]
    grids = [(i, grid) for i, items in enumerate(CASES[case]) for grid in items if not isinstance(grid, int)]
    return {
        "input_ids": np.concatenate(rows),
        "labels": np.concatenate(labels),
        "targets": np.concatenate([np.append(row[1:], IGNORED) for row in labels]),
        "offsets": np.cumsum([0, *(len(row) for row in rows)]),
        "grid_thw": np.array([grid for _, grid in grids], np.int64).reshape(-1, 3),
        "grid_row": np.array([i for i, _ in grids], np.int64),
    }


class Recorder:
    """Hooks that keep what a forward computes on its way: positions, features, hidden states,
    router logits.
    """

    def __init__(self, model: Model) -> None:
        self.seen: dict[str, list[torch.Tensor]] = defaultdict(list)
        language, core = model.model.language_model, model.model
        self._hooks = [language.rotary_emb.register_forward_pre_hook(lambda _, args: self._keep("positions", args[1]))]
        self._hooks += [core.resampler_model.register_forward_hook(lambda _, args, out: self._keep("features", out))]
        self._hooks += [language.layers[0].register_forward_pre_hook(lambda _, args: self._keep("hidden", args[0][0]))]
        for layer in language.layers:
            self._hooks += [layer.register_forward_hook(lambda _, args, out: self._keep("hidden", out[0]))]
            if isinstance(layer.mlp, modeling.Ernie4_5_VLMoeMoeBlock):
                self._hooks += [layer.mlp.register_forward_hook(lambda _, args, out: self._keep("router", out[1]))]

    def _keep(self, what: str, value: torch.Tensor) -> None:
        self.seen[what].append(value.detach().clone())

    def __enter__(self) -> dict[str, list[torch.Tensor]]:
        return self.seen

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def features_in_order(row: Row, seen: list[torch.Tensor]) -> list[np.ndarray]:
    """transformers runs a row's images and then its videos: back to the order of appearance."""
    if row.grid_thw_n3 is None:
        return []
    pending = torch.cat(seen)
    found: dict[int, torch.Tensor] = {}
    for i in sorted(range(len(row.grid_thw_n3)), key=lambda i: row.grid_thw_n3[i, 0] > 1):
        found[i], pending = pending.split([n := feature_count(row.grid_thw_n3[i]), len(pending) - n])
    return [found[i].numpy() for i in range(len(row.grid_thw_n3))]


def router_margin(logits: torch.Tensor, routing: torch.Tensor, block: torch.nn.Module) -> float:
    """The least distance between the last chosen and the first rejected expert over all tokens,
    with the bias (routing) and without (aux loss).
    """
    bias = torch.cat([moe.gate.moe_statics.e_score_correction_bias for moe in (block.text_moe, block.vision_moe)])
    scores = logits.softmax(-1)
    best = torch.cat([scores + bias[routing], scores]).topk(block.text_moe.gate.top_k + 1).values
    return float((best[:, -2] - best[:, -1]).min())


def run_case(model: Model, config: ModelConfig, case: str) -> Arrays:
    """One forward and backward of a case, row by row as transformers has no packing: the loss is
    the mean over the targets of all rows.
    """
    arrays = case_inputs(case, config.tokens)
    rows = case_rows({f"{case}/{key}": value for key, value in arrays.items()}, case)
    labels = np.split(arrays["labels"], arrays["offsets"][1:-1])
    count = int((arrays["targets"] != IGNORED).sum())
    kept: dict[str, list[np.ndarray]] = defaultdict(list)
    routers, loss = [], torch.zeros((), dtype=torch.float64)
    model.zero_grad(set_to_none=True)
    for row, row_labels in zip(rows, labels, strict=True):
        inputs = hf_inputs(row, config, torch.float64)
        with Recorder(model) as seen:
            out = model(**inputs, labels=torch.tensor(row_labels)[None], use_cache=False)
        loss = loss + out.loss * int((row_labels[1:] != IGNORED).sum()) / count
        kept["logits"].append(out.logits[0].detach().numpy())
        kept["position_ids"].append(seen["positions"][0][:, 0].T.numpy())
        kept["features"] += features_in_order(row, seen["features"])
        kept["hidden_states"].append(torch.stack(seen["hidden"]).numpy())
        routers.append(torch.stack(seen["router"]))
        blocks = [
            layer.mlp
            for layer in model.model.language_model.layers
            if isinstance(layer.mlp, modeling.Ernie4_5_VLMoeMoeBlock)
        ]
        routing = inputs["moe_mm_token_type_ids"][0].clamp(max=1)
        kept["margin"] += [
            np.array(router_margin(logits, routing, block))
            for logits, block in zip(seen["router"], blocks, strict=True)
        ]
    loss.backward()
    router_logits = torch.cat(routers, 1)
    arrays["position_ids"] = np.concatenate(kept["position_ids"])
    arrays["logits"] = np.concatenate(kept["logits"]).astype(np.float32)
    arrays["features"] = np.concatenate([*kept["features"], np.zeros((0, config.hidden_size))]).astype(np.float32)
    arrays["loss"] = loss.detach().numpy()
    arrays["aux_loss"] = modeling.load_balancing_loss_func(
        tuple(router_logits), config.moe.num_experts, config.moe.top_k
    ).numpy()
    arrays["router_margin"] = np.min(kept["margin"])
    assert arrays["router_margin"] > 3e-5, (
        f"{case}: an expert is chosen by {arrays['router_margin']} only, float32 may choose another"
    )
    arrays["grad_summary"], arrays["grad_samples"] = gradients(model, config)
    if case == "mixed":
        arrays["hidden_states"] = np.concatenate(kept["hidden_states"], 1).astype(np.float32)
        arrays["router_logits"] = router_logits.numpy().astype(np.float32)
    return arrays


def trainable_names(config: ModelConfig) -> list[str]:
    return [name for name, spec in parameter_specs(config).items() if spec.trainable]


def gradients(model: Model, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """`summary` and 32 samples of the gradient of every trainable parameter in its canonical
    layout; zero where none flows.
    """
    parameters, specs = dict(model.named_parameters()), parameter_specs(config)
    summaries, samples = [], []
    for name in trainable_names(config):
        parameter = parameters[hf_name(name)]
        grad = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        grad = swap_layout(name, grad)
        assert grad.shape == specs[name].shape, f"{name}: gradient {grad.shape}, parameter {specs[name].shape}"
        summaries.append(summary(name, grad))
        samples.append(grad.reshape(-1)[sample_indices(name, grad.size)])
    return np.stack(summaries), np.stack(samples)


def check_padding(model: Model, config: ModelConfig) -> None:
    """transformers' own left- and right-padded batches give the logits of the single rows: what
    packing has to match.
    """
    arrays = {f"packed/{key}": value for key, value in case_inputs("packed", config.tokens).items()}
    rows = [hf_inputs(row, config, torch.float64) for row in case_rows(arrays, "packed")]
    longest = max(row["input_ids"].shape[1] for row in rows)
    pixels = {
        key: torch.cat([row[key] for row in rows if key in row])
        for key in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
    }
    for side in ("left", "right"):

        def padded(values_1L: torch.Tensor, side: str = side) -> torch.Tensor:
            missing = longest - values_1L.shape[1]
            return torch.nn.functional.pad(values_1L, (missing, 0) if side == "left" else (0, missing))

        batch = {
            key: torch.cat([padded(row[key]) for row in rows])
            for key in ("input_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
        }
        mask = torch.cat([padded(torch.ones_like(row["input_ids"])) for row in rows])
        with torch.no_grad():
            found = model(**batch, **pixels, attention_mask=mask).logits
            expected = torch.cat([model(**row).logits[0] for row in rows])
        error = float((found[mask.bool()] - expected).abs().max())
        assert error < 1e-9, f"{side} padding changes the logits by {error}"


@torch.no_grad()
def generate(model: Model, config: ModelConfig, case: str) -> Arrays:
    """Greedy continuation of a case with the cache, and how far the best token is ahead of the
    second at each step.
    """
    row = case_rows({f"{case}/{key}": value for key, value in case_inputs(case, config.tokens).items()}, case)[0]
    inputs = hf_inputs(row, config, torch.float64)
    out = model.generate(
        **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    longer = dict(inputs, input_ids=out.sequences)
    for key in ("mm_token_type_ids", "moe_mm_token_type_ids"):
        longer[key] = torch.nn.functional.pad(inputs[key], (0, NEW_TOKENS))
    uncached = model(**longer, use_cache=False).logits[0, -NEW_TOKENS - 1 : -1].argmax(-1)
    assert uncached.equal(new[0]), "cached and uncached greedy tokens differ"
    best = torch.cat(out.logits).topk(2).values
    return {"tokens": new[0].numpy(), "margin": (best[:, 0] - best[:, 1]).numpy()}


@torch.no_grad()
def bfloat16_logits(config: ModelConfig, case: str) -> np.ndarray:
    row = case_rows({f"{case}/{key}": value for key, value in case_inputs(case, config.tokens).items()}, case)[0]
    return build(config, torch.bfloat16)(**hf_inputs(row, config, torch.bfloat16)).logits[0].float().numpy()


def model_goldens(name: str) -> Arrays:
    """Everything of one preset: `<case>/<array>`, and the order of the gradients."""
    config = golden_config(name)
    arrays: Arrays = {"trainable_names": np.array(trainable_names(config))}
    with all_float64():
        model = build(config, torch.float64)
        for case in CASES:
            arrays |= {f"{case}/{key}": value for key, value in run_case(model, config, case).items()}
        check_padding(model, config)
        if name == "tiny-b":
            for case in PROMPTS:
                arrays |= {f"{case}/generated_{key}": value for key, value in generate(model, config, case).items()}
    if name == "tiny-b":
        arrays["mixed/logits_bfloat16"] = bfloat16_logits(config, "mixed")
    return arrays


def rms_norm() -> Arrays:
    """bfloat16 bits (uint16) through transformers' RMSNorm: the order of cast and multiplication
    shows in the last bit.
    """
    x = (3 * torch.tensor(normal("rms_norm input", (8, 160)))).bfloat16()
    norm = modeling.Ernie4_5_VLMoeRMSNorm(160, eps=1e-5)
    norm.weight.data = torch.tensor(1 + 0.2 * normal("rms_norm weight", (160,))).bfloat16()
    found = {"input": x, "weight": norm.weight.data, "output": norm(x).detach()}
    return {f"rms_norm/{key}": value.view(torch.int16).numpy().view(np.uint16) for key, value in found.items()}


def text_rope() -> Arrays:
    """cos and sin of the 28B model's decoder, [n, 128]: each angle stands twice, for the two
    members of its adjacent pair.
    """
    positions_n3 = np.array([[0, 0, 0], [7, 3, 5], [9, 9, 9], [63, 40, 21], [300, 128, 77]])
    rope = modeling.Ernie4_5_VLMoeTextRotaryEmbedding(hf_config(preset("ernie-4.5-vl-28b-a3b")).text_config)
    cos, sin = rope(torch.zeros(1), torch.tensor(positions_n3.T[:, None]))
    return {"text_rope/positions": positions_n3, "text_rope/cos": cos[0].numpy(), "text_rope/sin": sin[0].numpy()}


def vision_tower(model: Model) -> Arrays:
    """The tiny-b tower on two images of different size, after every step, and its rope [P, head
    width]: row and column angles, then both again.
    """
    grid_n3 = np.array([[1, 4, 6], [1, 6, 8]])
    tower, steps = model.model.vision_tower, []
    modules = [tower.patch_embed, *tower.blocks, tower.ln]
    hooks = [module.register_forward_hook(lambda _, args, out: steps.append(out)) for module in modules]
    hooks.append(tower.rotary_pos_emb.register_forward_hook(lambda _, args, out: steps.extend(out)))
    pixels = torch.tensor(golden_pixels("vision", int(grid_n3.prod(1).sum()))).double()
    with torch.no_grad():
        tower(pixels, torch.tensor(grid_n3))
    for hook in hooks:
        hook.remove()
    names = ["patch_embed", "rope_cos", "rope_sin", *[f"block_{i}" for i in range(len(tower.blocks))], "output"]
    arrays = {f"vision/{name}": step.numpy().astype(np.float32) for name, step in zip(names, steps, strict=True)}
    return {"vision/grid_thw": grid_n3, **arrays}


def t_dominant(model: Model, config: ModelConfig) -> Arrays:
    """Positions of a video with more frame pairs than rows and columns, by transformers' rule."""
    row = Row(
        row_ids("t_dominant", [3, (12, 4, 4), 3], config.tokens),
        np.zeros((192, 588), np.float32),
        np.array([[12, 4, 4]]),
    )
    inputs = hf_inputs(row, config, torch.float64)
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )
    return {
        "t_dominant/input_ids": row.input_ids_L,
        "t_dominant/grid_thw": row.grid_thw_n3,
        "t_dominant/position_ids": positions[:, 0].T.numpy(),
    }


def images() -> Arrays:
    """transformers' Pillow image processor on `golden_image`s, and its smart_resize: rows of
    height, width, min and max pixels, the two results.
    """
    arrays: Arrays = {}
    for height, width, max_pixels in (
        (60, 83, 28 * 28 * 6177),
        (203, 317, 28 * 28 * 6177),
        (40, 30, 28 * 28 * 6177),
        (300, 420, 50_000),
    ):
        processor = Ernie4_5_VLMoeImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": max_pixels})
        out = processor(images=[Image.fromarray(golden_image(height, width))], return_tensors="np")
        name, pixels = f"image_{height}x{width}", np.asarray(out["pixel_values"], np.float32)
        arrays[f"{name}/max_pixels"], arrays[f"{name}/grid_thw"] = np.array(max_pixels), out["image_grid_thw"]
        arrays[f"{name}/summary"], arrays[f"{name}/samples"] = (
            summary(name, pixels),
            pixels.reshape(-1)[sample_indices(name, pixels.size, 512)],
        )
    sizes = (
        (28, 28),
        (56, 56),
        (1, 1),
        (203, 317),
        (480, 640),
        (1080, 1920),
        (4000, 6000),
        (3000, 20),
        (42, 70),
        (70, 42),
        (98, 126),
        (5, 7),
        (2160, 3840),
    )
    limits = ((3136, 4_842_768), (3136, 4_816_896), (234_416, 937_664))
    arrays["smart_resize"] = np.array(
        [(h, w, *limit, *smart_resize(h, w, 28, *limit)) for h, w in sizes for limit in limits]
    )
    arrays["smart_resize_hf_only"] = np.array([(10, 100, *limits[0], *smart_resize(10, 100, 28, *limits[0]))])
    return arrays


def unit_goldens() -> Arrays:
    """Parts of the model and of the processors by themselves."""
    config = golden_config("tiny-b")
    arrays = rms_norm() | images()
    with all_float64():
        model = build(config, torch.float64)
        return arrays | text_rope() | vision_tower(model) | t_dominant(model, config)


def main() -> None:
    folder = Path(__file__).parent
    for name in sys.argv[1:] or ("tiny-b", "tiny-c", "units"):
        arrays = unit_goldens() if name == "units" else model_goldens(name)
        path = folder / f"{name.replace('-', '_')}.npz"
        np.savez_compressed(path, **arrays)
        margins = {key: float(value.min()) for key, value in arrays.items() if "margin" in key}
        print(f"{path.name}: {len(arrays)} arrays, {path.stat().st_size / 1e6:.2f} MB; least margins {margins}")


if __name__ == "__main__":
    main()

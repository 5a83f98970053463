"""A rehearsal at the real size: the verbs that a user of the 28B types, on a folder of its true
shapes, with the memory and the time that each takes.

usage: python tests/bench/bench_real_size.py FOLDER [--layers 28] [--drawn 0,1] [--tokens 128,512]
                                             [--steps 3] [--only make,train,export,packed]

FOLDER gets `model/` (bfloat16, the paddle layout; layers in --drawn have random values, the others
are holes of the file and take no disk), rows, runs and the packed folder. With --layers 28 a disk
holds the drawn layers alone, 2 GB each; fewer layers make a slice for smaller machines.
Every verb is a process of its own. `anonymous`: its largest memory that is no mapped file;
`resident`: mapped pages counted too, which the system takes back when others need them. A step's
time stands beside the time that its products take on this machine in float32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PRESET = "ernie-4.5-vl-28b-a3b"
GB = 1e9
_STEP = re.compile(r"^\[\S+ (\d+):(\d+):([\d,]+)\].*loss: [\d.]+.*global_step: (\d+)", re.MULTILINE)
RUN = {"fine_tuning": "LoRA", "lora_rank": 16, "lora_target_modules": "attention", "learning_rate": 1e-4}
QUIET = {"plot_loss": False, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "recompute": True}


@dataclass
class Measured:
    """One process: seconds until it ended, the largest memory in bytes, and what it printed."""

    seconds: float
    anonymous: int
    resident: int
    output: str

    def steps(self) -> list[float]:
        """Seconds between the lines of successive steps."""
        found = [int(h) * 3600 + int(m) * 60 + float(s.replace(",", ".")) for h, m, s, _ in _STEP.findall(self.output)]
        return [b - a for a, b in itertools.pairwise(found)]


def shape_of(layers: int) -> Any:
    """The released shape, cut to its first layers, with token numbers of the bundled tokenizer."""
    import dataclasses

    from ernie_tune.models.presets import preset

    config = preset(PRESET)
    if config.moe is None:
        raise AssertionError("the released shape has experts")
    kept = tuple(i for i in config.moe.layer_indices if i < layers)
    moe = dataclasses.replace(config.moe, layer_indices=kept)
    return config.replace(num_hidden_layers=layers, moe=moe, tokens=preset("small").tokens)


def make(folder: Path, layers: int, drawn: set[int]) -> None:
    """The model's folder: one file, holes where nothing was drawn."""
    from ernie_tune.checkpoint.names import FLAVOURS, layout
    from ernie_tune.checkpoint.tensors import NUMPY_TYPES
    from ernie_tune.data.processor import Processor
    from ernie_tune.models.config_dialects import write_config

    config = shape_of(layers)
    table = layout(config, "paddle")
    folder.mkdir(parents=True)
    header: dict[str, Any] = {"__metadata__": {"format": "np"}}
    at = 0
    for name, spec in table.disk.items():
        code = "F32" if spec.float32 else "BF16"
        size = spec.size * NUMPY_TYPES[code].itemsize
        header[name] = {"dtype": code, "shape": list(spec.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = (np.random.default_rng(0).standard_normal(1 << 22) * 0.02).astype(np.float32)
    halves = (block.view(np.uint32) >> 16).astype(np.uint16)  # bfloat16, cut
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        file.truncate(begin + at)
        for name, entry in header.items():
            if name == "__metadata__" or not _is_drawn(name, drawn):
                continue
            values = block if entry["dtype"] == "F32" else halves
            file.seek(begin + entry["data_offsets"][0])
            left = entry["data_offsets"][1] - entry["data_offsets"][0]
            while left:
                left -= file.write(values.tobytes()[:left])
    (folder / "config.json").write_text(json.dumps(write_config(config, FLAVOURS["paddle"].dialect), indent=2))
    Processor.bundled("small").save_pretrained(folder)


def _is_drawn(name: str, drawn: set[int]) -> bool:
    layer = re.search(r"layers\.(\d+)\.", name)
    return layer is None or int(layer.group(1)) in drawn


def write_rows(path: Path, tokens: int, count: int = 4) -> None:
    """Rows of about so many tokens, a third of them a picture of 256."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    picture = path.with_suffix(".png")
    pixels = np.random.default_rng(1).integers(0, 255, (448, 448, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    words = np.random.default_rng(2)
    with path.open("w") as file:
        for _ in range(count):
            shown = tokens > 300
            text = " ".join(str(n) for n in words.integers(0, 10, max(8, (tokens - (300 if shown else 40)) * 2 // 5)))
            user: dict[str, Any] = {"role": "user", "content": ("<image>" if shown else "") + text}
            row: dict[str, Any] = {"messages": [user, {"role": "assistant", "content": text[: len(text) // 4]}]}
            if shown:
                row["images"] = [picture.name]
            file.write(json.dumps(row) + "\n")


def verb(*words: object) -> Measured:
    """`ernie-tune` with these words, watched."""
    command = [sys.executable, "-W", "ignore", "-m", "ernie_tune", *map(str, words)]
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        anonymous, resident = 0, 0
        while process.poll() is None:
            now = dict(_memory(process.pid))
            anonymous, resident = max(anonymous, now.get("RssAnon", 0)), max(resident, now.get("VmHWM", 0))
            time.sleep(0.05)
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        print(text[-3000:], file=sys.stderr)
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Measured(time.perf_counter() - started, anonymous, resident, text)


def _memory(pid: int) -> Iterator[tuple[str, int]]:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            key, _, value = line.partition(":")
            if key in ("RssAnon", "VmHWM"):
                yield key, int(value.split()[0]) * 1024
    except (OSError, IndexError):
        return


def product_rate() -> float:
    """Float32 operations a second of a large product, in the best of five."""
    import paddle

    a = paddle.randn([2048, 2048])
    best = 9.0
    for _ in range(5):
        start = time.perf_counter()
        paddle.matmul(a, a).numpy()
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def products_seconds(layers: int, tokens: int, rate: float) -> float:
    """Of a LoRA step with recompute: forward twice and back to the inputs once."""
    from ernie_tune.models.presets import preset
    from ernie_tune.plan.job import Job
    from ernie_tune.plan.weights import active_values

    job = Job(shape_of(layers), PRESET, row_tokens=tokens)
    visual = 256 if tokens > 300 else 0
    head = preset(PRESET).vocab_size * job.model.hidden_size
    active = (tokens - visual) * (active_values(job.model, False) + head) + visual * active_values(job.model, True)
    return 2 * 3 * active / rate


def estimated(yaml: Path) -> float:
    """Bytes that `ernie-tune estimate` says."""
    command = [sys.executable, "-W", "ignore", "-m", "ernie_tune", "estimate", str(yaml), "card=cpu-24g", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return float(json.loads(done.stdout)["total_bytes_per_card"])


def report(what: str, m: Measured, told: float | None = None, products: float | None = None) -> None:
    steps = m.steps()
    line = f"{what:<34}{m.seconds:>8.1f} s {m.anonymous / GB:>7.2f} GB anonymous {m.resident / GB:>7.2f} GB resident"
    if told is not None:
        line += f" {told / GB:>7.2f} GB estimated ({m.resident / told - 1:+.0%})"
    if steps:
        line += f"   step {min(steps):.2f} s"
    if steps and products:
        line += f", products {products:.2f} s ({min(steps) / products:.1f} x)"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--drawn", default="0,1")
    parser.add_argument("--tokens", default="128,512")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", default="make,train,export,packed")
    a = parser.parse_args()
    phases, root = a.only.split(","), a.folder
    model, packed = root / "model", root / "packed"
    if "make" in phases and not model.exists():
        make(model, a.layers, {int(i) for i in a.drawn.split(",")})
        held = sum(p.stat().st_blocks * 512 for p in model.iterdir())
        whole = sum(p.stat().st_size for p in model.iterdir())
        print(f"{model}: {whole / GB:.1f} GB, {held / GB:.1f} GB of disk", flush=True)
    rate = product_rate()
    print(f"float32 products here: {rate / GB:.0f} GFLOP/s", flush=True)
    settings = {
        **RUN,
        **QUIET,
        "max_steps": a.steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
    }
    bases = {"train": (model, {"weight_quantize_algo": "weight_only_mix"}), "packed": (packed, {})}
    if "export" in phases:
        done = verb(
            "export",
            model,
            "--output_dir",
            packed,
            "--quantization",
            "wint4",
            "--method",
            "rtn",
            "--emit",
            "packed",
            "--verify",
            "files",
        )
        size = sum(p.stat().st_size for p in packed.iterdir())
        report(f"export packed, {size / GB:.1f} GB", done)
    for phase, (base, extra) in bases.items():
        if phase not in phases:
            continue
        for tokens in map(int, a.tokens.split(",")):
            rows = root / f"rows_{tokens}.jsonl"
            write_rows(rows, tokens)
            out = root / f"run_{phase}_{tokens}"
            words = {
                **settings,
                **extra,
                "model_name_or_path": base,
                "train_dataset_path": rows,
                "max_seq_len": tokens + 64,
                "output_dir": out,
            }
            yaml = root / f"{phase}_{tokens}.yaml"
            yaml.write_text("".join(f"{k}: {json.dumps(v, default=str)}\n" for k, v in words.items()))
            done = verb("train", yaml)
            told = estimated(yaml)
            report(f"{phase} {tokens} tokens", done, told, products_seconds(a.layers, tokens, rate))


if __name__ == "__main__":
    main()

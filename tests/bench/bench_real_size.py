"""A rehearsal at the real size: the verbs that a user of the 28B types, on a folder of its true
shapes, with the memory and the time that each takes.

usage: python tests/bench/bench_real_size.py FOLDER [--preset ernie-4.5-vl-28b-a3b] [--layers 28]
           [--drawn 0,1] [--layout paddle] [--tokens 128,512] [--steps 3]
           [--only make,train,export,packed,resume,eval,merge,serve,equal]

FOLDER gets `model/` (bfloat16, the layout of the Paddle release or with `--layout hf` of the other;
random values, but for the experts of layers that are not in --drawn, which are holes of the file
and take no disk), rows, runs and the packed folder. Experts take 2 GB a drawn layer; fewer layers
make a slice for smaller machines, and `--preset ernie-4.5-vl-424b-a47b --layers 4` one of the
larger model, 9 GB a routing layer. `resume`, `eval` and `merge` go on from what `packed` left,
`serve` from the packed folder. `equal` makes a slice of two layers of its own, trains ten steps on
its codes and ten on the float model that has its rounded weights, and compares their losses.
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
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

RELEASED = "ernie-4.5-vl-28b-a3b"
GB = 1e9
_KEPT = re.compile(r"not run again for \d+ tokens, whose activations \(([\d.]+) GB\)")
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
    started: float  # seconds of the day

    def _lines(self) -> list[float]:
        """When each step's line was written, in seconds of the day."""
        return [int(h) * 3600 + int(m) * 60 + float(s.replace(",", ".")) for h, m, s, _ in _STEP.findall(self.output)]

    def steps(self) -> list[float]:
        """Seconds between the lines of successive steps."""
        return [b - a for a, b in itertools.pairwise(self._lines())]

    def first_step(self) -> float | None:
        """Seconds from the command to the line of the first step."""
        return next((at - self.started for at in self._lines()), None)

    def kept_bytes(self) -> float:
        """Of activations that layers kept instead of being run again, as the run said."""
        found = _KEPT.search(self.output)
        return float(found[1]) * GB if found else 0.0


def shape_of(preset_name: str, layers: int) -> Any:
    """The released shape, cut to its first layers, with token numbers of the bundled tokenizer."""
    import dataclasses

    from ernie_tune.models.presets import preset

    config = preset(preset_name)
    if config.moe is None:
        raise AssertionError("the released shape has experts")
    kept = tuple(i for i in config.moe.layer_indices if i < layers)
    moe = dataclasses.replace(config.moe, layer_indices=kept)
    return config.replace(num_hidden_layers=layers, moe=moe, tokens=preset("small").tokens)


def make(folder: Path, config: Any, drawn: set[int], flavour: str = "paddle") -> None:
    """The model's folder: one file, holes where nothing was drawn."""
    from ernie_tune.checkpoint.names import FLAVOURS, layout
    from ernie_tune.checkpoint.tensors import NUMPY_TYPES
    from ernie_tune.data.processor import Processor
    from ernie_tune.models.config_dialects import write_config

    table = layout(config, flavour)
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
            if "norm" in name and len(entry["shape"]) == 1:
                values = np.full(left // values.itemsize, 1.0 if entry["dtype"] == "F32" else 0x3F80, values.dtype)
            while left:
                left -= file.write(values.tobytes()[:left])
    (folder / "config.json").write_text(json.dumps(write_config(config, FLAVOURS[flavour].dialect), indent=2))
    Processor.bundled("small").save_pretrained(folder)


def _is_drawn(name: str, drawn: set[int]) -> bool:
    """Holes are the experts of other layers, so that their routers deal tokens to all of them, the
    routers' biases, and what dense layers beyond the first have in the experts' place.
    """
    layer = re.search(r"layers\.(\d+)\.", name)
    dense = re.search(r"\.mlp\.(gate|up|up_gate|down)_proj\.", name) and layer is not None and int(layer.group(1)) > 0
    held = layer is None or int(layer.group(1)) in drawn or not (".mlp.experts." in name or dense)
    return held and "e_score_correction_bias" not in name


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


def longest(rows: Path) -> int:
    """Tokens of the longest row, so that an estimate counts what is there."""
    from ernie_tune.data.processor import Processor

    processor = Processor.bundled("small")
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    return max(
        processor.measure(row["messages"], [str(rows.parent / name) for name in row.get("images", ())])[0]
        for row in read
    )


def codes_bytes(folder: Path) -> float:
    """Of a packed folder's codes, and of scales that are used where they lie: pages of its files,
    which are no memory of the process.
    """
    from ernie_tune.checkpoint.tensors import TensorReader

    entries = TensorReader(folder).entries.items()
    return sum(
        float(e.nbytes) for n, e in entries if e.dtype in ("U8", "I8") or (n.endswith(".scale") and e.dtype == "F32")
    )


def library_bytes() -> float:
    """Of a process with Paddle loaded, what is pages of its libraries: an estimate counts them as
    the process's, `anonymous` does not.
    """
    code = "import paddle; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    found = re.search(r"^RssFile:\s+(\d+) kB$", done.stdout, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0.0


def verb(*words: object) -> Measured:
    """`ernie-tune` with these words, watched."""
    return verb_of([sys.executable, "-W", "ignore", "-m", "ernie_tune", *map(str, words)])


def verb_of(command: list[str]) -> Measured:
    """A process, watched. SystemExit where it fails."""
    started, now = time.perf_counter(), datetime.now()
    of_day = now.hour * 3600 + now.minute * 60 + now.second + now.microsecond / 1e6
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed, stderr=subprocess.STDOUT)
        anonymous, resident = 0, 0
        while process.poll() is None:
            now = dict(_memory(process.pid))
            anonymous, resident = max(anonymous, now.get("RssAnon", 0)), max(resident, now.get("VmHWM", 0))
            time.sleep(0.2)
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        print(text[-3000:], file=sys.stderr)
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return Measured(time.perf_counter() - started, anonymous, resident, text, of_day)


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


def products_seconds(config: Any, tokens: int, rate: float) -> float:
    """Of a LoRA step with recompute: forward twice and back to the inputs once."""
    from ernie_tune.plan.weights import active_values

    visual = 256 if tokens > 300 else 0  # as `write_rows` deals them
    head = config.vocab_size * config.hidden_size
    active = (tokens - visual) * (active_values(config, False) + head) + visual * active_values(config, True)
    return 2 * 3 * active / rate


def estimated(yaml: Path, tokens: int) -> float:
    """Bytes that `ernie-tune estimate` says for rows with a picture of 256 tokens, or without."""
    words = ["estimate", str(yaml), "card=cpu-24g", f"visual_tokens={256 if tokens > 300 else 0}", "--json"]
    command = [sys.executable, "-W", "ignore", "-m", "ernie_tune", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return float(json.loads(done.stdout)["total_bytes_per_card"])


def report(what: str, m: Measured, told: float | None = None, products: float | None = None) -> None:
    """One line. `told`: the estimate, less what lies in mapped files."""
    steps = m.steps()
    line = f"{what:<34}{m.seconds:>8.1f} s {m.anonymous / GB:>7.2f} GB anonymous {m.resident / GB:>7.2f} GB resident"
    if told is not None:
        told += m.kept_bytes()
        line += f" {told / GB:>7.2f} GB estimated ({m.anonymous / told - 1:+.0%})"
    if (first := m.first_step()) is not None:
        line += f"   first step after {first:.1f} s"
    if steps:
        line += f"   step {min(steps):.2f} s"
    if steps and products:
        line += f", products {products:.2f} s ({min(steps) / products:.1f} x)"
    print(line, flush=True)


def speak(folder: Path, prompt_tokens: int = 100, new_tokens: int = 24) -> dict[str, float]:
    """Seconds to the first token of a prompt and between later ones, best of three; bytes of
    weights that one token reads, and bytes a second that a copy moves here.
    """
    import paddle

    from ernie_tune.checkpoint.tensors import TensorReader
    from ernie_tune.generate.batch import stream_prompts
    from ernie_tune.generate.engine import Request
    from ernie_tune.generate.opened import open_engine
    from ernie_tune.trainers.assemble import base_of_run

    engine = open_engine(folder, base_of_run)
    words = "7 " * (prompt_tokens // 2)
    prepared = engine.prepare(
        Request([{"role": "user", "content": words}], []), engine.params(max_new_tokens=new_tokens, temperature=0.0)
    )
    first, later = 1e9, 1e9
    for _ in range(3):
        at = [time.perf_counter()]
        for _event in stream_prompts(engine.model, [prepared.prompt], engine.processor.tokens, engine.processor.decode):
            at.append(time.perf_counter())
        first = min(first, at[1] - at[0])
        later = min([later, *(b - a for a, b in itertools.pairwise(at[1:]))])
    config, read = engine.model.config, 0.0
    for name, entry in TensorReader(folder).entries.items():
        size = float(np.prod(entry.shape)) * {"U8": 1, "I8": 1, "BF16": 4}.get(entry.dtype, 4)
        if "vision" not in name and "resampler" not in name:
            read += size * (config.moe.top_k / config.moe.num_experts if "text_experts" in name else 1)
    x = paddle.ones([2**26])
    copy = min(_seconds(lambda: x + 0.0) for _ in range(5))
    tokens = len(prepared.prompt.row.input_ids_L)
    return {"prompt_tokens": tokens, "first": first, "later": later, "read": read, "copy": 2 * 4 * 2**26 / copy}


def _seconds(function: Any) -> float:
    start = time.perf_counter()
    function().numpy()
    return time.perf_counter() - start


def report_speech(packed: Path) -> None:
    """`speak` in a process of its own, and its memory."""
    m = verb_of([sys.executable, "-W", "ignore", __file__, str(packed), "--speak"])
    found = json.loads(m.output.splitlines()[-1])
    report("serve", m)
    share = found["read"] / found["later"] / found["copy"]
    print(
        f"  {found['prompt_tokens']:.0f} tokens of a prompt: first token after {found['first']:.2f} s; then "
        f"{1 / found['later']:.2f} tokens/s, which read {found['read'] / GB:.2f} GB each: {share:.0%} of the "
        f"{found['copy'] / GB:.1f} GB/s that a copy moves",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default=RELEASED)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--drawn", default="0,1")
    parser.add_argument("--layout", choices=("paddle", "hf"), default="paddle")
    parser.add_argument("--tokens", default="128,512")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", default="make,train,export,packed,resume,eval,merge,serve,equal")
    parser.add_argument("--speak", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.speak:
        print(json.dumps(speak(a.folder)))
        return
    phases, root, config = a.only.split(","), a.folder, shape_of(a.preset, a.layers)
    model, packed = root / "model", root / "packed"
    if "make" in phases and not model.exists():
        make(model, config, {int(i) for i in a.drawn.split(",")}, a.layout)
        held = sum(p.stat().st_blocks * 512 for p in model.iterdir())
        whole = sum(p.stat().st_size for p in model.iterdir())
        print(f"{model}: {whole / GB:.1f} GB, {held / GB:.1f} GB of disk", flush=True)
    rate = product_rate()
    print(f"float32 products here: {rate / GB:.0f} GFLOP/s", flush=True)
    libraries = library_bytes()
    if "export" in phases:
        out = ("--output_dir", packed, "--quantization", "wint4", "--method", "rtn", "--emit", "packed")
        done = verb("export", model, *out, "--verify", "files")
        size = sum(p.stat().st_size for p in packed.iterdir())
        report(f"export packed, {size / GB:.1f} GB", done)
    lengths = list(map(int, a.tokens.split(",")))
    for phase, base, extra in (
        ("train", model, {"weight_quantize_algo": "weight_only_mix"}),
        ("packed", packed, {"save_strategy": "steps", "save_steps": a.steps}),
    ):
        for tokens in lengths if phase in phases else ():
            yaml = write_run(root, phase, tokens, {"model_name_or_path": base, "max_steps": a.steps, **extra})
            done = verb("train", yaml, "overwrite_output_dir=true")
            told = estimated(yaml, tokens) - libraries - (codes_bytes(packed) if phase == "packed" else 0)
            held = longest(root / f"rows_{tokens}.jsonl")
            report(f"{phase} {held} tokens", done, told, products_seconds(config, held, rate))
    after(root, phases, lengths[0], a.steps)
    if "equal" in phases:
        equal(root / "slice", a.preset, lengths[0])


def write_run(root: Path, phase: str, tokens: int, more: dict[str, Any]) -> Path:
    """Rows of so many tokens, and the YAML file of a run on them."""
    rows = root / f"rows_{tokens}.jsonl"
    write_rows(rows, tokens)
    words = {
        **RUN,
        **QUIET,
        "train_dataset_path": rows,
        "max_seq_len": longest(rows),
        "output_dir": root / f"run_{phase}_{tokens}",
        **more,
    }
    yaml = root / f"{phase}_{tokens}.yaml"
    yaml.write_text("".join(f"{k}: {json.dumps(v, default=str)}\n" for k, v in words.items()))
    return yaml


def after(root: Path, phases: list[str], tokens: int, steps: int) -> None:
    """What follows a run on the packed folder."""
    model, packed, run = root / "model", root / "packed", root / f"run_packed_{tokens}"
    if "resume" in phases:
        yaml = root / f"packed_{tokens}.yaml"
        done = verb("train", yaml, f"max_steps={steps + 1}")
        report("resume, one step more", done, estimated(yaml, tokens) - library_bytes() - codes_bytes(packed))
    if "eval" in phases:
        rows = root / f"rows_{tokens}.jsonl"
        done = verb("eval", run, f"eval_dataset_path={rows}", "eval_max_new_tokens=8", "eval_max_samples=2")
        report("eval with generation", done)
    if "merge" in phases:
        words = ("--output_dir", root / "merged", "--verify", "files")
        report("export merged, bfloat16", verb("export", model, run, *words))
    if "serve" in phases:
        report_speech(packed)


def equal(root: Path, preset_name: str, tokens: int, steps: int = 10) -> None:
    """Losses of a run on codes beside those on the float model with the same rounded weights."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from support.rounded import write_rounded
    from support.tiny_runs import history

    plain, packed, rounded = root / "model", root / "packed", root / "rounded"
    if not plain.exists():
        make(plain, shape_of(preset_name, 2), {0, 1})
        out = ("--output_dir", packed, "--quantization", "wint4", "--method", "rtn", "--emit", "packed")
        verb("export", plain, *out, "--verify", "files")
        write_rounded(plain, packed, rounded)
    found = {}
    for base in (packed, rounded):
        yaml = write_run(root, base.name, tokens, {"model_name_or_path": base, "max_steps": steps})
        verb("train", yaml, "overwrite_output_dir=true")
        found[base.name] = [r["loss"] for r in history(root / f"run_{base.name}_{tokens}") if "loss" in r]
    apart = max(abs(a / b - 1) for a, b in zip(found["packed"], found["rounded"], strict=True))
    print(f"{steps} steps on codes and on the rounded float weights: losses apart by {apart:.1e} at most")


if __name__ == "__main__":
    main()

"""How fast and how large an export is: python tests/bench/bench_export.py [--gigabytes 1] [--rounds
5] [--cold] [--folder DIR]

A model of about that size (the 28B's widths; fewer layers, experts and words) is made in DIR, and a
LoRA adapter of rank 16 on every linear layer of its decoder. Then, by turns that begin elsewhere in
every round: the folder is copied (cp, then sync of every file) and exported to every layout, merged
and quantised, with nothing but the writing timed (`write_layout`, which ends with fsync too; the
checks that follow read everything once more). Both sides read the same files, from the page cache,
or with --cold from the disk. Ratios are of one round's bytes a second, and their median is printed:
on a shared disk seconds differ threefold from one round to the next. Prints GB/s, the ratio to the
copy, GB a CPU second, and the largest growth of anonymous memory over its start, in units of the
largest tensor. Then the packing speed: bfloat16 in, packed int8 and int4 out, numpy on one core.
One JSON line at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from ernie_tune.checkpoint.auto import AutoConfig
from ernie_tune.checkpoint.names import FLAVOURS, layout
from ernie_tune.checkpoint.tensors import NUMPY_TYPES, narrow_bfloat16
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.export.choose import Chosen, Written
from ernie_tune.export.grid import quantize
from ernie_tune.export.packing import pack
from ernie_tune.export.run import LAYOUTS, write_layout
from ernie_tune.export.scheme import quantised_names, scheme
from ernie_tune.export.source import ExportSource
from ernie_tune.models.config_dialects import write_config
from ernie_tune.models.presets import preset
from ernie_tune.peft import dialects
from ernie_tune.peft.config import LoraConfig
from ernie_tune.peft.files import Stored, write_adapter


def make(folder: Path, gigabytes: float) -> None:
    """A folder in Paddle's layout with random bits that are finite bfloat16 numbers."""
    config = preset("ernie-4.5-vl-28b-a3b")
    layers = max(2, round((gigabytes - 0.6) / 0.65) + 1)
    moe = dataclasses.replace(config.moe, layer_indices=tuple(range(1, layers)), num_experts=16)  # type: ignore[type-var]
    vision = dataclasses.replace(config.vision, depth=2)  # type: ignore[type-var]
    config = config.replace(num_hidden_layers=layers, vocab_size=32768, moe=moe, vision=vision)
    table = layout(config, "paddle")
    codes = {name: "F32" if spec.float32 else "BF16" for name, spec in table.disk.items()}
    rng = np.random.default_rng(0)
    noise = narrow_bfloat16(rng.standard_normal(1 << 22).astype(np.float32) * np.float32(0.02))

    def produce(name: str) -> Any:
        shape = table.disk[name].shape
        return np.resize(noise, shape) if codes[name] == "BF16" else np.ones(shape, NUMPY_TYPES["F32"])

    entries = {name: (spec.shape, codes[name]) for name, spec in table.disk.items()}
    text = json.dumps(write_config(config, FLAVOURS["paddle"].dialect))
    write_folder(folder, entries, produce, files={"config.json": text})


def anonymous_bytes() -> int:
    """Memory of this process that is no page of a file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    return 0


@contextmanager
def peak_memory():  # type: ignore[no-untyped-def]
    """Yields a list whose one number is, at the end, the growth of anonymous memory."""
    start, found, stop = anonymous_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            found[0] = max(found[0], anonymous_bytes() - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        stop.set()
        thread.join()


def timed(work: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def copy(source: Path, target: Path) -> None:
    """What `write_folder` does too: every byte written and flushed to the disk."""
    subprocess.run(["cp", "-r", "--reflink=never", source, target], check=True)
    for file in target.iterdir():
        subprocess.run(["sync", file], check=True)


def make_adapter(base: Path, folder: Path) -> None:
    """A LoRA adapter of rank 16 with noise in both factors, on all linear layers of the decoder,
    experts included.
    """
    model, rng = AutoConfig.from_pretrained(base), np.random.default_rng(1)
    tensors: dict[str, Any] = {}
    for name in (name for name in dialects.modules(model) if name.startswith("layers.")):
        n_in, n_out = dialects.shape_of(name, model)
        stack = range(model.moe.num_experts) if name.endswith(dialects.PRODUCT) and model.moe else None
        for key in [name] if stack is None else [f"{name}.{expert}" for expert in stack]:
            for factor, shape in (("lora_A", (n_in, 16)), ("lora_B", (16, n_out))):
                tensors[f"{key}.{factor}"] = (0.01 * rng.standard_normal(shape)).astype(np.float32)
    config = LoraConfig(r=16, target_modules=["attention", "mlp", "shared_experts", "experts"])
    write_adapter(folder, Stored(config, tensors), model, "peft", "F32")


def forget_pages(folder: Path) -> None:
    """Let the next reader of these files wait for the disk."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def bench_layouts(base: Path, place: Path, rounds: int, cold: bool) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    source = ExportSource(base)
    make_adapter(base, place / "adapter")
    merged = ExportSource(base, [place / "adapter"])
    largest = max(int(np.prod(spec.shape)) * 2 for spec in source.table.disk.values())
    out: dict[str, Any] = {"gigabytes": size / 1e9, "largest_tensor_mb": largest / 1e6, "cold": cold}
    works: dict[str, Callable[[Path], Any]] = {"copy": lambda target: copy(base, target)}
    works |= {name: lambda target, f=flavour: write_layout(target, source, f) for name, flavour in LAYOUTS.items()}
    works["paddle, merged"] = lambda target: write_layout(target, merged, "paddle")
    works["pt, merged"] = lambda target: write_layout(target, merged, "hf")
    chosen = Chosen(source, scheme("wint4"), "clip", 1)
    start = cpu_seconds()
    names = [name for name in quantised_names(source.config, chosen.scheme) if chosen.bits(name) == 4]
    weights = 0
    for name in names:  # chosen while layers are compared, before anything is written: timed apart
        for expert in range(source.table.canonical[name].shape[0]):
            weights += chosen.grid(name, expert).codes_KN.size
    out["clip_mb_per_cpu_s"] = 2 * weights / 1e6 / (cpu_seconds() - start)
    print(
        f"clip search of {2 * weights / 1e9:.2f} GB: {out['clip_mb_per_cpu_s']:.0f} MB of bfloat16 a CPU second",
        flush=True,
    )
    works["paddle, wint4 clip"] = lambda target: write_layout(target, Written(chosen), "paddle")
    seconds: dict[str, list[float]] = {name: [] for name in works}
    memory, busy = dict.fromkeys(works, 0), dict.fromkeys(works, 0.0)
    for number in range(rounds):
        order = [*works][number % len(works) :] + [*works][: number % len(works)]
        for name in order:
            if cold:
                forget_pages(base)
            before = cpu_seconds()
            seconds[name].append(timed(lambda n=name: works[n](place / "out")))  # type: ignore[misc]
            busy[name] += (cpu_seconds() - before) / rounds
            shutil.rmtree(place / "out")
    for name, work in works.items():  # apart: watching takes time
        with peak_memory() as grown:
            work(place / "out")
        memory[name] = grown[0]
        shutil.rmtree(place / "out")
    for name, values in seconds.items():
        ratios = sorted(c / v for c, v in zip(seconds["copy"], values, strict=True))
        found = {
            "gb_per_s": size / statistics.median(values) / 1e9,
            "of_copy": statistics.median(ratios),
            "of_copy_least": ratios[0],
            "gb_per_cpu_s": size / busy[name] / 1e9,
            "memory_in_tensors": memory[name] / largest,
        }
        out[name] = found
        print(
            f"{name:<20}{found['gb_per_s']:6.2f} GB/s {found['of_copy']:5.2f} of the copy (least {ratios[0]:.2f}) "
            f"{found['gb_per_cpu_s']:6.2f} GB a CPU second {found['memory_in_tensors']:5.2f} tensors of memory",
            flush=True,
        )
    return out


def bench_packing() -> dict[str, float]:
    """MB of bfloat16 a second, quantised and packed, the best of five turns of each."""
    weight = narrow_bfloat16(np.random.default_rng(0).standard_normal((2560, 3072)).astype(np.float32))
    works: dict[str, Callable[[], Any]] = {}
    for bits in (8, 4):
        codes = quantize(weight, bits).codes_KN
        works[f"int{bits}: quantise and pack"] = lambda b=bits: pack(quantize(weight, b).codes_KN, b)
        works[f"int{bits}: pack"] = lambda b=bits, c=codes: pack(c, b)
    best = dict.fromkeys(works, np.inf)
    for _ in range(5):
        for name, work in works.items():
            best[name] = min(best[name], timed(work))
    speed = {name: weight.nbytes / 1e6 / seconds for name, seconds in best.items()}
    for name, value in speed.items():
        print(f"{name:<28}{value:8.0f} MB/s of bfloat16, one core", flush=True)
    return speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--folder", type=Path)
    a = parser.parse_args()
    if a.folder:
        a.folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"packing": bench_packing()}
    with TemporaryDirectory(dir=a.folder) as place:
        make(Path(place) / "base", a.gigabytes)
        found["layouts"] = bench_layouts(Path(place) / "base", Path(place), a.rounds, a.cold)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())

"""How fast and how large an export is: python tests/bench/bench_export.py [--gigabytes 1] [--folder DIR]

A model of about that size (the 28B's widths; fewer layers, experts and words) is made in DIR. Then, by turns: the folder is copied (cp, then sync) and exported to every
layout, with nothing but the writing timed (`write_layout`; the checks that follow read everything once more). Prints GB/s, the ratio to the copy, and
the CPU time (on a busy machine seconds say little), and the largest growth of anonymous memory over its start, in units of the largest tensor. Then the packing speed: bfloat16 in, packed int8 and int4 out,
numpy on one core. One JSON line at the end.
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

from ernie_tune.checkpoint.names import FLAVOURS, layout
from ernie_tune.checkpoint.tensors import NUMPY_TYPES, narrow_bfloat16
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.export.choose import Chosen, Written
from ernie_tune.export.grid import quantize
from ernie_tune.export.packing import pack
from ernie_tune.export.run import LAYOUTS, write_layout
from ernie_tune.export.scheme import scheme
from ernie_tune.export.source import Source
from ernie_tune.models.config_dialects import write_config
from ernie_tune.models.presets import preset

ROUNDS = 2


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


def bench_layouts(base: Path, place: Path) -> dict[str, Any]:
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    source = Source(base)
    largest = max(int(np.prod(spec.shape)) * 2 for spec in source.table.disk.values())
    out: dict[str, Any] = {"gigabytes": size / 1e9, "largest_tensor_mb": largest / 1e6}
    works: dict[str, Callable[[Path], Any]] = {"copy": lambda target: copy(base, target)}
    works |= {name: lambda target, f=flavour: write_layout(target, source, f) for name, flavour in LAYOUTS.items()}
    works["paddle wint4 rtn"] = lambda target: write_layout(
        target, Written(Chosen(source, scheme("wint4"), "rtn", 1)), "paddle"
    )
    seconds: dict[str, list[float]] = {name: [] for name in works}
    memory, busy = dict.fromkeys(works, 0), dict.fromkeys(works, 0.0)
    for _ in range(ROUNDS):
        for name, work in works.items():
            before = cpu_seconds()
            with peak_memory() as grown:
                seconds[name].append(timed(lambda w=work: w(place / "out")))  # type: ignore[misc]
            memory[name] = max(memory[name], grown[0])
            busy[name] += (cpu_seconds() - before) / ROUNDS
            shutil.rmtree(place / "out")
    plain = statistics.median(seconds["copy"])
    for name, values in seconds.items():
        middle = statistics.median(values)
        ratio = statistics.median(c / v for c, v in zip(seconds["copy"], values, strict=True))
        out[name] = {"gb_per_s": size / middle / 1e9, "of_copy": ratio, "memory_in_tensors": memory[name] / largest}
        out[name]["gb_per_cpu_s"] = size / busy[name] / 1e9
        print(
            f"{name:<18}{size / middle / 1e9:7.2f} GB/s {ratio:6.2f} of the copy {size / busy[name] / 1e9:7.2f} GB a CPU second"
            f"{memory[name] / largest:7.2f} tensors of memory",
            flush=True,
        )
    out["copy_seconds"] = plain
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
    parser.add_argument("--folder", type=Path)
    a = parser.parse_args()
    found: dict[str, Any] = {"packing": bench_packing()}
    with TemporaryDirectory(dir=a.folder) as place:
        make(Path(place) / "base", a.gigabytes)
        found["layouts"] = bench_layouts(Path(place) / "base", Path(place))
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())

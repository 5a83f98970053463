"""FastDeploy's model-load cache: `<model>/.cache/<md5>/rank<r>/`, from which it starts without
quantising.

Each rank's file holds every runtime parameter under its runtime name: codes packed for sm75 to sm90
after sharing out, scales in bfloat16, the rest as it is. FastDeploy loads by name with an exact
check of shapes and never misses a name, so all must be there. `fastdeploy_rules.share` says what a
rank holds.
Legend: K input rows, N output columns, E experts. Refuses to know: how codes are chosen.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.tensors import NUMPY_TYPES, TensorReader, cast
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.export import fastdeploy_rules as rules
from ernie_tune.export.choose import Chosen, Written
from ernie_tune.export.grid import Grid
from ernie_tune.export.packing import check_shape, pack, unpack
from ernie_tune.export.source import Place

Array = np.ndarray[Any, Any]
PROTOCOLS = (4, 5)  # pickle's default: 4 up to Python 3.13, 5 from 3.14; the hash depends on it


def cache_hash(model_type: str, quantization: str, tp: int, ep: int, protocol: int) -> str:
    """The name of the cache folder for one configuration. `quantization`: FastDeploy's own word,
    "mix_quant" for wint4 on ERNIE.
    """
    key = f"{model_type}_{quantization}_{tp}_{ep}"
    return hashlib.md5(pickle.dumps(key, protocol=protocol)).hexdigest()


def quantization_word(argument: str) -> str:
    """How FastDeploy names what --quantization says."""
    if argument.startswith("{"):
        return str(json.loads(argument)["quantization"])
    return "mix_quant" if argument == "wint4" else argument


class Cache:
    """The cache of one rank: what its file holds and how it is made."""

    def __init__(self, config: Mapping[str, Any], chosen: Chosen, rank: int = 0) -> None:
        """`config`: the exported config.json. ValueError for shapes that ranks cannot share out or
        FastDeploy's kernels cannot take.
        """
        self.config, self.chosen, self.written = config, chosen, Written(chosen)
        self.rank, self.tp = rank, chosen.target_tp
        rules.check_ranks(config, self.tp)
        self.entries: dict[str, tuple[tuple[int, ...], str]] = {}
        self._origin: dict[str, tuple[rules.Parameter, str]] = {}
        for parameter in rules.parameters(config):
            self._plan(parameter)

    def _bits(self, parameter: rules.Parameter) -> int:
        s = self.chosen.scheme
        return {"dense": s.dense, "text_experts": s.experts[0], "vision_experts": s.experts[1]}.get(parameter.group, 0)

    def _share(self, parameter: rules.Parameter, array: Array) -> Array:
        return rules.share(parameter.name, array, self.config, self.rank, self.tp)

    def _plan(self, parameter: rules.Parameter) -> None:
        bits = self._bits(parameter)
        shape = self._share(parameter, np.broadcast_to(np.zeros((), np.int8), parameter.shape)).shape
        if not bits:
            self._add(parameter.name, parameter, "floats", shape, "F32" if parameter.float32 else "BF16")
            return
        *stack, rows, columns = shape
        check_shape(rows, columns)
        packed = (columns // 2, rows) if bits == 4 else (columns, rows)
        self._add(parameter.name, parameter, "codes", (*stack, *packed), "I8")
        scale = f"{parameter.name}_scale"  # "….weight_scale" and "…_proj_weight_scale"
        self._add(scale, parameter, "scale", (*stack, columns), "BF16")

    def _add(self, name: str, parameter: rules.Parameter, what: str, shape: tuple[int, ...], code: str) -> None:
        self.entries[name] = (tuple(shape), code)
        self._origin[name] = (parameter, what)

    def produce(self, name: str) -> Array:
        """One entry. A stack of experts is made at once, as FastDeploy holds it."""
        parameter, what = self._origin[name]
        places = _places(parameter, self.config)
        if what == "floats":
            whole = self._join([self.written.read(p, e, self.entries[name][1]) for p, e in places], parameter)
            return np.ascontiguousarray(self._share(parameter, whole))
        bits, grids = self._bits(parameter), (self.chosen.grid(p, e) for p, e in places)
        # a linear layer, perhaps fused: columns are quantised each for itself
        if len(parameter.shape) == 2:
            made = list(grids)
            scale_SN = np.concatenate([g.scale_SN for g in made], 1)
            one = Grid(np.concatenate([g.codes_KN for g in made], 1), scale_SN, bits)
            return self._mine(parameter, one, what)
        shape, code = self.entries[name]
        out = np.empty(shape, NUMPY_TYPES[code])
        for expert, one in enumerate(grids):
            out[expert] = self._mine(parameter, one, what)
        return out

    def _mine(self, parameter: rules.Parameter, grid: Grid, what: str) -> Array:
        """This rank's codes or scales of one matrix: row shares have scales of their own, columns
        bring theirs along.
        """
        if what == "codes":
            return pack(np.ascontiguousarray(self._share(parameter, grid.codes_KN)), grid.bits)
        by_rows = rules.shared_by(parameter.name) == "rows"
        scale_N = grid.scale_SN[self.rank] if by_rows else self._share(parameter, grid.scale_SN)[0]
        return cast(np.ascontiguousarray(scale_N), "F32", "BF16")

    def _join(self, parts: list[Array], parameter: rules.Parameter) -> Array:
        if len(parts) == 1:
            array = parts[0]
            return (
                np.ascontiguousarray(array.T)
                if parameter.name == "lm_head.linear.weight" and array.shape != parameter.shape
                else array
            )
        return np.stack(parts) if len(parameter.shape) == 3 else np.concatenate(parts, 1)


def _places(parameter: rules.Parameter, config: Mapping[str, Any]) -> list[Place]:
    """Our parameters that a runtime parameter is made of."""
    if parameter.name == "lm_head.linear.weight" and config.get("tie_word_embeddings", True):
        return [("embed_tokens.weight", None)]
    blank = np.broadcast_to(np.zeros((), np.int8), parameter.shape)
    return [(name, expert) for name, expert, _ in rules.canonical_parts(parameter.name, blank, config)]


def write_cache(folder: Path, chosen: Chosen, protocols: tuple[int, ...] = PROTOCOLS) -> list[Path]:
    """Add the cache to an exported folder; one copy for each pickle protocol, hard-linked where the
    disk can. Returns the rank folders.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    word, tp = quantization_word(chosen.scheme.argument), chosen.target_tp
    trees = [folder / ".cache" / cache_hash(config["model_type"], word, tp, 1, protocol) for protocol in protocols]
    made: list[Path] = []
    for rank in range(tp):
        cache = Cache(config, chosen, rank)
        first, *others = (tree / f"rank{rank}" for tree in trees)
        write_folder(first, cache.entries, cache.produce, metadata={"format": "np"})
        for other in others:
            other.mkdir(parents=True)
            for file in first.iterdir():
                (other / file.name).hardlink_to(file)
        made += [first, *others]
    return made


def check_caches(folder: Path, chosen: Chosen) -> list[str]:
    """`check_cache` of every rank folder under an exported folder."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    problems = []
    for rank in range(chosen.target_tp):
        found = sorted(folder.glob(f".cache/*/rank{rank}"))
        problems += [] if found else [f"cache: rank{rank} is missing"]
        cache = Cache(config, chosen, rank)
        problems += [problem for one in found for problem in check_cache(one, cache)]
    return problems


def check_cache(rank: Path, cache: Cache) -> list[str]:
    """What FastDeploy's cache loader would stop at (shapes) or pass over (names), and codes that do
    not unpack to the plan.
    """
    reader, problems = TensorReader(rank), []
    problems += [f"cache: {name} is missing" for name in cache.entries if name not in reader.entries]
    problems += [
        f"cache: {name} is unknown and would be skipped" for name in reader.entries if name not in cache.entries
    ]
    for name, (shape, code) in cache.entries.items():
        entry = reader.entries.get(name)
        if entry is None:
            continue
        if entry.shape != shape or entry.dtype != code:
            problems.append(f"cache: {name} ({entry.dtype} {list(entry.shape)}) must be {code} {list(shape)}")
            continue
        parameter, what = cache._origin[name]
        if what == "codes" and not _same_codes(reader.read(name), name, cache):
            problems.append(f"cache: codes of {parameter.name} are not those that were chosen")
    return problems


def _same_codes(packed: Array, name: str, cache: Cache) -> bool:
    """Whether bytes unpack to this rank's share of the grid of each matrix."""
    parameter, _ = cache._origin[name]
    bits, grids = (
        cache._bits(parameter),
        [cache.chosen.grid(p, e).codes_KN for p, e in _places(parameter, cache.config)],
    )
    if len(parameter.shape) == 2:
        grids, packed = [np.concatenate(grids, 1)], packed[None]
    wanted = (cache._share(parameter, codes_KN) for codes_KN in grids)
    return all((unpack(found, bits) == codes).all() for found, codes in zip(packed, wanted, strict=True))

"""FastDeploy's model-load cache: `<model>/.cache/<md5>/rank<r>/`, from which it starts without quantising (fastdeploy.md 4.3, route B).

Each rank's file holds every runtime parameter under its runtime name: codes packed for sm75 to sm90 after sharing out, scales in bfloat16, the rest as it
is. FastDeploy loads by name with an exact check of shapes and never misses a name, so all must be there. What a rank holds of the decoder follows the
column and row shares of its layers; the vision tower and the resampler are written for one rank only, since how FastDeploy shares them out could not be
checked: more ranks are refused. Legend: K input rows, N output columns, E experts. Refuses to know: how codes are chosen.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.checkpoint.tensors import TensorReader, cast
from ernie_tune.checkpoint.writer import write_folder
from ernie_tune.export import fastdeploy_rules as rules
from ernie_tune.export.choose import Chosen, Written
from ernie_tune.export.packing import check_shape, pack, unpack
from ernie_tune.export.source import Place

Array = np.ndarray[Any, Any]
PROTOCOLS = (4, 5)  # pickle's default: 4 up to Python 3.13, 5 from 3.14; the hash depends on it


def cache_hash(model_type: str, quantization: str, tp: int, ep: int, protocol: int) -> str:
    """The name of the cache folder for one configuration. `quantization`: FastDeploy's own word, "mix_quant" for wint4 on ERNIE."""
    key = f"{model_type}_{quantization}_{tp}_{ep}"
    return hashlib.md5(pickle.dumps(key, protocol=protocol)).hexdigest()


def quantization_word(argument: str) -> str:
    """How FastDeploy names what --quantization says."""
    if argument.startswith("{"):
        return str(json.loads(argument)["quantization"])
    return "mix_quant" if argument == "wint4" else argument


class Cache:
    """The cache of one model: what each file holds and how it is made."""

    def __init__(self, config: Mapping[str, Any], chosen: Chosen) -> None:
        """`config`: the exported config.json. ValueError for more than one rank, and for shapes that FastDeploy's kernels cannot take."""
        if chosen.target_tp != 1:
            raise ValueError(
                f"target_tp ({chosen.target_tp}) must be 1 for a load cache: how FastDeploy shares out the vision tower is not known; use emit weights"
            )
        self.config, self.chosen, self.written = config, chosen, Written(chosen)
        self.entries: dict[str, tuple[tuple[int, ...], str]] = {}
        self._origin: dict[str, tuple[rules.Parameter, str]] = {}
        for parameter in rules.parameters(config):
            self._plan(parameter)

    def _bits(self, parameter: rules.Parameter) -> int:
        s = self.chosen.scheme
        return {"dense": s.dense, "text_experts": s.experts[0], "vision_experts": s.experts[1]}.get(parameter.group, 0)

    def _plan(self, parameter: rules.Parameter) -> None:
        bits = self._bits(parameter)
        if not bits:
            self._add(parameter.name, parameter, "floats", parameter.shape, "F32" if parameter.float32 else "BF16")
            return
        *stack, rows, columns = parameter.shape
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
        bits = self._bits(parameter)
        places = _places(parameter, self.config)
        if what == "floats":
            return self._join([self.written.read(p, e, self.entries[name][1]) for p, e in places], parameter)
        if len(parameter.shape) == 2:  # a linear layer, perhaps fused: columns are quantised each for itself
            made = [self.chosen.grid(p, e) for p, e in places]
            if what == "scale":
                return cast(np.concatenate([g.scale_SN[0] for g in made]), "F32", "BF16")
            return pack(np.concatenate([g.codes_KN for g in made], 1), bits)
        out = np.empty(self.entries[name][0], np.int8 if what == "codes" else np.uint16)
        for p, e in places:
            made_one = self.chosen.grid(p, e)
            out[e] = pack(made_one.codes_KN, bits) if what == "codes" else cast(made_one.scale_SN[0], "F32", "BF16")
        return out

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
    """Add the cache to an exported folder; one copy for each pickle protocol, hard-linked where the disk can. Returns the rank folders."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    cache = Cache(config, chosen)
    word = quantization_word(chosen.scheme.argument)
    made: list[Path] = []
    for protocol in protocols:
        name = cache_hash(config["model_type"], word, chosen.target_tp, 1, protocol)
        rank = folder / ".cache" / name / "rank0"
        rank.parent.mkdir(parents=True)
        if made:
            rank.mkdir()
            for file in made[0].iterdir():
                (rank / file.name).hardlink_to(file)
        else:
            write_folder(rank, cache.entries, cache.produce, metadata={"format": "np"})
        made.append(rank)
    return made


def check_caches(folder: Path, chosen: Chosen) -> list[str]:
    """`check_cache` of every rank folder under an exported folder."""
    cache = Cache(json.loads((folder / "config.json").read_text(encoding="utf-8")), chosen)
    return [problem for rank in sorted(folder.glob(".cache/*/rank*")) for problem in check_cache(rank, cache)]


def check_cache(rank: Path, cache: Cache) -> list[str]:
    """What FastDeploy's cache loader would stop at (shapes) or pass over (names), and codes that do not unpack to the plan."""
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
        if what == "codes":
            problems += _check_codes(name, reader.read(name), parameter, cache)
    return problems


def _check_codes(name: str, packed: Array, parameter: rules.Parameter, cache: Cache) -> list[str]:
    """Unpacked codes against the grid of each matrix."""
    first, bits = 0, cache._bits(parameter)
    for place, expert in _places(parameter, cache.config):
        wanted = cache.chosen.grid(place, expert).codes_KN
        if len(parameter.shape) == 3:
            found = unpack(packed[expert], bits)
        else:
            found = unpack(packed, bits)[:, first : first + wanted.shape[1]]
            first += wanted.shape[1]
        if (found != wanted).any():
            return [f"cache: codes of {name} are not those of {place}"]
    return []

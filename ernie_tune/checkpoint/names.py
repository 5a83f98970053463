"""One bijective table: canonical parameter <-> tensor on disk, for every layout that ERNIE-4.5
weights come in.

A `NameRow` says which canonical parameters make up which disk tensors; `NameTable` expands the rows
for one config into `Link`s. A link ties one block of one disk tensor to one block of one canonical
parameter, and both directions follow the same links: there is no hand-written inverse.
Legend: H hidden, E experts of one modality, I expert width, V vocabulary; "columns" are positions
on the output axis, the last canonical one.
Refuses to know: files, element types, paddle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_tune.checkpoint.tensors import in_threads
from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.specs import ParameterSpec, parameter_specs

Array = np.ndarray[Any, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class NameRow:
    """The canonical parameters, side by side on the output axis, are the disk tensors side by side
    on the output axis.

    `{n}` stands for any one part of a dotted name. An empty `disk` means: under the same names.
    `kind` "linear" is [out, in] in torch layouts; "router" is so only for text-only models (their
    converter transposes it, the VL one does not); "plain" never is. `modality`: stacked experts;
    the disk has one tensor for each, numbered `{e}` from modality * E.
    """

    canonical: tuple[str, ...]
    disk: tuple[str, ...] = ()
    kind: str = "plain"
    modality: int | None = None


@dataclass(frozen=True)
class Flavour:
    """One way of writing a checkpoint. `torch`: linear weights are [out, in]; `fused`: q|k|v and
    gate|up are one tensor each.
    """

    title: str
    decoder: str  # prefix of decoder and resampler names
    tower: str  # prefix of vision tower names, which replaces `vision_model.`
    torch: bool
    fused: bool
    dialect: str  # of config.json, see models/config_dialects.py


FLAVOURS: dict[str, Flavour] = {
    "hf": Flavour("Hugging Face -PT release", "model.", "vision_model.", torch=True, fused=False, dialect="legacy"),
    "hf_saved": Flavour(
        "transformers 5 save_pretrained", "model.", "model.vision_model.", torch=True, fused=False, dialect="native"
    ),
    "paddleformers": Flavour("PaddleFormers", "model.", "vision_model.", torch=False, fused=False, dialect="paddle"),
    "paddle": Flavour(
        "-Paddle release, FastDeploy", "ernie.", "vision_model.", torch=False, fused=True, dialect="paddle"
    ),
}


def _rows(kind: str, *names: str) -> tuple[NameRow, ...]:
    return tuple(NameRow((name,), kind=kind) for name in names)


_L, _MLP = "layers.{n}", "layers.{n}.mlp"
_BLOCK, _RESAMPLER = "vision_model.blocks.{n}", "resampler_model.{n}_linear"
_DENSE = (_MLP, f"{_MLP}.shared_experts")  # what is built like a dense feed-forward
_EXPERTS = ((f"{_MLP}.text_experts", 0), (f"{_MLP}.vision_experts", 1))

# the same in every flavour, up to prefix and transposition
SHARED: tuple[NameRow, ...] = (
    *_rows(
        "plain",
        "embed_tokens.weight",
        "norm.weight",
        f"{_L}.input_layernorm.weight",
        f"{_L}.post_attention_layernorm.weight",
    ),
    *_rows("router", f"{_MLP}.gate.weight", f"{_MLP}.gate.weight_1"),
    *_rows("plain", f"{_MLP}.moe_statics.e_score_correction_bias"),
    *_rows("linear", f"{_L}.self_attn.o_proj.weight", *(f"{mlp}.down_proj.weight" for mlp in _DENSE), "lm_head.weight"),
    *(NameRow((f"{x}.down_proj",), (f"{_MLP}.experts.{{e}}.down_proj.weight",), "linear", m) for x, m in _EXPERTS),
    *_rows("linear", "vision_model.patch_embed.proj.weight"),
    *_rows("linear", *(f"{_BLOCK}.{name}.weight" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))),
    *_rows("plain", *(f"{_BLOCK}.{name}.bias" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"))),
    *_rows(
        "plain",
        *(
            f"{name}.{part}"
            for name in (f"{_BLOCK}.norm1", f"{_BLOCK}.norm2", "vision_model.ln")
            for part in ("weight", "bias")
        ),
    ),
    *_rows("linear", f"{_RESAMPLER}.0.weight", f"{_RESAMPLER}.2.weight", "resampler_model.mlp.weight"),
    *_rows("plain", f"{_RESAMPLER}.0.bias", f"{_RESAMPLER}.2.bias", "resampler_model.mlp.bias"),
    *_rows("plain", f"{_RESAMPLER}.3.weight", f"{_RESAMPLER}.3.bias", "resampler_model.after_norm.weight"),
)
_QKV = tuple(f"{_L}.self_attn.{p}_proj.weight" for p in "qkv")
_GATE_UP = {mlp: (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight") for mlp in _DENSE}
_EXPERT_GATE_UP = (f"{_MLP}.experts.{{e}}.gate_proj.weight", f"{_MLP}.experts.{{e}}.up_proj.weight")
SPLIT: tuple[NameRow, ...] = (
    *_rows("linear", *_QKV, *(name for pair in _GATE_UP.values() for name in pair)),
    *(NameRow((f"{x}.up_gate_proj",), _EXPERT_GATE_UP, "linear", m) for x, m in _EXPERTS),
)
FUSED: tuple[NameRow, ...] = (
    NameRow(_QKV, (f"{_L}.self_attn.qkv_proj.weight",), "linear"),
    *(NameRow(pair, (f"{mlp}.up_gate_proj.weight",), "linear") for mlp, pair in _GATE_UP.items()),
    *(
        NameRow((f"{x}.up_gate_proj",), (f"{_MLP}.experts.{{e}}.up_gate_proj.weight",), "linear", m)
        for x, m in _EXPERTS
    ),
)

# in some folders, of no use for training: multi-token prediction of the text-only releases,
# PaddleFormers' counters, rotary tables
UNUSED = re.compile(r"\.mtp_|\.expert_usage$|\.inv_freq$")
# names that exist only in the memory of a running transformers model
_LIVE = re.compile(r"language_model\.|vision_tower\.|\.(text|vision)_moe\.|\.experts\.(gate_up_proj|down_proj)$")
_SHOWN = 10
_TILE = (256, 512)  # elements that are turned at once


@dataclass(frozen=True)
class Link:
    """`canonical[expert][..., first:last]` is `disk[..., disk_first:disk_last]`, the disk tensor
    being transposed before if `transpose`.
    """

    canonical: str
    disk: str
    expert: int | None
    columns: tuple[int, int]
    disk_columns: tuple[int, int]
    transpose: bool

    def of_canonical(self, array: Array) -> Array:
        """The block, as a view of one expert's matrix (or of the whole parameter where it is not
        stacked).
        """
        return array[..., slice(*self.columns)]

    def of_disk(self, array: Array) -> Array:
        """The block, as a view of the disk tensor."""
        return (array.T if self.transpose else array)[..., slice(*self.disk_columns)]


def _assign(target: Array, block: Array, transpose: bool) -> None:
    """target[...] = block; where one of them is a transposed view by way of tiles, which is several
    times faster.

    A tile is copied to where its rows are no power of two apart: else they take each other's place
    in the cache while columns are read.
    """
    if not transpose or target.ndim != 2:
        target[...] = block
        return
    if block.strides[0] < block.strides[1]:
        target, block = target.T, block.T  # rows as they lie in memory
    rows, columns = _TILE

    def turn(i: int) -> None:
        scratch = np.empty((rows, columns + 32), block.dtype)
        for j in range(0, block.shape[1], columns):
            tile = block[i : i + rows, j : j + columns]
            near = scratch[: tile.shape[0], : tile.shape[1]]
            near[...] = tile
            target[i : i + rows, j : j + columns] = near

    in_threads(turn, range(0, block.shape[0], rows))


@dataclass(frozen=True)
class NameTable:
    """All tensors of one config in one flavour. `canonical` and `disk`: name -> shape and float32
    flag; `head_copy`: see `check_names`.
    """

    flavour: str
    canonical: dict[str, ParameterSpec]
    disk: dict[str, ParameterSpec]
    links_to: dict[str, tuple[Link, ...]]  # by canonical name
    links_from: dict[str, tuple[Link, ...]]  # by disk name
    head_copy: str | None  # tied models: a head that a file may hold too

    def to_canonical(self, name: str, read: Callable[[str], Array], expert: int | None = None) -> Array:
        """One canonical parameter from the disk tensors that `read` gives by name, one at a time;
        with `expert`, that matrix of a stack alone.

        May be a view of what was read.
        """
        links = [link for link in self.links_to[name] if expert is None or link.expert == expert]
        stacked = expert is None and links[0].expert is not None
        shape = self.canonical[name].shape if expert is None else self.canonical[name].shape[1:]
        out: Array | None = None
        for link in links:
            block = link.of_disk(read(link.disk))
            if len(links) == 1 and not stacked:
                return block
            if out is None:
                out = np.empty(shape, block.dtype)
            _assign(link.of_canonical(out[link.expert] if stacked else out), block, link.transpose)
        assert out is not None, name
        return out

    def to_disk(
        self,
        name: str,
        read: Callable[[str, int | None], Array],
        empty: Callable[[tuple[int, ...], Any], Array] = np.empty,
    ) -> Array:
        """One disk tensor, C-contiguous; `read(canonical name, expert)` gives a whole parameter, or
        one expert's matrix of a stacked one.

        May be what was read, where nothing is to be done; else it lies in what
        `empty(shape, dtype)` gives.
        """
        out: Array | None = None
        links = self.links_from[name]
        for link in links:
            block = link.of_canonical(read(link.canonical, link.expert))
            if len(links) == 1 and not link.transpose and block.flags.c_contiguous:
                return block
            if out is None:
                out = empty(self.disk[name].shape, block.dtype)
            _assign(link.of_disk(out), block, link.transpose)
        assert out is not None, name
        return out


def layout(config: ModelConfig, flavour: str) -> NameTable:
    """The table expanded for one config. Disk tensors come in canonical order. ValueError for an
    unknown flavour.
    """
    if flavour not in FLAVOURS:
        raise ValueError(
            say(
                f"flavour ({flavour!r}) must be one of {sorted(FLAVOURS)}; choose one of them",
                f"flavour（{flavour!r}）须为 {sorted(FLAVOURS)} 之一；请选择其一",
            )
        )
    style, specs = FLAVOURS[flavour], parameter_specs(config)
    table = [(_pattern(row.canonical[0]), row) for row in (*SHARED, *(FUSED if style.fused else SPLIT))]
    disk: dict[str, ParameterSpec] = {}
    links: list[Link] = []
    for name in specs:
        for pattern, row in table:
            match = pattern.fullmatch(name)
            if match:
                transpose = style.torch and (row.kind == "linear" or (row.kind == "router" and config.vision is None))
                for shape, link in _expand(row, match.groups(), config, specs, style, transpose):
                    disk[link.disk] = ParameterSpec(shape, float32=specs[name].float32)
                    links.append(link)
    head_copy = "lm_head.weight" if config.tie_word_embeddings else None
    return NameTable(flavour, specs, disk, _grouped(links, "canonical"), _grouped(links, "disk"), head_copy)


def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{n\}", r"([^.]+)"))


def _grouped(links: list[Link], side: str) -> dict[str, tuple[Link, ...]]:
    groups: dict[str, list[Link]] = {}
    for link in links:
        groups.setdefault(link.canonical if side == "canonical" else link.disk, []).append(link)
    return {name: tuple(group) for name, group in groups.items()}


def _expand(
    row: NameRow,
    parts: tuple[str, ...],
    config: ModelConfig,
    specs: Mapping[str, ParameterSpec],
    style: Flavour,
    transpose: bool,
) -> Iterator[tuple[tuple[int, ...], Link]]:
    """The links of one row for one value of its `{n}`, each with the shape of its disk tensor."""
    names = [_fill(template, parts) for template in row.canonical]
    templates = [_disk_name(_fill(template, parts), style) for template in row.disk or row.canonical]
    widths = [specs[name].shape[-1] for name in names]
    disk_widths = widths if len(templates) == len(names) else [sum(widths) // len(templates)] * len(templates)
    stacked = row.modality is not None and config.moe is not None
    experts: list[int | None] = list(range(config.moe.num_experts)) if stacked and config.moe is not None else [None]
    leading = specs[names[0]].shape[1 if stacked else 0 : -1]
    for expert in experts:
        number = 0 if expert is None else expert + (row.modality or 0) * len(experts)
        for i, columns, j, disk_columns in _overlaps(widths, disk_widths):
            shape = (*leading, disk_widths[j])
            disk = templates[j].replace("{e}", str(number))
            yield shape[::-1] if transpose else shape, Link(names[i], disk, expert, columns, disk_columns, transpose)


def _fill(template: str, parts: tuple[str, ...]) -> str:
    for part in parts:
        template = template.replace("{n}", part, 1)
    return template


def _disk_name(name: str, style: Flavour) -> str:
    if name.startswith("vision_model."):
        return style.tower + name.removeprefix("vision_model.")
    return name if name.startswith("lm_head.") else style.decoder + name


def _overlaps(widths: list[int], disk_widths: list[int]) -> Iterator[tuple[int, tuple[int, int], int, tuple[int, int]]]:
    """Cut the same total width in two ways: (i, columns within part i, j, columns within disk part
    j) of every piece.
    """
    start = 0
    for i, width in enumerate(widths):
        disk_start = 0
        for j, disk_width in enumerate(disk_widths):
            first, last = max(start, disk_start), min(start + width, disk_start + disk_width)
            if first < last:
                yield i, (first - start, last - start), j, (first - disk_start, last - disk_start)
            disk_start += disk_width
        start += width


# --- which flavour is it, and is all of it there? -------------------------------------------------


def detect_flavour(found: Shapes, config: ModelConfig) -> str:
    """The flavour whose names and shapes match the most of `found` (the first of `FLAVOURS` where
    they are equal, as for text-only "hf_saved").

    Names alone cannot tell "hf" from "paddleformers"; the orientation of the matrices does.
    ValueError if nothing matches.
    """
    live = [name for name in found if _LIVE.search(name)]
    if live:
        raise ValueError(
            say(
                f"weights ({_some(live)}) must have the names of a saved checkpoint: these are the "
                "in-memory names of a transformers model; save it with model.save_pretrained(folder) and "
                "load that folder",
                f"权重（{_some(live)}）用的是 transformers 模型在内存中的名称，须为保存后的名称；请先 "
                "model.save_pretrained(folder)，再加载该文件夹",
            )
        )
    scores = {f: sum(found.get(name) == spec.shape for name, spec in layout(config, f).disk.items()) for f in FLAVOURS}
    best = max(scores, key=lambda flavour: scores[flavour])
    if scores[best] == 0:
        kinds = ", ".join(f"{name} ({flavour.title})" for name, flavour in FLAVOURS.items())
        raise ValueError(
            say(
                f"weights ({_some(list(found))}) must be ERNIE-4.5 tensors in one of the layouts {kinds}; "
                "none matches config.json",
                f"权重（{_some(list(found))}）须为 {kinds} 之一布局的 ERNIE-4.5 张量；没有与 config.json 相符的",
            )
        )
    return best


def check_names(expected: NameTable, found: Shapes) -> list[str]:
    """The names in `found` that are known and not needed. ValueError if anything is missing,
    unexpected or of another shape.

    A tied model's file may hold the head too (`head_copy`, in either orientation): the caller
    compares its values with the embedding.
    """
    unused = [name for name in found if name not in expected.disk and UNUSED.search(name)]
    known = {*expected.disk, *unused, expected.head_copy}
    missing = [name for name in expected.disk if name not in found]
    unexpected = [name for name in found if name not in known]
    shapes = [
        f"{name} {list(found[name])} instead of {list(spec.shape)}"
        for name, spec in expected.disk.items()
        if name in found and found[name] != spec.shape
    ]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of a wrong shape", shapes))
        if names
    ]
    if problems:
        raise ValueError(
            say(
                f"weights must be the {len(expected.disk)} tensors of config.json in layout "
                f"{expected.flavour!r}: {'; '.join(problems)}; use the config.json that came with the "
                "weights, or fetch the folder again",
                f"权重须为 config.json 所述布局 {expected.flavour!r} 的 {len(expected.disk)} 个张量："
                f"{'; '.join(problems)}；请用权重自带的 config.json，或重新下载文件夹",
            )
        )
    return unused


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f", ... ({len(names)} in all)" if len(names) > _SHOWN else "")

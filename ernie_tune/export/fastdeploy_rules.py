"""How FastDeploy 2.x reads a folder of ERNIE-4.5, written down a second time from its own side:
file finder, format switch, quantisation table, names and shapes of its runtime parameters, and what
it does silently.

It shares nothing with `checkpoint/names.py`, so that a mistake there is found here. Unknown tensors
are skipped and plain weights of a wrong shape are reshaped, as FastDeploy does; both are written
down in `Folder.silent`, and verification refuses them.
Legend: H width, V vocabulary, E experts of one modality, I inner width. Refuses to know: our
model's classes, how folders are written, GPUs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ernie_tune.config.language import say

Array = np.ndarray[Any, Any]
ARCHITECTURES = ("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_MoeForCausalLM", "Ernie4_5_ForCausalLM")
_SHARD = re.compile(r"model-(\d+)-of-(\d+)\.safetensors")
TOKENIZER_MODELS = ("tokenizer.model", "spm.model", "ernie_token_100k.model")
REQUIRED_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
VISION_FILES = ("preprocessor_config.json",)
VISION_TOKENS = (
    "<|IMAGE_PLACEHOLDER|>",
    "<|IMAGE_START|>",
    "<|IMAGE_END|>",
    "<|VIDEO_START|>",
    "<|VIDEO_END|>",
    "</think>",
)


# --- which files, which format, which quantisation ------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The files FastDeploy reads. ValueError for pickled weights beside them (they would be read
    instead), names it cannot parse, lost shards.
    """
    pickled = sorted(p.name for p in folder.glob("*.pdparams") if p.name != "scheduler.pdparams")
    if pickled:
        raise ValueError(
            say(
                f"{folder} must not hold {pickled[0]}: FastDeploy would read it instead of the safetensors files; "
                "move it away",
                f"{folder} 中不能有 {pickled[0]}：FastDeploy 会读取它而不是 safetensors 文件；请移走",
            )
        )
    ranks = sorted(p.name for p in folder.glob("rank*") if p.is_dir())
    if len(ranks) > 1:
        raise ValueError(
            say(
                f"{folder} must not hold folders {ranks[:2]}: FastDeploy would take it for a pre-sharded "
                "checkpoint; move them away",
                f"{folder} 中不能有文件夹 {ranks[:2]}：FastDeploy 会当作已切分的检查点；请移走",
            )
        )
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        if index.is_file():
            raise ValueError(
                say(
                    f"{folder} must not hold both {single.name} and {index.name}; FastDeploy reads the first "
                    "alone: delete one",
                    f"{folder} 中不能同时有 {single.name} 与 {index.name}；FastDeploy 只读前者：请删去其一",
                )
            )
        return [single]
    if not index.is_file():
        raise ValueError(
            say(
                f"{folder} must hold {single.name} or {index.name}; export it again",
                f"{folder} 中须有 {single.name} 或 {index.name}；请重新导出",
            )
        )
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    matches = [_SHARD.fullmatch(name) for name in names]
    numbers = [(int(m[1]), int(m[2])) for m in matches if m]
    count = numbers[0][1] if numbers else 0
    if len(numbers) != len(names) or numbers != [(i, count) for i in range(1, count + 1)]:
        raise ValueError(
            say(
                f"shards ({names[:3]} ...) must be model-00001-of-0000N.safetensors, all N of them; export the "
                "folder again",
                f"分片（{names[:3]} …）须为 model-00001-of-0000N.safetensors 且 N 个齐全；请重新导出该文件夹",
            )
        )
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ValueError(
            say(
                f"{folder} must hold {absent[0]}, which {index.name} names; the copy was cut off: repeat it",
                f"{folder} 中须有 {index.name} 所指的 {absent[0]}；复制中断了：请重新复制",
            )
        )
    return [folder / name for name in names]


def weight_format(config: Mapping[str, Any]) -> str:
    """ "paddle" ([in, out]) for a config with `dtype`, "torch" ([out, in]) for one with
    `torch_dtype`. ValueError for both or neither.
    """
    both = [key for key in ("dtype", "torch_dtype") if key in config]
    if len(both) != 1:
        raise ValueError(
            say(
                "config.json must hold exactly one of dtype and torch_dtype, but holds "
                f"{' and '.join(both) or 'neither'}: FastDeploy reads the "
                "orientation of all weights from it; remove torch_dtype for Paddle's layout, dtype for torch's",
                f"config.json 中 dtype 与 torch_dtype 须恰有其一，而现有 {' and '.join(both) or 'neither'}：FastDeploy "
                "由此判断所有权重的方向；Paddle 布局请删去 torch_dtype，torch 布局请删去 dtype",
            )
        )
    return "paddle" if both == ["dtype"] else "torch"


def _taken_for_quantised(about: Mapping[str, Any]) -> bool:
    return bool(about.get("is_quantized", about.get("is_moe_quantized", "kv_cache_quant_type" not in about)))


@dataclass(frozen=True)
class Quantisation:
    """What FastDeploy does to weights. Types are "wint8", "wint4" or ""; `on_disk`: it takes the
    files for quantised already.
    """

    dense: str = ""
    text_experts: str = ""
    vision_experts: str = ""
    on_disk: bool = False


def quantisation(config: Mapping[str, Any], argument: str) -> Quantisation:
    """The decision table. `argument`: the value of --quantization, "" for none. The config's own
    `quantization_config` wins over it.
    """
    about = config.get("quantization_config")
    on_disk = False
    if about is not None:
        if weight_format(config) == "torch":
            raise ValueError(
                say(
                    f"quantization_config ({about}) must be absent from a config.json with torch_dtype: "
                    "FastDeploy takes the weights for quantised; remove it",
                    f"含 torch_dtype 的 config.json 中不能有 quantization_config（{about}）：FastDeploy 会把权重当作已量化；请删去它",
                )
            )
        if not isinstance(about, dict) or "quantization" not in about:
            raise ValueError(
                say(
                    f"quantization_config ({about}) must hold the key quantization, FastDeploy stops without it; "
                    "remove quantization_config",
                    f"quantization_config（{about}）中须有键 quantization，否则 FastDeploy 会停止；请删去 quantization_config",
                )
            )
        on_disk = _taken_for_quantised(about)
    else:
        about = json.loads(argument) if argument.startswith("{") else {"quantization": argument}
        # Several keys are taken for a description of the files, as those in config.json are.
        on_disk = len(about) > 1 and _taken_for_quantised(about)
        if about["quantization"] == "wint4":  # rewritten for ERNIE
            about = {"quantization": "mix_quant", "dense_quant_type": "wint8", "moe_quant_type": "wint4"}
    kind = about["quantization"]
    if kind in ("", "wint8", "wint4"):
        return Quantisation(kind, kind, kind, on_disk)
    if kind != "mix_quant":
        raise ValueError(
            say(
                f"quantization ({kind!r}) must be '', 'wint8', 'wint4' or 'mix_quant'; other kinds need other weights",
                f"quantization（{kind!r}）须为 ''、'wint8'、'wint4' 或 'mix_quant'；其他种类需要其他权重",
            )
        )
    experts = about.get("moe_quant_type") or ""
    return Quantisation(
        about.get("dense_quant_type") or "", experts, about.get("image_moe_quant_type") or experts, on_disk
    )


# --- runtime parameters ---------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorPiece:
    """One tensor on disk and where it goes in a runtime parameter: `expert` of a stack, columns
    from `first`. `names`: accepted spellings.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]  # on disk
    transpose: bool = False
    expert: int | None = None
    first: int = 0


@dataclass(frozen=True)
class Parameter:
    """One runtime parameter (one rank, tensor parallel size 1). `fused`: its loader checks shapes;
    others reshape what does not fit.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[TensorPiece, ...]
    fused: bool = False
    float32: bool = False
    # "dense", "text_experts", "vision_experts": what the quantisation table decides about
    group: str = ""


def parameters(config: Mapping[str, Any]) -> list[Parameter]:
    """All runtime parameters of a folder's config.json. ValueError for an architecture that
    FastDeploy does not register.
    """
    named = (config.get("architectures") or ["none"])[0]
    if named not in ARCHITECTURES:
        raise ValueError(
            say(
                f"architectures ({named}) must be one of {ARCHITECTURES}; write config.json again",
                f"architectures（{named}）须为 {ARCHITECTURES} 之一；请重新写出 config.json",
            )
        )
    return list(_Names(config).all())


class _Names:
    """The table of names, for one config."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.c, self.torch = config, weight_format(config) == "torch"
        self.root = "model." if self.torch else "ernie."
        self.vision = config.get("vision_config")

    def all(self) -> Iterator[Parameter]:
        c = self.c
        width, vocabulary = c["hidden_size"], c["vocab_size"]
        table = f"{self.root}embed_tokens.weight"
        yield self.plain("ernie.embed_tokens.embeddings.weight", table, (vocabulary, width))
        for layer in range(c["num_hidden_layers"]):
            yield from self.layer(layer)
        yield self.plain("ernie.norm.weight", f"{self.root}norm.weight", (width,))
        if c.get("tie_word_embeddings", True):
            yield Parameter(
                "lm_head.linear.weight", (width, vocabulary), (TensorPiece((table,), (vocabulary, width), True),)
            )
        else:
            yield self.linear("lm_head.linear.weight", "lm_head.weight", width, vocabulary)
        if self.vision:
            yield from self.tower()
            yield from self.resampler()

    def plain(self, runtime: str, disk: str, shape: tuple[int, ...], float32: bool = False) -> Parameter:
        return Parameter(runtime, shape, (TensorPiece((disk,), shape),), float32=float32)

    def _stored(self, rows: int, columns: int) -> tuple[int, int]:
        return (columns, rows) if self.torch else (rows, columns)

    def linear(self, runtime: str, disk: str | tuple[str, ...], rows: int, columns: int, group: str = "") -> Parameter:
        names = (disk,) if isinstance(disk, str) else disk
        return Parameter(
            runtime, (rows, columns), (TensorPiece(names, self._stored(rows, columns), self.torch),), group=group
        )

    def side_by_side(self, runtime: str, stem: str, fused: str, parts: Mapping[str, int], rows: int) -> Parameter:
        """A fused layer: one tensor, or (always in torch's layout) its parts."""
        columns = sum(parts.values())
        if not self.torch:
            return Parameter(
                runtime,
                (rows, columns),
                (TensorPiece((f"{stem}.{fused}.weight",), (rows, columns)),),
                True,
                group="dense",
            )
        pieces, first = [], 0
        for name, width in parts.items():
            pieces.append(TensorPiece((f"{stem}.{name}.weight",), (width, rows), True, first=first))
            first += width
        return Parameter(runtime, (rows, columns), tuple(pieces), True, group="dense")

    def layer(self, i: int) -> Iterator[Parameter]:
        c, run, disk = self.c, f"ernie.layers.{i}", f"{self.root}layers.{i}"
        width, heads = c["hidden_size"], c["num_attention_heads"]
        head = c.get("head_dim") or width // heads
        kv = c.get("num_key_value_heads") or heads
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield self.plain(f"{run}.{norm}.weight", f"{disk}.{norm}.weight", (width,))
        parts = {"q_proj": heads * head, "k_proj": kv * head, "v_proj": kv * head}
        yield self.side_by_side(f"{run}.self_attn.qkv_proj.weight", f"{disk}.self_attn", "qkv_proj", parts, width)
        yield self.linear(
            f"{run}.self_attn.o_proj.weight", f"{disk}.self_attn.o_proj.weight", heads * head, width, "dense"
        )
        if self._sparse(i):
            yield from self.experts(f"{run}.mlp", f"{disk}.mlp")
            shared = (c.get("moe_num_shared_experts") or 0) * _at(c["moe_intermediate_size"], 0)
            if shared:
                yield from self.feed_forward(f"{run}.mlp.shared_experts", f"{disk}.mlp.shared_experts", shared)
        else:
            yield from self.feed_forward(f"{run}.mlp", f"{disk}.mlp", c["intermediate_size"])

    def _sparse(self, i: int) -> bool:
        if not _at(self.c.get("moe_num_experts") or 0, 0):
            return False
        first, last = _at(self.c["moe_layer_start_index"], 0), _at(self.c.get("moe_layer_end_index", -1), 0)
        last = self.c["num_hidden_layers"] - 1 if last == -1 else last
        return first <= i <= last and (i + 1) % (self.c.get("moe_layer_interval") or 1) == 0

    def feed_forward(self, run: str, disk: str, inner: int) -> Iterator[Parameter]:
        width = self.c["hidden_size"]
        halves = {"gate_proj": inner, "up_proj": inner}
        yield self.side_by_side(f"{run}.up_gate_proj.weight", disk, "up_gate_proj", halves, width)
        yield self.linear(f"{run}.down_proj.weight", f"{disk}.down_proj.weight", inner, width, "dense")

    def experts(self, run: str, disk: str) -> Iterator[Parameter]:
        """Vision experts follow the text experts in one numbering. Routers are [H, E] in float32
        and not transposed in either layout.
        """
        c, kinds = self.c, ("text", "image") if self.vision else ("",)
        width, count = c["hidden_size"], _at(c["moe_num_experts"], 0)
        for m, kind in enumerate(kinds):
            block = f"{run}.{kind}_fused_moe" if kind else run
            group = ("text_experts", "vision_experts")[m]
            inner = _at(c["moe_intermediate_size"], m)
            for name, parts, rows in (
                ("up_gate_proj", ("gate_proj", "up_proj"), width),
                ("down_proj", ("down_proj",), inner),
            ):
                columns = 2 * inner if len(parts) == 2 else width
                pieces = []
                for e in range(count):
                    stem = f"{disk}.experts.{m * count + e}"
                    if len(parts) == 2 and self.torch:
                        pieces += [
                            TensorPiece((f"{stem}.{p}.weight",), (inner, rows), True, e, j * inner)
                            for j, p in enumerate(parts)
                        ]
                    else:
                        pieces.append(
                            TensorPiece((f"{stem}.{name}.weight",), self._stored(rows, columns), self.torch, e)
                        )
                yield Parameter(
                    f"{block}.experts.{name}_weight", (count, rows, columns), tuple(pieces), True, group=group
                )
            router = f"{disk}.gate.weight" + ("_1" if m else "")
            if kind:
                yield self.plain(f"{block}.gate.weight", router, (width, count), float32=True)
            else:
                stored = (count, width) if self.torch else (width, count)
                piece = TensorPiece((router,), stored, self.torch)
                yield Parameter(f"{run}.gate.weight", (width, count), (piece,), float32=True)
        bias = f"{disk}.moe_statics.e_score_correction_bias"
        yield self.plain(f"{run}.gate_correction_bias", bias, (len(kinds), count), float32=True)

    def tower(self) -> Iterator[Parameter]:
        v: Any = self.vision
        width = v["hidden_size"]
        if v.get("embed_dim", width) != width:
            raise ValueError(
                say(
                    f"vision_config.hidden_size ({width}) must equal embed_dim ({v['embed_dim']}); write "
                    "config.json again",
                    f"vision_config.hidden_size（{width}）须等于 embed_dim（{v['embed_dim']}）；请重新写出 config.json",
                )
            )
        inner = v.get("intermediate_size") or round(width * v.get("mlp_ratio", 4))
        patch = v.get("in_channels", v.get("in_chans", 3)) * v.get("patch_size", 14) ** 2
        yield self.linear("vision_model.patch_embed.proj.weight", "vision_model.patch_embed.proj.weight", patch, width)
        for i in range(v["depth"]):
            block = f"vision_model.blocks.{i}"
            for name in ("norm1", "norm2"):
                yield from self._pair(f"{block}.{name}", f"{block}.{name}", width)
            sizes = {
                "attn.qkv": (width, 3 * width),
                "attn.proj": (width, width),
                "mlp.fc1": (width, inner),
                "mlp.fc2": (inner, width),
            }
            for name, (rows, columns) in sizes.items():
                yield self.linear(f"{block}.{name}.weight", f"{block}.{name}.weight", rows, columns)
                yield self.plain(f"{block}.{name}.bias", f"{block}.{name}.bias", (columns,))
        yield from self._pair("vision_model.ln", "vision_model.ln", width)

    def _pair(self, run: str, disk: str, width: int) -> Iterator[Parameter]:
        for leaf in ("weight", "bias"):
            yield self.plain(f"{run}.{leaf}", f"{disk}.{leaf}", (width,))

    def resampler(self) -> Iterator[Parameter]:
        v, run, disk = self.vision, "resampler_model", f"{self.root}resampler_model"
        wide = v["hidden_size"] * self.c.get("spatial_conv_size", 2) ** 2  # type: ignore[index]
        for name, rows in (("spatial_linear", wide), ("temporal_linear", wide * self.c.get("temporal_conv_size", 2))):
            for k, n_in in (("0", rows), ("2", wide)):
                yield self.linear(f"{run}.{name}.{k}.weight", f"{disk}.{name}.{k}.weight", n_in, wide)
                yield self.plain(f"{run}.{name}.{k}.bias", f"{disk}.{name}.{k}.bias", (wide,))
            yield from self._pair(f"{run}.{name}.3", f"{disk}.{name}.3", wide)
        width = self.c["hidden_size"]
        yield self.linear(f"{run}.mlp.weight", f"{disk}.mlp.weight", wide, width)
        yield self.plain(f"{run}.mlp.bias", f"{disk}.mlp.bias", (width,))
        yield self.plain(f"{run}.after_norm.weight", f"{disk}.after_norm.weight", (width,))


def _at(value: Any, modality: int) -> int:
    """A value that may be one number or one for each modality."""
    return int(value[modality] if isinstance(value, list | tuple) else value)


# --- what one rank of several holds ---------------------------------------------------------------

_VOCABULARY_STEP = 64  # rows that the embedding is padded to
# its columns lie in blocks, each of which is shared out for itself; or its rows are shared out; all
# others are whole on every rank
_BY_COLUMNS = re.compile(
    r"ernie\.layers\..*\.(qkv_proj\.weight|up_gate_proj[._]weight)|lm_head\.linear\.weight"
    r"|vision_model\.blocks\.\d+\.(attn\.qkv|mlp\.fc1)\.(weight|bias)"
)
_BY_ROWS = re.compile(
    r"ernie\.layers\..*\.(o_proj\.weight|down_proj[._]weight)|ernie\.embed_tokens\.embeddings\.weight"
    r"|vision_model\.blocks\.\d+\.(attn\.proj|mlp\.fc2)\.weight|resampler_model\.spatial_linear\.0\.weight"
)


def check_ranks(config: Mapping[str, Any], tp: int) -> None:
    """ValueError where `tp` ranks cannot share the model out, or FastDeploy pads the vocabulary,
    which not all versions do alike.
    """
    vision = config.get("vision_config") or {"num_heads": tp}
    kv = _kv_heads(config)
    for what, ok, rule in (
        (f"num_attention_heads ({config['num_attention_heads']})", config["num_attention_heads"] % tp == 0, "divide"),
        (f"num_key_value_heads ({kv})", kv % tp == 0 or tp % kv == 0, "divide, or be divided by,"),
        (f"heads of the vision tower ({vision['num_heads']})", vision["num_heads"] % tp == 0, "divide"),
        (f"vocab_size ({config['vocab_size']})", config["vocab_size"] % tp == 0, "divide"),
    ):
        if not ok:
            raise ValueError(
                say(
                    f"target_tp ({tp}) must {rule} {what}; choose another number of ranks",
                    f"target_tp（{tp}）不合要求（must {rule} {what}）；请换一个进程数",
                )
            )
    if tp > 1 and config["vocab_size"] % _VOCABULARY_STEP:
        raise ValueError(
            say(
                f"vocab_size ({config['vocab_size']}) must be a multiple of {_VOCABULARY_STEP} for a load cache "
                f"of {tp} ranks; use emit weights",
                f"{tp} 个进程的加载缓存要求 vocab_size（{config['vocab_size']}）为 {_VOCABULARY_STEP} 的整数倍；请用 emit weights",
            )
        )


def _kv_heads(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def shared_by(name: str) -> str:
    """ "rows", "columns", or "" for a parameter that every rank holds whole."""
    return "rows" if _BY_ROWS.fullmatch(name) else "columns" if _BY_COLUMNS.fullmatch(name) else ""


def share(name: str, array: Array, config: Mapping[str, Any], rank: int, tp: int) -> Array:
    """What one rank holds of a whole runtime parameter, or of something with the same columns (a
    view, or columns put together).
    """
    by = shared_by(name)
    if tp == 1 or not by:
        return array
    if by == "rows":
        rows = array.shape[-2] // tp
        return array[..., rank * rows : (rank + 1) * rows, :]
    parts = []
    for block, ranks in _blocks(name, array, config, tp):
        width = block.shape[-1] // ranks
        # heads of keys and values that are fewer than ranks are held by several
        mine = rank * ranks // tp
        parts.append(block[..., mine * width : (mine + 1) * width])
    return parts[0] if len(parts) == 1 else np.concatenate(parts, -1)


def _blocks(name: str, array: Array, config: Mapping[str, Any], tp: int) -> Iterator[tuple[Array, int]]:
    """Blocks of columns, and how many shares each is cut into."""
    if name.endswith(".qkv_proj.weight"):
        heads, kv = config["num_attention_heads"], _kv_heads(config)
        head = array.shape[-1] // (heads + 2 * kv)
        q, k, v = np.split(array, [heads * head, (heads + kv) * head], axis=-1)
        yield from ((q, tp), (k, min(tp, kv)), (v, min(tp, kv)))
        return
    count = 2 if ".up_gate_proj" in name else 3 if ".attn.qkv." in name else 1
    yield from ((block, tp) for block in np.split(array, count, axis=-1))


# --- loading --------------------------------------------------------------------------------------


@dataclass
class Folder:
    """A folder as FastDeploy would load it. `shapes` and `read(name)` come from whatever reads the
    files; BF16 arrives as raw bits.

    `silent`: what FastDeploy would pass over without a word, filled while loading.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Array]
    silent: list[str] = field(default_factory=list)

    def check_names(self) -> None:
        """Note missing tensors, unknown ones and those whose shape would be bent; ValueError where
        FastDeploy itself would stop.
        """
        known = set()
        for parameter in parameters(self.config):
            for piece in parameter.pieces:
                found = [name for name in piece.names if name in self.shapes]
                known.update(found)
                if not found:
                    self.silent.append(f"{piece.names[0]} is missing: {parameter.name} would keep its random start")
                elif self.shapes[found[0]] != piece.shape:
                    self._shape(parameter, piece, found[0])
        self.silent += [
            f"{name} is unknown and would be skipped"
            for name in self.shapes
            if name not in known and not self._tied(name)
        ]

    def _tied(self, name: str) -> bool:
        return name == "lm_head.weight" and self.config.get("tie_word_embeddings", True)

    def _shape(self, parameter: Parameter, piece: TensorPiece, name: str) -> None:
        found = self.shapes[name]
        text = f"{name} {list(found)} must be {list(piece.shape)}"
        if parameter.fused or np.prod(found) != np.prod(piece.shape):
            raise ValueError(
                say(
                    f"{text}; FastDeploy stops here: export the folder again",
                    f"{text}；FastDeploy 会在此停止：请重新导出该文件夹",
                )
            )
        self.silent.append(f"{text}, it would be reshaped, not transposed")

    def load(self, parameter: Parameter) -> Array:
        """The runtime parameter. What is missing is 0, what does not fit is reshaped."""
        out: Array | None = None
        for piece in parameter.pieces:
            name = next((n for n in piece.names if n in self.shapes), None)
            if name is None:
                continue
            raw: Array = self.read(name).reshape(piece.shape)
            block: Array = raw.T if piece.transpose else raw
            if out is None:
                out = np.zeros(parameter.shape, block.dtype)
            target = out if piece.expert is None else out[piece.expert]
            target[..., piece.first : piece.first + block.shape[-1]] = block
        return np.zeros(parameter.shape, np.uint16) if out is None else out


def canonical_parts(name: str, array: Array, config: Mapping[str, Any]) -> Iterator[tuple[str, int | None, Array]]:
    """A runtime parameter as parts of ours: (canonical name, expert, [in, out] or vector). Nothing
    for a head that is the embedding.
    """
    name = name.removeprefix("ernie.").replace("embed_tokens.embeddings.", "embed_tokens.")
    if name == "lm_head.linear.weight":
        if not config.get("tie_word_embeddings", True):
            yield "lm_head.weight", None, array
        return
    if name.endswith(".qkv_proj.weight"):
        heads = config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // heads
        cuts = [heads * head, (heads + (config.get("num_key_value_heads") or heads)) * head]
        for part, columns in zip("qkv", np.split(array, cuts, axis=1), strict=True):
            yield name.replace("qkv_proj", f"{part}_proj"), None, columns
        return
    if name.endswith(".up_gate_proj.weight"):
        for part, columns in zip(("gate_proj", "up_proj"), np.split(array, 2, axis=1), strict=True):
            yield name.replace("up_gate_proj", part), None, columns
        return
    stack = re.fullmatch(r"(layers\.\d+\.mlp)\.(?:(text|image)_fused_moe\.)?experts\.(\w+_proj)_weight", name)
    if stack:
        owner = f"{stack[1]}.{'vision' if stack[2] == 'image' else 'text'}_experts.{stack[3]}"
        yield from ((owner, e, matrix) for e, matrix in enumerate(array))
        return
    for theirs, ours in (
        (".mlp.text_fused_moe.gate.weight", ".mlp.gate.weight"),
        (".mlp.image_fused_moe.gate.weight", ".mlp.gate.weight_1"),
        (".mlp.gate_correction_bias", ".mlp.moe_statics.e_score_correction_bias"),
    ):
        name = name.replace(theirs, ours)
    yield name, None, array

"""`AutoConfig` and `AutoModel`: a folder of weights in any layout -> a model, and back.

Tensors go one at a time from the mapped file into the parameters, so that loading needs little more
memory than the model itself.
Refuses to know: training, adapters, distribution, tokenizers.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from ernie_tune.checkpoint.hub import resolve
from ernie_tune.checkpoint.names import FLAVOURS, NameTable, check_names, detect_flavour, layout
from ernie_tune.checkpoint.source import Drawn, OnDisk, Where, fill, router_dtype
from ernie_tune.checkpoint.tensors import FLOAT_CODES, TensorReader, cast
from ernie_tune.checkpoint.writer import DEFAULT_SHARD_BYTES, write_folder
from ernie_tune.config.foreign import read_json_object
from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.config_dialects import write_config
from ernie_tune.models.config_file import config_in
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.models.presets import preset, shipped_name

Array = np.ndarray[Any, Any]
# Lays an empty model out and says which part of its whole value a parameter holds, so that a
# process never has more than its own.
Lay = Callable[[ErnieModel], Where]
_CODES = {paddle.float64: "F64", paddle.float32: "F32", paddle.bfloat16: "BF16", paddle.float16: "F16"}
_FILE_DTYPES = ("float32", "bfloat16")
_COMPUTE_DTYPES = (*_FILE_DTYPES, "float64")
_COMPARED_ROWS = 1024


class AutoConfig:
    """Reads `config.json` in every dialect (models/config_dialects.py)."""

    @staticmethod
    def from_pretrained(name_or_path: str | os.PathLike[str], download_hub: str | None = None) -> ModelConfig:
        """The shape of the model in a folder or repository. FileNotFoundError without
        `config.json`, ValueError (naming the file) for a bad one.
        """
        return _read_config_file(resolve(name_or_path, download_hub))


class AutoModel(ErnieModel):
    """`ErnieModel` with `from_pretrained`, `from_config` and `save_pretrained`."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        dtype: str | None = None,
        download_hub: str | None = None,
        stages: Collection[str] | None = None,
        lay: Lay | None = None,
    ) -> AutoModel:
        """The model in a folder or repository (`hub.resolve`), whatever its layout, which is found
        out and printed.

        `dtype`: "float32", "bfloat16" or "float64", for everything but the routers and their
        biases, which are float32 beside bfloat16; by default float32 on the CPU and bfloat16 on an
        accelerator. `stages`: read only these (`ErnieModel.keep`); the others have names and
        shapes, but no memory, until `keep` drops them: adapters and freezing can be set as on the
        whole model. `lay`: what lays the empty model out over processes and says which part of each
        value it holds.
        Raises ValueError for tensors that are missing, unexpected, of a wrong shape, not finite, or
        a tied head that differs from the embedding.
        """
        model, source = cls.unread(name_or_path, dtype, download_hub, empty=stages is not None or lay is not None)
        fill(model, source, stages=stages, where=lay(model) if lay else None)
        return model

    @classmethod
    def unread(
        cls,
        name_or_path: str | os.PathLike[str],
        dtype: str | None = None,
        download_hub: str | None = None,
        empty: bool = True,
    ) -> tuple[AutoModel, OnDisk]:
        """The model of `from_pretrained` before its values, with names and shapes but (`empty`) no
        memory, and what `fill` can read them from: adapters, freezing, quantisation and a layout
        may come between the two. Raises ValueError as `from_pretrained`, for what names and shapes
        tell.
        """
        folder = resolve(name_or_path, download_hub)
        config = _read_config_file(folder)
        reader = TensorReader(folder)
        table = layout(config, detect_flavour(reader.shapes, config))
        unused = check_names(table, reader.shapes)
        check_tied_head(table, reader)
        dtype = compute_dtype(dtype)
        print(
            say(
                f"ernie_tune: {folder}: {len(table.disk)} tensors in layout {table.flavour!r} ("
                f"{FLAVOURS[table.flavour].title}) -> {dtype}, routers {router_dtype(dtype)}",
                f"ernie_tune：{folder}：{len(table.disk)} 个张量，布局 {table.flavour!r}（"
                f"{FLAVOURS[table.flavour].title}）→ {dtype}，路由 {router_dtype(dtype)}",
            )
            + (f"; not used: {len(unused)} ({unused[0]}, ...)" if unused else ""),
            file=sys.stderr,
            flush=True,
        )
        model = cls._skeleton(config, dtype, empty)
        # A model of the package is known by its name on every machine.
        model.name_or_path = shipped_name(os.fspath(name_or_path)) or str(folder)
        return model, OnDisk(table, reader)

    @classmethod
    def from_config(
        cls,
        config: ModelConfig | str,
        seed: int = 0,
        dtype: str | None = None,
        stages: Collection[str] | None = None,
        lay: Lay | None = None,
    ) -> AutoModel:
        """A model with fresh weights (models/init.py); `config` may be the name of a preset. The
        same seed gives the same weights. `stages`: as in `from_pretrained`.
        """
        model, source = cls.undrawn(config, seed, dtype, empty=stages is not None or lay is not None)
        fill(model, source, stages=stages, where=lay(model) if lay else None)
        return model

    @classmethod
    def undrawn(
        cls, config: ModelConfig | str, seed: int = 0, dtype: str | None = None, empty: bool = True
    ) -> tuple[AutoModel, Drawn]:
        """As `unread`, for fresh weights."""
        shape = preset(config) if isinstance(config, str) else config
        model = cls._skeleton(shape, compute_dtype(dtype), empty)
        model.name_or_path = config if isinstance(config, str) else ""
        return model, Drawn(shape, seed)

    @classmethod
    def _skeleton(cls, config: ModelConfig, dtype: str, empty: bool) -> AutoModel:
        """The model before its weights: zeros, or nothing at all where only a part of them will be
        read.
        """
        with paddle.LazyGuard() if empty else nullcontext():
            return cls(config, dtype)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        flavour: str = "hf",
        dtype: str | None = None,
        max_shard_size: int = DEFAULT_SHARD_BYTES,
        whole: Callable[[str], tuple[Array, str]] | None = None,
    ) -> list[Path]:
        """Write `config.json` and the weights in one of `names.FLAVOURS`; returns the paths.
        `max_shard_size` in bytes.

        `dtype` ("float32", "bfloat16"; default: the model's own, float32 for a float64 model: no
        reader of these files knows more) is for everything but routers and their biases, which are
        written in float32.
        `whole(name)` gives a tensor and its type where the model's own are parts. The folder is
        complete or absent; other files in it are left alone.
        """
        table = layout(self.config, flavour)
        dtype = _file_dtype(self.compute_dtype if dtype is None else _one_of(dtype, _FILE_DTYPES))
        config = write_config(self.config.replace(dtype=dtype), FLAVOURS[flavour].dialect)
        codes = {name: "F32" if spec.float32 else FLOAT_CODES[dtype] for name, spec in table.disk.items()}
        state = self.state_dict()

        def produce(disk: str) -> Array:
            def read(name: str, expert: int | None) -> Array:
                if whole is not None:
                    array, kind = whole(name)
                    return cast(array if expert is None else array[expert], FLOAT_CODES[kind], codes[disk])
                tensor = state[name]
                # the clone: numpy() of a slice would first copy the whole stack of experts
                array = (tensor if expert is None else tensor[expert].clone()).numpy()
                return cast(array, _CODES[tensor.dtype], codes[disk])

            return table.to_disk(disk, read)

        return write_folder(
            Path(folder),
            {name: (spec.shape, codes[name]) for name, spec in table.disk.items()},
            produce,
            max_shard_bytes=max_shard_size,
            metadata={"format": "pt" if FLAVOURS[flavour].torch else "np", "layout": flavour},
            files={"config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"},
        )


def compute_dtype(dtype: str | None) -> str:
    """What was asked for, else what this machine computes in. ValueError for an unknown type."""
    if dtype is None:
        return "float32" if paddle.get_device() == "cpu" else "bfloat16"
    return _one_of(dtype, _COMPUTE_DTYPES)


def _one_of(dtype: str, known: tuple[str, ...]) -> str:
    if dtype not in known:
        raise ValueError(
            say(
                f"dtype ({dtype!r}) must be one of {list(known)}; choose one of them",
                f"类型（{dtype!r}）须为 {list(known)} 之一；请选一种",
            )
        )
    return dtype


def _file_dtype(dtype: str) -> str:
    return "float32" if dtype == "float64" else dtype


def _read_config_file(folder: Path) -> ModelConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            say(
                f"{folder} must hold config.json; give the folder of a whole model (an adapter folder is "
                "loaded on top of its base)",
                f"{folder} 中须有 config.json；请给出完整模型的文件夹（适配器须加载在其底座之上）",
            )
        )
    return config_in(file, read_json_object(file))


def check_tied_head(table: NameTable, reader: TensorReader) -> None:
    """A tied model has one matrix; a file that holds two different ones contradicts its config."""
    head = table.head_copy
    if head is None or head not in reader.entries:
        return
    embedding = table.links_to["embed_tokens.weight"][0].disk
    (a, kind), (b, other) = ((reader.read(name), reader.entries[name].dtype) for name in (embedding, head))
    if not _same(a, kind, b, other) and not _same(a, kind, b.T, other):
        raise ValueError(
            say(
                f"{head} must equal {embedding}, because tie_word_embeddings is true; set it to false in "
                f"config.json to keep both, or delete {head}",
                f"tie_word_embeddings 为 true，{head} 须与 {embedding} 相同；要保留两者请在 config.json "
                f"中设为 false，或删除 {head}",
            )
        )


def _same(a: Array, kind: str, b: Array, other: str) -> bool:
    """Whether two matrices of these element types hold the same numbers; compared piece by
    piece.
    """
    pieces = (slice(i, i + _COMPARED_ROWS) for i in range(0, len(a), _COMPARED_ROWS))
    return a.shape == b.shape and all(
        np.array_equal(cast(a[rows], kind, "F32"), cast(b[rows], other, "F32")) for rows in pieces
    )

"""A checkpoint of PaddleNLP or PaddleFormers that a run goes on from: weights or adapter, both
moments of Adam, and the step.

Read is what they call a unified checkpoint (safetensors with an index). Their other forms
(`optimizer.pdopt`, `.distcp` of flex checkpoints) are pickles, which run what they hold when they
are opened: they are refused. Where the rows stood is theirs alone: rows begin anew. Refuses to
know: how a run is made, several processes, what is sampled.

Source: paddleformers 1.2.0 and paddlenlp 3.0.0b4, trainer/unified_checkpoint
(load_save_single_card.py): "<parameter>/moment1_0", "<parameter>/beta1_pow_acc_0"; master weights
under the parameter's own name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from ernie_tune.checkpoint.names import detect_flavour, layout
from ernie_tune.checkpoint.optimizer_state import load_optimizer_arrays
from ernie_tune.checkpoint.state import OPTIMIZER, Checkpoint
from ernie_tune.checkpoint.tensors import TensorReader, cast
from ernie_tune.config.language import Text, say
from ernie_tune.machine.placed import Placed, Whole
from ernie_tune.peft.dialects import from_paddle
from ernie_tune.peft.model import PeftModel
from ernie_tune.train.loop import Loop

Array = np.ndarray[Any, Any]
INDEX, MASTER_INDEX = "optimizer.safetensors.index.json", "master_weights.safetensors.index.json"
_PICKLES = ("optimizer.pdopt", "optimizer_state", "optimizer.pdopt.index.json", "model_state")
MOMENTS, POWERS = ("moment1_0", "moment2_0"), ("beta1_pow_acc_0", "beta2_pow_acc_0")
_HALF = "fp32_master_0_"  # before the slots of a parameter that has a copy in float32


def is_neighbours(folder: Path) -> bool:
    """Whether a checkpoint is theirs, in whichever form."""
    return not (folder / OPTIMIZER).is_dir() and any((folder / name).exists() for name in (INDEX, *_PICKLES))


def resume(checkpoint: Checkpoint, policy: Placed, loop: Loop, rows_per_step: int) -> None:
    """Put their weights, moments and step into a run that has made no step. Raises ValueError for
    pickles, several processes, and tensors that are not those of this run.
    """
    folder = checkpoint.path
    _check(folder, policy, loop)
    policy.take(folder)
    reader, named = _Tensors(folder, INDEX), policy.trained()
    state: dict[str, Tensor] = {}
    for slot in MOMENTS:
        for name, value in _ours(policy, reader.of(slot), folder).items():
            if name in named:
                state[f"{name}/{_prefix(named[name])}{slot}"] = paddle.to_tensor(np.ascontiguousarray(value))
    short = sorted(name for name in named if f"{name}/{_prefix(named[name])}{MOMENTS[0]}" not in state)
    if short:
        raise ValueError(_differs(folder, short[0], len(short)))
    for slot in POWERS:
        powers = [float(value.reshape(-1)[0]) for value in reader.of(slot).values()]
        for name, parameter in named.items():
            state[f"{name}/{_prefix(parameter)}{slot}"] = paddle.to_tensor([max(powers)], dtype="float32")
    if any(_prefix(p) for p in named.values()):
        masters = _ours(policy, _Tensors(folder, MASTER_INDEX).of(""), folder)
        state |= {
            f"{n}/master": paddle.to_tensor(np.ascontiguousarray(masters[n])) for n, p in named.items() if _prefix(p)
        }
    load_optimizer_arrays(loop.optimizer, named, state)
    loop.load_state_dict({**loop.state_dict(), "step": checkpoint.step, "rows": checkpoint.step * rows_per_step})


def told(checkpoint: Checkpoint) -> Text:
    """What a user must know of such a start."""
    return say(
        f"{checkpoint.path} is of PaddleNLP or PaddleFormers: its weights, moments and step are taken; rows begin anew, "
        "and the learning rate is what these settings give at that step",
        f"{checkpoint.path} 来自 PaddleNLP 或 PaddleFormers：沿用其权重、动量与步数；数据从头读起，学习率按本设置在该步的值",
    )


def _check(folder: Path, policy: Placed, loop: Loop) -> None:
    if not (folder / INDEX).is_file():
        found = next(name for name in _PICKLES if (folder / name).exists())
        raise ValueError(
            say(
                f"{folder} must hold {INDEX} to resume: {found} is a pickle, which is not opened; save it there with "
                "unified_checkpoint: true (PaddleFormers: save_checkpoint_format: unified_checkpoint), or begin anew "
                f"from its weights: resume_only_model: true, resume_from_checkpoint: {folder} and another output_dir",
                f"{folder} 中须有 {INDEX} 才能继续：{found} 是 pickle 文件，不会打开；请在原工具中以 unified_checkpoint: true（PaddleFormers："
                "save_checkpoint_format: unified_checkpoint）保存，或以其权重重新开始：resume_only_model: true、"
                f"resume_from_checkpoint: {folder}，并换一个 output_dir",
            )
        )
    if policy.place.several:
        raise ValueError(
            say(
                f"{folder} is of PaddleNLP or PaddleFormers and must be resumed by one process; save a checkpoint so, "
                "then go on under any layout",
                f"{folder} 来自 PaddleNLP 或 PaddleFormers，须以单进程继续；先如此保存一个检查点，再换任意布局",
            )
        )


class _Tensors:
    """The tensors that one of their indices names."""

    def __init__(self, folder: Path, index: str) -> None:
        try:
            files = dict(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                say(
                    f"{folder / index} must be the index that a save wrote ({error!r}); copy the checkpoint again",
                    f"{folder / index} 须为保存时写出的索引（{error!r}）；请重新复制检查点",
                )
            ) from error
        readers = {name: TensorReader(folder / Path(name).name) for name in dict.fromkeys(map(str, files.values()))}
        self._held = {key: readers[name] for key, name in files.items()}

    def of(self, slot: str) -> dict[str, Array]:
        """Their parameter's name -> its value of a slot, float32; "": of files without slots."""
        ending = f"/{slot}" if slot else ""
        keys = [key for key in self._held if key.endswith(ending)]
        return {key[: len(key) - len(ending)]: self._read(key) for key in keys}

    def _read(self, key: str) -> Array:
        reader = self._held[key]
        if key not in reader.entries:
            raise ValueError(
                say(
                    f"{reader.path} must hold {key}, as its index says; copy the checkpoint again",
                    f"{reader.path} 中须有索引所述的 {key}；请重新复制检查点",
                )
            )
        return cast(reader.read(key), reader.entries[key].dtype, "F32")


def _ours(policy: Placed, theirs: Mapping[str, Array], folder: Path) -> dict[str, Array]:
    """Values under our parameters' names, as far as they have all of one."""
    model = policy.model
    if isinstance(model, PeftModel):
        return _of_adapter(model, theirs, folder)
    shapes = {name: value.shape for name, value in theirs.items()}
    table = layout(model.config, detect_flavour(shapes, model.config))
    out = {}
    for name, links in table.links_to.items():
        if all(shapes.get(link.disk) == table.disk[link.disk].shape for link in links):
            out[name] = table.to_canonical(name, theirs.__getitem__)
    return out


def _of_adapter(model: PeftModel, theirs: Mapping[str, Array], folder: Path) -> dict[str, Array]:
    found = from_paddle(dict(theirs), model.config)
    if len(found) != len(theirs):  # the A of a fused layer is one there, several here
        raise ValueError(
            say(
                f"{folder} must have an adapter on layers that are not fused to resume; begin anew from it: "
                f"resume_only_model: true, resume_from_checkpoint: {folder} and another output_dir",
                f"{folder} 的适配器位于融合层上，无法继续；请以它重新开始：resume_only_model: true、"
                f"resume_from_checkpoint: {folder}，并换一个 output_dir",
            )
        )
    parts: dict[str, list[Array]] = {}
    stacked = set()
    for key, (name, row) in Whole(model).adapter.items():
        if key not in found:
            raise ValueError(_differs(folder, key, 1))
        parts.setdefault(name, []).append(found[key])
        stacked |= {name} if row is not None else set()
    return {name: np.stack(some) if name in stacked else some[0] for name, some in parts.items()}


def _prefix(parameter: Tensor) -> str:
    return _HALF if parameter.dtype in (paddle.bfloat16, paddle.float16) else ""


def _differs(folder: Path, name: str, count: int) -> Text:
    return say(
        f"{folder} must hold the moments of what this run trains, but has none of {name}"
        f"{f' and {count - 1} more' if count > 1 else ''}; train the same parameters as the saved run",
        f"{folder} 中须有本次所训练参数的动量，但没有 {name}{f' 等 {count} 个' if count > 1 else ''}；请训练与保存时相同的参数",
    )

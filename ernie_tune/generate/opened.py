"""A folder -> the engine of the model in it: a checkpoint, a packed int8 or int4 export, or a
finished run with its adapter. On a CPU weights that do not fit are refused before they are read.

Refuses to know: a run's settings; the caller brings what builds its base model from them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import paddle

from ernie_tune.checkpoint.auto import AutoModel
from ernie_tune.config.host_memory import free_memory
from ernie_tune.config.language import say
from ernie_tune.config.loader import ARGS_FILE, load_config
from ernie_tune.data.processor import Processor
from ernie_tune.generate.engine import Engine
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.packed import load_packed
from ernie_tune.peft.packed_header import is_packed
from ernie_tune.plan.free import check_weights
from ernie_tune.plan.job import model_shape


def _folder_of(path: Path) -> Path:
    """The folder that a path means: itself, that of a finished run's settings, or the output_dir of
    a run's YAML file. Raises ValueError where there is none.
    """
    if not path.exists():
        raise ValueError(
            say(
                f"{path} does not exist; give the folder of a model or of a finished run",
                f"{path} 不存在；请给出模型文件夹，或已完成运行的输出目录",
            )
        )
    if path.is_dir() or path.name == ARGS_FILE:
        return path if path.is_dir() else path.parent
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise ValueError(
            say(
                f"{path} must be the folder of a model, or the folder or YAML file of a run; give one",
                f"{path} 须为模型文件夹，或训练的输出目录、YAML 文件；请改用这样的路径",
            )
        )
    folder = Path(load_config(path).config.save.output_dir)
    if not folder.is_dir():
        raise ValueError(
            say(
                f"{path} names output_dir ({folder}), which is not there; run `ernie-tune train {path}` first, or "
                "give the folder of a model",
                f"{path} 的 output_dir（{folder}）不存在；请先运行 `ernie-tune train {path}`，或给出模型文件夹",
            )
        )
    return folder


def open_engine(path: Path, base_of_run: Callable[[Path], ErnieModel]) -> Engine:
    """The model of a folder (packed int8 or int4 too) or of a finished run, with its adapter if it
    has one. Raises ValueError when there is none.

    `base_of_run`: the file with a run's settings -> the model under its adapter
    (`trainers.assemble.base_of_run`).
    """
    folder = _folder_of(path)
    processor = Processor.from_pretrained(folder)
    if is_packed(folder):
        return Engine(load_packed(folder), processor)
    if (folder / "config.json").is_file():
        if paddle.get_device() == "cpu":
            check_weights(model_shape(str(folder)), "none", free_memory())
        return Engine(AutoModel.from_pretrained(folder), processor)
    arguments = folder / ARGS_FILE
    if not arguments.is_file():
        raise ValueError(
            say(
                f"{folder} must hold a model (config.json) or a finished run ({ARGS_FILE}); give the folder of one",
                f"{folder} 中须有模型（config.json）或已完成的训练（{ARGS_FILE}）；请给出这样的文件夹",
            )
        )
    return Engine(PeftModel.from_pretrained(base_of_run(arguments), folder), processor)

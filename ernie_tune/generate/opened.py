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
from ernie_tune.config.loader import ARGS_FILE
from ernie_tune.data.processor import Processor
from ernie_tune.generate.engine import Engine
from ernie_tune.models.ernie import ErnieModel
from ernie_tune.peft.model import PeftModel
from ernie_tune.peft.packed import load_packed
from ernie_tune.peft.packed_header import is_packed
from ernie_tune.plan.free import check_weights
from ernie_tune.plan.job import model_shape


def open_engine(path: Path, base_of_run: Callable[[Path], ErnieModel]) -> Engine:
    """The model of a folder (packed int8 or int4 too) or of a finished run, with its adapter if it
    has one. Raises ValueError when there is none.

    `base_of_run`: the file with a run's settings -> the model under its adapter
    (`trainers.assemble.base_of_run`).
    """
    folder = path.parent if path.is_file() else path
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

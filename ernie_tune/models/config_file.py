"""`config.json` of a folder -> the shape of its model, in errors that name the file.

Refuses to know: dialects (config_dialects.py), weights, paddle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie_tune.config.foreign import reading
from ernie_tune.config.language import say
from ernie_tune.models.config import ModelConfig
from ernie_tune.models.config_dialects import read_config


def config_in(file: Path, settings: Mapping[str, Any]) -> ModelConfig:
    """The shape that the settings read from `file` describe. Raises ValueError that names the file,
    whatever is wrong with them.
    """
    try:
        with reading(file):
            return read_config(settings)
    except ValueError as error:
        if str(file) in str(error):
            raise
        raise ValueError(say("{file}: {why}", "{file}：{why}", file=file, why=error)) from error

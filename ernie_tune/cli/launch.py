"""`ernie_tune.launch(config)`: training from a notebook, in a child process, so that its memory is free again when it ends.

Refuses to know: what is trained; the child runs `python -m ernie_tune train`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.loader import dump_config
from ernie_tune.config.training_arguments import TrainingArguments


def launch(config: RunConfig | Mapping[str, Any] | str | Path, **settings: Any) -> Path:
    """Train in a child process and return the output folder. `config`: a YAML file, settings by name, or a resolved configuration; `settings` go over it.

    The child's lines are printed as they come. Raises RuntimeError with its last lines when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config, str | Path):
            file, overrides = Path(config), [f"{name}={_word(value)}" for name, value in settings.items()]
        else:
            resolved = config if isinstance(config, RunConfig) else TrainingArguments(**{**config, **settings})
            file, overrides = Path(folder) / "run.yaml", []
            file.write_text(dump_config(resolved), encoding="utf-8")
        command = [sys.executable, "-u", "-m", "ernie_tune", "train", str(file), *overrides]
        package = Path(__file__).parents[2]
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])}
        tail: list[str] = []
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ
        ) as child:
            for line in child.stdout or ():
                print(line, end="", flush=True)
                tail = [*tail[-19:], line]
        if child.returncode:
            raise RuntimeError(f"training ended with exit code {child.returncode}; its last lines:\n{''.join(tail)}")
        return _output_dir(file, overrides)


def _output_dir(file: Path, overrides: list[str]) -> Path:
    from ernie_tune.config.loader import load_config, split_overrides

    return Path(load_config(file, split_overrides(overrides)[1]).config.save.output_dir)


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else "null" if value is None else str(value)

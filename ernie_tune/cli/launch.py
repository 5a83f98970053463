"""`ernie_tune.launch(config)`: training from a notebook, in a child process, so that its memory is
free again when it ends.

Refuses to know: what is trained; the child runs `python -m ernie_tune train`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie_tune.config.arguments import RunConfig
from ernie_tune.config.language import say
from ernie_tune.config.loader import dump_config, load_config, split_overrides
from ernie_tune.config.training_arguments import TrainingArguments

TAIL_LINES = 20


def launch(config: RunConfig | Mapping[str, Any] | str | Path, **settings: Any) -> Path:
    """Train in a child process and return the output folder. `config`: a YAML file, settings by
    name, or a resolved configuration; `settings` go over it.

    The child's lines are printed as they come. Raises RuntimeError with its last lines when it
    fails. An interrupt of the notebook is passed on: the child finishes its step and saves, then
    KeyboardInterrupt goes on.
    """
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(config, str | Path):
            file = Path(config)
        else:
            resolved = config if isinstance(config, RunConfig) else TrainingArguments(**config)
            file = Path(folder) / "run.yaml"
            file.write_text(dump_config(resolved), encoding="utf-8")
        overrides = [f"{name}={_word(value)}" for name, value in settings.items()]
        output_dir = Path(load_config(file, split_overrides(overrides)[1]).config.save.output_dir)
        command = [sys.executable, "-u", "-m", "ernie_tune", "train", str(file), *overrides]
        code, tail = _run(command)
    if code:
        raise RuntimeError(
            say(
                f"training ended with exit code {code}; its last lines:\n{''.join(tail)}",
                f"训练以退出码 {code} 结束；最后的输出：\n{''.join(tail)}",
            )
        )
    return output_dir


def _run(command: list[str]) -> tuple[int, list[str]]:
    """(exit code, last lines) of a command whose lines are printed here as they come."""
    path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONIOENCODING": "utf-8"}
    tail: list[str] = []
    # In a session of its own an interrupt reaches it once, from here.
    child = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=environ,
        start_new_session=True,
    )
    with child:
        try:
            for line in child.stdout or ():
                print(line, end="", flush=True)
                tail = [*tail[-(TAIL_LINES - 1) :], line]
        except KeyboardInterrupt:
            child.send_signal(signal.SIGINT)
            print(child.communicate()[0], end="", flush=True)
            raise
    return child.returncode, tail


def _word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else "null" if value is None else str(value)

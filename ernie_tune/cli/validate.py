"""`ernie-tune validate`: what a YAML file means, and where each value comes from.

Refuses to know: paddle, whether model and data exist.
"""

from __future__ import annotations

from ernie_tune.cli.verbs import file_and_settings
from ernie_tune.config.loader import dump_config, load_config


def run(args: list[str]) -> int:
    """ernie-tune validate run.yaml [key=value | --key value …]

    Checks names, types, choices, ranges and combinations without loading paddle; prints every setting that has an
    effect with the place that set it. The output is itself a YAML file that repeats the run.
    """
    path, settings = file_and_settings(args)
    loaded = load_config(path, settings, for_training=True)
    for line in dump_config(loaded.config).splitlines():
        name = line.partition(":")[0]
        entry = loaded.sources.get(name)
        spelled = f" as {entry.name}" if entry and entry.name != name else ""
        print(f"{line:<50}  # {entry.where}{spelled}" if entry else line)
    for note in loaded.notes:
        print(f"# note: {note}")
    print(f"# {path} is valid / 配置有效")
    return 0
